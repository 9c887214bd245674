"""What kd.py trains on: responses (the data's, the teacher's, the student's own) and the teacher's logits for each token.

The teacher's responses and its stored log-probs are files, one for each batch of examples, written whole: present is
done, a killed run continues where it was, and no file depends on the number of processes. Runs may share them
(`teacher_shards`). The losses are in kd.py.

Stored teacher. --teacher-cache keeps log p of the teacher's --teacher-top-k likeliest tokens and the mass left over, then
trains without the teacher. That mass is spread evenly over all other tokens, which makes p a distribution again, so every
loss is still a divergence. Lost is how p differs among tokens outside the top k: forward KL still pulls each of the top k to
its p, and their total mass; reverse KL sees one probability for every other token, likely or absurd. k = V loses nothing.
The cut is made at temperature 1, before --temperature.
"""

import math
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from lib import data, decode, measure, models, runs, training
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
    if torch.device(device).type == "cuda":  # copies that the host need not wait for
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def lengths_of(rows, column):
    """(len(rows),) int64: lengths of the lists in a column of a `datasets.Dataset`."""
    return torch.tensor([len(ids) for batch in rows.select_columns(column).iter(1000) for ids in batch[column]])


# ---------------------------------------------------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------------------------------------------------


def write_examples(args, world, tokenizer, tokens, prompts, out):
    """The examples to train on, as --mode says: a `Dataset` of prompt_id, ids, response, written to OUT/examples.arrow.

    prompts: from `data.write_prompts`. response: ids, with eos if it ended; null where the student writes all responses.
    Raises UserError where a response is missing.
    """
    if args.mode == "teacher":
        folder = out / "responses" if args.responses is None else Path(args.responses)
        rows = teacher_responses(args, world, tokenizer, tokens, prompts, folder)
        training.release_memory()
    elif args.mode == "gold" or args.on_policy < 1:
        rows = gold_responses(prompts, tokenizer, args)
    else:
        rows = (prompt | {"response": None} for prompt in prompts)
    file = out / "examples.arrow"
    world.first(lambda: data.write_arrow(file, rows, prompt_id="int64", ids=["int32"], response=["int32"]))
    examples = data.open_arrow(file)
    if not len(examples):
        raise UserError("all responses are over --max-new-tokens", f"in {args.data}", "raise the limit")
    if len(examples) < len(prompts):
        world.print(f"skipped: {len(prompts) - len(examples)} responses over --max-new-tokens {args.max_new_tokens}")
    return examples


def gold_responses(prompts, tokenizer, args):
    """Yields each prompt with "response", the ids of the data's response and eos, if it fits into --max-new-tokens."""
    for prompt in prompts:
        if prompt["gold"] is None:
            where = f"in {args.data} row {prompt['prompt_id']}"
            raise UserError("there is no response", where, "give --response-column, or --mode teacher to write them")
        ids = tokenizer(prompt["gold"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        if len(ids) <= args.max_new_tokens:
            yield prompt | {"response": ids}


def write_responses(model, prompts, sample_ids, stage, args, tokens, greedy=False, any_rank=None):
    """A response of up to --max-new-tokens to each prompt, greedy or sampled at temperature 1: a list of lists of ids.

    prompts: columns of a `Dataset`, with "prompt_id" and "ids". sample_ids: one for each, which decides its noise.
    """
    rows, device = decode.prefill(model, prompts["ids"], tokens), decode.device_of(model)
    prompt_ids, sample_ids = (torch.tensor(ids, device=device) for ids in (prompts["prompt_id"], sample_ids))
    start = torch.zeros_like(prompt_ids)
    choose = decode.greedy if greedy else decode.sampler(args.seed, stage, prompt_ids, sample_ids, start)
    responses, logprobs = decode.decode(model, rows, choose, start + args.max_new_tokens, tokens, any_rank)
    measure.check_finite(logprobs, prompts["prompt_id"])
    return responses


def teacher_shards(folder, suffix, args, world, tokens, examples, **settings):
    """Takes a folder of the teacher's files, one for --prompts-per-batch of `examples`, that several runs may share.

    examples: an Arrow `Dataset`. settings: what else decides the files' content. All of it is in folder/cache.json.
    Returns the key that the files carry, and those to make, as `runs.shards_to_do` does. Raises UserError if the folder
    is of something else, or if another run is at work in one that is not complete; a complete one is only read.
    """
    ours = {"teacher": args.teacher, "teacher_content": runs.fingerprint(args.teacher), "vocabulary": tokens.vocab_size}
    ours |= {"examples": runs.fingerprint(examples.cache_files[0]["filename"]), **settings}
    ours |= {"prompts_per_batch": args.prompts_per_batch}
    ours |= {"dtype": str(models.compute_dtype(args.dtype, world.device)).removeprefix("torch.")}
    file, count = folder / "cache.json", math.ceil(len(examples) / args.prompts_per_batch)

    def take():
        with runs.reading("the teacher's files cannot be kept", f"in {folder}", "give another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            if len(list(folder.glob(f"[0-9]*.{suffix}"))) < count:
                runs.lock(folder / ".lock")
            if not any(folder.glob("[0-9]*")):
                runs.write_json(file, ours)
            theirs = dict(runs.read_json(file)) if file.exists() else {}
        runs.refuse_differences(folder, ours, theirs, accept=None)
        return runs.seal(theirs, "cache")

    key = world.first(take)
    return key, runs.shards_to_do(folder, count, suffix, world)


def teacher_responses(args, world, tokenizer, tokens, prompts, folder):
    """SeqKD (Kim and Rush, arXiv 1606.07947): the teacher's response to each prompt, kept in folder/NNNNN.jsonl.

    Returns a generator of the prompts with "response". Raises UserError if the folder or a file is of other prompts.
    """
    size, greedy = args.prompts_per_batch, args.teacher_decoding == "greedy"
    settings = {"max_new_tokens": args.max_new_tokens, "teacher_decoding": args.teacher_decoding}
    settings |= {"seed": None if greedy else args.seed, "eos_ids": tokens.eos_ids}
    key, shards = teacher_shards(folder, "jsonl", args, world, tokens, prompts, **settings)
    teacher = training.load_teacher(args, world, tokenizer) if shards else None
    any_rank = world.any if args.shard_teacher else None
    for k, is_ours in runs.progress(shards, desc="responses", world=world, unit="batch"):
        batch = prompts[k * size : (k + 1) * size]
        zeros = [0] * len(batch["ids"])
        responses = write_responses(teacher, batch, zeros, decode.KD_TEACHER_STAGE, args, tokens, greedy, any_rank)
        if is_ours:
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            rows = [
                {"prompt_id": prompt_id, "prompt": prompt, "response_ids": ids, "response": text}
                for prompt_id, prompt, ids, text in zip(batch["prompt_id"], batch["text"], responses, texts)
            ]
            runs.write_jsonl(folder / f"{k:05d}.jsonl", rows, key)
    world.barrier()

    def read():
        for k in range(math.ceil(len(prompts) / size)):
            file, batch = folder / f"{k:05d}.jsonl", prompts.select(range(k * size, min((k + 1) * size, len(prompts))))
            rows = runs.read_jsonl(file, key)
            if [row["prompt"] for row in rows] != batch["text"][:]:
                raise UserError("the responses are to other prompts", f"in {file}", "delete it: it is then made again")
            yield from (prompt | {"response": row["response_ids"]} for prompt, row in zip(batch, rows))

    return read()


@torch.no_grad()
def sample_from_student(args, world, tokens, replica, lm, examples, batch, step):
    """On-policy data (GKD, arXiv 2306.13649): {example: response ids} from the student as it is before `step`.

    The weights of the sharded `lm` are gathered into `replica`: FSDP never decodes. The student writes the first
    --on-policy of the step's batch, which is shuffled.
    """
    for target, source in zip(replica.parameters(), lm.parameters()):
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    work, size, sampled = batch[: round(args.on_policy * len(batch))], args.prompts_per_batch, {}
    for start in range(world.rank * size, len(work), world.size * size):
        part = work[start : start + size]
        settings = ([step] * len(part), decode.KD_STUDENT_STAGE, args, tokens)
        sampled.update(zip(part, write_responses(replica, examples[part], *settings)))
    return {i: ids for part in world.gather(sampled) for i, ids in part.items()}


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
        """inputs: from `collate`. indices: of the examples, unused. Returns a function slice of M -> logits (m, V)."""
        hidden = response_hidden(self.lm, inputs["token_ids"], inputs["source"])
        return lambda part: F.linear(hidden[part], *decode.lm_head(self.lm, self.vocab_size))


class CachedTeacher:
    """The same from --teacher-cache, which is completed first: one file for --prompts-per-batch examples."""

    FIELDS = ("ids", "logprobs", "rest")  # (M, k), (M, k), (M,) of the M response tokens of a file's examples

    def __init__(self, args, world, tokenizer, tokens, examples):
        self.folder, self.size, self.device = Path(args.teacher_cache), args.prompts_per_batch, world.device
        self.vocab_size, self.k = tokens.vocab_size, min(args.teacher_top_k, tokens.vocab_size)
        self.offsets = F.pad(lengths_of(examples, "response").cumsum(0), (1, 0))  # response tokens before an example
        settings = (args, world, tokens, examples)
        self.key, shards = teacher_shards(self.folder, "safetensors", *settings, teacher_top_k=self.k)
        teacher = LiveTeacher(training.load_teacher(args, world, tokenizer), tokens.vocab_size) if shards else None
        for k, is_ours in runs.progress(shards, desc="teacher cache", world=world, unit="batch"):
            batch = examples[k * self.size : (k + 1) * self.size]
            sequences = [(prompt, response, True) for prompt, response in zip(batch["ids"], batch["response"])]
            inputs = collate(sequences, tokens.pad_id, world.device)
            logits, chunk = teacher(inputs, None), decode.head_chunk(self.vocab_size)
            starts = range(0, len(inputs["source"]), chunk)
            parts = [top_k_logprobs(logits(slice(start, start + chunk)).float(), self.k) for start in starts]
            tensors = {name: torch.cat(part).cpu() for name, part in zip(self.FIELDS, zip(*parts))}
            token_owners = [i for i, response in zip(batch["prompt_id"], batch["response"]) for _ in response]
            measure.check_finite(tensors["logprobs"], token_owners)
            if is_ours:
                with runs.atomic_path(self.folder / f"{k:05d}.safetensors") as partial:
                    safetensors.torch.save_file(tensors, partial, {"source": f"{self.key} {k}"})
        world.barrier()

    def __call__(self, inputs, indices):
        """indices: of the micro-batch's examples, in order. Returns a function slice of M -> log-probs (m, V)."""
        pieces = []
        for i in indices:
            file_start = self.offsets[i - i % self.size]
            start, end = (self.offsets[i : i + 2] - file_start).tolist()
            file, todo = self.folder / f"{i // self.size:05d}.safetensors", "delete the file: it is then made again"
            with runs.reading("the file is damaged", f"in {file}", todo), safetensors.safe_open(file, "pt") as stored:
                if stored.metadata()["source"] != f"{self.key} {i // self.size}":
                    raise ValueError("it is of another cache or batch")
                pieces.append([stored.get_slice(name)[start:end] for name in self.FIELDS])
        tensors = [torch.cat(parts).to(self.device) for parts in zip(*pieces)]  # (M, k), (M, k), (M,)
        return lambda part: expand_top_k(*(tensor[part] for tensor in tensors), self.vocab_size)
