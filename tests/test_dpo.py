"""dpo.py against hand-computed numbers, and against the two-row computation that prefix sharing replaces.

The twin runs the full model on [prompt + response] for each response alone, takes log_softmax over the vocabulary and
sums the response's log-probs: no shared rows, no mask, no cache, no FSDP.
"""

import inspect
import json
import math
import os
import signal
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from safetensors import safe_open
from test_data import BOS, CHAT, EOS, byte_tokenizer, turn, write
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import dpo
from lib import models, runs, training
from lib.runs import UserError

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
    ours, theirs = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (fast, slow))
    floor = 1e-2 * tolerance * torch.stack([g.norm() for g in theirs]).norm()
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + floor, name


LOSSES = {
    "sum": ({}, [False, True]),  # the shared part may be there: it cancels
    "mean": ({"average": True}, [True]),
    "nll": ({"nll_weight": 0.7}, [True]),
    "mean_nll": ({"average": True, "nll_weight": 0.7}, [True]),
}


BATCHES = [(family, PAIRS, 0.1) for family in MODELS] + [("qwen2", [pair], 1.0) for pair in PAIRS]


@pytest.mark.parametrize("family, pairs, beta", BATCHES, ids=[f"{family}-{len(pairs)}" for family, pairs, _ in BATCHES])
@pytest.mark.parametrize("name", LOSSES)
def test_prefix_sharing_equals_two_rows(family, pairs, beta, name):
    """Loss and the gradients of all parameters: a batch of all kinds of pairs, padded to the longest; each kind alone."""
    lm, reference = MODELS[family](1), MODELS[family](2)
    options, choices = LOSSES[name]
    slow = two_row_loss(lm, reference, pairs, beta, **options)
    for with_shared in choices:
        fast = one_row_loss(lm, reference, pairs, with_shared, beta, **options)
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
# Training, in a group of one process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return runs.start_processes("cpu", 1)


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
    runs.write_jsonl(out / "pairs.jsonl", dozen_pairs() if pairs is None else pairs)
    pairs = dpo.write_pairs(out / "pairs.jsonl", tokenizer, out, world)
    last = dpo.train(args, world, tokenizer, pairs, student, student if reference is None else reference, out)
    return last, runs.read_jsonl(out / "metrics.jsonl")


METRICS = {
    "stage", "step", "loss", "dpo_loss", "margin", "wins", "chosen_reward", "rejected_reward", "chosen_logp",
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
    assert steps[-1]["wins"] == 1 and steps[-1]["margin"] > 0.5
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

    again, _ = train(world, tokenizer, tmp_path, student, "--epochs", "6", "--beta", "0.5")
    assert again is None and runs.read_jsonl(tmp_path / "metrics.jsonl") == steps
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    assert all(torch.equal(trained[name], parameter) for name, parameter in new.items())


@pytest.mark.parametrize("reference", ["student", "teacher"])
def test_sharded_models_are_freed(world, tokenizer, pair_of_models, tmp_path, monkeypatch, reference):
    """The policy after the training, another reference before the first step: FSDP's modules are in cycles."""
    models_there, at_the_optimizer = [], []
    load_policy, make_optimizer = dpo.load_policy, training.make_optimizer

    def watch_load(*arguments):
        loaded = load_policy(*arguments)
        models_there.append(weakref.ref(loaded[0]))
        return loaded

    def watch_optimizer(*arguments):
        at_the_optimizer.extend(model() is not None for model in models_there)
        return make_optimizer(*arguments)

    monkeypatch.setattr(dpo, "load_policy", watch_load)
    monkeypatch.setattr(training, "make_optimizer", watch_optimizer)
    path = pair_of_models["student"]
    train(world, tokenizer, tmp_path, path, "--max-steps", "1", reference=pair_of_models[reference])
    assert at_the_optimizer == ([True] if reference == "student" else [True, False])
    training.release_memory()
    assert [model() for model in models_there] == [None] * len(models_there)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step(world, tokenizer, pair_of_models, tmp_path, monkeypatch, number):
    """The step is finished and its checkpoint written; the same command then gives the student of one run."""
    learning_rate, student, flags = training.learning_rate, pair_of_models["student"], ("--max-steps", "4")

    def told_to_stop(step, *arguments):
        if step == 1:
            os.kill(os.getpid(), number)
        return learning_rate(step, *arguments)

    _, whole = train(world, tokenizer, tmp_path / "whole", student, *flags)
    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", told_to_stop)
        with pytest.raises(runs.Stopped, match="stopped after step 2"):
            train(world, tokenizer, tmp_path / "out", student, *flags)
    assert [path.name for path in (tmp_path / "out" / "checkpoint").iterdir()] == ["step-000002"]
    _, steps = train(world, tokenizer, tmp_path / "out", student, *flags)
    assert [row["loss"] for row in steps] == [row["loss"] for row in whole]
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "student") for name in ("whole", "out"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


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
    """Rewards, margin, wins and log-probs of a first step over all twelve pairs, from the twin's log-probs.

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
        "wins": (chosen > rejected).float().mean(),
        "chosen_logp": logps[:, 0].mean(),
        "rejected_logp": logps[:, 1].mean(),
        "dpo_loss": F.softplus(rejected - chosen).mean(),
        "nll": -logps[:, 0].sum() / sum(len(p["chosen_ids"]) for p in dozen_pairs()),
    }
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_dtype(world, tokenizer, pair_of_models, tmp_path, dtype):
    """The files hold this dtype, config.json says so, and a plain from_pretrained loads it as such."""
    train(world, tokenizer, tmp_path, pair_of_models["student"], "--max-steps", "1", "--save-dtype", dtype)
    with safe_open(tmp_path / "student" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in list(file.keys())} == {runs.DTYPES[dtype]}
    assert runs.read_json(tmp_path / "student" / "config.json")["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").dtype == runs.DTYPES[dtype]


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
# Reading pairs
# ---------------------------------------------------------------------------------------------------------------------

IDS = {"prompt_ids": [9], "chosen_ids": [10], "rejected_ids": [11]}  # a good row
ASK, GOOD, BAD, SYSTEM = turn("user", "Q"), turn("assistant", "good"), turn("assistant", "bad"), turn("system", "S")
TEMPLATE = CHAT.replace("{% endfor %}", "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}")


def read(path, tokenizer):
    return list(dpo.read_pairs(path, tokenizer))


def read_one(tmp_path, row, tokenizer):
    [pair] = read(write(tmp_path, row), tokenizer)
    return {key: pair[key] for key in IDS}


def text_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_own_format_is_taken_as_it_is(tmp_path):
    """Ids are used untouched, whatever the text beside them says; the highest, 257, too; numbers of tokens are added.

    A fingerprint is not obligatory. Without a prompt_id it is the row's number.
    """
    tokenizer = byte_tokenizer()
    row = {"prompt_id": 4, "prompt_ids": [BOS, 9], "chosen_ids": [257, EOS], "rejected_ids": [257], "prompt": "x"}
    row |= {"chosen": "y", "rejected": "y"}
    rows = [row | {"tokenizer": models.tokenizer_fingerprint(tokenizer)}, row, IDS, {**IDS, "prompt_id": "a"}]
    found = read(write(tmp_path, *rows), tokenizer)
    counts = {"tokens": 5, "chosen_tokens": 2, "rejected_tokens": 1}
    assert found[:2] == [{**rows[0], **counts}, {**row, **counts}]
    assert [pair["prompt_id"] for pair in found] == [4, 4, 2, 3]
    assert read(write(tmp_path), tokenizer) == []


def test_pairs_in_a_file(world, tmp_path):
    """OUT/pairs.arrow, mapped into memory: the rows in their order, as `train` indexes them."""
    rows = [{**IDS, "chosen_ids": [10 + k] * (k + 1)} for k in range(2, 7)]
    pairs = dpo.write_pairs(write(tmp_path, *rows), byte_tokenizer(), tmp_path, world)
    assert [pairs[i]["chosen_ids"] for i in range(5)] == [row["chosen_ids"] for row in rows]
    assert pairs["prompt_id"][:] == [0, 1, 2, 3, 4] and pairs["tokens"][:] == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("add_bos", [True, False], ids=["tokenizer adds bos", "tokenizer adds none"])
@pytest.mark.parametrize("written", ["", "<s>"], ids=["no bos in the text", "bos in the text"])
def test_trl_text_format(tmp_path, add_bos, written):
    """Prompt with one bos if the tokenizer adds it or the text has it; responses without bos, closed by one eos.

    The text columns of OUT/pairs.jsonl are such a data set.
    """
    tokenizer = byte_tokenizer(add_bos)
    row = {"prompt": f"{written}Wie viel? ", "chosen": "é 5", "rejected": ""}
    bos = [BOS] if add_bos or written else []
    assert read_one(tmp_path, row, tokenizer) == {
        "prompt_ids": bos + text_ids(tokenizer, "Wie viel? "),
        "chosen_ids": [*text_ids(tokenizer, "é 5"), EOS],
        "rejected_ids": [EOS],
    }


CONVERSATIONS = {
    "prompt as messages": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, ""),
    "system turn": ({"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]}, "[system]S"),
    "prompt as text": ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, ""),
    "no prompt": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ""),
    "null prompt": ({"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ""),
    "several turns": (
        {"chosen": [SYSTEM, ASK, GOOD, ASK, GOOD], "rejected": [SYSTEM, ASK, GOOD, ASK, BAD]},
        "[system]S[user]Q[assistant]good</s>",
    ),
    "text and in both (UltraFeedback)": ({"prompt": "Q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ""),
}


@pytest.mark.parametrize("row, before", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("dated", [False, True])
def test_conversational_format(tmp_path, row, before, dated):
    """The chat template decides where the response begins; bos once; what both conversations begin with is the prompt.

    A date in the template is pinned: a run taken up tomorrow must see today's ids.
    """
    date = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    tokenizer = byte_tokenizer(chat_template=date + TEMPLATE if dated else TEMPLATE)
    assert read_one(tmp_path, row, tokenizer) == {
        "prompt_ids": text_ids(tokenizer, f"{'26 Jul 2024' if dated else ''}<s>{before}[user]Q[assistant]"),
        "chosen_ids": text_ids(tokenizer, "good</s>"),
        "rejected_ids": text_ids(tokenizer, "bad</s>"),
    }


def test_fingerprint_is_of_the_vocabulary(tmp_path, monkeypatch, tokenizer):
    """Equal for equal vocabularies, whatever the template; different when two tokens are swapped or one is added.

    It sorts and hashes the vocabulary, 0.2 s for 152k tokens: once a file, not once a line.
    """
    fingerprint, hashed = models.tokenizer_fingerprint, []
    one, same, more = byte_tokenizer(), byte_tokenizer(add_bos=False, chat_template=CHAT), byte_tokenizer()
    more.add_tokens(["<new>"])
    assert fingerprint(one) == fingerprint(same)
    assert len({fingerprint(t) for t in (one, more, tokenizer)}) == 3 and len(fingerprint(one)) == 16
    swapped, plain = (SimpleNamespace(get_vocab=lambda v=v: v) for v in ({"a": 1, "b": 0}, {"b": 1, "a": 0}))
    assert fingerprint(swapped) != fingerprint(plain)
    monkeypatch.setattr(models, "tokenizer_fingerprint", lambda t: [fingerprint(t), hashed.append(t)][0])
    assert len(read(write(tmp_path, *[{**IDS, "tokenizer": fingerprint(one)}] * 20), one)) == 20 and len(hashed) == 1


COLUMNS = "no columns chosen and rejected, in {}, see the README for the format"
NOT_TEXT = "prompt, chosen and rejected are not all text or all messages, in {}, repair the line"
SAME = "chosen equals rejected, in {}, repair or delete the line"
NO_PROMPT = "there is no prompt, and the conversations share none, in {}, repair the line"
OTHER = "the ids were made with another tokenizer, in {}, use the model that the pairs were made with"
REFUSED = [
    *[(row, COLUMNS) for row in ([1], "text", None, {}, {"prompt": "a", "chosen": "b"})],
    ({"prompt_ids": [9], "chosen_ids": [10]}, COLUMNS),
    ({"chosen": "b", "rejected": "c"}, NOT_TEXT),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, NOT_TEXT),
    ({"prompt": 1, "chosen": "b", "rejected": "c"}, NOT_TEXT),
    ({"prompt": "a", "chosen": "b", "rejected": None}, NOT_TEXT),
    ({"prompt": "a", "chosen": [GOOD], "rejected": "c"}, NOT_TEXT),
    ({"prompt": [ASK], "chosen": "b", "rejected": "c"}, NOT_TEXT),
    ({"prompt": [ASK], "chosen": ["b"], "rejected": ["c"]}, NOT_TEXT),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, SAME),
    ({**IDS, "chosen_ids": [11]}, SAME),
    ({"chosen": [GOOD], "rejected": [BAD]}, NO_PROMPT),
    ({**IDS, "tokenizer": "0123456789abcdef"}, OTHER),
    # A response of no token has no mean log-prob; even an empty answer has its eos
    *[({**IDS, key: []}, f"{key} is empty, in {{}}, repair or delete the line") for key in IDS],
    *[
        ({**IDS, key: value}, f"{key} is not a list of ids below 258, in {{}}, use the pairs' own tokenizer")
        for key in IDS
        for value in ([258], [9, 258], [-1], [1.5], ["9"], "9", None, 9, [[9]], [True])
    ],
]


@pytest.mark.parametrize("row, expected", REFUSED, ids=[json.dumps(row) for row, _ in REFUSED])
def test_rows_that_are_no_pair(tmp_path, row, expected):
    """Named by their line. The tokenizer has 258 tokens: 256 bytes and two specials."""
    path = write(tmp_path, IDS, row)
    with pytest.raises(UserError) as error:
        read(path, byte_tokenizer(chat_template=TEMPLATE))
    assert str(error.value) == expected.format(f"{path} line 2")


@pytest.mark.parametrize(
    "template, expected",
    [
        (None, "the pair is a conversation, the tokenizer has no chat template, in .* line 1, give text"),
        # Qwen3 style: the generation prompt opens an empty thought that a finished turn does not have. Where the
        # response begins is then unknown, and taking the whole conversation for it would train on the prompt
        (TEMPLATE.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}"), "chat template writes a prompt"),
    ],
    ids=["none", "prompt is no beginning"],
)
def test_templates_that_are_refused(tmp_path, template, expected):
    path = write(tmp_path, {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]})
    with pytest.raises(UserError, match=expected):
        read(path, byte_tokenizer(chat_template=template))


@pytest.mark.parametrize("content", [b'{"prompt": "a",\n', b"\n", b"\xff\xfe\x00\n"], ids=["cut", "blank", "binary"])
def test_files_that_are_no_json(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^not JSON \(.*\), in {path} line 1, repair or delete the line$"):
        read(path, byte_tokenizer())
    for missing in (tmp_path / "nope.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"^no pairs file, at {missing}, run warmup_distill.py first or check"):
            read(missing, byte_tokenizer())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = [("1+1:", "2", "3"), ("12+5:", "17", "18;"), ("9+9:", "18", "8"), ("4+4:", "8", "88")]
ROWS = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in TEXTS]


@pytest.fixture
def argv(tmp_path, pair_of_models):
    argv = [
        "--model",
        pair_of_models["student"],
        "--pairs",
        str(tmp_path / "data.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    argv += ["--device", "cpu", "--threads", "1", "--batch-size", "4", "--micro-batch-size", "2", "--beta", "1"]
    return argv


def test_command(tokenizer, argv, tmp_path, capsys):
    """dpo.main on a TRL-style file: reads, trains, says so in one line, leaves a model; again, it changes nothing."""
    write(tmp_path, *ROWS)
    out = tmp_path / "out"
    argv = [*argv, "--max-steps", "6", "--lr", "3e-3"]
    dpo.main(argv)
    steps = runs.read_jsonl(out / "metrics.jsonl")
    assert len(steps) == 6 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["loss"] < 0.9 * math.log(2)
    end = f"(loss {steps[-1]['loss']:.4f}, wins {steps[-1]['wins']:.3f}); its curves: python -m tools.report {out}"
    assert f"4 pairs -> {out / 'student'} {end}\n" in capsys.readouterr().out
    assert runs.read_json(out / "args.json")["args"]["max_steps"] == 6
    AutoModelForCausalLM.from_pretrained(out / "student")
    assert models.load_tokenizer(str(out / "student")).get_vocab() == tokenizer.get_vocab()
    dpo.main(argv)
    assert f"dpo: {out / 'student'} was there already\n" in capsys.readouterr().out
    assert runs.read_jsonl(out / "metrics.jsonl") == steps


def test_command_reference(argv, pair_of_models, tokenizer, tmp_path):
    """--reference names another model: the first step's loss is not ln 2."""
    file = write(tmp_path, *ROWS)
    dpo.main([*argv, "--reference", pair_of_models["teacher"]])
    lms = [AutoModelForCausalLM.from_pretrained(pair_of_models[name]) for name in ("student", "teacher")]
    with torch.no_grad():
        loss = two_row_loss(*lms, read(file, tokenizer), beta=1.0).item()
    assert runs.read_jsonl(tmp_path / "out" / "metrics.jsonl")[0]["loss"] == pytest.approx(loss, rel=2e-4)
    assert abs(loss - math.log(2)) > 0.01


def test_command_refuses_an_empty_file(argv, tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="^no pairs, in "):
        dpo.main(argv)
