"""What a student is distilled on: responses (the data's, the teacher's, its own) and what the teacher says of each token.

Responses and the teacher's log-probs that are kept are files, one for each micro-batch of examples, written whole: present
is done, a killed run goes on where it was, and no file depends on the number of processes. The losses are in kd.py.

Offline teacher. --teacher-cache keeps log p of the teacher's --teacher-top-k likeliest tokens and the mass left over, then
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
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import common
import decode
import models
import training
from common import UserError
from run_folder import fingerprint, turns


def response_hidden(lm, token_ids, source):
    """(M, D) hidden states that predict the response tokens. Padding is on the right: causal attention needs no mask."""
    hidden = lm.base_model(input_ids=token_ids, use_cache=False).last_hidden_state  # (B, L, D)
    return hidden.flatten(0, 1)[source]


def collate(rows, pad_id, device):
    """rows: B tuples (prompt ids, not empty; response ids; whether the response is a label) -> what `KDModel` takes.

    token_ids (B, L); source (M,) flat index into (B * L) of the hidden state that predicts a response token; target (M,).
    """
    length = max(len(prompt) + len(response) for prompt, response, _ in rows) - 1  # the last token predicts nothing
    token_ids, source, target = [], [], []
    for i, (prompt, response, labelled) in enumerate(rows):
        ids = (prompt + response)[:-1]
        token_ids.append(ids + [pad_id] * (length - len(ids)))
        first = i * length + len(prompt) - 1
        source.extend(range(first, first + len(response)))
        target.extend(response if labelled else [-100] * len(response))
    names = {"token_ids": token_ids, "source": source, "target": target}
    return {name: torch.tensor(values, device=device) for name, values in names.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------------------------------------------------


def cut(items, size):
    """Neighbours in groups of `size`; never by the number of ranks."""
    return [items[k : k + size] for k in range(0, len(items), size)]


def gold_responses(prompts, tokenizer, args):
    """Adds "response", the ids of the data's response and eos. Returns those of up to --max-new-tokens, how many were not."""
    examples = []
    for prompt in prompts:
        if prompt["gold"] is None:
            raise UserError(
                "there is no response",
                f"in {args.data} row {prompt['prompt_id']}",
                "name its column: --response-column",
            )
        ids = tokenizer(prompt["gold"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        if len(ids) <= args.max_new_tokens:
            examples.append({**prompt, "response": ids})
    if not examples:
        raise UserError("all responses are over --max-new-tokens", f"in {args.data}", "raise the limit")
    return examples, len(prompts) - len(examples)


def write_responses(model, prompts, sample_ids, stage, greedy, run):
    """A response of up to --max-new-tokens to each prompt, greedy or sampled at temperature 1: a list of lists of ids."""
    names = [torch.tensor(ids, device=run.world.device) for ids in ([p["prompt_id"] for p in prompts], sample_ids)]
    start = torch.zeros_like(names[0])
    choose = decode.greedy if greedy else decode.sampler(run.args.seed, stage, *names, start, 1.0, 1.0)
    rows = decode.prefill(model, [p["ids"] for p in prompts], run.tokenizer.pad_token_id, run.world.device)
    any_rank = run.world.any if run.args.shard_teacher and stage == decode.KD_TEACHER_STAGE else None
    return decode.decode(model, rows, choose, start + run.args.max_new_tokens, run.eos_ids, run.vocab_size, any_rank)[0]


def teacher_responses(prompts, run):
    """SeqKD (Kim and Rush, arXiv 1606.07947): the teacher's response to each prompt, kept in OUT/responses/NNNNN.jsonl."""
    folder, batches = run.out / "responses", cut(prompts, run.args.prompts_per_batch)
    for k, file, mine in turns(folder, len(batches), "jsonl", run.world, run.args.shard_teacher, "batch"):
        greedy = run.args.teacher_decoding == "greedy"
        responses = write_responses(
            run.teacher, batches[k], [0] * len(batches[k]), decode.KD_TEACHER_STAGE, greedy, run
        )
        texts = run.tokenizer.batch_decode(responses, skip_special_tokens=True)
        if mine:
            rows = [(p["prompt_id"], p["text"], *written) for p, *written in zip(batches[k], responses, texts)]
            common.write_jsonl(file, [dict(zip(("prompt_id", "prompt", "response_ids", "response"), r)) for r in rows])
    run.world.barrier()
    files = [folder / f"{k:05d}.jsonl" for k in range(len(batches))]
    responses = [ids for file, batch in zip(files, batches) for ids in read_responses(file, batch, run.vocab_size)]
    return [{**prompt, "response": ids} for prompt, ids in zip(prompts, responses, strict=True)]


def read_responses(file, batch, vocab_size):
    """The responses to a batch of prompts, lists of ids, from their file. Raises UserError unless it has just these."""
    is_response = lambda ids: bool(ids) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
    try:
        rows = common.read_jsonl(file)
        whole = [row["prompt_id"] for row in rows] == [prompt["prompt_id"] for prompt in batch]
        whole = whole and all(is_response(row["response_ids"]) for row in rows)
    except (UserError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError("the file is cut, or of other prompts", f"in {file}", "delete it: it is then made again")
    return [row["response_ids"] for row in rows]


def on_policy_of_step(step, examples, args):
    """The examples of a step whose response the student writes: the first --on-policy of its batch, which is shuffled."""
    batch = training.batch_of_step(step, len(examples), args.batch_size, args.seed)
    return batch[: round(args.on_policy * len(batch))]


@torch.no_grad()
def sample_ahead(replica, lm, examples, steps, run):
    """On-policy data (GKD, arXiv 2306.13649): {(step, example): response ids} for `steps`, from the student as it is now.

    The weights of the sharded `lm` are gathered into `replica`: FSDP never decodes.
    """
    for target, source in zip(replica.parameters(), lm.parameters()):
        target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    work = [(step, i) for step in steps for i in on_policy_of_step(step, examples, run.args)]
    mine = {}
    for batch in cut(work, run.args.prompts_per_batch)[run.world.rank :: run.world.size]:
        prompts, step_ids = [examples[i] for _, i in batch], [step for step, _ in batch]
        mine.update(zip(batch, write_responses(replica, prompts, step_ids, decode.KD_STUDENT_STAGE, False, run)))
    gathered = [None] * run.world.size
    dist.all_gather_object(gathered, mine)
    return {key: ids for part in gathered for key, ids in part.items()}


def warn_if_responses_run_on(sampled, run):
    """On-policy KD's known failure: the student's responses grow until nothing ends them. True if there is cause."""
    endless = sum(ids[-1] not in run.eos_ids for ids in sampled.values())
    if endless <= len(sampled) / 2:
        return False
    if run.world.rank == 0:
        what = f"{endless} of {len(sampled)} responses of the student have no end within --max-new-tokens"
        tqdm.write(f"warning: {what}; a lower --lr, a smaller --on-policy or a larger limit may help")
    return True


def read_training_data(run, prompts, long_prompts):
    """The examples to train on, as --mode says: prompts with "response", which only on-policy data may lack.

    long_prompts: how many were over the limit, to be told with the responses that are.
    """
    args = run.args
    long_responses = 0
    if args.mode == "teacher":
        prompts = teacher_responses(prompts, run)
    elif args.mode == "gold" or args.on_policy < 1:
        prompts, long_responses = gold_responses(prompts, run.tokenizer, args)
    if run.world.rank == 0 and long_prompts + long_responses:
        print(
            f"left out: {long_prompts} prompts over --max-prompt-tokens, {long_responses} responses over --max-new-tokens"
        )
    return prompts


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

    def __init__(self, run):
        self.lm, self.vocab_size = run.teacher, run.vocab_size

    @torch.no_grad()
    def __call__(self, rows, indices):
        """rows: from `collate`. indices: of the examples, unused. Returns a function slice of M -> logits (m, V) float32."""
        hidden = response_hidden(self.lm, rows["token_ids"], rows["source"])
        return lambda part: decode.next_logits(self.lm, hidden[part], self.vocab_size)


class CachedTeacher:
    """The same from --teacher-cache, which it makes first where there is none: one file for --prompts-per-batch examples."""

    def __init__(self, examples, run):
        self.folder, self.run, self.where = Path(run.args.teacher_cache), run, []
        batches = cut(examples, run.args.prompts_per_batch)
        self.check(examples)
        for k, file, mine in turns(
            self.folder, len(batches), "safetensors", run.world, run.args.shard_teacher, "batch"
        ):
            rows = [(e["ids"], e["response"], True) for e in batches[k]]
            rows = collate(rows, run.tokenizer.pad_token_id, run.world.device)
            logits = LiveTeacher(run)(rows, None)
            chunk = decode.head_chunk(run.vocab_size)
            parts = [slice(start, start + chunk) for start in range(0, len(rows["source"]), chunk)]
            tensors = zip(*(top_k_logprobs(logits(part), self.top_k()) for part in parts))
            tensors = {name: torch.cat(t).cpu() for name, t in zip(("ids", "logprobs", "rest"), tensors)}
            if mine:
                common.write_atomic(file, safetensors.torch.save(tensors))
        run.world.barrier()
        run.drop_teacher()
        for k, batch in enumerate(batches):
            ends = torch.tensor([len(e["response"]) for e in batch]).cumsum(0).tolist()
            self.check_file(k, ends[-1])
            self.where += [(k, start, end) for start, end in zip([0, *ends], ends)]

    def top_k(self):
        return min(self.run.args.teacher_top_k, self.run.vocab_size)

    def check(self, examples):
        """Raises UserError if the cache was made of something else; a new cache is signed."""
        args, file = self.run.args, self.folder / "cache.json"
        text = json.dumps([[e["ids"], e["response"]] for e in examples])
        ours = {"teacher": args.teacher, "teacher_content": fingerprint(args.teacher)}
        ours |= {"dtype": str(models.compute_dtype(args.dtype, self.run.world))}
        ours.update(
            teacher_top_k=self.top_k(), prompts_per_batch=args.prompts_per_batch, vocabulary=self.run.vocab_size
        )
        ours["examples"] = hashlib.sha256(text.encode()).hexdigest()
        try:
            theirs = dict(common.read_json(file)) if file.exists() else ours
        except (ValueError, TypeError):
            theirs = {}
        if not file.exists() and any(self.folder.glob("*.safetensors")):
            theirs = {}
        if different := [
            f"{key} {theirs.get(key)} there, {ours[key]} now" for key in ours if theirs.get(key) != ours[key]
        ]:
            what = f"the teacher cache was made of something else ({'; '.join(different)})"
            raise UserError(what, f"in {self.folder}", "give another --teacher-cache")
        self.run.world.barrier()
        if self.run.world.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                common.write_json(file, ours)
            except OSError as error:
                what = f"the teacher cache cannot be written ({common.one_line(error)})"
                raise UserError(what, f"at {self.folder}", "give another --teacher-cache")

    def check_file(self, k, tokens):
        """Raises UserError unless file number k is whole and of so many response tokens."""
        file, shapes = self.folder / f"{k:05d}.safetensors", None
        try:
            with safetensors.safe_open(file, "pt") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in ("ids", "logprobs", "rest")]
        except (OSError, safetensors.SafetensorError):
            pass
        if shapes != [[tokens, self.top_k()], [tokens, self.top_k()], [tokens]]:
            raise UserError("the file is cut or damaged", f"in {file}", "delete it: it is then made again")

    def __call__(self, rows, indices):
        """indices: of the micro-batch's examples, in order. Returns a function slice of M -> log-probs (m, V)."""
        pieces = []
        for k, start, end in (self.where[i] for i in indices):
            with safetensors.safe_open(self.folder / f"{k:05d}.safetensors", "pt") as file:
                pieces.append([file.get_slice(name)[start:end] for name in ("ids", "logprobs", "rest")])
        tensors = [torch.cat(t).to(self.run.world.device) for t in zip(*pieces)]  # (M, k), (M, k), (M,)
        return lambda part: expand_top_k(*(t[part] for t in tensors), self.run.vocab_size)
