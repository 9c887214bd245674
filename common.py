"""Plumbing that every script shares: errors, processes, flags, models and tokenizers, files.

Nothing in this file comes from a paper. What a paper says is in the file that bears its name.
"""

import argparse
import functools
import hashlib
import json
import math
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
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)
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
# Models and tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def compute_dtype(name, world):
    """torch dtype of "auto", "float32" or "bfloat16"; auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if world.device.type == "cuda" else "float32"
    return DTYPES[name]


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a model folder or hub id. Without a pad token, eos stands in: padding is always masked."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UserError(f"no tokenizer can be loaded ({one_line(error)})", f"in {path}", "check the path or hub id")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a Qwen2 folder without one
        raise UserError("no tokenizer can be loaded (no vocabulary)", f"in {path}", "check the path or hub id")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token", f"in {path}", "set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path, dtype, device, trust_remote_code=False):
    """A causal language model in `dtype` on `device`, weights from safetensors alone, attention through sdpa."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        check_no_weight_is_missing(info)
    except LOAD_ERRORS as error:
        raise UserError(
            f"no model can be loaded ({one_line(error)})", f"in {path}", "a folder or hub id with safetensors is needed"
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"the model changes its logits after lm_head ({name})", f"in {path}", "use a model without it"
            )
    if getattr(model.config, "sliding_window", None) and "sliding_attention" in getattr(
        model.config, "layer_types", ["sliding_attention"]
    ):
        raise UserError("sliding-window attention is not supported", f"in {path}", "use a model with full attention")
    return model.to(device).eval()


def check_no_weight_is_missing(info):
    """Raises ValueError where transformers would go on with random weights. info: of `from_pretrained`."""
    if info["missing_keys"]:
        raise ValueError(f"no weights for {min(info['missing_keys'])}")


def model_eos_ids(paths, tokenizer, trust_remote_code=False):
    """Sorted ids that end a response: the tokenizer's eos and those of each model's generation config, or of its config."""
    ids = {tokenizer.eos_token_id}
    for path in paths:
        try:
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # no generation_config.json
            try:
                eos = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).eos_token_id
            except LOAD_ERRORS as error:
                raise UserError(f"no model can be loaded ({one_line(error)})", f"in {path}", "check the path or hub id")
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return sorted(ids)


def tokenizer_fingerprint(tokenizer):
    """16 hex digits that two tokenizers share if and only if (but for chance) their vocabularies are equal."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()[:16]


def check_same_tokenizer(student, teacher, student_path, teacher_path):
    """Raises UserError with the first difference unless both tokenizers map the same tokens to the same ids."""
    where, todo = f"in {student_path} and {teacher_path}", "use a teacher and a student of one family"
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = sorted(
        token for token in ours.keys() | theirs.keys() if ours.get(token, None) != theirs.get(token, None)
    )
    if different:
        token = min(different, key=lambda t: min(ours.get(t, math.inf), theirs.get(t, math.inf)))
        what = (
            f"token {token!r} has id {ours.get(token)} in the student's tokenizer, {theirs.get(token)} in the teacher's"
        )
        raise UserError(what, where, todo)
    if student.eos_token_id != teacher.eos_token_id:
        what = f"eos is {student.eos_token!r} for the student and {teacher.eos_token!r} for the teacher"
        raise UserError(what, where, todo)


def check_vocabulary(model, tokenizer, path):
    """Raises UserError unless the model has a row for every token. Rows beyond len(tokenizer) are padding, never used."""
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        what = f"the model has {rows} vocabulary rows for {len(tokenizer)} tokens"
        raise UserError(what, f"in {path}", "resize its embeddings or use its own tokenizer")


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
