"""Check and splice (steps 2 and 3): one cache for both, beside a plain forward and then generate.

    python experiments/bench/splice.py                                      of SmolLM2-135M's shape

Ours prefills each prompt once, expands to N rows, scores the responses, rewinds to t* and decodes on in the same cache.
The plain way is a forward over N full rows a prompt, the head on response positions only, and generate() on
prompt + y_<t* of the rows that are spliced, which prefills them again. Both check the same samples of the student and
write the same number of tokens for every row. eta is set so that --mismatch of the tokens are above it. Checked, in
float32: the same log-probs, the same t*, the same greedy continuations.
"""

import torch
from harness import Stages, add_generation_arguments, compare, make_parser, random_model, tokens_of
from sampling import draw_lengths, draw_prompts, generate, names_of
from sampling import ours as sample

from lib import decode, runs
from warmup_distill import first_mismatch


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-135m")
    add_generation_arguments(parser)
    parser.add_argument("--mismatch", type=float, default=0.02, help="share of the tokens whose margin is above eta")
    return parser.parse_args(argv)


def check_ours(teacher, batch):
    """Log-probs of the responses (B, T), and the rows and hidden states to splice from."""
    rows = decode.expand(decode.prefill(teacher, batch["prompts"], tokens_of(teacher)), batch["n"])
    rows, hidden, logprobs = decode.score(teacher, rows, batch["responses"], tokens_of(teacher))
    return logprobs, (rows, hidden)


def splice_ours(teacher, batch, t_star, scored, greedy=False, seed=0):
    """What the teacher writes from t* on, for the rows that have one."""
    rows, hidden = scored
    chosen = (t_star >= 0).nonzero()[:, 0]
    rows = decode.rewind(rows.select(chosen), t_star[chosen], hidden[chosen])
    names = [ids[chosen] for ids in (*names_of(batch["prompts"], batch["n"], t_star.device), t_star)]
    choose = decode.greedy if greedy else decode.sampler(seed, decode.TEACHER_STAGE, *names)
    return decode.decode(teacher, rows, choose, batch["room"][chosen], tokens_of(teacher))[0]


@torch.no_grad()
def check_plain(model, batch):
    """As `check_ours`, from a forward over N full rows a prompt."""
    prompts = [p for p in batch["prompts"] for _ in range(batch["n"])]
    before, width = max(map(len, prompts)), batch["mask"].shape[1]
    token_ids, attention = [], []
    for prompt, response in zip(prompts, batch["responses"]):
        left, right = [0] * (before - len(prompt)), [0] * (width - len(response))
        token_ids.append(left + prompt + response + right)
        attention.append(left + [1] * len(prompt + response) + right)
    token_ids = torch.tensor(token_ids, device=model.device)  # (B, W + T)
    attention = torch.tensor(attention, device=model.device)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    logits = model(token_ids, attention, positions, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
    targets = token_ids[:, before:, None]
    # Row by row: the float32 logits of a whole batch would be the memory of this benchmark
    logprobs = [row.float().log_softmax(-1).gather(-1, target)[:, 0] for row, target in zip(logits, targets)]
    return torch.stack(logprobs).masked_fill(~batch["mask"], 0), None


def splice_plain(teacher, batch, t_star, scored, greedy=False, seed=0):
    """As `splice_ours`, by generate."""
    chosen = (t_star >= 0).nonzero()[:, 0]
    cut = [batch["prompts"][i // batch["n"]] + batch["responses"][i][: t_star[i]] for i in chosen.tolist()]
    return generate(teacher, cut, 1, batch["room"][chosen], seed, greedy)[0]


WAYS = {"ours": (check_ours, splice_ours), "plain": (check_plain, splice_plain)}


def make_batch(student, teacher, args):
    """Samples of the student with their log-probs, eta, and how many tokens each row's continuation gets (`room`)."""
    prompts = draw_prompts(args.prompts, args.prompt_length, student.config.vocab_size)
    count = args.prompts * args.samples
    lengths = draw_lengths(count, args.hazard, args.max_new_tokens).to(student.device)
    responses, logprobs = sample(student, prompts, args.samples, lengths)
    mask = torch.arange(logprobs.shape[1], device=lengths.device) < lengths[:, None]
    batch = {"prompts": prompts, "responses": responses, "n": args.samples, "student_logprobs": logprobs, "mask": mask}
    batch["room"] = draw_lengths(count, args.hazard, args.max_new_tokens).to(student.device)
    margins = (logprobs - check_ours(teacher, batch)[0])[mask].sort().values
    # Near that share, in the middle of the widest gap: rounding then moves no token across eta
    k = int((1 - args.mismatch) * len(margins))
    near = margins[max(k - 8, 0) : k + 8]
    widest = near.diff().argmax()
    batch["eta"] = near[widest : widest + 2].mean().item()
    return batch


def check(kind, teacher, batch):
    """What both ways must have computed, in float32 and greedily; continuations of 8 tokens at most."""
    check_way, splice_way = WAYS[kind]
    short, dtype = {**batch, "room": batch["room"].clamp(max=8)}, teacher.dtype
    logprobs, scored = check_way(teacher.float(), short)
    t_star = first_mismatch(batch["student_logprobs"], logprobs, batch["mask"], batch["eta"])
    assert (t_star >= 0).any(), "no row is spliced"
    written = splice_way(teacher, short, t_star, scored, greedy=True)
    teacher.to(dtype)
    return {"logprobs": logprobs.tolist(), "t_star": t_star.tolist(), "greedy_tokens": written}


def measure(args):
    teacher, student = random_model(args), random_model(args, seed=1)
    torch.manual_seed(0)
    batch = make_batch(student, teacher, args)
    del student
    check_way, splice_way = WAYS[args.kind]
    agreed, stages = check(args.kind, teacher, batch), Stages(args.device)
    t_star = torch.tensor(agreed["t_star"], device=batch["mask"].device)
    _, scored = stages("check", lambda: check_way(teacher, batch))
    stages("splice", lambda: splice_way(teacher, batch, t_star, scored))
    return stages.result(**agreed)


def main(argv=None):
    return compare(__file__, argv, parse_args(argv), measure, list(WAYS), atol=1e-3, rtol=0)


if __name__ == "__main__":
    runs.run(main)
