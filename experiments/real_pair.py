"""Four arms on a real pair, Qwen2.5-Coder 1.5B -> 0.5B Instruct, as far as a CPU reaches: experiments/real_pair.json.

    OMP_NUM_THREADS=1 python experiments/real_pair.py TEACHER STUDENT gsm8k_train.jsonl [SEED...]

24 problems x 8 samples for the warm-up (3 DPO steps of 16 pairs), 64 problems for KD (4 steps of 16), the last 64
problems of the file for the test, up to 512 tokens each: at 256 most of the teacher's responses are cut, and a shorter
student would win by being short. About an hour a seed on one core with AMX, 18 GB of memory, 30 GB of disk; resumes.
The learning rates are larger than the defaults because the steps are so few. They were not tuned.

The calculator's notes of GSM8K, <<48/2=24>>, are left out of all responses: no chat model writes them. Accuracy is
eval.py's (greedy, math-verify); Rouge-L is that of the same greedy responses against the gold solutions.
"""

import re
import subprocess
import sys

import lab
from lab import ROOT

from lib import runs, scoring

OUT, TEST = ROOT / "out/real", 64
MODEL = {"dtype": "bfloat16", "threads": 1}
TRAIN = {"max_prompt_tokens": 384, "batch_size": 16, "micro_batch_size": 4, "activation_checkpointing": True}
TRAIN |= {"data": OUT / "train.jsonl", "max_new_tokens": 256, "save_every": 1000, **MODEL}
WARMUP = {"limit": 24, "samples": 8, "prompts_per_batch": 8, "beta": 0.1, "lr": 5e-6, "max_steps": 3, "eval_limit": 0}
KD = {"limit": 64, "lr": 1e-5}
ARMS = ("warm", "kd", "warm-kd")


def split(rows):
    """(training rows, the last TEST rows); no question of the test is in training, however its spaces are written."""
    question = lambda row: " ".join(row["question"].lower().split())
    rows = [{**row, "answer": re.sub("<<.*?>>", "", row["answer"])} for row in rows]
    held_out = {question(row) for row in rows[-TEST:]}
    return [row for row in rows[:-TEST] if question(row) not in held_out], rows[-TEST:]


def run(script, out, settings):
    """A command of the project, unless its result is there."""
    done = "eval/table.json" if script == "eval" else "student"
    if not (out / done).exists():
        subprocess.run([sys.executable, ROOT / f"{script}.py", *lab.flags({**settings, "out": out})], check=True)


def evaluate(model, out):
    """Greedy responses of `model` to the test: {"accuracy": [0 or 1 a problem], "rouge_l": [0..100 a problem], ...}."""
    test = {"data": f"gsm8k={OUT / 'test.jsonl'}", "max_new_tokens": 512, "batch_size": 64}
    run("eval", out, {"model": model, **test, **MODEL})
    (file,) = (out / "eval").glob("*/gsm8k-seed*.jsonl")
    rows, gold = runs.read_jsonl(file), runs.read_jsonl(OUT / "test.jsonl")
    rouge = [scoring.rouge_l(row["response"], [gold[row["prompt_id"]]["answer"]]) for row in rows]
    scores = {"accuracy": [int(row["score"] > 0) for row in rows], "rouge_l": [round(score, 2) for score in rouge]}
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("tokens", "ended")}
    return scores | {"tokens": round(means["tokens"], 1), "ended": round(means["ended"], 4)}


def main(teacher, student, file, *seeds):
    OUT.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), split(runs.read_jsonl(file))):
        runs.write_jsonl(OUT / f"{name}.jsonl", rows)
    found = {"teacher": evaluate(teacher, OUT / "teacher"), "student": evaluate(student, OUT / "student")}
    for seed in seeds:
        out, settings = OUT / seed, {"teacher": teacher, "seed": seed, **TRAIN}
        run("warmup_distill", out / "warm", {**settings, **WARMUP, "student": student})
        run("kd", out / "warm-kd", {**settings, **KD, "student": out / "warm/student"})
        run("kd", out / "kd", {**settings, **KD, "student": student})
        for arm in ARMS:
            losses = [step["loss"] for step in runs.read_jsonl(out / arm / "metrics.jsonl")]
            steps = {"steps": len(losses), "loss": [round(losses[i], 4) for i in (0, -1)]}
            found[f"{arm}/{seed}"] = evaluate(out / arm / "student", out / arm) | steps
        mismatch = runs.read_json(out / "warm/mismatch.json")
        found[f"warm/{seed}"] |= {key: mismatch[key] for key in ("samples", "replaced", "pairs")}
        head = {
            "record": lab.record("python experiments/real_pair.py", 0),
            "seeds": list(map(int, seeds)),
            "test": TEST,
        }
        lab.write_result("real_pair", head, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
