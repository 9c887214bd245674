"""tools/explain.py: what the tour prints is what is in the shards, and its DPO terms are those of a slow twin."""

import math
import re
import shutil
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from test_decode import slow_score
from transformers import AutoModelForCausalLM

import warmup_distill
from lib import runs
from lib.runs import UserError
from tools import explain, report

PROMPT, REJECTED, CHOSEN = [1, 9, 6, 18], [7, 14, 5, 17, 8, 2], [7, 14, 5, 9, 2]
LOG_Q, LOG_P = [-0.1, -0.2, -0.3, -0.1, -0.5, -0.01], [-0.1, -1.2, -0.2, -6.0, -5.5, -0.02]


def record(prompt_id=0, sample_id=0, **changes):
    """A line of OUT/pairs/NNNNN.jsonl: t* = 3, y- `4+2=5<eos>`, y+ `4+26<eos>`."""
    lists = {"prompt_ids": PROMPT, "response_ids": REJECTED, "chosen_ids": CHOSEN}
    lists |= {"student_logprobs": LOG_Q, "teacher_logprobs": LOG_P, "chosen_teacher_logprobs": [-0.1] * 5}
    names = {"prompt_id": prompt_id, "sample_id": sample_id, "status": "kept", "t_star": 3, "prefix_len": 3}
    return {**names, **lists, "prompt": "<bos>52:", "ended": True, "chosen_ended": True, **changes}


@pytest.fixture
def run(tmp_path, pair_of_models, tokenizer, capsys):
    """run(records of shard 0, of shard 1 ..., trained, flags, prompt_id, sample_id) -> the lines of the tour."""

    def tour(*shards, trained=True, flags=(), prompt_id=0, sample_id=None):
        out = tmp_path / "out"
        (out / "pairs").mkdir(parents=True, exist_ok=True)
        for k, records in enumerate(shards):
            runs.write_jsonl(out / "pairs" / f"{k:05d}.jsonl", records, "key")
        if trained:
            make_model("llama", 9, tie_word_embeddings=True).save_pretrained(out / "student")
        models = [word for name, path in pair_of_models.items() for word in (f"--{name}", path)]
        args = warmup_distill.parse_args([*models, "--data", "none.jsonl", "--out", str(out), *flags])
        inputs = {args.student: runs.fingerprint(args.student)}
        runs.write_json(out / "args.json", {"args": vars(args), "key": "key", "inputs": inputs})
        explain.explain(out, prompt_id, sample_id)
        return capsys.readouterr().out.splitlines()

    return tour


def numbers(lines, label):
    """The numbers of the one line that begins with the label."""
    [line] = [line for line in lines if line.startswith(label)]
    return [float(word) for word in line[len(label) :].split()]


# ---------------------------------------------------------------------------------------------------------------------
# The tour
# ---------------------------------------------------------------------------------------------------------------------


def test_steps_1_to_3(run):
    lines = run([record(), record(sample_id=1, status="untouched", t_star=-1, prefix_len=6, chosen_ids=REJECTED)])
    assert any(line.split()[:4] == ["0", "kept", "3", "6"] for line in lines)
    assert any(line.split()[:4] == ["1", "untouched", "-", "6"] for line in lines)
    [mark] = [line for line in lines if line.endswith("<- t*")]
    assert mark.split() == ["3", "'='", "-0.1000", "-6.0000", "5.9000", "<-", "t*"]
    assert sum("above eta, not the first" in line for line in lines) == 1  # m_4 = 5.0
    expected = """text              '<bos>52:'
ids               1 9 6 18
t* = min { t : m_t > eta } = 3:  m_3 = -0.1000 - (-6.0000) = 5.9000 > 4.0 = eta
before it  max m_t = 1.0000 <= 4.0 = eta
kept y_<3         '3+1'
replaced y_3      '='
student's rest    '4<eos>'
teacher from 3    '5<eos>'
tokens            [ 4 + 3 | 2 | 3 ] = 12
position ids      [ 0 to 6 | from 7 | 7 again ]; rejected does not see chosen
two rows          (4 + 5) + (4 + 6) = 19; saved 7, 37%"""
    assert set(expected.splitlines()) <= set(lines)
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("average, reference, eps", [*product([False, True], ["student", "teacher"], [0.0, 0.2])])
def test_dpo_terms(run, pair_of_models, tmp_path, average, reference, eps):
    """Plain and exact agree, and are those of a whole forward for each response, in float64."""
    flags = ["--beta", "0.5", "--reference", reference, "--logprobs", "mean" if average else "sum"]
    lines = run([record()], flags=[*flags, "--label-smoothing", str(eps)])
    policy, ref = [], []
    for path, logps in ((tmp_path / "out" / "student", policy), (pair_of_models[reference], ref)):
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        of_tokens = [slow_score(lm, PROMPT, response) for response in (CHOSEN, REJECTED)]
        logps += [(x.mean() if average else x.sum()).item() for x in of_tokens]
    z = 0.5 * ((policy[0] - ref[0]) - (policy[1] - ref[1]))
    sigma = 1 / (1 + math.exp(-z))
    names = ("log pi(y+ | x)", "log pi(y- | x)", "log pi_ref(y+ | x)", "log pi_ref(y- | x)")
    for name, value in zip(names, [*policy, *ref]):
        plain, exact, _ = numbers(lines, name)
        assert plain == pytest.approx(value, abs=2e-5)
        assert (exact == pytest.approx(value, abs=2e-5)) == average  # a sum leaves the shared prefix out
    loss = -(1 - eps) * math.log(sigma) - eps * math.log(1 - sigma)
    titles = ("L = -0.8 log sigma(z) - 0.2 log sigma(-z)", "weight: sigma(-z) - 0.2")
    titles = titles if eps else ("L = -log sigma(z)", "weight of the gradient: sigma(-z)")
    values = (z / 0.5, z, sigma, loss, 1 - sigma - eps)
    for name, value in zip(("D+ - D-", "z = beta (D+ - D-)", "sigma(z)", *titles), values):
        plain, exact, difference = numbers(lines, name)
        assert plain == pytest.approx(value, abs=5e-5) and exact == pytest.approx(value, abs=5e-5)
        assert abs(difference) < 2e-5
    assert any(line.startswith("difference") and "rounding of float32" in line for line in lines)
    filled = [line.split()[-1] for line in lines if re.match("(plain|exact)  +z = ", line)]
    assert len(filled) == 2 and all(float(value) == pytest.approx(z, abs=5e-5) for value in filled)


def test_before_training_the_loss_is_ln_2(run, monkeypatch):
    """If the two ways ever differed, the tour would not call it rounding."""
    lines = run([record()], trained=False)
    assert numbers(lines, "L = -log sigma(z)")[:2] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert any("not trained yet" in line for line in lines)
    real = explain.dpo.response_logps
    monkeypatch.setattr(explain.dpo, "response_logps", lambda *a: tuple(x * k for x, k in zip(real(*a), (1.5, 1))))
    assert any("MORE THAN ROUNDING" in line for line in run([record()]))


def test_replace_after_and_a_teacher_that_agrees_for_a_while(run):
    """prefix_len 4 keeps the mismatched token; the teacher writes one of the student's again: 5 are shared. eta and beta
    are those of OUT/args.json."""
    chosen = [*REJECTED[:5], 9, 2]
    lines = run([record(prefix_len=4, chosen_ids=chosen)], flags=["--eta", "5.5", "--beta", "0.25"])
    text = "\n".join(lines)
    assert "settings          eta 5.5, beta 0.25, N 8, reference: the student" in lines and "> 5.5 = eta" in text
    assert "kept y_<4         '3+1='" in text and "replaced" not in text
    assert "[ 4 + 5 | 2 | 1 ]" in text and "wrote 1 of the student's tokens from 4 on again" in text


def test_a_sample_without_a_pair_has_no_dpo_terms(run):
    for changes, last in (({"t_star": -1}, "stays untouched"), ({"chosen_ids": REJECTED}, "no pair")):
        lines = run([record(**changes, status="untouched")])
        assert lines[-1].endswith(last) and not any("align" in line for line in lines)


def test_which_sample(run):
    """The first kept one, or the one that is asked for."""
    samples = [record(sample_id=0, status="duplicate"), record(sample_id=1), record(sample_id=2)]
    assert any(line.startswith("2. check   sample 1:") for line in run(samples))
    lines = run(samples, sample_id=0)
    assert any(line.startswith("2. check   sample 0:") for line in lines)
    assert "status            duplicate: not a pair of the run" in lines
    with pytest.raises(UserError, match=r"no sample 7, of prompt 0, give one of 0 to 2"):
        run(samples, sample_id=7)


def test_long_responses_are_folded(run):
    """400 tokens, t* at 200: some rows at both ends and around it, the rest in two lines that say what they hide."""
    long = {"response_ids": [7] * 399 + [2], "student_logprobs": [-0.1] * 400, "t_star": 200, "prefix_len": 200}
    margins = [0.25 if t == 100 else 9.0 if t in (200, 300) else 0.0 for t in range(400)]
    long |= {"teacher_logprobs": [-0.1 - m for m in margins], "chosen_ids": [7] * 200 + [8] * 180 + [2]}
    lines = run([record(**long)])
    folds = [line.strip() for line in lines if line.strip().startswith("... ")]
    assert folds == [
        "... 193 tokens, margins at most 0.2500 ...",
        "... 192 tokens, margins at most 9.0000, 1 above eta ...",
    ]
    assert len(lines) < 100 and max(map(len, lines)) <= 100


# ---------------------------------------------------------------------------------------------------------------------
# Why t* is where it is
# ---------------------------------------------------------------------------------------------------------------------


def test_verdict_when_the_code_or_eta_has_changed():
    """The formula is printed only where it holds for the stored t* and the rule as it is now agrees."""
    assert explain.verdict(record(), 4.0)[-1].startswith("t* = min { t : m_t > eta } = 3:")
    quiet = explain.verdict(record(t_star=-1), 6.0)
    assert quiet == ["max m_t = m_3 = 5.9000 <= 6.0 = eta: no mismatch, y stays untouched"]
    changed = "first_mismatch as it is now finds t* = 3, not 1: the code has changed since"
    found = explain.verdict(record(t_star=1), 4.0)
    assert found == ["t* = 1 was found by the rule of first_mismatch; the margin at t* is 1.0000, eta is 4.0", changed]
    missed = explain.verdict(record(t_star=-1), 4.0)
    assert "finds t* = 3, not -1" in missed[1] and missed[-1] == "no mismatch, y stays untouched"
    assert explain.verdict(record(), 5.9)[-1].startswith("(or it is rounding: a margin is within 0.0001 nats of eta")


def test_verdict_of_another_rule(monkeypatch):
    """A rule on the teacher alone, log p < -eta: its t* is believed, and margins do not explain it."""

    def rule(student_logprobs, teacher_logprobs, mask, eta):
        mismatch = (teacher_logprobs < -eta) & mask
        return torch.where(mismatch.any(-1), mismatch.int().argmax(-1), -1)

    monkeypatch.setattr(warmup_distill, "first_mismatch", rule)
    [line] = explain.verdict(record(t_star=1), 1.1)  # log p = -1.2, a margin of 1.0
    assert line == "t* = 1 was found by the rule of first_mismatch; the margin at t* is 1.0000, eta is 1.1"


# ---------------------------------------------------------------------------------------------------------------------
# What is not there
# ---------------------------------------------------------------------------------------------------------------------


def test_errors(run):
    shards = [record(prompt_id=k) for k in (0, 1, 2)], [record(prompt_id=4), record(prompt_id=7)]
    with pytest.raises(UserError, match="no samples to explain.*give the OUT of warmup_distill.py"):
        run()
    with pytest.raises(UserError, match="no prompt 5, or not yet; it has 0 to 2, 4, 7"):
        run(*shards, prompt_id=5)
    assert explain.spans(list(range(0, 100, 2))) == "0, 2, 4, 6, ..., 94, 96, 98"


def test_no_shard_is_read_beyond_the_prompt(run, tmp_path):
    run([record(prompt_id=0), record(prompt_id=1)])
    (tmp_path / "out" / "pairs" / "00001.jsonl").write_text("not JSON")
    run(prompt_id=1)
    with pytest.raises(UserError, match="not JSON"):
        run(prompt_id=2)


# ---------------------------------------------------------------------------------------------------------------------
# Text for a terminal
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE = "a\x1b[31mred\r\n\x07\u202eevil\u200f\u2066\x9b2J שלום عربي \ud800'\"\\"


def test_hostile_text_does_nothing():
    text = explain.safe(HOSTILE)
    assert all(c.isprintable() for c in text) and not set("\x1b\n\r\u202e\u200f\x9bשع") & set(text)
    assert explain.safe("漢字 é 👍") == "'漢字 é 👍'"  # what does no harm stays readable


def test_hostile_tokens_do_nothing(capsys):
    """A tokenizer that decodes to control characters and to parts of characters."""

    texts = {0: "\x1b[2J", 1: "\ufffd", 2: "\u202e", 3: "x"}
    decode = lambda ids: "".join(texts[i] for i in ids)
    tokenizer = SimpleNamespace(decode=decode, convert_ids_to_tokens=lambda token_id: "<0xE6>\x1b")
    responses = {"response_ids": [0, 1, 2, 3], "student_logprobs": [0.0] * 4, "teacher_logprobs": [0.0, 0.0, -9.0, 0.0]}
    sample = record(t_star=2, prefix_len=2, chosen_ids=[0, 1, 3], prompt_ids=[0, 2], **responses)
    explain.explain_prompt([sample], tokenizer)
    explain.explain_check(sample, 4.0, tokenizer)
    explain.explain_splice(sample, tokenizer)
    out = capsys.readouterr().out
    assert r"'\x1b[2J'" in out and r"'<0xE6>\x1b'" in out and r"'\u202e'" in out
    assert all(c.isprintable() or c == "\n" for c in out)


def test_width_counts_columns_not_characters(capsys):
    assert explain.columns("漢字") == 4 and explain.columns("e\u0301") == 1
    assert explain.fit("漢" * 20, 10) == "漢漢漢... " and explain.fit("ab", 4) == "ab  "
    explain.show("label", "漢" * 100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(explain.columns, lines)) <= explain.WIDTH
    explain.show("label", "x" * 100_000)
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 10 and "characters ..." in out


def test_no_code_of_a_model_is_run(run, tmp_path, pair_of_models):
    """Not even where the run itself was allowed to: only the command line of this start could say so."""
    folder = shutil.copytree(pair_of_models["student"], tmp_path / "remote")
    config = runs.read_json(folder / "config.json")
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    runs.write_json(folder / "config.json", config)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise RuntimeError\n")
    with pytest.raises(UserError, match="no .* can be loaded"):
        run([record()], trained=False, flags=["--student", str(folder), "--trust-remote-code"])
    report.load_tokenizer(tmp_path / "out")
    assert not (tmp_path / "ran").exists()
