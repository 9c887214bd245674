"""A run: what every stage of it needs, and its folder OUT, claimed by one run at a time, and taken up again."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import common
import models
import training
from common import UserError, one_line

OUR_FILES = ("pairs", "pairs.jsonl", "reference.json", "responses", "metrics.jsonl", "checkpoint", "student")
# Arguments that may change when a run goes on: what it makes is the same up to rounding
FREE_ARGS = ("out", "device", "micro_batch_size", "activation_checkpointing")
LOCK = None  # file descriptor of OUT/.lock, of the run that this process is at


class Run:
    """What every stage needs; `teacher` is loaded when it is first asked for, and the stages take their time with `clock`."""

    def __init__(self, args, world, tokenizer, eos_ids, out):
        self.args, self.world, self.tokenizer, self.eos_ids, self.out = args, world, tokenizer, eos_ids, out
        self.vocab_size, self.pad_id = len(tokenizer), tokenizer.pad_token_id
        file = out / "speed.json"  # of an earlier start
        self.clocks = common.read_json(file) if file.exists() else {}  # stage -> [tokens, seconds] on this rank

    def load(self, path, device=None):
        """A frozen model in the compute dtype, a plain replica."""
        dtype = models.compute_dtype(self.args.dtype, self.world)
        lm = models.load_model(path, dtype, device or self.world.device, self.args.trust_remote_code)
        models.check_vocabulary(lm, self.tokenizer, path)
        return lm.requires_grad_(False)

    @functools.cached_property
    def teacher(self):
        if self.args.shard_teacher:
            return training.shard_blocks(self.load(self.args.teacher, "cpu"), self.world)
        return self.load(self.args.teacher)

    def drop_teacher(self):
        """Frees its memory before another stage needs it."""
        self.__dict__.pop("teacher", None)

    def decode_text(self, ids):
        """Ids of a response -> text for readers and answer checkers, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @contextlib.contextmanager
    def clock(self, stage):
        """Adds the time inside, and the `tokens` that are set on the yielded object, to `clocks[stage]`."""
        lap, started = SimpleNamespace(tokens=0), time.perf_counter()
        yield lap
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        tokens, seconds = self.clocks.get(stage, (0, 0.0))
        self.clocks[stage] = (tokens + lap.tokens, seconds + time.perf_counter() - started)

    def save_clocks(self):
        """OUT/speed.json, from which a run that goes on later takes them up."""
        common.write_json(self.out / "speed.json", self.clocks)

    def print_speed(self):
        """Tokens a second of each stage; of those with a clock rank 0's."""
        file = self.out / "metrics.jsonl"
        steps = common.read_jsonl(file) if file.exists() else []
        clocks = self.clocks | {"dpo": [sum(step[key] for step in steps) for key in ("tokens", "seconds")]}
        for stage, (tokens, seconds) in clocks.items():
            if tokens:
                print(f"{stage:8} {tokens / seconds:10.0f} tokens/s")


def start_run(out, args, inputs=()):
    """Makes OUT, or takes it up again. OUT/args.json says which arguments and which files made what is in there.

    args: the namespace of `parse_args`; FREE_ARGS may differ (--device changes no more than rounding if --dtype is
    given). inputs: paths of models and data, whose content must be the same, too. Returns OUT as a Path.
    Raises UserError when OUT is no folder, another run is at work in it, or it holds a run of other arguments or inputs.
    """
    out = Path(out)
    if dist.get_rank() == 0:
        try:
            claim(out, vars(args), {str(path): fingerprint(path) for path in inputs})
        except OSError as error:
            raise UserError(f"OUT cannot be written ({one_line(error)})", f"at {out}", "give another --out")
    dist.barrier()
    return out


def claim(out, ours, inputs):
    """What `start_run` does, on rank 0."""
    global LOCK
    if out.exists() and not out.is_dir():
        raise UserError("OUT is not a folder", f"at {out}", "give another --out")
    file, foreign = out / "args.json", [name for name in (*OUR_FILES, "config.json") if (out / name).exists()]
    if foreign and not file.exists():
        raise UserError(f"OUT has a {foreign[0]} that no run here made", f"in {out}", "give another --out")
    out.mkdir(parents=True, exist_ok=True)
    if LOCK is not None:
        LOCK = os.close(LOCK)
    LOCK = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # locked until this process ends, however it ends
    try:
        fcntl.lockf(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError("another run is at work in OUT", f"at {out}", "wait for it or give another --out")
    for left in out.rglob(".*.partial"):  # of a killed run
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if file.exists():
        try:
            there = common.read_json(file)
            theirs, their_inputs = dict(there["args"]), dict(there.get("inputs", {}))
        except (ValueError, KeyError, TypeError):
            raise UserError("args.json is not of a run of this project", f"in {out}", "give another --out")
        # A run that has made nothing yet, since its student could not be loaded, say, claims nothing
        if any(p.is_file() and p != file and p.name != ".lock" for p in out.rglob("*")):
            refuse_if_different(out, ours, inputs, theirs, their_inputs)
            return
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    record = {"args": ours, "inputs": inputs, "versions": versions, "commit": git_commit()}
    common.write_atomic(file, json.dumps(record, indent=1) + "\n")


def refuse_if_different(out, ours, inputs, theirs, their_inputs):
    """Raises UserError that names the arguments and the inputs that are not those OUT was made of."""
    different = [
        f"--{key.replace('_', '-')} {theirs.get(key)} there, {ours.get(key)} now"
        for key in sorted(ours.keys() | theirs.keys())
        if key not in FREE_ARGS and ours.get(key) != theirs.get(key)
    ]
    different += [f"{p} has changed since" for p, content in inputs.items() if their_inputs.get(p, content) != content]
    if different:
        what = f"OUT holds a run with other arguments ({'; '.join(different)})"
        raise UserError(what, f"in {out}", "give another --out")


def fingerprint(path):
    """16 hex digits of the content of a file or a model folder; None for a hub id, which names its content itself.

    Of each file: its name, size, and 65 blocks of 64 KiB spread over it, the whole of a small one. Training changes every weight.
    """
    path, blocks, block = Path(path), 64, 1 << 16
    if not path.exists():
        return None
    content = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
        size = file.stat().st_size
        content.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as data:
            for k in range(blocks + 1):
                data.seek(k * max(block, (size - block) // blocks))
                content.update(data.read(block))
    return content.hexdigest()[:16]


def turns(folder, count, suffix, world, together, unit):
    """This rank's turns at the files NNNNN.suffix of `folder` that are not there: yields (number, file, write it?).

    together: of a sharded model, whose forwards need every rank: an idle rank then goes along on another's turn and
    writes nothing. One file is one `unit` of the progress bar. Ranks meet at the beginning, not at the end.
    """
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    world.barrier()
    there = {file.name for file in folder.iterdir()}
    missing = [k for k in range(count) if f"{k:05d}.{suffix}" not in there]
    world.barrier()  # every rank has looked before the first one writes
    first_of_turns = range(0, len(missing), world.size)
    for first in tqdm(first_of_turns, desc=folder.name, unit=unit, disable=world.rank > 0 or not missing):
        turn = missing[first : first + world.size]
        if world.rank < len(turn) or together:
            k = turn[min(world.rank, len(turn) - 1)]
            yield k, folder / f"{k:05d}.{suffix}", world.rank < len(turn)


@functools.cache
def git_commit():
    """The commit of the checkout that this file is in, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
