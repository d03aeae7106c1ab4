"""The version of the sources that generate code, so that caches on disk notice a change."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


@cache
def source_hash() -> str:
    """A hash of all source files of the package and of torch's version."""
    passes = find_spec("grass_fx.passes")  # in a checkout this folder is outside of the package
    folders = [] if passes is None else passes.submodule_search_locations or []
    files = {file for folder in folders for file in Path(folder).glob("*.py")}
    for pattern in ("*.py", "*.jinja"):
        files.update(Path(__file__).parents[1].rglob(pattern))
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
