"""Models and tokenizers: loading them, refusing what would be computed wrongly, checking that two have the same tokens."""

import hashlib
import json
import math

import torch
import transformers
from transformers import AutoTokenizer
from transformers.utils import cached_file

from lib import decode, runs
from lib.decode import Tokens
from lib.runs import DTYPES, UserError

# Nats that rounding may change on average: 0.05 in bfloat16 for Qwen2.5-1.5B, which with a wrong mask is off by 8
MAX_DECODING_ERROR = {torch.float32: 0.001, torch.bfloat16: 0.25}


def compute_dtype(name, device):
    """torch dtype of "auto", "float32" or "bfloat16"; auto: bfloat16 on a GPU, float32 on the CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[name]


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a model folder or hub id. Without a pad token, eos stands in: padding is always masked."""
    with runs.reading("no tokenizer can be loaded", f"in {path}", "check the path or hub id"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a Qwen2 folder without one
            raise ValueError("no vocabulary")
        if max(tokenizer.get_vocab().values()) >= len(tokenizer):
            raise ValueError("its ids are not those from 0 on")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token", f"in {path}", "set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path, trust_remote_code=False):
    """The configuration of a model folder or hub id."""
    with runs.reading("no model can be loaded", f"in {path}", "check the path or hub id"):
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_safetensors(auto_class, path, dtype, trust_remote_code, **options):
    """`from_pretrained` from safetensors alone. Raises ValueError where a weight is missing, and would be random."""
    if cached_file(path, "adapter_config.json", _raise_exceptions_for_missing_entries=False):
        raise ValueError("a PEFT adapter is beside the weights: merge it first")
    options |= {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    model, info = auto_class.from_pretrained(path, output_loading_info=True, **options)
    if info["missing_keys"]:
        raise ValueError(f"no weights for {min(info['missing_keys'])}")
    if info["unexpected_keys"]:  # it would be another model without them
        raise ValueError(f"the config has no place for the weights {min(info['unexpected_keys'])}")
    return model


def load_model(path, dtype, device, trust_remote_code=False):
    """A causal language model in `dtype` on `device`, attention through sdpa. Raises UserError for what it cannot be."""
    with runs.reading("no model can be loaded", f"in {path}", "a folder or hub id with safetensors is needed"):
        auto_class = transformers.AutoModelForCausalLM
        model = load_safetensors(auto_class, path, dtype, trust_remote_code, attn_implementation="sdpa")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UserError(f"logits are changed after lm_head ({name})", f"in {path}", "use a model without it")
    layer_types = getattr(model.config, "layer_types", ["sliding_attention"])
    if getattr(model.config, "sliding_window", None) and "sliding_attention" in layer_types:
        raise UserError("sliding-window attention is not supported", f"in {path}", "use a model with full attention")
    return model.to(device).eval()


def empty_model(path, dtype, trust_remote_code=False):
    """The model of `load_model` on the CPU without its values: memory that nothing touches takes no place."""
    config = load_config(path, trust_remote_code)
    options = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model.eval()


def load_frozen(path, args, world, tokenizer, device=None):
    """A model that is not trained: in --dtype, on this rank's device or on `device`, a row for every token."""
    model = load_model(path, compute_dtype(args.dtype, world.device), device or world.device, args.trust_remote_code)
    check_model(model, tokenizer, path)
    return model.requires_grad_(False)


def load_reward_model(path, args, world):
    """(model, tokenizer) of a sequence-classification reward model with one label."""
    tokenizer = load_tokenizer(path, args.trust_remote_code)
    dtype, auto_class = compute_dtype(args.dtype, world.device), transformers.AutoModelForSequenceClassification
    with runs.reading("no reward model can be loaded", f"in {path}", "check --keep"):
        model = load_safetensors(auto_class, path, dtype, args.trust_remote_code)
        if model.config.num_labels != 1:
            raise ValueError(f"it has {model.config.num_labels} labels, not one")
        if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
            raise ValueError("its tokenizer has more tokens than the model")
    return model.to(world.device).eval(), tokenizer


def model_eos_ids(paths, tokenizer, trust_remote_code=False):
    """Sorted ids that end a response: the tokenizer's eos and those of each model's generation config, or its config."""
    ids = {tokenizer.eos_token_id}
    for path in paths:
        eos = load_config(path, trust_remote_code).eos_token_id
        with runs.reading("its generation config is wrong", f"in {path}", "repair it"):
            if cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False):
                eos = transformers.GenerationConfig.from_pretrained(path).eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        if not all(i is None or type(i) is int and 0 <= i < 1 << 31 for i in eos):
            raise UserError(f"eos_token_id is {eos}, no id or list of ids", f"in {path}", "repair its configuration")
        ids.update(eos)
    return sorted(ids - {None})


def context_length(path, trust_remote_code=False):
    """The most tokens that a model can read, as its configuration says; infinite where that says nothing."""
    config = load_config(path, trust_remote_code)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # beyond, other frequencies hold for cached tokens, too
        return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return getattr(config, "max_position_embeddings", None) or math.inf


def prompt_limit(paths, most, new_tokens, trust_remote_code=False):
    """The longest prompt, `most` or less, that leaves `new_tokens` room in each model's context; UserError if none."""
    for path in paths:
        context = context_length(path, trust_remote_code)
        most = min(most, context - new_tokens)
        if most < 1:
            what = f"{new_tokens} new tokens leave no room for a prompt in a context of {context}"
            raise UserError(what, f"in {path}", "lower --max-new-tokens")
    return most


def tokenizer_fingerprint(tokenizer):
    """16 hex digits that two tokenizers share if and only if, except by chance, their vocabularies are equal."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_same_tokenizer(student, teacher, student_path, teacher_path):
    """Raises UserError with the first difference unless both tokenizers map the same tokens to the same ids."""
    where, todo = f"in {student_path} and {teacher_path}", "use a teacher and a student of one family"
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if different:
        token = min(different, key=lambda token: (min(ours.get(token, math.inf), theirs.get(token, math.inf)), token))
        ids = f"id {ours.get(token)} in the student's tokenizer, {theirs.get(token)} in the teacher's"
        raise UserError(f"token {token!r} has {ids}", where, todo)
    if student.eos_token_id != teacher.eos_token_id:
        what = f"eos is {student.eos_token!r} for the student and {teacher.eos_token!r} for the teacher"
        raise UserError(what, where, todo)


def decoder_blocks(lm):
    """The list of transformer blocks of a Hugging Face causal language model."""
    lists = (m for m in lm.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    return next(m for m in lists if len(m) == lm.config.num_hidden_layers)


def check_model(model, tokenizer, path):
    """Raises UserError unless the model has a row for every token (more are padding, never used) and decodes exactly."""
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise UserError(f"{rows} vocabulary rows for {len(tokenizer)} tokens", f"in {path}", "use its own tokenizer")
    todo = "use a decoder with full attention, plain logits and a standard cache, such as Llama or Qwen"
    with runs.reading("the model does not decode as lib/decode.py does", f"in {path}", todo):
        decoder_blocks(model)  # StopIteration: it has none
        error = decoding_error(model, len(tokenizer))
    if not math.isfinite(error):
        raise UserError("the model's log-probs are NaN or infinite", f"in {path}", "check its weights")
    if error > MAX_DECODING_ERROR[model.dtype]:
        what = f"the model's log-probs with a cache and masks differ by {error:.2g} nats from a plain forward's"
        raise UserError(what, f"in {path}", todo)


@torch.no_grad()
def decoding_error(model, vocab_size):
    """The mean difference of log-probs (nats) between lib/decode.py and plain forwards of the whole model, on two rows.

    The rows have unequal lengths and are prefilled, scored, rewound and continued by a token. A plain forward has one
    row, the model's own attention and logits, and no cache; with one token less it must not change: it sees no future.
    Returns the largest of the means over each row's scores, a continued row's vocabulary, and what a token less changes.
    """
    device, generator = decode.device_of(model), torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(vocab_size, (count,), generator=generator).tolist()
    prompts, responses, keep, token = [draw(3), draw(6)], [draw(5), draw(4)], [2, 3], draw(2)
    tokens = Tokens(pad_id=0, eos_ids=[], vocab_size=vocab_size)
    rows, hidden, logprobs = decode.score(model, decode.prefill(model, prompts, tokens), responses, tokens)
    rows = decode.rewind(rows, torch.tensor(keep, device=device), hidden)
    rows = decode.advance(model, rows, torch.tensor(token, device=device), torch.ones_like(rows.next_position))
    continued = decode.next_logits(model, rows.hidden, vocab_size).log_softmax(-1)  # (2, V)

    def plain(ids):
        logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
        return logits[0, :, :vocab_size].float().log_softmax(-1)  # (len(ids), V)

    errors = []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        whole = plain(prompt + response)
        targets = torch.tensor(response, device=device)[:, None]
        expected = whole[len(prompt) - 1 : -1].gather(-1, targets)[:, 0]
        errors += [logprobs[i, : len(response)] - expected]
        errors += [whole[:-1] - plain(prompt + response[:-1])]
        errors += [continued[i] - plain(prompt + response[: keep[i]] + token[i : i + 1])[-1]]
    return max(error.abs().mean().item() for error in errors)


def shared_tokenizer(student, teacher, trust_remote_code=False):
    """(tokenizer, `Tokens`) of a student and, unless it is None, a teacher; raises UserError where the two differ."""
    tokenizer, paths = load_tokenizer(student, trust_remote_code), [student]
    if teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(teacher, trust_remote_code), student, teacher)
        paths.append(teacher)
    return tokenizer, Tokens(tokenizer.pad_token_id, model_eos_ids(paths, tokenizer, trust_remote_code), len(tokenizer))
