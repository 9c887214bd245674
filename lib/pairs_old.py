"""Preference pairs: which are kept, the files they are written to, and reading them or any preference file back."""

import itertools
import json
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification

import common
import data
import models
import scores
from common import UserError

ETA_GRID = [0.5 * k for k in range(1, 21)]  # mismatch.json gives the replacement rate for these
MARGIN_BINS = [-10.0 + 0.5 * k for k in range(61)]  # nats, -10 .. 20; the outermost bins are open

# ---------------------------------------------------------------------------------------------------------------------
# Which pairs are kept
# ---------------------------------------------------------------------------------------------------------------------


def keep_all(record, prompt, run):
    """--keep all: every pair."""
    return True


def keep_teacher(record, prompt, run):
    """--keep teacher: the teacher's mean log-prob of y+ is above that of y-."""
    mean = lambda values: sum(values) / len(values)
    return mean(record["chosen_teacher_logprobs"]) > mean(record["teacher_logprobs"])


def keep_correct(record, prompt, run):
    """--keep correct: y+ answers right and y- wrong, judged by the data's gold response."""
    chosen, rejected = run.decode_text(record["chosen_ids"]), run.decode_text(record["response_ids"])
    return scores.is_correct(chosen, prompt["gold"]) and not scores.is_correct(rejected, prompt["gold"])


class KeepByReward:
    """--keep reward:MODEL: a sequence-classification reward model scores y+ higher than y-."""

    def __init__(self, path, args, world):
        self.tokenizer = models.load_tokenizer(path, args.trust_remote_code)
        self.device = world.device
        try:
            self.model, info = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=models.compute_dtype(args.dtype, world),
                use_safetensors=True,
                trust_remote_code=args.trust_remote_code,
                output_loading_info=True,
            )
            if self.model.config.num_labels == 1:
                models.check_no_weight_is_missing(info)
        except models.LOAD_ERRORS as error:
            raise UserError(f"no reward model can be loaded ({common.one_line(error)})", f"in {path}", "check --keep")
        if self.model.config.num_labels != 1:
            what = f"the reward model has {self.model.config.num_labels} labels"
            raise UserError(what, f"in {path}", "use a sequence-classification model with one")
        self.model = self.model.to(world.device).eval()

    @torch.no_grad()
    def score(self, prompt, response):
        """The reward of one response (text), a float."""
        if self.tokenizer.chat_template:
            turns = [*prompt["messages"], {"role": "assistant", "content": response}]
            text = data.render_chat(self.tokenizer, turns)
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        else:
            text = prompt["text"] + response  # may begin with bos as text: not a second one
            begun = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
            ids = self.tokenizer(text, add_special_tokens=not begun, return_tensors="pt").input_ids
        return self.model(ids.to(self.device)).logits[0, 0].item()

    def __call__(self, record, prompt, run):
        chosen, rejected = run.decode_text(record["chosen_ids"]), run.decode_text(record["response_ids"])
        return self.score(prompt, chosen) > self.score(prompt, rejected)


def pair_filter(args, world):
    """The function that --keep names: (record, prompt, run) -> bool."""
    if args.keep.startswith("reward:"):
        return KeepByReward(args.keep.removeprefix("reward:"), args, world)
    return {"all": keep_all, "teacher": keep_teacher, "correct": keep_correct}[args.keep]


# ---------------------------------------------------------------------------------------------------------------------
# The files of a run
# ---------------------------------------------------------------------------------------------------------------------


class Mismatch:
    """OUT/mismatch.json: what the check and the splice found, counted over all samples."""

    def __init__(self):
        self.counts = Counter()
        self.above_tokens, self.above_samples = torch.zeros(2, len(ETA_GRID), dtype=torch.long)
        self.margin_counts = torch.zeros(len(MARGIN_BINS) + 1, dtype=torch.long)
        self.t_star_counts = Counter()
        self.etas, self.bins = torch.tensor(ETA_GRID), torch.tensor(MARGIN_BINS)

    def add(self, records):
        """The records of one prompt."""
        counts = self.counts
        counts["prompts_with_pairs"] += any(record["status"] == "kept" for record in records)
        for record in records:
            counts[record["status"]] += 1
            if record["status"] == "too_long":
                continue
            margins = torch.tensor(record["student_logprobs"]) - torch.tensor(record["teacher_logprobs"])
            above = margins[:, None] > self.etas  # (T, E)
            self.above_tokens += above.sum(0)
            self.above_samples += above.any(0)
            self.margin_counts += torch.bincount(torch.bucketize(margins, self.bins), minlength=len(MARGIN_BINS) + 1)
            counts["tokens"] += len(margins)
            counts["samples"] += 1
            counts["prompts"] += record["sample_id"] == 0
            counts["at_length_limit"] += not record["ended"]
            counts["chosen_at_length_limit"] += record["status"] == "kept" and not record["chosen_ended"]
            if record["t_star"] >= 0:
                self.t_star_counts[record["t_star"]] += 1

    def summary(self, eta):
        """What is written to the file; each entry is described in the README."""
        counts, samples, tokens = self.counts, self.counts["samples"], self.counts["tokens"]
        return {
            "eta": eta,
            "prompts": counts["prompts"],
            "prompts_over_length": counts["too_long"],
            "prompts_with_pairs": counts["prompts_with_pairs"],
            "tokens": tokens,
            "samples": samples,
            "untouched": counts["untouched"],
            "replaced": samples - counts["untouched"],
            "pairs": counts["kept"],
            "dropped": {reason: counts[reason] for reason in ("identical", "duplicate", "filtered")},
            "at_length_limit": counts["at_length_limit"],
            "chosen_at_length_limit": counts["chosen_at_length_limit"],
            "replacement_rate": {
                str(eta): {"samples": s / samples, "tokens": t / tokens}
                for eta, s, t in zip(ETA_GRID, self.above_samples.tolist(), self.above_tokens.tolist())
            },
            "margin_histogram": {"edges": MARGIN_BINS, "counts": self.margin_counts.tolist()},
            "t_star_histogram": {str(t): self.t_star_counts[t] for t in sorted(self.t_star_counts)},
        }


def merge_pairs(run, batches, out):
    """OUT/pairs/*.jsonl -> OUT/pairs.jsonl and OUT/mismatch.json, both described in the README. Rank 0 only.

    One shard is in memory at a time. Raises UserError if one is cut. Returns the summary.
    """
    fingerprint, mismatch = models.tokenizer_fingerprint(run.tokenizer), Mismatch()
    with common.atomic_file(out / "pairs.jsonl") as file:
        for k in range(len(batches)):
            records = read_shard(out / "pairs" / f"{k:05d}.jsonl", batches.ids(k), run.args.samples)
            for _, group in itertools.groupby(records, key=lambda record: record["prompt_id"]):
                mismatch.add(group := list(group))
                for record in group:
                    if record["status"] == "kept":
                        line = json.dumps(to_pair(record, fingerprint, run), ensure_ascii=False)
                        file.write(f"{line}\n".encode())
    summary = mismatch.summary(run.args.eta)
    summary["warnings"] = warnings_of(summary)
    common.write_atomic(out / "mismatch.json", json.dumps(summary, indent=1) + "\n")
    return summary


def read_shard(file, prompt_ids, n):
    """The records of one micro-batch: for each prompt its N samples, or one record of status too_long."""
    try:
        records = common.read_jsonl(file)
        found = [record["prompt_id"] for record in records]
        long = {record["prompt_id"] for record in records if record["status"] == "too_long"}
    except (UserError, KeyError, TypeError):
        found, long = [], set()
    if found != [i for i in prompt_ids for _ in range(1 if i in long else n)]:
        raise UserError("the file is cut or damaged", f"in {file}", "delete it and run again: it is then made again")
    return records


def warnings_of(summary):
    """Lines about what commonly goes wrong with the pairs, with the numbers behind them."""
    rate, lines = summary["replaced"] / summary["samples"], []
    replaced = f"the teacher corrects {rate:.1%} of the samples at eta {summary['eta']}"
    if rate < 0.01:
        lines.append(
            f"{replaced}: eta is too high, or there is little to correct; see replacement_rate in mismatch.json"
        )
    if rate > 0.99:
        lines.append(f"{replaced}: eta may be too low; see replacement_rate in mismatch.json")
    few, prompts = summary["prompts_with_pairs"], summary["prompts"]
    if summary["pairs"] and prompts >= 10 and few < prompts / 10:
        lines.append(f"all {summary['pairs']} pairs come from {few} of {prompts} prompts")
    for key, of, what in (
        ("at_length_limit", "samples", "samples"),
        ("chosen_at_length_limit", "pairs", "chosen responses"),
    ):
        if summary[of] and summary[key] > summary[of] / 2:
            lines.append(f"{summary[key]} of {summary[of]} {what} have no end within --max-new-tokens")
    return lines


def to_pair(record, fingerprint, run):
    """One line of pairs.jsonl. The text columns are what TRL and the hub call a preference data set."""
    t = record["t_star"]
    return {
        "prompt_id": record["prompt_id"],
        "sample_id": record["sample_id"],
        "prompt_ids": record["prompt_ids"],
        "prefix_len": record["prefix_len"],
        "chosen_ids": record["chosen_ids"],
        "rejected_ids": record["response_ids"],
        "margin": round(record["student_logprobs"][t] - record["teacher_logprobs"][t], 4),
        "prompt": record["prompt"],
        "chosen": run.decode_text(record["chosen_ids"]),
        "rejected": run.decode_text(record["response_ids"]),
        "tokenizer": fingerprint,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading preference pairs
# ---------------------------------------------------------------------------------------------------------------------


def read_pairs(path, tokenizer):
    """Preference pairs from a JSONL file, as ids.

    Rows are either this project's (prompt_ids, chosen_ids, rejected_ids) or TRL's: prompt, chosen, rejected as text, or
    as lists of messages; then what both conversations begin with is the prompt, if there is no list of messages for it.
    """
    if not Path(path).is_file():
        raise UserError("no pairs file", f"at {path}", "run warmup_distill.py first or check --pairs")
    fingerprint, pairs = models.tokenizer_fingerprint(tokenizer), []
    for number, row in enumerate(common.read_jsonl(path), 1):
        where = f"in {path} line {number}"
        if not isinstance(row, dict) or not (
            {"chosen_ids", "rejected_ids"} <= row.keys() or {"chosen", "rejected"} <= row.keys()
        ):
            raise UserError("no columns chosen and rejected", where, "see the README for the format")
        if "chosen_ids" not in row:
            row = tokenize_pair(row, tokenizer, where)
        check_pair(row, tokenizer, fingerprint, where)
        pairs.append(row)
    return pairs


def check_pair(pair, tokenizer, fingerprint, where):
    """Raises UserError unless a pair's ids are ids of this tokenizer and there is something to prefer."""
    if pair.get("tokenizer", fingerprint) != fingerprint:
        raise UserError(
            "the ids were made with another tokenizer", where, "use the model that the pairs were made with"
        )
    vocab_size = len(tokenizer)  # slow: not once an id
    for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
        ids = pair.get(key)
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
            raise UserError(f"{key} is not a list of ids below {vocab_size}", where, "use the pairs' own tokenizer")
        if not ids:
            raise UserError(f"{key} is empty", where, "mend or delete the line")
    if pair["chosen_ids"] == pair["rejected_ids"]:
        raise UserError("chosen equals rejected", where, "mend or delete the line")


def tokenize_pair(row, tokenizer, where):
    """A TRL-style row -> ids. Text responses get the eos token; messages go through the chat template."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        eos = [tokenizer.eos_token_id]
        prompt_ids = encode(data.with_bos(tokenizer, prompt))
        return {"prompt_ids": prompt_ids, "chosen_ids": encode(chosen) + eos, "rejected_ids": encode(rejected) + eos}
    if not (is_conversation(chosen) and is_conversation(rejected)):
        raise UserError("prompt, chosen and rejected are not all text or all messages", where, "mend the line")
    if not tokenizer.chat_template:
        raise UserError("the pair is a conversation, the tokenizer has no chat template", where, "give text")
    if not is_conversation(prompt):
        shared = shared_length(chosen, rejected)
        if shared:
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        elif isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        else:
            raise UserError("there is no prompt, and the conversations share none", where, "mend the line")
    text = data.render_chat(tokenizer, prompt, add_generation_prompt=True)
    rendered = [data.render_chat(tokenizer, prompt + turns) for turns in (chosen, rejected)]
    if not all(conversation.startswith(text) for conversation in rendered):
        what = "the chat template writes a prompt otherwise than as the beginning of its conversation"
        raise UserError(what, where, "give prompt, chosen and rejected as text")
    chosen_ids, rejected_ids = (encode(conversation.removeprefix(text)) for conversation in rendered)
    return {"prompt_ids": encode(text), "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}


def is_conversation(value):
    """Whether a value is a non-empty list of messages, {"role": str, "content": str}."""
    fields = ("role", "content")
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(turn, dict) and all(isinstance(turn.get(f), str) for f in fields) for turn in value)
    )


def shared_length(chosen, rejected):
    """How many leading items two lists share. Of a spliced pair's ids at least t*: the teacher may have drawn y_t* again."""
    length = 0
    for a, b in zip(chosen, rejected):
        if a != b:
            break
        length += 1
    return length
