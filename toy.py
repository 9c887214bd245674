"""The embedded default: a synthetic task, a tiny teacher and a tiny student, made here in half a minute without a download.

Task. 3-digit addition with the carries written out, units first, one character a token. A step is digit+digit+carry=sum:

    prompt    199+877:
    response  9+7+0=16;9+7+1=17;1+8+1=10=1076

The answer is the number after the last `=`.

Teacher. A small Llama, trained on correct responses until its greedy answers are right, and no longer: trained to saturation, its
probability of any wrong token vanishes, and the threshold eta of the warm-up no longer matters.

Student. A smaller Llama with misconceptions: a quarter of the 200 facts (digit, digit, carry) -> sum is consistently off by one in
everything it is trained on, and a wrong sum carries its wrong digit and wrong carry on through the response. **So the paper's premise,
that the student is confidently wrong where the teacher is not, is true here by construction.** The toy can show that the code does
what the paper says; it is no evidence that the premise holds for real models. (A student that was merely under-trained showed no
effect of the warm-up at all.)

What comes out are ordinary Hugging Face folders and JSONL files, so no other file knows that it runs on a toy. From no paper.

    python toy.py --out out/toy --seed 0
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# What the toy needs other than the commands' own defaults, under the names of their flags.
WARMUP = {
    "limit": 250,
    "prompts_per_batch": 25,
    "max_prompt_tokens": 16,
    "max_new_tokens": 48,
    "batch_size": 32,
    "micro_batch_size": 32,
    "max_steps": 60,
    "lr": 5e-4,
    "beta": 0.5,
    "nll_weight": 1.0,
    "dtype": "float32",
    "threads": 1,  # a second thread makes models of this size slower
    "eval_limit": 500,
}
KD = {
    "limit": 1000,
    "loss": "reverse_kl",
    "max_prompt_tokens": 16,
    "max_new_tokens": 48,
    "batch_size": 32,
    "micro_batch_size": 32,
    "max_steps": 60,
    "lr": 5e-4,
    "dtype": "float32",
    "threads": 1,
}


@dataclass(frozen=True)
class Recipe:
    """Size and training budget of one model."""

    hidden_size: int
    intermediate_size: int
    batch_size: int
    lr: float
    steps: int


@dataclass(frozen=True)
class Settings:
    """All that decides, with the seed, what `build` writes."""

    teacher: Recipe = Recipe(hidden_size=64, intermediate_size=192, batch_size=64, lr=3e-3, steps=400)
    student: Recipe = Recipe(hidden_size=32, intermediate_size=96, batch_size=32, lr=6e-3, steps=800)
    misconceived: float = 0.25  # share of the facts that the student has wrong
    train: int = 4000  # problems in train.jsonl
    dev: int = 500
    test: int = 500
    version: int = 1  # raise it when a change to this file changes what `build` writes


# ---------------------------------------------------------------- the task

DIGITS = 3
LOWEST, COUNT = 10 ** (DIGITS - 1), 9 * 10 ** (DIGITS - 1)  # operands are 100 .. 999

Facts = dict[tuple[int, int, int], int]  # (digit, digit, carry) -> the sum that is written down


def correct_facts() -> Facts:
    return {(x, y, carry): x + y + carry for x in range(10) for y in range(10) for carry in range(2)}


def misconceived_facts(rng: random.Random, share: float) -> Facts:
    """The 200 facts with a `share` of them, chosen by `rng`, off by one: a sum one too low or too high, within 0 .. 19."""
    facts = correct_facts()
    for fact in rng.sample(sorted(facts), round(share * len(facts))):
        facts[fact] = rng.choice([s for s in (facts[fact] - 1, facts[fact] + 1) if 0 <= s <= 19])
    return facts


def solve(a: int, b: int, facts: Facts) -> str:
    """Write a + b out, step by step, as one who believes `facts` does.

    >>> solve(199, 877, correct_facts())
    '9+7+0=16;9+7+1=17;1+8+1=10=1076'
    >>> solve(199, 877, correct_facts() | {(9, 7, 0): 15})
    '9+7+0=15;9+7+1=17;1+8+1=10=1075'
    """
    steps, total, carry = [], "", 0
    for place in range(DIGITS):
        x, y = a // 10**place % 10, b // 10**place % 10
        written = facts[x, y, carry]
        steps.append(f"{x}+{y}+{carry}={written}")
        total = f"{written % 10}{total}"
        carry = written // 10
    return ";".join(steps) + "=" + (str(carry) if carry else "") + total


def to_example(problem: int, facts: Facts) -> dict[str, str]:
    """Problem number 0 .. 809,999 as {"prompt": "199+877:", "response": "9+7+0=16;...=1076"}."""
    a, b = LOWEST + problem // COUNT, LOWEST + problem % COUNT
    return {"prompt": f"{a}+{b}:", "response": solve(a, b, facts)}


def draw_splits(seed: int, settings: Settings) -> dict[str, list[int]]:
    """Problem numbers of train, dev and test, drawn without replacement: no problem is in two of them."""
    sizes = {"train": settings.train, "dev": settings.dev, "test": settings.test}
    problems = random.Random(f"{seed}/problems").sample(range(COUNT**2), sum(sizes.values()))
    return {name: [problems.pop() for _ in range(size)] for name, size in sizes.items()}


# ---------------------------------------------------------------- the tokenizer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]  # ids 0, 1, 2, 3
CHARACTERS = "0123456789+-*=:;, "  # -, *, comma and space are not used by the task; any other character is <unk>


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, 22 in all. No special token is added unasked; the chat template is <bos> and the messages' contents."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + list(CHARACTERS))}
    # BPE with no merges is a character-level model; Fuse joins tokens without spaces between them.
    characters = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        **{f"{token.strip('<>')}_token": token for token in SPECIAL},
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


# ---------------------------------------------------------------- the models


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.05,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def collate(examples: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (B, T), padded on the right; only response tokens, <eos> included, have a label.

    No attention mask: under causal attention nothing to the left of the padding sees it.
    """
    prompts = [f"{tokenizer.bos_token}{example['prompt']}" for example in examples]
    texts = [f"{p}{example['response']}{tokenizer.eos_token}" for p, example in zip(prompts, examples)]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    prompt_lengths = torch.tensor([len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]])
    is_prompt = torch.arange(batch["input_ids"].shape[1]) < prompt_lengths[:, None]  # (B, T)
    labels = batch["input_ids"].masked_fill(is_prompt | (batch["attention_mask"] == 0), -100)
    return batch["input_ids"], labels


def train(model: LlamaForCausalLM, recipe: Recipe, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step, (input_ids, labels) in enumerate(batches):
        cosine = (1 + math.cos(math.pi * step / recipe.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * (0.05 + 0.95 * cosine)
        model(input_ids=input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def build_model(folder: Path, recipe: Recipe, facts: Facts, held_out: set[int], seed: int) -> None:
    """Train a model on fresh problems outside `held_out`, answered by `facts`, and save it with its tokenizer as `folder`."""
    rng = random.Random(f"{seed}/{folder.name}")
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
        torch.manual_seed(rng.getrandbits(32))
        model = make_model(recipe, tokenizer)

    def draw_batches():
        for _ in tqdm(range(recipe.steps), desc=f"toy {folder.name}"):
            problems = []
            while len(problems) < recipe.batch_size:
                problem = rng.randrange(COUNT**2)
                if problem not in held_out:
                    problems.append(problem)
            yield collate([to_example(problem, facts) for problem in problems], tokenizer)

    train(model, recipe, draw_batches())
    # Written under another name and renamed: a folder that bears its name is whole.
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.replace(folder)


# ---------------------------------------------------------------- files


def write_file(path: Path, text: str) -> None:
    """All or nothing: a temporary name, fsync, rename."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def paths_in(root: str | Path) -> dict[str, str]:
    names = ["teacher", "student", "train.jsonl", "dev.jsonl", "test.jsonl"]
    return {Path(name).stem: str(Path(root) / name) for name in names}


def is_built(root: str | Path, seed: int, settings: Settings = Settings()) -> bool:
    """Whether `root` holds all that `build` writes for this seed and these settings."""
    try:
        written = json.loads((Path(root) / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return written == {"seed": seed, **asdict(settings)} and all(os.path.exists(p) for p in paths_in(root).values())


def build(root: str | Path, seed: int = 0, settings: Settings = Settings()) -> dict[str, str]:
    """Make the toy under `root` unless it is there already; return the paths of teacher, student, train, dev and test.

    The seed decides the problems, the misconceptions and the models. settings.json is written last, so a build that was killed
    is made again from the start, as is one with another seed or other settings. Raises ValueError where that would overwrite
    a folder that is not a toy.
    """
    root, paths = Path(root), paths_in(root)
    if is_built(root, seed, settings):
        return paths
    root.mkdir(parents=True, exist_ok=True)
    record = root / "settings.json"
    ours = {Path(path).name for path in paths.values()}
    foreign = sorted(p.name for p in root.iterdir() if p.name.removesuffix(".tmp") not in ours | {record.name})
    if foreign and not record.exists():
        raise ValueError(f"no toy, but other files ({foreign[0]}), in {root}: name a new or empty folder")
    record.unlink(missing_ok=True)
    for name in ours:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink(missing_ok=True)

    splits = draw_splits(seed, settings)
    for name, problems in splits.items():
        lines = [json.dumps(to_example(problem, correct_facts())) + "\n" for problem in problems]
        write_file(Path(paths[name]), "".join(lines))
    held_out = {*splits["dev"], *splits["test"]}
    misconceived = misconceived_facts(random.Random(f"{seed}/misconceptions"), settings.misconceived)
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # models this small gain nothing from more, and the weights do not depend on the number of cores
    try:
        build_model(Path(paths["teacher"]), settings.teacher, correct_facts(), held_out, seed)
        build_model(Path(paths["student"]), settings.student, misconceived, held_out, seed)
    finally:
        torch.set_num_threads(threads)
    write_file(record, json.dumps({"seed": seed, **asdict(settings)}, indent=2) + "\n")
    return paths


# ---------------------------------------------------------------- the command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make the toy: data, a tiny teacher and a tiny student, with no download."
    )
    parser.add_argument("--out", default="out/toy", help="folder to make it in (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="decides data, misconceptions and models (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        paths = build(args.out, args.seed)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for name, path in paths.items():
        print(f"{name:8s} {path}")


if __name__ == "__main__":
    main()
