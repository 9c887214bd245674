"""runs/: statistics against hand-computed values, scripts that parse, splits, resumption, blocks made of the committed files."""

import importlib
import json
import math
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import common
import toy
import training

RUNS = ROOT / "runs"
sys.path.insert(0, str(RUNS))

import dpo_sensitivity
import eta_sweep
import lab
import real_pair
import tables
import toy_ablation

SCRIPTS = sorted(RUNS.glob("*.sh"))
RESULTS = [name for name in tables.TABLES if (RUNS / f"{name}.json").exists()]

# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def test_t_interval_by_hand():
    """1, 2, 3, 4: mean 2.5, s = sqrt(5 / 3) = 1.29099, s / sqrt(4) = 0.645497, t(3) = 3.182: half width 2.05397."""
    mean, half = lab.t_interval([1, 2, 3, 4])
    assert mean == 2.5
    assert half == pytest.approx(2.05397, abs=1e-5)
    assert lab.t_interval([3.0]) == (3.0, math.inf)


def test_t_quantiles():
    """Entries of the usual table, by degrees of freedom."""
    assert [lab.T_QUANTILES[df - 1] for df in (1, 4, 9, 29)] == [12.706, 2.776, 2.262, 2.045]
    assert len(lab.T_QUANTILES) == 29
    assert lab.t_quantile(30) == pytest.approx(2.0423, abs=0.002)
    assert lab.t_quantile(63) == pytest.approx(1.9983, abs=0.002)
    assert sorted(lab.T_QUANTILES, reverse=True) == lab.T_QUANTILES


def test_paired_differences_not_difference_of_means():
    """Seeds that vary a lot and always gain 1: the paired interval is [1, 1], however large the spread is."""
    assert lab.paired([11, 51, 91], [10, 50, 90]) == (1, 0)
    with pytest.raises(ValueError, match="zip"):
        lab.paired([1, 2], [1])


def test_quantile_of_counts():
    counts = {3: 1, 0: 2, 7: 1}  # 0, 0, 3, 7
    assert [lab.quantile(counts, share) for share in (0.25, 0.5, 0.75, 1.0)] == [0, 0, 3, 7]


def test_eta_sweep_by_hand():
    """Two groups, three samples, margins (0, 5), (1, 1), (9, 0, 6): rates by token, by sample, and the places of t*."""
    zeros = lambda values: [0.0] * len(values)
    rows = [(0, [0.0, 5.0]), (0, [1.0, 1.0]), (1, [9.0, 0.0, 6.0])]
    samples = [{"group": g, "student_logprobs": v, "teacher_logprobs": zeros(v)} for g, v in rows]
    swept = eta_sweep.sweep(samples)
    assert swept[4.0]["samples"] == pytest.approx(2 / 3, abs=1e-5)
    assert swept[4.0]["tokens"] == pytest.approx(3 / 7, abs=1e-6)
    assert swept[4.0]["t_star"] == [0, 0, 1]
    assert swept[4.0]["behind"] == pytest.approx(4 / 7, abs=1e-5)  # (5), and all of (9, 0, 6)
    # the groups' rates are 1/2 and 1: s = 0.353553, half width t(1) s / sqrt(2) = 12.706 x 0.25
    assert swept[4.0]["half_width"] == pytest.approx(3.1765, abs=1e-4)
    assert swept[0.5]["samples"] == 1
    assert swept[10.0]["t_star"] is None


def test_cells():
    assert tables.percent([0.5, 0.7]) == "60.0 ± 14.1"
    assert tables.difference([0.5, 0.6, 0.7], [0.4, 0.5, 0.6]) == "**+10.0 [10.0, 10.0]**"
    assert tables.difference([0.5, 0.6], [0.6, 0.5]) == "+0.0 [-127.1, 127.1]"  # t(1) s / sqrt(2) = 12.706 x 10


# ---------------------------------------------------------------------------------------------------------------------
# Scripts and commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


def product_commands(script, arguments=()):
    """The product's commands that a script would run, in order, with `python` and `torchrun` put in the place of themselves."""
    fake = 'record() { printf "%s\\n" "$*"; }; python() { record python "$@"; }; torchrun() { record torchrun "$@"; }\n'
    fake += "rm() { :; }; bash() { :; }\n"
    environment = {"TEACHER": "T", "STUDENT": "S", "DATA": "gsm8k_train.jsonl", "PATH": "/usr/bin:/bin"}
    text = fake + script.read_text().replace('cd "$(dirname "$0")/.."', "cd .")
    done = subprocess.run(
        ["bash", "-c", text, script.name, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines() if re.match(r"(python|torchrun) ", line)]
    return [words for words in lines if not any(word.startswith("runs/") for word in words)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_commands_of_scripts_parse(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing has been done yet
    commands = product_commands(script)
    assert commands or script.stem in ("toy_ablation", "dpo_sensitivity")  # those call main(argv), below
    for words in commands:
        name = next(word for word in words if word.endswith(".py"))
        importlib.import_module(name.removesuffix(".py")).parse_args(words[words.index(name) + 1 :])


@pytest.mark.parametrize("name", ["paper_qwen", "paper_llama"])
def test_paper_scripts_are_marked_and_pass_dry_run_on(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = RUNS / f"{name}.sh"
    assert "NOT RUN" in script.read_text()
    commands = product_commands(script, ["--dry-run"])
    assert len(commands) == 7  # the warm-up, and KD with and without it for three losses
    assert all(words[-2:] == ["--dry-run", "8"] for words in commands)
    for words in commands:
        assert importlib.import_module(words[1].removesuffix(".py")).parse_args(words[2:]).dry_run == 8
    assert not any(
        "out/" in words[words.index("--student") + 1] for words in commands
    )  # nothing that is still to be made
    assert any("eval.py" in words for words in product_commands(script))


def test_no_machine_paths():
    """Nothing of the machine that it ran on but processor and versions."""
    for file in RUNS.iterdir():
        if file.is_file() and file.suffix in (".py", ".sh", ".json", ".svg"):
            assert not re.search(r"/root/|/work/|/home/|/tmp/", file.read_text(encoding="utf-8")), file.name


class Recorder:
    """Stands in for `lab.call`: parses the flags and remembers them."""

    def __init__(self):
        self.parsed = []

    def __call__(self, script, settings, folder):
        self.parsed.append((script, lab.MAINS[script].parse_args(lab.flags({**settings, "out": folder}))))
        raise StopIteration  # parsed is enough


def parsed_runs(monkeypatch, task, *calls):
    """The arguments of runs of a `lab.Toy` that are only parsed."""
    recorder = Recorder()
    monkeypatch.setattr(lab, "call", recorder)
    for name, arguments, settings in calls:
        with pytest.raises(StopIteration):
            getattr(task, name)(*arguments, **settings)
    return recorder.parsed


@pytest.fixture
def task(tmp_path):
    """A `lab.Toy` that has not been built."""
    made = object.__new__(lab.Toy)
    made.seed, made.folder, made.paths = 3, tmp_path / "3", toy.paths_in(tmp_path / "3/toy")
    made.split = made.paths["dev"]
    made.common = {"teacher": made.paths["teacher"], "data": made.paths["train"], "seed": 3}
    return made


def test_commands_of_the_experiments_parse(monkeypatch, task):
    """Every variant of the sensitivity, and the ablation's kinds of KD, through the product's own parsers."""
    calls = [
        ("dpo", (f"dpo/{name}", "pairs"), {k: v for k, v in changes.items() if k not in dpo_sensitivity.PAIR_FLAGS})
        for name, changes in dpo_sensitivity.variants().items()
    ]
    calls += [
        ("warmup", (name,), {k: v for k, v in changes.items() if k in dpo_sensitivity.PAIR_FLAGS})
        for name, changes in dpo_sensitivity.variants().items()
    ]
    calls += [
        ("warmup", ("a",), {"eta": -1e9}),
        ("warmup", ("b", "random"), {}),
        ("warmup", ("c",), {"keep": "correct"}),
    ]
    for loss, (_, _, flags) in zip(toy_ablation.LOSSES, toy_ablation.CONDITIONS.values(), strict=False):
        calls.append(("kd", (f"kd/{loss}", task.paths["student"]), {**flags, "loss": loss, "max_steps": 25}))
    calls.append(("kd", ("kd/student", "S"), {**toy_ablation.CONDITIONS["student"][2], "max_steps": 25}))
    parsed = parsed_runs(monkeypatch, task, *calls)
    assert len(parsed) == len(calls)
    assert {args.seed for _, args in parsed} == {3}
    by_out = {str(args.out): args for _, args in parsed}
    assert by_out[str(task.folder / "dpo/sft")].beta == 1e-9
    assert by_out[str(task.folder / "a")].eta == -1e9


def test_default_of_the_sensitivity_is_the_toys():
    """Its first row changes nothing, the "default" of all tables: one truth."""
    assert dpo_sensitivity.settings_of("default") == {key: toy.WARMUP[key] for key in dpo_sensitivity.DEFAULT}
    names = list(dpo_sensitivity.variants())
    assert len(set(names)) == len(names)


@pytest.mark.skipif("dpo_sensitivity" not in RESULTS, reason="not measured yet")
def test_a_run_of_each_kind(task, pair_of_models, prompts_file):
    """Warm-up, DPO, KD in its three modes on tiny random models: accuracy, costs, and nothing is kept but what is needed."""
    task.paths |= pair_of_models
    task.split = prompts_file
    task.common |= {"teacher": pair_of_models["teacher"], "data": prompts_file}
    few = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 4, "max_new_tokens": 8}
    warm = task.warmup("warm", limit=4, samples=2, prompts_per_batch=2, eta=-1e9, **few)
    again = task.dpo("again", "warm", max_steps=2, batch_size=4, micro_batch_size=4)
    assert {path.name for path in (task.folder / "warm").iterdir()} == {
        "student",
        "pairs",
        "pairs.jsonl",
        "result.json",
    }
    rows = [row for file in (task.folder / "warm/pairs").glob("*.jsonl") for row in common.read_jsonl(file)]
    pairs = common.read_jsonl(task.folder / "warm/pairs.jsonl")
    assert warm["pairs"] == len(pairs) > 0
    prompts = {row["prompt_id"]: len(row["prompt_ids"]) for row in rows}
    sampled = sum(prompts.values()) + sum(len(row["response_ids"]) for row in rows)
    assert warm["teacher_tokens"] == sampled + sum(len(row["chosen_ids"]) for row in rows)  # t* = 0: all of y+
    # The same pairs at the same settings: the same student, and the same costs
    assert {key: again[key] for key in ("accuracy", "student_tokens", "teacher_tokens")} == {
        key: warm[key] for key in ("accuracy", "student_tokens", "teacher_tokens")
    }
    # SFT on the same pairs: no reference, no rejected suffix; each step's pairs at their own lengths
    sft = task.dpo("sft", "warm", max_steps=2, batch_size=4, micro_batch_size=4, beta=1e-9, nll_weight=1.0)
    batches = [training.batch_of_step(step, len(pairs), 4, task.seed) for step in range(2)]
    tokens = sum(len(pairs[i]["prompt_ids"] + pairs[i]["chosen_ids"]) for batch in batches for i in batch)
    assert sft["dpo_tokens"] == tokens < again["dpo_tokens"]
    assert again["student_tokens"] - sft["student_tokens"] == again["dpo_tokens"] - tokens
    plain = few | {"limit": 8, "max_new_tokens": 40}
    by_mode = {
        mode: task.kd(mode, task.folder / "warm/student", mode=mode, **plain) for mode in ("gold", "teacher", "student")
    }
    assert {path.name for path in (task.folder / "gold").iterdir()} == {"result.json"}
    gold, teacher, student = by_mode.values()
    assert gold["student_tokens"] == gold["teacher_tokens"] > 0
    assert teacher["teacher_tokens"] > teacher["student_tokens"] + 8 * 2  # it read the prompts, and wrote the responses
    assert student["student_tokens"] == 2 * student["teacher_tokens"]
    assert all(result["steps"] == 2 and 0 <= result["accuracy"] <= 1 for result in by_mode.values())


# ---------------------------------------------------------------------------------------------------------------------
# Splits, and what was chosen where
# ---------------------------------------------------------------------------------------------------------------------


def test_choices_and_report_share_no_seed():
    assert not set(lab.DEV_SEEDS) & set(lab.REPORT_SEEDS)
    assert set(toy_ablation.SELECT_SEEDS) <= set(lab.DEV_SEEDS)
    assert {0, 42, 123} < set(lab.REPORT_SEEDS)
    assert len(set(lab.REPORT_SEEDS)) == 10


@pytest.mark.parametrize("seed", lab.REPORT_SEEDS[:3])
def test_toy_training_and_test_problems_never_overlap(seed):
    for settings in (toy.Settings(), toy.Settings(misconceived=0.5)):
        splits = toy.draw_splits(seed, settings)
        sets = {name: set(problems) for name, problems in splits.items()}
        assert all(len(sets[name]) == len(problems) for name, problems in splits.items())
        assert not sets["test"] & (sets["train"] | sets["dev"])


def test_real_training_and_test_problems_never_overlap():
    """Also where a question of the test is in the training part again, spelled with other spaces and capitals."""
    rows = [{"question": f"How  much is {i}?", "answer": f"It is <<{i}={i}>>{i}.\n#### {i}"} for i in range(200)]
    rows[5] = {"question": "how much is 199?", "answer": "#### 199"}
    train, test = real_pair.split(rows)
    assert len(test) == real_pair.TEST
    assert len(train) == 200 - real_pair.TEST - 1
    plain = lambda row: " ".join(row["question"].lower().split())
    assert not {plain(row) for row in train} & {plain(row) for row in test}
    assert test[-1]["answer"] == "It is 199.\n#### 199"  # the calculator's notes are left out


def test_rates_are_chosen_by_mean_and_of_equals_the_smallest():
    value = {5e-4: [0.1, 0.9], 1e-3: [0.6, 0.6], 2e-3: [0.6, 0.6], 4e-3: [0.0, 0.0], 8e-3: [0.5, 0.5]}
    found = {
        f"{loss}/{budget}/{rate}": value[rate]
        for loss in toy_ablation.LOSSES
        for budget in toy_ablation.BUDGETS
        for rate in toy_ablation.RATES
    }
    assert set(toy_ablation.best_rates(found).values()) == {1e-3}


def test_rate_of_more_steps_is_that_of_the_nearest_budget():
    rates = {f"a/{budget}": budget for budget in toy_ablation.BUDGETS}
    assert [toy_ablation.rate_of(rates, "a", steps) for steps in (30, 49, 51, 199, 201, 900)] == [
        25,
        25,
        100,
        100,
        400,
        400,
    ]


def test_moved_mismatch_is_a_control_and_goes_away():
    import torch

    import warmup_distill

    original = warmup_distill.first_mismatch
    q, p = torch.zeros(3, 4), torch.tensor([[0.0, 0, -9, 0], [0, 0, 0, 0], [0, -9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert original(q, p, mask, 4.0).tolist() == [2, -1, 1]
    with lab.moved_mismatch("start", 0):
        assert warmup_distill.first_mismatch(q, p, mask, 4.0).tolist() == [0, -1, 0]
    with lab.moved_mismatch("random", 0):
        drawn = [warmup_distill.first_mismatch(q, p, mask, 4.0).tolist() for _ in range(60)]
    with lab.moved_mismatch("random", 0):
        assert drawn == [warmup_distill.first_mismatch(q, p, mask, 4.0).tolist() for _ in range(60)]
    assert {row[0] for row in drawn} == {0, 1, 2, 3}
    assert {row[1] for row in drawn} == {-1}  # without a mismatch there is nothing to move
    assert {row[2] for row in drawn} == {0, 1}  # never beyond the response's end
    assert warmup_distill.first_mismatch is original


# ---------------------------------------------------------------------------------------------------------------------
# Resumption
# ---------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(tmp_path):
    calls = []

    def work():
        calls.append(1)
        (tmp_path / "run/model").mkdir()
        (tmp_path / "run/waste").write_text("x")
        return {"accuracy": 0.5}

    for _ in range(2):
        result = lab.resumable(tmp_path / "run", work, {"lr": 0.1}, keep=("model",))
        assert result == {"accuracy": 0.5, "settings": ["--lr=0.1"]}
    assert len(calls) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"model", "result.json"}


def test_a_run_of_other_settings_is_run_again(tmp_path):
    """And so is what went on from there: its settings hold those of where it began."""
    for lr in (0.1, 0.2):
        result = lab.resumable(tmp_path / "run", lambda lr=lr: {"accuracy": lr}, {"lr": lr})
        assert result["accuracy"] == lr
    assert lab.origin(tmp_path / "run") == {"origin": ["--lr=0.2"]}
    assert lab.origin(tmp_path) == {"origin": None}


def test_extra_steps_by_hand():
    """A warm-up of 1,000 and 500 tokens and 30 s; KD steps of 20 and 10 tokens, and of 0.2 s behind 5 s of start."""
    warmup = {"student_tokens": 1000, "teacher_tokens": 500, "seconds": 30}
    cost = lambda steps: {"student_tokens": 20 * steps, "teacher_tokens": 10 * steps, "seconds": 5 + 0.2 * steps}
    run = lambda steps: {"steps": steps, **cost(steps)}
    alone = {"forward_kl": {25: run(25), 100: run(100)}}
    extra = [toy_ablation.extra_steps(f"none + {what}", warmup, alone, "forward_kl") for what in ("tokens", "time")]
    assert extra == [50, 150]
    alone["forward_kl"][100]["teacher_tokens"] = 900
    assert toy_ablation.extra_steps("none + teacher tokens", warmup, alone, "forward_kl") == 56  # 500 / 9, rounded up


def test_a_killed_run_begins_anew(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/args.json").write_text("{}")
    seen = []
    lab.resumable(tmp_path / "run", lambda: seen.append([*(tmp_path / "run").iterdir()]) or {}, {})
    assert seen == [[]]


def test_an_error_of_a_run_surfaces_and_leaves_no_result(tmp_path):
    def fail():
        raise common.UserError("what", "where", "what to do")

    with pytest.raises(common.UserError):
        lab.run_all([("a", lambda: lab.resumable(tmp_path / "run", fail, {}))], "test")
    assert not (tmp_path / "run/result.json").exists()


def test_record_has_commit_machine_and_versions():
    record = lab.record("toy_ablation", 3.6)
    assert record["command"] == "bash runs/toy_ablation.sh" and record["cpu_seconds"] == 4
    assert re.fullmatch(r"([0-9a-f]{40}|unknown)\+?", record["commit"])
    assert record.keys() == common.read_json(RUNS / "dpo_sensitivity.json")["record"].keys()
    assert "not yet committed" in tables.source({**record, "commit": "1234567+"}, "")


def test_result_file_is_json_with_one_run_a_line(tmp_path):
    lab.write_result(tmp_path / "r.json", {"record": {"a": {"b": 1}}, "seeds": [1]}, {"x": {"y": [1, 2]}, "z": {}})
    text = (tmp_path / "r.json").read_text()
    assert json.loads(text) == {"record": {"a": {"b": 1}}, "seeds": [1], "runs": {"x": {"y": [1, 2]}, "z": {}}}
    assert '  "x": {"y": [1, 2]},\n' in text


# ---------------------------------------------------------------------------------------------------------------------
# The README's blocks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readme", ["README.md", "runs/README.md"])
def test_readme_and_figures_are_what_the_result_files_say(readme):
    command = [sys.executable, RUNS / "tables.py", "--check", ROOT / readme]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", RESULTS)
def test_blocks_are_made_of_the_committed_files(name):
    for kind, make in tables.TABLES[name].items():
        block = f"<!-- runs/{name}.json: {kind} -->\n<!-- end -->"
        filled = tables.fill(f"before\n{block}\nafter")
        assert filled == tables.fill(filled)
        assert make(tables.read(name)) in filled


@pytest.mark.parametrize("name", RESULTS)
def test_result_files_say_how_they_came_to_be(name):
    result = tables.read(name)
    assert {"command", "date", "commit", "cpu", "cores", "torch", "transformers"} <= result["record"].keys()
    assert (ROOT / result["record"]["command"].split()[-1]).exists()
    if name == "toy_ablation":
        for condition, seeds in result["seeds"].items():
            assert set(seeds) <= set(lab.REPORT_SEEDS)
            for key, row in result["runs"].items():
                assert len(row["accuracy"]) == len(seeds) or not key.startswith(f"{condition}/"), key


def test_a_number_that_was_changed_by_hand_is_found(tmp_path, monkeypatch, capsys):
    """--check names the block; --write mends it."""
    result = {"record": dict.fromkeys(("command", "date", "commit", "cpu", "cores", "torch", "transformers"), "x")}
    result |= {"seeds": [1, 2], "kd": {"loss": "forward_kl", "max_steps": 25, "lr": 1e-3}, "default": {"beta": 0.5}}
    row = {"accuracy": [0.5, 0.7], "after_kd": [0.6, 0.8]}
    result["runs"] = {"no warm-up": row, "default": row}
    (tmp_path / "dpo_sensitivity.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("text\n<!-- runs/dpo_sensitivity.json: settings -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="settings"):
        tables.main(["--check", str(readme)])
    tables.main(["--write", str(readme)])
    tables.main(["--check", str(readme)])
    assert "| default | 60.0 ± 14.1 | 70.0 ± 14.1 |" in readme.read_text()
    readme.write_text(readme.read_text().replace("60.0", "61.0", 1))
    with pytest.raises(SystemExit, match="error: not what the result files say"):
        tables.main(["--check", str(readme)])
    capsys.readouterr()


def test_chart_is_xml_with_a_line_for_each_name():
    from xml.etree import ElementTree

    svg = tables.chart({"a": [(1, 10, 0), (10, 90, 5)], "b": [(1, 0, 0), (10, 100, 0)]}, "x", "y", log=True)
    root = ElementTree.fromstring(svg)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 2
