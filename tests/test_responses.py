"""lib/responses.py: batches, the truncated teacher and the warning; what it does in a run of kd.py is in test_kd.py."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from datasets import Dataset
from test_kd import random_logits

import kd
from lib import responses

VOCAB = 12


def test_collate():
    """[prompt, response] without its last token, which predicts nothing; source is the column before each target's."""
    inputs = responses.collate([([1, 5], [7, 8, 2], True), ([1, 5, 6], [2], False)], 0, "cpu")
    assert inputs["token_ids"].tolist() == [[1, 5, 7, 8], [1, 5, 6, 0]]
    assert inputs["source"].tolist() == [1, 2, 3, 4 + 2] and inputs["target"].tolist() == [7, 8, 2, -100]


def test_lengths():
    rows = Dataset.from_dict({"ids": [[1] * (k % 7) for k in range(2001)]})
    assert responses.lengths_of(rows, "ids").tolist() == [k % 7 for k in range(2001)]


@pytest.mark.parametrize("pad", [0, 5])
def test_live_teacher_against_whole_forwards(pad):
    """Its logits are those of each sequence alone, whatever the padding; rows that are no tokens are cut off."""
    model = make_model("qwen2", 2, rows=32).requires_grad_(False)
    sequences = [([1, 5], [7, 8, 2], True), ([3], [9], True), ([1, 5, 6, 7], [2, 2], False)]
    inputs = responses.collate(sequences, pad, "cpu")
    logits = responses.LiveTeacher(model, 22)(inputs, None)
    found = torch.cat([logits(slice(0, 4)), logits(slice(4, 6))])
    alone = [model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1, :22] for prompt, ids, _ in sequences]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_top_k(k):
    """A distribution: the k likeliest tokens keep their probabilities, the others share what is left over evenly."""
    logits = random_logits(6, 10, seed=1)
    ids, logprobs, rest = responses.top_k_logprobs(logits, k)
    p, full = logits.softmax(-1), responses.expand_top_k(ids, logprobs, rest, 10).exp()
    torch.testing.assert_close(full.sum(-1), torch.ones(6, dtype=torch.float64))
    top = p.argsort(-1, descending=True)
    torch.testing.assert_close(full.gather(-1, top[:, :k]), p.gather(-1, top[:, :k]))
    for i in range(6):
        others = p[i, top[i, k:]]
        torch.testing.assert_close(full[i, top[i, k:]], others.mean().expand(10 - k) if k < 10 else others)
        assert rest[i].exp().item() == pytest.approx(others.sum().item(), abs=1e-12)


def test_top_k_of_a_real_vocabulary():
    assert responses.top_k_logprobs(torch.arange(70_000.0)[None], 1)[0].item() == 69_999


def test_top_k_keeps_forward_kl_gradient_of_the_top_k():
    """What the docstring says is kept and lost: forward KL's gradient q - p is the live teacher's at each of the top k."""
    student, teacher = random_logits(5, VOCAB, seed=1).requires_grad_(), random_logits(5, VOCAB, seed=2)
    stored = responses.top_k_logprobs(teacher, 4)
    cut = responses.expand_top_k(*stored, VOCAB)
    live, short = (torch.autograd.grad(kd.forward_kl(student, t).sum(), student)[0] for t in (teacher, cut))
    top = stored[0].long()
    torch.testing.assert_close(live.gather(-1, top), short.gather(-1, top))
    torch.testing.assert_close(live.sum(-1), short.sum(-1))
    assert (live - short).abs().max() > 1e-3


@pytest.mark.parametrize("loss", kd.LOSSES.values(), ids=kd.LOSSES)
def test_every_loss_takes_a_truncated_teacher(loss):
    student, teacher = (random_logits(5, VOCAB, seed=seed, scale=20.0) for seed in (1, 2))
    cut = responses.expand_top_k(*responses.top_k_logprobs(teacher, 2), VOCAB)
    assert loss(student, cut).isfinite().all() and (loss(student, cut) > 0).all()
    assert loss(cut, cut).abs().max() == 0


def test_copied_functions():
    """The two functions of the truncated teacher run in a namespace of torch and math."""
    logits, namespace = random_logits(4, 8, seed=3), {"torch": torch, "F": F, "math": math}
    for function in (responses.top_k_logprobs, responses.expand_top_k):
        exec(inspect.getsource(function), namespace)  # noqa: S102
    stored = namespace["top_k_logprobs"](logits, 3)
    assert all(torch.equal(a, b) for a, b in zip(stored, responses.top_k_logprobs(logits, 3)))
    assert torch.equal(namespace["expand_top_k"](*stored, 8), responses.expand_top_k(*stored, 8))
