"""kd.py against formulas in plain Python, the dense loss, and a plain training loop.

The twins: each divergence term by term over Python floats; the full model on one unpadded example, log_softmax over the
whole vocabulary, no chunks, no FSDP; AdamW from torch on that.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_identical, logged, make_model, weights
from safetensors.torch import load_file
from test_decode import VOCAB, all_logits, slow_decode, slow_draw, slow_noise
from test_dpo import MODELS, assert_plain_loop

import kd
from lib import decode, measure, models, responses, runs, training
from lib.runs import UserError

PAD, EOS = 0, 2

# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def kl(p, q):
    """KL(p, q) of two lists of probabilities, in nats."""
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


def adaptive(p, q, tail_mass=0.5):
    """AKL: tokens from the least likely on belong to the tail while their mass stays within tail_mass."""
    mass, gaps = 0.0, {"tail": 0.0, "head": 0.0}
    for a, b in sorted(zip(p, q)):
        mass += a
        gaps["tail" if mass <= tail_mass else "head"] += abs(a - b)
    return (gaps["head"] * kl(p, q) + gaps["tail"] * kl(q, p)) / (gaps["head"] + gaps["tail"])


def mix(p, q, weight):
    return [weight * a + (1 - weight) * b for a, b in zip(p, q)]


PUBLISHED = {  # of p the teacher and q the student, each a list of probabilities
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q, beta=0.5: beta * kl(p, mix(p, q, beta)) + (1 - beta) * kl(q, mix(p, q, beta)),
    "tvd": lambda p, q: sum(abs(a - b) for a, b in zip(p, q)) / 2,
    "skew_forward_kl": lambda p, q, alpha=0.1: kl(p, mix(p, q, alpha)),
    "skew_reverse_kl": lambda p, q, alpha=0.1: kl(q, mix(q, p, alpha)),
    "adaptive_kl": adaptive,
}
OPTIONS = [
    *((name, {}) for name in PUBLISHED),
    *(("jsd", {"beta": beta}) for beta in (0.1, 0.9)),
    *(("skew_forward_kl", {"alpha": alpha}) for alpha in (0.7, 0.0)),
    ("skew_reverse_kl", {"alpha": 0.7}),
    *(("adaptive_kl", {"tail_mass": mass}) for mass in (0.2, 0.0)),
]
EACH_LOSS = pytest.mark.parametrize("name, options", OPTIONS)


def logits_of(*probabilities, shift=0.0):
    return torch.tensor(probabilities, dtype=torch.float64).log() + shift


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


@EACH_LOSS
@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
def test_loss_is_the_published_formula(name, options, scale):
    """The formula in float64; the same in float32, to which bfloat16 is taken."""
    student, teacher = random_logits(5, 3, 17, seed=1, scale=scale), random_logits(5, 3, 17, seed=2, scale=scale)
    values = kd.LOSSES[name](student, teacher, **options)
    assert values.shape == (5, 3) and values.dtype == torch.float64
    p, q = (x.softmax(-1).flatten(0, 1).tolist() for x in (teacher, student))
    expected = [PUBLISHED[name](a, b, **options) for a, b in zip(p, q)]
    torch.testing.assert_close(values.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    single = kd.LOSSES[name](student.float(), teacher.float(), **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), values, rtol=1e-4, atol=2e-6)
    half = student.bfloat16(), teacher.bfloat16()
    assert torch.equal(kd.LOSSES[name](*half, **options), kd.LOSSES[name](*(x.float() for x in half), **options))


# p, q, what they give. The mean of HALF and QUARTER is (3/8, 5/8)
HALF, QUARTER = (1 / 2, 1 / 2), (1 / 4, 3 / 4)
BY_HAND = [
    ("forward_kl", {}, HALF, QUARTER, math.log(4 / 3) / 2),  # 1/2 log 2 + 1/2 log 2/3
    ("reverse_kl", {}, HALF, QUARTER, math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4),
    ("tvd", {}, HALF, QUARTER, 1 / 4),
    ("skew_forward_kl", {"alpha": 0.5}, HALF, QUARTER, math.log(4 / 3) / 2 + math.log(4 / 5) / 2),
    ("skew_reverse_kl", {"alpha": 0.5}, HALF, QUARTER, math.log(2 / 3) / 4 + 3 * math.log(6 / 5) / 4),
    ("jsd", {}, HALF, QUARTER, math.log(16 / 15) / 4 + math.log(2 / 3) / 8 + 3 * math.log(6 / 5) / 8),
]
# p's tail is {.15, .05} (mass .2; with .3 it would be .5), its head {.5, .3}. q is off in the head alone: forward KL; in
# the tail alone: reverse KL; in both: gaps .2 + .1 and .05 + .15
P, TAIL = (0.15, 0.5, 0.05, 0.3), {"tail_mass": 0.4}
for q, head in [((0.15, 0.2, 0.05, 0.6), 1.0), ((0.05, 0.5, 0.15, 0.3), 0.0), ((0.1, 0.3, 0.2, 0.4), 0.6)]:
    BY_HAND.append(("adaptive_kl", TAIL, P, q, head * kl(P, q) + (1 - head) * kl(q, P)))


@pytest.mark.parametrize("name, options, p, q, value", BY_HAND)
def test_loss_by_hand(name, options, p, q, value):
    found = kd.LOSSES[name](logits_of(q, shift=3.0), logits_of(p, shift=-1.0), **options)
    assert found.tolist() == pytest.approx([value], rel=1e-9)


@pytest.mark.parametrize("name, options", [(name, o) for name, o in OPTIONS if name != "adaptive_kl"])
def test_gradcheck(name, options):
    student, teacher = (random_logits(3, 6, seed=seed).requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda s, t: kd.LOSSES[name](s, t, **options), (student, teacher))


def test_adaptive_kl_gradient_leaves_the_weights_alone():
    """g_head and g_tail are constants to the gradient: it is that of the two KLs, weighed."""
    student, teacher = random_logits(1, 6, seed=3).requires_grad_(), random_logits(1, 6, seed=4)
    kls = [kd.forward_kl(student, teacher), kd.reverse_kl(student, teacher)]
    forward, reverse = (torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in kls)
    value = kd.adaptive_kl(student, teacher)
    share = (value - kls[1]) / (kls[0] - kls[1])  # g_head / g
    found = torch.autograd.grad(value.sum(), student)[0]
    torch.testing.assert_close(found, (share * forward + (1 - share) * reverse).detach())


@EACH_LOSS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extreme_logits(name, options, dtype):
    """Logits of +-10,000 in all meetings: sure and right, sure and wrong, undecided. Exactly 0 where the two are equal."""
    big = 1e4
    rows = [[big, -big, 0, 0], [-big, big, 0, 0], [-big, -big, -big, -big], [big, big, big, 0], [0, 0, 0, 0]]
    rows += random_logits(2, 4, scale=30.0).tolist()
    pairs = [(a, b) for a in rows for b in rows]
    student, teacher = (torch.tensor(column, dtype=dtype, requires_grad=True) for column in zip(*pairs))
    values = kd.LOSSES[name](student, teacher, **options)
    values.sum().backward()
    assert values.isfinite().all() and (values >= -1e-6).all()
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()
    equal = slice(0, None, len(rows) + 1)
    assert values[equal].abs().max() == 0 and student.grad[equal].abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Chunks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_is_dense(dtype, tolerance, chunk, with_bias):
    """Loss and all gradients, through a scaled loss; in bfloat16 against float32 arithmetic on the same numbers."""
    leaf = lambda seed, *shape: random_logits(*shape, seed=seed, scale=0.7).to(dtype).requires_grad_()
    hidden, weight, bias = leaf(1, 10, 8), leaf(2, 31, 8), leaf(3, 31) if with_bias else None
    teacher, targets = random_logits(10, 31, seed=4).to(dtype), torch.arange(10)
    leaves = [x for x in (hidden, weight, bias) if x is not None]

    def losses(part):
        return lambda logits, rows: kd.total_loss(logits, teacher[part][rows], targets[part][rows], kd.jsd, 0.4, 1.5)

    found, sums = kd.ChunkedHeadLoss.apply(hidden, weight, bias, losses, chunk)
    grads = torch.autograd.grad(3 * found, leaves)
    exact = [x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in leaves]
    logits = F.linear(*exact)
    parts = kd.total_loss(logits, teacher.to(logits.dtype), targets, kd.jsd, 0.4, 1.5)
    expected = torch.autograd.grad(3 * parts[0].sum(), exact)
    close = lambda a, b: (a.to(b.dtype) - b).norm() <= tolerance * b.norm()
    assert not sums.requires_grad and close(sums, torch.stack([x.sum() for x in parts]).detach())
    assert close(found.detach(), parts[0].sum().detach())
    assert all(a.dtype == dtype and close(a, b) for a, b in zip(grads, expected))


def test_weight_gradient_is_summed_in_float32():
    """512 chunks that each add 1 to a bfloat16 weight: bfloat16 would stop at 256, as 256 + 1 rounds to 256."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = kd.ChunkedHeadLoss.apply(hidden, weight, None, lambda part: lambda logits, rows: (logits.sum(-1),), 1)
    loss.backward(retain_graph=True)
    assert weight.grad.item() == 512
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # gradients are scaled where they are
        loss.backward()


def test_no_full_logits():
    """No tensor of more than (chunk, V) is made, forward or backward: recorded at every operation."""
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    hidden, weight = random_logits(64, 2).requires_grad_(), random_logits(100, 2, seed=1).requires_grad_()
    targets, teacher = torch.zeros(64, dtype=torch.long), random_logits(64, 2, seed=2)

    def losses(part):
        p_logits = teacher[part] @ weight.T
        return lambda logits, rows: kd.total_loss(logits, p_logits[rows], targets[part][rows], kd.tvd, 0.5, 1.0)

    with Record():
        kd.ChunkedHeadLoss.apply(hidden, weight, None, losses, 8)[0].backward()
    assert max(sizes) == 8 * 100


def dense_losses(lm, teacher, rows, divergence, rate, temperature):
    """Loss, CE and KD summed over response tokens: one unpadded row at a time, full logits, cut to the vocabulary.

    (1-r) CE at temperature 1 + r D at temperature T, without T^2; a response that is no label is distilled.
    """
    totals = []
    for prompt, response, labelled in rows:
        logits, theirs = (all_logits(m, prompt + response)[len(prompt) - 1 : -1] for m in (lm, teacher))
        log_q, log_p = logits.log_softmax(-1), theirs.log_softmax(-1)
        ce = -log_q.gather(-1, torch.tensor(response)[:, None]).sum() * labelled
        div = divergence((log_q / temperature).log_softmax(-1), (log_p / temperature).log_softmax(-1).detach()).sum()
        totals.append(torch.stack([(1 - rate) * ce + rate * div, ce, div]))
    return torch.stack(totals).sum(0)


ROWS = [
    ([1, 5, 6], [7, 8, 9, 2], True),
    ([1, 9], [4, 2], False),
    ([1, 4, 5, 10, 11], [2], True),
    ([3], [6, 6, 7, 12, 13, 2], True),
]


@pytest.mark.parametrize("student", ["llama_tied", "llama_bias", "qwen2"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_model_is_dense(student, chunk, monkeypatch):
    """KDModel on a padded batch, loss, CE, KD and every gradient; embeddings gather both gradients where they are tied."""
    monkeypatch.setattr(decode, "head_chunk", lambda vocab_size: chunk)
    lm, teacher = MODELS[student](1), make_model("qwen2", 2, width=24, rows=30)
    inputs = responses.collate(ROWS, PAD, "cpu")
    logits = responses.LiveTeacher(teacher, VOCAB)(inputs, None)
    loss, sums = kd.KDModel(lm, VOCAB, kd.skew_reverse_kl, 0.3, 2.0)(**inputs, teacher_logits=logits)
    loss.backward()
    found = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    expected = dense_losses(lm, teacher, ROWS, kd.skew_reverse_kl, 0.3, 2.0)
    expected[0].backward()
    assert [sums[key].item() for key in ("loss", "ce", "kd")] == pytest.approx(expected.tolist(), rel=1e-5)
    for name, parameter in lm.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 2e-5 * parameter.grad.norm(), name
    if lm.config.vocab_size > VOCAB and not lm.config.tie_word_embeddings:
        assert found["lm_head.weight"][VOCAB:].abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

SMALL = "--device cpu --threads 1 --batch-size 8 --micro-batch-size 4 --lr 2e-3 --max-new-tokens 40 --max-steps 4"
SMALL += " --template chat --prompts-per-batch 16"


@pytest.fixture
def distil(pair_of_models, prompts_file, tmp_path):
    """distil("name", "flags") -> OUT, its metrics; a small run: 40 examples, batches of 8 in micro-batches of 4."""

    def run(name, flags="", teacher=True):
        paths = ["--student", pair_of_models["student"], "--data", prompts_file, "--out", str(tmp_path / name)]
        paths += ["--teacher", pair_of_models["teacher"]] * teacher
        kd.main([*paths, *f"{SMALL} {flags}".split()])
        return tmp_path / name, logged(tmp_path / name)

    return run


@pytest.fixture
def gold(prompts_file, tokenizer):
    """(prompt ids, response ids, label) of the data, in order, put together by hand."""
    ids = lambda text: tokenizer.convert_tokens_to_ids(list(text))
    rows = runs.read_jsonl(prompts_file)
    return [([tokenizer.bos_token_id, *ids(r["prompt"])], [*ids(r["response"]), EOS], True) for r in rows]


METRICS = {"stage", "step", "loss", "ce", "kd", "grad_norm", "lr", "response_tokens"}
METRICS |= {"seconds", "tokens", "tokens_per_second", "peak_memory_gb"}
LOOPS = {
    "jsd": ("--loss jsd --jsd-beta 0.2", lambda s, t: kd.jsd(s, t, 0.2)),
    "skew": ("--loss skew_reverse_kl --skew-alpha 0.3", lambda s, t: kd.skew_reverse_kl(s, t, 0.3)),
    "adaptive": ("--loss adaptive_kl --tail-mass 0.3", lambda s, t: kd.adaptive_kl(s, t, 0.3)),
    "checkpointed": ("--activation-checkpointing --micro-batch-size 1", kd.forward_kl),
}


@pytest.mark.parametrize("flags, divergence", LOOPS.values(), ids=LOOPS)
def test_train_equals_a_plain_loop(distil, plain_models, gold, monkeypatch, flags, divergence):
    """Four steps over 21 examples (the third batch is short) against one row at a time, without chunks."""
    monkeypatch.setattr(decode, "head_chunk", lambda vocab_size: 13)
    out, _ = distil("run", f"--limit 21 --kd-rate 0.7 --temperature 2 --seed 9 --max-grad-norm 0.5 {flags}")
    batches = [[gold[i] for i in training.batch_of_step(step, 21, 8, 9)] for step in range(4)]
    assert [len(batch) for batch in batches] == [8, 8, 5, 8]

    def losses(batch):
        tokens = torch.tensor(sum(len(response) for _, response, _ in batch))
        values = dense_losses(*plain_models, batch, divergence, 0.7, 2.0) / tokens
        return {**dict(zip(("loss", "ce", "kd"), values)), "response_tokens": tokens}

    assert_plain_loop(out, plain_models[0], losses, batches, max_grad_norm=0.5)


def test_epochs(distil, gold, capsys):
    """Without --max-steps: each example once in an epoch, in another order each time. A finished run is left alone."""
    flags = "--limit 21 --max-steps 0 --epochs 2"
    out, steps = distil("run", flags)
    tokens, total = [m["response_tokens"] for m in steps], sum(len(response) for _, response, _ in gold[:21])
    assert len(steps) == 6 and sum(tokens[:3]) == sum(tokens[3:]) == total and tokens[:3] != tokens[3:]
    assert all(row.keys() == METRICS for row in runs.read_jsonl(out / "metrics.jsonl"))
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    capsys.readouterr()
    distil("run", flags)
    assert files == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert capsys.readouterr().out.startswith(f"training: {out / 'student'} was there already\n")


def test_sft_needs_no_teacher(distil, plain_models, gold):
    """--kd-rate 0, no --teacher: cross-entropy on the data. A teacher changes nothing then, and is not loaded."""
    out, steps = distil("sft", "--kd-rate 0", teacher=False)
    batch = [gold[i] for i in training.batch_of_step(0, 40, 8, 0)]
    loss, ce, _ = dense_losses(plain_models[0], plain_models[0], batch, kd.tvd, 0.0, 1.0) / steps[0]["response_tokens"]
    assert steps[0]["loss"] == steps[0]["ce"] == pytest.approx(ce.item(), rel=1e-5) and loss == ce
    assert all(m["kd"] == 0 for m in steps) and steps[-1]["loss"] < steps[0]["loss"]
    assert_identical(distil("with-teacher", "--kd-rate 0")[0], out)
    with pytest.raises(UserError, match="--teacher is missing"):
        distil("responses", "--kd-rate 0 --mode teacher", teacher=False)


def test_long_responses_are_left_out(distil, gold, capsys):
    lengths = [len(response) for _, response, _ in gold]
    limit = sorted(lengths)[20]
    kept = [n for n in lengths if n <= limit]
    _, steps = distil("run", f"--max-new-tokens {limit} --max-steps 1 --batch-size 40")
    printed = capsys.readouterr().out
    assert f"skipped: {40 - len(kept)} responses over --max-new-tokens {limit}\n" in printed
    assert f"kd: {len(kept)} examples" in printed and steps[0]["response_tokens"] == sum(kept)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("flags", ["--save-every 2", "--save-every 4 --mode student"])
def test_resume_bit_for_bit(distil, tmp_path, monkeypatch, flags, told):
    """Killed in step 6, or told to stop in step 5, then taken up again: the same metrics and weights as without."""
    flags += " --max-steps 7"
    whole, original, calls = distil("whole", flags)[0], training.optimizer_step, []

    def end(*args):
        calls.append(1)
        if told and len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if not told and len(calls) == 6:
            raise InterruptedError
        return original(*args)

    monkeypatch.setattr(training, "optimizer_step", end)
    with pytest.raises(runs.Stopped if told else InterruptedError, match="after step 5," if told else None):
        distil("parts", flags)
    monkeypatch.undo()
    assert (tmp_path / f"parts/checkpoint/step-{5 if told else 4:06d}").is_dir()
    assert_identical(distil("parts", flags)[0], whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_students_on_the_way(distil, monkeypatch, dtype):
    """2 of them in 7 steps: after 3 and 5, each with the weights of its step; the end is what it is without them.

    Killed as one is written, and between one and its checkpoint: the one is made again, the other stays as it is.
    """
    flags = f"--max-steps 7 --save-every 2 --mode teacher --max-new-tokens 9 --save-dtype {str(dtype)[6:]}"
    whole, states = distil("whole", flags)[0], {}
    assert not (whole / "students").exists()
    save, rename = training.save_checkpoint, os.rename

    def record(folder, model, optimizer, step, world):
        states[step] = {name: p.full_tensor().clone() for name, p in model.lm.named_parameters()}
        save(folder, model, optimizer, step, world)

    def die(part, function):
        def deadly(*args):
            if part in f"{args}":
                raise InterruptedError
            return function(*args)

        return deadly

    flags += " --save-students 2"
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(os, "rename", die("students/step-000003", rename))
        distil("out", flags)
    students = whole.with_name("out") / "students"
    assert [path.name for path in students.iterdir()] == [".step-000003.partial"]
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(training, "save_checkpoint", die(", 6, World", save))
        distil("out", flags)
    files = {path: path.stat().st_mtime_ns for path in students.rglob("*")}
    out, _ = distil("out", flags)
    assert files == {path: path.stat().st_mtime_ns for path in students.rglob("*")}
    assert_identical(out, whole)
    monkeypatch.setattr(training, "save_checkpoint", record)
    distil("recorded", f"{flags} --save-every 1")
    assert sorted(path.name for path in students.iterdir()) == ["step-000003", "step-000005"]
    for step in (3, 5):
        folder = students / f"step-{step:06d}"
        found, state = load_file(folder / "model.safetensors"), states[step]
        assert found and all(torch.equal(value, state[name].to(dtype)) for name, value in found.items())
        assert runs.read_json(folder / "config.json")["dtype"] == str(dtype)[6:]


@pytest.mark.parametrize(
    "total, count, expected", [(60, 2, {20, 40}), (7, 3, {2, 4, 6}), (3, 9, {1, 2}), (1, 5, set())]
)
def test_steps_of_the_students(tmp_path, monkeypatch, total, count, expected):
    """At k/(N+1) of the steps, rounded up, and never at the end, which is OUT/student."""
    saved, args = [], kd.parse_args(["--save-students", str(count)])
    monkeypatch.setattr(training, "save_model", lambda folder, *_: saved.append(int(folder.name[5:])))
    world = runs.World(0, 1, torch.device("cpu"))
    monkeypatch.setattr(training, "save_checkpoint", lambda *_: None)
    monkeypatch.setattr(runs.World, "first", lambda _, function: function())
    monkeypatch.setattr(runs.World, "any", lambda _, flag: bool(flag))
    for step in range(1, total + 1):
        training.end_step(args, step, total, tmp_path, SimpleNamespace(lm=None), None, None, [], world)
    assert saved == sorted(expected)


# ---------------------------------------------------------------------------------------------------------------------
# --mode teacher and student
# ---------------------------------------------------------------------------------------------------------------------


def test_teacher_mode(distil, plain_models, gold, tokenizer):
    """SeqKD: each token is the teacher's likeliest, by the plain model; stored, reused, written again if one is lost."""
    flags = "--mode teacher --max-new-tokens 12 --limit 20 --max-steps 2"
    out, steps = distil("run", flags)
    files = sorted((out / "responses").glob("[!.c]*"))
    assert [f.name for f in files] == ["00000.jsonl", "00001.jsonl"]
    stored = [row for file in files for row in runs.read_jsonl(file)]
    for i, (row, (prompt, _, _)) in enumerate(zip(stored, gold[:20], strict=True)):
        ids = row["response_ids"]
        assert row["prompt_id"] == i and row["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert slow_decode(plain_models[1], prompt, lambda logits, t: logits.argmax().item(), 12, [EOS])[0] == ids
    batch = training.batch_of_step(0, 20, 8, 0)
    assert steps[0]["response_tokens"] == sum(len(stored[i]["response_ids"]) for i in batch)

    before, time, whole = [f.read_bytes() for f in files], files[0].stat().st_mtime_ns, out.with_name("whole")
    files[1].unlink()
    (out / "student").rename(whole)
    distil("run", flags)
    assert [f.read_bytes() for f in files] == before and files[0].stat().st_mtime_ns == time
    assert all((out / "student" / file.name).read_bytes() == file.read_bytes() for file in whole.iterdir())

    sampled = [distil(f"{seed}", f"{flags} --teacher-decoding sample --seed {seed}")[0] for seed in (0, 1)]
    contents = [before[0], *((folder / "responses" / "00000.jsonl").read_bytes() for folder in sampled)]
    assert len(set(contents)) == 3, "other responses than the greedy ones, the seed's own"


OTHER_RESPONSES = {
    "--teacher-decoding sample": "seed: None there, 0 now; teacher_decoding: greedy there, sample now",
    "--max-new-tokens 9": "max_new_tokens: 12 there, 9 now",
    "--limit 19": "examples: ",
    "--prompts-per-batch 8": "prompts_per_batch: 16 there, 8 now",
    "--dtype bfloat16": "dtype: float32 there, bfloat16 now",
}


def test_shared_responses(distil, pair_of_models, tmp_path, monkeypatch):
    """--responses: made once, then the same for another seed, loss and student, without the teacher.

    Those of something else are refused; sampled ones are of one seed.
    """
    flags, shared = "--mode teacher --max-new-tokens 12 --limit 20 --max-steps 1", f"--responses {tmp_path}/responses"
    alone, first = distil("alone", flags)[0], distil("first", f"{flags} {shared}")[0]
    files = sorted((tmp_path / "responses").glob("0*"))
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in sorted((alone / "responses").glob("0*"))]
    assert len(files) == 2 and not (first / "responses").exists()
    assert_identical(first, alone)
    times = [f.stat().st_mtime_ns for f in files]
    with monkeypatch.context() as patch:
        patch.setattr(training, "load_teacher", lambda *_: pytest.fail("the teacher is loaded"))
        seed = f"{flags} {shared} --kd-rate 0 --seed 7 --student {pair_of_models['teacher']}"
        assert len(distil("seed", seed)[1]) == 1
    for k, (others, words) in enumerate(OTHER_RESPONSES.items()):
        with pytest.raises(
            UserError, match=f"made otherwise .*{words}.*, in {tmp_path}/responses, give another folder"
        ):
            distil(f"other{k}", f"{flags} {shared} {others}")
    assert [f.stat().st_mtime_ns for f in files] == times
    sampled = f"{flags} --teacher-decoding sample --responses {tmp_path}/sampled"
    distil("sampled", sampled)
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        distil("sampled-1", f"{sampled} --seed 1")


HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(99)"


def test_one_run_makes_the_responses(distil, tmp_path):
    """The second at once would do the first one's work, or spoil it: refused. A complete folder is anybody's to read."""
    flags, folder = "--mode teacher --max-new-tokens 9 --limit 20 --max-steps 1", tmp_path / "responses"
    out = distil("first", flags)[0]
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, folder / ".lock"], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(
            UserError, match=f"^another run is at work, in {folder}, wait for it or give another folder$"
        ):
            distil("second", f"{flags} --responses {folder}")
        assert [f.name for f in folder.iterdir()] == [".lock"]
        for name in ("cache.json", "00000.jsonl", "00001.jsonl"):
            shutil.copy(out / "responses" / name, folder)
        assert_identical(distil("second", f"{flags} --responses {folder}")[0], out)
        other.kill()


def test_student_mode(distil, plain_models, gold, monkeypatch):
    """On-policy: half of each batch is what the student of that moment samples, checked by drawing each sample alone.

    Those tokens count in KD, not in CE. Every loss of the run is computed again from the weights and samples of its step.
    """
    seen = []  # of each step: the weights, the samples
    original = responses.sample_from_student

    def spy(args, world, tokens, replica, lm, *rest):
        sampled = original(args, world, tokens, replica, lm, *rest)
        for ours, theirs in zip(replica.parameters(), lm.parameters()):
            assert torch.equal(ours, theirs.full_tensor())
        seen.append(({k: v.clone() for k, v in replica.state_dict().items()}, sampled))
        return sampled

    monkeypatch.setattr(responses, "sample_from_student", spy)
    _, steps = distil("run", "--mode student --on-policy 0.5 --max-steps 3")
    assert len(seen) == 3
    lm, teacher = plain_models
    for step, (state, sampled) in enumerate(seen):
        lm.load_state_dict(state)
        batch = training.batch_of_step(step, 40, 8, 0)
        assert sorted(sampled) == sorted(batch[:4])
        for i in batch[:2]:  # each sample drawn alone, without cache
            place = (0, decode.KD_STUDENT_STAGE, i, step)
            pick = lambda logits, t, place=place: slow_draw(logits.tolist(), slow_noise(*place, t))
            assert slow_decode(lm, gold[i][0], pick, 40, [EOS])[0] == sampled[i]
        rows = [(gold[i][0], sampled.get(i, gold[i][1]), i not in sampled) for i in batch]
        expected = dense_losses(lm, teacher, rows, kd.forward_kl, 0.5, 1.0) / steps[step]["response_tokens"]
        assert [steps[step][k] for k in ("loss", "ce", "kd")] == pytest.approx(expected.tolist(), rel=1e-4)
    monkeypatch.undo()
    none = distil("none", "--mode student --on-policy 0 --max-steps 2")[0]
    assert_identical(none, distil("gold", "--max-steps 2")[0])


@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_prompts_alone(distil, tmp_path, mode):
    """Where a model writes the responses: the student's are no labels, the teacher's are."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"1{k}+22:"}) + "\n" for k in range(8)))
    [step] = distil("run", f"--mode {mode} --data {path} --max-new-tokens 8 --max-steps 1")[1]
    assert step["loss"] == pytest.approx(0.5 * (step["ce"] + step["kd"])) and step["kd"] > 0
    assert (step["ce"] > 0) == (mode == "teacher")


# ---------------------------------------------------------------------------------------------------------------------
# --teacher-cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["--loss reverse_kl --temperature 2", "--mode teacher --max-new-tokens 9"])
def test_cache_of_the_whole_vocabulary_equals_the_live_teacher(distil, tmp_path, flags):
    live, live_steps = distil("live", flags)
    cached, cached_steps = distil("cached", f"{flags} --teacher-cache {tmp_path}/cache --teacher-top-k 64")
    for ours, theirs in zip(cached_steps, live_steps, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-6)
    expected = weights(live)
    for key, weight in weights(cached).items():
        assert (weight - expected[key]).norm() <= 2e-3 * expected[key].norm(), key


OTHERWISE = {
    "--teacher-top-k 4": "teacher_top_k: 3 there, 4 now",
    "--limit 39": "examples: ",
    "--prompts-per-batch 8": "prompts_per_batch: 16 there, 8 now",
    "--dtype bfloat16": "dtype: float32 there, bfloat16 now",
}


def test_cache(distil, pair_of_models, tmp_path, monkeypatch):
    """k = 3: another loss than the live teacher's; made once, then used without the teacher; a lost file is made again.

    A cache that was made for something else is refused, with --accept-changes, too: it would be of another text.
    """
    cache = f"--max-steps 2 --teacher-cache {tmp_path}/cache --teacher-top-k 3"
    live, first = distil("live", "--max-steps 1"), distil("first", cache)
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert [f.name for f in files] == [f"{k:05d}.safetensors" for k in range(3)]
    assert abs(live[1][0]["kd"] - first[1][0]["kd"]) > 1e-3 and live[1][0]["ce"] == pytest.approx(first[1][0]["ce"])

    content, times = [f.read_bytes() for f in files], [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    distil("second", cache)
    assert [f.read_bytes() for f in files] == content and files[2].stat().st_mtime_ns == times[2]
    for k, (flags, words) in enumerate(OTHERWISE.items()):
        with pytest.raises(UserError, match=f"made otherwise .*{words}.*give another folder$"):
            distil(f"other{k}", f"{cache} {flags} --accept-changes")

    original = models.load_model

    def no_teacher(path, *args):
        assert path != pair_of_models["teacher"]
        return original(path, *args)

    monkeypatch.setattr(models, "load_model", no_teacher)
    assert_identical(distil("third", cache)[0], first[0])
    with pytest.raises(AssertionError):
        distil("fourth")


# ---------------------------------------------------------------------------------------------------------------------
# Processes and the command
# ---------------------------------------------------------------------------------------------------------------------


def test_closing_table(distil, prompts_file, capsys, monkeypatch):
    """With --eval-data: student before and after; without a teacher no distance. Its rule is kd.py's first_mismatch."""
    flags = f"--eval-data {prompts_file} --eval-limit 4 --max-steps 1"
    out, _ = distil("run", flags)
    summary = runs.read_json(out / "summary.json")
    assert list(summary) == ["teacher", "student before", "student after"]
    assert "4 held-out prompts" in capsys.readouterr().out and summary["student before"] != summary["student after"]
    out, _ = distil("sft", f"{flags} --kd-rate 0", teacher=False)
    assert runs.read_json(out / "summary.json")["student after"].keys() == {"accuracy"}

    tables = []
    monkeypatch.setattr(measure, "closing_table", lambda *arguments: tables.append(arguments[7:]))
    distil("run", flags)
    assert tables == [(16, 4.0, kd.first_mismatch)]


def test_flags_win_over_the_toys_defaults():
    args = kd.parse_args(["--student", "out/warmup/student", "--loss", "jsd"])
    assert (args.student, args.loss, args.max_steps) == ("out/warmup/student", "jsd", 60)
