"""Bad input: one line, `error: what, where, what to do`, exit status 2, no traceback, nothing half-written, no hang."""

import json
import math
import re
import shutil
import sys

import datasets
import pytest
import torch
from conftest import ROOT, launch, make_model
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
)

import common
import dpo
import eval as evaluation
import kd
import models
import toy
import warmup_distill
from common import UserError

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no network: it counts each load, of a local file too
COMMAND_LINE = "on the command line"


@pytest.fixture(autouse=True)
def program_name(monkeypatch):
    """argparse names the program after sys.argv[0]."""
    monkeypatch.setattr(sys, "argv", ["SCRIPT"])


def error_of(main, argv):
    """The text of the UserError that a command raises; it is one line, complete, and no other exception."""
    with pytest.raises(UserError) as caught:
        main([str(word) for word in argv])
    text = str(caught.value)
    assert "\n" not in text and text.count(", ") >= 2
    return text


def assert_error(main, argv, expected):
    """`expected` is the exact text; … stands for what a library or the platform says."""
    found = error_of(main, argv)
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), found), found


def to_argv(flags):
    return [word for flag, value in flags.items() if value is not None for word in (f"--{flag}", value)]


@pytest.fixture
def warmup(tmp_path, pair_of_models, prompts_file):
    """warmup(flag=value, ...) -> argv of the smallest complete run with some flags changed; None leaves one out."""

    def argv(**changed):
        flags = {**pair_of_models, "data": prompts_file, "out": tmp_path / "out", "limit": 2, "samples": 1, "eta": 1,
                 "max-new-tokens": 3, "eval-limit": 0, "device": "cpu", "threads": 1, "batch-size": 2, "micro-batch-size": 2}  # fmt: skip
        return to_argv(flags | {flag.replace("_", "-"): value for flag, value in changed.items()})

    return argv


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "preferences.jsonl"
    path.write_text('{"prompt": "1+2:", "chosen": "3", "rejected": "4"}\n' * 4)
    return path


@pytest.fixture
def align(tmp_path, pair_of_models, pairs_file):
    """The same for dpo.py."""

    def argv(**changed):
        flags = {"model": pair_of_models["student"], "pairs": pairs_file, "out": tmp_path / "out", "device": "cpu",
                 "threads": 1, "batch-size": 2, "micro-batch-size": 2}  # fmt: skip
        return to_argv(flags | {flag.replace("_", "-"): value for flag, value in changed.items()})

    return argv


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

ONE, ZERO, POSITIVE, SHARE = "of 1 or more", "of 0 or more", "above 0", "from 0 to 1"
KEEP = "of all, teacher, correct or reward:MODEL"
RANGES = [
    *((flag, 0, ONE) for flag in ("--samples", "--max-new-tokens", "--prompts-per-batch")),
    ("--samples", -1, ONE),
    *(("--eta", value, "in nats, such as 4") for value in ("nan", "inf", "-inf")),
    *(("--temperature", value, POSITIVE) for value in (0.0, -1.0, "nan", "inf")),
    *(("--top-p", value, "in (0, 1]") for value in (0.0, 1.5, -0.5, "nan")),
    *((flag, -1, ZERO) for flag in ("--limit", "--eval-limit")),
    *(("--keep", value, KEEP) for value in ("best", "rewards:x", "reward:", "''")),
]
TRAINING_RANGES = [
    *((flag, 0, ONE) for flag in ("--epochs", "--batch-size", "--micro-batch-size", "--save-every")),
    *(("--lr", value, POSITIVE) for value in (0.0, -0.1, "nan", "inf")),
    *(("--max-grad-norm", value, POSITIVE) for value in (0.0, "nan")),
    ("--max-steps", -1, ZERO),
    *(("--weight-decay", value, ZERO) for value in (-0.1, "nan", "inf")),
    *((flag, v, SHARE) for flag in ("--lr-warmup-ratio", "--lr-final-ratio") for v in (-0.1, 1.1, "nan")),
    *(("--seed", value, "from 0 to 2^62 - 1") for value in (-1, 1 << 62)),
    *(("--beta", value, POSITIVE) for value in (0.0, -0.1, "nan", "inf")),
    *(("--label-smoothing", value, "in [0, 0.5)") for value in (-0.1, 0.5, "nan")),
    *(("--nll-weight", value, "0 or more") for value in (-1.0, "nan", "inf")),
    ("--threads", -1, ZERO),
]


@pytest.mark.parametrize("flag, value, allowed", RANGES + TRAINING_RANGES)
def test_warmup_flag_out_of_range(warmup, tmp_path, flag, value, allowed):
    argv = [*warmup(), f"{flag}={value}"]
    assert_error(warmup_distill.main, argv, f"{flag} is {value}, {COMMAND_LINE}, give a value {allowed}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag, value, allowed", TRAINING_RANGES)
def test_dpo_flag_out_of_range(align, tmp_path, flag, value, allowed):
    assert_error(dpo.main, [*align(), f"{flag}={value}"], f"{flag} is {value}, {COMMAND_LINE}, give a value {allowed}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("betas", [[0.9, 1.0], [-0.1, 0.9], [0.9, math.nan]])
def test_adam_betas_out_of_range(warmup, align, betas):
    for main, argv in ((warmup_distill.main, warmup()), (dpo.main, align())):
        expected = f"--adam-betas is {betas}, {COMMAND_LINE}, give a value in [0, 1), twice"
        assert_error(main, [*argv, "--adam-betas", *betas], expected)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--foo", "1"], "unrecognized arguments: --foo 1"),
        (["--sample", "3"], "unrecognized arguments: --sample 3"),
        (["stray"], "unrecognized arguments: stray"),
        (["--samples", "x"], "argument --samples: invalid int value: 'x'"),
        (["--seed", "1e3"], "argument --seed: invalid int value: '1e3'"),
        (["--eta", "four"], "argument --eta: invalid float value: 'four'"),
        (["--data"], "argument --data: expected one argument"),
        (["--adam-betas", "0.9"], "argument --adam-betas: expected 2 arguments"),
        (["--replace", "before"], "argument --replace: invalid choice: 'before' (…)"),
        (["--teacher-decoding", "beam"], "argument --teacher-decoding: invalid choice: 'beam' (…)"),
        (["--template", "x"], "argument --template: invalid choice: 'x' (…)"),
        (["--reference", "other"], "argument --reference: invalid choice: 'other' (…)"),
        (["--logprobs", "max"], "argument --logprobs: invalid choice: 'max' (…)"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16' (…)"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu' (…)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_are_no_flags(warmup, words, expected):
    assert_error(warmup_distill.main, [*warmup(), *words], f"{expected}, {COMMAND_LINE}, see SCRIPT --help")


@pytest.mark.parametrize(
    "left_out, missing",
    [
        (["teacher"], "teacher"),
        (["student"], "student"),
        (["data"], "data"),
        (["teacher", "student"], "teacher"),
        (["student", "data"], "student"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_teacher_student_data_all_or_none(warmup, left_out, missing):
    argv = warmup(**dict.fromkeys(left_out))
    expected = f"--{missing} is missing, {COMMAND_LINE}, give all three, or none for the toy"
    assert_error(warmup_distill.main, argv, expected)


@pytest.mark.parametrize("flag", ["model", "pairs"])
def test_dpo_needs_model_and_pairs(align, flag):
    expected = f"the following arguments are required: --{flag}, {COMMAND_LINE}, see SCRIPT --help"
    assert_error(dpo.main, align(**{flag: None}), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_gpu(warmup, align, tmp_path):
    expected = "no GPU can be used, --device cuda, use --device cpu or install a CUDA build of torch"
    for main, argv in ((warmup_distill.main, warmup(device="cuda")), (dpo.main, align(device="cuda"))):
        assert_error(main, argv, expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main", [warmup_distill.main, dpo.main])
def test_help_is_no_error(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and "--beta" in printed and "(default: 0.1)" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

UNREADABLE = "the data cannot be read (…), in …{}, check the file, hub id and --split"
NOT_JSON = "not JSON (…), in {} line #, mend or delete the line"
NO_ROWS = "…, in …{}, …"  # each library says it in another way
NO_TURNS = "messages is not a list of turns with text content, in {} row 0, mend the row"


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# name of the file, its content, flags, the error; {} is the file's path
BAD_DATA = [
    ("empty.jsonl", "", {}, NO_ROWS),
    ("empty.json", "", {}, NO_ROWS),
    ("no_rows.json", "[]", {}, NO_ROWS),
    ("empty.csv", "", {}, NO_ROWS),
    ("header_only.csv", "prompt,response\n", {}, NO_ROWS),
    ("cut.jsonl", '{"prompt": "1"}\n{"prompt": \n', {}, NOT_JSON.replace("#", "2")),
    ("blank_lines.jsonl", '{"prompt": "1"}\n\n\n{"prompt": }\n', {}, NOT_JSON.replace("#", "4")),
    ("surrogate.jsonl", '{"prompt": "1"}\n{"prompt": "\\ud800"}\n', {}, NOT_JSON.replace("#", "2")),
    ("deep.jsonl", '{"prompt": ' + "[" * 100_000 + "\n", {}, NOT_JSON.replace("#", "1")),
    ("null_row.jsonl", '{"prompt": "1"}\nnull\n', {}, "NoneType instead of an object with columns, in {} line 2, mend or delete it"),
    ("list_row.jsonl", '["1"]\n', {}, "list instead of an object with columns, in {} line 1, mend or delete it"),
    ("items.json", '[{"prompt": "1"}, 2]', {}, "int instead of an object with columns, in {} item 2, mend or delete it"),
    ("twice.jsonl", '{"prompt": "1", "prompt": "2"}\n', {}, UNREADABLE),
    ("control_name.jsonl", jsonl({"\n\x1b[31m": "1"}), {}, "no prompt column, in {} with columns \\n\\x1b[31m, name it with --prompt-column"),
    ("cut.json", '[{"prompt": "1"', {}, UNREADABLE),
    ("binary.jsonl", b"\xff\xfe\x00abc", {}, NOT_JSON.replace("#", "1")),
    ("binary.csv", b"prompt\n\xff\xfe\x00abc\n", {}, UNREADABLE),
    ("no.parquet", "text", {}, UNREADABLE),
    ("scalars.jsonl", "1\n2\n", {}, "int instead of an object with columns, in {} line 1, mend or delete it"),
    ("notes.txt", "1+2", {}, "unknown file type '.txt', in …{}, use one of .json, .jsonl, .csv, .parquet"),
    ("noext", "1+2", {}, "unknown file type '', in …{}, use one of .json, .jsonl, .csv, .parquet"),
    ("missing.jsonl", None, {}, UNREADABLE),
    ("text.jsonl", jsonl({"text": "1", "n": 2}), {}, "no prompt column, in {} with columns text, n, name it with --prompt-column"),
    ("p.jsonl", jsonl({"prompt": "1"}), {"prompt_column": "q"}, "no column q, in {} with columns prompt, name it with --prompt-column"),
    ("r.jsonl", jsonl({"prompt": "1"}), {"response_column": "a"}, "no column a, in {} with columns prompt, name it with --response-column"),
    ("null.jsonl", jsonl({"prompt": "1"}, {"prompt": None}), {}, "column prompt is empty, in {} row 1, mend or delete the row"),
    ("blank.jsonl", jsonl({"prompt": "1"}, {"prompt": " \n"}), {}, "column prompt is empty, in {} row 1, mend or delete the row"),
    ("empty_cell.csv", "question,answer\na,b\n,b\n", {}, "column question is empty, in {} row 1, mend or delete the row"),
    ("number.jsonl", jsonl({"prompt": 12}), {}, "column prompt is int, not text, in {} row 0, mend the row"),
    ("list.jsonl", jsonl({"prompt": ["1"]}), {}, "column prompt is list, not text, in {} row 0, mend the row"),
    ("input.jsonl", jsonl({"prompt": "1", "input": 5}), {}, "column input is int, not text, in {} row 0, mend the row"),
    ("gold.jsonl", jsonl({"prompt": "1", "answer": 5}), {}, "column answer is int, not text, in {} row 0, mend the row"),
    ("keep.jsonl", jsonl({"prompt": "1"}), {"keep": "correct"}, "--keep correct needs gold responses, in {}, name them with --response-column"),
    ("m0.jsonl", jsonl({"messages": []}), {}, NO_TURNS),
    ("m1.jsonl", jsonl({"messages": None}), {}, NO_TURNS),
    ("m2.jsonl", jsonl({"messages": "hello"}), {}, NO_TURNS),
    ("m3.jsonl", jsonl({"messages": ["hello"]}), {}, NO_TURNS),
    ("m4.jsonl", jsonl({"messages": [{"content": "hello"}]}), {}, NO_TURNS),
    ("m5.jsonl", jsonl({"messages": [{"role": "user"}]}), {}, NO_TURNS),
    ("m6.jsonl", jsonl({"messages": [{"role": "user", "content": None}]}), {}, NO_TURNS),
    ("m7.jsonl", jsonl({"messages": [{"role": "user", "content": [{"type": "text", "text": "1"}]}]}), {}, NO_TURNS),
    ("m8.jsonl", jsonl({"messages": [{"role": "assistant", "content": "1"}]}), {},
     "messages has no turn before the assistant's, in {} row 0, mend the row"),
    ("long.jsonl", jsonl({"prompt": "1+2+3:"}, {"prompt": "12345"}), {"max_prompt_tokens": 5},
     "all 2 prompts are over --max-prompt-tokens 5, in --data, raise the limit or give other data"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, flags, expected", BAD_DATA, ids=[row[0] for row in BAD_DATA])
def test_bad_data(warmup, tmp_path, name, content, flags, expected):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_error(warmup_distill.main, warmup(data=path, **flags), expected.format(path))


@pytest.mark.parametrize("text", ["1\x00\x07\x1b[31m\u202e", "\ufeff1", "1\u2028\u0085", "\U0001f600"])
def test_control_characters_are_text(warmup, tmp_path, text):
    """Nothing is wrong with them: they are tokens like others, and escaped where they are shown."""
    path = tmp_path / "control.jsonl"
    path.write_text(jsonl({"prompt": text}))
    warmup_distill.main([str(word) for word in warmup(data=path)])
    [record] = common.read_jsonl(tmp_path / "out" / "pairs" / "00000.jsonl")
    assert text in record["prompt"]


def test_parse_errors_say_what_is_wrong(warmup, tmp_path):
    """`datasets` wraps what it could not read into "An error occurred while generating the dataset": of no use."""
    path = tmp_path / "cut.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": \n')
    assert "JSON" in error_of(warmup_distill.main, warmup(data=path)).replace(str(path), "")


def test_bad_held_out_data_is_found_before_the_work(warmup, tmp_path):
    """--eval-data is read for the closing table, hours later; its error must come first, and not blame --data."""
    argv = warmup(eval_data=tmp_path / "missing.jsonl", eval_limit=1)
    text = error_of(warmup_distill.main, argv)
    assert "missing.jsonl" in text and "--data" not in text.replace("--eval-data", "")
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


def test_template_that_refuses_a_conversation(warmup, tmp_path, pair_of_models):
    """Gemma's and Mistral's chat templates raise an exception of their own, e.g. for a system turn."""
    folders = {name: shutil.copytree(path, tmp_path / name) for name, path in pair_of_models.items()}
    for folder in folders.values():
        (folder / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    path = tmp_path / "data.jsonl"
    path.write_text(jsonl({"prompt": "1+2:"}))
    assert "System role not supported" in error_of(warmup_distill.main, warmup(**folders, data=path))


def test_chat_template_asked_for_but_missing(warmup, tmp_path, pair_of_models):
    folders = {name: shutil.copytree(path, tmp_path / name) for name, path in pair_of_models.items()}
    for folder in folders.values():
        (folder / "chat_template.jinja").unlink()
    expected = "the tokenizer has no chat template, for --template chat, use --template alpaca"
    assert_error(warmup_distill.main, warmup(**folders, template="chat"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Models and tokenizers
# ---------------------------------------------------------------------------------------------------------------------

NO_MODEL = "no model can be loaded (…), in {}, a folder or hub id with safetensors is needed"
NO_TOKENIZER = "no tokenizer can be loaded (…), in {}, check the path or hub id"


@pytest.fixture
def broken(tmp_path, pair_of_models):
    """broken(how, which="student") -> a copy of a model's folder on which `how` was called."""

    def copy(how, which="student"):
        folder = shutil.copytree(pair_of_models[which], tmp_path / "broken")
        how(folder)
        return folder

    return copy


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save(make_model("llama", 1).state_dict(), folder / "pytorch_model.bin")


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def third_layer(folder):
    """Where only two have weights: transformers would make the third one up."""
    set_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)


BAD_MODELS = [
    ("no weights", remove("model.safetensors"), NO_MODEL),
    ("pickled weights only", pickle_weights, NO_MODEL),
    ("weights cut off", truncate, NO_MODEL),
    ("weights are text", lambda folder: (folder / "model.safetensors").write_text("oops"), NO_MODEL),
    ("weights of another size", lambda folder: set_config(folder, hidden_size=32, intermediate_size=64), NO_MODEL),
    ("weights of a layer missing", third_layer, NO_MODEL),
    (
        "config contradicts itself",
        lambda folder: set_config(folder, layer_types=["x"]),
        "no … can be loaded (…), in {}, …",
    ),
    ("no config", remove("config.json"), NO_MODEL),
    ("unknown architecture", lambda folder: set_config(folder, model_type="zzz"), NO_MODEL),
    ("config is no JSON", lambda folder: (folder / "config.json").write_text("{"), NO_TOKENIZER),
    ("no tokenizer", remove("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    ("tokenizer is no JSON", lambda folder: (folder / "tokenizer.json").write_text("{"), NO_TOKENIZER),
    ("nothing in it", lambda folder: [file.unlink() for file in folder.iterdir()], NO_TOKENIZER),
    ("does not exist", shutil.rmtree, NO_TOKENIZER),
]


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("how, expected", [row[1:] for row in BAD_MODELS], ids=[row[0] for row in BAD_MODELS])
def test_bad_model_folder(warmup, broken, tmp_path, which, how, expected):
    folder = broken(how, which)
    assert_error(warmup_distill.main, warmup(**{which: folder}), expected.format(folder))
    assert list((tmp_path / "out").glob("pairs/*")) == []


@pytest.mark.parametrize("how, expected", [row[1:] for row in BAD_MODELS], ids=[row[0] for row in BAD_MODELS])
def test_bad_model_folder_of_dpo(align, broken, how, expected):
    folder = broken(how)
    assert_error(dpo.main, align(model=folder), expected.format(folder))


def test_bad_reference_of_dpo(align, broken):
    folder = broken(remove("model.safetensors"))
    assert_error(dpo.main, align(reference=folder), NO_MODEL.format(folder))


def test_reference_of_dpo_with_another_tokenizer(align, tmp_path):
    """Its log-probs would be of other tokens, and nothing would show it."""
    other = toy.make_tokenizer()
    other.add_tokens(["<new>"])
    make_model("llama", 3, rows=23).save_pretrained(tmp_path / "reference")
    other.save_pretrained(tmp_path / "reference")
    assert "'<new>'" in error_of(dpo.main, align(reference=tmp_path / "reference"))


def edit_tokenizer(edit):
    def how(folder):
        tokenizer = models.load_tokenizer(folder)
        edit(tokenizer).save_pretrained(folder)

    return how


def renamed_token(tokenizer):
    """The same number of tokens, but the character of id 7 is `x` instead of `3`."""
    text = tokenizer.backend_tokenizer.to_str().replace('"3": 7', '"x": 7').replace('"3":7', '"x":7')
    return type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text), eos_token="<eos>")


def added_token(tokenizer):
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def other_eos(tokenizer):
    tokenizer.eos_token = "<bos>"
    return tokenizer


@pytest.mark.parametrize(
    "edit, expected",
    [
        (renamed_token, "token '3' has id 7 in the student's tokenizer, None in the teacher's"),
        (added_token, "token '<new>' has id None in the student's tokenizer, 22 in the teacher's"),
        (other_eos, "eos is '<eos>' for the student and '<bos>' for the teacher"),
    ],
)
def test_tokenizers_that_differ(warmup, broken, pair_of_models, edit, expected):
    teacher, student = broken(edit_tokenizer(edit), "teacher"), pair_of_models["student"]
    expected = f"{expected}, in {student} and {teacher}, use a teacher and a student of one family"
    assert_error(warmup_distill.main, warmup(teacher=teacher), expected)


def test_tokenizer_without_eos(warmup, broken):
    def drop_eos(tokenizer):
        return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")

    folder = broken(edit_tokenizer(drop_eos))
    expected = f"the tokenizer has no eos token, in {folder}, set eos_token in its tokenizer_config.json"
    assert_error(warmup_distill.main, warmup(student=folder), expected)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_fewer_vocabulary_rows_than_tokens(warmup, broken, which):
    folder = broken(lambda folder: make_model("llama", 1, rows=21).save_pretrained(folder), which)
    expected = (
        f"the model has 21 vocabulary rows for 22 tokens, in {folder}, resize its embeddings or use its own tokenizer"
    )
    assert_error(warmup_distill.main, warmup(**{which: folder}), expected)


SOFT = "the model changes its logits after lm_head ({}), in {{}}, use a model without it"
UNSUPPORTED = [
    (Gemma3TextConfig, {"head_dim": 8, "final_logit_softcapping": 30.0}, SOFT.format("final_logit_softcapping")),
    (CohereConfig, {}, SOFT.format("logit_scale")),
    (GraniteConfig, {"logits_scaling": 2.0}, SOFT.format("logits_scaling")),
    (
        MistralConfig,
        {"sliding_window": 8},
        "sliding-window attention is not supported, in {}, use a model with full attention",
    ),
]


@pytest.mark.parametrize("config, settings, expected", UNSUPPORTED, ids=[row[0].__name__ for row in UNSUPPORTED])
def test_architectures_that_would_be_computed_wrongly(tmp_path, config, settings, expected):
    """Models whose forward does more than hidden states times lm_head, or hides columns by itself."""
    small = {"vocab_size": 22, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    AutoModelForCausalLM.from_config(config(**small, **settings)).save_pretrained(tmp_path)
    with pytest.raises(UserError) as caught:
        models.load_model(tmp_path, torch.float32, "cpu")
    assert str(caught.value) == expected.format(tmp_path)


def test_sliding_window_that_is_off_is_fine(tmp_path):
    """Qwen2's config carries a window that its layers do not use; Mistral's may be null."""
    make_model("qwen2", 1, sliding_window=8, use_sliding_window=False).save_pretrained(tmp_path)
    models.load_model(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize(
    "labels, remove_names, expected",
    [
        (2, [], "the reward model has 2 labels, in {}, use a sequence-classification model with one"),
        (1, ["model.safetensors"], "no reward model can be loaded (…), in {}, check --keep"),
        (1, ["tokenizer.json", "tokenizer_config.json"], NO_TOKENIZER),
    ],
    ids=["two labels", "no weights", "no tokenizer"],
)
def test_bad_reward_model(warmup, tmp_path, tokenizer, labels, remove_names, expected):
    folder = tmp_path / "reward"
    config = LlamaConfig(vocab_size=22, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_labels=labels,
                         num_attention_heads=2, pad_token_id=0)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in remove_names:
        (folder / name).unlink()
    assert_error(warmup_distill.main, warmup(keep=f"reward:{folder}"), expected.format(folder))


def test_causal_model_as_reward_model(warmup, broken):
    """Its config may well say one label; the score head would be made up, and the pairs chosen at random."""
    folder = broken(lambda folder: set_config(folder, id2label={"0": "x"}, label2id={"x": 0}))
    assert_error(warmup_distill.main, warmup(keep=f"reward:{folder}"), f"…, in {folder}, …")


# ---------------------------------------------------------------------------------------------------------------------
# OUT
# ---------------------------------------------------------------------------------------------------------------------


def test_out_with_other_arguments(warmup, tmp_path):
    """Refused, naming each argument that differs; --out, --device and what needs less memory are none of them. The run itself is left alone."""
    warmup_distill.main([str(word) for word in warmup()])
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = (
        "OUT holds a run with other arguments (--eta 1.0 there, 2.0 now; --keep all there, teacher now; "
        "--max-new-tokens 3 there, 4 now; --max-prompt-tokens 253 there, 252 now; "
        f"--shard-teacher False there, True now), in {tmp_path / 'out'}, give another --out"
    )
    argv = [*warmup(eta=2, keep="teacher", max_new_tokens=4, device="auto", micro_batch_size=1)]
    argv += ["--shard-teacher", "--activation-checkpointing"]
    assert_error(warmup_distill.main, argv, expected)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == files


def test_out_of_another_script(warmup, align):
    warmup_distill.main([str(word) for word in warmup()])
    text = error_of(dpo.main, align())
    assert text.startswith("OUT holds a run with other arguments (") and "--pairs None there, " in text


def test_out_is_a_file(warmup, align, tmp_path):
    (tmp_path / "out").write_text("mine")
    for main, argv in ((warmup_distill.main, warmup()), (dpo.main, align())):
        assert_error(main, argv, f"OUT is not a folder, at {tmp_path / 'out'}, give another --out")
    assert (tmp_path / "out").read_text() == "mine"


def test_out_is_the_model_folder(warmup, broken):
    """--out STUDENT would write among its files, and they would have changed when the run is taken up again."""
    folder = broken(lambda folder: None)
    before = sorted(folder.iterdir())
    expected = f"OUT has a config.json that no run here made, in {folder}, give another --out"
    assert_error(warmup_distill.main, warmup(student=folder, out=folder), expected)
    assert sorted(folder.iterdir()) == before


def test_out_cannot_be_made(warmup, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    assert_error(warmup_distill.main, warmup(out=out), f"OUT cannot be written (…), at {out}, give another --out")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"args": 1}'])
def test_out_with_foreign_args_json(warmup, tmp_path, content):
    """Other tools write an args.json as well."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "args.json").write_text(content)
    assert_error(warmup_distill.main, warmup(), f"…, in {tmp_path / 'out'}…, give another --out")


def test_out_where_a_model_lies_already(warmup, tmp_path, pair_of_models):
    """--out models, where models/student is the student itself: no args.json, so that folder is not this run's result.
    Taking it for one would skip the training in silence."""
    student = shutil.copytree(pair_of_models["student"], tmp_path / "out" / "student")
    assert_error(warmup_distill.main, warmup(student=student), f"…, … {tmp_path / 'out'}, give another --out")


@pytest.mark.parametrize(
    "changed",
    [
        {"teacher": "nowhere"},
        {"student": "nowhere"},
        {"data": "missing.jsonl"},
        {"prompt-column": "q"},
        {"max-prompt-tokens": 3},
        {"batch-size": 4, "micro-batch-size": 3},
    ],
    ids=lambda changed: "+".join(changed),
)
def test_bad_input_does_not_claim_out(warmup, tmp_path, changed):
    """Otherwise the corrected command is refused: OUT would hold a run with other arguments."""
    paths = {flag: tmp_path / value for flag, value in changed.items() if flag in ("teacher", "student", "data")}
    error_of(warmup_distill.main, warmup(**changed | paths))
    assert not (tmp_path / "out").exists()
    warmup_distill.main([str(word) for word in warmup()])


def test_a_run_that_made_nothing_does_not_claim_out(warmup, tmp_path):
    """The reward model is loaded after OUT/args.json is written; nothing else is there when it fails."""
    error_of(warmup_distill.main, warmup(keep=f"reward:{tmp_path / 'nowhere'}"))
    assert (tmp_path / "out" / "args.json").exists()
    warmup_distill.main([str(word) for word in warmup()])
    assert common.read_json(tmp_path / "out" / "args.json")["args"]["keep"] == "all"


def test_dpo_bad_batch_does_not_claim_out(align, tmp_path):
    error_of(dpo.main, align(batch_size=4, micro_batch_size=3))
    assert not (tmp_path / "out").exists()


def test_run_goes_on_when_the_model_is_mended(warmup, broken, tmp_path, pair_of_models):
    """The same command, once the weights are there."""
    folder = broken(remove("model.safetensors"))
    error_of(warmup_distill.main, warmup(student=folder))
    shutil.copy(f"{pair_of_models['student']}/model.safetensors", folder)
    warmup_distill.main([str(word) for word in warmup(student=folder)])
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("batch, micro", [(4, 3), (6, 4), (5, 2)])
def test_batch_that_does_not_divide(warmup, align, tmp_path, batch, micro):
    expected = (
        f"--batch-size {batch} does not divide over 1 processes with micro-batches of {micro}, "
        f"{COMMAND_LINE}, give a multiple of processes x --micro-batch-size"
    )
    assert_error(warmup_distill.main, warmup(batch_size=batch, micro_batch_size=micro), expected)
    assert_error(dpo.main, align(batch_size=batch, micro_batch_size=micro, out=tmp_path / "dpo"), expected)


def test_toy_where_other_files_are(tmp_path, monkeypatch):
    """out/toy holds something else: toy.build refuses to touch it, and the command says so in one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "toy").mkdir(parents=True)
    (tmp_path / "out" / "toy" / "mine.txt").write_text("mine")
    text = error_of(warmup_distill.main, ["--out", tmp_path / "run", "--device", "cpu"])
    assert "mine.txt" in text and "out/toy" in text


# ---------------------------------------------------------------------------------------------------------------------
# dpo.py's pairs (tests/test_pairs.py has what a line may hold)
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "no pairs file, at {}, run warmup_distill.py first or check --pairs"),
        ("", "no pairs, in {}, lower --eta or use more prompts"),
        ('{"prompt": "1"', "not JSON (…), in {} line 1, mend or delete the line"),
        ('{"prompt": "1"}\n', "no columns chosen and rejected, in {} line 1, see the README for the format"),
    ],
    ids=["missing", "empty", "cut off", "no pairs in it"],
)
def test_bad_pairs_file(align, tmp_path, content, expected):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    assert_error(dpo.main, align(pairs=path), expected.format(path))
    assert not (tmp_path / "out").exists()


def test_loss_that_is_no_number(align, tmp_path):
    """A learning rate beyond all reason: the run stops, names step and prompts, and writes no student."""
    argv = [*align(), "--lr", "1e30", "--lr-warmup-ratio", "0", "--epochs", "4", "--max-grad-norm", "1e30"]
    text = error_of(dpo.main, argv)
    pattern = r"loss (nan|-?inf|\S+) and gradient norm \S+ at step \d, prompts \[\d, \d\], in \S+, lower --lr or use .*"
    assert re.fullmatch(pattern, text), text
    assert not (tmp_path / "out" / "student").exists()


PAIR = {"prompt": "1", "chosen": "2", "rejected": "3"}
IDS = {"prompt_ids": [4], "chosen_ids": [5], "rejected_ids": [6]}
NO_COLUMNS = "no columns chosen and rejected, in {} line 1, see the README for the format"
NOT_IDS = "{} is not a list of ids below 22, in {{}} line 1, use the pairs' own tokenizer"
NOT_TEXT = "prompt, chosen and rejected are not all text or all messages, in {} line 1, mend the line"
BAD_PAIRS = {
    "null": (None, NO_COLUMNS),
    "a list": ([], NO_COLUMNS),
    "nulls": (dict.fromkeys(PAIR), NOT_TEXT),
    "numbers": (dict.fromkeys(PAIR, 1), NOT_TEXT),
    "empty prompt": (PAIR | {"prompt": ""}, "prompt_ids is empty, in {} line 1, mend or delete the line"),
    "equal": (PAIR | {"chosen": "3"}, "chosen equals rejected, in {} line 1, mend or delete the line"),
    "surrogate": (PAIR | {"chosen": "\ud800"}, NOT_JSON.replace("#", "1")),
    "id out of range": (IDS | {"chosen_ids": [22]}, NOT_IDS.format("chosen_ids")),
    "id below 0": (IDS | {"prompt_ids": [-1]}, NOT_IDS.format("prompt_ids")),
    "id over 64 bits": (IDS | {"rejected_ids": [1 << 70]}, NOT_IDS.format("rejected_ids")),
    "id is a float": (IDS | {"chosen_ids": [5.0]}, NOT_IDS.format("chosen_ids")),
    "id is true": (IDS | {"chosen_ids": [True]}, NOT_IDS.format("chosen_ids")),
    "ids are text": (IDS | {"chosen_ids": "5"}, NOT_IDS.format("chosen_ids")),
    "another tokenizer": (IDS | {"tokenizer": "0123456789abcdef"},
                          "the ids were made with another tokenizer, in {} line 1, use the model that the pairs were made with"),
}  # fmt: skip


@pytest.mark.parametrize("row, expected", BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_bad_pair(align, tmp_path, row, expected):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert_error(dpo.main, align(pairs=path), expected.format(path))
    assert not (tmp_path / "out").exists()


def test_pairs_of_a_run_with_another_tokenizer(warmup, align, broken, tmp_path):
    """OUT/pairs.jsonl keeps its tokenizer's fingerprint: ids that are in range for both would go unnoticed."""
    warmup_distill.main([str(word) for word in warmup()])
    folder = broken(edit_tokenizer(renamed_token))
    path = tmp_path / "out" / "pairs.jsonl"
    assert path.read_text()
    expected = (
        f"the ids were made with another tokenizer, in {path} line 1, use the model that the pairs were made with"
    )
    assert_error(dpo.main, align(model=folder, pairs=path, out=tmp_path / "dpo"), expected)


# ---------------------------------------------------------------------------------------------------------------------
# kd.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def distil(tmp_path, pair_of_models, prompts_file):
    """The same for kd.py."""

    def argv(**changed):
        flags = {**pair_of_models, "data": prompts_file, "out": tmp_path / "out", "limit": 2, "max-new-tokens": 40,
                 "max-steps": 1, "eval-limit": 0, "device": "cpu", "threads": 1, "batch-size": 2, "micro-batch-size": 2}  # fmt: skip
        return to_argv(flags | {flag.replace("_", "-"): value for flag, value in changed.items()})

    return argv


KD_RANGES = [
    *((flag, v, SHARE) for flag in ("--kd-rate", "--on-policy", "--tail-mass") for v in (-0.1, 1.1, "nan")),
    *((flag, v, "in (0, 1)") for flag in ("--jsd-beta", "--skew-alpha") for v in (0.0, 1.0, "nan")),
    *(("--temperature", value, POSITIVE) for value in (0.0, -1.0, "nan", "inf")),
    *((flag, 0, ONE) for flag in ("--max-new-tokens", "--refresh-every", "--prompts-per-batch", "--teacher-top-k")),
    *((flag, -1, ZERO) for flag in ("--limit", "--eval-limit")),
    ("--seed", 1 << 64, "from 0 to 2^62 - 1"),
    ("--batch-size", 0, ONE),
    ("--lr", "nan", POSITIVE),
]


@pytest.mark.parametrize("flag, value, allowed", KD_RANGES)
def test_kd_flag_out_of_range(distil, tmp_path, flag, value, allowed):
    argv = [*distil(), f"{flag}={value}"]
    assert_error(kd.main, argv, f"{flag} is {value}, {COMMAND_LINE}, give a value {allowed}")
    assert not (tmp_path / "out").exists()


KD_ERRORS = {
    "unknown loss": ({"loss": "mse"}, f"argument --loss: invalid choice: 'mse' (…), {COMMAND_LINE}, see SCRIPT --help"),
    "unknown mode": ({"mode": "both"}, f"argument --mode: invalid choice: 'both' (…), {COMMAND_LINE}, see SCRIPT --help"),
    "batch": ({"batch_size": 4, "micro_batch_size": 3}, f"--batch-size 4 does not divide over 1 processes with micro-batches of 3, {COMMAND_LINE}, give a multiple of processes x --micro-batch-size"),
    "no teacher": ({"teacher": None}, f"--teacher is missing, {COMMAND_LINE}, give it, or neither teacher nor data for the toy"),
    "no student": ({"student": None}, f"--student is missing, {COMMAND_LINE}, give it, or neither teacher nor data for the toy"),
    "no labels": ({"mode": "student", "kd_rate": 0.0}, f"--kd-rate is 0.0, {COMMAND_LINE}, give a value above 0: with --mode student there are no labels"),
    "refresh": ({"mode": "student", "refresh_every": 3, "save_every": 4}, f"--save-every is 4, {COMMAND_LINE}, give a value that --refresh-every 3 divides"),
    "cache": ({"mode": "student", "teacher_cache": "c"}, f"--teacher-cache needs responses that stay, and a teacher: not --mode student, not --kd-rate 0, {COMMAND_LINE}, leave it out"),
    "all prompts long": ({"max_prompt_tokens": 2}, "all 2 prompts are over --max-prompt-tokens 2, in --data, raise the limit or give other data"),
    "all responses long": ({"max_new_tokens": 1}, "all responses are over --max-new-tokens, in {data}, raise the limit"),
    "no such column": ({"response_column": "a"}, "no column a, in {data} with columns …, name it with --response-column"),
    "no such data": ({"data": "{file}-no.jsonl"}, UNREADABLE.format("{file}-no.jsonl")),
    "cache is a file": ({"teacher_cache": "{file}"}, "the teacher cache cannot be written (…), at {file}, give another --teacher-cache"),
    "cache cannot be made": ({"teacher_cache": "{file}/cache"}, "the teacher cache cannot be written (…), at {file}/cache, give another --teacher-cache"),
    "OUT is a file": ({"out": "{file}"}, "OUT is not a folder, at {file}, give another --out"),
}  # fmt: skip


@pytest.mark.parametrize("changed, expected", KD_ERRORS.values(), ids=KD_ERRORS)
def test_kd_errors(distil, tmp_path, prompts_file, changed, expected):
    (tmp_path / "file").write_text("mine")
    words = {"data": prompts_file, "file": str(tmp_path / "file")}
    changed = {flag: value.format(**words) if isinstance(value, str) else value for flag, value in changed.items()}
    assert_error(kd.main, distil(**changed), expected.format(**words))
    assert not (tmp_path / "out" / "student").exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("how, expected", [row[1:] for row in BAD_MODELS], ids=[row[0] for row in BAD_MODELS])
def test_bad_model_folder_of_kd(distil, broken, tmp_path, which, how, expected):
    folder = broken(how, which)
    assert_error(kd.main, distil(**{which: folder}), expected.format(folder))
    assert not (tmp_path / "out" / "student").exists()


def test_kd_rows_without_a_response(distil, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(jsonl({"prompt": "1", "response": "2"}, {"prompt": "3", "response": None}))
    assert_error(
        kd.main, distil(data=path), f"there is no response, in {path} row 1, name its column: --response-column"
    )


def test_kd_tokenizers_that_differ(distil, broken, pair_of_models):
    teacher, student = broken(edit_tokenizer(added_token), "teacher"), pair_of_models["student"]
    expected = (
        "token '<new>' has id None in the student's tokenizer, 22 in the teacher's, "
        f"in {student} and {teacher}, use a teacher and a student of one family"
    )
    assert_error(kd.main, distil(teacher=teacher), expected)


# ---------------------------------------------------------------------------------------------------------------------
# eval.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def judge(tmp_path, pair_of_models, prompts_file):
    """The same for eval.py."""

    def argv(**changed):
        flags = {"model": pair_of_models["student"], "data": f"toy={prompts_file}", "metric": "math", "limit": 2,
                 "max-new-tokens": 3, "out": tmp_path / "out", "device": "cpu", "threads": 1}  # fmt: skip
        return to_argv(flags | {flag.replace("_", "-"): value for flag, value in changed.items()})

    return argv


EVAL_ERRORS = {
    "model alone": ({"data": None}, f"--model and --data go together, {COMMAND_LINE}, give both, or --compare alone"),
    "no such file": ({"data": "toy=no.jsonl"}, "no such file, in --data toy=no.jsonl, give NAME=FILE or FILE"),
    "no metric": ({"metric": None}, "nothing says how to score 'toy', in --data toy={data}, give --metric rouge or math, or a known name=FILE"),
    "name": ({"data": "a/b={data}"}, "the name 'a/b' cannot be part of a file name, in --data a/b={data}, give NAME=FILE"),
    "empty file": ({"data": "x={empty}"}, "no rows, in {empty}, give data with at least one row"),
    "null row": ({"data": "x={null}"}, "the rows are not objects with named columns, in {null}, give one JSON object a line"),
    "broken JSON": ({"data": "x={cut}"}, "not JSON (…), in {cut} line 2, mend or delete the line"),
    "surrogate": ({"data": "x={surrogate}"}, "not JSON (…), in {surrogate} line 1, mend or delete the line"),
    "temperature": ({"temperature": 0.0}, f"--temperature is 0.0, {COMMAND_LINE}, give a value above 0"),
    "top-p": ({"top_p": 1.5}, f"--top-p is 1.5, {COMMAND_LINE}, give a value in (0, 1]"),
    "limit": ({"limit": -1}, f"--limit is -1, {COMMAND_LINE}, give a value of 0 or more"),
    "batch": ({"batch_size": 0}, f"--batch-size is 0, {COMMAND_LINE}, give a value of 1 or more"),
    "eta": ({"eta": "nan"}, f"--eta is nan, {COMMAND_LINE}, give a value in nats, such as 4"),
    "model missing": ({"model": "{file}-no"}, NO_TOKENIZER.format("{file}-no")),
    "other teacher": ({"distance": "{file}-no"}, NO_TOKENIZER.format("{file}-no")),
    "OUT in a file": ({"out": "{file}"}, "OUT cannot be written (…), at {file}/eval, give another --out"),
}  # fmt: skip


@pytest.mark.parametrize("changed, expected", EVAL_ERRORS.values(), ids=EVAL_ERRORS)
def test_eval_errors(judge, tmp_path, prompts_file, changed, expected):
    contents = {"empty": "", "null": "null\n", "cut": jsonl({"prompt": "1", "response": "1"}) + '{"pro', "file": "mine",
                "surrogate": jsonl({"prompt": "\ud800", "response": "1"})}  # fmt: skip
    words = {"data": prompts_file}
    for name, text in contents.items():
        words[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text(text)
    changed = {flag: value.format(**words) if isinstance(value, str) else value for flag, value in changed.items()}
    assert_error(evaluation.main, judge(**changed), expected.format(**words))
    assert not list((tmp_path / "out").rglob("*-seed*"))


def test_bfloat16_where_it_is_not_supported(monkeypatch):
    """An old GPU: asked for, refused; by itself float32 is taken."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    world = common.World(0, 1, torch.device("cuda"))
    with pytest.raises(UserError) as caught:
        models.compute_dtype("bfloat16", world)
    assert str(caught.value) == "this GPU has no bfloat16, for --dtype bfloat16, use --dtype float32"
    assert models.compute_dtype("auto", world) == torch.float32


def test_remote_code_is_not_run(warmup, broken, tmp_path):
    """A model folder with Python code of its own: refused without --trust-remote-code, and nothing of it has run."""

    def with_code(folder):
        set_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
        (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise RuntimeError\n")

    folder = broken(with_code)
    text = error_of(warmup_distill.main, warmup(student=folder))
    assert str(folder) in text and not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What the shell sees
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exits(monkeypatch):
    """os._exit and sleeps of `common.run`, recorded instead of done; pytest keeps its own signal handlers."""
    seen = []

    def leave(status):
        seen.append(("exit", status))
        raise SystemExit(status)

    def sleep(seconds):
        slept = seen.pop()[1] if seen and seen[-1][0] == "sleep" else 0
        seen.append(("sleep", round(slept + seconds, 3)))

    monkeypatch.setattr(common.os, "_exit", leave)
    monkeypatch.setattr(common.time, "sleep", sleep)
    monkeypatch.setattr(common.signal, "signal", lambda *handler: None)
    monkeypatch.setattr(common, "STATUS", common.Status())
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    return seen


def fail():
    raise UserError("what", "where", "what to do")


@pytest.mark.parametrize(
    "rank, line, expected",
    [
        (None, "error: what, where, what to do\n", [("exit", 2)]),
        ("0", "error: what, where, what to do\n", [("exit", 2)]),
        ("3", "error: what, where, what to do (rank 3)\n", [("sleep", 5), ("exit", 2)]),
    ],
)
def test_rank_0_speaks_first(monkeypatch, capsys, exits, rank, line, expected):
    """Others wait for torchrun to end them; those still there after five seconds have an error of their own."""
    if rank:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit):
        common.run(fail)
    assert capsys.readouterr().err == line and exits == expected


def test_a_rank_is_silent_once_another_has_spoken(monkeypatch, capsys, exits, tmp_path):
    """Each rank's error.json is where torchrun looks for it: .../attempt_0/RANK/error.json."""
    for rank in ("1", "0"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit):
            common.run(fail)
        line = "error: what, where, what to do (rank 1)\n" if rank == "1" else ""
        assert capsys.readouterr().err == line
    assert common.read_json(tmp_path / "1" / "error.json")["message"] == "error: what, where, what to do (rank 1)"
    assert exits == [("sleep", 5), ("exit", 2), ("exit", 2)]


@pytest.mark.parametrize("number", [common.signal.SIGTERM, common.signal.SIGINT])
def test_a_signal_has_no_traceback(capsys, exits, number):
    def interrupted():
        common.STATUS.enter("pairs")
        common.STATUS.on_signal(number, None)

    with pytest.raises(SystemExit):
        common.run(interrupted)
    assert exits == [("exit", 128 + number)]
    assert capsys.readouterr().err == (
        f"error: stopped by {number.name}, in stage pairs, the same command goes on from what is done\n"
    )


def test_a_second_signal_does_not_wait_for_the_step(exits):
    common.STATUS.enter("dpo", finishes_step=True)
    common.STATUS.on_signal(common.signal.SIGTERM, None)  # no exception: the loop looks at it behind its step
    common.STATUS.on_signal(common.signal.SIGTERM, None)  # torchrun hands on what a scheduler has told all processes
    common.STATUS.signalled -= 2
    with pytest.raises(common.Stopped):
        common.STATUS.on_signal(common.signal.SIGTERM, None)


@pytest.mark.parametrize(
    "error, words",
    [
        (
            OSError(28, "No space left on device", "out/x"),
            "the disk refuses (No space left on device) at out/x: make room",
        ),
        (OSError(30, "Read-only file system"), "the disk refuses (Read-only file system) at OUT: make room"),
        (
            SafetensorError("I/O error: No space left (os error 28)"),
            "the disk refuses (I/O error: No space left (os error",
        ),
        (CheckpointException("save", {1: (OSError(28, "No space"), None)}), "the disk refuses (No space)"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), "another rank is gone ("),
    ],
)
def test_what_the_machine_does_is_one_line(capsys, exits, error, words):
    def main():
        raise error

    with pytest.raises(SystemExit):
        common.run(main)
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {words}") and ", in stage start-up, the same command goes on" in printed
    assert exits == [("exit", 1)] and printed.count("\n") == 1


def test_other_exceptions_keep_their_traceback(exits):
    """A bug of ours is not dressed up as the user's error."""
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)
    assert exits == []


@pytest.mark.parametrize("script", ["warmup_distill.py", "dpo.py"])
def test_one_process_prints_one_line(warmup, align, tmp_path, script):
    """stderr is the error line and nothing else, not even a library's complaint about the same file."""
    path = tmp_path / "cut.jsonl"
    path.write_text('{"prompt": "1"}\n{"prompt": \n')
    argv = warmup(data=path) if script == "warmup_distill.py" else align(pairs=path)
    result = launch(0, script, *argv)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: .+, in .*cut.jsonl.*, .+\n", result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


TOGETHER = {  # script -> the flags that are wrong, the one error line
    "warmup_distill.py": ({"prompt_column": "q"}, "error: no column q, in .+, name it with --prompt-column"),
    "dpo.py": (
        {"pairs": "no.jsonl"},
        "error: no pairs file, at no.jsonl, run warmup_distill.py first or check --pairs",
    ),
    "kd.py": (
        {"batch_size": 3},
        r"error: --batch-size 3 does not divide over 2 processes with .+, on the command line, .+",
    ),
    "eval.py": ({"data": "x=no.jsonl"}, "error: no such file, in --data x=no.jsonl, give NAME=FILE or FILE"),
}


@pytest.mark.parametrize("script", [*TOGETHER, "rank 0 alone"])
def test_two_processes_print_one_line(warmup, align, distil, judge, tmp_path, script):
    """torchrun ends the other rank and reports in its own way; from us there is one line and no traceback, and no hang."""
    (tmp_path / "file").write_text("mine")
    flags = {"warmup_distill.py": warmup, "dpo.py": align, "kd.py": distil, "eval.py": judge}
    if script in TOGETHER:
        changed, expected = TOGETHER[script]
        argv = flags[script](**changed)
    else:  # rank 0 makes OUT while rank 1 waits for it
        script, argv = "warmup_distill.py", warmup(out=tmp_path / "file" / "out")
        expected = r"error: OUT cannot be written \(.+\), at .+, give another --out"
    result = launch(2, script, *argv, timeout=100)
    assert result.returncode == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert re.fullmatch(expected, line), result.stderr
    last = [line for line in result.stderr.splitlines() if "traceback :" in line][-1]
    assert last.strip() == f"traceback : {line}", "torchrun's own report ends with it"
    assert f'File "{ROOT}' not in result.stderr, "a traceback of ours"
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"
