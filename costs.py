"""What a stage costs, by formula: bytes, FLOPs and seconds from a model's shapes. estimate.py puts them together.

A model is built on torch's meta device, where it has shapes and no memory: a folder with a config.json alone will do.
In formulas b is the bytes of a number in the compute dtype (2 for bfloat16), D the hidden size, A = heads x head size,
K = key-value heads x head size, I the MLP's width, V the vocabulary. tests/test_estimate.py holds them to measurements.
"""

import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import common
import decode
import models
import training
from common import UserError

ASSUMED = {
    "device": "H100 SXM",
    "flops": {"bfloat16": 989e12, "float32": 67e12},  # dense, a second: NVIDIA's data sheet; torch leaves TF32 off
    "bandwidth": 3.35e12,  # bytes a second of HBM: the same data sheet
    "link": 450e9,  # bytes a second of NVLink in one direction: the same data sheet
    "flops_share": 0.4,  # of `flops` that matrix products reach (MFU): usual for FSDP without compilation
    "bandwidth_share": 0.6,  # of `bandwidth` and `link` that is reached
    # A decode step launches each layer's kernels one by one, whatever the batch: eager Llama-7B wrote 25.5 tokens/s,
    # alone, with 32 layers (PyTorch's blog, "Accelerating Generative AI with PyTorch II"). Small models wait for this
    "launch": 1 / 25.5 / 32,  # seconds a layer and step
}
# Float32 copies of the logits that a loss works on, alive at once, gradients included; measured, tests/test_estimate.py
HEAD_COPIES = {"dpo": 3, "sft": 7, "forward_kl": 13, "reverse_kl": 13, "jsd": 20, "tvd": 12}
HEAD_COPIES |= {"skew_forward_kl": 15, "skew_reverse_kl": 16, "adaptive_kl": 18}

# ---------------------------------------------------------------------------------------------------------------------
# A model's shapes
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a model. `total`, `block` and `head` count parameters, a tied head once."""

    path: str
    dtype: str  # of its files
    layers: int
    hidden: int  # D
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int  # I
    rows: int  # of its embedding and of its head, V or a little more
    qk_norm: bool  # as Qwen3 has
    total: int
    block: int
    head: int

    @property
    def root(self):
        """Parameters outside the blocks: embedding, final norm, and the head if it is not tied."""
        return self.total - self.layers * self.block

    @property
    def attention(self):
        """A and K."""
        return self.heads * self.head_size, self.kv_heads * self.head_size


def read_shape(path, trust_remote_code=False):
    """The `Shape` of a folder with a config.json, of a hub id, or of a config. UserError if it is no such model."""
    try:
        config = path
        if isinstance(path, str):
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except models.LOAD_ERRORS as error:
        what = f"no model configuration can be loaded ({common.one_line(error)})"
        raise UserError(what, f"in {path}", "check the path or hub id")
    block = training.decoder_blocks(lm)[0]
    if not hasattr(getattr(block, "mlp", None), "gate_proj") or not hasattr(config, "num_key_value_heads"):
        what = f"there is no estimate for models of type {config.model_type}"
        raise UserError(what, f"in {path}", "leave --dry-run out; Llama's and Qwen's kind is known")
    count = lambda module: sum(parameter.numel() for parameter in module.parameters())
    return Shape(
        path=path if isinstance(path, str) else config.model_type,
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        rows=lm.get_output_embeddings().weight.shape[0],
        qk_norm=any("q_norm" in name for name, _ in block.named_parameters()),
        total=count(lm),
        block=count(block),
        head=lm.get_output_embeddings().weight.numel(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


def cache_columns(first, *more):
    """Columns that `decode.PreallocatedLayer` holds after updates of these many tokens: each growth adds spare ones."""
    length = capacity = 0
    for tokens in (first, *more):
        length += tokens
        if length > capacity:
            capacity = length + decode.PreallocatedLayer.spare
    return capacity


def cache_bytes(shape, b, rows, columns):
    """KV cache: keys and values, 2 K b a layer and token."""
    return 2 * shape.layers * shape.attention[1] * b * rows * columns


def forward_bytes(shape, b, tokens, columns):
    """A forward without gradients, while its widest layer runs: gate, up and their product (3 I), the residual stream,
    the layer's input, the normed input and two temporaries (5 D), and the bool mask (a byte a column)."""
    return tokens * (b * (3 * shape.intermediate + 5 * shape.hidden) + columns)


def scoring_bytes(shape, b, tokens, columns, vocab):
    """A forward and then log-probs of its tokens: the layer, or a chunk's logits in float32 and their exponentials."""
    return max(forward_bytes(shape, b, tokens, columns), 8 * vocab * min(decode.head_chunk(vocab), tokens))


def sampling_bytes(rows, vocab, top_p):
    """A decode step's (rows, V) in float32: logits, the same over the temperature, probabilities; top-p sorts, too."""
    return rows * vocab * 4 * (3.25 if top_p == 1 else 9.25)


def activation_bytes(shape, b, length, masked):
    """Saved for the backward pass, a token and layer. masked: a 4-D mask (DPO) rather than plain causal attention (KD).

    Two norms: the input in float32, the normalised and the scaled (2 D (4 + 2b)). Attention: q and output, k and v,
    which a mask makes transformers repeat for every head, and the mask as numbers. MLP: gate, activation, up, product
    (4 I b).
    The float32 sums of norms and softmax are the small rest.
    """
    (a, k), rest = shape.attention, 8 + 4 * shape.heads
    norms = 2 * shape.hidden * (4 + 2 * b)
    if shape.qk_norm:
        norms, rest = norms + (a + k) * (4 + b), rest + 4 * (shape.heads + shape.kv_heads)
    attention = b * (4 * a + length if masked else 2 * a + 2 * k)
    return norms + attention + 4 * shape.intermediate * b + rest


def training_activations(shape, b, rows, length, masked, checkpointing):
    """Of a micro-batch, from forward to backward. --activation-checkpointing: each layer's input (D b) alone."""
    layer = shape.hidden * b if checkpointing else activation_bytes(shape, b, length, masked)
    return rows * length * shape.layers * layer


def recomputed_bytes(shape, b, rows, length, masked):
    """With --activation-checkpointing: the one layer that is computed again, and the gradients of its MLP (3 I b)."""
    return rows * length * (activation_bytes(shape, b, length, masked) + 3 * shape.intermediate * b)


def chunk_bytes(b, vocab, loss, tokens, chunk):
    """lm_head and loss on the first chunk of `tokens`. dpo.py's works on all of it, and a single chunk's logits stay for
    the backward; kd.py holds logits and gradient, works on an eighth of a whole chunk, which may be all tokens."""
    rows = min(tokens, chunk)
    if loss == "dpo":
        return 4 * vocab * rows * (HEAD_COPIES[loss] + (tokens <= chunk))
    return vocab * (2 * b * rows + 4 * min(rows, math.ceil(chunk / 8)) * HEAD_COPIES[loss])


def head_rows(vocab, loss):
    """Tokens that go through lm_head at once."""
    return decode.head_chunk(vocab) * (1 if loss == "dpo" else 2)


def head_bytes(shape, b, vocab, loss, tokens):
    """A chunk and lm_head's gradient, summed over chunks in float32; or, when the chunks are done, that sum and the
    gradient in the compute dtype."""
    chunk = chunk_bytes(b, vocab, loss, tokens, head_rows(vocab, loss))
    if loss == "dpo" and tokens <= head_rows(vocab, loss):  # nothing to sum
        return chunk + b * shape.head
    return max(chunk + 4 * shape.head, (4 + b) * shape.head)


def training_memory(stage, shape, b, size, beside, step):
    """Memory of FSDP2 training at its two high points: a list of (stage, [(what, bytes), ...]).

    Parameters, gradients and Adam's two averages are float32: 4 + 4 + 8 bytes, over all ranks. The root's parameters
    stay gathered, in the compute dtype, from its forward to its backward; of the blocks three: this one, the next one
    and the next one's gather buffer. `beside` are other models. As the backward begins there is `step`: activations,
    lm_head's logits and gradient. As it ends, the root's gradient is reduced: itself, and in float32.
    """
    states = ("float32 weights, gradients, Adam: 16 B a parameter / ranks", 16 * shape.total / size)
    gathered = ("gathered by FSDP: embedding, lm_head, 3 blocks", b * (shape.root + 3 * shape.block))
    end = ("gradients of embedding and lm_head, to be reduced in float32", (b + 4) * shape.root)
    return [(stage, [*beside, states, gathered, *step]), (f"{stage}, end", [*beside, states, gathered, end])]


def weight_bytes(shape, b, size=1):
    """A frozen replica; sharded (size > 1): blocks over all ranks, and the rest and 2 gathered blocks on each."""
    if size == 1:
        return b * shape.total
    return b * (shape.layers * shape.block / size + 2 * shape.block + shape.root)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs and seconds
# ---------------------------------------------------------------------------------------------------------------------


def forward_flops(shape, tokens, length, head_tokens, vocab):
    """2 a parameter of the blocks and token, 4 A a layer, token and column of attention, 2 V D a token with logits."""
    blocks = tokens * shape.layers * (2 * shape.block + 4 * shape.attention[0] * length)
    return blocks + 2 * vocab * shape.hidden * head_tokens


def training_flops(shape, tokens, length, head_tokens, vocab, checkpointing):
    """Forward, and twice as much backward; --activation-checkpointing takes the blocks' forward a second time."""
    once = forward_flops(shape, tokens, length, head_tokens, vocab)
    return 3 * once + (forward_flops(shape, tokens, length, 0, vocab) if checkpointing else 0)


def compute_seconds(flops, dtype, size):
    return flops / (size * ASSUMED["flops"][dtype] * ASSUMED["flops_share"])


def decode_seconds(shape, b, dtype, rows, start, steps, vocab, shards=1):
    """`steps` tokens for `rows` rows that begin with `start` columns, and what bounds them: (seconds, "launch" ...).

    A step reads all weights and the cache (of its mean length), computes a token a row, and launches every layer's
    kernels; a sharded model's weights come over the link as well. The slowest of these is its time.
    """
    column = start + steps / 2
    bytes_read = weight_bytes(shape, b) + cache_bytes(shape, b, rows, column)
    bounds = {
        "launch": ASSUMED["launch"] * shape.layers,
        "bandwidth": bytes_read / (ASSUMED["bandwidth"] * ASSUMED["bandwidth_share"]),
        "compute": compute_seconds(forward_flops(shape, rows, column, rows, vocab), dtype, 1),
        "link": b * shape.layers * shape.block * (1 - 1 / shards) / (ASSUMED["link"] * ASSUMED["bandwidth_share"]),
    }
    bound = max(bounds, key=bounds.get)
    return steps * bounds[bound], bound
