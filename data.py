"""Prompts: read from any data set, put into the tokenizer's template, turned into ids once.

A data set is a hub id or a local JSON, JSONL, CSV or Parquet file, read through `datasets`. The usual columns are found
by name: question/answer, instruction/input|context/output|response, prompt/response|completion, problem/solution,
messages; others are named by flag. From here on a prompt is ids: nothing is ever tokenized a second time.
"""

from argparse import Namespace
from pathlib import Path

import datasets
import jinja2

from common import UserError, one_line

PROMPT_COLUMNS = ("instruction", "question", "problem", "prompt")
INPUT_COLUMNS = ("input", "context")
RESPONSE_COLUMNS = ("output", "response", "answer", "completion", "solution")
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
    group.add_argument("--limit", type=int, default=0, help="use the first LIMIT rows; 0: all")
    group.add_argument("--prompt-column", help="column of the prompt, where its name is unusual")
    group.add_argument("--response-column", help="column of the gold response, where its name is unusual")
    group.add_argument(
        "--template",
        choices=["auto", "chat", "alpaca", "none"],
        default="auto",
        help="auto: the tokenizer's chat template where there is one, Alpaca's otherwise; none: the text as it is",
    )
    group.add_argument("--max-prompt-tokens", type=int, default=256, help="a longer prompt is skipped and counted")


def add_eval_arguments(group, default):
    """The flags that name the held-out prompts of a closing table. default: what is done without them, for the help."""
    group.add_argument("--eval-data", help=f"held-out prompts, read as --data is; without them: {default}")
    group.add_argument("--eval-split", default="test", help="split of --eval-data, if it is a hub id")


def load_rows(source, config, split):
    """A `datasets.Dataset` from a local file or the hub."""
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would ask the hub, for a local file, too
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its complaints are in the exception, too
    path = Path(source)
    try:
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                raise UserError(
                    f"unknown file type {path.suffix!r}", f"in {source}", f"use one of {', '.join(FILE_FORMATS)}"
                )
            return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source, config, split=split)
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data cannot be read ({one_line(error.__cause__ or error)})",
            f"in {source}",
            "check the file, hub id and --split",
        )


def read_examples(args):
    """Rows of `--data` as a list of {"instruction": str, "input": str, "response": str or None, "messages": list or None}.

    Raises UserError if the columns are not found, a row has no usable prompt, or there are no rows.
    """
    rows = load_rows(args.data, args.data_config, args.split)
    if args.limit:
        rows = rows.select(range(min(args.limit, len(rows))))
    names = rows.column_names
    messages = "messages" if "messages" in names and not args.prompt_column else None
    prompt = args.prompt_column or next((c for c in PROMPT_COLUMNS if c in names), None)
    response = args.response_column or next((c for c in RESPONSE_COLUMNS if c in names and c != prompt), None)
    context = next((c for c in INPUT_COLUMNS if c in names and c not in (prompt, response)), None)
    for column, flag in ((messages or prompt, "--prompt-column"), (args.response_column, "--response-column")):
        if (column is None and flag == "--prompt-column") or (column is not None and column not in names):
            what = f"no column {column}" if column else "no prompt column"
            raise UserError(what, f"in {args.data} with columns {', '.join(names)}", f"name it with {flag}")
    examples = []
    for number, row in enumerate(rows):
        where = f"in {args.data} row {number}"
        if messages:
            examples.append(from_messages(row["messages"], where))
            continue
        for column in (prompt, context, response):
            if column in names and not isinstance(row[column], str | None):
                raise UserError(f"column {column} is {type(row[column]).__name__}, not text", where, "mend the row")
        if not (row[prompt] or "").strip():
            raise UserError(f"column {prompt} is empty", where, "mend or delete the row")
        example = {"instruction": row[prompt], "input": row[context] or "" if context else ""}
        examples.append({**example, "response": row[response] if response else None, "messages": None})
    if not examples:
        raise UserError("no rows", f"in {args.data}", "give data with at least one row")
    return examples


def from_messages(messages, where):
    """A conversation: the prompt is all up to the last assistant turn, which is the gold response."""
    is_turn = lambda m: isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
    if not isinstance(messages, list) or not messages or not all(map(is_turn, messages)):
        raise UserError("messages is not a list of turns with text content", where, "mend the row")
    response = None
    if messages[-1]["role"] == "assistant":
        messages, response = messages[:-1], messages[-1]["content"]
    if not messages:
        raise UserError("messages has no turn before the assistant's", where, "mend the row")
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
    """Messages as text through the chat template. Llama-3's writes today's date unless it is given one: a run that is
    taken up tomorrow would see other prompts."""
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=False, date_string="26 Jul 2024"
        )
    except jinja2.TemplateError as error:
        what = f"the chat template refuses a conversation ({one_line(error)})"
        raise UserError(
            what, f"of roles {', '.join(m['role'] for m in messages)}", "mend the data or --template alpaca"
        )


def with_bos(tokenizer, text):
    """Writes out the bos token that the tokenizer would put before a text by itself, unless it is there already."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token + text if adds_bos and not text.startswith(tokenizer.bos_token) else text


def encode_prompts(examples, tokenizer, template, max_tokens):
    """Returns (prompts, skipped): prompts are {"prompt_id", "messages", "text", "ids", "gold"}; `skipped` were too long.

    prompt_id is the row's number in the data, so skipping one prompt changes no other's noise.
    """
    prompts = []
    for prompt_id, example in enumerate(examples):
        text = prompt_text(example, tokenizer, template)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= max_tokens:
            prompt = {"prompt_id": prompt_id, "messages": messages_of(example), "text": text, "ids": ids}
            prompts.append({**prompt, "gold": example["response"]})
    if not prompts:
        what = f"all {len(examples)} prompts are over --max-prompt-tokens {max_tokens}"
        raise UserError(what, "in --data", "raise the limit or give other data")
    return prompts, len(examples) - len(prompts)


def load_eval_prompts(args, tokenizer, prompts):
    """The closing table's prompts: those of --eval-data, or else the first of the given ones."""
    if args.eval_data is not None and args.eval_limit:
        data_args = Namespace(
            **{**vars(args), "data": args.eval_data, "limit": args.eval_limit, "split": args.eval_split}
        )
        examples = read_examples(data_args)
        prompts, _ = encode_prompts(examples, tokenizer, args.template, args.max_prompt_tokens)
    return prompts[: args.eval_limit]
