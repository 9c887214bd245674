"""N samples a prompt: prefill + expand + decode (decode.py) beside transformers' generate(num_return_sequences=N), tokens/s.

    python bench/sampling.py                                 a random model of SmolLM2-135M's shape
    python bench/sampling.py --model FOLDER --repeat 5       any causal language model
    python bench/sampling.py --shape qwen2.5-1.5b --device cuda --prompts 32

One process, ours and generate in turn on the same prompts. Two settings: `equal`, every response has --max-new-tokens
tokens; `unequal`, every row ends with a probability of --hazard a token, drawn beforehand, so that both decode the same
number of tokens for every row. Ours also returns the log-prob of every token; generate does not, and is not asked to.
Seconds are of this process's CPU time: on one thread that is wall time on an idle machine, and other processes disturb
it less. Checked first: greedy decoding gives the same tokens in float32, and the first tokens of both samplers follow
the model's distribution (chi-square). The last line is JSON.
"""

import argparse
import json

import torch
from harness import DTYPES, SHAPES, add_arguments, clock, random_model, show, spread
from transformers import GenerationConfig, StoppingCriteria

# harness.py has put the project on the path
import decode
import models


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_arguments(parser)
    parser.add_argument("--model", help="folder or hub id; default: a random model of --shape")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--prompt-length", type=int, default=100, help="the longest; lengths are drawn from half of it")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="in `equal`; four times as many in `unequal`")
    parser.add_argument("--hazard", type=float, default=0.02, help="probability that a token is the last, in `unequal`")
    return parser.parse_args(argv)


def load(path, args, seed=0):
    """The model in `path`, or a random one, with nothing in its generation settings that would change the comparison."""
    if not path:
        return random_model(args.shape, DTYPES[args.dtype], args.device, seed)
    model = models.load_model(path, DTYPES[args.dtype], args.device)
    model.generation_config = GenerationConfig(pad_token_id=0)  # no EOS: `StopAt` ends the rows
    return model


def draw_prompts(count, longest, vocab_size):
    """Random ids, lengths from longest/2 to longest."""
    lengths = torch.randint(longest // 2, longest + 1, (count,)).tolist()
    return [torch.randint(vocab_size, (n,)).tolist() for n in lengths]


def draw_lengths(count, hazard, longest):
    """(count,) int64: how many tokens each row gets if each token is the last one with probability `hazard`."""
    return (torch.empty(count).geometric_(hazard).long()).clamp(max=longest)


class StopAt(StoppingCriteria):
    """Ends row i of generate after lengths[i] new tokens."""

    def __init__(self, prompt_width, lengths):
        self.prompt_width, self.lengths = prompt_width, lengths

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] - self.prompt_width >= self.lengths


def ours(model, prompts, n, lengths, seed, greedy=False):
    """Row i gets lengths[i] tokens. Returns P*n lists of ids."""
    rows = decode.expand(decode.prefill(model, prompts, 0, model.device), n)
    prompt_ids = torch.arange(len(prompts), device=model.device).repeat_interleave(n)
    sample_ids = torch.arange(n, device=model.device).repeat(len(prompts))
    choose = decode.sampler(seed, 0, prompt_ids, sample_ids, torch.zeros_like(prompt_ids), 1.0, 1.0)
    choose = decode.greedy if greedy else choose
    return decode.decode(model, rows, choose, lengths.to(model.device), [-1], model.config.vocab_size)[0]


def generate(model, prompts, n, lengths, seed, greedy=False):
    """The same by transformers' generate."""
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    draw = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    output = model.generate(
        input_ids=torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device),
        attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device),
        num_return_sequences=n,
        max_new_tokens=int(lengths.max()),
        stopping_criteria=[StopAt(width, lengths.to(model.device))],
        **draw,
    )
    return [row[:k] for row, k in zip(output[:, width:].tolist(), lengths.tolist())]


@torch.no_grad()
def check(model, prompts, samples=512):
    """Raises AssertionError unless both ways agree with each other (greedy) and with the model (sampling)."""
    lengths = torch.full((len(prompts),), 12)
    dtype = model.dtype
    model.float()
    same = [way(model, prompts, 1, lengths, 0, greedy=True) for way in (ours, generate)]
    model.to(dtype)
    assert same[0] == same[1], "greedy tokens differ"
    prompt = prompts[0][:8]  # short, since generate prefills it `samples` times
    probs = model(torch.tensor([prompt], device=model.device)).logits[0, -1].double().softmax(-1).cpu()  # (V,)
    ranked, order = probs.sort(descending=True)
    bins = torch.empty_like(order).scatter_(0, order, (8 * (ranked.cumsum(0) - ranked)).long().clamp(max=7))
    expected = samples * torch.zeros(8, dtype=probs.dtype).index_add_(0, bins, probs)
    for way in (ours, generate):
        first = torch.tensor(way(model, [prompt], samples, torch.ones(samples, dtype=torch.long), 1))[:, 0]
        observed = bins[first].bincount(minlength=8)
        chi_square = ((observed - expected) ** 2 / expected)[expected > 0].sum().item()
        print(f"check: {way.__name__:8} chi-square {chi_square:5.1f}, 7 degrees of freedom")
        assert chi_square < 45, "the first token's distribution is not the model's"  # p < 1e-6


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    model = load(args.model, args)
    torch.manual_seed(0)
    prompts = draw_prompts(args.prompts, args.prompt_length, model.config.vocab_size)
    check(model, prompts)
    count, summary = args.prompts * args.samples, {}
    for setting in ("equal", "unequal"):
        rates = {"ours": [], "generate": []}
        for seed in range(-1, args.repeat):  # run -1 warms up
            lengths = torch.full((count,), args.max_new_tokens)
            if setting == "unequal":
                lengths = draw_lengths(count, args.hazard, 4 * args.max_new_tokens)
            if seed < 0:
                lengths = lengths.clamp(max=4)
            for way in (ours, generate):
                began = clock(args.device)
                tokens = sum(map(len, way(model, prompts, args.samples, lengths, seed + 1)))
                seconds = clock(args.device) - began
                assert tokens == lengths.sum()
                if seed >= 0:
                    rates[way.__name__].append(tokens / seconds)
        summary[setting] = {way: spread(values) for way, values in rates.items()}
        for way, result in summary[setting].items():
            show(f"{setting} {way}", result, "tokens/s")
        summary[setting]["ratio"] = summary[setting]["ours"]["median"] / summary[setting]["generate"]["median"]
        print(f"{setting:8} ratio {summary[setting]['ratio']:.2f}", flush=True)
    print(json.dumps({**vars(args), **summary}))


if __name__ == "__main__":
    main()
