"""What the threshold eta does: runs/eta_sweep.json.

    python runs/eta_sweep.py [FOLDER]       FOLDER: OUT of a run of warmup_distill.py on real models (runs/eta_sweep.sh)

Replacement rates and the place of t* for eta from 0.5 to 10, counted in OUT/pairs/*.jsonl: the margins of all sampled
tokens are there, so no model is needed once it has sampled. On the toy also the accuracy after the warm-up, and after the
warm-up and KD, with eta 1, 2, 3, 4, 6, 8: dev sets of seeds 1 to 5, the settings of runs/dpo_sensitivity.py.
"""

import functools
import statistics
import sys
from collections import Counter
from pathlib import Path

import lab
from dpo_sensitivity import KD
from lab import DEV_SEEDS, ROOT

import common

ETAS = [0.5 * k for k in range(1, 21)]
TRAINED_ETAS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
RESULT = ROOT / "runs/eta_sweep.json"


def sweep(records):
    """{eta: rates and quartiles} of samples, dicts with group, student_logprobs and teacher_logprobs.

    samples, tokens: shares above eta; behind: share of the tokens at t* and behind it, which the teacher writes anew.
    half_width: half of the 95% interval of `samples`, from the spread of the groups' own rates. A group is what is drawn
    independently: a prompt, or where each seed has models of its own, a seed. t_star: first, second, third quartile.
    """
    rows = {}
    margins = [
        (r["group"], [q - p for q, p in zip(r["student_logprobs"], r["teacher_logprobs"], strict=True)])
        for r in records
    ]
    total = sum(len(values) for _, values in margins)
    for eta in ETAS:
        of_group, places, above, behind = {}, Counter(), 0, 0
        for group, values in margins:
            first = next((t for t, value in enumerate(values) if value > eta), None)
            of_group.setdefault(group, []).append(first is not None)
            above += sum(value > eta for value in values)
            if first is not None:
                places[first] += 1
                behind += len(values) - first
        half = lab.t_interval([statistics.fmean(found) for found in of_group.values()])[1]
        rows[eta] = {
            "samples": round(sum(places.values()) / len(margins), 5),
            "half_width": round(half, 5),
            "tokens": round(above / total, 6),
            "behind": round(behind / total, 5),
            "t_star": [lab.quantile(places, share) for share in (0.25, 0.5, 0.75)] if places else None,
        }
    return rows


def read_samples(folder):
    """All samples of a run's OUT/pairs."""
    return [record for file in sorted((Path(folder) / "pairs").glob("*.jsonl")) for record in common.read_jsonl(file)]


def size(records):
    """How much there is of it."""
    tokens = sum(len(r["response_ids"]) for r in records)
    cut = sum(not r["ended"] for r in records)
    return {
        "prompts": len({r["prompt_id"] for r in records}),
        "samples": len(records),
        "tokens": tokens,
        "tokens_a_sample": round(tokens / len(records), 1),
        "at_length_limit": round(cut / len(records), 4),
    }


def trained(task, eta):
    """The warm-up with `eta`, and KD from there."""
    name = f"eta/{eta:g}"
    warm = task.warmup(name, eta=eta)
    distilled = task.kd(f"eta-kd/{eta:g}", task.folder / name / "student", **KD)
    return warm | {"after_kd": distilled["accuracy"]}


def main(argv):
    samples, measured = [], {}
    for seed in DEV_SEEDS:
        task = lab.Toy(ROOT / "out/toy_dev", seed, "dev")
        jobs = [(eta, functools.partial(trained, task, eta)) for eta in TRAINED_ETAS]
        measured[seed] = lab.run_all(jobs, f"eta, seed {seed}")
        # Each seed has a teacher, a student and prompts of its own
        found = read_samples(task.folder / "eta/4")
        samples += [record | {"group": seed, "prompt_id": (seed, record["prompt_id"])} for record in found]
    sizes, runs = {"toy": size(samples)}, {f"toy/{eta}": row for eta, row in sweep(samples).items()}
    for eta in TRAINED_ETAS:
        results = [measured[seed][eta] for seed in DEV_SEEDS]
        columns = ("accuracy", "after_kd", "pairs", "teacher_tokens")
        runs[f"accuracy/{eta}"] = {c: [round(r[c], 4) for r in results] for c in columns}
    if argv:
        real = [record | {"group": record["prompt_id"]} for record in read_samples(argv[0])]
        sizes["real"] = size(real)
        runs |= {f"real/{eta}": row for eta, row in sweep(real).items()}
    seconds = sum(r["seconds"] for results in measured.values() for r in results.values())
    head = {"record": lab.record("eta_sweep", seconds), "seeds": DEV_SEEDS, "kd": KD, "sizes": sizes}
    lab.write_result(RESULT, head, runs)


if __name__ == "__main__":
    main(sys.argv[1:])
