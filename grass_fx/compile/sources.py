"""The version of what generates code: caches on disk must not outlive a change of it."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


@cache
def source_hash() -> str:
    """A hash of every source file of the package, and of torch's version."""
    passes = find_spec("grass_fx.passes")  # beside the package in a checkout, in it when installed
    folders = [] if passes is None else passes.submodule_search_locations or []
    files = {file for folder in folders for file in Path(folder).glob("*.py")}
    for pattern in ("*.py", "*.jinja"):
        files.update(Path(__file__).parents[1].rglob(pattern))
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
