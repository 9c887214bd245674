"""What a model writes and how far it is from its teacher: responses, greedy accuracy, distance, and the closing table.

eval.py measures on benchmarks with this, warmup_distill.py and kd.py at their end.
"""

import torch

from lib import decode, models, runs
from lib.runs import UserError
from lib.scoring import final_number, is_correct

# ---------------------------------------------------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------------------------------------------------


def no_repeat_ngram(choose, prompts, size):
    """A `choose` for `decode` that completes no `size`-gram which is in its prompt and response already.

    prompts: the B rows' lists of ids. The rule and its reach into the prompt are those of transformers' generate().
    """
    width = max(size, *map(len, prompts))
    history = torch.tensor([[-1] * (width - len(p)) + p for p in prompts])  # (B, L); -1: there is no token

    def choose_new(logits, indices, step):
        nonlocal history
        text = history.to(logits.device)[indices]  # (b, L)
        ngrams = text.unfold(1, size, 1)  # (b, L - size + 1, size)
        repeats = (ngrams[..., :-1] == text[:, None, 1 - size :]).all(-1)  # begins as the text ends
        forbidden = torch.where(repeats, ngrams[..., -1], logits.shape[-1])  # V: one column more, for no token
        barred = torch.nn.functional.pad(logits, (0, 1)).scatter(1, forbidden, -torch.inf)[:, :-1]  # (b, V)
        tokens = choose(barred, indices, step)
        history = torch.nn.functional.pad(history.to(logits.device), (0, 1), value=-1)
        history[indices, -1] = tokens
        return tokens

    return choose_new


def sampler(batch, seed, device, temperature=1.0, top_p=1.0, no_repeat_ngram_size=0):
    """A `choose` for `decode`: one sample of each prompt in a batch, a pure function of (seed, prompt id)."""
    prompt_ids = torch.tensor([p["prompt_id"] for p in batch], device=device)
    zeros = torch.zeros_like(prompt_ids)
    choose = decode.sampler(seed, decode.EVAL_STAGE, prompt_ids, zeros, zeros, temperature, top_p)
    if no_repeat_ngram_size > 0:
        choose = no_repeat_ngram(choose, [p["ids"] for p in batch], no_repeat_ngram_size)
    return choose


def generate(model, prompts, chooser, tokens, tokenizer, max_new_tokens, batch_size, world, title):
    """Yields (batch of prompts, their responses' ids, their responses' texts) for the batches of this rank.

    prompts: as `data.encode_prompts` returns them. chooser(batch): a `choose` for `decode`. title: of the progress bar.
    Batches are cut from the order of the prompts, never from the number of ranks.
    """
    batches = [prompts[k : k + batch_size] for k in range(0, len(prompts), batch_size)]
    for batch in runs.progress(batches[world.rank :: world.size], desc=title, world=world, leave=False):
        rows = decode.prefill(model, [p["ids"] for p in batch], tokens)
        budget = torch.full((len(batch),), max_new_tokens, device=world.device)
        responses, logprobs = decode.decode(model, rows, chooser(batch), budget, tokens)
        check_finite(logprobs, [p["prompt_id"] for p in batch])
        yield batch, responses, tokenizer.batch_decode(responses, skip_special_tokens=True)


def check_finite(values, prompt_ids):
    """Raises UserError with the id of the first of B prompts whose row of `values` (B, T) has a NaN or an infinity."""
    for prompt_id, finite in zip(prompt_ids, values.isfinite().all(-1).tolist()):
        if not finite:
            raise UserError("a model's output is NaN or infinite", f"for prompt {prompt_id}", "use --dtype float32")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def greedy_accuracy(model, prompts, tokens, tokenizer, max_new_tokens, batch_size, world):
    """Share of prompts whose greedy response `is_correct`; prompts need "ids" and "gold", a text."""
    settings = (tokens, tokenizer, max_new_tokens, batch_size, world, "accuracy")
    correct = 0
    for batch, _, texts in generate(model, prompts, lambda batch: decode.greedy, *settings):
        correct += sum(is_correct(text, prompt["gold"]) for prompt, text in zip(batch, texts))
    return world.sum({"correct": correct})["correct"] / len(prompts)


@torch.no_grad()
def distance(
    student, teacher, prompts, tokens, tokenizer, max_new_tokens, batch_size, seed, world, eta, first_mismatch
):
    """How far apart two models are on one sampled response of the student to each prompt.

    first_mismatch: the rule of `warmup_distill.first_mismatch`. Returns a dict: kl_teacher_student = KL(p, q) and
    kl_student_teacher = KL(q, p), nats a token, means over all sampled tokens of exact sums over the vocabulary;
    replaced_samples, the share of responses in which the rule finds a mismatch; replaced_tokens, the share of tokens
    with log q - log p > eta; response_tokens, the mean length.
    Raises UserError where a log-prob is NaN or infinite.
    """
    names = ("kl_teacher_student", "kl_student_teacher", "replaced_samples", "replaced_tokens", "response_tokens")
    totals = dict.fromkeys((*names, "samples"), 0.0)
    settings = (tokens, tokenizer, max_new_tokens, batch_size, world, "distance")
    for batch, responses, _ in generate(student, prompts, lambda batch: sampler(batch, seed, world.device), *settings):
        # Both models over the same tokens; position t of a response is predicted by hidden state t
        ids = [p["ids"] for p in batch]
        _, hidden_q, _ = decode.score(student, decode.prefill(student, ids, tokens), responses, tokens)
        _, hidden_p, _ = decode.score(teacher, decode.prefill(teacher, ids, tokens), responses, tokens)
        for i, response in enumerate(responses):
            targets = torch.tensor(response, device=world.device)[:, None]  # (T, 1)
            q = decode.next_logits(student, hidden_q[i, : len(response)], tokens.vocab_size).log_softmax(-1)  # (T, V)
            p = decode.next_logits(teacher, hidden_p[i, : len(response)], tokens.vocab_size).log_softmax(-1)
            log_q, log_p = q.gather(-1, targets).T, p.gather(-1, targets).T  # (1, T)
            forward, reverse = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum()
            check_finite(torch.stack([forward, reverse, (log_q - log_p).sum()])[None], [batch[i]["prompt_id"]])
            t_star = first_mismatch(log_q, log_p, torch.ones_like(log_q, dtype=torch.bool), eta)  # (1,)
            found = {"kl_teacher_student": forward, "kl_student_teacher": reverse, "response_tokens": len(response)}
            found |= {"replaced_samples": (t_star >= 0).sum(), "replaced_tokens": (log_q - log_p > eta).sum()}
            for name, value in {**found, "samples": 1}.items():
                totals[name] += float(value)
    totals = world.sum(totals)
    samples, all_tokens = totals.pop("samples"), totals["response_tokens"]
    per_sample = ("replaced_samples", "response_tokens")
    return {name: total / (samples if name in per_sample else all_tokens) for name, total in totals.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The table that warmup_distill.py and kd.py close with
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "accuracy": "accuracy",
    "replaced_samples": "samples > eta",
    "replaced_tokens": "tokens > eta",
    "kl_teacher_student": "KL(p,q)",
    "kl_student_teacher": "KL(q,p)",
    "response_tokens": "tokens",
}


def closing_table(args, world, tokenizer, tokens, out, teacher, prompts, batch_size, eta, first_mismatch):
    """Measures, writes OUT/summary.json and prints it as a table, whose columns the README defines.

    The students are --student and OUT/student. teacher: a loaded model, or None where there is no whole one: then there
    is no distance. prompts: as `data.encode_prompts` returns them; with a number in each gold response there is an
    accuracy. Returns the summary, {name: {column: value}}, on every rank.
    """
    with_answers = all(p["gold"] is not None and final_number(p["gold"]) is not None for p in prompts)
    settings = (prompts, tokens, tokenizer, args.max_new_tokens, batch_size)
    summary, students = {}, {"student before": args.student, "student after": out / "student"}
    if teacher is not None and with_answers:
        summary["teacher"] = {"accuracy": greedy_accuracy(teacher, *settings, world)}
    for name, path in students.items():
        model, summary[name] = models.load_frozen(path, args, world, tokenizer), {}
        if with_answers:
            summary[name]["accuracy"] = greedy_accuracy(model, *settings, world)
        if teacher is not None:
            summary[name] |= distance(model, teacher, *settings, args.seed, world, eta, first_mismatch)
    if world.rank > 0:
        return summary
    runs.write_json(out / "summary.json", summary, indent=1)
    print(f"\n{len(prompts)} {'training' if args.eval_data is None else 'held-out'} prompts, eta {eta}")
    columns = [c for c in COLUMNS if any(c in row for row in summary.values())]
    print(" " * 16 + "".join(f"{COLUMNS[c]:>15}" for c in columns))
    for name, row in summary.items():
        print(f"{name:16}" + "".join(f"{row[c]:15.4f}" if c in row else f"{'-':>15}" for c in columns))
    before, after = (summary[name].get("response_tokens", 0) for name in students)
    if after > 1.5 * before > 0:
        print(f"warning: the student's responses have grown from {before:.0f} to {after:.0f} tokens")
    return summary
