"""N samples a prompt: prefill + expand + decode (lib/decode.py) beside transformers' generate(num_return_sequences=N).

    python experiments/bench/sampling.py                                      of SmolLM2-135M's shape
    python experiments/bench/sampling.py --shape qwen2.5-0.5b --device cuda --prompts 32
    python experiments/bench/sampling.py --kinds ours --memory --prompts 32 --vocab 152064        how it grows

Two settings: `equal`, every response has --max-new-tokens tokens; `unequal`, each token is a row's last with a
probability of --hazard, drawn beforehand, at most 4 times as many, so that both decode the same number of tokens for
every row. Ours also returns the log-prob of every token; generate does not, and is not asked to. Checked: greedy
decoding gives the same tokens in float32. (That samples follow the model's distribution is tested in tests/.)
"""

import torch
from harness import Stages, add_generation_arguments, compare, make_parser, random_model, tokens_of
from transformers import StoppingCriteria

from lib import decode, runs


def parse_args(argv=None):
    parser = make_parser(__doc__, "smollm2-135m")
    add_generation_arguments(parser, max_new_tokens=64)
    parser.add_argument("--memory", action="store_true", help="its peak, equal lengths, instead of unequal ones")
    return parser.parse_args(argv)


def draw_prompts(count, longest, vocab_size):
    """Random ids, lengths from longest/2 to longest."""
    lengths = torch.randint(longest // 2, longest + 1, (count,)).tolist()
    return [torch.randint(vocab_size, (n,)).tolist() for n in lengths]


def draw_lengths(count, hazard, longest):
    """(count,) int64: how many tokens each row gets if each token is the last one with probability `hazard`."""
    return torch.empty(count).geometric_(hazard).long().clamp(max=longest)


class StopAt(StoppingCriteria):
    """Ends row i of generate after lengths[i] new tokens."""

    def __init__(self, prompt_width, lengths):
        self.prompt_width, self.lengths = prompt_width, lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_width >= self.lengths


def names_of(prompts, n, device):
    """(prompt ids, sample ids) of n rows a prompt, both (B,) int64."""
    prompt_ids = torch.arange(len(prompts), device=device).repeat_interleave(n)
    return prompt_ids, torch.arange(n, device=device).repeat(len(prompts))


def ours(model, prompts, n, lengths, seed=0, greedy=False):
    """Row i gets lengths[i] tokens. Returns P*n lists of ids, and their log-probs."""
    rows = decode.expand(decode.prefill(model, prompts, tokens_of(model)), n)
    lengths = lengths.to(model.device)
    choose = decode.sampler(seed, decode.STUDENT_STAGE, *names_of(prompts, n, model.device), torch.zeros_like(lengths))
    return decode.decode(model, rows, decode.greedy if greedy else choose, lengths, tokens_of(model))


def generate(model, prompts, n, lengths, seed=0, greedy=False):
    """The same by transformers' generate, without log-probs."""
    torch.manual_seed(seed)
    width, lengths, device = max(map(len, prompts)), lengths.to(model.device), model.device
    draw = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    size = {"num_return_sequences": n, "max_new_tokens": int(lengths.max())}
    token_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    stop = [StopAt(width, lengths)]
    output = model.generate(token_ids, attention_mask=attention, stopping_criteria=stop, **size, **draw)
    return [row[:k] for row, k in zip(output[:, width:].tolist(), lengths.tolist())], None


WAYS = {"ours": ours, "generate": generate}


def check(way, model, prompts):
    """Greedy tokens of 12 steps, in float32."""
    dtype = model.dtype
    greedy = way(model.float(), prompts, 1, torch.full((len(prompts),), 12), greedy=True)[0]
    model.to(dtype)
    return greedy


def measure(args):
    way, model, stages = WAYS[args.kind], random_model(args), Stages(args.device)
    torch.manual_seed(0)
    prompts = draw_prompts(args.prompts, args.prompt_length, model.config.vocab_size)
    count = args.prompts * args.samples
    lengths = {"equal": torch.full((count,), args.max_new_tokens)}
    if args.memory:
        stages.memory("memory", lambda: way(model, prompts, args.samples, lengths["equal"]))
    else:
        lengths["unequal"] = draw_lengths(count, args.hazard, 4 * args.max_new_tokens)
    greedy = check(way, model, prompts)
    for name, of_rows in lengths.items():
        way(model, prompts, args.samples, of_rows.clamp(max=4))  # warm-up
        written = stages(name, lambda of_rows=of_rows: way(model, prompts, args.samples, of_rows))[0]
        assert [len(row) for row in written] == of_rows.tolist()
    return stages.result(greedy_tokens=greedy)


def main(argv=None):
    return compare(__file__, argv, parse_args(argv), measure, list(WAYS))


if __name__ == "__main__":
    runs.run(main)
