"""The toy: its task, its tokenizer and models, what make.py writes, the folder that is shipped, the main job on it."""

import doctest
import json
import random
import re
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, launch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import runs
from toy import make

TINY = make.Settings(
    teacher=make.Recipe(16, 32, batch_size=4, lr=1e-3, steps=2),
    student=make.Recipe(8, 16, batch_size=4, lr=1e-3, steps=2),
    train=30,
    dev=10,
    test=10,
)
RIGHT = make.correct_facts()
SHIPPED = ROOT / "toy"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny toy; its tests only read it."""
    root = tmp_path_factory.mktemp("toy")
    return root, make.build(root, seed=3, settings=TINY)


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------


def test_right_facts_give_right_answers():
    """The last number is a + b, for many problems; every problem number is a problem of its own."""
    assert doctest.testmod(make) == (0, 2)
    assert make.solve(505, 495, RIGHT) == "5+5+0=10;0+9+1=10;5+4+1=10=1000"
    problems = random.Random(0).sample(range(900**2), 5000)
    examples = [make.to_example(problem, RIGHT) for problem in [0, 900**2 - 1, *problems]]
    assert examples[0]["prompt"] == "100+100:" and examples[1]["prompt"] == "999+999:"
    for example in examples:
        a, b = example["prompt"].rstrip(":").split("+")
        assert int(example["response"].rsplit("=", 1)[1]) == int(a) + int(b)
    assert len({example["prompt"] for example in examples[2:]}) == len(problems)


def test_misconceptions():
    """A quarter of the facts is off by one, by the seed alone; a wrong digit and carry go on through the response."""
    for seed in range(5):
        wrong = make.misconceived_facts(random.Random(seed), 0.25)
        assert wrong == make.misconceived_facts(random.Random(seed), 0.25) and wrong.keys() == RIGHT.keys()
        assert wrong != make.misconceived_facts(random.Random(seed + 1), 0.25)
        assert {wrong[fact] - RIGHT[fact] for fact in RIGHT} == {-1, 0, 1}
        assert sum(wrong[fact] != RIGHT[fact] for fact in RIGHT) == 50 and set(wrong.values()) <= set(range(20))
    assert make.solve(212, 383, RIGHT | {(1, 8, 0): 10}) == "2+3+0=5;1+8+0=10;2+3+1=6=605"


@pytest.mark.parametrize("seed", [0, 42, 123])
def test_splits_share_no_problem(seed):
    for settings in (make.Settings(), make.Settings(misconceived=0.5)):
        splits = make.draw_splits(seed, settings)
        assert {name: len(problems) for name, problems in splits.items()} == {"train": 4000, "dev": 500, "test": 500}
        assert len({problem for problems in splits.values() for problem in problems}) == 5000
        assert splits == make.draw_splits(seed, settings) != make.draw_splits(seed + 1, settings)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and models
# ---------------------------------------------------------------------------------------------------------------------


def test_tokenizer(built):
    """As made, and as any script loads it from the folder of a model."""
    text = "199+877: 9+7+0=16;9-7*1, ,  =1076"
    loaded = [AutoTokenizer.from_pretrained(built[1][name]) for name in ("teacher", "student")]
    for tokenizer in (make.make_tokenizer(), *loaded):
        assert len(tokenizer) == 22
        assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
        assert tokenizer("1a\n2")["input_ids"] == [5, tokenizer.unk_token_id, tokenizer.unk_token_id, 6]
        messages = [{"role": "user", "content": "199+877:"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt == "<bos>199+877:" and tokenizer(prompt)["input_ids"][0] == tokenizer.bos_token_id


def test_collate_labels_the_response_alone():
    tokenizer = make.make_tokenizer()
    examples = [{"prompt": f"{a}+{a}:", "response": make.solve(a, a, RIGHT)} for a in (100, 999)]
    ids, labels = make.collate(examples, tokenizer)
    assert ids.shape == labels.shape == (2, 1 + 8 + 31 + 1)
    for row, row_labels, example in zip(ids, labels, examples):
        labelled, response = row_labels != -100, f"{example['response']}<eos>"
        assert tokenizer.decode(row[row != tokenizer.pad_token_id]) == f"<bos>{example['prompt']}{response}"
        assert tokenizer.decode(row_labels[labelled]) == response and torch.equal(row[labelled], row_labels[labelled])


def test_accuracy_is_greedy_accuracy():
    """What `train` returns is what decoding token by token finds, on a task of one problem, once it is learnt."""
    recipe = make.Recipe(16, 32, batch_size=2, lr=1e-2, steps=60)
    tokenizer, example = make.make_tokenizer(), {"prompt": "1:", "response": "2=3"}
    model = make.make_model(recipe, tokenizer, 0)
    assert make.train(model, recipe, lambda size: make.collate([example] * size, tokenizer), "test") == 1.0
    prompt = tokenizer("<bos>1:", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=9, do_sample=False)[0]) == "<bos>1:2=3<eos>"
    other = example | {"response": "2=4"}
    two = lambda size: make.collate([example, other], tokenizer)
    assert make.train(model, replace(recipe, steps=0), two, "test") == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# What make.py writes
# ---------------------------------------------------------------------------------------------------------------------


def test_same_seed_same_files(built, tmp_path):
    """Bit for bit, whatever the number of threads and the caller's random state, which are left as they were."""
    root, paths = built
    assert {path.name for path in root.iterdir()} == {*(p.split("/")[-1] for p in paths.values()), "settings.json"}
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        make.build(tmp_path / "same", 3, TINY)
        assert torch.get_num_threads() == 2 and torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_num_threads(1)
    same, files = (
        {p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()} for r in (root, tmp_path / "same")
    )
    assert same == files
    make.build(tmp_path / "other", 4, TINY)
    weights = "teacher/model.safetensors"
    assert (root / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_trained_on_nothing_held_out(tmp_path, monkeypatch):
    """The models see no problem of dev or test; the student sees misconceived responses, the teacher none."""
    seen, collate = {"teacher": [], "student": []}, make.collate

    def spy(examples, tokenizer):
        seen["student" if (tmp_path / "teacher").exists() else "teacher"].extend(examples)
        return collate(examples, tokenizer)

    monkeypatch.setattr(make, "collate", spy)
    # 100 problems in all, 70 of them held out: without the check, most draws would hit one
    monkeypatch.setattr(make, "OPERANDS", range(100, 110))
    paths = make.build(tmp_path, settings=replace(TINY, train=20, dev=40, test=30))
    held_out = {example["prompt"] for name in ("dev", "test") for example in runs.read_jsonl(paths[name])}
    assert len(held_out) == 70
    facts = {"teacher": RIGHT, "student": make.misconceived_facts(random.Random("0/misconceptions"), 0.25)}
    for name, examples in seen.items():
        assert len(examples) > 500 and not held_out & {example["prompt"] for example in examples}
        for example in examples:
            a, b = map(int, example["prompt"].rstrip(":").split("+"))
            assert example["response"] == make.solve(a, b, facts[name])


def test_errors(tmp_path, monkeypatch):
    """A folder that is not empty, and a model that learns nothing from five initialisations: one line each."""
    (tmp_path / "student").mkdir()
    done = launch(0, "toy/make.py", "--out", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: the folder is not empty, at {tmp_path}")
    models, make_model = [], make.make_model
    monkeypatch.setattr(make, "make_model", lambda *args: models.append(make_model(*args)) or models[-1])
    hard = replace(TINY, teacher=replace(TINY.teacher, min_accuracy=0.5))
    with pytest.raises(make.ToyError, match="teacher did not learn its task"):
        make.build(tmp_path / "new", 0, hard)
    assert len({model.lm_head.weight.sum().item() for model in models}) == len(models) == 5
    assert not list((tmp_path / "new").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# What is shipped
# ---------------------------------------------------------------------------------------------------------------------


def test_shipped_toy_is_whole():
    """Small, without pickles, made by make.py's settings; its data are what the seed gives."""
    files = [path for path in SHIPPED.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 1.5e6
    assert {path.suffix for path in files} == {".py", ".json", ".jsonl", ".safetensors", ".jinja"}
    settings = json.loads((SHIPPED / "settings.json").read_text())
    assert settings == {"seed": 0, **asdict(make.Settings())}
    for name, problems in make.draw_splits(0, make.Settings()).items():
        assert runs.read_jsonl(SHIPPED / f"{name}.jsonl") == [make.to_example(problem, RIGHT) for problem in problems]
    for name, size in (("teacher", 108_224), ("student", 27_488)):
        model = AutoModelForCausalLM.from_pretrained(SHIPPED / name)
        assert model.num_parameters() == size and model.generation_config.eos_token_id == 2
        assert len(AutoTokenizer.from_pretrained(SHIPPED / name)) == model.config.vocab_size == 22


def test_main_job_gives_the_quickstart_figures(tmp_path):
    """`python warmup_distill.py`, whole: the counts of experiments/quickstart.json exactly, the table to 1e-2."""
    done = launch(0, "warmup_distill.py", "--out", tmp_path)
    assert done.returncode == 0 and not re.search("Traceback|[Ww]arning", done.stderr), done.stderr
    expected = runs.read_json(ROOT / "experiments/quickstart.json")
    found, summary = (runs.read_json(tmp_path / name) for name in ("mismatch.json", "summary.json"))
    assert [found[key] == expected[key] for key in ("pairs", "samples", "untouched", "dropped")] == [True] * 4, found
    assert summary == {name: pytest.approx(row, abs=1e-2) for name, row in expected["summary"].items()}
