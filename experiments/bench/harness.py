"""What the benchmarks share: models of real shapes, time, peak memory, and two kinds of the same work compared in turn.

A benchmark is a script with a function measure(args) that does the work of `args.kind` and returns what `Stages.result` does.
`compare` runs it for each kind in turn, each time in a process of its own, and raises AssertionError unless all kinds
computed the same. It prints the machine's limits; median, minimum and maximum of seconds or GiB, and the ratio to the
first kind, which is this project; and as the last line JSON, for experiments/bench.jsonl.

Memory: glibc gives large blocks back to the kernel as soon as they are free, and the next tensor begins with page
faults. All kinds keep freed memory (KEEP_MEMORY, on Linux).
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent.parent
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "1099511627776"}
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import tables

from lib import decode, runs

# hidden size, intermediate size, layers, heads, KV heads, vocabulary
SHAPES = {
    "tiny": (32, 64, 2, 4, 2, 97),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "smollm2-6-layers": (576, 1536, 6, 9, 9, 49152),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
}


def make_parser(doc, shape=None, dtype="float32", repeat=5):
    """A parser with the flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--dtype", choices=list(runs.DTYPES), default=dtype)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=repeat, help="runs of each kind")
    parser.add_argument("--kinds", nargs="+", help="these kinds alone, this project's first")
    parser.add_argument("--kind", help="one run of this kind, in this process")
    if shape:
        parser.add_argument("--shape", choices=list(SHAPES), default=shape, help="of the random models")
        parser.add_argument("--vocab", type=int, help="another vocabulary for --shape")
    return parser


def add_generation_arguments(parser, prompts=2, max_new_tokens=128):
    """The size of steps 1 to 3."""
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--prompt-length", type=int, default=100, help="the longest; lengths are drawn from half of it")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens)
    parser.add_argument("--hazard", type=float, default=0.02, help="probability that a token is a response's last")


def random_model(args, seed=0, dtype=None, std=0.05):
    """A random Llama of `args.shape` on `args.device`, in --dtype, its head tied to its embeddings."""
    width, intermediate, depth, heads, kv_heads, vocab_size = SHAPES[args.shape]
    sizes = {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": depth}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": args.vocab or vocab_size}
    config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=std, **sizes)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(args.device, dtype or runs.DTYPES[args.dtype]).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # no EOS: `generate` ends no row by itself
    return model


def tokens_of(model):
    """What `decode` must know, without an EOS."""
    return decode.Tokens(pad_id=0, eos_ids=[-1], vocab_size=model.config.vocab_size)


def clock(device):
    """Seconds. On a CPU those of this process, which other processes disturb less: on one thread, wall time at rest."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def ceiling(args):
    """What the machine gives now: GFLOP/s of a product (512, 896) x (896, 32768), GB/s of reading 1 GiB."""
    draw = lambda *shape: torch.randn(*shape, device=args.device, dtype=runs.DTYPES[args.dtype])
    tensors = {"a": draw(512, 896), "b": draw(896, 32768), "memory": torch.ones(1 << 28, device=args.device)}
    seconds = lambda code: Timer(code, globals=tensors, num_threads=args.threads).timeit(5).median
    product, read = seconds("a @ b"), seconds("memory.sum()")
    return {"GFLOP/s": 2 * 512 * 896 * 32768 / product / 1e9, "GB/s": (1 << 30) / read / 1e9}


class Stages:
    """`result = stages(name, function)` calls function and keeps its seconds; `stages.memory` its peak of memory."""

    def __init__(self, device):
        self.device, self.stages = device, {}

    def __call__(self, name, function):
        began = clock(self.device)
        result = function()
        self.stages[name] = {"s": clock(self.device) - began}
        return result

    def memory(self, name, function):
        """GiB of tensors above those that were there, at most. On a CPU a profiler counts them: no time is kept."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before, result = torch.cuda.memory_allocated(), function()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            with torch.profiler.profile(profile_memory=True) as profile:
                result = function()
            # Every allocation and release, which the public lists sum up by operation
            changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
            changes.sort(key=lambda event: event.start_ns())
            peak = max(itertools.accumulate(event.nbytes() for event in changes))
        self.stages[name] = {"GiB": peak / 2**30}
        return result

    def result(self, **check):
        """check: what all kinds must have computed: {name: a number or nested lists of them}."""
        return {"stages": self.stages, "check": check}


def compare(file, argv, args, measure, kinds, launch=lambda kind: [sys.executable], **tolerance):
    """Runs `measure` for each of `kinds` in turn, checks and prints. Returns {kind: [what `Stages.result` returns]}.

    args: `argv` as parsed; argv None is the command line. launch: kind -> the command that starts Python for it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if args.kind:
        torch.set_num_threads(args.threads)
        result = measure(args)
        if result:  # of rank 0
            print(json.dumps(result))
        return None
    kinds = args.kinds or kinds
    for peer, package in {"trl": "trl", "liger": "liger_kernel"}.items():
        if any(peer in kind for kind in kinds) and importlib.util.find_spec(package) is None:
            todo = "pip install -r experiments/bench/requirements.txt"
            raise runs.UserError(f"{package} is not installed", "for this benchmark's peer", todo)
    found, environment = {kind: [] for kind in kinds}, os.environ | KEEP_MEMORY
    for _ in range(args.repeat):
        for kind in kinds:
            command = [*launch(kind), file, *argv, "--kind", kind]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    for kind in kinds[1:]:
        for ours, theirs in zip(found[kinds[0]], found[kind]):
            for name, value in ours["check"].items():
                torch.testing.assert_close(theirs["check"][name], value, **tolerance)
    print(f"check: {' and '.join(kinds)} agree in {', '.join(found[kinds[0]][0]['check'])}")
    limits = ceiling(args)
    print(", ".join(f"{value:.1f} {unit}" for unit, value in limits.items()), "is what this machine gives")
    stages = {kind: [result["stages"] for result in results] for kind, results in found.items()}
    line = {"bench": Path(file).stem, "commit": runs.git_commit(), "args": vars(args)}
    line |= {"ceiling": limits, "stages": stages}
    print(tables.speed([line]), json.dumps(line), sep="\n", flush=True)
    return found
