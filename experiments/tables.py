"""Result files -> the tables of README.md and experiments/README.md, and toy_ablation.svg.

    python experiments/tables.py            puts the files' numbers into the texts' blocks, and draws the figure
    python experiments/tables.py --check    writes nothing; exit status 1 if a block or the figure is not what the files
                                            say, or if a text has a number that no table has. Says what of the code
                                            has changed since a result

A block begins with `<!-- NAME.json: TABLE -->` and ends with `<!-- end -->`. Differences are paired by seed; in
brackets their 95% interval, Student's t over seeds. Differences whose interval leaves out 0 are in bold.

Numbers of a text are those outside of `code` and links: of experiments/README.md's sections, each in a table of its own,
and of the results in README.md, in any table of the two.
"""

import re
import statistics
import subprocess
import sys

import lab
from lab import FOLDER, paired
from toy_ablation import BUDGETS, CONDITIONS, LOSSES, STARTS

from lib import runs
from tools.report import describe

PAGES = (lab.ROOT / "README.md", FOLDER / "README.md")

# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def percent(values):
    """Shares -> "mean ± sd" in percent."""
    mean, sd, _ = describe([100 * value for value in values])
    return f"{mean:.1f} ± {sd or 0:.1f}"


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
    count, made = sum(isinstance(cell, str) and "[" in cell for row in rows for cell in row), []
    text += f"; {count} intervals of 95%, not corrected for their number" if count else ""
    for r in result["records"].values() if "records" in result else [result["record"]]:
        versions = f"torch {r['torch']}, transformers {r['transformers']}"
        made.append(f"{r['cores']} cores of {r['cpu']}, {versions}; commit {r['commit'][:7]}, {r['date']}")
    return f"{markdown(header, rows)}\n`{r['command']}`: {text}; {' and '.join(dict.fromkeys(made))}."


def test_seeds(result):
    counts = sorted({len(seeds) for seeds in result["seeds"].values()})
    return f"{' to '.join(map(str, counts))} test seeds in each condition, test sets of 500 problems"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def ablation_students(result):
    """Before KD: what each condition's student is, what the check finds, and what the warm-up makes of it."""
    rows = []
    for condition in (c for c in CONDITIONS if c in result["seeds"] and c not in ("teacher", "student")):  # gold's
        before, warm = (result["runs"][f"{condition}/{start}"] for start in ("none", "warm-up"))
        row = [CONDITIONS[condition][0], percent(before["accuracy"]), percent(warm["replaced"]), round(warm["pairs"])]
        rows.append([*row, percent(warm["accuracy"]), difference(warm["accuracy"], before["accuracy"])])
    header = ["student", "right, %", "samples with a mismatch, %", "pairs", "right after the warm-up, %", "difference"]
    return table(header, rows, result, test_seeds(result))


def ablation_gain(result):
    """KD alone and with the warm-up, for each condition, loss and budget."""
    results, rows = result["runs"], []
    cells = ((condition, loss, budget) for condition in CONDITIONS for loss in LOSSES for budget in BUDGETS)
    for condition, loss, budget in cells:
        names = {start: f"{condition}/{start}/{loss}/{budget}" for start in STARTS}
        of = {start: results[name] for start, name in names.items() if name in results}
        if of:
            row = [CONDITIONS[condition][0], loss, budget, *(percent(of[s]["accuracy"]) for s in ("none", "warm-up"))]
            for start in ("none", "none + tokens", "none + teacher tokens"):
                steps = f"; {of[start]['steps']:.0f} steps" if start != "none" and start in of else ""
                ours = of["warm-up"]["accuracy"]
                row.append(difference(ours, of[start]["accuracy"]) + steps if start in of else "")
            rows.append(row)
    header = ["student", "loss", "KD steps", "KD alone, %", "warm-up + KD, %", "warm-up minus none"]
    header += ["minus KD with the warm-up's tokens", "minus KD with its teacher tokens"]
    return table(header, rows, result, test_seeds(result))


def ablation_controls(result):
    """What of the warm-up it is that helps: each start before KD, and the warm-up minus it after KD."""
    results, rows = result["runs"], []
    columns = [f"{loss}/{budget}" for loss in LOSSES for budget in BUDGETS]
    for start in (start for start in STARTS if not start.startswith("none +")):
        row = [STARTS[start], percent(results[f"gold/{start}"]["accuracy"])]
        for column in columns:
            ours, theirs = (results[f"gold/{s}/{column}"]["accuracy"] for s in ("warm-up", start))
            row.append(f"{percent(ours)} %" if start == "warm-up" else difference(ours, theirs))
        rows.append(row)
    header = ["start", "before KD, %"]
    header += [f"{column.replace('/', ', ')} steps: warm-up minus this" for column in columns]
    return table(header, rows, {"record": result["records"]["gold"]}, test_seeds(result))


def effect(result):
    """toy_ablation.svg: after 25 steps of KD, what the warm-up gains at equal steps and at equal tokens, 95% intervals."""
    x, parts, height = lambda points: 520 + 5 * points, [], 44 * len(result["seeds"]) + 70
    for points in range(-40, 41, 20):
        parts.append(f'<path d="M{x(points)} 40V{height - 34}" stroke="{"#ccc" if points else "#000"}"/>')
        parts.append(f'<text x="{x(points)}" y="{height - 16}" text-anchor="middle">{points}</text>')
    for k, condition in enumerate(c for c in CONDITIONS if c in result["seeds"]):
        parts.append(f'<text x="310" y="{44 * k + 64}" text-anchor="end">{CONDITIONS[condition][0]}</text>')
        for y, start, colour in ((44 * k + 54, "none", "#0072b2"), (44 * k + 68, "none + tokens", "#d55e00")):
            arms = (result["runs"][f"{condition}/{s}/reverse_kl/25"]["accuracy"] for s in ("warm-up", start))
            mean, half = paired(*([100 * value for value in arm] for arm in arms))
            ends = f"M{x(mean - half):.1f} {y}H{x(mean + half):.1f}"
            parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{x(mean):.1f}" cy="{y}" r="3" fill="{colour}"/>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="740" height="{height}" font-family="sans-serif" font-size="13">'
    title = "Warm-up + 25 KD steps (reverse KL) minus KD alone, points: "
    key = '<tspan fill="#0072b2">above, same steps</tspan>; <tspan fill="#d55e00">below, same tokens</tspan></text>'
    white = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, white, f'<text x="20" y="24">{title}{key}', *parts, "</svg>\n"])


def samples_of(result):
    """What a table of mismatch.py is of."""
    sizes, group = result["sizes"], "seed" if result["outs"] > 1 else "prompt"
    text = f"{sizes['samples']:,} samples of {sizes['prompts']:,} prompts, {sizes['tokens']:,} tokens"
    return f"{text}, {100 * sizes['cut']:.0f}% of the samples cut at the limit; ± half of the 95% interval, by {group}"


def share(found, digits=1, scale=100):
    """A mean of mismatch.py in percent, with half of its interval."""
    return " ± ".join(f"{scale * found[key]:.{digits}f}" for key in ("mean", "half"))


def by_eta(result):
    """Replacement rates and the place of t*."""
    header, rows = ["eta, nats", "samples replaced, %", "tokens above, %", "tokens from t* on, %"], []
    for eta in ("0.5", "1", "2", "3", "4", "5", "6", "8", "10"):
        found = result["runs"]["eta"][eta]
        low, middle, high = found["t_star"] or ("-", "-", "-")
        row = [eta, share(found["samples"]), f"{100 * found['tokens']:.2f}", f"{100 * found['behind']:.1f}"]
        rows.append([*row, f"{middle} ({low} to {high})"])
    return table([*header, "t*: median (quartiles)"], rows, result, samples_of(result))


def by_token(result):
    """Where, and on which kinds of tokens, the margin is above eta; left out is what only one group has."""
    found = sorted(result["runs"]["token"].items(), key=lambda item: (len(item[0]), item[0]))
    rows = [[name, f"{of['count']:,}", share(of, 2)] for name, of in found if of["half"] is not None]
    return table(["tokens", "how many", f"above eta {result['eta']:g}, %"], rows, result, samples_of(result))


def by_answer(result):
    """Is what the teacher writes better?"""
    found = result["runs"]["right"].items()
    rows = [[name, f"{of['y']['count']:,}", *map(share, of.values())] for name, of in found]
    header = ["samples", "", "y right, %", "y+ right, %", "y+ minus y, points", "only y right, %", "only y+ right, %"]
    return table(header, rows, result, samples_of(result))


def by_student(result):
    """Students on the same held-out prompts, and each minus the first."""
    rows = []
    for name, of in result["runs"].items():
        cells = ((found, (3, 1) if what == "KL(q, p)" else ()) for what, pair in of.items() for found in pair)
        rows.append([name, *(share(found, *form) for found, form in cells)])
    header = ["student", "KL(q, p), nats a token", "minus the first", "samples > eta 4, %", "minus the first"]
    header += ["right, %", "minus the first"]
    return table(header, rows, result, samples_of(result))


def sensitivity(result):
    """DPO's settings."""
    results, rows = result["runs"], []
    base, none = results["default"], results["no warm-up"]
    for name, row in results.items():
        cells = [name, percent(row["accuracy"]), percent(row["after_kd"])]
        cells.append("" if row is none else difference(row["after_kd"], none["after_kd"]))
        rows.append([*cells, "" if row in (none, base) else difference(row["after_kd"], base["after_kd"])])
    header = ["DPO", "after the warm-up, %", "after KD, %", "after KD, to no warm-up", "after KD, to default"]
    default, kd = " ".join(f"{key} {value:g}" for key, value in result["default"].items()), result["kd"]
    text = f"{len(result['seeds'])} seeds, dev sets; default: {default}; KD: {kd['max_steps']} steps, {kd['loss']}"
    return table(header, rows, result, f"{text}, lr {kd['lr']:g}")


def speed(lines):
    """bench/: seconds and GiB of this project and of each peer, run in turn: median (minimum to maximum)."""
    rows = []
    for line in lines:
        args, (ours, *peers) = line["args"], line["stages"]
        work = [line["bench"], *(str(args[name]) for name in ("loss", "tokens") if name in args)]
        for stage, [unit] in line["stages"][ours][0].items():
            middle, cells = {}, {}
            for kind, found in line["stages"].items():
                values = [run[stage][unit] for run in found]
                middle[kind] = statistics.median(values)
                cells[kind] = f"{middle[kind]:.3g} ({min(values):.3g} to {max(values):.3g})"
            for kind in peers:
                ratio = f"{middle[kind] / middle[ours]:.2f}"
                rows.append([", ".join(work), f"{stage}, {unit}", cells[ours], kind, cells[kind], ratio])
    return markdown(["bench", "stage", "ours", "peer", "theirs", "theirs over ours"], rows)


def growth(lines):
    """Sampling by this project alone, one run each: tokens a second, and what the decoding holds beside the model."""
    rows = []
    for line in (x for x in lines if x["bench"] == "sampling" and x["stages"].keys() == {"ours"}):
        args, [run] = line["args"], line["stages"]["ours"]
        row = [args["prompts"] * args["samples"], args["prompt_length"], args["vocab"] or 49152]
        speed, memory = row[0] * args["max_new_tokens"] / run["equal"]["s"], run["memory"]["GiB"]
        rows.append([*row, f"{speed:.0f}", f"{memory:.2f}"])
    return markdown(["rows", "prompt, tokens at most", "vocabulary", "tokens/s", "GiB"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------

TABLES = {
    "toy_ablation": {"students": ablation_students, "gain": ablation_gain, "controls": ablation_controls},
    **{of: {"eta": by_eta, "token": by_token, "answer": by_answer} for of in ("mismatch_toy", "mismatch_real")},
    "mismatch_held_out": {"student": by_student},
    "dpo_sensitivity": {"settings": sensitivity},
    "bench": {"all": speed, "growth": growth},
}
NUMBER = re.compile(r"(?:(?<!\w)[+-])?\d+(?:[.,]\d+)*")
NOT_TEXT = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->", re.DOTALL)  # code, links, comments
BLOCK = re.compile(r"(<!-- (?:experiments/)?(\w+)\.jsonl?: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(name):
    """A result file; bench.jsonl has a line for each run of a benchmark."""
    return runs.read_jsonl(FOLDER / "bench.jsonl") if name == "bench" else runs.read_json(FOLDER / f"{name}.json")


def fill(text):
    """A text with all its blocks as the result files have them."""
    block = lambda found: f"{found[1]}{TABLES[found[2]][found[3]](read(found[2]))}\n{found[5]}"
    return BLOCK.sub(block, text)


def loose_numbers(text, tables):
    """The numbers of `text` outside of tables that no table of `tables`, a text, has. Without a sign, any sign is right."""
    cells = " ".join(line for found in BLOCK.finditer(tables) for line in found[4].split("\n") if line.startswith("|"))
    there = {number for found in NUMBER.findall(cells) for number in (found, found.lstrip("+-"))}
    return [number for number in NUMBER.findall(NOT_TEXT.sub("", BLOCK.sub("", text))) if number not in there]


def changed_since(commit, name):
    """The files that are not those of a commit, of the code that made the result `name`."""
    code = [":(glob)*.py", "lib", "toy", "experiments/bench" if name == "bench" else ":(glob)experiments/*.py"]
    command = ["git", "-C", str(lab.ROOT), "diff", "--name-only", commit, "--", *code, ":!experiments/tables.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "unknown, it is not in this checkout" if done.returncode else ", ".join(done.stdout.split()) or "nothing"


def main(argv):
    figure, drawn, texts = FOLDER / "toy_ablation.svg", effect(read("toy_ablation")), []
    for page in PAGES:
        texts.append(page.read_text(encoding="utf-8"))
        if "--check" not in argv:
            page.write_text(fill(texts[-1]), encoding="utf-8")
            figure.write_text(drawn, encoding="utf-8")
        elif fill(texts[-1]) != texts[-1] or figure.read_text(encoding="utf-8") != drawn:
            sys.exit(f"error: {page} is not what the result files say, run tables.py without --check")
    readme, page = texts
    parts = [(section, section) for section in re.split("\n(?=## )", page)[1:]]
    parts.append((readme.partition("\n## Results\n")[2].partition("\n## ")[0], readme + page))
    loose = [number for text, tables in parts for number in loose_numbers(text, tables)]
    if loose and "--check" in argv:
        sys.exit(f"error: numbers that no table has, in the texts, take them from a table: {', '.join(loose)}")
    print(f"{sum(len(BLOCK.findall(text)) for text in texts)} tables and their texts are what the result files say")
    for name in TABLES:
        result = read(name)
        records = result if name == "bench" else result.get("records", {"": result.get("record")}).values()
        for commit in dict.fromkeys(record["commit"] for record in records):
            print(f"{name}: {commit[:7]}, changed since: {changed_since(commit, name)}")


if __name__ == "__main__":
    main(sys.argv[1:])
