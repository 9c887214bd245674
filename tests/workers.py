"""What test_distributed.py starts under torchrun, or alone: a list of jobs, each a `main` of this project.

    torchrun --nproc_per_node N workers.py JOBS.json      [{"main": module, "argv": [...], "die": ..., "record": bool}]
    torchrun --nproc_per_node 2 workers.py rank-error     a UserError on rank 1 alone; rank 0 waits in a collective

To start Python and import torch is most of a test's time. So every rank forks one child a job: a child may die, and has
a process group of its own. The exit status of each job goes to JOBS.json.RANK.
"die": {"at": "os.rename", "call": "checkpoint/step-000004"}: the process that calls this function with these words in
its last argument or keyword arguments is killed before the call (on rank "rank", if given), and then all others are.
With "signal": 15 it is sent that signal instead, and the others are left alone.
"record": gradients before clipping go to OUT/gradients.pt; the weights stay as they are.
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401  once here, not in every child

import warmup_distill  # noqa: F401
from lib import runs, training

RANK, SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
KILL = int(signal.SIGKILL)
SECONDS = 60  # for one job: a hang becomes a failed test


def meet_in_store(name):
    """Lets the next process group, under torchrun, use keys of its own in torchrun's store."""
    if "RANK" not in os.environ:
        return
    init = dist.init_process_group
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group = lambda backend, **kwargs: init(
        backend, **{**kwargs, "store": dist.PrefixStore(name, store)}
    )


def die_at(at, call, marker, rank=RANK, signal=KILL):
    """Replaces the function `at` by one that kills this process when it is called with `call` in its arguments."""
    module, name = at.rsplit(".", 1)
    module = importlib.import_module(module)
    function = getattr(module, name)

    def deadly(*args, **kwargs):
        if rank == RANK and call in f"{args[-1]} {kwargs}":
            if signal == KILL:
                marker.touch()
            os.kill(os.getpid(), signal)
        return function(*args, **kwargs)

    setattr(module, name, deadly)


def record_gradients(out):
    """Replaces the optimizer step by one that writes the whole gradients, and leaves the weights alone."""
    steps = []

    def record(model, optimizer, *schedule):
        full = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
        steps.append(full)
        optimizer.zero_grad(set_to_none=True)
        if RANK == 0:
            torch.save(steps, Path(out) / "gradients.pt")
        return {"grad_norm": torch.stack([g.norm() for g in full.values()]).norm().item(), "lr": 0.0}

    training.optimizer_step = record


def do(job, number, marker):
    """One job, in a process of its own."""
    signal.alarm(SECONDS)
    meet_in_store(f"job-{number}")
    if "die" in job:
        die_at(**job["die"], marker=marker)
    if job.get("record"):
        record_gradients(job["argv"][job["argv"].index("--out") + 1])
    if RANK == 0:
        print(f"--- job {number}: {job}", file=sys.stderr, flush=True)
    runs.run(lambda: importlib.import_module(job["main"]).main(job["argv"]))


def wait(pid, marker):
    """Exit status of a child; negative: the signal that killed it. A dead peer means death, as when a machine goes down."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if marker.exists():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def main(file):
    codes = []
    for number, job in enumerate(json.loads(Path(file).read_text())):
        marker = Path(f"{file}.dead-{number}")
        pid = os.fork()
        if pid == 0:
            do(job, number, marker)
        codes.append(wait(pid, marker))
    Path(f"{file}.{RANK}").write_text(json.dumps(codes))


def error_of_one_rank():
    world = runs.start_processes("cpu", 1)
    if world.rank == 1:
        raise runs.UserError("rank 1 met something", "in its own data", "repair it")
    world.barrier()


if __name__ == "__main__":
    if sys.argv[1] == "rank-error":
        runs.run(error_of_one_rank)
    else:
        torch.set_num_threads(1)
        main(sys.argv[1])
