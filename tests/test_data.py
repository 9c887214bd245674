"""lib/data.py: columns, file formats, templates, the one bos token, Arrow files; with a byte-level tokenizer made here."""

import csv
import itertools
import json
from types import SimpleNamespace

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
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


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


NAMED = {
    "both": ({"text": "Q", "label": "A"}, "--prompt-column text --response-column label", example("Q", "", "A")),
    "prompt": ({"question": "no", "text": "Q", "answer": "A"}, "--prompt-column text", example("Q", "", "A")),
    "response": ({"prompt": "Q", "answer": "no", "gold": "A"}, "--response-column gold", example("Q", "", "A")),
    "not messages": (
        {"messages": [ASK], "prompt": "P", "answer": "A"},
        "--prompt-column prompt",
        example("P", "", "A"),
    ),
    "prompt is `input`": ({"input": "Q", "output": "A"}, "--prompt-column input", example("Q", "", "A")),
    "response is `context`": ({"prompt": "Q", "context": "A"}, "--response-column context", example("Q", "", "A")),
    "prompt is `solution`": ({"solution": "Q"}, "--prompt-column solution", example("Q")),
}


@pytest.mark.parametrize("row, flags, expected", NAMED.values(), ids=NAMED)
def test_columns_named_by_flag(tmp_path, row, flags, expected):
    """A column that is the prompt or the response is not the prompt's input as well."""
    assert read(write(tmp_path, row), *flags.split()) == [expected]


def test_rows_like_gsm8k(tmp_path):
    """The response is kept whole, with its calculator marks and the answer after ####."""
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
    """A bad row after the limit is no error."""
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


def write_jsonl(path):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


WRITERS = {
    "a.json": lambda path: path.write_text(json.dumps(ROWS)),
    "a.jsonl": write_jsonl,
    "a.csv": write_csv,
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "with space.jsonl": write_jsonl,
}


@pytest.mark.parametrize("name, put", WRITERS.items(), ids=WRITERS)
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


CHATS = {
    "instruction": (example("Q"), "<s>[user]Q[assistant]"),
    "instruction and input": (example("Q", "I"), "<s>[user]Q\n\nI[assistant]"),
    "system turn": (example("S\n\nQ", messages=[SYSTEM, ASK]), "<s>[system]S[user]Q[assistant]"),
    "several turns": (example("", messages=[ASK, HELP, ASK]), "<s>[user]Q[assistant]A[user]Q[assistant]"),
}


@pytest.mark.parametrize("template", ["auto", "chat"])
@pytest.mark.parametrize("row, text", CHATS.values(), ids=CHATS)
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


def test_toy_prompt(tokenizer):
    """The embedded default: <bos> and the characters, one token each."""
    [prompt], _ = encode([example("199+877:")], tokenizer)
    assert prompt["text"] == "<bos>199+877:"
    assert prompt["ids"] == tokenizer.convert_tokens_to_ids(["<bos>", *"199+877:"])


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


def test_arrow_file_without_rows(tmp_path):
    data.write_arrow(tmp_path / "a.arrow", [], **ARROW)
    assert len(data.open_arrow(tmp_path / "a.arrow")) == 0


@pytest.mark.parametrize("good", [0, 1, 2500])
@pytest.mark.parametrize(
    "bad", [{}, {"number": "text", "ids": [], "text": ""}, None], ids=["no column", "type", "error"]
)
def test_arrow_file_is_written_whole_or_not_at_all(tmp_path, good, bad):
    """An error in the rows, however many were good, leaves the folder as it was: an older file, and no partial one."""
    path = tmp_path / "a.arrow"
    row = {"number": 1, "ids": [2], "text": "new"}

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
    """Every row in order, one that is too long as well; each what `encode_prompt` makes of it, its messages as JSON."""
    rows = [{"prompt": "é 1", "response": "A"}, {"prompt": "12345" * 100, "response": None}, {"prompt": "3"}]
    args, tokenizer = parse(write(tmp_path, *rows), "--template", template), byte_tokenizer(chat_template=CHAT)
    found = list(data.write_prompts(args, tokenizer, tmp_path, WORLD))
    expected = [data.encode_prompt(row, k, tokenizer, template) for k, row in enumerate(data.read_examples(args))]
    assert [row | {"messages": json.loads(row["messages"])} for row in found] == expected
    assert [row["gold"] for row in found] == ["A", None, None] and len(found[1]["ids"]) > args.max_prompt_tokens


def test_write_prompts_keeps_a_conversation(tmp_path):
    [prompt] = prompts_of(tmp_path, {"messages": [SYSTEM, ASK, HELP]})
    assert json.loads(prompt["messages"]) == [SYSTEM, ASK] and prompt["gold"] == "A"
    assert prompt["text"] == "<s>S\n\nQ"


OBJECTS = {"prompt": {"\u0000": {}}}  # pyarrow cannot make Python objects of it
BAD_PROMPTS = {
    "all too long": ([{"prompt": "1234"}, {"prompt": "12345"}], "all prompts are over --max-prompt-tokens 4, in .+"),
    "objects": ([OBJECTS], ".+, in .+data.jsonl.*, .+"),
    "blank": ([{"prompt": "1"}, {"prompt": " "}], "column prompt is empty, in .+ row 1, repair .+"),
}


@pytest.mark.parametrize("rows, expected", BAD_PROMPTS.values(), ids=BAD_PROMPTS)
def test_write_prompts_of_bad_data(tmp_path, rows, expected):
    """One UserError, and no file that a later run would take for the data."""
    with pytest.raises(runs.UserError, match=f"^{expected}$"):
        prompts_of(tmp_path, *rows, flags=("--template", "none", "--max-prompt-tokens", 4))
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_write_prompts_again_after_a_change(tmp_path):
    """The file of an earlier start is replaced, although it is mapped into memory."""
    old = prompts_of(tmp_path, {"prompt": "old"})
    assert [row["text"] for row in prompts_of(tmp_path, {"prompt": "new"}, {"prompt": "newer"})] == [
        "<s>new",
        "<s>newer",
    ]
    assert old[0]["text"] == "<s>old"
