"""Knowledge distillation: step 5 of Warmup-Distill (arXiv 2502.11766), its baseline, and SFT.

    python kd.py --student out/warmup/student                                   the whole method, on the toy in toy/
    python kd.py                                                                the baseline, on the toy
    torchrun --nproc_per_node 8 kd.py --teacher T --student S --data D          real models
    torchrun --nproc_per_node 8 kd.py --student S --data D --kd-rate 0          SFT: no teacher is read

The steps: responses y (--mode: the data's, the teacher's, the student's own) -> for each step: teacher p and student q
at every response token, (1-r) CE(y, q) + r D(p, q), gradient, AdamW. A student's own sample is no label: CE leaves it out.

Memory. The full-vocabulary logits are what KD costs. Hidden states are computed once, prompt positions left out, then
lm_head and the loss over chunks of tokens, each chunk's gradient taken in the forward pass (`ChunkedHeadLoss`).
"""

import functools
import math
import time

import torch
import torch.nn.functional as F

from lib import data, decode, measure, models, responses, runs, training
from warmup_distill import first_mismatch

# Defaults of the toy, which is used without --teacher and --data
TOY = {"limit": 1000, "max_prompt_tokens": 16, "max_new_tokens": 48, "loss": "reverse_kl", "lr": 5e-4, "max_steps": 60}
TOY |= {"batch_size": 32, "micro_batch_size": 32, "dtype": "float32", "threads": 1}

# ---------------------------------------------------------------------------------------------------------------------
# The losses: p the teacher, q the student. Logits (..., V), finite -> nats a token (...), in float32 (float64 stays)
# ---------------------------------------------------------------------------------------------------------------------


def probs(logits):
    """softmax in float32 or more."""
    return F.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def log_probs(logits):
    """log softmax in float32 or more."""
    return F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def log(x):
    """log of probabilities, finite, so that 0 log 0 = 0, gradients too."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()


def forward_kl(student_logits, teacher_logits):
    """KL(p, q): q covers all of p (Hinton et al., arXiv 1503.02531)."""
    log_p, log_q = log_probs(teacher_logits), log_probs(student_logits)
    # sum p log(p/q)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student_logits, teacher_logits):
    """KL(q, p): q keeps to where p is (MiniLLM, arXiv 2306.08543; here on given tokens, without its policy gradient)."""
    log_p, log_q = log_probs(teacher_logits), log_probs(student_logits)
    # sum q log(q/p)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jsd(student_logits, teacher_logits, beta=0.5):
    """Generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649), 0 < beta < 1; beta 0.5 is symmetric in p and q."""
    p, q = probs(teacher_logits), probs(student_logits)
    # m = beta p + (1-beta) q, written so that m is exactly p where q is
    m = p + (1 - beta) * (q - p)
    # beta KL(p, m) + (1-beta) KL(q, m)
    return (beta * p * (log(p) - log(m)) + (1 - beta) * q * (log(q) - log(m))).sum(-1)


def tvd(student_logits, teacher_logits):
    """Total variation distance, 0 to 1 (f-distill, arXiv 2307.15190)."""
    p, q = probs(teacher_logits), probs(student_logits)
    # 1/2 sum |p - q|
    return (p - q).abs().sum(-1) / 2


def skew_forward_kl(student_logits, teacher_logits, alpha=0.1):
    """KL(p, alpha p + (1-alpha) q), at most log(1/alpha) (DistiLLM, arXiv 2402.03898), 0 < alpha < 1."""
    p, q = probs(teacher_logits), probs(student_logits)
    # m = alpha p + (1-alpha) q;  sum p log(p/m)
    m = q + alpha * (p - q)
    return (p * (log(p) - log(m))).sum(-1)


def skew_reverse_kl(student_logits, teacher_logits, alpha=0.1):
    """KL(q, (1-alpha) p + alpha q), at most log(1/alpha) (DistiLLM, arXiv 2402.03898), 0 < alpha < 1."""
    p, q = probs(teacher_logits), probs(student_logits)
    # m = (1-alpha) p + alpha q;  sum q log(q/m)
    m = p + alpha * (q - p)
    return (q * (log(q) - log(m))).sum(-1)


def adaptive_kl(student_logits, teacher_logits, tail_mass=0.5):
    """Forward and reverse KL, weighed by how far q is from p in p's head and in its tail (AKL, arXiv 2404.02657)."""
    log_p, log_q = log_probs(teacher_logits), log_probs(student_logits)
    p, q = log_p.exp(), log_q.exp()
    with torch.no_grad():
        # tail: the least likely tokens of p whose mass adds up to no more than tail_mass; head: the others
        ascending, order = p.sort(-1)
        tail = ascending.cumsum(-1) <= tail_mass
        # g = sum |p - q| over the head, over the tail
        gap = (p - q).abs().gather(-1, order)
        g_head, g_tail = (gap * ~tail).sum(-1), (gap * tail).sum(-1)
        g = (g_head + g_tail).clamp(min=torch.finfo(g_head.dtype).tiny)  # at p = q: 0/g is 0, not 0/0
    # (g_head KL(p, q) + g_tail KL(q, p)) / (g_head + g_tail)
    forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
    return g_head / g * forward + g_tail / g * reverse


LOSSES = {f.__name__: f for f in (forward_kl, reverse_kl, jsd, tvd, skew_forward_kl, skew_reverse_kl, adaptive_kl)}


def total_loss(student_logits, teacher_logits, targets, divergence, kd_rate, temperature):
    """(1-r) CE + r D, per token. Logits (M, V). targets (M,): the response's tokens, -100 where one is no label.

    divergence: one of LOSSES. kd_rate: r; at r = 0 teacher_logits may be None. Returns total, ce and kd, each (M,).
    """
    ce = F.nll_loss(log_probs(student_logits), targets, reduction="none", ignore_index=-100)
    if kd_rate == 0:
        return ce, ce, torch.zeros_like(ce)
    # D(softmax(teacher / T), softmax(student / T)), without the factor T^2
    kd = divergence(student_logits / temperature, teacher_logits / temperature)
    total = kd if kd_rate == 1 else (1 - kd_rate) * ce + kd_rate * kd  # at r = 1 no gradient goes through CE
    return total, ce, kd


# ---------------------------------------------------------------------------------------------------------------------
# Full-vocabulary logits in chunks
# ---------------------------------------------------------------------------------------------------------------------


class ChunkedHeadLoss(torch.autograd.Function):
    """Sums a loss on lm_head's logits over tokens; no more than (chunk, V) logits exist at once, none in the backward.

    The gradient of each chunk is taken in the forward pass, as in Liger Kernel's fused linear losses (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, chunk_losses, chunk):
        """hidden (M, D). weight (V, D). bias (V,) or None.

        chunk_losses(slice of M), called once a chunk, returns a function (logits (m, V), slice of the chunk) -> K losses, each (m,).

        Returns the first loss's sum, to differentiate, and the sums of all of them (K,), to log.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        grad_hidden, grad_weight, grad_bias = torch.zeros_like(hidden), None, None
        add = lambda total, value: value if total is None else value.to(dtype).add_(total)  # over chunks, in float32
        sums = 0
        rows = math.ceil(chunk / 16)  # a loss makes many float32 tensors of its logits' size: few rows at a time
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            token_losses = chunk_losses(part)  # the teacher's head runs here
            grad = F.linear(hidden[part], weight, bias)  # (m, V) logits, overwritten by their gradient
            for row in range(0, len(grad), rows):
                logits = grad[row : row + rows].to(dtype, copy=True).requires_grad_()
                with torch.enable_grad():
                    losses = token_losses(logits, slice(row, row + len(logits)))
                    grad[row : row + rows] = torch.autograd.grad(losses[0].sum(), logits)[0]
                sums = sums + torch.stack([values.detach().sum() for values in losses])
            del token_losses  # and with it the teacher's logits
            # logits = h W^T + b:  dh = g W,  dW = g^T h,  db = sum g
            if bias is not None:
                grad_bias = add(grad_bias, grad.sum(0, dtype=dtype))
            grad_hidden[part] = grad @ weight
            grad_weight = add(grad_weight, grad.T @ hidden[part])
        grads = (grad_hidden, grad_weight, grad_bias)
        ctx.save_for_backward(*(None if grad is None else grad.to(weight.dtype) for grad in grads))
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    def backward(ctx, scale, _):
        grads = [None if g is None else g.mul_(scale) for g in ctx.saved_tensors]  # a second backward raises
        return (*grads, None, None)


class KDModel(torch.nn.Module):
    """A language model that returns its distillation loss. It is FSDP's root, so lm_head's weights are gathered here."""

    def __init__(self, lm, vocab_size, divergence, kd_rate, temperature):
        super().__init__()
        self.lm, self.vocab_size = lm, vocab_size
        self.options = (divergence, kd_rate, temperature)

    def forward(self, token_ids, source, target, teacher_logits):
        """What `responses.collate` returns, and a function slice of M -> teacher's logits (m, V), or None.

        Returns the loss summed over tokens, to differentiate, and {"loss", "ce", "kd"}: sums over tokens, to log.
        """

        def chunk_losses(part):
            all_p_logits = None if teacher_logits is None else teacher_logits(part)

            def token_losses(q_logits, rows):
                p_logits = None if teacher_logits is None else all_p_logits[rows].float()
                return total_loss(q_logits, p_logits, target[part][rows], *self.options)

            return token_losses

        weight, bias = decode.lm_head(self.lm, self.vocab_size)
        hidden = responses.response_hidden(self.lm, token_ids, source)
        chunk = 4 * decode.head_chunk(self.vocab_size)  # few sums of the weight's gradient, which is as large
        loss, (total, ce, kd) = ChunkedHeadLoss.apply(hidden, weight, bias, chunk_losses, chunk)
        return loss, {"loss": total, "ce": ce, "kd": kd}


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def divergence_of(args):
    """LOSSES[--loss] with its options."""
    options = {"jsd": {"beta": args.jsd_beta}, "adaptive_kl": {"tail_mass": args.tail_mass}}
    options["skew_forward_kl"] = options["skew_reverse_kl"] = {"alpha": args.skew_alpha}
    return functools.partial(LOSSES[args.loss], **options.get(args.loss, {}))


def train(args, world, tokenizer, tokens, examples, teacher, student_path, out):
    """Trains the student; writes OUT/metrics.jsonl, OUT/checkpoint, OUT/student. Resumes.

    examples: from `responses.write_examples`. teacher: LiveTeacher or CachedTeacher, None where --kd-rate is 0.
    """
    lm = training.load_trainable(student_path, args, tokenizer, world)
    model = KDModel(lm, tokens.vocab_size, divergence_of(args), args.kd_rate, args.temperature)
    model = training.shard(model, lm, models.compute_dtype(args.dtype, world.device), world, args.shard_size)
    replica = models.load_frozen(student_path, args, world, tokenizer) if args.mode == "student" else None
    optimizer, total_steps, bar = training.begin("kd", len(examples), "examples", model, args, out, world)
    sampled = {}
    with training.stop_signals() as stop:
        for step in bar:
            started = time.perf_counter()
            batch = training.batch_of_step(step, len(examples), args.batch_size, args.seed)
            columns = examples[batch]
            if args.mode == "student":
                sampled = responses.sample_from_student(args, world, tokens, replica, lm, examples, batch, step)
            sequences = {  # number of the example: prompt, response, whether the response is a label
                i: (prompt, sampled.get(i, response), i not in sampled)
                for i, prompt, response in zip(batch, columns["ids"], columns["response"])
            }
            # Counted over all ranks before the first backward: neither ranks nor accumulation change the gradient.
            # CE, too, is divided by all response tokens; a token that is no label adds 0 to it
            token_count = sum(len(response) for _, response, _ in sequences.values())
            lengths = {i: len(prompt) + len(response) for i, (prompt, response, _) in sequences.items()}
            totals = {"loss": 0.0, "ce": 0.0, "kd": 0.0, "tokens": 0.0}  # tokens: computed, padding too
            for indices, weight in training.micro_batches(batch, lengths, args.micro_batch_size, world):
                inputs = responses.collate([sequences[i] for i in indices], tokens.pad_id, world.device)
                teacher_logits = None if teacher is None else teacher(inputs, indices)
                loss, sums = model(**inputs, teacher_logits=teacher_logits)
                (weight * world.size / token_count * loss).backward()  # FSDP averages gradients over ranks
                for name, value in {**sums, "tokens": inputs["token_ids"].numel()}.items():
                    totals[name] = totals[name] + weight * value
            updated = training.optimizer_step(model, optimizer, step, total_steps, args)
            totals = world.sum(totals)
            means = {name: totals[name] / token_count for name in ("loss", "ce", "kd")}
            metrics = {"stage": "kd", "step": step + 1, **means, **updated, "response_tokens": token_count}
            training.log_step(out, metrics, columns["prompt_id"], totals["tokens"], started, world)
            bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("loss", "ce", "kd")})
            training.end_step(args, step + 1, total_steps, out, model, optimizer, tokenizer, stop, world)
    training.save_model(out / "student", model.lm, tokenizer, runs.DTYPES[args.save_dtype], world)


# ---------------------------------------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = runs.ArgumentParser(__doc__)
    runs.add_arguments(parser)
    data.add_arguments(parser, "out/kd", eval_limit=500)
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=list(LOSSES), default="forward_kl", help="divergence of teacher and student")
    add("--kd-rate", type=runs.SHARE, default=0.5, help="r in (1-r) CE + r KD; 0: SFT, no teacher")
    add("--temperature", type=runs.TEMPERATURE, default=1.0, help="of both's logits; no factor T^2")
    add("--jsd-beta", type=runs.OPEN_SHARE, default=0.5, help="beta of jsd")
    add("--skew-alpha", type=runs.OPEN_SHARE, default=0.1, help="alpha of the two skewed losses")
    add("--tail-mass", type=runs.SHARE, default=0.5, help="share of p that is adaptive_kl's tail")
    add = parser.add_argument_group("responses").add_argument
    add("--mode", choices=["gold", "teacher", "student"], default="gold", help="who wrote the responses")
    add("--teacher-decoding", choices=["sample", "greedy"], default="greedy", help="in --mode teacher")
    add("--responses", help="folder: store the teacher's there once, greedy ones for every --seed; None: OUT/responses")
    add("--on-policy", type=runs.SHARE, default=1.0, help="student's share of a batch in --mode student")
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher-cache", help="folder: store the teacher's log-probs there once, or use those there")
    add("--teacher-top-k", type=runs.COUNT, default=64, help="log-probs a token in --teacher-cache")
    training.add_arguments(parser, lr=1e-5)
    args = data.parse_args(parser, argv, TOY, ["teacher"])
    needed = ["student", "data", "teacher"] if args.kd_rate > 0 or args.mode == "teacher" else ["student", "data"]
    for name in needed:
        if not getattr(args, name):
            parser.error(f"--{name} is missing: give it, or neither teacher nor data for the toy")
    if args.mode == "student" and args.kd_rate == 0:
        parser.error("--kd-rate is 0.0, and with --mode student there are no labels")
    if args.teacher_cache and (args.mode == "student" or args.kd_rate == 0):
        parser.error("--teacher-cache needs responses that stay, and a teacher: not --mode student, not --kd-rate 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    world = runs.start_processes(args.device, args.threads)
    tokenizer, tokens = models.shared_tokenizer(args.student, args.teacher, args.trust_remote_code)
    limits = (args.max_prompt_tokens, args.max_new_tokens, args.trust_remote_code)
    args.max_prompt_tokens = models.prompt_limit(filter(None, [args.student, args.teacher]), *limits)
    eval_prompts = world.first(lambda: data.load_eval_prompts(args, tokenizer))
    inputs = [path for path in (args.student, args.teacher, args.data) if path]
    out = runs.start_run(args.out, args, world, inputs)  # after all that can be wrong with the arguments
    teacher = None
    if not world.first(lambda: training.is_trained(out)):
        prompts = data.write_prompts(args, tokenizer, out, world)
        examples = responses.write_examples(args, world, tokenizer, tokens, prompts, out)
        if args.teacher_cache:
            teacher = responses.CachedTeacher(args, world, tokenizer, tokens, examples)
        elif args.kd_rate > 0:
            teacher = responses.LiveTeacher(training.load_teacher(args, world, tokenizer), tokens.vocab_size)
        train(args, world, tokenizer, tokens, examples, teacher, args.student, out)
        training.release_memory()

    if eval_prompts:
        teacher_lm = None  # without KD, sharded or cached there is no whole teacher here
        if args.kd_rate > 0 and not args.shard_teacher and not args.teacher_cache:
            teacher_lm = training.load_teacher(args, world, tokenizer) if teacher is None else teacher.lm
        settings = (eval_prompts, args.prompts_per_batch, 4.0, first_mismatch)  # 4.0: the warm-up's default eta
        measure.closing_table(args, world, tokenizer, tokens, out, teacher_lm, *settings)
    world.print(f"the run as a page: python -m tools.report {out}")
    world.print(f"{runs.seconds_since_start():.0f} seconds; the distilled student is {out / 'student'}")


if __name__ == "__main__":
    runs.run(main)
