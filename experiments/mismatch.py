"""What the check finds in stored samples, and what the teacher makes of them: experiments/mismatch_NAME.json.

    python experiments/mismatch.py NAME OUT...              OUT: folders of warmup_distill.py, of one or of several seeds
    python experiments/mismatch.py NAME --students OUT...   the same prompts, an OUT a student; the first is the initial one

Parts of the first, all but `eta` at the runs' own eta:

    eta        for eta from 0.5 to 10: share of samples and of tokens above it, and where t* is
    token      share of the tokens above eta, by position in the response, and by kind: digits, words (with a letter),
               the end, other
    right      how often y and y+ answer right, and y+ minus y: in samples with a mismatch, in those of them that
               `--keep teacher` keeps, and in those where both responses end; and in samples without one, where y+ is y. A
               response that did not end is not right

The second has, for each OUT, by its folder's name, and minus the first: KL(q, p) in nats a token, the mean of
log q - log p over sampled tokens; how often samples have a mismatch at eta 4, and are right. Splices do not count.

`half`s are halves of 95% intervals, by groups. A group is what is drawn independently: a prompt, or of several OUTs,
which have models of their own, an OUT. (Of several students a prompt: how much another training run would differ is not
in it.) README.md has the commands that made the folders.
"""

import math
import statistics
import sys
from pathlib import Path

import lab
from transformers import AutoTokenizer

from lib import data, runs, scoring
from tools.report import t_quantile
from warmup_distill import ETA_GRID

PLACES = (0, 10, 20, 40, 80, 160, 320, 10**6)  # bands of positions


def mean(found, less=()):
    """{"mean", "half", "count"} of a list of (group, number); shares are means of True and False.

    half: of the 95% interval of a ratio estimate, t sqrt(n / (n - 1) sum_g r_g^2), with n groups, N values and r_g the
    sum of a group's deviations from the mean, divided by N; None for one group. less: another list of the same groups,
    whose mean is taken off, and whose r_g, too: the difference is paired by group.
    """
    average, residuals, half = 0, {}, None
    for sign, part in ((1, found), (-1, less)):
        part_mean = statistics.fmean(value for _, value in part) if part else 0
        average += sign * part_mean
        for group, value in part:
            residuals[group] = residuals.get(group, 0) + sign * (value - part_mean) / len(part)
    n = len(residuals)
    if n > 1:
        half = round(t_quantile(n - 1) * math.sqrt(n / (n - 1) * sum(r * r for r in residuals.values())), 5)
    return {"mean": round(average, 5), "half": half, "count": len(found)}


def at_eta(samples, eta):
    """Shares above eta; behind: share of the tokens from t* on, which the teacher writes anew; quartiles of t*."""
    first, behind = [], 0
    for sample in samples:
        first.append(next((t for t, margin in enumerate(sample["margins"]) if margin > eta), -1))
        behind += len(sample["margins"]) - first[-1] if first[-1] >= 0 else 0
    tokens, places = [margin for sample in samples for margin in sample["margins"]], sorted(t for t in first if t >= 0)
    return {
        "samples": mean([(sample["group"], t >= 0) for sample, t in zip(samples, first)]),
        "tokens": round(statistics.fmean(margin > eta for margin in tokens), 6),
        "behind": round(behind / len(tokens), 5),
        "t_star": [places[math.ceil(share * len(places)) - 1] for share in (0.25, 0.5, 0.75)] if places else None,
    }


def kind(text):
    """Of a token's text."""
    return "words" if any(c.isalpha() for c in text) else "digits" if any(c.isdigit() for c in text) else "other"


def by_token(samples, eta):
    """{"tokens 10 to 19", ..., "digits", ...: share of these tokens above eta}."""
    found = {}
    for sample in samples:
        for t, (margin, kind) in enumerate(zip(sample["margins"], sample["kinds"])):
            place = next(k for k in range(len(PLACES) - 1) if t < PLACES[k + 1])
            for name in (f"tokens {PLACES[place]} to {PLACES[place + 1] - 1}", kind):
                found.setdefault(name, []).append((sample["group"], margin > eta))
    return {name: mean(of) for name, of in found.items()}


def right(samples):
    """How often y and y+ are right, y+ minus y, and how often only one of them is."""
    values = {
        "y": lambda s: s["right"],
        "y+": lambda s: s["chosen_right"],
        "y+ minus y": lambda s: s["chosen_right"] - s["right"],
        "y alone": lambda s: s["right"] and not s["chosen_right"],
        "y+ alone": lambda s: s["chosen_right"] and not s["right"],
    }
    return {name: mean([(s["group"], value(s)) for s in samples]) for name, value in values.items()}


def subsets(samples):
    """The samples with a mismatch, of these those that `--keep teacher` keeps and those where y and y+ end; the others."""
    found, mean_of = [s for s in samples if s["t_star"] >= 0], lambda s, key: statistics.fmean(s[key])
    kept = [s for s in found if mean_of(s, "chosen_teacher_logprobs") > mean_of(s, "teacher_logprobs")]
    parts = {"with a mismatch": found, "of these, kept by --keep teacher": kept}
    parts["with a mismatch, y and y+ have an end"] = [s for s in found if s["ended"] and s["chosen_ended"]]
    return parts | {"without a mismatch": [s for s in samples if s["t_star"] < 0]}


def by_student(outs):
    """outs: {name: samples of the same prompts}. {name: {what: [`mean`, `mean` minus the first's]}}, at eta 4."""
    found, first = {}, next(iter(outs.values()))
    of_sample = lambda s: {"KL(q, p)": s["margins"], "mismatch": [max(s["margins"]) > 4], "right": [s["right"]]}
    values = lambda samples, what: [(s["prompt_id"], value) for s in samples for value in of_sample(s)[what]]
    for name, samples in outs.items():
        pairs = {what: [values(of, what) for of in (samples, first)] for what in of_sample(samples[0])}
        found[name] = {what: [mean(ours), mean(ours, theirs)] for what, (ours, theirs) in pairs.items()}
    return found


def read(out, group):
    """The samples of a folder: what warmup_distill.py stored, the text of each token, and whether the answers are right."""
    golds = {row["prompt_id"]: row["gold"] for row in data.open_arrow(out / "prompts.arrow")}
    tokenizer = AutoTokenizer.from_pretrained(runs.read_json(out / "args.json")["args"]["student"])
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    samples = lab.read_samples(out)
    for s in samples:
        gold = golds[s["prompt_id"]]
        s["margins"] = [q - p for q, p in zip(s["student_logprobs"], s["teacher_logprobs"], strict=True)]
        s["group"] = s["prompt_id"] if group is None else group
        s["kinds"] = [kind(text([i])) for i in s["response_ids"]]
        s["kinds"][-1] = "the end" if s["ended"] else s["kinds"][-1]
        s["right"] = s["ended"] and scoring.is_correct(text(s["response_ids"]), gold)
        s["chosen_right"] = s["chosen_ended"] and scoring.is_correct(text(s["chosen_ids"]), gold)
    return samples


def main(argv):
    students = "--students" in argv
    if len(argv) < 2 + students:
        sys.exit(__doc__)
    made = lab.record(f"python experiments/mismatch.py {argv[0]} {'--students ' if students else ''}OUT...")
    outs = [Path(out) for out in argv[1 + students :]]
    args = [runs.read_json(out / "args.json") for out in outs]
    if any(of["code"] != runs.code_fingerprints() for of in args):
        sys.exit("error: other code made it, in a folder that was given, make it again")
    [eta] = {of["args"]["eta"] for of in args}
    of_outs = [read(out, None if students or len(outs) == 1 else k) for k, out in enumerate(outs)]
    samples = [sample for of_out in of_outs for sample in of_out]
    sizes = {
        "prompts": len({(s["group"], s["prompt_id"]) for s in samples}),
        "samples": len(samples),
        "tokens": sum(len(s["margins"]) for s in samples),
        "cut": round(statistics.fmean(not s["ended"] for s in samples), 4),
    }
    if students:
        same = {**args[0]["settings"], "student": "", "temperature": 1.0, "top_p": 1.0}
        if any({**of["settings"], "student": ""} != same for of in args) or len({out.name for out in outs}) < len(outs):
            sys.exit("error: not the same but for the student, or one name twice, of the OUTs given, sample them alike")
        parts = by_student({out.name: of_out for out, of_out in zip(outs, of_outs)})
    else:
        parts = {"eta": {f"{eta:g}": at_eta(samples, eta) for eta in ETA_GRID}, "token": by_token(samples, eta)}
        parts["right"] = {name: right(found) for name, found in subsets(samples).items() if found}
    head = {"record": made, "eta": eta, "outs": 1 if students else len(outs), "sizes": sizes}
    lab.write_result(f"mismatch_{argv[0]}", head, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
