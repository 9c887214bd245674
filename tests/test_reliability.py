"""Killed, told to stop, cut off, misled: nothing is lost, and nothing wrong is made of what is left.

`python tests/kills.py` is the long version of the first test, `python tests/long_run.py` that of the last two.
"""

import ast
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import kills
import long_run
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import common
import dpo
import kd
import run_folder
import training
import warmup_distill
from common import UserError

SMALL = "--batch-size 2 --micro-batch-size 2 --lr 1e-3 --threads 1 --device cpu --save-every 2"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return kills.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    """12 preference pairs of text."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    common.write_jsonl(path, [{"prompt": f"{i}+2:", "chosen": f"{i}3", "rejected": f"{i}45"} for i in range(12)])
    return path


@pytest.fixture
def align(inputs, pairs_file, tmp_path):
    """align(flags, out="out", ...) runs dpo.py here and returns OUT."""

    def run(flags="", out="out", model=inputs["student"], data=pairs_file):
        argv = ["--model", model, "--pairs", data, "--out", tmp_path / out, *SMALL.split(), *flags.split()]
        dpo.main([str(word) for word in argv])
        return tmp_path / out

    return run


def starter(script, few, inputs, tmp_path):
    """run(flags="", out="out", ...) starts warmup_distill.py or kd.py here and returns OUT; more: other inputs, by name."""

    def run(flags="", out="out", **changed):
        paths = [word for name, path in {**inputs, **changed}.items() for word in (f"--{name}", str(path))]
        script.main([*paths, "--out", str(tmp_path / out), *f"--template none --limit 6 {SMALL} {few} {flags}".split()])
        return tmp_path / out

    return run


@pytest.fixture
def warm_up(inputs, tmp_path):
    few = "--samples 2 --max-new-tokens 8 --prompts-per-batch 2 --eta 1 --eval-limit 0"
    return starter(warmup_distill, few, inputs, tmp_path)


@pytest.fixture
def distil(inputs, tmp_path):
    return starter(kd, "--max-new-tokens 40 --prompts-per-batch 2 --eval-limit 0", inputs, tmp_path)


def weights(out):
    return load_file(out / "student" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)


def content(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def logged(out):
    rows = common.read_jsonl(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in kills.CLOCKS} for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Killed, or told to stop
# ---------------------------------------------------------------------------------------------------------------------


def interrupt(job, number, count, log, processes=2):
    """Starts a command, sends it a signal `count` steps behind what is done, waits for all its processes; returns the Start."""
    script, args, out = job
    count += kills.count_lines(out / "metrics.jsonl")
    start = kills.Start(processes, script, args, log)
    moment = kills.Moment(0, "training", count, 0.0, "")
    while not moment.reached(out):
        assert start.process.poll() is None, start.log.read_text()
        time.sleep(0.002)
    start.process.send_signal(number)
    start.wait_for_all()
    return start


def newest_checkpoint(out):
    [folder] = out.glob("checkpoint/step-*")
    return int(folder.name.removeprefix("step-"))


def assert_stopped(start, out, number):
    """The error line names stage and step; the checkpoint is of that step; all that is logged is in it."""
    lines = {line.removesuffix(" (rank 1)") for line in start.errors()}
    [line] = [line for line in lines if "stopped after step" in line]
    step = int(re.fullmatch(
        r"error: stopped after step (\d+), whose checkpoint is written, in stage dpo, the same command goes on .*", line
    )[1])  # fmt: skip
    assert newest_checkpoint(out) == step == kills.count_lines(out / "metrics.jsonl")
    assert f'File "{ROOT}' not in start.log.read_text(), "a traceback of ours; torchrun has its own"


def test_two_processes_killed_and_stopped(inputs, tmp_path):
    """A rank is killed, SIGTERM comes, Ctrl-C comes, torchrun is killed in a checkpoint: each time the same command goes
    on, nobody is left over, and the end is that of an unbroken run, bit for bit."""
    [job, _] = kills.commands(inputs, tmp_path / "run")
    out, log = job[2], tmp_path / "log"
    kills.run_unbroken(2, [job], log)
    whole = kills.results([job])
    (tmp_path / "run").rename(tmp_path / "unbroken")

    def kill(stage, count, victim):
        start = kills.Start(2, *job[:2], log)
        seen = kills.strike(start, [kills.Moment(0, stage, count, 0.0, victim)], out)
        assert seen["stage"] == stage and seen["ended after"] < 60
        assert any("in stage" in line for line in start.errors()), log.read_text()

    kill("pairs", 6, "rank 1")
    assert_stopped(interrupt(job, signal.SIGTERM, 3, log), out, signal.SIGTERM)
    assert_stopped(interrupt(job, signal.SIGINT, 3, log), out, signal.SIGINT)
    kill("checkpoint", 1, "torchrun")
    kills.run_unbroken(2, [job], log)
    assert len(whole) > 30 and kills.differences(kills.results([job]), whole) == []


def test_one_process_stopped_while_another_waits(inputs, pairs_file, tmp_path, align):
    """OUT belongs to one run at a time. Ctrl-C: status 130, a checkpoint. The same command ends with the same weights."""
    whole = align("--epochs 20", out="whole")
    args = ["--model", inputs["student"], "--pairs", str(pairs_file), *SMALL.split(), "--epochs", "20"]
    job = ("dpo.py", [*args, "--out", str(tmp_path / "out")], tmp_path / "out")
    start = kills.Start(0, *job[:2], tmp_path / "log")
    while not (tmp_path / "out" / "reference.json").exists():
        assert start.process.poll() is None, start.log.read_text()
        time.sleep(0.002)
    start.process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="^another run is at work in OUT, at .*, wait for it or give another --out$"):
        align("--epochs 20")
    start.process.send_signal(signal.SIGCONT)
    while kills.count_lines(tmp_path / "out" / "metrics.jsonl") < 3:
        time.sleep(0.002)
    start.process.send_signal(signal.SIGINT)
    assert start.process.wait(60) == 128 + signal.SIGINT
    assert_stopped(start, job[2], signal.SIGINT)
    assert 3 <= newest_checkpoint(job[2]) < 120
    out = align("--epochs 20")
    assert same(weights(out), weights(whole)) and logged(out) == logged(whole)


def test_all_ranks_stop_if_one_is_told(monkeypatch):
    """The others were not signalled, and leave with SIGTERM's status all the same."""
    monkeypatch.setattr(common, "STATUS", common.Status())
    left = []
    monkeypatch.setattr(common, "leave", lambda line, status: left.append((line, status)))
    monkeypatch.setattr(common.signal, "signal", lambda *handler: None)

    def main():
        raise common.Stopped("stopped after step 3, whose checkpoint is written")

    common.run(main)
    assert left[0][1] == 143 and "after step 3" in left[0][0]


@pytest.mark.parametrize("error", [UserError("a", "b", "c"), common.Stopped("stopped"), RuntimeError("gloo: closed")])
def test_no_signal_interrupts_the_last_words(monkeypatch, error):
    """A rank is lost: gloo fails here, and torchrun's SIGTERM comes while that is being put into words."""
    monkeypatch.setattr(common, "STATUS", common.Status())
    monkeypatch.setattr(common.signal, "signal", lambda *handler: None)
    left, cause = [], common.cause_outside

    def interrupted(*args):
        common.STATUS.on_signal(signal.SIGTERM, None)
        return cause(*args) if len(args) == 1 else left.append(args)

    monkeypatch.setattr(common, "cause_outside", interrupted)
    monkeypatch.setattr(common, "leave", interrupted)

    def main():
        raise error

    common.run(main)
    [(line, status)] = left
    assert line.startswith("error: ") and status == {UserError: 2, RuntimeError: 1}.get(type(error), 143)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_full_memory_is_one_line(monkeypatch, error):
    """With the flags that need less of it, and the stage."""
    left = []
    monkeypatch.setattr(common, "STATUS", common.Status())
    monkeypatch.setattr(common, "leave", lambda *args: left.append(args))

    def main():
        common.STATUS.enter("dpo")
        raise error

    common.run(main)
    [(line, status)] = left
    assert line.startswith("error: out of memory (") and status == 1
    assert all(flag in line for flag in ("--micro-batch-size", "--activation-checkpointing", "--prompts-per-batch"))
    assert f"in stage dpo, {common.GO_ON}" in line


@pytest.mark.parametrize("which", ["dpo", "kd"])
def test_less_memory_goes_on_in_the_same_folder(align, distil, tmp_path, monkeypatch, which):
    """After running out of memory: smaller micro-batches, activations computed again; the same weights but for rounding."""
    run = align if which == "dpo" else distil
    whole, append = run("--epochs 2", out="whole"), common.append_jsonl

    def full(file, row):
        if row["step"] == 3:
            raise torch.OutOfMemoryError
        append(file, row)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(common, "append_jsonl", full)
        run("--epochs 2")
    ended = weights(run("--epochs 2 --micro-batch-size 1 --activation-checkpointing"))
    assert newest_checkpoint(tmp_path / "out") > 2
    for name, value in weights(whole).items():
        torch.testing.assert_close(ended[name], value, rtol=0, atol=1e-5)


def test_checkpoint_of_many_files(align, tmp_path, monkeypatch):
    """Gone on with as from one file: the same weights, bit for bit."""
    whole, append = align("--epochs 2", out="whole"), common.append_jsonl
    assert len([*whole.glob("checkpoint/*/*.safetensors")]) == 1
    monkeypatch.setattr(training, "FILE_BYTES", 4096)

    def stop(file, row):
        if row["step"] == 3:
            raise common.Stopped("stopped")
        append(file, row)

    with monkeypatch.context() as patch, pytest.raises(common.Stopped):
        patch.setattr(common, "append_jsonl", stop)
        align("--epochs 2")
    files = [*(tmp_path / "out").glob("checkpoint/*/*.safetensors")]
    tensors = [load_file(file) for file in files]
    assert len(files) > 3 and all(len(t) == 1 or sum(v.nbytes for v in t.values()) <= 4096 for t in tensors)
    ended = weights(align("--epochs 2"))
    assert all(torch.equal(ended[name], value) for name, value in weights(whole).items())


def test_a_signal_behind_the_last_step_is_not_lost():
    status = common.Status()
    status.enter("dpo", finishes_step=True)
    status.on_signal(signal.SIGTERM, None)
    with pytest.raises(common.Stopped, match="stopped by SIGTERM"):
        status.enter("dpo, saving the model")


def test_left_half_written(align, tmp_path):
    """What a killed run left under a temporary name goes when the next one starts."""
    whole = align(out="whole")
    out = tmp_path / "out"
    for name in (
        ".student.partial/model.safetensors",
        "checkpoint/.step-000009.partial/shard",
        ".pairs.jsonl.7.partial",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("half")
    shutil.copy(whole / "args.json", out)
    align()
    assert not [path for path in out.rglob("*") if "partial" in path.name]
    assert same(weights(out), weights(whole))


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that have changed under the same path
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["student", "teacher", "data"])
def test_changed_inputs_are_refused(inputs, warm_up, tmp_path, name):
    copy = tmp_path / Path(inputs[name]).name
    (shutil.copytree if name != "data" else shutil.copy)(inputs[name], copy)
    out = warm_up(**{name: copy})
    before = content(out)
    if name == "data":
        copy.write_text(copy.read_text().replace("1", "2", 1))
    else:
        tensors = load_file(copy / "model.safetensors")
        tensors[min(tensors)][0] += 1e-3
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    pattern = rf"^OUT holds a run with other arguments \({re.escape(str(copy))} has changed since\), in .*"
    with pytest.raises(UserError, match=pattern):
        warm_up(**{name: copy})
    assert content(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------


FULL = {  # name -> the script, its flags, bytes that a file may have (EFBIG stands for a full disk), what cannot be written
    "pairs": ("warmup_distill.py", "--samples 16 --max-new-tokens 24", 6000, "pairs"),
    "metrics": ("dpo.py", "--epochs 8 --save-every 99", 8000, "dpo"),
    "checkpoint": ("dpo.py", "", 8000, "dpo"),
    "kd": ("kd.py", "", 8000, "kd"),
}
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script, flags, size, stage", FULL.values(), ids=FULL)
def test_full_disk(align, warm_up, distil, inputs, pairs_file, tmp_path, script, flags, size, stage):
    """One line that names the stage, status 1, no half file; with room again the same command ends as if nothing was."""
    run = {"warmup_distill.py": warm_up, "dpo.py": align, "kd.py": distil}[script]
    argv = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[script[:-3]], "main", argv.extend)
        run(flags)
    command = [sys.executable, "-c", LIMITED, str(size), str(ROOT / script), *map(str, argv)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.match(r"error: the disk refuses \(.*(File too large|No space left).*\)", lines[0])
    assert f", in stage {stage}" in lines[0] and "the same command goes on" in lines[0]
    for file in (tmp_path / "out").rglob("*.jsonl"):
        common.read_jsonl(file)
    assert not (tmp_path / "out" / "student").exists()
    out, whole = run(flags), run(flags, out="whole")
    assert same(weights(out), weights(whole)) and logged(out) == logged(whole)


def test_a_log_line_is_whole_or_not_there(tmp_path):
    """The disk is full within a line of metrics.jsonl."""
    path = tmp_path / "metrics.jsonl"
    common.append_jsonl(path, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(OSError, match="No space left on device"):
            common.append_jsonl(path, {"step": 2, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert common.read_jsonl(path) == [{"step": 1}]


def test_read_only_out(align, tmp_path, monkeypatch):
    """OUT cannot be opened for writing. (chmod does not hold root back: the system's answer is put in its place.)"""
    (tmp_path / "out").mkdir()

    def refuse(*args):
        raise OSError(30, "Read-only file system", str(tmp_path / "out" / ".lock"))

    monkeypatch.setattr(run_folder.os, "open", refuse)
    pattern = r"^OUT cannot be written \(.*Read-only file system.*\), at .*out, give another --out$"
    with pytest.raises(UserError, match=pattern):
        align()
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files of a run
# ---------------------------------------------------------------------------------------------------------------------


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_header(path):
    path.write_bytes(path.read_bytes().replace(b"F32", b"F99"))


CUT = "the checkpoint is damaged ({} is cut), in {}, delete it, and training starts again from the initial student"
DAMAGED = "the checkpoint is damaged (…), in {1}, delete it, and training starts again from the initial student"
CHECKPOINTS = {
    "shard cut": ("*.safetensors", half, CUT),
    "shard empty": ("*.safetensors", lambda path: path.write_bytes(b""), CUT),
    "shard gone": ("*.safetensors", Path.unlink, DAMAGED),
    "shard damaged": ("*.safetensors", flip_header, DAMAGED),
    "no files.json": ("files.json", Path.unlink, DAMAGED),
    "files.json cut": ("files.json", half, DAMAGED),
    "files.json is a list": ("files.json", lambda path: path.write_text("[]"), DAMAGED),
    "files.json of nothing": ("files.json", lambda path: path.write_text('{"shard-9.safetensors": 5}'), DAMAGED),
}


@pytest.fixture(scope="module")
def trained(inputs, pairs_file, tmp_path_factory):
    """A run of dpo.py that ended; without OUT/student it goes on from its checkpoint at step 6."""
    out = tmp_path_factory.mktemp("trained") / "out"
    argv = ["--model", inputs["student"], "--pairs", pairs_file, "--out", out, *SMALL.split()]
    dpo.main([str(word) for word in argv])
    return out


def fullmatch(expected, text):
    """`expected` is exact, but for …"""
    return re.fullmatch(re.escape(expected).replace("…", ".*"), text)


@pytest.mark.parametrize("pattern, damage, expected", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_damaged_checkpoint(align, trained, tmp_path, pattern, damage, expected):
    """Refused in one line; deleted, the work is done again, and ends the same."""
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "student")
    [file] = out.glob(f"checkpoint/step-000006/{pattern}")
    damage(file)
    with pytest.raises(UserError) as caught:
        align()
    assert fullmatch(expected.format(file.name, file.parent), str(caught.value)), caught.value
    assert not (out / "student").exists()
    shutil.rmtree(out / "checkpoint")
    align()
    assert same(weights(out), weights(trained)) and logged(out) == logged(trained)


@pytest.mark.parametrize("damage", [half, lambda p: p.write_text("[[1, 2, 3]]"), lambda p: p.write_bytes(b"\xff")])
def test_damaged_reference_is_made_again(align, trained, tmp_path, damage):
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "student")
    damage(out / "reference.json")
    align()
    assert (out / "reference.json").read_bytes() == (trained / "reference.json").read_bytes()
    assert same(weights(out), weights(trained))


@pytest.mark.parametrize("text", ['{"step": 1}\n{"step": \n{"step": 3}\n', "[1]\n2\n", '{"loss": 1}\n\n', "\x00\n"])
def test_damaged_metrics(align, trained, tmp_path, text):
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "student")
    (out / "metrics.jsonl").write_text(text)
    pattern = rf"^the file is damaged \(.*\), in {out}/metrics.jsonl, mend or delete it"
    with pytest.raises(UserError, match=pattern):
        align()


@pytest.mark.parametrize(
    "damage",
    [half, Path.unlink, lambda p: p.write_text(""), lambda p: p.write_text(p.read_text().splitlines()[0] + "\n")],
)
def test_damaged_pair_shard(warm_up, tmp_path, damage):
    """Refused, or (gone) made again; with the file deleted the run goes on, and its pairs are the same."""
    whole = warm_up(out="whole")
    out = shutil.copytree(whole, tmp_path / "out")
    file = out / "pairs" / "00001.jsonl"
    damage(file)
    if file.exists():
        expected = f"the file is cut or damaged, in {file}, delete it and run again: it is then made again"
        with pytest.raises(UserError, match=re.escape(expected)):
            warm_up()
        file.unlink()
    warm_up()
    for name in ("pairs/00001.jsonl", "pairs.jsonl", "mismatch.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


RESPONSES = {
    "cut in a line": half,
    "a row is missing": lambda p: p.write_text(p.read_text().splitlines()[0] + "\n"),
    "twice": lambda p: p.write_text(p.read_text() * 2),
    "of other prompts": lambda p: p.write_text(p.read_text().replace('"prompt_id": ', '"prompt_id": 1')),
    "no ids": lambda p: p.write_text(p.read_text().replace("response_ids", "ids")),
    "ids out of range": lambda p: p.write_text(p.read_text().replace('"response_ids": [', '"response_ids": [99, ')),
    "not rows": lambda p: p.write_text("1\n2\n"),
}


@pytest.mark.parametrize("damage", RESPONSES.values(), ids=RESPONSES)
def test_damaged_responses(distil, tmp_path, damage):
    """kd.py --mode teacher: one more line in a file would shift all responses behind it."""
    out = distil("--mode teacher --max-steps 1")
    shutil.rmtree(out / "student")
    damage(file := out / "responses" / "00001.jsonl")
    expected = f"the file is cut, or of other prompts, in {file}, delete it: it is then made again"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        distil("--mode teacher --max-steps 1")
    file.unlink()
    distil("--mode teacher --max-steps 1")


CACHES = {
    "cut": ("00001.safetensors", half, "the file is cut or damaged, in {}/00001.safetensors, delete it: it is then made again"),
    "empty": ("00001.safetensors", lambda p: p.write_bytes(b""), "the file is cut or damaged, in {}/00001.safetensors, delete it: it is then made again"),
    "another's": ("00001.safetensors", lambda p: shutil.copy(p.with_name("00000.safetensors"), p), "the file is cut or damaged, in {}/00001.safetensors, delete it: it is then made again"),
    "no cache.json": ("cache.json", Path.unlink, "the teacher cache was made of something else (…), in {}, give another --teacher-cache"),
    "cache.json cut": ("cache.json", half, "the teacher cache was made of something else (…), in {}, give another --teacher-cache"),
    "cache.json no object": ("cache.json", lambda p: p.write_text("[1]"), "the teacher cache was made of something else (…), in {}, give another --teacher-cache"),
}  # fmt: skip


@pytest.mark.parametrize("name, damage, expected", CACHES.values(), ids=CACHES)
def test_damaged_teacher_cache(distil, tmp_path, name, damage, expected):
    flags = f"--max-steps 1 --teacher-cache {tmp_path / 'cache'} --teacher-top-k 3 --prompts-per-batch "
    distil(flags + "3")
    damage(tmp_path / "cache" / name)
    with pytest.raises(UserError) as caught:
        distil(flags + "3", out="second")
    assert fullmatch(expected.format(tmp_path / "cache"), str(caught.value)), caught.value


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def poison(folder, value):
    """One weight of the last norm is not a number, or far too large."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("which", ["dpo", "kd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(inputs, align, distil, tmp_path, which, value):
    """The first step stops the run, names it and its prompts; nothing is trained, saved or logged."""
    student = shutil.copytree(inputs["student"], tmp_path / "student")
    poison(student, value)
    with pytest.raises(UserError) as caught:
        align(model=student) if which == "dpo" else distil(student=student)
    pattern = rf"loss nan and gradient norm \S+ at step 1, prompts \[\d+, \d+\], in {tmp_path}/out, lower --lr or use --dtype float32; the last checkpoint is kept"
    assert re.fullmatch(pattern, str(caught.value)), caught.value
    out = tmp_path / "out"
    assert not any((out / name).exists() for name in ("student", "checkpoint", "metrics.jsonl"))


@pytest.mark.parametrize("which", ["dpo", "kd"])
def test_training_that_explodes_keeps_the_last_checkpoint(align, distil, tmp_path, which):
    """A learning rate beyond all reason: what was written before the step that failed stays, and is finite."""
    run = align if which == "dpo" else distil
    with pytest.raises(UserError) as caught:
        run("--lr 1e30 --lr-warmup-ratio 0 --epochs 4 --max-grad-norm 1e30 --save-every 1")
    step = int(re.search(r"at step (\d+), prompts \[\d+, \d+\]", str(caught.value))[1])
    out = tmp_path / "out"
    assert step > 1 and newest_checkpoint(out) == step - 1 == len(logged(out)) and not (out / "student").exists()
    tensors = [t for file in out.glob("checkpoint/step-*/*.safetensors") for t in load_file(file).values()]
    assert tensors and all(t.isfinite().all() for t in tensors)


def test_chosen_log_prob_that_falls_is_told_once(align, capsys):
    """With the number behind it; the learning rate is large enough for the known failure."""
    align("--lr 1 --epochs 3 --lr-warmup-ratio 0 --beta 0.01 --max-grad-norm 1e9")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1
    pattern = r"warning: step \d+: the chosen responses' log-prob is (\d+\.\d) nats under the reference's, counted behind the shared prefix; .*"
    assert float(re.fullmatch(pattern, lines[0])[1]) > 10


def test_fall_of_a_mean_log_prob_is_that_of_the_response():
    """beta 0.5, chosen reward -0.1: 0.2 nats; of a mean over 60 tokens 12 nats a response."""
    args, world = dpo.parse_args(["--model", "M", "--pairs", "P", "--beta", "0.5"]), SimpleNamespace(rank=1)
    fell = lambda: dpo.warn_if_chosen_falls({"chosen_reward": -0.1}, args, 60, world)
    assert not fell()
    args.logprobs = "mean"
    assert fell()


def test_warnings_about_pairs_are_printed(warm_up, capsys):
    """eta 100: nothing is corrected, and the run says so."""
    warm_up("--eta 100")
    printed = capsys.readouterr().out
    assert "warning: the teacher corrects 0.0% of the samples at eta 100.0: eta is too high" in printed
    assert "warning: no pair came out" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Untrusted files
# ---------------------------------------------------------------------------------------------------------------------


def production_files():
    return sorted(path for path in ROOT.glob("*.py"))


def test_no_pickle():
    """No module here imports pickle, or calls what unpickles; weights are asked for as safetensors."""
    assert len(production_files()) > 10
    for path in production_files():
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.Import | ast.ImportFrom) else set()
            names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert not names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, path
            assert called not in ("torch.load", "torch.save", "eval", "exec") and "pickle" not in called, path
            if called.endswith(".from_pretrained") and "AutoModel" in called:
                assert any(k.arg == "use_safetensors" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_a_checkpoint_is_safetensors_and_json(trained):
    """All files of a run: nothing else is in the checkpoint, nothing is a pickle or a zip of pickles."""
    files = [path for path in trained.rglob("*") if path.is_file()]
    checkpoint = [path for path in files if "checkpoint" in path.parts]
    assert len(checkpoint) >= 2 and {path.suffix for path in checkpoint} == {".safetensors", ".json"}
    for path in files:
        assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), path


def test_pickled_checkpoint_is_not_opened(align, trained, tmp_path):
    """A file that would run code if it were unpickled."""
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "student")

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    [file] = out.glob("checkpoint/step-000006/*.safetensors")
    file.write_bytes(pickle.dumps(Bomb()))
    (file.parent / ".metadata").write_bytes(pickle.dumps(Bomb()))
    sizes = {f.name: f.stat().st_size for f in file.parent.iterdir() if f.name != "files.json"}
    common.write_json(file.parent / "files.json", sizes)
    with pytest.raises(UserError, match="^the checkpoint is damaged "):
        align()
    assert not (tmp_path / "exploded").exists()


def test_paths_in_data_are_never_opened(warm_up, align, tmp_path, monkeypatch):
    """Prompts and responses that look like paths or URLs are text like any other."""
    secret = tmp_path / "secret.txt"
    secret.write_text("7")
    strange = [str(secret), f"file://{secret}", "http://localhost:1/x", "../../etc/passwd", "@" + str(secret), "$HOME"]
    rows = [{"prompt": text, "response": text, "image": text, "path": text, "file_name": text} for text in strange]
    common.write_jsonl(tmp_path / "data.jsonl", rows)
    common.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": t, "chosen": t, "rejected": "1"} for t in strange])
    opened, real = [], open

    def watched(file, *args, **kwargs):
        opened.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", watched)
    before = secret.stat().st_atime_ns
    warm_up(data=tmp_path / "data.jsonl", out="a")
    align(data=tmp_path / "pairs.jsonl", out="b")
    assert opened and not [path for path in opened if any(text in path for text in (*strange, "secret"))]
    assert secret.stat().st_atime_ns == before


# ---------------------------------------------------------------------------------------------------------------------
# Long runs
# ---------------------------------------------------------------------------------------------------------------------


def test_memory_of_steps(inputs, tmp_path):
    """A small version: 60 steps of each loop, the growth behind step 30 under the limit that 400 steps have."""
    found = long_run.measure_steps(tmp_path, 60, inputs, every=2)
    assert all(len(f["samples"]) == 30 and f["growth_mb"] < long_run.GROWTH_LIMIT for f in found.values())
    assert long_run.too_much(found, []) == [] and "<svg" in long_run.plot(found)


def test_memory_of_prompts(tmp_path):
    """20,000 prompts take little more than 2,000."""
    few, many = long_run.measure_prompts(tmp_path, [2_000, 20_000])
    assert many["prompts"] == 20_000 and many["peak_mb"] - few["peak_mb"] < long_run.PROMPT_LIMIT
