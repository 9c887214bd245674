"""A run's files in the libraries that others use, datasets and TRL's DPOTrainer; and TRL's model in kd.py.

Not part of `python -m pytest`: it needs `pip install -r tests/optional/requirements.txt`. Then

    python -m pytest tests/optional/test_interop.py

What TRL makes of pairs.jsonl: it ignores the ids and tokenizes the text columns anew, with an eos after each response.
So it trains on our very tokens where a response ended by itself, and text and ids say the same: by the toy's tokenizer,
one token a character, that is every such response without a special token in its middle. A tokenizer that puts a bos
before every text, such as Llama's, puts a second one before our prompts, which have it: take ours out for TRL.
"""

import importlib
import math
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
import trl
from conftest import make_model
from test_kd import dense_losses
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

import dpo
import kd
import warmup_distill
from lib import models, runs
from toy import make as toy

BETA, LR, STEPS = 0.5, 1e-3, 4
# TRL's own code uses names that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing here asks a network (the environment's HF_HUB_OFFLINE is read at import, too early), or uses a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert huggingface_hub.is_offline_mode()
        yield


# ---------------------------------------------------------------------------------------------------------------------
# A run, and its pairs in TRL
# ---------------------------------------------------------------------------------------------------------------------


def flags(**values):
    """{"batch_size": 4} -> ["--batch-size", "4"], with what every command here shares."""
    values = {"device": "cpu", "threads": 1, "dtype": "float32", **values}
    return [str(word) for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run: two tiny models after a few steps of SFT, so that they write sums and end, then the whole warm-up."""
    root = tmp_path_factory.mktemp("interop")
    facts, tokenizer = toy.correct_facts(), toy.make_tokenizer()
    problems, data = toy.draw_splits(0, toy.Settings(train=64))["train"], root / "train.jsonl"
    runs.write_jsonl(data, [toy.to_example(problem, facts) for problem in problems])
    for name, family, steps, seed in (("student", "llama", 60, 1), ("teacher", "qwen2", 120, 2)):
        make_model(family, seed, width=32, std=0.05, tie_word_embeddings=name == "student").save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        sft = flags(student=root / name, data=data, out=root / f"{name}-sft", kd_rate=0, max_new_tokens=48)
        kd.main([*sft, *flags(max_steps=steps, batch_size=16, micro_batch_size=16, lr=1e-2, lr_warmup_ratio=0)])
    student, teacher = (root / f"{name}-sft" / "student" for name in ("student", "teacher"))
    warmup_distill.main(
        [*flags(teacher=teacher, student=student, data=data, out=root / "out", limit=6, samples=4, eta=2),
         *flags(max_new_tokens=40, batch_size=8, micro_batch_size=8, lr=LR, beta=BETA, eval_limit=0)]
    )  # fmt: skip
    tokenizer = models.load_tokenizer(str(student))
    return SimpleNamespace(out=root / "out", student=student, teacher=teacher, data=data, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def dataset(run, tmp_path_factory):
    """pairs.jsonl as `datasets` reads it."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return datasets.load_dataset("json", data_files=str(run.out / "pairs.jsonl"), split="train", cache_dir=cache)


@pytest.fixture(scope="module")
def from_text(run, dataset):
    """The ids that dpo.py makes of the text columns alone, for each pair."""
    texts = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in dataset]
    return [dpo.tokenize_pair(row, run.tokenizer, "here") for row in texts]


@pytest.fixture(scope="module")
def same_in_text(dataset, from_text):
    """Numbers of the pairs whose text, tokenized with an eos after each response, is their ids."""
    return [i for i, ids in enumerate(from_text) if ids.items() <= dataset[i].items()]


@pytest.fixture(scope="module")
def make_trainer(run, dataset, tmp_path_factory):
    """make_trainer(rows) -> DPOTrainer of the run's student on those rows of pairs.jsonl, all of them in each step."""

    def make(rows, tokenizer=run.tokenizer, dataset=dataset, **settings):
        settings = {
            "beta": BETA,
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
            "adam_beta2": 0.95,  # dpo.py's
            "max_steps": STEPS,
            "per_device_train_batch_size": len(rows),
            "activation_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": [],
            "disable_tqdm": True,
        } | settings
        return trl.DPOTrainer(
            AutoModelForCausalLM.from_pretrained(run.student, dtype=torch.float32),
            args=trl.DPOConfig(str(tmp_path_factory.mktemp("trl")), **settings),
            train_dataset=dataset.select(rows),
            processing_class=tokenizer,
        )

    return make


def test_datasets_reads_pairs(run, dataset):
    """The rows of the file, ids as integers, text as text."""
    assert dataset.to_list() == runs.read_jsonl(run.out / "pairs.jsonl")


def test_trl_trains_on_our_tokens(run, dataset, from_text, same_in_text, make_trainer):
    """TRL's ids are those that dpo.py makes of the text alone, and our own where both responses ended by themselves."""
    for ours, theirs in zip(from_text, make_trainer(range(len(dataset))).train_dataset, strict=True):
        assert ours.items() <= theirs.items()
    special, eos = set(run.tokenizer.all_special_ids), run.tokenizer.eos_token_id
    clean = lambda ids: ids[-1] == eos and not special & set(ids[:-1])
    ended = [i for i, row in enumerate(dataset) if clean(row["chosen_ids"]) and clean(row["rejected_ids"])]
    assert same_in_text == ended and len(ended) >= 4


def test_trl_doubles_bos(run, dataset, make_trainer):
    """If the tokenizer puts <bos> before every text, TRL's prompts begin with two; with ours taken out, with one."""
    tokenizer = toy.make_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    assert tokenizer("1+1").input_ids[0] == bos[1]
    ours = [row["prompt_ids"] for row in dataset]
    doubled = make_trainer(range(len(dataset)), tokenizer).train_dataset
    assert [row["prompt_ids"] for row in doubled] == [[bos[1], *ids] for ids in ours]
    bare = dataset.map(lambda row: {"prompt": row["prompt"].removeprefix(bos[0])})
    once = make_trainer(range(len(dataset)), tokenizer, bare).train_dataset
    assert [row["prompt_ids"] for row in once] == ours


def test_trl_trains_as_dpo_does(run, dataset, same_in_text, make_trainer, tmp_path):
    """DPOTrainer.train() beside the command dpo.py, the same pairs in every step: logged numbers, and the weights.

    TRL computes two rows a pair, dpo.py one. From step 2 on the loss is off its symmetric point, ln 2.
    """
    count = len(same_in_text)
    runs.write_jsonl(tmp_path / "pairs.jsonl", [dataset[i] for i in same_in_text])
    dpo.main(
        [*flags(model=run.student, pairs=tmp_path / "pairs.jsonl", out=tmp_path / "ours", beta=BETA, lr=LR),
         *flags(max_steps=STEPS, batch_size=count, micro_batch_size=count, lr_warmup_ratio=0, lr_final_ratio=1)]
    )  # fmt: skip
    ours = runs.read_jsonl(tmp_path / "ours" / "metrics.jsonl")
    trainer = make_trainer(same_in_text)
    start = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(ours) == len(theirs) == STEPS
    names = {"loss": "loss", "grad_norm": "grad_norm", "margin": "rewards/margins", "wins": "rewards/accuracies"}
    for step, (a, b) in enumerate(zip(ours, theirs)):
        for name, key in names.items():
            if name != "wins" or step > 0:  # at first all rewards are 0 up to rounding
                assert a[name] == pytest.approx(b[key], rel=2e-4, abs=2e-4), f"{name} of step {step + 1}"
    assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) == theirs[0]["loss"]
    assert ours[-1]["loss"] < 0.95 * math.log(2)

    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "student").state_dict()
    steps = [(trained[n] - s, p.detach() - s) for (n, p), s in zip(trainer.model.named_parameters(), start)]
    ours, theirs = (torch.cat([change.flatten().double() for change in changes]) for changes in zip(*steps))
    assert (ours - theirs).norm() < 1e-2 * theirs.norm()


# ---------------------------------------------------------------------------------------------------------------------
# A model of TRL, and its losses
# ---------------------------------------------------------------------------------------------------------------------


def test_student_of_trl_in_kd(run, same_in_text, make_trainer, tmp_path):
    """What DPOTrainer.save_model wrote is --student of kd.py; its first loss is the plain model's on the plain rows."""
    trainer = make_trainer(same_in_text, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "trl"))
    kd.main(
        [*flags(student=tmp_path / "trl", teacher=run.teacher, data=run.data, out=tmp_path / "kd", limit=8, lr=LR),
         *flags(max_steps=2, batch_size=8, micro_batch_size=4, max_new_tokens=48, loss="forward_kl", kd_rate=0.5)]
    )  # fmt: skip
    first, second = runs.read_jsonl(tmp_path / "kd" / "metrics.jsonl")

    models, rows = [AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "trl", run.teacher)], []
    for example in runs.read_jsonl(run.data)[:8]:
        prompt, response = (run.tokenizer.encode(text) for text in ("<bos>" + example["prompt"], example["response"]))
        rows.append((prompt, [*response, run.tokenizer.eos_token_id], True))
    tokens = sum(len(response) for _, response, _ in rows)
    with torch.no_grad():
        _, ce, kl = (dense_losses(*models, rows, kd.forward_kl, 0.5, 1.0) / tokens).tolist()
    assert first["ce"] == pytest.approx(ce, abs=1e-5) and first["kd"] == pytest.approx(kl, abs=1e-5)
    assert second["loss"] < first["loss"] and first["response_tokens"] == tokens
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "kd" / "student").state_dict()
    assert any(not torch.equal(trained[name], value) for name, value in models[0].state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning:trl.*", "ignore:.*experimental.*")
@pytest.mark.parametrize("name, beta", [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)])
def test_divergences_equal_trl(name, beta):
    gkd = importlib.import_module("trl.experimental.gkd").GKDTrainer  # its import warns
    student, teacher = torch.randn(2, 7, 30, generator=torch.Generator().manual_seed(0))
    theirs = gkd.generalized_jsd_loss(student, teacher, beta=beta, reduction="sum")
    torch.testing.assert_close(theirs, kd.LOSSES[name](student, teacher).sum())
