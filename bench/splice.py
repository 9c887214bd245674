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
import statistics
import time

import torch
from sampling import StopAt, draw_lengths, draw_prompts, load

# sampling.py has put the project on the path
import decode
from warmup_distill import first_mismatch


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--teacher", help="folder or hub id; default: random, SmolLM2-135M's shape")
    parser.add_argument("--student", help="folder or hub id, the same tokenizer; default: another random model")
    parser.add_argument("--layers", type=int, default=30, help="of the random models")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-length", type=int, default=100, help="the longest; lengths are drawn from half of it")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--hazard", type=float, default=0.02, help="probability that a token is a response's last")
    parser.add_argument("--mismatch", type=float, default=0.02, help="share of the tokens whose margin is above eta")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def ours(teacher, batch, greedy=False, seed=0):
    """Returns (log-probs (B, T), t* (B,), continuations, seconds of the check, seconds of the splice)."""
    began = time.process_time()
    vocab_size = teacher.config.vocab_size
    rows = decode.expand(decode.prefill(teacher, batch["prompts"], 0, "cpu"), batch["n"])
    rows, hidden, logprobs = decode.score(teacher, rows, batch["responses"], vocab_size)
    t_star = first_mismatch(batch["student_logprobs"], logprobs, batch["mask"], batch["eta"])
    checked = time.process_time()
    chosen = (t_star >= 0).nonzero()[:, 0]
    rows = decode.rewind(rows.select(chosen), t_star[chosen], hidden[chosen])
    names = (batch["prompt_ids"][chosen], batch["sample_ids"][chosen], t_star[chosen])
    choose = decode.greedy if greedy else decode.sampler(seed, 1, *names, 1.0, 1.0)
    written = decode.decode(teacher, rows, choose, batch["room"][chosen], [-1], vocab_size)[0]
    return logprobs, t_star, written, checked - began, time.process_time() - checked


@torch.no_grad()
def plain(teacher, batch, greedy=False, seed=0):
    """The same from a full forward and generate."""
    began = time.process_time()
    torch.manual_seed(seed)
    prompts = [p for p in batch["prompts"] for _ in range(batch["n"])]
    before, width = max(map(len, prompts)), batch["mask"].shape[1]
    left, right = [before - len(p) for p in prompts], [width - len(r) for r in batch["responses"]]
    columns = list(zip(left, prompts, batch["responses"], right))
    token_ids = torch.tensor([[0] * a + p + r + [0] * b for a, p, r, b in columns])  # (B, W + T)
    attention = torch.tensor([[0] * a + [1] * (len(p) + len(r)) + [0] * b for a, p, r, b in columns])
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = teacher(
        input_ids=token_ids,
        attention_mask=attention,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    targets = token_ids[:, before:, None]
    # Row by row: the float32 logits of a whole batch would be the memory of this benchmark
    logprobs = [row.float().log_softmax(-1).gather(-1, target)[:, 0] for row, target in zip(logits, targets)]
    logprobs = torch.stack(logprobs).masked_fill(~batch["mask"], 0)
    del logits
    t_star = first_mismatch(batch["student_logprobs"], logprobs, batch["mask"], batch["eta"])
    checked = time.process_time()
    chosen = (t_star >= 0).nonzero()[:, 0]
    cut = [prompts[i] + batch["responses"][i][: t_star[i]] for i in chosen.tolist()]
    width, room = max(map(len, cut)), batch["room"][chosen]
    draw = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    output = teacher.generate(
        input_ids=torch.tensor([[0] * (width - len(c)) + c for c in cut]),
        attention_mask=torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in cut]),
        max_new_tokens=int(room.max()),
        stopping_criteria=[StopAt(width, room)],
        **draw,
    )
    written = [row[:k] for row, k in zip(output[:, width:].tolist(), room.tolist())]
    return logprobs, t_star, written, checked - began, time.process_time() - checked


def make_batch(student, teacher, args):
    """Samples of the student with their log-probs, eta, and how many tokens each row's continuation gets."""
    vocab_size, n = student.config.vocab_size, args.samples
    prompts = draw_prompts(args.prompts, args.prompt_length, vocab_size)
    prompt_ids = torch.arange(args.prompts).repeat_interleave(n)
    sample_ids = torch.arange(n).repeat(args.prompts)
    lengths = draw_lengths(len(prompt_ids), args.hazard, args.max_new_tokens)
    choose = decode.sampler(0, 0, prompt_ids, sample_ids, torch.zeros_like(prompt_ids), 1.0, 1.0)
    rows = decode.expand(decode.prefill(student, prompts, 0, "cpu"), n)
    responses, logprobs = decode.decode(student, rows, choose, lengths, [-1], vocab_size)
    width = int(lengths.max())
    batch = {
        "prompts": prompts,
        "responses": responses,
        "student_logprobs": torch.tensor([values + [0.0] * (width - len(values)) for values in logprobs]),
        "mask": torch.arange(width) < lengths[:, None],
        "n": n,
        "prompt_ids": prompt_ids,
        "sample_ids": sample_ids,
        "room": torch.ones_like(lengths),
        "eta": float("inf"),
    }
    margin = (batch["student_logprobs"] - ours_logprobs(teacher, batch))[batch["mask"]].sort().values
    k = int((1 - args.mismatch) * len(margin))
    batch["eta"] = ((margin[k - 1] + margin[k]) / 2).item()
    batch["room"] = draw_lengths(len(lengths), args.hazard, args.max_new_tokens)
    return batch


def ours_logprobs(teacher, batch):
    """The teacher's log-probs of the responses, (B, T)."""
    rows = decode.expand(decode.prefill(teacher, batch["prompts"], 0, "cpu"), batch["n"])
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
    dtype = getattr(torch, args.dtype)
    teacher = load(args.teacher, dtype, args.layers)
    student = load(args.student, dtype, args.layers, seed=1)
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
            low, middle, high = min(stages[stage]), statistics.median(stages[stage]), max(stages[stage])
            print(f"{stage:6} {way:6} {low:8.1f} {middle:8.1f} {high:8.1f}  s per 1,000 samples, min median max")
            summary[f"{way}_{stage}"], summary[f"{way}_{stage}_range"] = middle, [low, high]
        summary[f"ratio_{stage}"] = summary[f"plain_{stage}"] / summary[f"ours_{stage}"]
        print(f"{stage:6} ratio {summary[f'ratio_{stage}']:.2f}")
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
