"""The checks that torch makes of its own optimizers, made of ours.

Torch is installed without its tests, so they are written anew, after its test_optim: each runs on
``grass_fx.subspace(X)`` for every class X of torch.optim, and on ``grass_fx.AdamW``, once with
parameters that train dense and once with weights that a compiled model moves in their subspace. X
itself is the control: what it fails is skipped, with its error as the reason.
"""

import pytest
import torch

from optimizer_checks import CHECKS, OURS, Case
from optimizer_database import REFUSED, SOME, every, names, ours, some

pytestmark = pytest.mark.filterwarnings("ignore:no compact gradient")


@pytest.fixture(autouse=True, scope="module")
def _fresh():
    """In place of the one for every test: all models here share their compiled code."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cases():
    found = []
    for name in [*SOME, OURS]:
        for kind in ("dense", "compact"):
            for each in CHECKS:
                found.append((each, name, kind))
    return pytest.mark.parametrize(("each", "name", "kind"), found)


def options_of(name, configurations):
    """Those of the class, without what grass_fx.AdamW refuses."""
    return ours(configurations("AdamW")) if name == OURS else configurations(name)


def run(each, name, kind, configurations):
    failed_by_torch = []
    for options in options_of(name, configurations):
        try:
            CHECKS[each](Case(name, options, kind))
        except Exception as error:
            try:
                CHECKS[each](Case(name, options, "torch"))
            except Exception as control:
                failed_by_torch.append(f"{options}: {type(control).__name__}: {control}")
            else:
                raise AssertionError(f"{name}(**{options}), {kind}: {error}") from error
    if failed_by_torch:
        pytest.skip(f"torch's own {name}, {each}: " + "; ".join(failed_by_torch))


@cases()
def test_check_of_some_configurations(each, name, kind):
    run(each, name, kind, some)


@pytest.mark.slow
@cases()
def test_check_of_every_configuration(each, name, kind):
    run(each, name, kind, every)


@pytest.mark.slow
def test_every_class_of_the_database_is_checked_or_refused():
    assert names() == sorted([*SOME, *REFUSED])
