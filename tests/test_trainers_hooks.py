"""What hooks, loggers and filters of gradients do between backward and step (docs/trainers.md)."""

import copy

import pytest
import torch
from test_trainers import CYCLIC, RANK, Net, adamw, fresh

import grass_fx

DECAY, STRENGTH, STEPS = 0.9, 2.0, 6


def compiled(**options):
    net = fresh(Net)
    net.compile(backend="grass", options={**CYCLIC, **options})
    return net, adamw(net.named_parameters())


def backward(net, x):
    net(x).square().mean().backward()


def batches():
    return torch.randn(STEPS, 4, 16, generator=torch.Generator().manual_seed(1))


def selection_of(grad):
    return grad.selection.generation if isinstance(grad, grass_fx.CompactGrad) else None


def test_a_moving_average_that_starts_anew_with_the_selection_is_that_of_full_gradients():
    """Grokfast on compact gradients, and on an eager twin's full ones, compared where selected."""
    net, optimizer = compiled()
    averages, full, starts = {}, {}, 0
    for x in batches():
        twin = copy.deepcopy(net)  # a copy is not compiled
        for each in (net, twin):
            each.zero_grad()
            backward(each, x)
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            if name not in averages or averages[name][0] != selection_of(p.grad):
                starts += 1
                averages[name], full[name] = (selection_of(p.grad), p.grad.clone()), q.grad.clone()
            average = averages[name][1].mul_(DECAY).add_(p.grad, alpha=1 - DECAY)
            full[name].lerp_(q.grad, 1 - DECAY)
            p.grad.add_(average, alpha=STRENGTH)
            got, want = p.grad, q.grad + STRENGTH * full[name]
            if isinstance(got, grass_fx.CompactGrad):
                got, want = got.compact, got.selection.project(want)
            torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")
        optimizer.step()
    assert starts == 6 + 2 * (STEPS // 2 - 1)  # parameters, and weights whose selection changed


def test_hooks_get_the_gradient_that_the_optimizer_gets():
    net, _ = compiled()
    seen, weight = [], net.up.weight

    def hook(grad):
        seen.append(type(grad))
        return grad * 0.5

    backward(net, batches()[0])
    whole = weight.grad.compact.clone()
    weight.grad = None
    weight.register_hook(hook)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(type(p.grad)))
    backward(net, batches()[0])
    assert seen == [grass_fx.CompactGrad] * 2
    torch.testing.assert_close(weight.grad.compact, whole / 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.add_(torch.ones_like(rows), alpha=0.1),
        lambda rows: rows.sign_(),
        lambda rows: rows.sub_(rows.mean(1, keepdim=True)),
    ],
    ids=["noise", "signs", "centred"],
)
def test_what_is_done_to_the_selected_rows_is_stepped_with(change):
    net, _ = compiled()
    weight = net.up.weight
    optimizer = grass_fx.subspace(torch.optim.SGD)(net.named_parameters(), lr=1.0, warmup_steps=0)
    backward(net, batches()[0])
    before, grad = weight.detach().clone(), weight.grad
    rows = change(grad.compact.clone())
    change(grad.compact)
    optimizer.step()
    moved = before - weight.detach()
    torch.testing.assert_close(moved[:, grad.selection.indices], rows)
    assert int((moved != 0).any(0).sum()) == RANK


def test_histograms_of_the_selected_rows_in_tensorboard(tmp_path):
    writers = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    net, _ = compiled()
    backward(net, batches()[0])
    with writers.SummaryWriter(tmp_path) as writer:
        writer.add_histogram("up", net.up.weight.grad.compact, 0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Histograms("up")[0].histogram_value.num == 32 * RANK
