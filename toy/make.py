"""The embedded default: a synthetic task, a tiny teacher and a tiny student, made here in half a minute, no download.

    python toy.py --out out/toy --seed 0

Task: 3-digit addition with the carries written out, units first, one character a token; a step: digit+digit+carry=sum.

    prompt    199+877:
    response  9+7+0=16;9+7+1=17;1+8+1=10=1076      the answer is the number after the last `=`

Teacher: a small Llama, trained on correct responses until its greedy answers are right, and no longer: in a saturated
teacher any wrong token has next to no probability, and the threshold eta of the warm-up no longer matters.

Student: a smaller Llama with misconceptions. A quarter of the 200 facts (digit, digit, carry) -> sum is off by one,
always the same way, in everything it is trained on; the digit and the carry of a wrong sum go on through the response.
**So the paper's premise, a student that is confidently wrong where the teacher is not, is true here by construction.**
The toy shows that the code does what the paper says; it is no evidence that the premise holds for real models. (A
student that was merely trained too little showed no effect of the warm-up at all.)

What comes out are ordinary Hugging Face folders and JSONL files: no other file knows that it runs on a toy.
Nothing in this file comes from a paper.
"""

import math
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
from common import UserError

# Defaults of warmup_distill.py and of kd.py on the toy, by the names of their flags.
# One thread: a second one makes models of this size slower.
BOTH = {"max_prompt_tokens": 16, "max_new_tokens": 48, "max_steps": 60, "batch_size": 32, "micro_batch_size": 32}
BOTH |= {"lr": 5e-4, "dtype": "float32", "threads": 1}
WARMUP = BOTH | {"limit": 250, "prompts_per_batch": 25, "beta": 0.5, "nll_weight": 1.0, "eval_limit": 500}
KD = BOTH | {"limit": 1000, "loss": "reverse_kl"}


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
    student: Recipe = Recipe(32, 96, batch_size=32, lr=6e-3, steps=800)
    misconceived: float = 0.25  # share of the facts that the student has wrong
    train: int = 4000  # problems in train.jsonl
    dev: int = 500
    test: int = 500
    version: int = 2  # raise it when a change to this file changes what `build` writes


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
    """a + b written out, step by step, by one who believes `facts`.

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
    return f"{';'.join(steps)}={carry or ''}{total}"


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

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]  # ids 0, 1, 2, 3
CHARACTERS = "0123456789+-*=:;, "  # the task does not use "-", "*", "," and " "; any other character is <unk>


def make_tokenizer():
    """One token a character, 22 in all; adds no token unasked. Its chat template: <bos> and the messages' contents."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    # BPE without merges splits into characters; Fuse joins them again with nothing in between.
    characters = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        **{f"{token.strip('<>')}_token": token for token in SPECIAL},
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe, tokenizer, seed):
    """A LlamaForCausalLM with random weights."""
    config = LlamaConfig(
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
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def collate(examples, tokenizer):
    """Token ids and labels, both (B, T), padded on the right; a label is -100 but on the response and its <eos>."""
    prompts = [f"<bos>{example['prompt']}" for example in examples]
    texts = [f"{prompt}{example['response']}<eos>" for prompt, example in zip(prompts, examples)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    prompt_lengths = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    in_prompt = torch.arange(batch["input_ids"].shape[1]) < prompt_lengths[:, None]  # (B, T)
    labels = batch["input_ids"].masked_fill(in_prompt | (batch["attention_mask"] == 0), -100)
    return batch["input_ids"], labels


def train(model, recipe, draw, name):
    """Trains on `draw(batch size)` -> (ids, labels); returns the greedy accuracy on problems drawn afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in tqdm(range(recipe.steps), desc=f"toy {name}"):
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
    """Trains a model on fresh problems outside `held_out`, solved with `facts`, and writes it to `folder`."""
    tokenizer = make_tokenizer()
    rng = random.Random(f"{seed} {folder.name}")

    def draw(size):
        problems = []
        while len(problems) < size:
            problem = rng.randrange(len(OPERANDS) ** 2)
            if problem not in held_out:
                problems.append(problem)
        return collate([to_example(problem, facts) for problem in problems], tokenizer)

    for attempt in range(5):
        model = make_model(recipe, tokenizer, rng.getrandbits(32))
        if train(model, recipe, draw, folder.name + ", again" * (attempt > 0)) >= recipe.min_accuracy:
            break
    else:
        raise UserError(
            f"five times the {folder.name} did not learn its task", f"with seed {seed}", "give another seed"
        )
    partial = folder.with_name(f".{folder.name}.partial")  # renamed when whole, as common.write_atomic does for files
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def paths_in(root):
    """{"teacher": path, "student": path, "train": path, "dev": path, "test": path}"""
    names = ("teacher", "student", "train.jsonl", "dev.jsonl", "test.jsonl")
    return {Path(name).stem: str(Path(root) / name) for name in names}


def is_built(root, seed, settings=Settings()):
    """Whether `root` holds all that `build` writes for this seed and these settings."""
    try:
        written = common.read_json(Path(root) / "settings.json")
    except (OSError, ValueError):
        return False
    return written == {"seed": seed, **asdict(settings)} and all(Path(p).exists() for p in paths_in(root).values())


def build(root, seed=0, settings=Settings()):
    """Makes the toy in the folder `root` unless it is there; returns its paths by name, as `paths_in` does.

    The seed decides problems, misconceptions and models. settings.json is written last: what a killed build left, or
    one with another seed or other settings, is made again. Raises UserError if `root` holds what is not the toy's.
    """
    root, paths = Path(root), paths_in(root)
    if is_built(root, seed, settings):
        return paths
    clear(root, {Path(path).name for path in paths.values()})
    splits = draw_splits(seed, settings)
    for name, problems in splits.items():
        common.write_jsonl(paths[name], [to_example(problem, correct_facts()) for problem in problems])
    held_out = {*splits["dev"], *splits["test"]}
    misconceived = misconceived_facts(random.Random(f"{seed}/misconceptions"), settings.misconceived)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster at this size, and the weights do not depend on the number of cores
    try:
        build_model(Path(paths["teacher"]), settings.teacher, correct_facts(), held_out, seed)
        build_model(Path(paths["student"]), settings.student, misconceived, held_out, seed)
    finally:
        torch.set_num_threads(threads)
    common.write_json(root / "settings.json", {"seed": seed, **asdict(settings)})
    return paths


def fill_in(args, world):
    """What a script does where no models and data are named: builds the toy in out/toy and names what is in there."""
    if world.rank == 0:
        build("out/toy", args.seed)
    world.barrier()
    paths = paths_in("out/toy")
    args.teacher, args.student, args.data = paths["teacher"], args.student or paths["student"], paths["train"]
    args.eval_data = args.eval_data or paths["dev"]


def clear(root, names):
    """Makes the folder `root` and removes `names`, settings.json and what a killed build left half-written from it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        ours = [p for p in root.iterdir() if p.name in {"settings.json", *names} or p.name.endswith(".partial")]
        others = sorted(set(root.iterdir()) - set(ours))
        if others and not (root / "settings.json").exists():  # a folder of someone else's, such as a run's OUT
            raise UserError(f"{others[0].name} is not the toy's", f"in {root}", "give a new or empty folder to the toy")
        for path in sorted(ours, key=lambda path: path.name != "settings.json"):  # from here on it is not built
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise UserError(f"the toy cannot be written ({common.one_line(error)})", f"at {root}", "give another folder")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = common.ArgumentParser(__doc__)
    parser.add_argument("--out", default="out/toy", help="folder for the toy")
    parser.add_argument("--seed", type=int, default=0, help="decides problems, misconceptions and models")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    for name, path in build(args.out, args.seed).items():
        print(f"{name:8s} {path}")


if __name__ == "__main__":
    common.run(main)
