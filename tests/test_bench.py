"""bench/ at toy size: the checks inside the benchmarks pass and can fail, the counts are right, no peer library is needed."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import ceiling
import dpo_step
import growth
import harness
import kd_memory
import sampling
import scaling
import splice

import decode
import dpo

TINY = ["--shape", "tiny", "--dtype", "float32"]
VOCAB = harness.SHAPES["tiny"][-1]


def test_sampling_check_passes_and_fails(monkeypatch):
    """Greedy tokens and the chi-square test; a sampler that forgets half of the vocabulary is found out."""
    model = harness.random_model("tiny", std=0.3)
    torch.manual_seed(0)
    prompts = sampling.draw_prompts(2, 20, VOCAB)
    sampling.check(model, prompts)
    real = decode.sample_token
    monkeypatch.setattr(decode, "sample_token", lambda logits, *rest: real(logits[:, : VOCAB // 2], *rest))
    with pytest.raises(AssertionError):
        sampling.check(model, prompts)


def test_sampling_prints_json_last(capsys):
    sampling.main([*TINY, "--prompt-length", "8", "--max-new-tokens", "3", "--samples", "2", "--repeat", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["equal"]["ratio"] > 0 and result["unequal"]["generate"]["range"][0] > 0


def test_splice_check_passes_and_fails(monkeypatch):
    args = splice.parse_args([*TINY, "--prompt-length", "8", "--max-new-tokens", "9", "--mismatch", "0.1"])
    student, teacher = (harness.random_model("tiny", seed=seed, std=0.3) for seed in (1, 0))
    torch.manual_seed(0)
    batch = splice.make_batch(student, teacher, args)
    assert splice.check(teacher, batch) > 0
    real = decode.rewind
    monkeypatch.setattr(decode, "rewind", lambda rows, keep, hidden: real(rows, keep * 0, hidden))
    with pytest.raises(AssertionError):
        splice.check(teacher, batch)


def test_dpo_step_accumulates_to_the_whole():
    """Two shares of a step give the loss and the gradient of all pairs at once."""
    args = dpo_step.parse_args([*TINY, "--pairs", "4", "--prompt", "5", "--prefix", "2", "--suffix", "4"])
    torch.manual_seed(1)
    pairs, reference = dpo_step.make_pairs(args)
    gradients, losses = [], []
    for size in (4, 2):
        model = dpo_step.our_model(harness.random_model("tiny"), args)
        parts = range(0, 4, size)
        losses.append(
            sum(dpo_step.our_step(model, pairs[k : k + size], reference[k : k + size], size / 4) for k in parts)
        )
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kd_rate", ["0.5", "1"])
def test_kd_memory_kinds_agree(kd_rate):
    size = ["--dtype", "float32", "--tokens", "11", "--vocab", "50", "--width", "8", "--kd-rate", kd_rate]
    results = {
        kind: kd_memory.measure(kd_memory.parse_args([*size, "--loss", "jsd", "--only", kind]))
        for kind in ("chunked", "dense")
    }
    for key in ("loss", "grad_hidden", "grad_weight"):
        assert results["chunked"][key] == pytest.approx(results["dense"][key], rel=1e-4)


@pytest.mark.parametrize("name", kd_memory.TRL_BETA)
def test_kd_loss_equals_trl(name):
    pytest.importorskip("trl")
    student, teacher = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(0))
    theirs = kd_memory.trl_loss(name, student, teacher)
    torch.testing.assert_close(theirs, kd_memory.kd.LOSSES[name](student, teacher).mean())


def test_scaling_stages_in_one_process():
    """What torchrun starts, alone: finite losses, ln 2 for a policy that is its reference; all stages have a time."""
    args = scaling.parse_args(
        [*TINY, "--prompt-length", "8", "--max-new-tokens", "6", "--pairs", "4", "--batches", "2", "--samples", "2"]
    )

    class OneProcess:
        rank, size, device = 0, 1, torch.device("cpu")
        barrier, sum = staticmethod(lambda: None), staticmethod(list)

    laps = scaling.Laps(OneProcess)
    student, teacher = (harness.random_model("tiny", seed=seed) for seed in (0, 1))
    tokens = scaling.generation_stages(args, OneProcess, student, teacher, laps)
    assert tokens == scaling.generation_stages(args, OneProcess, student, teacher, laps)
    assert set(laps.wall) == {"sample", "check", "splice"}
    pair = {"prompt_ids": [1, 5], "chosen_ids": [4, 6], "rejected_ids": [4, 7]}
    loss = scaling.dpo_loss(dpo.PairModel(student, VOCAB), [pair, pair])
    assert loss.item() == pytest.approx(2 * 0.693147, abs=1e-5)


def test_growth_point_and_plot(monkeypatch):
    point = {"prompt": 4, "response": 6, "N": 2, "vocabulary": 60, "batch": 1}
    result = growth.measure(growth.parse_args([*TINY, "--only", json.dumps(point)]))
    assert set(result) == set(growth.STAGES) and all(stage["seconds"] > 0 for stage in result.values())
    line = [{"value": v, **{key: harness.spread([v * v]) for key in ("seconds", "gib")}} for v in (1, 2, 4)]
    assert growth.power(line, "seconds") == pytest.approx(2)
    svg = growth.draw_svg({"prompt": dict.fromkeys(growth.STAGES, line)})
    assert svg.startswith("<svg") and svg.count("<polyline") == 2 * len(growth.STAGES)


def test_growth_predictions():
    """Operations are those of all weights for each token; few tokens of a large vocabulary: the logits are the memory."""
    args, point = growth.parse_args(TINY), {"prompt": 4, "response": 6, "N": 2, "vocabulary": 6000, "batch": 2}
    expected = growth.predict(args, point)
    # 24 tokens with logits: float32 and their exponentials, beside a cache of a few columns
    assert expected["check"]["predicted_gib"] * 2**30 == pytest.approx(8 * 6000 * 24, rel=0.1)
    parameters = sum(p.numel() for p in harness.random_model("tiny", vocab=6000).parameters())
    blocks = parameters - 32 - 32 * 6000  # but for the final norm and the tied head
    dpo_flops = 3 * 2 * (2 * 13 * (blocks + 2 * 2 * 32 * 13) + 2 * 9 * 32 * 6000)
    assert expected["dpo"]["tflop"] == pytest.approx(dpo_flops / 1e12)


def test_ceiling_counts_a_model_s_weights():
    """block_weights and the head's are the parameters of the model, but for norms; a forward is 2 operations for each."""
    parameters = sum(p.numel() for name, p in harness.random_model("tiny").named_parameters() if "norm" not in name)
    width = harness.SHAPES["tiny"][0]
    assert ceiling.block_weights("tiny") + VOCAB * width == parameters
    assert ceiling.block_flops("tiny", 1, 0) + ceiling.head_flops("tiny", 1) == 2 * parameters
    args = ceiling.parse_args([*TINY, "--response", "4", "--prompt-length", "6", "--repeat", "1"])
    assert set(ceiling.count(args)) == set(ceiling.stages(args))
