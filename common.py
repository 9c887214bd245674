"""Plumbing that every script shares: errors, processes, flags, files.

Nothing in this file comes from a paper. What a paper says is in the file that bears its name.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

OUR_FILES = ("pairs", "pairs.jsonl", "reference.json", "responses", "metrics.jsonl", "checkpoint", "student")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# ---------------------------------------------------------------------------------------------------------------------
# Errors: one line, exit status 2, from one process
# ---------------------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something the user can mend: what is wrong, where, what to do. Printed as one line, without a traceback."""

    def __init__(self, what, where, what_to_do):
        super().__init__(f"{what}, {where}, {what_to_do}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse with this project's error line, and help that shows each default once."""

    def __init__(self, doc):
        super().__init__(
            description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        raise UserError(message.replace("\n", " "), "on the command line", f"see {self.prog} --help")


def run(main):
    """Call `main`; turn a UserError into one line on stderr and exit status 2, from one process of the job.

    An error that all ranks meet is printed by rank 0. The others wait: torchrun ends them as soon as rank 0 has exited.
    If they are still there after 5 seconds, the error is theirs alone and they print it themselves.
    """
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(5)
        line = f"error: {error}" + (f" (rank {rank})" if rank > 0 else "")
        print(line, file=sys.stderr, flush=True)
        os._exit(2)  # not sys.exit: a rank must not wait in a destructor for ranks that are gone
    except KeyboardInterrupt:
        os._exit(130)
    except Exception:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(5)  # a peer that is gone may be the cause: then torchrun ends this rank before it prints
        raise
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


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


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def one_line(error):
    """The first line of an exception's text, for an error message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def write_atomic(path, content):
    """Writes `content`, text or bytes, to `path` so that a reader or a killed run sees the whole file or none."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_jsonl(path, rows):
    """Writes one JSON object a line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path):
    """A list of the JSON objects in `path`, one a line. Raises UserError that names the first bad line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:  # not JSON, or not UTF-8
                raise UserError(f"not JSON ({one_line(error)})", f"in {path} line {number}", "mend or delete the line")
    return rows


def write_json(path, value):
    """Writes one JSON value, atomically."""
    write_atomic(path, json.dumps(value) + "\n")


def read_json(path):
    """The JSON value in `path`."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def append_jsonl(path, row):
    """Adds one JSON object as a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def start_run(out, args):
    """Makes OUT, or takes it up again. OUT/args.json says which arguments made what is in there.

    args: the namespace of `parse_args`; --out may differ, and --device, which changes no more than rounding if --dtype
    is given.
    Raises UserError when OUT holds a run with other arguments, naming those that differ, or is no folder.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError("OUT is not a folder", f"at {out}", "give another --out")
    ours = {key: value for key, value in vars(args).items()}
    file, foreign = out / "args.json", [name for name in OUR_FILES if (out / name).exists()]
    # A run that has made nothing yet, since its student could not be loaded, say, claims nothing
    claimed = file.exists() and any(path.is_file() and path != file for path in out.rglob("*"))
    if file.exists():
        try:
            theirs = dict(read_json(file)["args"])
        except (ValueError, KeyError, TypeError):
            raise UserError("args.json is not of a run of this project", f"in {out}", "give another --out")
        different = [
            f"--{key.replace('_', '-')} {theirs.get(key)} there, {ours.get(key)} now"
            for key in sorted(ours.keys() | theirs.keys())
            if key not in ("out", "device") and ours.get(key) != theirs.get(key)
        ]
        if claimed and different:
            raise UserError(
                f"OUT holds a run with other arguments ({'; '.join(different)})", f"in {out}", "give another --out"
            )
    elif foreign:
        raise UserError(f"OUT has a {foreign[0]} that no run here made", f"in {out}", "give another --out")
    dist.barrier()  # nobody writes before everybody has compared
    if dist.get_rank() == 0 and not claimed:
        try:
            out.mkdir(parents=True, exist_ok=True)
            versions = {"python": sys.version.split()[0], "torch": torch.__version__}
            versions["transformers"] = transformers.__version__
            record = {"args": ours, "versions": versions, "commit": git_commit()}
            write_atomic(file, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"OUT cannot be written ({one_line(error)})", f"at {out}", "give another --out")
    dist.barrier()
    return out


@functools.cache
def git_commit():
    """The commit of the checkout that this file is in, or None."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
