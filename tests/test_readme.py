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
    elif words[:2] == ["python", "-m"]:
        parse(words[2], words[3:], monkeypatch)
    else:
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert (ROOT / words[place]).is_file()
        for flag, value in zip(words[1:place:2], words[2:place:2], strict=True):
            assert words[0] == "torchrun" and flag.removeprefix("--") in TORCHRUN and not value.startswith("-")
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


def check_sampling(uniform_noise, sample_token):
    index = torch.arange(20_000)
    noise = uniform_noise(0, 0, index, index, index)
    assert noise[7:8] == uniform_noise(0, 0, *[torch.tensor([7])] * 3)  # whatever its batch
    drawn = sample_token(torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4), noise, 1.0, 0.8)
    assert abs((drawn == 0).double().mean() - math.e / (math.e + 1)) < 0.01  # tokens 0 and 1 are left, e to 1


def check_splice(first_mismatch, splice):
    log_q, log_p = torch.tensor([[-0.1, -0.1, -0.2], [-1.0, -2.0, 0.0]]), torch.tensor([[-0.2, -5.6, -6.0], [-1.0] * 3])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert first_mismatch(log_q, log_p, mask, eta=4.0).tolist() == [1, -1]
    assert splice([10, 11, 12], 1, [21, 2]) == [10, 21, 2]


def check_dpo(dpo_loss, collate_pairs, shared_length, response_logps):
    losses, chosen, rejected = dpo_loss(*torch.tensor([[-10.0], [-12.0], [-10.0], [-10.0]]), beta=0.5)
    assert (chosen.item(), rejected.item()) == (0, -1)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-1)))
    pair = {"prompt_ids": [1, 5, 6], "chosen_ids": [7, 8, 9, 2], "rejected_ids": [7, 3, 2]}
    rows = collate_pairs([pair], pad_id=0, with_shared=True, device="cpu")
    assert rows["token_ids"].tolist() == [[1, 5, 6, 7, 8, 9, 2, 3, 2]]
    assert rows["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5]]
    chosen, rejected = response_logps(torch.tensor([[-1.0, -2.0, -4.0]]), None, average=False)
    assert (chosen.item(), rejected.item()) == (-3, -5)


def check_losses(total_loss, **losses):
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.75, 0.25], [0.9, 0.1]]).log()
    for divergence in losses.values():
        values = divergence(q, p)
        assert values[0] > 0.01 and values[1].abs() < 1e-6
    total, ce, kl = total_loss(q, p, torch.tensor([0, -100]), losses["forward_kl"], kd_rate=0.5, temperature=1.0)
    assert ce[0].item() == pytest.approx(-math.log(0.75)) and torch.equal(total, (ce + kl) / 2)
    assert kl[0].item() == pytest.approx(0.5 * math.log(4 / 3))


def check_chunks(token_logprobs, ChunkedLogprobs, ChunkedHeadLoss, forward_kl):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets, teacher, logits = torch.randint(50, (7,)), torch.randn(7, 50), hidden @ weight.T
    token_losses = lambda logits, part: (forward_kl(logits, teacher[part]),)
    plain = [logits.log_softmax(-1)[range(7), targets].sum(), forward_kl(logits, teacher).sum()]
    chunked = [token_logprobs(hidden, weight, None, targets, 3).sum()]
    chunked.append(ChunkedHeadLoss.apply(hidden, weight, None, token_losses, 3)[0])
    for losses in zip(plain, chunked):
        gradients = [torch.cat(torch.autograd.grad(loss, (hidden, weight), retain_graph=True)) for loss in losses]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def check_bootstrap(paired_bootstrap, interval):
    differences = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, -1.0, 1.0, 0.0] * 25)
    found = interval(0.375, paired_bootstrap(differences, 10_000, seed=0))
    assert found["low"] == pytest.approx(0.28, abs=0.01) and found["high"] == pytest.approx(0.47, abs=0.01)


CHECKS = {
    check_sampling: [decode.uniform_noise, decode.sample_token],
    check_splice: [warmup_distill.first_mismatch, warmup_distill.splice],
    check_dpo: [dpo.dpo_loss, dpo.collate_pairs, dpo.shared_length, dpo.response_logps],
    check_losses: [kd.total_loss, *kd.LOSSES.values()],
    check_chunks: [decode.token_logprobs, decode.ChunkedLogprobs, kd.ChunkedHeadLoss, kd.forward_kl],
    check_bootstrap: [scoring.paired_bootstrap, scoring.interval],
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_copied_source_runs_alone(check):
    """Sources alone, below `import math, torch` and `import torch.nn.functional as F`."""
    names = {"math": math, "torch": torch, "F": F, "__name__": "copied"}
    for thing in CHECKS[check]:
        exec(inspect.getsource(thing), names)  # noqa: S102
    check(**{thing.__name__: names[thing.__name__] for thing in CHECKS[check]})


def test_every_named_function_is_checked():
    sentence = re.search(r"Pure functions to copy.*?(?=Steps 1 to 3)", COPY, re.DOTALL)[0]
    assert "the seven losses" in sentence and len(kd.LOSSES) == 7
    checked = {thing.__name__ for things in CHECKS.values() for thing in things}
    assert set(re.findall(r"`(\w+)`", sentence)) == checked - kd.LOSSES.keys()
    imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / "lib/decode.py").read_text(), re.MULTILINE)
    assert {"torch", "transformers"} <= set(imports) and not {"lib", *SCRIPTS} & set(imports)
