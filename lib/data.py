"""Prompts: read from any data set, put into the tokenizer's template, turned into ids once, kept on the disk.

A data set is a hub id or a local JSON, JSONL, CSV or Parquet file, read through `datasets`. The usual columns are found
by name: question/answer, instruction/input|context/output|response, prompt/response|completion, problem/solution,
messages; others are named by flag. From here on a prompt is ids: nothing is ever tokenized a second time. Prompts and
what is made of them are Arrow files in OUT, mapped into memory: a million of them cost no rank more than a thousand.
"""

import itertools
import json
from argparse import Namespace
from pathlib import Path

import datasets
import jinja2
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetsError

from lib import runs
from lib.runs import UserError, one_line

PROMPT_COLUMNS = ("instruction", "question", "problem", "prompt")
INPUT_COLUMNS = ("input", "context")
RESPONSE_COLUMNS = ("output", "response", "answer", "completion", "solution")
# What `datasets` lets through when its readers meet what they did not expect
DATA_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, StopIteration)
DATA_ERRORS += (OverflowError, DatasetsError)
TEMPLATES = ["auto", "chat", "alpaca", "none"]
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

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


def add_arguments(parser):
    """The flags that say which data and how a prompt is made of it."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", help="hub id or local .json, .jsonl, .csv, .parquet file")
    group.add_argument("--data-config", help="configuration of a hub data set, such as `main` of openai/gsm8k")
    group.add_argument("--split", default="train", help="split of a hub data set")
    group.add_argument("--limit", type=runs.LIMIT, default=0, help="use the first LIMIT rows; 0: all")
    group.add_argument("--prompt-column", help="column of the prompt, where its name is unusual")
    group.add_argument("--response-column", help="column of the gold response, where its name is unusual")
    template_help = "auto: the tokenizer's chat template where there is one, else Alpaca's; none: the text as it is"
    group.add_argument("--template", choices=TEMPLATES, default="auto", help=template_help)
    limit_help = "a longer prompt is skipped and counted"
    group.add_argument("--max-prompt-tokens", type=runs.COUNT, default=256, help=limit_help)


def toy_paths(folder):
    """{flag: path} of a folder made by toy/make.py."""
    names = {"teacher": "teacher", "student": "student", "data": "train.jsonl", "eval_data": "dev.jsonl"}
    return {flag: str(Path(folder) / name) for flag, name in names.items()}


def add_eval_arguments(parser, default, limit):
    """The flags of a closing table. default: what is done without --eval-data, for the help. limit: of the prompts."""
    group = parser.add_argument_group("closing table")
    group.add_argument("--eval-data", help=f"held-out prompts, read as --data is; without them: {default}")
    group.add_argument("--eval-config", help="configuration of --eval-data; of the same hub id as --data: its own")
    group.add_argument("--eval-split", default="test", help="split of --eval-data, if it is a hub id")
    group.add_argument("--eval-limit", type=runs.LIMIT, default=limit, help="prompts in the table; 0: no table")


def load_rows(source, config, split):
    """A `datasets.Dataset` from a local file or the hub."""
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would ask the hub, for a local file, too
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its complaints are in the exception, too
    path = Path(source)
    try:
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                what = f"unknown file type {path.suffix!r}"
                raise UserError(what, f"in {source}", f"use one of {', '.join(FILE_FORMATS)}")
            if FILE_FORMATS[path.suffix] == "json":
                check_json(path)
            return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source, config, split=split)
    except DATA_ERRORS as error:
        what = f"the data cannot be read ({one_line(error.__cause__ or error)})"
        raise UserError(what, f"in {source}", "check the file, hub id and --split")


def check_json(path):
    """Raises UserError that names the first row of a JSON file that is no object; on some of them pyarrow crashes."""
    with open(path, "rb") as file:
        beginning = file.read(1 << 16).lstrip()[:1]
    whole = path.suffix == ".json" and beginning == b"["  # one list, which `datasets` reads whole, too
    rows = enumerate(runs.parse_json(path.read_bytes()), 1) if whole else runs.iterate_jsonl(path, blank_lines=True)
    for number, row in rows:
        if not isinstance(row, dict):
            what = f"{type(row).__name__} instead of an object with columns"
            raise UserError(what, f"in {path} {'item' if whole else 'line'} {number}", "repair or delete it")


def read_examples(args):
    """The rows of --data, checked, in order: {"instruction": str, "input": str, "response": str or None, "messages": list or None}.

    Raises UserError where columns are not found or a row cannot be used.
    """
    rows = load_rows(args.data, args.data_config, args.split)
    if not len(rows):
        raise UserError("no rows", f"in {args.data}", "give data with at least one row")
    if args.limit:
        rows = rows.select(range(min(args.limit, len(rows))))
    names = rows.column_names
    messages = "messages" if "messages" in names and not args.prompt_column else None
    prompt = args.prompt_column or next((c for c in PROMPT_COLUMNS if c in names), None)
    response = args.response_column or next((c for c in RESPONSE_COLUMNS if c in names and c != prompt), None)
    context = next((c for c in INPUT_COLUMNS if c in names and c not in (prompt, response)), None)
    wanted = {"prompt": messages or prompt}
    if args.response_column:
        wanted["response"] = response
    for name, column in wanted.items():
        if column not in names:
            what = f"no {name} column" if column is None else f"no column {column}"
            raise UserError(what, f"in {args.data} with columns {', '.join(names)}", f"name it with --{name}-column")
    try:
        for number, row in enumerate(rows):
            where = f"in {args.data} row {number}"
            if messages:
                yield conversation_example(row[messages], where)
                continue
            texts = {column: row[column] for column in (prompt, context, response) if column}
            for column, value in texts.items():
                if not isinstance(value, str | None):
                    raise UserError(f"column {column} is {type(value).__name__}, not text", where, "repair the row")
            if not (texts[prompt] or "").strip():
                raise UserError(f"column {prompt} is empty", where, "repair or delete the row")
            example = {"instruction": texts[prompt], "input": texts.get(context) or ""}
            yield {**example, "response": texts.get(response), "messages": None}
    except DATA_ERRORS as error:
        raise UserError(f"the data cannot be read ({one_line(error)})", f"in {args.data}", "check its columns")


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
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template", "for --template chat", "use --template alpaca")
        return render_chat(tokenizer, messages_of(example), add_generation_prompt=True)
    text = example["instruction"]
    if template != "none":
        text = (ALPACA_INPUT if example["input"] else ALPACA).format(**example)
    return with_bos(tokenizer, text)


def messages_of(example):
    """An example's conversation up to its response."""
    content = "\n\n".join(filter(None, [example["instruction"], example["input"]]))
    return example["messages"] or [{"role": "user", "content": content}]


def render_chat(tokenizer, messages, add_generation_prompt=False):
    """Messages as text through the chat template. Llama-3's writes today's date unless it is given one: a run that
    continues tomorrow would see other prompts.
    """
    try:
        options = {"add_generation_prompt": add_generation_prompt, "date_string": "26 Jul 2024"}
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        what, roles = f"the chat template refuses a conversation ({one_line(error)})", [m["role"] for m in messages]
        raise UserError(what, f"of roles {', '.join(roles)}", "repair the data or --template alpaca")


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
        prompt = encode_prompt(example, prompt_id, tokenizer, template)
        if len(prompt["ids"]) > max_tokens:
            skipped.append(prompt_id)
        else:
            kept += 1
            yield prompt
    if kept == 0:
        what = f"all prompts are over --max-prompt-tokens {max_tokens}"
        raise UserError(what, where, "raise the limit or give other data")


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
    limits = (args.template, args.max_prompt_tokens, skipped)
    prompts = encode_prompts(examples, f"in {args.data}", tokenizer, *limits)
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
    if not args.eval_limit:
        return []
    if args.eval_data is not None:
        config = args.eval_config or (args.data_config if args.eval_data == args.data else None)
        changes = {"data": args.eval_data, "data_config": config, "limit": 0, "split": args.eval_split}
        examples, where = read_examples(Namespace(**{**vars(args), **changes})), f"in {args.eval_data}"
        prompts = encode_prompts(examples, where, tokenizer, args.template, args.max_prompt_tokens, [])
    return list(itertools.islice(prompts, args.eval_limit))
