"""lib/scoring.py and lib/benchmarks.py: scores counted by hand, the bootstrap, each set in its real format, traps."""

import json
import os
import time

import pytest
import torch
from conftest import launch
from test_data import byte_tokenizer

from lib import benchmarks, data, scoring
from lib.runs import UserError

# ---------------------------------------------------------------------------------------------------------------------
# One response
# ---------------------------------------------------------------------------------------------------------------------

# response, references, F = 2PR/(P+R) by hand, with P = LCS/words of the response and R = LCS/words of the reference
ROUGE = [
    # LCS "the cat on the mat" = 5 of 6 and 6 words: P = R = 5/6
    ("the cat sat on the mat", ["the cat was on the mat"], 5 / 6),
    # LCS "a b" = 2 of 3 and 4 words: P = 2/3, R = 1/2, F = 2 * 1/3 / (7/6) = 4/7
    ("a b c", ["a x b y"], 4 / 7),
    # The order counts: LCS "police kill" = 2 of 4 and 4 words
    ("gunman the police kill", ["police kill the gunman"], 1 / 2),
    # The stemmer takes "killed" and "kills" to "kill": all 4 words. Without it the LCS is 3: 3/4
    ("police killed the gunman", ["police kills the gunman"], 1.0),
    ("Yes, it IS!", ["yes it is"], 1.0),  # case and punctuation do not count
    ("", ["yes it is"], 0.0),
    # The best reference counts: against "a b c d" F is 2 * 2/4 * 1 / (6/4) = 2/3, against "x" 0, against "a b" 1
    ("a b", ["x", "a b c d"], 2 / 3),
    ("a b", ["a b c d", "x", "a b"], 1.0),
]


def test_rouge_l():
    for response, references, expected in ROUGE:
        assert scoring.score_response(response, references, "rouge", None) == (pytest.approx(100 * expected), False)


# response, gold, whether math-verify calls it right, whether the cheap check does
ANSWERS = [
    ("#### 18", "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", True, True),
    ("The answer is 18.0", "#### 18", True, True),
    ("It costs \\$18.", "#### 18", True, True),
    ("\\boxed{17} no: \\boxed{18}", "#### 18", True, True),
    ("$\\boxed{1{,}000}$", "#### 1,000", True, True),
    ("10,\\!080", "\\boxed{10080}", True, True),
    ("The answer is $\\frac{1}{2}$.", "\\boxed{0.5}", True, True),
    ("\\boxed{-\\frac12}", "\\boxed{0.5}", False, False),
    ("\\boxed{3\\frac12}", "\\boxed{0.5}", False, False),
    ("\\boxed{3\\sqrt{2}}", "\\boxed{\\sqrt{18}}", True, False),  # the cheap check knows numbers only
    ("\\boxed{\\left[0,1\\right)}", "\\boxed{[0, 1)}", True, None),
    ("\\boxed{\\{1,2\\}}", "\\boxed{\\left\\{2,1\\right\\}}", True, False),
    ("\\boxed{\\text{even}}", "it is \\boxed{\\text{even}}.", True, False),
    ("\\boxed 5", "\\boxed{5}", True, True),
    ("#### -5", "10-15=-5\n#### -5", True, True),
    ("10-5", "#### -5", False, False),
    ("#### 18\nand not 19", "#### 19", False, False),
    ("", "#### 18", False, False),
    ("####", "#### 18", False, False),
    ("\\boxed{18", "#### 18", False, False),  # cut before the answer was complete
    ("9+7+0=16;9+7+1=17;1+8+1=10=1075", "9+7+0=16;9+7+1=17;1+8+1=10=1076", False, False),
]


def test_is_correct():
    for response, gold, _, cheap in ANSWERS:
        assert cheap is None or scoring.is_correct(response, gold) is cheap, (response, gold)


def test_math_verify_on_the_same_answers():
    """9^9^9^9 is a real hang: Python computes the power in one operation, which no alarm signal interrupts."""
    checker = scoring.AnswerChecker(seconds=20)
    for response, gold, expected, _ in ANSWERS:
        assert checker(response, gold) is expected, (response, gold)
    checker.seconds = 1
    assert checker("\\boxed{9^{9^{9^{9}}}}", "#### 18") is None and checker.process is None
    checker.close()


NUMBERS = [("1,000", 1000), ("= 18.0", 18), ("$18", 18), ("#### 18", 18), ("-3", -3), ("5-3", 3), ("1/2", 0.5)]
NUMBERS += [(".5", 0.5), ("1,2", 2), ("16=4^2", None), ("x_2", None), ("2\\pi", None), ("1/0", None), ("none", None)]
NUMBERS += [("", None), ("9" * 400, None), ("1/" + "1" * 5000, None)]  # a looping model: no answer, and no exception


def test_final_number():
    for text, number in NUMBERS:
        assert scoring.final_number(text) == number, text


ENDS = {"hang": (time.sleep, 600), "crash": (os.abort,), "raise": (int, "x"), "memory": (bytearray, 1 << 40)}


def misbehave(response, gold):
    """Stands in for math-verify in the checker's process: does what the response says."""
    if response in ENDS:
        function, *args = ENDS[response]
        function(*args)
    return response == gold


def test_a_hung_or_crashing_check_costs_one_example():
    """Every other example of the run is scored, and the four that failed are told from the one that is wrong."""
    checker = scoring.AnswerChecker(misbehave, seconds=1)
    texts = ["yes", "hang", "yes", "crash", "raise", "memory", "no", "yes"]
    verdicts = [scoring.score_response(text, ["yes"], "math", checker) for text in texts]
    checker.close()
    right, wrong, failed = (100, False), (0, False), (0, True)
    assert verdicts == [right, failed, right, failed, failed, failed, wrong, right]


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
    found = scoring.paired_bootstrap(differences, 50, 5)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_bootstrap_does_not_depend_on_its_chunks():
    """2^22 draws at a time: 70 resamples of 100,000 examples come in two chunks, and begin like 30 of them."""
    differences = torch.arange(100_000.0)
    assert torch.equal(scoring.paired_bootstrap(differences, 70, 1)[:30], scoring.paired_bootstrap(differences, 30, 1))


def test_interval_of_equal_differences():
    for value, share in ((2.5, 1.0), (0.0, 0.5), (-1.0, 0.0)):
        found = scoring.interval(value, scoring.paired_bootstrap(torch.full((20,), value), 1000, 0))
        assert found == {"difference": value, "low": value, "high": value, "share": share}


def results(values, name="set"):
    """{set: {seed: rows}} from a list of scores for each seed."""
    rows = lambda scores: [{"prompt_id": k, "score": score} for k, score in enumerate(scores)]
    return {name: {seed: rows(scores) for seed, scores in values.items()}}


def test_compare_pairs_examples_and_averages_over_seeds():
    """Example scores of A: (10, 40), of B: (30, 40): differences 20 and 0."""
    a, b = results({10: [0, 40], 20: [20, 40]}), results({10: [30, 30], 20: [30, 50]})
    found = scoring.compare(a, b, 2000, 0)["set"]
    assert (found["difference"], found["low"], found["high"], found["examples"]) == (10, 0, 20, 2)
    assert found["share"] == pytest.approx(3 / 4 + 1 / 8, abs=0.03)  # (0, 0) is drawn in 1 of 4 and is a tie


def test_compare_over_all_sets():
    """Sets weigh alike: 2 examples that gain 3 and 100 that lose 1 are +1. They are drawn independently: opposite
    differences at the same places would otherwise cancel in every resample."""
    a, b = (results({1: [x] * 2}) | results({1: [y] * 100}, name="big") for x, y in ((0, 0), (3, -1)))
    found = scoring.compare(a, b, 100, 0)
    assert found["all"] == {"examples": 102, "difference": 1, "low": 1, "high": 1, "share": 1}
    a = results({1: [0] * 50}) | results({1: [0] * 50}, name="other")
    b = results({1: [-2, 2] * 25}) | results({1: [2, -2] * 25}, name="other")
    found = scoring.compare(a, b, 1000, 0)["all"]
    assert found["high"] - found["low"] > 0.5


def test_compare_without_a_common_example():
    """Each model's tokenizer has left out the other's prompts."""
    a, b = ({"set": {1: [{"prompt_id": k, "score": 0}]}} for k in range(2))
    with pytest.raises(UserError, match="no prompt of set fits both models, in --compare, raise"):
        scoring.compare(a, b, 10, 0)


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
SETS = {
    "dolly": [minillm_row("Say hi", "hi"), minillm_row("Add", "It is 3.", "1 and 2")],
    "selfinst": [minillm_row("Name a fruit", "apple", topic="food")],
    "vicuna": [minillm_row("How are you?", ["fine", "well"], category="generic")],
    "sni": [minillm_row("Classify", ["it is good", "it is very good"], "nice day"), minillm_row("Sum", ["a b"], "a")],
    "unni": [minillm_row("Write", "a poem", "about cats")],
    "gsm8k": GSM8K_ROWS,
    "math": [{"problem": "Simplify $\\sqrt{18}$.", "solution": "$\\boxed{3\\sqrt{2}}$", "level": "Level 1"}],
}


def load(path, rows, name="dolly"):
    """The examples of rows in a file, as JSON Lines or, if its name says so, as a JSON list."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return benchmarks.load(benchmarks.find(f"{name}={path}", None))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_each_set_in_its_format(name, ending, tmp_path):
    examples = load(tmp_path / f"file.{ending}", SETS[name], name)
    for row, example in zip(SETS[name], examples, strict=True):
        gold = row.get("output") or row.get("answer") or row.get("solution")
        assert example["response"] == (gold if isinstance(gold, list) else [gold])
        assert example["instruction"] == (row.get("instruction") or row.get("question") or row.get("problem"))
        assert example["input"] == row.get("input", "")


def test_only_a_part_of_a_set_counts(tmp_path):
    """Of UnNI, as in MiniLLM."""
    assert len(load(tmp_path / "valid.jsonl", [SETS["unni"][0]] * 10_003, "unni")) == 10_000


GOOD = minillm_row("Say hi", "hi")
BAD = [
    ([{"text": "Say hi", "output": "hi"}], "no prompt column"),
    ([{"instruction": "Say hi"}], "no text and no list of texts, .* give a column references or output"),
    ([GOOD, {**GOOD, "output": None}], "no text and no list of texts, in .* row 1"),
    ([GOOD, {**GOOD, "output": []}], "references missing.* row 1"),
    ([GOOD, {**GOOD, "instruction": " "}], "column instruction is empty.* row 1"),
    ([{**GOOD, "instruction": 7}], "column instruction is int"),
]


@pytest.mark.parametrize("rows, message", BAD, ids=[message for _, message in BAD])
def test_bad_data_is_refused(rows, message, tmp_path):
    """No rows, or rows that are no objects: tests/test_errors.py."""
    with pytest.raises(UserError, match=message):
        load(tmp_path / "valid.jsonl", rows)
    with pytest.raises(UserError, match="references missing"):  # a gold response without an answer
        load(tmp_path / "test.jsonl", [{"question": "How many?", "answer": "Many.\n#### "}], "gsm8k")


def test_names_and_files(tmp_path):
    """What has no name in the table, or a name that is no name, is in test_errors.py."""
    load(path := tmp_path / "mine.jsonl", [GOOD])
    assert benchmarks.find(str(path), "rouge") == benchmarks.Benchmark("mine", "rouge", path=str(path))
    assert benchmarks.find(f"other={path}", "math") == benchmarks.Benchmark("other", "math", path=str(path))
    assert benchmarks.find(f"gsm8k={path}", "rouge").metric == "math"


@pytest.mark.parametrize("name", ["dolly", "gsm8k"])
def test_no_network_is_one_line(name, pair_of_models, tmp_path):
    """What a user without network sees, from the command itself; nothing is written."""
    env = {"HF_HOME": str(tmp_path / "hub")}
    done = launch(0, "eval.py", "--model", pair_of_models["student"], "--data", name, cwd=tmp_path, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and f"give --data {name}=FILE" in done.stderr
    assert not (tmp_path / "out").exists()


def test_which_template_a_model_sees(tmp_path):
    """As in training; a prompt that is in Alpaca's template already, and without its instruction, as it is."""
    plain = byte_tokenizer(False)
    chat = byte_tokenizer(False, "{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    alpaca = data.ALPACA_INPUT.format(instruction="Add", input="1 and 2")
    examples = load(tmp_path / "dolly.jsonl", [minillm_row("Add", "3", "1 and 2")])
    text = lambda *args: benchmarks.encode(*args, 1024)[0][0]["text"]
    assert text(examples, plain, "auto") == text(examples, chat, "alpaca") == alpaca
    assert text(examples, chat, "auto") == text(examples, chat, "chat") == "<Add\n\n1 and 2>"
    bare = load(tmp_path / "bare.jsonl", [{"prompt": alpaca.replace("\n", "<n>"), "output": "3"}])
    assert text(bare, chat, "auto") == text(bare, plain, "alpaca") == alpaca
    question = load(tmp_path / "gsm8k.jsonl", GSM8K_ROWS, "gsm8k")
    assert text(question, plain, "auto") == data.ALPACA.format(instruction=GSM8K_ROWS[0]["question"])
    assert text(question, chat, "auto") == f"<{GSM8K_ROWS[0]['question']}>"
