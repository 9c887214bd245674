"""Memory of long runs: 500 steps of DPO and of KD on the toy, and up to a million prompts through the pair stage's reader.

    python tests/long_run.py --steps 500 --prompts 10000 100000 1000000

Writes runs/memory.json and runs/memory.svg. Every measurement is a process of its own. Steps: the resident memory of a
lone process, sampled every 10 steps; the growth is that of the last 10 samples' median over that of the 10 samples behind
step 100. Prompts: the peak of the anonymous memory (RssAnon; pages of files that are mapped into it can be given back
at any time) while all prompts are read, checked, put into the template and encoded, batch by batch. Exit status 1 if
memory grows by more than the limits below.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kills

import common
import data
import run_folder
import toy

GROWTH_LIMIT = 16.0  # MB, from step 100 to the end
PROMPT_LIMIT = 64.0  # MB, of the largest count over the smallest


def resident(field="VmRSS"):
    """MB of this process, by a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field + ":"))) / 1024


def call(function, *args):
    """The result of a function in a new process, so that no measurement sees what another has left."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def steps_of(script, argv, every):
    """Runs a training command in this process; returns [(step, MB)], a sample each `every` steps."""
    samples, append = [], common.append_jsonl

    def sampled(path, row):
        append(path, row)
        if "step" in row and row["step"] % every == 0:
            samples.append((row["step"], round(resident(), 2)))

    common.append_jsonl = sampled
    __import__(script).main(argv)
    return samples


def growth(samples, skip=100, count=10):
    """MB by which the last samples lie over the first ones behind step `skip`; medians of up to `count` samples each."""
    values = [mb for step, mb in samples if step > skip]
    count = max(1, min(count, len(values) // 2))
    return round(statistics.median(values[-count:]) - statistics.median(values[:count]), 2)


def measure_steps(root, steps, inputs, every=10):
    """{"dpo": ..., "kd": ...}: samples and growth. inputs: {"teacher", "student", "data"}."""
    pairs, found = make_pairs(root / "pairs.jsonl", inputs["data"]), {}
    shared = (
        f"--max-steps {steps} --batch-size 8 --micro-batch-size 4 --save-every 50 --threads 1 --device cpu --lr 1e-5"
    )
    jobs = {
        "dpo": ["--model", inputs["student"], "--pairs", pairs],
        "kd": ["--student", inputs["student"], "--teacher", inputs["teacher"], "--data", inputs["data"]]
        + ["--template", "none", "--limit", "200", "--max-new-tokens", "48", "--eval-limit", "0"],
    }
    for script, argv in jobs.items():
        began = time.monotonic()
        samples = call(steps_of, script, [*argv, *shared.split(), "--out", str(root / script)], every)
        found[script] = {"growth_mb": growth(samples, min(100, steps // 2)), "samples": samples}
        print(
            f"{script}: {steps} steps, {samples[0][1]:.0f} MB at first, {samples[-1][1]:.0f} MB at last,"
            f" growth {found[script]['growth_mb']:+.1f} MB; {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return found


def make_pairs(path, problems, count=200):
    """A preference file of the toy's task: right against a wrong first digit."""
    rows = common.read_jsonl(problems)[:count]
    wrong = lambda text: f"{(int(text[0]) + 1) % 10}{text[1:]}"
    common.write_jsonl(
        path, [{"prompt": r["prompt"], "chosen": r["response"], "rejected": wrong(r["response"])} for r in rows]
    )
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def write_prompts(path, count):
    """`count` synthetic prompts, of a few words and of many, written line by line."""
    with open(path, "w") as file:
        for i in range(count):
            text = f"{i}+{i * 7919 % 1000}:" * (1 + i % 7)
            file.write(json.dumps({"prompt": text, "response": str(i)}) + "\n")


def read_prompts(path, cache):
    """Reads all prompts of a file as the pair stage does; returns their number, tokens, peak and first MB, and seconds."""
    data.datasets.config.HF_DATASETS_CACHE = cache
    began, before = time.monotonic(), resident("RssAnon")
    argv = {"data": path, "data_config": None, "split": "train", "limit": 0, "prompt_column": None}
    argv |= {"response_column": None, "template": "none", "max_prompt_tokens": 256, "prompts_per_batch": 8}
    examples = data.read_examples(argparse.Namespace(**argv))
    peak = resident("RssAnon")
    batches = data.PromptBatches(examples, toy.make_tokenizer(), argparse.Namespace(**argv))
    prompts = tokens = 0
    for k in range(len(batches)):
        batch = batches[k]
        prompts, tokens = prompts + len(batch), tokens + sum(len(prompt["ids"]) for prompt in batch)
        if k % 100 == 0:
            peak = max(peak, resident("RssAnon"))
    return {"prompts": prompts, "tokens": tokens, "before_mb": round(before, 1), "peak_mb": round(peak, 1),
            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip


def measure_prompts(root, counts):
    """One dict for each count of prompts."""
    found = []
    for count in counts:
        write_prompts(root / "prompts.jsonl", count)
        found.append(call(read_prompts, str(root / "prompts.jsonl"), str(root / f"cache-{count}")))
        print(
            "prompts: {prompts}, {before_mb} MB before, peak {peak_mb} MB, {seconds} s".format(**found[-1]), flush=True
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The result
# ---------------------------------------------------------------------------------------------------------------------


def plot(steps, width=640, height=260):
    """An SVG: resident memory against optimizer steps, one line a command, the axis from 0."""
    left, top, right, bottom = 60, 20, width - 20, height - 40
    last = max(step for found in steps.values() for step, _ in found["samples"])
    most = 1.1 * max(mb for found in steps.values() for _, mb in found["samples"])
    x, y = lambda step: left + (right - left) * step / last, lambda mb: bottom - (bottom - top) * mb / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    ]
    parts += [
        "<title>Resident memory over optimizer steps</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for tick in range(0, int(most), max(50, int(most / 5) // 50 * 50)):
        parts.append(f'<path d="M{left} {y(tick):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for tick in range(0, last + 1, max(1, last // 5)):
        parts.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">optimizer step</text>')
    parts.append(f'<text x="{left}" y="{top - 6}">MB resident</text>')
    for (name, found), colour in zip(steps.items(), ("#0b62a4", "#c2410c")):
        line = " ".join(f"{x(step):.1f},{y(mb):.1f}" for step, mb in found["samples"])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        step, mb = found["samples"][-1]
        text = f"{name}: {found['growth_mb']:+.1f} MB behind step 100"
        parts.append(f'<text x="{x(step):.1f}" y="{y(mb) - 6:.1f}" text-anchor="end" fill="{colour}">{text}</text>')
    return "\n".join([*parts, "</svg>\n"])


def too_much(steps, prompts):
    """Lines about what grew by more than its limit."""
    lines = [f"{name} grew by {s['growth_mb']} MB" for name, s in steps.items() if s["growth_mb"] > GROWTH_LIMIT]
    peaks = [p["peak_mb"] for p in prompts]
    if peaks and peaks[-1] - peaks[0] > PROMPT_LIMIT:
        lines.append(f"{prompts[-1]['prompts']} prompts took {peaks[-1] - peaks[0]:.1f} MB more")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--prompts", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--result", default=str(ROOT / "runs" / "memory"))
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prompts = measure_prompts(root, args.prompts)
        paths = toy.build(root / "toy")
        inputs = {name: paths[key] for name, key in (("teacher", "teacher"), ("student", "student"), ("data", "train"))}
        steps = measure_steps(root, args.steps, inputs)
    lines = too_much(steps, prompts)
    command = f"python tests/long_run.py --steps {args.steps} --prompts {' '.join(map(str, args.prompts))}"
    result = {"command": command, "machine": kills.machine(), "commit": run_folder.git_commit(), "too_much": lines}
    result |= {"limits_mb": {"steps": GROWTH_LIMIT, "prompts": PROMPT_LIMIT}, "steps": steps, "prompts": prompts}
    Path(f"{args.result}.json").write_text(json.dumps(result) + "\n")
    Path(f"{args.result}.svg").write_text(plot(steps))
    print("; ".join(lines) or "memory does not grow")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
