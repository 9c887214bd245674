"""lib/runs.py: errors, processes, what OUT's arguments, inputs and code may be, and files that are whole or not there."""

import argparse
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from lib import runs
from lib.runs import UserError


@pytest.fixture(scope="module")
def world():
    return runs.start_processes("cpu", 0)


@pytest.fixture
def start(world, tmp_path):
    """start(flag=value, ...) takes up tmp_path/out, whose inputs are one file and one hub id."""
    data = tmp_path / "data.jsonl"
    if not data.exists():
        data.write_text("1\n")

    def begin(**flags):
        args = argparse.Namespace(**{"seed": 1, "out": tmp_path / "out", "accept_changes": False} | flags)
        return runs.start_run(args.out, args, world, [data, "some/model"])

    return begin


def error_of(function, *args, **flags):
    with pytest.raises(UserError) as caught:
        function(*args, **flags)
    return str(caught.value)


def fail(*args):
    raise UserError("what", "where", "what to do")


def made(out):
    """Puts something into OUT that a run would have made."""
    (out / "pairs.jsonl").write_text("")


# ---------------------------------------------------------------------------------------------------------------------
# Errors and flags
# ---------------------------------------------------------------------------------------------------------------------


def test_user_error_is_one_printable_line():
    """It may quote a file: line ends and escape sequences are written out, other letters stay; also once pickled."""
    error = UserError("a\nb\x1b[31m", "in é\u2028", "do c")
    for copy in (error, pickle.loads(pickle.dumps(error))):  # as `World.first` sends it
        assert type(copy) is UserError and str(copy) == "a\\nb\\x1b[31m, in é\\u2028, do c"


def test_one_line():
    errors = {"one": ValueError("\n  one.\ntwo"), "ValueError": ValueError(), "'k'": KeyError("k")}
    assert [runs.one_line(error) for error in errors.values()] == list(errors)


def test_parser_errors(monkeypatch):
    """Flags out of range, and others that are wrong: tests/test_errors.py."""
    monkeypatch.setattr(sys, "argv", ["SCRIPT"])
    parser = runs.ArgumentParser("First line.\n\nMore.")
    runs.add_arguments(parser)
    expected = "unrecognized arguments: --see 1, on the command line, see SCRIPT --help"
    assert error_of(parser.parse_args, ["--see", "1"]) == expected, "no abbreviations"
    assert "First line." in parser.format_help() and "More." not in parser.format_help()


# ---------------------------------------------------------------------------------------------------------------------
# Processes: tests/test_distributed.py has several
# ---------------------------------------------------------------------------------------------------------------------


def test_world_of_one(world):
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
    assert runs.start_processes("cpu", 0) == world, "a second start joins the same group"
    assert world.any([7]) and not world.any([]) and not world.any(0.0)
    assert world.sum({"a": 1.5, "b": math.pi}) == {"a": 1.5, "b": math.pi}, "float64"
    assert world.first(lambda: {"x": [1]}) == {"x": [1]} and world.first(lambda: None) is None
    assert error_of(world.first, fail) == "what, where, what to do"
    with pytest.raises(ZeroDivisionError):
        world.first(lambda: 1 / 0)


# ---------------------------------------------------------------------------------------------------------------------
# OUT
# ---------------------------------------------------------------------------------------------------------------------


def test_args_json(start, tmp_path):
    """What it holds; arguments that change no pair and no weight may differ, and it stays as it was."""
    out = start(device="cpu", threads=1, save_every=5, micro_batch_size=2, eval_data="a")
    record = runs.read_json(out / "args.json")
    assert record["args"]["out"] == str(out) and record["args"]["eval_data"] == "a"
    assert record["settings"] == {"seed": 1}, "what is compared"
    assert record["inputs"].keys() == {str(tmp_path / "data.jsonl"), "some/model"}
    assert record["inputs"]["some/model"] is None
    assert {"dpo.py", "lib/runs.py"} <= record["code"].keys() and not any("test" in file for file in record["code"])
    assert record.keys() >= {"versions", "commit", "accepted"}
    made(out)
    start(device="cuda", threads=2, save_every=6, micro_batch_size=1, activation_checkpointing=True, eval_data="b")
    assert runs.read_json(out / "args.json") == record


@pytest.mark.parametrize("what", ["argument", "input", "code"])
def test_changes_are_refused_or_accepted(start, tmp_path, monkeypatch, capsys, what):
    out, data, flags = start(), tmp_path / "data.jsonl", {}
    made(out)
    if what == "argument":
        flags, changes = {"seed": 2, "lr": 0.1}, "lr: None there, 0.1 now; seed: 1 there, 2 now"
    elif what == "input":
        old = runs.fingerprint(data)
        data.write_text("2\n")
        changes = f"{data}: {old} there, {runs.fingerprint(data)} now"
    else:
        code = runs.code_fingerprints()
        monkeypatch.setattr(runs, "code_fingerprints", lambda: code | {"kd.py": "new"})
        changes = f"kd.py: {code['kd.py']} there, new now"
    todo = "give another folder, or --accept-changes to keep what is there"
    assert error_of(start, **flags) == f"what is there was made otherwise ({changes}), in {out}, {todo}"
    assert capsys.readouterr().out == ""
    start(**flags, accept_changes=True)
    assert capsys.readouterr().out == f"accepted in {out}: {changes}\n"
    assert runs.read_json(out / "args.json")["accepted"] == [changes]
    start(**flags)


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": [1]}', "\ud800"])
def test_foreign_folders(start, tmp_path, content):
    """Other tools write an args.json as well; a folder that no run made; a file."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("mine")
    assert error_of(start) == f"OUT holds config.json, which no run made, at {out}, give another --out"
    assert error_of(start, out=out / "config.json").startswith("OUT cannot be used (")
    assert [file.name for file in out.iterdir()] == ["config.json"] and (out / "config.json").read_text() == "mine"
    (out / "args.json").write_bytes(content.encode(errors="surrogatepass"))
    text = error_of(start)
    assert text.startswith("args.json is not of a run of this project (")
    assert text.endswith(f"in {out}, give another --out")


def test_left_by_a_killed_run(start):
    """Half-written files of this run go; whole ones, others' hidden files and another run's stay."""
    out = start()
    made(out)
    (out / "other" / "checkpoint" / ".step-000002.partial").mkdir(parents=True)
    others = {".hidden", ".notes.partial", "other/.metrics.jsonl.1.partial", "other/checkpoint/.step-000002.partial/x"}
    for name in (".pairs.arrow.123.partial", *others):
        (out / name).write_text("")
    start()
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {".lock", "args.json", "pairs.jsonl", *others}


def test_one_run_at_a_time(start, tmp_path, monkeypatch):
    """The lock ends with its process, however that ends. Some file systems have none: then there is no check."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from lib import runs; from pathlib import Path\n"
    code += f"runs.lock(Path({str(tmp_path / 'out' / '.lock')!r})); print(runs.seconds_since_start(), flush=True)\n"
    begun = time.time()
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", f"{code}time.sleep(100)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert 0.5 < float(other.stdout.readline()) <= time.time() - begun + 0.05, "the imports count"
        expected = f"another run is at work, in {tmp_path / 'out'}, wait for it or give another folder"
        assert error_of(start) == expected
        other.send_signal(signal.SIGKILL)
    runs.LOCKS.pop(tmp_path / "out" / ".lock", None)  # as a new process would begin
    start()
    monkeypatch.setattr(runs.fcntl, "lockf", lambda *_: os.stat("/no lock here"))  # raises OSError
    monkeypatch.setattr(runs, "LOCKS", {})
    start()


def test_fingerprint(tmp_path):
    """Of a model folder: weights and JSON files, each by name, size and content; nothing else."""
    folder, values = tmp_path / "model", []
    folder.mkdir()
    for name, content in (("a.safetensors", b"1"), ("a.safetensors", b"2"), ("b.json", b"{}"), ("c.bin", b"")):
        (folder / name).write_bytes(content)
        values.append(runs.fingerprint(folder))
    assert len(set(values)) == 3 and values[2] == values[3] and all(len(value) == 16 for value in values)
    assert runs.fingerprint(str(folder / "b.json")) not in (None, values[2])
    assert runs.fingerprint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("size, places", [(4_000_000, [0, 2_345_678, 3_999_999]), (50_000_000, [0, 49_999_999])])
def test_fingerprint_of_a_large_file(tmp_path, size, places):
    """Blocks from the file's begin to its end; up to 4 MiB every byte counts."""
    path, seen = tmp_path / "x", set()
    for place in (None, *places):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        seen.add(runs.fingerprint(path))
    assert len(seen) == 1 + len(places)


@pytest.mark.parametrize("count, size", [(0, 2), (1, 3), (3, 1), (4, 2), (5, 2), (5, 3), (7, 8)])
def test_shards_to_do(world, tmp_path, capsys, count, size):
    """What is there is left out. Each shard has one owner; all ranks take as many turns, since a sharded model's forwards
    need every rank."""
    folder = tmp_path / "out" / "pairs"
    assert runs.shards_to_do(folder, count, "jsonl", world) == [(k, True) for k in range(count)] and folder.is_dir()
    assert capsys.readouterr().out == "", "nothing was there"
    for name in ("00002.jsonl", ".00001.jsonl.partial", "00000.safetensors", "00099.jsonl"):
        (folder / name).write_text("")
    # `first` of a World of one stands in for the broadcast
    worlds = [argparse.Namespace(rank=rank, size=size, first=world.first) for rank in range(size)]
    lists, missing = [runs.shards_to_do(folder, count, "jsonl", w) for w in worlds], [k for k in range(count) if k != 2]
    assert {len(shards) for shards in lists} == {math.ceil(len(missing) / size)}
    assert sorted(k for shards in lists for k, is_ours in shards if is_ours) == missing
    assert all(k in missing for shards in lists for k, _ in shards)
    said = f"pairs: 1 of {count} batches were there already\n" if count > 2 else ""
    assert capsys.readouterr().out == said * size


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_files_are_whole_or_not_there(tmp_path):
    path = tmp_path / "x.json"
    runs.write_json(path, {"a": "é"})
    with pytest.raises(KeyboardInterrupt), runs.atomic_path(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(TypeError):
        runs.write_jsonl(path, [{"a": 1}, {"b": object()}])
    assert runs.read_json(path) == {"a": "é"} and os.listdir(tmp_path) == ["x.json"]


def test_jsonl(tmp_path):
    """One row a line, whatever is in it; where allowed with blank ones between. tests/test_properties.py has more rows."""
    path, rows = tmp_path / "x.jsonl", [{"a": "é\u2028\U0001f600\n"}, {"b": [1, None, 0.1]}]
    runs.write_jsonl(path, rows)
    runs.append_jsonl(path, {"c": 1})
    path.write_text(path.read_text() + "\n \n2\n")
    assert list(runs.iterate_jsonl(path, blank_lines=True)) == [(1, rows[0]), (2, rows[1]), (3, {"c": 1}), (6, 2)]


BAD_LINES = {"cut": b'{"a": ', "blank": b"", "bytes": b"\xff", "surrogate": b'"\\ud800"', "deep": b"[" * 100_000}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps({"a": "\U0001f600"}).encode() + b"\n" + line + b"\n{}\n")
    text = error_of(runs.read_jsonl, path)
    assert text.startswith("not JSON (") and text.endswith(f"), in {path} line 2, repair or delete the line")
