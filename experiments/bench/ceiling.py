"""How far each stage is from what this machine can do: measured ceilings, and operations and bytes counted by formula.

    python bench/ceiling.py                                          6 layers of SmolLM2-135M's shape
    python bench/ceiling.py --shape qwen2.5-0.5b --device cuda       the share of the matrix ceiling is the step's MFU

Ceilings: GFLOP/s of matrix products of the model's own shapes with many rows (a weight times 1,024 columns), in --dtype
and in float32, and GB/s of reading and of copying a tensor that fits in no cache.
A stage's floor is the larger of operations / GFLOP/s and bytes / GB/s. Counted are matrix products and attention (2
operations a multiply-add), and the bytes of weights, KV cache and logits that must be read or written at least once;
softmaxes, norms, copies and Python count as nothing, so that a floor is out of reach. Share = floor / measured.
The last line is JSON.
"""

import argparse
import json

import scaling
import torch
import torch.nn.functional as F
from harness import DTYPES, SHAPES, add_arguments, clock, random_model, spread

# harness.py has put the project on the path
import decode
import dpo
import kd


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-6-layers")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-length", type=int, default=100)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=8)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# Counting: operations and bytes of one forward, by formula
# ---------------------------------------------------------------------------------------------------------------------


def block_weights(shape):
    """Weights of all blocks' matrices: q and o (D x D), k and v (D x D kv/heads), gate, up and down (D x F)."""
    width, between, layers, heads, kv_heads, _ = SHAPES[shape]
    return layers * (2 * width * width + 2 * width * width * kv_heads // heads + 3 * width * between)


def block_flops(shape, tokens, seen):
    """Operations of the blocks on `tokens` tokens, each of which attends to `seen` columns: q k^T and p v, D each."""
    width, _, layers, *_ = SHAPES[shape]
    return 2 * tokens * block_weights(shape) + layers * 4 * tokens * seen * width


def head_flops(shape, tokens):
    return 2 * tokens * SHAPES[shape][0] * SHAPES[shape][-1]


def cache_bytes(shape, rows, columns, size):
    """Keys and values of `rows` x `columns` tokens."""
    width, _, layers, heads, kv_heads, _ = SHAPES[shape]
    return 2 * layers * rows * columns * (width * kv_heads // heads) * size


def count(args):
    """{stage: (operations, bytes)} of the stages that `stages` runs; bytes in the stage's own dtype."""
    shape, p, n, x, y = args.shape, args.prompts, args.samples, args.prompt_length, args.response
    width, *_, vocab = SHAPES[shape]
    rows, size = p * n, {"bfloat16": 2, "float32": 4}[args.dtype]
    weights = (block_weights(shape) + vocab * width) * size
    prefill = block_flops(shape, p * x, x / 2)  # a causal row sees half of the columns on average
    token = block_flops(shape, rows, x + y / 2) + head_flops(shape, rows)
    logits = rows * vocab * 4  # written and read again once, in float32
    decode_bytes = weights + cache_bytes(shape, rows, x + y / 2, size) + 2 * logits
    check = prefill + block_flops(shape, rows * y, x + y / 2) + head_flops(shape, rows * y)
    # A pair's row is [prompt + y/2 shared | y/2 | y/2]; the gradient costs twice the forward
    tokens, suffixes = args.pairs * (x + 3 * y // 2), args.pairs * y
    step = 3 * (block_flops(shape, tokens, (x + 3 * y / 2) / 2) + head_flops(shape, suffixes))
    again = head_flops(shape, suffixes)  # the chunked head computes its logits twice
    tokens, size = args.pairs * (x + y), 4
    teacher = block_flops(shape, tokens, (x + y) / 2) + head_flops(shape, args.pairs * y)
    parameters = (block_weights(shape) + vocab * width) * size
    logits = args.pairs * y * vocab * 4
    return {
        "decode, a token of each row": (token, decode_bytes),
        "check": (check, weights + 2 * rows * y * vocab * 4),
        "dpo": (step, 3 * parameters + 4 * logits),
        "dpo, with the head computed twice": (step + again, 3 * parameters + 4 * logits),
        "kd": (4 * teacher, 4 * parameters + 6 * logits),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def seconds_of(function, args):
    """Median seconds of a call, after one to warm up."""
    function()
    values = []
    for _ in range(args.repeat):
        began = clock(args.device)
        function()
        values.append(clock(args.device) - began)
    return spread(values)["median"]


def ceilings(args):
    """Matrix products in GFLOP/s by dtype, weighed as the model's matrices are; reading and copying in GB/s."""
    width, between, *_, vocab = SHAPES[args.shape]
    result = {}
    for dtype in sorted({args.dtype, "float32"}):
        rates = {}
        for name, (rows, columns) in {
            "attention": (width, width),
            "MLP": (between, width),
            "head": (vocab, width),
        }.items():
            weight, x = torch.randn(rows, columns), torch.randn(1024, columns)
            weight, x = (t.to(args.device, DTYPES[dtype]) for t in (weight, x))
            rates[name] = 2 * 1024 * rows * columns / seconds_of(lambda w=weight, x=x: F.linear(x, w), args) / 1e9
        result[dtype] = rates
    big = torch.ones(1 << 27, device=args.device)  # 512 MiB
    other = torch.empty_like(big)
    result["read GB/s"] = big.nbytes / seconds_of(big.sum, args) / 1e9
    result["copy GB/s"] = 2 * big.nbytes / seconds_of(lambda: other.copy_(big), args) / 1e9
    return result


def stages(args):
    """{stage: measured seconds} of this project's functions, on random models and random tokens."""
    shape, n, longest = args.shape, args.samples, args.response
    vocab, device = SHAPES[shape][-1], torch.device(args.device)
    model = random_model(shape, DTYPES[args.dtype], device)
    torch.manual_seed(0)
    draw = lambda length: torch.randint(3, vocab, (length,)).tolist()
    prompts = [draw(args.prompt_length) for _ in range(args.prompts)]
    budget = torch.full((args.prompts * n,), longest, device=device)
    index = torch.arange(len(budget), device=device)
    prefill = lambda: decode.expand(decode.prefill(model, prompts, 0, device), n)

    def generate(budget):
        choose = decode.sampler(0, 0, index // n, index % n, torch.zeros_like(budget), 1.0, 1.0)
        return decode.decode(model, prefill(), choose, budget, [-1], vocab)[0]

    responses = generate(budget)
    result = {"decode, a token of each row": seconds_of(lambda: generate(budget), args)}
    first = seconds_of(lambda: generate(budget.clamp(max=1)), args)
    result["decode, a token of each row"] = (result["decode, a token of each row"] - first) / (longest - 1)
    result["check"] = seconds_of(lambda: decode.score(model, prefill(), responses, vocab), args)
    student, teacher, pairs = random_model(shape, device=device, seed=1), model.float(), []
    for _ in range(args.pairs):
        shared = draw(longest // 2)
        suffixes = {name: shared + draw(longest // 2) for name in ("chosen_ids", "rejected_ids")}
        pairs.append({"prompt_ids": draw(args.prompt_length), **suffixes})
    pair_model, kd_model = dpo.PairModel(student, vocab), kd.KDModel(student, vocab, kd.forward_kl, 0.5, 1.0)
    result["dpo"] = seconds_of(lambda: scaling.dpo_loss(pair_model, pairs).backward(), args)
    result["dpo, with the head computed twice"] = result["dpo"]
    result["kd"] = seconds_of(lambda: scaling.kd_loss(kd_model, teacher, pairs).backward(), args)
    return result


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    ceiling, counted, measured = ceilings(args), count(args), stages(args)
    for dtype in sorted({args.dtype, "float32"}):
        print(f"{dtype} GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in ceiling[dtype].items()))
    print(f"read {ceiling['read GB/s']:.1f} GB/s, copy {ceiling['copy GB/s']:.1f} GB/s")
    summary = {}
    for stage, (flops, moved) in counted.items():
        rates = ceiling["float32" if stage.startswith(("dpo", "kd")) else args.dtype]  # training is float32 here
        floors = {"operations": flops / max(rates.values()) / 1e9, "bytes": moved / ceiling["read GB/s"] / 1e9}
        bound = max(floors, key=floors.get)
        summary[stage] = {"gflop": flops / 1e9, "gb": moved / 1e9, "floor": floors[bound], "bound": bound}
        summary[stage].update(seconds=measured[stage], share=floors[bound] / measured[stage])
        row = summary[stage]
        print(
            f"{stage:34} {row['gflop']:9.1f} GFLOP {row['gb']:7.2f} GB  floor {row['floor']:8.4f} s by {bound:10}"
            f"  measured {row['seconds']:8.4f} s  share {row['share']:.2f}"
        )
    print(json.dumps({**vars(args), "ceiling": ceiling, "stages": summary}))


if __name__ == "__main__":
    main()
