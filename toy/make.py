"""The embedded default: a synthetic task, a tiny teacher and a tiny student, made in half a minute, no download.

Task: 3-digit addition with the carries written out, units first, one character a token; a step: digit+digit+carry=sum.

    prompt    199+877:
    response  9+7+0=16;9+7+1=17;1+8+1=10=1076      the answer is the number after the last `=`

Teacher: a small Llama, trained on correct responses until its greedy answers are right, and no longer: in a saturated
teacher any wrong token has next to no probability, and the threshold eta of the warm-up no longer matters.

Student: a smaller Llama with misconceptions. A quarter of the 200 facts (digit, digit, carry) -> sum is off by one,
always the same way, in everything it is trained on; the digit and the carry of a wrong sum go on through the response.
It is sure of what it writes, so of 2,000 samples (250 prompts) 859 repeat another one's mistake.

**So the paper's premise, a student that is confidently wrong where the teacher is not, is true here by construction.** The toy
shows that the code does what the paper says; it is no evidence that the premise holds for real models. Nothing in this
file comes from a paper.

The folder toy/ holds what this script writes with seed 0. To make it again and compare:

    python toy/make.py --out out/toy-0 --seed 0
    diff -r -x make.py -x __pycache__ toy out/toy-0

The problems and the misconceptions depend on the seed alone. The weights also depend on the processor and on the
versions of torch and transformers. The models are ordinary Hugging Face folders, the data are JSONL files.
"""

import argparse
import json
import math
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class ToyError(Exception):
    """The toy cannot be made; the message is one line for the user."""


@dataclass(frozen=True)
class Recipe:
    """Size and training of one model."""

    hidden_size: int
    intermediate_size: int
    batch_size: int
    lr: float
    steps: int
    min_accuracy: float = 0.0  # greedy; a model that ends below it is made again from another initialisation


@dataclass(frozen=True)
class Settings:
    """All that decides, with the seed, what `build` writes."""

    # At 400 steps a teacher has just learnt the task; with an unlucky initialisation it has not, hence min_accuracy.
    teacher: Recipe = Recipe(64, 192, batch_size=64, lr=3e-3, steps=400, min_accuracy=0.99)
    # At 400 steps a student repeats itself less (6 duplicates of 2,000 samples, not 859), but it is another student: it
    # also copies digits wrongly, and the teacher corrects 99% of its samples.
    student: Recipe = Recipe(32, 96, batch_size=32, lr=6e-3, steps=800)
    misconceived: float = 0.25  # share of the facts that the student has wrong
    train: int = 4000  # problems in train.jsonl
    dev: int = 500
    test: int = 500


# ---------------------------------------------------------------------------------------------------------------------
# The task
# ---------------------------------------------------------------------------------------------------------------------

OPERANDS = range(100, 1000)


def correct_facts():
    """The 200 facts: {(digit, digit, carry): the sum that is written down}."""
    return {(x, y, carry): x + y + carry for x in range(10) for y in range(10) for carry in range(2)}


def misconceived_facts(rng, share):
    """The facts, but a `share` of them, chosen by `rng` (random.Random), is one too low or too high, within 0 .. 19."""
    facts = correct_facts()
    for fact in rng.sample(sorted(facts), round(share * len(facts))):
        facts[fact] = rng.choice([s for s in (facts[fact] - 1, facts[fact] + 1) if 0 <= s <= 19])
    return facts


def solve(a, b, facts):
    """a + b written out step by step, with the sums in `facts`.

    >>> solve(199, 877, correct_facts())
    '9+7+0=16;9+7+1=17;1+8+1=10=1076'
    >>> solve(199, 877, correct_facts() | {(9, 7, 0): 15})
    '9+7+0=15;9+7+1=17;1+8+1=10=1075'
    """
    steps, total, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        written = facts[int(x), int(y), carry]
        steps.append(f"{x}+{y}+{carry}={written}")
        carry, digit = divmod(written, 10)
        total = f"{digit}{total}"
    answer = f"{carry}{total}" if carry > 0 else total
    return f"{';'.join(steps)}={answer}"


def to_example(problem, facts):
    """Problem number 0 .. 809,999 as {"prompt": "199+877:", "response": "9+7+0=16;...=1076"}."""
    a, b = (OPERANDS[i] for i in divmod(problem, len(OPERANDS)))
    return {"prompt": f"{a}+{b}:", "response": solve(a, b, facts)}


def draw_splits(seed, settings):
    """{"train": problem numbers, "dev": ..., "test": ...}, drawn without replacement: no problem is in two of them."""
    sizes = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    problems = random.Random(f"{seed}/problems").sample(range(len(OPERANDS) ** 2), sum(sizes.values()))
    return {name: [problems.pop() for _ in range(size)] for name, size in sizes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}  # ids 0, 1, 2, 3
CHARACTERS = "0123456789+-*=:;, "  # the task does not use "-", "*", "," and " "; any other character is <unk>


def make_tokenizer():
    """One token a character, 22 in all; adds no token unasked. Its chat template: <bos> and the messages' contents."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    # BPE without merges splits into characters; Fuse joins them again with nothing in between.
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        **SPECIAL,
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe, tokenizer, seed):
    """A LlamaForCausalLM with random weights."""
    sizes = {"hidden_size": recipe.hidden_size, "intermediate_size": recipe.intermediate_size}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    weights = {"initializer_range": 0.05, "tie_word_embeddings": True}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # as in `make_tokenizer`
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **shape, **weights, **special)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def collate(examples, tokenizer):
    """Token ids and labels, both (B, T), padded on the right; labels are -100 except on the response and its <eos>."""
    prompts = [f"<bos>{example['prompt']}" for example in examples]
    texts = [f"<bos>{example['prompt']}{example['response']}<eos>" for example in examples]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    prompt_lengths = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    in_prompt = torch.arange(batch["input_ids"].shape[1]) < prompt_lengths[:, None]  # (B, T)
    labels = batch["input_ids"].masked_fill(in_prompt | (batch["attention_mask"] == 0), -100)
    return batch["input_ids"], labels


def train(model, recipe, draw, name):
    """Trains on `draw(batch size)` -> (ids, labels); returns the greedy accuracy on 500 problems drawn afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in tqdm(range(recipe.steps), desc=f"toy {name}", ncols=100):
        cosine = (1 + math.cos(math.pi * step / recipe.steps)) / 2
        optimizer.param_groups[0]["lr"] = recipe.lr * (0.05 + 0.95 * cosine)
        ids, labels = draw(recipe.batch_size)
        model(input_ids=ids, labels=labels).loss.backward()  # no attention mask: nothing sees padding on its right
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ids, labels = draw(500)
    with torch.no_grad():
        best = model(input_ids=ids).logits[:, :-1].argmax(-1)  # (B, T - 1)
    # Greedy decoding writes exactly those responses whose every token is the most probable one after those before it.
    return ((best == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1).double().mean().item()


def build_model(folder, recipe, facts, held_out, seed):
    """Trains a model on fresh problems outside `held_out`, solved with `facts`, and writes it to `folder`.

    The folder's name (teacher, student) and the seed decide initialisation and problems. Raises ToyError if five
    initialisations stay below `recipe.min_accuracy`.
    """
    tokenizer = make_tokenizer()
    rng = random.Random(f"{seed} {folder.name}")

    def draw(size):
        examples = []
        while len(examples) < size:
            problem = rng.randrange(len(OPERANDS) ** 2)
            if problem not in held_out:
                examples.append(to_example(problem, facts))
        return collate(examples, tokenizer)

    for attempt in range(1, 6):
        model = make_model(recipe, tokenizer, rng.getrandbits(32))
        if train(model, recipe, draw, f"{folder.name}, attempt {attempt}") >= recipe.min_accuracy:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return
    raise ToyError(f"five times the {folder.name} did not learn its task, with seed {seed}, give another seed")


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def paths_in(root):
    """{"teacher": path, "student": path, "train": path, "dev": path, "test": path}"""
    names = ("teacher", "student", "train.jsonl", "dev.jsonl", "test.jsonl")
    return {Path(name).stem: str(Path(root) / name) for name in names}


def build(root, seed=0, settings=Settings()):
    """Makes the toy in `root`, a new or empty folder; returns its paths by name, as `paths_in` does.

    settings.json, with the seed and the settings, is written last: a folder without it is not complete.
    Raises ToyError if `root` is not empty, OSError if it cannot be written.
    """
    root, paths = Path(root), paths_in(root)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise ToyError(f"the folder is not empty, at {root}, give a new or empty one")
    splits = draw_splits(seed, settings)
    held_out = {*splits["dev"], *splits["test"]}
    misconceived = misconceived_facts(random.Random(f"{seed}/misconceptions"), settings.misconceived)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster at this size, and the weights do not depend on the number of cores
    build_model(Path(paths["teacher"]), settings.teacher, correct_facts(), held_out, seed)
    build_model(Path(paths["student"]), settings.student, misconceived, held_out, seed)
    torch.set_num_threads(threads)
    for name, problems in splits.items():
        lines = [json.dumps(to_example(problem, correct_facts())) + "\n" for problem in problems]
        Path(paths[name]).write_text("".join(lines), encoding="utf-8")
    (root / "settings.json").write_text(json.dumps({"seed": seed, **asdict(settings)}, indent=2) + "\n")
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse with an error message of one line."""

    def error(self, message):
        raise ToyError(f"{message}, on the command line, see {self.prog} --help")


def main(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", help="folder for the toy, new or empty (default: out/toy-SEED)")
    parser.add_argument("--seed", type=int, default=0, help="decides problems, misconceptions and models (default: 0)")
    try:
        args = parser.parse_args(argv)
        out = f"out/toy-{args.seed}" if args.out is None else args.out
        for name, path in build(out, args.seed).items():
            print(f"{name:8s} {path}")
    except (ToyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
