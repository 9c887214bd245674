"""Direct Preference Optimization (Rafailov et al., arXiv 2305.18290): step 4 of Warmup-Distill, and a command of its own.

    torchrun --nproc_per_node 8 dpo.py --model STUDENT --pairs OUT/pairs.jsonl --out out/dpo
    python dpo.py --model STUDENT --pairs preferences.jsonl        any TRL-style file: prompt, chosen, rejected as text

The steps: read pairs -> reference log-probs, once -> for each step: policy log-probs, loss, gradient, AdamW.

Exact prefix sharing (ours). Both responses of a pair share the prompt and, after a splice, y_<t*. With summed log-probs
the shared tokens' terms cancel in log pi(y+) - log pi(y-), for the policy and for the reference. So a pair is ONE row

    [ prompt + shared response | chosen suffix | rejected suffix ]

in which the rejected suffix does not see the chosen one and position ids start again for it; lm_head runs on suffix
positions only. Loss and gradient are those of the two-row computation (tests/test_dpo.py). `--logprobs mean` and
`--nll-weight` need the log-probs of the shared response tokens as well: the row is the same, lm_head runs on more of it.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from lib import data, decode, models, runs, training
from lib.runs import UserError

# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    reference_chosen_logps,
    reference_rejected_logps,
    beta,
    label_smoothing=0.0,
):
    """The DPO loss of each pair, equation 7 of arXiv 2305.18290; label smoothing as in its authors' "conservative DPO".

    All log-probs: (B,) nats, a response's sum (or mean) over its tokens. beta: strength of the KL constraint that holds pi to pi_ref.
    label_smoothing: assumed probability that a preference is the wrong way round, in [0, 0.5).
    Returns losses (B,), chosen rewards (B,), rejected rewards (B,); rewards are beta log(pi / pi_ref), detached.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps  # log pi(y+|x) / pi_ref(y+|x)
    rejected_logratios = policy_rejected_logps - reference_rejected_logps  # log pi(y-|x) / pi_ref(y-|x)
    logits = beta * (chosen_logratios - rejected_logratios)
    # L = - (1 - eps) log sigma(logits) - eps log sigma(-logits)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)
    return losses, beta * chosen_logratios.detach(), beta * rejected_logratios.detach()


# ---------------------------------------------------------------------------------------------------------------------
# Exact prefix sharing
# ---------------------------------------------------------------------------------------------------------------------


def shared_length(chosen, rejected):
    """How many leading ids two responses share: at least t*, more where the teacher drew y_t* again."""
    different = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
    return next(different, min(len(chosen), len(rejected)))


def collate_pairs(pairs, pad_id, with_shared, device):
    """Pairs -> one row each, for `PairModel`.

    pairs: B dicts with prompt_ids (not empty), chosen_ids, rejected_ids. with_shared: also ask for the log-probs of the
    response tokens that both share. Returns a dict of tensors:
    token_ids, positions (B, L); attention (B, L, L) bool;
    source (M,) flat index into (B * L) of the hidden state that predicts a token, target (M,) that token's id,
    row, part (M,) where its log-prob is added: part 0 shared, 1 chosen suffix, 2 rejected suffix.
    """
    rows, positions, regions = [], [], []
    predicted_from, target, row_of, part = [], [], [], []
    for i, pair in enumerate(pairs):
        prompt, chosen, rejected = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
        shared = shared_length(chosen, rejected)
        common, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        start = len(prompt) + shared  # columns: prefix 0 .. start, chosen suffix .. end, rejected suffix
        end = start + len(chosen)
        rows.append(prompt + common + chosen + rejected)
        positions.append([*range(end), *range(start, start + len(rejected))])
        regions.append([0] * start + [1] * len(chosen) + [2] * len(rejected))
        # A token is predicted from the column before it; the first of each suffix from the last of the prefix
        parts = [(0, range(len(prompt) - 1, start - 1), common)] if with_shared else []
        parts += [(1, range(start - 1, end - 1), chosen)]
        parts += [(2, [start - 1, *range(end, end + len(rejected) - 1)], rejected)]
        for number, columns, ids in parts:
            predicted_from += columns[: len(ids)]
            target += ids
            row_of += [i] * len(ids)
            part += [number] * len(ids)
    length = max(map(len, rows))
    pinned = torch.device(device).type == "cuda"  # a copy that the host need not wait for
    index = lambda x: torch.tensor(x, dtype=torch.long, pin_memory=pinned).to(device, non_blocking=True)
    pad = lambda lists, value: index([x + [value] * (length - len(x)) for x in lists])
    region = pad(regions, 3)  # (B, L): 0 prefix, 1 chosen, 2 rejected, 3 padding
    columns = torch.arange(length, device=device)
    causal = columns[:, None] >= columns
    blind = (region[:, :, None] == 2) & (region[:, None, :] == 1)  # the rejected suffix does not see the chosen one
    return {
        "token_ids": pad(rows, pad_id),
        "positions": pad(positions, 0),
        "attention": causal & ~blind,
        "source": index(row_of) * length + index(predicted_from),
        "target": index(target),
        "row": index(row_of),
        "part": index(part),
    }


class PairModel(torch.nn.Module):
    """A language model that returns the log-probs of pairs. It is FSDP's root, so lm_head's weights are gathered here."""

    def __init__(self, lm, vocab_size):
        super().__init__()
        self.lm, self.vocab_size = lm, vocab_size

    def forward(self, token_ids, positions, attention, source, target, row, part):
        """Takes what `collate_pairs` returns. Returns (B, 3) summed log-probs: shared, chosen suffix, rejected suffix."""
        weight, bias = decode.lm_head(self.lm, self.vocab_size)
        mask = decode.additive_mask(attention, weight.dtype)
        hidden = self.lm.base_model(
            input_ids=token_ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state  # (B, L, D)
        chunk = decode.head_chunk(self.vocab_size)
        logprobs = decode.token_logprobs(hidden.flatten(0, 1)[source], weight, bias, target, chunk)  # (M,)
        return torch.zeros(len(token_ids), 3, device=logprobs.device).index_put((row, part), logprobs, accumulate=True)


def response_logps(sums, lengths, average):
    """(B, 3) sums -> chosen and rejected log-probs (B,). The shared part is added to both, or to neither: it cancels.

    average: divide by lengths (B, 2), the responses' tokens; then nothing cancels and `sums` must hold the shared part.
    """
    logps = sums[:, :1] + sums[:, 1:]
    if average:
        logps = logps / lengths
    return logps[:, 0], logps[:, 1]


def batch_loss(sums, reference, lengths, pair_count, chosen_tokens, args):
    """A micro-batch's part of the step's loss: the mean over pairs, and for --nll-weight that over chosen tokens.

    sums, reference: (b, 3) log-probs of policy and reference, as `PairModel` returns them. lengths: (b, 2) tokens of
    chosen and rejected. pair_count, chosen_tokens: of the whole step, over all ranks and micro-batches.
    Returns the loss, and {name: sum over the pairs} to log.
    """
    average = args.logprobs == "mean"
    chosen, rejected = response_logps(sums, lengths, average)  # (b,)
    reference_logps = response_logps(reference, lengths, average)
    options = (args.beta, args.label_smoothing)
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, *reference_logps, *options)
    nll = -(sums[:, 0] + sums[:, 1])  # (b,), counts only where the shared part is computed
    loss = losses.sum() / pair_count
    if args.nll_weight > 0:
        loss = loss + args.nll_weight * nll.sum() / chosen_tokens
    logged = {"dpo_loss": losses, "wins": (chosen_rewards > rejected_rewards).float()}
    logged |= {"chosen_reward": chosen_rewards, "rejected_reward": rejected_rewards}
    logged |= {"chosen_logp": chosen, "rejected_logp": rejected, "nll": nll}
    return loss, {name: values.detach().sum() for name, values in logged.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_logprobs(model, pairs, lengths, pad_id, with_shared, micro_batch_size, world):
    """(number of pairs, 3) float32 on the CPU: what `PairModel` returns for each pair, under a model that stays."""
    sums = torch.zeros(len(pairs), 3, device=world.device)
    batches = training.micro_batches(range(len(pairs)), lengths, micro_batch_size, world)
    for indices, weight in runs.progress(batches, desc="reference", world=world, leave=False):
        values = model(**collate_pairs([pairs[i] for i in indices], pad_id, with_shared, world.device))
        sums[indices] += weight * values
    model.reshard()  # FSDP leaves its root gathered after a forward: checkpoints and optimizers must see the shards
    torch.distributed.all_reduce(sums)  # each row is non-zero on one rank only: the sum is exact
    return sums.cpu()


def load_policy(path, args, tokenizer, world):
    """A `PairModel` to train: float32 parameters, sharded."""
    lm = training.load_trainable(path, args, tokenizer, world)
    dtype = models.compute_dtype(args.dtype, world.device)
    return training.shard(PairModel(lm, len(tokenizer)), lm, dtype, world, args.shard_size)


def train(args, world, tokenizer, pairs, student_path, reference_path, out):
    """Trains the student on the pairs; writes OUT/metrics.jsonl, OUT/checkpoint, OUT/student. Resumes what it finds.

    pairs: as `write_pairs` returns them. Returns the last step's metrics, None if OUT/student was there already.
    """
    if world.first(lambda: training.is_trained(out)):
        return None
    # Do the log-probs of shared response tokens count? In a difference of sums they cancel, in others not
    with_shared, pad_id = args.logprobs == "mean" or args.nll_weight > 0, tokenizer.pad_token_id
    lengths = pairs["tokens"][:]
    response_lengths = torch.tensor([pairs["chosen_tokens"][:], pairs["rejected_tokens"][:]]).long().T  # (n, 2)
    model = load_policy(student_path, args, tokenizer, world)
    # log pi_ref never changes: computed once, before the first step and before a checkpoint is loaded
    same = reference_path == student_path
    reference_model = model if same else load_policy(reference_path, args, tokenizer, world)
    reference = reference_logprobs(reference_model, pairs, lengths, pad_id, with_shared, args.micro_batch_size, world)
    del reference_model
    training.release_memory()
    optimizer, total_steps, bar = training.begin("dpo", len(pairs), "pairs", model, args, out, world)
    metrics, warned = None, False
    with training.stop_signals() as stop:
        for step in bar:
            started = time.perf_counter()
            batch = training.batch_of_step(step, len(pairs), args.batch_size, args.seed)
            # Division over ranks and accumulation: by the counts of the whole step, known before the first backward.
            # FSDP averages gradients over ranks, so each rank's loss is multiplied by their number
            pair_count, chosen_tokens = len(batch), response_lengths[batch, 0].sum().item()
            totals = {}
            for indices, weight in training.micro_batches(batch, lengths, args.micro_batch_size, world):
                rows = collate_pairs([pairs[i] for i in indices], pad_id, with_shared, world.device)
                constants = reference[indices].to(world.device), response_lengths[indices].to(world.device)
                loss, sums = batch_loss(model(**rows), *constants, pair_count, chosen_tokens, args)
                (weight * world.size * loss).backward()
                for name, value in {**sums, "tokens": rows["token_ids"].numel()}.items():
                    totals[name] = totals.get(name, 0) + weight * value
            updated = training.optimizer_step(model, optimizer, step, total_steps, args)
            totals = world.sum(totals)
            # What metrics.jsonl holds; each is defined in the README
            means = {name: total / pair_count for name, total in totals.items() if name not in ("nll", "tokens")}
            means = {"loss": means["dpo_loss"], **means, "margin": means["chosen_reward"] - means["rejected_reward"]}
            if args.nll_weight > 0:
                means["nll"] = totals["nll"] / chosen_tokens
                means["loss"] += args.nll_weight * means["nll"]
            metrics = {"stage": "dpo", "step": step + 1, **means, **updated}
            training.log_step(out, metrics, pairs[batch]["prompt_id"], totals["tokens"], started, world)
            if same and not warned:
                warned = warn_if_chosen_falls(metrics, args, chosen_tokens / pair_count, world)
            bar.set_postfix(loss=f"{metrics['loss']:.3f}", wins=f"{metrics['wins']:.2f}")
            training.end_step(args, step + 1, total_steps, out, model, optimizer, tokenizer, stop, world)
    training.save_model(out / "student", model.lm, tokenizer, runs.DTYPES[args.save_dtype], world)
    return metrics


def warn_if_chosen_falls(metrics, args, mean_length, world):
    """DPO's known failure: the loss falls while the chosen responses, too, become less likely. True if it warned."""
    fall = -metrics["chosen_reward"] / args.beta * (mean_length if args.logprobs == "mean" else 1)
    if fall > 10 and world.rank == 0:
        what = f"step {metrics['step']}: the chosen responses' log-prob is {fall:.1f} nats under the reference's"
        runs.tqdm.write(f"warning: {what}; a smaller --lr, a larger --beta or --nll-weight 1 holds it")
    return fall > 10


# ---------------------------------------------------------------------------------------------------------------------
# Preference pairs
# ---------------------------------------------------------------------------------------------------------------------


def write_pairs(path, tokenizer, out, world, context=math.inf):
    """A preference file as OUT/pairs.arrow, written by rank 0: a `Dataset` of prompt_id, ids and numbers of tokens.

    context: the most tokens that prompt and response may have together.
    """
    ids = {name: ["int32"] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
    counts = {name: "int64" for name in ("prompt_id", "tokens", "chosen_tokens", "rejected_tokens")}
    file = out / "pairs.arrow"
    world.first(lambda: data.write_arrow(file, read_pairs(path, tokenizer, context), **ids, **counts))
    return data.open_arrow(file)


def read_pairs(path, tokenizer, context=math.inf):
    """Yields the preference pairs of a JSONL file, as ids. Raises UserError that names the first bad line.

    Rows are either this project's (prompt_ids, chosen_ids, rejected_ids) or TRL's: prompt, chosen, rejected as text, or
    as lists of messages; then what both conversations begin with is the prompt, if there is no list of messages for it.
    """
    if not Path(path).is_file():
        raise UserError("no pairs file", f"at {path}", "run warmup_distill.py first or check --pairs")
    fingerprint, vocab_size = models.tokenizer_fingerprint(tokenizer), len(tokenizer)
    for number, row in runs.iterate_jsonl(path):
        where = f"in {path} line {number}"
        columns = row.keys() if isinstance(row, dict) else set()
        if not ({"chosen_ids", "rejected_ids"} <= columns or {"chosen", "rejected"} <= columns):
            raise UserError("no columns chosen and rejected", where, "see the README for the format")
        pair = row if "chosen_ids" in row else tokenize_pair(row, tokenizer, where)
        if pair.get("tokenizer", fingerprint) != fingerprint:
            raise UserError("the ids were made with another tokenizer", where, "use the model of the pairs")
        for key in ("prompt_ids", "chosen_ids", "rejected_ids"):
            ids = pair.get(key)
            if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < vocab_size for i in ids)):
                what = f"{key} is empty or not a list of ids below {vocab_size}"
                raise UserError(what, where, "repair or delete the line, or use the pairs' own tokenizer")
        if pair["chosen_ids"] == pair["rejected_ids"]:
            raise UserError("chosen equals rejected", where, "repair or delete the line")
        prompt, chosen, rejected = (len(pair[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
        if prompt + max(chosen, rejected) > context:
            what = f"the pair has {prompt + max(chosen, rejected)} tokens, the model's context {context}"
            raise UserError(what, where, "shorten or delete the line")
        counts = {"tokens": prompt + chosen + rejected, "chosen_tokens": chosen, "rejected_tokens": rejected}
        prompt_id = pair.get("prompt_id")
        prompt_id = prompt_id if type(prompt_id) is int and 0 <= prompt_id < 1 << 63 else number - 1
        yield {**pair, **counts, "prompt_id": prompt_id}


def tokenize_pair(row, tokenizer, where):
    """A TRL-style row -> ids. Text responses get the eos token; messages go through the chat template."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    if all(isinstance(text, str) for text in (prompt, chosen, rejected)):
        prompt_ids = encode(data.with_bos(tokenizer, prompt))
        responses = [encode(text) + [tokenizer.eos_token_id] for text in (chosen, rejected)]
        return {"prompt_ids": prompt_ids, "chosen_ids": responses[0], "rejected_ids": responses[1]}
    if not (data.is_conversation(chosen) and data.is_conversation(rejected)):
        raise UserError("prompt, chosen and rejected are not all text or all messages", where, "repair the line")
    if not tokenizer.chat_template:
        raise UserError("the pair is a conversation, the tokenizer has no chat template", where, "give text")
    if not data.is_conversation(prompt):
        shared = shared_length(chosen, rejected)
        if not shared and not isinstance(prompt, str):
            raise UserError("there is no prompt, and the conversations share none", where, "repair the line")
        prompt = chosen[:shared] if shared else [{"role": "user", "content": prompt}]
        chosen, rejected = chosen[shared:], rejected[shared:]
    text = data.render_chat(tokenizer, prompt, add_generation_prompt=True)
    rendered = [data.render_chat(tokenizer, prompt + turns) for turns in (chosen, rejected)]
    if not all(conversation.startswith(text) for conversation in rendered):
        raise UserError("the chat template changes the prompt in its conversation", where, "give all three as text")
    responses = [encode(conversation.removeprefix(text)) for conversation in rendered]
    return {"prompt_ids": encode(text), "chosen_ids": responses[0], "rejected_ids": responses[1]}


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser):
    """The flags of the DPO stage; `warmup_distill.py` has them too."""
    add = parser.add_argument_group("DPO").add_argument
    add("--beta", type=runs.ABOVE_0, default=0.1, help="strength of the pull to the reference")
    smoothing = runs.ranged(float, lambda x: 0 <= x < 0.5, "from 0 to below 0.5")
    add("--label-smoothing", type=smoothing, default=0.0, help="P(a preference is wrong)")
    add("--nll-weight", type=runs.NOT_NEGATIVE, default=0.0, help="of -log pi(chosen) per token; not in the paper")
    add("--logprobs", choices=["sum", "mean"], default="sum", help="of a response: sum as in DPO, or mean")


def parse_args(argv=None):
    parser = runs.ArgumentParser(__doc__)
    parser.add_argument("--model", required=True, help="the policy to train: folder or hub id")
    parser.add_argument("--pairs", required=True, help="JSONL: OUT/pairs.jsonl or TRL-style prompt, chosen, rejected")
    parser.add_argument("--reference", help="folder or hub id of the reference model; default: --model itself")
    parser.add_argument("--out", default="out/dpo", help="folder of the run; the trained model is OUT/student")
    runs.add_arguments(parser)
    add_arguments(parser)
    training.add_arguments(parser, lr=5e-7)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    world = runs.start_processes(args.device, args.threads)
    tokenizer, _ = models.shared_tokenizer(args.model, args.reference, args.trust_remote_code)
    inputs = [path for path in (args.model, args.reference, args.pairs) if path]
    out = runs.start_run(args.out, args, world, inputs)
    context = min(models.context_length(path, args.trust_remote_code) for path in inputs[:-1])
    pairs = write_pairs(args.pairs, tokenizer, out, world, context)
    if not len(pairs):
        raise UserError("no pairs", f"in {args.pairs}", "lower --eta or use more prompts")
    reference_path = args.model if args.reference is None else args.reference
    metrics = train(args, world, tokenizer, pairs, args.model, reference_path, out)
    end = f" (loss {metrics['loss']:.4f}, wins {metrics['wins']:.3f})" if metrics else ""
    world.print(f"{len(pairs)} pairs -> {out / 'student'}{end}; its curves: python -m tools.report {out}")


if __name__ == "__main__":
    runs.run(main)
