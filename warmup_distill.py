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
teacher's splice goes on from the cache of its check (`decode.rewind`); a token's random number depends on its place alone
(`decode.uniform_noise`) and batches are cut from the prompts alone, so pairs are the same for any number of processes.
"""

import math
import time
from pathlib import Path

import torch

import common
import data
import decode
import dpo
import estimate
import explain
import models
import pairs
import report
import run_folder
import toy
import training
from common import UserError, check_range
from measure import closing_table
from run_folder import Run, turns

# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3: sample, check, splice
# ---------------------------------------------------------------------------------------------------------------------


def sample_responses(student, prompts, run):
    """Step 1. N responses for each of P prompts, rows prompt by prompt.

    Returns P*N lists of ids and P*N lists of log q(y_t | x, y_<t), the latter at temperature 1 and not truncated,
    whatever the samples were drawn with.
    """
    args, n = run.args, run.args.samples
    device = run.world.device
    rows = decode.prefill(student, [p["ids"] for p in prompts], run.pad_id, device)
    rows = decode.expand(rows, n)
    prompt_ids, sample_ids = sample_names(prompts, n, device)
    start = torch.zeros_like(prompt_ids)
    choose = decode.sampler(
        args.seed, decode.STUDENT_STAGE, prompt_ids, sample_ids, start, args.temperature, args.top_p
    )
    budget = torch.full_like(prompt_ids, args.max_new_tokens)
    return decode.decode(student, rows, choose, budget, run.eos_ids, run.vocab_size)


def check_responses(teacher, prompts, responses, run):
    """Step 2. log p(y_t | x, y_<t) of every response token from one teacher forward.

    Returns rows and hidden states to splice from, and (P*N, T) log-probs, 0 beyond a response's end.
    """
    rows = decode.prefill(teacher, [p["ids"] for p in prompts], run.pad_id, run.world.device)
    rows = decode.expand(rows, run.args.samples)
    return decode.score(teacher, rows, responses, run.vocab_size)


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


def continue_by_teacher(teacher, rows, hidden, positions, lengths, prompts, run):
    """The teacher writes on from each response's token `positions` (B,), where that is under the response's `lengths` (B,).

    rows, hidden: from `check_responses`; decoding goes on in that cache, nothing is prefilled again.
    Returns B lists of ids and B lists of log-probs, empty for rows it does not touch.
    """
    args, device = run.args, run.world.device
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
    any_rank = run.world.any if args.shard_teacher else None
    written = decode.decode(teacher, rows, choose, budget, run.eos_ids, run.vocab_size, any_rank)
    for row, ids, values in zip(chosen.tolist(), *written):
        tokens[row], logprobs[row] = ids, values
    return tokens, logprobs


def sample_names(prompts, n, device):
    """(P*N,) prompt ids and sample ids of the rows of P prompts with N samples each."""
    prompt_ids = torch.tensor([p["prompt_id"] for p in prompts], device=device).repeat_interleave(n)
    return prompt_ids, torch.arange(n, device=device).repeat(len(prompts))


def build_samples(student, teacher, prompts, run, keep):
    """Steps 1 to 3 for one micro-batch of prompts -> one record a sample, as OUT/pairs/NNNNN.jsonl holds it."""
    args, device = run.args, run.world.device
    with run.clock("sample") as clock:
        responses, student_logprobs = sample_responses(student, prompts, run)
        clock.tokens = sum(map(len, responses))
    with run.clock("check") as clock:
        rows, hidden, teacher_logprobs = check_responses(teacher, prompts, responses, run)
        width = teacher_logprobs.shape[1]
        lengths = torch.tensor([len(r) for r in responses], device=device)
        mask = torch.arange(width, device=device) < lengths[:, None]  # (B, T)
        padded = torch.tensor([values + [0.0] * (width - len(values)) for values in student_logprobs], device=device)
        t_star = first_mismatch(padded, teacher_logprobs, mask, args.eta)  # (B,)
        clock.tokens = sum(map(len, responses))
    with run.clock("splice") as clock:
        # The mismatched token itself is replaced, or (--replace after) kept. Without a mismatch all of y is kept
        positions = torch.where(t_star >= 0, t_star + int(args.replace == "after"), lengths)
        continuations, continuation_logprobs = continue_by_teacher(
            teacher, rows, hidden, positions, lengths, prompts, run
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
            "prompt": prompt["text"],
            "prompt_ids": prompt["ids"],
            "ended": response[-1] in run.eos_ids,
            "t_star": t,
            "prefix_len": position,
            "response_ids": response,
            "student_logprobs": rounded(student_logprobs[i]),
            "teacher_logprobs": rounded(teacher_values),
            "chosen_ids": splice(response, position, continuations[i]),
            "chosen_teacher_logprobs": rounded(teacher_values[:position] + continuation_logprobs[i]),
        }
        record["chosen_ended"] = record["chosen_ids"][-1] in run.eos_ids
        if t >= 0:
            record["status"] = pair_status(record, seen, prompt, run, keep)
        records.append(record)
    return records


def pair_status(record, seen, prompt, run, keep):
    """Whether a spliced sample becomes a pair, or why not; `seen` collects the pairs of the micro-batch."""
    key = (record["prompt_id"], tuple(record["chosen_ids"]), tuple(record["response_ids"]))
    if record["chosen_ids"] == record["response_ids"]:
        return "identical"  # the teacher drew what the student had written, or (--replace after) had nothing to add
    if key in seen:
        return "duplicate"
    seen.add(key)
    return "kept" if keep(record, prompt, run) else "filtered"


def rounded(values):
    """Log-probs as they are written to files: 1e-4 nats is far under any threshold, and shorter."""
    return [round(value, 4) for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3 over all prompts and ranks
# ---------------------------------------------------------------------------------------------------------------------


def build_pairs(run, batches):
    """Runs steps 1 to 3 over all prompts, a `data.PromptBatches`; a micro-batch whose file is there is done."""
    args, world, models_loaded = run.args, run.world, None
    for k, file, mine in turns(run.out / "pairs", len(batches), "jsonl", world, args.shard_teacher, "batch"):
        if models_loaded is None:
            models_loaded = run.load(args.student), run.teacher, pairs.pair_filter(args, world)
        student, teacher, keep = models_loaded
        prompts = batches[k]
        fitting = [prompt for prompt in prompts if batches.fits(prompt)]
        records = build_samples(student, teacher, fitting, run, keep) if fitting else []
        if args.shard_teacher and not fitting:  # its forwards need every rank: the start of a prompt goes along
            stand_in = prompts[0] | {"ids": prompts[0]["ids"][: args.max_prompt_tokens]}
            build_samples(student, teacher, [stand_in], run, keep)
        for prompt in prompts:
            if not batches.fits(prompt):
                length = {"prompt": prompt["text"], "prompt_tokens": len(prompt["ids"])}
                records.append({"prompt_id": prompt["prompt_id"], "status": "too_long", **length})
        records.sort(key=lambda record: record["prompt_id"])  # stable: a prompt's samples stay in order
        if mine:
            common.write_jsonl(file, records)
        if world.rank == 0:
            run.save_clocks()
    run.drop_teacher()


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--teacher", help="folder or hub id; without teacher, student and data: the toy of toy.py")
    parser.add_argument("--student", help="folder or hub id, same tokenizer as the teacher")
    parser.add_argument("--out", default="out/warmup", help="folder of the run; the warmed-up student is OUT/student")
    parser.add_argument(
        "--explain",
        type=int,
        nargs="+",
        metavar=("PROMPT_ID", "SAMPLE_ID"),
        help="walk one prompt of the run in --out through all steps, in the terminal, and end",
    )
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
    rules = {
        "of 1 or more": (lambda x: x >= 1, ["samples", "max_new_tokens", "prompts_per_batch"]),
        "in nats, such as 4": (math.isfinite, ["eta"]),
        "above 0": (lambda x: 0 < x < math.inf, ["temperature"]),
        "in (0, 1]": (lambda x: 0 < x <= 1, ["top_p"]),
        "of 0 or more": (lambda x: x >= 0, ["limit", "eval_limit"]),
        "of one or two numbers": (lambda x: x is None or len(x) <= 2, ["explain"]),
    }
    common.check_ranges(args, rules)
    known = args.keep in ("all", "teacher", "correct") or (args.keep.startswith("reward:") and args.keep != "reward:")
    check_range("--keep", args.keep, known, "of all, teacher, correct or reward:MODEL")
    return dpo.check_args(args)


def load_prompts(args, tokenizer):
    """(micro-batches of --data's prompts, the closing table's prompts)."""
    examples = data.read_examples(args)
    if args.keep == "correct" and any(e["response"] is None for e in examples):
        raise UserError("--keep correct needs gold responses", f"in {args.data}", "name them with --response-column")
    return data.PromptBatches(examples, tokenizer, args), data.load_eval_prompts(args, tokenizer, examples)


def main(argv=None):
    started = time.perf_counter()
    args = parse_args(argv)
    if args.dry_run is not None:
        return estimate.dry_run(args)
    world = common.start_processes(args.device, args.threads)
    if args.explain is not None:
        if world.rank == 0:
            explain.explain(args, Path(args.out), *args.explain)
        return
    training.accumulation_steps(args, world)  # its error belongs before the work
    if args.toy:
        toy.fill_in(args, world)
    tokenizer, eos_ids = models.shared_tokenizer(args.student, args.teacher, args.trust_remote_code)
    note = models.fit_into_context(args)
    batches, eval_prompts = load_prompts(args, tokenizer)
    # Behind all that can be wrong with the arguments: OUT then is theirs
    out = run_folder.start_run(args.out, args, [args.student, args.teacher, args.data])
    run = Run(args, world, tokenizer, eos_ids, out)
    if note and world.rank == 0:
        print(note)

    # Steps 1 to 3
    common.STATUS.enter("pairs")
    build_pairs(run, batches)
    world.barrier()
    if world.rank == 0:
        found = pairs.merge_pairs(run, batches, out)
        print(f"{found['pairs']} pairs of {found['samples']} samples, {found['untouched']} untouched")
        print("".join(f"warning: {line}\n" for line in found["warnings"]), end="")
    world.barrier()

    # Step 4
    common.STATUS.enter("dpo, reference")
    preferences = pairs.read_pairs(out / "pairs.jsonl", tokenizer)
    reference = args.student if args.reference == "student" else args.teacher
    if not preferences and world.rank == 0:
        print("warning: no pair came out, so there is nothing to learn: OUT/student is the student unchanged")
    dpo.train(args, world, tokenizer, preferences, args.student, reference, out)

    if args.eval_limit:
        common.STATUS.enter("closing table")
        students = {"student before": args.student, "student after": out / "student"}
        # A sharded teacher is one that fits on no single device: the table does without it
        teacher = None if args.shard_teacher else lambda: run.teacher
        # As many rows as in sampling, but 8 batches or more for the ranks; their number itself must change no batch
        size = min(args.prompts_per_batch * args.samples, math.ceil(len(eval_prompts) / 8))
        closing_table(run, students, teacher, eval_prompts, size, args.eta)
    if world.rank == 0:
        run.print_speed()
        print(f"the run as a page: {report.write_report(out, tokenizer=tokenizer)}")
        print(f"{time.perf_counter() - started:.0f} seconds after start-up; the warmed-up student is {out / 'student'}")


if __name__ == "__main__":
    common.run(main)
