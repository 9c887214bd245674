"""lib/data.py: columns, file formats, templates, the one bos token, Arrow files; with a byte-level tokenizer made here."""

import itertools
import json
import os
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lib import data, runs

BOS, EOS = 0, 1
WORLD = SimpleNamespace(rank=0, first=lambda function: function())


def byte_tokenizer(add_bos=True, chat_template=None):
    """One token a byte, no merges; <s> is put before every text if `add_bos`, as Llama's tokenizers do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if add_bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **specials)


def parse(path, *flags):
    """What a script's arguments say of `path`, given the flags that a user types."""
    parser = runs.ArgumentParser("test")
    data.add_arguments(parser)
    return parser.parse_args(["--data", str(path), *map(str, flags)])


def read(path, *flags):
    """The rows of `path` as `data.read_examples` returns them."""
    return list(data.read_examples(parse(path, *flags)))


def write(tmp_path, *rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def example(instruction, input="", response=None, messages=None):
    return {"instruction": instruction, "input": input, "response": response, "messages": messages}


def encode(examples, tokenizer, template="auto", max_tokens=1000):
    skipped = []
    return list(data.encode_prompts(examples, "in --data", tokenizer, template, max_tokens, skipped)), len(skipped)


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


def turn(role, content):
    return {"role": role, "content": content}


ASK, HELP, SYSTEM = turn("user", "Q"), turn("assistant", "A"), turn("system", "S")


COLUMNS = [
    ({"question": "Q", "answer": "2=<<1+1=2>>2\n#### 2"}, example("Q", response="2=<<1+1=2>>2\n#### 2")),
    ({"instruction": "Q", "input": "I", "output": "A"}, example("Q", "I", "A")),
    ({"instruction": "Q", "context": "I", "response": "A", "category": "c"}, example("Q", "I", "A")),
    ({"prompt": "Q", "completion": "A"}, example("Q", response="A")),
    ({"problem": "Q", "solution": "A", "level": 5}, example("Q", response="A")),
    ({"prompt": "Q"}, example("Q")),
    ({"prompt": "Zwölf – 十二\n\n?", "response": "è"}, example("Zwölf – 十二\n\n?", response="è")),
    ({"messages": [ASK]}, example("Q", messages=[ASK])),
    ({"messages": [ASK, HELP]}, example("Q", response="A", messages=[ASK])),
    ({"messages": [SYSTEM, ASK, HELP]}, example("S\n\nQ", response="A", messages=[SYSTEM, ASK])),
    ({"messages": [ASK, HELP, ASK, HELP]}, example("Q\n\nA\n\nQ", response="A", messages=[ASK, HELP, ASK])),
    ({"messages": [ASK, HELP], "prompt": "other"}, example("Q", response="A", messages=[ASK])),
]


NAMED = [
    ({"text": "Q", "label": "A"}, "--prompt-column text --response-column label", example("Q", "", "A")),
    ({"question": "no", "text": "Q", "answer": "A"}, "--prompt-column text", example("Q", "", "A")),
    ({"prompt": "Q", "answer": "no", "gold": "A"}, "--response-column gold", example("Q", "", "A")),
    ({"messages": [ASK], "prompt": "P", "answer": "A"}, "--prompt-column prompt", example("P", "", "A")),
    ({"input": "Q", "output": "A"}, "--prompt-column input", example("Q", "", "A")),
    ({"prompt": "Q", "context": "A"}, "--response-column context", example("Q", "", "A")),
    ({"solution": "Q"}, "--prompt-column solution", example("Q")),
]


@pytest.mark.parametrize("row, flags, expected", [*((row, "", found) for row, found in COLUMNS), *NAMED])
def test_columns(tmp_path, row, flags, expected):
    """Usual names, and names by flag. A column that is the prompt or the response is not the prompt's input as well."""
    assert read(write(tmp_path, row), *flags.split()) == [expected]


def test_limit(tmp_path):
    """The first rows; a bad row after them is not read."""
    path = write(tmp_path, {"prompt": "0"}, {"prompt": "1"}, {"prompt": None})
    assert read(path, "--limit", 1) == [example("0")] and read(path, "--limit", 2) == [example("0"), example("1")]
    write(tmp_path, {"prompt": "0"}, {"prompt": "1"})
    assert read(path) == read(path, "--limit", 9) == [example("0"), example("1")]


# ---------------------------------------------------------------------------------------------------------------------
# File formats
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [
    {"question": 'a "quoted", 1\n2', "answer": "x\ny"},
    {"question": "é", "answer": "#### 1,000"},
    {"question": "3", "answer": "z"},
]


WRITERS = {
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "with space.jsonl": lambda path: write(path.parent, *ROWS, name=path.name),
    "a.csv": lambda path: datasets.Dataset.from_list(ROWS).to_pandas().to_csv(path, index=False),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name, put", WRITERS.items(), ids=WRITERS)
def test_file_formats(tmp_path, name, put):
    """The same rows from every format, in order, quotes, newlines and accents untouched."""
    put(tmp_path / name)
    assert read(tmp_path / name) == [example(row["question"], response=row["answer"]) for row in ROWS]


AS_WRITTEN = {
    "words that pandas takes for nothing": ("a.csv", "prompt,response\nNA,null\n", [example("NA", response="null")]),
    "an empty field is none": ("a.csv", "prompt,input,response\n1,,\n", [example("1")]),
    "numbers and dates are text": ("a.csv", "prompt,response\n007,1.50\n", [example("007", response="1.50")]),
    "dates": ("a.jsonl", '{"prompt": "2024-01-01"}\n', [example("2024-01-01")]),
    "a byte order mark": ("a.jsonl", '\ufeff{"prompt": "1"}\n', [example("1")]),
    "a byte order mark before a list": ("a.json", '\ufeff [{"prompt": "1"}]', [example("1")]),
    "a byte order mark in CSV": ("a.csv", "\ufeffprompt\n1\n", [example("1")]),
    "lines in a .json": ("a.json", '{"prompt": "1"}\n{"prompt": "2"}\n', [example("1"), example("2")]),
    "a column that only later rows have": (
        "a.jsonl",
        '{"prompt": "1"}\n{"prompt": "2", "input": "I", "response": "A"}\n',
        [example("1"), example("2", "I", "A")],
    ),
    "nulls": (
        "a.jsonl",
        '{"prompt": "1", "input": null, "response": null}\n{"prompt": "2", "input": "I", "response": "A"}\n',
        [example("1"), example("2", "I", "A")],
    ),
    "a name that is a pattern": ("a[1]*.jsonl", '{"prompt": "1"}\n', [example("1")]),
}


@pytest.mark.parametrize("name, content, expected", AS_WRITTEN.values(), ids=AS_WRITTEN)
def test_a_file_is_read_as_it_is_written(tmp_path, name, content, expected):
    (tmp_path / "a1.jsonl").write_text('{"prompt": "a neighbour, which the pattern means"}\n')
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read(tmp_path / name) == expected


def test_a_file_is_read_again_although_its_time_and_size_are_the_same(tmp_path):
    """`datasets` has a cache, whose key does not see this."""
    path = write(tmp_path, {"prompt": "1"})
    assert read(path) == [example("1")]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write(tmp_path, {"prompt": "2"})
    os.utime(path, ns=times)
    assert read(path) == [example("2")]


REFUSED = {
    "a.csv": ("prompt,response\n1,2\n3,4,5\n", r"line 3 has not the 2 fields of the header"),
    "b.csv": ("prompt,response\n1\n", r"line 2 has not the 2 fields of the header"),
    "c.csv": ('prompt\n"1\n', "unexpected end of data"),
    "d.csv": ("prompt,prompt\n1,2\n", "a column is there twice"),
    "folder": (None, "it is no file, in .*, name the file itself"),
    "*.jsonl": (None, "it is no file|the data cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_strictly_is_refused(tmp_path, name):
    content, message = REFUSED[name]
    write(tmp_path, {"prompt": "a file that the pattern means"})
    if content is not None:
        (tmp_path / name).write_text(content)
    elif name == "folder":
        (tmp_path / name).mkdir()
        write(tmp_path / name, {"prompt": "1"})
    with pytest.raises(runs.UserError, match=message):
        read(tmp_path / name)


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    pq.write_table(pa.table([["1"], ["2"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(runs.UserError, match="a column is there twice"):
        read(tmp_path / "a.parquet")


def test_an_empty_prompt_is_refused(tmp_path):
    """A chat template may write nothing."""
    with pytest.raises(runs.UserError, match="the prompt is empty, in --data row 0, repair the row or the chat"):
        encode([example("Q")], byte_tokenizer(add_bos=False, chat_template="{{ '' }}"))


# ---------------------------------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------------------------------

TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
CONTEXT = ", paired with an input that provides further context"
WITHOUT_INPUT = f"{TASK}. {REQUEST}\n\n### Instruction:\nAdd {{them}}.\n\n### Response:\n"
WITH_INPUT = WITHOUT_INPUT.replace(TASK, TASK + CONTEXT).replace("### R", "### Input:\n1 and 2\n\n### R")
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template, chat", [("auto", None), ("alpaca", None), ("alpaca", CHAT)])
def test_alpaca_template(template, chat):
    """Exactly the text of Taori et al., by flag although there is a chat template; braces in the data are no fields."""
    tokenizer = byte_tokenizer(add_bos=False, chat_template=chat)
    text = lambda *row, **more: data.prompt_text(example(*row, **more), tokenizer, template)
    assert text("Add {them}.", "1 and 2") == WITH_INPUT and text("Add {them}.") == WITHOUT_INPUT
    found = text("S\n\nAdd {them}.", messages=[SYSTEM, turn("user", "Add {them}.")])
    assert found == WITHOUT_INPUT.replace("Add", "S\n\nAdd")
    assert data.prompt_text(example(" Q\n{x} ", "I"), tokenizer, "none") == " Q\n{x} \n\nI", "the text as it is"


CHATS = [
    (example("Q"), "<s>[user]Q[assistant]"),
    (example("Q", "I"), "<s>[user]Q\n\nI[assistant]"),
    (example("S\n\nQ", messages=[SYSTEM, ASK]), "<s>[system]S[user]Q[assistant]"),
    (example("", messages=[ASK, HELP, ASK]), "<s>[user]Q[assistant]A[user]Q[assistant]"),
]


@pytest.mark.parametrize("template", ["auto", "chat"])
@pytest.mark.parametrize("row, text", CHATS)
def test_chat_template(template, row, text):
    assert data.prompt_text(row, byte_tokenizer(chat_template=CHAT), template) == text


def test_date_in_a_chat_template_is_pinned():
    """Llama-3's template writes today's date unless it gets one; a resumed run must see the prompt of the first day."""
    llama3 = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=llama3 + "Today Date: {{ date_string }}")
    assert data.prompt_text(example("Q"), tokenizer, "auto") == "Today Date: 26 Jul 2024"


# ---------------------------------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["none", "alpaca", "chat"])
@pytest.mark.parametrize("add_bos", [True, False], ids=["tokenizer adds bos", "tokenizer adds none"])
def test_bos_once_where_the_tokenizer_wants_it(template, add_bos):
    """Where the tokenizer adds bos by itself, or the chat template writes it: one, at the start. Otherwise none.

    `text` has its special tokens written out, so that it tokenizes, without added ones, to `ids`. Prompts that were
    rendered beforehand, with --template none, often begin with bos: it is not doubled.
    """
    tokenizer = byte_tokenizer(add_bos, chat_template=CHAT)
    [prompt], skipped = encode([example("é 1\n2", "I", "gold")], tokenizer, template)
    ids, wanted = prompt["ids"], int(add_bos or template == "chat")
    assert ids.count(BOS) == wanted and (ids[0] == BOS) == (wanted == 1)
    assert EOS not in ids, "the prompt goes on with the response"
    assert tokenizer(prompt["text"], add_special_tokens=False).input_ids == ids
    assert tokenizer.decode(ids) == prompt["text"] and prompt["gold"] == "gold" and skipped == 0
    ids = encode([example("<s>1+2=")], tokenizer, "none")[0][0]["ids"]
    assert ids[0] == BOS and ids.count(BOS) == 1


@pytest.mark.parametrize("add_bos", [True, False])
def test_long_prompts_are_skipped_and_keep_their_numbers(add_bos):
    """The limit itself is allowed, bos counts; prompt_id is the row's number, whatever was skipped before it."""
    rows, limit = [example("12345"), example("1"), example("1234"), example("123456"), example("123")], 4 + add_bos
    prompts, skipped = encode(rows, byte_tokenizer(add_bos), "none", max_tokens=limit)
    assert [(p["prompt_id"], len(p["ids"]) - add_bos) for p in prompts] == [(1, 1), (2, 4), (4, 3)] and skipped == 2


# ---------------------------------------------------------------------------------------------------------------------
# Arrow files
# ---------------------------------------------------------------------------------------------------------------------

ARROW = {"number": "int64", "ids": ["int32"], "text": "string"}


def test_arrow_file_has_what_was_written(tmp_path):
    """Empty lists, null text, the ends of int64; a key without a column is left out; batches of `datasets` keep order."""
    rows = [{"number": k, "ids": list(range(k % 3)), "text": "é\n" if k % 2 else None} for k in range(2500)]
    rows += [{"number": number, "ids": [], "text": ""} for number in (-(2**63), 2**63 - 1)]
    data.write_arrow(tmp_path / "a.arrow", ({**row, "other": 1} for row in rows), **ARROW)
    found = data.open_arrow(tmp_path / "a.arrow")
    assert found.column_names == list(ARROW) and list(found) == rows
    assert found[2:4]["ids"] == [[0, 1], []]
    assert [path.name for path in tmp_path.iterdir()] == ["a.arrow"]
    data.write_arrow(tmp_path / "empty.arrow", [], **ARROW)
    assert len(data.open_arrow(tmp_path / "empty.arrow")) == 0


BAD_ROWS = {"no column": {}, "type": {"number": "text", "ids": [], "text": ""}, "error": None}


@pytest.mark.parametrize("good", [0, 2500])
@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_arrow_file_is_written_whole_or_not_at_all(tmp_path, good, bad):
    """An error in the rows, however many were good, leaves the folder as it was: an older file, and no partial one."""
    path, row = tmp_path / "a.arrow", {"number": 1, "ids": [2], "text": "new"}

    def rows():
        yield from itertools.repeat(row, good)
        yield bad if bad is not None else 1 / 0

    for _ in range(2):
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises((KeyError, ZeroDivisionError, pa.ArrowInvalid)):
            data.write_arrow(path, rows(), **ARROW)
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        data.write_arrow(path, [row | {"text": "old"}], **ARROW)


def prompts_of(tmp_path, *rows, flags=("--template", "none")):
    return data.write_prompts(parse(write(tmp_path, *rows), *flags), byte_tokenizer(), tmp_path, WORLD)


@pytest.mark.parametrize("template", ["none", "alpaca", "chat"])
def test_write_prompts(tmp_path, template):
    """The rows that fit, in order, under their numbers; each what `encode_prompt` makes of it, its messages as JSON."""
    rows = [{"prompt": "é 1", "response": "A"}, {"prompt": "12345" * 100, "response": None}, {"prompt": "3"}]
    args, tokenizer = parse(write(tmp_path, *rows), "--template", template), byte_tokenizer(chat_template=CHAT)
    found = list(data.write_prompts(args, tokenizer, tmp_path, WORLD))
    expected = [data.encode_prompt(row, k, tokenizer, template) for k, row in enumerate(data.read_examples(args))]
    assert len(expected.pop(1)["ids"]) > args.max_prompt_tokens
    assert [row | {"messages": json.loads(row["messages"])} for row in found] == expected
    assert [(row["prompt_id"], row["gold"]) for row in found] == [(0, "A"), (2, None)]


def test_write_prompts_keeps_a_conversation(tmp_path):
    [prompt] = prompts_of(tmp_path, {"messages": [SYSTEM, ASK, HELP]})
    assert json.loads(prompt["messages"]) == [SYSTEM, ASK] and prompt["gold"] == "A"
    assert prompt["text"] == "<s>S\n\nQ"


OBJECTS = {"prompt": {"\u0000": {}}}  # pyarrow cannot make Python objects of it
BAD_PROMPTS = {
    "all too long": ([{"prompt": "1234"}, {"prompt": "12345"}], "all prompts are over --max-prompt-tokens 4, in .+"),
    "huge": ([{"prompt": [None, 1 << 63]}], ".+, in .+data.jsonl.*, .+"),
    "objects": ([OBJECTS], ".+, in .+data.jsonl.*, .+"),
}


@pytest.mark.parametrize("rows, expected", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_write_prompts_of_bad_data(tmp_path, rows, expected):
    """One UserError, and no file that a later run would take for the data."""
    with pytest.raises(runs.UserError, match=f"^{expected}$"):
        prompts_of(tmp_path, *rows, flags=("--template", "none", "--max-prompt-tokens", 4))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_write_prompts_again_after_a_change(tmp_path):
    """The file of an earlier start is replaced, although it is mapped into memory; `datasets` must not use its cache."""
    old = prompts_of(tmp_path, {"prompt": "old"})
    new = prompts_of(tmp_path, {"prompt": "new"}, {"prompt": "newer"})
    assert [row["text"] for row in new] == ["<s>new", "<s>newer"] and old[0]["text"] == "<s>old"
