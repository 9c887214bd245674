"""lm_head and KD loss over chunks (kd.ChunkedHeadLoss) beside the dense computation: seconds, peak memory, same gradients.

    python bench/kd_memory.py --dtype bfloat16 --repeat 3

Each run is a process of its own, chunked and dense in turn, on the same random inputs: hidden states of 2,048 tokens and
two heads of Qwen2.5's 151,936-entry vocabulary. Peak memory is counted above the inputs, by a thread that reads the
process's resident size every 10 ms (so a CPU on Linux). Dense needs about 12 GiB. The last line is JSON.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import decode
import kd


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--width", type=int, default=896, help="that of Qwen2.5-0.5B")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--loss", choices=list(kd.LOSSES), default="forward_kl")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["chunked", "dense"], help="one run of one kind, as JSON")
    return parser.parse_args(argv)


def resident_gib():
    """This process's resident memory in GiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**30


def measure(args):
    """One forward and backward; returns {"seconds", "gib", "loss", "grad_hidden", "grad_weight"}, the latter two norms."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    draw = lambda *shape: torch.randn(shape).to(dtype)
    hidden, weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    hidden.requires_grad_(), weight.requires_grad_()
    teacher_hidden, teacher_weight = draw(args.tokens, args.width), draw(args.vocab, args.width) * 0.02
    targets = torch.randint(args.vocab, (args.tokens,))
    start, peak, done = resident_gib(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident_gib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    loss_of = functools.partial(kd.total_loss, divergence=kd.LOSSES[args.loss], kd_rate=0.5, temperature=1.0)
    began = time.process_time()
    if args.only == "dense":
        logits, teacher_logits = F.linear(hidden, weight).float(), F.linear(teacher_hidden, teacher_weight).float()
        loss = loss_of(logits, teacher_logits, targets)[0].mean()
    else:
        chunk_loss = lambda logits, part: loss_of(
            logits, F.linear(teacher_hidden[part], teacher_weight).float(), targets[part]
        )
        chunk = decode.head_chunk(args.vocab)
        loss = kd.ChunkedHeadLoss.apply(hidden, weight, None, chunk_loss, chunk)[0] / args.tokens
    loss.backward()
    seconds = time.process_time() - began
    done.set()
    watcher.join()
    norms = {"grad_hidden": hidden.grad.float().norm().item(), "grad_weight": weight.grad.float().norm().item()}
    return {"seconds": seconds, "gib": peak[0] - start, "loss": loss.item(), **norms}


def main(argv=None):
    args = parse_args(argv)
    if args.only:
        print(json.dumps(measure(args)))
        return
    runs = {"chunked": [], "dense": []}
    for _ in range(args.repeat):
        for kind, results in runs.items():
            command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--only", kind]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(kind, results[-1], flush=True)
    ours, dense = runs["chunked"][0], runs["dense"][0]
    for key in ("loss", "grad_hidden", "grad_weight"):
        assert abs(ours[key] - dense[key]) <= 1e-3 * abs(dense[key]), f"{key}: {ours[key]} chunked, {dense[key]} dense"
    median = lambda kind, key: statistics.median(r[key] for r in runs[kind])
    summary = {f"{kind}_{key}": median(kind, key) for kind in runs for key in ("seconds", "gib")}
    for key in ("seconds", "gib"):
        summary[f"ratio_{key}"] = summary[f"chunked_{key}"] / summary[f"dense_{key}"]
        for kind, results in runs.items():
            values = [r[key] for r in results]
            print(f"{kind:8} {key:8} {min(values):7.2f} {median(kind, key):7.2f} {max(values):7.2f}  min median max")
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
