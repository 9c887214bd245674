"""Prompts: read from any data set, put into the tokenizer's template, turned into ids once.

A data set is a hub id or a local JSON, JSONL, CSV or Parquet file, read through `datasets`. The usual columns are found
by name: question/answer, instruction/input|context/output|response, prompt/response|completion, problem/solution,
messages; others are named by flag. From here on a prompt is ids: nothing is ever tokenized a second time.
"""

import math
from argparse import Namespace
from pathlib import Path

import datasets
import jinja2
from datasets.exceptions import DatasetsError

import common
from common import UserError, one_line

PROMPT_COLUMNS = ("instruction", "question", "problem", "prompt")
INPUT_COLUMNS = ("input", "context")
RESPONSE_COLUMNS = ("output", "response", "answer", "completion", "solution")
# What `datasets` lets through when its readers meet what they did not expect
DATA_ERRORS = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, StopIteration, DatasetsError)
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
    group.add_argument(
        "--eval-config", help="configuration of --eval-data; of the same hub id as --data: --data-config"
    )
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
            if FILE_FORMATS[path.suffix] == "json":
                check_json(path)
            return datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source, config, split=split)
    except UserError:
        raise
    except DATA_ERRORS as error:
        raise UserError(
            f"the data cannot be read ({one_line(error.__cause__ or error)})",
            f"in {source}",
            "check the file, hub id and --split",
        )


def check_json(path):
    """Raises UserError that names the first row of a JSON file that is no object; on some of them pyarrow crashes."""
    with open(path, "rb") as file:
        beginning = file.read(1 << 16).lstrip()[:1]
    whole = path.suffix == ".json" and beginning == b"["  # one list, which `datasets` reads whole, too
    rows = enumerate(common.read_json(path), 1) if whole else common.iterate_jsonl(path, blank_lines=True)
    for number, row in rows:
        if not isinstance(row, dict):
            what = f"{type(row).__name__} instead of an object with columns"
            raise UserError(what, f"in {path} {'item' if whole else 'line'} {number}", "mend or delete it")


class Examples:
    """Rows of --data as {"instruction": str, "input": str, "response": str or None, "messages": list or None}.

    A sequence whose items are read from the disk when they are asked for: its memory does not grow with their number.
    """

    def __init__(self, rows, source, columns):
        """columns: names of the columns for "prompt", "input", "response" and "messages"; None where there is none."""
        self.rows, self.source, self.columns = rows, source, columns

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(number)  # ends a `for`, too
        return self.example(self.rows[number], number)

    def __iter__(self):
        for number, row in enumerate(row for batch in self.rows.iter(1000) for row in self.rows_of(batch)):
            yield self.example(row, number)

    def rows_of(self, batch):
        """{column: values} of neighbouring rows -> one dict a row."""
        return (dict(zip(batch, values)) for values in zip(*batch.values()))

    def example(self, row, number):
        """One row, checked. Raises UserError if it has no usable prompt."""
        where = f"in {self.source} row {number}"
        if self.columns["messages"]:
            return from_messages(row[self.columns["messages"]], where)
        prompt, context, response = (
            row[column] if column else None
            for column in (self.columns[name] for name in ("prompt", "input", "response"))
        )
        for name, value in (("prompt", prompt), ("input", context), ("response", response)):
            if not isinstance(value, str | None):
                what = f"column {self.columns[name]} is {type(value).__name__}, not text"
                raise UserError(what, where, "mend the row")
        if not (prompt or "").strip():
            raise UserError(f"column {self.columns['prompt']} is empty", where, "mend or delete the row")
        return {"instruction": prompt, "input": context or "", "response": response, "messages": None}


def read_examples(args):
    """The `Examples` of --data. Raises UserError if columns are not found, a row is unusable, or there are no rows."""
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
    columns = {"prompt": prompt, "input": context, "response": response, "messages": messages}
    examples = Examples(rows, args.data, columns)
    if not examples:
        raise UserError("no rows", f"in {args.data}", "give data with at least one row")
    try:
        for _ in examples:  # a bad row is an error now, not after hours
            pass
    except DATA_ERRORS as error:
        raise UserError(f"the data cannot be read ({one_line(error)})", f"in {args.data}", "check its columns")
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


def encode_prompt(example, prompt_id, tokenizer, template):
    """{"prompt_id", "messages", "text", "ids", "gold"} of an example; "text" and "ids" are what the model sees."""
    text = prompt_text(example, tokenizer, template)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompt = {"prompt_id": prompt_id, "messages": messages_of(example), "text": text, "ids": ids}
    return {**prompt, "gold": example["response"]}


def encode_prompts(examples, tokenizer, template, max_tokens, most=math.inf):
    """Returns (prompts, skipped): the first `most` prompts as `encode_prompt` makes them; `skipped` were too long.

    prompt_id is the row's number in the data, so skipping one prompt changes no other's noise.
    """
    prompts, skipped = [], 0
    for prompt_id, example in enumerate(examples):
        prompt = encode_prompt(example, prompt_id, tokenizer, template)
        if len(prompt["ids"]) > max_tokens:
            skipped += 1
        else:
            prompts.append(prompt)
            if len(prompts) >= most:
                break
    if not prompts:
        what = f"all {skipped} prompts are over --max-prompt-tokens {max_tokens}"
        raise UserError(what, "in --data", "raise the limit or give other data")
    return prompts, skipped


class PromptBatches:
    """Micro-batches of prompts: number k holds rows k * size and following, encoded when it is asked for.

    They are cut from the order of the rows, never from the number of ranks. A prompt over the limit is in its batch, to
    be counted; `fits` tells.
    """

    def __init__(self, examples, tokenizer, args):
        self.examples, self.tokenizer, self.args = examples, tokenizer, args
        encode_prompts(examples, tokenizer, args.template, args.max_prompt_tokens, 1)  # raises if all are too long

    def __len__(self):
        return math.ceil(len(self.examples) / self.args.prompts_per_batch)

    def __getitem__(self, k):
        return [encode_prompt(self.examples[i], i, self.tokenizer, self.args.template) for i in self.ids(k)]

    def ids(self, k):
        """The prompt ids of batch k."""
        size = self.args.prompts_per_batch
        return range(k * size, min((k + 1) * size, len(self.examples)))

    def fits(self, prompt):
        """Whether a prompt is sampled from."""
        return len(prompt["ids"]) <= self.args.max_prompt_tokens


def load_eval_prompts(args, tokenizer, examples):
    """The closing table's prompts: the first --eval-limit that fit, of --eval-data, or else of the given examples."""
    if args.eval_data is not None:
        config = args.eval_config or (args.data_config if args.eval_data == args.data else None)
        changes = {"data": args.eval_data, "data_config": config, "limit": 0, "split": args.eval_split}
        examples = read_examples(Namespace(**{**vars(args), **changes}))
    if not args.eval_limit or not examples:
        return []
    return encode_prompts(examples, tokenizer, args.template, args.max_prompt_tokens, args.eval_limit)[0]
