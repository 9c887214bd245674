"""tools/TEACHING.md: its changes apply and do something, its commands run, its figures are those of teaching.json."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import accumulate

import pytest
import teaching
from conftest import QUIET, ROOT

from lib import runs

PAGE = teaching.PAGE.read_text(encoding="utf-8")
DIFFS = dict(zip(teaching.CHANGES, re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL), strict=True))
# The first command of the page, those of exercises 1 and 2, that of 3 to 5
COMMANDS = [
    shlex.split(line, comments=True)[2:] for line in re.findall(r"^python warmup_distill\.py .*", PAGE, re.MULTILINE)
]
# Few prompts and steps. At this eta, which a command's own flags go before, the rules differ in more samples than at 4
ETA = 6
FEW = f"--eta {ETA} --limit 60 --samples 2 --max-steps 1 --batch-size 2 --micro-batch-size 2 --eval-limit 2 --device cpu".split()
# What a process in the tree does: runs the commands one after the other, prints the error of one that is refused
DRIVER = """
import sys
sys.path.insert(0, "")
import warmup_distill
from lib.runs import UserError
from tools import explain
for argv in {jobs}:
    print("--- job")
    try:
        (warmup_distill.main if argv[0].startswith("--") else explain.main)(argv)
    except UserError as error:
        print(f"error: {{error}}")
"""


def first(values, holds):
    return next((t for t, value in enumerate(values) if holds(value)), -1)


def margins(record):
    return [q - p for q, p in zip(record["student_logprobs"], record["teacher_logprobs"])]


class Tree:
    """A copy of the repository, in which the page's changes are made and taken back."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "out/teach"
        for name in ("lib", "tools", "toy"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ROOT.glob("*.py"):
            shutil.copy(file, folder)

    def do(self, *jobs):
        """What each of the jobs, lists of words, has printed."""
        command = [sys.executable, "-c", DRIVER.format(jobs=jobs)]
        environment = {**os.environ, **QUIET}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split("--- job\n")[1:]

    def apply(self, change, *flags):
        (self.folder / "rule.diff").write_text(change)
        subprocess.run(["git", "apply", *flags, "rule.diff"], cwd=self.folder, check=True)

    def records(self, name):
        files = sorted((self.out / name / "pairs").glob("*.jsonl"))
        return [record for file in files for record in runs.read_jsonl(file)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """With OUT `paper`, of the rule as it is, those of the exercises that are a flag, and the walk's first micro-batch."""
    tree = Tree(tmp_path_factory.mktemp("tree"))
    small = [[*FEW, *words] for words in ([*COMMANDS[0], "--out", "out/teach/paper"], *COMMANDS[1:3])]
    tree.do(*small, [*COMMANDS[0], "--limit", "25", "--pairs-only", "--device", "cpu"])
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# The exercises
# ---------------------------------------------------------------------------------------------------------------------


def rules(record):
    """{exercise: t* of a record}, as one would find it without torch; "random": whether there is one, here 0."""
    at = first(margins(record), lambda m: m > ETA)
    return {
        "paper": at,
        "after": at,
        "eta8": first(margins(record), lambda m: m > 8),
        "teacher-alone": first(record["teacher_logprobs"], lambda p: p < -ETA),
        "sum": first(accumulate(margins(record)), lambda m: m > ETA),
        "random": min(at, 0),
    }


def test_exercises_that_are_a_flag(tree):
    paper, eta8, after = (tree.records(name) for name in ("paper", "eta8", "after"))
    for name, records in (("paper", paper), ("eta8", eta8), ("after", after)):
        assert [r["t_star"] for r in records] == [rules(r)[name] for r in paper]
    assert 0 < sum(r["t_star"] >= 0 for r in eta8) < sum(r["t_star"] >= 0 for r in paper) < len(paper)
    for record in after:
        if record["t_star"] >= 0:
            assert record["prefix_len"] == record["t_star"] + 1
            assert record["chosen_ids"][: record["prefix_len"]] == record["response_ids"][: record["prefix_len"]]
    assert len({(tree.out / name / "pairs.jsonl").read_text() for name in ("paper", "eta8", "after")}) == 3


@pytest.mark.parametrize("name, change", DIFFS.items(), ids=DIFFS)
def test_exercises_that_are_a_change(tree, name, change):
    """The rule does what the page says; an OUT of the old rule is refused; `explain` prints no formula that is false."""
    paper, new = tree.records("paper"), [*FEW, *(word.replace("NAME", name) for word in COMMANDS[3])]
    theirs = [r["t_star"] for r in paper]
    # Tours of two samples whose t* should be the paper's, and of three others; one of the paper's OUT under the new rule
    differs = [rules(r)[name] != t for r, t in zip(paper, theirs)]
    of_kind = lambda kind: [i for i, differ in enumerate(differs) if differ == kind]
    picked = [*of_kind(False)[:2], *of_kind(True)[:3]]
    tour = lambda i, out: [out, str(paper[i]["prompt_id"]), str(paper[i]["sample_id"])]
    tours = [*(tour(i, new[-1]) for i in picked), tour(picked[-1], "out/teach/paper")]
    tree.apply(change)
    try:
        refused, _, *told, old = tree.do([*new[:-1], "out/teach/paper"], new, *tours)
    finally:
        tree.apply(change, "-R")
    assert "made otherwise (warmup_distill.py: " in refused and "give another folder" in refused
    assert "first_mismatch as it is now finds" in old and "the code has changed since" in old
    records = tree.records(name)
    assert [r["response_ids"] for r in records] == [r["response_ids"] for r in paper]  # the samples are the same
    ours = [r["t_star"] for r in records]
    if name == "random":
        assert [min(t, 0) for t in ours] == [rules(r)[name] for r in paper]
        shares = [t / len(r["response_ids"]) for t, r in zip(ours, records) if t >= 0]
        assert 0 <= min(shares) < 0.2 and 0.8 < max(shares) < 1
    else:
        assert ours == [rules(r)[name] for r in paper]
    found, before = (runs.read_json(tree.out / of / "mismatch.json") for of in (name, "paper"))
    assert found["t_star_histogram"] != before["t_star_histogram"]
    assert found["margin_histogram"] == before["margin_histogram"]
    assert ours != theirs
    for i, text in zip(picked, told, strict=True):
        formula = re.search(r"t\* = min \{ t : m_t > eta \} = |= eta: no mismatch", text)
        assert bool(formula) == (ours[i] == theirs[i]), text
        assert ("was found by the rule of first_mismatch" in text) == (ours[i] != theirs[i])
        assert "the code has changed" not in text


# ---------------------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_result_file():
    """Walk and table, letter by letter; and what the text says in figures."""
    result = runs.read_json(ROOT / "experiments/teaching.json")
    assert teaching.fill(PAGE, result) == PAGE and len(teaching.BLOCKS.findall(PAGE)) == 2
    assert {"command", "date", "commit", "cpu", "cores", "torch", "transformers"} <= result["record"].keys()
    assert result["runs"].keys() == teaching.RULES.keys()
    assert all(len(values) == len(result["seeds"]) == 5 for row in result["runs"].values() for values in row.values())
    for name, (moved, samples, examples) in result["shipped"].items():
        before, of_rule = PAGE.split(DIFFS[name])[0], f"in {moved} of {samples:,} samples"
        assert of_rule in before.split("**")[-1] and all(f"{example}`" in before for example in examples)
    # What the text below the table says in figures stands in it
    text, cells = PAGE.split("<!-- end -->")[-1].replace("95% interval", ""), f"2,000 {teaching.table(result)}"
    figures = re.findall(r"[-+]?\d+[.,]\d+|\d+%|\d+ pairs", text)
    assert len(figures) > 5
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(re.sub('%| pairs', '', figure))}(?![\d.])", cells), figure


def test_a_figure_that_was_changed_by_hand_is_found():
    result = runs.read_json(ROOT / "experiments/teaching.json")
    result["runs"]["sum"]["after"][2] += 0.01
    assert teaching.fill(PAGE, result) != PAGE


def test_walk_is_what_explain_prints(tree):
    """Of the first micro-batch's samples as they are now; other processors may differ in a log-prob's last digit."""
    words = [re.split(r"(-?\d+\.\d+)", line) for line in teaching.walk(tree.folder / "out/warmup")]
    expected = [re.split(r"(-?\d+\.\d+)", line) for line in runs.read_json(ROOT / "experiments/teaching.json")["walk"]]
    for ours, theirs in zip(words, expected, strict=True):
        assert ours[::2] == theirs[::2]
        assert [float(word) for word in ours[1::2]] == pytest.approx([float(word) for word in theirs[1::2]], abs=2e-3)
