"""Warmup-Distill, steps 1 to 4: hand-made tables, a slow twin without a cache, recounts of what a run writes, resuming."""

import inspect
import itertools
import json
import math
import re
import shutil

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import common
import data
import decode
import kd
import models
import pairs
import run_folder
import scores
import warmup_distill

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no network: it counts each load, of a local file too
INF = math.inf
STUDENT_STAGE, TEACHER_STAGE = decode.STUDENT_STAGE, decode.TEACHER_STAGE
examples = settings(derandomize=True, database=None, deadline=None, max_examples=100)

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
    ("padding behind a mismatch", [-1, -1, 0], [-1, -9, -9], [1, 1, 0], 1),
    ("the first of several", [-1, -1, -1], [-1, -6, -20], [1, 1, 1], 1),
    ("teacher gives probability 0", [-1, -1, -1], [-1, -INF, -1], [1, 1, 1], 1),
    ("teacher likes it better", [-9, -9, -9], [-1, -1, -1], [1, 1, 1], -1),
    ("no token at all", [0, 0, 0], [-9, -9, -9], [0, 0, 0], -1),
]


def mismatches(rows, eta=4.0):
    student, teacher, mask = zip(*rows)
    mask = torch.tensor(mask, dtype=torch.bool)
    return warmup_distill.first_mismatch(torch.tensor(student), torch.tensor(teacher), mask, eta)


@pytest.mark.parametrize("name, student, teacher, mask, expected", MISMATCHES, ids=[row[0] for row in MISMATCHES])
def test_first_mismatch_of_one_row(name, student, teacher, mask, expected):
    found = mismatches([([float(v) for v in student], [float(v) for v in teacher], mask)])
    assert found.tolist() == [expected] and found.dtype == torch.int64


def test_first_mismatch_rows_do_not_touch_each_other():
    rows = [([float(v) for v in q], [float(v) for v in p], mask) for _, q, p, mask, _ in MISMATCHES]
    assert mismatches(rows).tolist() == [row[-1] for row in MISMATCHES]


@st.composite
def scored_batch(draw):
    """Log-probs in quarters of a nat, so that margins of exactly eta occur and float32 subtracts them exactly."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    quarters = st.integers(-40, 0).map(lambda k: k / 4)
    grid = lambda values: st.lists(st.lists(values, min_size=width, max_size=width), min_size=rows, max_size=rows)
    lengths = draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    return draw(grid(quarters)), draw(grid(quarters | st.just(-INF))), lengths, draw(st.integers(-8, 8)) / 4


@examples
@given(scored_batch())
def test_first_mismatch_against_a_loop(batch):
    student, teacher, lengths, eta = batch
    expected = []
    for q, p, length in zip(student, teacher, lengths):
        above = [t for t in range(length) if q[t] - p[t] > eta]
        expected.append(above[0] if above else -1)
    width = len(student[0])
    mask = [[t < length for t in range(width)] for length in lengths]
    assert mismatches(list(zip(student, teacher, mask)), eta).tolist() == expected


@pytest.mark.parametrize(
    "response, position, continuation, expected",
    [
        ([5, 6, 7], 0, [8, 9], [8, 9]),
        ([5, 6, 7], 1, [8], [5, 8]),
        ([5, 6, 7], 2, [7], [5, 6, 7]),
        ([5, 6, 7], 3, [8], [5, 6, 7, 8]),
        ([5, 6, 7], 1, [], [5]),
        ([5], 0, [2], [2]),
    ],
)
def test_splice(response, position, continuation, expected):
    before = list(response), list(continuation)
    assert warmup_distill.splice(response, position, continuation) == expected
    assert (response, continuation) == before, "the arguments are left alone"


@examples
@given(st.lists(st.integers(0, 21), min_size=1), st.data())
def test_splice_token_by_token(response, data):
    position = data.draw(st.integers(0, len(response)))
    continuation = data.draw(st.lists(st.integers(0, 21)))
    spliced = warmup_distill.splice(response, position, continuation)
    assert len(spliced) == position + len(continuation)
    for t, token in enumerate(spliced):
        assert token == (response[t] if t < position else continuation[t - position])


def test_functions_can_be_copied():
    """The source of each, alone with torch, F and math, does what the import does."""
    for function in (warmup_distill.first_mismatch, warmup_distill.splice):
        exec(inspect.getsource(function), namespace := {"torch": torch, "F": F, "math": math})  # noqa: S102
        copied = namespace[function.__name__]
        if function is warmup_distill.splice:
            assert copied([1, 2, 3], 1, [4]) == [1, 4]
        else:
            q, p = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[-1.0, -9.0], [-1.0, -2.0]])
            assert copied(q, p, torch.ones(2, 2, dtype=torch.bool), 4.0).tolist() == [1, -1]


# ---------------------------------------------------------------------------------------------------------------------
# A run of steps 1 to 3, and the slow twin
# ---------------------------------------------------------------------------------------------------------------------

PROMPTS = ["1+2:", "199+877:", "12+3:", "9*9=81;7:", "5:"]  # of different lengths: the batch is padded


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    """A few prompts of different lengths as JSONL."""
    return write_prompts(tmp_path_factory.mktemp("mixed") / "mixed.jsonl", PROMPTS)


def write_prompts(path, prompts, golds=None):
    rows = [{"prompt": p, "response": g} for p, g in zip(prompts, golds or ["1"] * len(prompts))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Run:
    """Steps 1 to 3 by the production code, in process, from command-line flags; `records` is what it wrote."""

    def __init__(self, out, teacher, student, data, *flags):
        argv = ["--teacher", teacher, "--student", student, "--data", data, "--device", "cpu", "--threads", "1"]
        argv += ["--samples", "3", "--max-new-tokens", "8", "--eta", "1", "--prompts-per-batch", "2", *map(str, flags)]
        self.out, self.args = out, warmup_distill.parse_args(argv)
        self.world = common.start_processes("cpu", 1)
        self.tokenizer = models.load_tokenizer(student)
        self.batches, _ = warmup_distill.load_prompts(self.args, self.tokenizer)
        self.prompts = [p for k in range(len(self.batches)) for p in self.batches[k] if self.batches.fits(p)]
        eos_ids = models.model_eos_ids([student, teacher], self.tokenizer)
        self.context = run_folder.Run(self.args, self.world, self.tokenizer, eos_ids, out)
        out.mkdir(parents=True, exist_ok=True)
        self.build()

    def build(self):
        warmup_distill.build_pairs(self.context, self.batches)
        pairs.merge_pairs(self.context, self.batches, self.out)
        records = [r for file in sorted(self.out.glob("pairs/*")) for r in read_lines(file)]
        self.records = [r for r in records if r["status"] != "too_long"]
        self.pairs = read_lines(self.out / "pairs.jsonl")
        self.mismatch = json.loads((self.out / "mismatch.json").read_text())

    def models(self):
        """Student and teacher, loaded by transformers alone."""
        return [AutoModelForCausalLM.from_pretrained(path).eval() for path in (self.args.student, self.args.teacher)]

    def prompt(self, record):
        return next(p for p in self.prompts if p["prompt_id"] == record["prompt_id"])


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def tokens_of(records):
    return [
        [r[k] for k in ("prompt_id", "sample_id", "t_star", "response_ids", "chosen_ids", "status")] for r in records
    ]


def logprobs_of(records):
    names = ("student_logprobs", "teacher_logprobs", "chosen_teacher_logprobs")
    return [value for record in records for name in names for value in record[name]]


@pytest.fixture
def build(tmp_path, pair_of_models, mixed_file):
    """build("--flag", value, ..., teacher=..., student=..., data=...) -> Run; each call in a folder of its own."""
    count = 0

    def start(*flags, teacher=pair_of_models["teacher"], student=pair_of_models["student"], data=mixed_file):
        nonlocal count
        count += 1
        return Run(tmp_path / f"run{count}", str(teacher), str(student), data, *flags)

    return start


@torch.no_grad()
def log_softmax_of_next(model, ids, vocab_size):
    return model(input_ids=torch.tensor([ids])).logits[0, -1, :vocab_size].float().log_softmax(-1)


def slow_write(run, model, prompt, before, sample_id, stage, greedy):
    """Writes on from prompt + `before`, each token from a full forward over everything so far. Returns ids, log-probs."""
    args, written, logprobs = run.args, [], []
    while len(before) + len(written) < args.max_new_tokens:
        values = log_softmax_of_next(model, prompt["ids"] + before + written, len(run.tokenizer))
        place = [torch.tensor([v]) for v in (prompt["prompt_id"], sample_id, len(before) + len(written))]
        noise = decode.uniform_noise(args.seed, stage, *place)
        token = decode.sample_token(values[None], noise, args.temperature, args.top_p).item()
        token = values.argmax().item() if greedy else token
        written.append(token)
        logprobs.append(values[token].item())
        if token in run.context.eos_ids:
            break
    return written, logprobs


@torch.no_grad()
def slow_score(run, model, prompt, response):
    """log p of each response token from one plain forward: no cache, no padding, no batch."""
    logits = model(input_ids=torch.tensor([prompt["ids"] + response])).logits[0, len(prompt["ids"]) - 1 : -1]
    values = logits[:, : len(run.tokenizer)].float().log_softmax(-1)
    return values.gather(-1, torch.tensor(response)[:, None])[:, 0].tolist()


def assert_equals_twin(run):
    student, teacher = run.models()
    args = run.args
    assert [(r["prompt_id"], r["sample_id"]) for r in run.records] == [
        (p["prompt_id"], s) for p in run.prompts for s in range(args.samples)
    ]
    for record in run.records:
        prompt, sample_id = run.prompt(record), record["sample_id"]
        response, q = slow_write(run, student, prompt, [], sample_id, STUDENT_STAGE, greedy=False)
        p = slow_score(run, teacher, prompt, response)
        above = [t for t in range(len(response)) if q[t] - p[t] > args.eta]
        assert record["response_ids"] == response
        assert record["student_logprobs"] == pytest.approx(q, abs=1e-4)
        assert record["teacher_logprobs"] == pytest.approx(p, abs=1e-4)
        assert record["t_star"] == (above[0] if above else -1)
        assert record["ended"] == (response[-1] in run.context.eos_ids)
        if not above:
            assert record["status"] == "untouched" and record["chosen_ids"] == response
            continue
        position = above[0] + (args.replace == "after")
        if position == len(response):  # nothing to write behind the last token
            assert record["status"] == "identical" and record["chosen_ids"] == response
            continue
        greedy = args.teacher_decoding == "greedy"
        written, values = slow_write(run, teacher, prompt, response[:position], sample_id, TEACHER_STAGE, greedy)
        assert record["prefix_len"] == position
        assert record["chosen_ids"] == response[:position] + written
        assert record["chosen_teacher_logprobs"] == pytest.approx(p[:position] + values, abs=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--replace", "after"],
        ["--teacher-decoding", "greedy"],
        ["--replace", "after", "--teacher-decoding", "greedy", "--seed", 3],
        ["--temperature", 0.7],
        ["--top-p", 0.9],
        ["--max-new-tokens", 3],
        ["--max-new-tokens", 1],
        ["--max-new-tokens", 2, "--replace", "after", "--eta", -100],
        ["--eta", -100],
        ["--eta", 4],
    ],
    ids=lambda flags: " ".join(map(str, flags)) or "default",
)
def test_samples_equal_slow_twin(build, flags):
    """Cached, batched, padded, rewound and spliced = token by token with full forwards over prompt + response."""
    run = build(*flags)
    assert_equals_twin(run)
    limit = run.args.max_new_tokens
    assert all(len(r["response_ids"]) <= limit and len(r["chosen_ids"]) <= limit for r in run.records)


def test_length_limit_appends_no_eos(build):
    run = build("--max-new-tokens", 3)
    stopped = [r for r in run.records if r["response_ids"][-1] != 2]
    assert stopped and len(stopped) < len(run.records), "some responses end by themselves, some do not"
    assert all(len(r["response_ids"]) == 3 and not r["ended"] for r in stopped)
    assert run.mismatch["at_length_limit"] == len(stopped)


def test_tiny_eta_replaces_everything(build):
    run = build("--eta", -100, "--max-new-tokens", 8)
    assert all(r["t_star"] == 0 and r["prefix_len"] == 0 for r in run.records)
    assert run.mismatch["untouched"] == 0 and run.mismatch["replaced"] == len(run.records)


def test_teacher_equals_student(build, pair_of_models):
    """q = p: every margin is 0 up to float32, in whatever shape the two forwards ran, and nothing is replaced."""
    run = build("--eta", 0.01, teacher=pair_of_models["student"])
    margins = [q - p for r in run.records for q, p in zip(r["student_logprobs"], r["teacher_logprobs"])]
    assert len(margins) > 30 and max(map(abs, margins)) < 1e-3
    assert run.pairs == [] and {r["status"] for r in run.records} == {"untouched"}


def test_seed_and_temperature_matter(build):
    """Otherwise the twin, which reads the same flags, could agree with code that ignores them."""
    default, seed, cold = build(), build("--seed", 1), build("--temperature", 0.2)
    assert tokens_of(default.records) != tokens_of(seed.records)
    mean = lambda run: sum(map(sum, (r["student_logprobs"] for r in run.records))) / run.mismatch["tokens"]
    assert mean(cold) > mean(default) + 0.5, "a cold sampler draws likelier tokens"


def test_prompts_per_batch_changes_no_token(build):
    one, two, all_at_once = (build("--prompts-per-batch", n) for n in (1, 2, 64))
    assert len(list(one.out.glob("pairs/*"))) == len(PROMPTS) and len(list(all_at_once.out.glob("pairs/*"))) == 1
    for run in (two, all_at_once):
        assert tokens_of(run.records) == tokens_of(one.records)
        assert logprobs_of(run.records) == pytest.approx(logprobs_of(one.records), abs=2e-4)


def test_sharded_teacher_is_the_same_teacher(build):
    plain, sharded = build(), build("--shard-teacher")
    assert tokens_of(sharded.records) == tokens_of(plain.records)
    assert logprobs_of(sharded.records) == pytest.approx(logprobs_of(plain.records), abs=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Models and tokenizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_several_eos_ids_end_a_response(build, tmp_path, pair_of_models, which):
    """Llama-3 style: generation_config.json of one of the two names a second end, the token with id 9."""
    folder = shutil.copytree(pair_of_models[which], tmp_path / which)
    GenerationConfig(eos_token_id=[2, 9]).save_pretrained(folder)
    run = build("--samples", 6, **{which: folder})
    assert run.context.eos_ids == [2, 9]
    responses = [r[key] for r in run.records for key in ("response_ids", "chosen_ids")]
    assert all(token not in (2, 9) for response in responses for token in response[:-1])
    assert {2, 9} <= {response[-1] for response in responses}
    assert run.mismatch["at_length_limit"] == sum(r["response_ids"][-1] not in (2, 9) for r in run.records)
    assert_equals_twin(run)


def test_no_generation_config_is_no_error(build, tmp_path, pair_of_models):
    folder = shutil.copytree(pair_of_models["teacher"], tmp_path / "teacher")
    (folder / "generation_config.json").unlink()
    assert tokens_of(build(teacher=folder).records) == tokens_of(build().records)


@pytest.mark.parametrize("swapped", [False, True], ids=["teacher wider", "student wider"])
def test_vocabulary_rows_beyond_the_tokenizer(build, pair_of_models, swapped):
    """Qwen2.5: one model has more rows than there are tokens (here 32 for 22). They are cut off and the rest
    renormalised: log p' = log p - log(mass of the 22). The last assertion shows that the cut is not without effect."""
    student, teacher = pair_of_models["student"], pair_of_models["teacher"]
    folders = {"student": teacher, "teacher": student} if swapped else {"student": student, "teacher": teacher}
    run = build(**folders)
    assert_equals_twin(run)
    wide = run.models()[0 if swapped else 1]
    assert wide.config.vocab_size == 32 and len(run.tokenizer) == 22
    assert all(token < 22 for r in run.records for token in r["response_ids"] + r["chosen_ids"])
    with torch.no_grad():
        whole = wide(input_ids=torch.tensor([run.prompts[0]["ids"]])).logits[0, -1].log_softmax(-1)
    assert whole[:22].logsumexp(-1) < -0.05


def test_tokenizer_without_pad_token(build, tmp_path, pair_of_models, tokenizer):
    """Padding is masked, so which token stands in for it is all one."""
    folders = {name: shutil.copytree(path, tmp_path / name) for name, path in pair_of_models.items()}
    for folder in folders.values():
        for name in ("tokenizer_config.json", "tokenizer.json"):
            (folder / name).unlink()
        bare = AutoTokenizer.from_pretrained(pair_of_models["student"])
        bare.pad_token = None
        bare.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folders["student"]).pad_token is None
    assert build(**folders).records == build().records


def test_overlong_prompts_are_skipped_and_others_unchanged(build):
    """prompt_id is the row's number, so the other prompts' noise is as if the long ones were there."""
    everything, short = build(), build("--max-prompt-tokens", 7)  # <bos> and up to 6 characters
    left = [i for i, prompt in enumerate(PROMPTS) if len(prompt) <= 6]
    assert [p["prompt_id"] for p in short.prompts] == left == [0, 2, 4]
    assert short.mismatch["prompts_over_length"] == 2 and short.mismatch["prompts"] == 3
    expected = [r for r in everything.records if r["prompt_id"] in left]
    assert tokens_of(short.records) == tokens_of(expected)
    assert logprobs_of(short.records) == pytest.approx(logprobs_of(expected), abs=2e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Which samples become pairs
# ---------------------------------------------------------------------------------------------------------------------


def assert_statuses(run, keep):
    """Statuses, recounted: untouched; y+ = y-; a pair that this prompt has had already; then `keep` decides."""
    counts = dict.fromkeys(("untouched", "identical", "duplicate", "filtered", "kept"), 0)
    for prompt in run.prompts:
        had = []
        for record in run.records:
            if record["prompt_id"] != prompt["prompt_id"]:
                continue
            pair = (record["response_ids"], record["chosen_ids"])
            if record["t_star"] < 0:
                expected = "untouched"
            elif pair[0] == pair[1]:
                expected = "identical"
            elif pair in had:
                expected = "duplicate"
            else:
                had.append(pair)
                expected = "kept" if keep(prompt, *pair) else "filtered"
            assert record["status"] == expected, record
            counts[expected] += 1
    dropped = {reason: counts[reason] for reason in ("identical", "duplicate", "filtered")}
    assert run.mismatch["dropped"] == dropped
    assert (run.mismatch["untouched"], run.mismatch["pairs"]) == (counts["untouched"], counts["kept"])
    assert run.mismatch["replaced"] == run.mismatch["samples"] - counts["untouched"]
    return counts


def test_identical_and_duplicate_pairs(build, tmp_path):
    """Responses of one token, all replaced by the teacher's greedy one: many coincide. So do those of two prompts with
    the same text, in one micro-batch; they are other prompts all the same."""
    flags = ("--max-new-tokens", 1, "--teacher-decoding", "greedy", "--eta", -100, "--samples", 32)
    counts = assert_statuses(build(*flags, data=write_prompts(tmp_path / "p.jsonl", ["1+2:"] * 2)), lambda *pair: True)
    assert counts["identical"] > 0 and counts["duplicate"] > 0 and counts["kept"] > 0


def test_keep_teacher(build):
    """--keep teacher, by the teacher's full forwards: mean log p(y+) > mean log p(y-)."""
    run = build("--keep", "teacher", "--samples", 6)
    teacher = run.models()[1]
    mean = lambda values: sum(values) / len(values)
    score = lambda prompt, ids: mean(slow_score(run, teacher, prompt, ids))
    counts = assert_statuses(run, lambda prompt, y, y_plus: score(prompt, y_plus) > score(prompt, y))
    assert counts["kept"] > 0 and counts["filtered"] > 0


def test_keep_correct(build, tmp_path, tokenizer):
    """--keep correct: the gold answer of each prompt is made what the teacher's first splice ends in."""
    golds = []
    for prompt_id, records in itertools.groupby(build("--samples", 6).records, key=lambda r: r["prompt_id"]):
        texts = [tokenizer.decode(r["chosen_ids"], skip_special_tokens=True) for r in records if r["t_star"] >= 0]
        numbers = [scores.final_number(text) for text in texts]
        golds.append(f"The answer is {next((int(n) for n in numbers if n is not None), 7)}")
    run = build("--samples", 6, "--keep", "correct", data=write_prompts(tmp_path / "gold.jsonl", PROMPTS, golds))
    right = lambda prompt, ids: scores.is_correct(run.context.decode_text(ids), golds[prompt["prompt_id"]])
    counts = assert_statuses(run, lambda prompt, y, y_plus: right(prompt, y_plus) and not right(prompt, y))
    assert counts["kept"] > 0 and counts["filtered"] > 0


@pytest.mark.parametrize("kind", ["on text", "on text, adds bos", "with chat template"])
def test_keep_reward(build, tmp_path, tokenizer, kind):
    """--keep reward:MODEL: a random scorer with one label, asked here for one text at a time.

    The toy's chat template is <bos> + the contents, so all kinds of reward tokenizer see the same text, one bos in it.
    """
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=22, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_labels=1,
                         num_attention_heads=2, initializer_range=0.3, pad_token_id=0, max_position_embeddings=256)  # fmt: skip
    LlamaForSequenceClassification(config).eval().save_pretrained(tmp_path / "reward")
    scorer = LlamaForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    own = AutoTokenizer.from_pretrained(build().args.student)
    if kind != "with chat template":
        own.chat_template = None
    if kind == "on text, adds bos":
        bos = [("<bos>", own.bos_token_id)]
        own.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)
    own.save_pretrained(tmp_path / "reward")

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


def test_mismatch_json_recounted(build):
    """Every number of mismatch.json by an obvious loop over OUT/pairs/*.jsonl."""
    run = build("--samples", 5)
    found, records = run.mismatch, run.records
    margins = [[q - p for q, p in zip(r["student_logprobs"], r["teacher_logprobs"])] for r in records]
    tokens = [m for row in margins for m in row]
    assert (found["eta"], found["prompts"], found["prompts_over_length"]) == (1.0, len(PROMPTS), 0)
    assert (found["tokens"], found["samples"]) == (len(tokens), len(records)) == (found["tokens"], 25)
    assert found["at_length_limit"] == sum(2 not in r["response_ids"] for r in records)
    assert_statuses(run, lambda *pair: True)
    assert list(found["replacement_rate"]) == [str(k / 2) for k in range(1, 21)]
    for eta, rate in found["replacement_rate"].items():
        assert rate["tokens"] == pytest.approx(sum(m > float(eta) for m in tokens) / len(tokens), abs=1e-9)
        assert rate["samples"] == pytest.approx(sum(max(row) > float(eta) for row in margins) / 25, abs=1e-9)
    assert found["replacement_rate"]["1.0"]["samples"] == found["replaced"] / 25
    edges, counts = found["margin_histogram"]["edges"], found["margin_histogram"]["counts"]
    lows, highs = [-INF, *edges], [*edges, INF]
    assert counts == [sum(low < m <= high for m in tokens) for low, high in zip(lows, highs)]
    t_stars = [r["t_star"] for r in records if r["t_star"] >= 0]
    assert found["t_star_histogram"] == {str(t): t_stars.count(t) for t in sorted(set(t_stars))}
    assert len(set(t_stars)) > 2 and 0 < found["untouched"] < 25


def test_pairs_jsonl_fields(build, tokenizer):
    run = build("--samples", 5)
    kept = [r for r in run.records if r["status"] == "kept"]
    assert len(kept) == len(run.pairs) == run.mismatch["pairs"] > 5
    for pair, record in zip(run.pairs, kept):
        margins = [q - p for q, p in zip(record["student_logprobs"], record["teacher_logprobs"])]
        prompt = "<bos>" + PROMPTS[record["prompt_id"]]
        assert pair == {
            "prompt_id": record["prompt_id"],
            "sample_id": record["sample_id"],
            "prompt_ids": tokenizer.encode(prompt, add_special_tokens=False),
            "prefix_len": record["t_star"],
            "chosen_ids": record["chosen_ids"],
            "rejected_ids": record["response_ids"],
            "margin": pytest.approx(margins[record["t_star"]], abs=1e-6),
            "prompt": prompt,
            "chosen": tokenizer.decode(record["chosen_ids"], skip_special_tokens=True),
            "rejected": tokenizer.decode(record["response_ids"], skip_special_tokens=True),
            "tokenizer": models.tokenizer_fingerprint(tokenizer),
        }
        assert pair["chosen_ids"][: pair["prefix_len"]] == pair["rejected_ids"][: pair["prefix_len"]]
        assert pair["margin"] > run.args.eta and "<eos>" not in pair["chosen"] + pair["rejected"]


def test_missing_micro_batch_is_made_again_and_no_other(build):
    run = build("--prompts-per-batch", 2)
    files = sorted(run.out.glob("pairs/*"))
    assert [file.name for file in files] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    before = {
        file: (file.read_bytes(), file.stat().st_mtime_ns)
        for file in [*files, run.out / "pairs.jsonl", run.out / "mismatch.json"]
    }
    files[1].unlink()
    run.build()
    assert sorted(run.out.glob("pairs/*")) == files
    assert all(file.read_bytes() == content for file, (content, _) in before.items())
    assert [file.stat().st_mtime_ns == before[file][1] for file in files] == [True, False, True]


def test_finished_micro_batches_load_no_model(build, monkeypatch):
    run = build()
    monkeypatch.setattr(models, "load_model", lambda *args: pytest.fail("a model was loaded for nothing"))
    run.build()


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


def test_sharded_teacher_is_left_out_of_the_table(argv, tmp_path, capsys):
    """It fits on no single device, so the table has neither its row nor distances; accuracies are there."""
    warmup_distill.main([*argv, "--shard-teacher"])
    summary = common.read_json(tmp_path / "out" / "summary.json")
    assert "teacher" not in summary and set(summary["student after"]) == {"accuracy"}
    assert "student after" in capsys.readouterr().out


def test_eval_data_has_a_split_of_its_own(argv, tmp_path, monkeypatch, prompts_file):
    """--eval-data HUB_ID is read from its test split and, where it is another id, its own configuration."""
    asked, load_rows = [], data.load_rows
    monkeypatch.setattr(data, "load_rows", lambda *a: asked.append(a) or load_rows(*a))
    warmup_distill.main([*argv, "--eval-data", prompts_file, "--data-config", "main"])
    assert asked == [(prompts_file, "main", "train"), (prompts_file, "main", "test")]
    for flags, config in (((), None), (("--eval-config", "other"), "other")):
        asked.clear()
        copy = shutil.copy(prompts_file, tmp_path / f"{config}.jsonl")
        flags = [*flags, "--out", str(tmp_path / f"out-{config}")]
        warmup_distill.main([*argv, "--eval-data", str(copy), "--data-config", "main", *flags])
        assert asked == [(prompts_file, "main", "train"), (str(copy), config, "test")]


@pytest.mark.parametrize("limit, size", [(3, 1), (17, 3), (40, 5)])
def test_closing_table_has_work_for_eight_ranks(argv, prompts_file, monkeypatch, limit, size):
    """8 batches or more where there are prompts for them, but no more rows than in sampling; ranks do not count."""
    sizes = []
    monkeypatch.setattr(warmup_distill, "closing_table", lambda *arguments: sizes.append(arguments[4]))
    flags = ["--eval-data", prompts_file, "--eval-split", "train", "--eval-limit", str(limit)]
    warmup_distill.main([*argv, *flags, "--samples", "1", "--prompts-per-batch", "5"])
    assert sizes == [size]


def test_eval_limit_counts_prompts_that_fit(tmp_path, tokenizer):
    """The first two that fit, though a prompt over the limit is among the first two rows."""
    file = write_prompts(tmp_path / "eval.jsonl", ["1+2:", "123456789+123456789:", "3+4:", "5+6:"])
    flags = ["--eval-data", file, "--eval-limit", "2", "--max-prompt-tokens", "12", "--template", "none"]
    args = warmup_distill.parse_args(["--teacher", "T", "--student", "S", "--data", file, *flags])
    prompts = data.load_eval_prompts(args, tokenizer, [])
    assert [p["prompt_id"] for p in prompts] == [0, 2]


def test_prompts_leave_room_in_the_context(argv, tmp_path, capsys):
    """Models with 256 positions: 250 new tokens leave 6 for the prompt, of 8 tokens; 260 leave none."""
    out = ["--out", str(tmp_path / "short")]
    with pytest.raises(common.UserError, match="all .* prompts are over --max-prompt-tokens 6"):
        warmup_distill.main([*argv, *out, "--max-new-tokens", "250"])
    assert capsys.readouterr().out == ""
    warmup_distill.main([*argv, "--max-new-tokens", "40", "--eval-limit", "0"])
    assert capsys.readouterr().out.startswith("prompts may have 216 tokens: the models' context has no more")
    with pytest.raises(common.UserError, match="260 new tokens leave no room for a prompt in a context of 256"):
        warmup_distill.main([*argv, *out, "--max-new-tokens", "260"])
    shared = argv[: argv.index("--samples")]  # models and data, for kd.py
    with pytest.raises(common.UserError, match="260 new tokens leave no room"):
        kd.main([*shared, *out, "--max-new-tokens", "260", "--device", "cpu", "--threads", "1"])


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def test_main_writes_what_it_promises(argv, tmp_path, pair_of_models, capsys):
    out = tmp_path / "out"
    warmup_distill.main(argv)
    printed = capsys.readouterr().out
    written = {path.name for path in out.iterdir()} - {"reference.json"}
    assert written == {"args.json", "pairs", "pairs.jsonl", "mismatch.json", "metrics.jsonl", "checkpoint", "student",
                       "summary.json", "speed.json", ".lock", "report.html"}  # fmt: skip
    run = json.loads((out / "args.json").read_text())
    asked = vars(warmup_distill.parse_args(argv))
    assert run["args"] == asked | {"max_prompt_tokens": 256 - asked["max_new_tokens"]}  # the models' context is 256
    assert run["versions"]["torch"] == torch.__version__

    # The closing table says what summary.json and mismatch.json say
    summary, mismatch = (json.loads((out / f"{name}.json").read_text()) for name in ("summary", "mismatch"))
    assert "3 training prompts, eta 1.0" in printed
    titles = ["accuracy", "samples > eta", "tokens > eta", "KL(p,q)", "KL(q,p)", "tokens"]
    columns = [
        "accuracy",
        "replaced_samples",
        "replaced_tokens",
        "kl_teacher_student",
        "kl_student_teacher",
        "response_tokens",
    ]
    assert re.search(r"^\s+" + r"\s+".join(map(re.escape, titles)) + "$", printed, re.MULTILINE)
    for name in ("teacher", "student before", "student after"):
        cells = [f"{summary[name][c]:.4f}" if c in summary[name] else "-" for c in columns]
        assert re.search(rf"^{name}\s+" + r"\s+".join(map(re.escape, cells)) + "$", printed, re.MULTILINE), name
    assert "-" in cells or len(cells) == 6 and summary["teacher"].keys() == {"accuracy"}
    count = f"{mismatch['pairs']} pairs of {mismatch['samples']} samples, {mismatch['untouched']} untouched"
    assert count in printed and mismatch["samples"] == 12
    assert all(
        re.search(rf"^{stage}\s+\d+ tokens/s$", printed, re.MULTILINE) for stage in ("sample", "check", "splice", "dpo")
    )
    assert printed.rstrip().endswith(f"the warmed-up student is {out / 'student'}")

    # OUT/student loads as it is, has moved, and brings the tokenizer; every step is logged
    assert not same_weights(out / "student", pair_of_models["student"])
    assert AutoTokenizer.from_pretrained(out / "student").get_vocab() == models.load_tokenizer(argv[3]).get_vocab()
    steps = [row["step"] for row in read_lines(out / "metrics.jsonl")]
    assert steps == list(range(1, math.ceil(mismatch["pairs"] / 4) + 1)) and len(steps) >= 2


def test_main_again_changes_nothing(argv, tmp_path):
    out = tmp_path / "out"
    warmup_distill.main(argv)
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "summary.json"]
    before = [(path, path.read_bytes()) for path in files]
    summary = json.loads((out / "summary.json").read_text())
    warmup_distill.main(argv)
    assert [(path, path.read_bytes()) for path in files] == before
    again = json.loads((out / "summary.json").read_text())
    assert [again[key] for key in ("teacher", "student before", "student after")] == [
        summary[key] for key in ("teacher", "student before", "student after")
    ]


@pytest.mark.parametrize("lost", [["student"], ["student", "checkpoint"], ["student", "checkpoint", "reference.json"]])
def test_main_resumes_to_the_same_student(argv, tmp_path, lost):
    """A run killed after its last checkpoint, before its first one, and before the reference log-probs were there."""
    out = tmp_path / "out"
    warmup_distill.main(argv)
    metrics = read_lines(out / "metrics.jsonl")
    (out / "student").rename(tmp_path / "first")
    for name in lost[1:]:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    warmup_distill.main(argv)
    assert same_weights(tmp_path / "first", out / "student")
    clock = {"seconds", "tokens_per_second", "peak_memory_gb"}
    timeless = lambda rows: [{key: value for key, value in row.items() if key not in clock} for row in rows]
    assert timeless(read_lines(out / "metrics.jsonl")) == timeless(metrics)


def test_dry_run_makes_nothing(argv, tmp_path, capsys):
    warmup_distill.main([*argv, "--dry-run", "2"])
    printed = capsys.readouterr().out
    assert "KV cache" in printed and "dpo" in printed and not (tmp_path / "out").exists()


def test_explain_takes_the_run_as_it_is(argv, tmp_path, capsys):
    warmup_distill.main([*argv, "--eval-limit", "0"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    record = next(r for r in read_lines(tmp_path / "out" / "pairs" / "00000.jsonl") if r["status"] == "kept")
    warmup_distill.main(
        ["--explain", str(record["prompt_id"]), str(record["sample_id"]), "--out", str(tmp_path / "out")]
    )
    assert f"= {record['t_star']}:  m_{record['t_star']} = " in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_main_with_held_out_prompts_and_teacher_as_reference(argv, tmp_path, mixed_file, capsys):
    warmup_distill.main([*argv, "--eval-data", mixed_file, "--reference", "teacher"])
    assert "3 held-out prompts, eta 1.0" in capsys.readouterr().out
    # Each pair's reference log-probs are the teacher's: row 0 against full forwards of the chosen suffix
    pair = read_lines(tmp_path / "out" / "pairs.jsonl")[0]
    start = next(i for i, (a, b) in enumerate(zip(pair["chosen_ids"], pair["rejected_ids"])) if a != b)
    teacher = AutoModelForCausalLM.from_pretrained(argv[1]).eval()
    ids, expected = pair["prompt_ids"] + pair["chosen_ids"], 0.0
    for t in range(len(pair["prompt_ids"]) + start, len(ids)):
        expected += log_softmax_of_next(teacher, ids[:t], 22)[ids[t]].item()
    assert json.loads((tmp_path / "out" / "reference.json").read_text())[0][1] == pytest.approx(expected, abs=1e-3)


def test_main_without_table(argv, tmp_path, capsys):
    warmup_distill.main([*argv, "--eval-limit", "0"])
    assert "KL(p,q)" not in capsys.readouterr().out and not (tmp_path / "out" / "summary.json").exists()


def test_no_pair_leaves_the_student_as_it_was(argv, tmp_path, pair_of_models, capsys):
    """A huge eta: nothing is replaced, a warning says so, and the run still ends well."""
    warmup_distill.main([*argv, "--eta", "1e6"])
    warning = "warning: no pair came out, so there is nothing to learn: OUT/student is the student unchanged\n"
    assert warning in capsys.readouterr().out
    assert same_weights(tmp_path / "out" / "student", pair_of_models["student"])
    mismatch = json.loads((tmp_path / "out" / "mismatch.json").read_text())
    assert (mismatch["pairs"], mismatch["untouched"]) == (0, 12) and mismatch["t_star_histogram"] == {}


def test_no_pair_resumes(argv, tmp_path, pair_of_models):
    """Killed after OUT/reference.json, which is then an empty list, and before OUT/student."""
    argv = [*argv, "--eta", "1e6", "--eval-limit", "0"]
    warmup_distill.main(argv)
    shutil.rmtree(tmp_path / "out" / "student")
    warmup_distill.main(argv)
    assert same_weights(tmp_path / "out" / "student", pair_of_models["student"])


def test_every_weight_of_an_untied_student_is_trained(argv, tmp_path, tokenizer):
    """The other tests' student ties lm_head to its embeddings; here they are two, and wider than the vocabulary."""
    make_model("qwen2", 4, rows=24).save_pretrained(tmp_path / "untied")
    tokenizer.save_pretrained(tmp_path / "untied")
    warmup_distill.main([*argv, "--student", str(tmp_path / "untied"), "--eval-limit", "0", "--save-every", "100"])
    before, after = weights(tmp_path / "untied"), weights(tmp_path / "out" / "student")
    assert before["lm_head.weight"].shape == after["lm_head.weight"].shape == (24, 16)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert torch.equal(before["lm_head.weight"][22:], after["lm_head.weight"][22:]), "padding rows get no gradient"
