"""The evaluation sets: where each one is, how its rows are read, which score belongs to it.

Instruction following: the five sets of MiniLLM (Gu et al., arXiv 2306.08543), which DistiLLM and DSKD share, from the
files that MiniLLM's authors put on the hub. One JSON object a line: "prompt" (instruction and input in the Alpaca
template, a line break may be written <n>), "output" (a reference, or a list of them), mostly "instruction" and "input"
too. Math: GSM8K and MATH as their hub data sets have them. Any of them may be a local file: `--data name=FILE`.

JSON files are read line by line, not through `datasets`: inferring one type for a column that holds strings here and
lists there is how a list of references turns into one string, which Rouge-L then scores without a warning.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import huggingface_hub

from lib import data
from lib.runs import UserError, one_line, parse_json, read_jsonl
from lib.scoring import answer_of

REFERENCE_COLUMNS = ("references", *data.RESPONSE_COLUMNS)


@dataclass(frozen=True)
class Benchmark:
    """One evaluation set. `file` is read from the repository as it is; `configs` are loaded, test split, one by one."""

    name: str
    metric: str  # "rouge": Rouge-L of sampled responses. "math": accuracy of greedy ones
    repo: str = ""
    file: str = ""
    configs: tuple = ()
    first: int = 0  # only the first rows count; 0: all
    path: str = ""  # a local file instead of the hub

    @property
    def where(self):
        return f"in {self.path or self.repo}"

    @property
    def max_new_tokens(self):
        return 256 if self.metric == "rouge" else 1024


MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                 "prealgebra", "precalculus")  # fmt: skip
TABLE = (
    Benchmark("dolly", "rouge", "MiniLLM/dolly", "valid.jsonl"),  # 500
    Benchmark("selfinst", "rouge", "MiniLLM/self-inst", "valid.jsonl"),  # 242
    Benchmark("vicuna", "rouge", "MiniLLM/Vicuna", "valid.jsonl"),  # 80
    Benchmark("sni", "rouge", "MiniLLM/sinst", "11_/valid.jsonl"),  # S-NI, references of 11 words and more
    Benchmark("unni", "rouge", "MiniLLM/uinst", "11_/valid.jsonl", first=10_000),  # UnNI, likewise
    Benchmark("gsm8k", "math", "openai/gsm8k", configs=("main",)),  # 1,319
    Benchmark("math", "math", "EleutherAI/hendrycks_math", configs=MATH_SUBJECTS),  # 5,000
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in TABLE}


def find(spec, metric):
    """The `Benchmark` that one word of --data means: a known name, name=FILE, or FILE.

    metric: what scores a file under a name that is not in the table.
    """
    if spec in BENCHMARKS:
        return BENCHMARKS[spec]
    where = f"in --data {spec}"
    name, equals, path = (Path(spec).stem, "", spec) if Path(spec).is_file() else spec.partition("=")
    if not Path(path).is_file():
        if equals or "/" in spec or Path(spec).suffix:
            raise UserError("no such file", where, "give NAME=FILE or FILE")
        todo = f"use {', '.join(BENCHMARKS)}, NAME=FILE or FILE"
        raise UserError(f"unknown data set {spec!r}", "in --data", todo)
    if not re.fullmatch(r"[\w.-]*[^\W_][\w.-]*", name):
        raise UserError(f"the name {name!r} cannot be part of a file name", where, "give NAME=FILE")
    if name in BENCHMARKS:
        return replace(BENCHMARKS[name], path=path)
    if metric is None:
        what, todo = f"nothing says how to score {name!r}", "give --metric rouge or math, or a known name=FILE"
        raise UserError(what, where, todo)
    return Benchmark(name, metric, path=path)


def read_rows(benchmark):
    """The rows of a set as a list of dicts. Raises UserError if there is no file, no network, or nothing in it."""
    path = benchmark.path
    try:
        if path.endswith(".jsonl"):
            rows = read_jsonl(path)
        elif path:
            rows = parse_json(Path(path).read_bytes())
        elif benchmark.file:
            rows = read_jsonl(huggingface_hub.hf_hub_download(benchmark.repo, benchmark.file, repo_type="dataset"))
        else:
            parts = [datasets.load_dataset(benchmark.repo, config, split="test") for config in benchmark.configs]
            rows = [row for part in parts for row in part]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        todo = "check the file" if path else f"fetch it elsewhere and give --data {benchmark.name}=FILE"
        what = f"{path or benchmark.repo} cannot be read ({one_line(error)})"
        raise UserError(what, f"in --data {benchmark.name}", todo)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError("the rows are not objects with named columns", benchmark.where, "give one JSON object a line")
    if not rows:
        raise UserError("no rows", benchmark.where, "give data with at least one row")
    return rows[: benchmark.first or None]


def load(benchmark, limit=0):
    """Examples of a set, as `data.encode_prompts` takes them: "response" holds the list of references.

    "templated" is the prompt as MiniLLM's files have it, ready for the model, or None. limit: first rows only; 0: all.
    """
    rows, where = read_rows(benchmark)[: limit or None], benchmark.where
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = []
    for wanted in (data.PROMPT_COLUMNS, data.INPUT_COLUMNS, REFERENCE_COLUMNS):
        found.append(next((column for column in wanted if column in names), None))
        if found[-1] is None and wanted is not data.INPUT_COLUMNS:
            what = f"no column {' or '.join(wanted)}"
            raise UserError(what, f"{where} with columns {', '.join(names)}", "rename one")
    text, context, target = found
    examples = []
    for number, row in enumerate(rows):
        place, instruction = f"{where} row {number}", row.get(text)
        extra = "" if row.get(context) is None else row[context]
        for column, field in ((text, instruction), (context, extra)):
            if not isinstance(field, str):
                raise UserError(f"column {column} is {type(field).__name__}, not text", place, "repair the row")
        if not instruction.strip():
            raise UserError(f"column {text} is empty", place, "repair or delete the row")
        gold, ready = references(row.get(target), target, benchmark.metric, place), templated(row.get("prompt"), place)
        example = {"instruction": instruction, "input": extra, "response": gold, "messages": None, "templated": ready}
        examples.append(example)
    return examples


def templated(prompt, where):
    """A prompt that is in the Alpaca template already, line breaks restored, or None if it is not."""
    if not isinstance(prompt, str) or "### Instruction:" not in prompt:
        return None
    if "### Response:" not in prompt:
        raise UserError("the prompt was cut: it has no response marker", where, "give the whole prompt")
    return prompt.replace("<n>", "\n")


def references(value, column, metric, where):
    """One reference or a list of them -> a list of strings; at least one has content, or for math states an answer."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError(f"column {column} is neither text nor a list of texts", where, "repair the row")
    if not any(answer_of(text).strip("$ ") if metric == "math" else text.strip() for text in found):
        raise UserError(f"references missing: column {column} is empty", where, "repair or delete the row")
    return found


def encode(examples, tokenizer, template, max_tokens):
    """(prompts, how many were over `max_tokens`): as `data.encode_prompts`, whose "gold" is the list of references.

    A prompt that the file brings in the Alpaca template is taken as it is, unless the model is to see its chat template
    and the file has the instruction by itself.
    """
    chat = template == "chat" or (template == "auto" and tokenizer.chat_template)
    if all(e["templated"] and (not chat or "### Instruction:" in e["instruction"]) for e in examples):
        examples, template = [{**e, "instruction": e["templated"]} for e in examples], "none"
    skipped = []
    return list(data.encode_prompts(examples, "in --data", tokenizer, template, max_tokens, skipped)), len(skipped)
