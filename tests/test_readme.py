"""The README's claims about names: every command parses, every flag, path and function in it exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SET_UP = (
    "pip install -r requirements.txt",
    "pip install -r tests/optional/requirements.txt",
    "python -m pytest",
    "python -m pytest tests/optional",
)


def commands():
    """Every shell line of the README's bash blocks, with continued lines joined and comments cut off."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("  #")[0].split("&&") if part.strip()]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    """Each is pip, pytest, or one of our scripts, with or without torchrun, whose own parser takes its arguments."""
    words = shlex.split(command)
    if command in SET_UP:
        return
    if words[0] == "bash":
        assert (ROOT / words[1]).exists()
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    if "/" in script:  # of bench/, runs/ and tests/, which are no modules here
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words if word.startswith("--"))
        return
    assert words[0] in ("python", "torchrun")
    importlib.import_module(script.removesuffix(".py")).parse_args(words[words.index(script) + 1 :])


def test_scripts_without_arguments_are_the_toy():
    for name in ("warmup_distill", "kd"):
        assert importlib.import_module(name).parse_args([]).toy


def test_functions_named_beside_a_file_exist():
    """`file.py: name, name` in the table of steps."""
    named = re.findall(r"`(\w+)\.py: ([\w, ]+)`", README)
    assert len(named) >= 6
    for module, names in named:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.py has no {name}"


def test_flags_in_the_text_exist():
    known = "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("**/*.py"))
    torchrun = {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) - torchrun:
        assert f'"{flag}"' in known, flag


def test_file_tree_is_the_repository():
    tree = re.search(r"## Where things live\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = {line.split()[0] for line in tree.splitlines()}
    ours = {p.name for p in ROOT.glob("*.py")} | {"tests/", "runs/", "bench/"}
    assert named == ours


def test_links_inside_the_readme():
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)", README, re.MULTILINE)
    }
    for target in re.findall(r"\]\(#([\w-]+)\)", README):
        assert target in headings
    for path in re.findall(r"\b(?:runs|tests|bench)/[\w./-]*\.\w+", README):
        assert Path(ROOT / path).exists(), path
