"""lib/models.py: what is loaded, and what is refused in one line that names the folder and what is wrong with it."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
)

from lib import decode, models, runs

WORLD = runs.World(0, 1, torch.device("cpu"))
ARGS = SimpleNamespace(dtype="auto", trust_remote_code=False)
SMALL = {"vocab_size": 22, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def assert_error(expected, function, *args):
    """A UserError of this exact text; … stands for what a library says."""
    with pytest.raises(runs.UserError) as caught:
        function(*args)
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), str(caught.value)), str(caught.value)


def load(student, teacher):
    """What the scripts load, in their order."""
    tokenizer, tokens = models.shared_tokenizer(student, teacher)
    models.prompt_limit([student, teacher], 256, 3)
    return tokens, [models.load_frozen(path, ARGS, WORLD, tokenizer) for path in (student, teacher)]


@pytest.fixture
def broken(tmp_path, pair_of_models):
    """broken(how, which="student") -> a copy of a model's folder on which `how` was called."""

    def copy(how, which="student"):
        folder = shutil.copytree(pair_of_models[which], tmp_path / "broken")
        how(folder)
        return folder

    return copy


def edit_config(name="config.json", **values):
    def how(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return how


def edit_generation(**values):
    return edit_config("generation_config.json", **values)


def put(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def test_models_that_load(pair_of_models):
    """One tokenizer for both; more vocabulary rows than tokens are padding; sdpa, evaluation mode, nothing to train."""
    tokens, [student, teacher] = load(**pair_of_models)
    assert tokens == decode.Tokens(pad_id=0, eos_ids=[2], vocab_size=22)
    for model, rows in ((student, 22), (teacher, 32)):
        assert model.get_output_embeddings().weight.shape[0] == rows and model.dtype == torch.float32
        assert model.config._attn_implementation == "sdpa" and not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    model = models.load_model(pair_of_models["student"], torch.bfloat16, "cpu")
    assert model.dtype == torch.bfloat16 and all(parameter.requires_grad for parameter in model.parameters())


def pickle_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save(make_model("llama", 1).state_dict(), folder / "pytorch_model.bin")


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500])


NO_MODEL = "no model can be loaded (…), in {}, a folder or hub id with safetensors is needed"
NO_TOKENIZER = "no tokenizer can be loaded (…), in {}, check the path or hub id"
THIRD_LAYER = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}  # transformers would make it up
BAD_MODELS = {
    "no weights": (remove("model.safetensors"), NO_MODEL),
    "a PEFT adapter": (put("adapter_config.json", "{}"), NO_MODEL),
    "pickled weights only": (pickle_weights, NO_MODEL),
    "weights cut off": (cut_weights, NO_MODEL),
    "weights of another size": (edit_config(hidden_size=32, intermediate_size=64), NO_MODEL),
    "weights of a layer missing": (edit_config(**THIRD_LAYER), NO_MODEL),
    "config contradicts itself": (edit_config(layer_types=["x"]), "no … can be loaded (…), in {}, …"),
    "a layer more than the config": (edit_config(num_hidden_layers=1), "no … can be loaded (…), in {}, …"),
    "cut generation config": (
        put("generation_config.json", '{"eos_'),
        "its generation config is wrong (…), in {}, repair it",
    ),
    "no layers": (edit_config(num_hidden_layers=-1), "… in {}, …"),
    "eos is text": (edit_generation(eos_token_id="2"), "eos_token_id is ['2'], no id or list of ids, in {}, repair …"),
    "eos below 0": (edit_generation(eos_token_id=[2, -1]), "eos_token_id is [2, -1], no id or list of ids, in {}, …"),
    "generation config": (put("generation_config.json", "[1]"), "its generation config is wrong (…), in {}, repair it"),
    "generation settings": (edit_generation(max_new_tokens=-4), "its generation config is wrong (…), in {}, repair it"),
    "unknown architecture": (edit_config(model_type="zzz"), "no model can be loaded (…), in {}, …"),
    "config is no JSON": (put("config.json", "{"), NO_TOKENIZER),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    "does not exist": (shutil.rmtree, NO_TOKENIZER),
    "fewer rows than tokens": (
        lambda folder: make_model("llama", 1, rows=21).save_pretrained(folder),
        "21 vocabulary rows for 22 tokens, in {}, use its own tokenizer",
    ),
}


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("how, expected", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model_folder(pair_of_models, broken, which, how, expected):
    folder = broken(how, which)
    paths = pair_of_models | {which: folder}
    assert_error(expected.format(folder), load, paths["student"], paths["teacher"])


UNSUPPORTED = [
    (Gemma3TextConfig, {"head_dim": 8, "final_logit_softcapping": 30.0}, "after lm_head (final_logit_softcapping)"),
    (CohereConfig, {}, "after lm_head (logit_scale)"),
    (GraniteConfig, {"logits_scaling": 2.0}, "after lm_head (logits_scaling)"),
    (MistralConfig, {"sliding_window": 8}, "sliding-window attention is not supported"),
]


@pytest.mark.parametrize("config, changes, expected", UNSUPPORTED, ids=[row[0].__name__ for row in UNSUPPORTED])
def test_architectures_that_would_be_computed_wrongly(tmp_path, config, changes, expected):
    """Models whose forward does more than hidden states times lm_head, or hides columns by itself."""
    AutoModelForCausalLM.from_config(config(**SMALL, **changes)).save_pretrained(tmp_path)
    assert_error(f"…{expected}, in {tmp_path}, use a model with…", models.load_model, tmp_path, torch.float32, "cpu")


TURNED_OFF = [
    make_model("qwen2", 1, sliding_window=8, use_sliding_window=False).config,
    MistralConfig(**SMALL, sliding_window=None),
    GraniteConfig(**SMALL, logits_scaling=1.0),
]


@pytest.mark.parametrize("config", TURNED_OFF, ids=lambda config: config.model_type)
def test_what_is_turned_off_is_fine(tmp_path, config):
    """Qwen2's config carries a window that its layers do not use; Mistral's may be null; a factor may be 1."""
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    models.load_model(tmp_path, torch.float32, "cpu")


def test_remote_code_is_not_run(broken, pair_of_models, tmp_path):
    """A model folder with Python code of its own: refused without --trust-remote-code, and nothing of it has run."""
    folder = broken(
        edit_config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    )
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise RuntimeError\n")
    assert_error(f"no … can be loaded (…), in {folder}, …", load, folder, pair_of_models["teacher"])
    assert_error(f"no … can be loaded (…), in {folder}, …", models.load_model, folder, torch.float32, "cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, device, dtype",
    [
        ("auto", "cpu", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_compute_dtype(name, device, dtype):
    assert models.compute_dtype(name, torch.device(device)) == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------


def renamed_token(tokenizer):
    """The same number of tokens, but the character of id 7 is `x` instead of `3`."""
    text = re.sub('"3": ?7', '"x": 7', tokenizer.backend_tokenizer.to_str())
    return type(tokenizer)(tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text), eos_token="<eos>")


def added_token(tokenizer):
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def other_eos(tokenizer):
    tokenizer.eos_token = "<bos>"
    return tokenizer


def edited(edit):
    return lambda folder: edit(models.load_tokenizer(folder)).save_pretrained(folder)


DIFFERENT = [
    (renamed_token, "token '3' has id 7 in the student's tokenizer, None in the teacher's"),
    (added_token, "token '<new>' has id None in the student's tokenizer, 22 in the teacher's"),
    (other_eos, "eos is '<eos>' for the student and '<bos>' for the teacher"),
]


@pytest.mark.parametrize("edit, expected", DIFFERENT, ids=[edit.__name__ for edit, _ in DIFFERENT])
def test_tokenizers_that_differ(broken, pair_of_models, tokenizer, edit, expected):
    """Refused, and by another fingerprint: 16 hex digits of the vocabulary, whatever the special tokens are called."""
    teacher, student = broken(edited(edit), "teacher"), pair_of_models["student"]
    expected = f"{expected}, in {student} and {teacher}, use a teacher and a student of one family"
    assert_error(expected, models.shared_tokenizer, student, teacher)
    assert models.shared_tokenizer(student, None)[1] == decode.Tokens(0, [2], 22), "alone it is fine"
    ours, theirs = (models.tokenizer_fingerprint(t) for t in (tokenizer, models.load_tokenizer(teacher)))
    assert re.fullmatch("[0-9a-f]{16}", ours) and (ours == theirs) == (edit is other_eos)


def without(**kept):
    return edited(lambda tokenizer: type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, **kept))


def test_tokenizer_without_eos_or_pad(broken):
    """Without pad, eos stands in; without eos no response could end."""
    folder = broken(without(eos_token="<eos>"))
    assert models.shared_tokenizer(folder, None)[1] == decode.Tokens(pad_id=2, eos_ids=[2], vocab_size=22)
    without(pad_token="<pad>")(folder)
    expected = f"the tokenizer has no eos token, in {folder}, set eos_token in its tokenizer_config.json"
    assert_error(expected, models.load_tokenizer, folder)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("eos, expected", [(9, [2, 9]), ([2, 9, 5], [2, 5, 9]), (None, [2]), (2, [2])])
def test_ids_that_end_a_response(broken, pair_of_models, name, eos, expected):
    """The tokenizer's, and each model's: from its generation config, or from its config where there is none."""
    folder = broken(edit_config(name, eos_token_id=eos), "teacher")
    if name == "config.json":
        (folder / "generation_config.json").unlink()
    assert models.shared_tokenizer(pair_of_models["student"], folder)[1].eos_ids == expected


# ---------------------------------------------------------------------------------------------------------------------
# The context
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most, new_tokens, limit", [(100, 3, 100), (256, 3, 200), (256, 255, 1)])
def test_prompt_limit(broken, pair_of_models, tmp_path, most, new_tokens, limit):
    """The smallest context, minus the new tokens."""
    folder, student = broken(edit_config(max_position_embeddings=300)), pair_of_models["student"]
    GPT2Config(n_positions=new_tokens + limit).save_pretrained(tmp_path / "gpt2")
    paths = [folder, pair_of_models["teacher"], tmp_path / "gpt2"]
    assert models.prompt_limit(paths, most, new_tokens) == limit
    expected = f"256 new tokens leave no room for a prompt in a context of 256, in {student}, lower --max-new-tokens"
    assert_error(expected, models.prompt_limit, [student], 256, 256)


# ---------------------------------------------------------------------------------------------------------------------
# Reward models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reward_model(tmp_path, tokenizer):
    """reward_model(labels) -> the folder of a sequence-classification model."""

    def save(labels):
        for thing in (LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=labels)), tokenizer):
            thing.save_pretrained(tmp_path / "reward")
        return tmp_path / "reward"

    return save


def test_reward_model(reward_model):
    """One score a sequence, with its own tokenizer."""
    model, tokenizer = models.load_reward_model(reward_model(1), ARGS, WORLD)
    assert model(**tokenizer("1+2:3", return_tensors="pt")).logits.shape == (1, 1)
    assert not model.training and model.dtype == torch.float32 and len(tokenizer) == 22


BAD_REWARD = {  # number of labels, what is wrong, the error
    "two labels": (2, lambda folder: None, "no reward model can be loaded (it has 2 labels, not one), in {}, …"),
    "no weights": (1, remove("model.safetensors"), "no reward model can be loaded (…), in {}, check --keep"),
    "no tokenizer": (1, remove("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    # Its config may well say one label; the score head would be made up, and the pairs chosen at random
    "causal": (1, make_model("llama", 1, num_labels=1).save_pretrained, "no reward model can be loaded (…), in {}, …"),
}


@pytest.mark.parametrize("labels, how, expected", BAD_REWARD.values(), ids=BAD_REWARD)
def test_bad_reward_model(reward_model, labels, how, expected):
    folder = reward_model(labels)
    how(folder)
    assert_error(expected.format(folder), models.load_reward_model, folder, ARGS, WORLD)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding against plain forwards: what a name or a flag of a configuration does not tell
# ---------------------------------------------------------------------------------------------------------------------

ZOO = {"vocab_size": 22, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ZOO |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA, HEADS = {"num_key_value_heads": 2}, {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **GQA}
DECODER = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 1}
EXACT = {"llama": {}, "qwen2": GQA, "qwen3": HEADS, "qwen3_moe": EXPERTS, "mistral": {"sliding_window": None, **GQA}}
EXACT |= {"mixtral": {"num_local_experts": 4, **GQA}, "phi": {}, "phi3": GQA, "olmo": {}, "olmo2": {}, "gemma": HEADS}
EXACT |= {"gpt2": {}, "gpt_neox": {}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "falcon": {}}
EXACT |= {"stablelm": GQA, "smollm3": GQA, "glm4": HEADS, "biogpt": {}, "persimmon": {}, "nemotron": GQA}
EXACT |= {"llama eager": {}, "gpt2 eager": {}}  # `_attn_implementation` in a config.json wins over the sdpa we ask for
NOT_CAUSAL = {"bert": {}, "roberta": {}, "camembert": {}, "electra": {"embedding_size": 32}}
OTHER_LOGITS = {"cohere": {"logit_scale": 0.1, **GQA}, "granite": {"logits_scaling": 8.0, **GQA}}
OTHER_CACHE = {
    "jamba": GQA,
    "recurrent_gemma": {"num_key_value_heads": 1},
    "llama4_text": {"num_local_experts": 2, **HEADS},
}
OTHER_CACHE |= {"lfm2": {"layer_types": ["conv", "full_attention"], **GQA}, "qwen3_next": {**EXPERTS, "head_dim": 8}}
WRONG = NOT_CAUSAL | OTHER_LOGITS | OTHER_CACHE | {"mistral": {"sliding_window": 4, **GQA}}
WRONG |= dict.fromkeys(("bart", "mbart", "marian", "pegasus", "plbart", "blenderbot"), DECODER)


def make_any(name, extra):
    """A tiny random model of an architecture; its weights are large, since near uniform predictions hide errors."""
    torch.manual_seed(0)
    architecture, _, attention = name.partition(" ")
    config = AutoConfig.for_model(architecture, **{**ZOO, **extra})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention or "sdpa").float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return model


@pytest.mark.parametrize("name", EXACT)
def test_decoding_is_exact(tokenizer, name):
    model = make_any(name, EXACT[name])
    models.check_model(model, tokenizer, "PATH")
    assert models.decoding_error(model, len(tokenizer)) < 1e-5


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_would_be_decoded_wrongly_is_refused(tokenizer, name):
    """Attention that sees the future or too little, logits that are more than a product, caches of another kind."""
    message = r"the model('s log-probs .* differ by \d.* nats from .*| does not decode as .*), in PATH, use a decoder"
    with pytest.raises(runs.UserError, match=message):
        models.check_model(make_any(name, WRONG[name]), tokenizer, "PATH")


def test_longrope_ends_where_its_frequencies_change(broken, pair_of_models):
    """Beyond, all tokens of a batch get other frequencies, those in the cache too, which nothing computes again."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    folder = broken(edit_config(rope_parameters=rope, max_position_embeddings=128))
    assert models.context_length(folder) == 32 and models.prompt_limit([folder], 100, 12) == 20


def test_ids_with_holes_are_refused(broken):
    """len(tokenizer) would be below its highest id, and cut tokens off."""
    folder = broken(lambda folder: None)
    text = json.loads((folder / "tokenizer.json").read_text())
    text["model"]["vocab"][max(text["model"]["vocab"], key=text["model"]["vocab"].get)] = 29
    (folder / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(runs.UserError, match="no tokenizer can be loaded .its ids are not those from 0 on"):
        models.load_tokenizer(folder)
