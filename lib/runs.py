"""Plumbing that every script shares: errors, processes, flags, files.

Nothing in this file comes from a paper. What a paper says is in the file that bears its name.
"""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
GO_ON = "the same command goes on from what is done"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------------------
# Errors: one line, exit status 2, from one process
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: what is wrong, where, what to do. Printed as one line, without a traceback."""

    def __init__(self, what, where, what_to_do):
        text = f"{what}, {where}, {what_to_do}"  # it may quote a file: no line ends, no terminal's control characters
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's error line, and help that shows each default once."""

    def __init__(self, doc):
        super().__init__(
            description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        raise UserError(message.replace("\n", " "), "on the command line", f"see {self.prog} --help")


class Stopped(Exception):
    """SIGTERM or Ctrl-C has come; what is done so far is on the disk, and the same command goes on from there."""


@dataclass
class Status:
    """What this process is doing, for its last words, and whether it has been told to stop."""

    stage: str = "start-up"
    signal: int = 0  # SIGTERM or SIGINT, once one has come
    signalled: float = 0.0  # when: time.monotonic()
    finishes_step: bool = (
        False  # true in a training loop: a first signal then waits for `World.stops`, a second does not
    )
    leaving: bool = False

    def enter(self, stage, finishes_step=False):
        """Names what comes now. Raises Stopped if a signal came behind the last look at it."""
        if self.signal and not self.leaving:
            raise Stopped(f"stopped by {signal.Signals(self.signal).name}")
        self.stage, self.finishes_step = stage, finishes_step

    def on_signal(self, number, frame):
        """The handler of SIGTERM and SIGINT. Within a second it is the same one: of the scheduler, and of torchrun."""
        first, before = not self.signal, self.signalled
        self.signal, self.signalled = number, time.monotonic()
        if not first and self.signalled - before < 1:
            return
        if not self.leaving and not (first and self.finishes_step):
            raise Stopped(f"stopped by {signal.Signals(number).name}")


STATUS = Status()


def run(main):
    """Call `main`; turn what ends it into one line on stderr, from one process of the job, and an exit status.

    2: a UserError. 1: another rank is gone, or the disk refuses. 128 + signal: told to stop. Anything else is a defect
    of ours and keeps its traceback. os._exit, not sys.exit: a rank must not wait in a destructor for ranks that are gone.
    """
    signal.signal(signal.SIGTERM, STATUS.on_signal)
    signal.signal(signal.SIGINT, STATUS.on_signal)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with_torchrun, daemon=True).start()
    try:
        main()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        # Not by the interpreter's shutdown, in which gloo's threads abort about 1 finished job in 40 (pytorch#179291)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    # In each case first: no signal interrupts the last words. torchrun's SIGTERM comes just when a lost rank is noticed
    except UserError as error:
        STATUS.leaving = True
        line, status = f"error: {error}", 2
    except BrokenPipeError:  # `| head` has read enough
        os._exit(128 + signal.SIGPIPE)
    except Stopped as error:
        STATUS.leaving = True
        line, status = f"error: {error}, in stage {STATUS.stage}, {GO_ON}", 128 + (STATUS.signal or signal.SIGTERM)
    except (Exception, CheckpointException) as error:  # torch's is a BaseException
        STATUS.leaving = True
        if (what := cause_outside(error)) is None:
            raise
        line, status = f"error: {what}, in stage {STATUS.stage}, {GO_ON}", 1
    leave(line, status)


def end_with_torchrun():
    """Ends this rank when torchrun is gone: one that was killed leaves its ranks at work, and nobody to end them."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    leave(f"error: torchrun is gone, in stage {STATUS.stage}, {GO_ON}", 1)


def cause_outside(error):
    """What the machine, not this program, has done: one line for a lost rank, full memory, a disk that refuses; else None."""
    if isinstance(error, CheckpointException):  # wraps what the ranks met
        return cause_outside(next(iter(error.failures.values()))[0]) if error.failures else None
    text = one_line(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return (
            f"the disk refuses ({error.strerror or text}) at {error.filename or 'OUT'}: make room or give another --out"
        )
    if isinstance(error, SafetensorError) and "os error" in text:
        return f"the disk refuses ({text}): make room or give another --out"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        less = "less --micro-batch-size or --activation-checkpointing in training, less --prompts-per-batch before it"
        return f"out of memory ({text[:160]}): {less}"
    if isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "onnection reset")):
        return f"another rank is gone ({text[:160]})"
    return None


def leave(line, status):
    """Ends this process with `line` on stderr, unless another rank of this machine has said its own.

    Most errors are met by all ranks: the others give rank 0 five seconds to speak, or half a second once torchrun ends
    them. What is in torchrun's error file it prints at the very end of its own report.
    """
    STATUS.leaving = True
    rank, file = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_ERROR_FILE")
    # .../attempt_0/RANK/error.json
    spoken = lambda: bool(file) and any(Path(file).parent.parent.glob("*/error.json"))
    for tenths in range(50 * (rank > 0)):
        if spoken() or (STATUS.signal and tenths >= 5):
            break
        time.sleep(0.1)
    if not spoken():
        line += f" (rank {rank})" if rank > 0 else ""
        tqdm.write(line, file=sys.stderr)  # not behind a progress bar
        sys.stderr.flush()
        if file:
            write_json(file, {"message": line, "timestamp": int(time.time())})
    os._exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """This process among its peers. `size` processes, numbered by `rank`; `device` is where this one computes."""

    rank: int
    size: int
    device: torch.device

    def barrier(self):
        dist.barrier()

    def stops(self, boundary=True):
        """At the end of an optimizer step: whether any rank has been told to stop; `boundary`: if it may stop here."""
        return boundary and self.any(STATUS.signal)

    def any(self, flag):
        """True on every rank if `flag` is true on at least one."""
        return self.sum([float(bool(flag))])[0] > 0

    def sum(self, values):
        """Sums a list of floats over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()


def start_processes(device, threads):
    """Joins the other processes of a torchrun job, or makes a group of one without torchrun. Returns a `World`.

    device: "auto" (cuda if there is one), "cpu" or "cuda". threads: CPU threads of this process, 0: torch's choice.
    """
    check_range("--threads", threads, threads >= 0, "of 0 or more")
    if threads:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU can be used", "--device cuda", "use --device cpu or install a CUDA build of torch")
    if device == "cuda":
        local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"there is no GPU number {local_rank}", f"on a machine of {count}", "start fewer processes")
        torch.cuda.set_device(local_rank)
        device = f"cuda:{torch.cuda.current_device()}"
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    # Rank 0 alone builds the toy and merges files, the others wait: an hour is a bound for a dead peer, not a guess.
    kwargs = {"backend": backend, "timeout": timedelta(hours=1)}
    if "RANK" not in os.environ:
        kwargs.update(store=dist.HashStore(), rank=0, world_size=1)
    elif "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's store is there before its ranks are, or torchrun is gone
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=15))
    if not dist.is_initialized():
        dist.init_process_group(**kwargs)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return World(dist.get_rank(), dist.get_world_size(), torch.device(device))


# ---------------------------------------------------------------------------------------------------------------------
# Flags of every script
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser):
    """Flags of every script."""
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="decides every random number of the run")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    group.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the arithmetic; auto: bfloat16 on cuda, float32 on cpu; trained weights are float32 in any case",
    )
    group.add_argument("--threads", type=int, default=0, help="CPU threads of each process; 0: torch's choice")
    group.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with a model")


def check_range(flag, value, good, range_text):
    """Raises UserError unless `good`."""
    if not good:
        raise UserError(f"{flag} is {value}", "on the command line", f"give a value {range_text}")


def check_ranges(args, rules):
    """Raises UserError for the first flag out of its range. rules: {text of the range: (is a value good, names)}."""
    for text, (good, names) in rules.items():
        for name in names:
            value = getattr(args, name)
            check_range(f"--{name.replace('_', '-')}", value, good(value), text)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def one_line(error):
    """The first line of an exception's text, for an error message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write to, which becomes `path` when the block ends: a reader or a killed run sees all or nothing."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path, content):
    """Writes `content`, text or bytes, to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_jsonl(path, rows):
    """Writes one JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def iterate_jsonl(path, blank_lines=False):
    """(line number, JSON value) of the lines of `path`. Raises UserError that names the first bad one."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if blank_lines and not line.strip():
                continue
            try:
                value = json.loads(line)
                if b"\\u" in line:
                    json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate is no text: no tokenizer takes it
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets without end
                raise UserError(f"not JSON ({one_line(error)})", f"in {path} line {number}", "mend or delete the line")
            yield number, value


def read_jsonl(path):
    """A list of the JSON values in `path`, one a line. Raises UserError that names the first bad line."""
    return [value for _, value in iterate_jsonl(path)]


def write_json(path, value):
    """Writes one JSON value, atomically."""
    write_atomic(path, json.dumps(value) + "\n")


def read_json(path):
    """The JSON value in `path`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_jsonl(path, row):
    """Adds one JSON object as a line, whole or not at all."""
    line = f"{json.dumps(row)}\n".encode()
    with open(path, "ab", buffering=0) as file:
        written = file.write(line)
        if written < len(line):  # the disk is full
            file.truncate(file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
