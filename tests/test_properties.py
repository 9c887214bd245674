"""Properties, with inputs that hypothesis thinks up: readers of files, the paper's functions.

Readers: whatever is in a file, what comes out is rows or a UserError of one line, and never another exception.
"""

import argparse
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dpo
import warmup_distill
from lib import data, runs, training
from lib.runs import UserError
from toy import make as toy

FAST = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # as many examples as the profile says
FEW = settings(FAST, max_examples=settings.default.max_examples // 6)  # each reads a file with `datasets`, 20 ms
TOKENIZER = toy.make_tokenizer()

text = st.text(st.characters(exclude_categories=()), max_size=8)  # surrogates and control characters, too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
ids = st.lists(st.integers(-2, 25), max_size=4)
turns = st.lists(st.fixed_dictionaries({"role": text | values, "content": text | values}) | values, max_size=3)


def rows_or_error(read, *args):
    """What a reader returns, or None where it raises a UserError of one line."""
    try:
        return read(*args)
    except UserError as error:
        assert "\n" not in str(error) and str(error).count(", ") >= 2
        return None


def write_lines(path, rows):
    """JSON as Python writes it: NaN, lone surrogates escaped."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


@FAST
@given(st.lists(values, max_size=4))
def test_read_jsonl_gives_back_what_was_written(tmp_path, rows):
    path = write_lines(tmp_path / "x.jsonl", rows)
    surrogates = any("\ud800" <= c <= "\udfff" for c in json.dumps(rows, ensure_ascii=False))
    assert repr(rows_or_error(runs.read_jsonl, path)) == repr(None if surrogates else json.loads(json.dumps(rows)))


def read_pairs(path):
    return list(dpo.read_pairs(path, TOKENIZER))


@FAST
@given(st.lists(st.fixed_dictionaries({}, optional={
    "prompt": text | turns | values, "chosen": text | turns | values, "rejected": text | turns | values,
    "prompt_ids": ids | values, "chosen_ids": ids | values, "rejected_ids": ids | values, "tokenizer": values,
}) | values, min_size=1, max_size=2))  # fmt: skip
def test_read_pairs(tmp_path, rows):
    """Rows of ids of this tokenizer, two unlike responses to a prompt, none of them empty."""
    found = rows_or_error(read_pairs, write_lines(tmp_path / "p.jsonl", rows))
    for pair in found or []:
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert pair[key] and all(0 <= i < len(TOKENIZER) for i in pair[key])
        assert pair["chosen_ids"] != pair["rejected_ids"]


def read_data(path):
    """As warmup_distill.py reads it: rows, then prompts."""
    flags = {"data": str(path), "data_config": None, "split": "train", "limit": 0}
    args = argparse.Namespace(**flags, prompt_column=None, response_column=None)
    return list(data.encode_prompts(data.read_examples(args), "in --data", TOKENIZER, "auto", 64, []))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A home for what `datasets` makes of the files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@FEW
@given(st.lists(st.fixed_dictionaries({}, optional={
    "prompt": text | values, "input": text | values, "response": text | values, "messages": turns | values,
}) | values, min_size=1, max_size=3))  # fmt: skip
def test_read_examples(tmp_path, cache, rows):
    for prompt in rows_or_error(read_data, write_lines(tmp_path / "d.jsonl", rows)) or []:
        assert prompt["ids"] and all(0 <= i < len(TOKENIZER) for i in prompt["ids"])


@FEW
@given(st.binary(max_size=60), st.sampled_from(["jsonl", "json", "csv", "parquet"]))
def test_read_examples_on_bytes(tmp_path, cache, content, suffix):
    path = tmp_path / f"d.{suffix}"
    path.write_bytes(content)
    rows_or_error(read_data, path)


READERS = [runs.read_jsonl, read_pairs, lambda path: training.cut_metrics(path, 3)]


@pytest.mark.parametrize("read", READERS, ids=["rows", "pairs", "metrics"])
@FAST
@given(st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_jsonl_of_any_bytes(tmp_path, read, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    rows_or_error(read, path)


@FAST
@given(values)
def test_args_json(tmp_path, value):
    """OUT/args.json of another tool, or damaged."""
    (tmp_path / "args.json").write_text(json.dumps(value))
    (tmp_path / "pairs.jsonl").write_text("")
    rows_or_error(runs.claim, tmp_path, {"seed": 1}, [])


# ---------------------------------------------------------------------------------------------------------------------
# The paper's functions
# ---------------------------------------------------------------------------------------------------------------------

logprobs = st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0), st.booleans()), min_size=1, max_size=12)


@FAST
@given(st.lists(logprobs, min_size=1, max_size=4), st.floats(-1, 10))
def test_first_mismatch(rows, eta):
    """The first token in the mask whose margin, as float32 has it, is above eta."""
    width = max(map(len, rows))
    table = torch.tensor([row + [(0.0, 0.0, False)] * (width - len(row)) for row in rows])
    student, teacher, mask = table[..., 0], table[..., 1], table[..., 2].bool()
    found = warmup_distill.first_mismatch(student, teacher, mask, eta).tolist()
    for i, t in enumerate(found):
        above = [j for j in range(width) if mask[i, j] and (student[i, j] - teacher[i, j] > eta).item()]
        assert t == (above[0] if above else -1)


@FAST
@given(st.lists(st.integers()), st.lists(st.integers()), st.data())
def test_splice(response, continuation, draw):
    position = draw.draw(st.integers(0, len(response)))
    spliced = warmup_distill.splice(response, position, continuation)
    assert spliced[:position] == response[:position] and spliced[position:] == continuation
    assert dpo.shared_length(spliced, response) >= position
