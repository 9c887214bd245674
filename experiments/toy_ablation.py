"""When does the warm-up pay? The toy, 10 seeds that nothing was chosen on, the test set once: toy_ablation.json.

    export OMP_NUM_THREADS=1
    python experiments/toy_ablation.py select                    learning rates of KD, on the dev sets of seeds 1 to 3
    python experiments/toy_ablation.py report CONDITION SEED...  the report seeds, which processes can share; not the
                                                                 conditions of one seed
    python experiments/toy_ablation.py collect                   what is finished -> experiments/toy_ablation.json

About 4 hours of CPU time in all; resumes. Every arm ends in B steps of KD, B = 25 and 100: after 100, nearly all is
learnt. What differs is the student, what it is distilled on, and where it starts:

    condition  gold       a quarter of the student's facts is wrong; KD on the data's responses (CE and KD in equal
                          parts), as in the paper
               mismatch   the same with half of the facts wrong
               teacher    no gold responses: KD on the teacher's greedy responses to the same prompts
               student    no gold responses: on-policy KD, without CE
               no student is taught wrong facts in the others, all on gold responses:
               steps-500, steps-540, steps-650   trained too little, 800 steps are usual: by a trial with seeds 1 to 3
                          these give about 30, 60 and 90% of right answers; how many they gave is in the table
               small      three quarters of the width
               below-500  trained on other data: numbers below 500. (Of two-digit problems a student learns nothing
                          that counts here: after a few seeds with no right answer in any arm it was left out.)
    start      none       the student as it is: KD alone
               warm-up    Warmup-Distill: DPO with the NLL term
               plain      the same with the paper's plain DPO loss, at its own best settings
               sft        SFT on the chosen responses: the same pairs and steps, DPO's part switched off (--beta 1e-9)
               no-splice  the teacher writes all of y+, for every sample (--eta=-1e9 makes t* = 0)
               no-splice-same   ... for the samples with a mismatch only
               random     y+ is spliced at a random position instead of t*
    none + tokens, none + teacher tokens    KD alone for as many more steps as the warm-up cost: in token positions that
               student and teacher compute (lab.py), in those of the teacher alone

Learning rates of KD are chosen for each loss and budget, for "none" and for "warm-up" apart, in the condition "gold";
the other starts use those of "warm-up", KD with more steps that of the nearest budget (200 is one, for this alone), the
other conditions the same. DPO's settings come from dpo_sensitivity.json. "gold" has two losses and all starts; the others have
reverse KL, by which the warm-up gained most in the first edition, and the starts none, warm-up and none + tokens.
"""

import functools
import itertools
import math
import statistics
import sys

import dpo_sensitivity
import lab
from lab import FOLDER, REPORT_SEEDS, ROOT

from lib import runs

BUDGETS = (25, 100)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
RATE_BUDGETS = {"none": (25, 100, 200), "warm-up": BUDGETS}  # what a rate is chosen for
SELECT_SEEDS = (1, 2, 3)
LOSSES = ("forward_kl", "reverse_kl")
FEW = ("none", "warm-up", "none + tokens")
STARTS = {
    "none": "student: KD alone",
    "warm-up": "warm-up (DPO + NLL)",
    "plain": "warm-up, plain DPO",
    "sft": "SFT on y+ of the same pairs",
    "no-splice": "y+ all the teacher's, every sample",
    "no-splice-same": "y+ all the teacher's, samples with a mismatch",
    "random": "spliced at a random position",
    "none + tokens": "KD alone, with the warm-up's tokens",
    "none + teacher tokens": "KD alone, with the warm-up's teacher tokens",
}
# condition -> title, starts, flags of kd.py, what differs in the student (lab.other_student)
CONDITIONS = {
    "gold": ("a quarter of the facts wrong", STARTS, {}, None),
    "mismatch": ("half of the facts wrong", FEW, {}, {"misconceived": 0.5}),
    "teacher": ("a quarter; KD on the teacher's responses", FEW, {"mode": "teacher"}, None),
    "student": ("a quarter; on-policy KD", FEW, {"mode": "student"}, None),
    "steps-500": ("trained for 500 steps", FEW, {}, {"steps": 500}),
    "steps-540": ("trained for 540 steps", FEW, {}, {"steps": 540}),
    "steps-650": ("trained for 650 steps", FEW, {}, {"steps": 650}),
    "small": ("three quarters of the width", FEW, {}, {"hidden_size": 24, "intermediate_size": 72}),
    "below-500": ("trained on numbers below 500", FEW, {}, {"operands": range(100, 500)}),
}


def search(start, dpo):
    """{"loss/budget/rate": accuracies on the dev sets} of KD from `start`, one value a seed."""
    found = {}
    for seed in SELECT_SEEDS:
        task, jobs = lab.Toy(ROOT / "out/toy_dev", seed, "dev"), []
        model = make_start(task, start, dpo)[0]
        for loss, budget, rate in itertools.product(LOSSES, RATE_BUDGETS[start], RATES):
            name, settings = f"{loss}/{budget}/{rate}", {"loss": loss, "max_steps": budget, "lr": rate}
            jobs.append((name, functools.partial(task.kd, f"{start}/{name}", model, **settings)))
        for name, result in lab.run_all(jobs, f"select, {start}, seed {seed}").items():
            found.setdefault(name, []).append(result["accuracy"])
    return found


def best_rates(found):
    """{"loss/budget": the rate with the highest mean accuracy}; of equals the smallest. found: as `search` returns."""
    cells = dict.fromkeys(name.rpartition("/")[0] for name in found)
    return {cell: max(RATES, key=lambda rate: (statistics.fmean(found[f"{cell}/{rate}"]), -rate)) for cell in cells}


def select():
    """toy_selected.json: DPO's settings from dpo_sensitivity.json, KD's rates from a search on the dev sets."""
    sensitivity = lab.read_result("dpo_sensitivity")
    names = {start: dpo_sensitivity.best(sensitivity, start == "warm-up") for start in ("warm-up", "plain")}
    chosen = {start: lab.DPO | dpo_sensitivity.variants()[name] for start, name in names.items()}
    found = {start: search(start, chosen) for start in RATE_BUDGETS}
    rates = {start: best_rates(found[start]) for start in found}
    means = {f"{s}/{k}": [round(v, 4) for v in values] for s in found for k, values in found[s].items()}
    head = {"record": lab.record("python experiments/toy_ablation.py select"), "seeds": SELECT_SEEDS}
    lab.write_result("toy_selected", head | {"dpo": chosen, "rates": rates}, means)


def make_start(task, start, dpo):
    """Runs what comes before KD. Returns (model folder, result). dpo: {"warm-up": settings, "plain": settings}."""
    name = f"start/{start}"
    if start == "none":
        return task.paths["student"], task.initial()
    if start in ("plain", "sft"):
        make_start(task, "warm-up", dpo)
        settings = dpo["plain"] if start == "plain" else {**dpo["warm-up"], "beta": 1e-9, "nll_weight": 1.0}
        return task.folder / name / "student", task.dpo(name, "start/warm-up", **settings)
    settings, position = dpo["warm-up"], {"random": "random", "no-splice-same": "start"}.get(start)
    eta = {"eta": -1e9} if start == "no-splice" else {}
    return task.folder / name / "student", task.warmup(name, position, **settings, **eta)


def rate_of(rates, loss, steps):
    """The rate chosen for the budget nearest to `steps` (ratio)."""
    rates = {int(cell.split("/")[1]): rate for cell, rate in rates.items() if cell.startswith(f"{loss}/")}
    return rates[min(rates, key=lambda budget: abs(math.log(steps / budget)))]


def extra_steps(extra, warmup, short, long):
    """How many KD steps cost what the warm-up cost. short, long: results of KD alone, which give the price of a step."""
    keys = ["teacher_tokens"] if extra == "none + teacher tokens" else ["student_tokens", "teacher_tokens"]
    total = lambda result: sum(result[key] for key in keys)
    return math.ceil(total(warmup) * (long["steps"] - short["steps"]) / (total(long) - total(short)))


def distil(task, condition, start, loss, budget, selected):
    """One KD run."""
    steps, rates, model = budget, selected["rates"]["none"], task.paths["student"]
    if start.startswith("none +"):
        warmup = make_start(task, "warm-up", selected["dpo"])[1]
        alone = (distil(task, condition, "none", loss, budget, selected) for budget in BUDGETS)  # they are there
        steps += extra_steps(start, warmup, *alone)
    else:
        model = make_start(task, start, selected["dpo"])[0]
        rates = selected["rates"]["none" if start == "none" else "warm-up"]
    settings = {**CONDITIONS[condition][2], "loss": loss, "max_steps": steps, "lr": rate_of(rates, loss, steps)}
    return task.kd(f"{condition}/{start}/{loss}/{budget}", model, **settings)


def folder_of(condition):
    """Where the toys of a condition are."""
    return ROOT / "out" / (f"toy_{condition}" if CONDITIONS[condition][3] else "toy_test")


def report(condition, seed):
    """All arms of one condition on the test set of one seed -> SEED/CONDITION.json."""
    selected = lab.read_result("toy_selected")
    _, starts, _, student = CONDITIONS[condition]
    task = lab.Toy(ROOT / "out/toy_test", seed, "test")
    if student:
        task = lab.Toy(folder_of(condition), seed, "test", base=task, **student)
    jobs = []
    for start in starts:
        if not start.startswith("none +"):
            job = functools.partial(make_start, task, start, selected["dpo"])
            jobs.append((f"{condition}/{start}", lambda job=job: job()[1]))
        for loss in LOSSES if starts is STARTS else LOSSES[1:]:
            for budget in BUDGETS:
                job = functools.partial(distil, task, condition, start, loss, budget, selected)
                jobs.append((f"{condition}/{start}/{loss}/{budget}", job))
    runs.write_json(task.folder / f"{condition}.json", lab.run_all(jobs, f"{condition}, seed {seed}"))


def collect():
    """toy_ablation.json: {arm: {"accuracy": one value a seed, and mean costs}} of the seeds that are finished.

    A condition that has none here stays as it is in the file, with its own record.
    """
    old = runs.read_json(FOLDER / "toy_ablation.json")
    records, seeds, rows, selected = old["records"], old["seeds"], {}, lab.read_result("toy_selected")
    for condition in CONDITIONS:
        files = {seed: folder_of(condition) / str(seed) / f"{condition}.json" for seed in REPORT_SEEDS}
        found = {seed: runs.read_json(file) for seed, file in files.items() if file.exists()}
        found = {seed: of for seed, of in found.items() if all(r["code"] == lab.code() for r in of.values())}
        print(f"{condition}: {len(found)} of {len(REPORT_SEEDS)} seeds")
        if not found:
            rows |= {name: row for name, row in old["runs"].items() if name.startswith(f"{condition}/")}
            continue
        records[condition] = lab.record("python experiments/toy_ablation.py")
        seeds[condition] = list(found)
        for name in next(iter(found.values())):
            results = [found[seed][name] for seed in found]
            of_seeds = [key for key in ("accuracy", "replaced") if key in results[0]]
            rows[name] = {key: [round(r[key], 4) for r in results] for key in of_seeds}
            for key in ("steps", "pairs", "student_tokens", "teacher_tokens"):
                if key in results[0]:
                    rows[name][key] = round(statistics.fmean(r[key] for r in results), 1)
    lab.write_result("toy_ablation", {"records": records, "seeds": seeds, "dpo": selected["dpo"]}, rows)


def main(argv):
    lab.commit()
    match argv:
        case ["select"]:
            select()
        case ["report", condition, *seeds] if condition in CONDITIONS:
            for seed in map(int, seeds or REPORT_SEEDS):
                report(condition, seed)
        case ["collect"]:
            collect()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
