"""Warmup-Distill (arXiv 2502.11766): close the gap between student and teacher before knowledge distillation.

    torchrun --nproc_per_node 8 warmup_distill.py                                   the embedded default, in toy/
    torchrun --nproc_per_node 8 warmup_distill.py --teacher T --student S --data D  real models
    python warmup_distill.py                                                        one process, the same

The steps, in the order of this file; q is the student, p the teacher, x a prompt, y a response, t a position in it:

    1. sample   N responses a prompt from the student, with log q(y_t | x, y_<t) of every token
    2. check    one teacher forward: log p(y_t | x, y_<t);  t* = min { t : log q - log p > eta }
    3. splice   keep the student's y_<t*; the teacher samples from position t* on:  y+ = spliced, y- = the student's own
    4. align    DPO on the pairs (dpo.py), reference = the initial student  ->  OUT/student, the warmed-up student
    5. distil   ordinary KD from there: kd.py --student OUT/student

EOS is a token like any other: a student that ends too early has its mismatch there. A response that is cut at the limit
has no EOS to check.
Everything stays in token ids from sampling to loss: decoding to text and tokenizing again would move the splice point.
Where the paper is silent, the README's ledger names our reading and the flag that changes it. Ours, and exact: the
teacher's splice continues in the cache of its check (`decode.rewind`); a token's random number depends on its place
alone (`decode.uniform_noise`) and batches are cut from the prompts alone, so pairs are the same for any number of
processes.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch

import dpo
from lib import data, decode, measure, models, runs, scoring, training
from lib.runs import UserError

# The defaults of the toy, by the names of their flags. One thread: a second one makes models of this size slower
TOY = {"limit": 250, "max_prompt_tokens": 16, "max_new_tokens": 48, "prompts_per_batch": 25, "beta": 0.5}
TOY |= {"nll_weight": 1.0, "lr": 5e-4, "max_steps": 60, "batch_size": 32, "micro_batch_size": 32}
TOY |= {"dtype": "float32", "threads": 1, "eval_limit": 500}
ETA_GRID = [0.5 * k for k in range(1, 21)]  # mismatch.json gives the replacement rate for these
MARGIN_BINS = [-10.0 + 0.5 * k for k in range(61)]  # nats, -10 .. 20; the outermost bins are open

# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3: sample, check, splice. P prompts with N samples each make B = P*N rows, prompt by prompt
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How the student's samples and the teacher's continuations are drawn."""

    samples: int = 8  # N, responses a prompt
    max_new_tokens: int = 256  # longest response, before and after the splice
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def choose(self, stage, prompt_ids, start):
        """A `choose` for `decode.decode`. prompt_ids: P numbers. start: (B,) the position of each row's next token."""
        prompt_ids = torch.tensor(prompt_ids, device=start.device).repeat_interleave(self.samples)  # (B,)
        sample_ids = torch.arange(self.samples, device=start.device).repeat(len(prompt_ids) // self.samples)
        return decode.sampler(self.seed, stage, prompt_ids, sample_ids, start, self.temperature, self.top_p)


def sample_responses(student, prompts, prompt_ids, tokens, sampling):
    """Step 1. N responses for each of P prompts.

    prompts: P lists of ids. prompt_ids: P numbers that name the prompts to the random numbers. tokens: `decode.Tokens`.
    Returns B lists of ids, and log q(y_t | x, y_<t) (B, T), at temperature 1 and not truncated, whatever the samples
    were drawn with; 0 after a response's end.
    """
    rows = decode.expand(decode.prefill(student, prompts, tokens), sampling.samples)
    start = torch.zeros_like(rows.next_position)
    choose = sampling.choose(decode.STUDENT_STAGE, prompt_ids, start)
    return decode.decode(student, rows, choose, start + sampling.max_new_tokens, tokens)


def check_responses(teacher, prompts, responses, tokens):
    """Step 2. log p(y_t | x, y_<t) of every response token, from one teacher forward.

    Returns rows and hidden (B, T + 1, D), to splice from; log p (B, T); mask (B, T), true on the responses' tokens.
    """
    rows = decode.expand(decode.prefill(teacher, prompts, tokens), len(responses) // len(prompts))
    rows, hidden, log_p = decode.score(teacher, rows, responses, tokens)
    return rows, hidden, log_p, rows.visible[:, -log_p.shape[1] :]


def first_mismatch(student_logprobs, teacher_logprobs, mask, eta):
    """t* = min { t : log q(y_t | x, y_<t) - log p(y_t | x, y_<t) > eta }, the paper's mismatch condition, in nats.

    student_logprobs, teacher_logprobs: (B, T). mask: (B, T) bool, true on a response's tokens, its EOS included.
    Returns (B,) int64, -1 where there is no mismatch. To try another rule, change this function alone.
    """
    margin = student_logprobs - teacher_logprobs  # (B, T)
    mismatch = (margin > eta) & mask
    return torch.where(mismatch.any(-1), mismatch.int().argmax(-1), -1)


def splice(response, position, continuation):
    """Step 3. y+ = y_<position + the teacher's continuation; all are lists of ids."""
    return response[:position] + continuation


def continue_by_teacher(
    teacher, rows, hidden, positions, lengths, prompt_ids, tokens, sampling, greedy=False, any_rank=None
):
    """Step 3. The teacher writes from each response's token `positions` (B,) on, where that is below `lengths` (B,).

    rows, hidden: from `check_responses`; decoding continues in that cache, which is used up: nothing is prefilled again.
    any_rank: of a sharded teacher, `World.any`. Returns B lists of ids and B lists of log-probs, empty for rows that it leaves alone.
    """
    chosen = ((positions >= 0) & (positions < lengths)).nonzero()[:, 0]
    if any_rank and len(chosen) == 0:  # its forwards need every rank: row 0 takes part and writes nothing
        chosen = torch.zeros_like(positions[:1])
    continuations, logprobs = [[] for _ in lengths], [[] for _ in lengths]
    if len(chosen) == 0:
        return continuations, logprobs
    choose = decode.greedy
    if not greedy:
        choose_of_all = sampling.choose(decode.TEACHER_STAGE, prompt_ids, positions)
        choose = lambda logits, indices, step: choose_of_all(logits, chosen[indices], step)
    budget = torch.where(positions < lengths, sampling.max_new_tokens - positions, 0)
    rewound = decode.rewind(rows.select(chosen), positions[chosen], hidden[chosen])
    written, values = decode.decode(teacher, rewound, choose, budget[chosen], tokens, any_rank)
    measure.check_finite(values, [prompt_ids[row // sampling.samples] for row in chosen.tolist()])
    for row, ids, log_p in zip(chosen.tolist(), written, values.tolist()):
        continuations[row], logprobs[row] = ids, log_p[: len(ids)]
    return continuations, logprobs


def build_samples(
    student, teacher, prompts, prompt_ids, tokens, sampling, eta, replace="at", greedy=False, any_rank=None
):
    """Steps 1 to 3 for one micro-batch of prompts -> one dict a sample, as OUT/pairs/NNNNN.jsonl has it.

    replace: "at", the teacher writes from t* on; "after", the mismatched token is kept.
    """
    responses, log_q = sample_responses(student, prompts, prompt_ids, tokens, sampling)
    rows, hidden, log_p, mask = check_responses(teacher, prompts, responses, tokens)
    measure.check_finite(log_q + log_p, [prompt_id for prompt_id in prompt_ids for _ in range(sampling.samples)])
    t_star = first_mismatch(log_q, log_p, mask, eta)  # (B,)
    lengths = mask.sum(-1)
    positions = torch.where(t_star >= 0, t_star + int(replace == "after"), lengths)  # without a mismatch y is kept
    settings = (prompt_ids, tokens, sampling, greedy, any_rank)
    continuations, continuation_log_p = continue_by_teacher(teacher, rows, hidden, positions, lengths, *settings)
    rounded = lambda values: [round(value, 4) for value in values]  # 1e-4 nats is far below any threshold
    samples = []
    columns = zip(responses, t_star.tolist(), positions.tolist(), log_q.tolist(), log_p.tolist())
    for i, (response, t, position, student_values, teacher_values) in enumerate(columns):
        chosen, teacher_values = splice(response, position, continuations[i]), teacher_values[: len(response)]
        sample = {"prompt_id": prompt_ids[i // sampling.samples], "sample_id": i % sampling.samples}
        sample |= {"t_star": t, "prefix_len": position, "response_ids": response, "chosen_ids": chosen}
        sample |= {"student_logprobs": rounded(student_values[: len(response)])}
        sample |= {"teacher_logprobs": rounded(teacher_values)}
        sample |= {"chosen_teacher_logprobs": rounded(teacher_values[:position] + continuation_log_p[i])}
        sample |= {"ended": response[-1] in tokens.eos_ids, "chosen_ended": chosen[-1] in tokens.eos_ids}
        samples.append(sample)
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Which samples become pairs
# ---------------------------------------------------------------------------------------------------------------------


def pair_status(sample, seen, keep, prompt):
    """ "kept" for a pair; else why the sample is none. `seen` collects the pairs of the micro-batch."""
    if sample["t_star"] < 0:
        return "untouched"
    if sample["chosen_ids"] == sample["response_ids"]:
        return "identical"  # the teacher drew what the student had written, or (--replace after) had nothing to add
    key = (sample["prompt_id"], tuple(sample["chosen_ids"]), tuple(sample["response_ids"]))
    if key in seen:
        return "duplicate"
    seen.add(key)
    return "kept" if keep(sample, prompt) else "filtered"


def pair_filter(args, world, tokenizer):
    """--keep as a function (sample, prompt) -> bool."""
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    mean = lambda values: sum(values) / len(values)

    def teacher_prefers(sample, prompt):
        """The teacher's mean log-prob of y+ is above that of y-."""
        return mean(sample["chosen_teacher_logprobs"]) > mean(sample["teacher_logprobs"])

    def is_corrected(sample, prompt):
        """y+ answers right and y- wrong, by the data's gold response."""
        chosen, rejected = text(sample["chosen_ids"]), text(sample["response_ids"])
        return scoring.is_correct(chosen, prompt["gold"]) and not scoring.is_correct(rejected, prompt["gold"])

    @torch.no_grad()
    def reward(prompt, response):
        """Of a response (text), by a sequence-classification model: a float."""
        if reward_tokenizer.chat_template:
            turns = [*json.loads(prompt["messages"]), {"role": "assistant", "content": response}]
            whole = data.render_chat(reward_tokenizer, turns)
        else:
            whole = data.with_bos(reward_tokenizer, prompt["text"] + response)
        ids = reward_tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
        with runs.reading("the reward model fails", f"for prompt {prompt['prompt_id']}", "check --keep"):
            logits = reward_model(ids.to(world.device)).logits  # (1, 1)
        measure.check_finite(logits, [prompt["prompt_id"]])
        return logits.item()

    def reward_prefers(sample, prompt):
        """The reward of y+ is above that of y-."""
        return reward(prompt, text(sample["chosen_ids"])) > reward(prompt, text(sample["response_ids"]))

    if args.keep.startswith("reward:"):
        reward_model, reward_tokenizer = models.load_reward_model(args.keep.removeprefix("reward:"), args, world)
        return reward_prefers
    return {"all": lambda sample, prompt: True, "teacher": teacher_prefers, "correct": is_corrected}[args.keep]


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3 over all prompts and ranks
# ---------------------------------------------------------------------------------------------------------------------


def build_pairs(args, world, tokenizer, tokens, prompts, out):
    """Steps 1 to 3 over all prompts -> OUT/pairs/NNNNN.jsonl, one file a micro-batch; one that is there is done.

    prompts: the `Dataset` of `data.write_prompts`. Micro-batches are cut from its order, never from the number of ranks.
    """
    size = args.prompts_per_batch
    shards = runs.shards_to_do(out / "pairs", math.ceil(len(prompts) / size), "jsonl", world)
    if not shards:
        return
    student = models.load_frozen(args.student, args, world, tokenizer)
    teacher = training.load_teacher(args, world, tokenizer)
    keep = pair_filter(args, world, tokenizer)
    sampling = Sampling(args.samples, args.max_new_tokens, args.temperature, args.top_p, args.seed)
    any_rank = world.any if args.shard_teacher else None
    settings = (tokens, sampling, args.eta, args.replace, args.teacher_decoding == "greedy", any_rank)
    for k, is_ours in runs.progress(shards, desc="pairs", world=world, unit="batch"):
        batch = [prompts[i] for i in range(k * size, min((k + 1) * size, len(prompts)))]
        ids, prompt_ids = [prompt["ids"] for prompt in batch], [prompt["prompt_id"] for prompt in batch]
        records, seen = [], set()
        for i, sample in enumerate(build_samples(student, teacher, ids, prompt_ids, *settings)):
            prompt = batch[i // args.samples]
            status = pair_status(sample, seen, keep, prompt)
            records.append({"status": status, "prompt": prompt["text"], "prompt_ids": prompt["ids"], **sample})
        if is_ours:
            runs.write_jsonl(out / "pairs" / f"{k:05d}.jsonl", records, runs.run_key(out))


def merge_pairs(args, tokenizer, prompts, out):
    """OUT/pairs/*.jsonl -> OUT/pairs.jsonl (the kept pairs) and OUT/mismatch.json. Rank 0 only. Returns the summary.

    One shard is in memory at a time. Raises UserError if one is cut.
    """
    fingerprint, key = models.tokenizer_fingerprint(tokenizer), runs.run_key(out)
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    counts, t_stars = Counter(), Counter()
    etas, bins = torch.tensor(ETA_GRID), torch.tensor(MARGIN_BINS)
    tokens_above, samples_above = torch.zeros(2, len(etas), dtype=torch.long)
    margin_counts = torch.zeros(len(bins) + 1, dtype=torch.long)
    with runs.atomic_path(out / "pairs.jsonl") as partial, open(partial, "w", encoding="utf-8") as file:
        for start in range(0, len(prompts), args.prompts_per_batch):
            shard = out / "pairs" / f"{start // args.prompts_per_batch:05d}.jsonl"
            records = runs.read_jsonl(shard, key)
            batch = prompts[start : start + args.prompts_per_batch]
            expected = [prompt for prompt in zip(batch["prompt_id"], batch["ids"]) for _ in range(args.samples)]
            if [(record["prompt_id"], record["prompt_ids"]) for record in records] != expected:
                raise UserError("the file is cut, or of other prompts", f"in {shard}", "delete it and run again")
            counts["prompts_with_pairs"] += len({r["prompt_id"] for r in records if r["status"] == "kept"})
            for record in records:
                counts[record["status"]] += 1
                margins = torch.tensor(record["student_logprobs"]) - torch.tensor(record["teacher_logprobs"])  # (T,)
                above = margins[:, None] > etas  # (T, E)
                tokens_above, samples_above = tokens_above + above.sum(0), samples_above + above.any(0)
                margin_counts += torch.bincount(torch.bucketize(margins, bins), minlength=len(bins) + 1)
                counts["at_length_limit"] += not record["ended"]
                t_stars[record["t_star"]] += 1  # -1: none
                if record["status"] == "kept":
                    counts["chosen_at_length_limit"] += not record["chosen_ended"]
                    names = ("prompt_id", "sample_id", "prompt_ids", "prefix_len", "chosen_ids")
                    pair = {name: record[name] for name in names} | {"rejected_ids": record["response_ids"]}
                    pair |= {"margin": round(margins[record["t_star"]].item(), 4), "prompt": record["prompt"]}
                    pair |= {"chosen": text(record["chosen_ids"]), "rejected": text(record["response_ids"])}
                    file.write(json.dumps(pair | {"tokenizer": fingerprint}, ensure_ascii=False) + "\n")
    samples, tokens = len(prompts) * args.samples, margin_counts.sum().item()
    rates = zip(ETA_GRID, samples_above.tolist(), tokens_above.tolist())
    summary = {"eta": args.eta, "samples": samples, "pairs": counts["kept"], "untouched": counts["untouched"]}
    summary |= {"dropped": {reason: counts[reason] for reason in ("identical", "duplicate", "filtered")}}
    summary |= {"replaced": samples - counts["untouched"], "prompts": len(prompts)}
    summary |= {"prompts_with_pairs": counts["prompts_with_pairs"], "tokens": tokens}
    summary |= {name: counts[name] for name in ("at_length_limit", "chosen_at_length_limit")}
    summary["replacement_rate"] = {str(e): {"samples": s / samples, "tokens": t / tokens} for e, s, t in rates}
    summary["margin_histogram"] = {"edges": MARGIN_BINS, "counts": margin_counts.tolist()}
    summary["t_star_histogram"] = {str(t): t_stars[t] for t in sorted(t_stars) if t >= 0}
    summary["warnings"] = warnings_of(summary)
    runs.write_json(out / "mismatch.json", summary, indent=1)
    return summary


def warnings_of(summary):
    """Lines about what commonly goes wrong with the pairs, with their numbers."""
    rate, few, prompts = summary["replaced"] / summary["samples"], summary["prompts_with_pairs"], summary["prompts"]
    endless, endless_chosen = summary["at_length_limit"], summary["chosen_at_length_limit"]
    replaced = f"the teacher corrects {rate:.1%} of the samples at eta {summary['eta']}"
    no_end = "have no end within --max-new-tokens"
    lines = {
        f"{replaced}: eta is too high, or there is little to correct (replacement_rate in mismatch.json)": rate < 0.01,
        f"{replaced}: eta may be too low; see replacement_rate in mismatch.json": rate > 0.99,
        f"all {summary['pairs']} pairs come from {few} of {prompts} prompts": 0 < few < prompts / 10 and prompts >= 10,
        f"{endless} of {summary['samples']} samples {no_end}": endless > summary["samples"] / 2,
        f"{endless_chosen} of {summary['pairs']} chosen responses {no_end}": endless_chosen > summary["pairs"] / 2,
    }
    return [line for line, applies in lines.items() if applies]


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = runs.ArgumentParser(__doc__)
    parser.add_argument("--pairs-only", action="store_true", help="stop after OUT/pairs.jsonl")
    runs.add_arguments(parser)
    data.add_arguments(parser, "out/warmup", eval_limit=64)
    add = parser.add_argument_group("sample, check, splice").add_argument
    add("--samples", type=runs.COUNT, default=8, help="N, responses a prompt; 8 in the paper")
    add("--eta", type=runs.NATS, default=4.0, help="threshold of log q - log p, nats; 4 in the paper")
    add("--temperature", type=runs.TEMPERATURE, default=1.0, help="of both models' sampling")
    add("--top-p", type=runs.TOP_P, default=1.0, help="of both; margins use the full distribution")
    add("--replace", choices=["at", "after"], default="at", help="the teacher writes from t* on, or from t* + 1")
    add("--teacher-decoding", choices=["sample", "greedy"], default="sample", help="in the splice")
    choices = "all, teacher, correct or reward:MODEL"
    keep = runs.ranged(str, re.compile("all|teacher|correct|reward:.+").fullmatch, choices)
    add("--keep", type=keep, default="all", help=f"which pairs: {choices}")
    add("--reference", choices=["student", "teacher"], default="student", help="pi_ref of DPO")
    dpo.add_arguments(parser)
    training.add_arguments(parser, lr=5e-7)
    args = data.parse_args(parser, argv, TOY, ["teacher", "student"])
    for flag in ("teacher", "student", "data"):
        if not getattr(args, flag):
            parser.error(f"--{flag} is missing: give all three, or none for the toy")
    return args


def main(argv=None):
    args = parse_args(argv)
    world = runs.start_processes(args.device, args.threads)
    tokenizer, tokens = models.shared_tokenizer(args.student, args.teacher, args.trust_remote_code)
    limits = (args.max_prompt_tokens, args.max_new_tokens, args.trust_remote_code)
    args.max_prompt_tokens = models.prompt_limit([args.student, args.teacher], *limits)
    inputs = [args.student, args.teacher, args.data]
    if args.keep.startswith("reward:"):
        inputs.append(args.keep.removeprefix("reward:"))
    out = runs.start_run(args.out, args, world, inputs)
    prompts = data.write_prompts(args, tokenizer, out, world)
    eval_prompts = world.first(lambda: data.load_eval_prompts(args, tokenizer, prompts))
    if args.keep == "correct" and prompts.data["gold"].null_count:
        raise UserError("--keep correct needs gold responses", f"in {args.data}", "name them with --response-column")
    if args.nll_weight > 0:
        added = f"--nll-weight {args.nll_weight:g} adds the chosen responses' NLL to the DPO loss"
        world.print(f"not in the paper: {added}")

    # Steps 1 to 3
    build_pairs(args, world, tokenizer, tokens, prompts, out)
    training.release_memory()
    world.barrier()
    found = world.first(lambda: merge_pairs(args, tokenizer, prompts, out))
    others = {"untouched": found["untouched"], **found["dropped"]}
    words = [f"{count} {status}" for status, count in others.items() if count > 0]
    world.print(f"{found['pairs']} pairs of {found['samples']} samples{': ' if words else ''}{', '.join(words)}")
    for line in found["warnings"]:
        world.print(f"warning: {line}")
    if args.pairs_only:
        return

    # Step 4
    pairs = dpo.write_pairs(out / "pairs.jsonl", tokenizer, out, world)
    if not len(pairs):
        world.print("warning: no pair came out, so there is nothing to learn: OUT/student is the student unchanged")
    reference = args.student if args.reference == "student" else args.teacher
    dpo.train(args, world, tokenizer, pairs, args.student, reference, out)
    training.release_memory()

    if args.eval_limit:
        # A sharded teacher is one that fits on no single device: then there is none in the table
        teacher = None if args.shard_teacher else models.load_frozen(args.teacher, args, world, tokenizer)
        # As many rows as in sampling, but 8 batches or more for the ranks, whose number must change no batch
        size = min(args.prompts_per_batch * args.samples, math.ceil(len(eval_prompts) / 8))
        settings = (eval_prompts, size, args.eta, first_mismatch)
        measure.closing_table(args, world, tokenizer, tokens, out, teacher, *settings)
    world.print(f"{runs.seconds_since_start():.0f} seconds; the warmed-up student is {out / 'student'}")
    world.print(f"the run as a page: python -m tools.report {out}")


if __name__ == "__main__":
    runs.run(main)
