"""Prompts: read from any data set, put into the tokenizer's template, turned into ids once, kept on the disk.

A data set is a hub id, read through `datasets`, or a local JSON, JSONL, CSV or Parquet file. The usual columns are found
by name: question/answer, instruction/input|context/output|response, prompt/response|completion, problem/solution,
messages; others are named by flag. From here on a prompt is ids: nothing is ever tokenized a second time. Prompts and
what is made of them are Arrow files in OUT, mapped into memory: a million of them cost no rank more than a thousand.
"""

import codecs
import csv
import itertools
import json
from argparse import Namespace
from pathlib import Path

import datasets
import pyarrow.parquet
from datasets.arrow_writer import ArrowWriter

from lib import runs
from lib.runs import UserError

PROMPT_COLUMNS = ("instruction", "question", "problem", "prompt")
INPUT_COLUMNS = ("input", "context")
RESPONSE_COLUMNS = ("output", "response", "answer", "completion", "solution")
TEMPLATES = ["auto", "chat", "alpaca", "none"]

# The Alpaca template (Taori et al., 2023), which MiniLLM, DistiLLM and DSKD use for base models
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def add_arguments(parser, out=None, eval_limit=0):
    """The flags that say which models and data, how a prompt is made of a row, and how long responses may be."""
    add = parser.add_argument_group("models").add_argument
    add("--teacher", help="folder or hub id; without models and data: the toy")
    add("--student", help="folder or hub id, same tokenizer as the teacher; with the toy: its own")
    add("--toy", default=str(runs.ROOT / "toy"), help="folder made by toy/make.py")
    add("--out", default=out, help="folder of the run; the trained model is OUT/student")
    add("--shard-teacher", action="store_true", help="for a teacher that does not fit; slow to decode")
    add("--max-new-tokens", type=runs.COUNT, default=256, help="longest response, whoever wrote it")
    add("--prompts-per-batch", type=runs.COUNT, default=32, help="decoded at once, and in one file")
    add = parser.add_argument_group("data").add_argument
    add("--data", help="hub id or local .json, .jsonl, .csv, .parquet file")
    add("--data-config", help="configuration of a hub data set, such as `main` of openai/gsm8k")
    add("--split", default="train", help="split of a hub data set")
    add("--limit", type=runs.LIMIT, default=0, help="use the first LIMIT rows; 0: all")
    add("--prompt-column", help="column of the prompt, where its name is unusual")
    add("--response-column", help="column of the gold response, where its name is unusual")
    add("--template", choices=TEMPLATES, default="auto", help="auto: chat if the tokenizer has one, else alpaca")
    add("--max-prompt-tokens", type=runs.COUNT, default=256, help="a longer prompt is skipped and counted")
    add = parser.add_argument_group("closing table").add_argument
    add("--eval-data", help="held-out prompts, read as --data is; without: the training prompts in warmup_distill.py")
    add("--eval-config", help="configuration of --eval-data; of the same hub id as --data: its own")
    add("--eval-split", default="test", help="split of --eval-data, if it is a hub id")
    add("--eval-limit", type=runs.LIMIT, default=eval_limit, help="prompts in the table; 0: no table")


def parse_args(parser, argv, toy, models):
    """The arguments, with the defaults `toy` and the files of --toy where none of --data and the flags `models` is given."""
    args = parser.parse_args(argv)
    if args.data is None and all(getattr(args, name) is None for name in models):
        names = {"teacher": "teacher", "student": "student", "data": "train.jsonl", "eval_data": "dev.jsonl"}
        parser.set_defaults(**toy, **{flag: str(Path(args.toy) / name) for flag, name in names.items()})
        args = parser.parse_args(argv)
    return args


def file_rows(path):
    """Yields the rows of a local file, a dict each, in order. Strict: that file alone, and text as it is written there."""
    if path.suffix == ".csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            if len(set(lines.fieldnames or [])) < len(lines.fieldnames or []):
                raise ValueError("a column is there twice")
            for row in lines:
                if None in row or None in row.values():  # fields without a name, names without a field
                    raise ValueError(f"line {lines.line_num} has not the {len(lines.fieldnames)} fields of the header")
                yield {name: text or None for name, text in row.items()}
    elif path.suffix == ".parquet":
        file = pyarrow.parquet.ParquetFile(path)
        if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
            raise ValueError("a column is there twice")
        for batch in file.iter_batches():
            yield from batch.to_pylist()
    elif path.suffix in (".json", ".jsonl"):
        with open(path, "rb") as file:
            whole = path.suffix == ".json" and file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        rows = runs.parse_json(path.read_bytes()) if whole else runs.iterate_jsonl(path, blank_lines=True)
        for number, row in enumerate(rows, 1) if whole else rows:
            if not isinstance(row, dict):
                where = f"in {path} {'item' if whole else 'line'} {number}"
                raise UserError(f"{type(row).__name__} instead of an object with columns", where, "repair or delete it")
            yield row
    else:
        raise ValueError(f"{path.suffix!r} is none of .json, .jsonl, .csv, .parquet")


def open_rows(source, config=None, split=None):
    """A local file or a data set of the hub: an iterator over its rows, and their columns."""
    path = Path(source)
    if path.is_file():
        return file_rows(path), list(dict.fromkeys(name for row in file_rows(path) for name in row))
    if path.exists():
        raise UserError("it is no file", f"in {source}", "name the file itself")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its complaints are in the exception, too
    rows = datasets.load_dataset(source, config, split=split)
    return iter(rows), rows.column_names


def read_examples(args):
    """The rows of --data, checked, in order: {"instruction": str, "input": str, "response": str or None, "messages": list or None}.

    Raises UserError where columns are not found or a row cannot be used.
    """
    where = f"in {args.data}"
    with runs.reading("the data cannot be read", where, "check the file, hub id and --split"):
        rows, names = open_rows(args.data, args.data_config, args.split)
        rows = itertools.islice(rows, args.limit or None)
        yield from examples_of(rows, names, where, args.prompt_column, args.response_column)


def examples_of(rows, names, where, prompt_column=None, response_column=None, references=()):
    """Rows with the columns `names` -> examples, as `read_examples` yields them.

    references: columns that count as the response, and whose values may be of any type.
    """
    if not names:
        raise UserError("no rows", where, "give data with at least one row")
    messages = "messages" if "messages" in names and not (prompt_column or response_column) else None
    prompt = prompt_column or next((c for c in PROMPT_COLUMNS if c in names), None)
    response = response_column or next((c for c in references or RESPONSE_COLUMNS if c in names and c != prompt), None)
    context = next((c for c in INPUT_COLUMNS if c in names and c not in (prompt, response)), None)
    for kind, column in {"prompt": messages or prompt, "response": response_column or "response"}.items():
        if column not in names and (kind == "prompt" or response_column):
            what = f"no {kind} column" if column is None else f"no column {column}"
            todo = f"rename one to {kind} (in training, or give --{kind}-column)"
            raise UserError(what, f"{where} with columns {', '.join(names)}", todo)
    for number, row in enumerate(rows):
        place = f"{where} row {number}"
        if messages:
            yield conversation_example(row.get(messages), place)
            continue
        for column in (prompt, context) if references else (prompt, context, response):
            if not isinstance(row.get(column), str | None):
                raise UserError(f"column {column} is {type(row[column]).__name__}, not text", place, "repair the row")
        if not (row.get(prompt) or "").strip():
            raise UserError(f"column {prompt} is empty", place, "repair or delete the row")
        texts = {"instruction": row[prompt], "input": row.get(context) or "", "response": row.get(response)}
        yield texts | {"messages": None}


def is_conversation(value):
    """Whether a value is a non-empty list of messages, {"role": str, "content": str}."""
    is_turn = lambda m: isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
    return isinstance(value, list) and len(value) > 0 and all(map(is_turn, value))


def conversation_example(messages, where):
    """A conversation: the prompt is all up to the last assistant turn, which is the gold response."""
    if not is_conversation(messages):
        raise UserError("messages is not a list of turns with text content", where, "repair the row")
    response = None
    if messages[-1]["role"] == "assistant":
        messages, response = messages[:-1], messages[-1]["content"]
    if not messages:
        raise UserError("messages has no turn before the assistant's", where, "repair the row")
    text = "\n\n".join(m["content"] for m in messages)
    return {"instruction": text, "input": "", "response": response, "messages": messages}


def prompt_text(example, tokenizer, template):
    """The prompt as the model sees it, special tokens written out, up to where the response begins."""
    if template == "chat" or (template == "auto" and tokenizer.chat_template):
        return render_chat(tokenizer, messages_of(example), add_generation_prompt=True)
    if template == "none":
        return with_bos(tokenizer, content_of(example))
    return with_bos(tokenizer, (ALPACA_INPUT if example["input"] else ALPACA).format(**example))


def content_of(example):
    """An instruction and its input as one text."""
    return "\n\n".join(filter(None, [example["instruction"], example["input"]]))


def messages_of(example):
    """An example's conversation up to its response."""
    return example["messages"] or [{"role": "user", "content": content_of(example)}]


def render_chat(tokenizer, messages, add_generation_prompt=False):
    """Messages as text through the chat template. Llama-3's writes today's date unless it is given one: a run that
    continues tomorrow would see other prompts.
    """
    options = {"add_generation_prompt": add_generation_prompt, "date_string": "26 Jul 2024"}
    where = f"of roles {', '.join(message['role'] for message in messages)}"
    with runs.reading("the chat template refuses a conversation", where, "repair the data or --template alpaca"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def with_bos(tokenizer, text):
    """Writes out the bos token that the tokenizer would put before a text by itself, unless it is there already."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token + text if adds_bos and not text.startswith(tokenizer.bos_token) else text


def encode_prompt(example, prompt_id, tokenizer, template):
    """{"prompt_id", "messages", "text", "ids", "gold"} of an example; "text" and "ids" are what the model sees."""
    text = prompt_text(example, tokenizer, template)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompt = {"prompt_id": prompt_id, "messages": messages_of(example), "text": text, "ids": ids}
    return {**prompt, "gold": example["response"]}


def encode_prompts(examples, where, tokenizer, template, max_tokens, skipped):
    """Yields the prompts of up to `max_tokens`, as `encode_prompt` makes them; adds the others' ids to the list `skipped`.

    prompt_id is the row's number in the data, so skipping one prompt changes no other's noise.
    """
    kept = 0
    for prompt_id, example in enumerate(examples):
        place = f"{where} row {prompt_id}"
        with runs.reading("the prompt cannot be encoded", place, "repair the row or the tokenizer"):
            prompt = encode_prompt(example, prompt_id, tokenizer, template)
        if not prompt["ids"]:
            raise UserError("the prompt is empty", place, "repair the row or the chat template")
        if len(prompt["ids"]) > max_tokens:
            skipped.append(prompt_id)
        else:
            kept += 1
            yield prompt
    if kept == 0:
        raise UserError(f"all prompts are over --max-prompt-tokens {max_tokens}", where, "raise it or give other data")


# ---------------------------------------------------------------------------------------------------------------------
# Arrow files
# ---------------------------------------------------------------------------------------------------------------------


def write_arrow(path, rows, **features):
    """Writes dicts to an Arrow file, whole or not at all. features: {column: "string", "int64" or ["int32"], a list}."""
    of_kind = lambda kind: datasets.List(of_kind(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
    features = datasets.Features({name: of_kind(kind) for name, kind in features.items()})
    with runs.atomic_path(path) as partial, ArrowWriter(path=str(partial), features=features) as writer:
        for row in rows:
            writer.write({name: row[name] for name in features})
        writer.finalize()


def open_arrow(path):
    """The `datasets.Dataset` of an Arrow file, mapped into memory."""
    return datasets.Dataset.from_file(str(path))


def write_prompts(args, tokenizer, out, world):
    """--data as OUT/prompts.arrow, written by rank 0: a `Dataset` of prompt_id, text, ids, gold, messages (JSON).

    Prompts over --max-prompt-tokens are skipped and counted. Raises UserError where none fits.
    """
    file, skipped = out / "prompts.arrow", []
    examples = runs.progress(read_examples(args), desc="prompts", unit="row", world=world, leave=False)
    prompts = encode_prompts(examples, f"in {args.data}", tokenizer, args.template, args.max_prompt_tokens, skipped)
    rows = (prompt | {"messages": json.dumps(prompt["messages"])} for prompt in prompts)
    columns = {"prompt_id": "int64", "text": "string", "ids": ["int32"], "gold": "string", "messages": "string"}
    world.first(lambda: write_arrow(file, rows, **columns))
    if skipped:
        print(f"skipped: {len(skipped)} prompts over --max-prompt-tokens {args.max_prompt_tokens}")
    return open_arrow(file)


def load_eval_prompts(args, tokenizer, prompts=()):
    """The closing table's prompts: the first --eval-limit that fit, of --eval-data, or else of the given `prompts`.

    Returns a list of dicts as `encode_prompt` does.
    """
    if args.eval_data is not None:
        config = args.eval_config or (args.data_config if args.eval_data == args.data else None)
        changes = {"data": args.eval_data, "data_config": config, "limit": 0, "split": args.eval_split}
        examples, where = read_examples(Namespace(**{**vars(args), **changes})), f"in {args.eval_data}"
        prompts = encode_prompts(examples, where, tokenizer, args.template, args.max_prompt_tokens, [])
    return list(itertools.islice(prompts, args.eval_limit))
