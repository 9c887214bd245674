"""How cost grows: seconds and peak memory of each stage against prompt length, response length, N, vocabulary, batch.

    python bench/growth.py                                  prints the table, writes bench/growth.json and bench/growth.svg
    python bench/growth.py --repeat 1 --out /tmp/growth
    python bench/growth.py --read                           measures nothing: the table of bench/growth.json again

One thing grows at a time, the others stay at BASE; each point is a process of its own. Random models of --shape. Stages:

    sample      prefill, expand to N rows, decode the whole response
    check       prefill, expand, score
    splice      rewind to half the response, decode the rest
    dpo         forward and backward over `batch` pairs that share half of their responses
    kd          forward and backward over `batch` examples, forward KL + CE, the teacher's forward included

Memory is the peak above the stage's start: the models are there before, the gradients of dpo and kd are not. Beside it
stands what the formulas of costs.py give for that point, with which estimate.py plans a run, and their ratio; then the
seconds for each 10^12 operations that they count. Growth from the first point to the last is printed as a power: 1 is
linear. The last line is JSON.
"""

import argparse
import ctypes
import json
import math
from pathlib import Path

import scaling
import torch
from harness import DTYPES, SHAPES, PeakMemory, add_arguments, child, clock, random_model, spread

# harness.py has put the project on the path
import costs
import decode
import dpo
import kd

BASE = {"prompt": 64, "response": 64, "N": 4, "vocabulary": 16384, "batch": 2}
AXES = {
    "prompt": [32, 64, 128, 256, 512],
    "response": [32, 64, 128, 256],
    "N": [1, 2, 4, 8, 16],
    "vocabulary": [16384, 32768, 65536, 131072],
    "batch": [1, 2, 4, 8],
}
STAGES = ("sample", "check", "splice", "dpo", "kd")
NOISE = 0.05  # GiB: less is the noise of the allocator


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser, repeat=3)
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-6-layers")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--points", type=int, default=9, help="points of an axis, from its first")
    parser.add_argument("--out", default=str(Path(__file__).parent / "growth"), help="OUT.json and OUT.svg")
    parser.add_argument("--read", action="store_true", help="take what was measured from OUT.json")
    parser.add_argument("--only", type=json.loads, help="one point, as JSON")
    return parser.parse_args(argv)


def measure(args):
    """Seconds and GiB of each stage at one point."""
    at, device = args.only, torch.device(args.device)
    torch.set_num_threads(args.threads)
    rows, half = at["batch"] * at["N"], at["response"] // 2
    model, teacher = (random_model(args.shape, DTYPES[args.dtype], device, s, vocab=at["vocabulary"]) for s in (0, 1))
    draw = lambda n: torch.randint(3, at["vocabulary"], (n,)).tolist()
    prompts = [draw(at["prompt"]) for _ in range(at["batch"])]
    budget = torch.full((rows,), at["response"], device=device)
    names = torch.arange(rows, device=device) // at["N"], torch.arange(rows, device=device) % at["N"]
    pairs = []
    for prompt in prompts:
        shared = draw(half)
        pairs.append({"prompt_ids": prompt, "chosen_ids": shared + draw(half), "rejected_ids": shared + draw(half)})
    state = {}

    def sample(budget):
        state["rows"] = decode.expand(decode.prefill(model, prompts, 0, device), at["N"])
        choose = decode.sampler(0, 0, *names, torch.zeros_like(budget), 1.0, 1.0)
        state["samples"] = decode.decode(model, state.pop("rows"), choose, budget, [-1], at["vocabulary"])[0]

    def check():
        expanded = decode.expand(decode.prefill(teacher, prompts, 0, device), at["N"])
        state["scored"] = decode.score(teacher, expanded, state["samples"], at["vocabulary"])

    def splice():
        scored, hidden, _ = state.pop("scored")
        start = torch.full_like(budget, half)
        choose = decode.sampler(0, 1, *names, start, 1.0, 1.0)
        decode.decode(teacher, decode.rewind(scored, start, hidden), choose, budget - start, [-1], at["vocabulary"])

    def dpo_step():
        scaling.dpo_loss(dpo.PairModel(model, at["vocabulary"]), pairs).backward()
        model.zero_grad(set_to_none=True)

    def kd_step():
        scaling.kd_loss(kd.KDModel(model, at["vocabulary"], kd.forward_kl, 0.5, 1.0), teacher, pairs).backward()
        model.zero_grad(set_to_none=True)

    sample(budget.clamp(max=2))
    stages = {"sample": lambda: sample(budget), "check": check, "splice": splice, "dpo": dpo_step, "kd": kd_step}
    result = {}
    for name, stage in stages.items():
        if args.device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what earlier stages freed goes back to the system: this stage asks anew
        with PeakMemory(args.device) as peak:
            began = clock(args.device)
            stage()
            result[name] = {"seconds": clock(args.device) - began}
        result[name]["gib"] = peak.gib
    return result


def predict(args, at):
    """What costs.py's formulas give for each stage at one point: {stage: {"predicted_gib", "tflop"}}."""
    b, vocab, response = DTYPES[args.dtype].itemsize, at["vocabulary"], at["response"]
    with torch.device("meta"):
        shape = costs.read_shape(random_model(args.shape, DTYPES[args.dtype], "meta", vocab=vocab).config)
    rows, half, batch = at["batch"] * at["N"], response // 2, at["batch"]
    cache = lambda *updates: costs.cache_bytes(shape, b, rows, costs.cache_columns(at["prompt"], *updates))
    forward = costs.scoring_bytes(shape, b, rows * response, at["prompt"] + response, vocab)
    sampling = costs.sampling_bytes(rows, vocab, 1)
    ones = [1] * (half - 1)  # the last token that is drawn is not fed
    flops = lambda *counts: costs.forward_flops(shape, *counts, vocab)
    memory = {
        "sample": cache(*ones, *ones, 1) + sampling,
        "check": cache(response) + forward,
        "splice": cache(response, *ones) - cache(response) + sampling,
    }
    work = {
        "sample": flops(rows * response, at["prompt"] + half, rows * response),
        "check": flops(rows * response, at["prompt"] + response, rows * response),
        "splice": flops(rows * half, at["prompt"] + half + half / 2, rows * half),
    }
    trained = {"dpo": (at["prompt"] + 3 * half, 3 * half), "kd": (at["prompt"] + response - 1, response)}
    for stage, (length, logits) in trained.items():
        loss = "dpo" if stage == "dpo" else "forward_kl"
        kept = costs.training_activations(shape, b, batch, length, stage == "dpo", False)
        head = costs.head_bytes(shape, b, vocab, loss, batch * logits)
        # In the backward the activations leave as the gradients of the blocks come: the larger of the two moments
        memory[stage] = max(kept + head, b * shape.total)
        counts = batch * length, length, batch * logits
        work[stage] = costs.training_flops(shape, *counts, vocab, False) + flops(*counts) * (stage == "kd")
    return {stage: {"predicted_gib": memory[stage] / 2**30, "tflop": work[stage] / 1e12} for stage in STAGES}


def power(points, key):
    """log-log slope from the first point to the last."""
    (x0, y0), (x1, y1) = ((p["value"], max(p[key]["median"], 1e-9)) for p in (points[0], points[-1]))
    return math.log(y1 / y0) / math.log(x1 / x0)


def measure_axes(args):
    """{axis: {stage: [{"value", "seconds", "gib"} of each point]}}"""
    flags = [f"--{name}={getattr(args, name)}" for name in ("dtype", "device", "threads", "shape")]
    measured = {}  # BASE is a point of every axis: it is measured once
    table = {}
    for axis in args.axes:
        table[axis] = {stage: [] for stage in STAGES}
        for value in AXES[axis][: args.points]:
            point = json.dumps({**BASE, axis: value})
            if point not in measured:
                measured[point] = [child(__file__, flags, "--only", point) for _ in range(args.repeat)]
            for stage in STAGES:
                runs = [run[stage] for run in measured[point]]
                values = {key: spread([run[key] for run in runs]) for key in ("seconds", "gib")}
                table[axis][stage].append({"value": value, **values})
            seconds = (f"{stage} {table[axis][stage][-1]['seconds']['median']:.2f} s" for stage in STAGES)
            print(f"{axis} {value}: {', '.join(seconds)}", flush=True)
    return table


COLOURS = dict(zip(STAGES, ("#1b6ca8", "#2a9d4a", "#8e44ad", "#c0392b", "#b8860b")))
SIZE, GAP, LEFT, TOP = 190, 40, 60, 40  # of a panel of the plot, in pixels


def svg_text(x, y, words, anchor="middle", colour="#222"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def svg_panel(stages, key, title, x0, y0, low, high, labels):
    """One panel, log-log: a line a stage; the vertical axis goes from 10^low to 10^high. Returns its elements."""
    ticks = [p["value"] for p in stages[STAGES[0]]]
    span = math.log(ticks[-1] / ticks[0]) or 1.0
    place_x = lambda v: x0 + SIZE * math.log(v / ticks[0]) / span
    place_y = lambda v: y0 + SIZE * (high - math.log10(max(v, 10**low))) / (high - low)
    parts = [f'<rect x="{x0}" y="{y0}" width="{SIZE}" height="{SIZE}" fill="none" stroke="#999"/>']
    for exponent in range(low, high + 1):
        y = place_y(10.0**exponent)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x0 + SIZE}" y2="{y:.1f}" stroke="#ddd"/>')
        if labels:
            parts.append(svg_text(x0 - 6, y + 4, f"{10.0**exponent:g}", "end"))
    for tick in ticks:
        parts.append(svg_text(place_x(tick), y0 + SIZE + 14, f"{tick // 1024}k" if tick > 9999 else tick))
    parts.append(svg_text(x0 + SIZE / 2, y0 - 6, title))
    for stage, points in stages.items():
        line = " ".join(f"{place_x(p['value']):.1f},{place_y(p[key]['median']):.1f}" for p in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[stage]}" stroke-width="2"/>')
    return parts


def draw_svg(table):
    """Seconds (above) and GiB (below) against each axis. Returns the SVG as text."""
    parts = [svg_text(LEFT + 90 * k, 18, stage, "start", colour) for k, (stage, colour) in enumerate(COLOURS.items())]
    for j, (key, unit) in enumerate((("seconds", "seconds"), ("gib", "GiB"))):
        values = [max(p[key]["median"], 1e-2) for stages in table.values() for ps in stages.values() for p in ps]
        low, high = math.floor(math.log10(min(values))), math.floor(math.log10(max(values))) + 1
        for i, (axis, stages) in enumerate(table.items()):
            place = LEFT + i * (SIZE + GAP), TOP + j * (SIZE + 60)
            parts += svg_panel(stages, key, f"{unit} against {axis}", *place, low, high, labels=i == 0)
    width, height = LEFT + len(table) * (SIZE + GAP), TOP + 2 * (SIZE + 60)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
    return (
        "\n".join([head + 'font-size="11">', '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"])
        + "\n"
    )


def main(argv=None):
    args = parse_args(argv)
    if args.only:
        print(json.dumps(measure(args)))
        return
    table = json.loads(Path(args.out + ".json").read_text())["table"] if args.read else measure_axes(args)
    for axis, stages in table.items():
        for k, value in enumerate(p["value"] for p in stages[STAGES[0]]):
            expected = predict(args, {**BASE, axis: value})
            for stage in STAGES:
                point = stages[stage][k]
                point |= expected[stage]
                seconds, gib = point["seconds"]["median"], point["gib"]["median"]
                predicted = point["predicted_gib"]
                ratio = f"{gib / predicted:5.2f}" if gib > NOISE else "    -"
                print(
                    f"{axis:10} {value:7} {stage:7}{seconds:8.2f} s {seconds / point['tflop']:6.1f} s/TFLOP "
                    f"{gib:6.3f} GiB, predicted {predicted:6.3f}, ratio {ratio}"
                )
        if len(stages["sample"]) > 1:
            for key in ("seconds", "gib"):
                powers = (
                    f"{stage} {power(points, key):.2f}"
                    for stage, points in stages.items()
                    if key == "seconds" or points[-1][key]["median"] > NOISE
                )
                print(f"{axis:10} {key} grow with the power: {', '.join(powers)}")
    Path(args.out + ".json").write_text(json.dumps({"base": BASE, "table": table}, indent=1) + "\n")
    Path(args.out + ".svg").write_text(draw_svg(table))
    print(json.dumps({"axes": list(table), "out": args.out}))


if __name__ == "__main__":
    main()
