"""Result files -> the README's tables and the figures in this folder.

    python runs/tables.py                      prints every block, and writes the figures
    python runs/tables.py --check README.md    exits with 1 if a block of the README or a figure is not what the files say
    python runs/tables.py --write README.md    puts the files' numbers into the README's blocks

A block begins with `<!-- runs/NAME.json: TABLE -->` and ends with `<!-- end -->`. Differences are paired by seed; in
brackets their 95% interval, Student's t over seeds. Differences whose interval leaves out 0 are in bold.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

from lab import mean_sd, paired, t_interval

FOLDER = Path(__file__).parent
BUDGETS = ("25", "100", "400")
LOSSES = ("forward_kl", "reverse_kl", "skew_reverse_kl")
LEDGER = ("no warm-up", "default", "nll-0 beta-0.5 lr-0.0005", "nll-0 beta-0.5 lr-0.00025", "nll-1 beta-0.1 lr-0.0005")
LEDGER += ("nll-1 beta-0.5 lr-0.0001", "steps-120", "sft", "replace-after", "teacher-greedy", "samples-2", "samples-16")
LEDGER += ("temperature-0.7", "keep-teacher", "keep-correct", "mean nll-1 beta-0.5", "reference-teacher nll-1")
LEDGER += ("label-smoothing-0.1",)


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


def table(header, rows):
    """Markdown."""
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def source(record, rest):
    """The line under a table that says how it came to be."""
    machine = (
        f"{record['cores']} cores of {record['cpu']}, torch {record['torch']}, transformers {record['transformers']}"
    )
    commit = record["commit"][:7] + (" with scripts not yet committed" if record["commit"].endswith("+") else "")
    return f"\n`{record['command']}`, {rest}; {machine}; commit {commit}, {record['date']}."


# ---------------------------------------------------------------------------------------------------------------------
# The toy's ablation
# ---------------------------------------------------------------------------------------------------------------------


def compared(result, conditions):
    """Rows of condition, loss, budget: KD alone, with the warm-up, and the differences."""
    runs, rows = result["runs"], []
    for condition in conditions:
        for loss in LOSSES:
            for budget in BUDGETS:
                name = lambda start: f"{condition}/{start}/{loss}/{budget}"  # noqa: B023 - used before the next turn
                if name("none") not in runs:
                    continue
                of = {s: runs[name(s)]["accuracy"] for s in ("none", "warm-up", "sft", "none + tokens")}
                cells = [percent(of["none"]), percent(of["warm-up"]), difference(of["warm-up"], of["none"])]
                cells += [difference(of["warm-up"], of[other]) for other in ("none + tokens", "sft")]
                rows.append([condition, loss, budget, *cells])
    return rows


COMPARED = ["KD alone, %", "warm-up + KD, %", "warm-up minus none"]
COMPARED += ["minus KD with the warm-up's tokens", "minus SFT on y+, then KD"]


def ablation_gain(result):
    """Condition gold: the paper's setting."""
    rows = [row[1:] for row in compared(result, ["gold"])]
    return table(["loss", "KD steps", *COMPARED], rows) + "\n" + ablation_source(result, ["gold"])


def ablation_when(result):
    """The other conditions."""
    conditions = [c for c in ("mismatch", "teacher", "student") if c in result["seeds"]]
    names = {"mismatch": "student with half of the facts wrong", "teacher": "no gold responses, KD on the teacher's"}
    names["student"] = "no gold responses, on-policy KD"
    rows = [[f"{names[row[0]]}", *row[1:]] for row in compared(result, conditions)]
    header = ["condition", "loss", "KD steps", *COMPARED]
    return table(header, rows) + "\n" + ablation_source(result, conditions)


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


def ablation_controls(result):
    """What of the warm-up it is that helps: each start before KD, and the warm-up minus it after KD."""
    runs, rows = result["runs"], []
    for start, title in STARTS.items():
        row = [title, percent(runs[f"gold/{start}"]["accuracy"]) if f"gold/{start}" in runs else ""]
        for loss in LOSSES[:2]:
            for budget in BUDGETS[:2]:
                ours, theirs = (runs[f"gold/{s}/{loss}/{budget}"] for s in ("warm-up", start))
                steps = f", {theirs['steps']:.0f} steps" if start.startswith("none +") else ""
                minus = difference(ours["accuracy"], theirs["accuracy"]) + steps
                row.append(f"{percent(ours['accuracy'])} %" if start == "warm-up" else minus)
        rows.append(row)
    columns = (f"{loss}, {budget} steps: warm-up minus this" for loss in LOSSES[:2] for budget in BUDGETS[:2])
    return table(["start", "before KD, %", *columns], rows) + "\n" + ablation_source(result, ["gold"])


def ablation_source(result, conditions):
    """The line under the ablation's tables."""
    seeds = ", ".join(f"{len(result['seeds'][c])} ({c})" for c in conditions)
    return source(result["record"], f"test sets of 500 problems, seeds: {seeds}")


def total_cost(runs, name, key):
    """Cost of a KD run and of what its start had cost. name: condition/start/loss/budget."""
    condition, start = name.split("/")[:2]
    return runs[name][key] + runs.get(f"{condition}/{start}", {}).get(key, 0)


def ablation_cost(result):
    """Accuracy beside what it cost, in thousands of token positions."""
    runs, rows = result["runs"], []
    whose = {"gold": "gold", "teacher": "the teacher's", "student": "the student's (on-policy)"}
    for condition, data in whose.items():
        for budget in BUDGETS:
            for start in ("none", "warm-up", "sft", "none + tokens", "none + teacher tokens"):
                name = f"{condition}/{start}/reverse_kl/{budget}"
                if name in runs:
                    costs = (total_cost(runs, name, key) for key in ("teacher_tokens", "student_tokens"))
                    steps, scores = round(runs[name]["steps"]), percent(runs[name]["accuracy"])
                    rows.append([data, STARTS[start], steps, *(f"{cost / 1000:.0f} k" for cost in costs), scores])
    header = ["responses", "start", "KD steps", "teacher tokens", "student tokens", "accuracy, %"]
    return table(header, rows) + "\n" + ablation_source(result, [c for c in whose if c in result["seeds"]])


def ablation_figure(result):
    """Accuracy against the teacher's tokens, condition gold, reverse KL."""
    runs, lines = result["runs"], {}
    for start in ("none", "warm-up", "sft", "plain"):
        points = []
        for budget in BUDGETS:
            name = f"gold/{start}/reverse_kl/{budget}"
            if name in runs:
                mean, half = t_interval([100 * value for value in runs[name]["accuracy"]])
                points.append((total_cost(runs, name, "teacher_tokens") / 1000, mean, half))
        lines[STARTS[start]] = points
    return chart(lines, "teacher tokens, thousands (warm-up included)", "accuracy after KD, %", log=True)


# ---------------------------------------------------------------------------------------------------------------------
# The other experiments
# ---------------------------------------------------------------------------------------------------------------------


def eta_rates(result):
    """Replacement rates and the place of t*."""
    kinds, rows = list(result["sizes"]), []
    for eta in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0):
        row = [f"{eta:g}"]
        for kind in kinds:
            found = result["runs"][f"{kind}/{eta}"]
            low, middle, high = found["t_star"] or ("-", "-", "-")
            half = 100 * found["half_width"]
            row += [f"{100 * found['samples']:.1f} ± {half:.1f}", f"{100 * found['tokens']:.2f}"]
            row += [f"{100 * found['behind']:.1f}", f"{middle} ({low} to {high})"]
        rows.append(row)
    header = ["eta, nats"]
    for kind in kinds:
        name = {"toy": "toy", "real": "Qwen2.5-Coder 1.5B, 0.5B"}[kind]
        header += [f"{name}: samples replaced, %", "tokens above, %", "tokens from t* on, %", "t*: median (quartiles)"]
    sizes = "; ".join(
        f"{kind}: {s['samples']:,} samples of {s['prompts']} prompts, {s['tokens_a_sample']} tokens a sample, "
        f"{100 * s['at_length_limit']:.0f}% cut at the limit"
        for kind, s in result["sizes"].items()
    )
    return (
        table(header, rows)
        + "\n"
        + source(result["record"], f"± half of the 95% interval, toy: over seeds, real: over prompts; {sizes}")
    )


def eta_accuracy(result):
    """What the threshold does to the toy's student."""
    runs, rows = result["runs"], []
    base = runs["accuracy/4.0"]["after_kd"]
    for name, row in runs.items():
        if name.startswith("accuracy/"):
            eta = float(name.removeprefix("accuracy/"))
            pairs = round(mean_sd(row["pairs"])[0])
            other = difference(row["after_kd"], base) if eta != 4 else ""
            rows.append([f"{eta:g}", pairs, percent(row["accuracy"]), percent(row["after_kd"]), other])
    none = read("dpo_sensitivity")["runs"]["no warm-up"]  # the same dev sets, the same KD
    values = none["accuracy"], none["after_kd"]
    rows.append(["no warm-up", 0, *map(percent, values), difference(values[1], base)])
    header = ["eta, nats", "pairs", "after the warm-up, %", "after KD, %", "after KD, to eta 4"]
    text = f"{len(result['seeds'])} seeds, dev sets; {kd_words(result)}"
    return table(header, rows) + "\n" + source(result["record"], text)


def kd_words(result):
    """Which KD a table's "after KD" is."""
    kd = result["kd"]
    return f"KD: {kd['max_steps']} steps, {kd['loss']}, lr {kd['lr']:g}"


def eta_figure(result):
    """Share of samples that are replaced, against eta."""
    lines = {}
    for kind in result["sizes"]:
        name = {"toy": "toy", "real": "Qwen2.5-Coder 1.5B, 0.5B, GSM8K"}[kind]
        for column, unit in (("samples", "samples"), ("tokens", "tokens")):
            points = []
            for key, row in result["runs"].items():
                if key.startswith(f"{kind}/"):
                    half = 100 * row["half_width"] if column == "samples" else 0
                    points.append((float(key.split("/")[1]), 100 * row[column], half))
            lines[f"{name}: {unit}"] = points
    return chart(lines, "eta, nats", "replaced, %")


def head_start(result):
    """KD alone and after the warm-up at their best learning rates, on the dev sets that these were chosen on."""
    rows = []
    for loss in LOSSES:
        for budget in BUDGETS:
            rates = [result["rates"][start][f"{loss}/{budget}"] for start in ("none", "warm-up")]
            alone, warm = (
                result["runs"][f"{start}/{loss}/{budget}/{rate}"] for start, rate in zip(("none", "warm-up"), rates)
            )
            rows.append([loss, budget, percent(alone), percent(warm), difference(warm, alone)])
    header = ["KD loss", "KD steps", "KD alone, %", "warm-up + KD, %", "difference, points"]
    rates = len({name.split("/")[-1] for name in result["runs"]})
    warmup = " ".join(f"{key} {value:g}" for key, value in result["dpo"]["warm-up"].items())
    text = f"{len(result['seeds'])} seeds, dev sets, learning rates of KD chosen on the same, of {rates} for each cell"
    text += f"; warm-up: {warmup}, the best on the dev sets of 5 seeds, these among them"
    return table(header, rows) + "\n" + source(result["record"], text)


def ledger(result):
    """The README's ledger: one variant for each choice that the paper leaves open."""
    return sensitivity(result, LEDGER)


def sensitivity(result, names=None):
    """DPO's settings, all or those of `names`."""
    runs, rows = result["runs"], []
    base, none = runs["default"], runs["no warm-up"]
    for name, row in ((name, runs[name]) for name in names or runs):
        cells = [percent(row["accuracy"]), percent(row["after_kd"])]
        cells += ["" if row is none else difference(row["after_kd"], none["after_kd"])]
        cells += ["" if row in (none, base) else difference(row["after_kd"], base["after_kd"])]
        rows.append([name, *cells])
    header = ["DPO", "after the warm-up, %", "after KD, %", "after KD, to no warm-up", "after KD, to default"]
    default = " ".join(f"{key} {value:g}" for key, value in result["default"].items())
    text = f"{len(result['seeds'])} seeds, dev sets; default: {default}; {kd_words(result)}"
    return table(header, rows) + "\n" + source(result["record"], text)


def real_pair(result):
    """Four arms on a real pair. Seeds answer the same problems: the mean of a problem over seeds is one value."""
    runs, rows, of = result["runs"], [], {}
    arms = {"teacher": "teacher", "student": "student", "warm": "warm-up", "kd": "KD", "warm-kd": "warm-up + KD"}
    for arm, title in arms.items():
        found = [runs[arm]] if arm in runs else [runs[f"{arm}/{seed}"] for seed in result["seeds"]]
        row = [title, len(found) if arm not in runs else ""]
        for key, scale in (("accuracy", 1), ("rouge_l", 0.01)):
            of[arm, key] = [scale * statistics.fmean(values) for values in zip(*(r[key] for r in found), strict=True)]
            mean, half = t_interval([100 * value for value in of[arm, key]])
            row.append(f"{mean:.1f} ± {half:.1f}")
            base = {"warm": "student", "warm-kd": "kd"}.get(arm)
            row.append(difference(of[arm, key], of[base, key]) if base else "")
        row.append(f"{100 * statistics.fmean(run['ended'] for run in found):.0f}")
        rows.append([*row, f"{statistics.fmean(run['tokens'] for run in found):.0f}"])
    header = ["model", "seeds", "GSM8K accuracy, %", "to without", "Rouge-L", "to without", "finished, %", "tokens"]
    text = (
        f"{result['test']} held-out problems, 512 tokens at most; ± and brackets: 95% over problems, not over seeds; "
        '"to without": minus the same without the warm-up'
    )
    return table(header, rows) + "\n" + source(result["record"], text)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------

COLOURS = ("#4269d0", "#e8743b", "#3ca951", "#8a5fc7")


def chart(lines, x_title, y_title, log=False, width=640, height=360):
    """An SVG line chart. lines: {name: [(x, y, half width of y's interval)]}. y goes from 0 to 100.

    The names stand at the right, below where lines rise and above where they fall.
    """
    left, top, bottom, right = 56, 16, 44, 16
    place = math.log10 if log else float
    xs = [place(x) for points in lines.values() for x, _, _ in points]
    low, high = min(xs), max(xs)
    across = lambda x: left + (place(x) - low) / ((high - low) or 1) * (width - left - right)
    up = lambda y: height - bottom - y / 100 * (height - top - bottom)
    text = lambda x, y, s, more="": f'<text x="{x:.1f}" y="{y:.1f}" {more}>{s}</text>'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    ]
    out.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for y in range(0, 101, 20):
        out.append(f'<path d="M{left} {up(y):.1f}H{width - right}" stroke="#ddd"/>')
        out.append(text(left - 6, up(y) + 4, y, 'text-anchor="end"'))
    ticks = [m * 10**e for e in range(6) for m in (1, 2, 5)] if log else range(11)
    for x in ticks:
        if low <= (place(x) if x else low - 1) <= high:
            out.append(text(across(x), height - bottom + 16, x, 'text-anchor="middle"'))
    out.append(text((left + width - right) / 2, height - 8, x_title, 'text-anchor="middle"'))
    turned = f'text-anchor="middle" transform="rotate(-90 14 {(height - bottom) / 2:.0f})"'
    out.append(text(14, (height - bottom) / 2, y_title, turned))
    rises = sum(points[-1][1] - points[0][1] for points in lines.values()) > 0
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y, _ in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, half in points:
            out.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.5" fill="{colour}"/>')
            if half:
                ends = f"M{across(x):.1f} {up(max(0, y - half)):.1f}V{up(min(100, y + half)):.1f}"
                out.append(f'<path d="{ends}" stroke="{colour}"/>')
        y = height - bottom - 12 - 16 * number if rises else top + 16 * (number + 1)
        out.append(text(width - right - 8, y, name, f'text-anchor="end" fill="{colour}"'))
    return "\n".join([*out, "</svg>"]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of the README
# ---------------------------------------------------------------------------------------------------------------------

TABLES = {
    "toy_ablation": {
        "gain": ablation_gain,
        "controls": ablation_controls,
        "when": ablation_when,
        "cost": ablation_cost,
    },
    "toy_selected": {"head": head_start},
    "eta_sweep": {"rates": eta_rates, "accuracy": eta_accuracy},
    "dpo_sensitivity": {"settings": sensitivity, "ledger": ledger},
    "real_pair": {"arms": real_pair},
}
FIGURES = {"toy_ablation": ablation_figure, "eta_sweep": eta_figure}
BLOCK = re.compile(r"(<!-- runs/(\w+)\.json: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(name):
    """A result file."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def fill(text):
    """A text with all its blocks as the result files have them."""
    block = lambda found: f"{found[1]}{TABLES[found[2]][found[3]](read(found[2]))}\n{found[5]}"
    return BLOCK.sub(block, text)


def figures():
    """{file: SVG} of the results that are there."""
    there = {name: draw for name, draw in FIGURES.items() if (FOLDER / f"{name}.json").exists()}
    return {FOLDER / f"{name}.svg": draw(read(name)) for name, draw in there.items()}


def main(argv):
    match argv:
        case []:
            for name, tables in TABLES.items():
                for kind in tables:
                    if (FOLDER / f"{name}.json").exists():
                        print(fill(f"<!-- runs/{name}.json: {kind} -->\n<!-- end -->"), end="\n\n")
            for file, svg in figures().items():
                file.write_text(svg, encoding="utf-8")
        case ["--write", readme]:
            text = Path(readme).read_text(encoding="utf-8")
            Path(readme).write_text(fill(text), encoding="utf-8")
        case ["--check", readme]:
            text, wrong = Path(readme).read_text(encoding="utf-8"), []
            for found, made in zip(BLOCK.finditer(text), BLOCK.finditer(fill(text)), strict=True):
                if found[0] != made[0]:
                    wrong.append(f"{found[1].strip()} of {readme}")
            wrong += [file.name for file, svg in figures().items() if not file.exists() or file.read_text() != svg]
            if wrong:
                sys.exit(
                    f"error: not what the result files say, {', '.join(wrong)}, run tables.py with --write or alone"
                )
            print(f"{len(BLOCK.findall(text))} blocks and {len(figures())} figures are what the result files say")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
