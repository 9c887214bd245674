"""Warmup-Distill, steps 1 to 4: hand-made tables, a slow twin without a cache, recounts of what a run writes, resuming."""

import itertools
import math
import re
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import logged, make_model, weights
from safetensors.torch import load_file
from test_decode import slow_decode, slow_draw, slow_noise, slow_score
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForSequenceClassification

import dpo
import kd
import warmup_distill
from lib import data, decode, measure, models, runs
from toy import make as toy

INF = math.inf
VOCAB, EOS = 22, 2

# ---------------------------------------------------------------------------------------------------------------------
# first_mismatch and splice
# ---------------------------------------------------------------------------------------------------------------------

# name, log q of each token, log p of each token, which are tokens, t* at eta = 4
MISMATCHES = [
    ("none", [-1, -1, -1], [-2, -3, -1], [1, 1, 1], -1),
    ("first token", [-1, -1, -1], [-6, -1, -1], [1, 1, 1], 0),
    ("last token", [-1, -1, -1], [-1, -1, -6], [1, 1, 1], 2),
    ("exactly eta is not above it", [-1, -1, -1], [-5, -5, -5], [1, 1, 1], -1),
    ("just above eta", [-1, -1, -1], [-5, -5.001, -5], [1, 1, 1], 1),
    ("padding is no token", [-1, -1, 0], [-1, -1, -9], [1, 1, 0], -1),
    ("padding after a mismatch", [-1, -1, 0], [-1, -9, -9], [1, 1, 0], 1),
    ("the first of several", [-1, -1, -1], [-1, -6, -20], [1, 1, 1], 1),
    ("teacher gives probability 0", [-1, -1, -1], [-1, -INF, -1], [1, 1, 1], 1),
    ("teacher likes it better", [-9, -9, -9], [-1, -1, -1], [1, 1, 1], -1),
    ("no token at all", [0, 0, 0], [-9, -9, -9], [0, 0, 0], -1),
]


def test_first_mismatch():
    """Each row alone; all in one batch, in which they do not touch each other. `splice` is in test_properties.py."""
    for rows in [*([row] for row in MISMATCHES), MISMATCHES]:
        names, *columns, expected = zip(*rows)
        student, teacher, mask = (torch.tensor(column, dtype=torch.float32) for column in columns)
        found = warmup_distill.first_mismatch(student, teacher, mask.bool(), 4.0)
        assert found.tolist() == list(expected) and found.dtype == torch.int64, names


# ---------------------------------------------------------------------------------------------------------------------
# Steps 1 to 3 as functions of their arguments
# ---------------------------------------------------------------------------------------------------------------------

TOKENS = decode.Tokens(0, [EOS], VOCAB)
IDS, NUMBERS = [[1, 5, 6], [1, 9], [1, 4, 4, 4, 13]], [7, 0, 31]


def model_with_eos_bias(bias):
    """A random model whose logit of EOS is raised by `bias`."""
    lm = make_model("llama", 1)
    lm.lm_head.bias = torch.nn.Parameter(bias * (torch.arange(VOCAB) == EOS))
    return lm


def test_steps_one_by_one_are_build_samples():
    """Models, ids and numbers are all they take; one by one they give what `build_samples` says."""
    student, teacher = make_model("llama", 1), make_model("qwen2", 2, width=24, rows=32)
    sampling = warmup_distill.Sampling(samples=3, max_new_tokens=6, seed=5)
    y, log_q = warmup_distill.sample_responses(student, IDS, NUMBERS, TOKENS, sampling)
    rows, hidden, log_p, mask = warmup_distill.check_responses(teacher, IDS, y, TOKENS)
    lengths = torch.tensor([len(response) for response in y])
    assert log_q.shape == log_p.shape == mask.shape == (9, max(lengths)) and torch.equal(mask.sum(-1), lengths)
    assert not log_q[~mask].any() and not log_p[~mask].any()

    t_star = warmup_distill.first_mismatch(log_q, log_p, mask, 3.0)
    positions = torch.where(t_star >= 0, t_star, lengths)
    settings = (positions, lengths, NUMBERS, TOKENS, sampling)
    rest, rest_log_p = warmup_distill.continue_by_teacher(teacher, rows, hidden, *settings)
    assert [len(values) for values in rest_log_p] == [len(ids) for ids in rest]
    assert [ids == [] for ids in rest] == (t_star < 0).tolist() and 0 < (t_star < 0).sum() < 9

    samples = warmup_distill.build_samples(student, teacher, IDS, NUMBERS, TOKENS, sampling, 3.0)
    assert [(s["prompt_id"], s["sample_id"]) for s in samples] == [(n, i) for n in NUMBERS for i in range(3)]
    chosen = [warmup_distill.splice(*parts) for parts in zip(y, positions.tolist(), rest)]
    expected = {"t_star": t_star.tolist(), "response_ids": y, "chosen_ids": chosen}
    assert {name: [s[name] for s in samples] for name in expected} == expected
    no_pad = decode.Tokens(EOS, [EOS], VOCAB)  # padding is masked: it does not matter which token stands in for it
    assert warmup_distill.build_samples(student, teacher, IDS, NUMBERS, no_pad, sampling, 3.0) == samples


@pytest.mark.parametrize("replace", ["at", "after"])
def test_eos_can_be_the_mismatch(replace):
    """A student that ends where the teacher would not. "at": the teacher goes on. "after": there is nothing to add."""
    student, teacher = model_with_eos_bias(4.0), model_with_eos_bias(-8.0)
    sampling = warmup_distill.Sampling(samples=4, max_new_tokens=8)
    samples = warmup_distill.build_samples(student, teacher, IDS, NUMBERS, TOKENS, sampling, 4.0, replace)
    ended = [s for s in samples if s["ended"] and len(s["response_ids"]) > 1]
    assert len(ended) > 3
    for sample in ended:
        y, end = sample["response_ids"], len(sample["response_ids"]) - 1
        assert y[end] == EOS and sample["t_star"] == end
        status = warmup_distill.pair_status(sample, set(), lambda sample, prompt: True, None)
        if replace == "after":
            assert sample["chosen_ids"] == y and sample["prefix_len"] == len(y) and status == "identical"
        else:
            assert sample["chosen_ids"][:end] == y[:end] and len(sample["chosen_ids"]) > end and status == "kept"
            assert sample["chosen_ids"][end] != EOS


# ---------------------------------------------------------------------------------------------------------------------
# A run of steps 1 to 3, and the slow twin
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = ["1+2:", "199+877:", "12+3:", "9*9=81;7:", "5:"]  # of different lengths: the batch is padded


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    """A few prompts of different lengths as JSONL."""
    return write_prompts(tmp_path_factory.mktemp("mixed") / "mixed.jsonl", PROMPTS)


def write_prompts(path, prompts, golds=None):
    golds = ["1"] * len(prompts) if golds is None else golds
    runs.write_jsonl(path, [{"prompt": p, "response": g} for p, g in zip(prompts, golds)])
    return str(path)


class Run:
    """Steps 1 to 3 by the command, in process; `records` is what it wrote."""

    def __init__(self, out, teacher, student, data_file, *flags):
        self.argv = ["--teacher", teacher, "--student", student, "--data", data_file, "--out", str(out), "--pairs-only"]
        self.argv += ["--samples", "3", "--max-new-tokens", "8", "--eta", "1", "--prompts-per-batch", "2"]
        self.argv += ["--device", "cpu", "--threads", "1", *map(str, flags)]
        self.out, self.args = out, warmup_distill.parse_args(self.argv)
        self.tokenizer, self.tokens = models.shared_tokenizer(student, teacher)
        self.start()

    def start(self):
        warmup_distill.main(self.argv)
        self.prompts = list(data.open_arrow(self.out / "prompts.arrow"))
        self.records = [record for file in sorted(self.out.glob("pairs/*")) for record in runs.read_jsonl(file)]
        self.pairs = runs.read_jsonl(self.out / "pairs.jsonl")
        self.mismatch = runs.read_json(self.out / "mismatch.json")

    def models(self):
        """Student and teacher, loaded by transformers alone."""
        return [AutoModelForCausalLM.from_pretrained(path).eval() for path in (self.args.student, self.args.teacher)]


@pytest.fixture
def build(tmp_path, pair_of_models, mixed_file):
    """build("--flag", value, ..., teacher=..., student=..., data_file=...) -> Run; each call in a folder of its own."""
    numbers = itertools.count(1)

    def start(*flags, teacher=pair_of_models["teacher"], student=pair_of_models["student"], data_file=mixed_file):
        return Run(tmp_path / f"run{next(numbers)}", str(teacher), str(student), data_file, *flags)

    return start


def tokens_of(records):
    """What must be the same in another batch; log-probs are rounded otherwise there."""
    names = ("prompt_id", "sample_id", "t_star", "response_ids", "chosen_ids", "status")
    return [[record[name] for name in names] for record in records]


def slow_write(run, model, prompt, before, sample_id, stage, greedy=False):
    """Writes on from prompt + `before`, each token from a full forward over everything so far. Returns ids, log-probs."""
    args, place = run.args, (stage, prompt["prompt_id"], sample_id)

    def pick(logits, step):
        noise = slow_noise(args.seed, *place, len(before) + step)
        return logits.argmax().item() if greedy else slow_draw(logits.tolist(), noise, args.temperature, args.top_p)

    return slow_decode(model, prompt["ids"] + before, pick, args.max_new_tokens - len(before), run.tokens.eos_ids)


def assert_equals_twin(run):
    student, teacher = run.models()
    args = run.args
    places = [(prompt, sample_id) for prompt in run.prompts for sample_id in range(args.samples)]
    assert len(run.records) == len(places)
    for record, (prompt, sample_id) in zip(run.records, places):
        response, q = slow_write(run, student, prompt, [], sample_id, decode.STUDENT_STAGE)
        p = slow_score(teacher, prompt["ids"], response).tolist()
        t_star = next((t for t in range(len(response)) if q[t] - p[t] > args.eta), -1)
        position, written, values = len(response), [], []
        if t_star >= 0:
            position, greedy = t_star + (args.replace == "after"), args.teacher_decoding == "greedy"
        if position < len(response):  # else there is nothing to write
            written, values = slow_write(
                run, teacher, prompt, response[:position], sample_id, decode.TEACHER_STAGE, greedy
            )
        expected = {"prompt_id": prompt["prompt_id"], "sample_id": sample_id, "t_star": t_star, "prefix_len": position}
        expected |= {"response_ids": response, "ended": response[-1] in run.tokens.eos_ids}
        expected |= {"chosen_ids": response[:position] + written}
        assert {name: record[name] for name in expected} == expected
        assert (record["status"] == "untouched") == (t_star < 0)
        assert record["student_logprobs"] == pytest.approx(q, abs=1e-4)
        assert record["teacher_logprobs"] == pytest.approx(p, abs=1e-4)
        assert record["chosen_teacher_logprobs"] == pytest.approx(p[:position] + values, abs=1e-4)


TWIN_FLAGS = [
    *("", "--eta 4", "--temperature 0.7 --top-p 0.9", "--max-new-tokens 1", "--max-new-tokens 3 --eta -100"),
    *("--teacher-decoding greedy", "--replace after", "--replace after --teacher-decoding greedy --seed 3"),
    "--max-new-tokens 2 --replace after --eta -100",
]


@pytest.mark.parametrize("flags", TWIN_FLAGS)
def test_samples_equal_slow_twin(build, flags):
    """Cached, batched, padded, rewound and spliced = token by token with full forwards over prompt + response."""
    run = build(*flags.split())
    assert_equals_twin(run)
    limit = run.args.max_new_tokens
    assert all(len(r["response_ids"]) <= limit and len(r["chosen_ids"]) <= limit for r in run.records)
    stopped = [r for r in run.records if r["response_ids"][-1] != EOS]
    assert all(len(r["response_ids"]) == limit for r in stopped), "no eos is appended at the length limit"
    assert run.mismatch["at_length_limit"] == len(stopped) and 0 < len(stopped) < len(run.records)
    if run.args.eta == -100:
        assert all(r["t_star"] == 0 for r in run.records) and run.mismatch["untouched"] == 0


@pytest.mark.parametrize("flags", [["--prompts-per-batch", 1], ["--prompts-per-batch", 64], ["--shard-teacher"]])
def test_flags_that_change_no_token(build, flags):
    run = build(*flags)
    assert tokens_of(run.records) == tokens_of(build().records)
    assert len(list(run.out.glob("pairs/*"))) == math.ceil(len(PROMPTS) / run.args.prompts_per_batch)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_log_probs_that_are_no_numbers(build, tmp_path, pair_of_models, tokenizer, which, monkeypatch):
    """They stop the run, which names the prompt; NaN > eta is false, and would count as no mismatch."""
    monkeypatch.setattr(models, "check_model", lambda *model: None)  # which refuses a model that has nothing else
    model = AutoModelForCausalLM.from_pretrained(pair_of_models[which])
    torch.nn.init.constant_(model.get_decoder().norm.weight, math.nan)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / which)
    with pytest.raises(runs.UserError, match="NaN or infinite.* prompt 0"):
        build(**{which: tmp_path / which})
    assert not list(tmp_path.glob("run1/pairs/*"))


# A rule of the teacher alone, and one of the prefix's sum: what of each token is compared with eta, and how a reader
# who knows no torch would say it


def test_rule_is_changed_in_one_function(build, monkeypatch):
    """Another `first_mismatch`, here one of the prefix's sum, decides t*. That of the closing table is tested below."""

    def rule(student_logprobs, teacher_logprobs, mask, eta):
        above = ((student_logprobs - teacher_logprobs).cumsum(-1) > eta) & mask
        return torch.where(above.any(-1), above.int().argmax(-1), -1)

    monkeypatch.setattr(warmup_distill, "first_mismatch", rule)
    run = build("--eta", 3)
    first = lambda values: next((t for t, value in enumerate(values) if value > 3), -1)
    margins = [[q - p for q, p in zip(r["student_logprobs"], r["teacher_logprobs"])] for r in run.records]
    found = [record["t_star"] for record in run.records]
    assert found == [first(itertools.accumulate(values)) for values in margins]
    assert found != [first(values) for values in margins] and len(set(found)) > 2


# ---------------------------------------------------------------------------------------------------------------------
# Models and tokenizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_several_eos_ids_end_a_response(build, tmp_path, pair_of_models, which):
    """Llama-3 style: generation_config.json of one of the two names a second end, the token with id 9."""
    folder = shutil.copytree(pair_of_models[which], tmp_path / which)
    GenerationConfig(eos_token_id=[2, 9]).save_pretrained(folder)
    run = build("--samples", 6, **{which: folder})
    assert run.tokens.eos_ids == [2, 9]
    responses = [r[key] for r in run.records for key in ("response_ids", "chosen_ids")]
    assert all(token not in (2, 9) for response in responses for token in response[:-1])
    assert {2, 9} <= {response[-1] for response in responses}
    assert run.mismatch["at_length_limit"] == sum(r["response_ids"][-1] not in (2, 9) for r in run.records)
    assert_equals_twin(run)


def test_student_rows_beyond_the_tokenizer(build, pair_of_models):
    """Qwen2.5: a model has more rows than there are tokens (here 32 for 22; elsewhere the teacher has). They are cut off
    and the rest renormalised: log p' = log p - log(mass of the 22). The last assertion: the cut is not without effect."""
    run = build(student=pair_of_models["teacher"], teacher=pair_of_models["student"])
    assert_equals_twin(run)
    with torch.no_grad():
        logits = run.models()[0](input_ids=torch.tensor([run.prompts[0]["ids"]])).logits[0, -1]
    assert len(logits) == 32 and logits.log_softmax(-1)[:VOCAB].logsumexp(-1) < -0.05


def test_overlong_prompts_are_skipped_and_others_unchanged(build, capsys):
    """prompt_id is the row's number, so the other prompts' noise is as if the long ones were there."""
    everything, short = build(), build("--max-prompt-tokens", 7)  # <bos> and up to 6 characters
    left = [i for i, prompt in enumerate(PROMPTS) if len(prompt) <= 6]
    assert [p["prompt_id"] for p in short.prompts] == left == [0, 2, 4] and short.mismatch["prompts"] == 3
    assert "skipped: 2 prompts over --max-prompt-tokens 7\n" in capsys.readouterr().out
    assert tokens_of(short.records) == tokens_of(r for r in everything.records if r["prompt_id"] in left)


# ---------------------------------------------------------------------------------------------------------------------
# Which samples become pairs
# ---------------------------------------------------------------------------------------------------------------------


# Log-probs of y+ and y-. Means, -1 and -3; the sum would say otherwise; equal is not above
MEANS = [([-1, -1], [-3], True), ([-1, -1], [-1.5], True), ([-1], [-1], False), ([-2, -4], [-2, -2], False)]
ANSWERS = {("=1076", "=1075"): True} | dict.fromkeys(
    [("=1076", "=1076"), ("=1", "=2"), ("=1", "=1076"), ("", "")], False
)


def test_keep_by_hand(tokenizer):
    """correct: y+ is right and y- is wrong, given the gold response "9+7+0=16;9+7+1=17;1+8+1=10=1076"."""
    every, teacher, correct = (
        warmup_distill.pair_filter(SimpleNamespace(keep=keep), None, tokenizer)
        for keep in ("all", "teacher", "correct")
    )
    for chosen, rejected, kept in MEANS:
        sample = {"chosen_teacher_logprobs": chosen, "teacher_logprobs": rejected}
        assert teacher(sample, None) is kept and every(sample, None) is True
    gold = {"gold": toy.solve(199, 877, toy.correct_facts())}
    for texts, kept in ANSWERS.items():
        ids = [[*tokenizer(text, add_special_tokens=False).input_ids, EOS] for text in texts]
        assert bool(correct({"chosen_ids": ids[0], "response_ids": ids[1]}, gold)) is kept


def assert_statuses(run, keep):
    """Statuses, recounted: untouched; y+ = y-; a pair that this prompt has had already; then `keep` decides."""
    counts = dict.fromkeys(("untouched", "identical", "duplicate", "filtered", "kept"), 0)
    for prompt in run.prompts:
        had = []
        for record in run.records:
            if record["prompt_id"] != prompt["prompt_id"]:
                continue
            pair, expected = (record["response_ids"], record["chosen_ids"]), "kept"
            if record["t_star"] < 0:
                expected = "untouched"
            elif pair[0] == pair[1]:
                expected = "identical"
            elif pair in had:
                expected = "duplicate"
            elif not keep(prompt, *pair):
                expected = "filtered"
            had.append(pair)
            assert record["status"] == expected, record
            counts[expected] += 1
    found = {**run.mismatch["dropped"], "untouched": run.mismatch["untouched"], "kept": run.mismatch["pairs"]}
    assert found == counts
    assert run.mismatch["replaced"] == run.mismatch["samples"] - counts["untouched"]
    return counts


def test_identical_and_duplicate_pairs(build, tmp_path, capsys):
    """Responses of one token, all replaced by the teacher's greedy one: many coincide. So do those of two prompts with
    the same text, in one micro-batch; they are different prompts all the same."""
    flags = ("--max-new-tokens", 1, "--teacher-decoding", "greedy", "--eta", -100, "--samples", 32)
    run = build(*flags, data_file=write_prompts(tmp_path / "p.jsonl", ["1+2:"] * 2))
    counts = assert_statuses(run, lambda *pair: True)
    assert counts["identical"] > 0 and counts["duplicate"] > 0 and counts["kept"] > 0
    line = f"{counts['kept']} pairs of 64 samples: {counts['identical']} identical, {counts['duplicate']} duplicate\n"
    assert line in capsys.readouterr().out, "what there is none of is not named"


@pytest.mark.parametrize("kind", ["on text", "on text, adds bos", "with chat template"])
def test_keep_reward(build, tmp_path, tokenizer, kind):
    """--keep reward:MODEL: a random scorer with one label, asked here for one text at a time.

    The toy's chat template is <bos> + the contents, so all kinds of reward tokenizer see the same text, one bos in it.
    """
    torch.manual_seed(5)
    config = make_model("llama", 5).config
    config.num_labels = 1
    scorer, own = LlamaForSequenceClassification(config).eval(), toy.make_tokenizer()
    if kind != "with chat template":
        own.chat_template = None
    if kind == "on text, adds bos":
        bos = [("<bos>", own.bos_token_id)]
        own.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    for part in (scorer, own):
        part.save_pretrained(tmp_path / "reward")

    @torch.no_grad()
    def reward(prompt, ids):
        text = "<bos>" + PROMPTS[prompt["prompt_id"]] + tokenizer.decode(ids, skip_special_tokens=True)
        return scorer(torch.tensor([tokenizer.encode(text, add_special_tokens=False)])).logits.item()

    run = build("--keep", f"reward:{tmp_path / 'reward'}", "--samples", 6)
    counts = assert_statuses(run, lambda prompt, y, y_plus: reward(prompt, y_plus) > reward(prompt, y))
    assert counts["kept"] > 0 and counts["filtered"] > 0


# ---------------------------------------------------------------------------------------------------------------------
# The files of steps 1 to 3
# ---------------------------------------------------------------------------------------------------------------------


def record(prompt_id, sample_id, status, t_star, margins, ended=True, chosen_ended=True):
    """A sample whose tokens have these margins; the ids do not matter."""
    place = {"prompt_id": prompt_id, "sample_id": sample_id, "t_star": t_star, "prefix_len": max(t_star, 0)}
    place |= {"status": status, "prompt": f"{prompt_id}:", "prompt_ids": [5, prompt_id]}
    ids = {"response_ids": [5] * len(margins), "chosen_ids": [9, 9, 2], "ended": ended, "chosen_ended": chosen_ended}
    return place | ids | {"student_logprobs": [-1.0] * len(margins), "teacher_logprobs": [-1.0 - m for m in margins]}


WARNINGS = [  # what differs from a summary without warnings; the warning
    ({}, ""),
    ({"replaced": 9, "samples": 1000}, "corrects 0.9% of the samples at eta 4.0: eta is too high"),
    ({"replaced": 10, "samples": 1000}, ""),
    ({"replaced": 100}, "corrects 100.0% of the samples at eta 4.0: eta may be too low"),
    ({"replaced": 99}, ""),
    ({"prompts_with_pairs": 1, "prompts": 20}, "all 40 pairs come from 1 of 20 prompts"),
    ({"prompts_with_pairs": 2, "prompts": 20}, ""),
    ({"at_length_limit": 51}, "51 of 100 samples have no end"),
    ({"chosen_at_length_limit": 21}, "21 of 40 chosen responses have no end"),
    ({"chosen_at_length_limit": 20, "at_length_limit": 50}, ""),
]


@pytest.mark.parametrize("changes, words", WARNINGS)
def test_warnings(changes, words):
    summary = {"eta": 4.0, "samples": 100, "replaced": 50, "pairs": 40, "prompts": 20, "prompts_with_pairs": 10}
    lines = warmup_distill.warnings_of(summary | {"at_length_limit": 0, "chosen_at_length_limit": 0} | changes)
    assert len(lines) == (words != "") and all(words in line for line in lines)


def test_merge_pairs_by_hand(tmp_path, tokenizer):
    """Two shards, six samples, eta 4. A margin of exactly 4 is no mismatch, one of exactly 0.5 is in the bin (0, 0.5]."""
    records = [
        record(1, 0, "untouched", -1, [0.0, 0.5, 4.0]),
        record(1, 1, "kept", 1, [0.0, 5.0, 6.0], ended=False, chosen_ended=False),
        record(1, 2, "duplicate", 1, [0.0, 5.0, 6.0], ended=False),
        record(2, 0, "kept", 0, [4.5]),
        record(2, 1, "identical", 0, [25.0]),
        record(2, 2, "filtered", 2, [-30.0, -9.75, 9.0]),
    ]
    prompts = datasets.Dataset.from_dict({"prompt_id": [1, 2], "ids": [[5, 1], [5, 2]]})
    args = SimpleNamespace(eta=4.0, samples=3, prompts_per_batch=1)
    (tmp_path / "pairs").mkdir()
    for name, rows in (("00000", records[:3]), ("00001", records[3:])):
        runs.write_jsonl(tmp_path / "pairs" / f"{name}.jsonl", rows, runs.run_key(tmp_path))
    summary = warmup_distill.merge_pairs(args, tokenizer, prompts, tmp_path)

    found = runs.read_json(tmp_path / "mismatch.json")
    assert found == summary
    rates, histogram = found.pop("replacement_rate"), found.pop("margin_histogram")
    counts = {"prompts": 2, "prompts_with_pairs": 2, "tokens": 14, "samples": 6}
    counts |= {"untouched": 1, "replaced": 5, "pairs": 2, "at_length_limit": 2, "chosen_at_length_limit": 1}
    dropped = {"identical": 1, "duplicate": 1, "filtered": 1}
    rest = {"eta": 4.0, "dropped": dropped, "t_star_histogram": {"0": 2, "1": 2, "2": 1}, "warnings": []}
    assert found == counts | rest
    assert list(rates) == [str(k / 2) for k in range(1, 21)]
    # All margins: 0 0.5 4 | 0 5 6 | 0 5 6 | 4.5 | 25 | -30 -9.75 9
    expected = {"0.5": (8, 6), "3.5": (8, 6), "4.0": (7, 5), "4.5": (6, 4), "5.0": (4, 4), "6.0": (2, 2), "9.0": (1, 1)}
    for eta, (tokens, samples) in expected.items():
        assert rates[eta] == {"samples": pytest.approx(samples / 6), "tokens": pytest.approx(tokens / 14)}, eta
    edges, counts = histogram["edges"], histogram["counts"]
    assert len(counts) == len(edges) + 1 and (edges[0], edges[-1]) == (-10, 20)
    tokens_up_to = {edge: count for edge, count in zip([*edges, "above"], counts) if count}
    assert tokens_up_to == {-10: 1, -9.5: 1, 0: 3, 0.5: 1, 4: 1, 4.5: 1, 5: 2, 6: 2, 9: 1, "above": 1}

    merged = runs.read_jsonl(tmp_path / "pairs.jsonl")
    places = [(p["prompt_id"], p["sample_id"], p["prefix_len"], p["margin"]) for p in merged]
    assert places == [(1, 1, 1, 5.0), (2, 0, 0, 4.5)]


def test_pairs_jsonl_fields(build, tokenizer):
    run = build("--samples", 5)
    kept = [r for r in run.records if r["status"] == "kept"]
    assert len(kept) == len(run.pairs) == run.mismatch["pairs"] > 5
    for pair, record in zip(run.pairs, kept):
        margins = [q - p for q, p in zip(record["student_logprobs"], record["teacher_logprobs"])]
        prompt = "<bos>" + PROMPTS[record["prompt_id"]]
        expected = {name: record[name] for name in ("prompt_id", "sample_id", "chosen_ids")}
        expected |= {"prompt": prompt, "prompt_ids": tokenizer.encode(prompt, add_special_tokens=False)}
        expected |= {"rejected_ids": record["response_ids"], "prefix_len": record["t_star"]}
        expected |= {"margin": pytest.approx(margins[record["t_star"]], abs=1e-6)}
        expected |= {"chosen": tokenizer.decode(record["chosen_ids"], skip_special_tokens=True)}
        expected |= {"rejected": tokenizer.decode(record["response_ids"], skip_special_tokens=True)}
        assert pair == expected | {"tokenizer": models.tokenizer_fingerprint(tokenizer)}
        assert pair["chosen_ids"][: pair["prefix_len"]] == pair["rejected_ids"][: pair["prefix_len"]]
        assert pair["margin"] > run.args.eta and "<eos>" not in pair["chosen"] + pair["rejected"]


def test_damaged_shard_is_named_and_a_missing_one_is_made_again(build, capsys, monkeypatch):
    """And no other. When all are there, no model is loaded."""
    run = build()
    files = sorted(run.out.glob("pairs/*"))
    assert [file.name for file in files] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    results = [*files, run.out / "pairs.jsonl", run.out / "mismatch.json"]
    before, times = [file.read_bytes() for file in results], [file.stat().st_mtime_ns for file in files]
    whole = files[1].read_text()
    other_prompt = whole.replace('"prompt_id": 2', '"prompt_id": 9')
    for damaged in ("".join(whole.splitlines(keepends=True)[:2]), whole[:-20], other_prompt, ""):
        files[1].write_text(damaged)
        with pytest.raises(runs.UserError, match=f"in {files[1]}"):
            run.start()
        assert not list(run.out.glob(".*partial"))
    files[1].unlink()
    capsys.readouterr()
    run.start()
    assert "pairs: 2 of 3 batches were there already\n" in capsys.readouterr().out
    assert [file.read_bytes() for file in results] == before and sorted(run.out.glob("pairs/*")) == files
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times)] == [True, False, True]
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("a model was loaded for nothing"))
    run.start()


# ---------------------------------------------------------------------------------------------------------------------
# The command, all steps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def argv(tmp_path, pair_of_models, prompts_file):
    """A small complete run: 4 prompts, 3 samples, a few DPO steps."""
    flags = {"teacher": pair_of_models["teacher"], "student": pair_of_models["student"], "data": prompts_file,
             "out": tmp_path / "out", "limit": 4, "samples": 3, "max-new-tokens": 8, "eta": 1, "device": "cpu",
             "threads": 1, "batch-size": 4, "micro-batch-size": 2, "lr": 0.01, "save-every": 1, "eval-limit": 3}  # fmt: skip
    return [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]


def test_eval_data_has_a_split_of_its_own(tmp_path, tokenizer, monkeypatch, prompts_file):
    """--eval-data HUB_ID is read from its test split and, where it is another id, its own configuration."""
    asked, open_rows, other = [], data.open_rows, str(shutil.copy(prompts_file, tmp_path / "other.jsonl"))
    monkeypatch.setattr(data, "open_rows", lambda *source: asked.append(source) or open_rows(*source))
    cases = [((prompts_file,), "main"), ((other,), None), ((other, "--eval-config", "other"), "other")]
    for flags, config in cases:
        models_and_data = ["--teacher", "T", "--student", "S", "--data", prompts_file, "--data-config", "main"]
        data.load_eval_prompts(warmup_distill.parse_args([*models_and_data, "--eval-data", *flags]), tokenizer)
        assert asked.pop() == (flags[0], config, "test") and asked == []


@pytest.mark.parametrize("limit, size", [(3, 1), (17, 3), (40, 5)])
def test_closing_table_has_work_for_eight_ranks(argv, prompts_file, monkeypatch, limit, size):
    """8 batches or more where there are prompts for them, but no more rows than in sampling; ranks do not count.

    Its rule of a mismatch is that of step 2.
    """
    tables = []
    monkeypatch.setattr(dpo, "train", lambda *arguments: None)
    monkeypatch.setattr(measure, "closing_table", lambda *arguments: tables.append(arguments[7:]))
    flags = ["--eval-data", prompts_file, "--eval-split", "train", "--eval-limit", str(limit)]
    warmup_distill.main([*argv, *flags, "--samples", "1", "--prompts-per-batch", "5"])
    assert tables == [(size, 1.0, warmup_distill.first_mismatch)]


def test_eval_limit_counts_prompts_that_fit(tmp_path, tokenizer):
    """The first two that fit, though a prompt over the limit is among the first two rows."""
    file = write_prompts(tmp_path / "eval.jsonl", ["1+2:", "123456789+123456789:", "3+4:", "5+6:"])
    flags = ["--eval-data", file, "--eval-limit", "2", "--max-prompt-tokens", "12", "--template", "none"]
    args = warmup_distill.parse_args(["--teacher", "T", "--student", "S", "--data", file, *flags])
    assert [p["prompt_id"] for p in data.load_eval_prompts(args, tokenizer)] == [0, 2]


def test_prompts_leave_room_in_the_context(argv, tmp_path):
    """Models with 256 positions: 250 new tokens leave 6 for the prompt, of 8 tokens; 260 leave none."""
    kd_argv = [*argv[: argv.index("--samples")], "--device", "cpu", "--threads", "1"]  # models and data are the same
    for main, flags, new_tokens, message in (
        (warmup_distill.main, argv, "250", "all prompts are over --max-prompt-tokens 6"),
        (warmup_distill.main, argv, "260", "260 new tokens leave no room for a prompt in a context of 256"),
        (kd.main, kd_argv, "260", "260 new tokens leave no room for a prompt in a context of 256"),
    ):
        with pytest.raises(runs.UserError, match=message):
            main([*flags, "--max-new-tokens", new_tokens])


def test_main_writes_what_it_promises(argv, tmp_path, pair_of_models, tokenizer, capsys):
    """With --pairs-only it ends after OUT/pairs.jsonl; without the flag the run goes on from there.

    Finished, it is left alone. One that has lost some of it: here for shards, in test_distributed.py for the rest.
    """
    out, names = tmp_path / "out", {"args.json", "prompts.arrow", "pairs", "pairs.jsonl", "mismatch.json", ".lock"}
    warmup_distill.main([*argv, "--pairs-only"])
    assert {path.name for path in out.iterdir()} == names
    mismatch = runs.read_json(out / "mismatch.json")
    assert f"{mismatch['pairs']} pairs of 12 samples: " in capsys.readouterr().out

    warmup_distill.main(argv)
    printed = capsys.readouterr().out
    assert "pairs: 1 of 1 batches were there already\n" in printed
    names |= {"pairs.arrow", "metrics.jsonl", "checkpoint", "student", "summary.json"}
    assert {path.name for path in out.iterdir()} == names
    run, asked = runs.read_json(out / "args.json"), vars(warmup_distill.parse_args([*argv, "--pairs-only"]))
    assert run["args"] == asked | {"max_prompt_tokens": 256 - asked["max_new_tokens"]}  # the models' context is 256

    # The closing table says what summary.json says
    summary, columns = runs.read_json(out / "summary.json"), measure.COLUMNS
    assert "3 training prompts, eta 1.0" in printed
    assert summary["teacher"].keys() == {"accuracy"} and summary["student after"].keys() == columns.keys()
    for name, row in summary.items():
        cells = [f"{row[c]:.4f}" if c in row else "-" for c in columns]
        assert re.search(rf"^{name}\s+" + r"\s+".join(map(re.escape, cells)) + "$", printed, re.MULTILINE), name
    assert f"the warmed-up student is {out / 'student'}\n" in printed

    # OUT/student loads as it is, has moved, and brings the tokenizer; every step is logged
    AutoModelForCausalLM.from_pretrained(out / "student")
    before, after = load_file(f"{pair_of_models['student']}/model.safetensors"), weights(out)
    assert before.keys() == after.keys() and not any(torch.equal(before[key], after[key]) for key in before)
    assert AutoTokenizer.from_pretrained(out / "student").get_vocab() == tokenizer.get_vocab()
    steps = [row["step"] for row in logged(out)]
    assert steps == list(range(1, math.ceil(mismatch["pairs"] / 4) + 1)) and len(steps) >= 2

    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    warmup_distill.main(argv)
    assert f"training: {out / 'student'} was there already\n" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_held_out_prompts_sharded_teacher_and_teacher_as_reference(argv, tmp_path, mixed_file, monkeypatch, capsys):
    """Each pair's reference log-probs are the teacher's: row 0 against full forwards of the chosen suffix.

    A sharded teacher fits on no single device, so the table has neither its row nor distances; accuracies are there.
    """
    found, reference_logprobs = [], dpo.reference_logprobs
    monkeypatch.setattr(dpo, "reference_logprobs", lambda *a: found.append(reference_logprobs(*a)) or found[0])
    warmup_distill.main([*argv, "--eval-data", mixed_file, "--reference", "teacher", "--shard-teacher"])
    assert "3 held-out prompts, eta 1.0" in capsys.readouterr().out
    summary = runs.read_json(tmp_path / "out" / "summary.json")
    assert "teacher" not in summary and summary["student after"].keys() == {"accuracy"}
    pair = runs.read_jsonl(tmp_path / "out" / "pairs.jsonl")[0]
    start = dpo.shared_length(pair["chosen_ids"], pair["rejected_ids"])
    teacher = AutoModelForCausalLM.from_pretrained(argv[1]).eval()
    expected = slow_score(teacher, pair["prompt_ids"], pair["chosen_ids"])[start:].sum().item()
    assert found[0][0, 1].item() == pytest.approx(expected, abs=1e-3)


def test_no_pair_leaves_the_student_as_it_was(argv, tmp_path, pair_of_models, capsys):
    """A huge eta: nothing is replaced, a warning says so, and the run still ends well. No table."""
    out, before = tmp_path / "out", load_file(f"{pair_of_models['student']}/model.safetensors")
    warmup_distill.main([*argv, "--eta", "1e6", "--eval-limit", "0"])
    printed, after = capsys.readouterr().out, weights(out)
    assert "warning: no pair came out, so there is nothing to learn" in printed
    assert "0 pairs of 12 samples: 12 untouched\n" in printed and not (out / "summary.json").exists()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    mismatch = runs.read_json(out / "mismatch.json")
    assert (mismatch["pairs"], mismatch["untouched"]) == (0, 12) and mismatch["t_star_histogram"] == {}
