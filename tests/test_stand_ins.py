"""What X sees in place of a taken weight, and how its rows are read and written."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import grass_fx
from grass_fx.optim.probe import Wrapped
from grass_fx.optim.rows import add_to_rows_, put_rows_, rows_of
from helpers import Captured, mlp

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_are_read_and_written_bit_by_bit(dtype, dim):
    matrix = torch.randn(12, 10).to(dtype)
    matrix[3, 4], matrix[5, 6] = torch.nan, -0.0
    for given in (matrix, matrix.t().contiguous().t()):
        indices = torch.tensor([6, 3, 4])
        rows = given.index_select(dim, indices)
        torch.testing.assert_close(rows_of(given, indices, dim), rows, equal_nan=True)
        wanted, written = given.clone(), given.clone()
        wanted.index_copy_(dim, indices, 2 * rows)
        put_rows_(written, indices, 2 * rows, dim)
        torch.testing.assert_close(written, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(written.signbit(), wanted.signbit())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [0, 1])
def test_changes_are_added_and_rounded_once(dtype, change_dtype, dim):
    matrix, indices = torch.randn(12, 10).to(dtype), torch.tensor([1, 7, 4])
    change = (torch.randn(matrix.index_select(dim, indices).shape) / 100).to(change_dtype)
    if dtype == torch.float64:
        change = change.double()
    wide = torch.promote_types(dtype, torch.float32)
    wanted = matrix.to(wide).index_add(dim, indices, change.to(wide)).to(dtype)
    add_to_rows_(matrix, indices, change, dim)
    torch.testing.assert_close(matrix, wanted, rtol=0, atol=0)


LOOKING = {"ASGD", "Adafactor", "Muon"}
BLIND = [
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


def ignores(wrapped, **options):
    group = wrapped([torch.nn.Parameter(torch.ones(2, 2))], **options).param_groups[0]
    return Wrapped(wrapped, (), {}, {}).ignores_weights(group)


@pytest.mark.parametrize("name", sorted({*BLIND, *LOOKING}))
def test_which_classes_of_torch_look_at_weights(name):
    """With L2 decay all of them do, and decoupled decay is not X's affair."""
    wrapped = getattr(torch.optim, name)
    assert ignores(wrapped) == (name in BLIND)
    if name not in ("AdamW", "Muon", "Rprop", *LOOKING):
        assert not ignores(wrapped, weight_decay=0.1)
    if name in ("Adam", "NAdam", "RAdam"):
        assert ignores(wrapped, weight_decay=0.1, decoupled_weight_decay=True)
    if name == "AdamW":
        assert ignores(wrapped, weight_decay=0.1, amsgrad=True)


SEEN = []


class Timid(torch.optim.SGD):
    """Looks at a weight only where it is large, which no step on small ones shows."""

    @torch.no_grad()
    def step(self, closure=None):
        weights = [p for group in self.param_groups for p in group["params"]]
        SEEN[:] = [p.clone() for p in weights]
        before = [p.clone() for p in weights]
        super().step()
        for p, old in zip(weights, before, strict=True):
            p.copy_(torch.where(old.abs() > 50, old, p))


def trained(make, steps=3, **options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mlp(8, 12, 8, bias=False)
    optimizer = make(model.parameters())
    compiled = torch.compile(model, backend=Captured(rank=4, **options))
    for _ in range(steps):
        optimizer.zero_grad()
        compiled(torch.ones(3, 8)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_a_class_of_somebody_else_sees_the_weight():
    model, optimizer = trained(lambda params: grass_fx.subspace(Timid)(params, lr=0.0))
    for p, seen in zip(model.parameters(), SEEN, strict=True):
        selected = p.detach().index_select(1, optimizer.state[p]["indices"])
        torch.testing.assert_close(seen, selected, rtol=0, atol=0)


class Named(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_step_of_adamw_touches_the_rows_once():
    """After the first steps; a class that looks at weights also reads them."""

    def calls(wrapped):
        settings = {"warmup_steps": 2, "weight_decay": 0.0}  # with decay rows are read, too
        _, optimizer = trained(lambda params: grass_fx.subspace(wrapped)(params, **settings))
        with Named() as seen:
            optimizer.step()
        rows = ("index_select", "gather", "index_copy_", "scatter_", "index_add_")
        return {n: c for n in rows if (c := sum(n == k.split("::")[1] for k in seen.names))}

    class Other(torch.optim.AdamW):
        pass

    assert calls(torch.optim.AdamW) == {"index_add_": 2}
    assert calls(Other) == {"index_select": 2, "scatter_": 2}


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("rule", ["uniform", "multinomial_norm"])
@pytest.mark.parametrize("warmup_steps", [0, 5])
def test_zeros_and_the_weight_itself_give_the_same_steps(side, rule, warmup_steps):
    """Also where rows differ in age."""

    class Other(torch.optim.AdamW):
        """Torch's, which grass does not know to ignore weights."""

    options = {"side": side, "selection": rule, "refresh_every": 2}
    found = []
    for wrapped in (torch.optim.AdamW, Other):

        def make(params, wrapped=wrapped):
            settings = {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": warmup_steps}
            return grass_fx.subspace(wrapped)(params, **settings)

        model, optimizer = trained(make, steps=9, **options)
        found.append(([*model.parameters()], [optimizer.state[p] for p in model.parameters()]))
    assert len(found[0][1][0]["age"].unique()) > 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
