"""lib/training.py without a model: the order of the examples, micro-batches, the schedule, one step, signals, the log."""

import contextlib
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch

from lib import decode, runs, training

CPU = torch.device("cpu")


def world_of(rank, size):
    return runs.World(rank, size, CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, batch_size", [(12, 4), (13, 4), (3, 8), (1, 1)])
def test_batch_of_step(count, batch_size, monkeypatch):
    """Each epoch is a permutation, that of the noise of (seed, epoch, index), drawn once; its last batch may be short."""
    calls, uniform_noise, index = [], decode.uniform_noise, torch.arange(count)
    monkeypatch.setattr(decode, "uniform_noise", lambda *place: calls.append(place) or uniform_noise(*place))
    training.epoch_order.cache_clear()
    steps = math.ceil(count / batch_size)
    for epoch in range(3):
        batches = [training.batch_of_step(epoch * steps + k, count, batch_size, 7) for k in range(steps)]
        order = uniform_noise(7, decode.ORDER_STAGE, 0 * index + epoch, 0 * index, index).argsort().tolist()
        assert batches == [order[k * batch_size : (k + 1) * batch_size] for k in range(steps)]
        assert len(calls) == epoch + 1


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 8, 19])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_micro_batches_are_a_partition(size, count, micro_batch_size):
    """Over all ranks each example once; equally many micro-batches a rank, none too large; an idle rank's has weight 0.

    Dealt out in order of length, whatever the order before.
    """
    draw = torch.Generator().manual_seed(count)
    indices, lengths = torch.randperm(30, generator=draw).tolist()[:count], torch.randint(5, 50, (30,), generator=draw)
    worlds = [world_of(rank, size) for rank in range(size)]
    deal = lambda order: [training.micro_batches(order, lengths.tolist(), micro_batch_size, world) for world in worlds]
    ranks, shortest = deal(indices), min(indices, key=lambda i: (lengths[i], i))
    assert all(weight == 1 or (batch, weight) == ([shortest], 0) for batches in ranks for batch, weight in batches)
    assert {len(batches) for batches in ranks} == {math.ceil(math.ceil(count / size) / micro_batch_size)}
    assert all(len(batch) <= micro_batch_size for batches in ranks for batch, _ in batches)
    shares = [[i for batch, weight in batches if weight for i in batch] for batches in ranks]
    assert sorted(i for share in shares for i in share) == sorted(indices)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all((lengths[share].diff() >= 0).all() for share in shares) and ranks == deal(indices[::-1])


def test_micro_batches_by_hand():
    """Lengths 9 2 5 2 7: in order 1 3 2 4 0, dealt to two ranks: 1 2 0 and 3 4, then nothing."""
    lengths = [9, 2, 5, 2, 7]
    assert training.micro_batches([0, 1, 2, 3, 4], lengths, 2, world_of(0, 2)) == [([1, 2], 1.0), ([0], 1.0)]
    assert training.micro_batches([0, 1, 2, 3, 4], lengths, 2, world_of(1, 2)) == [([3, 4], 1.0), ([1], 0.0)]


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "total, warmup_ratio, expected",
    [
        # Warm-up of ceil(0.2 x 10) = 2 steps: 1/2, 1; cosine over steps 2 .. 9, so step 2 is the peak and step 9 is 10%
        (10, 0.2, {0: 0.5, 1: 1, 2: 1, 9: 0.1}),
        # 11 steps, no warm-up: halfway at step 5, (1 + 0.1) / 2; a quarter of the way cos(pi / 5) at step 2
        (11, 0.0, {0: 1, 5: 0.55, 2: 0.1 + 0.45 * (1 + math.cos(math.pi / 5)), 10: 0.1}),
        (4, 1.0, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1}),  # warm-up alone
        (2, 0.03, {0: 1, 1: 1}),  # one step of warm-up, at the peak, and one that is the cosine's first
    ],
)
def test_learning_rate(total, warmup_ratio, expected):
    args = SimpleNamespace(lr=3e-4, lr_warmup_ratio=warmup_ratio, lr_final_ratio=0.1)
    for step, factor in expected.items():
        assert training.learning_rate(step, total, args) == pytest.approx(3e-4 * factor, rel=1e-12)


@pytest.mark.parametrize("gradient, norm", [([3.0, 4.0], 5.0), ([math.nan, 1.0], math.nan)])
def test_optimizer_step(gradient, norm):
    """Clips to the norm, steps, clears. A gradient that is not a number changes nothing, and `log_step` stops the run."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=9.0), model.weight.detach().clone()
    model.weight.grad = torch.tensor([gradient])
    args = SimpleNamespace(lr=0.5, lr_warmup_ratio=0, lr_final_ratio=0.1, max_grad_norm=1.0)
    updated = training.optimizer_step(model, optimizer, 0, 10, args)
    assert updated == {"grad_norm": pytest.approx(norm, nan_ok=True), "lr": 0.5}
    if math.isnan(norm):
        assert torch.equal(model.weight, before)
        with pytest.raises(runs.UserError, match=r"gradient norm nan at step 3, prompts \[8\], in OUT, lower --lr"):
            training.log_step("OUT", {"loss": 1.0, "step": 3, **updated}, [8], 1, 0.0, world_of(0, 1))
    else:
        torch.testing.assert_close(model.weight.detach(), before - 0.5 * torch.tensor([[0.6, 0.8]]))
        assert model.weight.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Signals and the log
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError])
def test_stop_signals(error):
    """SIGTERM and Ctrl-C are collected, the loop goes on; after it, also by an exception, they do what they did."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(error) if error else contextlib.nullcontext(), training.stop_signals() as stop:
        assert not stop
        for number in numbers:
            os.kill(os.getpid(), number)
        if error:
            raise error
    assert stop == numbers and [signal.getsignal(number) for number in numbers] == before


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    """Steps after the last checkpoint go, and so does a line that a kill cut short."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    training.cut_metrics(path, 2)
    assert runs.read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_checkpoints_are_sorted_by_step(tmp_path):
    """By number, not by name; what else a user keeps there is none, and is never deleted."""
    for name in ("step-000002", "step-000010", "step-1000000", "step-000003.bak", "step-x", ".step-000004.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in training.checkpoints(tmp_path)] == ["step-000002", "step-000010", "step-1000000"]
