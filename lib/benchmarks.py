"""The evaluation sets: where each one is, how its rows are read, which score belongs to it.

Instruction following: the five sets of MiniLLM (Gu et al., arXiv 2306.08543), which DistiLLM and DSKD share, from the
files that MiniLLM's authors put on the hub. One JSON object a line: "prompt" (instruction and input in the Alpaca
template, a line break may be written <n>), "output" (a reference, or a list of them), mostly "instruction" and "input"
too. Math: GSM8K and MATH as their hub data sets have them. Any of them may be a local file: `--data name=FILE`.
"""

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub

from lib import data, runs
from lib.runs import UserError
from lib.scoring import answer_of

REFERENCE_COLUMNS = ("references", *data.RESPONSE_COLUMNS)


@dataclass(frozen=True)
class Benchmark:
    """One evaluation set. `file` is read from the repository as it is; `configs` are loaded, test split, one by one."""

    name: str
    metric: str  # "rouge": Rouge-L of sampled responses. "math": accuracy of greedy ones
    repo: str = ""
    file: str = ""
    configs: tuple = (None,)
    first: int = 0  # only the first rows count; 0: all
    path: str = ""  # a local file instead of the hub


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
    name, _, path = (Path(spec).stem, "", spec) if Path(spec).is_file() else spec.partition("=")
    if not Path(path).is_file():
        raise UserError("no such data set or file", where, f"use {', '.join(BENCHMARKS)}, NAME=FILE or FILE")
    if not re.fullmatch(r"[\w.-]*[^\W_][\w.-]*", name):
        raise UserError(f"the name {name!r} cannot be part of a file name", where, "give NAME=FILE")
    if name in BENCHMARKS:
        return replace(BENCHMARKS[name], path=path, configs=(None,))
    if metric is None:
        raise UserError(f"nothing says how to score {name!r}", where, "give --metric, or a known name=FILE")
    return Benchmark(name, metric, path=path)


def load(benchmark, limit=0):
    """Examples of a set, as `data.encode_prompts` takes them: "response" holds the list of references.

    limit: first rows only; 0: all. Raises UserError if there is no file, no network, or nothing in it.
    """
    where, path = f"in --data {benchmark.name}", benchmark.path or benchmark.repo
    todo = "check the file" if benchmark.path else f"fetch it elsewhere and give --data {benchmark.name}=FILE"
    with runs.reading(f"{path} cannot be read", where, todo):
        if benchmark.file and not benchmark.path:
            path = huggingface_hub.hf_hub_download(benchmark.repo, benchmark.file, repo_type="dataset")
        parts = [data.open_rows(path, config, "test") for config in benchmark.configs]
        rows = itertools.islice(itertools.chain(*(rows for rows, _ in parts)), limit or benchmark.first or None)
        examples = list(data.examples_of(rows, parts[0][1], where, references=REFERENCE_COLUMNS))
    for number, example in enumerate(examples):
        example["response"] = references(example["response"], benchmark.metric, f"{where} row {number}")
    return examples


def references(value, metric, where):
    """One reference or a list of them -> a list of strings; at least one has content, or for math states an answer."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UserError("no text and no list of texts", where, f"give a column {' or '.join(REFERENCE_COLUMNS)}")
    if not any(answer_of(text).strip("$ ") if metric == "math" else text.strip() for text in found):
        raise UserError("references missing: they are empty", where, "repair or delete the row")
    return found


def encode(examples, tokenizer, template, max_tokens):
    """(prompts, how many were over `max_tokens`): as `data.encode_prompts`, whose "gold" is the list of references.

    A file without a column instruction brings its prompts in the Alpaca template: they are taken as they are.
    """
    if all("### Instruction:" in e["instruction"] for e in examples):
        examples = [{**e, "instruction": e["instruction"].replace("<n>", "\n"), "input": ""} for e in examples]
        template = "none"
    skipped = []
    return list(data.encode_prompts(examples, "in --data", tokenizer, template, max_tokens, skipped)), len(skipped)
