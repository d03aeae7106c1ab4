"""Private interfaces that torch has moved are named in an error, before any compilation."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grass_fx._torch_compat.selfcheck import (
    FOR_FSDP2,
    FOR_WORDS,
    NEEDS,
    SUPPORTED,
    check,
    selfcheck,
)
from grass_fx.errors import UnsupportedTorchError

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "grass_fx/_torch_compat").glob("*.py"))
NEEDED = {name.partition("(")[0] for names in NEEDS.values() for name in names}
NEEDED |= {*FOR_WORDS, *FOR_FSDP2}
PRIVATE = re.compile(r"torch\.(.*\.)?_[a-zA-Z]|torch\.fx\.experimental")


def private_names(path):
    """Every name of private torch that a file imports or spells out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and PRIVATE.match(f"{node.module}."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and PRIVATE.match(ast.unparse(node)):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_list_has_every_private_name_of_the_package(path):
    names = {*private_names(path)}
    assert names or path.stem in ("__init__", "selfcheck")
    known = [*NEEDED, "torch.__version__"]
    # A name of the list may lie in what is imported, or be what is done with it.
    assert [n for n in names if not any(f"{k}.".startswith(f"{n}.") for k in known)] == []


def test_this_torch_has_it_all():
    selfcheck()
    check({"words": FOR_WORDS, "FSDP2": FOR_FSDP2})


@pytest.mark.parametrize(
    "name",
    [
        "torch._inductor.no_such_module.function",
        "torch._inductor.lowering.no_such_function",
        "torch._inductor.select_algorithm.TritonTemplate.no_such_method",
        "torch._functorch._aot_autograd.descriptors.PlainAOTInput.no_such_field",
        "torch._inductor.config.triton.no_such_option",
        "torch._inductor.compile_fx.compile_fx(config_patches, no_such_keyword)",
    ],
)
def test_what_is_missing_is_named_with_what_it_is_for(name):
    needs = {"one thing": ["torch._inductor.lowering.lowerings", name], "another": ["torch._no"]}
    with pytest.raises(UnsupportedTorchError) as caught:
        check(needs)
    message = str(caught.value)
    assert f"{name}, for one thing; torch._no, for another. " in message
    assert "lowerings" not in message and SUPPORTED in message


def test_the_supported_versions_are_those_that_pip_installs():
    (low, high), text = SUPPORTED.split(" to "), (ROOT / "pyproject.toml").read_text("utf-8")
    major, minor = high.split(".")
    assert f'"torch>={low},<{major}.{int(minor) + 1}"' in text


MOVED = """
import torch
import torch._inductor.compile_fx, torch._inductor.select_algorithm
del torch._inductor.select_algorithm.autotune_select_algorithm
del torch._inductor.custom_graph_pass.CustomGraphPass
import grass_fx
from grass_fx.errors import UnsupportedTorchError
model = torch.nn.Linear(4, 4)
calls = (
    lambda: torch.compile(model, backend="grass", options={"rank": 2}),
    lambda: torch.compile(model, backend="grass", options={"rank": 2}),  # it is no less missing now
    lambda: grass_fx.explain(model, torch.randn(2, 4), options={"rank": 2}),
)
for call in calls:
    try:
        call()
    except UnsupportedTorchError as error:
        print(error)
"""


def test_a_torch_whose_interfaces_have_moved_is_told_when_the_backend_is_looked_up():
    run = subprocess.run([sys.executable, "-c", MOVED], capture_output=True, text=True, check=True)
    told = run.stdout.splitlines()
    assert len(told) == 3
    for line in told:
        assert "custom_graph_pass.CustomGraphPass.uuid, for compiling with Inductor; " in line
        assert "autotune_select_algorithm(input_gen_fns), for Triton kernels" in line
        assert line.count(", for ") == 2


def test_torchs_own_warnings_are_no_errors_of_the_user():
    """Where warnings are errors, the backend is found all the same."""
    code = (
        "import warnings, torch, grass_fx; warnings.simplefilter('error'); "
        "torch._dynamo.lookup_backend('grass'); print('found')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "found", run.stderr[-2000:]
