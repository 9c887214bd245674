"""Kills a run at random moments, starts the same command again each time, and compares its end with an unbroken run's.

    python tests/kills.py --kills 24 --seed 0 --processes 2

The job is the whole method on tiny models: warmup_distill.py (pairs, DPO, closing table), then kd.py on its student, each
under torchrun. The seed decides the moments, spread over all stages, and who is killed: a rank, all ranks, torchrun, or
everything at once. One line a kill; the result goes to runs/kills.json. Exit status 1 if anything differs from the
unbroken run, a process is left over after 60 s, or a survivor does not say in which stage it was.
"""

import argparse
import collections
import itertools
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import make_model

import common
import run_folder
import toy

CLOCKS = ("seconds", "tokens_per_second", "peak_memory_gb")  # what metrics.jsonl has of the clock and the machine
DEADLINE = 60  # seconds for the survivors of a kill
VICTIMS = ("rank 0", "rank 1", "rank 0", "rank 1", "torchrun", "all ranks", "everything")
SHARED = "--template none --lr 1e-3 --batch-size 8 --micro-batch-size 2 --save-every 3 --threads 1 --device cpu"
WARMUP = f"{SHARED} --samples 6 --max-new-tokens 24 --prompts-per-batch 2 --limit 64 --eta 1.5 --max-steps 36 --eval-limit 16"
KD = f"{SHARED} --mode teacher --max-new-tokens 24 --prompts-per-batch 2 --limit 48 --max-steps 24 --eval-limit 0"


# ---------------------------------------------------------------------------------------------------------------------
# The job
# ---------------------------------------------------------------------------------------------------------------------


def make_inputs(root, prompts=64):
    """Folders of a random student and teacher, and a file of prompts; returns {"student", "teacher", "data": path}."""
    paths = {name: str(root / name) for name in ("student", "teacher", "data.jsonl")}
    make_model("llama", 1, tie_word_embeddings=True).save_pretrained(paths["student"])
    make_model("qwen2", 2, width=24, rows=32).save_pretrained(paths["teacher"])
    for name in ("student", "teacher"):
        toy.make_tokenizer().save_pretrained(paths[name])
    problems = toy.draw_splits(0, toy.Settings(train=prompts))["train"]
    common.write_jsonl(paths["data.jsonl"], [toy.to_example(problem, toy.correct_facts()) for problem in problems])
    return {"student": paths["student"], "teacher": paths["teacher"], "data": paths["data.jsonl"]}


def commands(inputs, out):
    """[(script, its arguments, its OUT)] of the whole job."""
    models = ["--teacher", inputs["teacher"], "--data", inputs["data"]]
    warm, kd = out / "warmup", out / "kd"
    return [
        ("warmup_distill.py", [*models, "--student", inputs["student"], *WARMUP.split(), "--out", str(warm)], warm),
        ("kd.py", [*models, "--student", str(warm / "student"), *KD.split(), "--out", str(kd)], kd),
    ]


class Start:
    """One start of a command; all its processes, torchrun's too, are known by a word in their environment."""

    def __init__(self, processes, script, args, log):
        self.token, self.log = uuid.uuid4().hex, Path(log)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes else []), str(ROOT / script), *map(str, args)]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KILLS_TOKEN": self.token}
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}
            )

    def pids(self):
        """{pid: rank, or None of torchrun and other helpers} of all processes that are still there."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else []
            except OSError:  # it has just ended, or is not ours
                continue
            if f"KILLS_TOKEN={self.token}".encode() in variables:
                ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
                found[int(folder.name)] = ranks[0] if ranks else None
        return found

    def kill(self, victim, pids=None):
        """SIGKILL to one of VICTIMS; pids: as `pids` has found them before, where there is no time to look again."""
        pids = pids or self.pids()
        if victim == "torchrun":
            chosen = [self.process.pid]
        elif victim == "everything":
            chosen = sorted(pids)
        else:
            chosen = [p for p, rank in pids.items() if rank is not None and victim in ("all ranks", f"rank {rank}")]
        for pid in chosen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def wait_for_all(self, deadline=DEADLINE):
        """Seconds until no process of this start is left. Raises TimeoutError, after ending them, if some stay."""
        began = time.monotonic()
        while self.process.poll() is None or self.pids():
            if time.monotonic() - began > deadline:
                left = self.pids()
                self.kill("everything")
                raise TimeoutError(f"processes {left} are left after {deadline} s")
            time.sleep(0.1)
        return time.monotonic() - began

    def errors(self):
        """The error lines of ours in what it has printed."""
        lines = re.split(r"[\r\n]+", self.log.read_text(errors="replace"))
        return [line for line in lines if line.startswith("error: ")]


# ---------------------------------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------------------------------


def count_lines(file):
    """Whole lines of a file, 0 without it."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def at_work(out):
    """Whether a run has claimed OUT: before that it is starting up, and what lies there is of the start before it."""
    lock = out / ".lock"
    return lock.exists() and f":{lock.stat().st_ino} " in Path("/proc/locks").read_text()


# What lies in OUT -> the stage that a run is in; the first that is there tells
TRACES = {
    ".pairs.jsonl.*.partial": "merge",  # each start merges again
    "student": "closing table",
    ".student.partial": "saving the model",
    "checkpoint/.step-*.partial": "checkpoint",
    "metrics.jsonl": "training",
    "responses": "responses",
    "reference.json": "training",
    "mismatch.json": "reference",
    "pairs.jsonl": "merge",
}


def stage_of(out):
    """The stage that a run is in, as its files tell."""
    there = lambda pattern: any(out.glob(pattern))
    if not at_work(out):
        return "start-up"
    return next((stage for pattern, stage in TRACES.items() if there(pattern)), "pairs")


@dataclass
class Moment:
    """When to kill whom: `seconds` after `reached(OUT, count)` has become true."""

    command: int  # 0: warmup_distill.py, 1: kd.py
    stage: str
    count: int
    seconds: float
    victim: str

    def reached(self, out):
        if not at_work(out):
            return self.stage == "start-up"
        if self.stage in ("pairs", "responses"):
            return len(list(out.glob(f"{self.stage}/*.jsonl"))) >= self.count
        if self.stage == "training":
            return count_lines(out / "metrics.jsonl") >= self.count
        if self.stage == "checkpoint":
            return any(int(p.name[6:12]) >= self.count for p in out.glob("checkpoint/.step-*.partial"))
        return stage_of(out) == self.stage


# (command, stage, greatest count, longest wait behind it in seconds, which may fall into the next stage), in the order
# in which they are chosen; each is chosen again and again, until there are enough kills
STAGES = [
    (0, "checkpoint", 33, 0.02),
    (0, "pairs", 30, 0.2),
    (1, "training", 22, 0.1),
    (0, "training", 34, 0.1),
    (1, "checkpoint", 21, 0.02),
    (1, "responses", 22, 0.1),
    (0, "merge", 0, 0.02),
    (0, "reference", 0, 0.4),
    (0, "saving the model", 0, 0.0),
    (0, "closing table", 0, 0.2),
    (1, "saving the model", 0, 0.0),
    (1, "start-up", 0, 4.0),
]
ORDER = ("start-up", "pairs", "merge", "responses", "reference", "training", "saving the model", "closing table")


def plan(kills, processes, seed):
    """`kills` moments in the order in which the job comes by, decided by `seed`."""
    rng, moments = random.Random(seed), []
    for command, stage, most, longest in itertools.islice(itertools.cycle(STAGES), kills):
        victims = VICTIMS if processes > 1 else [v for v in VICTIMS if v != "rank 1"]
        moments.append(
            Moment(command, stage, rng.randint(1, max(1, most)), rng.uniform(0, longest), rng.choice(victims))
        )
    place = lambda m: (m.command, ORDER.index("training" if m.stage == "checkpoint" else m.stage), m.count)
    return sorted(moments, key=place)


# ---------------------------------------------------------------------------------------------------------------------
# The unbroken run, the broken one, their comparison
# ---------------------------------------------------------------------------------------------------------------------


def run_unbroken(processes, job, log):
    """Runs all commands to their end."""
    for script, args, _ in job:
        start = Start(processes, script, args, log)
        start.wait_for_all(600)
        assert start.process.returncode == 0, start.log.read_text()[-5000:]


def strike(start, waiting, out):
    """Waits for the first moment of a list that comes, takes it and those it has missed off the list, and kills.

    Returns what was seen, or None if the command was at its end before.
    """
    working, pids = False, None
    while start.process.poll() is None:
        if not working and at_work(out):
            time.sleep(0.05)  # longer than a run takes to remove what another left half-written
            working, pids = True, start.pids()
        for number, moment in enumerate(waiting):
            if moment.reached(out) and (working or moment.stage == "start-up"):
                del waiting[: number + 1]
                time.sleep(moment.seconds)
                if start.process.poll() is not None:
                    return None
                seen = {"aimed at": moment.stage, "stage": stage_of(out), "killed": moment.victim}
                start.kill(moment.victim, pids)
                return seen | {"ended after": start.wait_for_all()}
        time.sleep(0.001)
    return None


def run_broken(processes, job, moments, log):
    """Starts each command until it ends by itself; every start before that is killed. Returns one dict a kill."""
    seen = []
    for number, (script, args, out) in enumerate(job):
        waiting = [m for m in moments if m.command == number]
        while True:
            start = Start(processes, script, args, log)
            kill = strike(start, waiting, out)
            if kill is None:
                assert start.process.wait(600) == 0, start.log.read_text()[-5000:]
                break
            kill.update(command=script, last_words=[line for line in start.errors() if "in stage" in line])
            kill["at its end"] = "seconds after start-up" in start.log.read_text(errors="replace")
            seen.append(kill)
            if silent(kill):
                print(start.log.read_text(errors="replace")[-5000:], file=sys.stderr, flush=True)
            print(
                f"{len(seen):3d} {script:17s} {kill['stage']:17s} {kill['killed']:10s} killed, the others gone"
                f" {kill['ended after']:4.1f} s later: {'; '.join(kill['last_words'])[:150] or '-'}",
                flush=True,
            )
    return seen


def results(job):
    """{name: content} of all that must not depend on kills: files by their bytes, metrics without clocks."""
    found = {}
    for _, _, out in job:
        for pattern in ("pairs.jsonl", "mismatch.json", "reference.json", "summary.json", "pairs/*", "responses/*"):
            found.update({f"{out.name}/{f.relative_to(out)}": f.read_bytes() for f in out.glob(pattern)})
        found[f"{out.name}/weights"] = (out / "student" / "model.safetensors").read_bytes()
        rows = common.read_jsonl(out / "metrics.jsonl")
        found[f"{out.name}/metrics"] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    return found


def differences(broken, whole):
    """Names of the results that are not equal."""
    return sorted(name for name in broken.keys() | whole.keys() if broken.get(name) != whole.get(name))


def silent(kill):
    """Whether somebody was left to say in which stage it was, and did not. (While Python starts, nobody can.)"""
    survivors = kill["killed"] in ("rank 0", "rank 1", "torchrun")
    return survivors and kill["stage"] != "start-up" and not kill["last_words"] and not kill["at its end"]


def machine():
    """A line about the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{os.cpu_count()} cores of {name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--result", default=str(ROOT / "runs" / "kills.json"))
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = make_inputs(root)
        # The student of kd.py is named by its path, which is an argument: both runs lie at the same path, one after another
        job = commands(inputs, root / "run")
        run_unbroken(args.processes, job, root / "log")
        whole, unbroken = results(job), time.monotonic() - began
        (root / "run").rename(root / "unbroken")
        print(f"the unbroken run took {unbroken:.0f} s", flush=True)
        kills = run_broken(args.processes, job, plan(args.kills, args.processes, args.seed), root / "log")
        different = differences(results(job), whole)
    result = {
        "command": f"python tests/kills.py --kills {args.kills} --seed {args.seed} --processes {args.processes}",
        "kills": len(kills),
        "by_stage": collections.Counter(f"{kill['command']}: {kill['stage']}" for kill in kills),
        "by_victim": collections.Counter(kill["killed"] for kill in kills),
        "results_compared": len(whole),
        "different": different,
        "silent": sum(map(silent, kills)),
        "slowest_end_seconds": round(max(kill["ended after"] for kill in kills), 1),
        "seconds": round(time.monotonic() - began),
        "machine": machine(),
        "commit": run_folder.git_commit(),
    }
    Path(args.result).write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(kills)} kills, {len(whole)} results compared, different: {different or 'none'}; {result['seconds']} s")
    sys.exit(bool(different or result["silent"]))


if __name__ == "__main__":
    main()
