"""kd.py and kd_data.py against formulas in plain Python, the dense loss, and a plain training loop.

The twins: each divergence term by term over Python floats; the full model on one unpadded example, log_softmax over the
whole vocabulary, no chunks, no FSDP; AdamW from torch on that.
"""

import inspect
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, launch, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import common
import decode
import kd
import kd_data
import models
import training

VOCAB, PAD, EOS = 22, 0, 2
PURE = [*kd.LOSSES.values(), kd.total_loss, kd.ChunkedHeadLoss, kd_data.top_k_logprobs, kd_data.expand_top_k]
MIXTURES = ["jsd", "skew_forward_kl", "skew_reverse_kl"]


@pytest.fixture(scope="module")
def world():
    return common.start_processes("cpu", 1)


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
OPTIONS = [(name, {}) for name in PUBLISHED] + [
    ("jsd", {"beta": 0.1}),
    ("jsd", {"beta": 0.9}),
    ("skew_forward_kl", {"alpha": 0.7}),
    ("skew_reverse_kl", {"alpha": 0.7}),
    ("adaptive_kl", {"tail_mass": 0.2}),
    ("adaptive_kl", {"tail_mass": 0.0}),
]


def logits_of(*probabilities, shift=0.0):
    return torch.tensor(probabilities, dtype=torch.float64).log() + shift


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(scale).to(dtype)


@pytest.mark.parametrize("name, options", OPTIONS)
@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
def test_loss_is_the_published_formula(name, options, scale):
    student, teacher = random_logits(5, 3, 17, seed=1, scale=scale), random_logits(5, 3, 17, seed=2, scale=scale)
    values = kd.LOSSES[name](student, teacher, **options)
    assert values.shape == (5, 3) and values.dtype == torch.float64
    p, q = (x.softmax(-1).flatten(0, 1).tolist() for x in (teacher, student))
    expected = [PUBLISHED[name](a, b, **options) for a, b in zip(p, q)]
    torch.testing.assert_close(values.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    single = kd.LOSSES[name](student.float(), teacher.float(), **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), values, rtol=1e-4, atol=2e-6)


HALF, QUARTER = (1 / 2, 1 / 2), (1 / 4, 3 / 4)  # p and q; their mean is (3/8, 5/8)


@pytest.mark.parametrize(
    "name, options, value",
    [
        ("forward_kl", {}, math.log(4 / 3) / 2),  # 1/2 log 2 + 1/2 log 2/3
        ("reverse_kl", {}, math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4),
        ("tvd", {}, 1 / 4),
        ("skew_forward_kl", {"alpha": 0.5}, math.log(4 / 3) / 2 + math.log(4 / 5) / 2),
        ("skew_reverse_kl", {"alpha": 0.5}, math.log(2 / 3) / 4 + 3 * math.log(6 / 5) / 4),
        ("jsd", {}, math.log(4 / 3) / 4 + math.log(4 / 5) / 4 + math.log(2 / 3) / 8 + 3 * math.log(6 / 5) / 8),
    ],
)
def test_loss_by_hand(name, options, value):
    found = kd.LOSSES[name](logits_of(QUARTER, shift=3.0), logits_of(HALF, shift=-1.0), **options)
    assert found.tolist() == pytest.approx([value], rel=1e-12)


def test_adaptive_kl_by_hand():
    """p = (.5, .3, .15, .05), tail_mass .4: the tail is {.15, .05} (mass .2; with .3 it would be .5), the head {.5, .3}."""
    p = (0.5, 0.3, 0.15, 0.05)
    for q, head, tail in [
        ((0.2, 0.6, 0.15, 0.05), 1.0, 0.0),  # q is off in the head alone: forward KL
        ((0.5, 0.3, 0.05, 0.15), 0.0, 1.0),  # in the tail alone: reverse KL
        ((0.3, 0.4, 0.1, 0.2), 0.6, 0.4),  # gaps .2 + .1 and .05 + .15
    ]:
        value = kd.adaptive_kl(logits_of(q), logits_of(p), tail_mass=0.4).item()
        assert value == pytest.approx(head * kl(p, q) + tail * kl(q, p), rel=1e-9)
        order = [2, 0, 3, 1]  # the tokens' order says nothing
        shuffled = [logits_of([x[i] for i in order]) for x in (q, p)]
        assert kd.adaptive_kl(*shuffled, tail_mass=0.4).item() == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name, options", [(n, o) for n, o in OPTIONS if n != "adaptive_kl"])
def test_gradcheck(name, options):
    student, teacher = (random_logits(3, 6, seed=seed).requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda s, t: kd.LOSSES[name](s, t, **options), (student, teacher))


def test_adaptive_kl_gradient_leaves_the_weights_alone():
    """g_head and g_tail are constants to the gradient: it is theirs of the two KLs, weighed."""
    student, teacher = random_logits(1, 6, seed=3).requires_grad_(), random_logits(1, 6, seed=4)
    kls = [kd.forward_kl(student, teacher), kd.reverse_kl(student, teacher)]
    forward, reverse = (torch.autograd.grad(value.sum(), student, retain_graph=True)[0] for value in kls)
    value = kd.adaptive_kl(student, teacher)
    share = (value - kls[1]) / (kls[0] - kls[1])  # g_head / g
    found = torch.autograd.grad(value.sum(), student)[0]
    torch.testing.assert_close(found, (share * forward + (1 - share) * reverse).detach())


@pytest.mark.parametrize("name, options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_exactly_zero_where_student_is_teacher(name, options, dtype, scale):
    logits = random_logits(7, 50, seed=5, scale=scale, dtype=dtype)
    student = logits.clone().requires_grad_()
    values = kd.LOSSES[name](student, logits, **options)
    assert values.abs().max() == 0
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.isfinite().all() and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name, options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_finite_at_extreme_logits(name, options, dtype):
    """Logits of +-10,000 in all meetings: sure and right, sure and wrong, undecided."""
    big = 1e4
    rows = [[big, -big, 0, 0], [-big, big, 0, 0], [-big, -big, -big, -big], [big, big, big, 0], [0, 0, 0, 0]]
    pairs = [(a, b) for a in rows for b in rows]
    student = torch.tensor([a for a, _ in pairs], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([b for _, b in pairs], dtype=dtype, requires_grad=True)
    values = kd.LOSSES[name](student, teacher, **options)
    values.sum().backward()
    assert values.isfinite().all() and (values >= -1e-6).all()
    assert student.grad.isfinite().all() and teacher.grad.isfinite().all()


@pytest.mark.parametrize("name", kd.LOSSES)
def test_bfloat16_is_computed_in_float32(name):
    student, teacher = (random_logits(4, 100, seed=seed, dtype=torch.bfloat16) for seed in (6, 7))
    assert torch.equal(kd.LOSSES[name](student, teacher), kd.LOSSES[name](student.float(), teacher.float()))


number = st.floats(-30, 30, allow_nan=False)
rows = st.integers(2, 9).flatmap(lambda n: st.tuples(*[st.lists(number, min_size=n, max_size=n)] * 2))
share = st.floats(0.01, 0.99)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(rows, share, st.floats(-5, 5))
def test_divergences_are_divergences(logits, weight, shift):
    """None is negative, each has its bound, and a constant added to the logits changes nothing."""
    student, teacher = torch.tensor(logits, dtype=torch.float64)
    options = {"jsd": {"beta": weight}, "adaptive_kl": {"tail_mass": weight}}
    options.update(skew_forward_kl={"alpha": weight}, skew_reverse_kl={"alpha": weight})
    bounds = {"tvd": 1, "skew_forward_kl": -math.log(weight), "skew_reverse_kl": -math.log(weight)}
    bounds["jsd"] = -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)
    for name, loss in kd.LOSSES.items():
        value = loss(student, teacher, **options.get(name, {})).item()
        assert -1e-12 <= value <= bounds.get(name, math.inf) + 1e-9, name
        if name != "adaptive_kl":  # its tail ends at a token: rounding may move the end
            assert loss(student + shift, teacher - shift, **options.get(name, {})).item() == pytest.approx(
                value, abs=1e-9
            )


def test_losses_among_each_other():
    """Swapped roles, symmetry, and the limits that GKD and DistiLLM name."""
    s, t = random_logits(9, 12, seed=8), random_logits(9, 12, seed=9)
    close = lambda a, b, **kwargs: torch.testing.assert_close(a, b, **(kwargs or {"rtol": 1e-9, "atol": 1e-12}))
    close(kd.reverse_kl(s, t), kd.forward_kl(t, s))
    close(kd.tvd(s, t), kd.tvd(t, s))
    close(kd.jsd(s, t), kd.jsd(t, s))
    close(kd.jsd(s, t, beta=0.2), kd.jsd(t, s, beta=0.8))
    close(kd.skew_reverse_kl(s, t, alpha=0.3), kd.skew_forward_kl(t, s, alpha=0.3))
    parts = 0.2 * kd.skew_forward_kl(s, t, alpha=0.2) + 0.8 * kd.skew_reverse_kl(s, t, alpha=0.8)
    close(kd.jsd(s, t, beta=0.2), parts)
    close(kd.skew_forward_kl(s, t, alpha=0.0), kd.forward_kl(s, t))
    close(kd.skew_reverse_kl(s, t, alpha=0.0), kd.reverse_kl(s, t))
    near = {"rtol": 1e-3, "atol": 1e-4}
    close(kd.skew_forward_kl(s, t, alpha=1e-7), kd.forward_kl(s, t), **near)
    close(kd.skew_forward_kl(s, t, alpha=1 - 1e-7), torch.zeros(9, dtype=torch.float64), **near)
    close(kd.jsd(s, t, beta=1e-6) / 1e-6, kd.forward_kl(s, t), **near)
    close(kd.jsd(s, t, beta=1 - 1e-6) / 1e-6, kd.reverse_kl(s, t), **near)
    close(kd.adaptive_kl(s, t, tail_mass=0.0), kd.forward_kl(s, t))  # no tail


def copied(thing):
    """What a reader gets who copies the source: it may use torch, F and math, and nothing else of this project."""
    exec(inspect.getsource(thing), namespace := {"torch": torch, "F": F, "math": math})  # noqa: S102
    return namespace[thing.__name__]


@pytest.mark.parametrize("name", kd.LOSSES)
def test_copied_loss(name):
    student, teacher = random_logits(3, 8, seed=1), random_logits(3, 8, seed=2)
    assert torch.equal(copied(kd.LOSSES[name])(student, teacher), kd.LOSSES[name](student, teacher))


def test_copied_functions():
    logits, targets = random_logits(4, 8, seed=3), torch.tensor([1, -100, 3, 7])
    for args in [(logits, logits + 1, targets, kd.jsd, 0.3, 2.0), (logits, None, targets, None, 0, 1.0)]:
        assert torch.equal(torch.stack(copied(kd.total_loss)(*args)), torch.stack(kd.total_loss(*args)))
    stored = copied(kd_data.top_k_logprobs)(logits, 3)
    assert all(torch.equal(a, b) for a, b in zip(stored, kd_data.top_k_logprobs(logits, 3)))
    assert torch.equal(copied(kd_data.expand_top_k)(*stored, 8), kd_data.expand_top_k(*stored, 8))
    hidden, weight = random_logits(4, 3, seed=4), random_logits(8, 3, seed=5)
    squares = lambda logits, part: (logits.square().sum(-1),)
    assert copied(kd.ChunkedHeadLoss).apply(hidden, weight, None, squares, 3)[0].item() == pytest.approx(
        (hidden @ weight.T).square().sum().item()
    )


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_total_loss(rate, temperature):
    """(1-r) CE at temperature 1 + r D at temperature T, no T^2; a target of -100 is no label but is distilled."""
    student, teacher = random_logits(4, 9, seed=1), random_logits(4, 9, seed=2)
    targets = torch.tensor([3, -100, 0, 8])
    total, ce, divergence = kd.total_loss(student, teacher, targets, kd.forward_kl, rate, temperature)
    for i, target in enumerate(targets.tolist()):
        label = 0.0 if target < 0 else -math.log(student[i].softmax(-1)[target].item())
        p, q = ((x[i] / temperature).softmax(-1).tolist() for x in (teacher, student))
        assert ce[i].item() == pytest.approx(label)
        assert divergence[i].item() == (0.0 if rate == 0 else pytest.approx(kl(p, q)))
        assert total[i].item() == pytest.approx((1 - rate) * label + rate * kl(p, q))


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
    teacher, targets = random_logits(10, 31, seed=4), torch.arange(10)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    found, sums = kd.ChunkedHeadLoss.apply(
        hidden,
        weight,
        bias,
        lambda logits, part: kd.total_loss(logits, teacher[part].to(dtype), targets[part], kd.jsd, 0.4, 1.5),
        chunk,
    )
    grads = torch.autograd.grad(3 * found, leaves)
    exact = [x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for x in leaves]
    logits = F.linear(*exact)
    parts = kd.total_loss(logits, teacher.to(dtype).to(logits.dtype), targets, kd.jsd, 0.4, 1.5)
    expected = torch.autograd.grad(3 * parts[0].sum(), exact)
    close = lambda a, b: (a.to(b.dtype) - b).norm() <= tolerance * b.norm()
    assert not sums.requires_grad and close(sums, torch.stack([x.sum() for x in parts]).detach())
    assert close(found.detach(), parts[0].sum().detach())
    for leaf_, a, b in zip(leaves, grads, expected):
        assert a.dtype == leaf_.dtype and close(a, b)


def test_weight_gradient_is_summed_in_float32():
    """256 chunks that each add 1 to a bfloat16 weight: bfloat16 would stop at 256, as 256 + 1 rounds to 256."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = kd.ChunkedHeadLoss.apply(hidden, weight, None, lambda logits, part: (logits.sum(-1),), 1)
    loss.backward()
    assert weight.grad.item() == 512


def test_no_full_logits():
    """No tensor of more than (chunk, V) is made, forward or backward: recorded at every operation."""
    sizes = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor))
            return result

    hidden, weight = torch.randn(64, 2, requires_grad=True), torch.randn(100, 2, requires_grad=True)
    targets, teacher = torch.zeros(64, dtype=torch.long), torch.randn(64, 2)
    losses = lambda logits, part: kd.total_loss(logits, teacher[part] @ weight.T, targets[part], kd.tvd, 0.5, 1.0)
    with Record():
        kd.ChunkedHeadLoss.apply(hidden, weight, None, losses, 8)[0].backward()
    assert max(sizes) == 8 * 100


def dense_losses(lm, teacher, rows, divergence, rate, temperature):
    """Loss, CE and KD summed over response tokens: one unpadded row at a time, full logits, cut to the vocabulary."""
    totals = []
    for prompt, response, labelled in rows:
        ids = torch.tensor([prompt + response])
        logits, theirs = (m(input_ids=ids).logits[0, len(prompt) - 1 : -1, :VOCAB] for m in (lm, teacher))
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


def with_bias(model):
    old, model.lm_head = model.lm_head, torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    model.lm_head.weight = old.weight
    return model


STUDENTS = {
    "tied": lambda: make_model("llama", 1, tie_word_embeddings=True),
    "untied": lambda: make_model("llama", 1),
    "more rows than tokens": lambda: make_model("qwen2", 1, rows=32),
    "tied, more rows than tokens": lambda: make_model("qwen2", 1, rows=32, tie_word_embeddings=True),
    "bias": lambda: with_bias(make_model("llama", 1, rows=25)),
}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("chunk", [3, 100])
def test_model_is_dense(student, chunk, monkeypatch):
    """KDModel on a padded batch, loss, CE, KD and every gradient; embeddings gather both gradients where they are tied."""
    monkeypatch.setattr(decode, "head_chunk", lambda vocab_size: chunk)
    lm, teacher = STUDENTS[student](), make_model("qwen2", 2, width=24, rows=30)
    rows = kd_data.collate(ROWS, PAD, "cpu")
    hidden = kd_data.response_hidden(teacher, rows["token_ids"], rows["source"]).detach()
    logits = lambda part: decode.next_logits(teacher, hidden[part], VOCAB).detach()
    loss, sums = kd.KDModel(lm, VOCAB, kd.skew_reverse_kl, 0.3, 2.0)(**rows, teacher_logits=logits)
    loss.backward()
    found = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    expected = dense_losses(lm, teacher, ROWS, kd.skew_reverse_kl, 0.3, 2.0)
    expected[0].backward()
    torch.testing.assert_close(sums, expected.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in lm.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 2e-5 * parameter.grad.norm(), name
    if lm.config.vocab_size > VOCAB and not lm.config.tie_word_embeddings:
        assert found["lm_head.weight"][VOCAB:].abs().max() == 0


def test_collate():
    """[prompt, response] without its last token, which predicts nothing; source is the column before each target's."""
    rows = kd_data.collate([([1, 5], [7, 8, 2], True), ([1, 5, 6], [2], False)], 0, "cpu")
    assert rows["token_ids"].tolist() == [[1, 5, 7, 8], [1, 5, 6, 0]]
    assert rows["source"].tolist() == [1, 2, 3, 4 + 2] and rows["target"].tolist() == [7, 8, 2, -100]


# ---------------------------------------------------------------------------------------------------------------------
# Truncated teacher
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_top_k(k):
    logits = random_logits(6, 10, seed=1)
    ids, logprobs, rest = kd_data.top_k_logprobs(logits, k)
    p, full = logits.softmax(-1), kd_data.expand_top_k(ids, logprobs, rest, 10).exp()
    torch.testing.assert_close(full.sum(-1), torch.ones(6, dtype=torch.float64))
    top = p.argsort(-1, descending=True)
    torch.testing.assert_close(full.gather(-1, top[:, :k]), p.gather(-1, top[:, :k]))
    for i in range(6):
        others = p[i, top[i, k:]]
        torch.testing.assert_close(full[i, top[i, k:]], others.mean().expand(10 - k) if k < 10 else others)
        assert rest[i].exp().item() == pytest.approx(others.sum().item(), abs=1e-12)
    assert kd_data.top_k_logprobs(torch.arange(70_000.0)[None], 1)[0].item() == 69_999  # ids of a real vocabulary


def test_top_k_keeps_forward_kl_gradient_of_the_top_k():
    """What kd_data's docstring says is lost: forward KL's gradient q - p is the live teacher's at each of the top k."""
    student, teacher = random_logits(5, 12, seed=1).requires_grad_(), random_logits(5, 12, seed=2)
    stored = kd_data.top_k_logprobs(teacher, 4)
    cut = kd_data.expand_top_k(*stored, 12)
    live, short = (torch.autograd.grad(kd.forward_kl(student, t).sum(), student)[0] for t in (teacher, cut))
    top = stored[0].long()
    torch.testing.assert_close(live.gather(-1, top), short.gather(-1, top))
    torch.testing.assert_close(live.sum(-1), short.sum(-1))
    assert (live - short).abs().max() > 1e-3


def test_every_loss_takes_a_truncated_teacher():
    student = random_logits(5, 12, seed=1, scale=20.0)
    cut = kd_data.expand_top_k(*kd_data.top_k_logprobs(random_logits(5, 12, seed=2, scale=20.0), 2), 12)
    for loss in kd.LOSSES.values():
        assert loss(student, cut).isfinite().all() and (loss(student, cut) > 0).all()
        assert loss(cut, cut).abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def command(models, data, out, *flags, teacher=True):
    """Command line of a small run: 40 examples, batches of 8 in micro-batches of 4."""
    argv = ["--student", models["student"], "--data", data, "--out", out, "--device", "cpu", "--threads", "1"]
    argv += [
        "--batch-size",
        "8",
        "--micro-batch-size",
        "4",
        "--lr",
        "2e-3",
        "--max-new-tokens",
        "40",
        "--max-steps",
        "4",
    ]
    argv += ["--template", "chat", "--prompts-per-batch", "16"] + ["--teacher", models["teacher"]] * teacher
    return [str(x) for x in (*argv, *flags)]


@pytest.fixture
def distil(world, pair_of_models, prompts_file, tmp_path):
    """Runs kd.main in this process: distil("name", *flags) -> OUT, its metrics."""

    def run(name, *flags, **kwargs):
        kd.main(command(pair_of_models, prompts_file, tmp_path / name, *flags, **kwargs))
        return tmp_path / name, common.read_jsonl(tmp_path / name / "metrics.jsonl")

    return run


def weights(out):
    return AutoModelForCausalLM.from_pretrained(out / "student").state_dict()


def assert_equal_runs(a, b, rtol=0.0):
    """Two (OUT, metrics): the same numbers, but for time and memory; the same weights."""
    assert len(a[1]) == len(b[1])
    for x, y in zip(a[1], b[1]):
        for key in ("step", "loss", "ce", "kd", "grad_norm", "lr", "response_tokens"):
            assert x[key] == pytest.approx(y[key], rel=rtol, abs=rtol * 1e-2), (x["step"], key)
    ours, theirs = weights(a[0]), weights(b[0])
    for key in ours:
        assert (ours[key] - theirs[key]).norm() <= 10 * rtol * theirs[key].norm(), key


def gold_rows(prompts_file, tokenizer):
    """(prompt ids, response ids, label) of the data, in order, put together by hand."""
    ids = lambda text: tokenizer.convert_tokens_to_ids(list(text))
    rows = common.read_jsonl(prompts_file)
    return [([tokenizer.bos_token_id, *ids(r["prompt"])], [*ids(r["response"]), EOS], True) for r in rows]


METRICS = {
    "stage", "step", "loss", "ce", "kd", "grad_norm", "lr", "response_tokens", "seconds", "tokens", "tokens_per_second",
    "peak_memory_gb",
}  # fmt: skip
LOOPS = {
    "forward_kl": ([], kd.forward_kl),
    "jsd": (["--loss", "jsd", "--jsd-beta", "0.2"], lambda s, t: kd.jsd(s, t, 0.2)),
    "skew": (["--loss", "skew_reverse_kl", "--skew-alpha", "0.3"], lambda s, t: kd.skew_reverse_kl(s, t, 0.3)),
    "adaptive": (["--loss", "adaptive_kl", "--tail-mass", "0.3"], lambda s, t: kd.adaptive_kl(s, t, 0.3)),
    "checkpointed": (["--activation-checkpointing", "--micro-batch-size", "1"], kd.forward_kl),
}


@pytest.mark.parametrize("name", LOOPS)
def test_train_equals_a_plain_loop(distil, pair_of_models, prompts_file, tokenizer, monkeypatch, name):
    """Four steps over 21 examples (the third batch is short) against one row at a time, AdamW, no FSDP, no chunks."""
    monkeypatch.setattr(decode, "head_chunk", lambda vocab_size: 13)
    flags = ["--limit", 21, "--kd-rate", "0.7", "--temperature", "2", "--seed", "9", "--max-grad-norm", "0.5"]
    out, steps = distil("run", *flags, *LOOPS[name][0])
    rows = gold_rows(prompts_file, tokenizer)[:21]
    lm, teacher = (AutoModelForCausalLM.from_pretrained(pair_of_models[n]) for n in ("student", "teacher"))
    start = {key: parameter.detach().clone() for key, parameter in lm.named_parameters()}
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for step, metrics in enumerate(steps):
        assert metrics.keys() == METRICS and metrics["step"] == step + 1 and metrics["stage"] == "kd"
        batch = [rows[i] for i in training.batch_of_step(step, 21, 8, 9)]
        tokens = sum(len(response) for _, response, _ in batch)
        assert len(batch) == (5 if step == 2 else 8) and metrics["response_tokens"] == tokens
        loss, ce, divergence = dense_losses(lm, teacher, batch, LOOPS[name][1], 0.7, 2.0) / tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 2e-3 * [1, 1, 0.55, 0.1][step]  # one step of warm-up, then the cosine
        optimizer.step()
        for key, value in {"loss": loss, "ce": ce, "kd": divergence, "grad_norm": norm}.items():
            assert metrics[key] == pytest.approx(value.item(), rel=2e-3 if key == "grad_norm" else 2e-4), key
    trained = weights(out)
    for key, parameter in lm.named_parameters():
        assert (trained[key] - parameter).norm() < 1e-2 * (parameter - start[key]).norm(), key


def test_a_finished_run_is_left_alone(distil):
    out, _ = distil("run", "--max-steps", "1")
    files = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    distil("run", "--max-steps", "1")
    assert files == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_sft_needs_no_teacher(distil, pair_of_models, prompts_file, tokenizer):
    """--kd-rate 0, no --teacher: cross-entropy on the data. A teacher changes nothing then, and is not loaded."""
    out, steps = distil("sft", "--kd-rate", "0", teacher=False)
    rows = gold_rows(prompts_file, tokenizer)
    lm = AutoModelForCausalLM.from_pretrained(pair_of_models["student"])
    batch = [rows[i] for i in training.batch_of_step(0, 40, 8, 0)]
    loss, ce, _ = dense_losses(lm, lm, batch, kd.tvd, 0.0, 1.0) / steps[0]["response_tokens"]
    assert steps[0]["loss"] == steps[0]["ce"] == pytest.approx(ce.item(), rel=1e-5) and loss == ce
    assert all(m["kd"] == 0 for m in steps) and steps[-1]["loss"] < steps[0]["loss"]
    assert_equal_runs((out, steps), distil("with-teacher", "--kd-rate", "0"))


def test_dropout_is_off(distil, pair_of_models, tokenizer, tmp_path):
    """GPT-2 has dropout 0.1 by default: the loss of the first step is that of the model without it."""
    torch.manual_seed(1)
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--student", tmp_path / "gpt2", "--teacher", tmp_path / "gpt2", "--max-steps", "1", "--kd-rate", "1"]
    for name, more in {"plain": [], "checkpointed": ["--activation-checkpointing"]}.items():
        _, steps = distil(name, *flags, *more)
        assert abs(steps[0]["kd"]) < 1e-6


def test_long_responses_are_left_out(distil, prompts_file, tokenizer, capsys):
    rows = gold_rows(prompts_file, tokenizer)
    lengths = [len(response) for _, response, _ in rows]
    limit = sorted(lengths)[20]
    kept = sum(n <= limit for n in lengths)
    _, steps = distil("run", "--max-new-tokens", limit, "--max-steps", "1", "--batch-size", "40")
    printed = capsys.readouterr().out
    assert f"left out: 0 prompts over --max-prompt-tokens, {40 - kept} responses over --max-new-tokens" in printed
    assert f"kd: {kept} examples" in printed and steps[0]["response_tokens"] == sum(n for n in lengths if n <= limit)


# ---------------------------------------------------------------------------------------------------------------------
# --mode teacher and student
# ---------------------------------------------------------------------------------------------------------------------


def test_teacher_mode(distil, pair_of_models, prompts_file, tokenizer):
    """SeqKD: each token is the teacher's likeliest, by the plain model; stored, reused, written again if one is lost."""
    flags = ["--mode", "teacher", "--max-new-tokens", "12", "--limit", "20"]
    out, steps = distil("run", *flags)
    files = sorted((out / "responses").iterdir())
    assert [f.name for f in files] == ["00000.jsonl", "00001.jsonl"]
    stored = [row for file in files for row in common.read_jsonl(file)]
    teacher = AutoModelForCausalLM.from_pretrained(pair_of_models["teacher"])
    rows = gold_rows(prompts_file, tokenizer)[:20]
    for i, (row, (prompt, _, _)) in enumerate(zip(stored, rows)):
        assert row["prompt_id"] == i and row["response"] == tokenizer.decode(
            row["response_ids"], skip_special_tokens=True
        )
        ids = prompt + row["response_ids"]
        with torch.no_grad():
            likeliest = teacher(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1, :VOCAB].argmax(-1)
        assert likeliest.tolist() == row["response_ids"]
        assert len(row["response_ids"]) == 12 or row["response_ids"][-1] == EOS
    batch = training.batch_of_step(0, 20, 8, 0)
    assert steps[0]["response_tokens"] == sum(len(stored[i]["response_ids"]) for i in batch)

    before, times = [f.read_bytes() for f in files], [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    shutil.rmtree(out / "student")
    again = distil("run", *flags)
    assert [f.read_bytes() for f in files] == before and files[0].stat().st_mtime_ns == times[0]
    assert_equal_runs((out, steps), again)


def test_teacher_mode_sampled(distil):
    """--teacher-decoding sample: other responses than the greedy ones, the seed's own."""
    flags = ["--mode", "teacher", "--max-new-tokens", "8", "--limit", "8", "--max-steps", "1"]
    read = lambda out: [row["response_ids"] for row in common.read_jsonl(out / "responses" / "00000.jsonl")]
    greedy = read(distil("greedy", *flags)[0])
    runs = [read(distil(f"{seed}", *flags, "--teacher-decoding", "sample", "--seed", seed)[0]) for seed in (0, 1)]
    assert greedy != runs[0] != runs[1]


def test_student_mode(distil, pair_of_models, prompts_file, tokenizer, monkeypatch):
    """On-policy: half of each batch is what the student of that moment samples, checked by drawing each sample alone.

    Those tokens count in KD, not in CE. Every loss of the run is computed again from the weights and samples of its step.
    """
    seen = []  # of each refresh: the weights, the steps
    original = kd.sample_ahead

    def spy(replica, lm, examples, steps, run):
        sampled = original(replica, lm, examples, steps, run)
        for ours, theirs in zip(replica.parameters(), lm.parameters()):
            assert torch.equal(ours, theirs.full_tensor())
        seen.append((list(steps), {k: v.clone() for k, v in replica.state_dict().items()}, sampled))
        return sampled

    monkeypatch.setattr(kd, "sample_ahead", spy)
    flags = ["--mode", "student", "--on-policy", "0.5", "--refresh-every", "2", "--max-steps", "5", "--save-every", "2"]
    _, steps = distil("run", *flags)
    assert [s for s, _, _ in seen] == [[0, 1], [2, 3], [4]]
    rows = gold_rows(prompts_file, tokenizer)
    lm, teacher = (AutoModelForCausalLM.from_pretrained(pair_of_models[n]) for n in ("student", "teacher"))
    for window, state, sampled in seen:
        lm.load_state_dict(state)
        for step in window:
            batch = training.batch_of_step(step, 40, 8, 0)
            mine = [i for s, i in sampled if s == step]
            assert sorted(mine) == sorted(batch[:4])
            for i in mine[:2]:  # each sample drawn alone, without cache
                ids = list(rows[i][0])
                while len(ids) - len(rows[i][0]) < 40 and ids[-1] != EOS:
                    name = [torch.tensor([x]) for x in (i, step, len(ids) - len(rows[i][0]))]
                    noise = decode.uniform_noise(0, decode.KD_STUDENT_STAGE, *name)
                    with torch.no_grad():
                        ids.append(
                            decode.sample_token(lm(torch.tensor([ids])).logits[:, -1, :VOCAB], noise, 1.0, 1.0).item()
                        )
                assert ids[len(rows[i][0]) :] == sampled[step, i]
        step = window[0]  # the replica is the student of this step
        batch = [(rows[i][0], sampled.get((step, i), rows[i][1]), (step, i) not in sampled) for i in
                 training.batch_of_step(step, 40, 8, 0)]  # fmt: skip
        expected = dense_losses(lm, teacher, batch, kd.forward_kl, 0.5, 1.0) / steps[step]["response_tokens"]
        assert [steps[step][k] for k in ("loss", "ce", "kd")] == pytest.approx(expected.tolist(), rel=1e-4)
    monkeypatch.undo()
    gold = distil("gold", "--max-steps", "2")
    assert_equal_runs(gold, distil("none", "--mode", "student", "--on-policy", "0", "--max-steps", "2"))


def test_warning_when_responses_run_on(capsys):
    run = SimpleNamespace(eos_ids=[2], world=SimpleNamespace(rank=0))
    assert not kd_data.warn_if_responses_run_on({(0, 1): [5, 5], (0, 2): [5, 2]}, run)
    assert capsys.readouterr().out == ""
    assert kd_data.warn_if_responses_run_on({(0, 1): [5, 5], (0, 2): [5, 2], (1, 0): [7]}, run)
    assert "warning: 2 of 3 responses of the student have no end within --max-new-tokens" in capsys.readouterr().out


def test_on_policy_data_need_no_responses(distil, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"1{k}+22:"}) + "\n" for k in range(8)))
    data = ["--data", tmp_path / "prompts.jsonl", "--max-new-tokens", "8", "--max-steps", "1"]
    _, steps = distil("run", "--mode", "student", *data)
    assert steps[0]["ce"] == 0 and steps[0]["loss"] == 0.5 * steps[0]["kd"] > 0
    for name, flags in {"gold": [], "mixed": ["--mode", "student", "--on-policy", "0.5"]}.items():
        with pytest.raises(
            common.UserError, match=r"there is no response, in .*prompts.jsonl row 0, .*--response-column"
        ):
            distil(name, *data, *flags)


@pytest.mark.parametrize(
    "flags", [["--save-every", "2"], ["--save-every", "4", "--mode", "student", "--refresh-every", "2"]]
)
def test_resume_bit_for_bit(distil, monkeypatch, flags):
    """Killed in its sixth step, taken up again at the checkpoint: the same metrics and weights as without."""
    flags = [*flags, "--max-steps", "7", "--max-new-tokens", "40"]
    whole = distil("whole", *flags)
    original, calls = training.optimizer_step, []

    def die_in_step_6(*args):
        calls.append(1)
        if len(calls) == 6:
            raise InterruptedError
        return original(*args)

    monkeypatch.setattr(training, "optimizer_step", die_in_step_6)
    with pytest.raises(InterruptedError):
        distil("parts", *flags)
    monkeypatch.undo()
    assert_equal_runs(whole, distil("parts", *flags))


# ---------------------------------------------------------------------------------------------------------------------
# --teacher-cache
# ---------------------------------------------------------------------------------------------------------------------


def no_teacher(monkeypatch, path):
    """From here on it is an error to load the teacher's weights."""
    original = models.load_model
    monkeypatch.setattr(models, "load_model", lambda p, *args: (_ for _ in ()).throw(AssertionError) if p == path else original(p, *args))  # fmt: skip


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl"])
def test_cache_of_the_whole_vocabulary_equals_the_live_teacher(distil, tmp_path, loss):
    cache = ["--teacher-cache", tmp_path / "cache", "--teacher-top-k", "64"]
    live = distil("live", "--loss", loss, "--temperature", "2")
    assert_equal_runs(live, distil("cached", "--loss", loss, "--temperature", "2", *cache), rtol=2e-4)


def test_cache(distil, pair_of_models, tmp_path, monkeypatch):
    """k = 3: another loss than the live teacher's; made once, then used without the teacher; a lost file is made again."""
    cache = ["--teacher-cache", tmp_path / "cache", "--teacher-top-k", "3"]
    live, first = distil("live"), distil("first", *cache)
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert [f.name for f in files] == [f"{k:05d}.safetensors" for k in range(3)]
    assert abs(live[1][0]["kd"] - first[1][0]["kd"]) > 1e-3 and live[1][0]["ce"] == pytest.approx(first[1][0]["ce"])

    content, times = [f.read_bytes() for f in files], [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    distil("second", *cache, "--max-steps", "1")
    assert [f.read_bytes() for f in files] == content and files[2].stat().st_mtime_ns == times[2]

    no_teacher(monkeypatch, pair_of_models["teacher"])
    assert_equal_runs(first, distil("third", *cache))
    with pytest.raises(AssertionError):
        distil("fourth")


def test_cache_of_the_teachers_own_responses(distil, tmp_path):
    flags = ["--mode", "teacher", "--max-new-tokens", "9", "--max-steps", "2"]
    cache = ["--teacher-cache", tmp_path / "cache", "--teacher-top-k", "22"]
    assert_equal_runs(distil("live", *flags), distil("cached", *flags, *cache), rtol=2e-4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--teacher-top-k", "4"], "teacher_top_k 3 there, 4 now"),
        (["--limit", "39"], "examples "),
        (["--prompts-per-batch", "8"], "prompts_per_batch 16 there, 8 now"),
        (["--dtype", "bfloat16"], "dtype torch.float32 there, torch.bfloat16 now"),
    ],
)
def test_a_cache_of_something_else_is_refused(distil, tmp_path, flags, words):
    cache = ["--teacher-cache", tmp_path / "cache", "--teacher-top-k", "3", "--max-steps", "1"]
    distil("first", *cache)
    with pytest.raises(common.UserError, match=f"made of something else .*{words}.*give another --teacher-cache"):
        distil("second", *cache, *flags)


# ---------------------------------------------------------------------------------------------------------------------
# Processes and the command
# ---------------------------------------------------------------------------------------------------------------------

SEVERAL = """
import json, sys
import torch.distributed as dist
sys.path.insert(0, {root!r})
import kd
for argv in json.load(open({jobs!r})):
    kd.main(argv)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes(distil, pair_of_models, prompts_file, tmp_path):
    """Two processes against one: the last batch leaves a rank without an example, and a batch is dealt out unevenly.

    Stored responses and samples are the same; losses and weights but for rounding. A sharded teacher is the teacher: its
    ranks write 11 files of responses of unlike lengths together, and the last one on one rank alone.
    """
    short = ["--limit", "17", "--max-steps", "3", "--max-new-tokens", "40", "--micro-batch-size", "2"]
    jobs = {
        "teacher": ["--mode", "teacher", "--teacher-decoding", "sample", "--prompts-per-batch", "3", "--limit", "33"],
        "student": ["--mode", "student", "--on-policy", "0.6", "--refresh-every", "2", *short],
        "cache": [*short, "--teacher-top-k", "5", "--prompts-per-batch", "6"],
    }
    shard = {"teacher": ["--shard-teacher"], "student": ["--shard-teacher"], "cache": []}
    argvs = []
    for name, flags in jobs.items():
        more = ["--teacher-cache", tmp_path / "cache2"] if name == "cache" else shard[name]
        argvs.append(command(pair_of_models, prompts_file, tmp_path / f"{name}2", *flags, *more))
    (tmp_path / "jobs.json").write_text(json.dumps(argvs))
    script = tmp_path / "several.py"
    script.write_text(SEVERAL.format(root=str(ROOT), jobs=str(tmp_path / "jobs.json")))
    done = launch(2, script)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, flags in jobs.items():
        more = ["--teacher-cache", tmp_path / "cache1"] if name == "cache" else []
        one = distil(name, *flags, *more)
        two = tmp_path / f"{name}2", common.read_jsonl(tmp_path / f"{name}2" / "metrics.jsonl")
        assert_equal_runs(one, two, rtol=2e-4)
    read = lambda folder: {f.name: f.read_bytes() for f in folder.glob("0*")}
    assert read(tmp_path / "teacher" / "responses") == read(tmp_path / "teacher2" / "responses") != {}
    assert read(tmp_path / "cache1").keys() == read(tmp_path / "cache2").keys() and len(read(tmp_path / "cache1")) == 3


def test_closing_table(distil, prompts_file, capsys):
    """With --eval-data: student before and after in print and in summary.json; without a teacher no distance."""
    flags = ["--eval-data", prompts_file, "--eval-limit", "4", "--max-steps", "2", "--max-new-tokens", "40"]
    out, _ = distil("run", *flags)
    summary, printed = common.read_json(out / "summary.json"), capsys.readouterr().out
    assert list(summary) == ["teacher", "student before", "student after"] and "4 held-out prompts" in printed
    assert {"accuracy", "kl_teacher_student", "kl_student_teacher"} <= summary["student after"].keys()
    assert f"{summary['student before']['kl_teacher_student']:15.4f}" in printed
    assert summary["student before"] != summary["student after"]
    out, _ = distil("sft", *flags, "--kd-rate", "0", teacher=False)
    assert common.read_json(out / "summary.json")["student after"].keys() == {"accuracy"}


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--kd-rate 1.5", "--kd-rate is 1.5"),
        ("--kd-rate nan", "--kd-rate is nan"),
        ("--temperature 0", "--temperature is 0.0"),
        ("--jsd-beta 1", "--jsd-beta is 1.0"),
        ("--skew-alpha 0", "--skew-alpha is 0.0"),
        ("--tail-mass -0.1", "--tail-mass is -0.1"),
        ("--on-policy 2", "--on-policy is 2.0"),
        ("--refresh-every 0", "--refresh-every is 0"),
        ("--teacher-top-k 0", "--teacher-top-k is 0"),
        ("--max-new-tokens 0", "--max-new-tokens is 0"),
        ("--prompts-per-batch 0", "--prompts-per-batch is 0"),
        ("--limit -1", "--limit is -1"),
        ("--batch-size 0", "--batch-size is 0"),
        ("--loss kl", "argument --loss"),
        ("--mode student --refresh-every 3 --save-every 100", "--save-every is 100, .* that --refresh-every 3 divides"),
        ("--mode student --kd-rate 0", "--kd-rate is 0.0, .*no labels"),
        ("--mode student --teacher-cache c", "--teacher-cache needs"),
        ("--kd-rate 0 --teacher-cache c", "--teacher-cache needs"),
    ],
)
def test_bad_arguments(flags, words):
    with pytest.raises(common.UserError, match=words):
        kd.parse_args(["--teacher", "t", "--student", "s", "--data", "d", *flags.split()])


def test_what_must_be_given():
    for argv, missing in [("--teacher t --student s", "data"), ("--teacher t --data d", "student"),
                          ("--student s --data d", "teacher"), ("--data d --kd-rate 0", "student"),
                          ("--student s --data d --kd-rate 0 --mode teacher", "teacher")]:  # fmt: skip
        with pytest.raises(common.UserError, match=f"--{missing} is missing"):
            kd.parse_args(argv.split())
    assert not kd.parse_args(["--student", "s", "--data", "d", "--kd-rate", "0"]).toy
    args = kd.parse_args([])
    assert args.toy and args.loss == "reverse_kl" and args.max_steps == 60 and args.student is None
    args = kd.parse_args(["--student", "out/warmup/student", "--loss", "jsd"])
    assert args.toy and args.loss == "jsd" and args.student == "out/warmup/student"
    args = kd.parse_args(["--teacher", "t", "--student", "s", "--data", "d"])
    assert (args.loss, args.kd_rate, args.temperature, args.mode, args.lr) == ("forward_kl", 0.5, 1.0, "gold", 1e-5)
    assert (args.epochs, args.batch_size) == (1, 64)
