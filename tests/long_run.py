"""Memory: 500 steps of DPO and of KD on the toy, and a million prompts and pairs against a run of a few.

    python tests/long_run.py --steps 500 --rows 1000000

Steps: the resident memory of a process, sampled every 10 steps; the growth is that of the last 10 samples' median over
that of the 10 samples after step 100. Rows: each script with --processes (forked from this one, which has imported
everything), once on 16 rows and once on --rows; of each rank the peak of its anonymous memory (RssAnon: the kernel takes
back pages of mapped files at any time). Everything in the scripts runs but what models do with all rows: sampling (every
100th batch of prompts is read instead) and the reference's log-probs. Prints the figures as JSON, in the last line. Exit
status 1 if memory grows by more than the limits below.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets
import torch
from conftest import make_inputs
from workers import fork_ranks, own_rank

import dpo
import kd
import warmup_distill
from lib import runs, training

LIMITS_MB = {"steps": 16.0, "rows": 600.0}  # from step 100 to the end; of all rows over 16 rows
SCRIPTS = {"warmup_distill": warmup_distill, "dpo": dpo, "kd": kd}
FEW = 16  # rows of an empty run
SHARED = "--threads 1 --device cpu --batch-size 8 --micro-batch-size 4 --lr 1e-5"
PROMPTS = f"{SHARED} --template none --max-new-tokens 48 --eval-limit 0"


def memory(field):
    """MB of this process, by a field of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field + ":"))) / 1024


# ---------------------------------------------------------------------------------------------------------------------
# In the measured process
# ---------------------------------------------------------------------------------------------------------------------


def read_prompts(args, world, tokenizer, tokens, prompts, out):
    """In place of `warmup_distill.build_pairs`; it ends the process."""
    size = args.prompts_per_batch
    for k, _ in runs.shards_to_do(out / "pairs", len(prompts) // size, "jsonl", world)[::100]:
        assert len([prompts[i] for i in range(k * size, (k + 1) * size)]) == size
    raise SystemExit(0)


def no_reference(model, pairs, lengths, pad_id, with_shared, micro_batch_size, world):
    """In place of `dpo.reference_logprobs`: its lists, without the forwards."""
    sums = torch.zeros(len(pairs), 3, device=world.device)
    assert len(training.micro_batches(range(len(pairs)), lengths, micro_batch_size, world)) > 0
    torch.distributed.all_reduce(sums)
    return sums.cpu()


def measured(name, argv, file, replace, every):
    """Runs a script and writes {"peak_mb", "samples": [(step, MB)]} to FILE.RANK."""
    found, append, ended = {"peak_mb": 0.0, "samples": []}, runs.append_jsonl, threading.Event()

    def sampled(path, row):
        append(path, row)
        if row["step"] % every == 0:
            found["samples"].append((row["step"], round(memory("VmRSS"), 2)))

    def watch():
        while not ended.wait(0.02):
            found["peak_mb"] = max(found["peak_mb"], round(memory("RssAnon"), 1))

    runs.append_jsonl = sampled
    if replace:
        warmup_distill.build_pairs, dpo.reference_logprobs = read_prompts, no_reference
    threading.Thread(target=watch, daemon=True).start()
    try:
        SCRIPTS[name].main(argv)
    finally:
        ended.set()
        runs.write_json(f"{file}.{own_rank()}", found)


def measure(root, processes, name, argv, replace=False, every=10):
    """A list of what `measured` writes, one for each rank."""
    codes = fork_ranks(processes, functools.partial(measured, name, argv, root / "measured", replace, every))
    assert set(codes) == {0}, codes
    return [runs.read_json(root / f"measured.{rank}") for rank in range(len(codes))]


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def growth(samples, skip=100, count=10):
    """MB by which the last samples are above the first ones after step `skip`; medians of up to `count` samples each."""
    values = [mb for step, mb in samples if step > skip]
    count = max(1, min(count, len(values) // 2))
    return round(statistics.median(values[-count:]) - statistics.median(values[:count]), 2)


def measure_steps(root, steps):
    """{"dpo": {"growth_mb", "samples"}, "kd": ...} on the toy."""
    toy, found, pairs = ROOT / "toy", {}, root / "pairs.jsonl"
    rows = runs.read_jsonl(toy / "train.jsonl")[:200]
    write_rows(pairs, "dpo", ((row["prompt"], row["response"]) for row in rows))
    jobs = {
        "dpo": f"--model {toy}/student --pairs {pairs} {SHARED}",
        "kd": f"--student {toy}/student --teacher {toy}/teacher --data {toy}/train.jsonl --limit 200 {PROMPTS}",
    }
    for name, flags in jobs.items():
        argv = f"{flags} --max-steps {steps} --save-every 50 --out {root}/{name}".split()
        [result] = measure(root, 0, name, argv, every=10 if steps >= 300 else 2)
        found[name] = {"growth_mb": growth(result["samples"], min(100, steps // 2)), "samples": result["samples"]}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def write_rows(path, script, rows):
    """(prompt, response) -> a JSONL file, line by line; dpo's have a response with another first digit, too."""
    with open(path, "w") as file:
        for prompt, response in rows:
            answers = {"response": response}
            if script == "dpo":
                answers = {"chosen": response, "rejected": f"{(int(response[0]) + 1) % 10}{response[1:]}"}
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")


def measure_rows(root, count, processes):
    """[{"script", "rank", "empty_mb", "peak_mb", "above_mb"}]: of each script, each rank."""
    inputs, found = make_inputs(root, 1), []
    student, teacher, file = inputs["student"], inputs["teacher"], root / "rows.jsonl"
    jobs = {
        "warmup_distill": f"--student {student} --teacher {teacher} --data {file} {PROMPTS}",
        "kd": f"--student {student} --kd-rate 0 --data {file} --max-steps 2 {PROMPTS}",
        "dpo": f"--model {student} --pairs {file} --max-steps 2 {SHARED}",
    }
    for script, flags in jobs.items():
        results = []
        for rows in (FEW, count):
            # Of a few tokens and of many; no two alike
            write_rows(file, script, ((f"{i}+{i * 7919 % 1000}:" * (1 + i % 7), str(i)) for i in range(rows)))
            argv = f"{flags} --out {root}/{script}-{rows}".split()
            results.append(measure(root, processes, script, argv, replace=script != "kd"))
        for rank, (empty, full) in enumerate(zip(*results, strict=True)):
            peaks = {"empty_mb": empty["peak_mb"], "peak_mb": full["peak_mb"]}
            above = round(full["peak_mb"] - empty["peak_mb"], 1)
            found.append({"script": script, "rank": rank, **peaks, "above_mb": above})
    return found


def too_much(steps, rows):
    """Lines about what grew by more than its limit."""
    grown = [(name, found["growth_mb"], "steps") for name, found in steps.items()]
    grown += [(f"{row['script']}, rank {row['rank']}", row["above_mb"], "rows") for row in rows]
    return [f"{name}: {mb} MB more over all {what}" for name, mb, what in grown if mb > LIMITS_MB[what]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=500, help="0: none")
    parser.add_argument("--rows", type=int, default=1_000_000, help="prompts and pairs; 0: none")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
        steps = measure_steps(Path(folder), args.steps) if args.steps else {}
        rows = measure_rows(Path(folder), args.rows, args.processes) if args.rows else []
    lines = too_much(steps, rows)
    command = f"python tests/long_run.py --steps {args.steps} --rows {args.rows} --processes {args.processes}"
    result = {"command": command, "commit": runs.git_commit(), "limits_mb": LIMITS_MB, "too_much": lines}
    print(json.dumps(result | {"rows": rows, "steps": steps}))
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
