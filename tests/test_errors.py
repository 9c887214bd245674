"""Bad input: one line, `error: what, where, what to do`, exit status 2, no traceback, nothing half-written, no hang."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, launch
from workers import free_port

import dpo
import eval as evaluation
import kd
import warmup_distill
from lib import runs
from lib.runs import UserError

COMMAND_LINE = "on the command line"
SEE_HELP = f"{COMMAND_LINE}, see SCRIPT --help"
NO_KEEP = "not all, teacher, correct or reward:MODEL"


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    """argparse names the program after sys.argv[0]."""
    monkeypatch.setattr(sys, "argv", ["SCRIPT"])


def error_of(main, argv):
    """The text of the UserError that a command raises; it is one line, complete, and no other exception."""
    with pytest.raises(UserError) as caught:
        main(argv)
    text = str(caught.value)
    assert "\n" not in text and text.count(", ") >= 2
    return text


def assert_error(main, argv, expected):
    """`expected` is the exact text; … stands for what a library or the platform says."""
    found = error_of(main, argv)
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), found), found


def command(defaults):
    """argv(flag=value, ...) -> the words of `defaults` with some flags changed; None leaves one out."""

    def argv(**changed):
        flags = defaults | changed
        pairs = [(f"--{flag.replace('_', '-')}", str(value)) for flag, value in flags.items() if value is not None]
        return [word for pair in pairs for word in pair]

    return argv


@pytest.fixture
def scripts(tmp_path, pair_of_models, prompts_file):
    """{script: (its main, argv of its smallest complete run)}"""
    pairs = tmp_path / "preferences.jsonl"
    pairs.write_text('{"prompt": "1+2:", "chosen": "3", "rejected": "4"}\n' * 4)
    run = {"out": tmp_path / "out", "device": "cpu", "threads": 1}
    training = run | {"batch_size": 2, "micro_batch_size": 2}
    distillation = {**training, **pair_of_models, "data": prompts_file, "limit": 2, "eval_limit": 0}
    scored = {"model": pair_of_models["student"], "data": f"toy={prompts_file}", "metric": "math", "limit": 2}
    return {
        "warmup_distill": (warmup_distill.main, command({**distillation, "samples": 1, "eta": 1, "max_new_tokens": 3})),
        "dpo": (dpo.main, command({**training, "model": pair_of_models["student"], "pairs": pairs})),
        "kd": (kd.main, command({**distillation, "max_new_tokens": 40, "max_steps": 1})),
        "eval": (evaluation.main, command({**run, **scored, "max_new_tokens": 3})),
    }


@pytest.fixture
def warmup(scripts):
    return scripts["warmup_distill"][1]


@pytest.fixture
def align(scripts):
    return scripts["dpo"][1]


SCRIPTS = ["warmup_distill", "dpo", "kd", "eval"]

# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

RUN_RANGES = [
    *(("seed", value, "from 0 to 2^62 - 1") for value in (-1, 1 << 62)),
    ("threads", -1, "from 0 to 1024"),
]
TRAINING_RANGES = [
    *((flag, 0, "1 or more…") for flag in ("epochs", "batch-size", "micro-batch-size", "save-every")),
    *(("lr", value, "above 0…") for value in (0.0, -0.1, "nan", "inf")),
    *(("max-grad-norm", value, "above 0…") for value in (0.0, "nan")),
    ("max-steps", -1, "0 or more…"),
    *(("weight-decay", value, "0 or more…") for value in (-0.1, "nan", "inf")),
    *((flag, v, "from 0 to 1") for flag in ("lr-warmup-ratio", "lr-final-ratio") for v in (-0.1, 1.1, "nan")),
]
DPO_RANGES = [
    *(("beta", value, "above 0…") for value in (0.0, -0.1, "nan", "inf")),
    *(("label-smoothing", value, "from 0 to below 0.5") for value in (-0.1, 0.5, "nan")),
    *(("nll-weight", value, "0 or more…") for value in (-1.0, "nan", "inf")),
]
SAMPLING_RANGES = [
    *((flag, 0, "1 or more…") for flag in ("samples", "max-new-tokens", "prompts-per-batch")),
    *(("eta", value, "a finite number") for value in ("nan", "inf", "-inf")),
    *(("temperature", value, "from 1e-6 to 1e6") for value in (0.0, 1e-7, 1e7, "nan", "inf")),
    *(("top-p", value, "from 1e-6 to 1") for value in (1e-7, 1.5, -0.5, "nan")),
    *((flag, -1, "0 or more…") for flag in ("limit", "eval-limit")),
]
KD_RANGES = [
    *((flag, v, "from 0 to 1") for flag in ("kd-rate", "tail-mass", "on-policy") for v in (-0.1, 1.1, "nan")),
    *((flag, v, "between 0 and 1") for flag in ("jsd-beta", "skew-alpha") for v in (0.0, 1.0, "nan")),
    *((flag, 0, "1 or more…") for flag in ("teacher-top-k", "max-new-tokens", "prompts-per-batch")),
    ("temperature", 0.0, "from 1e-6 to 1e6"),
]
EVAL_RANGES = [
    ("temperature", 0.0, "from 1e-6 to 1e6"),
    ("top-p", 1.5, "from 1e-6 to 1"),
    ("eta", "nan", "a finite number"),
    ("limit", -1, "0 or more…"),
    ("no-repeat-ngram-size", 1, "0, or 2 or more"),
    *((flag, 0, "1 or more…") for flag in ("batch-size", "max-prompt-tokens", "resamples")),
]
RANGES = {
    "warmup_distill": RUN_RANGES + TRAINING_RANGES + DPO_RANGES + SAMPLING_RANGES,
    "dpo": RUN_RANGES + TRAINING_RANGES + DPO_RANGES,
    "kd": RUN_RANGES + TRAINING_RANGES + KD_RANGES,
    "eval": RUN_RANGES + EVAL_RANGES,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_out_of_range(scripts, tmp_path, script):
    main, argv = scripts[script]
    for flag, value, allowed in RANGES[script]:
        assert_error(main, [*argv(), f"--{flag}={value}"], f"argument --{flag}: {value} is not {allowed}, {SEE_HELP}")
    assert not (tmp_path / "out").exists()


NO_FLAGS = [
    (["--sample", "3"], "unrecognized arguments: --sample 3"),
    (["stray"], "unrecognized arguments: stray"),
    (["--seed", "1e3"], "argument --seed: invalid int value: '1e3'"),
    (["--eta", "four"], "argument --eta: invalid float value: 'four'"),
    (["--data"], "argument --data: expected one argument"),
    (["--adam-betas", "0.9"], "argument --adam-betas: expected 2 arguments"),
    (["--adam-betas", "0.9", "1.0"], "argument --adam-betas: 1.0 is not from 0 to below 1"),
    (["--adam-betas", "nan", "0.9"], "argument --adam-betas: nan is not from 0 to below 1"),
    (["--replace", "before"], "argument --replace: invalid choice: 'before' (…)"),
    (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16' (…)"),
    *((["--keep", word], f"argument --keep: {word} is {NO_KEEP}") for word in ("best", "rewards:x", "reward:")),
]


@pytest.mark.parametrize("words, expected", NO_FLAGS, ids=[" ".join(words) for words, _ in NO_FLAGS])
def test_flags_that_are_no_flags(warmup, words, expected):
    assert_error(warmup_distill.main, [*warmup(), *words], f"{expected}, {SEE_HELP}")


def test_teacher_student_data_all_or_none(warmup):
    for missing, also in (("teacher", "teacher"), ("student", "data"), ("data", "data")):
        expected = f"--{missing} is missing: give all three, or none for the toy, {SEE_HELP}"
        assert_error(warmup_distill.main, warmup(**{missing: None, also: None}), expected)


def test_dpo_needs_model_and_pairs(align):
    for flag in ("model", "pairs"):
        assert_error(dpo.main, align(**{flag: None}), f"the following arguments are required: --{flag}, {SEE_HELP}")


def test_toy_folder_that_is_not_there(tmp_path):
    argv = ["--toy", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert_error(warmup_distill.main, argv, NO_TOKENIZER.format(tmp_path / "nowhere" / "student"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_without_gpu(scripts, tmp_path, script):
    main, argv = scripts[script]
    expected = "no GPU can be used, --device cuda, use --device cpu or install a CUDA build of torch"
    assert_error(main, argv(device="cuda"), expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_no_error(scripts, capsys, script):
    with pytest.raises(SystemExit) as stopped:
        scripts[script][0](["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "--accept-changes" in printed and "(default: 0)" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def messages(*turns):
    return jsonl({"messages": list(turns)})


UNREADABLE = "the data cannot be read (…), in …{}, check the file, hub id and --split"
NOT_JSON = "not JSON (…), in {} line %d, repair or delete the line"
NO_ROWS = "…, in …{}, …"  # each library says it in another way
NO_OBJECT = "%s instead of an object with columns, in {} %s, repair or delete it"
NO_COLUMN = "no %s, in {} with columns %s, rename one to %s …"
EMPTY = "column %s is empty, in {} row 1, repair or delete the row"
NO_TEXT = "column %s is %s, not text, in {} row 0, repair the row"
NO_TURNS = "messages is not a list of turns with text content, in {} row 0, repair the row"
NO_PROMPT = "messages has no turn before the assistant's, in {} row 0, repair the row"
PART, QUESTION = {"type": "text", "text": "1"}, jsonl({"prompt": "1+2+3:"}, {"prompt": "12345"})

LONG = "all prompts are over --max-prompt-tokens 3, in {}, raise it or give other data"
NO_GOLD = "--keep correct needs gold responses, in {}, name them with --response-column"
BAD_DATA = {  # name of the file: its content, the error ({} is the file's path), other words of the command
    "empty.jsonl": ("", NO_ROWS),
    "no_rows.json": ("[]", NO_ROWS),
    "empty.csv": ("", NO_ROWS),
    "header_only.csv": ("prompt,response\n", NO_ROWS),
    "blank_lines.jsonl": ('{"prompt": "1"}\n\n\n{"prompt": }\n', NOT_JSON % 4),
    "surrogate.jsonl": ('{"prompt": "1"}\n{"prompt": "\\ud800"}\n', NOT_JSON % 2),
    "deep.jsonl": ('{"prompt": ' + "[" * 100_000 + "\n", NOT_JSON % 1),
    "null_row.jsonl": ('{"prompt": "1"}\nnull\n', NO_OBJECT % ("NoneType", "line 2")),
    "items.json": ('[{"prompt": "1"}, 2]', NO_OBJECT % ("int", "item 2")),
    "twice.jsonl": ('{"prompt": "1", "prompt": "2"}\n', NOT_JSON % 1),
    "cut.json": ('[{"prompt": "1"', UNREADABLE),
    "deep.json": ("[" * 100_000, UNREADABLE),
    "binary.jsonl": (b"\xff\xfe\x00abc", NOT_JSON % 1),
    "binary.csv": (b"prompt\n\xff\xfe\x00abc\n", UNREADABLE),
    "no.parquet": ("text", UNREADABLE),
    "missing.jsonl": (None, UNREADABLE),
    "notes.txt": ("1+2", UNREADABLE),
    "noext": ("1+2", UNREADABLE),
    "text.jsonl": (jsonl({"text": "1", "n": 2}), NO_COLUMN % ("prompt column", "text, n", "prompt")),
    "control.jsonl": (jsonl({"\n\x1b[31m": "1"}), NO_COLUMN % ("prompt column", "\\n\\x1b[31m", "prompt")),
    "null.jsonl": (jsonl({"prompt": "1"}, {"prompt": None}), EMPTY % "prompt"),
    "blank.jsonl": (jsonl({"prompt": "1"}, {"prompt": " \n"}), EMPTY % "prompt"),
    "empty_cell.csv": ("question,answer\na,b\n,b\n", EMPTY % "question"),
    "number.jsonl": (jsonl({"prompt": 12}), NO_TEXT % ("prompt", "int")),
    "input.jsonl": (jsonl({"prompt": "1", "input": 5}), NO_TEXT % ("input", "int")),
    "gold.jsonl": (jsonl({"prompt": "1", "answer": 5}), NO_TEXT % ("answer", "int")),
    "m0.jsonl": (messages(), NO_TURNS),
    "m1.jsonl": (jsonl({"messages": None}), NO_TURNS),
    "m4.jsonl": (messages({"content": "hello"}), NO_TURNS),
    "m7.jsonl": (messages({"role": "user", "content": [PART]}), NO_TURNS),
    "m8.jsonl": (messages({"role": "assistant", "content": "1"}), NO_PROMPT),
    "q.jsonl": (QUESTION, NO_COLUMN % ("column q", "prompt", "prompt"), "--prompt-column", "q"),
    "a.jsonl": (QUESTION, NO_COLUMN % ("column a", "prompt", "response"), "--response-column", "a"),
    "no_gold.jsonl": (QUESTION, NO_GOLD, "--keep", "correct"),
    "long.jsonl": (QUESTION, LONG, "--max-prompt-tokens", "3"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(warmup, tmp_path, name):
    path, (content, expected, *words) = tmp_path / name, BAD_DATA[name]
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_error(warmup_distill.main, [*warmup(data=path), *words], expected.format(path))


@pytest.mark.parametrize("text", ["1\x00\x07\x1b[31m\u202e", "\ufeff1", "1\u2028\u0085", "\U0001f600"])
def test_control_characters_are_text(warmup, tmp_path, text):
    """Nothing is wrong with them: they are tokens like others, and escaped where they are shown."""
    path = tmp_path / "control.jsonl"
    path.write_text(jsonl({"prompt": text}))
    warmup_distill.main(warmup(data=path))
    [record] = runs.read_jsonl(tmp_path / "out" / "pairs" / "00000.jsonl")
    assert text in record["prompt"]


@pytest.mark.parametrize("script", ["warmup_distill", "kd"])
def test_bad_held_out_data_is_found_before_the_work(scripts, tmp_path, script):
    """--eval-data is read for the closing table, hours later; its error must come first, and not blame --data."""
    main, argv = scripts[script]
    text = error_of(main, argv(eval_data=tmp_path / "missing.jsonl", eval_limit=1))
    assert "missing.jsonl" in text and "--data" not in text.replace("--eval-data", "")
    assert not (tmp_path / "out" / "pairs").exists() and not (tmp_path / "out" / "student").exists()


def test_templates_that_cannot_be_used(warmup, tmp_path, pair_of_models):
    """One that is asked for and missing; one that refuses a conversation, as Gemma's does for a system turn."""
    folders = {name: shutil.copytree(path, tmp_path / name) for name, path in pair_of_models.items()}
    templates = [folder / "chat_template.jinja" for folder in folders.values()]
    for template in templates:
        template.write_text("{{ raise_exception('no system turn') }}")
    expected = (
        "the chat template refuses a conversation (TemplateError: no system turn), of roles user, repair the data or …"
    )
    assert_error(warmup_distill.main, warmup(**folders), expected)
    for template in templates:
        template.unlink()
    expected = "the chat template refuses a conversation (…), of roles user, repair the data or --template alpaca"
    assert_error(warmup_distill.main, warmup(**folders, template="chat"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Models: one bad folder a flag; tests/test_models.py has what can be wrong with one
# ---------------------------------------------------------------------------------------------------------------------

NO_MODEL = "no model can be loaded (…), in {}, a folder or hub id with safetensors is needed"
NO_TOKENIZER = "no tokenizer can be loaded (…), in {}, check the path or hub id"


FLAGS = [(script, name) for script in ("warmup_distill", "kd") for name in ("student", "teacher")]


@pytest.mark.parametrize("script, flag", [*FLAGS, ("dpo", "model"), ("dpo", "reference"), ("eval", "model")])
def test_bad_model_folder(scripts, tmp_path, pair_of_models, script, flag):
    """Without its weights; once they are there, the same command goes on."""
    main, argv = scripts[script]
    good = pair_of_models["teacher" if flag == "teacher" else "student"]
    folder = shutil.copytree(good, tmp_path / "broken")
    (folder / "model.safetensors").unlink()
    assert_error(main, argv(**{flag: folder}), NO_MODEL.format(folder))
    assert not [*tmp_path.glob("out/student"), *tmp_path.glob("out/pairs/*"), *tmp_path.glob("out/**/*-seed*")]
    shutil.copy(f"{good}/model.safetensors", folder)
    main(argv(**{flag: folder}))
    assert [*tmp_path.glob("out/student/model.safetensors"), *tmp_path.glob("out/**/*-seed*")]


# ---------------------------------------------------------------------------------------------------------------------
# OUT: tests/test_run_folder.py has the comparison itself
# ---------------------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_out_with_other_arguments(warmup, tmp_path):
    """Refused, naming each argument that differs; what changes no pair and no weight is none of them."""
    warmup_distill.main(warmup())
    before = contents(tmp_path / "out")
    changes = "eta: 1.0 there, 2.0 now; keep: all there, teacher now; max_new_tokens: 3 there, 4 now; "
    changes += "max_prompt_tokens: 253 there, 252 now"
    todo = "give another folder, or --accept-changes to keep what is there"
    expected = f"what is there was made otherwise ({changes}), in {tmp_path / 'out'}, {todo}"
    argv = warmup(eta=2, keep="teacher", max_new_tokens=4, device="auto", micro_batch_size=1)
    assert_error(warmup_distill.main, [*argv, "--shard-teacher", "--activation-checkpointing"], expected)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_out_that_cannot_be_made(scripts, tmp_path, script):
    main, argv = scripts[script]
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    place = out / "eval" if script == "eval" else out
    assert_error(main, argv(out=out), f"OUT cannot be used (…), at {place}, give another --out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("script", ["warmup_distill", "dpo", "kd"])
def test_out_where_other_files_are(scripts, tmp_path, pair_of_models, script):
    """--out models, where models/student is the student itself: taken for a result, it would end the run at once."""
    main, argv = scripts[script]
    student = shutil.copytree(pair_of_models["student"], tmp_path / "out" / "student")
    before = contents(tmp_path / "out")
    for out, name in ((tmp_path / "out", "student"), (student, "chat_template.jinja")):
        expected = f"OUT holds {name}, which no run made, at {out}, give another --out"
        assert_error(main, argv(out=out), expected)
    assert contents(tmp_path / "out") == before


CORRECTED = [
    *({"teacher": "no/such/folder"}, {"keep": "reward:no/such/folder"}),
    *({"data": "/missing.jsonl"}, {"eval_data": "/missing.jsonl", "eval_limit": 1}, {"max_prompt_tokens": 3}),
]


@pytest.mark.parametrize("changed", CORRECTED, ids="+".join)
def test_a_corrected_command_goes_on(warmup, tmp_path, changed):
    """A run that has made nothing claims no OUT."""
    error_of(warmup_distill.main, [*warmup(**changed), "--pairs-only"])
    warmup_distill.main([*warmup(), "--pairs-only"])
    assert runs.read_json(tmp_path / "out" / "args.json")["args"]["keep"] == "all"


def test_a_corrected_pairs_file_goes_on(align, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("")
    expected = f"no pairs, in {path}, lower --eta or use more prompts"
    assert_error(dpo.main, align(pairs=path), expected)
    path.write_text(jsonl(*[{"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6]}] * 2))
    dpo.main(align(pairs=path))


def test_loss_that_is_no_number(align, tmp_path):
    """A learning rate beyond all reason: the run stops, names step and prompts, and writes no student."""
    argv = [*align(lr=1e30, epochs=4, max_grad_norm=1e30), "--lr-warmup-ratio", "0"]
    pattern = r"loss \S+ and gradient norm \S+ at step \d, prompts \[\d, \d\], in \S+, lower --lr or use .*"
    text = error_of(dpo.main, argv)
    assert re.fullmatch(pattern, text), text
    assert not (tmp_path / "out" / "student").exists()


# ---------------------------------------------------------------------------------------------------------------------
# kd.py and eval.py; tests/test_dpo.py has what is wrong with pairs
# ---------------------------------------------------------------------------------------------------------------------

FOR_TOY = f"give it, or neither teacher nor data for the toy, {SEE_HELP}"
NO_LABELS = f"--kd-rate is 0.0, and with --mode student there are no labels, {SEE_HELP}"
NO_CACHE = "--teacher-cache needs responses that stay, and a teacher: not --mode student, not --kd-rate 0"
CACHE = "the teacher's files cannot be kept (…), in {}, give another folder"
KD_ERRORS = {  # the flags that are wrong, the error; {file} is a file of something else, {data} the data's
    "no teacher": ({"teacher": None}, f"--teacher is missing: {FOR_TOY}"),
    "no data": ({"data": None}, f"--data is missing: {FOR_TOY}"),
    "no student": ({"student": None}, f"--student is missing: {FOR_TOY}"),
    "no labels": ({"mode": "student", "kd_rate": 0.0}, NO_LABELS),
    "cache": ({"mode": "student", "teacher_cache": "c"}, f"{NO_CACHE}, {SEE_HELP}"),
    "long": ({"max_new_tokens": 1}, "all responses are over --max-new-tokens, in {data}, raise the limit"),
    "column": ({"response_column": "a"}, "no column a, in {data} with columns …, rename one to response …"),
    "cache is a file": ({"teacher_cache": "{file}"}, CACHE.format("{file}")),
}
KNOWN = "use dolly, selfinst, vicuna, sni, unni, gsm8k, math, NAME=FILE or FILE"
NO_METRIC = "nothing says how to score 'toy', in --data toy={data}, give --metric, or a known name=FILE"
BAD_NAME = "the name 'a/b' cannot be part of a file name, in --data a/b={data}, give NAME=FILE"
EVAL_ERRORS = {
    "model alone": ({"data": None}, f"the following arguments are required: --data, {COMMAND_LINE}, see …"),
    "no such file": ({"data": "toy=no.jsonl"}, f"no such data set or file, in --data toy=no.jsonl, {KNOWN}"),
    "unknown set": ({"data": "dolli"}, f"no such data set or file, in --data dolli, {KNOWN}"),
    "no metric": ({"metric": None}, NO_METRIC),
    "name": ({"data": "a/b={data}"}, BAD_NAME),
    "empty file": ({"data": "x={empty}"}, "no rows, in --data x, give data with at least one row"),
    "null row": (
        {"data": "x={null}"},
        "NoneType instead of an object with columns, in {null} line 1, repair or delete it",
    ),
    "broken JSON": ({"data": "x={cut}"}, NOT_JSON.format("{cut}") % 2),
    "model missing": ({"model": "{file}-no"}, NO_TOKENIZER.format("{file}-no")),
    "other teacher": ({"distance": "{file}-no"}, NO_TOKENIZER.format("{file}-no")),
}
CUT = jsonl({"prompt": "1", "response": "1"}) + '{"pro'
FILES = {"empty": "", "null": "null\n", "file": "mine", "cut": CUT}


KD_AND_EVAL = [("kd", *case) for case in KD_ERRORS.items()] + [("eval", *case) for case in EVAL_ERRORS.items()]


@pytest.mark.parametrize("script, name, case", KD_AND_EVAL, ids=[f"{script} {name}" for script, name, _ in KD_AND_EVAL])
def test_errors_of_kd_and_eval(scripts, tmp_path, prompts_file, script, name, case):
    (main, argv), (changed, expected) = scripts[script], case
    words = {"data": prompts_file} | {name: str(tmp_path / f"{name}.jsonl") for name in FILES}
    for file, text in FILES.items():
        (tmp_path / f"{file}.jsonl").write_text(text)
    changed = {flag: value.format(**words) if isinstance(value, str) else value for flag, value in changed.items()}
    assert_error(main, argv(**changed), expected.format(**words))
    assert not [*tmp_path.glob("out/student"), *tmp_path.glob("out/**/*-seed*")]
    assert (tmp_path / "file.jsonl").read_text() == "mine"


def test_kd_rows_without_a_response(scripts, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(jsonl({"prompt": "1", "response": "2"}, {"prompt": "3", "response": None}))
    todo = "give --response-column, or --mode teacher to write them"
    expected = f"there is no response, in {path} row 1, {todo}"
    assert_error(kd.main, scripts["kd"][1](data=path), expected)


# ---------------------------------------------------------------------------------------------------------------------
# What the shell sees
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ends(monkeypatch):
    """ends(main) -> the exit status of `runs.run(main)` and the seconds that it slept; os._exit only ends `run`."""
    slept = []

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(runs.os, "_exit", leave)
    monkeypatch.setattr(runs.time, "sleep", slept.append)
    for name in ("RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)

    def run(main):
        with pytest.raises(SystemExit) as end:
            runs.run(main)
        return end.value.code, sum(slept)

    return run


def raises(error):
    def main():
        raise error

    return main


STOPPED = "stopped after step 7"
ENDS = {
    "done": (lambda: None, 0, ""),
    "--help": (lambda: dpo.main(["--help"]), 0, ""),
    "UserError": (raises(UserError("what", "where", "todo")), 2, "error: what, where, todo\n"),
    "Ctrl-C": (lambda: signal.raise_signal(signal.SIGINT), 130, ""),
    "Stopped": (raises(runs.Stopped(STOPPED)), 143, f"{STOPPED}\n"),
}


@pytest.mark.parametrize("main, status, printed", ENDS.values(), ids=ENDS)
def test_exit_status(capsys, ends, main, status, printed):
    assert ends(main) == (status, 0) and capsys.readouterr().err == printed


def test_reading_is_one_line_and_its_traceback_is_a_flag(capsys, ends, monkeypatch):
    """Whatever a library raises, but for full memory; a defect of ours outside stays a traceback (below)."""

    def read(error):
        with runs.reading("the file cannot be read", "in FILE", "check it"):
            raise error

    for error, cause in ((KeyError("x"), "KeyError: 'x'"), (ValueError("bad\nmore"), "bad"), (OSError(2, "No"), "…")):
        assert ends(lambda error=error: read(error)) == (2, 0)
        expected = f"error: the file cannot be read ({cause}), in FILE, check it\n"
        assert re.fullmatch(re.escape(expected).replace("…", ".*"), capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["script", "--traceback"])
    assert ends(lambda: read(KeyError("x"))) == (2, 0)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback ") and "KeyError: 'x'" in printed and printed.endswith("in FILE, check it\n")
    assert ends(lambda: read(torch.OutOfMemoryError("full"))) == (1, 0)


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}])
def test_processes_that_never_come(variables):
    """RANK left over from elsewhere; a job whose other processes were never started."""
    if len(variables) > 1:
        variables["MASTER_PORT"] = str(free_port())
    code = "from datetime import timedelta; from lib import runs; runs.MEETING_TIME = timedelta(seconds=2); "
    code += "runs.run(lambda: runs.start_processes('cpu', 1))"
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the other processes do not come (")


def test_full_memory_is_one_line(capsys, ends):
    assert ends(raises(torch.OutOfMemoryError("CUDA out of memory. Tried to\nGPU 0"))) == (1, 0)
    what = "error: out of GPU memory (CUDA out of memory. Tried to), in this process, lower --micro-batch-size"
    printed = capsys.readouterr().err
    assert printed.startswith(what) and printed.count("\n") == 1


DEFECTS = [
    *(ZeroDivisionError("ours"), RuntimeError("[gloo] Connection closed by peer")),
    *(OSError(28, "No space left on device", "out/x"), BaseException("no Exception")),
]


@pytest.mark.parametrize("error", DEFECTS, ids=[type(error).__name__ for error in DEFECTS])
def test_other_exceptions_keep_their_traceback(capsys, ends, error):
    """A defect of ours is not dressed up as the user's error."""
    assert ends(raises(error)) == (1, 0)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback ") and printed.endswith(f"{type(error).__name__}: {error}\n")
    assert "error: " not in printed


def test_a_path_that_cannot_be_used_is_one_line(capsys, ends, tmp_path):
    """A folder stands where a file belongs, a name is too long, ...: not a defect, whoever meets it."""
    for path in (tmp_path, tmp_path / ("n" * 300)):
        assert ends(lambda path=path: path.read_bytes()) == (2, 0)
        assert re.fullmatch(r"error: a path cannot be used \(.*\), in this run, check it .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("rank, end, seconds", [("0", "", 0), ("3", " (rank 3)", 4.75)])
def test_rank_0_prints_first(monkeypatch, capsys, ends, tmp_path, rank, end, seconds):
    """Others wait for torchrun to end them; one that is still there has an error of its own."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert ends(raises(UserError("what", "where", "todo"))) == (2, seconds)
    line = f"error: what, where, todo{end}"
    assert capsys.readouterr().err == f"{line}\n"
    assert runs.read_json(tmp_path / "error.json")["message"] == line, "for torchrun's own report"


def test_an_end_runs_no_destructors(tmp_path):
    """gloo's threads abort some interpreter shutdowns after all work is done: the process leaves by os._exit."""
    script = tmp_path / "script.py"
    text = "import atexit\nfrom lib import runs\natexit.register(print, 'shutdown')\n"
    script.write_text(f"{text}runs.run(lambda: print(runs.start_processes('cpu', 1).size, end=''))\n")
    result = launch(0, script, env={"PYTHONPATH": str(ROOT)})
    assert (result.returncode, result.stdout, result.stderr) == (0, "1", "")


@pytest.mark.parametrize("script", ["warmup_distill", "dpo"])
def test_one_process_prints_one_line(warmup, align, tmp_path, script):
    """stderr is the error line and at most a bar, not even a library's complaint about the same file."""
    path = tmp_path / "cut.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": \n')
    result = launch(0, f"{script}.py", *(warmup(data=path) if script == "warmup_distill" else align(pairs=path)))
    assert result.returncode == 2 and result.stdout == ""
    [line] = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("prompts: ")]
    assert re.fullmatch(r"error: .+, in .*cut.jsonl.*, .+", line), result.stderr


TOGETHER = {  # who meets the error: script, its flags that are wrong, the one line
    "rank 0": ("warmup_distill", {"prompt_column": "q"}, "no column q, in .+, rename one to prompt .+"),
    "all ranks": ("eval", {"data": "x=no.jsonl"}, f"no such data set or file, in --data x=no.jsonl, {KNOWN}"),
    "rank 1": (None, {}, r"rank 1 met something, in its own data, repair it \(rank 1\)"),
}


@pytest.mark.parametrize("script, changed, expected", TOGETHER.values(), ids=TOGETHER)
def test_two_processes_print_one_line(scripts, tmp_path, script, changed, expected):
    """torchrun ends the other rank and reports in its own way; from us there is one line, no traceback, no hang."""
    file, argv = ("tests/workers.py", ["rank-error"])
    if script is not None:
        file, argv = f"{script}.py", scripts[script][1](**changed)
    result = launch(2, file, *argv, timeout=100, env={"PYTHONPATH": str(ROOT)})
    assert result.returncode == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(f"error: {expected}", line), result.stderr
    assert f"traceback : {line}\n" in result.stderr, "torchrun's own report has it"
    if script is not None:  # else rank 0's own: it has lost its peer
        assert f'File "{ROOT}' not in result.stderr, "a traceback of ours"
