"""Check and splice (steps 2 and 3): one cache for both, beside a plain forward and then generate, seconds per 1,000 samples.

    python bench/splice.py                                        random models of SmolLM2-135M's shape
    python bench/splice.py --teacher FOLDER --student FOLDER      two models of one tokenizer

Ours prefills each prompt once, expands to N rows, scores the responses, rewinds to t* and decodes on in the same cache.
The plain way is a forward over N full rows a prompt, head on response positions only, and generate() on prompt + y_<t*
of the rows to be spliced, which prefills them again. Both see the same samples of the student and write the same number
of tokens for every row. eta is set so that --mismatch of the tokens are above it. Seconds are of this process's CPU
time. Checked first, in float32: the same log-probs, the same t*, the same greedy continuations. The last line is JSON.
"""

import argparse
import json

import torch
from harness import SHAPES, add_arguments, clock, show, spread
from sampling import StopAt, draw_lengths, draw_prompts, load

# harness.py has put the project on the path
import decode
from warmup_distill import first_mismatch


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--teacher", help="folder or hub id; default: random, of --shape")
    parser.add_argument("--student", help="folder or hub id, the same tokenizer; default: another random model")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m", help="of the random models")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-length", type=int, default=100, help="the longest; lengths are drawn from half of it")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--hazard", type=float, default=0.02, help="probability that a token is a response's last")
    parser.add_argument("--mismatch", type=float, default=0.02, help="share of the tokens whose margin is above eta")
    return parser.parse_args(argv)


def ours(teacher, batch, greedy=False, seed=0):
    """Returns (log-probs (B, T), t* (B,), continuations, seconds of the check, seconds of the splice)."""
    device, vocab_size = teacher.device, teacher.config.vocab_size
    began = clock(device.type)
    rows = decode.expand(decode.prefill(teacher, batch["prompts"], 0, teacher.device), batch["n"])
    rows, hidden, logprobs = decode.score(teacher, rows, batch["responses"], vocab_size)
    t_star = first_mismatch(batch["student_logprobs"], logprobs, batch["mask"], batch["eta"])
    checked = clock(teacher.device.type)
    chosen = (t_star >= 0).nonzero()[:, 0]
    rows = decode.rewind(rows.select(chosen), t_star[chosen], hidden[chosen])
    names = (batch["prompt_ids"][chosen], batch["sample_ids"][chosen], t_star[chosen])
    choose = decode.greedy if greedy else decode.sampler(seed, 1, *names, 1.0, 1.0)
    written = decode.decode(teacher, rows, choose, batch["room"][chosen], [-1], vocab_size)[0]
    return logprobs, t_star, written, checked - began, clock(teacher.device.type) - checked


@torch.no_grad()
def plain_logprobs(model, batch):
    """Log-probs of the responses (B, T) from a forward over N full rows a prompt, the head on response positions only."""
    prompts = [p for p in batch["prompts"] for _ in range(batch["n"])]
    before, width = max(map(len, prompts)), batch["mask"].shape[1]
    left, right = [before - len(p) for p in prompts], [width - len(r) for r in batch["responses"]]
    columns = list(zip(left, prompts, batch["responses"], right))
    tensor = lambda lists: torch.tensor(lists, device=model.device)
    token_ids = tensor([[0] * a + p + r + [0] * b for a, p, r, b in columns])  # (B, W + T)
    attention = tensor([[0] * a + [1] * (len(p) + len(r)) + [0] * b for a, p, r, b in columns])
    logits = model(
        input_ids=token_ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    targets = token_ids[:, before:, None]
    # Row by row: the float32 logits of a whole batch would be the memory of this benchmark
    logprobs = [row.float().log_softmax(-1).gather(-1, target)[:, 0] for row, target in zip(logits, targets)]
    return torch.stack(logprobs).masked_fill(~batch["mask"], 0)


@torch.no_grad()
def plain(teacher, batch, greedy=False, seed=0):
    """The same as `ours` from a full forward and generate."""
    began = clock(teacher.device.type)
    torch.manual_seed(seed)
    logprobs = plain_logprobs(teacher, batch)
    t_star = first_mismatch(batch["student_logprobs"], logprobs, batch["mask"], batch["eta"])
    checked = clock(teacher.device.type)
    chosen = (t_star >= 0).nonzero()[:, 0]
    cut = [batch["prompts"][i // batch["n"]] + batch["responses"][i][: t_star[i]] for i in chosen.tolist()]
    width, room = max(map(len, cut)), batch["room"][chosen]
    draw = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    output = teacher.generate(
        input_ids=torch.tensor([[0] * (width - len(c)) + c for c in cut], device=teacher.device),
        attention_mask=torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in cut], device=teacher.device),
        max_new_tokens=int(room.max()),
        stopping_criteria=[StopAt(width, room)],
        **draw,
    )
    written = [row[:k] for row, k in zip(output[:, width:].tolist(), room.tolist())]
    return logprobs, t_star, written, checked - began, clock(teacher.device.type) - checked


def make_batch(student, teacher, args):
    """Samples of the student with their log-probs, eta, and how many tokens each row's continuation gets."""
    vocab_size, n = student.config.vocab_size, args.samples
    prompts = draw_prompts(args.prompts, args.prompt_length, vocab_size)
    device = student.device
    prompt_ids = torch.arange(args.prompts, device=device).repeat_interleave(n)
    sample_ids = torch.arange(n, device=device).repeat(args.prompts)
    lengths = draw_lengths(len(prompt_ids), args.hazard, args.max_new_tokens).to(device)
    choose = decode.sampler(0, 0, prompt_ids, sample_ids, torch.zeros_like(prompt_ids), 1.0, 1.0)
    rows = decode.expand(decode.prefill(student, prompts, 0, student.device), n)
    responses, logprobs = decode.decode(student, rows, choose, lengths, [-1], vocab_size)
    width = int(lengths.max())
    batch = {
        "prompts": prompts,
        "responses": responses,
        "student_logprobs": torch.tensor(
            [values + [0.0] * (width - len(values)) for values in logprobs], device=device
        ),
        "mask": torch.arange(width, device=device) < lengths[:, None],
        "n": n,
        "prompt_ids": prompt_ids,
        "sample_ids": sample_ids,
        "room": torch.ones_like(lengths),
        "eta": float("inf"),
    }
    margin = (batch["student_logprobs"] - ours_logprobs(teacher, batch))[batch["mask"]].sort().values
    # Near that share, in the middle of the widest gap: rounding in bfloat16 then moves no token across eta
    k = int((1 - args.mismatch) * len(margin))
    near = margin[max(k - 8, 0) : k + 8]
    gap = near.diff().argmax()
    batch["eta"] = ((near[gap] + near[gap + 1]) / 2).item()
    batch["room"] = draw_lengths(len(lengths), args.hazard, args.max_new_tokens).to(device)
    return batch


def ours_logprobs(teacher, batch):
    """The teacher's log-probs of the responses, (B, T)."""
    rows = decode.expand(decode.prefill(teacher, batch["prompts"], 0, teacher.device), batch["n"])
    return decode.score(teacher, rows, batch["responses"], teacher.config.vocab_size)[2]


def check(teacher, batch):
    """Raises AssertionError unless both ways give the same, in float32 and greedily."""
    short = {**batch, "room": batch["room"].clamp(max=8)}
    dtype = teacher.dtype
    teacher.float()
    mine, theirs = (way(teacher, short, greedy=True) for way in (ours, plain))
    teacher.to(dtype)
    difference = (mine[0] - theirs[0]).abs().max().item()
    spliced = (mine[1] >= 0).sum().item()
    print(f"check: {spliced} of {len(mine[1])} rows spliced, log-probs differ by {difference:.1e} at most")
    assert difference < 1e-3 and torch.equal(mine[1], theirs[1]) and mine[2] == theirs[2]
    return spliced


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    teacher, student = load(args.teacher, args), load(args.student, args, seed=1)
    torch.manual_seed(0)
    batch = make_batch(student, teacher, args)
    del student
    spliced = check(teacher, batch)
    thousands = len(batch["responses"]) / 1000
    seconds = {"ours": {"check": [], "splice": [], "both": []}, "plain": {"check": [], "splice": [], "both": []}}
    for seed in range(args.repeat):
        for way in (ours, plain):
            *_, checking, splicing = way(teacher, batch, seed=seed)
            for stage, value in (("check", checking), ("splice", splicing), ("both", checking + splicing)):
                seconds[way.__name__][stage].append(value / thousands)
    summary = {"rows": len(batch["responses"]), "spliced": spliced, "eta": batch["eta"]}
    for stage in ("check", "splice", "both"):
        for way, stages in seconds.items():
            summary[f"{way}_{stage}"] = spread(stages[stage])
            show(f"{stage} {way}", summary[f"{way}_{stage}"], "s per 1,000 samples")
        summary[f"ratio_{stage}"] = summary[f"plain_{stage}"]["median"] / summary[f"ours_{stage}"]["median"]
        print(f"{stage:6} ratio {summary[f'ratio_{stage}']:.2f}")
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
