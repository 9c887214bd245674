"""Prompts: columns, file formats, templates, and the one bos token, with a byte-level tokenizer made here."""

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import common
import data
import toy

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # no network: it counts each load, of a local file too
BOS, EOS = 0, 1


def byte_tokenizer(add_bos=True, chat_template=None):
    """One token a byte, no merges; <s> is put before every text if `add_bos`, as Llama's tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def read(path, *flags):
    """The rows of `path` as `data.read_examples` returns them, given the flags that a user types."""
    parser = common.ArgumentParser("test")
    data.add_arguments(parser)
    return list(data.read_examples(parser.parse_args(["--data", str(path), *map(str, flags)])))


def write(tmp_path, *rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def example(instruction, input="", response=None, messages=None):
    return {"instruction": instruction, "input": input, "response": response, "messages": messages}


def encode(examples, tokenizer, template="auto", max_tokens=1000):
    return data.encode_prompts(examples, tokenizer, template, max_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


def turn(role, content):
    return {"role": role, "content": content}


ASK, HELP, SYSTEM = turn("user", "Q"), turn("assistant", "A"), turn("system", "S")


COLUMNS = [
    ({"question": "Q", "answer": "A"}, example("Q", response="A")),
    ({"instruction": "Q", "input": "I", "output": "A"}, example("Q", "I", "A")),
    ({"instruction": "Q", "input": "", "output": "A"}, example("Q", "", "A")),
    ({"instruction": "Q", "context": "I", "response": "A", "category": "c"}, example("Q", "I", "A")),
    ({"prompt": "Q", "response": "A"}, example("Q", response="A")),
    ({"prompt": "Q", "completion": "A"}, example("Q", response="A")),
    ({"problem": "Q", "solution": "A", "level": 5}, example("Q", response="A")),
    ({"prompt": "Q"}, example("Q")),
    ({"prompt": "Zwölf – 十二\n\n?", "response": "è"}, example("Zwölf – 十二\n\n?", response="è")),
    ({"messages": [ASK]}, example("Q", messages=[ASK])),
    ({"messages": [ASK, HELP]}, example("Q", response="A", messages=[ASK])),
    ({"messages": [SYSTEM, ASK, HELP]}, example("S\n\nQ", response="A", messages=[SYSTEM, ASK])),
    ({"messages": [ASK, HELP, ASK]}, example("Q\n\nA\n\nQ", messages=[ASK, HELP, ASK])),
    ({"messages": [ASK, HELP, ASK, HELP]}, example("Q\n\nA\n\nQ", response="A", messages=[ASK, HELP, ASK])),
    ({"messages": [ASK, HELP], "prompt": "other"}, example("Q", response="A", messages=[ASK])),
]


@pytest.mark.parametrize("row, expected", COLUMNS, ids=["+".join(row) for row, _ in COLUMNS])
def test_usual_columns_are_found(tmp_path, row, expected):
    assert read(write(tmp_path, row)) == [expected]


@pytest.mark.parametrize(
    "row, flags, expected",
    [
        ({"text": "Q", "label": "A"}, ("--prompt-column", "text", "--response-column", "label"), example("Q", "", "A")),
        ({"question": "no", "text": "Q", "answer": "A"}, ("--prompt-column", "text"), example("Q", "", "A")),
        ({"prompt": "Q", "answer": "no", "gold": "A"}, ("--response-column", "gold"), example("Q", "", "A")),
        ({"messages": [ASK], "prompt": "P", "answer": "A"}, ("--prompt-column", "prompt"), example("P", "", "A")),
        ({"input": "Q", "output": "A"}, ("--prompt-column", "input"), example("Q", "", "A")),
        ({"prompt": "Q", "context": "A"}, ("--response-column", "context"), example("Q", "", "A")),
        ({"solution": "Q"}, ("--prompt-column", "solution"), example("Q")),
    ],
    ids=[
        "both",
        "prompt",
        "response",
        "prompt before messages",
        "prompt is `input`",
        "response is `context`",
        "prompt is `solution`",
    ],
)
def test_columns_named_by_flag(tmp_path, row, flags, expected):
    """A column that is the prompt or the response is not the prompt's input as well."""
    assert read(write(tmp_path, row), *flags) == [expected]


def test_rows_like_gsm8k(tmp_path):
    """The response is kept whole, with its calculator marks and the answer behind ####."""
    answer = "She has 16-3-4=<<16-3-4=9>>9 eggs.\nShe makes 9*2=$<<9*2=18>>18.\n#### 18"
    found = read(write(tmp_path, {"question": "Janet’s ducks lay 16 eggs.", "answer": answer}))
    assert found == [example("Janet’s ducks lay 16 eggs.", response=answer)]
    assert encode(found, byte_tokenizer())[0][0]["gold"] == answer


def test_null_input_is_no_input_and_null_response_is_none(tmp_path):
    rows = [{"prompt": "1", "input": None, "response": None}, {"prompt": "2", "input": "I", "response": "A"}]
    assert read(write(tmp_path, *rows)) == [example("1"), example("2", "I", "A")]


def test_limit_takes_the_first_rows(tmp_path):
    path = write(tmp_path, *({"prompt": str(k)} for k in range(5)))
    first = lambda limit: [row["instruction"] for row in read(path, "--limit", limit)]
    assert first(2) == ["0", "1"]
    assert first(0) == first(5) == first(99) == ["0", "1", "2", "3", "4"]


def test_limit_reads_no_further(tmp_path):
    """A bad row behind the limit is no error."""
    path = write(tmp_path, {"prompt": "1"}, {"prompt": None})
    assert read(path, "--limit", 1) == [example("1")]


# ---------------------------------------------------------------------------------------------------------------------
# File formats
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [
    {"question": 'a "quoted", 1\n2', "answer": "x\ny"},
    {"question": "é", "answer": "#### 1,000"},
    {"question": "3", "answer": "z"},
]


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0].keys())
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize(
    "name, put",
    [
        ("a.json", lambda path: path.write_text(json.dumps(ROWS))),
        ("a.jsonl", lambda path: path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))),
        ("a.csv", write_csv),
        ("a.parquet", lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path)),
        ("with space.jsonl", lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))),
    ],
    ids=["json", "jsonl", "csv", "parquet", "space in name"],
)
def test_file_formats(tmp_path, name, put):
    """The same rows from every format, in order, quotes, newlines and accents untouched."""
    put(tmp_path / name)
    assert read(tmp_path / name) == [example(row["question"], response=row["answer"]) for row in ROWS]


def test_changed_file_is_read_again(tmp_path):
    """`datasets` caches; a file that was edited must not come from its cache."""
    path = write(tmp_path, {"prompt": "old"})
    assert read(path) == [example("old")]
    write(tmp_path, {"prompt": "new"}, {"prompt": "newer"})
    assert read(path) == [example("new"), example("newer")]


# ---------------------------------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------------------------------

WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Add {them}.

### Input:
1 and 2

### Response:
"""
WITHOUT_INPUT = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Add {them}.

### Response:
"""
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", ["auto", "alpaca"])
@pytest.mark.parametrize("input, text", [("1 and 2", WITH_INPUT), ("", WITHOUT_INPUT)], ids=["input", "no input"])
def test_alpaca_template(template, input, text):
    """Exactly the text of Taori et al.; braces in the data are not fields."""
    found = data.prompt_text(example("Add {them}.", input), byte_tokenizer(add_bos=False), template)
    assert found == text


def test_alpaca_by_flag_although_there_is_a_chat_template():
    tokenizer = byte_tokenizer(add_bos=False, chat_template=CHAT)
    assert data.prompt_text(example("Add {them}."), tokenizer, "alpaca") == WITHOUT_INPUT
    messages = [SYSTEM, turn("user", "Add {them}.")]
    found = data.prompt_text(example("S\n\nAdd {them}.", messages=messages), tokenizer, "alpaca")
    assert found == WITHOUT_INPUT.replace("Add", "S\n\nAdd")


@pytest.mark.parametrize("template", ["auto", "chat"])
@pytest.mark.parametrize(
    "row, text",
    [
        (example("Q"), "<s>[user]Q[assistant]"),
        (example("Q", "I"), "<s>[user]Q\n\nI[assistant]"),
        (example("S\n\nQ", messages=[SYSTEM, ASK]), "<s>[system]S[user]Q[assistant]"),
        (example("", messages=[ASK, HELP, ASK]), "<s>[user]Q[assistant]A[user]Q[assistant]"),
    ],
    ids=["instruction", "instruction and input", "system turn", "several turns"],
)
def test_chat_template(template, row, text):
    assert data.prompt_text(row, byte_tokenizer(chat_template=CHAT), template) == text


def test_date_in_a_chat_template_is_pinned():
    """Llama-3's template writes today's date unless it gets one; a resumed run must see the prompt of the first day."""
    llama3 = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=llama3 + "Today Date: {{ date_string }}")
    assert data.prompt_text(example("Q"), tokenizer, "auto") == "Today Date: 26 Jul 2024"


def test_template_none_is_the_text_as_it_is():
    tokenizer = byte_tokenizer(add_bos=False, chat_template=CHAT)
    assert data.prompt_text(example(" Q\n{x} ", "I"), tokenizer, "none") == " Q\n{x} "


# ---------------------------------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["none", "alpaca", "chat"])
@pytest.mark.parametrize("add_bos", [True, False], ids=["tokenizer adds bos", "tokenizer adds none"])
def test_bos_once_where_the_tokenizer_wants_it(template, add_bos):
    """Where the tokenizer adds bos by itself, or the chat template writes it: one, at the start. Otherwise none."""
    tokenizer = byte_tokenizer(add_bos, chat_template=CHAT)
    ids = encode([example("1+2=")], tokenizer, template)[0][0]["ids"]
    if add_bos or template == "chat":
        assert ids[0] == BOS and ids.count(BOS) == 1
    else:
        assert BOS not in ids
    assert EOS not in ids, "the prompt goes on with the response"


@pytest.mark.parametrize("add_bos", [True, False], ids=["tokenizer adds bos", "tokenizer adds none"])
def test_bos_in_the_data_is_not_doubled(add_bos):
    """Prompts that were rendered beforehand, with --template none, often begin with bos."""
    ids = encode([example("<s>1+2=")], byte_tokenizer(add_bos), "none")[0][0]["ids"]
    assert ids[0] == BOS and ids.count(BOS) == 1


@pytest.mark.parametrize("template", ["none", "alpaca", "chat"])
def test_text_and_ids_agree(template):
    """`text` has its special tokens written out, so that it tokenizes, without added ones, to `ids`."""
    tokenizer = byte_tokenizer(chat_template=CHAT)
    [prompt], skipped = encode([example("é 1\n2", "I", "gold")], tokenizer, template)
    assert skipped == 0 and prompt["gold"] == "gold"
    assert prompt["ids"] == tokenizer(prompt["text"], add_special_tokens=False).input_ids
    assert tokenizer.decode(prompt["ids"]) == prompt["text"]


def test_long_prompts_are_skipped_and_keep_their_numbers():
    """The limit itself is allowed; prompt_id is the row's number, whatever was skipped before it."""
    rows = [example("12345"), example("1"), example("1234"), example("123456"), example("123")]
    prompts, skipped = encode(rows, byte_tokenizer(add_bos=False), "none", max_tokens=4)
    assert [(p["prompt_id"], p["text"]) for p in prompts] == [(1, "1"), (2, "1234"), (4, "123")] and skipped == 2
    assert all(len(p["ids"]) == len(p["text"]) for p in prompts)


def test_bos_counts_towards_the_limit():
    assert encode([example("1234"), example("123")], byte_tokenizer(), "none", max_tokens=4)[1] == 1


def test_toy_prompt():
    """The embedded default: <bos> and the characters, one token each."""
    tokenizer = toy.make_tokenizer()
    [prompt], _ = encode([example("199+877:")], tokenizer)
    assert prompt["text"] == "<bos>199+877:"
    assert prompt["ids"] == tokenizer.convert_tokens_to_ids(["<bos>", *"199+877:"])
