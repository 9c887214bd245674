"""What a model writes and how far it is from another: responses, greedy accuracy, distance, and the closing table.

eval.py measures on benchmarks with this, warmup_distill.py and kd.py at their end.
"""

import json

import torch
from tqdm import tqdm

import common
import decode
from scores import final_number, is_correct

# ---------------------------------------------------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------------------------------------------------


def no_repeat_ngram(choose, prompts, size):
    """A `choose` for `decode` that completes no `size`-gram which its prompt and response have had already.

    prompts: the B rows' lists of ids. The rule and its reach into the prompt are those of transformers' generate().
    """
    histories, seen = [[] for _ in prompts], [{} for _ in prompts]  # seen: the size-1 tokens before -> what followed

    def remember(i, token):
        if len(histories[i]) >= size - 1:
            seen[i].setdefault(tuple(histories[i][1 - size :]), set()).add(token)
        histories[i].append(token)

    for i, prompt in enumerate(prompts):
        for token in prompt:
            remember(i, token)

    def choose_new(logits, indices, step):
        forbidden = torch.zeros_like(logits, dtype=torch.bool)
        for row, i in enumerate(indices.tolist()):
            forbidden[row, list(seen[i].get(tuple(histories[i][1 - size :]), ()))] = True
        tokens = choose(logits.masked_fill(forbidden, -torch.inf), indices, step)
        for i, token in zip(indices.tolist(), tokens.tolist()):
            remember(i, token)
        return tokens

    return choose_new


def batches_of_rank(prompts, batch_size, world):
    """This rank's batches; they are cut from the order of the prompts, never from the number of ranks."""
    batches = [prompts[k : k + batch_size] for k in range(0, len(prompts), batch_size)]
    return batches[world.rank :: world.size]


def generate(model, prompts, chooser, tokenizer, eos_ids, max_new_tokens, batch_size, world, title):
    """Yields (prompt, response ids, response text) for this rank's prompts. chooser(batch): a `choose` for `decode`."""
    batches = batches_of_rank(prompts, batch_size, world)
    for batch in tqdm(batches, desc=title, disable=world.rank > 0, leave=False):
        rows = decode.prefill(model, [p["ids"] for p in batch], tokenizer.pad_token_id, world.device)
        budget = torch.full((len(batch),), max_new_tokens, device=world.device)
        responses, _ = decode.decode(model, rows, chooser(batch), budget, eos_ids, len(tokenizer))
        yield from zip(batch, responses, tokenizer.batch_decode(responses, skip_special_tokens=True))


def sampler(batch, seed, args, device):
    """A `choose` for `decode`: one sample of each prompt in a batch, a pure function of (seed, prompt id)."""
    prompt_ids = torch.tensor([p["prompt_id"] for p in batch], device=device)
    zeros = torch.zeros_like(prompt_ids)
    choose = decode.sampler(seed, decode.EVAL_STAGE, prompt_ids, zeros, zeros, args.temperature, args.top_p)
    size = args.no_repeat_ngram_size
    return no_repeat_ngram(choose, [p["ids"] for p in batch], size) if size else choose


def greedy_accuracy(model, prompts, tokenizer, eos_ids, max_new_tokens, batch_size, world):
    """Share of prompts whose greedy response `is_correct`; prompts need "ids" and "gold", a text."""
    settings = (tokenizer, eos_ids, max_new_tokens, batch_size, world)
    responses = generate(model, prompts, lambda batch: decode.greedy, *settings, "accuracy")
    return world.sum([sum(is_correct(text, prompt["gold"]) for prompt, _, text in responses)])[0] / len(prompts)


@torch.no_grad()
def distance(student, teacher, prompts, tokenizer, eos_ids, max_new_tokens, batch_size, eta, seed, world):
    """How far apart two models are on one sampled response of the student to each prompt.

    Returns a dict: kl_teacher_student = KL(p, q) and kl_student_teacher = KL(q, p), nats a token, means over all sampled
    tokens of exact sums over the vocabulary; replaced_samples and replaced_tokens, shares with log q - log p > eta;
    response_tokens, the mean length.
    """
    totals = torch.zeros(6, dtype=torch.float64)
    batches = batches_of_rank(prompts, batch_size, world)
    for batch in tqdm(batches, desc="distance", disable=world.rank > 0, leave=False):
        ids, device = [p["ids"] for p in batch], world.device
        prompt_ids = torch.tensor([p["prompt_id"] for p in batch], device=device)
        zeros = torch.zeros_like(prompt_ids)
        choose = decode.sampler(seed, decode.EVAL_STAGE, prompt_ids, zeros, zeros, 1.0, 1.0)
        rows = decode.prefill(student, ids, tokenizer.pad_token_id, device)
        responses, _ = decode.decode(student, rows, choose, zeros + max_new_tokens, eos_ids, len(tokenizer))
        # Both models over the same tokens; position t of a response is predicted by hidden state t
        hidden = []
        for model in (student, teacher):
            rows = decode.prefill(model, ids, tokenizer.pad_token_id, device)
            hidden.append(decode.score(model, rows, responses, len(tokenizer))[1])
        for i, response in enumerate(responses):
            targets = torch.tensor(response, device=device)[:, None]
            q, p = (  # (T, V) log-probs
                decode.next_logits(m, h[i, : len(response)], len(tokenizer)).log_softmax(-1)
                for m, h in zip((student, teacher), hidden)
            )
            margin = (q - p).gather(-1, targets)[:, 0]  # (T,)
            sums = (p.exp() * (p - q)).sum(), (q.exp() * (q - p)).sum(), (margin > eta).sum(), (margin > eta).any()
            totals += torch.tensor([*map(float, sums), len(response), 1])
    forward, reverse, tokens_above, samples_above, tokens, samples = world.sum(totals.tolist())
    return {
        "kl_teacher_student": forward / tokens,
        "kl_student_teacher": reverse / tokens,
        "replaced_samples": samples_above / samples,
        "replaced_tokens": tokens_above / tokens,
        "response_tokens": tokens / samples,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The table that warmup_distill.py and kd.py close with
# ---------------------------------------------------------------------------------------------------------------------

TITLES = {
    "accuracy": "accuracy",
    "replaced_samples": "samples > eta",
    "replaced_tokens": "tokens > eta",
    "kl_teacher_student": "KL(p,q)",
    "kl_student_teacher": "KL(q,p)",
    "response_tokens": "tokens",
}


def closing_table(run, students, teacher, prompts, batch_size, eta):
    """Measures, prints and writes to OUT/summary.json; each column is defined in the README.

    students: {name: path}, before and after. teacher: () -> its model, or None where there is no whole one.
    prompts: as `data.encode_prompts` returns them. Returns the summary; on rank 0 it is on the disk, too.
    """
    with_answers = all(p["gold"] is not None and final_number(p["gold"]) is not None for p in prompts)
    shared = (run.tokenizer, run.eos_ids, run.args.max_new_tokens, batch_size)
    summary = {}
    if teacher and with_answers:
        summary["teacher"] = {"accuracy": greedy_accuracy(teacher(), prompts, *shared, run.world)}
    for name, path in students.items():
        model, row = run.load(path), {}
        if with_answers:
            row["accuracy"] = greedy_accuracy(model, prompts, *shared, run.world)
        if teacher:
            row.update(distance(model, teacher(), prompts, *shared, eta, run.args.seed, run.world))
        summary[name] = row
    if run.world.rank == 0:
        common.write_atomic(run.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        which = "training" if run.args.eval_data is None else "held-out"
        print_table(summary, f"{len(prompts)} {which} prompts, eta {eta}")
        before, after = (summary[name].get("response_tokens", 0) for name in students)
        if after > 1.5 * before > 0:
            print(f"warning: the student's responses have grown from {before:.0f} to {after:.0f} tokens")
    return summary


def print_table(summary, title):
    """{name: {column: value}} as text, a row a name."""
    columns = [c for c in TITLES if any(c in row for row in summary.values())]
    print(f"\n{title}\n{'':16}" + "".join(f"{TITLES[c]:>15}" for c in columns))
    for name, row in summary.items():
        print(f"{name:16}" + "".join(f"{row[c]:15.4f}" if c in row else f"{'-':>15}" for c in columns))
