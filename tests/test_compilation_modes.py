"""What happens between two steps and around a compiled function: modes, losses, mistakes."""

import copy
import fnmatch

import pytest
import torch
import torch.nn.functional as F
from test_compilation import (
    RULES,
    SUBSPACE,
    Stack,
    check,
    close,
    matrices,
    pushed,
    step_both,
    tokens,
)
from torch import nn
from torch.autograd.function import once_differentiable

import grass_fx
from grass_fx.compile.runtime import GrassCallable
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.registry import registry
from helpers import Captured, mlp
from other_functions import Linear


def batch(tokens=4, features=8):
    return torch.randn(tokens, features, dtype=torch.float64)


def made(model, **options):
    """A model in float64, its copy, the backend, the compiled model, and an optimizer."""
    model = model.double()
    backend = Captured(**SUBSPACE, **options)
    compiled = torch.compile(model, backend=backend)
    return model, copy.deepcopy(model), backend, compiled, grass_fx.AdamW(model.parameters())


# --- training and evaluation ----------------------------------------------------------------------


def dropping():
    layers = list(mlp(8, 12, 6))
    return nn.Sequential(*layers[:2], nn.Dropout(0.5), *layers[2:])


def train_step(optimizer, compiled, model, twin):
    """A step that drops at random, and so cannot be compared; the twin gets its result."""
    model.train()
    optimizer.zero_grad()
    compiled(batch()).square().mean().backward()
    assert all(isinstance(model[k].weight.grad, CompactGrad) for k in (0, 3))
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    model.eval()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("rule", RULES)
def test_evaluation_between_training_steps(context, rule):
    model, twin, backend, compiled, optimizer = made(dropping(), selection=rule)
    twin.eval()
    for _ in range(4):
        train_step(optimizer, compiled, model, twin)
        before = [registry.get(model[k].weight).selection for k in (0, 3)]
        with context():
            x = batch()
            close(compiled(x), twin(x))
        after = [registry.get(model[k].weight).selection for k in (0, 3)]
        assert all(a is b for a, b in zip(after, before, strict=True))
    # One graph for each mode. What can train has taken weights, even if nobody wants gradients.
    assert len(backend.graphs) == 2
    assert len(pushed(backend)) == (2 if context is torch.enable_grad else 1)


@pytest.mark.parametrize("rule", RULES)
def test_training_in_evaluation_mode_uses_the_same_subspaces(rule):
    model, twin, backend, compiled, optimizer = made(dropping(), selection=rule)
    twin.eval()
    for _ in range(3):
        train_step(optimizer, compiled, model, twin)
        used = registry.get(model[0].weight).selection
        assert step_both(optimizer, compiled, model, twin, batch()) == matrices(model)
        assert model[0].weight.grad.selection is used
    assert len(pushed(backend)) == len(backend.graphs) == 2


@pytest.mark.slow
def test_what_dropout_drops_is_what_plain_inductor_drops():
    model, twin, _, compiled, optimizer = made(dropping(), compiler="inductor")
    plain = torch.compile(twin)
    for _ in range(3):
        optimizer.zero_grad()
        twin.zero_grad()
        x = batch()
        for it in (compiled, plain):
            torch.manual_seed(1)
            it(x).square().mean().backward()
        assert check(model, twin) == matrices(model)
        optimizer.step()
        twin.load_state_dict(model.state_dict())


# --- frozen and unfrozen --------------------------------------------------------------------------


unnoticed = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch.compile does not notice that a parameter is thawed"
)


@unnoticed
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("frozen", ["0", "2", "4", "0 2 4"])
def test_layers_frozen_and_unfrozen_between_steps(frozen, rule):
    model, twin, backend, compiled, optimizer = made(mlp(8, 12, 12, 6), selection=rule)
    everything = matrices(model)
    for step in range(9):
        freezes = 3 <= step < 6
        for it in (model, twin):
            for k in frozen.split():
                it.get_submodule(k).weight.requires_grad_(not freezes)
        held = [model.get_submodule(k).weight.detach().clone() for k in frozen.split()]
        compact = step_both(optimizer, compiled, model, twin, batch())
        trained = [n for n in everything if not (freezes and n.split(".")[0] in frozen)]
        assert compact == trained
        for k, before in zip(frozen.split(), held, strict=True):
            weight = model.get_submodule(k).weight
            assert torch.equal(weight, before) == freezes
            assert (weight.grad is None) == freezes
    # The third phase finds the graph of the first one.
    assert len(backend.graphs) == 2 and pushed(backend)[0] == everything


@unnoticed
def test_unfreezing_whole_layers_one_by_one():
    """From the last one on, as in fine-tuning."""
    model, twin, backend, compiled, optimizer = made(mlp(8, 12, 12, 6))
    order = ["4", "2", "0"]
    for step in range(6):
        for it in (model, twin):
            for place, k in enumerate(order):
                it.get_submodule(k).requires_grad_(place <= step // 2)
        trained = sorted(f"{k}.weight" for k in order[: step // 2 + 1])
        assert step_both(optimizer, compiled, model, twin, batch()) == trained
    assert [len(names) for names in pushed(backend)] == [1, 2, 3]


# --- autograd functions of the user ---------------------------------------------------------------


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class WithFunctions(nn.Module):
    """Functions of the user between linear layers, and where ``at`` says."""

    def __init__(self, at):
        super().__init__()
        self.first, self.last, self.at = nn.Linear(8, 12), nn.Linear(12, 6, bias=False), at

    def forward(self, x):
        if "before" in self.at:
            x = Cubed.apply(x)
        x = torch.sin(self.first(x))
        if "between" in self.at:
            x = Cubed.apply(x)
        x = self.last(x)
        return Cubed.apply(x) if "after" in self.at else x


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("at", [["before"], ["between"], ["after"], ["before", "between", "after"]])
def test_functions_of_the_user_inside_the_region(at, rule):
    model, twin, backend, compiled, optimizer = made(WithFunctions(at), selection=rule)
    for _ in range(3):
        assert step_both(optimizer, compiled, model, twin, batch()) == matrices(model)
    assert pushed(backend) == [["first.weight", "last.weight"]]


def test_functions_of_the_user_around_the_region():
    model, twin, backend, compiled, optimizer = made(WithFunctions(["between"]))

    def around(it):
        return lambda x: Cubed.apply(it(Cubed.apply(x)))

    for _ in range(3):
        optimizer.zero_grad()
        twin.zero_grad()
        inputs = [batch().requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        for it, x in zip((compiled, twin), inputs, strict=True):
            around(it)(x).square().mean().backward()
        close(inputs[0].grad, inputs[1].grad)
        assert check(model, twin) == matrices(model)
        optimizer.step()
        twin.load_state_dict(model.state_dict())
    assert len(pushed(backend)) == 1


def test_a_weight_inside_a_function_of_the_user_trains_compact():
    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.w = nn.Linear(8, 12), nn.Parameter(torch.randn(6, 12))

        def forward(self, x):
            return Linear.apply(torch.tanh(self.first(x)), self.w)

    model, twin, backend, compiled, optimizer = made(ByHand())
    for _ in range(3):
        assert step_both(optimizer, compiled, model, twin, batch()) == ["w", "first.weight"]
    assert not backend.only.found.left and pushed(backend) == [["first.weight", "w"]]


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_function_that_returns_the_loss(rule):
    model, backend = Stack().double(), Captured(selection=rule, **SUBSPACE)
    twin = copy.deepcopy(model)
    optimizer = grass_fx.AdamW(model.parameters())

    def loss_of(it, ids):
        return F.cross_entropy(it(ids).flatten(0, 1), ids.flatten() % 6)

    @torch.compile(backend=backend, fullgraph=True)
    def compiled_loss(ids):
        return loss_of(model, ids)

    for _ in range(4):
        optimizer.zero_grad()
        twin.zero_grad()
        ids = tokens()
        compiled_loss(ids).backward()
        loss_of(twin, ids).backward()
        assert check(model, twin) == matrices(model)
        optimizer.step()
        twin.load_state_dict(model.state_dict())
    assert len(backend.graphs) == 1 and len(pushed(backend)[0]) == 7


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.left, self.right = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(12, 4)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return self.left(x).square().mean(), self.right(x).exp().mean()


def one_after_the_other(left, right):
    left.backward(retain_graph=True)
    right.backward()


def together(left, right):
    torch.autograd.backward([left, right])


def only_the_first(left, right):
    left.backward()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "backward", [one_after_the_other, together, only_the_first], ids=lambda b: b.__name__
)
def test_several_losses_of_one_forward(backward, rule):
    model, twin, backend, compiled, optimizer = made(TwoHeads(), selection=rule)
    with torch._functorch.config.patch(donated_buffer=False):
        for _ in range(4):
            optimizer.zero_grad()
            twin.zero_grad()
            x = batch()
            backward(*compiled(x))
            backward(*twin(x))
            if backward is only_the_first:  # the graph returns zeros where autograd returns nothing
                assert not model.right.weight.grad.to_dense().any()
                assert not model.right.bias.grad.any() and twin.right.bias.grad is None
                twin.right.weight.grad = torch.zeros_like(twin.right.weight)
                twin.right.bias.grad = torch.zeros_like(twin.right.bias)
            assert check(model, twin) == matrices(model)
            optimizer.step()
            twin.load_state_dict(model.state_dict())
    assert pushed(backend) == [matrices(model)]


def test_autograd_grad_of_weights_is_compact_and_leaves_no_gradient():
    model, twin, _, compiled, optimizer = made(mlp(8, 12, 6))
    x = batch()
    got = torch.autograd.grad(compiled(x).square().mean(), list(model.parameters()))
    want = torch.autograd.grad(twin(x).square().mean(), list(twin.parameters()))
    assert all(p.grad is None for p in model.parameters())
    for p, q, grad, full in zip(model.parameters(), twin.parameters(), got, want, strict=True):
        assert isinstance(grad, CompactGrad) == (p.dim() == 2)
        p.grad, q.grad = grad, full
    assert check(model, twin) == matrices(model)
    optimizer.step()  # as if backward had put them there
    assert "indices" in optimizer.state[model[0].weight]


def weight_penalty(model, y, x):
    return torch.autograd.grad(y, model[0].weight, create_graph=True)[0].norm()


def input_penalty(model, y, x):
    return torch.autograd.grad(y, x, create_graph=True)[0].norm()


@pytest.mark.parametrize("penalty", [weight_penalty, input_penalty], ids=lambda p: p.__name__)
def test_double_backward_is_an_error_and_not_a_wrong_gradient(penalty):
    model, _, _, compiled, _ = made(mlp(8, 12, 6))
    x = batch().requires_grad_()
    with torch._functorch.config.patch(donated_buffer=False):
        loss = compiled(x).square().mean()
        with pytest.raises(RuntimeError, match=r"double backward|differentiated once"):
            penalty(model, loss, x).backward()


# --- one model in several functions ---------------------------------------------------------------


def test_two_compilations_of_one_model_share_its_subspaces():
    model, twin, first, compiled, optimizer = made(mlp(8, 12, 6))
    second = Captured(**SUBSPACE)
    again = torch.compile(model, backend=second)
    for _ in range(4):
        optimizer.zero_grad()
        twin.zero_grad()
        one, other = batch(), batch()
        (compiled(one).square().mean() + again(other).square().mean()).backward()
        (twin(one).square().mean() + twin(other).square().mean()).backward()
        assert check(model, twin) == matrices(model)
        optimizer.step()
        twin.load_state_dict(model.state_dict())
    assert pushed(first) == pushed(second) == [["0.weight", "2.weight"]]


class Encoder(nn.Module):
    """A compiled body whose one layer is also called from outside."""

    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(8, 12, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.filterwarnings("ignore:.*its gradient came dense.*it was projected")
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("eager_first", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_submodule_compiled_and_eager_in_one_step(passes, eager_first, started):
    """In whatever order its gradients arrive, the weight moves in its selected rows, by both."""
    model, twin, backend, compiled, _ = made(Encoder())
    optimizer = grass_fx.AdamW(model.parameters(), weight_decay=0.0)
    if started:
        step_both(optimizer, compiled, model, twin, batch())

    def losses(whole, body, x):
        terms = [lambda: whole(x).square().mean(), lambda: body(x.sin()).square().mean()]
        return terms[::-1] if eager_first else terms

    for _ in range(3):
        optimizer.zero_grad()
        twin.zero_grad()
        x = batch()
        for whole, it in ((compiled, model), (twin, twin)):
            terms = losses(whole, it.body, x)
            if passes == 1:
                sum(term() for term in terms).backward()
            else:
                for term in terms:
                    term().backward()
        weight, full = model.body[0].weight, twin.body[0].weight.grad
        selection = registry.get(weight).selection
        grad = weight.grad
        compact = grad.compact if isinstance(grad, CompactGrad) else selection.project(grad)
        close(compact, selection.project(full))
        before = weight.detach().clone()
        optimizer.step()
        moved = (weight.detach() - before).abs().amax(1 - selection.dim) > 0
        assert moved.nonzero().flatten().tolist() == selection.indices.tolist()
        twin.load_state_dict(model.state_dict())
    assert len(pushed(backend)) == 1


# --- mistakes and exceptions ----------------------------------------------------------------------


class Refused(Exception):
    pass


@pytest.mark.parametrize("rule", RULES)
def test_a_forward_without_a_backward_leaves_nothing_behind(rule):
    model, twin, backend, compiled, optimizer = made(mlp(8, 12, 6), selection=rule)
    for _ in range(4):
        forgotten = compiled(batch()).square().mean()
        assert step_both(optimizer, compiled, model, twin, batch()) == matrices(model)
        del forgotten
    assert len(backend.graphs) == 1 and pushed(backend)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ["body", "input"])
def test_a_step_after_a_backward_that_raised(where, rule):
    """Where hooks of the user raise: before the compiled backward runs, and after it."""
    model, twin, backend, compiled, optimizer = made(mlp(8, 12, 6), selection=rule)

    def refuse(grad):
        raise Refused

    for _ in range(4):
        x = batch().requires_grad_()
        y = compiled(x)
        handle = (y if where == "body" else x).register_hook(refuse)
        with pytest.raises(Refused):
            y.square().mean().backward()
        handle.remove()
        assert step_both(optimizer, compiled, model, twin, batch()) == matrices(model)
    # A second graph only because the inputs of the failing calls need gradients.
    assert len(backend.graphs) == len(pushed(backend)) == 2


def test_a_backward_repeated_after_an_exception():
    """The graph of the failed backward is still there: what stood in the way is gone."""
    model, twin, _, compiled, _ = made(mlp(8, 12, 6))
    x, failing = batch(), [True]

    def refuse_once(grad):
        if failing.pop():
            raise Refused

    y, want = compiled(x), twin(x)
    y.register_hook(lambda grad: refuse_once(grad) if failing else None)
    loss = y.square().mean()
    with pytest.raises(Refused):
        loss.backward(retain_graph=True)
    loss.backward()
    want.square().mean().backward()
    assert check(model, twin) == matrices(model)


def test_a_forward_that_raises_half_way():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.moody = nn.Linear(8, 12), nn.Linear(12, 6), False

        def forward(self, x):
            x = torch.tanh(self.first(x))
            self.check()
            return self.last(x)

        @torch._dynamo.disable  # Dynamo gives up for good on a frame that raises while it traces
        def check(self):
            if self.moody:
                raise Refused

    model, twin, backend, compiled, optimizer = made(Moody())
    for _ in range(3):
        model.moody = True
        with pytest.raises(Refused):
            compiled(batch())
        model.moody = False
        assert step_both(optimizer, compiled, model, twin, batch()) == matrices(model)
    trained = [g.found.taken for g in backend.graphs if isinstance(g, GrassCallable)]
    assert [weight.name for taken in trained for weight in taken] == matrices(model)


class Block(nn.Module):
    """Of a class of its own: torch compiles no frame of nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Blocks(nn.Module):
    """With a graph break after each block: torch compiles them one by one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            torch._dynamo.graph_break()
        return x


class Delegating(nn.Module):
    """As adapters' wrappers are: what it does not have it looks for in what it wraps."""

    def __init__(self):
        super().__init__()
        self.base = Block()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize(
    ("make", "pattern"),
    [(Blocks, "blocks.1.up.*"), (Delegating, "base.up.*"), (Blocks, "*.up.weight")],
)
def test_weights_are_excluded_by_the_names_that_the_model_gives_them(make, pattern):
    model = make()
    optimizer = grass_fx.AdamW(model.named_parameters())
    compiled = torch.compile(model, backend=Captured(rank=4, exclude=[pattern]))
    compiled(torch.randn(3, 8)).sum().backward()
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert isinstance(p.grad, CompactGrad) != fnmatch.fnmatchcase(name, pattern), name
    optimizer.step()
