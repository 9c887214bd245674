"""The README's claims: every command parses, every name exists, the code of "Copy" runs as it stands there."""

import argparse
import copy
import importlib
import inspect
import json
import math
import re
import shlex
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_model

import dpo
import kd
import warmup_distill
from lib import decode, scoring

README = (ROOT / "README.md").read_text(encoding="utf-8")
COPY = re.search(r"^## Copy\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
SCRIPTS = ("warmup_distill", "dpo", "kd", "eval")
OTHERS = ("tools.report", "tools.explain", "kills", "long_run", "toy.make")  # tests/ is in the path of imports
TORCHRUN = ("nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint")


class ParsedError(Exception):
    """Raised in the place of a main program's work, with its parser."""


def parse(module, argv, monkeypatch):
    """Has the main program's own parser take `argv`; returns that parser. Nothing is run."""
    real = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        real(parser, argv, namespace)
        raise ParsedError(parser)

    with monkeypatch.context() as patch, pytest.raises(ParsedError) as stopped:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        importlib.import_module(module).main()
    return stopped.value.args[0]


def commands():
    """Every command of the README's bash blocks, with continued lines joined, comments and variables cut off."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
    lines = blocks.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("  #")[0].split("&&")]
    return [re.sub(r"^(\w+=\w+ )+", "", part) for part in parts if part]


@pytest.mark.parametrize("command", [*commands(), "python tests/kills.py", "python tests/long_run.py"])
def test_commands_parse(command, monkeypatch):
    """pip, pytest, or a program of ours, with or without torchrun, whose own parser takes the arguments."""
    words = shlex.split(command)
    if words[:3] == ["pip", "install", "-r"]:
        assert (ROOT / words[3]).is_file() and len(words) == 4
    elif words[:3] == ["python", "-m", "pytest"]:
        assert len(words) == 3
    elif words[0] == "bash":  # tests/test_experiments.py has its commands
        assert words[1:] == ["experiments/paper.sh"] and (ROOT / words[1]).is_file()
    elif words[:2] == ["python", "-m"]:
        parse(words[2], words[3:], monkeypatch)
    else:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[place]).is_file()
        launched = dict(zip(words[1:place:2], words[2:place:2], strict=True))
        for flag, value in launched.items():
            assert words[0] == "torchrun" and flag.removeprefix("--") in TORCHRUN and not value.startswith("-")
        processes = int(launched.get("--nnodes", 1)) * int(launched.get("--nproc_per_node", 1))
        monkeypatch.setenv("WORLD_SIZE", str(processes))  # which --shard-size divides
        module, argv = words[place].removesuffix(".py").removeprefix("tests/"), words[place + 1 :]
        if module in SCRIPTS:
            importlib.import_module(module).parse_args(argv)  # with the checks that follow argparse's own
        else:
            parse(module, argv, monkeypatch)


def test_flags_are_defined(monkeypatch):
    known = {f"--{name}" for name in (*TORCHRUN, "hypothesis-profile")}
    required = {"tools.report": ["OUT"], "tools.explain": ["OUT", "1"], "dpo": ["--model", "S", "--pairs", "FILE"]}
    required["eval"] = ["--model", "S", "--data", "gsm8k"]
    for module in (*SCRIPTS, *OTHERS):
        parser = parse(module, required.get(module, []), monkeypatch)
        known |= {flag for action in parser._actions for flag in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", README.replace("`--eval-*`", "")))
    assert len(named) > 50 and not named - known


def test_files_exist():
    named = set(re.findall(r"(?<![\w./-])((?:toy|tools|lib|tests|experiments)/[\w./-]*\w|\w+\.py)\b", README))
    missing = [name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"*/{name}"))]
    assert len(named) >= 20 and not missing


def test_tree_is_the_repository():
    tree = re.search(r"^## Where things are\n\n```\n(.*?)```", README, re.DOTALL | re.MULTILINE)[1]
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")}
    assert set(re.findall(r"^\S+", tree, re.MULTILINE)) == folders | {path.name for path in ROOT.glob("*.py")}


def test_functions_beside_a_file_exist():
    """`file.py: name, name` in the table of steps."""
    named = re.findall(r"`([\w/]+)\.py: ([\w, ]+)`", README)
    assert len(named) >= 7
    for module, names in named:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module.replace("/", ".")), name), f"{module}.py has no {name}"


def test_links_and_size():
    headings = re.findall(r"^#+ (.*)", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert target[1:] in anchors if target.startswith("#") else (ROOT / target).is_file(), target
    assert len(README.splitlines()) <= 280 and len(README.encode()) < 24_000


def test_quickstart_is_what_was_printed():
    block = re.search(r"<!-- experiments/quickstart.json -->\n```\n(.*?)\n```", README, re.DOTALL)[1]
    assert block.splitlines() == json.loads((ROOT / "experiments/quickstart.json").read_text())["output"]


# ---------------------------------------------------------------------------------------------------------------------
# Copy
# ---------------------------------------------------------------------------------------------------------------------


class PlainDecoder(torch.nn.Module):
    """A decoder in plain torch, with a cache that only needs `update(k, v, layer)`: what the README's `Adapted` is made of."""

    def __init__(self, seed, vocab_size=22, width=16, layers=2):
        torch.manual_seed(seed)
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(vocab_size, width), torch.nn.Embedding(64, width)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.norm, self.lm_head = torch.nn.LayerNorm(width), torch.nn.Linear(width, vocab_size)
        torch.nn.init.normal_(self.lm_head.weight, std=0.8)  # predictions far from uniform

    def hidden_states(self, ids, mask, positions, cache):
        """ids, positions: (B, T). mask: (B, 1, T, C), added to the scores. Returns (B, T, D)."""
        x = self.tokens(ids) + self.places(positions)
        for i, qkv in enumerate(self.qkv):
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv(x).chunk(3, -1))  # (B, 2, T, D / 2)
            if cache is not None:
                k, v = cache.update(k, v, i)
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + mask
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.norm(x)

    def get_output_embeddings(self):
        return self.lm_head

    def plain_logprobs(self, prompt, response):
        """log p of a response's tokens, (T,), from one forward over one row without padding or cache."""
        row = torch.tensor([prompt + response])
        causal = torch.full((1, 1, row.shape[1], row.shape[1]), -math.inf).triu(1)
        hidden = self.hidden_states(row, causal, torch.arange(row.shape[1])[None], None)
        logprobs = self.lm_head(hidden).log_softmax(-1)[0, len(prompt) - 1 : -1]
        return logprobs.gather(-1, torch.tensor(response)[:, None])[:, 0]


def transformers_logprobs(model, prompt, response):
    """The same of a model of transformers."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


IN_THE_CHAIN = [warmup_distill.Sampling, warmup_distill.sample_responses, warmup_distill.check_responses]
IN_THE_CHAIN += [warmup_distill.continue_by_teacher, dpo.PairModel]


@pytest.mark.parametrize("kind", ["transformers", "a class of one's own"])
def test_chain(kind):
    """The chain runs with sources alone and what the README says that they need; its log-probs are those of plain
    forwards, the first losses are ln 2, and the student gets its gradient."""
    [code] = re.findall(r"```python\n(.*?)```", COPY, re.DOTALL)
    assert len(code.splitlines()) <= 25
    names = {"math": math, "torch": torch, "F": F, "__name__": "copied", "decode": decode, "dataclass": dataclass}
    copied = [warmup_distill.first_mismatch, warmup_distill.splice, dpo.collate_pairs, dpo.shared_length]
    for thing in [*copied, dpo.response_logps, dpo.dpo_loss, *IN_THE_CHAIN]:
        exec(re.sub(r".*measure\.check_finite.*\n", "", inspect.getsource(thing)), names)  # noqa: S102
    names |= {"SimpleNamespace": SimpleNamespace, "YourDecoder": PlainDecoder}
    student, teacher = make_model("llama", 1, rows=22, std=0.6), make_model("qwen2", 2, rows=22, std=0.6)
    logprobs = transformers_logprobs
    if kind != "transformers":
        exec(code[: code.index("\n\n")], names)  # noqa: S102 the adapter alone
        student, teacher = (names["Adapted"](seed).eval() for seed in (1, 2))
        logprobs = PlainDecoder.plain_logprobs
    names |= {"student": student, "initial_student": copy.deepcopy(student), "teacher": teacher}
    exec(code, names)  # noqa: S102
    assert len(names["losses"]) == len(names["pairs"]) >= 3
    torch.testing.assert_close(names["losses"], torch.full_like(names["losses"], math.log(2)), atol=1e-6, rtol=0)
    assert all(parameter.grad.norm() > 0 for parameter in student.parameters())
    idle = [*teacher.parameters(), *names["initial_student"].parameters()]
    assert all(parameter.grad is None for parameter in idle)
    x = [prompt for prompt in names["prompts"] for _ in range(4)]
    for i, (t, y, y_plus) in enumerate(zip(names["t_star"].tolist(), names["y"], names["y_plus"], strict=True)):
        assert y_plus == y if t < 0 else y_plus[:t] == y[:t]
        for model, found in ((student, names["log_q"]), (teacher, names["log_p"])):
            torch.testing.assert_close(found[i, : len(y)], logprobs(model, x[i], y), atol=2e-5, rtol=0)
    sums = lambda pair, key: logprobs(student, pair["prompt_ids"], pair[key]).sum()
    expected = [sums(pair, "chosen_ids") - sums(pair, "rejected_ids") for pair in names["pairs"]]
    chosen, rejected = names["logps"](student)
    torch.testing.assert_close(chosen - rejected, torch.stack(expected), atol=1e-4, rtol=0)


NOISE, DIFFERENCES = (
    decode.uniform_noise(7, 0, *[torch.arange(60)] * 3).view(3, 20),
    torch.tensor([1.0, 0.0, -1.0] * 9).double(),
)
Q, P, TARGETS = 9 * NOISE[:2], 9 * NOISE[1:], torch.tensor([3, -100])
PAIR = {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8, 9, 2], "rejected_ids": [7, 3, 2]}
# Functions to copy together, and a call of them
COPIES = [
    ([decode.uniform_noise], lambda noise: noise(0, 0, *[torch.arange(9)] * 3)),
    ([decode.sample_token], lambda sample: sample(Q, NOISE[0, :2], 1.0, 0.8)),
    ([warmup_distill.first_mismatch], lambda rule: rule(-Q, -P, P > 1, 4.0)),
    ([warmup_distill.splice], lambda splice: splice([10, 11, 12], 1, [21, 2])),
    ([dpo.dpo_loss], lambda loss: loss(*-Q, *-P, 0.5)),
    ([dpo.collate_pairs, dpo.shared_length], lambda collate, _: collate([PAIR], 0, True, "cpu")),
    ([dpo.response_logps], lambda logps: logps(-Q[:, :3], None, False)),
    *[
        ([kd.probs, kd.log_probs, kd.log, kd.total_loss, loss], lambda *f: f[3](Q, P, TARGETS, f[4], 0.5, 2.0))
        for loss in kd.LOSSES.values()
    ],
    (
        [decode.token_logprobs, decode.ChunkedLogprobs],
        lambda logprobs, _: logprobs(Q, P, None, torch.tensor([0, 1]), 1),
    ),
    (
        [kd.ChunkedHeadLoss],
        lambda chunked: chunked.apply(Q, P, None, lambda part: lambda logits, rows: (logits.exp()[:, 0],), 1),
    ),
    ([scoring.paired_bootstrap], lambda bootstrap: bootstrap(DIFFERENCES, 10, seed=0)),
    ([scoring.interval], lambda interval: interval(0.375, DIFFERENCES)),
]


@pytest.mark.parametrize("things, call", COPIES, ids=[things[-1].__name__ for things, _ in COPIES])
def test_copied_source_runs_alone(things, call):
    """Sources alone, below `import math, torch` and `import torch.nn.functional as F`, do what the imported ones do."""
    names = {"math": math, "torch": torch, "F": F, "__name__": "copied"}
    for thing in things:
        exec(inspect.getsource(thing), names)  # noqa: S102
    assert repr(call(*(names[thing.__name__] for thing in things))) == repr(call(*things))


def test_every_named_function_is_checked():
    alone, with_decode = re.search(
        r"These run alone below.*?:(.*?)These need `decode`, too:(.*?)A model is", COPY, re.DOTALL
    ).groups()
    assert "the seven losses" in alone and len(kd.LOSSES) == 7
    copied = {thing.__name__ for things, _ in COPIES for thing in things}
    assert set(re.findall(r"`(\w+)`", alone)) == copied - kd.LOSSES.keys()
    assert set(re.findall(r"`(\w+)`", with_decode)) == {thing.__name__ for thing in IN_THE_CHAIN}
    imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / "lib/decode.py").read_text(), re.MULTILINE)
    assert {"torch", "transformers"} <= set(imports) and not {"lib", *SCRIPTS} & set(imports)
