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

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import decode
import estimate
import models
import run_folder
import training
from common import UserError
from pairs import read_pairs, shared_length
from training import batch_of_step, micro_batches

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


def collate_pairs(pairs, pad_id, with_shared, device):
    """Pairs -> one row each, for `PairModel`.

    pairs: B dicts with prompt_ids (not empty), chosen_ids, rejected_ids. with_shared: also ask for the log-probs of the
    response tokens that both share. Returns a dict of tensors:
    token_ids, positions (B, L); attention (B, L, L) bool;
    source (M,) flat index into (B * L) of the hidden state that predicts a token, target (M,) that token's id,
    row, part (M,) where its log-prob is added: part 0 shared, 1 chosen suffix, 2 rejected suffix.
    """
    rows, positions, regions = [], [], []
    source, target, row_of, part = [], [], [], []
    for pair in pairs:
        prompt, chosen, rejected = pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]
        shared = shared_length(chosen, rejected)
        chosen, rejected, prefix = chosen[shared:], rejected[shared:], prompt + chosen[:shared]
        rows.append(prefix + chosen + rejected)
        start, end = len(prefix), len(prefix) + len(chosen)
        positions.append([*range(end), *range(start, start + len(rejected))])
        regions.append([0] * start + [1] * len(chosen) + [2] * len(rejected))
    length = max(map(len, rows))
    for i, (row, region, pair) in enumerate(zip(rows, regions, pairs)):
        prefix = region.count(0)
        for column in range(len(pair["prompt_ids"]) if with_shared else prefix, len(row)):
            # A token is predicted from the column before it; the first of each suffix from the last of the prefix
            begins_suffix = region[column] != region[column - 1]
            source.append(i * length + (prefix if begins_suffix else column) - 1)
            target.append(row[column])
            row_of.append(i)
            part.append(region[column])
    pad = lambda lists, value: torch.tensor([x + [value] * (length - len(x)) for x in lists], device=device)
    index = lambda values: torch.tensor(values, dtype=torch.long, device=device)
    region = pad(regions, 3)  # (B, L): 0 prefix, 1 chosen, 2 rejected, 3 padding
    columns = torch.arange(length, device=device)
    causal = columns[:, None] >= columns
    blind = (region[:, :, None] == 2) & (region[:, None, :] == 1)  # the rejected suffix does not see the chosen one
    return {
        "token_ids": pad(rows, pad_id),
        "positions": pad(positions, 0),
        "attention": causal & ~blind,
        "source": index(source),
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
        hidden = self.lm.base_model(
            input_ids=token_ids, attention_mask=attention[:, None], position_ids=positions, use_cache=False
        ).last_hidden_state  # (B, L, D)
        weight, bias = decode.lm_head(self.lm, self.vocab_size)
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
    Returns the loss and, to log, sums over the pairs (7,): loss, wins, both rewards, both log-probs, -log pi(y+|x).
    """
    average = args.logprobs == "mean"
    chosen, rejected = response_logps(sums, lengths, average)  # (b,)
    reference_logps = response_logps(reference, lengths, average)
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        chosen, rejected, *reference_logps, args.beta, args.label_smoothing
    )
    nll = -(sums[:, 0] + sums[:, 1])  # (b,); read only if the shared part is there
    loss = losses.sum() / pair_count
    if args.nll_weight > 0:
        loss = loss + args.nll_weight * nll.sum() / chosen_tokens
    wins = (chosen_rewards > rejected_rewards).float()
    logged = [losses, wins, chosen_rewards, rejected_rewards, chosen, rejected, nll]
    return loss, torch.stack([values.detach().sum() for values in logged])


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reference_logprobs(model, pairs, lengths, pad_id, with_shared, micro_batch_size, world):
    """(number of pairs, 3) float32 on the CPU: what `PairModel` says of each pair before training."""
    sums = torch.zeros(len(pairs), 3, device=world.device)
    batches = micro_batches(range(len(pairs)), lengths, micro_batch_size, world)
    for indices in tqdm(batches, desc="reference", disable=world.rank > 0, leave=False):
        batch = [pairs[i] for i in indices] or pairs[:1]  # an idle rank still takes part in FSDP's collectives
        values = model(**collate_pairs(batch, pad_id, with_shared, world.device))
        sums[indices] = values[: len(indices)]
    model.reshard()  # FSDP leaves its root gathered after a forward: checkpoints and optimizers must see the shards
    torch.distributed.all_reduce(sums)  # each row is non-zero on one rank only: the sum is exact
    return sums.cpu()


def load_reference(args, world, tokenizer, pairs, lengths, policy, policy_path, reference_path, out):
    """log pi_ref of all pairs: computed once, since a frozen model's log-probs never change; kept in OUT/reference.json.

    Where the reference is the policy before its first step, no second model is loaded.
    """
    file = out / "reference.json"
    try:
        return torch.tensor(common.read_json(file)).view(len(pairs), 3)
    except (OSError, ValueError, TypeError, RuntimeError):
        pass  # not there, or damaged
    if reference_path != policy_path:
        policy = load_policy(reference_path, args, tokenizer, world)[0]
    with_shared, pad_id = needs_shared(args), tokenizer.pad_token_id
    reference = reference_logprobs(policy, pairs, lengths, pad_id, with_shared, args.micro_batch_size, world)
    world.barrier()  # every rank has looked for the file before it is written
    if world.rank == 0:
        common.write_json(file, reference.tolist())
    return reference


def needs_shared(args):
    """Whether the log-probs of shared response tokens count: in a difference of sums they cancel, in others not."""
    return args.logprobs == "mean" or args.nll_weight > 0


def load_policy(path, args, tokenizer, world):
    """A model to train: float32 parameters, sharded. Returns (PairModel, the language model in it)."""
    lm = training.load_trainable(path, args, tokenizer, world)
    return training.shard(PairModel(lm, len(tokenizer)), lm, models.compute_dtype(args.dtype, world), world), lm


def train(args, world, tokenizer, pairs, student_path, reference_path, out):
    """Trains the student on the pairs; writes OUT/metrics.jsonl, OUT/checkpoint, OUT/student. Resumes what it finds.

    Returns the last step's metrics, or None if OUT/student was already there.
    """
    if (out / "student").exists():
        return None
    accumulation = training.accumulation_steps(args, world)
    with_shared = needs_shared(args)
    lengths = [len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs]
    response_lengths = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in pairs])  # (n, 2)
    model, lm = load_policy(student_path, args, tokenizer, world)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=tuple(args.adam_betas), weight_decay=args.weight_decay
    )
    reference = load_reference(args, world, tokenizer, pairs, lengths, model, student_path, reference_path, out)
    first_step = training.load_checkpoint(out / "checkpoint", model, optimizer)
    total_steps = (args.max_steps or args.epochs * math.ceil(len(pairs) / args.batch_size)) if pairs else 0
    metrics_file = training.open_metrics(out / "metrics.jsonl", first_step, world)
    metrics, warned = None, False
    if world.rank == 0:
        print(
            f"dpo: {len(pairs)} pairs, {total_steps} steps of {args.batch_size} pairs"
            f" = {world.size} processes x {accumulation} micro-batches"
        )
    common.STATUS.enter("dpo", finishes_step=True)
    bar = tqdm(total=total_steps, initial=first_step, desc="dpo", unit="step", disable=world.rank > 0)
    for step in range(first_step, total_steps):
        started = time.perf_counter()
        batch = batch_of_step(step, len(pairs), args.batch_size, args.seed)
        # Counted over all ranks before the first backward: neither ranks nor accumulation change the gradient
        pair_count = len(batch)
        chosen_tokens = response_lengths[batch, 0].sum().item()
        totals = torch.zeros(8, device=world.device)  # what `batch_loss` logs; tokens computed, padding too
        for indices in micro_batches(batch, lengths, args.micro_batch_size, world):
            weight = float(len(indices) > 0)  # an idle rank runs a pair of weight 0: FSDP's collectives need it
            indices = indices or batch[:1]
            rows = collate_pairs([pairs[i] for i in indices], tokenizer.pad_token_id, with_shared, world.device)
            of_batch = reference[indices].to(world.device), response_lengths[indices].to(world.device)
            loss, sums = batch_loss(model(**rows), *of_batch, pair_count, chosen_tokens, args)
            (weight * world.size * loss).backward()  # FSDP averages gradients over ranks; the loss is already a mean
            totals[:7] += weight * sums
            totals[7] += weight * rows["token_ids"].numel()
        lr = training.learning_rate(step, total_steps, args.lr, args.lr_warmup_ratio, args.lr_final_ratio)
        grad_norm = training.optimizer_step(model, optimizer, lr, args.max_grad_norm)
        totals = world.sum(totals.tolist())
        metrics = step_metrics(totals, pair_count, chosen_tokens, args)
        metrics = {"stage": "dpo", "step": step + 1, **metrics, "grad_norm": grad_norm, "lr": lr}
        training.check_finite(metrics, [pairs[i].get("prompt_id", i) for i in batch], out)
        if not warned and reference_path == student_path:
            warned = warn_if_chosen_falls(metrics, args, chosen_tokens / pair_count, world)
        metrics.update(training.speed(totals[-1], time.perf_counter() - started, world))
        if world.rank == 0:
            common.append_jsonl(metrics_file, metrics)
        bar.update()
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", accuracy=f"{metrics['accuracy']:.2f}")
        stops = world.stops()
        if stops or (step + 1) % args.save_every == 0 or step + 1 == total_steps:
            training.save_checkpoint(out / "checkpoint", model, optimizer, step + 1, world)
        if stops:
            raise common.Stopped(f"stopped after step {step + 1}, whose checkpoint is written")
    bar.close()
    common.STATUS.enter("dpo, saving the model")
    training.save_model(out / "student", model, lm, tokenizer, common.DTYPES[args.save_dtype], world)
    return metrics


def step_metrics(totals, pair_count, chosen_tokens, args):
    """Sums over the step's pairs on all ranks -> what metrics.jsonl holds; each is defined in the README."""
    loss, wins, chosen_reward, rejected_reward, chosen, rejected = (total / pair_count for total in totals[:6])
    metrics = {"loss": loss, "dpo_loss": loss}
    if args.nll_weight > 0:
        metrics["nll"] = totals[6] / chosen_tokens
        metrics["loss"] = loss + args.nll_weight * metrics["nll"]
    return {
        **metrics,
        "margin": chosen_reward - rejected_reward,
        "accuracy": wins,
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
        "chosen_logp": chosen,
        "rejected_logp": rejected,
    }


def warn_if_chosen_falls(metrics, args, mean_length, world):
    """DPO's known failure: the loss falls while the chosen responses, too, become less likely. True if it warned."""
    fall = -metrics["chosen_reward"] / args.beta * (mean_length if args.logprobs == "mean" else 1)
    if fall <= 10 or world.rank > 0:
        return fall > 10
    behind = "" if needs_shared(args) else ", counted behind the shared prefix"
    tqdm.write(
        f"warning: step {metrics['step']}: the chosen responses' log-prob is {fall:.1f} nats under the reference's{behind}; "
        "a smaller --lr, a larger --beta or --nll-weight 1 holds it"
    )
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser):
    """The flags of the DPO stage; `warmup_distill.py` has them too."""
    group = parser.add_argument_group("DPO")
    group.add_argument("--beta", type=float, default=0.1, help="strength of the pull to the reference; 0.1 as in DPO")
    group.add_argument("--label-smoothing", type=float, default=0.0, help="conservative DPO: P(preference is wrong)")
    group.add_argument(
        "--nll-weight", type=float, default=0.0, help="adds this times -log pi(chosen) per token; not in the paper"
    )
    group.add_argument(
        "--logprobs", choices=["sum", "mean"], default="sum", help="a response's log-prob: sum as in DPO, or mean"
    )


def parse_args(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--model", required=True, help="the policy to train: folder or hub id")
    parser.add_argument("--pairs", required=True, help="JSONL: OUT/pairs.jsonl or TRL-style prompt, chosen, rejected")
    parser.add_argument("--reference", help="folder or hub id of the reference model; default: --model itself")
    parser.add_argument("--out", default="out/dpo", help="folder of the run; the trained model is OUT/student")
    common.add_arguments(parser)
    add_arguments(parser)
    training.add_training_arguments(parser, lr=5e-7)
    return check_args(parser.parse_args(argv))


def check_args(args):
    """Raises UserError for values that make no sense."""
    training.check_training_args(args)
    rules = {
        "above 0": (lambda x: 0 < x < math.inf, ["beta"]),
        "in [0, 0.5)": (lambda x: 0 <= x < 0.5, ["label_smoothing"]),
        "0 or more": (lambda x: 0 <= x < math.inf, ["nll_weight"]),
    }
    common.check_ranges(args, rules)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.dry_run is not None:
        return estimate.dry_run(args)
    world = common.start_processes(args.device, args.threads)
    training.accumulation_steps(args, world)  # its error belongs before the work
    tokenizer, _ = models.shared_tokenizer(args.model, args.reference, args.trust_remote_code)
    pairs = read_pairs(args.pairs, tokenizer)
    if not pairs:
        raise UserError("no pairs", f"in {args.pairs}", "lower --eta or use more prompts")
    out = run_folder.start_run(args.out, args, filter(None, [args.model, args.reference, args.pairs]))
    metrics = train(args, world, tokenizer, pairs, args.model, args.reference or args.model, out)
    if world.rank == 0:
        last = (
            "it was finished before"
            if metrics is None
            else f"loss {metrics['loss']:.4f} accuracy {metrics['accuracy']:.3f}"
        )
        print(f"{len(pairs)} pairs -> {out / 'student'} ({last})")


if __name__ == "__main__":
    common.run(main)
