"""One self-contained HTML page about a run, made for auditing: OUT/report.html.

    python -m tools.report out/warmup                the samples token by token, the mismatch, the curves, the results
    python -m tools.report out/warmup out/warmup-2   two runs side by side; the page is written into the first

The page needs no network and no server. This file gathers what the run's files hold into one JSON value, in fewer
bytes than the files have, and puts it into report_template.html, whose script draws only the sample in view.
Text of models and data is never markup: it leaves here as JSON without `<`, `>` and `&`, the script writes it with
textContent, and the page's content security policy admits the template's own scripts and styles by hash and nothing else.

If a run has more than --max-samples samples, an even choice is embedded, and the page says how many are left out.
"""

import base64
import hashlib
import html
import json
import math
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

from lib import models, runs
from lib.runs import UserError

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_SAMPLES, MAX_STEPS = 10_000, 2_000  # embedded at most: samples of a run, points of a curve
UNIT = 10_000  # log-probs are embedded as whole numbers of 1e-4 nats, which is what the files hold
STATUSES = ("kept", "untouched", "identical", "duplicate", "filtered")
CURVES = "loss dpo_loss nll margin wins chosen_reward rejected_reward chosen_logp rejected_logp ce kd grad_norm lr"
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # in byte-level BPE these bytes stand for themselves
BYTE_OF = {chr(b): b for b in BYTES} | {chr(256 + k): b for k, b in enumerate(sorted(set(range(256)) - set(BYTES)))}


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
    Raises one of BAD_SHAPE if the record is not a sample.
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
    """What one token id stands for, readable on its own: its text, or its bytes if it is a part of a character."""
    piece = None
    with suppress(Exception):  # tokenizers differ in what they raise for an id that is none of theirs
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:  # no such id
        return f"⟨{token}⟩"
    if "▁" in piece:  # sentencepiece: decoding one id alone loses the space before it
        return piece.replace("▁", " ")
    if "\ufffd" not in text:
        return text
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):  # sentencepiece's way to write a byte
        return f"⟨{piece[3:5]}⟩"
    return "⟨" + " ".join(f"{BYTE_OF[c]:02X}" for c in piece) + "⟩" if BYTE_OF.keys() >= set(piece) else piece


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
    """metrics.jsonl -> the number of steps, and a column for each curve, thinned out evenly to MAX_STEPS points."""
    rows = runs.read_jsonl(path) if path.exists() else []
    if not rows:
        return None
    every = math.ceil(len(rows) / MAX_STEPS)
    kept = rows[::every] + (rows[-1:] if (len(rows) - 1) % every else [])  # the last step is always there
    with reading("a file", f"in {path}"):
        columns = {name: [number(row.get(name)) for row in kept] for name in CURVES.split()}
        steps, stage = [int(row["step"]) for row in kept], str(kept[-1].get("stage", ""))
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    if "nll" not in columns:
        columns.pop("dpo_loss", None)  # it is the loss
    return {"stage": stage, "every": every, "step": steps, "columns": columns}


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
    """table.json or compare.json -> one row a model and set, and one a comparison."""
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
# The page
# ---------------------------------------------------------------------------------------------------------------------


def gather(out, max_samples, tokenizer=None):
    """All that the page says about one run. Raises UserError if OUT holds nothing to report on."""
    out = Path(out)
    if not out.is_dir():
        raise UserError("OUT is not a folder", f"at {out}", "give the folder of a run")
    evaluations = [read_part(out / "eval" / name, shape_eval) for name in ("table.json", "compare.json")]
    run = {"mismatch": read_part(out / "mismatch.json", shape_mismatch), "metrics": read_metrics(out / "metrics.jsonl")}
    run |= {"summary": read_part(out / "summary.json", shape_summary), "eval": [e for e in evaluations if e]}
    run["samples"] = read_samples(out, max_samples, tokenizer)
    if not any(run.values()):
        what = "nothing to report (no pairs, metrics.jsonl, mismatch.json, summary.json or eval)"
        raise UserError(what, f"in {out}", "give the folder of a run that has got further")
    run |= {"name": out.resolve().name, "path": str(out), **read_args(out)}
    if run["mismatch"]:
        run["eta"] = run["mismatch"]["eta"]
    return run


def escape_json(value):
    """JSON that can stand inside <script>: no `<`, `>`, `&`, and ASCII alone, so no U+2028 and no lone surrogate either."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(gathered):
    """The page about one or two runs, text. The template's {{POLICY}}, {{TITLE}} and {{DATA}} are filled in one pass."""
    # The template says in one line that it is the template: a page is none
    template = re.sub('<p id="template">.*?</p>\n', "", TEMPLATE.read_text(encoding="utf-8"))
    sources = {}
    for tag in ("script", "style"):
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        sources[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}"
    policy += "; base-uri 'none'; form-action 'none'"
    title = html.escape(" and ".join(run["name"] for run in gathered) + " - Warmup-Distill report")
    title = title.encode("utf-8", "xmlcharrefreplace").decode()  # the name of a folder need not be UTF-8
    parts = {"POLICY": policy, "TITLE": title, "DATA": escape_json({"unit": UNIT, "runs": gathered})}
    return re.sub(r"\{\{(POLICY|TITLE|DATA)\}\}", lambda match: parts[match[1]], template)


def write_report(out, other=None, max_samples=MAX_SAMPLES, tokenizer=None):
    """Writes OUT/report.html about the run in `out`, beside that in `other` if given. Returns the path.

    tokenizer: of the samples; None: the one that is found with each run.
    """
    gathered = [gather(folder, max_samples, tokenizer) for folder in (out, other) if folder is not None]
    path = Path(out) / "report.html"
    try:
        runs.write_atomic(path, render(gathered))
    except OSError as error:
        raise UserError(f"the report cannot be written ({runs.one_line(error)})", f"at {path}", "check the folder")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = runs.ArgumentParser(__doc__)
    parser.prog = "python -m tools.report"
    parser.add_argument("out", help="folder of a run; the page is OUT/report.html")
    parser.add_argument("other", nargs="?", help="folder of a second run, to be shown beside the first")
    parser.add_argument("--max-samples", type=runs.COUNT, default=MAX_SAMPLES, help="the most samples of one run")
    args = parser.parse_args(argv)
    path = write_report(args.out, args.other, args.max_samples)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    runs.run(main)
