"""Warmup-Distill (arXiv 2502.11766): close the gap between student and teacher before knowledge distillation.

    torchrun --nproc_per_node 8 warmup_distill.py                                   the embedded default (toy.py)
    torchrun --nproc_per_node 8 warmup_distill.py --teacher T --student S --data D  real models
    python warmup_distill.py                                                        one process, the same

The steps, in the order of this file; q is the student, p the teacher, x a prompt, y a response, t a position in it:

    1. sample   N responses a prompt from the student, with log q(y_t | x, y_<t) of every token
    2. check    one teacher forward: log p(y_t | x, y_<t);  t* = min { t : log q - log p > eta }
    3. splice   keep the student's y_<t*; the teacher samples on from position t*:  y+ = spliced, y- = the student's own
    4. align    DPO on the pairs (dpo.py), reference = the initial student  ->  OUT/student, the warmed-up student
    5. distil   ordinary KD from there: kd.py --student OUT/student

Everything stays in token ids from sampling to loss: decoding to text and tokenizing again would move the splice point.
Where the paper is silent, the README's ledger names our reading and the flag that changes it. Ours, and exact: the
teacher's splice goes on from the cache of its check (`decode.rewind`), and no sample depends on its batch or rank
(`decode.uniform_noise`), so pairs are the same for any number of processes.
"""

import argparse
import contextlib
import json
import math
import time

import torch
from tqdm import tqdm

import common
import data
import decode
import dpo
import eval
import models
import pairs
import toy
import training
from common import UserError, check_range


class Context:
    """What steps 1 to 3 need beside models and prompts."""

    def __init__(self, args, world, tokenizer, eos_ids):
        self.args, self.world, self.tokenizer, self.eos_ids = args, world, tokenizer, eos_ids
        self.vocab_size, self.pad_id = len(tokenizer), tokenizer.pad_token_id
        self.clocks = {}  # stage -> tokens and seconds on this rank

    @contextlib.contextmanager
    def clock(self, stage):
        """Adds the time inside, and the `tokens` that are set on the yielded object, to `clocks[stage]`."""
        lap, started = argparse.Namespace(tokens=0), time.perf_counter()
        yield lap
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        tokens, seconds = self.clocks.get(stage, (0, 0.0))
        self.clocks[stage] = (tokens + lap.tokens, seconds + time.perf_counter() - started)

    def decode_text(self, ids):
        """Ids of a response -> text for readers and answer checkers, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3: sample, check, splice
# ---------------------------------------------------------------------------------------------------------------------


def sample_responses(student, prompts, context):
    """Step 1. N responses for each of P prompts, rows prompt by prompt.

    Returns P*N lists of ids and P*N lists of log q(y_t | x, y_<t), the latter at temperature 1 and not truncated,
    whatever the samples were drawn with.
    """
    args, n = context.args, context.args.samples
    device = context.world.device
    rows = decode.prefill(student, [p["ids"] for p in prompts], context.pad_id, device)
    rows = decode.expand(rows, n)
    prompt_ids, sample_ids = sample_names(prompts, n, device)
    start = torch.zeros_like(prompt_ids)
    choose = decode.sampler(
        args.seed, decode.STUDENT_STAGE, prompt_ids, sample_ids, start, args.temperature, args.top_p
    )
    budget = torch.full_like(prompt_ids, args.max_new_tokens)
    return decode.decode(student, rows, choose, budget, context.eos_ids, context.vocab_size)


def check_responses(teacher, prompts, responses, context):
    """Step 2. log p(y_t | x, y_<t) of every response token from one teacher forward.

    Returns rows and hidden states to splice from, and (P*N, T) log-probs, 0 beyond a response's end.
    """
    rows = decode.prefill(teacher, [p["ids"] for p in prompts], context.pad_id, context.world.device)
    rows = decode.expand(rows, context.args.samples)
    return decode.score(teacher, rows, responses, context.vocab_size)


def first_mismatch(student_logprobs, teacher_logprobs, mask, eta):
    """t* = min { t : log q(y_t | x, y_<t) - log p(y_t | x, y_<t) > eta }, the paper's mismatch condition, in nats.

    student_logprobs, teacher_logprobs: (B, T). mask: (B, T) bool, true on a response's tokens, its EOS included.
    Returns (B,) int64, -1 where no token's margin is above eta.
    """
    margin = student_logprobs - teacher_logprobs  # (B, T)
    mismatch = (margin > eta) & mask
    return torch.where(mismatch.any(-1), mismatch.int().argmax(-1), -1)


def splice(response, position, continuation):
    """Step 3. y+ = y_<position + the teacher's continuation; all are lists of ids."""
    return response[:position] + continuation


def continue_by_teacher(teacher, rows, hidden, positions, lengths, prompts, context):
    """The teacher writes on from each response's token `positions` (B,), where that is under the response's `lengths` (B,).

    rows, hidden: from `check_responses`; decoding goes on in that cache, nothing is prefilled again.
    Returns B lists of ids and B lists of log-probs, empty for rows it does not touch.
    """
    args, device = context.args, context.world.device
    chosen = (positions < lengths).nonzero()[:, 0]
    tokens, logprobs = [[] for _ in lengths], [[] for _ in lengths]
    if args.shard_teacher and len(chosen) == 0:  # its forwards need every rank: row 0 goes along and writes nothing
        chosen = torch.zeros(1, dtype=torch.long, device=device)
    if len(chosen) == 0:
        return tokens, logprobs
    start, room = positions[chosen], args.max_new_tokens - positions[chosen]
    budget = torch.where(start < lengths[chosen], room, 0)
    prompt_ids, sample_ids = (names[chosen] for names in sample_names(prompts, args.samples, device))
    rows = decode.rewind(rows.select(chosen), start, hidden[chosen])
    choose = decode.greedy
    if args.teacher_decoding == "sample":
        choose = decode.sampler(
            args.seed, decode.TEACHER_STAGE, prompt_ids, sample_ids, start, args.temperature, args.top_p
        )
    any_rank = context.world.any if args.shard_teacher else bool
    written = decode.decode(teacher, rows, choose, budget, context.eos_ids, context.vocab_size, any_rank)
    for row, ids, values in zip(chosen.tolist(), *written):
        tokens[row], logprobs[row] = ids, values
    return tokens, logprobs


def sample_names(prompts, n, device):
    """(P*N,) prompt ids and sample ids of the rows of P prompts with N samples each."""
    prompt_ids = torch.tensor([p["prompt_id"] for p in prompts], device=device).repeat_interleave(n)
    return prompt_ids, torch.arange(n, device=device).repeat(len(prompts))


def build_samples(student, teacher, prompts, context, keep):
    """Steps 1 to 3 for one micro-batch of prompts -> one record a sample, as OUT/pairs/NNNNN.jsonl holds it."""
    args, device = context.args, context.world.device
    with context.clock("sample") as clock:
        responses, student_logprobs = sample_responses(student, prompts, context)
        clock.tokens = sum(map(len, responses))
    with context.clock("check") as clock:
        rows, hidden, teacher_logprobs = check_responses(teacher, prompts, responses, context)
        width = teacher_logprobs.shape[1]
        lengths = torch.tensor([len(r) for r in responses], device=device)
        mask = torch.arange(width, device=device) < lengths[:, None]  # (B, T)
        padded = torch.tensor([values + [0.0] * (width - len(values)) for values in student_logprobs], device=device)
        t_star = first_mismatch(padded, teacher_logprobs, mask, args.eta)  # (B,)
        clock.tokens = sum(map(len, responses))
    with context.clock("splice") as clock:
        # The mismatched token itself is replaced, or (--replace after) kept. Without a mismatch all of y is kept
        positions = torch.where(t_star >= 0, t_star + int(args.replace == "after"), lengths)
        continuations, continuation_logprobs = continue_by_teacher(
            teacher, rows, hidden, positions, lengths, prompts, context
        )
        clock.tokens = sum(map(len, continuations))

    records, seen = [], set()
    columns = zip(responses, t_star.tolist(), positions.tolist(), teacher_logprobs.tolist())
    for i, (response, t, position, teacher_values) in enumerate(columns):
        prompt, teacher_values = prompts[i // args.samples], teacher_values[: len(response)]
        record = {
            "prompt_id": prompt["prompt_id"],
            "sample_id": i % args.samples,
            "status": "untouched",
            "ended": response[-1] in context.eos_ids,
            "t_star": t,
            "prefix_len": position,
            "response_ids": response,
            "student_logprobs": rounded(student_logprobs[i]),
            "teacher_logprobs": rounded(teacher_values),
            "chosen_ids": splice(response, position, continuations[i]),
            "chosen_teacher_logprobs": rounded(teacher_values[:position] + continuation_logprobs[i]),
        }
        record["chosen_ended"] = record["chosen_ids"][-1] in context.eos_ids
        if t >= 0:
            record["status"] = pair_status(record, seen, prompt, context, keep)
        records.append(record)
    return records


def pair_status(record, seen, prompt, context, keep):
    """Whether a spliced sample becomes a pair, or why not; `seen` collects the pairs of the micro-batch."""
    key = (record["prompt_id"], tuple(record["chosen_ids"]), tuple(record["response_ids"]))
    if record["chosen_ids"] == record["response_ids"]:
        return "identical"  # the teacher drew what the student had written, or (--replace after) had nothing to add
    if key in seen:
        return "duplicate"
    seen.add(key)
    return "kept" if keep(record, prompt, context) else "filtered"


def rounded(values):
    """Log-probs as they are written to files: 1e-4 nats is far under any threshold, and shorter."""
    return [round(value, 4) for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3 over all prompts and ranks
# ---------------------------------------------------------------------------------------------------------------------


def build_pairs(args, world, context, prompts, out):
    """Runs steps 1 to 3 over all prompts; a micro-batch whose file is there is done.

    Micro-batches are formed from the order of the prompts, never from the number of ranks.
    """
    folder = out / "pairs"
    if world.rank == 0:
        folder.mkdir(exist_ok=True)
    world.barrier()
    batches = [prompts[k : k + args.prompts_per_batch] for k in range(0, len(prompts), args.prompts_per_batch)]
    missing = [k for k in range(len(batches)) if not (folder / f"{k:05d}.jsonl").exists()]
    world.barrier()  # every rank has looked before the first one writes
    if not missing:
        return
    dtype = models.compute_dtype(args.dtype, world)
    keep = pairs.pair_filter(args, world)
    student = models.load_model(args.student, dtype, world.device, args.trust_remote_code)
    teacher_device = "cpu" if args.shard_teacher else world.device
    teacher = models.load_model(args.teacher, dtype, teacher_device, args.trust_remote_code)
    models.check_vocabulary(student, context.tokenizer, args.student)
    models.check_vocabulary(teacher, context.tokenizer, args.teacher)
    if args.shard_teacher:
        teacher = training.shard_blocks(teacher, world)
    bar = tqdm(total=len(missing) * args.prompts_per_batch, desc="pairs", unit="prompt", disable=world.rank > 0)
    for first in range(0, len(missing), world.size):
        turn = missing[first : first + world.size]
        idle = world.rank >= len(turn)
        if idle and not args.shard_teacher:
            break
        k = turn[0] if idle else turn[world.rank]  # a sharded teacher needs an idle rank along; its work is dropped
        records = build_samples(student, teacher, batches[k], context, keep)
        if not idle:
            common.write_jsonl(folder / f"{k:05d}.jsonl", records)
        bar.update(len(turn) * args.prompts_per_batch)
    bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--teacher", help="folder or hub id; without teacher, student and data: the toy of toy.py")
    parser.add_argument("--student", help="folder or hub id, same tokenizer as the teacher")
    parser.add_argument("--out", default="out/warmup", help="folder of the run; the warmed-up student is OUT/student")
    common.add_arguments(parser)
    data.add_arguments(parser)
    group = parser.add_argument_group("sample, check, splice")
    group.add_argument("--samples", type=int, default=8, help="N, responses a prompt; 8 in the paper")
    group.add_argument(
        "--eta", type=float, default=4.0, help="threshold of the margin log q - log p, nats; 4 in the paper"
    )
    group.add_argument("--temperature", type=float, default=1.0, help="of the student's and the teacher's sampling")
    group.add_argument("--top-p", type=float, default=1.0, help="of both; margins use the full distribution regardless")
    group.add_argument("--max-new-tokens", type=int, default=256, help="longest response, before and after the splice")
    group.add_argument(
        "--replace", choices=["at", "after"], default="at", help="the teacher writes from t* on, or from behind it"
    )
    group.add_argument(
        "--teacher-decoding", choices=["sample", "greedy"], default="sample", help="how the teacher writes"
    )
    group.add_argument("--keep", default="all", help="which pairs: all, teacher, correct, or reward:MODEL (see README)")
    group.add_argument("--prompts-per-batch", type=int, default=8, help="prompts in one micro-batch of sampling")
    group.add_argument(
        "--shard-teacher", action="store_true", help="spread a teacher that does not fit; slow to decode"
    )
    group.add_argument("--reference", choices=["student", "teacher"], default="student", help="pi_ref of DPO")
    dpo.add_arguments(parser)
    training.add_training_arguments(parser, lr=5e-7)
    group = parser.add_argument_group("closing table")
    data.add_eval_arguments(group, "the training prompts, and the table says so")
    group.add_argument("--eval-limit", type=int, default=64, help="prompts in the table; 0: no table")
    args = parser.parse_args(argv)
    args.toy = args.teacher is None and args.student is None and args.data is None
    if args.toy:  # the same flags with the toy's own defaults
        parser.set_defaults(**toy.WARMUP, toy=True)
        args = parser.parse_args(argv)
    return check_args(args)


def check_args(args):
    """Raises UserError for values that make no sense."""
    if not args.toy and not (args.teacher and args.student and args.data):
        missing = [flag for flag in ("teacher", "student", "data") if not getattr(args, flag)]
        raise UserError(f"--{missing[0]} is missing", "on the command line", "give all three, or none for the toy")
    check_range("--samples", args.samples, args.samples >= 1, "of 1 or more")
    check_range("--eta", args.eta, math.isfinite(args.eta), "in nats, such as 4")
    check_range("--temperature", args.temperature, 0 < args.temperature < math.inf, "above 0")
    check_range("--top-p", args.top_p, 0 < args.top_p <= 1, "in (0, 1]")
    check_range("--max-new-tokens", args.max_new_tokens, args.max_new_tokens >= 1, "of 1 or more")
    check_range("--prompts-per-batch", args.prompts_per_batch, args.prompts_per_batch >= 1, "of 1 or more")
    check_range("--limit", args.limit, args.limit >= 0, "of 0 or more")
    check_range("--eval-limit", args.eval_limit, args.eval_limit >= 0, "of 0 or more")
    known = args.keep in ("all", "teacher", "correct") or (args.keep.startswith("reward:") and args.keep != "reward:")
    check_range("--keep", args.keep, known, "of all, teacher, correct or reward:MODEL")
    return dpo.check_args(args)


def load_prompts(args, tokenizer):
    """(prompts, how many were too long) of --data."""
    examples = data.read_examples(args)
    if args.keep == "correct" and any(e["response"] is None for e in examples):
        raise UserError("--keep correct needs gold responses", f"in {args.data}", "name them with --response-column")
    return data.encode_prompts(examples, tokenizer, args.template, args.max_prompt_tokens)


def closing_table(args, world, context, prompts, out):
    """Prints teacher, student before and student after side by side; writes OUT/summary.json."""
    with_answers = all(p["gold"] is not None and eval.final_number(p["gold"]) is not None for p in prompts)
    dtype = models.compute_dtype(args.dtype, world)
    load = lambda path: models.load_model(path, dtype, world.device, args.trust_remote_code)
    shared = (context.tokenizer, context.eos_ids, args.max_new_tokens, args.prompts_per_batch * args.samples)
    # A sharded teacher is one that fits on no single device: the table does without it
    teacher, summary = None if args.shard_teacher else load(args.teacher), {}
    for name, path in (("teacher", None), ("student before", args.student), ("student after", out / "student")):
        model, row = teacher if path is None else load(path), {}
        if with_answers and model is not None:
            row["accuracy"] = eval.greedy_accuracy(model, prompts, *shared, world)
        if path is not None and teacher is not None:
            row.update(eval.distance(model, teacher, prompts, *shared, args.eta, args.seed, world))
        summary[name] = row
    if world.rank > 0:
        return
    mismatch = common.read_json(out / "mismatch.json")
    summary["stages"] = {stage: tokens / seconds for stage, (tokens, seconds) in context.clocks.items() if tokens}
    steps = common.read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    if steps:
        summary["stages"]["dpo"] = sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps)
    common.write_atomic(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    where = "held-out prompts" if args.eval_data is not None else "training prompts"
    columns = ("accuracy", "replaced_samples", "replaced_tokens", "kl_teacher_student", "kl_student_teacher")
    titles = ("accuracy", "samples > eta", "tokens > eta", "KL(p,q)", "KL(q,p)")
    print(f"\n{len(prompts)} {where}, eta {args.eta}\n{'':16}" + "".join(f"{title:>15}" for title in titles))
    for name in ("teacher", "student before", "student after"):
        cells = (f"{summary[name][c]:.4f}" if c in summary[name] else "-" for c in columns)
        print(f"{name:16}" + "".join(f"{cell:>15}" for cell in cells))
    print(f"\n{mismatch['pairs']} pairs of {mismatch['samples']} samples, {mismatch['untouched']} untouched")
    for stage, rate in summary["stages"].items():
        print(f"{stage:8} {rate:10.0f} tokens/s")


def main(argv=None):
    started = time.perf_counter()
    args = parse_args(argv)
    world = common.start_processes(args.device, args.threads)
    training.accumulation_steps(args, world)  # its error belongs before the work
    if args.toy:
        if world.rank == 0:
            toy.build("out/toy", args.seed)
        world.barrier()
        args.teacher, args.student, args.data = (f"out/toy/{name}" for name in ("teacher", "student", "train.jsonl"))
        args.eval_data = args.eval_data or "out/toy/dev.jsonl"
    tokenizer = models.load_tokenizer(args.student, args.trust_remote_code)
    teacher_tokenizer = models.load_tokenizer(args.teacher, args.trust_remote_code)
    models.check_same_tokenizer(tokenizer, teacher_tokenizer, args.student, args.teacher)
    eos_ids = models.model_eos_ids([args.student, args.teacher], tokenizer, args.trust_remote_code)
    prompts, skipped = load_prompts(args, tokenizer)
    eval_prompts = data.load_eval_prompts(args, tokenizer, prompts)
    out = common.start_run(args.out, args)  # behind all that can be wrong with the arguments: OUT then is theirs
    context = Context(args, world, tokenizer, eos_ids)

    # Steps 1 to 3
    build_pairs(args, world, context, prompts, out)
    world.barrier()
    if world.rank == 0:
        pairs.merge_pairs(args, context, prompts, skipped, out)
    world.barrier()

    # Step 4
    preferences = pairs.read_pairs(out / "pairs.jsonl", tokenizer)
    reference = args.student if args.reference == "student" else args.teacher
    if not preferences and world.rank == 0:
        print("warning: no pair came out, so there is nothing to learn: OUT/student is the student unchanged")
    dpo.train(args, world, tokenizer, preferences, args.student, reference, out)

    if args.eval_limit:
        closing_table(args, world, context, eval_prompts, out)
    if world.rank == 0:
        print(f"{time.perf_counter() - started:.0f} seconds after start-up; the warmed-up student is {out / 'student'}")


if __name__ == "__main__":
    common.run(main)
