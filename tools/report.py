"""One self-contained HTML page about a run, made for auditing: OUT/report.html.

    python report.py out/warmup                the samples token by token, the mismatch, the curves, the results
    python report.py out/warmup out/warmup-2   two runs side by side; the page is written into the first

The page needs no network and no server. This file gathers what the run's files hold into one JSON value, in fewer
bytes than the files have, and puts it into the template report.html, whose script draws the visible sample alone.
Text of models and data is never markup: it leaves here as JSON without `<`, `>` and `&`, the script writes it with
textContent, and the page's content security policy admits the template's own scripts and styles by hash and nothing else.

Of a run with more than --max-samples samples an even choice is embedded, and the page says how many are left out.
"""

import base64
import hashlib
import html
import json
import math
import re
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

import common
import models
from common import UserError, check_range

TEMPLATE = Path(__file__).with_name("report.html")
MAX_SAMPLES, MAX_STEPS = 10_000, 2_000  # embedded at most: samples of a run, points of a curve
UNIT = 10_000  # log-probs are embedded as whole numbers of 1e-4 nats, which is what the files hold
STATUSES = ("kept", "untouched", "identical", "duplicate", "filtered", "too_long")
CURVES = "loss dpo_loss nll margin accuracy chosen_reward rejected_reward chosen_logp rejected_logp ce kd grad_norm lr"
BAD_SHAPE = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # of byte-level BPE: these stand for themselves
BYTE_OF = {chr(b): b for b in BYTES} | {chr(256 + k): b for k, b in enumerate(sorted(set(range(256)) - set(BYTES)))}

# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


def lines_of(files):
    """Yields (line, where it is) of all files; not parsed, since of a large run only some are wanted."""
    for path in files:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line, f"in {path} line {number}"


def read_samples(out, max_samples, tokenizer):
    """The samples of OUT/pairs for the page, columns rather than rows, or None where there are none.

    Each sample's token numbers and log-probs are one string, which the page takes apart when the sample is looked at.
    """
    files = sorted((out / "pairs").glob("*.jsonl"))
    total = sum(1 for _ in lines_of(files))
    if total == 0:
        return None
    shown = min(total, max_samples)
    wanted = {k * total // shown for k in range(shown)}
    columns = {name: [] for name in ("prompt", "sample", "status", "t", "prefix", "margin", "top", "ends", "tokens")}
    statuses, prompts, vocabulary = list(STATUSES), {}, {}  # prompt_id -> (number, text or ids); token id -> number
    for position, (line, where) in enumerate(lines_of(files)):
        if position not in wanted:
            continue
        try:
            record = json.loads(line)
            row, status = pack_record(record, vocabulary), str(record["status"])
            prompt = prompts.setdefault(int(record["prompt_id"]), [len(prompts), None])
            prompt[1] = prompt[1] or record.get("prompt") or record.get("prompt_ids")
        except BAD_SHAPE as error:
            what = f"not a sample of this project ({type(error).__name__}: {common.one_line(error)})"
            raise UserError(what, where, "delete the file and run warmup_distill.py again")
        if status not in statuses:
            statuses.append(status)
        row |= {"prompt": prompt[0], "status": statuses.index(status)}
        for name, column in columns.items():
            column.append(row[name])
    if tokenizer is None:
        tokenizer = load_tokenizer(out)
    return {
        **columns,
        "total": total,
        "statuses": statuses,
        "prompts": [[prompt_id, text] for prompt_id, text in prompt_texts(out, prompts, tokenizer).items()],
        "vocabulary": [token_text(tokenizer, token) if tokenizer else f"⟨{token}⟩" for token in vocabulary],
        "ids": list(vocabulary),
        "has_text": tokenizer is not None,
    }


def pack_record(record, vocabulary):
    """One line of OUT/pairs/NNNNN.jsonl -> its columns. A prompt that was too long has no response.

    vocabulary: token id -> number, is added to. `ends`: 1 if y- ends by EOS, plus 2 if y+ does.
    """
    if "response_ids" not in record:
        return {"sample": -1, "t": -1, "prefix": 0, "margin": None, "top": None, "ends": 0, "tokens": ";;;;"}
    response, t, prefix = record["response_ids"], record["t_star"], record["prefix_len"]
    chosen, chosen_logprobs = record["chosen_ids"], whole(record["chosen_teacher_logprobs"])
    student, teacher = whole(record["student_logprobs"]), whole(record["teacher_logprobs"])
    if not len(response) == len(student) == len(teacher) or len(chosen) != len(chosen_logprobs):
        raise ValueError("ids and log-probs are not equally many")
    if not (-1 <= t < len(response) and 0 <= prefix <= len(response) and chosen[:prefix] == response[:prefix]):
        raise ValueError("t_star or prefix_len does not fit the response")
    places = lambda ids: [vocabulary.setdefault(int(i), len(vocabulary)) for i in ids]
    margins = [q - p for q, p in zip(student, teacher)]
    # y+ shares y_<prefix with y-: the rest of it is enough
    fields = (places(response), student, teacher, places(chosen[prefix:]), chosen_logprobs[prefix:])
    return {
        "sample": int(record["sample_id"]),
        "t": int(t),
        "prefix": int(prefix),
        "margin": margins[t] if t >= 0 else None,
        "top": max(margins, default=None),
        "ends": bool(record.get("ended")) + 2 * bool(record.get("chosen_ended")),
        "tokens": ";".join(" ".join(map(str, field)) for field in fields),
    }


def whole(logprobs):
    """Log-probs in nats -> whole numbers of 1e-4 nats; -inf, the log of 0, becomes a number that the page knows."""
    return [round(max(value, -1e5) * UNIT) for value in logprobs]


def prompt_texts(out, prompts, tokenizer):
    """{prompt_id: text}: from the record, else from pairs.jsonl, else decoded from ids, else None.

    prompts: {prompt_id: (number, text, or ids, or None)}, in order of the numbers.
    """
    texts = {prompt_id: found if isinstance(found, str) else None for prompt_id, (_, found) in prompts.items()}
    if None in texts.values() and (out / "pairs.jsonl").exists():
        for pair in common.read_jsonl(out / "pairs.jsonl"):  # runs from before the records had their prompt
            if isinstance(pair, dict) and pair.get("prompt") and texts.get(pair.get("prompt_id"), "") is None:
                texts[pair["prompt_id"]] = str(pair["prompt"])
    for prompt_id, (_, found) in prompts.items():
        if texts[prompt_id] is None and isinstance(found, list) and tokenizer is not None:
            texts[prompt_id] = "".join(token_text(tokenizer, token) for token in found)
    return texts


def load_tokenizer(out):
    """The run's tokenizer from OUT/student, or from the student it began with; None if neither is on this machine.

    It must be the one the pairs were made with: a page for auditing shows ids rather than another tokenizer's text.
    """
    first = [parse_json(*line) for line in islice(lines_of(out.glob("pairs.jsonl")), 1)]
    fingerprint = first[0].get("tokenizer") if first else None
    for name in (str(out / "student"), str(read_args(out)["args"].get("student"))):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
            known = len(tokenizer) > len(tokenizer.all_special_ids)
            if known and fingerprint in (None, models.tokenizer_fingerprint(tokenizer)):
                return tokenizer
        except models.LOAD_ERRORS:
            continue
    return None


def token_text(tokenizer, token):
    """What one token id stands for, readable on its own: its text, or its bytes where it is a part of a character."""
    try:
        piece = tokenizer.convert_ids_to_tokens(token)
        text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    except (*models.LOAD_ERRORS, TypeError, OverflowError, IndexError):
        piece = None
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


def parse_json(text, where):
    """A JSON object. Raises UserError where it is none."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"not JSON ({common.one_line(error)})", where, "mend or delete the file")
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where, "mend or delete the file")
    return value


def read_part(path, shape):
    """`shape` of the JSON object in `path`, or None if there is no such file. Raises UserError if it does not fit."""
    if not path.exists():
        return None
    value = parse_json(path.read_bytes(), f"in {path}")
    try:
        return shape(value)
    except BAD_SHAPE as error:
        what = f"not what this project writes ({type(error).__name__}: {common.one_line(error)})"
        raise UserError(what, f"in {path}", "mend or delete the file")


def read_args(out):
    """OUT/args.json; of a folder of eval.py the one in OUT/eval."""
    shape = lambda v: {"args": dict(v["args"]), "versions": dict(v["versions"]), "commit": v.get("commit")}
    nothing = {"args": {}, "versions": {}, "commit": None}
    return read_part(out / "args.json", shape) or read_part(out / "eval" / "args.json", shape) or nothing


def number(value):
    """A number of at most 6 digits; None, a gap in a curve, for one that is missing, infinite or not a number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def read_metrics(path):
    """metrics.jsonl -> the number of steps, and a column for each curve, thinned out evenly to MAX_STEPS points."""
    if not path.exists():
        return None
    rows = common.read_jsonl(path)
    step = -(-len(rows) // MAX_STEPS) or 1
    kept = rows[::step] + (rows[-1:] if (len(rows) - 1) % step else [])  # the last step is always there
    try:
        columns = {name: [number(row.get(name)) for row in kept] for name in CURVES.split()}
        steps, stage = [int(row["step"]) for row in kept], str(kept[-1].get("stage", "")) if kept else ""
    except BAD_SHAPE as error:
        raise UserError(f"a step is not an object of numbers ({common.one_line(error)})", f"in {path}", "mend it")
    columns = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    if "nll" not in columns:
        columns.pop("dpo_loss", None)  # it is the loss
    return {"stage": stage, "every": step, "step": steps, "columns": columns} if rows else None


def shape_mismatch(value):
    """mismatch.json -> counts, replacement rates and histograms as lists of numbers."""
    rates = value["replacement_rate"].items()
    rates = sorted((float(eta), number(rate["samples"]), number(rate["tokens"])) for eta, rate in rates)
    edges = [float(edge) for edge in value["margin_histogram"]["edges"]]
    margins = [int(count) for count in value["margin_histogram"]["counts"]]
    if len(margins) != len(edges) + 1 or not all(math.isfinite(x) for x in [*edges, *(rate[0] for rate in rates)]):
        raise ValueError("margin_histogram or replacement_rate is not complete")
    return {
        "eta": number(value["eta"]),
        "counts": {name: count for name, count in value.items() if type(count) is int and name != "eta"},
        "dropped": {str(reason): int(count) for reason, count in value["dropped"].items()},
        "rates": rates,
        "margins": {"edges": edges, "counts": margins},
        "t_star": sorted((int(t), int(count)) for t, count in value["t_star_histogram"].items()),
    }


def shape_summary(value):
    """summary.json -> the rows of the closing table, and tokens a second of each stage."""
    rows = {str(name): row for name, row in value.items() if name != "stages"}
    return {
        "rows": {name: {str(k): number(v) for k, v in row.items()} for name, row in rows.items()},
        "stages": {str(stage): number(rate) for stage, rate in value.get("stages", {}).items()},
    }


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
    record = read_args(out)
    run = {
        "name": out.resolve().name,
        "path": str(out),
        "args": {str(key): str(value) for key, value in record["args"].items()},
        "versions": {str(key): str(value) for key, value in record["versions"].items()},
        "commit": record["commit"] and str(record["commit"]),
        "mismatch": read_part(out / "mismatch.json", shape_mismatch),
        "metrics": read_metrics(out / "metrics.jsonl"),
        "summary": read_part(out / "summary.json", shape_summary),
        "eval": [e for e in (read_part(out / "eval" / f"{n}.json", shape_eval) for n in ("table", "compare")) if e],
        "samples": read_samples(out, max_samples, tokenizer),
    }
    if not any(run[part] for part in ("mismatch", "metrics", "summary", "eval", "samples")):
        what = "nothing to report (no pairs, metrics.jsonl, mismatch.json, summary.json or eval)"
        raise UserError(what, f"in {out}", "give the folder of a run that has got further")
    eta = record["args"].get("eta")
    run["eta"] = run["mismatch"]["eta"] if run["mismatch"] else number(eta) if isinstance(eta, (int, float)) else None
    return run


def escape_json(value):
    """JSON that can stand inside <script>: no `<`, `>`, `&`, and ASCII alone, so no U+2028 and no lone surrogate either."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def render(runs):
    """The page, ASCII text. The template's {{POLICY}}, {{TITLE}} and {{DATA}} are filled in one pass."""
    template = TEMPLATE.read_text(encoding="utf-8")
    sources = {}
    for tag in ("script", "style"):
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        sources[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}"
    parts = {
        "POLICY": policy + "; base-uri 'none'; form-action 'none'",
        "TITLE": html.escape(" and ".join(run["name"] for run in runs) + " - Warmup-Distill report"),
        "DATA": escape_json({"unit": UNIT, "runs": runs}),
    }
    return re.sub(r"\{\{(POLICY|TITLE|DATA)\}\}", lambda match: parts[match[1]], template)


def write_report(out, other=None, max_samples=MAX_SAMPLES, tokenizer=None):
    """Writes OUT/report.html about the run in `out`, beside that in `other` if given. Returns the path.

    tokenizer: of the run in `out`, where the caller has it loaded.
    """
    runs = [gather(out, max_samples, tokenizer)] + ([gather(other, max_samples)] if other is not None else [])
    path = Path(out) / "report.html"
    try:
        common.write_atomic(path, render(runs).encode("utf-8", "xmlcharrefreplace"))
    except OSError as error:
        raise UserError(f"the report cannot be written ({common.one_line(error)})", f"at {path}", "check the folder")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("out", help="folder of a run; the page is OUT/report.html")
    parser.add_argument("other", nargs="?", help="folder of a second run, to be shown beside the first")
    parser.add_argument("--max-samples", type=int, default=MAX_SAMPLES, help="samples of a run in the page, at most")
    args = parser.parse_args(argv)
    check_range("--max-samples", args.max_samples, args.max_samples >= 1, "of 1 or more")
    return args


def main(argv=None):
    args = parse_args(argv)
    path = write_report(args.out, args.other, args.max_samples)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    common.run(main)
