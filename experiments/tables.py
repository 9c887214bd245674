"""Result files -> the tables of experiments/README.md.

    python experiments/tables.py experiments/README.md            puts the files' numbers into the text's blocks
    python experiments/tables.py --check experiments/README.md    exit status 1 if a block is not what the files say

A block begins with `<!-- NAME.json: TABLE -->` and ends with `<!-- end -->`. Differences are paired by seed; in
brackets their 95% interval, Student's t over seeds. Differences whose interval leaves out 0 are in bold.
"""

import json
import re
import statistics
import sys
from pathlib import Path

from lab import FOLDER, mean_sd, paired

from lib import runs

BUDGETS = ("25", "100", "400")
LOSSES = ("forward_kl", "reverse_kl", "skew_reverse_kl")
PEER_LOSSES = ("forward_kl", "reverse_kl", "jsd")  # of bench/kd_loss.py
SPLIT = {"sampling": ("equal", "unequal"), "splice": ("check", "splice")}  # stages of bench/ that the README has
CONDITIONS = {
    "gold": "gold responses",
    "mismatch": "gold, half of the facts wrong",
    "teacher": "the teacher's responses",
    "student": "the student's (on-policy)",
}
STARTS = {
    "none": "student: KD alone",
    "warm-up": "warm-up (DPO + NLL)",
    "plain": "warm-up, plain DPO",
    "sft": "SFT on y+ of the same pairs",
    "no-splice": "y+ all the teacher's, every sample",
    "no-splice-same": "y+ all the teacher's, samples with a mismatch",
    "random": "spliced at a random position",
    "none + time": "KD alone, with the warm-up's CPU time",
    "none + tokens": "KD alone, with the warm-up's tokens",
    "none + teacher tokens": "KD alone, with the warm-up's teacher tokens",
}

# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def percent(values):
    """Shares -> "mean ± sd" in percent."""
    mean, sd = mean_sd([100 * value for value in values])
    return f"{mean:.1f} ± {sd:.1f}"


def difference(after, before):
    """Paired shares -> "+1.2 [0.3, 2.1]" in points."""
    mean, half = paired([100 * value for value in after], [100 * value for value in before])
    text = f"{mean:+.1f} [{mean - half:.1f}, {mean + half:.1f}]"
    return f"**{text}**" if abs(mean) > half else text


def markdown(header, rows):
    """A table, and an empty line."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(["| " + " | ".join(map(str, line)) + " |" for line in lines]) + "\n"


def table(header, rows, result, text):
    """Markdown, with a line that says how the table came to be."""
    record = result["record"]
    machine = f"{record['cores']} cores of {record['cpu']}, torch {record['torch']}"
    commit = record["commit"][:7] + (
        " with scripts not yet committed" if record["commit"].endswith(("+", "-dirty")) else ""
    )
    made = f"`{record['command']}`, {text}; {machine}, transformers {record['transformers']}; commit {commit}"
    return f"{markdown(header, rows)}\n{made}, {record['date']}."


def test_seeds(result):
    seeds = ", ".join(f"{len(seeds)} ({condition})" for condition, seeds in result["seeds"].items())
    return f"test sets of 500 problems, seeds: {seeds}"


def dev_seeds(result, text=""):
    """Of a table on dev sets; which KD its "after KD" is."""
    kd = result["kd"]
    kd = f"KD: {kd['max_steps']} steps, {kd['loss']}, lr {kd['lr']:g}"
    return f"{len(result['seeds'])} seeds, dev sets{text}; {kd}"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def ablation_gain(result):
    """KD alone and with the warm-up, for each condition, loss and budget."""
    results, rows = result["runs"], []
    cells = ((condition, loss, budget) for condition in CONDITIONS for loss in LOSSES for budget in BUDGETS)
    for condition, loss, budget in cells:
        names = {s: f"{condition}/{s}/{loss}/{budget}" for s in ("none", "warm-up", "sft", "none + tokens")}
        if names["none"] in results:
            of = {start: results[name]["accuracy"] for start, name in names.items()}
            minus = [difference(of["warm-up"], of[other]) for other in ("none", "none + tokens", "sft")]
            rows.append([CONDITIONS[condition], loss, budget, percent(of["none"]), percent(of["warm-up"]), *minus])
    header = ["KD on", "loss", "KD steps", "KD alone, %", "warm-up + KD, %", "warm-up minus none"]
    header += ["minus KD with the warm-up's tokens", "minus SFT on y+, then KD"]
    return table(header, rows, result, test_seeds(result))


def ablation_controls(result):
    """What of the warm-up it is that helps: each start before KD, and the warm-up minus it after KD."""
    results, rows = result["runs"], []
    columns = [f"{loss}/{budget}" for loss in LOSSES[:2] for budget in BUDGETS[:2]]
    starts = {start: title for start, title in STARTS.items() if f"gold/{start}/{columns[0]}" in results}
    for start, title in starts.items():
        row = [title, percent(results[f"gold/{start}"]["accuracy"]) if f"gold/{start}" in results else ""]
        for column in columns:
            ours, theirs = (results[f"gold/{s}/{column}"] for s in ("warm-up", start))
            steps = f", {theirs['steps']:.0f} steps" if start.startswith("none +") else ""
            minus = difference(ours["accuracy"], theirs["accuracy"]) + steps
            row.append(f"{percent(ours['accuracy'])} %" if start == "warm-up" else minus)
        rows.append(row)
    header = ["start", "before KD, %"]
    header += [f"{column.replace('/', ', ')} steps: warm-up minus this" for column in columns]
    return table(header, rows, result, test_seeds(result))


def ablation_cost(result):
    """Accuracy beside what it cost, in thousands of token positions: KD's, and those of what came before it."""
    results, rows = result["runs"], []
    starts = ("none", "warm-up", "sft", "none + tokens", "none + teacher tokens")
    cells = ((c, budget, s) for c in ("gold", "teacher", "student") for budget in BUDGETS for s in starts)
    for condition, budget, start in cells:
        found, before = results.get(f"{condition}/{start}/reverse_kl/{budget}"), results.get(f"{condition}/{start}", {})
        if found:
            costs = [found[key] + before.get(key, 0) for key in ("teacher_tokens", "student_tokens")]
            row = [CONDITIONS[condition], STARTS[start], round(found["steps"])]
            rows.append([*row, *(f"{cost / 1000:.0f} k" for cost in costs), percent(found["accuracy"])])
    header = ["KD on", "start", "KD steps", "teacher tokens", "student tokens", "accuracy, %"]
    return table(header, rows, result, f"reverse_kl, {test_seeds(result)}")


def eta_rates(result):
    """Replacement rates and the place of t*."""
    header, rows, sizes = ["eta, nats"], [], []
    names = {"toy": "toy", "real": "Qwen2.5-Coder 1.5B, 0.5B"}
    for kind, size in result["sizes"].items():
        header += [f"{names[kind]}: samples replaced, %", "tokens above, %", "tokens from t* on, %"]
        header += ["t*: median (quartiles)"]
        text = f"{kind}: {size['samples']:,} samples of {size['prompts']} prompts, {size['tokens_a_sample']} tokens a"
        sizes.append(f"{text} sample, {100 * size['at_length_limit']:.0f}% cut at the limit")
    for eta in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0):
        row = [f"{eta:g}"]
        for kind in result["sizes"]:
            found = result["runs"][f"{kind}/{eta}"]
            low, middle, high = found["t_star"] or ("-", "-", "-")
            row += [f"{100 * found['samples']:.1f} ± {100 * found['half_width']:.1f}", f"{100 * found['tokens']:.2f}"]
            row += [f"{100 * found['behind']:.1f}", f"{middle} ({low} to {high})"]
        rows.append(row)
    text = f"± half of the 95% interval, toy: over seeds, real: over prompts; {'; '.join(sizes)}"
    return table(header, rows, result, text)


def eta_accuracy(result):
    """What the threshold does to the toy's student."""
    found = {name.split("/")[1]: row for name, row in result["runs"].items() if name.startswith("accuracy/")}
    base, rows = found["4.0"]["after_kd"], []
    found["no warm-up"] = read("dpo_sensitivity")["runs"]["no warm-up"] | {"pairs": [0]}  # same dev sets, same KD
    for eta, row in found.items():
        cells = [round(statistics.fmean(row["pairs"])), percent(row["accuracy"]), percent(row["after_kd"])]
        rows.append([eta.removesuffix(".0"), *cells, difference(row["after_kd"], base) if eta != "4.0" else ""])
    header = ["eta, nats", "pairs", "after the warm-up, %", "after KD, %", "after KD, to eta 4"]
    return table(header, rows, result, dev_seeds(result))


def sensitivity(result):
    """DPO's settings."""
    results, rows = result["runs"], []
    base, none = results["default"], results["no warm-up"]
    for name, row in results.items():
        cells = [name, percent(row["accuracy"]), percent(row["after_kd"])]
        cells.append("" if row is none else difference(row["after_kd"], none["after_kd"]))
        rows.append([*cells, "" if row in (none, base) else difference(row["after_kd"], base["after_kd"])])
    header = ["DPO", "after the warm-up, %", "after KD, %", "after KD, to no warm-up", "after KD, to default"]
    default = " ".join(f"{key} {value:g}" for key, value in result["default"].items())
    return table(header, rows, result, dev_seeds(result, f"; default: {default}"))


def medians(line, stage):
    """Of a line of bench.jsonl: {kind: median}, this project first."""
    return {
        kind: statistics.median(*zip(*(run[stage].values() for run in found))) for kind, found in line["stages"].items()
    }


def speed(lines):
    """bench/: seconds and GiB of this project and of each peer, run in turn: median (minimum to maximum)."""
    rows = []
    for line in lines:
        args, (ours, *peers) = line["args"], line["stages"]
        work = [line["bench"], *(str(args[name]) for name in ("loss", "tokens") if name in args)]
        work += ["page faults"] if args["page_faults"] else []
        for stage, [unit] in line["stages"][ours][0].items():
            middle, cells = medians(line, stage), {}
            for kind, found in line["stages"].items():
                values = [run[stage][unit] for run in found]
                cells[kind] = f"{middle[kind]:.3g} ({min(values):.3g} to {max(values):.3g})"
            for kind in peers:
                ratio = f"{middle[kind] / middle[ours]:.2f}"
                rows.append([", ".join(work), f"{stage}, {unit}", cells[ours], kind, cells[kind], ratio])
    return markdown(["bench", "stage", "ours", "peer", "theirs", "theirs over ours"], rows)


def growth(lines):
    """Sampling by this project alone: tokens a second, and what the decoding holds beside the model."""
    rows = []
    for line in lines:
        args = line["args"]
        if line["stages"].keys() == {"ours"} and line["bench"] == "sampling":
            count, seconds = args["prompts"] * args["samples"], medians(line, "equal")["ours"]
            speed, memory = count * args["max_new_tokens"] / seconds, medians(line, "memory")["ours"]
            rows.append([count, args["prompt_length"], args["vocab"] or 49152, f"{speed:.0f}", f"{memory:.2f}"])
    return markdown(["rows", "prompt, tokens at most", "vocabulary", "tokens/s", "GiB"], rows)


def speed_in_short(lines):
    """The README's table: a peer's median over ours; of several peers the best."""

    def over(bench, stage, *peers, **options):
        of_bench = (x for x in lines if x["bench"] == bench and len(x["stages"]) > 1 and not x["args"]["page_faults"])
        [line] = [line for line in of_bench if options.items() <= line["args"].items()]
        ours, *theirs = (value for kind, value in medians(line, stage).items() if kind in ("ours", *peers) or not peers)
        return f"{min(theirs) / ours:.2f}"

    kd = lambda stage: ", ".join(over("kd_loss", stage, tokens=512, loss=x) for x in PEER_LOSSES)
    chunked = over("kd_loss", "memory", "trl-chunked", tokens=512, loss="forward_kl")
    wide = [over("kd_loss", stage, tokens=2048) for stage in ("step", "memory")]
    both = [over("dpo_step", stage, "trl-compact") for stage in ("step 2", "memory")]
    sampling, splice = ([over(name, s) for s in stages] for name, stages in SPLIT.items())
    rows = [
        ["sampling, equal and unequal lengths", "`generate`", ", ".join(sampling), "1.5, 2.5"],
        ["check, splice", "forward over whole rows, `generate`", ", ".join(splice), "1.6"],
        ["DPO step; memory", "TRL, its head on labels alone", "; ".join(both), "1.4; 2"],
        ["KD, 512 tokens: forward KL, reverse KL, JSD", "the fastest: Liger", kd("step"), "1"],
        ["KD, 512 tokens, forward KL: memory", "TRL, chunked", chunked, "0.95"],
        ["KD, 2,048 tokens, forward KL; memory", "TRL, chunked", "; ".join(wide), "4; 1.5"],
        ["samples to warmed-up student", "`generate` and TRL", over("pipeline", "all"), "3"],
    ]
    return markdown(["work", "peer", "theirs / ours", "aim"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------

TABLES = {
    "toy_ablation": {"gain": ablation_gain, "controls": ablation_controls, "cost": ablation_cost},
    "eta_sweep": {"rates": eta_rates, "accuracy": eta_accuracy},
    "dpo_sensitivity": {"settings": sensitivity},
    "bench": {"all": speed, "short": speed_in_short, "growth": growth},
}
BLOCK = re.compile(r"(<!-- (?:experiments/)?(\w+)\.jsonl?: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(name):
    """A result file; bench.jsonl has a line for each run of a benchmark."""
    if name == "bench":
        return runs.read_jsonl(FOLDER / "bench.jsonl")
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def fill(text):
    """A text with all its blocks as the result files have them."""
    block = lambda found: f"{found[1]}{TABLES[found[2]][found[3]](read(found[2]))}\n{found[5]}"
    return BLOCK.sub(block, text)


def main(argv):
    text = Path(argv[-1]).read_text(encoding="utf-8")
    if "--check" not in argv:
        Path(argv[-1]).write_text(fill(text), encoding="utf-8")
    elif fill(text) != text:
        sys.exit(f"error: {argv[-1]} is not what the result files say, run tables.py without --check")
    print(f"{argv[-1]}: {len(BLOCK.findall(text))} tables are what the result files say")


if __name__ == "__main__":
    main(sys.argv[1:])
