"""How much the settings that the paper does not give matter, on the toy: experiments/dpo_sensitivity.json.

    OMP_NUM_THREADS=1 python experiments/dpo_sensitivity.py     over an hour on one core; resumes

Seeds 1 to 5, each with a toy of its own, dev sets; the test sets are not touched. DPO's variants learn from the same
stored pairs of their seed, through dpo.py; the last rows make their own pairs. Greedy accuracy after the warm-up alone,
and after 25 steps of KD (KD below) from there. The best row with and the best row without the NLL term, by the accuracy
after KD, are what toy_ablation.py uses.
"""

import functools
import itertools
import statistics

import lab
from lab import DEV_SEEDS, ROOT

# At the warm-up's best rate of those in toy_ablation.py; after 100 steps every start is at 95% or more
KD = {"loss": "forward_kl", "max_steps": 25, "lr": 1e-3}
PAIR_FLAGS = ("eta", "keep", "replace", "teacher_decoding", "samples", "temperature", "top_p")  # those of steps 1 to 3


def variants():
    """{name: what differs from lab.DPO}. Flags of dpo.py, PAIR_FLAGS of warmup_distill.py; `reference` is "teacher"."""
    found = {"default": {}}
    for nll, beta, rate in itertools.product((1.0, 0.0), (0.1, 0.5, 2.0), (1e-4, 2.5e-4, 5e-4, 1e-3)):
        settings = {"nll_weight": nll, "beta": beta, "lr": rate}
        if settings.items() - lab.DPO.items():
            found[f"nll-{nll:g} beta-{beta:g} lr-{rate:g}"] = settings
    for nll in (0.1, 0.3, 3.0):
        found[f"nll-{nll:g}"] = {"nll_weight": nll}
    for nll, beta in itertools.product((1.0, 0.0), (0.5, 5.0)):
        found[f"mean nll-{nll:g} beta-{beta:g}"] = {"logprobs": "mean", "nll_weight": nll, "beta": beta}
    for nll in (1.0, 0.0):
        found[f"reference-teacher nll-{nll:g}"] = {"reference": "teacher", "nll_weight": nll}
    found |= {f"keep-{keep}": {"keep": keep} for keep in ("teacher", "correct")}
    found["keep-correct nll-0 beta-0.1 lr-0.0001"] = {"keep": "correct", "nll_weight": 0.0, "beta": 0.1, "lr": 1e-4}
    found |= {f"steps-{steps}": {"max_steps": steps} for steps in (15, 30, 120)}
    found["label-smoothing-0.1"], found["sft"] = {"label_smoothing": 0.1}, {"beta": 1e-9}
    found["replace-after"], found["teacher-greedy"] = {"replace": "after"}, {"teacher_decoding": "greedy"}
    found |= {f"samples-{samples}": {"samples": samples} for samples in (2, 16)}
    found |= {f"temperature-{temperature:g}": {"temperature": temperature} for temperature in (0.7, 1.3)}
    found["top-p-0.9"] = {"top_p": 0.9}
    found |= {f"eta-{eta}": {"eta": eta} for eta in (1, 2, 3, 6, 8)}
    return found


def one(task, name, changes):
    """One variant on one seed's toy: pairs, DPO, then KD from there."""
    of_pairs = {key: value for key, value in changes.items() if key in PAIR_FLAGS}
    words = [value if isinstance(value, str) else f"{key}-{value:g}" for key, value in of_pairs.items()]
    pairs = "-".join(["pairs", *words])
    task.warmup(pairs, pairs_only=True, **of_pairs)
    settings = {key: value for key, value in changes.items() if key not in PAIR_FLAGS}
    if "reference" in settings:
        settings["reference"] = task.paths[settings["reference"]]
    aligned = task.dpo(f"dpo/{name}", pairs, **settings)
    distilled = task.kd(f"dpo-kd/{name}", task.folder / "dpo" / name / "student", **KD)
    return aligned | {"after_kd": distilled["accuracy"]}


def measure(seed):
    """{variant: result} of one seed."""
    task = lab.Toy(ROOT / "out/toy_dev", seed, "dev")
    distilled = task.kd("dpo-kd/no warm-up", task.paths["student"], **KD)
    jobs = [(name, functools.partial(one, task, name, changes)) for name, changes in variants().items()]
    student = task.initial() | {"after_kd": distilled["accuracy"]}
    return {"no warm-up": student, **lab.run_all(jobs, f"DPO, seed {seed}")}


def best(result, with_nll):
    """The name of the row with the highest mean accuracy after KD, among those with or those without the NLL term.

    Rows that differ in something else (filter, reference, number of steps, SFT) do not take part.
    """
    tuned = {name: row for name, row in result["runs"].items() if name.startswith(("default", "nll-"))}
    rows = {name: statistics.fmean(row["after_kd"]) for name, row in tuned.items()}
    return max((name for name in rows if name.startswith("nll-0 ") != with_nll), key=rows.get)


def main():
    lab.commit()
    measured = {seed: measure(seed) for seed in DEV_SEEDS}
    columns = ("accuracy", "after_kd", "pairs", "margin")
    rows = {}
    for name, result in measured[DEV_SEEDS[0]].items():
        rows[name] = {c: [round(measured[s][name][c], 4) for s in DEV_SEEDS] for c in columns if c in result}
    head = {"record": lab.record("python experiments/dpo_sensitivity.py"), "seeds": DEV_SEEDS}
    lab.write_result("dpo_sensitivity", head | {"default": lab.DPO, "kd": KD}, rows)


if __name__ == "__main__":
    main()
