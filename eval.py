"""Evaluation: math accuracy, and the distance between a teacher and a student on the student's own samples.

Work is divided over ranks by batches of prompts; no score depends on the number of processes.
"""

import re

import torch
from tqdm import tqdm

import decode

EVAL_STAGE = 2  # separates the noise of these samples from that of training samples


def final_number(text):
    """The last number in a text as a float, or None: "1,000" is 1000, "= 18.0" is 18, "#### 18" is 18."""
    found = re.findall(r"(?<![\d)])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def is_correct(response, gold):
    """Whether a response ends in the same number as the gold response."""
    answer = final_number(response)
    return answer is not None and answer == final_number(gold)


def batches_of_rank(prompts, batch_size, world):
    """This rank's batches; they are cut from the order of the prompts, never from the number of ranks."""
    batches = [prompts[k : k + batch_size] for k in range(0, len(prompts), batch_size)]
    return batches[world.rank :: world.size]


def greedy_accuracy(model, prompts, tokenizer, eos_ids, max_new_tokens, batch_size, world):
    """Share of prompts whose greedy response `is_correct`; prompts need "ids" and "gold"."""
    correct = 0
    for batch in tqdm(
        batches_of_rank(prompts, batch_size, world), desc="accuracy", disable=world.rank > 0, leave=False
    ):
        rows = decode.prefill(model, [p["ids"] for p in batch], tokenizer.pad_token_id, world.device)
        budget = torch.full((len(batch),), max_new_tokens, device=world.device)
        responses, _ = decode.decode(model, rows, decode.greedy, budget, eos_ids, len(tokenizer))
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        correct += sum(is_correct(text, prompt["gold"]) for text, prompt in zip(texts, batch))
    return world.sum([correct])[0] / len(prompts)


@torch.no_grad()
def distance(student, teacher, prompts, tokenizer, eos_ids, max_new_tokens, batch_size, eta, seed, world):
    """How far apart two models are on one sampled response of the student to each prompt.

    Returns a dict: kl_teacher_student = KL(p, q) and kl_student_teacher = KL(q, p), nats a token, means over all sampled
    tokens of exact sums over the vocabulary; replaced_samples and replaced_tokens, shares with log q - log p > eta.
    """
    totals = torch.zeros(6, dtype=torch.float64)
    for batch in tqdm(
        batches_of_rank(prompts, batch_size, world), desc="distance", disable=world.rank > 0, leave=False
    ):
        ids, device = [p["ids"] for p in batch], world.device
        prompt_ids = torch.tensor([p["prompt_id"] for p in batch], device=device)
        zeros = torch.zeros_like(prompt_ids)
        choose = decode.sampler(seed, EVAL_STAGE, prompt_ids, zeros, zeros, 1.0, 1.0)
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
            totals += torch.stack(
                [
                    (p.exp() * (p - q)).sum(),
                    (q.exp() * (q - p)).sum(),
                    (margin > eta).sum(),
                    (margin > eta).any(),
                    torch.tensor(len(response)),
                    torch.tensor(1),
                ]
            ).cpu()
    forward, reverse, tokens_above, samples_above, tokens, samples = world.sum(totals.tolist())
    return {
        "kl_teacher_student": forward / tokens,
        "kl_student_teacher": reverse / tokens,
        "replaced_samples": samples_above / samples,
        "replaced_tokens": tokens_above / tokens,
    }
