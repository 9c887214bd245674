"""The README's section "Copy a function", done as it says: sources alone, in a namespace of torch, F and math.

A row of its table: functions, what else each needs, what it gives. The first line of an example names all that is
copied for it, "# file.py: name, name; file.py: name".
"""

import ast
import builtins
import dis
import importlib
import inspect
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import scores

GUIDE = ROOT / "README.md"
SECTION = re.search(
    r"^## Copy a function\n(.*?)(?=^## |\Z)", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
TEXT = SECTION[1] if SECTION else ""
EXAMPLES = re.findall(r"^```python\n# (.+?)\n(.+?)^```", TEXT, re.DOTALL | re.MULTILINE)
ROWS = re.findall(r"^\| `(\w+\.py: [\w, ]+)` \| (.*?) \|", TEXT, re.MULTILINE)
GIVEN = {"torch": torch, "F": F, "math": math}


def things(named):
    """ "kd.py: tvd; pairs.py: shared_length" -> {name: function or class}."""
    found = {}
    for part in named.split("; "):
        module, names = part.split(".py: ")
        for name in names.split(", "):
            found[name] = getattr(importlib.import_module(module), name)
    return found


def free_names(source):
    """The global names that a piece of source reads and does not define: what it needs beside Python itself."""
    read, defined, codes = set(), set(), [compile(source, "source", "exec")]
    for code in codes:
        codes += filter(inspect.iscode, code.co_consts)
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                read.add(instruction.argval)
            elif instruction.opname == "STORE_NAME":
                defined.add(instruction.argval)
    return read - defined - set(dir(builtins))


def test_section_is_whole():
    """It is there, its blocks and rows are all understood, and each function in the table has an example."""
    assert SECTION, f"{GUIDE.name} has no section 'Copy a function'"
    assert len(EXAMPLES) == TEXT.count("```python\n") >= 7
    assert len(ROWS) == TEXT.count("\n| `") >= 10
    assert all(re.search(r"^\s*assert ", code, re.MULTILINE) for _, code in EXAMPLES)
    in_table = {name for named, _ in ROWS for name in things(named)}
    in_examples = {name for named, _ in EXAMPLES for name in things(named)}
    needed = {name for _, needs in ROWS for name in re.findall(r"`(\w+)`", needs)}
    assert in_examples == in_table | needed


@pytest.mark.parametrize("named, code", EXAMPLES, ids=[named for named, _ in EXAMPLES])
def test_example(named, code):
    torch.manual_seed(0)
    namespace = dict(GIVEN)
    for thing in things(named).values():
        exec(inspect.getsource(thing), namespace)  # noqa: S102
    exec(compile(code, f"{GUIDE.name}, {named}", "exec"), namespace)  # noqa: S102


@pytest.mark.parametrize("named, needs", ROWS, ids=[named for named, _ in ROWS])
def test_needs(named, needs):
    """The table's second column is all that the source reads beside torch, F, math and itself."""
    named, needs = things(named), set(re.findall(r"`(\w+)`", needs))
    read = set().union(*(free_names(inspect.getsource(thing)) for thing in named.values()))
    assert read - GIVEN.keys() - named.keys() - {"__name__"} == needs


def test_not_alone():
    """What the sentence under the table says of two functions that are not in it."""
    assert free_names(inspect.getsource(scores.rouge_l)) == {"rouge_scorer"}
    assert free_names(inspect.getsource(scores.rouge_scorer)) == {"functools"}
    assert free_names(inspect.getsource(scores.final_number)) - GIVEN.keys() == {"re", "FRACTION", "NUMBER"}


def test_decode_is_a_file_to_copy():
    """decode.py imports torch, transformers and Python's own modules, nothing of this project."""
    tree = ast.parse((ROOT / "decode.py").read_text(encoding="utf-8"))
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = [a.name for n in imports if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in imports if isinstance(n, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch", "transformers"}
