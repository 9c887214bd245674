"""What the experiments in this folder share: product commands called in one process, resumption, costs, statistics.

A run is a call of a script's own `main(argv)` in a folder `NAME/`, ended by `NAME/result.json`; a run whose result is
there is not run again. What a script prints goes to `NAME/log`. Importing torch once instead of once a run is the only
reason for one process: `command` gives the same line for a shell.

Costs are counted in token positions that a model computes: prompts and responses while sampling and checking, padded
rows in the training loops (their `tokens` in metrics.jsonl). Seconds are CPU seconds of the one thread that works; on a
shared machine they still vary, since memory is shared.
"""

import contextlib
import datetime
import functools
import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from tqdm import tqdm

import common
import dpo
import kd
import measure
import models
import run_folder
import toy
import training
import warmup_distill

MAINS = {"warmup_distill": warmup_distill, "dpo": dpo, "kd": kd}
DEV_SEEDS = (1, 2, 3, 4, 5)  # all choices are made here, on the dev set
REPORT_SEEDS = (0, 42, 123, 11, 12, 13, 14, 15, 16, 17)  # used once, on the test set

# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------

# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145]
T_QUANTILES += [2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045]


def mean_sd(values):
    """Mean and standard deviation (n - 1; 0 of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def t_quantile(df):
    """The 97.5% quantile; beyond the table 1.96 + 2.42 / df, right to 0.002."""
    return T_QUANTILES[df - 1] if df <= len(T_QUANTILES) else 1.96 + 2.42 / df


def t_interval(values):
    """Mean and half width of its 95% interval, t s / sqrt(n), infinite for one value: independent and about normal."""
    mean, sd = mean_sd(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, t_quantile(len(values) - 1) * sd / math.sqrt(len(values))


def paired(after, before):
    """`t_interval` of the differences after[i] - before[i]; both are of the same seeds in the same order."""
    return t_interval([a - b for a, b in zip(after, before, strict=True)])


def quantile(counts, share):
    """The smallest key of {number: count} at or below which at least `share` of all counts lie."""
    below, total = 0, sum(counts.values())
    for key in sorted(counts):
        below += counts[key]
        if below >= share * total:
            return key
    raise ValueError("no counts")


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def flags(settings):
    """{"max_steps": 60} -> ["--max-steps=60"]; `=` so that a negative value is no flag."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def command(script, settings):
    """The same run as a line for a shell."""
    return " ".join(["python", f"{script}.py", *flags(settings)])


@functools.cache
def world():
    """This process, one thread: a second one makes models of the toy's size slower."""
    return common.start_processes("cpu", 1)


def call(script, settings, folder):
    """`python SCRIPT.py FLAGS --out FOLDER` in this process. Returns CPU seconds; what it prints goes to FOLDER/log."""
    started, log = time.process_time(), Path(folder) / "log"
    with open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        MAINS[script].main(flags({**settings, "out": folder}))
    return time.process_time() - started


def resumable(folder, work, settings, keep=()):
    """work() -> dict, kept as FOLDER/result.json with its settings. A run that is there, of these, is not run again.

    All else in the folder goes afterwards but for `keep`; a folder without a result is what a killed run left.
    """
    folder = Path(folder)
    file = folder / "result.json"
    settings = [flag.replace(f"{ROOT}/", "") for flag in flags(settings)]
    if file.exists() and (result := common.read_json(file))["settings"] == settings:
        return result
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = work() | {"settings": settings}
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    common.write_json(file, result)
    return result


def origin(folder):
    """The settings of the run in a folder, for the settings of what goes on from there; nothing if no run made it."""
    file = Path(folder) / "result.json"
    return {"origin": common.read_json(file)["settings"] if file.exists() else None}


def accuracy(model, file):
    """Greedy accuracy of the model folder on a JSONL file of the toy's problems."""
    tokenizer, lm = models.load_tokenizer(model, False), models.load_model(model, torch.float32, "cpu", False)
    facts = [json.loads(line) for line in Path(file).read_text().splitlines()]
    prompts = [
        {"ids": tokenizer(f"<bos>{fact['prompt']}").input_ids, "gold": fact["response"], "prompt_id": i}
        for i, fact in enumerate(facts)
    ]
    eos = models.model_eos_ids([model], tokenizer, False)
    with contextlib.redirect_stderr(io.StringIO()):
        return measure.greedy_accuracy(lm, prompts, tokenizer, eos, 48, 250, world())


def run_all(jobs, title):
    """jobs: list of (name, function -> result). Returns {name: result}, with a bar."""
    results = {}
    for name, job in tqdm(jobs, desc=title, unit="run"):
        results[name] = job()
    return results


# ---------------------------------------------------------------------------------------------------------------------
# The toy's runs
# ---------------------------------------------------------------------------------------------------------------------


class Toy:
    """The toy of one seed in ROOT/SEED/toy, and runs on it in ROOT/SEED/NAME. split: the file that is evaluated on."""

    def __init__(self, root, seed, split, settings=None):
        self.seed, self.folder = seed, Path(root) / str(seed)
        world()  # one thread, and no progress bars of transformers
        with contextlib.redirect_stderr(io.StringIO()):
            self.paths = toy.build(self.folder / "toy", seed, settings or toy.Settings())
        self.split = self.paths[split]
        self.common = {"teacher": self.paths["teacher"], "data": self.paths["train"], "seed": seed}

    def initial(self):
        """The student as it is."""
        return resumable(
            self.folder / "student",
            lambda: {"accuracy": accuracy(self.paths["student"], self.split)},
            {"student": self.paths["student"]},
        )

    def warmup(self, name, position=None, **settings):
        """Steps 1 to 4. position: replaces t* of the samples that have one, for a control (`moved_mismatch`).

        Keeps the student and the pairs. Counts tokens: of the student, of the teacher.
        """
        folder = self.folder / name
        settings = {**toy.WARMUP, **self.common, "student": self.paths["student"], **settings, "eval_limit": 0}

        def work():
            page = mock.patch.object(warmup_distill.report, "write_report")  # no part of the method's time
            with moved_mismatch(position, self.seed), page:
                seconds = call("warmup_distill", settings, folder)
            records = [r for file in (folder / "pairs").glob("*.jsonl") for r in common.read_jsonl(file)]
            pairs = common.read_jsonl(folder / "pairs.jsonl")
            prompts = sum({r["prompt_id"]: len(r["prompt_ids"]) for r in records}.values())
            sampled = prompts + sum(len(r["response_ids"]) for r in records)
            spliced = sum(len(r["chosen_ids"]) - r["prefix_len"] for r in records)
            aligned = dpo_tokens(folder, pairs)
            return {
                "accuracy": accuracy(folder / "student", self.split),
                "pairs": len(pairs),
                "seconds": seconds,
                "student_tokens": sampled + aligned,
                "teacher_tokens": sampled + spliced,
                "dpo_tokens": aligned,
            }

        return resumable(folder, work, settings | {"position": position}, keep=("student", "pairs", "pairs.jsonl"))

    def dpo(self, name, pairs_of, **settings):
        """DPO alone on the pairs of the run `pairs_of`, at other settings. Costs are those of the warm-up with it.

        With beta 1e-9 nothing but SFT on the chosen responses is left, and that is what is counted.
        """
        folder, pairs = self.folder / name, self.folder / pairs_of / "pairs.jsonl"
        inherited = {key: value for key, value in toy.WARMUP.items() if key in DPO_FLAGS}
        settings = {**inherited, "model": self.paths["student"], "pairs": pairs, "seed": self.seed, **settings}

        def work():
            seconds = call("dpo", settings, folder)
            steps = common.read_jsonl(folder / "metrics.jsonl")
            before, rows = common.read_json(self.folder / pairs_of / "result.json"), common.read_jsonl(pairs)
            tokens = sft_tokens(rows, settings) if settings.get("beta") == 1e-9 else dpo_tokens(folder, rows)
            return {
                "accuracy": accuracy(folder / "student", self.split),
                "margin": steps[-1]["margin"],
                "chosen_logp_change": steps[-1]["chosen_logp"] - steps[0]["chosen_logp"],
                "pairs": before["pairs"],
                "dpo_seconds": seconds,
                "dpo_tokens": tokens,
                "student_tokens": before["student_tokens"] - before["dpo_tokens"] + tokens,
                "teacher_tokens": before["teacher_tokens"],
            }

        return resumable(folder, work, settings | origin(self.folder / pairs_of), keep=("student",))

    def kd(self, name, student, **settings):
        """Step 5 from the model folder `student`. Keeps no model."""
        folder = self.folder / name
        settings = {**toy.KD, **self.common, "student": student, **settings, "eval_limit": 0}

        def work():
            seconds = call("kd", settings, folder)
            steps = common.read_jsonl(folder / "metrics.jsonl")
            trained = sum(step["tokens"] for step in steps)
            responses = [r for file in (folder / "responses").glob("*.jsonl") for r in common.read_jsonl(file)]
            result = {
                "accuracy": accuracy(folder / "student", self.split),
                "steps": len(steps),
                "seconds": seconds,
                "student_tokens": trained,
                "teacher_tokens": trained,
            }
            if settings.get("mode") == "student":  # every row that is trained on was sampled before
                result["student_tokens"] += trained
            elif settings.get("mode") == "teacher":
                tokenizer = models.load_tokenizer(settings["teacher"], False)
                length = lambda r: len(tokenizer(r["prompt"]).input_ids) + len(r["response_ids"])
                result["teacher_tokens"] += sum(length(r) for r in responses)
            return result

        return resumable(folder, work, settings | origin(Path(student).parent))


# Flags of the toy's warm-up that dpo.py has, too
DPO_FLAGS = ("max_steps", "batch_size", "micro_batch_size", "lr", "dtype", "threads", "beta", "nll_weight")


def dpo_tokens(folder, pairs):
    """Token positions of DPO: its steps, and the reference's pass over all pairs."""
    reference = sum(
        len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) - p["prefix_len"] for p in pairs
    )
    return reference + sum(step["tokens"] for step in common.read_jsonl(folder / "metrics.jsonl"))


def sft_tokens(pairs, settings):
    """Token positions of SFT on the chosen responses, over the same steps as DPO: no reference, no rejected suffix."""
    size, seed, steps = settings["batch_size"], settings["seed"], range(settings["max_steps"])
    batches = (training.batch_of_step(step, len(pairs), size, seed) for step in steps)
    return sum(len(pairs[i]["prompt_ids"]) + len(pairs[i]["chosen_ids"]) for batch in batches for i in batch)


@contextlib.contextmanager
def moved_mismatch(position, seed):
    """For controls: where `first_mismatch` finds a t*, another place takes over. Never in the product.

    position: None (t* stays), "random" (uniform over the response's tokens), "start" (0: the teacher writes all of y+).
    """
    original, calls = warmup_distill.first_mismatch, 0

    def moved(student_logprobs, teacher_logprobs, mask, eta):
        nonlocal calls
        t_star = original(student_logprobs, teacher_logprobs, mask, eta)
        generator = torch.Generator().manual_seed(1000 * seed + calls)
        calls += 1
        share = torch.rand(len(t_star), generator=generator) if position == "random" else torch.zeros(len(t_star))
        return torch.where(t_star >= 0, (share * mask.sum(-1)).long(), -1)

    warmup_distill.first_mismatch = moved if position else original
    try:
        yield
    finally:
        warmup_distill.first_mismatch = original


# ---------------------------------------------------------------------------------------------------------------------
# Result files
# ---------------------------------------------------------------------------------------------------------------------


def commit():
    """The checkout's commit, with a + behind it where code has changed since; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "*.py", "*.sh"]
    changed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return (run_folder.git_commit() or "unknown") + "+" * bool(changed)


def record(script, seconds):
    """What a result file says of how it came to be."""
    model = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":"
    )
    flags_of_cpu = Path("/proc/cpuinfo").read_text()
    return {
        "command": f"bash runs/{script}.sh",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "cpu": model.partition(":")[2].strip() + (" with AMX" if "amx_bf16" in flags_of_cpu else ""),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cpu_seconds": round(seconds),
    }


def write_result(path, head, runs):
    """A result file: the fields of `head`, and "runs", {name: value}, one to a line, for small diffs."""
    lines = lambda fields, indent: ",\n".join(
        f"{indent}{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()
    )
    common.write_atomic(path, f'{{\n{lines(head, " ")},\n "runs": {{\n{lines(runs, "  ")}\n }}\n}}\n')
