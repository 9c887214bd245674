"""One decode loop over a KV cache, for student, teacher and evaluation: prefill, expand, decode, score, rewind.

A batch of sequences is a `Rows`: the cache's columns, which of them each row may see, the position of each row's next
token, and the hidden state that the next token's logits come from.

    rows = prefill(model, prompts, tokens)               the prompts, padded on the left, one forward
    rows = expand(rows, n)                               n rows a prompt, from the one prefill
    decode(model, rows, choose, budget, tokens)          token by token; finished rows leave the batch
    score(model, rows, responses, tokens)                one forward over given responses: log-probs, and a cache
    rows = rewind(rows, keep, hidden)                    forget all but the first `keep` response tokens of each row

Each call may change the cache of the rows that it is given: continue with the rows that it returns.
The random number of a sampled token depends on the sample and its position alone (`uniform_noise`), so a sample
does not depend on its rank, nor, up to the rounding of logits, on its batch (bfloat16 rounds enough to change a token).

This file imports torch and transformers alone, and can be copied as it is. A model needs what a Hugging Face decoder
has: `base_model` (called with input_ids, a 4-D attention_mask of 0 and -inf, position_ids and the cache, whose `update`
each layer calls; returns last_hidden_state) and `get_output_embeddings()` (weight, bias). Its logits must be the plain
product of the two, its attention one that adds such a mask (sdpa, eager).
"""

import inspect
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlamaModel
from transformers.cache_utils import Cache, DynamicLayer

# The keyword of a KV cache: transformers 5.24 renamed it in all its models
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# The stage of each use of `uniform_noise`, so that no two draw the same numbers: the warm-up's student and teacher,
# evaluation, kd.py's student and teacher, the order of an epoch
STUDENT_STAGE, TEACHER_STAGE, EVAL_STAGE, KD_STUDENT_STAGE, KD_TEACHER_STAGE, ORDER_STAGE = range(6)

# ---------------------------------------------------------------------------------------------------------------------
# Noise, tokens, log-probs: pure functions, torch alone
# ---------------------------------------------------------------------------------------------------------------------


def uniform_noise(seed, stage, prompt_ids, sample_ids, positions):
    """Uniform numbers in [0, 1), each a pure function of (seed, stage, prompt id, sample id, position).

    seed, stage: int64. prompt_ids, sample_ids, positions: (B,) int64. Returns (B,) float64, multiples of 2^-52.
    The hash is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied after each field is added;
    int64 products wrap, which is what it needs.
    """

    def mix(x):
        # Python's >> on int64 tensors keeps the sign: the mask makes it a logical shift
        x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
        x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
        return x ^ ((x >> 31) & ((1 << 33) - 1))

    state = mix(torch.full_like(prompt_ids, seed))
    for field in (torch.full_like(prompt_ids, stage), prompt_ids, sample_ids, positions):
        state = mix(state + (0x9E3779B97F4A7C15 - (1 << 64)) + field)
    return ((state >> 12) & ((1 << 52) - 1)).double() / (1 << 52)


def sample_token(logits, noise, temperature, top_p):
    """Draws one token a row by inverting the cumulative distribution at `noise`.

    logits: (B, V). noise: (B,) float64 in [0, 1). Returns (B,) int64. A token of probability 0 is never drawn.
    top_p < 1 keeps the smallest set of tokens whose mass reaches top_p (Holtzman et al., arXiv 1904.09751).
    """

    def invert(weights, noise):
        """The entry of weights (B, K) that noise (B, 1) points to, and where in that entry: in [0, 1), uniform again."""
        cdf = weights.cumsum(-1, dtype=torch.float64)  # (B, K)
        target = noise * cdf[:, -1:]
        index = torch.searchsorted(cdf, target, right=True)  # (B, 1) the first entry that ends above target
        index = index.clamp(max=weights.shape[-1] - 1)  # of a row of NaN, whose log-probs the caller refuses
        weight = weights.gather(-1, index)
        within = (target - (cdf.gather(-1, index) - weight)) / weight
        return index, within.clamp(0, 1 - 2**-52)  # rounding may carry it out

    probs = torch.softmax(logits.float() / temperature, -1)  # (B, V)
    if top_p < 1:
        descending, order = probs.sort(-1, descending=True)
        outside = descending.cumsum(-1) - descending >= top_p  # the mass before this token has reached top_p already
        probs = probs.masked_fill(outside.gather(-1, order.argsort(-1)), 0)
    # A running sum over 152k tokens in float64 is slow, and in float32 loses the tail: so first the block, then the token
    block_size = math.isqrt(probs.shape[-1]) + 1
    blocks = F.pad(probs, (0, -probs.shape[-1] % block_size)).unflatten(-1, (-1, block_size))
    block, noise = invert(blocks.sum(-1), noise[:, None])
    token, _ = invert(blocks.take_along_dim(block[:, :, None], 1)[:, 0], noise)
    return (block * block_size + token)[:, 0].clamp(max=probs.shape[-1] - 1)


def token_logprobs(hidden, weight, bias, targets, chunk):
    """log softmax(hidden weight^T + bias)[target], in float32, `chunk` tokens at a time.

    hidden: (M, D). weight: (V, D). bias: (V,) or None. targets: (M,). Returns (M,).
    With more than one chunk the logits are computed again in the backward pass: no more than (chunk, V) exist at once.
    """
    if len(targets) > chunk:
        return ChunkedLogprobs.apply(hidden, weight, bias, targets, chunk)
    logits = F.linear(hidden, weight, bias).float()  # (M, V)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


class ChunkedLogprobs(torch.autograd.Function):
    """`token_logprobs` in chunks. Beside torch.utils.checkpoint: fewer passes over the logits, less memory."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.chunk = chunk
        parts = zip(hidden.split(chunk), targets.split(chunk))
        return torch.cat([token_logprobs(h, weight, bias, t, chunk) for h, t in parts])

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # summed in float32 over the chunks
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for start in range(0, len(targets), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            # z = h W^T + b:  d log softmax(z)[y] / dz = onehot(y) - softmax(z)
            grad_logits = F.linear(hidden[part], weight, bias).softmax(-1, dtype=torch.float32)
            grad_logits.mul_(-grad[part, None]).scatter_add_(-1, targets[part, None], grad[part, None])
            # dh = dz W,  dW = dz^T h,  db = sum dz
            if bias is not None:
                grad_bias += grad_logits.sum(0)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None, None


def head_chunk(vocab_size):
    """Tokens whose float32 logits fill 128 MiB: enough for a full matrix product, little beside a model."""
    return max(1, (1 << 25) // vocab_size)


def sampler(seed, stage, prompt_ids, sample_ids, start, temperature=1.0, top_p=1.0):
    """A `choose` for `decode`: row i draws its token at response position start[i] + step with the noise of that place.

    prompt_ids, sample_ids, start: (B,) int64.
    """

    def choose(logits, indices, step):
        noise = uniform_noise(seed, stage, prompt_ids[indices], sample_ids[indices], start[indices] + step)
        return sample_token(logits, noise, temperature, top_p)

    return choose


def greedy(logits, indices, step):
    """A `choose` for `decode`: the most likely token."""
    return logits.argmax(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Rows in a cache
# ---------------------------------------------------------------------------------------------------------------------


class PreallocatedLayer(DynamicLayer):
    """One layer's keys and values (B, heads, columns, D), with spare columns after the `length` that are in use.

    A decoded token is written into the next spare column. DynamicLayer would copy the whole cache, for every token.
    """

    length, spare = 0, 64

    def get_seq_length(self):
        return self.length

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, self.length = self.length, self.length + key_states.shape[2]
        missing = self.length - self.keys.shape[2]
        if missing > 0:
            room = (0, 0, 0, missing + self.spare)
            self.keys, self.values = F.pad(self.keys, room), F.pad(self.values, room)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


@dataclass(frozen=True)
class Tokens:
    """What decoding must know of a tokenizer."""

    pad_id: int
    eos_ids: list  # ids that end a response
    vocab_size: int  # len(tokenizer): rows of lm_head above it are padding, never used


@dataclass
class Rows:
    """B sequences in one KV cache of C columns."""

    cache: Cache
    visible: torch.Tensor  # (B, C) bool: which columns the row's next token may attend to
    next_position: torch.Tensor  # (B,) position id of the row's next token
    hidden: torch.Tensor  # (B, D) hidden state that predicts the row's next token

    def select(self, indices):
        """Keeps the rows `indices` (int64), in that order; the cache is compacted."""
        self.cache.batch_select_indices(indices)
        return Rows(self.cache, self.visible[indices], self.next_position[indices], self.hidden[indices])


def lm_head(model, vocab_size):
    """Weight (V, D) and bias (V,) or None of a model's head, cut to the tokenizer's vocabulary; views, gradients flow."""
    head = model.get_output_embeddings()
    return head.weight[:vocab_size], None if head.bias is None else head.bias[:vocab_size]


def next_logits(model, hidden, vocab_size):
    """lm_head on hidden states (..., D): (..., V) float32."""
    return F.linear(hidden, *lm_head(model, vocab_size)).float()


def device_of(model):
    """Where a model's tokens must be."""
    return model.get_output_embeddings().weight.device


def additive_mask(attention, dtype):
    """(B, T, C) bool -> (B, 1, T, C): 0 where a token may attend, else -inf. Models take it as it is.

    Both sdpa and eager attention add it, and it is made once: sdpa would make it of a bool mask in each layer.
    """
    return torch.zeros_like(attention, dtype=dtype).masked_fill(~attention, -math.inf)[:, None]


def forward_tokens(model, cache, token_ids, attention, positions):
    """One forward of the model without its head: (B, T) tokens, (B, T, C) bool attention -> (B, T, D) hidden states."""
    output = model.base_model(
        input_ids=token_ids,
        attention_mask=additive_mask(attention, model.get_output_embeddings().weight.dtype),
        position_ids=positions,
        use_cache=True,
        **{CACHE: cache},
    )
    return output.last_hidden_state


@torch.no_grad()
def prefill(model, prompts, tokens):
    """prompts: P non-empty lists of ids. tokens: a `Tokens`. Returns `Rows` that predict the first response token."""
    width, device = max(map(len, prompts)), device_of(model)
    token_ids = torch.tensor([[tokens.pad_id] * (width - len(p)) + p for p in prompts], device=device)  # (P, W)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    columns = torch.arange(width, device=device)
    visible = columns >= width - lengths[:, None]  # (P, W)
    causal = columns[:, None] >= columns
    # A padding column sees itself: a row of softmax over nothing would be NaN, and NaN times 0 is NaN for all that follow
    attention = (causal & visible[:, None]) | torch.eye(width, dtype=torch.bool, device=device)
    positions = (columns - (width - lengths[:, None])).clamp(min=0)
    cache = Cache(layer_class_to_replicate=PreallocatedLayer)
    hidden = forward_tokens(model, cache, token_ids, attention, positions)
    return Rows(cache, visible, lengths, hidden[:, -1])


def expand(rows, n):
    """n rows for each row, neighbours: row i becomes rows i*n .. i*n + n-1."""
    rows.cache.batch_repeat_interleave(n)
    row = torch.arange(len(rows.hidden), device=rows.hidden.device).repeat_interleave(n)
    return Rows(rows.cache, rows.visible[row], rows.next_position[row], rows.hidden[row])


@torch.no_grad()
def decode(model, rows, choose, budget, tokens, any_rank=None):
    """Decodes each row until a token of `tokens.eos_ids` (which is kept) or until `budget` tokens.

    choose(logits (b, V), indices (b,), step) -> (b,) token ids; `indices` says which of the B rows these are.
    budget: (B,) int64, 0 allowed. any_rank: for a sharded model, `World.any`: this rank continues while any rank does.
    Returns B lists of token ids, and (B, T) float32 their log-probs under the distribution at temperature 1 without
    truncation, 0 after a response's end; T is the longest response.
    """
    size, width, device = len(budget), int(budget.max()), budget.device
    written = torch.full((size, width), -1, device=device)
    logprobs = torch.zeros(size, width, device=device)
    eos = torch.tensor(tokens.eos_ids, device=device)
    indices = torch.arange(size, device=device)
    finished = budget <= 0  # (b,) rows that wait to leave the batch
    token = torch.zeros_like(budget)  # nothing is fed before step 1
    check_every = 1 if device.type == "cpu" else 8  # each check makes the host wait for the device
    for step in itertools.count():
        if step % check_every == 0 or (any_rank is None and step == width):
            running = (~finished).nonzero()[:, 0]
            any_running = len(running) > 0
            if not (any_rank(any_running) if any_rank else any_running):
                break
            idle_from_the_start = step == 0 and len(running) < size
            worth_a_copy = len(running) <= 0.75 * len(indices)  # of the cache
            if any_running and (idle_from_the_start or worth_a_copy):
                rows, indices, finished = rows.select(running), indices[running], finished[running]
                token = token[running]
        if step > 0:
            rows = advance(model, rows, token, ~finished)
        logits = next_logits(model, rows.hidden, tokens.vocab_size)  # (b, V)
        token = choose(logits, indices, step)  # (b,)
        if step < width:
            logprob = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
            written[indices, step] = torch.where(finished, -1, token)
            logprobs[indices, step] = torch.where(finished, 0, logprob)
        finished = finished | torch.isin(token, eos) | (step + 1 >= budget[indices])
    lengths = (written >= 0).sum(-1).tolist()
    responses = [ids[:length] for ids, length in zip(written.tolist(), lengths)]
    return responses, logprobs[:, : max(lengths)]


def advance(model, rows, token, running):
    """Feeds one token (b,) a row: the rows one column further, those that are `running` (b,) one position.

    The position of a finished row stays: a model with learned positions has no more of them than its context.
    """
    visible = F.pad(rows.visible, (0, 1), value=True)  # (b, C + 1)
    hidden = forward_tokens(model, rows.cache, token[:, None], visible[:, None], rows.next_position[:, None])
    return Rows(rows.cache, visible, rows.next_position + running, hidden[:, 0])


@torch.no_grad()
def score(model, rows, responses, tokens):
    """One forward over given responses.

    responses: B lists of ids, lengths may differ. tokens: a `Tokens`. Returns
    rows: with the T response columns in the cache, of which each row sees its own tokens;
    hidden: (B, T + 1, D), hidden[:, t] predicts response token t;
    logprobs: (B, T) float32 of the responses' tokens, 0 after a response's end.
    """
    device = rows.visible.device
    width = max(map(len, responses))
    lengths = torch.tensor([len(r) for r in responses], device=device)
    token_ids = torch.tensor([r + [0] * (width - len(r)) for r in responses], device=device)  # (B, T)
    columns = torch.arange(width, device=device)
    valid = columns < lengths[:, None]  # (B, T)
    causal = (columns[:, None] >= columns).expand(len(responses), -1, -1)
    before = rows.visible[:, None].expand(-1, width, -1)
    attention = torch.cat([before, causal], -1)  # (B, T, C + T); padding comes last, so no real token sees it
    positions = rows.next_position[:, None] + columns
    hidden = forward_tokens(model, rows.cache, token_ids, attention, positions)
    hidden = torch.cat([rows.hidden[:, None], hidden], 1)  # (B, T + 1, D)
    logprobs = torch.zeros(len(responses), width, device=device)
    head, chunk = lm_head(model, tokens.vocab_size), head_chunk(tokens.vocab_size)
    logprobs[valid] = token_logprobs(hidden[:, :-1][valid], *head, token_ids[valid], chunk)
    last = hidden[torch.arange(len(responses), device=device), lengths]
    scored = Rows(rows.cache, torch.cat([rows.visible, valid], 1), rows.next_position + lengths, last)
    return scored, hidden, logprobs


def rewind(rows, keep, hidden):
    """Rows as `score` returns them, as if it had scored only `keep` tokens: the rest is masked, not computed again.

    keep: (B,) int64, at most the response's length. hidden: (B, T + 1, D) from `score`.
    Exact: attention and rotary positions depend on which columns are visible and on position ids, not on where in the
    cache a column is.
    """
    width = hidden.shape[1] - 1
    start = rows.visible.shape[1] - width  # the scored tokens are the last columns
    columns = torch.arange(width, device=keep.device)
    visible = rows.visible.clone()
    forgotten = visible[:, start:].sum(-1) - keep
    visible[:, start:] &= columns < keep[:, None]
    at_keep = hidden[torch.arange(len(keep), device=keep.device), keep]
    return Rows(rows.cache, visible, rows.next_position - forgotten, at_keep)
