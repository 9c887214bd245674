"""experiments/: statistics by hand, commands that parse, resumption, tables made of the result files; bench/ at toy size."""

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUIET, ROOT
from transformers import AutoTokenizer

import dpo
import warmup_distill
from lib import runs
from tools import report
from toy import make

FOLDER = ROOT / "experiments"
sys.path[:0] = [str(FOLDER), str(FOLDER / "bench")]

import dpo_sensitivity
import dpo_step
import harness
import kd_loss
import lab
import mismatch
import pipeline
import sampling
import scaling
import splice
import tables
import toy_ablation

RECORD = {"command", "date", "commit", "cpu", "cores", "torch", "transformers"}
TINY = ["--shape", "tiny", "--dtype", "float32", "--repeat", "1"]
SHORT = ["--prompt-length", "8", "--max-new-tokens", "9"]

# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_intervals_by_hand():
    """1, 2, 3, 4: mean 2.5, s = sqrt(5 / 3) = 1.29099, s / sqrt(4) = 0.645497, t(3) = 3.182: half width 2.05397."""
    assert lab.paired([2, 4, 6, 8], [1, 2, 3, 4]) == (2.5, pytest.approx(2.05397, abs=1e-5))
    # Entries of the usual table, by degrees of freedom
    table = {1: 12.706, 4: 2.776, 9: 2.262, 29: 2.045, 30: 2.0423, 63: 1.9983}
    assert {df: report.t_quantile(df) for df in table} == pytest.approx(table, abs=0.002)
    assert len(report.T_QUANTILES) == 29 and sorted(report.T_QUANTILES, reverse=True) == report.T_QUANTILES
    # Paired: seeds that vary a lot and always gain 1 have the interval [1, 1]
    assert lab.paired([11, 51, 91], [10, 50, 90]) == (1, 0)
    with pytest.raises(ValueError, match="zip"):
        lab.paired([1, 2], [1])
    assert tables.difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == "**+10.0 [10.0, 10.0]**"
    assert tables.difference([0.5, 0.6], [0.6, 0.5]) == "+0.0 [-127.1, 127.1]"  # t(1) s / sqrt(2) = 12.706 x 10


def test_mismatch_by_hand():
    """Two groups, three samples, margins (0, 5), (1, 1), (9, 0, 6): rates by token, by sample, and the places of t*."""
    rows = [(0, [0.0, 5.0], False, True), (0, [1.0, 1.0], True, True), (1, [9.0, 0.0, 6.0], True, False)]
    samples = [dict(zip(("group", "margins", "right", "chosen_right"), row)) for row in rows]
    found = mismatch.at_eta(samples, 4)
    # behind: (5), and all of (9, 0, 6). The groups' deviations from 2/3 sum to -1/3 and 1/3: half of the interval is
    # 12.706 sqrt(2 / 1 x 2/9) / 3 = 2.82356
    assert found["samples"] == {"mean": 0.66667, "half": pytest.approx(2.82356, abs=1e-5), "count": 3}
    # With groups of one size it is that of the groups' means: 0 and 1 of two values each
    half = mismatch.mean([(0, 0), (0, 0), (1, 1), (1, 1)])["half"]
    assert half == pytest.approx(lab.paired([0, 1], [0, 0])[1], abs=1e-4)
    # Less another list, paired by group: with groups of one size, the interval of the groups' differences, -1 and 2
    less = mismatch.mean([(0, 1), (0, 1), (1, 4), (1, 2)], [(0, 2), (0, 2), (1, 1), (1, 1)])
    assert less == {"mean": 0.5, "half": pytest.approx(lab.paired([1, 3], [2, 1])[1], abs=1e-4), "count": 4}
    assert (found["tokens"], found["behind"], found["t_star"]) == (0.428571, 0.57143, [0, 0, 1])
    assert mismatch.at_eta(samples, 0.5)["samples"]["mean"] == 1 and mismatch.at_eta(samples, 10)["t_star"] is None
    places = [{"group": 0, "margins": [0.0] * t + [9.0]} for t in (7, 0, 3, 0, 8)]
    assert mismatch.at_eta(places, 4)["t_star"] == [0, 3, 7]
    means = {name: of["mean"] for name, of in mismatch.right(samples).items()}
    assert means == {"y": 0.66667, "y+": 0.66667, "y+ minus y": 0, "y alone": 0.33333, "y+ alone": 0.33333}
    for k, sample in enumerate(samples):
        sample["prompt_id"] = k
    of = mismatch.by_student({"initial": samples, "trained": samples[:2]})
    # KL: 22 nats over 7 tokens, 7 over 4; mismatches in 2 of 3 samples, 1 of 2; right 2 of 3, 1 of 2
    found = {(name, what): [part["mean"] for part in parts] for name in of for what, parts in of[name].items()}
    assert found["initial", "KL(q, p)"] == [3.14286, 0] and found["trained", "KL(q, p)"] == [1.75, -1.39286]
    assert found["trained", "mismatch"] == found["trained", "right"] == [0.5, -0.16667]
    for sample in samples:
        sample["kinds"] = ["digits", "words", "other"][: len(sample["margins"])]
    shares = {name: (of["mean"], of["count"]) for name, of in mismatch.by_token(samples, 4).items()}
    assert shares == {"tokens 0 to 9": (0.42857, 7), "digits": (0.33333, 3), "words": (0.33333, 3), "other": (1, 1)}
    long = {"group": 0, "margins": [0.0] * 321, "kinds": ["words"] * 321}
    counts = {name: of["count"] for name, of in mismatch.by_token([long], 4).items()}
    assert (counts["tokens 10 to 19"], counts["tokens 160 to 319"], counts["tokens 320 to 999999"]) == (10, 160, 1)
    assert [mismatch.kind(text) for text in (" the", "A1", " 12", "=", "\n")] == ["words"] * 2 + ["digits"] + [
        "other"
    ] * 2


def test_mismatch_of_a_run(tmp_path, monkeypatch):
    """Two OUTs of the toy: each answer checked anew, and two folders' samples in two groups."""
    outs = [tmp_path / "a", tmp_path / "b"]
    for seed, out in enumerate(outs):
        flags = {
            "pairs_only": True,
            "limit": 6,
            "seed": seed,
            "samples": 4,
            "prompts_per_batch": 6,
            "toy": ROOT / "toy",
        }
        lab.call("warmup_distill", flags, out)
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    monkeypatch.setattr(lab, "commit", lambda: "0" * 40)
    mismatch.main(["toy", *map(str, outs)])
    result = runs.read_json(tmp_path / "mismatch_toy.json")
    samples = [row for out in outs for file in (out / "pairs").glob("*.jsonl") for row in runs.read_jsonl(file)]
    assert result["sizes"]["prompts"] == 12 and result["sizes"]["samples"] == len(samples) == 48
    replaced = sum(row["t_star"] >= 0 for row in samples)
    assert result["runs"]["eta"]["4"]["samples"]["mean"] == pytest.approx(replaced / 48, abs=1e-5) != 0
    gold = {row["prompt"]: row["response"] for row in runs.read_jsonl(ROOT / "toy/train.jsonl")}
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy/student")
    answer = lambda row, key: tokenizer.decode(row[key], skip_special_tokens=True).rpartition("=")[2]
    for name, key in (("y", "response_ids"), ("y+", "chosen_ids")):
        same = [answer(r, key) == gold[r["prompt"][5:]].rpartition("=")[2] for r in samples if r["t_star"] >= 0]
        found = result["runs"]["right"]["with a mismatch"][name]
        assert (found["mean"], found["count"]) == (pytest.approx(sum(same) / replaced, abs=1e-5), replaced)
    ends = result["runs"]["token"]["the end"]["count"]
    assert ends == sum(row["ended"] for row in samples) and result["outs"] == 2
    found = result["runs"]["token"].items()
    assert sum(of["count"] for name, of in found if name.startswith("tokens")) == result["sizes"]["tokens"]
    # Two students, the second one the teacher itself, which is at distance 0; the differences are paired by prompt
    of_real = flags | {"teacher": ROOT / "toy/teacher", "data": ROOT / "toy/train.jsonl", "max_new_tokens": 48}
    students = [tmp_path / name for name in ("student", "teacher")]
    for out in students:
        lab.call("warmup_distill", of_real | {"student": ROOT / "toy" / out.name}, out)
    mismatch.main(["pair", "--students", *map(str, students)])
    result = runs.read_json(tmp_path / "mismatch_pair.json")
    samples = lab.read_samples(students[0])
    total = sum(sum(r["student_logprobs"]) - sum(r["teacher_logprobs"]) for r in samples)
    kl = total / sum(len(r["response_ids"]) for r in samples)
    assert list(result["runs"]) == ["student", "teacher"] and (result["sizes"]["prompts"], result["outs"]) == (6, 1)
    found = [of["mean"] for name in ("student", "teacher") for of in result["runs"][name]["KL(q, p)"]]
    assert found == pytest.approx([kl, 0, 0, -kl], abs=2e-4) and kl > 0.05
    for pair in (outs, [outs[0], outs[0]]):  # of two seeds; the same name
        with pytest.raises(SystemExit, match="not the same but for the student, or one name twice"):
            mismatch.main(["pair", "--students", *map(str, pair)])


# ---------------------------------------------------------------------------------------------------------------------
# Choices and controls
# ---------------------------------------------------------------------------------------------------------------------


def test_rates_of_kd():
    """The highest mean, of equals the smallest rate; for another number of steps the rate of the nearest budget."""
    value = {5e-4: [0.1, 0.9], 1e-3: [0.6, 0.6], 2e-3: [0.6, 0.6], 4e-3: [0.0, 0.0], 8e-3: [0.5, 0.5]}
    cells = [f"{loss}/{budget}" for loss in toy_ablation.LOSSES for budget in toy_ablation.BUDGETS]
    found = {f"{cell}/{rate}": values for cell in cells for rate, values in value.items()}
    assert toy_ablation.best_rates(found) == dict.fromkeys(cells, 1e-3)
    rates = {"a/25": 25, "a/100": 100, "a/400": 400, "b/30": 30}
    nearest = {30: 25, 49: 25, 51: 100, 199: 100, 201: 400, 900: 400}
    assert {steps: toy_ablation.rate_of(rates, "a", steps) for steps in nearest} == nearest
    # Extra steps: a warm-up of 1,000 and 500 tokens; a KD step has 20 and 10, and a start of 7 that is paid once
    warmup = {"student_tokens": 1000, "teacher_tokens": 500}
    run = lambda steps: {"steps": steps, "student_tokens": 20 * steps + 7, "teacher_tokens": 10 * steps}
    assert toy_ablation.extra_steps("none + tokens", warmup, run(25), run(100)) == 50
    long = run(100) | {"teacher_tokens": 925}
    assert toy_ablation.extra_steps("none + teacher tokens", warmup, run(25), long) == 56  # 500 / 9, rounded up


def test_moved_mismatch_is_a_control_and_goes_away():
    original = warmup_distill.first_mismatch
    q, p = torch.zeros(3, 4), torch.tensor([[0.0, 0, -9, 0], [0, 0, 0, 0], [0, -9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    found = lambda: warmup_distill.first_mismatch(q, p, mask, 4.0).tolist()
    assert found() == [2, -1, 1]
    with lab.moved_mismatch("start", 0):
        assert found() == [0, -1, 0]
    with lab.moved_mismatch("random", 0):
        drawn = [found() for _ in range(60)]
    with lab.moved_mismatch("random", 0):
        assert drawn == [found() for _ in range(60)]
    # Without a mismatch there is nothing to move; never beyond the response's end
    assert [set(places) for places in zip(*drawn)] == [{0, 1, 2, 3}, {-1}, {0, 1}]
    assert warmup_distill.first_mismatch is original


# ---------------------------------------------------------------------------------------------------------------------
# Commands and runs
# ---------------------------------------------------------------------------------------------------------------------


SCRIPT = FOLDER / "paper.sh"
HEADER = re.sub(r"\\\n#", "", re.match("(#.*\n)+", SCRIPT.read_text())[0])
EXAMPLES = re.findall(r"^# +((?!LAUNCH)(?:\w+=.*)?bash experiments/paper.sh)", HEADER, re.MULTILINE)
ARMS = [
    "kd-forward_kl",
    "warm-forward_kl",
    "kd-reverse_kl",
    "warm-reverse_kl",
    "kd-skew_reverse_kl",
    "warm-skew_reverse_kl",
]


def commands_of(example, **environment):
    """[(module, the arguments that its parser returns)] of one of the header's commands, and the folders of each page."""
    environment |= {"LAUNCH": "echo", "PATH": "/usr/bin:/bin"}
    variables = [word for word in shlex.split(example) if word != "bash" and "=" in word]
    command = ["env", *variables, "bash", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    commands, pages = ([line for line in lines if ("tools.report" in line) == is_page] for is_page in (False, True))
    parse = lambda file, *argv: importlib.import_module(file.removesuffix(".py")).parse_args(argv)
    assert all(page[:3] + page[-2:-1] == ["python", "-m", "tools.report", "--max-samples"] for page in pages)
    return [(words[0], parse(*words)) for words in commands], [page[3:-2] for page in pages]


@pytest.mark.parametrize("example", EXAMPLES)
def test_commands_of_paper_sh_parse(example):
    """Each arm begins with its student; all share a teacher, data and its stored log-probs; each is evaluated in its folder."""
    assert "NOT RUN" in HEADER and len(EXAMPLES) == 3
    parsed, pages = commands_of(example)
    out, warmup = parsed[0][1].out.removesuffix("/student"), parsed[1][1]
    arms = ARMS[2:4] if "TOY" in example else ARMS
    kd = [args for script, args in parsed if script == "kd.py"]
    warmups = [args for script, args in parsed if script == "warmup_distill.py"]
    evaluations = {args.out: args for script, args in parsed if script == "eval.py"}
    assert [args.out for args in warmups] == [f"{out}/seed-{seed}/warmup" for seed in range(3)]
    assert {args.out for args in kd} == {f"{out}/seed-{seed}/{arm}" for seed in range(3) for arm in arms}
    for page, pair in zip(pages, (arms[k : k + 2] for k in range(0, len(arms), 2)), strict=True):
        assert page == [f"{out}/seed-{seed}/{arm}" for arm in [*pair, "warmup"] for seed in range(3)] + [
            f"{out}/student"
        ]
    assert (
        evaluations.keys() == {folder for page in pages for folder in page} and warmup.samples == 8 and warmup.eta == 4
    )
    if "TOY" not in example:
        assert warmup.lr == 5e-7 and "toy" not in f"{warmup.student} {warmup.teacher} {warmup.data}"
    for args in kd:
        seed, arm = args.out.removeprefix(f"{out}/seed-").split("/")
        began = warmup.student if arm.startswith("kd-") else f"{out}/seed-{seed}/warmup/student"
        assert (Path(args.student).resolve(), args.seed, args.loss) == (
            Path(began).resolve(),
            int(seed),
            arm.split("-")[1],
        )
        assert (args.mode, args.teacher_cache, args.responses) == ("gold", f"{out}/teacher-cache", None)
    for folder, args in evaluations.items():
        assert args.model == [f"{folder}/student"] or folder == f"{out}/student"
    different = ("out", "student", "seed", "loss")
    assert len({str({k: v for k, v in vars(args).items() if k not in different}) for args in kd}) == 1


def test_commands_of_real_pair_sh_parse(tmp_path):
    """The samples differ in student and data alone, and the warmed-up student is sampled again."""
    rows = [{"question": "?" * (k % 7), "answer": str(k)} for k in range(1200)]
    runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    environment = {
        "LAUNCH": "echo",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "OUT": str(out),
        "TEACHER": "T",
        "STUDENT": "S",
    }
    command = ["bash", FOLDER / "real_pair.sh", tmp_path / "rows.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    samples = [warmup_distill.parse_args(words) for file, *words in lines if file == "warmup_distill.py"]
    [aligned] = [dpo.parse_args(words) for file, *words in lines if file == "dpo.py"]
    gathered = [words[1:] for file, *words in lines if file == "python"]  # the result files' commands, for the end
    assert [args.out.removeprefix(f"{out}/held_out/") for args in samples[1:]] == ["initial", "dpo", "teacher"]
    assert [args.student for args in samples] == ["S", "S", f"{aligned.out}/student", "T"]
    different = ("out", "student", "data", "eta")
    assert len({str({k: v for k, v in vars(args).items() if k not in different}) for args in samples}) == 1
    assert [args.eta for args in samples] == [4, 1e9, 1e9, 1e9] and aligned.nll_weight == 0
    held_out = [args.out for args in samples[1:]]
    assert gathered == [["real", samples[0].out], ["held_out", "--students", *held_out]]
    expected = {"train": rows[:1000], "held_out": rows[-128:]}
    for name, part in expected.items():  # sorted is stable
        assert runs.read_jsonl(out / f"{name}.jsonl") == sorted(part, key=lambda row: len(row["question"])), name
    assert {args.data for args in samples} == {str(out / f"{name}.jsonl") for name in expected}


def test_variables_of_paper_sh():
    """On-policy KD has nothing to share; without EVAL_DATA there is no eval.py; own data have the instruction sets."""
    own = {
        "DATA": "d.jsonl --prompt-column p",
        "TEACHER": "T",
        "STUDENT": "S",
        "SEEDS": "4 5",
        "LOSSES": "jsd",
        "OUT": "o",
    }
    parsed, [page] = commands_of("", **own, MODE="teacher", FLAGS="--lr 1 --save-students 3", KD_FLAGS="--lr 2")
    assert [script for script, _ in parsed[:4]] == ["eval.py", "warmup_distill.py", "eval.py", "kd.py"] and len(
        parsed
    ) == 13
    evaluated, warmup, _, kd = (args for _, args in parsed[:4])
    assert evaluated.data == ["selfinst", "vicuna", "sni", "unni"] and evaluated.template == "auto"
    assert (warmup.data, warmup.prompt_column, warmup.teacher, warmup.student, warmup.lr) == (
        "d.jsonl",
        "p",
        "T",
        "S",
        1,
    )
    assert (kd.mode, kd.responses, kd.teacher_cache) == ("teacher", "o/responses", "o/teacher-cache")
    assert (kd.lr, kd.save_students, kd.seed, warmup.seed, page[0]) == (2, 3, 4, 4, "o/seed-4/kd-jsd")
    parsed, [page] = commands_of("", **own, MODE="student", EVAL_DATA="")
    assert [script for script, _ in parsed] == ["warmup_distill.py", "kd.py", "kd.py"] * 2 and len(page) == 6
    assert {(args.mode, args.teacher_cache, args.responses) for _, args in parsed[1:3]} == {("student", None, None)}
    parsed, _ = commands_of("", **own, TOP_K="0", EVAL_DATA="")
    assert {(args.mode, args.teacher_cache) for _, args in parsed[1:3]} == {("gold", None)}


def test_paper_sh_on_the_toy(tmp_path):
    """All stages, without an evaluation; then again, with one: what is there is taken up, the rest is done."""
    small = {
        "WARMUP_FLAGS": "--limit 8 --samples 2 --eval-limit 4",
        "KD_FLAGS": "--limit 40",
        "EVAL_FLAGS": "--limit 2",
    }
    small |= {"FLAGS": "--max-steps 3 --save-students 2", "SEEDS": "0", "LAUNCH": sys.executable, "TOY": "1"}
    environment = {**os.environ, **QUIET, **small, "OUT": str(tmp_path), "MODE": "teacher"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(**more):
        done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, check=False, env=environment | more)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    first = run(EVAL_DATA="")
    folders = {name: tmp_path / "seed-0" / name for name in ("warmup", "kd-reverse_kl", "warm-reverse_kl")}
    made = [p for p in tmp_path.rglob("*.*") if p.suffix in (".safetensors", ".jsonl") and p.name != "pairs.jsonl"]
    times = [p.stat().st_mtime_ns for p in made]
    assert len([*tmp_path.glob("responses/*.jsonl")]) == len([*tmp_path.glob("teacher-cache/0*")]) == 2
    for stage in ("responses", "teacher-cache"):  # made by the first arm for the second
        assert first.count(f"{stage}: 2 of 2 batches were there already\n") == 1
    second = run(EVAL_DATA="toy=toy/test.jsonl --metric rouge --seeds 10 --max-new-tokens 8 --threads 1")
    assert all(f"training: {folder}/student was there already\n" in second for folder in folders.values())
    assert times == [p.stat().st_mtime_ns for p in made]
    for name, folder in folders.items():
        steps = [f"{folder}/students/step-{step:06d}" for step in (1, 2)]
        assert [*runs.read_json(folder / "eval" / "table.json")["models"]] == [f"{folder}/student", *steps], name
    assert [*runs.read_json(tmp_path / "student/eval/table.json")["models"]] == ["toy/student"]
    assert (folders["kd-reverse_kl"] / "report.html").is_file()


@pytest.fixture
def task(tmp_path):
    """A `lab.Toy` with a tiny toy of its own."""
    tiny = make.Recipe(16, 32, batch_size=4, lr=1e-3, steps=2)
    return lab.Toy(tmp_path, 3, "dev", teacher=tiny, student=tiny, train=40, dev=8, test=8)


def test_variants_parse(monkeypatch, task):
    """Every variant of the sensitivity and of the ablation's KD, through the parsers of the scripts."""
    parsed = {}

    def parse(script, settings, folder):
        parsed[folder] = importlib.import_module(script).parse_args(lab.flags({**settings, "out": folder}))
        raise StopIteration  # parsed is enough

    def only_parse(folder, work, *rest, **more):
        with pytest.raises(StopIteration):
            work()

    monkeypatch.setattr(lab, "call", parse)
    monkeypatch.setattr(lab, "resumable", only_parse)
    for name, changes in dpo_sensitivity.variants().items():
        of_pairs = {key: changes.pop(key) for key in dpo_sensitivity.PAIR_FLAGS if key in changes}
        task.warmup(f"pairs/{name}", pairs_only=True, **of_pairs)
        task.dpo(f"dpo/{name}", "pairs", **changes)
    task.warmup("no-splice", eta=-1e9)
    for condition, (_, _, flags, _) in toy_ablation.CONDITIONS.items():
        for loss in toy_ablation.LOSSES:
            task.kd(f"{condition}/{loss}", task.paths["student"], loss=loss, max_steps=100, **flags)
    assert {args.seed for args in parsed.values()} == {3} and len(parsed) > 80
    assert parsed[task.folder / "dpo/sft"].beta == 1e-9 and parsed[task.folder / "no-splice"].eta == -1e9
    # The sensitivity's first row is the toy's default
    toy = warmup_distill.TOY
    assert lab.DPO.items() <= toy.items() and lab.DPO_SIZE.items() <= toy.items()


def test_a_toy_with_another_student(tmp_path, task, monkeypatch):
    """The base's teacher and problems; a student that is trained on other problems, none of them held out."""
    drawn, held_out, build = [], [], make.build_model
    monkeypatch.setattr(make, "train", lambda model, recipe, draw, name: drawn.append((recipe, draw(3)[0])) or 1.0)
    monkeypatch.setattr(make, "build_model", lambda *rest: held_out.append(rest[3]) or build(*rest))
    changes = {"hidden_size": 16, "intermediate_size": 32, "steps": 2}
    other = lab.Toy(tmp_path / "other", 3, "dev", base=task, operands=range(100, 500), **changes)
    for name in ("teacher", "train.jsonl", "dev.jsonl", "test.jsonl"):
        assert runs.fingerprint(other.toy / name) == runs.fingerprint(task.toy / name), name
    [(recipe, ids)] = drawn
    assert (recipe.hidden_size, recipe.intermediate_size, recipe.steps) == (16, 32, 2)
    tokenizer = AutoTokenizer.from_pretrained(other.toy / "student")
    for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
        problem, _, response = text.partition(":")
        a, b = map(int, problem.split("+"))
        assert 100 <= min(a, b) and max(a, b) < 500 and response.endswith(f"={a + b}")
    assert len(make.OPERANDS) == 900  # as before
    rows = [row for name in ("dev", "test") for row in runs.read_jsonl(other.toy / f"{name}.jsonl")]
    prompts = {row["prompt"] for row in rows if max(map(int, row["prompt"][:-1].split("+"))) < 500}
    assert {f"{100 + k // 400}+{100 + k % 400}:" for k in held_out[0]} == prompts != set()
    lab.Toy(tmp_path / "longer", 3, "dev", base=task, steps=3)
    splits = make.draw_splits(3, make.Settings(train=40, dev=8, test=8))
    assert held_out[1] == {*splits["dev"], *splits["test"]}
    settings = runs.read_json(other.toy / "settings.json")
    assert settings["misconceived"] == 0 and settings["student"]["steps"] == 2
    assert lab.Toy(tmp_path / "other", 3, "dev", base=task).paths == other.paths and len(drawn) == 2  # not made again


def test_a_run_of_each_kind(task):
    """Warm-up, DPO, KD in its three modes: accuracy and costs; only what is needed is kept."""
    few = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "max_new_tokens": 8}
    warm = task.warmup("warm", limit=4, samples=2, prompts_per_batch=2, eta=-1e9, **few)
    folder = task.folder / "warm"
    again = task.dpo("again", "warm", max_steps=2, batch_size=4, micro_batch_size=4)
    assert {path.name for path in folder.iterdir()} == {"student", "pairs", "pairs.jsonl", "result.json"}
    rows = [row for file in (folder / "pairs").glob("*.jsonl") for row in runs.read_jsonl(file)]
    pairs = runs.read_jsonl(folder / "pairs.jsonl")
    assert warm["pairs"] == len(pairs) > 0
    prompts = {row["prompt_id"]: len(row["prompt_ids"]) for row in rows}
    sampled = sum(prompts.values()) + sum(len(row["response_ids"]) for row in rows)
    assert warm["teacher_tokens"] == sampled + sum(len(row["chosen_ids"]) for row in rows)  # t* = 0: all of y+
    # The same pairs at the same settings: the same student, and the same costs
    for key in ("accuracy", "student_tokens", "teacher_tokens"):
        assert again[key] == warm[key], key
    few |= {"limit": 8, "max_new_tokens": 40}
    modes = ("gold", "teacher", "student")
    gold, teacher, student = (task.kd(mode, folder / "student", mode=mode, **few) for mode in modes)
    assert {path.name for path in (task.folder / "gold").iterdir()} == {"result.json"}
    assert gold["student_tokens"] == gold["teacher_tokens"] > 0
    assert teacher["teacher_tokens"] > teacher["student_tokens"] + 8 * 2  # it read the prompts and wrote the responses
    assert student["student_tokens"] == 2 * student["teacher_tokens"]
    assert all(result["steps"] == 2 and 0 <= result["accuracy"] <= 1 for result in (gold, teacher, student))


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    """Unless its settings or the code differ; and what goes on from there has its settings among its own."""
    folder, calls = tmp_path / "run", []
    folder.mkdir()
    (folder / "left by a kill").write_text("x")

    def work():
        calls.append([*folder.iterdir()])
        (folder / "model").mkdir()
        (folder / "waste").write_text("x")
        return {"accuracy": 0.5}

    for lr in (0.1, 0.1, 0.2):
        result = lab.resumable(folder, work, {"lr": lr}, keep=("model",))
        assert result == {"accuracy": 0.5, "settings": [f"--lr={lr}"], "code": lab.code()}
    monkeypatch.setattr(lab, "code", lambda: "other")
    assert lab.resumable(folder, work, {"lr": 0.2}, keep=("model",))["code"] == "other"
    assert calls == [[], [], []]
    assert {path.name for path in folder.iterdir()} == {"model", "result.json"}
    assert lab.origin(folder) == {"origin": ["--lr=0.2"]} and lab.origin(tmp_path) == {"origin": None}


# ---------------------------------------------------------------------------------------------------------------------
# Result files and tables
# ---------------------------------------------------------------------------------------------------------------------


def test_tables_are_what_the_result_files_say(capsys):
    """And each number of the text is in a table; what has changed since a result is said."""
    tables.main(["--check"])
    assert f"bench: {tables.read('bench')[0]['commit'][:7]}, changed since: " in capsys.readouterr().out
    blocks = set()
    for page in tables.PAGES:
        blocks |= {match.groups()[1:3] for match in tables.BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert blocks == {(name, kind) for name, kinds in tables.TABLES.items() for kind in kinds}


def test_result_files_say_how_they_came_to_be():
    """What was chosen, was chosen on other seeds than those of the report."""
    assert not set(lab.DEV_SEEDS) & set(lab.REPORT_SEEDS) and len(set(lab.REPORT_SEEDS)) == 10
    assert set(toy_ablation.SELECT_SEEDS) <= set(lab.DEV_SEEDS)
    sensitivity, selected = tables.read("dpo_sensitivity"), tables.read("toy_selected")
    for start, row in (("warm-up", "nll-1 beta-0.1 lr-0.001"), ("plain", "nll-0 beta-0.5 lr-0.0005")):
        assert dpo_sensitivity.best(sensitivity, start == "warm-up") == row
        assert selected["dpo"][start] == lab.DPO | dpo_sensitivity.variants()[row]
    result, records = tables.read("toy_ablation"), [*tables.read("bench")]
    for name in (*tables.TABLES.keys() - {"bench", "toy_ablation"}, "toy_selected", "teaching"):
        records.append(tables.read(name)["record"])
    records += result["records"].values()
    assert all(record.keys() >= RECORD for record in records if "bench" not in record)
    assert all(re.fullmatch("[0-9a-f]{40}", record["commit"]) for record in records)  # nothing uncommitted
    assert result["records"].keys() == result["seeds"].keys()
    for condition, seeds in result["seeds"].items():
        assert set(seeds) <= set(lab.REPORT_SEEDS)
        arms = [row for arm, row in result["runs"].items() if arm.startswith(f"{condition}/")]
        assert arms and all(len(row["accuracy"]) == len(seeds) for row in arms)
    for file in FOLDER.rglob("*"):  # nothing of the machine but its processor and versions
        if file.suffix in (".py", ".sh", ".json", ".svg", ".md"):
            assert not re.search(r"/root/|/work/|/home/|/tmp/", file.read_text(encoding="utf-8")), file.name


def test_changed_files_and_other_code_are_refused(tmp_path, monkeypatch):
    """Before anything runs; and a result that other code made is not gone on from."""
    monkeypatch.setattr(runs, "git_commit", lambda: "0" * 40 + "-dirty")
    commands = [(dpo_sensitivity.main,), (mismatch.main, ["toy", str(tmp_path / "no folder")])]
    commands += [(toy_ablation.main, [name]) for name in ("select", "report", "collect")]
    for command, *argv in commands:
        with pytest.raises(SystemExit, match="files differ from their commit"):
            command(*argv)
    monkeypatch.setattr(runs, "git_commit", lambda: "0" * 40)
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    for name, code in (("ours", lab.code()), ("theirs", "other")):
        lab.write_result(name, {"record": {"code": code}}, {})
    assert lab.read_result("ours")["record"]["code"] == lab.code()
    with pytest.raises(SystemExit, match="other code made it, in .*theirs.json"):
        lab.read_result("theirs")


def test_a_number_that_was_changed_by_hand_is_found(tmp_path, monkeypatch):
    result = {"record": dict.fromkeys(RECORD, "x") | {"commit": "HEAD"}, "seeds": [1, 2]}
    result |= {"kd": {"loss": "forward_kl", "max_steps": 25, "lr": 1e-3}, "default": {"beta": 0.5}}
    row = {"accuracy": [0.5, 0.7], "after_kd": [0.6, 0.8]}
    monkeypatch.setattr(lab, "FOLDER", tmp_path)
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    lab.write_result("toy_ablation", {"records": {}}, {})
    lab.write_result("dpo_sensitivity", result, {"no warm-up": row, "default": row})
    assert tables.read("dpo_sensitivity") == result | {"runs": {"no warm-up": row, "default": row}}
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    page.write_text("")
    readme.write_text("x\n\n## A section\n<!-- dpo_sensitivity.json: settings -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "PAGES", (page, readme))
    monkeypatch.setattr(tables, "effect", lambda result: "<svg/>")
    monkeypatch.setattr(tables, "TABLES", {"dpo_sensitivity": tables.TABLES["dpo_sensitivity"]})
    tables.main([])
    tables.main(["--check"])
    assert "| default | 60.0 ± 14.1 | 70.0 ± 14.1 |" in readme.read_text()
    readme.write_text(readme.read_text().replace("60.0", "61.0", 1))
    with pytest.raises(SystemExit, match="is not what the result files say"):
        tables.main(["--check"])
    tables.main([])
    # Of the text: 70.0 is in the section's table, code and links are no text
    readme.write_text(readme.read_text() + "70.0, `7.5` [x](y8.html), 71.5 or 1,234 points, 80.0\n\n## Another\n80.0\n")
    with pytest.raises(SystemExit, match="numbers that no table has, .*: 71.5, 1,234, 80.0"):
        tables.main(["--check"])


# ---------------------------------------------------------------------------------------------------------------------
# bench/
# ---------------------------------------------------------------------------------------------------------------------


SIZES = {sampling: [*TINY, *SHORT, "--samples", "2"], splice: [*TINY, *SHORT, "--mismatch", "0.1"]}


@pytest.mark.parametrize(
    "module, kinds, stages",
    [(sampling, ("ours", "generate"), {"equal", "unequal"}), (splice, ("ours", "plain"), {"check", "splice"})],
)
def test_kinds_compute_the_same(module, kinds, stages, capsys):
    found = []
    for kind in kinds:
        module.main([*SIZES[module], "--kind", kind])
        found.append(json.loads(capsys.readouterr().out))
        assert found[-1]["stages"].keys() == stages
    assert found[0]["check"].keys() == found[1]["check"].keys() != set()
    torch.testing.assert_close(*([*of["check"].values()] for of in found), rtol=1e-3, atol=1e-3)


def test_compare_in_processes_prints_json_last(capsys):
    """It checks, too, that the kinds compute the same."""
    found = kd_loss.main(["--loss", "tvd", "--repeat", "1", "--tokens", "11", "--vocab", "50", "--width", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "check: ours and dense agree in loss, gradient_norms"
    assert json.loads(lines[-1])["stages"].keys() == found.keys() == {"ours", "dense"}


def test_a_difference_is_found(monkeypatch, tmp_path):
    """Of the kinds' numbers; nested lists, too: another number, another length."""
    for ours, theirs in ((1, 2), ([1, [2.0]], [1, [2.1]]), ([1, [2.0]], [1, []])):
        script = tmp_path / "bench.py"
        kinds = f"{{'a': {ours}, 'b': {theirs}, 'c': {ours}}}[sys.argv[-1]]"
        script.write_text(f"import json, sys\nprint(json.dumps({{'stages': {{}}, 'check': {{'x': {kinds}}}}}))")
        args = harness.make_parser("x").parse_args(["--repeat", "1"])
        monkeypatch.setattr(harness, "ceiling", lambda args: {})
        harness.compare(str(script), [], args, None, ["a", "c"], atol=1e-3, rtol=0)
        with pytest.raises(AssertionError):
            harness.compare(str(script), [], args, None, ["a", "b"], atol=1e-3, rtol=0)


def test_dpo_step_accumulates_to_the_whole():
    """Two shares of a step give the loss and the gradient of all pairs at once."""
    args = dpo_step.parse_args(TINY)
    torch.manual_seed(1)
    pairs, reference = dpo_step.draw_pairs(4, 97, 5, 2, 4), 3 * torch.randn(4, 2)
    found = []
    for size in (4, 2):
        model = dpo_step.our_model(harness.random_model(args), args)
        parts = [slice(k, k + size) for k in range(0, 4, size)]
        loss = sum(dpo_step.our_step(model, pairs[part], reference[part], size / 4) for part in parts)
        found.append(torch.cat([torch.tensor([loss]), *(p.grad.flatten() for p in model.parameters())]))
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)
    assert dpo_step.our_step(model, pairs) == pytest.approx(math.log(2), abs=1e-6)  # its own reference


def test_pipeline_in_one_process(capsys):
    """One kind, here: all stages have a time, and the loss of a policy that is its reference is ln 2."""
    pipeline.main([*TINY, *SHORT, "--prompts", "2", "--samples", "2", "--mismatch", "0.1", "--kind", "ours"])
    result = json.loads(capsys.readouterr().out)
    assert result["stages"].keys() == {"sample", "check", "splice", "dpo", "all"}
    assert result["check"]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_scaling_starts_the_commands(capsys):
    """One and two real processes; each command's three losses are the same, which `compare` checks."""
    found = scaling.main([*TINY, "--examples", "4", "--tokens", "8"])
    assert found.keys() == {"1", "2"}
    for [result] in found.values():
        assert result["stages"].keys() == {"dpo", "kd"} and all(stage["s"] > 0 for stage in result["stages"].values())
        assert torch.tensor(result["check"]["losses"]).shape == (2, 3, 2)
        assert all(norm > 0 for steps in result["check"]["losses"] for _, norm in steps)
    assert "scaling" in capsys.readouterr().out
