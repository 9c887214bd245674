"""The figures of tools/TEACHING.md: out/warmup and the runs in out/teach -> experiments/teaching.json and the page's blocks.

    python tests/teaching.py

The page says how the runs are made: out/teach/RULE-SEED for each of RULES, the toys out/toy-SEED.
"""

import contextlib
import io
import itertools
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import lab
from tables import difference, percent

from lib import runs, scoring
from tools import explain

PAGE, SEEDS, ETA = ROOT / "tools/TEACHING.md", (1, 2, 3, 4, 5), 4.0
RULES = {  # name of OUT -> its row
    "paper": "the paper's rule",
    "reseeded": "the paper's rule, `--seed 1`",
    "eta8": "1. eta 8",
    "eta8-short": "1., and `--max-steps 6`",
    "after": "2. `--replace after`",
    "teacher-alone": "3. the teacher alone",
    "sum": "4. the sum",
    "random": "5. a random place",
}
CHANGES = ("teacher-alone", "sum", "random")  # these change the code, the others are a flag
WALK = r" +0  kept|.*<- t\*$|t\* = min|teacher from|y\+,|y-,|tokens +\["
BLOCKS = re.compile(r"(<!-- experiments/teaching\.json: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def walk(out):
    """The lines of `explain` that the page shows, of prompt 1 of a run with the rule and the toy as they are."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        explain.explain(out, 1)
    return [line.rstrip() for line in printed.getvalue().splitlines() if re.match(WALK, line)]


def is_right(pair):
    """Whether y+ of one of the toy's pairs ends in the sum."""
    return scoring.final_number(pair["chosen"]) == sum(map(int, re.findall(r"\d+", pair["prompt"])))


def figures(outs, papers):
    """What is reported of one rule's runs, {name: one value a seed}. papers: the OUTs of the paper's rule."""
    found, tables = ([runs.read_json(out / name) for out in outs] for name in ("mismatch.json", "summary.json"))
    t_stars, theirs = ([[r["t_star"] for r in lab.read_samples(out)] for out in some] for some in (outs, papers))
    pairs = [runs.read_jsonl(out / "pairs.jsonl") for out in outs]
    values = {"mismatched": [f["replaced"] for f in found], "pairs": [len(of) for of in pairs]}
    values["t_star"] = [round(statistics.fmean(t for t in of if t >= 0), 2) for of in t_stars]
    values["moved"] = [sum(a != b for a, b in zip(*both, strict=True)) for both in zip(t_stars, theirs)]
    values["right"] = [round(statistics.fmean(map(is_right, of)), 4) for of in pairs]
    return values | {when: [table[f"student {when}"]["accuracy"] for table in tables] for when in ("before", "after")}


def table(result):
    """The page's table, as Markdown."""
    of, whole = result["runs"], lambda values: f"{statistics.fmean(values):,.0f}"
    header = ["rule", "samples with a mismatch", "another t\\* than the paper's", "mean t\\*", "pairs", "y+ right, %"]
    header += ["accuracy after, %", "minus the paper's rule", "on each toy"]
    none = difference(of["paper"]["before"], of["paper"]["after"])
    rows = [["no warm-up", *[""] * 5, percent(of["paper"]["before"]), none, ""]]
    for name, title in RULES.items():
        row, base = of[name], of["paper"]["after"]
        cells = [title, whole(row["mismatched"]), "" if name in ("paper", "reseeded") else whole(row["moved"])]
        cells += [
            f"{statistics.fmean(row['t_star']):.1f}",
            whole(row["pairs"]),
            f"{100 * statistics.fmean(row['right']):.0f}",
        ]
        each = ", ".join(f"{100 * (a - b):+.1f}" for a, b in zip(row["after"], base, strict=True))
        minus = ["", ""] if name == "paper" else [difference(row["after"], base), each]
        rows.append([*cells, percent(row["after"]), *minus])
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def moved_on_the_shipped_toy(out):
    """{exercise: [samples in which its rule finds another t*, of how many, some of them as "prompt sample"]}."""
    first = lambda values: next((t for t, value in enumerate(values) if value > ETA), -1)
    found = {"teacher-alone": [], "sum": []}
    for r in (records := lab.read_samples(out)):
        margins = [q - p for q, p in zip(r["student_logprobs"], r["teacher_logprobs"])]
        t_stars = {
            "teacher-alone": first(-p for p in r["teacher_logprobs"]),
            "sum": first(itertools.accumulate(margins)),
        }
        for name, t in t_stars.items():
            if t != first(margins):
                found[name].append(f"{r['prompt_id']} {r['sample_id']}")
    return {name: [len(samples), len(records), samples[:3]] for name, samples in found.items()}


def fill(text, result):
    """The page, with its blocks as the result file has them."""
    blocks = {"walk": ["```", *result["walk"], "```"], "runs": table(result)}
    return BLOCKS.sub(lambda found: found[1] + "\n".join([*blocks[found[2]], found[4]]), text)


def main():
    outs = {name: [ROOT / f"out/teach/{name}-{seed}" for seed in SEEDS] for name in RULES}
    for name, of in {**outs, "walk": [ROOT / "out/warmup"]}.items():
        now, changed = runs.code_fingerprints(), {"warmup_distill.py"} if name in CHANGES else set()
        for code in (runs.read_json(out / "args.json")["code"] for out in of):
            assert {file for file in code.keys() | now if code.get(file) != now.get(file)} == changed, (
                f"{name}: other code"
            )
    head = {"record": lab.record("the commands of tools/TEACHING.md, then python tests/teaching.py"), "seeds": SEEDS}
    head |= {"walk": walk(ROOT / "out/warmup"), "shipped": moved_on_the_shipped_toy(ROOT / "out/warmup")}
    found = {name: figures(outs[name], outs["paper"]) for name in RULES}
    del found["reseeded"]["moved"]  # its samples are others
    lab.write_result("teaching", head, found)
    result = runs.read_json(lab.FOLDER / "teaching.json")
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
