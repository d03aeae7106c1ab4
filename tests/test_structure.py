"""What holds of the source files themselves: sizes, imports, floors, docstrings."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import grass_fx

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("grass_fx/**/*.py"), *ROOT.glob("passes/**/*.py")])

# Who may import whom: a module only from its own floor or one below (docs/architecture.md).
FLOORS = {
    "grass_fx.errors": 1,
    "grass_fx.ops": 1,
    "grass_fx._torch_compat": 2,
    "grass_fx.config": 2,
    "grass_fx.state": 3,
    "grass_fx.compile": 4,
    "grass_fx.passes": 4,
    "grass_fx.optim": 4,
    "grass_fx.testing": 4,
    "grass_fx.backend": 5,
    "grass_fx.distributed": 5,
    "grass_fx.inspect": 6,
    "grass_fx": 6,  # what it shows to users
    "grass_fx.__main__": 6,
}


def name_of(path):
    """The module that a source file is imported as."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(parts if parts[0] == "grass_fx" else ("grass_fx", *parts))


MODULES = {name_of(path): path for path in SOURCES}
PRIVATE = re.compile(r"(torch\._(inductor|dynamo|functorch|guards)|functorch)(\.|$)")
every_module = pytest.mark.parametrize("module", MODULES)


@cache
def tree_of(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported_by(module):
    """Everything that a module imports, wherever in it; ``a.b`` for ``from a import b``."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rooms_imported_by(module):
    """The modules of ours among them."""
    names = imported_by(module)
    rooms = {name if name in MODULES else name.rpartition(".")[0] for name in names}
    return (rooms & MODULES.keys()) - {module}


def floor_of(module):
    while module not in FLOORS:
        module = module.rpartition(".")[0]
    return FLOORS[module]


def test_the_top_of_the_package_is_seen_at_a_glance():
    entries = {path.name for path in (ROOT / "grass_fx").iterdir()} - {"__pycache__"}
    assert len(entries) <= 14, entries


def test_no_public_name_hides_a_module():
    assert not {f"grass_fx.{name}" for name in grass_fx.__all__} & MODULES.keys()


def test_there_are_sources():
    assert {"grass_fx", "grass_fx.backend", "grass_fx.passes.pipeline"} <= MODULES.keys()


def test_every_package_is_installed():
    """The list in pyproject.toml: what is not on it is missing from the wheel."""
    tomllib = pytest.importorskip("tomllib")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert {*settings["tool"]["setuptools"]["packages"]} == packages


@every_module
def test_only_torch_compat_touches_private_torch(module):
    virtual = "grass_fx.testing.virtual_gpu", "grass_fx.testing.training_code"
    if module.startswith("grass_fx._torch_compat") or module in virtual:
        return  # the virtual GPU is nothing but private torch, and no part of what users run
    touched = imported_by(module)
    touched |= {ast.unparse(n) for n in ast.walk(tree_of(module)) if isinstance(n, ast.Attribute)}
    assert not {name for name in touched if PRIVATE.match(name)}


@every_module
def test_a_module_imports_from_no_higher_floor(module):
    assert module.count(".") == 0 or ".".join(module.split(".")[:2]) in FLOORS, "give it a floor"
    higher = {name for name in rooms_imported_by(module) if floor_of(name) > floor_of(module)}
    assert not higher


def test_imports_make_no_circle():
    left = {module: rooms_imported_by(module) for module in MODULES}
    while free := [module for module, needed in left.items() if not needed & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_importing_grass_fx_loads_no_inductor():
    code = "import sys, torch; old = {*sys.modules}; import grass_fx; print(*{*sys.modules} - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "grass_fx.state.gradient" in loaded
    assert [name for name in loaded if name.startswith("torch._inductor")] == []


LIMITS = {
    **dict.fromkeys(SOURCES, 400),
    **dict.fromkeys(sorted(ROOT.glob("grass_fx/_torch_compat/*.py")), 300),
    **dict.fromkeys(sorted(ROOT.glob("tests/**/*.py")), 600),
    ROOT / "grass_fx/testing/reference.py": 150,
    ROOT / "examples/llama.py": 150,
    ROOT / "README.md": 140,
}


@pytest.mark.parametrize("path", LIMITS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LIMITS[path]


@every_module
def test_modules_and_what_they_offer_have_docstrings(module):
    tree = tree_of(module)
    offered = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    silent = [node.name for node in offered if ast.get_docstring(node) is None]
    assert ast.get_docstring(tree) is not None
    assert silent == []
