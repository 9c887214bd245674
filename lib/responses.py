"""What kd.py trains on: responses (the data's, the teacher's, the student's own) and the teacher's logits for each token.

The teacher's responses and its stored log-probs are files, one for each batch of examples, written whole: present is
done, a killed run continues where it was, and no file depends on the number of processes. The losses are in kd.py.

Stored teacher. --teacher-cache keeps log p of the teacher's --teacher-top-k likeliest tokens and the mass left over, then
trains without the teacher. That mass is spread evenly over all other tokens, which makes p a distribution again, so every
loss is still a divergence. Lost is how p differs among tokens outside the top k: forward KL still pulls each of the top k to
its p, and their total mass; reverse KL sees one probability for every other token, likely or absurd. k = V loses nothing.
The cut is made at temperature 1, before --temperature.
"""

import hashlib
import json
import math
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lib import data, decode, models, runs, training
from lib.runs import UserError


def response_hidden(lm, token_ids, source):
    """(M, D) hidden states that predict the response tokens. Padding is on the right: causal attention needs no mask."""
    hidden = lm.base_model(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, L, D)
    return hidden.flatten(0, 1)[source]


def collate(sequences, pad_id, device):
    """B tuples (prompt ids, not empty; response ids; whether the response is a label) -> what `KDModel` takes.

    token_ids (B, L); source (M,) flat index into (B * L) of the hidden state that predicts a response token; target (M,).
    """
    ids = [torch.tensor((prompt + response)[:-1]) for prompt, response, _ in sequences]  # the last predicts nothing
    token_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id)  # (B, L)
    source, target = [], []
    for i, (prompt, response, labelled) in enumerate(sequences):
        first = i * token_ids.shape[1] + len(prompt) - 1
        source.extend(range(first, first + len(response)))
        target.extend(response if labelled else [-100] * len(response))
    tensors = {"token_ids": token_ids, "source": torch.tensor(source), "target": torch.tensor(target)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def lengths_of(rows, column):
    """(len(rows),) int64: lengths of the lists in a column of a `datasets.Dataset`."""
    return torch.tensor([len(ids) for batch in rows.select_columns(column).iter(1000) for ids in batch[column]])


# ---------------------------------------------------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------------------------------------------------


def write_examples(args, world, tokenizer, tokens, prompts, out):
    """The examples to train on, as --mode says: a `Dataset` of prompt_id, ids, response, written to OUT/examples.arrow.

    prompts: from `data.write_prompts`; those over --max-prompt-tokens are left out, and counted. response: ids, with
    eos if it ended; null where the student writes all responses. Raises UserError where a response is missing.
    """
    fitting = prompts.select((lengths_of(prompts, "ids") <= args.max_prompt_tokens).nonzero()[:, 0].numpy())
    if args.mode == "teacher":
        write_teacher_responses(args, world, tokenizer, tokens, fitting, out / "responses")
        training.release_memory()
        rows = stored_responses(fitting, args.prompts_per_batch, out / "responses", tokens.vocab_size)
    elif args.mode == "gold" or args.on_policy < 1:
        rows = gold_responses(fitting, tokenizer, args)
    else:
        rows = (prompt | {"response": None} for prompt in fitting)
    file = out / "examples.arrow"
    world.first(lambda: data.write_arrow(file, rows, prompt_id="int64", ids=["int32"], response=["int32"]))
    examples = data.open_arrow(file)
    if world.rank == 0 and len(examples) < len(prompts):
        responses = f"{len(fitting) - len(examples)} responses over --max-new-tokens"
        print(f"left out: {len(prompts) - len(fitting)} prompts over --max-prompt-tokens, {responses}")
    return examples


def gold_responses(prompts, tokenizer, args):
    """Yields each prompt with "response", the ids of the data's response and eos, if it fits into --max-new-tokens."""
    kept = 0
    for prompt in prompts:
        if prompt["gold"] is None:
            where = f"in {args.data} row {prompt['prompt_id']}"
            raise UserError("there is no response", where, "name its column: --response-column")
        ids = tokenizer(prompt["gold"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        if len(ids) <= args.max_new_tokens:
            kept += 1
            yield prompt | {"response": ids}
    if kept == 0:
        raise UserError("all responses are over --max-new-tokens", f"in {args.data}", "raise the limit")


def write_responses(model, prompts, sample_ids, stage, args, tokens, greedy=False, any_rank=None):
    """A response of up to --max-new-tokens to each prompt, greedy or sampled at temperature 1: a list of lists of ids.

    prompts: columns of a `Dataset`, with "prompt_id" and "ids". sample_ids: one for each, which decides its noise.
    """
    rows, device = decode.prefill(model, prompts["ids"], tokens), decode.device_of(model)
    prompt_ids, sample_ids = (torch.tensor(ids, device=device) for ids in (prompts["prompt_id"], sample_ids))
    start = torch.zeros_like(prompt_ids)
    choose = decode.greedy if greedy else decode.sampler(args.seed, stage, prompt_ids, sample_ids, start)
    return decode.decode(model, rows, choose, start + args.max_new_tokens, tokens, any_rank)[0]


def write_teacher_responses(args, world, tokenizer, tokens, prompts, folder):
    """SeqKD (Kim and Rush, arXiv 1606.07947): the teacher's response to each prompt, kept in folder/NNNNN.jsonl."""
    size, greedy = args.prompts_per_batch, args.teacher_decoding == "greedy"
    missing = runs.missing_shards(folder, math.ceil(len(prompts) / size), "jsonl", world)
    teacher = training.load_teacher(args, world, tokenizer) if missing else None
    any_rank = world.any if args.shard_teacher else None
    for turn in runs.progress(range(0, len(missing), world.size), desc="responses", world=world, unit="batch"):
        # In the last turn a rank without a batch goes along: the forwards of a sharded teacher need every rank
        k = missing[min(turn + world.rank, len(missing) - 1)]
        batch = prompts[k * size : (k + 1) * size]
        zeros = [0] * len(batch["ids"])
        responses = write_responses(teacher, batch, zeros, decode.KD_TEACHER_STAGE, args, tokens, greedy, any_rank)
        if turn + world.rank < len(missing):
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            rows = [
                {"prompt_id": prompt_id, "prompt": prompt, "response_ids": ids, "response": text}
                for prompt_id, prompt, ids, text in zip(batch["prompt_id"], batch["text"], responses, texts)
            ]
            runs.write_jsonl(folder / f"{k:05d}.jsonl", rows)
    world.barrier()


def stored_responses(prompts, size, folder, vocab_size):
    """Yields each prompt with "response", from the files of `write_teacher_responses`."""
    for k in range(math.ceil(len(prompts) / size)):
        batch = prompts.select(range(k * size, min((k + 1) * size, len(prompts))))
        responses = read_responses(folder / f"{k:05d}.jsonl", batch["prompt_id"], vocab_size)
        yield from (prompt | {"response": ids} for prompt, ids in zip(batch, responses))


def read_responses(file, prompt_ids, vocab_size):
    """The responses to a batch of prompts, lists of ids, from their file. Raises UserError unless it has just these."""
    is_response = lambda ids: bool(ids) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    try:
        rows = runs.read_jsonl(file)
        whole = [row["prompt_id"] for row in rows] == list(prompt_ids)
        whole = whole and all(is_response(row["response_ids"]) for row in rows)
    except (UserError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError("the file is cut, or of other prompts", f"in {file}", "delete it: it is then made again")
    return [row["response_ids"] for row in rows]


@torch.no_grad()
def sample_ahead(args, world, tokens, replica, lm, examples, steps):
    """On-policy data (GKD, arXiv 2306.13649): {(step, example): response ids} for `steps`, from the student as it is now.

    The weights of the sharded `lm` are gathered into `replica`: FSDP never decodes. The student writes the first
    --on-policy of each batch, which is shuffled.
    """
    for target, source in zip(replica.parameters(), lm.parameters()):
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    batches = {step: training.batch_of_step(step, len(examples), args.batch_size, args.seed) for step in steps}
    work = [(step, i) for step, batch in batches.items() for i in batch[: round(args.on_policy * len(batch))]]
    size, sampled = args.prompts_per_batch, {}
    for start in range(world.rank * size, len(work), world.size * size):
        batch = work[start : start + size]
        prompts, step_ids = examples[[i for _, i in batch]], [step for step, _ in batch]
        responses = write_responses(replica, prompts, step_ids, decode.KD_STUDENT_STAGE, args, tokens)
        sampled.update(zip(batch, responses))
    gathered = [None] * world.size
    dist.all_gather_object(gathered, sampled)
    return {key: ids for part in gathered for key, ids in part.items()}


def warn_if_responses_run_on(sampled, tokens, world):
    """On-policy KD's known failure: the student's responses grow until nothing ends them. True if that has begun."""
    endless = sum(ids[-1] not in tokens.eos_ids for ids in sampled.values())
    if endless > len(sampled) / 2 and world.rank == 0:
        what = f"{endless} of {len(sampled)} responses of the student have no end within --max-new-tokens"
        tqdm.write(f"warning: {what}; a lower --lr, a smaller --on-policy or a larger limit may help")
    return endless > len(sampled) / 2


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's logits
# ---------------------------------------------------------------------------------------------------------------------


def top_k_logprobs(logits, k):
    """(M, V) logits -> ids (M, k) int32 and log-probs (M, k) of the k likeliest tokens, log of the mass left over (M,)."""
    values, ids = logits.topk(k, -1)
    total = logits.logsumexp(-1, keepdim=True)
    rest = logits.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)  # (M, 1), -inf at k = V
    return ids.int(), values - total, (rest - total)[:, 0]


def expand_top_k(ids, logprobs, rest, vocab_size):
    """What `top_k_logprobs` returns -> (M, V) log-probs of a distribution, `rest` spread evenly over the other tokens."""
    others = rest - math.log(max(1, vocab_size - ids.shape[-1]))  # (M,)
    return others[:, None].repeat(1, vocab_size).scatter(-1, ids.long(), logprobs)


class LiveTeacher:
    """The teacher's logits from the teacher: replica, or sharded blocks with its embeddings and lm_head on every rank."""

    def __init__(self, lm, vocab_size):
        self.lm, self.vocab_size = lm, vocab_size

    @torch.no_grad()
    def __call__(self, inputs, indices):
        """inputs: from `collate`. indices: of the examples, unused. Returns a function slice of M -> logits (m, V) float32."""
        hidden = response_hidden(self.lm, inputs["token_ids"], inputs["source"])
        return lambda part: decode.next_logits(self.lm, hidden[part], self.vocab_size)


class CachedTeacher:
    """The same from --teacher-cache, which is completed first: one file for --prompts-per-batch examples."""

    FIELDS = ("ids", "logprobs", "rest")  # (M, k), (M, k), (M,) of the M response tokens of a file's examples

    def __init__(self, args, world, tokenizer, tokens, examples):
        self.folder, self.size, self.world = Path(args.teacher_cache), args.prompts_per_batch, world
        self.vocab_size, self.k = tokens.vocab_size, min(args.teacher_top_k, tokens.vocab_size)
        self.offsets = F.pad(lengths_of(examples, "response").cumsum(0), (1, 0))  # response tokens before an example
        world.first(lambda: self.check_source(args, examples))
        self.write(args, tokenizer, tokens, examples)
        training.release_memory()
        world.first(self.check_files)

    def check_source(self, args, examples):
        """Raises UserError if the cache was made of something else; a new one gets its cache.json."""
        content = hashlib.sha256()  # of json.dumps of the list of all examples, without its text in memory
        for i, example in enumerate(examples):
            text = json.dumps([example["ids"], example["response"]])
            content.update(f"{', ' if i else '['}{text}".encode())
        content.update(b"]")
        ours = {"teacher": args.teacher, "teacher_content": runs.fingerprint(args.teacher)}
        ours |= {"dtype": str(models.compute_dtype(args.dtype, self.world.device)), "teacher_top_k": self.k}
        ours |= {"prompts_per_batch": self.size, "vocabulary": self.vocab_size, "examples": content.hexdigest()}
        file = self.folder / "cache.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not file.exists() and not any(self.folder.glob("*.safetensors")):
                runs.write_json(file, ours)
            theirs = dict(runs.read_json(file)) if file.exists() else {}
        except OSError as error:
            what = f"the teacher cache cannot be written ({runs.one_line(error)})"
            raise UserError(what, f"at {self.folder}", "give another --teacher-cache")
        except (ValueError, TypeError):
            theirs = {}
        runs.refuse_differences(self.folder, ours, theirs, args.accept_changes)

    def write(self, args, tokenizer, tokens, examples):
        """Writes the files that are missing."""
        world, count = self.world, math.ceil(len(examples) / self.size)
        missing = runs.missing_shards(self.folder, count, "safetensors", world)
        teacher = LiveTeacher(training.load_teacher(args, world, tokenizer), tokens.vocab_size) if missing else None
        for turn in runs.progress(range(0, len(missing), world.size), desc="teacher cache", world=world, unit="batch"):
            # In the last turn a rank without a batch goes along: the forwards of a sharded teacher need every rank
            k = missing[min(turn + world.rank, len(missing) - 1)]
            batch = examples[k * self.size : (k + 1) * self.size]
            sequences = [(prompt, response, True) for prompt, response in zip(batch["ids"], batch["response"])]
            inputs = collate(sequences, tokens.pad_id, world.device)
            logits, chunk = teacher(inputs, None), decode.head_chunk(self.vocab_size)
            starts = range(0, len(inputs["source"]), chunk)
            parts = [top_k_logprobs(logits(slice(start, start + chunk)), self.k) for start in starts]
            if turn + world.rank < len(missing):
                tensors = {name: torch.cat(part).cpu() for name, part in zip(self.FIELDS, zip(*parts))}
                with runs.atomic_path(self.folder / f"{k:05d}.safetensors") as partial:
                    safetensors.torch.save_file(tensors, partial)
        world.barrier()

    def place(self, i):
        """The file of example i, and from where to where in it its response tokens are."""
        start, end = (self.offsets[i : i + 2] - self.offsets[i - i % self.size]).tolist()
        return self.folder / f"{i // self.size:05d}.safetensors", start, end

    def check_files(self):
        """Raises UserError unless each file is whole and of its examples' response tokens."""
        count = len(self.offsets) - 1
        for last in [*range(self.size - 1, count - 1, self.size), count - 1]:
            file, _, tokens = self.place(last)
            try:
                with safetensors.safe_open(file, "pt") as stored:
                    shapes = [stored.get_slice(name).get_shape() for name in self.FIELDS]
            except (OSError, safetensors.SafetensorError):
                shapes = None
            if shapes != [[tokens, self.k], [tokens, self.k], [tokens]]:
                raise UserError("the file is cut or damaged", f"in {file}", "delete it: it is then made again")

    def __call__(self, inputs, indices):
        """indices: of the micro-batch's examples, in order. Returns a function slice of M -> log-probs (m, V)."""
        pieces = []
        for file, start, end in map(self.place, indices):
            with safetensors.safe_open(file, "pt") as stored:
                pieces.append([stored.get_slice(name)[start:end] for name in self.FIELDS])
        tensors = [torch.cat(parts).to(self.world.device) for parts in zip(*pieces)]  # (M, k), (M, k), (M,)
        return lambda part: expand_top_k(*(tensor[part] for tensor in tensors), self.vocab_size)
