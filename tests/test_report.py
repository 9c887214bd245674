"""tools/report.py: what the page embeds is what the files say, nothing in it is markup, and bad input is one line.

The page's script is tested in a browser by tests/optional/test_report_browser.py; here the page is parsed, not drawn.
"""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser

import pytest

from lib import data, runs
from lib.runs import UserError
from tools import report

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=alert(1)><!--",
    "<!--<script>",
    "\"quotes' and `ticks` & &lt;entities&gt; \\u003c {{DATA}} {{TITLE}}",
    "emoji 👩‍👩‍👧 🦜, Arabic مرحبا بالعالم, override \u202eabc\u202c, zero\u200bwidth",
    "line \u2028 and paragraph \u2029 separators, NUL \x00, bell \x07, lone \ud800 surrogates \udfff",
]


def sample(prompt_id=0, sample_id=0, status="kept", t=2, **more):
    """A record as build_samples writes it: five tokens, the third is replaced."""
    teacher = [-0.15, -0.1, -6.0, -0.5, -0.0001]
    record = {"prompt_id": prompt_id, "sample_id": sample_id, "status": status, "t_star": t, "ended": True}
    record |= {"prompt": f"prompt {prompt_id}", "prompt_ids": [1, 5], "chosen_ended": True}
    record |= {"response_ids": [5, 6, 7, 8, 2], "student_logprobs": [-0.1, -0.2, -0.3, -0.4, 0.0]}
    record |= {"prefix_len": 5, "teacher_logprobs": teacher, "chosen_ids": [5, 6, 7, 8, 2]}
    record |= {"chosen_teacher_logprobs": teacher}
    if t >= 0:
        record |= {"prefix_len": t, "chosen_ids": [5, 6, 9, 2], "chosen_teacher_logprobs": [-0.15, -0.1, -0.25, -0.01]}
    return {**record, **more}


RATES = {"10.0": {"samples": 0.0, "tokens": 0.0}, "4.0": {"samples": 0.75, "tokens": 0.15}}
MISMATCH = {"eta": 4.0, "prompts": 3, "tokens": 20, "samples": 4, "untouched": 1}
MISMATCH |= {"replaced": 3, "pairs": 2, "dropped": {"identical": 1, "duplicate": 0, "filtered": 0}}
MISMATCH |= {"at_length_limit": 0, "chosen_at_length_limit": 0, "replacement_rate": RATES}
MISMATCH |= {"margin_histogram": {"edges": [-1.0, 0.0, 1.0], "counts": [0, 7, 10, 3]}}
MISMATCH |= {"t_star_histogram": {"10": 1, "2": 2}}
STEPS = [
    {"stage": "dpo", "step": k, "loss": 0.7 / k, "dpo_loss": 0.7 / k, "margin": float(k), "wins": 1.0, "lr": 1e-6}
    for k in (1, 2, 3)
]


@pytest.fixture
def make_run(tmp_path, tokenizer):
    """(name, records, files) -> the folder of a run with a tokenizer; files: name -> JSON value, a list for .jsonl."""

    def make(name="run", records=(), files=None, with_tokenizer=True):
        out = tmp_path / name
        (out / "pairs").mkdir(parents=True)
        args = {"teacher": "T", "student": "missing/student", "data": "D", "eta": 4.0, "seed": 0}
        runs.write_json(out / "args.json", {"args": args, "versions": {"torch": "2"}, "commit": "abc"})
        if with_tokenizer:
            tokenizer.save_pretrained(out / "student")
        for first in range(0, len(records), 1000):
            path = out / "pairs" / f"{first // 1000:05d}.jsonl"
            # ASCII: a lone surrogate can be in a JSON file, but not in UTF-8
            path.write_text("".join(json.dumps(record) + "\n" for record in records[first : first + 1000]))
        for file, value in (files or {}).items():
            (out / file).parent.mkdir(exist_ok=True)
            (runs.write_jsonl if file.endswith("jsonl") else runs.write_json)(out / file, value)
        return out

    return make


class Page(HTMLParser):
    """Start tags with their attributes; the source, and what is embedded in it."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.source = [], path.read_bytes().decode("utf-8")
        self.feed(self.source)
        self.close()
        self.embedded = self.source.split('id="data">')[1].split("</script>")[0]
        self.data = json.loads(self.embedded)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def page_of(*outs, **options):
    return Page(report.write_report(*outs, **options))


def columns(page):
    return page.data["runs"][0]["samples"]


# ---------------------------------------------------------------------------------------------------------------------
# What is embedded
# ---------------------------------------------------------------------------------------------------------------------


def test_samples_are_the_records(make_run, tokenizer):
    records = [sample(0, 0), sample(0, 1, "untouched", -1), sample(4, 0, "duplicate", ended=False)]
    samples = columns(page_of(make_run(records=records)))
    assert [samples["statuses"][k] for k in samples["status"]] == ["kept", "untouched", "duplicate"]
    assert samples["prompts"] == [[0, "prompt 0"], [4, "prompt 4"]]
    assert [samples["prompts"][k][0] for k in samples["prompt"]] == [0, 0, 4]
    assert samples["sample"] == [0, 1, 0]
    assert samples["t"] == [2, -1, 2] and samples["ends"] == [3, 3, 2]
    assert samples["margin"] == [57000, None, 57000]  # (-0.3 + 6.0) nats
    assert samples["top"] == [57000, 57000, 57000]
    # The five fields of a sample, as the page's script takes them apart
    fields = [[int(word) for word in field.split()] for field in samples["tokens"][0].split(";")]
    response, student, teacher, chosen, chosen_logprobs = fields
    ids = samples["ids"]
    assert [ids[k] for k in response] == records[0]["response_ids"]
    assert student == [-1000, -2000, -3000, -4000, 0] and teacher == [-1500, -1000, -60000, -5000, -1]
    assert [ids[k] for k in chosen] == [9, 2] and chosen_logprobs == [-2500, -100]  # after the shared prefix
    assert samples["vocabulary"] == [tokenizer.decode([token]) for token in ids]


def test_curves_mismatch_and_results(make_run):
    scores = {"metric": "math", "mean": 50.0, "std": None, "seeds": {"10": 50.0}, "examples": 4, "unfinished": 0.25}
    all_sets = {"difference": 1.0, "low": -1.0, "high": 3.0, "share": 0.8, "examples": 4}
    table = {"models": {"m/<b>": {"average": 50.0, "sets": {"gsm8k": scores}}}}
    table["compare"] = {"a": "m", "b": "n", "resamples": 10, "sets": {"all": all_sets}}
    summary = {"student before": {"accuracy": 0.4}, "student after": {"accuracy": 0.5}}
    files = {"mismatch.json": MISMATCH, "metrics.jsonl": STEPS, "summary.json": summary, "eval/table.json": table}
    run = page_of(make_run(records=[sample()], files=files)).data["runs"][0]
    assert run["eta"] == 4.0
    assert run["mismatch"]["rates"] == [[4.0, 0.75, 0.15], [10.0, 0.0, 0.0]]
    assert run["mismatch"]["t_star"] == [[2, 2], [10, 1]]  # sorted as numbers
    assert run["mismatch"]["margins"] == {"edges": [-1.0, 0.0, 1.0], "counts": [0, 7, 10, 3]}
    columns = run["metrics"]["columns"]
    assert columns["step"] == [1, 2, 3] and columns["margin"] == [1.0, 2.0, 3.0]
    assert "dpo_loss" not in columns  # without NLL it is the loss
    assert run["summary"]["student after"]["accuracy"] == 0.5
    assert run["eval"][0]["rows"][0]["model"] == "m/<b>" and run["eval"][0]["rows"][0]["seeds"] == 1
    assert run["eval"][0]["pair"] == ["m", "n"] and run["eval"][0]["comparisons"][0]["high"] == 3.0


def test_long_runs_are_thinned_and_keep_their_last_step(make_run):
    steps = [{"stage": "dpo", "step": k + 1, "loss": float(k)} for k in range(5001)]
    metrics = page_of(make_run(files={"metrics.jsonl": steps})).data["runs"][0]["metrics"]
    steps, losses = metrics["columns"]["step"], metrics["columns"]["loss"]
    assert metrics["every"] == 3 and steps[:2] == [1, 4] and steps[-1] == 5001
    assert len(steps) == len(losses) <= report.MAX_STEPS


def test_numbers_that_json_has_not(make_run):
    """Infinite log-probs and losses: a gap in a curve, a margin the page writes as infinite; never invalid JSON."""
    minus = float("-inf")
    record = sample(teacher_logprobs=[-0.15, -0.1, minus, -0.5, 0.0])
    steps = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": float("inf"), "lr": 1.0}]
    run = page_of(make_run(records=[record], files={"metrics.jsonl": steps})).data["runs"][0]
    assert run["samples"]["margin"][0] > 9e4 * report.UNIT
    assert run["metrics"]["columns"] == {"step": [1, 2], "lr": [None, 1.0]}


def test_a_run_of_kd_has_no_pairs(make_run):
    steps = [{"stage": "kd", "step": 1, "loss": 0.1, "ce": 0.2, "kd": 0.3, "response_tokens": 9}]
    out = make_run(files={"metrics.jsonl": steps, "summary.json": {"student before": {}, "student after": {}}})
    (out / "pairs").rmdir()
    run = page_of(out).data["runs"][0]
    assert run["samples"] is None and run["mismatch"] is None and run["metrics"]["stage"] == "kd"
    assert run["metrics"]["columns"] == {"step": [1], "loss": [0.1], "ce": [0.2], "kd": [0.3]}


def test_three_runs(make_run):
    first, second = make_run("a", [sample()]), make_run("b", [sample(), sample(1)], {"metrics.jsonl": STEPS})
    page = page_of(first, second, make_run("c", files={"metrics.jsonl": STEPS}))
    found = [(run["name"], run["samples"] and len(run["samples"]["t"])) for run in page.data["runs"]]
    assert found == [("a", 1), ("b", 2), ("c", None)]
    assert (first / "report.html").exists() and not (second / "report.html").exists()
    panels = {panel["title"]: panel["lines"] for panel in page.data["panels"]}
    assert panels["Loss of DPO"] == [[1, "loss", 0, "loss"], [2, "loss", 0, "loss"]] and "Loss of KD" not in panels


def test_cap_of_samples_is_an_even_choice(make_run):
    records = [sample(i) for i in range(1500)]  # over two files
    samples = columns(page_of(make_run(records=records), max_samples=6))
    assert samples["total"] == 1500 and len(samples["tokens"]) == 6
    assert [samples["prompts"][k][0] for k in samples["prompt"]] == [0, 250, 500, 750, 1000, 1250]


# ---------------------------------------------------------------------------------------------------------------------
# Arms
# ---------------------------------------------------------------------------------------------------------------------


def set_args(folder, inputs=(), **args):
    """Writes FOLDER/args.json; inputs: paths as they are now."""
    record = {"args": args, "inputs": {str(path): runs.fingerprint(path) for path in inputs}}
    runs.write_json(folder / "args.json", record)


@pytest.fixture
def make_arm(make_run):
    """(name, accuracies of its seeds 0, 1, ...) -> folders; None: a run without a closing table."""

    def make(name, *accuracies):
        outs = []
        for seed, accuracy in enumerate(accuracies):
            outs.append(make_run(f"seed-{seed}/{name}", files={"metrics.jsonl": STEPS}))
            set_args(outs[-1], student="S", seed=seed)
            if accuracy is not None:
                summary = {"student before": {"accuracy": 0.1}, "student after": {"accuracy": accuracy}}
                runs.write_json(outs[-1] / "summary.json", summary)
        return outs

    return make


def test_arms_by_hand(make_arm):
    outs = [*make_arm("kd", 0.5, 0.54, 0.58, 0.9), *make_arm("warm", 0.6, 0.6, 0.66, None), *make_arm("one", 0.7)]
    base, warm, one = page_of(*outs).data["arms"]
    assert [row["arm"] for row in (base, warm, one)] == ["kd", "warm", "one"]
    assert {row["metric"] for row in (base, warm, one)} == {"closing table, accuracy"}
    assert base["values"] == [50.0, 54.0, 58.0, 90.0] and base["mean"] == 63.0
    assert base["sd"] == pytest.approx(1004**0.5 / 3**0.5, abs=1e-3)  # squares 169, 81, 25, 729
    assert (base["pairs"], base["difference"], base["half"]) == (0, None, None)
    # warm - kd: 10, 6, 8 for seeds 0, 1, 2: mean 8, standard deviation 2, 4.303 x 2 / sqrt(3)
    assert (warm["mean"], warm["pairs"], warm["difference"]) == (62.0, 3, 8.0)
    assert warm["sd"] == pytest.approx(12**0.5, abs=1e-4) and warm["half"] == pytest.approx(4.9687, abs=1e-3)
    # One seed: a difference, but no spread and no interval
    assert (one["mean"], one["sd"], one["pairs"], one["difference"], one["half"]) == (70.0, None, 1, 20.0, None)


@pytest.mark.parametrize("df", [1, 2, 5, 12, 29, 30, 60, 400])
def test_t_interval(df):
    """The half width, by the integral of Student's density, which is 0.95 between its ends."""
    values = [0.0] * df + [1.0]
    mean, sd, half = report.describe(values)
    assert mean == pytest.approx(1 / (df + 1), rel=1e-5) and sd == pytest.approx((df + 1) ** -0.5, rel=1e-5)
    t = half / sd * (df + 1) ** 0.5
    constant = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    step = t / 10_000
    middles = [(1 + ((k + 0.5) * step) ** 2 / df) ** (-(df + 1) / 2) for k in range(10_000)]
    assert 2 * constant * step * math.fsum(middles) == pytest.approx(0.95, abs=2e-4)


def test_what_is_too_little_for_statistics():
    assert report.describe([]) == report.describe([1.0, None]) == (None, None, None)
    assert report.describe([2.5]) == (2.5, None, None)


def test_one_seed_of_one_arm_twice(make_arm):
    outs = make_arm("kd", 0.5, 0.6)
    set_args(outs[1], student="S", seed=0)
    what = "two runs have the same name and the same seed, 0, in "
    assert error_of(*outs).startswith(what) and str(outs[1]) in error_of(*outs)
    assert error_of(outs[0], outs[0]).startswith(what)


def test_arms_without_a_score(make_arm):
    [row] = page_of(*make_arm("kd", None)).data["arms"]
    assert (row["metric"], row["values"], row["mean"]) == (None, [], None)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens spent, scores on the way
# ---------------------------------------------------------------------------------------------------------------------

KD_STEPS = [{"stage": "kd", "step": k, "loss": 0.1, "tokens": 100 * k, "response_tokens": 10} for k in (1, 2)]


def spent(out):
    return page_of(out).data["runs"][0]["spent"]


def test_spending_of_kd(make_run):
    """100 and 200 positions in two steps; what the teacher does depends on the flags."""
    out = make_run("kd", files={"metrics.jsonl": KD_STEPS})
    for flags, expected in (
        ({"kd_rate": 0.5}, [300, 300]),
        ({"kd_rate": 0.0}, [300, 0]),
        ({"kd_rate": 0.5, "teacher_cache": "cache"}, [300, None]),
        ({"kd_rate": 0.5, "mode": "student", "on_policy": 1.0}, [320, 300]),
        ({"kd_rate": 0.5, "mode": "student", "on_policy": 0.5}, [None, 300]),
        ({"kd_rate": 0.5, "mode": "teacher", "on_policy": 1.0}, [300, None]),
    ):
        set_args(out, student="S", seed=0, **flags)
        assert spent(out) == expected, flags
    columns = {"ids": ["int32"], "response": ["int32"]}  # 4 and 6 tokens, the last of which no one needs to read
    data.write_arrow(
        out / "examples.arrow", [{"ids": [1, 5], "response": [7, 2]}, {"ids": [1], "response": [5] * 5}], **columns
    )
    set_args(out, student="S", seed=0, kd_rate=0.5, teacher_cache="cache")
    assert spent(out) == [300, 8]
    set_args(out, student="S", seed=0, kd_rate=0.5, mode="teacher", on_policy=1.0)
    (out / "responses").mkdir()
    runs.write_jsonl(out / "responses" / "00000.jsonl", [{"response_ids": [5, 6, 2]}, {"response_ids": [2]}])
    assert spent(out) == [300, 304]
    (out / "responses").rename(out.parent / "shared")
    set_args(out, student="S", seed=0, kd_rate=0.5, mode="teacher", responses=str(out.parent / "shared"))
    assert spent(out) == [300, 304]
    runs.write_jsonl(out / "metrics.jsonl", [{"stage": "kd", "step": 1, "loss": 0.1}])
    assert spent(out) == [None, None]
    (out / "args.json").unlink()
    assert spent(out) == [None, None]


def test_spending_includes_the_run_before(make_run):
    """A warm-up, then KD; and DPO alone on the warm-up's pairs.

    Two samples of 5 tokens to one prompt of 2, of one the teacher writes 2 anew: 12 and 14; and 30 in DPO.
    """
    steps = [{"stage": "dpo", "step": 1, "loss": 0.1, "tokens": 30}]
    records = [sample(), sample(0, 1, "untouched", -1)]
    warmup = make_run("warmup", records, {"metrics.jsonl": steps, "pairs.jsonl": []})
    set_args(warmup, student="S", seed=0, samples=2)
    assert spent(warmup) == [42, 14]
    kd, student = make_run("kd", files={"metrics.jsonl": KD_STEPS}), str(warmup / "student")
    set_args(kd, [student], student=student, seed=0, kd_rate=0.5)
    assert spent(kd) == [342, 314]
    assert page_of(kd).data["runs"][0]["before"] == str(warmup)
    dpo, pairs = make_run("dpo", files={"metrics.jsonl": steps}), warmup / "pairs.jsonl"
    set_args(dpo, ["S", pairs], model="S", pairs=str(pairs), seed=0)
    assert spent(dpo) == [42, 14]
    set_args(dpo, [student, pairs], model=student, pairs=str(pairs), seed=0)  # a second time on the same pairs
    assert spent(dpo) == [72, 14]
    set_args(dpo, ["S", pairs], model="S", pairs=str(pairs), seed=0)
    (warmup / "student" / "tokenizer.json").write_text("{}")  # no longer what the run began with
    assert spent(kd) == [None, None]
    set_args(kd, student="gone/student", seed=0, kd_rate=0.5)
    assert spent(kd) == [None, None]
    (warmup / "pairs" / "00000.jsonl").unlink()
    assert spent(warmup) == [None, None]
    (warmup / "args.json").unlink()  # a model, not a run
    set_args(kd, student=student, seed=0, kd_rate=0.5)
    assert spent(kd) == [300, 300]
    pairs.write_text("{}\n")
    assert spent(dpo) == [None, None]


def test_a_run_that_begins_with_itself(make_run):
    out = make_run("kd", files={"metrics.jsonl": KD_STEPS})
    set_args(out, [out / "student"], student=str(out / "student"), seed=0, kd_rate=0.5)
    assert error_of(out).startswith("not a run of this project (RecursionError")


def table_of(scores):
    """{path of a model: score} -> eval.py's table.json with one set."""
    rest = {"metric": "math", "std": None, "seeds": {"10": 0}, "examples": 4, "unfinished": 0.0}
    return {"models": {str(path): {"sets": {"gsm8k": {"mean": score, **rest}}} for path, score in scores.items()}}


def test_scores_on_the_way(make_run):
    """Students of this run, by its folder now or as it was named; those of others are not drawn."""
    out = make_run("kd", files={"metrics.jsonl": KD_STEPS})
    set_args(out, student="S", out="once/kd", seed=0, kd_rate=0.5)
    scores = {out / "students/step-000001": 30.0, "once/kd/student": 40.0}
    scores |= {"other/kd/students/step-000001": 1.0, "S": 2.0, out / "students/step-1x": 3.0}
    (out / "eval").mkdir()
    runs.write_json(out / "eval" / "table.json", table_of(scores))
    page = page_of(out)
    columns = {"step": [1, 2], "student": [100, 300], "teacher": [100, 300], "gsm8k, accuracy": [30.0, 40.0]}
    assert page.data["runs"][0]["measured"]["columns"] == columns
    assert [(row["metric"], row["mean"]) for row in page.data["arms"]] == [("gsm8k, accuracy", 40.0)]
    drawn = [panel for panel in page.data["panels"] if panel["of"] == "measured"]
    assert [panel["x"] for panel in drawn] == ["step", "student", "teacher"]
    assert all(panel["lines"] == [[0, "gsm8k, accuracy", 0, ""]] for panel in drawn)
    runs.write_json(out / "eval" / "table.json", table_of({out / "students/step-000001": 30.0}))
    assert page_of(out).data["arms"][0]["metric"] is None  # that is not the trained student's score
    (out / "args.json").unlink()
    runs.write_json(out / "eval" / "table.json", table_of({"S": 2.0}))  # eval.py alone, of a model that no run made
    assert [(row["metric"], row["mean"]) for row in page_of(out).data["arms"]] == [("gsm8k, accuracy", 2.0)]


def test_many_runs_have_a_chart_for_each_quantity(make_arm):
    title = lambda outs: [panel["title"] for panel in page_of(*outs).data["panels"] if "Reward" in panel["title"]]
    outs = make_arm("kd", *[0.5] * 4)
    for out in outs:
        steps = [{**row, "chosen_reward": 1.0, "rejected_reward": 0.0} for row in STEPS]
        runs.write_jsonl(out / "metrics.jsonl", steps)
    assert title(outs[:3]) == ["Reward margin", "Rewards"]
    assert title(outs) == ["Reward margin", "Rewards: chosen y+", "Rewards: rejected y−"]


def test_figures_need_matplotlib(make_arm, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    [out] = make_arm("kd", 0.5)
    assert error_of(out, figures=tmp_path / "figures").endswith("for --figures, pip install matplotlib")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer of given (piece, text); id 0 is unknown to it."""

    def __init__(self, *pieces):
        self.pieces = dict(enumerate(pieces, 1))

    def convert_ids_to_tokens(self, token):
        return self.pieces[token][0] if token in self.pieces else None

    def decode(self, ids, **options):
        return self.pieces[ids[0]][1] if ids[0] in self.pieces else ""


def test_token_text():
    tokenizer = Pieces(
        ("Ġthe", " the"),  # byte level: Ġ is the space
        ("âĢ", "\ufffd"),  # byte level: the beginning of a character
        ("▁the", "the"),  # sentencepiece: decoding one id loses the space
        ("<0xE2>", "\ufffd"),  # sentencepiece: a byte
        ("<eos>", "<eos>"),
    )
    assert [report.token_text(tokenizer, k) for k in range(6)] == ["⟨0⟩", " the", "⟨âĢ⟩", " the", "⟨<0xE2>⟩", "<eos>"]


def test_ids_stand_in_for_an_unknown_tokenizer(make_run):
    """And for another one than the run's: its text would be wrong, and look right."""
    pairs = {"pairs.jsonl": [{"prompt_id": 0, "prompt": "x", "tokenizer": "other"}]}
    for out in (make_run("none", [sample()], with_tokenizer=False), make_run("other", [sample()], pairs)):
        samples = columns(page_of(out))
        assert not samples["has_text"] and samples["vocabulary"][0] == "⟨5⟩"


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text
# ---------------------------------------------------------------------------------------------------------------------


def test_hostile_text_comes_back_as_it_was_and_is_no_markup(make_run):
    """In prompts, statuses, tokens, results, arguments and the folder's name."""
    name = "<script>alert(1)<&'\""  # a slash cannot be in a name
    ids = {"response_ids": [1, 2, 3, 4, 5], "chosen_ids": [1, 2, 6, 6]}
    records = [sample(i, prompt=text, status=f"kept{text}", **ids) for i, text in enumerate(HOSTILE)]
    out = make_run(name, records, {"summary.json": {HOSTILE[1]: {HOSTILE[0]: 1.0}}}, with_tokenizer=False)
    args = {"student": HOSTILE[1], HOSTILE[0]: HOSTILE[5], "eta": "<b>"}
    runs.write_json(out / "args.json", {"args": args, "versions": {"<i>": "</script>"}, "commit": "<u>"})
    page = page_of(out, tokenizer=Pieces(*((text, text) for text in HOSTILE)))
    plain = page_of(make_run("plain", [sample()]))
    [run] = page.data["runs"]
    assert [text for _, text in run["samples"]["prompts"]] == HOSTILE == run["samples"]["vocabulary"]
    assert {f"kept{text}" for text in HOSTILE} <= set(run["samples"]["statuses"])
    assert run["name"] == name and run["args"][HOSTILE[0]] == HOSTILE[5] and run["eta"] is None
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags] and "<script>alert" not in page.source
    assert page.embedded.isascii() and not set(page.embedded) & set("<>&\x00")


def test_policy_admits_the_scripts_of_the_template_alone(make_run):
    page = page_of(make_run(records=[sample()]))
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    assert len(re.findall(r"script-src( 'sha256-[\w+/=]+'){2};", policy)) == 1
    assert not any("src" in attrs or attrs.get("href", "#")[0] != "#" for _, attrs in page.tags)
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.tags for name in attrs)


def test_script_writes_text_alone():
    """What would make markup of text is not in the template at all."""
    source = report.TEMPLATE.read_text(encoding="utf-8")
    words = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|https?:"
    assert not re.findall(words, source.replace("http://www.w3.org/2000/svg", ""))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def error_of(out, *others, **options):
    with pytest.raises(UserError) as caught:
        report.write_report(out, *others, **options)
    assert "\n" not in str(caught.value) and str(caught.value).count(", ") >= 2
    assert not (out / "report.html").exists()
    return str(caught.value)


def test_no_run(make_run, tmp_path):
    assert error_of(tmp_path / "none").startswith("OUT is not a folder, at ")
    assert error_of(make_run()).startswith("nothing to report (")
    assert error_of(make_run("good", [sample()]), tmp_path / "none").startswith("OUT is not a folder, at ")


@pytest.mark.parametrize("name", ["mismatch.json", "summary.json", "metrics.jsonl", "args.json", "eval/table.json"])
@pytest.mark.parametrize("content", ['{"eta": 4', "[1]", '{"a": 1, "models": 3}', "\xff"])
def test_cut_and_foreign_files(make_run, name, content):
    out = make_run(records=[sample()])
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_bytes(content.encode("latin-1") + b"\n")
    assert f"in {out / name}" in error_of(out)


NO_SAMPLE, NO_FIT = "not a sample of this project (", "t_star or prefix_len does not fit"
BAD_RECORDS = [
    ('{"prompt_id": 0, "sample', NO_SAMPLE),
    ("[]", f"{NO_SAMPLE}TypeError"),
    ("{}", f"{NO_SAMPLE}KeyError"),
    *((json.dumps(sample(**changes)), NO_FIT) for changes in ({"t_star": 5}, {"chosen_ids": [9, 9, 9, 2]})),
    (json.dumps(sample(student_logprobs=[0.0])), "ids and log-probs are not equally many"),
    (json.dumps(sample(student_logprobs=[float("nan")] * 5)), NO_SAMPLE),
    (json.dumps(sample(response_ids="abcde")), NO_SAMPLE),
]


@pytest.mark.parametrize("line, expected", BAD_RECORDS)
def test_bad_record(make_run, line, expected):
    out = make_run(records=[sample()])
    with open(out / "pairs" / "00000.jsonl", "a") as file:
        file.write(line)
    text = error_of(out)
    assert expected in text and f"in {out / 'pairs' / '00000.jsonl'} line 2" in text


def test_page_is_written_whole_or_not_at_all(make_run, monkeypatch):
    """A run that is killed while it writes leaves the page that was there."""
    out = make_run(records=[sample()])
    before = report.write_report(out).read_bytes()
    monkeypatch.setattr(runs.os, "fsync", lambda _: os.stat("/no such file"))  # raises OSError
    with pytest.raises(UserError, match="the report cannot be written"):
        report.write_report(out, max_samples=1)
    assert (out / "report.html").read_bytes() == before


def test_command(make_run, capsys):
    out = make_run(records=[sample()])
    report.main([str(out)])
    assert capsys.readouterr().out.startswith(str(out / "report.html"))
    report.main([str(out), *(str(make_run(f"other-{k}", [sample()])) for k in range(3))])
    assert len(Page(out / "report.html").data["runs"]) == 4
    with pytest.raises(UserError, match="argument --max-samples: 0 is not 1 or more"):
        report.main([str(out), "--max-samples", "0"])
