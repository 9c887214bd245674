"""Models and tokenizers: loading, and checking that teacher and student speak of the same tokens."""

import hashlib
import json
import math

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import DTYPES, UserError, one_line

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, StrictDataclassError)


def compute_dtype(name, world):
    """torch dtype of "auto", "float32" or "bfloat16"; auto: bfloat16 on a GPU that has it, else float32."""
    on_gpu = world.device.type == "cuda"
    has_bfloat16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bfloat16" if on_gpu and has_bfloat16 else "float32"
    if name == "bfloat16" and not has_bfloat16:
        raise UserError("this GPU has no bfloat16", "for --dtype bfloat16", "use --dtype float32")
    return DTYPES[name]


def load_tokenizer(path, trust_remote_code=False):
    """The tokenizer of a model folder or hub id. Without a pad token, eos stands in: padding is always masked."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except LOAD_ERRORS as error:
        raise UserError(f"no tokenizer can be loaded ({one_line(error)})", f"in {path}", "check the path or hub id")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a Qwen2 folder without one
        raise UserError("no tokenizer can be loaded (no vocabulary)", f"in {path}", "check the path or hub id")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos token", f"in {path}", "set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(path, dtype, device, trust_remote_code=False):
    """A causal language model in `dtype` on `device`, weights from safetensors alone, attention through sdpa."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation="sdpa",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        check_no_weight_is_missing(info)
    except LOAD_ERRORS as error:
        raise UserError(
            f"no model can be loaded ({one_line(error)})", f"in {path}", "a folder or hub id with safetensors is needed"
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1, 1.0):
            raise UserError(
                f"the model changes its logits after lm_head ({name})", f"in {path}", "use a model without it"
            )
    if getattr(model.config, "sliding_window", None) and "sliding_attention" in getattr(
        model.config, "layer_types", ["sliding_attention"]
    ):
        raise UserError("sliding-window attention is not supported", f"in {path}", "use a model with full attention")
    return model.to(device).eval()


def check_no_weight_is_missing(info):
    """Raises ValueError where transformers would go on with random weights. info: of `from_pretrained`."""
    if info["missing_keys"]:
        raise ValueError(f"no weights for {min(info['missing_keys'])}")


def model_eos_ids(paths, tokenizer, trust_remote_code=False):
    """Sorted ids that end a response: the tokenizer's eos and those of each model's generation config, or of its config."""
    ids = {tokenizer.eos_token_id}
    for path in paths:
        try:
            eos = GenerationConfig.from_pretrained(path).eos_token_id
        except OSError:  # no generation_config.json
            try:
                eos = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).eos_token_id
            except LOAD_ERRORS as error:
                raise UserError(f"no model can be loaded ({one_line(error)})", f"in {path}", "check the path or hub id")
        ids.update([eos] if isinstance(eos, int) else eos or [])
    return sorted(ids)


def prompt_limit(paths, most, new_tokens, trust_remote_code=False):
    """The longest prompt, `most` or less, that leaves `new_tokens` room in the context of each model; UserError if none."""
    for path in paths:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except LOAD_ERRORS:
            continue  # `load_model` says what is wrong with it
        context = getattr(config, "max_position_embeddings", math.inf)
        most = min(most, context - new_tokens)
        if most < 1:
            what = f"{new_tokens} new tokens leave no room for a prompt in a context of {context}"
            raise UserError(what, f"in {path}", "lower --max-new-tokens")
    return most


def fit_into_context(args):
    """Lowers --max-prompt-tokens where student or teacher has no room for it and --max-new-tokens. Returns a note, "" if none."""
    paths = filter(None, [args.student, args.teacher])
    limit = prompt_limit(paths, args.max_prompt_tokens, args.max_new_tokens, args.trust_remote_code)
    asked, args.max_prompt_tokens = args.max_prompt_tokens, limit
    if limit == asked:
        return ""
    return f"prompts may have {limit} tokens: the models' context has no more beside {args.max_new_tokens} new ones"


def tokenizer_fingerprint(tokenizer):
    """16 hex digits that two tokenizers share if and only if (but for chance) their vocabularies are equal."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()[:16]


def check_same_tokenizer(student, teacher, student_path, teacher_path):
    """Raises UserError with the first difference unless both tokenizers map the same tokens to the same ids."""
    where, todo = f"in {student_path} and {teacher_path}", "use a teacher and a student of one family"
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    different = sorted(
        token for token in ours.keys() | theirs.keys() if ours.get(token, None) != theirs.get(token, None)
    )
    if different:
        token = min(different, key=lambda t: min(ours.get(t, math.inf), theirs.get(t, math.inf)))
        what = (
            f"token {token!r} has id {ours.get(token)} in the student's tokenizer, {theirs.get(token)} in the teacher's"
        )
        raise UserError(what, where, todo)
    if student.eos_token_id != teacher.eos_token_id:
        what = f"eos is {student.eos_token!r} for the student and {teacher.eos_token!r} for the teacher"
        raise UserError(what, where, todo)


def check_vocabulary(model, tokenizer, path):
    """Raises UserError unless the model has a row for every token. Rows beyond len(tokenizer) are padding, never used."""
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        what = f"the model has {rows} vocabulary rows for {len(tokenizer)} tokens"
        raise UserError(what, f"in {path}", "resize its embeddings or use its own tokenizer")


def shared_tokenizer(student, teacher, trust_remote_code=False):
    """(tokenizer, eos ids) of a student and, unless it is None, a teacher; raises UserError where the two differ."""
    tokenizer = load_tokenizer(student, trust_remote_code)
    if teacher:
        check_same_tokenizer(tokenizer, load_tokenizer(teacher, trust_remote_code), student, teacher)
    return tokenizer, model_eos_ids(filter(None, [student, teacher]), tokenizer, trust_remote_code)
