"""Properties, with inputs that hypothesis thinks up: readers of files, the paper's functions, the losses.

Readers: whatever is in a file, what comes out is rows or a UserError of one line, and never another exception.
"""

import argparse
import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

import dpo
import kd
import warmup_distill
from lib import data, decode, runs, training
from lib.runs import UserError
from toy import make as toy

FAST = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # as many examples as the profile says
FEW = settings(FAST, max_examples=settings.default.max_examples // 6)  # each reads a file with `datasets`, 20 ms
WORLD = runs.World(0, 1, torch.device("cpu"))
TOKENIZER = toy.make_tokenizer()

text = st.text(st.characters(exclude_categories=()), max_size=8)  # surrogates and control characters, too
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
ids = st.lists(st.integers(-2, 25), max_size=4)
turns = st.lists(st.fixed_dictionaries({"role": text | values, "content": text | values}) | values, max_size=3)


def one_line(error):
    return "\n" not in str(error) and str(error).count(", ") >= 2


def rows_or_error(read, *args):
    """What a reader returns, or None where it raises a UserError of one line."""
    try:
        return read(*args)
    except UserError as error:
        assert one_line(error)
        return None


def write_lines(path, rows):
    """JSON as Python writes it: NaN, lone surrogates escaped."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


@FAST
@given(st.binary(max_size=40))
def test_read_jsonl_on_bytes(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    rows_or_error(runs.read_jsonl, path)


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


@FAST
@given(st.binary(max_size=60))
def test_read_pairs_on_bytes(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    rows_or_error(read_pairs, path)


def data_args(path):
    flags = {"data": str(path), "data_config": None, "split": "train", "limit": 0, "template": "auto"}
    return argparse.Namespace(**flags, prompt_column=None, response_column=None, max_prompt_tokens=64)


def read_data(path):
    """As warmup_distill.py reads it: rows, then prompts."""
    examples = data.read_examples(data_args(path))
    return list(data.encode_prompts(examples, "in --data", TOKENIZER, "auto", 64, []))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A home for what `datasets` makes of the files."""
    before = data.datasets.config.HF_DATASETS_CACHE
    data.datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))
    yield
    data.datasets.config.HF_DATASETS_CACHE = before


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


@FAST
@given(st.binary(max_size=40) | values.map(lambda value: json.dumps(value).encode() + b"\n"))
def test_cut_metrics(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    rows_or_error(training.cut_metrics, path, 3)


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


@FAST
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3), st.data())
def test_rewind_bookkeeping(rows, draw):
    """Rows of (padding, prompt, response): rewound to t tokens they see prompt and t tokens, and go on at that position."""
    before, width = max(pad + prompt for pad, prompt, _ in rows), max(length for *_, length in rows)
    keep = [draw.draw(st.integers(0, length)) for *_, length in rows]
    visible = [
        [False] * (before - prompt) + [True] * prompt + [True] * length + [False] * (width - length)
        for _, prompt, length in rows
    ]
    hidden = torch.arange(len(rows) * (width + 1) * 2.0).view(len(rows), width + 1, 2)
    positions = torch.tensor([prompt + length for _, prompt, length in rows])
    scored = decode.Rows(None, torch.tensor(visible), positions, hidden[:, -1])
    rewound = decode.rewind(scored, torch.tensor(keep), hidden)
    assert torch.equal(scored.visible, torch.tensor(visible)), "the rows that came in are left alone"
    for i, (_, prompt, _) in enumerate(rows):
        expected = visible[i][:before] + [column < keep[i] for column in range(width)]
        assert rewound.visible[i].tolist() == expected and rewound.next_position[i] == prompt + keep[i]
        assert torch.equal(rewound.hidden[i], hidden[i, keep[i]])


@FAST
@given(st.lists(st.integers(0, (1 << 62) - 1), min_size=3, max_size=3), st.integers(0, 9))
def test_uniform_noise_is_in_the_unit_interval(numbers, stage):
    """[0, 1), for any seed, prompt and sample up to 2^62, and no two positions share a number."""
    seed, prompt, sample = numbers
    position = torch.arange(64)
    noise = decode.uniform_noise(
        seed, stage, torch.full_like(position, prompt), torch.full_like(position, sample), position
    )
    assert noise.dtype == torch.float64 and ((noise >= 0) & (noise < 1)).all()
    assert len(set(noise.tolist())) == 64 and 0.2 < noise.mean() < 0.8


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------

logps = st.floats(-500, 0)


@FAST
@given(st.lists(st.tuples(logps, logps, logps, logps), min_size=1, max_size=5), st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_loss(rows, beta, epsilon):
    """Against the formula, row by row; at least 0 (entropy of epsilon); shifts that both responses share change nothing."""
    columns = [torch.tensor(column, dtype=torch.float64, requires_grad=k < 2) for k, column in enumerate(zip(*rows))]
    losses, chosen, rejected = dpo.dpo_loss(*columns, beta, epsilon)
    z = beta * ((columns[0] - columns[2]) - (columns[1] - columns[3]))
    expected = -(1 - epsilon) * logsigmoid(z) - epsilon * logsigmoid(-z)
    floor = 0.0 if epsilon == 0 else -epsilon * math.log(epsilon) - (1 - epsilon) * math.log1p(-epsilon)
    assert torch.allclose(losses, expected) and (losses >= floor - 1e-9).all() and losses.isfinite().all()
    assert torch.allclose(chosen - rejected, z.detach()) and not (chosen.requires_grad or rejected.requires_grad)
    losses.sum().backward()
    assert torch.equal(columns[0].grad, -columns[1].grad) and (columns[0].grad.abs() <= beta).all()
    shifted = [c.detach() - 7.0 for c in columns]
    assert torch.allclose(dpo.dpo_loss(*shifted, beta, epsilon)[0], losses.detach(), atol=1e-9)
    swapped = dpo.dpo_loss(columns[1], columns[0], columns[3], columns[2], beta, epsilon)
    assert torch.equal(swapped[1], rejected) and torch.equal(swapped[2], chosen)


logits = st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=2, max_size=8)


@pytest.mark.parametrize("name", kd.LOSSES)
@FAST
@given(logits, st.randoms(use_true_random=False))
def test_kd_losses(name, columns, rng):
    """>= 0, finite, finite gradients that sum to 0 (softmax); 0 with no gradient at p = q; the order of the vocabulary and
    a constant in the logits do not matter."""
    loss = kd.LOSSES[name]
    student, teacher = (torch.tensor(column, dtype=torch.float64) for column in zip(*columns))
    student.requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    assert -1e-9 <= value.item() < 100 and gradient.isfinite().all() and gradient.sum().abs() < 1e-6
    ascending = teacher.softmax(-1).sort()[0]
    clear = (ascending.diff() > 1e-9).all() and ((ascending.cumsum(-1) - 0.5).abs() > 1e-9).all()
    if name != "adaptive_kl" or clear:  # where p has ties, which of them are its tail is rounding's choice
        assert loss(student + 3, teacher - 5).item() == pytest.approx(value.item(), rel=1e-6, abs=1e-9)
        order = rng.sample(range(len(columns)), len(columns))
        assert loss(student[order], teacher[order]).item() == pytest.approx(value.item(), rel=1e-6, abs=1e-9)
    same = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(at_zero := loss(same, teacher), same)
    assert abs(at_zero.item()) < 1e-12 and (name == "tvd" or gradient.abs().max() < 1e-9) and gradient.isfinite().all()


@FAST
@given(logits)
def test_kd_losses_are_bounded(columns):
    """tvd by 1, jsd by ln 2, the skewed ones by log(1 / alpha); Pinsker's inequality ties tvd to forward KL."""
    student, teacher = (torch.tensor(column, dtype=torch.float64) for column in zip(*columns))
    value = {name: loss(student, teacher).item() for name, loss in kd.LOSSES.items()}
    assert value["tvd"] <= 1 + 1e-9 and value["jsd"] <= math.log(2) + 1e-9
    assert max(value["skew_forward_kl"], value["skew_reverse_kl"]) <= math.log(10) + 1e-9
    assert 2 * value["tvd"] ** 2 <= value["forward_kl"] + 1e-9
