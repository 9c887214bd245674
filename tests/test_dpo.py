"""dpo.py against hand-computed numbers, and against the two-row computation that prefix sharing replaces.

The twin runs the full model on [prompt + response] for each response alone, takes log_softmax over the vocabulary and
sums the response's log-probs: no shared rows, no mask, no cache, no FSDP.
"""

import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import logged, make_model, weights, with_bias
from test_data import BOS, CHAT, EOS, byte_tokenizer, turn, write
from test_decode import VOCAB, slow_score
from transformers import AutoModelForCausalLM

import dpo
from lib import models, runs, training
from lib.runs import UserError

PAD = 0
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# dpo_loss
# ---------------------------------------------------------------------------------------------------------------------


# Policy and reference log-probs (chosen, rejected), beta, smoothing, loss, rewards (chosen, rejected).
# z = beta ((chosen - reference chosen) - (rejected - reference rejected)); loss = log(1 + e^-z), and where a label is
# wrong with probability eps, eps z more: (1 - eps) loss(z) + eps loss(-z). Its slope is eps - sigma(-z)
BY_HAND = [
    ((-3.0, -9.0), (-3.0, -9.0), 5.0, 0.3, math.log(2), (0.0, 0.0)),  # the policy is the reference: z = 0
    ((-10.0, -12.0), (-11.0, -10.0), 1.0, 0.0, math.log1p(math.exp(-3)), (1.0, -2.0)),  # z = 1 + 2 = 3
    ((-10.0, -12.0), (-11.0, -10.0), 0.1, 0.0, math.log1p(math.exp(-0.3)), (0.1, -0.2)),  # z = 0.3
    ((-10.0, -12.0), (-11.0, -10.0), 1.0, 0.2, math.log1p(math.exp(-3)) + 0.6, (1.0, -2.0)),
    ((-4.0, -1.0), (-2.0, -2.0), 0.5, 0.0, math.log1p(math.exp(1.5)), (-1.0, 0.5)),  # z = 0.5 (-2 - 1) = -1.5
    ((-4.0, -8.0), (-2.0, -6.0), 0.5, 0.0, math.log(2), (-1.0, -1.0)),  # both fall by 2: z = 0
    ((-1.0, -2.0), (-math.log(2) - 1, -2.0), 1.0, 0.0, math.log(3 / 2), (math.log(2), 0.0)),  # e^-z = 1/2
]


@pytest.mark.parametrize("policy, reference, beta, eps, loss, rewards", BY_HAND)
def test_loss_by_hand(policy, reference, beta, eps, loss, rewards):
    logps = [torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in policy + reference]
    losses = dpo.dpo_loss(*logps, beta, eps)
    assert [column.item() for column in losses] == pytest.approx([loss, *rewards], rel=1e-12)
    losses[0].backward()
    weight = beta * (1 / (1 + math.exp(rewards[0] - rewards[1])) - eps)
    assert [policy.grad.item() for policy in logps[:2]] == pytest.approx([-weight, weight], rel=1e-12)


def test_loss_limits():
    """|z| of 10,000 is finite: 0 on the right side, |z| on the wrong one."""
    policy = torch.tensor([0.0, -1e4], requires_grad=True)
    losses, *_ = dpo.dpo_loss(policy, policy.flip(0), torch.zeros(2), torch.zeros(2), 1.0)
    losses.sum().backward()
    assert losses.tolist() == [0, 1e4] and torch.isfinite(policy.grad).all()


# ---------------------------------------------------------------------------------------------------------------------
# Prefix sharing
# ---------------------------------------------------------------------------------------------------------------------

PAIRS = [
    {"prompt_ids": [1, 4, 9, 13, 8], "chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 6, 9, 10, 11, 2]},  # shared: 2
    {"prompt_ids": [1, 7, 3], "chosen_ids": [8, 2], "rejected_ids": [19, 4, 4, 12, 2]},  # nothing shared
    {"prompt_ids": [1, 20, 6, 6], "chosen_ids": [9, 5, 14, 3], "rejected_ids": [9, 5, 14, 2]},  # all but the last
    {"prompt_ids": [1, 5], "chosen_ids": [16, 4], "rejected_ids": [16, 4, 11, 2]},  # chosen begins rejected
    {"prompt_ids": [1, 11, 12, 4, 7, 7, 10], "chosen_ids": [6, 17, 8, 2], "rejected_ids": [6]},  # the other way round
    {"prompt_ids": [1], "chosen_ids": [15, 10, 2], "rejected_ids": [15, 2]},  # a prompt of one token
    {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [5]},  # one token each
]


def two_row_logps(lm, pair, key):
    """Sum of log pi(y_t | x, y_<t) over one response, with gradients."""
    return slow_score(lm, pair["prompt_ids"], pair[key]).sum()


RESPONSES = ("chosen_ids", "rejected_ids")


def two_row_loss(lm, reference, pairs, beta=0.1, label_smoothing=0.0, nll_weight=0.0, average=False):
    """The step's loss by two rows a pair: mean over pairs of DPO, plus nll_weight times NLL per chosen token."""
    total = nll = 0.0
    for pair in pairs:
        policy = [two_row_logps(lm, pair, key) for key in RESPONSES]
        with torch.no_grad():
            fixed = [two_row_logps(reference, pair, key) for key in RESPONSES]
        nll = nll - policy[0]
        if average:
            counts = len(pair["chosen_ids"]), len(pair["rejected_ids"])
            policy, fixed = ([x / n for x, n in zip(values, counts)] for values in (policy, fixed))
        z = beta * (policy[0] - policy[1] - fixed[0] + fixed[1])
        total = total - (1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
    return total / len(pairs) + nll_weight * nll / sum(len(p["chosen_ids"]) for p in pairs)


def one_row_loss(lm, reference, pairs, with_shared, beta, nll_weight=0.0, average=False):
    """The same from the production path: one row a pair, all pairs in one padded batch."""
    rows = dpo.collate_pairs(pairs, PAD, with_shared, CPU)
    lengths = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in pairs])
    with torch.no_grad():
        fixed = dpo.PairModel(reference, VOCAB)(**rows)
    args = SimpleNamespace(beta=beta, nll_weight=nll_weight, label_smoothing=0.0)
    args.logprobs = "mean" if average else "sum"
    return dpo.batch_loss(dpo.PairModel(lm, VOCAB)(**rows), fixed, lengths, len(pairs), lengths[:, 0].sum(), args)[0]


MODELS = {
    "llama": lambda seed: make_model("llama", seed, rows=32),
    "llama_tied": lambda seed: make_model("llama", seed, tie_word_embeddings=True),
    "llama_bias": lambda seed: with_bias(make_model("llama", seed, rows=32)),
    "qwen2": lambda seed: make_model("qwen2", seed, rows=32),
    "eager": lambda seed: make_model("llama", seed, attn_implementation="eager"),
}


# Of the step's loss, and whether the shared part is there: in differences of sums it may be, as it cancels
LOSSES = {
    "sum": (False, {}),
    "sum of all": (True, {}),
    "mean": (True, {"average": True}),
    "nll": (True, {"nll_weight": 0.7}),
    "mean_nll": (True, {"average": True, "nll_weight": 0.7}),
}
BATCHES = [(family, PAIRS, 0.1) for family in MODELS] + [("qwen2", [pair], 1.0) for pair in PAIRS]


@pytest.mark.parametrize("family, pairs, beta", BATCHES, ids=[f"{family}-{len(pairs)}" for family, pairs, _ in BATCHES])
@pytest.mark.parametrize("name", LOSSES)
def test_prefix_sharing_equals_two_rows(family, pairs, beta, name):
    """Loss and the gradients of all parameters: a batch of all kinds of pairs, padded to the longest; each kind alone.

    With float64 weights what differs is the head's float32 softmax. The floor is for gradients that are zero but for
    rounding: a prompt of one token has nothing to choose from in its attention, so queries and keys do not matter.
    """
    lm, reference = MODELS[family](1).double(), MODELS[family](2).double()
    with_shared, options = LOSSES[name]
    names, parameters = zip(*lm.named_parameters())
    slow = two_row_loss(lm, reference, pairs, beta, **options)
    theirs = torch.autograd.grad(slow, parameters)
    floor = 1e-7 * torch.stack([g.norm() for g in theirs]).norm()
    fast = one_row_loss(lm, reference, pairs, with_shared, beta, **options)
    assert fast.item() == pytest.approx(slow.item(), rel=1e-5)
    for parameter, a, b in zip(names, torch.autograd.grad(fast, parameters), theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + floor, parameter


def test_shared_length_and_response_logps():
    """Sums: the shared part is in both. Means: over each response's own number of tokens."""
    rows = [([5, 6, 7], [5, 6, 8], 2), ([5, 6], [5, 6, 7], 2), ([5, 6], [5], 1), ([], [5], 0), ([4, 1], [3, 1], 0)]
    assert [dpo.shared_length(*row[:2]) for row in rows] == [row[2] for row in rows]
    sums, lengths = torch.tensor([[-2.0, -4.0, -1.0], [0.0, -3.0, -8.0]]), torch.tensor([[3, 2], [6, 4]])
    assert [x.tolist() for x in dpo.response_logps(sums, lengths, False)] == [[-6, -3], [-3, -8]]
    assert [x.tolist() for x in dpo.response_logps(sums, lengths, True)] == [[-2, -0.5], [-1.5, -2]]


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
    seen = [["".join("01"[column] for column in query) for query in row] for row in rows["attention"].tolist()]
    assert seen[0] == ["100000", "110000", "111000", "111100", "111110", "111001"]  # 9 does not see 8 2
    assert seen[1][:4] == ["100000", "110000", "101000", "101100"]  # 4 does not see 6, 2 neither
    assert rows["attention"][1, 4:].any(-1).all()  # padding sees something: no softmax over nothing
    # 8 and 9 are both predicted from the shared 7 (column 2), 2 from 8; in row 1 (from flat index 6 on) 6 and 4 from 1
    assert rows["target"].tolist() == [8, 2, 9, 6, 4, 2] and rows["source"].tolist() == [2, 3, 2, 6, 6, 8]
    assert rows["row"].tolist() == [0, 0, 0, 1, 1, 1] and rows["part"].tolist() == [1, 1, 2, 1, 2, 2]

    # With shared tokens one target more: the 7, predicted from the prompt's 5. All else is the same
    more = dpo.collate_pairs(HAND, PAD, True, CPU)
    assert more["target"].tolist() == [7, 8, 2, 9, 6, 4, 2] and more["source"].tolist() == [1, 2, 3, 2, 6, 6, 8]
    assert more["row"].tolist() == [0, 0, 0, 0, 1, 1, 1] and more["part"].tolist() == [0, 1, 1, 2, 1, 2, 2]
    assert all(torch.equal(rows[key], more[key]) for key in ("token_ids", "positions", "attention"))


# ---------------------------------------------------------------------------------------------------------------------
# The command, in a group of one process
# ---------------------------------------------------------------------------------------------------------------------


# The seven kinds above, and five with longer responses
DOZEN = PAIRS + [
    {
        "prompt_ids": [1, 9 + n, 4],
        "chosen_ids": [*range(7, 7 + n), 4, 13, n + 3, 2],
        "rejected_ids": [*range(7, 7 + n), 5, 2],
    }
    for n in range(5)
]


def train(out, student, flags, pairs=DOZEN):
    """dpo.py with small defaults, here; returns the metrics of all steps."""
    paths = f"--model {student} --pairs {write(out.parent, *pairs)} --out {out}"
    defaults = "--device cpu --threads 1 --batch-size 4 --micro-batch-size 2 --lr 2e-3"
    dpo.main(f"{paths} {defaults} {flags}".split())
    return runs.read_jsonl(out / "metrics.jsonl")


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_command(pair_of_models, tokenizer, tmp_path, capsys, which):
    """The loss falls from ln 2, there is one line a step, OUT/student is another, loadable model.

    It says so in one line; again, it changes nothing. The student ties lm_head to its embeddings; the teacher's are two,
    and wider than the vocabulary.
    """
    out, student, flags = tmp_path / "out", pair_of_models[which], "--epochs 6 --beta 0.5"
    steps = train(out, student, flags)
    assert [m["step"] for m in steps] == list(range(1, 19))
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(m["loss"] for m in steps[-3:]) / 3 < 0.5 * math.log(2)
    assert steps[-1]["wins"] == 1 and steps[-1]["margin"] > 0.5
    end = f"(loss {steps[-1]['loss']:.4f}, wins {steps[-1]['wins']:.3f})"
    assert f"12 pairs -> {out / 'student'} {end}" in capsys.readouterr().out

    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (student, out / "student"))
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert {n: p.shape for n, p in old.items()} == {n: p.shape for n, p in new.items()}
    assert [n for n in old if torch.equal(old[n], new[n])] == [], "not trained"
    heads = [lm.get_output_embeddings().weight[VOCAB:] for lm in (before, after)]
    assert len(heads[0]) == (10 if which == "teacher" else 0) and torch.equal(*heads), "padding gets no gradient"
    assert models.load_tokenizer(str(out / "student")).get_vocab() == tokenizer.get_vocab()

    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    train(out, student, flags)
    assert f"training: {out / 'student'} was there already\n" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("reference", ["student", "teacher"])
def test_sharded_models_are_freed(pair_of_models, tmp_path, monkeypatch, reference):
    """The policy after the training, another reference before the first step: FSDP's modules are in cycles."""
    loaded, at_the_optimizer = [], []
    load_policy, make_optimizer = dpo.load_policy, training.make_optimizer

    def load(*arguments):
        policy = load_policy(*arguments)
        loaded.append(weakref.ref(policy))
        return policy

    there = lambda: [model() is not None for model in loaded]
    monkeypatch.setattr(dpo, "load_policy", load)
    monkeypatch.setattr(training, "make_optimizer", lambda *a: at_the_optimizer.extend(there()) or make_optimizer(*a))
    train(tmp_path / "out", pair_of_models["student"], f"--max-steps 1 --reference {pair_of_models[reference]}")
    assert at_the_optimizer == ([True] if reference == "student" else [True, False])
    training.release_memory()
    assert not any(there())


def assert_plain_loop(out, lm, losses_of, batches, max_grad_norm, weight_decay=0.0):
    """A run of four steps with --lr 2e-3 against AdamW on `lm`, without FSDP. losses_of(batch): {metric: its value}.

    Gradient norms are those before clipping, which only some of the steps need, and steps 2 to 4 run on weights that the
    steps before them made. AdamW divides by the gradient's size, so the few weights with hardly any gradient move by
    rounding: the trained weights are compared as a whole.
    """
    start = {key: parameter.detach().clone() for key, parameter in lm.named_parameters()}
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay)
    # One step of warm-up at the peak, then the cosine's beginning, middle and end
    for metrics, batch, factor in zip(logged(out), batches, (1, 1, 0.55, 0.1), strict=True):
        losses = losses_of(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(lm.parameters(), max_grad_norm)
        optimizer.param_groups[0]["lr"] = 2e-3 * factor
        optimizer.step()
        expected = {key: value.item() for key, value in losses.items()} | {"lr": 2e-3 * factor}
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=2e-4)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=2e-3)
    trained = weights(out)
    for key, parameter in lm.named_parameters():
        assert (trained[key] - parameter).norm() < 1e-2 * (parameter - start[key]).norm(), key


def test_train_equals_a_plain_loop(pair_of_models, plain_models, tmp_path):
    """Four steps over 11 pairs (the third batch is short) against two rows a pair. With another model as the reference,
    the first step's loss says all that the flags change; test_distributed.py has each flag alone."""
    student, reference, pairs = pair_of_models["student"], pair_of_models["teacher"], DOZEN[:11]
    options = {"beta": 0.3, "label_smoothing": 0.2, "average": True, "nll_weight": 2.0}
    flags = f"--reference {reference} --beta 0.3 --label-smoothing 0.2 --logprobs mean --nll-weight 2 --seed 9"
    flags += " --max-steps 4 --max-grad-norm 3 --weight-decay 0.1 --activation-checkpointing"
    train(tmp_path / "out", student, flags, pairs)
    lm, frozen = plain_models
    batches = [[pairs[i] for i in training.batch_of_step(step, 11, 4, 9)] for step in range(4)]
    assert [len(batch) for batch in batches] == [4, 4, 3, 4]
    losses = lambda batch: {"loss": two_row_loss(lm, frozen, batch, **options)}
    assert_plain_loop(tmp_path / "out", lm, losses, batches, max_grad_norm=3.0, weight_decay=0.1)


def test_logged_numbers(pair_of_models, plain_models, tmp_path):
    """Rewards, margin, wins and log-probs of a first step over all twelve pairs, from the twin's log-probs.

    With an NLL term the shared tokens are counted, so rewards and log-probs are those of whole responses.
    """
    flags = f"--reference {pair_of_models['teacher']} --max-steps 1 --batch-size 12 --nll-weight 1 --beta 0.2"
    [metrics] = train(tmp_path / "out", pair_of_models["student"], flags)
    with torch.no_grad():
        rows = [[two_row_logps(lm, p, key) for lm in plain_models for key in RESPONSES] for p in DOZEN]
    policy_chosen, policy_rejected, *reference = torch.tensor(rows).T  # (12,) each
    chosen, rejected = 0.2 * (policy_chosen - reference[0]), 0.2 * (policy_rejected - reference[1])
    means = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}
    means |= {"wins": (chosen > rejected).float(), "dpo_loss": F.softplus(rejected - chosen)}
    means |= {"chosen_logp": policy_chosen, "rejected_logp": policy_rejected}
    expected = {name: values.mean().item() for name, values in means.items()}
    expected["nll"] = -policy_chosen.sum().item() / sum(len(p["chosen_ids"]) for p in DOZEN)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_save_dtype(pair_of_models, tmp_path):
    """The files hold this dtype, config.json says so, and a plain from_pretrained loads it as such."""
    train(tmp_path / "out", pair_of_models["student"], "--max-steps 1 --save-dtype bfloat16")
    folder = tmp_path / "out" / "student"
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert runs.read_json(folder / "config.json")["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_dropout_is_off(tokenizer, tmp_path):
    """A model with dropout in its config (GPT-2: 0.1 by default) is its own reference all the same: loss ln 2."""
    for part in (make_model("gpt2", 1), tokenizer):
        part.save_pretrained(tmp_path / "model")
    flags = "--max-steps 1 --beta 1 --batch-size 12 --activation-checkpointing"
    [metrics] = train(tmp_path / "out", tmp_path / "model", flags)
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


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("written", ["", "<s>"])
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


DATE = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
TURNS, BEFORE = [SYSTEM, ASK, GOOD, ASK], "[system]S[user]Q[assistant]good</s>"
CONVERSATIONS = {
    "prompt as messages": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, ""),
    "system turn": ({"prompt": [SYSTEM, ASK], "chosen": [GOOD], "rejected": [BAD]}, "[system]S"),
    "prompt as text": ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, ""),
    "no prompt": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ""),
    "null prompt": ({"prompt": None, "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ""),
    "several turns": ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, BEFORE),
    "text and in both (UltraFeedback)": ({"prompt": "Q", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, ""),
}


@pytest.mark.parametrize("row, before", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversational_format(tmp_path, row, before):
    """The chat template decides where the response begins; bos once; what both conversations begin with is the prompt.

    A date in the template is pinned: a run taken up tomorrow must see today's ids.
    """
    tokenizer = byte_tokenizer(chat_template=DATE + TEMPLATE)
    assert read_one(tmp_path, row, tokenizer) == {
        "prompt_ids": text_ids(tokenizer, f"26 Jul 2024<s>{before}[user]Q[assistant]"),
        "chosen_ids": text_ids(tokenizer, "good</s>"),
        "rejected_ids": text_ids(tokenizer, "bad</s>"),
    }


def test_fingerprint_is_made_once(tmp_path, monkeypatch):
    """It sorts and hashes the vocabulary, 0.2 s for 152k tokens: once a file, not once a line."""
    fingerprint, hashed, tokenizer = models.tokenizer_fingerprint, [], byte_tokenizer()
    monkeypatch.setattr(models, "tokenizer_fingerprint", lambda t: [fingerprint(t), hashed.append(t)][0])
    assert len(read(write(tmp_path, *[{**IDS, "tokenizer": fingerprint(tokenizer)}] * 20), tokenizer)) == 20
    assert len(hashed) == 1


NO_IDS = [*([258], [9, 258], [-1], [1.5], ["9"], "9"), *(None, 9, [[9]], [True], [1 << 70])]
NO_COLUMNS, NOT_TEXT, SAME = "no columns chosen and rejected", "not all text or all messages", "chosen equals rejected"
REFUSED = [
    *[(row, NO_COLUMNS) for row in ([1], "text", None, {}, {"prompt": "a", "chosen": "b"})],
    ({"prompt_ids": [9], "chosen_ids": [10]}, NO_COLUMNS),
    *[({**prompt, "chosen": "b", "rejected": "c"}, NOT_TEXT) for prompt in ({}, {"prompt": 1}, {"prompt": [ASK]})],
    ({"prompt": "a", "chosen": "b", "rejected": None}, NOT_TEXT),
    ({"prompt": "a", "chosen": [GOOD], "rejected": "c"}, NOT_TEXT),
    ({"prompt": [ASK], "chosen": ["b"], "rejected": ["c"]}, NOT_TEXT),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, SAME),
    ({**IDS, "chosen_ids": [11]}, SAME),
    ({"chosen": [GOOD], "rejected": [BAD]}, "there is no prompt, and the conversations share none"),
    ({**IDS, "tokenizer": "0123456789abcdef"}, "the ids were made with another tokenizer"),
    # A response of no token has no mean log-prob; even an empty answer has its eos
    *[({**IDS, key: []}, f"{key} is empty or not a list of ids below 258") for key in IDS],
    *[({**IDS, key: value}, f"{key} is empty or not a list of ids below 258") for key in IDS for value in NO_IDS],
]
# Qwen3 style: the generation prompt opens an empty thought that a finished turn does not have. Where the response begins
# is then unknown, and taking the whole conversation for it would train on the prompt
THINKING = TEMPLATE.replace("[assistant]{% endif %}", "[assistant]<think>{% endif %}")
CONVERSATION = {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}
REFUSED = [(row, expected, TEMPLATE) for row, expected in REFUSED] + [
    (CONVERSATION, "the pair is a conversation, the tokenizer has no chat template", None),
    (CONVERSATION, "chat template changes the prompt in its conversation", THINKING),
]


@pytest.mark.parametrize("row, expected, template", REFUSED, ids=[json.dumps(row) for row, *_ in REFUSED])
def test_rows_that_are_no_pair(tmp_path, row, expected, template):
    """Named by their line. The tokenizer has 258 tokens: 256 bytes and two specials."""
    path = write(tmp_path, IDS, row)
    with pytest.raises(UserError, match=f"{expected}, in {path} line 2, "):
        read(path, byte_tokenizer(chat_template=template))


def test_a_pair_beyond_the_context(tmp_path):
    """Its positions would be none that the model has learned."""
    path, row = write(tmp_path, IDS), {key: len(ids) for key, ids in IDS.items()}
    size = row["prompt_ids"] + max(row["chosen_ids"], row["rejected_ids"])
    assert len(list(dpo.read_pairs(path, byte_tokenizer(), size))) == 1
    with pytest.raises(UserError, match=f"the pair has {size} tokens, the model's context {size - 1}, in .* line 1"):
        list(dpo.read_pairs(path, byte_tokenizer(), size - 1))


def test_files_that_cannot_be_read(tmp_path):
    """What is no JSON is in test_run_folder.py."""
    for missing in (tmp_path / "nope.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"^no pairs file, at {missing}, run warmup_distill.py first or check"):
            read(missing, byte_tokenizer())
