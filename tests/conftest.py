"""What several tests need: tiny models as ordinary folders, and real processes over gloo on the CPU."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import settings
from safetensors.torch import load_file

from lib import runs
from toy import make as toy

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True, database=None, deadline=None)
settings.register_profile("search", max_examples=2000, deadline=None)  # pytest --hypothesis-profile search
settings.load_profile("ci")


def pytest_collection_finish():
    """Garbage collections, which the scripts ask for, leave out what is imported: to look through it takes half a second."""
    gc.freeze()


def make_model(family, seed, width=16, layers=2, rows=None, std=0.3, **kwargs):
    """A random model of the toy's vocabulary; `std` is large so that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        # Learned positions, and dropout unless it is turned off
        "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
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


def with_bias(model):
    """The model, whose head now has a random bias, as some families' heads have one."""
    model.lm_head.bias = torch.nn.Parameter(torch.randn(len(model.lm_head.weight)))
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return toy.make_tokenizer()


def make_inputs(root, prompts):
    """{"student": a random Llama, tied; "teacher": a random Qwen2 with more vocabulary rows than tokens; "data": JSONL}."""
    paths = {"student": str(root / "student"), "teacher": str(root / "teacher"), "data": str(root / "train.jsonl")}
    make_model("llama", 1, tie_word_embeddings=True).save_pretrained(paths["student"])
    make_model("qwen2", 2, width=24, rows=32).save_pretrained(paths["teacher"])
    for name in ("student", "teacher"):
        toy.make_tokenizer().save_pretrained(paths[name])
    problems, facts = toy.draw_splits(0, toy.Settings(train=prompts))["train"], toy.correct_facts()
    runs.write_jsonl(paths["data"], [toy.to_example(problem, facts) for problem in problems])
    return paths


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("models"), 40)


@pytest.fixture(scope="session")
def pair_of_models(inputs):
    """Folders of a student and a teacher."""
    return {"student": inputs["student"], "teacher": inputs["teacher"]}


@pytest.fixture
def plain_models(pair_of_models):
    """The student and the teacher as transformers loads them."""
    return [transformers.AutoModelForCausalLM.from_pretrained(pair_of_models[name]) for name in ("student", "teacher")]


@pytest.fixture(scope="session")
def prompts_file(inputs):
    """40 problems of the toy's task as JSONL."""
    return inputs["data"]


def weights(out):
    """What a run has trained."""
    return load_file(out / "student" / "model.safetensors")


def logged(out):
    """metrics.jsonl without the stage and what the clock and the machine say."""
    rest = ("stage", "seconds", "tokens_per_second", "peak_memory_gb")
    return [{k: v for k, v in row.items() if k not in rest} for row in runs.read_jsonl(out / "metrics.jsonl")]


def assert_identical(ours, whole):
    """Two runs have, bit for bit, the same weights and metrics; and nothing half-written is left."""
    a, b = weights(ours), weights(whole)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert logged(ours) == logged(whole) and not list(ours.rglob("*.partial"))


QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # for the environment of a process


def command_of(processes, script, args):
    """The words that start a script of the repository, under torchrun if `processes` > 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes else []), str(ROOT / script), *map(str, args)]


def launch(processes, script, *args, timeout=300, cwd=None, env=None):
    """Runs a script of the repository, under torchrun if `processes` > 0; returns the CompletedProcess, text captured."""
    environment = {**os.environ, **QUIET, "PYTHONWARNINGS": "error::FutureWarning", **(env or {})}
    options = {"capture_output": True, "text": True, "timeout": timeout, "cwd": cwd}
    return subprocess.run(command_of(processes, script, args), check=False, env=environment, **options)


def launch_jobs(file, jobs):
    """Does jobs of workers.py, which FILE is written for. Returns their exit statuses and what each has printed."""
    runs.write_json(file, jobs)
    done = launch(0, "tests/workers.py", file, timeout=600, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-5000:]
    return runs.read_json(f"{file}.codes"), done.stdout.split("--- job ")[1:]
