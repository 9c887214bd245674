"""What the experiments share: commands of the project in one process, resumption, costs, statistics, result files.

A run is a call of a script's own `main(argv)` in a folder `NAME/`, ended by `NAME/result.json`; a run whose result is
there, of the same settings and code, is not run again; the code is the scripts, lib/ and toy/make.py. Nothing runs from
files that no commit has, and a result file names the commit that gathered it, whose code made the runs. What a script
prints goes to `NAME.log`. torch is imported once instead of once a run: that is the only reason for one process.

Costs are counted in token positions that a model computes: prompts and responses in sampling and checking, padded rows
in the training loops (their `tokens` in metrics.jsonl). A position counts the same for student and teacher, forward and
backward.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import statistics
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
import transformers
from tqdm import tqdm

import warmup_distill
from lib import data, measure, models, runs
from tools.report import describe
from toy import make

FOLDER = ROOT / "experiments"
DEV_SEEDS = (1, 2, 3, 4, 5)  # all choices are made here, on the dev set
REPORT_SEEDS = (21, 22, 23, 24, 25, 26, 27, 28, 29, 30)  # used once, on the test set; the first edition had others
# What dpo.py needs for the toy, the same as warmup_distill.py's settings there
DPO = {"beta": 0.5, "lr": 5e-4, "nll_weight": 1.0, "max_steps": 60}
DPO_SIZE = {"batch_size": 32, "micro_batch_size": 32, "dtype": "float32", "threads": 1}

# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


def paired(after, before):
    """Mean of the differences after[i] - before[i] and half of its 95% interval, Student's t, infinite for one; same order."""
    mean, _, half = describe([a - b for a, b in zip(after, before, strict=True)])
    return mean, float("inf") if half is None else half


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def flags(settings):
    """{"max_steps": 60} -> ["--max-steps=60"]; `=` so that a negative value is no flag. True is a flag without value."""
    names = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    return [name if value is True else f"{name}={value}" for name, value in names.items()]


@functools.cache
def world():
    """This process, one thread: a second one makes models of the toy's size slower."""
    return runs.start_processes("cpu", 1)


def commit():
    """This checkout's commit; ends the script where a file differs from it. Scripts call it first."""
    found = runs.git_commit() or "-dirty"
    if found.endswith("-dirty"):
        sys.exit(f"error: files differ from their commit, in {ROOT}, commit them first: results name what made them")
    return found


@functools.cache
def code():
    """One fingerprint of all that runs: the scripts, lib/ and toy/make.py."""
    return hashlib.sha256(json.dumps([runs.code_fingerprints(), runs.fingerprint(make.__file__)]).encode()).hexdigest()


def call(script, settings, folder):
    """`python SCRIPT.py FLAGS --out FOLDER` in this process. What it prints goes to FOLDER.log."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        importlib.import_module(script).main(flags({**settings, "out": folder}))
    Path(f"{folder}.log").write_text(printed.getvalue())


def resumable(folder, work, settings, keep=()):
    """work() -> dict, kept as FOLDER/result.json with settings and code. A run that is there, of these, is not run again.

    All else in the folder except `keep` is deleted afterwards; a folder without a result is what a killed run left.
    """
    folder = Path(folder)
    file = folder / "result.json"
    settings = [flag.replace(f"{ROOT}/", "") for flag in flags(settings)]
    made_of = {"settings": settings, "code": code()}
    if file.exists() and made_of.items() <= (result := runs.read_json(file)).items():
        return result
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    result = work() | made_of
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    runs.write_json(file, result)
    return result


def origin(folder):
    """The settings of the run in a folder, for the settings of what goes on from there; nothing if no run made it."""
    file = Path(folder) / "result.json"
    return {"origin": runs.read_json(file)["settings"] if file.exists() else None}


def accuracy(model, file):
    """Greedy accuracy of the model folder on a JSONL file of the toy's problems."""
    tokenizer, tokens = models.shared_tokenizer(model, model)
    lm, prompts = models.load_model(model, torch.float32, "cpu"), []
    for prompt_id, row in enumerate(runs.read_jsonl(file)):
        ids = tokenizer(f"<bos>{row['prompt']}").input_ids
        prompts.append({"prompt_id": prompt_id, "ids": ids, "gold": row["response"]})
    with contextlib.redirect_stderr(io.StringIO()):
        return measure.greedy_accuracy(lm, prompts, tokens, tokenizer, 48, 250, world())


def run_all(jobs, title):
    """jobs: list of (name, function -> result). Returns {name: result}, with a bar."""
    return {name: job() for name, job in tqdm(jobs, desc=title, unit="run", ncols=100)}


# ---------------------------------------------------------------------------------------------------------------------
# The toy's runs
# ---------------------------------------------------------------------------------------------------------------------


def other_student(toy, folder, seed, misconceived=0.0, operands=make.OPERANDS, **recipe):
    """The toy in `folder` with another student: same teacher, same problems. settings.json is written last, as ever.

    misconceived: its share of wrong facts. operands: of the problems that it is trained on. recipe: what differs of
    toy/make.py's `Recipe` for the student, its steps say.
    """
    shutil.copytree(toy, folder, ignore=shutil.ignore_patterns("student", "settings.json"))
    settings = make.Settings(misconceived=misconceived, student=dataclasses.replace(make.Settings.student, **recipe))
    facts = make.misconceived_facts(random.Random(f"{seed}/misconceptions"), misconceived)
    rows = runs.read_jsonl(folder / "dev.jsonl") + runs.read_jsonl(folder / "test.jsonl")
    pairs = [[int(number) for number in row["prompt"].rstrip(":").split("+")] for row in rows]
    place = {number: k for k, number in enumerate(operands)}
    held_out = {place[a] * len(operands) + place[b] for a, b in pairs if a in place and b in place}
    with mock.patch.object(make, "OPERANDS", operands):
        make.build_model(folder / "student", settings.student, facts, held_out, seed)
    runs.write_json(folder / "settings.json", {"seed": seed, **dataclasses.asdict(settings), "operands": [*operands]})


class Toy:
    """The toy of one seed in ROOT/SEED/toy, and runs on it in ROOT/SEED/NAME. split: the file that is evaluated on.

    settings: those of toy/make.py's `Settings` that differ; or, of a toy that has `base`'s teacher, of `other_student`.
    """

    def __init__(self, root, seed, split, base=None, **settings):
        self.seed, self.folder = seed, Path(root) / str(seed)
        world()  # one thread, and no progress bars of transformers
        self.toy = self.folder / "toy"
        if not (self.toy / "settings.json").exists():
            shutil.rmtree(self.toy, ignore_errors=True)
            if base:
                other_student(base.toy, self.toy, seed, **settings)
            else:
                make.build(self.toy, seed, make.Settings(**settings))
        self.paths = make.paths_in(self.toy)
        self.split = self.paths[split]
        self.common = {"toy": self.toy, "seed": seed, "eval_limit": 0}

    def initial(self):
        """The student as it is."""
        work = lambda: {"accuracy": accuracy(self.paths["student"], self.split)}
        return resumable(self.folder / "initial", work, {"student": self.paths["student"]})

    def warmup(self, name, position=None, **settings):
        """Steps 1 to 4. position: replaces t* of the samples that have one, for a control (`moved_mismatch`).

        Keeps the student and the pairs. Counts tokens: of the student, of the teacher.
        """
        folder, settings = self.folder / name, {**self.common, **settings}

        def work():
            with moved_mismatch(position, self.seed):
                call("warmup_distill", settings, folder)
            records = read_samples(folder)
            pairs = runs.read_jsonl(folder / "pairs.jsonl")
            replaced = statistics.fmean(r["t_star"] >= 0 for r in records)
            prompts = sum({r["prompt_id"]: len(r["prompt_ids"]) for r in records}.values())
            sampled = prompts + sum(len(r["response_ids"]) for r in records)
            spliced = sum(len(r["chosen_ids"]) - r["prefix_len"] for r in records)
            result = {"pairs": len(pairs), "replaced": replaced, "dpo_tokens": 0}
            if (folder / "student").exists():  # not with --pairs-only
                result["dpo_tokens"] = dpo_tokens(folder, pairs)
                result["accuracy"] = accuracy(folder / "student", self.split)
            tokens = {"student_tokens": sampled + result["dpo_tokens"], "teacher_tokens": sampled + spliced}
            return result | tokens

        return resumable(folder, work, settings | {"position": position}, keep=("student", "pairs", "pairs.jsonl"))

    def dpo(self, name, pairs_of, **settings):
        """DPO alone on the pairs of the run `pairs_of`, at other settings. Costs are those of the warm-up with it."""
        folder, pairs = self.folder / name, self.folder / pairs_of / "pairs.jsonl"
        settings = {**DPO, **DPO_SIZE, "model": self.paths["student"], "pairs": pairs, "seed": self.seed, **settings}

        def work():
            call("dpo", settings, folder)
            before, rows = runs.read_json(self.folder / pairs_of / "result.json"), runs.read_jsonl(pairs)
            result = {key: before[key] for key in ("pairs", "teacher_tokens")}
            result["margin"] = runs.read_jsonl(folder / "metrics.jsonl")[-1]["margin"]
            result["student_tokens"] = before["student_tokens"] - before["dpo_tokens"] + dpo_tokens(folder, rows)
            return result | {"accuracy": accuracy(folder / "student", self.split)}

        return resumable(folder, work, settings | origin(self.folder / pairs_of), keep=("student",))

    def kd(self, name, student, **settings):
        """Step 5 from the model folder `student`. Keeps no model."""
        folder, settings = self.folder / name, {**self.common, "student": student, **settings}

        def work():
            call("kd", settings, folder)
            steps = runs.read_jsonl(folder / "metrics.jsonl")
            trained = sum(step["tokens"] for step in steps)
            result = {"accuracy": accuracy(folder / "student", self.split), "steps": len(steps)}
            result |= {"student_tokens": trained, "teacher_tokens": trained}
            if settings.get("mode") == "student":  # every row that is trained on was sampled before
                result["student_tokens"] += trained
            elif settings.get("mode") == "teacher":
                examples = data.open_arrow(folder / "examples.arrow")
                result["teacher_tokens"] += sum(len(row["ids"]) + len(row["response"]) for row in examples)
            return result

        return resumable(folder, work, settings | origin(Path(student).parent))


def read_samples(out):
    """All samples that a run of warmup_distill.py has stored, in order."""
    return [record for file in sorted((Path(out) / "pairs").glob("*.jsonl")) for record in runs.read_jsonl(file)]


def dpo_tokens(folder, pairs):
    """Token positions of DPO: its steps, and the reference's pass over all pairs."""
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    of_reference = sum(sum(len(pair[key]) for key in keys) - pair["prefix_len"] for pair in pairs)
    return of_reference + sum(step["tokens"] for step in runs.read_jsonl(folder / "metrics.jsonl"))


def moved_mismatch(position, seed):
    """For controls, a context: where `first_mismatch` finds a t*, another place is used instead.

    position: None (t* stays), "random" (uniform over the response's tokens), "start" (0: the teacher writes all of y+).
    """
    original = warmup_distill.first_mismatch
    generator = torch.Generator().manual_seed(seed)

    def moved(student_logprobs, teacher_logprobs, mask, eta):
        t_star = original(student_logprobs, teacher_logprobs, mask, eta)
        share = torch.rand(len(t_star), generator=generator) if position == "random" else torch.zeros(len(t_star))
        return torch.where(t_star >= 0, (share * mask.sum(-1)).long(), -1)

    return mock.patch.object(warmup_distill, "first_mismatch", moved if position else original)


# ---------------------------------------------------------------------------------------------------------------------
# Result files
# ---------------------------------------------------------------------------------------------------------------------


def record(command):
    """What a result file says of how it came to be."""
    cpu = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    cpu = (names[0] if names else "unknown") + (" with AMX" if "amx_bf16" in cpu else "")
    made = {"command": command, "date": datetime.date.today().isoformat(), "commit": commit()}
    made |= {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__}
    return made | {"transformers": transformers.__version__, "code": code()}


def read_result(name):
    """experiments/NAME.json for what goes on from it; ends the script where other code made it."""
    found = runs.read_json(FOLDER / f"{name}.json")
    if found["record"].get("code") != code():
        sys.exit(f"error: other code made it, in {FOLDER / name}.json, make it again")
    return found


def write_result(name, head, results):
    """experiments/NAME.json: the fields of `head`, and "runs", {name: value}, one to a line, for small diffs."""
    line = lambda item: f"{json.dumps(item[0])}: {json.dumps(item[1])}"
    top, rows = ",\n ".join(map(line, head.items())), ",\n  ".join(map(line, results.items()))
    text = f'{{\n {top},\n "runs": {{\n  {rows}\n }}\n}}\n'
    runs.write_atomic(FOLDER / f"{name}.json", text)
