"""Killed, told to stop, cut off, misled: nothing is lost, and nothing wrong is made of what is left.

`python tests/kills.py` is the long version of the first test, `python tests/long_run.py` that of the last.
"""

import ast
import json
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import kills
import pytest
import torch
from conftest import ROOT, assert_identical, launch, launch_jobs, logged, make_model, weights
from safetensors.torch import load_file, save_file

import dpo
import kd
import warmup_distill
from lib import models, runs
from lib.runs import UserError

SMALL = "--batch-size 2 --micro-batch-size 2 --lr 1e-3 --threads 1 --device cpu --save-every 2"


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """12 preference pairs of text."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    runs.write_jsonl(path, [{"prompt": f"{i}+2:", "chosen": f"{i}3", "rejected": f"{i}45"} for i in range(12)])
    return path


SCRIPTS = {  # its main, flags of a small run
    "dpo": (dpo.main, ""),
    "warmup_distill": (warmup_distill.main, "--samples 2 --max-new-tokens 8 --eta 1"),
    "kd": (kd.main, "--max-new-tokens 40"),
}


@pytest.fixture
def argv(inputs, pairs_file, tmp_path):
    """argv(script, flags="", out="out", ...) of a small run; more: other paths, by name."""

    def words(script, flags="", out="out", **changed):
        paths, few = inputs, f"--template none --limit 6 --prompts-per-batch 2 --eval-limit 0 {SCRIPTS[script][1]}"
        if script == "dpo":
            paths, few = {"model": inputs["student"], "pairs": pairs_file}, ""
        named = [word for name, path in {**paths, **changed}.items() for word in (f"--{name}", str(path))]
        return [*named, "--out", str(tmp_path / out), *f"{SMALL} {few} {flags}".split()]

    return words


@pytest.fixture
def run(argv, tmp_path):
    """run(script, ...) runs it here and returns OUT."""

    def main(script, flags="", out="out", **changed):
        SCRIPTS[script][0](argv(script, flags, out, **changed))
        return tmp_path / out

    return main


def newest_checkpoint(out):
    [folder] = out.glob("checkpoint/step-*")
    return int(folder.name.removeprefix("step-"))


def assert_error(expected, function, *args, **kwargs):
    """It must end with this UserError; in `expected`, … is any text."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), str(caught.value)), caught.value


# ---------------------------------------------------------------------------------------------------------------------
# Killed, or told to stop
# ---------------------------------------------------------------------------------------------------------------------


def wait_until(reached, start):
    while not reached():
        assert start.process.poll() is None, start.end_of_log()
        time.sleep(0.002)


def stop(start, out, number, lines):
    """Sends a signal once `lines` steps are logged; waits for all processes. The checkpoint is of the last step logged."""
    wait_until(lambda: kills.at_work(out) and kills.count_lines(out / "metrics.jsonl") >= lines, start)
    start.process.send_signal(number)
    start.wait_for_all()
    step, log = newest_checkpoint(out), start.log.read_text()
    assert step == kills.count_lines(out / "metrics.jsonl") >= lines
    assert f"stopped after step {step}, whose checkpoint is written: the same command continues" in log
    assert f'File "{ROOT}' not in log, "a traceback of ours; torchrun has its own"


def test_two_processes_killed_and_stopped(inputs, tmp_path):
    """torchrun is killed while Python starts, a rank while it samples; SIGTERM comes; torchrun is killed in a checkpoint.
    Each time no process is left, and the same command continues: the end is that of an unbroken run."""
    [(script, args, out), _] = kills.commands(inputs, tmp_path / "run")
    args, log = [*args, *["--limit", "24", "--max-steps", "9", "--eval-limit", "4"]], tmp_path / "log"
    argv = [*args, "--out", str(tmp_path / "unbroken" / out.name)]
    codes, printed = launch_jobs(tmp_path / "jobs", [{"main": "warmup_distill", "argv": argv, "processes": 2}])
    assert codes == [[0, 0]], printed
    whole = kills.results([(script, argv, tmp_path / "unbroken" / out.name)])

    def kill(stage, pattern, count, victim):
        start = kills.Start(2, script, args, log)
        if stage == "start-up":
            wait_until(lambda: {0, 1} <= set(start.pids().values()), start)
        seen = kills.strike(start, [kills.Moment(0, stage, pattern, count, 0.0, victim)], out)
        assert seen["stage"] == stage and seen["ended after"] < 60

    kill("start-up", "", 0, "torchrun")
    kill("pairs", "pairs/*.jsonl", 6, "rank 1")
    stop(kills.Start(2, script, args, log), out, signal.SIGTERM, 3)
    kill("checkpoint", "checkpoint/.step-*.partial", 1, "torchrun")
    kills.run(2, [(script, args, out)], [], log)
    assert len(whole) == 17 and kills.results([(script, args, out)]) == whole


def test_one_process_stopped_while_another_waits(run, argv, tmp_path):
    """OUT belongs to one run at a time. Ctrl-C: a checkpoint, status 143. The same command ends with the same weights."""
    whole, out = run("dpo", "--epochs 10", out="whole"), tmp_path / "out"
    start = kills.Start(0, "dpo.py", argv("dpo", "--epochs 10"), tmp_path / "log")
    wait_until(lambda: kills.count_lines(out / "metrics.jsonl") > 0, start)
    start.process.send_signal(signal.SIGSTOP)
    assert_error("another run is at work, in …, wait for it or give another folder", run, "dpo", "--epochs 10")
    start.process.send_signal(signal.SIGCONT)
    stop(start, out, signal.SIGINT, 3)
    assert start.process.returncode == 143 and newest_checkpoint(out) < 60
    assert_identical(run("dpo", "--epochs 10"), whole)


@pytest.mark.parametrize("which", ["dpo", "kd"])
def test_less_memory_continues_in_the_same_folder(run, tmp_path, monkeypatch, which):
    """After running out of memory: smaller micro-batches, activations computed again; the same weights but for rounding."""
    whole, append = run(which, "--epochs 2", out="whole"), runs.append_jsonl

    def full(file, row):
        if row["step"] == 3:
            raise torch.OutOfMemoryError
        append(file, row)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(runs, "append_jsonl", full)
        run(which, "--epochs 2")
    assert newest_checkpoint(tmp_path / "out") == 2
    ended = weights(run(which, "--epochs 2 --micro-batch-size 1 --activation-checkpointing"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(ended[name], value, rtol=0, atol=1e-5)


def test_inputs_that_must_not_change_are_all_that_a_script_reads(run, inputs, pairs_file):
    """tests/test_run_folder.py has what happens if they do."""
    student, teacher, data = (inputs[name] for name in ("student", "teacher", "data"))
    read = {script: (f"--teacher {teacher}", [student, teacher, data]) for script in ("warmup_distill", "kd")}
    read["dpo"] = (f"--reference {teacher}", [student, teacher, str(pairs_file)])
    for script, (flags, paths) in read.items():
        recorded = runs.read_json(run(script, flags, out=script) / "args.json")["inputs"]
        assert recorded == {path: runs.fingerprint(path) for path in paths}


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


FULL = {  # name -> the script, its flags, bytes that a file may have (EFBIG stands for a full disk)
    "pairs": ("warmup_distill", "--samples 16 --max-new-tokens 24", 6000),
    "metrics": ("dpo", "--epochs 8 --save-every 99", 8000),
    "checkpoint": ("dpo", "", 8000),
    "kd": ("kd", "", 8000),
}


def test_full_disk(run, argv, tmp_path):
    """The system's error, status 1, no half file; with room again the same command ends as if nothing had happened."""
    jobs = [
        {"main": script, "argv": argv(script, flags, name), "processes": 0, "file_size": size}
        for name, (script, flags, size) in FULL.items()
    ]
    codes, printed = launch_jobs(tmp_path / "jobs", jobs)
    assert codes == [[1]] * len(FULL), printed
    for (name, (script, flags, _)), text in zip(FULL.items(), printed):
        out = tmp_path / name
        assert re.search("File too large|No space left", text), text
        for file in (*out.glob("*/*.jsonl"), *out.glob("pairs.jsonl")):
            runs.read_jsonl(file)
        assert (out / "args.json").exists() and not (out / "student").exists()
        assert_identical(run(script, flags, name), run(script, flags, f"{name}-whole"))


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files of a run
# ---------------------------------------------------------------------------------------------------------------------


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def becomes(text):
    return lambda path: path.write_text(text)


def zeros(path):
    path.write_bytes(path.read_bytes()[:-64] + bytes(64))


def replaced(old, new):
    return lambda path: path.write_bytes(path.read_bytes().replace(old, new))


@pytest.fixture
def trained(run):
    """A run of dpo.py that ended."""
    return run("dpo", out="trained")


@pytest.fixture
def unfinished(trained, tmp_path):
    """A copy of it without OUT/student: it continues from its checkpoint at step 6."""
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "student")
    return out


@pytest.mark.parametrize(
    "pattern, damage, what",
    [
        ("*.safetensors", half, "{} is missing, cut or changed"),
        ("*.safetensors", Path.unlink, "…"),
        ("*.safetensors", zeros, "{} is missing, cut or changed"),
        ("files.json", replaced(b'"step": 6', b'"step": 5'), "it is of another run or step"),
        ("files.json", replaced(b'"key": "', b'"key": "0'), "it is of another run or step"),
        ("*.safetensors", replaced(b"F32", b"F99"), "…"),
        ("files.json", Path.unlink, "…"),
        ("files.json", half, "…"),
        ("files.json", becomes("[]"), "…"),
        ("files.json", becomes('{"shard-9.safetensors": 5}'), "…"),
    ],
)
def test_damaged_checkpoint(run, trained, unfinished, pattern, damage, what):
    """Refused in one line; deleted, the work is done again, and ends the same."""
    folder = unfinished / "checkpoint" / "step-000006"
    damage(file := min(folder.glob(pattern)))
    todo = "delete it, and training starts again from the initial student"
    assert_error(f"the checkpoint is damaged ({what.format(file.name)}), in {folder}, {todo}", run, "dpo")
    assert not (unfinished / "student").exists()
    shutil.rmtree(unfinished / "checkpoint")
    assert_identical(run("dpo"), trained)


OTHERS = "the responses are to other prompts, in {}, delete it: it is then made again"
AGAIN = "delete the file: it is then made again"
CHANGED = f"the line was changed, or is of another run, model or data, in {{}} line %d, {AGAIN}"


def of_another_seed(path):
    """The same, made under other arguments."""
    rows = runs.read_jsonl(path)
    runs.write_jsonl(path, [{key: value for key, value in row.items() if key != "seal"} for row in rows], "other key")


@pytest.mark.parametrize(
    "damage, expected",
    [
        (half, "not JSON (…), in {} line …, repair or delete the line"),
        (lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"), OTHERS),
        (lambda path: path.write_text(path.read_text() * 2), CHANGED % 3),
        (replaced(b'"prompt_id": ', b'"prompt_id": 1'), CHANGED % 1),
        (replaced(b'"response_ids": [', b'"response_ids": [3, '), CHANGED % 1),
        (of_another_seed, CHANGED % 1),
    ],
)
def test_damaged_responses(run, damage, expected):
    """kd.py --mode teacher: one more line in a file would shift all responses after it."""
    out = run("kd", "--mode teacher --max-steps 1")
    shutil.rmtree(out / "student")
    damage(file := out / "responses" / "00001.jsonl")
    assert_error(expected.format(file), run, "kd", "--mode teacher --max-steps 1")
    file.unlink()
    run("kd", "--mode teacher --max-steps 1")


DAMAGED = "the file is damaged (…), in {}/00001.safetensors, delete the file: it is then made again"
UNUSABLE = "the teacher's files cannot be kept (…), in {}, give another folder"
OTHERWISE = "what is there was made otherwise (…), in {}, give another folder"


@pytest.mark.parametrize(
    "file, damage, expected",
    [
        ("cache.json", Path.unlink, OTHERWISE),
        ("cache.json", half, UNUSABLE),
        ("cache.json", becomes("[1]"), UNUSABLE),
        ("cache.json", becomes("{}"), OTHERWISE),
        ("00001.safetensors", half, DAMAGED),
        ("00001.safetensors", lambda file: shutil.copy(file.with_name("00000.safetensors"), file), DAMAGED),
    ],
)
def test_damaged_teacher_cache(run, tmp_path, file, damage, expected):
    cache = tmp_path / "cache"
    flags = f"--max-steps 1 --batch-size 6 --teacher-cache {cache} --teacher-top-k 3 --prompts-per-batch 3"
    run("kd", flags)
    damage(cache / file)
    assert_error(expected.format(cache), run, "kd", flags, out="second")
    assert not (tmp_path / "second" / "student").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which, value", [("dpo", float("nan")), ("kd", float("inf"))])
def test_weights_that_are_no_numbers(inputs, run, tmp_path, which, value, monkeypatch):
    """The first step stops the run, names it and its prompts; nothing is trained, saved or logged."""
    expected = "the model's log-probs are NaN or infinite, …"
    student, out = shutil.copytree(inputs["student"], tmp_path / "student"), tmp_path / "out"
    tensors = load_file(student / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, student / "model.safetensors", {"format": "pt"})
    policy = {"model" if which == "dpo" else "student": student}
    assert_error(expected, run, which, **policy)
    monkeypatch.setattr(models, "check_model", lambda *model: None)  # some input alone gives NaN
    todo = "lower --lr or use --dtype float32; the last checkpoint is kept"
    expected = f"loss nan and gradient norm … at step 1, prompts […, …], in {out}, {todo}"
    assert_error(expected, run, which, **policy)
    assert not any((out / name).exists() for name in ("student", "checkpoint", "metrics.jsonl"))


@pytest.mark.parametrize("which", ["dpo", "kd"])
def test_training_that_explodes_keeps_the_last_checkpoint(run, tmp_path, which):
    """A learning rate beyond all reason: what was written before the step that failed stays, and is finite."""
    with pytest.raises(UserError) as caught:
        run(which, "--lr 1e30 --lr-warmup-ratio 0 --epochs 4 --max-grad-norm 1e30 --save-every 1")
    step = int(re.search(r"at step (\d+), prompts \[\d+, \d+\]", str(caught.value))[1])
    out = tmp_path / "out"
    assert step > 1 and newest_checkpoint(out) == step - 1 == len(logged(out)) and not (out / "student").exists()
    tensors = [t for file in out.glob("checkpoint/step-*/*.safetensors") for t in load_file(file).values()]
    assert tensors and all(t.isfinite().all() for t in tensors)


def test_chosen_log_prob_that_falls_is_told_once(run, capsys):
    """With its number of nats; the learning rate is large enough for the known failure."""
    run("dpo", "--lr 1 --epochs 3 --lr-warmup-ratio 0 --beta 0.01 --max-grad-norm 1e9")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    pattern = r"warning: step \d+: the chosen responses' log-prob is (\d+\.\d) nats under the reference's; .*"
    assert float(re.fullmatch(pattern, line)[1]) > 10
    # beta 0.5, chosen reward -0.1: 0.2 nats; of a mean over 60 tokens 12 nats a response
    args, world = dpo.parse_args(["--model", "M", "--pairs", "P", "--beta", "0.5"]), SimpleNamespace(rank=1)
    fell = lambda: dpo.warn_if_chosen_falls({"chosen_reward": -0.1}, args, 60, world)
    assert not fell()
    args.logprobs = "mean"
    assert fell()


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted files
# ---------------------------------------------------------------------------------------------------------------------


def test_no_pickle():
    """No module imports pickle, or calls what unpickles."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("tools/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path
            assert called not in ("torch.load", "torch.save", "eval", "exec") and "pickle" not in called, path


def test_a_checkpoint_is_safetensors_and_json(trained):
    """Of at most 16 tensors a file, since the writer has a file twice in memory; no file of a run is a pickle."""
    files = [path for path in trained.rglob("*") if path.is_file()]
    checkpoint = [path for path in files if "checkpoint" in path.parts]
    assert {path.suffix for path in checkpoint} == {".safetensors", ".json"}
    tensors = [len(load_file(path)) for path in checkpoint if path.suffix == ".safetensors"]
    assert len(tensors) > 2 and max(tensors) <= 16
    for path in files:
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), path


def test_pickled_checkpoint_is_not_opened(run, unfinished, tmp_path):
    """A file that would run code if it were unpickled."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    file = min(unfinished.glob("checkpoint/step-000006/*.safetensors"))
    file.write_bytes(pickle.dumps(Bomb()))
    (file.parent / ".metadata").write_bytes(pickle.dumps(Bomb()))
    sizes = {f.name: f.stat().st_size for f in file.parent.iterdir() if f.name != "files.json"}
    runs.write_json(file.parent / "files.json", sizes)
    assert_error("the checkpoint is damaged …", run, "dpo")
    assert not (tmp_path / "exploded").exists()


def test_paths_in_data_are_never_opened(run, tmp_path, monkeypatch):
    """Prompts and responses that look like paths or URLs are text like any other."""
    secret = tmp_path / "secret.txt"
    secret.write_text("7")
    strange = [str(secret), f"file://{secret}", "http://localhost:1/x", "../../etc/passwd", "@" + str(secret), "$HOME"]
    rows = [{"prompt": text, "response": text, "image": text, "path": text, "file_name": text} for text in strange]
    runs.write_jsonl(tmp_path / "data.jsonl", rows)
    runs.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": t, "chosen": t, "rejected": "1"} for t in strange])
    opened, real = [], open

    def watched(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", watched)
    before = secret.stat().st_atime_ns
    run("warmup_distill", data=tmp_path / "data.jsonl", out="a")
    run("dpo", pairs=tmp_path / "pairs.jsonl", out="b")
    assert opened and not [path for path in opened if any(text in path for text in (*strange, "secret"))]
    assert secret.stat().st_atime_ns == before


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

READ_AND_SHARD = """
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
sys.path.insert(0, {root!r})
from lib import models, runs, training

def main():
    world, tokenizer = runs.start_processes("cpu", 1), models.load_tokenizer({path!r})
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before = peak()
    args = SimpleNamespace(trust_remote_code=False, activation_checkpointing=False)
    lm = training.load_trainable({path!r}, args, tokenizer, world)
    training.shard(torch.nn.Sequential(lm), lm, torch.float32, world)
    Path({path!r}).with_name("grown-" + str(world.rank)).write_text(str(peak() - before))

runs.run(main)
"""


def test_one_copy_of_a_trained_model_in_memory(tmp_path, tokenizer):
    """One rank reads it; the three others hold their quarter, and for a moment the largest weight."""
    model = make_model("llama", 1, width=1536)
    megabytes = sum(weight.numel() for weight in model.parameters()) * 4 / 2**20
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    script = tmp_path / "script.py"
    script.write_text(READ_AND_SHARD.format(root=str(ROOT), path=str(tmp_path / "model")))
    done = launch(4, script)
    assert done.returncode == 0 and megabytes > 120, done.stderr[-3000:]
    first, *others = (float((tmp_path / f"grown-{rank}").read_text()) for rank in range(4))
    assert first > 0.9 * megabytes and max(others) < 0.6 * megabytes, (first, others)


def test_memory():
    """60 steps of each loop: the growth after step 30 is under the limit that 400 steps have. 5,000 prompts and pairs cost
    little more than 16, in each script. (One process; the command starts two.)"""
    done = launch(0, "tests/long_run.py", *["--steps", "60", "--rows", "5000", "--processes", "0"])
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [len(script["samples"]) for script in found["steps"].values()] == [30, 30]
    assert len(found["rows"]) == 3 and max(row["above_mb"] for row in found["rows"]) < 50
