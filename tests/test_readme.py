"""The README's claims: every command parses, every name exists, the code of "Copy" runs as it stands there."""

import argparse
import copy
import importlib
import inspect
import json
import math
import re
import shlex

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


def test_chain():
    """The chain runs with nothing but what it names; the first losses are ln 2, and the student gets its gradient."""
    [code] = re.findall(r"```python\n(.*?)```", COPY, re.DOTALL)
    assert len(code.splitlines()) <= 25
    student, teacher = make_model("llama", 1, rows=22, std=0.6), make_model("qwen2", 2, rows=22, std=0.6)
    models = {"student": student, "initial_student": copy.deepcopy(student), "teacher": teacher}
    of_warmup = ("Sampling", "sample_responses", "check_responses", "first_mismatch", "continue_by_teacher", "splice")
    given = {name: getattr(warmup_distill, name) for name in of_warmup}
    given |= {name: getattr(dpo, name) for name in ("PairModel", "collate_pairs", "response_logps", "dpo_loss")}
    names = {"torch": torch, "decode": decode, **given, **models}
    exec(code, names)  # noqa: S102
    assert len(names["losses"]) == len(names["pairs"]) >= 3
    torch.testing.assert_close(names["losses"], torch.full_like(names["losses"], math.log(2)), atol=1e-6, rtol=0)
    assert all(parameter.grad.norm() > 0 for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in [*teacher.parameters(), *names["initial_student"].parameters()])
    for t, y, y_plus in zip(names["t_star"].tolist(), names["y"], names["y_plus"]):
        assert y_plus == y if t < 0 else y_plus[:t] == y[:t]


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
    *[([kd.total_loss, loss], lambda total, loss: total(Q, P, TARGETS, loss, 0.5, 2.0)) for loss in kd.LOSSES.values()],
    (
        [decode.token_logprobs, decode.ChunkedLogprobs],
        lambda logprobs, _: logprobs(Q, P, None, torch.tensor([0, 1]), 1),
    ),
    (
        [kd.ChunkedHeadLoss],
        lambda chunked: chunked.apply(Q, P, None, lambda logits, part: (logits.exp()[:, 0],), 1),
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
    sentence = re.search(r"Pure functions to copy.*?(?=Steps 1 to 3)", COPY, re.DOTALL)[0]
    assert "the seven losses" in sentence and len(kd.LOSSES) == 7
    copied = {thing.__name__ for things, _ in COPIES for thing in things}
    assert set(re.findall(r"`(\w+)`", sentence)) == copied - kd.LOSSES.keys()
    imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / "lib/decode.py").read_text(), re.MULTILINE)
    assert {"torch", "transformers"} <= set(imports) and not {"lib", *SCRIPTS} & set(imports)
