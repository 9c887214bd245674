"""What the threshold eta does: experiments/eta_sweep.json.

    OMP_NUM_THREADS=1 python experiments/eta_sweep.py [OUT]          the toy alone: 10 minutes on one core; resumes

    python warmup_distill.py --teacher T --student S --data gsm8k_train.jsonl --limit 125 --max-prompt-tokens 384 \\
        --samples 8 --max-new-tokens 160 --prompts-per-batch 5 --eta 1000 --pairs-only --dtype bfloat16 --out OUT

The second command makes an OUT of real models: 125 problems x 8 samples; --eta 1000 splices nothing, since sampling and
checking are all that the sweep needs. Replacement rates and the place of t* for eta from 0.5 to 10 are counted in
OUT/pairs/*.jsonl, where the log-probs of all sampled tokens are. On the toy also the accuracy after the warm-up, and
after the warm-up and KD, with eta 1, 2, 3, 4, 6, 8: dev sets of seeds 1 to 5, the settings of dpo_sensitivity.py.
"""

import functools
import math
import statistics
import sys
from pathlib import Path

import lab
from dpo_sensitivity import KD
from lab import DEV_SEEDS, ROOT

from lib import runs

ETAS = [0.5 * k for k in range(1, 21)]
TRAINED_ETAS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


def quantile(values, share):
    """The smallest of `values` at or below which at least `share` of them are."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def sweep(records):
    """{eta: rates and quartiles} of samples, dicts with group, student_logprobs and teacher_logprobs.

    samples, tokens: shares above eta; behind: share of the tokens from t* on, which the teacher writes anew.
    half_width: half of the 95% interval of `samples`, from the spread of the groups' own rates. A group is what is drawn
    independently: a prompt, or where each seed has models of its own, a seed. t_star: first, second, third quartile.
    """
    margins = []
    for r in records:
        logprobs = zip(r["student_logprobs"], r["teacher_logprobs"], strict=True)
        margins.append((r["group"], [q - p for q, p in logprobs]))
    total, rows = sum(len(values) for _, values in margins), {}
    for eta in ETAS:
        of_group, places, above, behind = {}, [], 0, 0
        for group, values in margins:
            first = next((t for t, value in enumerate(values) if value > eta), None)
            of_group.setdefault(group, []).append(first is not None)
            above += sum(value > eta for value in values)
            if first is not None:
                places.append(first)
                behind += len(values) - first
        half = lab.t_interval([statistics.fmean(found) for found in of_group.values()])[1]
        rows[eta] = {
            "samples": round(len(places) / len(margins), 5),
            "half_width": round(half, 5),
            "tokens": round(above / total, 6),
            "behind": round(behind / total, 5),
            "t_star": [quantile(places, share) for share in (0.25, 0.5, 0.75)] if places else None,
        }
    return rows


def read_samples(folder):
    """All samples of a run's OUT/pairs."""
    return [record for file in sorted((Path(folder) / "pairs").glob("*.jsonl")) for record in runs.read_jsonl(file)]


def size(records):
    """How many prompts, samples and tokens there are."""
    tokens = sum(len(r["response_ids"]) for r in records)
    return {
        "prompts": len({(r["group"], r["prompt_id"]) for r in records}),
        "samples": len(records),
        "tokens": tokens,
        "tokens_a_sample": round(tokens / len(records), 1),
        "at_length_limit": round(sum(not r["ended"] for r in records) / len(records), 4),
    }


def trained(task, eta):
    """The warm-up with `eta`, and KD from there."""
    warm = task.warmup(f"eta/{eta:g}", eta=eta)
    distilled = task.kd(f"eta-kd/{eta:g}", task.folder / f"eta/{eta:g}/student", **KD)
    return warm | {"after_kd": distilled["accuracy"]}


def main(argv):
    lab.commit()
    samples, measured = [], {}
    for seed in DEV_SEEDS:
        task = lab.Toy(ROOT / "out/toy_dev", seed, "dev")
        jobs = [(eta, functools.partial(trained, task, eta)) for eta in TRAINED_ETAS]
        measured[seed] = lab.run_all(jobs, f"eta, seed {seed}")
        samples += [record | {"group": seed} for record in read_samples(task.folder / "eta/4")]  # models of its own
    sizes, rows = {"toy": size(samples)}, {f"toy/{eta}": row for eta, row in sweep(samples).items()}
    for eta in TRAINED_ETAS:
        columns = ("accuracy", "after_kd", "pairs", "teacher_tokens")
        rows[f"accuracy/{eta}"] = {c: [round(measured[s][eta][c], 4) for s in DEV_SEEDS] for c in columns}
    if argv:
        real = [record | {"group": record["prompt_id"]} for record in read_samples(argv[0])]
        sizes["real"] = size(real)
        rows |= {f"real/{eta}": row for eta, row in sweep(real).items()}
    seconds = sum(r["seconds"] for results in measured.values() for r in results.values())
    head = {"record": lab.record("python experiments/eta_sweep.py", seconds), "seeds": DEV_SEEDS}
    lab.write_result("eta_sweep", head | {"kd": KD, "sizes": sizes}, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
