"""The files of runs/real_pair.sh: problems in, runs/real_pair.json out.

    python runs/real_pair.py split gsm8k_train.jsonl    -> out/real/train.jsonl, out/real/test.jsonl
    python runs/real_pair.py collect                    what is finished -> runs/real_pair.json

The calculator's notes of GSM8K, <<48/2=24>>, are left out of all responses: no chat model writes them. Accuracy is
eval.py's (greedy, math-verify); Rouge-L is that of the same greedy responses against the gold solutions.
"""

import re
import sys

import lab
from lab import ROOT

import common
import scores

RESULT, FOLDER = ROOT / "runs/real_pair.json", ROOT / "out/real"
TEST = 64
ARMS = ("warm", "kd", "warm-kd")


def split(rows):
    """(training rows, the last TEST rows); no question of the test is left in training, in any other spelling of spaces."""
    question = lambda row: " ".join(row["question"].lower().split())
    rows = [{**row, "answer": re.sub("<<.*?>>", "", row["answer"])} for row in rows]
    test = rows[-TEST:]
    held_out = {question(row) for row in test}
    return [row for row in rows[:-TEST] if question(row) not in held_out], test


def scored(folder):
    """{"accuracy": [0 or 1 a problem], "rouge_l": [0..100 a problem], "tokens": mean length, "ended": share} of one OUT."""
    (file,) = (folder / "eval").glob("*/gsm8k-seed*.jsonl")
    rows = common.read_jsonl(file)
    gold = [row["answer"] for row in common.read_jsonl(FOLDER / "test.jsonl")]
    return {
        "accuracy": [int(row["score"] > 0) for row in rows],
        "rouge_l": [round(scores.rouge_l(row["response"], [gold[row["prompt_id"]]]), 2) for row in rows],
        "tokens": round(sum(row["tokens"] for row in rows) / len(rows), 1),
        "ended": round(sum(row["ended"] for row in rows) / len(rows), 4),
    }


def collect():
    """Writes the seeds of which all arms are finished."""
    runs, seconds = {}, 0
    for name in ("teacher", "student"):
        runs[name] = scored(FOLDER / name)
    whole = lambda folder: all((folder / arm / "eval/table.json").exists() for arm in ARMS)
    seeds = sorted(int(folder.name) for folder in FOLDER.iterdir() if whole(folder))
    for seed in seeds:
        for arm in ARMS:
            run = FOLDER / str(seed) / arm
            runs[f"{arm}/{seed}"] = row = scored(run)
            steps = common.read_jsonl(run / "metrics.jsonl")
            row["steps"] = len(steps)
            row["loss"] = [round(steps[i]["loss"], 4) for i in (0, -1)]
            seconds += sum(step["seconds"] for step in steps)
            if run.name == "warm":
                mismatch = common.read_json(run / "mismatch.json")
                row |= {key: mismatch[key] for key in ("samples", "replaced", "pairs")}
    head = {"record": lab.record("real_pair", seconds), "seeds": seeds, "test": TEST}
    lab.write_result(RESULT, head, runs)


def main(argv):
    match argv:
        case ["split", file]:
            FOLDER.mkdir(parents=True, exist_ok=True)
            for name, rows in zip(("train", "test"), split(common.read_jsonl(file))):
                common.write_jsonl(FOLDER / f"{name}.jsonl", rows)
        case ["collect"]:
            collect()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
