"""One self-contained HTML page about any number of runs, made for auditing: OUT/report.html, in the first run's folder.

    python -m tools.report out/warmup                       the samples token by token, the mismatch, the curves, the results
    python -m tools.report out/seed-*/kd out/seed-*/warm    arms: runs whose folders have the same name are one arm's seeds
    python -m tools.report out/a out/b --figures figures    its curves and arms as SVG and PNG files, too, for a paper

The page needs no network and no server. This file gathers what the runs' files hold into one JSON value, in fewer
bytes than the files have, and puts it into report_template.html, whose script draws only the sample in view.
Text of models and data is never markup: it leaves here as JSON without `<`, `>` and `&`, the script writes it with
textContent, and the page's content security policy admits the template's own scripts and styles by hash and nothing else.

If a run has more than --max-samples samples, an even choice is embedded, and the page says how many are left out.
What is counted as tokens: `spending`.
"""

import base64
import hashlib
import html
import inspect
import json
import math
import re
import statistics
from contextlib import suppress
from functools import cache
from itertools import cycle, groupby, islice
from pathlib import Path

from transformers import AutoTokenizer

from lib import data, models, runs, scoring
from lib.runs import UserError

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_SAMPLES, MAX_STEPS = 10_000, 2_000  # embedded at most: samples of a run, points of a curve
UNIT = 10_000  # log-probs are embedded as whole numbers of 1e-4 nats, which is what the files hold
STATUSES = ("kept", "untouched", "identical", "duplicate", "filtered")
# The charts of metrics.jsonl: title, unit, the stage they are of (None: any), and {name in the file: name on the page}
CURVES = (
    ("Loss of DPO", "nats", "dpo", {"loss": "loss", "dpo_loss": "DPO loss", "nll": "NLL a token"}),
    ("Loss of KD", "nats a token", "kd", {"loss": "loss", "ce": "CE", "kd": "KD"}),
    ("Reward margin", "β nats", None, {"margin": "margin"}),
    ("Wins: the chosen response has the higher reward", "share of pairs", None, {"wins": "wins"}),
    ("Rewards", "β nats", None, {"chosen_reward": "chosen y+", "rejected_reward": "rejected y−"}),
    ("Log-probability of the pairs", "nats", None, {"chosen_logp": "log π(y+)", "rejected_logp": "log π(y−)"}),
    ("Gradient norm, before clipping", "norm", None, {"grad_norm": "norm"}),
    ("Learning rate", "learning rate", None, {"lr": "rate"}),
)
DASHES = ((), (7, 4), (2, 3))  # a chart's first, second, third quantity; a color is an arm
AXES = {"step": "optimizer steps", "student": "student's tokens", "teacher": "teacher's tokens"}
# A trained student: the folder of its run, and the step if it was saved on the way
STUDENT = re.compile(r"(.+)/student(?:s/step-(\d+))?/?", re.DOTALL)
# 97.5% quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145]
T_QUANTILES += [2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045]


def t_quantile(df):
    """The 97.5% quantile of Student's t; beyond the table 1.96 + 2.42 / df, right to 0.002."""
    return T_QUANTILES[df - 1] if df <= len(T_QUANTILES) else 1.96 + 2.42 / df


def reading(what, where):
    """Raises UserError if what the block reads is not in the form that this project writes."""
    return runs.reading(f"not {what} of this project", where, "restore or delete the file")


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def lines_of(files):
    """Yields (line, where it is) of all files. Lines are not parsed here: of a large run only some are wanted."""
    for path in files:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line, f"in {path} line {number}"


def read_samples(out, max_samples, tokenizer=None):
    """The samples of OUT/pairs as columns for the page, or None if there are none.

    The token numbers and log-probs of a sample are one string, which the page splits when the sample is looked at.
    """
    files = sorted((out / "pairs").glob("*.jsonl"))
    total = sum(1 for _ in lines_of(files))
    if total == 0:
        return None
    shown = min(total, max_samples)
    wanted = {k * total // shown for k in range(shown)}
    rows, statuses = [], {status: number for number, status in enumerate(STATUSES)}
    prompts, vocabulary = {}, {}  # prompt id: (its number in the page, its text); token id: its number in the page
    for position, (line, where) in enumerate(lines_of(files)):
        if position not in wanted:
            continue
        with reading("a sample", where):
            record = json.loads(line)
            row = pack_record(record, vocabulary)
            prompt_id, text, status = int(record["prompt_id"]), str(record["prompt"]), str(record["status"])
        row["status"] = statuses.setdefault(status, len(statuses))
        row["prompt"], _ = prompts.setdefault(prompt_id, (len(prompts), text))
        rows.append(row)
    if tokenizer is None:
        tokenizer = load_tokenizer(out)
    has_text = tokenizer is not None
    texts = [token_text(tokenizer, token) if has_text else f"⟨{token}⟩" for token in vocabulary]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"total": total, "statuses": list(statuses)}
    columns["prompts"] = [[prompt_id, text] for prompt_id, (_, text) in prompts.items()]
    return columns | {"ids": list(vocabulary), "vocabulary": texts, "has_text": has_text}


def pack_record(record, vocabulary):
    """One line of OUT/pairs/NNNNN.jsonl -> its columns.

    vocabulary: {token id: number}; new ids are added to it. `ends`: 1 if y- ends by EOS, plus 2 if y+ does.
    Raises an error if the record is not a sample.
    """
    response, t, prefix = record["response_ids"], record["t_star"], record["prefix_len"]
    chosen, chosen_logprobs = record["chosen_ids"], whole(record["chosen_teacher_logprobs"])
    student, teacher = whole(record["student_logprobs"]), whole(record["teacher_logprobs"])
    if not len(response) == len(student) == len(teacher) or len(chosen) != len(chosen_logprobs):
        raise ValueError("ids and log-probs are not equally many")
    if not (-1 <= t < len(response) and 0 <= prefix <= len(response) and chosen[:prefix] == response[:prefix]):
        raise ValueError("t_star or prefix_len does not fit the response")
    rest = chosen[prefix:]  # y+ shares y_<prefix with y-: its rest is enough
    response, rest = ([vocabulary.setdefault(int(i), len(vocabulary)) for i in ids] for ids in (response, rest))
    margins = [q - p for q, p in zip(student, teacher)]
    fields = (response, student, teacher, rest, chosen_logprobs[prefix:])
    tokens = ";".join(" ".join(map(str, field)) for field in fields)
    ends = bool(record["ended"]) + 2 * bool(record["chosen_ended"])
    row = {"sample": int(record["sample_id"]), "t": int(t), "prefix": int(prefix), "ends": ends, "tokens": tokens}
    return row | {"margin": margins[t] if t >= 0 else None, "top": max(margins, default=None)}


def whole(logprobs):
    """Log-probs in nats -> whole numbers of 1e-4 nats; -inf, the log of 0, becomes a number that the page knows."""
    return [round(max(value, -1e5) * UNIT) for value in logprobs]


def load_tokenizer(out):
    """The run's tokenizer from OUT/student, or from the student it began with; None if neither is on this machine.

    It must be the one the pairs were made with: a page for auditing shows ids rather than another tokenizer's text.
    """
    fingerprint = None
    for line, where in islice(lines_of(out.glob("pairs.jsonl")), 1):  # none, if the run kept no pair
        with reading("a pair", where):
            fingerprint = json.loads(line)["tokenizer"]
    for name in (str(out / "student"), str(read_args(out)["args"].get("student"))):
        with suppress(Exception):  # the next folder may have it
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
            known = len(tokenizer) > len(tokenizer.all_special_ids)
            if known and fingerprint in (None, models.tokenizer_fingerprint(tokenizer)):
                return tokenizer
    return None


def token_text(tokenizer, token):
    """What one token id stands for, readable on its own: its text, or as the vocabulary has it if it is no character."""
    piece = None
    with suppress(Exception):  # tokenizers differ in what they raise for an id that is none of theirs
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # no such id
        return f"⟨{token}⟩"
    # sentencepiece: decoding one id alone loses the space before it
    return piece.replace("▁", " ") if "▁" in piece else f"⟨{piece}⟩" if "\ufffd" in text else text


# ---------------------------------------------------------------------------------------------------------------------
# The other files of a run
# ---------------------------------------------------------------------------------------------------------------------


def read_part(path, shape):
    """`shape` of the JSON value in the file `path`, or None if there is no such file."""
    if not path.exists():
        return None
    with reading("a file", f"in {path}"):
        return shape(runs.read_json(path))


def read_args(out):
    """What OUT/args.json says, or in a folder of eval.py OUT/eval/args.json."""
    path = out / "args.json" if (out / "args.json").exists() else out / "eval" / "args.json"
    found = read_part(path, shape_args)
    return shape_args({"args": {}}) if found is None else found


def shape_args(value):
    """args.json -> {part: {name: text}}, the commit as text, and eta, or None if it is no number."""
    parts = {"args": value["args"]} | {key: value.get(key, {}) for key in ("versions", "inputs", "code")}
    texts = {key: {str(name): str(one) for name, one in part.items()} for key, part in parts.items()}
    commit, eta = str(value.get("commit")), value["args"].get("eta")
    return texts | {"commit": commit, "eta": number(eta) if isinstance(eta, int | float) else None}


def number(value):
    """A number of at most 6 digits; None, a gap in a curve, for one that is missing, infinite or not a number."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def read_metrics(path):
    """metrics.jsonl -> its stage, and a column for the steps and each curve, thinned out evenly to MAX_STEPS points."""
    rows = runs.read_jsonl(path) if path.exists() else []
    if not rows:
        return None
    every = math.ceil(len(rows) / MAX_STEPS)
    kept = rows[::every] + (rows[-1:] if (len(rows) - 1) % every else [])  # the last step is always there
    with reading("a file", f"in {path}"):
        names = [name for *_, curves in CURVES for name in curves]
        columns = {name: [number(row.get(name)) for row in kept] for name in names}
        steps, stage = [int(row["step"]) for row in kept], str(kept[-1].get("stage", ""))
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    if "nll" not in columns:
        columns.pop("dpo_loss", None)  # it is the loss
    return {"stage": stage, "every": every, "columns": {"step": steps, **columns}}


@cache  # 12 runs may have begun with one
def spending(out):
    """Tokens are positions that a model computes, over all processes. Counted are, for each run:
    - Training: `tokens` in metrics.jsonl, prompts and padding included, for the student; the same for the teacher where
      it reads what the student is trained on (kd.py with --kd-rate above 0).
    - A warm-up's samples, in OUT/pairs: prompts and responses, for the student, which writes them, and for the teacher,
      which checks them; for the teacher its continuations, too. A run of dpo.py has those of the run that made its pairs.
    - Responses that kd.py has written: with --mode teacher for the teacher, in each run that uses them (--responses);
      with --mode student for the student.
    - With --teacher-cache the teacher's one reading of each example, in each run that uses it.
    - All that was spent on the student that the run began with, if a run made it.
    - Not counted: the reference model's one pass over DPO's pairs, the prompts of kd.py's written responses, evaluations,
      work that was lost when a run was killed.
    - A gap: the files do not say. So with --on-policy below 1 for the student, and where the samples or examples are
      gone, or what the run began with is gone or has changed.

    The text above is on the page. Returns {step: (the student's, the teacher's)}, summed up to that step, 0: before
    training, nan: a gap; and the folder of the run before, or None.
    """
    with reading("a run", f"in {out}"):
        found, gap = read_part(out / "args.json", dict) or {"args": {}}, math.nan
        args, inputs = found["args"], found.get("inputs", {})
        unchanged = lambda path: runs.fingerprint(path) == inputs.get(path)
        match = STUDENT.fullmatch(str(args.get("student", args.get("model"))))
        before = Path(match[1]) if match else None
        if before and before.exists() and not (before / "args.json").exists():
            before = None  # no run's, such as toy/student
        spent = {0: (0, 0) if args else (gap, gap)}
        if before:
            earlier = spending(before)[0] if unchanged(match[0]) else {}
            spent[0] = earlier.get(int(match[2] or max(earlier, default=0)), (gap, gap))
        student, teacher = spent[0]
        if "samples" in args or ("pairs" in args and Path(args["pairs"]).parent != before):  # else counted above
            source = Path(args["pairs"]).parent if "pairs" in args and unchanged(args["pairs"]) else out
            files = list(source.glob("pairs/*.jsonl"))
            for record in (json.loads(line) for line, _ in lines_of(files)):
                # The samples of a prompt share its cache
                both = len(record["prompt_ids"]) * (record["sample_id"] == 0) + len(record["response_ids"])
                student += both
                teacher += both + len(record["chosen_ids"]) - record["prefix_len"]
            student, teacher = (student, teacher) if files else (gap, gap)
        if args.get("mode") == "teacher":
            folder = Path(args.get("responses") or out / "responses")
            written = [len(json.loads(line)["response_ids"]) for line, _ in lines_of(folder.glob("*.jsonl"))]
            teacher += sum(written) if written else gap
        if args.get("teacher_cache"):
            file = out / "examples.arrow"
            examples = data.open_arrow(file) if file.exists() else []
            teacher += sum(len(row["ids"] + row["response"]) - 1 for row in examples) if len(examples) else gap
        reads = int(args.get("kd_rate", 0) > 0 and not args.get("teacher_cache"))
        samples = (1 if args["on_policy"] == 1 else gap) if args.get("mode") == "student" else 0
        spent = {0: (student, teacher)}
        for row in runs.read_jsonl(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []:
            student += row.get("tokens", gap) + samples * row.get("response_tokens", 0)
            teacher += row.get("tokens", gap) * reads
            spent[int(row["step"])] = (student, teacher)
    return spent, before


def read_measured(out, args, evaluations, spent):
    """The scores of the run's own students in OUT/eval/table.json, as columns step, student, teacher (`spending`), and
    one a set. OUT/student is the last step's; so is the one model in a folder of eval.py alone. None if there is no such score.
    """
    rows, found = {}, [row for table in evaluations for row in table["rows"]]
    alone = not (out / "args.json").exists() and len({row["model"] for row in found}) == 1
    for row in found:
        match = STUDENT.fullmatch(row["model"])
        if alone or (match and (match[1] == args.get("out") or Path(match[1]).resolve() == out.resolve())):
            step = max(spent) if alone or not match[2] else int(match[2])
            student, teacher = map(number, spent.get(step, (None, None)))
            rows.setdefault(step, {"step": step, "student": student, "teacher": teacher})
            rows[step][f"{row['set']}, {scoring.TITLES.get(row['metric'], row['metric'])}"] = row["mean"]
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {"columns": {name: [rows[step].get(name) for step in sorted(rows)] for name in names}} if rows else None


def shape_mismatch(value):
    """mismatch.json -> counts, replacement rates and histograms as lists of numbers."""
    rates = value["replacement_rate"].items()
    rates = sorted((float(eta), number(rate["samples"]), number(rate["tokens"])) for eta, rate in rates)
    edges = [float(edge) for edge in value["margin_histogram"]["edges"]]
    margins = [int(count) for count in value["margin_histogram"]["counts"]]
    if len(margins) != len(edges) + 1 or not all(math.isfinite(x) for x in [*edges, *(rate[0] for rate in rates)]):
        raise ValueError("margin_histogram or replacement_rate is not complete")
    counts = {name: count for name, count in value.items() if type(count) is int and name != "eta"}
    dropped = {str(reason): int(count) for reason, count in value["dropped"].items()}
    t_star = sorted((int(t), int(count)) for t, count in value["t_star_histogram"].items())
    histograms = {"margins": {"edges": edges, "counts": margins}, "t_star": t_star}
    return {"eta": number(value["eta"]), "counts": counts, "dropped": dropped, "rates": rates} | histograms


def shape_summary(value):
    """summary.json -> the rows of the closing table: {name: {column: number}}."""
    return {str(name): {str(key): number(cell) for key, cell in row.items()} for name, row in value.items()}


def shape_eval(value):
    """table.json -> one row a model and set, and one a comparison."""
    rows, compared = [], value.get("compare")
    for model, results in value["models"].items():
        for name, s in results["sets"].items():
            row = {"model": str(model), "set": str(name), "metric": str(s["metric"]), "seeds": len(s["seeds"])}
            rows.append(row | {key: number(s.get(key)) for key in ("mean", "std", "examples", "unfinished", "skipped")})
    sets = compared["sets"] if compared else {}
    columns = ("difference", "low", "high", "share", "examples")
    comparisons = [{"set": str(name)} | {key: number(c[key]) for key in columns} for name, c in sets.items()]
    pair = [str(compared["a"]), str(compared["b"])] if compared else []
    return {"rows": rows, "pair": pair, "comparisons": comparisons}


# ---------------------------------------------------------------------------------------------------------------------
# Runs, arms, charts
# ---------------------------------------------------------------------------------------------------------------------


def gather(out, max_samples, tokenizer=None):
    """All that the page says about one run. Raises UserError if OUT holds nothing to report on."""
    out = Path(out)
    if not out.is_dir():
        raise UserError("OUT is not a folder", f"at {out}", "give the folder of a run")
    evaluation = read_part(out / "eval/table.json", shape_eval)
    run = {"mismatch": read_part(out / "mismatch.json", shape_mismatch), "metrics": read_metrics(out / "metrics.jsonl")}
    run |= {"summary": read_part(out / "summary.json", shape_summary), "eval": [evaluation] if evaluation else []}
    run["samples"] = read_samples(out, max_samples, tokenizer)
    if not any(run.values()):
        what = "nothing to report (no pairs, metrics.jsonl, mismatch.json, summary.json or eval)"
        raise UserError(what, f"in {out}", "give the folder of a run that has got further")
    run |= {"name": out.resolve().name, "path": str(out), **read_args(out)}
    if run["mismatch"]:
        run["eta"] = run["mismatch"]["eta"]
    spent, before = spending(out)
    with reading("a run", f"in {out}"):
        run["measured"] = read_measured(out, run["args"], run["eval"], spent)
        run |= {"spent": list(map(number, spent[max(spent)])), "before": before and str(before)}
        accuracy = (run["summary"] or {}).get("student after", {}).get("accuracy")
        of_training = " on training prompts" if run["args"].get("eval_data") == "None" else ""
        score = None if accuracy is None else number(100 * accuracy)
        run["scores"] = {} if score is None else {f"closing table, accuracy{of_training}": score}
    if run["measured"] and run["measured"]["columns"]["step"][-1] == max(spent):  # the student as it is at the end
        last = {name: column[-1] for name, column in run["measured"]["columns"].items() if name not in AXES}
        run["scores"] |= {name: score for name, score in last.items() if score is not None}
    return run


def describe(values):
    """n values -> mean, standard deviation (n - 1), half width of the mean's 95% interval, t s / sqrt(n).

    The interval takes the values as independent and about normal. None where there are too few, or one is None.
    """
    n = len(values)
    if n == 0 or None in values:
        return None, None, None
    if n == 1:
        return number(values[0]), None, None
    sd = statistics.stdev(values)
    return number(statistics.fmean(values)), number(sd), number(t_quantile(n - 1) * sd / math.sqrt(n))


def arms_of(gathered):
    """A row for each metric and arm. Runs whose folders have one name are an arm's seeds; the first is the baseline.

    difference, half: of the score's differences to the baseline, seed by seed, over the `pairs` seeds that both have.
    Scores are 0 to 100; student, teacher: tokens of a run, the mean. Raises UserError if an arm has a seed twice.
    """
    arms, rows = {}, []
    for run in gathered:
        other = arms.setdefault(run["name"], {}).setdefault(run["args"].get("seed"), run)
        if other is not run:
            what = f"two runs have the same name and the same seed, {run['args'].get('seed')}"
            raise UserError(what, f"in {other['path']} and {run['path']}", "leave one out or rename its folder")
    for metric in dict.fromkeys(name for run in gathered for name in run["scores"]) or [None]:
        base = None
        for arm, seeds in arms.items():
            scores = {seed: run["scores"][metric] for seed, run in seeds.items() if metric in run["scores"]}
            base = scores if base is None else base
            paired = [scores[seed] - base[seed] for seed in scores if seed in base and base is not scores]
            row = {"metric": metric, "arm": arm, "values": list(scores.values()), "pairs": len(paired)}
            row["mean"], row["sd"], _ = describe(row["values"])
            row["difference"], _, row["half"] = describe(paired)
            student, teacher = zip(*(run["spent"] for run in seeds.values()))
            rows.append(row | {"student": describe(student)[0], "teacher": describe(teacher)[0]})
    return rows


def panels_of(gathered):
    """The charts of curves, for the page and the figures. Each is of columns run[of]["columns"]: one for x, and one for
    each of its lines (number of the run, column, dash, name).
    """
    sets = dict.fromkeys(name for run in gathered if run["measured"] for name in run["measured"]["columns"])
    charts = [("metrics", title, "step", *rest) for title, *rest in CURVES]
    charts += [("measured", name, x, "score", None, {name: ""}) for name in sets if name not in AXES for x in AXES]
    panels = []
    for of, title, x, unit, stage, names in charts:
        found = [(k, run[of]) for k, run in enumerate(gathered) if run[of] and stage in (None, run[of].get("stage"))]
        apart = len(found) > 3 and len(names) > 1  # many runs: a chart for each quantity
        for dash, (column, name) in enumerate(names.items()):
            if apart or dash == 0:
                words = f"{title}: {name}" if apart else title
                panels.append({"of": of, "title": words, "x": x, "y": unit, "lines": []})
            for k, columns in ((k, part["columns"]) for k, part in found):
                if any(None not in point for point in zip(columns[x], columns.get(column, ()))):
                    panels[-1]["lines"].append((k, column, dash, name))
    return [panel for panel in panels if panel["lines"]]


# ---------------------------------------------------------------------------------------------------------------------
# The page, the figures
# ---------------------------------------------------------------------------------------------------------------------


def escape_json(value):
    """JSON that can stand inside <script>: no `<`, `>`, `&`, and ASCII alone, so no U+2028 and no lone surrogate either."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(gathered):
    """The page about the runs, text. The template's {{POLICY}}, {{TITLE}} and {{DATA}} are filled in one pass."""
    # The template says in one line that it is the template: a page is none
    template = re.sub('<p id="template">.*?</p>\n', "", TEMPLATE.read_text(encoding="utf-8"))
    sha = lambda body: base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    policy = "default-src 'none'; base-uri 'none'; form-action 'none'"
    for tag in ("script", "style"):
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        policy += f"; {tag}-src " + " ".join(f"'sha256-{sha(body)}'" for body in bodies)
    names = " and ".join(run["name"] for run in gathered) if len(gathered) < 3 else f"{len(gathered)} runs"
    title = html.escape(f"{names} - Warmup-Distill report")
    title = title.encode("utf-8", "xmlcharrefreplace").decode()  # the name of a folder need not be UTF-8
    data = {"unit": UNIT, "dashes": DASHES, "axes": AXES, "spending": inspect.getdoc(spending).split("\n\n")[0]}
    data |= {"runs": gathered, "arms": arms_of(gathered), "panels": panels_of(gathered)}
    parts = {"POLICY": policy, "TITLE": title, "DATA": escape_json(data)}
    return re.sub(r"\{\{(POLICY|TITLE|DATA)\}\}", lambda match: parts[match[1]], template)


def write_figures(gathered, folder):
    """The page's curves and arms as SVG and PNG files in `folder`, in the page's light colors. Needs matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        raise UserError("matplotlib is not installed", "for --figures", "pip install matplotlib") from None
    colors = re.findall(r"--series\d+: light-dark\((#\w+)", TEMPLATE.read_text(encoding="utf-8"))
    color = dict(zip(dict.fromkeys(run["name"] for run in gathered), cycle(colors)))
    charts = []  # title, x and y axis; lines: (arm, name, dash, xs, ys, standard deviation of ys)
    for panel in panels_of(gathered):
        lines = []
        for k, column, dash, name in panel["lines"]:
            columns = gathered[k][panel["of"]]["columns"]
            lines.append((gathered[k]["name"], name, dash, columns[panel["x"]], columns[column], None))
        charts.append((panel["title"], AXES[panel["x"]], panel["y"], lines))
    for metric, rows in groupby(arms_of(gathered), lambda row: row["metric"]):
        lines = [(row["arm"], "", 0, [at], [row["mean"]], row["sd"]) for at, row in enumerate(rows) if row["values"]]
        charts += [(f"{metric}, mean and SD", "arms", "score", lines)] if lines else []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 8}):
        for number, (title, x, y, lines) in enumerate(charts):
            figure = Figure(figsize=(5, 2.6), layout="constrained")
            axes, labels = figure.subplots(), {}
            for arm, name, dash, xs, ys, sd in lines:
                style = {"color": color[arm], "linestyle": (0, DASHES[dash]), "marker": "" if name else "."}
                labels[runs.printable(f"{arm} {name}")] = axes.errorbar(xs, ys, sd, capsize=3, linewidth=1, **style)
            axes.set(title=runs.printable(title), xlabel=x, ylabel=y)
            axes.xaxis.set_major_formatter("" if x == "arms" else EngFormatter(sep=""))
            figure.legend(labels.values(), labels.keys(), loc="outside right upper")  # the seeds of an arm: one entry
            for ending in ("svg", "png"):
                name = re.sub(r"\W+", "-", f"{number:02d} {title} {x}".lower())[:80]
                figure.savefig(folder / f"{name}.{ending}", dpi=200)


def write_report(*outs, max_samples=MAX_SAMPLES, tokenizer=None, figures=None):
    """Writes OUT/report.html about the runs in the folders `outs` into the first. Returns the path.

    tokenizer: of the samples; None: the one that is found with each run. figures: a folder for `write_figures`.
    """
    spending.cache_clear()
    gathered = [gather(out, max_samples, tokenizer) for out in outs]
    path, page = Path(outs[0]) / "report.html", render(gathered)
    if figures:
        write_figures(gathered, figures)
    with runs.reading("the report cannot be written", f"at {path}", "check the folder"):
        runs.write_atomic(path, page)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = runs.ArgumentParser(__doc__)
    parser.prog = "python -m tools.report"
    parser.add_argument("outs", nargs="+", metavar="OUT", help="folders of runs; the page is report.html in the first")
    parser.add_argument("--max-samples", type=runs.COUNT, default=MAX_SAMPLES, help="the most samples of one run")
    parser.add_argument("--figures", metavar="DIR", help="write the curves and arms there, too, as SVG and PNG")
    args = parser.parse_args(argv)
    path = write_report(*args.outs, max_samples=args.max_samples, figures=args.figures)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    runs.run(main)
