"""The scripts on a pretended GPU, tests/simulated_cuda.py: the same files as on the CPU, and planted faults are seen."""

import functools
import json
import re
import shutil

import pytest
import torch
from conftest import logged, make_inputs, make_model, weights
from simulated_cuda import CUDA, WAITS, CudaTensor, DeviceError, simulated_cuda

import dpo
import eval as evaluation
import kd
import warmup_distill
from lib import decode, measure, models, responses, runs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")

MODELS = "--student {student} --teacher {teacher} --data {data} --prompts-per-batch 4"
TRAINING = "--batch-size 4 --micro-batch-size 2 --max-steps 2 --lr 1e-3"
SPLICE = f"{MODELS} --samples 3 --eta 3 --max-new-tokens 12"
KD = f"{MODELS} {TRAINING} --max-new-tokens 36 --eval-limit 2"
EVAL = "--model {student} --data toy={data} --distance {teacher} --metric rouge --no-repeat-ngram-size 3"
COMMANDS = {
    "warmup": (warmup_distill, f"{SPLICE} {TRAINING} --eval-limit 2 --nll-weight 1"),
    "pairs": (warmup_distill, f"{SPLICE} --pairs-only --replace after --teacher-decoding greedy --top-p 0.8"),
    "dpo": (dpo, f"{TRAINING} --model {{student}} --reference {{teacher}} --pairs {{pairs}} --logprobs mean"),
    "kd-student": (kd, f"{KD} --mode student --on-policy 0.5 --loss skew_reverse_kl --eval-data {{data}}"),
    "kd-cache": (kd, f"{KD} --loss adaptive_kl --teacher-cache {{out}}/cache"),
    "eval": (evaluation, f"{EVAL} --seeds 1 --max-new-tokens 12 --batch-size 4"),
}
FLOAT = r"-?\d+\.\d+(?:e-\d+)?"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Models, prompts of different lengths, preference pairs."""
    root = tmp_path_factory.mktemp("models")
    ids = [{"prompt_ids": [1, 4 + n], "chosen_ids": [7, 8, 2], "rejected_ids": [7, n + 9, 4, 2]} for n in range(4)]
    runs.write_jsonl(root / "pairs.jsonl", ids)
    paths = make_inputs(root, 6)
    rows = [row | {"prompt": row["prompt"][n:]} for n, row in enumerate(runs.read_jsonl(paths["data"]))]
    runs.write_jsonl(paths["data"], rows)
    return paths | {"pairs": root / "pairs.jsonl"}


@pytest.fixture
def run(inputs, tmp_path):
    """run(name, device): the folder that the command has written."""

    def run(name, device):
        script, flags = COMMANDS[name]
        flags = flags.format(**inputs, out=tmp_path / f"{device}-files")
        script.main(f"{flags} --dtype float32 --threads 1 --device {device} --out {tmp_path / device}".split())
        return tmp_path / device

    return run


def texts(out):
    """{file: its JSON text} of a run, without what the device, the clock and the machine decide."""
    files = [file for file in out.rglob("*.json*") if not {"args.json", "checkpoint", "student"} & {*file.parts}]
    found = {str(file.relative_to(out)): file.read_text() for file in files}
    return found | {name: json.dumps(logged(out)) for name in found if name == "metrics.jsonl"}


@pytest.mark.parametrize("name", COMMANDS)
def test_same_files_as_on_the_cpu(name, run, monkeypatch):
    """But for the last digits of floats: on cuda rows leave a batch later, and another batch rounds otherwise."""
    monkeypatch.setattr(decode, "head_chunk", lambda vocab_size: 5)  # log-probs and losses in several chunks
    expected = run(name, "cpu")
    with simulated_cuda() as enable_cudnn_sdp:
        found = run(name, "cuda")
    enable_cudnn_sdp.assert_called_once_with(False)
    assert texts(found).keys() == texts(expected).keys()
    for file, text in texts(expected).items():
        ours, theirs = ([float(number) for number in re.findall(FLOAT, x)] for x in (texts(found)[file], text))
        assert re.sub(FLOAT, "", texts(found)[file]) == re.sub(FLOAT, "", text), file
        assert ours == pytest.approx(theirs, rel=1e-5, abs=2e-4 if "pairs" in file else 1e-5), file  # pairs: 4 digits
    if (expected / "student").exists():
        torch.testing.assert_close(weights(found), weights(expected), rtol=1e-5, atol=1e-5)


def test_resume(run, capsys):
    """From a checkpoint that was written on cuda, on cuda."""
    with simulated_cuda():
        trained = weights(out := run("kd-cache", "cuda"))
        shutil.rmtree(out / "student")
        run("kd-cache", "cuda")
    assert "checkpoint: continues after step 2" in capsys.readouterr().out
    torch.testing.assert_close(weights(out), trained, rtol=0, atol=0)


# What is wrong, command, function of the project, its faulty variant, what the error says
FAULTS = [
    ("mask of attention on the CPU", "eval", (decode, "forward_tokens"),
     lambda right, model, cache, ids, mask, *rest: right(model, cache, ids, mask.cpu(), *rest), "attention.*two devices"),
    ("a row that sees nothing", "eval", (decode, "forward_tokens"),
     lambda right, model, cache, ids, mask, *rest: right(model, cache, ids, mask & (ids > 0)[:, :, None], *rest), "nothing"),
    ("mask of margins on the CPU", "warmup", (warmup_distill, "first_mismatch"),
     lambda right, log_q, log_p, mask, eta: right(log_q, log_p, mask.cpu(), eta), "bitwise_and: tensors of two devices"),
    ("a token that is not there", "eval", (decode, "sample_token"),
     lambda right, *args: right(*args) + 22, "device-side assert, index .* is out of bounds"),
    ("indices on cuda, values on the CPU", "eval", (measure, "sampler"),
     lambda right, batch, seed, device, *rest: right(batch, seed, "cpu", *rest), "index: tensors of two devices"),
    ("reference on the CPU", "dpo", (dpo, "batch_loss"),
     lambda right, sums, reference, *rest: right(sums, reference.cpu(), *rest), "two devices"),
    ("responses on the CPU", "kd-cache", (responses, "collate"),
     lambda right, sequences, pad_id, device: right(sequences, pad_id, "cpu"), "embedding: tensors of two devices"),
]  # fmt: skip


@pytest.mark.parametrize("name, place, wrong, error", [pytest.param(*x[1:], id=x[0]) for x in FAULTS])
def test_planted_fault(name, place, wrong, error, run, monkeypatch):
    monkeypatch.setattr(*place, functools.partial(wrong, getattr(*place)))
    monkeypatch.setattr(models, "check_model", lambda *model: None)  # which would refuse a faulty `decode`
    with simulated_cuda(), pytest.raises(DeviceError, match=error):
        run(name, "cuda")


def test_decode_seldom_waits():
    """Once in 8 tokens it looks which rows still run; each look makes the host wait."""
    with simulated_cuda():
        model, tokens = make_model("llama", 3).to(CUDA), decode.Tokens(0, [999], 22)
        rows, budget = decode.prefill(model, [[1, 5]], tokens), torch.full((1,), 64, device=CUDA)
        WAITS.clear()
        decode.decode(model, rows, decode.greedy, budget, tokens)
    assert len(WAITS) <= 64 / 8 + 2, WAITS


def test_the_pretended_device():
    """What it refuses, what it takes, and that values and gradients are right."""
    on_cpu, index = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    with simulated_cuda():
        on_cuda = torch.zeros(4, 3, device="cuda") + 1
        refused = [
            lambda: on_cuda + on_cpu,
            lambda: on_cpu[index.to("cuda:0")],
            lambda: on_cuda.index_put_((index.to("cuda:0"),), on_cpu[:2]),
            lambda: on_cuda.gather(1, torch.full((4, 1), 3, device="cuda")),
            lambda: on_cuda[torch.tensor([4], device="cuda")],
        ]
        for operation in refused:
            with pytest.raises(DeviceError):
                operation()
        on_cuda.copy_(on_cpu)
        assert torch.equal((on_cuda * torch.tensor(2.0))[index].cpu(), 2 * on_cpu[index])
        view = on_cuda[:, 1:]
        view += 5
        assert torch.equal(on_cuda.cpu()[:, 1:], on_cpu[:, 1:] + 5)
        weight = torch.ones(3, device="cuda", requires_grad=True)
        (on_cpu.to("cuda:0") @ weight)[index].sum().backward()
        assert isinstance(weight.grad, CudaTensor) and torch.allclose(weight.grad.cpu(), on_cpu[1:3].sum(0))
