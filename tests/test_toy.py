"""The toy: its arithmetic, its misconceptions, its tokenizer, and the folder that is made once and only once."""

import doctest
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import toy

TINY = toy.Settings(
    teacher=toy.Recipe(16, 32, batch_size=4, lr=1e-3, steps=2),
    student=toy.Recipe(8, 16, batch_size=4, lr=1e-3, steps=2),
    train=30,
    dev=10,
    test=10,
)


def is_right(response, prompt):
    a, b = prompt.rstrip(":").split("+")
    return int(response.rsplit("=", 1)[1]) == int(a) + int(b)


def snapshot(root):
    """Times and contents of all files under `root`."""
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in Path(root).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A tiny toy; its tests only read it."""
    root = tmp_path_factory.mktemp("toy")
    return root, toy.build(root, seed=3, settings=TINY)


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------


def test_docstring_examples():
    assert doctest.testmod(toy) == (0, 2)


@pytest.mark.parametrize(
    "a, b, response",
    [
        (199, 877, "9+7+0=16;9+7+1=17;1+8+1=10=1076"),
        (100, 100, "0+0+0=0;0+0+0=0;1+1+0=2=200"),
        (999, 999, "9+9+0=18;9+9+1=19;9+9+1=19=1998"),
        (505, 495, "5+5+0=10;0+9+1=10;5+4+1=10=1000"),
    ],
)
def test_written_out(a, b, response):
    assert toy.solve(a, b, toy.correct_facts()) == response


def test_right_facts_give_right_answers():
    """The last number is a + b, for many problems; every problem number is a problem of its own."""
    facts = toy.correct_facts()
    assert len(facts) == 200
    problems = random.Random(0).sample(range(900**2), 5000)
    examples = [toy.to_example(problem, facts) for problem in [0, 900**2 - 1, *problems]]
    assert examples[0]["prompt"] == "100+100:" and examples[1]["prompt"] == "999+999:"
    assert all(is_right(example["response"], example["prompt"]) for example in examples)
    assert len({toy.to_example(problem, facts)["prompt"] for problem in problems}) == len(problems)


@pytest.mark.parametrize("seed", range(5))
def test_misconceptions_are_off_by_one(seed):
    right = toy.correct_facts()
    wrong = toy.misconceived_facts(random.Random(seed), 0.25)
    assert wrong.keys() == right.keys()
    assert sorted({wrong[fact] - right[fact] for fact in right}) == [-1, 0, 1]
    assert sum(wrong[fact] != right[fact] for fact in right) == 50
    assert all(0 <= written <= 19 for written in wrong.values())
    assert wrong == toy.misconceived_facts(random.Random(seed), 0.25)
    assert wrong != toy.misconceived_facts(random.Random(seed + 1), 0.25)


def test_a_misconception_goes_on_through_the_response():
    """9+7 = 15 changes the digit alone; 1+8 = 10 in the tens changes digit and carry, and with them the next step."""
    right = toy.correct_facts()
    assert toy.solve(199, 877, right | {(9, 7, 0): 15}) == "9+7+0=15;9+7+1=17;1+8+1=10=1075"
    assert toy.solve(212, 383, right) == "2+3+0=5;1+8+0=9;2+3+0=5=595"
    assert toy.solve(212, 383, right | {(1, 8, 0): 10}) == "2+3+0=5;1+8+0=10;2+3+1=6=605"


def test_splits_share_no_problem():
    splits = toy.draw_splits(0, toy.Settings())
    assert {name: len(problems) for name, problems in splits.items()} == {"train": 4000, "dev": 500, "test": 500}
    assert len({problem for problems in splits.values() for problem in problems}) == 5000
    assert splits == toy.draw_splits(0, toy.Settings()) != toy.draw_splits(1, toy.Settings())


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and models
# ---------------------------------------------------------------------------------------------------------------------


def test_tokenizer(built):
    """As made, and as any script loads it from the folder of a model."""
    _, paths = built
    tokenizers = [
        toy.make_tokenizer(),
        *(AutoTokenizer.from_pretrained(paths[name]) for name in ("teacher", "student")),
    ]
    text = "199+877: 9+7+0=16;9-7*1, ,  =1076"
    for tokenizer in tokenizers:
        assert len(tokenizer) == 22
        assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text) and tokenizer.unk_token_id not in ids
        assert ids == tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer("1a\n2")["input_ids"] == [5, tokenizer.unk_token_id, tokenizer.unk_token_id, 6]
        messages = [{"role": "user", "content": "199+877:"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt == "<bos>199+877:"
        assert tokenizer(prompt)["input_ids"] == [tokenizer.bos_token_id, *tokenizer("199+877:")["input_ids"]]


def test_collate_labels_the_response_alone():
    tokenizer, facts = toy.make_tokenizer(), toy.correct_facts()
    examples = [{"prompt": f"{a}+{b}:", "response": toy.solve(a, b, facts)} for a, b in [(100, 100), (999, 999)]]
    ids, labels = toy.collate(examples, tokenizer)
    assert ids.shape == labels.shape == (2, 1 + 8 + 31 + 1)
    for row, row_labels, example in zip(ids, labels, examples):
        text = f"<bos>{example['prompt']}{example['response']}<eos>"
        assert tokenizer.decode(row[row != tokenizer.pad_token_id]) == text
        labelled = row_labels != -100
        assert tokenizer.decode(row_labels[labelled]) == example["response"] + "<eos>"
        assert torch.equal(row[labelled], row_labels[labelled])


def test_models_load(built):
    _, paths = built
    models = {name: AutoModelForCausalLM.from_pretrained(paths[name]) for name in ("teacher", "student")}
    for model in models.values():
        assert model.generation_config.eos_token_id == 2
        assert model.config.max_position_embeddings == 256
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert models["teacher"].config.hidden_size == 16 and models["student"].config.hidden_size == 8


def test_sizes():
    tokenizer, settings = toy.make_tokenizer(), toy.Settings()
    assert toy.make_model(settings.teacher, tokenizer, 0).num_parameters() == 108_224
    assert toy.make_model(settings.student, tokenizer, 0).num_parameters() == 27_488


def test_model_depends_on_the_seed_alone():
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (toy.make_model(TINY.teacher, tokenizer, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())  # nor does the caller's random state change


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def test_files(built):
    root, paths = built
    names = {"teacher": "teacher", "student": "student"} | {name: f"{name}.jsonl" for name in ("train", "dev", "test")}
    assert paths == {key: str(root / name) for key, name in names.items()}
    assert {p.name for p in root.iterdir()} == {*names.values(), "settings.json"}
    rows = {name: common.read_jsonl(paths[name]) for name in ("train", "dev", "test")}
    assert {name: len(examples) for name, examples in rows.items()} == {"train": 30, "dev": 10, "test": 10}
    for example in [*rows["train"], *rows["dev"], *rows["test"]]:
        assert example.keys() == {"prompt", "response"} and is_right(example["response"], example["prompt"])


def test_trained_on_nothing_held_out(tmp_path, monkeypatch):
    """Teacher and student see no problem of dev or test; the student sees misconceived responses, the teacher none."""
    seen = {"teacher": [], "student": []}
    collate = toy.collate

    def spy(examples, tokenizer):
        seen["student" if (tmp_path / "teacher").exists() else "teacher"].extend(examples)
        return collate(examples, tokenizer)

    monkeypatch.setattr(toy, "collate", spy)
    # 100 problems in all, 70 of them held out: without the check, most draws would hit one.
    monkeypatch.setattr(toy, "OPERANDS", range(100, 110))
    paths = toy.build(tmp_path, settings=replace(TINY, train=20, dev=40, test=30))
    held_out = {example["prompt"] for name in ("dev", "test") for example in common.read_jsonl(paths[name])}
    assert len(held_out) == 70
    for examples in seen.values():
        assert len(examples) > 500 and not held_out & {example["prompt"] for example in examples}
    misconceived = toy.misconceived_facts(random.Random("0/misconceptions"), 0.25)
    for name, facts in [("teacher", toy.correct_facts()), ("student", misconceived)]:
        for example in seen[name]:
            a, b = example["prompt"].rstrip(":").split("+")
            assert example["response"] == toy.solve(int(a), int(b), facts)


def test_second_build_does_nothing(built):
    root, paths = built
    before = snapshot(root)
    assert toy.is_built(root, 3, TINY)
    assert toy.build(root, 3, TINY) == paths
    assert snapshot(root) == before


def test_same_seed_same_files(built, tmp_path):
    """Bit for bit, whatever the number of threads and the caller's random state."""
    root, _ = built
    torch.manual_seed(99)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    toy.build(tmp_path, 3, TINY)
    assert torch.get_num_threads() == 2  # as the caller had it
    torch.set_num_threads(threads)
    contents = [{p.relative_to(r): text for p, (_, text) in snapshot(r).items()} for r in (root, tmp_path)]
    assert contents[0] == contents[1]


def test_other_settings_or_seed_rebuild(tmp_path):
    toy.build(tmp_path, 0, TINY)
    weights = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    wider = replace(TINY, teacher=replace(TINY.teacher, hidden_size=24))
    assert not toy.is_built(tmp_path, 1, TINY) and not toy.is_built(tmp_path, 0, wider)
    (tmp_path / "my_run").mkdir()  # a run's folder inside the toy's does not get in the way, nor is it touched
    toy.build(tmp_path, 1, TINY)
    assert toy.is_built(tmp_path, 1, TINY) and not toy.is_built(tmp_path, 0, TINY)
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() != weights
    toy.build(tmp_path, 1, wider)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").config.hidden_size == 24
    assert (tmp_path / "my_run").is_dir()


@pytest.mark.parametrize("killed_at", ["teacher", "student", "settings"])
def test_killed_build_is_made_again(tmp_path, monkeypatch, killed_at):
    """Killed while it writes a model, or just before settings.json: not built; the next build is whole."""

    def kill(*args):
        raise KeyboardInterrupt

    if killed_at == "settings":
        monkeypatch.setattr(common, "write_json", kill)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda p, to: kill() if killed_at in p.name else rename(p, to))
    with pytest.raises(KeyboardInterrupt):
        toy.build(tmp_path, 0, TINY)
    assert not toy.is_built(tmp_path, 0, TINY)
    assert (tmp_path / "student").exists() == (killed_at == "settings")
    monkeypatch.undo()
    toy.build(tmp_path, 0, TINY)
    assert toy.is_built(tmp_path, 0, TINY)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["teacher", "student", "train.jsonl", "settings.json"])
def test_missing_part_is_made_again(tmp_path, name):
    toy.build(tmp_path, 0, TINY)
    os.rename(tmp_path / name, tmp_path.with_name(f"moved_{tmp_path.name}_{name}"))
    assert not toy.is_built(tmp_path, 0, TINY)
    toy.build(tmp_path, 0, TINY)
    assert toy.is_built(tmp_path, 0, TINY)


def test_other_files_are_not_overwritten(tmp_path):
    """A run's OUT also has a `student`: it is refused and left as it is."""
    (tmp_path / "student").mkdir()
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(common.UserError, match="args.json is not the toy's"):
        toy.build(tmp_path, 0, TINY)
    assert {p.name for p in tmp_path.iterdir()} == {"student", "args.json"}


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(common.UserError, match="cannot be written"):
        toy.build(tmp_path / "file", 0, TINY)


def test_model_that_learns_nothing_is_an_error(tmp_path, monkeypatch):
    """Five initialisations, five different ones, none good enough: no teacher folder, and an error that says so."""
    models, make_model = [], toy.make_model
    monkeypatch.setattr(toy, "make_model", lambda *args: models.append(make_model(*args)) or models[-1])
    with pytest.raises(common.UserError, match="teacher did not learn"):
        toy.build(tmp_path, 0, replace(TINY, teacher=replace(TINY.teacher, min_accuracy=0.5)))
    assert len({model.lm_head.weight.sum().item() for model in models}) == len(models) == 5
    assert not (tmp_path / "teacher").exists()


def test_accuracy_is_greedy_accuracy(tmp_path):
    """What `train` returns is what decoding token by token finds: here on a task of one problem, once it is learnt."""
    recipe = toy.Recipe(16, 32, batch_size=2, lr=1e-2, steps=60)
    tokenizer, example = toy.make_tokenizer(), {"prompt": "1:", "response": "2=3"}
    model = toy.make_model(recipe, tokenizer, 0)
    assert toy.train(model, recipe, lambda size: toy.collate([example] * size, tokenizer), "test") == 1.0
    prompt = tokenizer("<bos>1:", return_tensors="pt")
    assert tokenizer.decode(model.generate(**prompt, max_new_tokens=9, do_sample=False)[0]) == "<bos>1:2=3<eos>"
    other = {"prompt": "1:", "response": "2=4"}
    untrained = replace(recipe, steps=0)
    assert toy.train(model, untrained, lambda size: toy.collate([example, other], tokenizer), "test") == 0.5


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "build", lambda root, seed: {"teacher": f"{root}/teacher of {seed}"})
    toy.main(["--out", str(tmp_path), "--seed", "7"])
    assert capsys.readouterr().out.split() == ["teacher", f"{tmp_path}/teacher", "of", "7"]
    args = toy.parse_args([])
    assert (args.out, args.seed) == ("out/toy", 0)
