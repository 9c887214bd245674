"""dpo.py against hand-computed numbers, and against the two-row computation that prefix sharing replaces.

The twin runs the full model on [prompt + response] for each response alone, takes log_softmax over the vocabulary and
sums the response's log-probs: no shared rows, no mask, no cache, no FSDP.
"""

import inspect
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import common
import dpo
import models
import training
from pairs import read_pairs

VOCAB, PAD = 22, 0
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# dpo_loss
# ---------------------------------------------------------------------------------------------------------------------


def loss_of(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing=0.0):
    """dpo_loss of lists of floats, in float64."""
    values = (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    return dpo.dpo_loss(*(torch.tensor(v, dtype=torch.float64) for v in values), beta, label_smoothing)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_loss_is_ln_2_where_policy_is_reference(beta, label_smoothing):
    """-log sigma(0), whatever beta and smoothing."""
    losses, chosen, rejected = loss_of([-3.0, -70.0], [-9.0, 0.0], [-3.0, -70.0], [-9.0, 0.0], beta, label_smoothing)
    torch.testing.assert_close(losses, torch.full((2,), math.log(2), dtype=torch.float64))
    assert chosen.tolist() == rejected.tolist() == [0, 0]


@pytest.mark.parametrize(
    "chosen, rejected, reference_chosen, reference_rejected, beta, loss, chosen_reward, rejected_reward",
    [
        # z = beta ((chosen - reference chosen) - (rejected - reference rejected)), loss = log(1 + e^-z)
        (-10.0, -12.0, -11.0, -10.0, 1.0, math.log1p(math.exp(-3)), 1.0, -2.0),  # z = 1 + 2 = 3
        (-10.0, -12.0, -11.0, -10.0, 0.1, math.log1p(math.exp(-0.3)), 0.1, -0.2),  # z = 0.3
        (-4.0, -1.0, -2.0, -2.0, 0.5, math.log1p(math.exp(1.5)), -1.0, 0.5),  # z = 0.5 (-2 - 1) = -1.5
        (-4.0, -8.0, -2.0, -6.0, 0.5, math.log(2), -1.0, -1.0),  # both fall by 2: z = 0
        (-1.0, -2.0, -math.log(2) - 1, -2.0, 1.0, math.log(3 / 2), math.log(2), 0.0),  # e^-z = 1/2
    ],
)
def test_loss_by_hand(
    chosen, rejected, reference_chosen, reference_rejected, beta, loss, chosen_reward, rejected_reward
):
    losses, *rewards = loss_of([chosen], [rejected], [reference_chosen], [reference_rejected], beta)
    assert losses.item() == pytest.approx(loss, rel=1e-12)
    assert [r.item() for r in rewards] == pytest.approx([chosen_reward, rejected_reward], rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_gradient(beta):
    """d loss / d chosen = -beta sigma(-z), d loss / d rejected is its negative; equation 7's weight on each pair."""
    policy = torch.tensor([[-3.0, -5.0, -2.0], [-4.0, -1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-3.5, -4.0, -2.0], [-3.0, -1.5, -2.0]], dtype=torch.float64, requires_grad=True)
    losses, *_ = dpo.dpo_loss(*policy, *reference, beta)
    losses.sum().backward()
    delta = (policy[0] - policy[1] - reference[0] + reference[1]).detach()
    expected = -beta / (1 + torch.exp(beta * delta))
    torch.testing.assert_close(policy.grad, torch.stack([expected, -expected]))
    assert (policy.grad[0] < 0).all() and (policy.grad[1] > 0).all()


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.49])
def test_label_smoothing(eps):
    """(1 - eps) loss(z) + eps loss(-z); loss(-z) is the loss of the pair the other way round, z above loss(z)."""
    arguments = ([-10.0, -1.0], [-12.0, -6.0], [-11.0, -4.0], [-10.0, -3.0], 0.7)  # z = 2.1, 4.2
    smoothed, plain = loss_of(*arguments, eps)[0], loss_of(*arguments)[0]
    chosen, rejected, reference_chosen, reference_rejected, beta = arguments
    flipped = loss_of(rejected, chosen, reference_rejected, reference_chosen, beta)[0]
    torch.testing.assert_close(smoothed, (1 - eps) * plain + eps * flipped)
    torch.testing.assert_close(smoothed, plain + eps * torch.tensor([2.1, 4.2], dtype=torch.float64))


def test_label_smoothing_has_its_minimum_at_the_odds():
    """Unsmoothed, the loss falls for ever; smoothed, it is least where sigma(z) = 1 - eps: z = log((1 - eps) / eps)."""
    eps = 0.2
    z = torch.tensor([math.log((1 - eps) / eps)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(z)
    dpo.dpo_loss(z, zero, zero, zero, 1.0, eps)[0].sum().backward()
    assert z.grad.item() == pytest.approx(0, abs=1e-12)


def test_loss_limits_and_shapes():
    """|z| of 10,000 is finite: 0 on the right side, |z| on the wrong one. Shapes (B,); rewards carry no gradient."""
    policy = torch.tensor([0.0, -1e4], requires_grad=True)
    losses, chosen, rejected = dpo.dpo_loss(policy, policy.flip(0), torch.zeros(2), torch.zeros(2), 1.0)
    assert losses.tolist() == [0, 1e4]
    assert losses.shape == chosen.shape == rejected.shape == (2,)
    assert losses.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    assert torch.isfinite(policy.grad).all()


def test_copy_paste():
    """dpo_loss made from its source alone, in a namespace of torch, F and math."""
    namespace = {"torch": torch, "F": F, "math": math}
    exec(inspect.getsource(dpo.dpo_loss), namespace)  # noqa: S102
    arguments = (*torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), 0.3, 0.1)
    for ours, theirs in zip(namespace["dpo_loss"](*arguments), dpo.dpo_loss(*arguments), strict=True):
        assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# Prefix sharing
# ---------------------------------------------------------------------------------------------------------------------

# fmt: off
PAIRS = [
    {"prompt_ids": [1, 4, 9, 13, 8], "chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 6, 9, 10, 11, 2]},  # shared: 2
    {"prompt_ids": [1, 7, 3], "chosen_ids": [8, 2], "rejected_ids": [19, 4, 4, 12, 2]},  # nothing shared
    {"prompt_ids": [1, 20, 6, 6], "chosen_ids": [9, 5, 14, 3], "rejected_ids": [9, 5, 14, 2]},  # all but the last
    {"prompt_ids": [1, 5], "chosen_ids": [16, 4], "rejected_ids": [16, 4, 11, 2]},  # chosen begins rejected
    {"prompt_ids": [1, 11, 12, 4, 7, 7, 10], "chosen_ids": [6, 17, 8, 2], "rejected_ids": [6]},  # the other way round
    {"prompt_ids": [1], "chosen_ids": [15, 10, 2], "rejected_ids": [15, 2]},  # a prompt of one token
    {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [5]},  # one token each
]
# fmt: on


def two_row_logps(lm, pair, key):
    """Sum of log pi(y_t | x, y_<t) over one response: a plain forward of one sequence, softmax over the vocabulary."""
    prompt, response = pair["prompt_ids"], pair[key]
    logits = lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :VOCAB]
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].sum()


def two_row_loss(lm, reference, pairs, beta=0.1, label_smoothing=0.0, nll_weight=0.0, average=False):
    """The step's loss by two rows a pair: mean over pairs of DPO, plus nll_weight times NLL per chosen token."""
    total = nll = 0.0
    for pair in pairs:
        policy = [two_row_logps(lm, pair, key) for key in ("chosen_ids", "rejected_ids")]
        with torch.no_grad():
            fixed = [two_row_logps(reference, pair, key) for key in ("chosen_ids", "rejected_ids")]
        nll = nll - policy[0]
        if average:
            counts = len(pair["chosen_ids"]), len(pair["rejected_ids"])
            policy, fixed = ([x / n for x, n in zip(values, counts)] for values in (policy, fixed))
        z = beta * (policy[0] - policy[1] - fixed[0] + fixed[1])
        total = total - (1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return total / len(pairs) + nll_weight * nll / sum(len(p["chosen_ids"]) for p in pairs)


def one_row_loss(lm, reference, pairs, with_shared, beta=0.1, nll_weight=0.0, average=False):
    """The same from the production path: one row a pair, all pairs in one padded batch."""
    rows = dpo.collate_pairs(pairs, PAD, with_shared, CPU)
    counts = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in pairs])
    sums = dpo.PairModel(lm, VOCAB)(**rows)
    with torch.no_grad():
        fixed = dpo.PairModel(reference, VOCAB)(**rows)
    logps = (*dpo.response_logps(sums, counts, average), *dpo.response_logps(fixed, counts, average))
    losses, *_ = dpo.dpo_loss(*logps, beta)
    return losses.mean() - nll_weight * (sums[:, 0] + sums[:, 1]).sum() / counts[:, 0].sum()


def biased_model(seed):
    """A Llama whose head has a bias, as some families' do, and more rows than there are tokens."""
    lm = make_model("llama", seed, rows=32)
    lm.lm_head = torch.nn.Linear(lm.config.hidden_size, 32, bias=True)
    return lm


MODELS = {
    "llama": lambda seed: make_model("llama", seed, rows=32),
    "llama_tied": lambda seed: make_model("llama", seed, tie_word_embeddings=True),
    "llama_bias": biased_model,
    "qwen2": lambda seed: make_model("qwen2", seed, rows=32),
}


def assert_same_loss_and_gradients(lm, fast, slow, tolerance=1e-4):
    """Losses to a tenth of `tolerance`, each parameter's gradient to `tolerance` of its norm.

    The floor is for gradients that are zero but for rounding: a prompt of one token has nothing to choose from in its
    attention, so queries and keys do not matter.
    """
    assert fast.item() == pytest.approx(slow.item(), rel=tolerance / 10)
    names, parameters = zip(*lm.named_parameters())
    ours, theirs = (torch.autograd.grad(loss, parameters) for loss in (fast, slow))
    floor = 1e-2 * tolerance * torch.stack([g.norm() for g in theirs]).norm()
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + floor, name


LOSSES = {
    "sum": ({}, [False, True]),  # the shared part may be there: it cancels
    "mean": ({"average": True}, [True]),
    "nll": ({"nll_weight": 0.7}, [True]),
    "mean_nll": ({"average": True, "nll_weight": 0.7}, [True]),
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("name", LOSSES)
def test_prefix_sharing_equals_two_rows(family, name):
    """Loss and the gradients of all parameters, on a batch of all kinds of pairs, padded to the longest."""
    lm, reference = MODELS[family](1), MODELS[family](2)
    options, choices = LOSSES[name]
    for with_shared in choices:
        fast = one_row_loss(lm, reference, PAIRS, with_shared, **options)
        assert_same_loss_and_gradients(lm, fast, two_row_loss(lm, reference, PAIRS, **options))


@pytest.mark.parametrize("number", range(len(PAIRS)))
@pytest.mark.parametrize("name", LOSSES)
def test_prefix_sharing_equals_two_rows_for_each_kind_of_pair(number, name):
    lm, reference = MODELS["qwen2"](3), MODELS["qwen2"](4)
    options, choices = LOSSES[name]
    for with_shared in choices:
        fast = one_row_loss(lm, reference, [PAIRS[number]], with_shared, beta=1.0, **options)
        slow = two_row_loss(lm, reference, [PAIRS[number]], beta=1.0, **options)
        assert_same_loss_and_gradients(lm, fast, slow)


def test_prefix_sharing_in_float64():
    """With float64 weights what is left is the head's float32 softmax: gradients agree ten times closer than above."""
    lm, reference = MODELS["qwen2"](1).double(), MODELS["qwen2"](2).double()
    fast, slow = one_row_loss(lm, reference, PAIRS, False), two_row_loss(lm, reference, PAIRS)
    assert_same_loss_and_gradients(lm, fast, slow, 1e-5)


@pytest.mark.parametrize("with_shared", [False, True])
def test_pair_model_says_the_parts(with_shared):
    """(B, 3): shared, chosen suffix, rejected suffix. Shared + suffix is a response's log-prob; without it, 0."""
    lm = MODELS["qwen2"](1)
    with torch.no_grad():
        sums = dpo.PairModel(lm, VOCAB)(**dpo.collate_pairs(PAIRS, PAD, with_shared, CPU))
        for i, pair in enumerate(PAIRS):
            n = dpo.shared_length(pair["chosen_ids"], pair["rejected_ids"])
            shared = two_row_logps(lm, {**pair, "ids": pair["chosen_ids"][:n]}, "ids") if n else torch.tensor(0.0)
            for part, key in ((1, "chosen_ids"), (2, "rejected_ids")):
                assert sums[i, part].item() == pytest.approx((two_row_logps(lm, pair, key) - shared).item(), abs=2e-5)
            assert sums[i, 0].item() == pytest.approx(shared.item() if with_shared else 0, abs=2e-5)


def test_response_logps():
    """Sums: the shared part is in both. Means: over each response's own number of tokens."""
    sums, lengths = torch.tensor([[-2.0, -4.0, -1.0], [0.0, -3.0, -8.0]]), torch.tensor([[3, 2], [6, 4]])
    assert [x.tolist() for x in dpo.response_logps(sums, lengths, False)] == [[-6, -3], [-3, -8]]
    assert [x.tolist() for x in dpo.response_logps(sums, lengths, True)] == [[-2, -0.5], [-1.5, -2]]


@pytest.mark.parametrize(
    "chosen, rejected, length",
    [([5, 6, 7], [5, 6, 8], 2), ([5, 6], [5, 6, 7], 2), ([5, 6], [5], 1), ([], [5], 0), ([4, 1], [3, 1], 0)],
)  # fmt: skip
def test_shared_length(chosen, rejected, length):
    assert dpo.shared_length(chosen, rejected) == length


# ---------------------------------------------------------------------------------------------------------------------
# collate_pairs, by hand
# ---------------------------------------------------------------------------------------------------------------------

# Row 0: prompt 1 5, shared 7, chosen 8 2, rejected 9. Row 1: prompt 1, chosen 6, rejected 4 2, two columns of padding.
HAND = [
    {"prompt_ids": [1, 5], "chosen_ids": [7, 8, 2], "rejected_ids": [7, 9]},
    {"prompt_ids": [1], "chosen_ids": [6], "rejected_ids": [4, 2]},
]


def test_collate_pairs_by_hand():
    rows = dpo.collate_pairs(HAND, PAD, False, CPU)
    assert rows["token_ids"].tolist() == [[1, 5, 7, 8, 2, 9], [1, 6, 4, 2, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 0, 0]]
    assert rows["attention"].dtype == torch.bool
    assert rows["attention"][0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],  # 1
        [1, 1, 0, 0, 0, 0],  # 5
        [1, 1, 1, 0, 0, 0],  # 7
        [1, 1, 1, 1, 0, 0],  # 8
        [1, 1, 1, 1, 1, 0],  # 2
        [1, 1, 1, 0, 0, 1],  # 9 does not see 8 2
    ]
    assert rows["attention"][1, :4].int().tolist() == [
        [1, 0, 0, 0, 0, 0],  # 1
        [1, 1, 0, 0, 0, 0],  # 6
        [1, 0, 1, 0, 0, 0],  # 4 does not see 6
        [1, 0, 1, 1, 0, 0],  # 2 neither
    ]
    assert rows["attention"][1, 4:].any(-1).all()  # padding sees something: no softmax over nothing
    # 8 and 9 are both predicted from the shared 7 (column 2), 2 from 8; in row 1 (from flat index 6 on) 6 and 4 from 1
    assert rows["target"].tolist() == [8, 2, 9, 6, 4, 2]
    assert rows["source"].tolist() == [2, 3, 2, 6, 6, 8]
    assert rows["row"].tolist() == [0, 0, 0, 1, 1, 1]
    assert rows["part"].tolist() == [1, 1, 2, 1, 2, 2]


def test_collate_pairs_with_shared_by_hand():
    """One target more: the shared 7, predicted from the prompt's 5. All else is the same."""
    rows, plain = dpo.collate_pairs(HAND, PAD, True, CPU), dpo.collate_pairs(HAND, PAD, False, CPU)
    assert rows["target"].tolist() == [7, 8, 2, 9, 6, 4, 2]
    assert rows["source"].tolist() == [1, 2, 3, 2, 6, 6, 8]
    assert rows["row"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert rows["part"].tolist() == [0, 1, 1, 2, 1, 2, 2]
    assert all(torch.equal(rows[key], plain[key]) for key in ("token_ids", "positions", "attention"))


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, batch_size", [(12, 4), (13, 4), (3, 8), (1, 1)])
def test_batch_of_step(count, batch_size):
    """Each epoch is a permutation in batches of `batch_size`, the last one short where it does not divide."""
    per_epoch = -(-count // batch_size)
    for epoch in range(3):
        batches = [training.batch_of_step(epoch * per_epoch + k, count, batch_size, 7) for k in range(per_epoch)]
        assert [len(b) for b in batches[:-1]] == [batch_size] * (per_epoch - 1)
        assert len(batches[-1]) == count - batch_size * (per_epoch - 1)
        assert sorted(i for batch in batches for i in batch) == list(range(count))


def test_batch_of_step_is_seeded():
    order = lambda step, seed: training.batch_of_step(step, 40, 40, seed)
    assert order(0, 1) == order(0, 1) != sorted(order(0, 1))
    assert order(0, 1) != order(1, 1) and order(0, 1) != order(0, 5)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    """Steps behind the last checkpoint go, and so does a line that a kill cut short."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    training.open_metrics(path, 2, world_of(0, 1))
    assert common.read_jsonl(path) == [{"step": 1}, {"step": 2}]


def world_of(rank, size):
    return common.World(rank, size, CPU)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 16, 19])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
def test_micro_batches_are_a_partition(size, count, micro_batch_size):
    """Over all ranks each pair once; equally many micro-batches a rank, none too large; an idle rank's is empty."""
    indices = torch.randperm(30, generator=torch.Generator().manual_seed(count)).tolist()[:count]
    lengths = torch.randint(5, 50, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    ranks = [training.micro_batches(indices, lengths, micro_batch_size, world_of(r, size)) for r in range(size)]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == sorted(indices)
    assert {len(batches) for batches in ranks} == {math.ceil(math.ceil(count / size) / micro_batch_size)}
    assert all(len(batch) <= micro_batch_size for batches in ranks for batch in batches)
    shares = [sum(map(len, batches)) for batches in ranks]
    assert max(shares) - min(shares) <= 1
    # Dealt out in order of length: each rank's are sorted, and no rank has more than one place's advantage
    assert all(s == sorted(s) for s in ([lengths[i] for batch in batches for i in batch] for batches in ranks))
    assert ranks == [
        training.micro_batches(indices[::-1], lengths, micro_batch_size, world_of(r, size)) for r in range(size)
    ]


def test_micro_batches_by_hand():
    """Lengths 9 2 5 2 7: in order 1 3 2 4 0, dealt to two ranks: 1 2 0 and 3 4, then nothing."""
    lengths = [9, 2, 5, 2, 7]
    assert training.micro_batches([0, 1, 2, 3, 4], lengths, 2, world_of(0, 2)) == [[1, 2], [0]]
    assert training.micro_batches([0, 1, 2, 3, 4], lengths, 2, world_of(1, 2)) == [[3, 4], []]


# ---------------------------------------------------------------------------------------------------------------------
# Training, in a group of one process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return common.start_processes("cpu", 1)


@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_reference_logprobs(world, with_shared, micro_batch_size):
    """In the pairs' own order, whatever the micro-batches: shared, chosen suffix and rejected suffix of each pair."""
    lm, sharded = MODELS["llama_tied"](1), MODELS["llama_tied"](1)
    model = training.shard(dpo.PairModel(sharded, VOCAB), sharded, torch.float32, world)
    parameters = list(model.parameters())
    lengths = [len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in PAIRS]
    sums = dpo.reference_logprobs(model, PAIRS, lengths, PAD, with_shared, micro_batch_size, world)
    assert sums.shape == (len(PAIRS), 3) and not sums.requires_grad
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)), "an optimizer would see others"
    with torch.no_grad():
        chosen, rejected = (
            torch.stack([two_row_logps(lm, p, key) for p in PAIRS]) for key in ("chosen_ids", "rejected_ids")
        )
    torch.testing.assert_close(sums[:, 1] - sums[:, 2], chosen - rejected, atol=2e-5, rtol=0)
    if with_shared:
        torch.testing.assert_close(sums[:, 0] + sums[:, 1], chosen, atol=2e-5, rtol=0)
    else:
        assert (sums[:, 0] == 0).all()


@pytest.mark.parametrize(
    "total, warmup_ratio, expected",
    [
        # Warm-up of ceil(0.2 x 10) = 2 steps: 1/2, 1; cosine over steps 2 .. 9, so step 2 is the peak and step 9 is 10%
        (10, 0.2, {0: 0.5, 1: 1, 2: 1, 9: 0.1}),
        # 11 steps, no warm-up: halfway at step 5, (1 + 0.1) / 2; a quarter of the way cos(pi / 5) at step 2
        (11, 0.0, {0: 1, 5: 0.55, 2: 0.1 + 0.45 * (1 + math.cos(math.pi / 5)), 10: 0.1}),
        (4, 1.0, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1}),  # warm-up alone
        (1, 0.03, {0: 1}),  # one step: one step of warm-up, at the peak
        (2, 0.03, {0: 1, 1: 1}),  # one of warm-up, and one that is the cosine's first
    ],
)
def test_learning_rate(total, warmup_ratio, expected):
    for step, factor in expected.items():
        assert training.learning_rate(step, total, 3e-4, warmup_ratio, 0.1) == pytest.approx(3e-4 * factor, rel=1e-12)


def test_learning_rate_rises_then_falls():
    rates = [training.learning_rate(step, 100, 1.0, 0.1, 0.1) for step in range(100)]
    assert rates[:10] == sorted(set(rates[:10])) and rates[10:] == sorted(set(rates[10:]), reverse=True)
    assert max(rates) == 1 and rates[9] == rates[10] == 1 and rates[99] == pytest.approx(0.1)


def dozen_pairs():
    """Twelve pairs: the seven kinds above, and five with longer responses."""
    rng = torch.Generator().manual_seed(6)
    draw = lambda n: torch.randint(3, VOCAB, (n,), generator=rng).tolist()
    more = []
    for n in range(5):
        shared = draw(n)
        more.append(
            {"prompt_ids": [1, *draw(4)], "chosen_ids": [*shared, 4, *draw(3), 2], "rejected_ids": [*shared, 5, 2]}
        )
    return PAIRS + more


def train(world, tokenizer, out, student, *flags, pairs=None, reference=None):
    """dpo.train with small defaults; returns (last step's metrics, all steps' metrics)."""
    defaults = ["--device", "cpu", "--threads", "1", "--batch-size", "4", "--micro-batch-size", "2", "--lr", "2e-3"]
    args = dpo.parse_args(["--model", student, "--pairs", "unused", *defaults, *flags])
    out.mkdir(exist_ok=True)
    last = dpo.train(args, world, tokenizer, pairs or dozen_pairs(), student, reference or student, out)
    return last, common.read_jsonl(out / "metrics.jsonl")


METRICS = {
    "stage", "step", "loss", "dpo_loss", "margin", "accuracy", "chosen_reward", "rejected_reward", "chosen_logp",
    "rejected_logp", "grad_norm", "lr", "seconds", "tokens", "tokens_per_second", "peak_memory_gb",
}  # fmt: skip


def test_train_end_to_end(world, tokenizer, pair_of_models, tmp_path):
    """The loss falls from ln 2, there is one line a step with all keys, and OUT/student is another, loadable model."""
    student = pair_of_models["student"]
    last, steps = train(world, tokenizer, tmp_path, student, "--epochs", "6", "--beta", "0.5")
    assert [m["step"] for m in steps] == list(range(1, 19)) and all(m.keys() == METRICS for m in steps)
    assert all(isinstance(v, str) or math.isfinite(v) for m in steps for v in m.values())
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(m["loss"] for m in steps[-3:]) / 3 < 0.5 * math.log(2)
    assert steps[-1]["accuracy"] == 1 and steps[-1]["margin"] > 0.5
    assert last == steps[-1]

    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in (student, tmp_path / "student"))
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert {n: p.shape for n, p in old.items()} == {n: p.shape for n, p in new.items()}
    assert [n for n in old if torch.equal(old[n], new[n])] == [], "not trained"
    with torch.no_grad():
        for pair in dozen_pairs():
            margins = [
                two_row_logps(m, pair, "chosen_ids") - two_row_logps(m, pair, "rejected_ids") for m in (before, after)
            ]
            assert margins[1] > margins[0]

    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    again, _ = train(world, tokenizer, tmp_path, student, "--epochs", "6", "--beta", "0.5")
    assert again is None and files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


# Flags, the twin's options, and which model is the reference
FLAGS = {
    "plain": ([], {}, "teacher"),
    "own_reference": ([], {}, "student"),
    "label_smoothing": (["--label-smoothing", "0.2"], {"label_smoothing": 0.2}, "teacher"),
    "nll": (["--nll-weight", "0.5"], {"nll_weight": 0.5}, "teacher"),
    "mean": (["--logprobs", "mean"], {"average": True}, "teacher"),
    "mean_nll": (["--logprobs", "mean", "--nll-weight", "2"], {"average": True, "nll_weight": 2.0}, "student"),
    "accumulation": (["--micro-batch-size", "1", "--activation-checkpointing"], {}, "teacher"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_train_equals_a_plain_loop(world, tokenizer, pair_of_models, tmp_path, name):
    """Four steps over 11 pairs (the third batch is short) against two rows a pair, AdamW and no FSDP.

    With another model as the reference, the first step's loss says all that the flags change. Gradient norms are those
    before clipping, which only some of the steps need, and steps 2 to 4 run on weights that the steps before them made.
    AdamW divides by the gradient's size, so the few weights with hardly any gradient move by rounding: the trained
    weights are compared as a whole.
    """
    flags, options, reference = FLAGS[name]
    student, reference, pairs = pair_of_models["student"], pair_of_models[reference], dozen_pairs()[:11]
    settings = ["--max-steps", "4", "--beta", "0.3", "--max-grad-norm", "3", "--weight-decay", "0.1", "--seed", "9"]
    flags = [*settings, *flags]
    _, steps = train(world, tokenizer, tmp_path, student, *flags, pairs=pairs, reference=reference)

    lm, frozen = (AutoModelForCausalLM.from_pretrained(p) for p in (student, reference))
    start = {key: parameter.detach().clone() for key, parameter in lm.named_parameters()}
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step, metrics in enumerate(steps):
        batch = [pairs[i] for i in training.batch_of_step(step, 11, 4, 9)]
        assert len(batch) == (3 if step == 2 else 4)
        loss = two_row_loss(lm, frozen, batch, beta=0.3, **options)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), 3.0)
        # 4 steps: one of warm-up at the peak, then the cosine's beginning, middle and end
        optimizer.param_groups[0]["lr"] = 2e-3 * [1, 1, 0.55, 0.1][step]
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=2e-4)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=2e-3)
        assert metrics["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        if "nll_weight" in options:
            assert metrics["loss"] == pytest.approx(metrics["dpo_loss"] + options["nll_weight"] * metrics["nll"])
    trained = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "student").named_parameters())
    for key, parameter in lm.named_parameters():
        assert (trained[key] - parameter).norm() < 1e-2 * (parameter - start[key]).norm(), key


def test_logged_numbers(world, tokenizer, pair_of_models, tmp_path):
    """Rewards, margin, accuracy and log-probs of a first step over all twelve pairs, from the twin's log-probs.

    With an NLL term the shared tokens are counted, so rewards and log-probs are those of whole responses.
    """
    flags = ["--max-steps", "1", "--batch-size", "12", "--micro-batch-size", "4", "--nll-weight", "1", "--beta", "0.2"]
    paths = pair_of_models["student"], pair_of_models["teacher"]
    metrics, _ = train(world, tokenizer, tmp_path, paths[0], *flags, reference=paths[1])
    policy, reference = (AutoModelForCausalLM.from_pretrained(p) for p in paths)
    with torch.no_grad():
        logps = torch.tensor(
            [
                [two_row_logps(lm, p, key) for lm in (policy, reference) for key in ("chosen_ids", "rejected_ids")]
                for p in dozen_pairs()
            ]
        )  # (12, 4): policy chosen, policy rejected, reference chosen, reference rejected
    chosen, rejected = 0.2 * (logps[:, 0] - logps[:, 2]), 0.2 * (logps[:, 1] - logps[:, 3])
    expected = {
        "chosen_reward": chosen.mean(),
        "rejected_reward": rejected.mean(),
        "margin": (chosen - rejected).mean(),
        "accuracy": (chosen > rejected).float().mean(),
        "chosen_logp": logps[:, 0].mean(),
        "rejected_logp": logps[:, 1].mean(),
        "dpo_loss": F.softplus(rejected - chosen).mean(),
        "nll": -logps[:, 0].sum() / sum(len(p["chosen_ids"]) for p in dozen_pairs()),
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), key


def test_reference_teacher_differs_from_reference_student(world, tokenizer, pair_of_models, tmp_path):
    student, teacher = pair_of_models["student"], pair_of_models["teacher"]
    own, _ = train(world, tokenizer, tmp_path / "own", student, "--max-steps", "1")
    other, _ = train(world, tokenizer, tmp_path / "other", student, "--max-steps", "1", reference=teacher)
    assert own["loss"] == pytest.approx(math.log(2), abs=1e-5) and own["margin"] == pytest.approx(0, abs=1e-5)
    assert abs(other["loss"] - own["loss"]) > 0.01 and abs(other["margin"]) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_dtype(world, tokenizer, pair_of_models, tmp_path, dtype):
    """The files hold this dtype, config.json says so, and a plain from_pretrained loads it as such."""
    train(world, tokenizer, tmp_path, pair_of_models["student"], "--max-steps", "1", "--save-dtype", dtype)
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in list(file.keys())} == {common.DTYPES[dtype]}
    assert common.read_json(tmp_path / "student" / "config.json")["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").dtype == common.DTYPES[dtype]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_is_off(world, tokenizer, tmp_path, family):
    """A model with dropout in its config (GPT-2: 0.1 by default) is its own reference all the same: loss ln 2."""
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config) if family == "gpt2" else make_model("llama", 1, attention_dropout=0.5)
    model.save_pretrained(tmp_path / "model")
    metrics, _ = train(world, tokenizer, tmp_path / "out", str(tmp_path / "model"), "--max-steps", "1", "--beta", "1")
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = [("1+1:", "2", "3"), ("12+5:", "17", "18;"), ("9+9:", "18", "8"), ("4+4:", "8", "88")]


def turn(role, content):
    return {"role": role, "content": content}


def to_row(form, prompt, chosen, rejected):
    """One preference as text, as conversations with a prompt, and as conversations that both begin with it."""
    if form == "text":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    user, answers = turn("user", prompt), [turn("assistant", chosen), turn("assistant", rejected)]
    if form == "messages":
        return {"prompt": [user], "chosen": answers[:1], "rejected": answers[1:]}
    return {"chosen": [user, answers[0]], "rejected": [user, answers[1]]}


def write_rows(path, form):
    path.write_text("".join(json.dumps(to_row(form, *texts)) + "\n" for texts in TEXTS))
    return path


FORMS = ["text", "messages", "messages_without_prompt"]


@pytest.mark.parametrize("form", FORMS)
def test_read_pairs(tokenizer, tmp_path, form):
    """Text: the prompt as it is, responses end with <eos>. Messages: the toy's template: <bos>, contents, no <eos>."""
    ids = lambda text: tokenizer.convert_tokens_to_ids(list(text))
    bos, eos = ([], [tokenizer.eos_token_id]) if form == "text" else ([tokenizer.bos_token_id], [])
    assert read_pairs(write_rows(tmp_path / "pairs.jsonl", form), tokenizer) == [
        {"prompt_ids": bos + ids(p), "chosen_ids": ids(c) + eos, "rejected_ids": ids(r) + eos} for p, c, r in TEXTS
    ]


@pytest.mark.parametrize("form", FORMS)
def test_command(world, tokenizer, pair_of_models, tmp_path, capsys, form):
    """dpo.main on a TRL-style file: reads, trains, says so in one line, leaves a model; again, it changes nothing."""
    pairs, out, student = write_rows(tmp_path / "pairs.jsonl", form), tmp_path / "out", pair_of_models["student"]
    argv = ["--model", student, "--pairs", str(pairs), "--out", str(out), "--device", "cpu", "--threads", "1"]
    argv += ["--batch-size", "4", "--micro-batch-size", "2", "--max-steps", "6", "--lr", "3e-3", "--beta", "1"]
    dpo.main(argv)
    steps = common.read_jsonl(out / "metrics.jsonl")
    assert len(steps) == 6 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < 0.9 * math.log(2)
    assert f"4 pairs -> {out / 'student'} (loss {steps[-1]['loss']:.4f} accuracy" in capsys.readouterr().out
    assert common.read_json(out / "args.json")["args"]["max_steps"] == 6
    AutoModelForCausalLM.from_pretrained(out / "student")
    assert models.load_tokenizer(str(out / "student")).get_vocab() == tokenizer.get_vocab()
    dpo.main(argv)
    assert "it was finished before" in capsys.readouterr().out
    assert len(common.read_jsonl(out / "metrics.jsonl")) == 6


def test_command_reference(world, pair_of_models, tmp_path):
    """--reference names another model: the first step's loss is not ln 2."""
    pairs, student, teacher = (
        write_rows(tmp_path / "p.jsonl", "text"),
        pair_of_models["student"],
        pair_of_models["teacher"],
    )
    argv = [
        "--model",
        student,
        "--pairs",
        str(pairs),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    dpo.main([*argv, "--batch-size", "4", "--reference", teacher, "--beta", "1"])
    texts = read_pairs(pairs, models.load_tokenizer(student))
    with torch.no_grad():
        loss = two_row_loss(*(AutoModelForCausalLM.from_pretrained(p) for p in (student, teacher)), texts, beta=1.0)
    assert common.read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(loss.item(), rel=2e-4)
    assert abs(loss.item() - math.log(2)) > 0.01


@pytest.mark.parametrize("key", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_read_pairs_refuses_empty_ids(tokenizer, tmp_path, key):
    """A mean over no tokens is not a number, and a response has at least its EOS: refused before training."""
    row = {"prompt_ids": [1, 5], "chosen_ids": [4, 2], "rejected_ids": [6, 2], key: []}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(common.UserError, match="empty.*line 1"):
        read_pairs(tmp_path / "pairs.jsonl", tokenizer)


def test_command_refuses_an_empty_file(world, pair_of_models, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(common.UserError, match="no pairs"):
        dpo.main(["--model", pair_of_models["student"], "--pairs", str(tmp_path / "pairs.jsonl"), "--device", "cpu"])
