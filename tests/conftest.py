"""What several tests need: tiny models as ordinary folders, and real torchrun processes over gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from toy import make as toy

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, database=None, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)  # pytest --hypothesis-profile search
settings.load_profile("ci")


def make_model(family, seed, width=16, layers=2, rows=None, std=0.3, **kwargs):
    """A random model of the toy's vocabulary; `std` is large so that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    settings = {
        "vocab_size": rows or len(toy.make_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": std,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **kwargs,
    }
    return model_class(config_class(**settings)).eval()


@pytest.fixture(scope="session")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="session")
def pair_of_models(tmp_path_factory, tokenizer):
    """Folders of a random student (Llama, tied) and a random teacher (Qwen2, more vocabulary rows than tokens)."""
    root = tmp_path_factory.mktemp("models")
    make_model("llama", 1, tie_word_embeddings=True).save_pretrained(root / "student")
    make_model("qwen2", 2, width=24, rows=32).save_pretrained(root / "teacher")
    for name in ("student", "teacher"):
        tokenizer.save_pretrained(root / name)
    return {"student": str(root / "student"), "teacher": str(root / "teacher")}


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """40 problems of the toy's task as JSONL."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    problems = toy.draw_splits(0, toy.Settings(train=40))["train"]
    facts = toy.correct_facts()

    path.write_text("".join(json.dumps(toy.to_example(p, facts)) + "\n" for p in problems))
    return str(path)


def launch(processes, script, *args, timeout=300, cwd=None, env=None):
    """Runs a script of the repository, under torchrun if `processes` > 0; returns the CompletedProcess, text captured."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / script), *map(str, args)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "error::FutureWarning",
    }
    environment.update(env or {})
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment
    )
