"""Processes without torchrun: one that has imported everything forks the ranks. To start Python and import torch is most
of a test's time.

    python workers.py JOBS.json                          jobs, one after the other; their exit statuses: JOBS.json.codes
    torchrun --nproc_per_node 2 workers.py rank-error    a UserError on rank 1 alone; rank 0 waits in a collective

A job is a `main` of this project: {"main": module, "argv": [...], "processes": 2}, 0 of them: one without RANK; and
"die": {"at": "os.rename", "call": "checkpoint/step-000004"}: the process that calls this function with these words in
its last argument or keyword arguments is killed before the call (on rank "rank" alone, if given), and then all others
are. With "signal": 15 it is sent that signal instead, and the others are left alone.
"record": gradients before clipping go to OUT/gradients.pt; the weights stay as they are.
"file_size": no file can have more bytes (the system's error stands for that of a full disk).
"""

import functools
import gc
import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, Qwen2ForCausalLM  # noqa: F401  once here, not in every child

import kd  # noqa: F401
from lib import runs, training

SECONDS = 60  # for one job: a hang becomes a failed test


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def own_rank():
    return int(os.environ.get("RANK", "0"))


def fork_ranks(processes, function):
    """Exit statuses, by rank, of the processes that call the function; negative: the signal that killed one.

    They find each other by the variables that torchrun sets. A killed one takes the others with it, as when a machine
    goes down.
    """
    variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    pids, codes = [], {}
    gc.freeze()  # of all that is imported: to look through it takes longer than most jobs
    for rank in range(max(1, processes)):
        pid = os.fork()
        if pid == 0:
            if processes:
                os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
            runs.run(function)
        pids.append(pid)
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] == -signal.SIGKILL:
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def die_at(at, call, rank=None, signal=int(signal.SIGKILL)):
    """Replaces the function `at` by one that kills this process when it is called with `call` in its arguments."""
    module, name = at.rsplit(".", 1)
    module = importlib.import_module(module)
    function = getattr(module, name)

    def deadly(*args, **kwargs):
        if rank in (None, own_rank()) and call in f"{args[-1]} {kwargs}":
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
        if own_rank() == 0:
            torch.save(steps, Path(out) / "gradients.pt")
        return {"grad_norm": torch.stack([g.norm() for g in full.values()]).norm().item(), "lr": 0.0}

    training.optimizer_step = record


def do(job):
    """One job, in a process of its own."""
    signal.alarm(SECONDS)
    time.sleep = lambda _: None  # ranks above 0 give torchrun time to end them, before they tell of an error
    if "file_size" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"],) * 2)
    if "die" in job:
        die_at(**job["die"])
    if job.get("record"):
        record_gradients(job["argv"][job["argv"].index("--out") + 1])
    importlib.import_module(job["main"]).main(job["argv"])


def main(file):
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # what jobs print stays in order
    codes = []
    for job in json.loads(Path(file).read_text()):
        print(f"--- job {job}", flush=True)
        codes.append(fork_ranks(job["processes"], functools.partial(do, job)))
    Path(f"{file}.codes").write_text(json.dumps(codes))


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
