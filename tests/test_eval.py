"""Evaluation: hand-counted scores, each set in its real format, traps, files that no process count changes, the bootstrap."""

import inspect
import json
import os
import random
import time

import pytest
import torch
from conftest import launch, make_model
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import benchmarks
import common
import data
import decode
import eval
import measure
import models
import scores
from common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Rouge-L
# ---------------------------------------------------------------------------------------------------------------------

# response, reference, F by hand
ROUGE = [
    # LCS "the cat on the mat" = 5 of 6 and 6 words: P = R = 5/6
    ("the cat sat on the mat", "the cat was on the mat", 5 / 6),
    # LCS "a b" = 2 of 3 and 4 words: P = 2/3, R = 1/2, F = 2 * 1/3 / (7/6) = 4/7
    ("a b c", "a x b y", 4 / 7),
    # The order counts: LCS "police kill" = 2 of 4 and 4 words
    ("gunman the police kill", "police kill the gunman", 1 / 2),
    # The stemmer takes "killed" and "kills" to "kill": all 4 words. Without it the LCS is 3: 3/4
    ("police killed the gunman", "police kills the gunman", 1.0),
    # Case and punctuation do not count
    ("Yes, it IS!", "yes it is", 1.0),
    ("", "yes it is", 0.0),
    ("no", "yes it is", 0.0),
]


@pytest.mark.parametrize("response, reference, expected", ROUGE)
def test_rouge_l_pinned(response, reference, expected):
    """F = 2PR/(P+R) with P = LCS/words of the response and R = LCS/words of the reference."""
    assert scores.rouge_l(response, [reference]) == pytest.approx(100 * expected)


def test_rouge_l_takes_the_best_reference():
    """Against "a b c d" F is 2 * 2/4 * 1 / (6/4) = 2/3, against "x" 0, against "a b" 1; order does not matter."""
    assert scores.rouge_l("a b", ["x", "a b c d"]) == pytest.approx(100 * 2 / 3)
    assert scores.rouge_l("a b", ["a b c d", "x", "a b"]) == 100
    assert scores.score_response("a b", ["x", "a b"], "rouge", None) == (100, False)


# ---------------------------------------------------------------------------------------------------------------------
# Math
# ---------------------------------------------------------------------------------------------------------------------

# response, gold, whether math-verify calls it right, whether the cheap check does
ANSWERS = [
    ("#### 18", "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", True, True),
    ("The answer is 18.0", "#### 18", True, True),
    ("It costs $18", "#### 18", True, True),
    ("It costs \\$18.", "#### 18", True, True),
    ("so \\boxed{18}", "#### 18", True, True),
    ("\\boxed{17} no: \\boxed{18}", "#### 18", True, True),
    ("1,000 dollars", "#### 1000", True, True),
    ("$\\boxed{1{,}000}$", "#### 1,000", True, True),
    ("10,\\!080", "\\boxed{10080}", True, True),
    ("\\frac12", "\\boxed{\\frac{1}{2}}", True, True),
    ("The answer is $\\frac{1}{2}$.", "\\boxed{0.5}", True, True),
    ("\\boxed{-\\frac12}", "\\boxed{0.5}", False, False),
    ("\\boxed{3\\frac12}", "\\boxed{0.5}", False, False),
    ("\\boxed{\\sqrt{2}}", "\\boxed{2}", False, False),
    ("\\boxed{3\\sqrt{2}}", "\\boxed{\\sqrt{18}}", True, False),  # the cheap check knows numbers only
    ("\\boxed{\\left[0,1\\right)}", "\\boxed{[0, 1)}", True, None),
    ("\\boxed{\\{1,2\\}}", "\\boxed{\\left\\{2,1\\right\\}}", True, False),
    ("\\boxed{\\text{even}}", "it is \\boxed{\\text{even}}.", True, False),
    ("\\boxed 5", "\\boxed{5}", True, True),
    ("#### -5", "10-15=-5\n#### -5", True, True),
    ("10-5", "#### -5", False, False),
    ("#### 18\nand not 19", "#### 19", False, False),
    ("", "#### 18", False, False),
    ("   \n", "#### 18", False, False),
    ("####", "#### 18", False, False),
    ("\\boxed{18", "#### 18", False, False),  # cut before the answer was complete
    ("I do not know", "#### 18", False, False),
    ("9+7+0=16;9+7+1=17;1+8+1=10=1076", "9+7+0=16;9+7+1=17;1+8+1=10=1076", True, True),
    ("9+7+0=16;9+7+1=17;1+8+1=10=1075", "9+7+0=16;9+7+1=17;1+8+1=10=1076", False, False),
]


@pytest.mark.parametrize("response, gold, _, cheap", ANSWERS)
def test_is_correct(response, gold, _, cheap):
    if cheap is not None:
        assert scores.is_correct(response, gold) is cheap


@pytest.mark.parametrize(
    "text, number",
    [
        ("1,000", 1000),
        ("= 18.0", 18),
        ("$18", 18),
        ("#### 18", 18),
        ("-3", -3),
        ("5-3", 3),
        ("1/2", 0.5),
        (".5", 0.5),
        ("1,2", 2),
        ("16=4^2", None),
        ("x_2", None),
        ("2\\pi", None),
        ("1/0", None),
        ("9" * 400, None),  # a looping model: inf is no answer, and no exception
        ("1/" + "1" * 5000, None),
        ("none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert scores.final_number(text) == number


def misbehave(response, gold):
    """Stands in for math-verify in the checker's process: does what the response says."""
    if response == "hang":
        time.sleep(600)
    if response == "crash":
        os.abort()
    if response == "raise":
        raise RecursionError
    if response == "memory":
        bytearray(1 << 40)
    return response == gold


def test_a_hung_or_crashing_check_costs_one_example():
    """Every other example of the run is scored, and the four that failed are told from the one that is wrong."""
    checker = scores.AnswerChecker(misbehave, seconds=3)
    responses = ["yes", "hang", "yes", "crash", "raise", "memory", "no", "yes"]
    verdicts = [scores.score_response(text, ["yes"], "math", checker) for text in responses]
    checker.close()
    right, wrong, failed = (100, False), (0, False), (0, True)
    assert verdicts == [right, failed, right, failed, failed, failed, wrong, right]


def test_math_verify_on_the_hand_made_list():
    """9^9^9^9 is a real hang: Python computes the power in one operation, which no alarm signal interrupts."""
    checker = scores.AnswerChecker(seconds=20)
    for response, gold, expected, _ in ANSWERS:
        assert checker(response, gold) is expected, (response, gold)
    checker.seconds = 1
    assert checker("\\boxed{9^{9^{9^{9}}}}", "#### 18") is None
    assert checker.process is None
    checker.close()


# ---------------------------------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------------------------------


def minillm_row(instruction, output, context="", **more):
    """A line of MiniLLM's valid.jsonl, line breaks of the prompt written as <n>."""
    template = data.ALPACA_INPUT if context else data.ALPACA
    prompt = template.format(instruction=instruction, input=context).replace("\n", "<n>")
    return {"instruction": instruction, "prompt": prompt, "input": context, "output": output, **more}


GSM8K_ROWS = [
    {"question": "Ann has 5 apples and buys 4. How many?", "answer": "5 + 4 = <<5+4=9>>9 apples.\n#### 9"},
    {"question": "A car costs $1,000 a month. A year?", "answer": "1000 * 12 = $<<1000*12=12000>>12000.\n#### 12,000"},
    {"question": "Half of 3 cups?", "answer": "3 / 2 = <<3/2=1.5>>1.5 cups.\n#### 1.5"},
]
MATH_ROWS = [
    {
        "problem": "What is $1-\\frac12$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
    },
    {"problem": "Simplify $\\sqrt{18}$.", "level": "Level 2", "type": "Algebra", "solution": "$\\boxed{3\\sqrt{2}}$"},
]
SETS = {
    "dolly": [minillm_row("Say hi", "hi"), minillm_row("Add", "It is 3.", "1 and 2")],
    "selfinst": [minillm_row("Name a fruit", "apple", topic="food"), minillm_row("Shout", "HEY", "hey")],
    "vicuna": [minillm_row("How are you?", ["fine", "well"], category="generic")],
    "sni": [minillm_row("Classify", ["it is good", "it is very good"], "nice day"), minillm_row("Sum", ["a b"], "a")],
    "unni": [minillm_row("Write", "a poem", "about cats"), minillm_row("Go", "gone")],
    "gsm8k": GSM8K_ROWS,
    "math": MATH_ROWS,
}


def write_rows(path, rows):
    """Rows as JSONL, Parquet or CSV, by the file's ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).to_csv(path)
    return path


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_each_set_in_its_format(name, ending, tmp_path):
    rows = SETS[name]
    path = write_rows(tmp_path / f"file{ending}", rows)
    benchmark = benchmarks.find(f"{name}={path}", None)
    examples = benchmarks.load(benchmark)
    assert benchmark.metric == benchmarks.BENCHMARKS[name].metric
    assert len(examples) == len(rows)
    for row, example in zip(rows, examples):
        gold = row.get("output") or row.get("answer") or row.get("solution")
        assert example["response"] == (gold if isinstance(gold, list) else [gold])
        assert example["instruction"] == (row.get("instruction") or row.get("question") or row.get("problem"))
        assert example["input"] == row.get("input", "")
        prompt = (data.ALPACA_INPUT if example["input"] else data.ALPACA).format(**example)
        assert example["templated"] == (prompt if "prompt" in row else None)


def test_the_table_of_sets():
    """Hub ids as published, and where only a part of a set counts."""
    assert benchmarks.find("sni", None).file == benchmarks.find("unni", None).file == "11_/valid.jsonl"
    assert [b.name for b in benchmarks.BENCHMARKS.values() if b.metric == "math"] == ["gsm8k", "math"]
    assert {b.repo.split("/")[0] for b in benchmarks.BENCHMARKS.values() if b.metric == "rouge"} == {"MiniLLM"}


def test_only_the_first_10000_of_unni(tmp_path):
    row = json.dumps(minillm_row("Go", "gone")) + "\n"
    (tmp_path / "valid.jsonl").write_text(row * 10_003)
    assert len(benchmarks.load(benchmarks.find(f"unni={tmp_path / 'valid.jsonl'}", None))) == 10_000


def test_list_of_references_that_a_file_format_made_text(tmp_path):
    """CSV has no lists: it holds "['a', 'b']", which as one reference would be scored without a word."""
    rows = [{**row, "output": str(row["output"])} for row in SETS["sni"]]
    examples = benchmarks.load(benchmarks.find(f"sni={write_rows(tmp_path / 'valid.csv', rows)}", None))
    assert [e["response"] for e in examples] == [["it is good", "it is very good"], ["a b"]]
    rows = [{**row, "output": json.dumps(row["output"])} for row in SETS["sni"]]
    examples = benchmarks.load(benchmarks.find(f"sni={write_rows(tmp_path / 'valid.jsonl', rows)}", None))
    assert [e["response"] for e in examples] == [["it is good", "it is very good"], ["a b"]]
    rows[1]["output"] = "a b"  # then the first one is a reference that looks like a list
    examples = benchmarks.load(benchmarks.find(f"sni={write_rows(tmp_path / 'valid.jsonl', rows)}", None))
    assert [e["response"] for e in examples] == [['["it is good", "it is very good"]'], ["a b"]]


GOOD = minillm_row("Say hi", "hi")
BAD = [
    ([{"text": "Say hi", "output": "hi"}], "no column instruction"),
    ([{"instruction": "Say hi"}], "no column references or output"),
    ([], "no rows"),
    ([GOOD, {**GOOD, "output": None}], "neither text nor a list of texts, in .* row 1"),
    ([GOOD, {**GOOD, "output": ""}], "references missing.* row 1"),
    ([GOOD, {**GOOD, "output": []}], "references missing.* row 1"),
    ([GOOD, {**GOOD, "output": ["hi", 3]}], "neither text nor a list of texts.* row 1"),
    ([{**GOOD, "output": "['hi', 'hello']"}, {**GOOD, "output": "['hi', 'hel"}], "cannot be read as one, in .* row 1"),
    ([GOOD, {**GOOD, "instruction": " "}], "column instruction is empty.* row 1"),
    ([{**GOOD, "instruction": 7}], "column instruction is int"),
    ([{**GOOD, "prompt": GOOD["prompt"][:-15]}], "no response marker"),
    (["Say hi"], "not objects with named columns"),
]


@pytest.mark.parametrize("rows, message", BAD, ids=[message for _, message in BAD])
def test_bad_data_is_refused(rows, message, tmp_path):
    path = write_rows(tmp_path / "valid.jsonl", rows)
    with pytest.raises(UserError, match=message):
        benchmarks.load(benchmarks.find(f"dolly={path}", None))


def test_a_gold_response_without_an_answer_is_refused(tmp_path):
    path = write_rows(tmp_path / "test.jsonl", [{"question": "How many?", "answer": "Many.\n#### "}])
    with pytest.raises(UserError, match="references missing"):
        benchmarks.load(benchmarks.find(f"gsm8k={path}", None))


def test_names_and_files(tmp_path):
    path = write_rows(tmp_path / "mine.jsonl", [GOOD])
    assert benchmarks.find(str(path), "rouge").name == "mine"
    assert benchmarks.find(f"other={path}", "math") == benchmarks.Benchmark("other", "math", path=str(path))
    for spec, message in (("dollly", "unknown data set"), (f"x={path}x", "no such file"), ("a/b", "no such file")):
        with pytest.raises(UserError, match=message):
            benchmarks.find(spec, None)
    with pytest.raises(UserError, match="how to score"):
        benchmarks.find(str(path), None)
    with pytest.raises(UserError, match="file name"):
        benchmarks.find(f"a/b={path}", "rouge")


@pytest.mark.parametrize("name", ["dolly", "gsm8k"])
def test_no_network_is_one_line(name, pair_of_models, tmp_path):
    """What a user without network sees, from the command itself; nothing is written."""
    env = {"HF_HOME": str(tmp_path / "hub")}
    done = launch(0, "eval.py", "--model", pair_of_models["student"], "--data", name, cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert f"give --data {name}=FILE" in done.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------------------------


def make_english_tokenizer(chat_template=None):
    """One token a character of printable ASCII, so that real prompts can be read back."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    characters = ["\n", *map(chr, range(32, 127))]
    model = BPE(vocab={t: i for i, t in enumerate(special + characters)}, merges=[], unk_token="<unk>")
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{token.strip('<>')}_token": token for token in special},
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def load(tmp_path, name, rows):
    return benchmarks.load(benchmarks.find(f"{name}={write_rows(tmp_path / f'{name}.jsonl', rows)}", None))


def test_a_prompt_over_the_limit_is_skipped_and_never_cut(tmp_path):
    tokenizer = make_english_tokenizer()
    rows = [minillm_row("Say hi", "hi"), minillm_row("Say " + "very " * 99, "v"), minillm_row("Bye", "bye", "now")]
    prompts, skipped = benchmarks.encode(load(tmp_path, "dolly", rows), tokenizer, "auto", 300)
    assert skipped == 1
    assert [p["prompt_id"] for p in prompts] == [0, 2]  # the others keep their numbers, and with them their noise
    for prompt in prompts:
        assert tokenizer.decode(prompt["ids"]) == prompt["text"]
        assert prompt["text"].endswith("### Response:\n")
    with pytest.raises(UserError, match="all 3 prompts are over"):
        benchmarks.encode(load(tmp_path, "dolly", rows), tokenizer, "auto", 20)


def test_which_template_a_model_sees(tmp_path):
    """MiniLLM's prompt as it is; through the chat template instead where there is one and the file has the instruction."""
    plain = make_english_tokenizer()
    chat = make_english_tokenizer("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    alpaca = data.ALPACA_INPUT.format(instruction="Add", input="1 and 2")
    examples = load(tmp_path, "dolly", [minillm_row("Add", "3", "1 and 2")])
    text = lambda *args: benchmarks.encode(*args, 1024)[0][0]["text"]
    assert text(examples, plain, "auto") == text(examples, chat, "alpaca") == text(examples, plain, "none") == alpaca
    assert text(examples, chat, "auto") == text(examples, chat, "chat") == "<Add\n\n1 and 2>"
    bare = load(tmp_path, "dolly", [{"prompt": alpaca, "output": "3"}])
    assert text(bare, chat, "auto") == text(bare, plain, "alpaca") == alpaca
    question = load(tmp_path, "gsm8k", GSM8K_ROWS)
    assert text(question, plain, "auto") == data.ALPACA.format(instruction=GSM8K_ROWS[0]["question"])
    assert text(question, chat, "auto") == f"<{GSM8K_ROWS[0]['question']}>"


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def run_decode(model, prompts, choose, tokens, vocab_size, eos_ids=(2,)):
    rows = decode.prefill(model, prompts, 0, torch.device("cpu"))
    return decode.decode(model, rows, choose, torch.full((len(prompts),), tokens), list(eos_ids), vocab_size)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_no_repeat_ngram(size, tokenizer):
    """Sampled responses complete no n-gram that stands before it in prompt and response; without the flag they do."""
    model, noise = make_model("llama", 3), random.Random(0)
    prompts = [[noise.randrange(4, 22) for _ in range(n)] for n in (1, 5, 30, 12)]
    ids = torch.arange(len(prompts))
    sampled = decode.sampler(7, 0, ids, ids * 0, ids * 0, 1.0, 1.0)
    repeats = {}
    for name, choose in (("free", sampled), ("barred", measure.no_repeat_ngram(sampled, prompts, size))):
        repeats[name] = 0
        for prompt, response in zip(prompts, run_decode(model, prompts, choose, 60, len(tokenizer))):
            text = prompt + response
            ngrams = [tuple(text[k : k + size]) for k in range(len(text) - size + 1)]
            repeats[name] += sum(ngrams[k] in ngrams[:k] for k in range(max(0, len(prompt) - size + 1), len(ngrams)))
    assert repeats["barred"] == 0 < repeats["free"]


def test_no_repeat_ngram_is_transformers_rule(tokenizer):
    """The same greedy response as generate(no_repeat_ngram_size=3), its reach into the prompt included."""
    model = make_model("llama", 3)
    prompt = [5, 6, 7, 5, 6, 7, 8, 9, 8, 9, 8]
    ours = run_decode(model, [prompt], measure.no_repeat_ngram(decode.greedy, [prompt], 3), 50, len(tokenizer), [999])
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=50, do_sample=False, no_repeat_ngram_size=3, eos_token_id=None
    )
    assert ours == [theirs[0, len(prompt) :].tolist()]


def one_world():
    return common.start_processes("cpu", 1)


def load_pair(pair_of_models, name):
    return AutoModelForCausalLM.from_pretrained(pair_of_models[name]).eval()


def test_distance_against_whole_forwards(pair_of_models):
    """A slow twin: the same samples, one at a time and without a cache; KL as sums over the vocabulary, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(pair_of_models["student"])
    q_model, p_model = load_pair(pair_of_models, "student"), load_pair(pair_of_models, "teacher")
    prompts = [{"prompt_id": k, "ids": [1, *range(4, 5 + 2 * k)]} for k in range(5)]
    eta, seed, size = 1.0, 10, len(tokenizer)
    result = measure.distance(q_model, p_model, prompts, tokenizer, [2], 12, 2, eta, seed, one_world())

    forward, reverse, above, samples_above, tokens = 0.0, 0.0, 0, 0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt["prompt_id"]])
        choose = decode.sampler(seed, decode.EVAL_STAGE, ids, ids * 0, ids * 0, 1.0, 1.0)
        response = run_decode(q_model, [prompt["ids"]], choose, 12, size)[0]
        whole = torch.tensor([prompt["ids"] + response])
        with torch.no_grad():
            q, p = (
                m(whole).logits[0, len(prompt["ids"]) - 1 : -1, :size].double().softmax(-1) for m in (q_model, p_model)
            )
        margins = [(q[t, y] / p[t, y]).log().item() for t, y in enumerate(response)]
        forward += sum((p[t, v] * (p[t, v] / q[t, v]).log()).item() for t in range(len(response)) for v in range(size))
        reverse += sum((q[t, v] * (q[t, v] / p[t, v]).log()).item() for t in range(len(response)) for v in range(size))
        above += sum(m > eta for m in margins)
        samples_above += any(m > eta for m in margins)
        tokens += len(response)
    assert 0 < above < tokens
    assert result["kl_teacher_student"] == pytest.approx(forward / tokens, rel=1e-4)
    assert result["kl_student_teacher"] == pytest.approx(reverse / tokens, rel=1e-4)
    assert result["replaced_tokens"] == pytest.approx(above / tokens)
    assert result["replaced_samples"] == pytest.approx(samples_above / len(prompts))
    nothing = measure.distance(q_model, q_model, prompts, tokenizer, [2], 12, 2, eta, seed, one_world())
    assert nothing.pop("response_tokens") == result["response_tokens"] and set(nothing.values()) == {0.0}


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap
# ---------------------------------------------------------------------------------------------------------------------


def test_bootstrap_against_a_loop():
    """The same draws taken one by one, in Python."""
    differences = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator, expected = torch.Generator().manual_seed(5), []
    for _ in range(50):
        drawn = torch.randint(9, (9,), generator=generator).tolist()
        expected.append(sum(differences[k].item() for k in drawn) / 9)
    torch.testing.assert_close(scores.paired_bootstrap(differences, 50, 5), torch.tensor(expected, dtype=torch.float64))


def test_bootstrap_does_not_depend_on_its_chunks():
    """2^22 draws at a time: 70 resamples of 100,000 examples come in two chunks, and begin like 30 of them."""
    differences = torch.arange(100_000.0)
    assert torch.equal(scores.paired_bootstrap(differences, 70, 1)[:30], scores.paired_bootstrap(differences, 30, 1))


def test_bootstrap_known_cases():
    equal = scores.interval(2.5, scores.paired_bootstrap(torch.full((20,), 2.5), 1000, 0))
    assert equal == {"difference": 2.5, "low": 2.5, "high": 2.5, "share": 1.0}
    none = scores.interval(0.0, scores.paired_bootstrap(torch.zeros(20), 1000, 0))
    assert none == {"difference": 0.0, "low": 0.0, "high": 0.0, "share": 0.5}
    symmetric = scores.interval(0.0, scores.paired_bootstrap(torch.tensor([-1.0, 1.0] * 50), 10_000, 0))
    assert symmetric["share"] == pytest.approx(0.5, abs=0.03)
    # The mean of 100 draws of +-1 has standard deviation 0.1, and 1.96 of them on either side
    assert symmetric["low"] == pytest.approx(-0.196, abs=0.02)
    assert symmetric["high"] == pytest.approx(0.196, abs=0.02)


def test_bootstrap_interval_covers_the_truth():
    """Of 300 draws of 40 normal differences around 0.3, about 95% have 0.3 in their interval; the percentile
    interval is somewhat narrow at N = 40 (about 94%), and 300 trials have a standard error of 1.3 points."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for trial in range(300):
        differences = 0.3 + torch.randn(40, generator=generator)
        found = scores.interval(0.0, scores.paired_bootstrap(differences, 500, trial))
        covered += found["low"] <= 0.3 <= found["high"]
    assert 0.89 <= covered / 300 <= 0.98


@pytest.mark.parametrize("function", [scores.paired_bootstrap, measure.no_repeat_ngram])
def test_pure_functions_need_only_torch(function):
    """Copied out of the file, they run."""
    namespace = {"torch": torch}
    exec(inspect.getsource(function), namespace)  # noqa: S102
    copy = namespace[function.__name__]
    if function is scores.paired_bootstrap:
        assert copy(torch.ones(3), 5, 0).tolist() == [1.0] * 5
    else:
        choose = copy(lambda logits, indices, step: logits.argmax(-1), [[1, 2, 1]], 2)
        assert choose(torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([0]), 0).tolist() == [1]  # 1 2 stands there already


def results(values, references="r", name="set"):
    """{set: {seed: rows}} from a list of scores for each seed."""
    rows = lambda scores: [{"prompt_id": k, "references": [references], "score": s} for k, s in enumerate(scores)]
    return {name: {seed: rows(scores) for seed, scores in values.items()}}


def test_compare_pairs_examples_and_averages_over_seeds():
    """Example scores of A: (10, 40), of B: (30, 40): differences 20 and 0."""
    a, b = results({10: [0, 40], 20: [20, 40]}), results({10: [30, 30], 20: [30, 50]})
    found = scores.compare(a, b, 2000, 0)["set"]
    assert found["difference"] == 10
    assert (found["low"], found["high"], found["examples"]) == (0, 20, 2)
    assert found["share"] == pytest.approx(3 / 4 + 1 / 8, abs=0.03)  # (0, 0) is drawn in 1 of 4 and is a tie


def test_compare_over_all_sets_weighs_sets_alike():
    """2 examples that gain 3 and 100 that lose 1: the mean over sets is +1, over examples it would be below 0."""
    a = results({1: [0] * 2}) | results({1: [0] * 100}, name="big")
    b = results({1: [3] * 2}) | results({1: [-1] * 100}, name="big")
    found = scores.compare(a, b, 100, 0)
    assert found["all"] == {"examples": 102, "difference": 1, "low": 1, "high": 1, "share": 1}


def test_compare_resamples_sets_independently():
    """Two sets with opposite differences at the same places: drawn together they would cancel in every resample."""
    a = results({1: [0] * 50}) | results({1: [0] * 50}, name="other")
    b = results({1: [-2, 2] * 25}) | results({1: [2, -2] * 25}, name="other")
    found = scores.compare(a, b, 1000, 0)["all"]
    assert found["high"] - found["low"] > 0.5


def test_compare_refuses_different_data():
    a = results({1: [0, 0]})
    with pytest.raises(UserError, match="different data"):
        scores.compare(a, results({1: [0, 0]}, references="other"), 10, 0)
    with pytest.raises(UserError, match="no set in common"):
        scores.compare(a, results({1: [0, 0]}, name="other"), 10, 0)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    """Two random models that can read English, and a file for each of two sets."""
    root, tokenizer = tmp_path_factory.mktemp("english"), make_english_tokenizer()
    for name, seed in (("a", 1), ("b", 2)):
        make_model("llama", seed, rows=len(tokenizer), max_position_embeddings=1024).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    rows = [minillm_row(f"Say {k}", [f"{k}", f"number {k}"]) for k in range(7)] + [minillm_row("x" * 500, "x")]
    write_rows(root / "sni.jsonl", rows)
    write_rows(root / "gsm8k.jsonl", GSM8K_ROWS)
    return root


def command(english, out, *more, models="ab"):
    data_flags = ["--data", f"sni={english}/sni.jsonl", f"gsm8k={english}/gsm8k.jsonl", "--threads", "1"]
    sizes = ["--max-new-tokens", "12", "--batch-size", "2", "--max-prompt-tokens", "400", "--seeds", "10", "20"]
    return ["--model", *(str(english / m) for m in models), *data_flags, *sizes, "--out", str(out), *map(str, more)]


def files_of(out):
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def one_process(english, tmp_path_factory):
    """OUT of a whole command in one process."""
    out = tmp_path_factory.mktemp("one")
    eval.main(
        command(
            english, out, "--distance", english / "b", "--compare", english / "a", english / "b", "--resamples", 200
        )
    )
    return out


def test_files_and_table(one_process, english):
    """Every number of the table is counted again from the response files."""
    table = json.loads((one_process / "eval/table.json").read_text())
    assert list(table["models"]) == [str(english / "a"), str(english / "b")]
    for path, model in table["models"].items():
        folder, means = one_process / "eval" / eval.model_name(path), {}
        assert [f.name for f in sorted(folder.glob("*.jsonl"))] == [
            "gsm8k-seed10.jsonl",
            "sni-seed10.jsonl",
            "sni-seed20.jsonl",
        ]
        for file in folder.glob("*.jsonl"):
            name, seed = file.stem.split("-seed")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            assert [row["prompt_id"] for row in rows] == list(range({"sni": 7, "gsm8k": 3}[name]))
            for row in rows:
                if name == "sni":
                    assert row["score"] == scores.rouge_l(row["response"], row["references"])
                    assert row["references"] == [str(row["prompt_id"]), f"number {row['prompt_id']}"]
                else:
                    assert row["references"] == [GSM8K_ROWS[row["prompt_id"]]["answer"]]
                assert row["prompt"].endswith("### Response:\n")
                assert row["ended"] or row["tokens"] == 12
            means.setdefault(name, {})[seed] = sum(row["score"] for row in rows) / len(rows)
        for name, seeds in means.items():
            summary, values = model["sets"][name], list(seeds.values())
            assert summary["seeds"] == pytest.approx(seeds)
            assert summary["mean"] == pytest.approx(sum(values) / len(values))
            if name == "sni":
                assert summary["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)  # n - 1 = 1
            else:
                assert summary["std"] is None
            assert summary["skipped"] == {"sni": 1, "gsm8k": 0}[name]
        assert model["average"] == pytest.approx(sum(s["mean"] for s in model["sets"].values()) / 2)
    a, b = table["models"].values()
    assert a["sets"]["sni"]["distance"]["kl_student_teacher"] > 0 == b["sets"]["sni"]["distance"]["kl_student_teacher"]
    difference = b["sets"]["sni"]["mean"] - a["sets"]["sni"]["mean"]
    assert table["compare"]["sets"]["sni"]["difference"] == pytest.approx(difference)


def test_two_processes_write_the_same_bytes(one_process, english, tmp_path):
    """Response files, distances, comparison and table; 4 and 2 batches over 2 processes."""
    flags = ["--distance", english / "b", "--compare", english / "a", english / "b", "--resamples", 200]
    done = launch(2, "eval.py", *command(english, tmp_path / "two", *flags))
    assert done.returncode == 0, done.stderr
    one, two = files_of(one_process), files_of(tmp_path / "two")
    assert one == two
    assert "| model | sni (Rouge-L) | gsm8k (accuracy) | average |" in done.stdout
    assert "sni: 7 examples, 2 seed(s); 1 prompts over the limit of 400 tokens skipped" in done.stdout


def test_a_killed_run_goes_on(one_process, english, monkeypatch, capsys):
    """A file that is there is not made again; one that is missing is, with the same content."""
    file = one_process / "eval" / eval.model_name(english / "b") / "sni-seed20.jsonl"
    before, made = files_of(one_process), []
    file.unlink()
    respond = eval.respond
    monkeypatch.setattr(eval, "respond", lambda *args: made.append(args[-1]) or respond(*args))
    flags = ["--distance", english / "b", "--compare", english / "a", english / "b", "--resamples", 200]
    eval.main(command(english, one_process, *flags))
    assert made == ["sni-seed20"]
    assert files_of(one_process) == before
    monkeypatch.setattr(models, "load_model", None)  # nothing to do: no model is loaded
    eval.main(command(english, one_process, *flags))
    assert files_of(one_process) == before


def test_seeds_differ_and_greedy_does_not_depend_on_them(one_process, english, tmp_path):
    eval.main(command(english, tmp_path, models="a"))
    name = eval.model_name(english / "a")
    assert files_of(tmp_path / "eval" / name).items() <= files_of(one_process / "eval" / name).items()
    ten, twenty = (common.read_jsonl(tmp_path / "eval" / name / f"sni-seed{s}.jsonl") for s in (10, 20))
    assert [row["response"] for row in ten] != [row["response"] for row in twenty]


def test_the_preset_forbids_repeats(english, tmp_path):
    args = eval.parse_args(["--model", "m", "--data", "dolly", "--preset", "minillm"])
    assert (args.no_repeat_ngram_size, args.template, args.temperature, args.top_p) == (6, "alpaca", 1, 1)
    assert args.seeds == [10, 20, 30, 40, 50]
    assert benchmarks.find("dolly", None).max_new_tokens == 256
    args = eval.parse_args(["--model", "m", "--data", "dolly", "--preset", "minillm", "--no-repeat-ngram-size", "0"])
    assert args.no_repeat_ngram_size == 0  # a flag that is given wins
    assert eval.parse_args(["--model", "m", "--data", "dolly"]).no_repeat_ngram_size == 0


def test_results_of_something_else_are_refused(one_process, english):
    """Other settings, other prompts, or a model trained since: never scored as if they were this run's."""
    with pytest.raises(UserError, match="--temperature 1.0 there, 0.5 now"):
        eval.main(command(english, one_process, "--temperature", 0.5))
    with pytest.raises(UserError, match="other prompts"):
        eval.main(command(english, one_process, "--limit", 2))
    weights = english / "a" / "model.safetensors"
    times = weights.stat()
    os.utime(weights, (time.time() + 60, time.time() + 60))
    with pytest.raises(UserError, match="older than the model"):
        eval.main(command(english, one_process))
    os.utime(weights, (times.st_atime, times.st_mtime))


def test_compare_earlier_results_alone(one_process, english, tmp_path, capsys):
    folders = [one_process / "eval" / eval.model_name(english / m) for m in "ab"]
    before = json.loads((one_process / "eval/table.json").read_text())
    eval.main(["--compare", *map(str, folders), "--resamples", "200", "--out", str(tmp_path)])
    table = json.loads((tmp_path / "eval/compare.json").read_text())
    assert table["compare"]["sets"].keys() == {"sni", "gsm8k", "all"}
    assert table["compare"]["sets"]["sni"]["difference"] == before["compare"]["sets"]["sni"]["difference"]
    assert f"{folders[1]} minus {folders[0]}, 200 resamples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--model and --data go together"),
        (["--model", "m"], "--model and --data go together"),
        (["--compare", "a", "b", "--distance", "t"], "--distance needs"),
        (["--compare", "/nowhere", "b"], "no folder of response files"),
        (["--model", "m", "--data", "dolly", "dolly"], "--data is dolly dolly"),
        (["--model", "m", "--data", "dolly", "--seeds", "1", "1"], "--seeds is 1 1"),
        (["--model", "m", "--data", "dolly", "--no-repeat-ngram-size", "1"], "--no-repeat-ngram-size is 1"),
        (["--model", "m", "--data", "dolly", "--top-p", "0"], "--top-p is 0"),
        (["--model", "m", "--data", "nothing"], "unknown data set 'nothing'"),
    ],
)
def test_bad_flags_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        eval.main(argv)


def test_a_context_too_short_is_refused(english, tmp_path):
    with pytest.raises(UserError, match="leave no room for a prompt"):
        eval.main(command(english, tmp_path, "--max-new-tokens", 1024))


def test_a_scorer_that_is_not_installed(monkeypatch):
    """Otherwise every check would fail, and every answer be wrong."""
    monkeypatch.setattr(scores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="math-verify is not installed"):
        scores.check_installed("math")


def test_seeds_beyond_an_integer():
    with pytest.raises(UserError, match="--seed and --seeds is 18446744073709551616, on the command line"):
        eval.parse_args(["--model", "m", "--data", "d", "--seeds", str(2**64)])
