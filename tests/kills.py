"""Kills a run at random moments, starts the same command again each time, and compares its end with an unbroken run's.

    python tests/kills.py --kills 24 --seed 0 --processes 2

The job is the whole method on tiny models: warmup_distill.py (pairs, DPO, closing table), then kd.py on its student, each
under torchrun. The seed decides the moments, spread over all stages, and who is killed: a rank, all ranks, torchrun, or
everything at once. One line a kill, then the result as JSON. Exit status 1 if anything differs from the unbroken run, or
a process is left over after 60 s.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
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

from conftest import QUIET, command_of, logged, make_inputs

from lib import runs

DEADLINE = 60  # seconds for the survivors of a kill
RESULTS = "pairs.jsonl mismatch.json summary.json pairs/* responses/* student/model.safetensors students/*/*"
VICTIMS = ("rank 0", "rank 1", "rank 0", "rank 1", "torchrun", "all ranks", "everything")
SHARED = "--template none --lr 1e-3 --batch-size 8 --micro-batch-size 2 --save-every 3 --threads 1 --device cpu"
WARMUP = f"{SHARED} --samples 6 --max-new-tokens 24 --prompts-per-batch 2 --limit 64 --eta 1.5 --max-steps 36 --eval-limit 16"
KD = f"{SHARED} --mode teacher --max-new-tokens 24 --prompts-per-batch 2 --limit 48 --max-steps 24 --eval-limit 0 --save-students 3"
# In the order in which a job passes them: (command, stage, what a run in it has in OUT, greatest count of that, longest
# wait after it in seconds). A file with a count in its name has to have at least this count
STAGES = [
    (0, "pairs", "pairs/*.jsonl", 30, 0.2),
    (0, "merge", ".pairs.jsonl.*.partial", 1, 0.02),
    (0, "reference", "pairs.arrow", 1, 0.4),
    (0, "training", "metrics.jsonl", 34, 0.1),
    (0, "checkpoint", "checkpoint/.step-*.partial", 33, 0.02),
    (0, "saving the model", ".student.partial", 1, 0.0),
    (0, "closing table", "student", 1, 0.2),
    (1, "start-up", "", 0, 4.0),
    (1, "responses", "responses/*.jsonl", 22, 0.1),
    (1, "training", "metrics.jsonl", 22, 0.1),
    (1, "checkpoint", "checkpoint/.step-*.partial", 21, 0.02),
    (1, "saving the model", ".student.partial", 1, 0.0),
]


# ---------------------------------------------------------------------------------------------------------------------
# The job
# ---------------------------------------------------------------------------------------------------------------------


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
        command, environment = command_of(processes, script, args), {**os.environ, **QUIET, "KILLS_TOKEN": self.token}
        with open(self.log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

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

    def kill(self, victim, pids):
        """SIGKILL to one of VICTIMS among `pids`."""
        for pid, rank in pids.items():
            names = {"everything", f"rank {rank}", "torchrun" if pid == self.process.pid else "another helper"}
            names |= set() if rank is None else {"all ranks"}
            if victim in names:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait_for_all(self):
        """Seconds until no process of this start is left. Raises TimeoutError, after ending them, if some stay."""
        began = time.monotonic()
        while self.process.poll() is None or self.pids():
            if time.monotonic() - began > DEADLINE:
                left = self.pids()
                self.kill("everything", left)
                raise TimeoutError(f"processes {left} are left after {DEADLINE} s: {self.end_of_log()}")
            time.sleep(0.1)
        return time.monotonic() - began

    def end_of_log(self):
        return self.log.read_text(errors="replace")[-5000:]


# ---------------------------------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------------------------------


def count_lines(file):
    """Whole lines of a file, 0 without it."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def at_work(out):
    """Whether a run has claimed OUT: before that it is starting up, and what is there is of the start before it."""
    lock = out / ".lock"
    return lock.exists() and f":{lock.stat().st_ino} " in Path("/proc/locks").read_text()


@dataclass
class Moment:
    """When to kill whom: `seconds` after `reached(OUT)` has become true."""

    command: int  # 0: warmup_distill.py, 1: kd.py
    stage: str
    pattern: str
    count: int
    seconds: float
    victim: str

    def reached(self, out):
        """Whether the files in OUT say so; a start-up is the time before OUT is claimed."""
        if not self.pattern or not at_work(out):
            return not self.pattern
        found = list(out.glob(self.pattern))
        if self.stage == "training":
            return count_lines(out / self.pattern) >= self.count
        if self.stage == "checkpoint":
            return any(int(path.name[6:12]) >= self.count for path in found)
        return len(found) >= self.count


def plan(kills, processes, seed):
    """`kills` moments in the order in which the job passes them, decided by `seed`."""
    rng, chosen = random.Random(seed), []
    victims = [victim for victim in VICTIMS if processes > 1 or victim != "rank 1"]
    for number in itertools.islice(itertools.cycle(range(len(STAGES))), kills):
        command, stage, pattern, most, longest = STAGES[number]
        moment = (rng.randint(min(1, most), most), rng.uniform(0, longest), rng.choice(victims))
        chosen.append((command, number + (stage == "training"), Moment(command, stage, pattern, *moment)))
    # Checkpoints are written while training goes on
    return [moment for *_, moment in sorted(chosen, key=lambda item: (*item[:2], item[2].count))]


# ---------------------------------------------------------------------------------------------------------------------
# The unbroken run, the broken one, their results
# ---------------------------------------------------------------------------------------------------------------------


def strike(start, waiting, out):
    """Waits for the first moment of a list that comes, takes it and those it has missed off the list, and kills.

    Returns what was seen, or None if the command was at its end before.
    """
    working, pids = False, {}
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
                gone = moment.pattern and not any(out.glob(moment.pattern))
                start.kill(moment.victim, pids if working else start.pids())
                seen = {"stage": f"after {moment.stage}" if gone else moment.stage, "killed": moment.victim}
                return seen | {"ended after": start.wait_for_all()}
        time.sleep(0.001)
    return None


def run(processes, job, moments, log):
    """Starts each command until it ends by itself; every start before that is killed. Returns one dict a kill.

    In a run without kills nothing is left over, and nobody complains.
    """
    seen = []
    for number, (script, args, out) in enumerate(job):
        waiting = [moment for moment in moments if moment.command == number]
        start = Start(processes, script, args, log)
        while (kill := strike(start, waiting, out)) is not None:
            seen.append({"command": script, **kill})
            words = f"{kill['killed']:10s} killed, the others gone {kill['ended after']:4.1f} s later"
            print(f"{len(seen):3d} {script:17s} {kill['stage']:22s} {words}", flush=True)
            start = Start(processes, script, args, log)
        start.wait_for_all()
        assert start.process.returncode == 0, start.end_of_log()
        complaint = re.search("destroy_process_group|Traceback|Warning", log.read_text())
        assert moments or not complaint, start.end_of_log()
    return seen


def results(job):
    """{name: content} of all that must not depend on kills: files by their bytes, metrics without clocks."""
    found = {}
    for _, _, out in job:
        for file in (file for pattern in RESULTS.split() for file in out.glob(pattern)):
            found[f"{out.name}/{file.relative_to(out)}"] = file.read_bytes()
        found[f"{out.name}/metrics"] = logged(out)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = make_inputs(root, 64)
        # kd.py's student is named by its path, which is an argument: both runs have the same path, one after another
        job = commands(inputs, root / "run")
        run(args.processes, job, [], root / "log")
        whole, unbroken = results(job), time.monotonic() - began
        (root / "run").rename(root / "unbroken")
        print(f"the unbroken run took {unbroken:.0f} s", flush=True)
        kills = run(args.processes, job, plan(args.kills, args.processes, args.seed), root / "log")
        broken = results(job)
    different = sorted(name for name in broken.keys() | whole.keys() if broken.get(name) != whole.get(name))
    result = {
        "command": f"python tests/kills.py --kills {args.kills} --seed {args.seed} --processes {args.processes}",
        "kills": len(kills),
        "by_stage": collections.Counter(f"{kill['command']}: {kill['stage']}" for kill in kills),
        "by_victim": collections.Counter(kill["killed"] for kill in kills),
        "results_compared": len(whole),
        "different": different,
        "slowest_end_seconds": round(max((kill["ended after"] for kill in kills), default=0), 1),
        "seconds": round(time.monotonic() - began),
        "commit": runs.git_commit(),
    }
    print(json.dumps(result, indent=1))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
