"""lib/decode.py against slow twins: the noise in Python integers, sampling in Python floats, decoding without a cache.

A twin runs the full model on one sequence at a time and takes a step for each token; the fast path must give the same
tokens, and log-probs to 1e-5.
"""

import bisect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, with_bias
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import decode

PAD, VOCAB = 0, 22
EOS = [3, 19, 21]  # three of 22 tokens: these models end responses at different steps
TOKENS = decode.Tokens(PAD, EOS, VOCAB)
PROMPTS = [[1, 5, 9, 13, 4, 4, 8, 20, 6], [1], [1, 17, 3], [1, 12, 10, 19, 4], [1, 3, 5, 7]]
RESPONSES = [[4, 9, 2], [15, 8, 8, 21, 5, 6, 2], [2], [6, 6, 13, 18, 4], [19, 10]]
FAMILIES = ["llama", "qwen2", "biased"]


@pytest.fixture(scope="module")
def models():
    """A Llama with a row for each token; a Qwen2 with more rows than tokens; a Llama whose head has a bias, too."""
    return {
        "llama": make_model("llama", 1, rows=VOCAB),
        "qwen2": make_model("qwen2", 2, width=24, rows=32),
        "biased": with_bias(make_model("llama", 3, rows=32)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Slow twins
# ---------------------------------------------------------------------------------------------------------------------

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix_mix(x):
    """The finalizer of SplitMix64 on unsigned 64-bit Python integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


def slow_noise(seed, stage, prompt, sample, position):
    state = splitmix_mix(seed & WORD)
    for field in (stage, prompt, sample, position):
        state = splitmix_mix((state + GOLDEN + field) & WORD)
    return (state >> 12) / 2**52


def slow_probs(logits, temperature, top_p):
    """Softmax in Python floats; then the loop that defines top-p: tokens from the top until their mass reaches it."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    kept, mass = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += probs[token]
    return [p / mass if i in kept else 0.0 for i, p in enumerate(probs)]


def slow_draw(logits, noise, temperature=1.0, top_p=1.0):
    cdf = list(itertools.accumulate(slow_probs(logits, temperature, top_p)))
    return bisect.bisect_right(cdf, noise * cdf[-1])


def all_logits(model, ids):
    """The logits of one sequence (T, V), cut to the vocabulary: a full forward, no cache, no padding."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, :VOCAB]


@torch.no_grad()
def slow_decode(model, prompt, pick, budget, eos_ids):
    """pick(logits, step) -> token. Returns token ids and log-probs under the untempered distribution."""
    tokens, logprobs = [], []
    while len(tokens) < budget and not (tokens and tokens[-1] in eos_ids):
        logits = all_logits(model, prompt + tokens)[-1]
        tokens.append(pick(logits, len(tokens)))
        logprobs.append(logits.log_softmax(-1)[tokens[-1]].item())
    return tokens, logprobs


def slow_sampler(prompt, sample, start=0, *options):
    """As `decode.sampler(SEED, STAGE, ...)` for one row; options: temperature, top_p."""
    noise = lambda step: slow_noise(SEED, STAGE, prompt, sample, start + step)
    return lambda logits, step: slow_draw(logits.tolist(), noise(step), *options)


def slow_score(model, prompt, response):
    """Log-probs of a response's tokens from one full forward over this sequence alone; with gradients."""
    at = torch.arange(len(response))
    logprobs = all_logits(model, prompt + response).log_softmax(-1)
    return logprobs[len(prompt) - 1 + at, torch.tensor(response, dtype=torch.long)]


SEED, STAGE = 3, 1


def fast_sampler(prompt_ids=range(5), sample_ids=(0,) * 15, start=(0,) * 15, temperature=1.0, top_p=1.0):
    """Row i is sample 0 of prompt i, unless told otherwise."""
    places = [torch.as_tensor(column) for column in (prompt_ids, sample_ids, start)]
    return decode.sampler(SEED, STAGE, *places, temperature, top_p)


def fast_decode(model, rows, choose, budget, eos_ids=EOS, **kwargs):
    """`decode.decode` as [(ids, log-probs), ...], one a row, like `slow_decode`; checks the form of what it returns."""
    budget = torch.as_tensor(budget).expand(len(rows.hidden))
    tokens = decode.Tokens(PAD, eos_ids, VOCAB)
    responses, logprobs = decode.decode(model, rows, choose, budget, tokens, **kwargs)
    lengths = list(map(len, responses))
    assert logprobs.shape == (len(budget), max(lengths)) and logprobs.dtype == torch.float32
    assert all((row[n:] == 0).all() and (row[:n] <= 0).all() for row, n in zip(logprobs, lengths))
    return [(ids, row[: len(ids)]) for ids, row in zip(responses, logprobs.tolist())]


def prefill(model, prompts=PROMPTS):
    return decode.prefill(model, prompts, TOKENS)


def assert_same(actual, expected, tolerance=1e-5):
    """Two lists of (tokens, logprobs): tokens equal, log-probs near."""
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(actual, expected, strict=True):
        assert tokens == expected_tokens and logprobs == pytest.approx(expected_logprobs, abs=tolerance)


def assert_near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# uniform_noise
# ---------------------------------------------------------------------------------------------------------------------


def draws_along(*fields, count=1 << 15):
    """The twin's noise, the same numbers as `uniform_noise`'s, for successive values of some fields, the others fixed."""
    place = {"seed": 11, "stage": 1, "prompt": 3, "sample": 2, "position": 5}
    draws = [slow_noise(*(place | dict.fromkeys(fields, k)).values()) for k in range(count)]
    return torch.tensor(draws, dtype=torch.float64)


@pytest.mark.parametrize("fields", ["seed", "stage", "prompt", "sample", "position", "sample position"])
def test_noise_is_uniform_along_each_field(fields):
    """Chi-square of pairs at distances 1 to 3 on 16 x 16 cells: uniform, and neighbours are independent.

    With 255 degrees of freedom its mean is 255, its variance 510, and it is nearly normal.
    """
    u = draws_along(*fields.split())
    assert len(u.unique()) == len(u)  # 52 bits: a repeat among 2^15 draws has probability 1e-7
    cells = (16 * u.view(-1, 4)).long()
    for distance in (1, 2, 3):
        counts = torch.bincount(16 * cells[:, 0] + cells[:, distance], minlength=256)
        chi_square = (counts - len(cells) / 256).square().sum() / (len(cells) / 256)
        assert abs(chi_square - 255) < 3.3 * math.sqrt(510)


def test_slow_noise_is_splitmix64():
    """The twin itself: SplitMix64's published outputs for seed 1234567, which mix successive multiples of GOLDEN."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix_mix((1234567 + k * GOLDEN) & WORD) for k in (1, 2, 3, 4)] == published


int64 = st.integers(-(1 << 63), (1 << 63) - 1)


@settings(max_examples=60)
@given(int64, st.integers(0, 1 << 40), st.lists(st.tuples(int64, int64, int64), min_size=1, max_size=4))
def test_noise_equals_python_integers(seed, stage, rows):
    """int64 products that wrap and shifts that keep the sign against unsigned arithmetic; also, rows do not mix."""
    noise = decode.uniform_noise(seed, stage, *torch.tensor(rows).T)
    assert noise.dtype == torch.float64 and noise.tolist() == [slow_noise(seed, stage, *row) for row in rows]


def test_noise_pinned():
    """A change to any of these numbers changes every sample of every run that was ever made."""
    places = torch.tensor([[0, 0, 0], [7472, 7, 511], [5, 0, 1]]).T
    assert decode.uniform_noise(0, 0, *places)[0] == 0.1296456182997474
    assert decode.uniform_noise(0, 1, *places)[0] == 0.8847898165349131
    assert decode.uniform_noise(42, 1, *places)[1] == 0.32914885037539765
    assert decode.uniform_noise(2**62 - 1, 1, *places)[2] == 0.6173751517331749


# ---------------------------------------------------------------------------------------------------------------------
# sample_token
# ---------------------------------------------------------------------------------------------------------------------

ALMOST_ONE = 1 - 2**-52  # the largest value of uniform_noise


def draw(logits, noise, temperature=1.0, top_p=1.0):
    """Tokens of one distribution for many noises."""
    noise = torch.as_tensor(noise, dtype=torch.float64)
    return decode.sample_token(torch.tensor(logits).expand(len(noise), -1), noise, temperature, top_p)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 40])
def test_sample_token_equals_python_floats(temperature, top_p, dtype, size):
    """300 random rows, each with its own possible tokens, against the twin's inverse CDF, at both ends of the noise, too.

    No probability is rounded to bfloat16. No two logits of a row are equal: which of them top-p keeps is not defined.
    """
    generator = torch.Generator().manual_seed(1)
    logits = 0.25 * torch.rand(300, size, generator=generator).argsort(-1)
    impossible = torch.rand(300, size, generator=generator) < 0.4
    impossible[torch.arange(300), torch.randint(size, (300,), generator=generator)] = False
    logits = logits.masked_fill(impossible, -math.inf).to(dtype)
    noise = draws_along("sample", count=300)
    noise[:50], noise[50:100] = 0.0, ALMOST_ONE
    slow = [slow_draw(row, u, temperature, top_p) for row, u in zip(logits.tolist(), noise.tolist())]
    assert decode.sample_token(logits, noise, temperature, top_p).tolist() == slow


@pytest.mark.parametrize("top_p, kept", [(1e-9, 1), (0.49, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.88, 4), (1.0, 4)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    """Probabilities 1/8, 1/2, 1/8, 1/4: of the equal ones either may be kept, but not both."""
    tokens = draw([math.log(p) for p in (1 / 8, 1 / 2, 1 / 8, 1 / 4)], draws_along("position", count=2000), top_p=top_p)
    counts = torch.bincount(tokens, minlength=4)
    assert (counts > 0).sum() == kept
    assert counts[1] > 0 and (counts[3] > 0) == (kept > 1)


def test_sample_token_of_huge_logits():
    noise = [0.0, 0.3, 0.49, 0.51, ALMOST_ONE]
    for top_p in (1.0, 0.9):
        assert draw([1e30, -1e30, 1e30], noise, top_p=top_p).tolist() == [0, 0, 0, 2, 2]
    assert draw([6e4, 0.0, -6e4], noise, temperature=0.01).tolist() == [0] * 5


def test_sample_token_keeps_the_tail_of_a_large_vocabulary():
    """A token of mass 1 - 2e-5 and 20,000 of 1e-9 each: noises 1e-9 apart draw the tail's tokens one after the other.

    Beside 1 float32 steps by 6e-8: in a float32 CDF sixty of these tokens share a step and only one of them is drawn.
    """
    logits = torch.full((20_001,), math.log(1e-9))
    logits[0] = math.log(1 - 2e-5)
    tokens = draw(logits.tolist(), 1 - 1e-5 + 1e-9 * torch.arange(100).double())
    assert tokens.min() > 0 and len(tokens.unique()) >= 98 and tokens.diff().max() <= 2


@pytest.mark.parametrize("size, scale", [(1000, 1), (1024, 5), (49_152, 1), (151_936, 3), (151_936, 0)])
def test_sample_token_equals_one_running_sum(size, scale):
    """Large vocabularies, on two levels, against one sum over all of it in float64.

    The same token, or its neighbour where noise is within float32 rounding of the boundary.
    """
    logits = scale * torch.randn(16, size, generator=torch.Generator().manual_seed(size))
    logits[:, ::7] = -math.inf
    noise, cdf = draws_along("sample", count=16), logits.double().softmax(-1).cumsum(-1)
    slow = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    tokens = decode.sample_token(logits, noise, 1.0, 1.0)
    ends = cdf.gather(-1, torch.stack([tokens, slow], -1).amin(-1)[:, None])[:, 0]
    assert (logits.gather(-1, tokens[:, None]) > -math.inf).all()
    assert ((tokens == slow) | ((ends - noise).abs() < 1e-6)).all() and (tokens == slow).sum() >= 14
    for rows in ([0], [15, 3], list(range(5, 12))):  # whatever the batch
        assert torch.equal(decode.sample_token(logits[rows], noise[rows], 1.0, 1.0), tokens[rows])


# ---------------------------------------------------------------------------------------------------------------------
# token_logprobs
# ---------------------------------------------------------------------------------------------------------------------


def head_inputs(dtype=torch.float32, tokens=13, width=6, vocab=40):
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
    return make(tokens, width), make(vocab, width), make(vocab), torch.randint(0, vocab, (tokens,), generator=generator)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 12, 13, 100])
def test_token_logprobs_with_gradients(with_bias, chunk):
    """log_softmax at the target, and its gradients with respect to hidden, weight and bias, for any chunk."""
    hidden, weight, bias, targets = head_inputs()
    inputs = [hidden, weight] + ([bias] if with_bias else [])
    weights = torch.linspace(-1, 2, len(targets))  # of the sum that is differentiated: tokens are told apart
    logits = hidden @ weight.T + (bias if with_bias else 0)
    plain = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    fast = decode.token_logprobs(hidden, weight, bias if with_bias else None, targets, chunk)
    assert_near(fast, plain)
    expected = torch.autograd.grad((weights * plain).sum(), inputs)
    for ours, theirs in zip(torch.autograd.grad((weights * fast).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_token_logprobs_keeps_no_logits_for_the_backward_pass():
    """What autograd saves in the forward pass is never larger than the weight: logits are computed again."""
    hidden, weight, bias, targets = head_inputs(tokens=64, width=2, vocab=40)
    sizes = []
    pack = lambda tensor: sizes.append(tensor.numel()) or tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decode.token_logprobs(hidden, weight, bias, targets, 8)
    assert max(sizes) <= max(weight.numel(), hidden.numel()) < 8 * 40


def test_token_logprobs_at_the_edges():
    """No token; huge logits; in bfloat16 the head's product is rounded, and the softmax over it is float32."""
    hidden, weight, bias, targets = head_inputs()
    assert decode.token_logprobs(hidden[:0], weight, bias, targets[:0], 4).shape == (0,)
    logprobs = decode.token_logprobs(torch.tensor([[1e4]]), torch.tensor([[1.0], [-1.0]]), None, torch.tensor([1]), 4)
    assert logprobs.item() == -2e4
    hidden, weight, bias, targets = head_inputs(torch.bfloat16)
    plain = F.linear(hidden, weight, bias).float().log_softmax(-1)[torch.arange(len(targets)), targets]
    assert_near(decode.token_logprobs(hidden, weight, bias, targets, 5), plain)


# ---------------------------------------------------------------------------------------------------------------------
# prefill, expand, decode
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budgets, eos", [([14] * 5, EOS), ([5, 0, 12, 1, 0], [])], ids=["EOS", "budgets"])
def test_greedy_equals_no_cache(models, family, budgets, eos):
    """Unequal prompts in one left-padded batch; rows end at different steps, by EOS and by budget, 0 among them."""
    model, likeliest = models[family], lambda logits, step: logits.argmax().item()
    fast = fast_decode(model, prefill(model), decode.greedy, budgets, eos)
    assert_same(fast, [slow_decode(model, p, likeliest, budget, eos) for p, budget in zip(PROMPTS, budgets)])
    assert len({len(ids) for ids, _ in fast}) >= 3, "these models no longer end at different steps"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_sampling_equals_no_cache(models, family, temperature, top_p):
    """The same noise gives the same tokens; the log-probs are the untempered, untruncated distribution's."""
    places = list(zip([8, 0, 3, 3, 1], [0, 1, 2, 3, 0], [0, 4, 0, 9, 1]))  # prompt, sample, start
    model, options = models[family], (temperature, top_p)
    fast = fast_decode(model, prefill(model), fast_sampler(*zip(*places), *options), 12)
    rows = zip(PROMPTS, places)
    assert_same(fast, [slow_decode(model, p, slow_sampler(*place, *options), 12, EOS) for p, place in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_expand_equals_no_cache(models, family):
    """Row i becomes rows i*n .. i*n + n-1, each sampling on its own."""
    model, n = models[family], 3
    choose = fast_sampler([i for i in range(5) for _ in range(n)], list(range(n)) * 5)
    fast = fast_decode(model, decode.expand(prefill(model), n), choose, 8)
    assert_same(fast, [slow_decode(model, PROMPTS[i // n], slow_sampler(i // n, i % n), 8, EOS) for i in range(15)])
    assert len({tuple(ids) for ids, _ in fast}) > 10


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_the_cache_grows(models, monkeypatch, spare):
    """However many spare columns it takes at a time, and with rows that leave in between."""
    model = models["qwen2"]
    expected = fast_decode(model, prefill(model), fast_sampler(), 14)
    monkeypatch.setattr(decode.PreallocatedLayer, "spare", spare)
    assert_same(fast_decode(model, prefill(model), fast_sampler(), 14), expected)


@pytest.mark.parametrize("budget, fed", [([1, 1, 12, 1, 1], [5] + [1] * 11), ([3, 0, 3, 3, 3], [5, 4, 4])])
def test_finished_rows_are_not_computed(models, monkeypatch, budget, fed):
    """Rows in each forward: all in the prefill, then those that still run; a row with no budget leaves at once."""
    seen, forward_tokens = [], decode.forward_tokens
    monkeypatch.setattr(decode, "forward_tokens", lambda *args: seen.append(len(args[2])) or forward_tokens(*args))
    fast_decode(models["llama"], prefill(models["llama"]), decode.greedy, budget, [])
    assert seen == fed


@pytest.mark.parametrize("budget", [[9, 3, 10, 0, 6], [0] * 5])
@pytest.mark.parametrize("extra", [1, 20])
def test_other_ranks_that_go_on_change_nothing(models, budget, extra):
    """`any_rank` says "continue" for some steps after this rank is done: it goes along, and its result stays."""
    model, left = models["qwen2"], [True] * extra
    any_rank = lambda flag: flag or (left and left.pop())
    with_others = fast_decode(model, prefill(model), fast_sampler(), budget, any_rank=any_rank)
    assert_same(with_others, fast_decode(model, prefill(model), fast_sampler(), budget))
    assert not left


def test_positions_end_with_the_context():
    """Learned positions, a context of prompt and response and no more: a row that is done walks no further than it."""
    model = make_model("gpt2", 1, max_position_embeddings=24)
    rows, hidden, _ = decode.score(model, prefill(model, [[5] * 8] * 5), [[6] * 16] * 5, TOKENS)
    start = torch.tensor([15, 0, 0, 0, 0])
    fast = fast_decode(model, decode.rewind(rows, start, hidden), decode.greedy, 16 - start, [-1])
    assert [len(ids) for ids, _ in fast] == [1, 16, 16, 16, 16]


# ---------------------------------------------------------------------------------------------------------------------
# score
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("responses", [RESPONSES, [[4, 9, 2], [], [2], [], [19, 10]]], ids=["full", "some empty"])
def test_score_equals_each_sequence_alone(models, family, responses):
    """Log-probs, 0 after a response's end; hidden[:, t] predicts token t. A response may be empty beside others.

    The rows that come back predict what follows their whole response.
    """
    model = models[family]
    rows, hidden, logprobs = decode.score(model, prefill(model), responses, TOKENS)
    assert logprobs.shape == (5, max(map(len, responses))) and logprobs.dtype == torch.float32
    assert hidden.shape[:2] == (5, logprobs.shape[1] + 1)
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses)):
        n = len(response)
        assert_near(logprobs[i, :n], slow_score(model, prompt, response))
        assert (logprobs[i, n:] == 0).all()
        logits = decode.next_logits(model, hidden[i, : n + 1], VOCAB)
        assert_near(logits, all_logits(model, prompt + response)[len(prompt) - 1 :], 2e-5)
    fresh = prefill(model, [p + r for p, r in zip(PROMPTS, responses)])
    assert_same(fast_decode(model, rows, fast_sampler(), 8), fast_decode(model, fresh, fast_sampler(), 8))


# ---------------------------------------------------------------------------------------------------------------------
# rewind
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", range(max(map(len, RESPONSES)) + 1))
def test_rewind_equals_a_fresh_prefill(models, family, limit):
    """At every keep from 0 to the response's length: decode on as if prompt + kept tokens had just been prefilled."""
    model, keep = models[family], torch.tensor([min(limit, len(r)) for r in RESPONSES])
    for choose in (decode.greedy, fast_sampler(start=keep)):
        rows, hidden, _ = decode.score(model, prefill(model), RESPONSES, TOKENS)
        fast = fast_decode(model, decode.rewind(rows, keep, hidden), choose, 8, [])
        fresh = prefill(model, [p + r[:k] for p, r, k in zip(PROMPTS, RESPONSES, keep)])
        assert_same(fast, fast_decode(model, fresh, choose, 8, []))


# ---------------------------------------------------------------------------------------------------------------------
# Numerical traps
# ---------------------------------------------------------------------------------------------------------------------


# In bfloat16 a different summation order moves a log-prob by some 2^-8 of its size
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_one_token_beside_a_long_prompt(family, dtype, tolerance):
    """Prompts of 1 and 200 tokens: 199 columns of padding, whose queries see nothing else, must not turn into NaN."""
    model = make_model(family, 5, rows=32).to(dtype)
    long = torch.randint(3, VOCAB, (200,), generator=torch.Generator().manual_seed(5)).tolist()
    rows = prefill(model, [[1], long])
    assert all(torch.isfinite(layer.keys).all() and torch.isfinite(layer.values).all() for layer in rows.cache.layers)
    rows, hidden, logprobs = decode.score(model, rows, [[5, 6, 7, 2], [8]], TOKENS)
    assert torch.isfinite(hidden).all() and torch.isfinite(logprobs).all()
    _, _, alone = decode.score(model, prefill(model, [[1]]), [[5, 6, 7, 2]], TOKENS)
    assert_near(logprobs[0], alone[0], tolerance)
    fast = fast_decode(model, decode.rewind(rows, torch.tensor([2, 0]), hidden), fast_sampler(), 6, [])
    assert all(len(ids) == 6 and all(map(math.isfinite, logprobs)) for ids, logprobs in fast)
