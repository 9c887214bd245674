"""A run: its errors, its processes, its flags, its folder OUT and the files in it.

Nothing in this file comes from a paper.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import huggingface_hub
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
MEETING_TIME = timedelta(minutes=10)  # for the processes of a job to find each other
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Something of the user's is where a file of this project belongs, or must not be touched
PATH_ERRORS = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}
# Arguments that may differ when a run continues: they change no pair and no weight by more than rounding
FREE_ARGS = {"out", "toy", "device", "threads", "pairs_only", "save_every", "micro_batch_size", "shard_size"}
FREE_ARGS |= {"activation_checkpointing", "accept_changes", "traceback", "shard_teacher", "responses"}

# ---------------------------------------------------------------------------------------------------------------------
# Errors: one line, exit status 2
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input: UserError(what is wrong, where, what to do). Printed as one line, without a traceback."""

    def __str__(self):
        return printable(", ".join(map(str, self.args)))


def printable(text):
    """Text that may come from a file, for a terminal: line ends and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Stopped(Exception):
    """A training loop was told to stop by a signal, and has written a checkpoint. Printed as one line."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's error line, and help that shows each default once."""

    def __init__(self, doc):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=doc.split("\n\n")[0], formatter_class=formatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        if "" in vars(found).values():
            self.error("an argument is empty")
        return found

    def error(self, message):
        raise UserError(message.replace("\n", " "), "on the command line", f"see {self.prog} --help")


def run(main):
    """Calls `main` and ends the process with an exit status.

    0: done. 2: a UserError, one line. 130, 143: told to stop. 1: anything else, with its traceback.
    The process leaves by os._exit: gloo's threads abort about 1 interpreter shutdown in 40 (pytorch#179291), and a
    rank must not wait in a destructor for ranks that are gone.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # no rank outlives its torchrun (1: PR_SET_PDEATHSIG)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    status, line = 0, None
    try:
        main()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except SystemExit as end:  # of argparse's --help
        status = end.code
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except Stopped as stop:
        status, line = 128 + signal.SIGTERM, str(stop)
    except UserError as error:
        status, line = 2, f"error: {error}"
        if "--traceback" in sys.argv:
            traceback.print_exc()
    except torch.OutOfMemoryError as error:
        status, todo = 1, "lower --micro-batch-size, --prompts-per-batch or add --activation-checkpointing"
        line = f"error: out of GPU memory ({one_line(error)[:160]}), in this process, {todo}"
    except BaseException as error:  # noqa: BLE001 - torch has errors that are no Exception
        if isinstance(error, OSError) and error.errno in PATH_ERRORS:
            status, line = 2, f"error: a path cannot be used ({error}), in this run, check it or give another --out"
        else:  # a defect of ours, shown whole
            status = 1
            traceback.print_exc()
    if line is not None:
        say_from_one_rank(line)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def from_environment(name, default):
    """The number that torchrun has set, or `default`."""
    word = os.environ.get(name, "")
    return int(word) if word.isdecimal() else default


def say_from_one_rank(line):
    """Prints `line` on stderr, and puts it at the end of torchrun's report. Usually all ranks meet the same error: the
    others wait until torchrun, which sees rank 0 end, ends them. One that is alone with its error prints it.
    """
    rank = from_environment("RANK", 0)
    if rank > 0:
        time.sleep(4 + from_environment("LOCAL_RANK", 0) / 4)
        line += f" (rank {rank})"
    tqdm.write(line, file=sys.stderr)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        write_json(os.environ["TORCHELASTIC_ERROR_FILE"], {"message": line, "timestamp": int(time.time())})


@contextlib.contextmanager
def reading(what, where, what_to_do):
    """Inside, a user's files are read: any error, but one of memory, becomes a UserError. --traceback shows it whole."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # torch and tokenizers have errors that are no Exception
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{what} ({kind}{one_line(error)})", where, what_to_do) from error


def one_line(error):
    """The first line of an exception's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among `size` processes, numbered by `rank`; `device` is where it computes."""

    rank: int
    size: int
    device: torch.device

    def barrier(self):
        dist.barrier()

    def print(self, text):
        """On rank 0."""
        if self.rank == 0:
            print(text)

    def any(self, flag):
        """True on every rank if `flag` is true on at least one."""
        return self.sum({"flag": bool(flag)})["flag"] > 0

    def sum(self, values):
        """{name: number} summed over all ranks, in float64."""
        tensor = torch.tensor([float(value) for value in values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return {name: total for name, total in zip(values, tensor.tolist())}

    def gather(self, value):
        """The `value` of each rank, in a list."""
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first(self, function):
        """Calls `function` on rank 0 alone. Its result, or its UserError, reaches every rank."""
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = function()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def start_processes(device, threads):
    """Joins the other processes of a torchrun job, or makes a group of one without torchrun. Returns a `World`.

    device: "auto" (cuda if there is one), "cpu" or "cuda". threads: CPU threads of this process, 0: torch's choice.
    """
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError("no GPU can be used", "--device cuda", "use --device cpu or install a CUDA build of torch")
        local_rank, count = from_environment("LOCAL_RANK", 0), torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"there is no GPU number {local_rank}", f"on a machine of {count}", "start fewer processes")
        torch.cuda.set_device(local_rank)
        torch.backends.cuda.enable_cudnn_sdp(False)  # with a mask its gradients can be NaN (pytorch#196678)
        device = f"cuda:{local_rank}"
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if not dist.is_initialized():
        store, rank, size = dist.HashStore(), 0, 1
        if "RANK" in os.environ:
            with reading("the other processes do not come", "by RANK and MASTER_ADDR", "use torchrun"):
                # Is torchrun itself still there? The rendezvous would wait for it
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                    socket.create_connection(place, timeout=60).close()
                store, rank, size = next(dist.rendezvous("env://", timeout=MEETING_TIME))
        # Ranks wait while rank 0 reads the data or merges files: an hour is for a lost peer only
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=1))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device))


def progress(iterable=None, *, desc, world, **options):
    """A tqdm bar on rank 0; 100 columns, so that it can be read where the terminal's width is unknown."""
    return tqdm(iterable, desc=desc, disable=world.rank > 0, ncols=100, **options)


def seconds_since_start():
    """Seconds since this process was started, the imports included (Linux: field 22 of /proc/self/stat)."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


# ---------------------------------------------------------------------------------------------------------------------
# Flags of every script
# ---------------------------------------------------------------------------------------------------------------------


def ranged(kind, good, text):
    """A `type` for argparse: int or float values that are `good`; `text` names them in the error."""

    def parse(word):
        value = kind(word)
        if not good(value):
            raise argparse.ArgumentTypeError(f"{word} is not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


COUNT = ranged(int, lambda x: 1 <= x < 1 << 31, "1 or more, below 2^31")
LIMIT = ranged(int, lambda x: 0 <= x < 1 << 31, "0 or more, below 2^31")
THREADS = ranged(int, lambda x: 0 <= x <= 1024, "from 0 to 1024")
SEED = ranged(int, lambda x: 0 <= x < 1 << 62, "from 0 to 2^62 - 1")
NATS = ranged(float, math.isfinite, "a finite number")
ABOVE_0 = ranged(float, lambda x: 0 < x <= 1e30, "above 0, at most 1e30")
NOT_NEGATIVE = ranged(float, lambda x: 0 <= x <= 1e30, "0 or more, at most 1e30")
SHARE = ranged(float, lambda x: 0 <= x <= 1, "from 0 to 1")
OPEN_SHARE = ranged(float, lambda x: 0 < x < 1, "between 0 and 1")
TOP_P = ranged(float, lambda x: 1e-6 <= x <= 1, "from 1e-6 to 1")  # float32 knows no smaller share
TEMPERATURE = ranged(float, lambda x: 1e-6 <= x <= 1e6, "from 1e-6 to 1e6")  # logits beyond would be infinite, or all 0


def add_arguments(parser):
    """Flags of every script."""
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=SEED, default=0, help="decides every random number of the run")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 on cuda; trained: always float32")
    add("--threads", type=THREADS, default=0, help="CPU threads of each process; 0: torch's choice")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with a model")
    add("--traceback", action="store_true", help="show where an error in a file or argument was found")
    add("--accept-changes", action="store_true", help="go on in an OUT of other arguments, inputs or code, as it is")


# ---------------------------------------------------------------------------------------------------------------------
# The folder OUT
# ---------------------------------------------------------------------------------------------------------------------


def start_run(out, args, world, inputs=()):
    """Makes OUT, or takes it up again. OUT/args.json says which arguments, inputs and code made what is in it.

    args: the namespace of `parse_args`; FREE_ARGS and --eval-* may differ. inputs: paths of models and data, whose
    content must be the same. Returns OUT as a Path. Raises UserError where OUT is no folder of such a run, holds a run
    of other arguments, inputs or code (unless --accept-changes, which args.json records), or another run is at work.
    """
    return world.first(lambda: claim(Path(out), vars(args), inputs))


def run_key(out):
    """Names the run that OUT is of, by its first settings and inputs: what it makes carries this. "" without args.json."""
    file = out / "args.json"
    return read_json(file)["key"] if file.exists() else ""


def claim(out, args, inputs):
    """What `start_run` does, on rank 0."""
    settings = {key: value for key, value in args.items() if key not in FREE_ARGS and key[:5] != "eval_"}
    versions = {"python": sys.version, "torch": torch.__version__, "transformers": transformers.__version__}
    record = {"args": args | {"out": str(out)}, "settings": settings, "versions": versions, "code": code_fingerprints()}
    with reading("the inputs cannot be read", f"among {', '.join(map(str, inputs))}", "check the files"):
        record |= {"inputs": {str(path): fingerprint(path) for path in inputs}, "commit": git_commit(), "accepted": []}
    record["key"] = seal(settings, record["inputs"])
    file = out / "args.json"
    # A run that has made nothing yet, since its model was not found, say, claims nothing
    begun = {"args.json", "eval", "cache.json"}
    made = [path for path in sorted(out.glob("[!.]*")) if path.suffix != ".arrow" and path.name not in begun]
    made = [path for path in made if not path.is_dir() or {file.name for file in path.glob("[!.]*")} - begun]
    if made and not file.exists():
        raise UserError(f"OUT holds {made[0].name}, which no run made", f"at {out}", "give another --out")
    with reading("OUT cannot be used", f"at {out}", "give another --out"):
        out.mkdir(parents=True, exist_ok=True)
        str(out).encode()  # Arrow files can have no other names
        lock(out / ".lock")
        for partial in out.glob(".*.*[0-9].partial"):  # of a killed run's `atomic_path`
            partial.unlink()
    with reading("args.json is not of a run of this project", f"in {out}", "give another --out"):
        there = read_json(file) if made else record
        record |= {"accepted": list(there["accepted"]), "key": there["key"]}
        for key in ("settings", "inputs", "code"):
            if record[key] != there[key]:
                accept = args.get("accept_changes", False)
                record["accepted"].append(refuse_differences(out, record[key], dict(there[key]), accept))
    if not made or record["accepted"] != there["accepted"]:
        write_json(file, record, indent=1)
    return out


def refuse_differences(folder, ours, theirs, accept):
    """Raises UserError that names the entries of two dicts that differ, or with `accept` prints them. Returns them.

    accept: None where what differs can never be accepted.
    """
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    changes = "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} now" for key in different)
    if different and not accept:
        what = f"what is there was made otherwise ({changes})"
        todo = "give another folder" + ("" if accept is None else ", or --accept-changes to keep what is there")
        raise UserError(what, f"in {folder}", todo)
    if different:
        print(printable(f"accepted in {folder}: {changes}"))
    return changes


LOCKS = {}  # file descriptors: a lock lasts until its process ends, however it ends


def lock(path):
    """Raises UserError if another process holds the lock `path`. Where the file system has no locks, there is none."""
    if path in LOCKS:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError("another run is at work", f"in {path.parent}", "wait for it or give another folder")
    LOCKS[path] = descriptor


def fingerprint(path):
    """16 hex digits of the content of a file or model folder. Of a model on the hub: its commit, None before it is here.

    Of weights: name, size, and 65 blocks of 64 KiB spread over the file, since training changes every weight.
    """
    path, content = Path(path), hashlib.sha256()
    if not path.exists():
        with contextlib.suppress(ValueError):  # a path may be no hub id
            cached = huggingface_hub.try_to_load_from_cache(str(path), "config.json")
            return Path(cached).parent.name if isinstance(cached, str) else None
        return None
    endings = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
    for file in [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in endings and f.is_file()):
        size = file.stat().st_size
        content.update(f"{file.name!r} {size} ".encode())
        with open(file, "rb") as stream:
            if file.suffix != ".safetensors":
                content.update(hashlib.file_digest(stream, "sha256").digest())
                continue
            for k in range(65):
                stream.seek(k * max(1 << 16, (size - (1 << 16)) // 64))
                content.update(stream.read(1 << 16))
    return content.hexdigest()[:16]


def code_fingerprints():
    """{file: 16 hex digits} of the scripts and lib/."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")])
    return {str(file.relative_to(ROOT)): hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files}


def git_commit():
    """The commit of this checkout, with "-dirty" where a file of it has been changed since; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    with contextlib.suppress(OSError):  # there is no git
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def shards_to_do(folder, count, suffix, world):
    """This rank's part of the shards folder/NNNNN.suffix, k < count, that are not there: a list of (k, is it ours).

    All ranks get equally long lists, since a sharded model's forwards need every rank: one that has no shard left in the
    last turn takes part in another one's, which is not its own and which it must not write.
    """

    def look():
        folder.mkdir(parents=True, exist_ok=True)
        there = {file.name for file in folder.iterdir()}
        missing = [k for k in range(count) if f"{k:05d}.{suffix}" not in there]
        if len(missing) < count:
            print(f"{folder.name}: {count - len(missing)} of {count} batches were there already")
        return missing

    missing = world.first(look)
    numbers = range(world.rank, world.rank + len(missing), world.size)
    return [(missing[min(number, len(missing) - 1)], number < len(missing)) for number in numbers]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path):
    """A path to write to, which becomes `path` when the block ends: a reader or a killed run sees all or nothing."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path, content):
    """Writes text to `path`, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode())


def write_json(path, value, indent=None):
    """Writes one JSON value, atomically."""
    write_atomic(path, json.dumps(value, indent=indent) + "\n")


def write_jsonl(path, rows, key=None):
    """Writes one JSON object a line, atomically; with a key, each has the seal that `read_jsonl` asks for."""
    if key is not None:
        rows = (row | {"seal": seal(row, f"{key} {number}")} for number, row in enumerate(rows, 1))
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def seal(row, key):
    """16 hex digits of a JSON object and of what made it, `key`."""
    return hashlib.sha256(f"{key} {json.dumps(row)}".encode()).hexdigest()[:16]


def unique_keys(pairs):
    """A JSON object's pairs as a dict."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("an object has a key twice")
    return value


def parse_json(line):
    """The value of some JSON. Raises ValueError for what is no JSON or not UTF-8, for a lone surrogate, a key given twice."""
    text = line.decode("utf-8-sig")
    value = json.loads(text, object_pairs_hook=unique_keys)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()  # no tokenizer takes a lone surrogate
    return value


def read_json(path):
    """The JSON value in `path`."""
    return json.loads(Path(path).read_bytes())


def iterate_jsonl(path, blank_lines=False):
    """(line number, JSON value) of the lines of `path`. Raises UserError that names the first bad one."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if blank_lines and not line.strip():
                continue
            with reading("not JSON", f"in {path} line {number}", "repair or delete the line"):
                value = parse_json(line)
            yield number, value


def read_jsonl(path, key=None, count=None):
    """A list of the JSON values in `path`, one a line. Raises UserError that names the first bad line.

    With a key, a line that was changed, moved or made under another key is a bad one; with a count, so is a missing one.
    """
    rows, todo = [], "delete the file: it is then made again"
    for number, row in iterate_jsonl(path):
        if key is not None and not (isinstance(row, dict) and row.pop("seal", "") == seal(row, f"{key} {number}")):
            what = "the line was changed, or is of another run, model or data"
            raise UserError(what, f"in {path} line {number}", todo)
        rows.append(row)
    if count not in (None, len(rows)):
        raise UserError(f"{len(rows)} lines instead of {count}", f"in {path}", todo)
    return rows


def append_jsonl(path, row):
    """Adds one JSON object as a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
