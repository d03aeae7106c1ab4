"""torch.compile as people use it: with all rows selected grass trains as other backends do.

Three comparisons of each use: at r = n with the same use of the backend "aot_eager" (or Inductor),
at a low rank with the plain training of the same model, and the number of compact gradients. What
differs says why, where the use is defined; what torch alone cannot do is skipped, with its error.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import backward_uses  # noqa: F401, they add themselves to USES
import compile_uses  # noqa: F401
import grass_fx
from compile_world import USES, World
from grass_fx.backend import grass
from grass_fx.errors import GrassWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:no compact gradient"),
    pytest.mark.filterwarnings("ignore:grass took no weight"),
]

ALL_ROWS = {"rank": 8, "side": "auto", "refresh_every": 3}
FEW_ROWS = {"rank": 4, "refresh_every": 3}


def world(compiler, options=None):
    if options is None:
        how = {"backend": compiler}
        return World(how, torch.optim.AdamW, compiler).start()
    options = {"compiler": compiler, **options}
    force = functools.partial(grass, options=options)
    make = functools.partial(grass_fx.AdamW, warmup_steps=0)
    return World({"backend": "grass", "options": options}, make, force).start()


def outcome(use, w):
    """Its losses, or what it raises."""
    try:
        return use.run(w)
    except Exception as error:
        return error


def compare(name, compiler):
    use = USES[name]
    want = outcome(use, world(compiler))
    if isinstance(want, Exception):
        pytest.skip(f"torch alone: {type(want).__name__}: {want}")
    everything = world(compiler, ALL_ROWS)
    if use.warns:
        with pytest.warns(GrassWarning, match=use.warns):
            got = use.run(everything)
    else:
        got = use.run(everything)
    close = {"rtol": use.rounding, "atol": 0}
    if use.differs:
        with pytest.raises(AssertionError, match="not close"):
            torch.testing.assert_close(got, want, **close)
    else:
        torch.testing.assert_close(got, want, **close)
    assert max(everything.compact) == use.compact, use.why
    assert use.why or use.compact == min(everything.compact) == 4
    if use.plain:
        losses = use.run(world(compiler, FEW_ROWS))
        torch.testing.assert_close(losses, plain(compiler)[: len(losses)], rtol=1e-10, atol=0)


@functools.cache
def plain(compiler):
    w = world(compiler, FEW_ROWS)
    return w.train(w.compile())


def uses(wanted):
    return pytest.mark.parametrize("name", [n for n, use in USES.items() if wanted(use)])


@uses(lambda use: use.quick)
def test_use_without_inductor(name):
    compare(name, "aot_eager")


@pytest.mark.slow
@uses(lambda use: True)
def test_use_with_inductor(name):
    compare(name, "inductor")


def saving(path):
    """Train and save what was compiled; in a process of its own."""
    w = world("inductor", FEW_ROWS)
    losses = w.train(w.compile())
    Path(path).write_bytes(torch.compiler.save_cache_artifacts()[0])
    return losses, 0


def loading(path):
    torch.compiler.load_cache_artifacts(Path(path).read_bytes())
    w = world("inductor", FEW_ROWS)
    losses = w.train(w.compile())
    return losses, torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]


@pytest.mark.slow
def test_saved_cache_artifacts_compile_nothing_elsewhere(tmp_path):
    found = []
    for act in (saving, loading):
        name = act.__name__
        command = f"import json, test_compile_uses as t; print(json.dumps(t.{name}('saved')))"
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name)}
        path = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", command],
            env={**env, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    (losses, _), (again, hits) = found
    assert again == losses and hits == 1
