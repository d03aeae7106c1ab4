"""Which optimizer classes step each part of a weight as they step the whole, as shards need."""

from functools import partial

import pytest
import torch
from test_wrap import Lion

import grass_fx
from grass_fx.optim import probe


class NormedSGD(torch.optim.SGD):
    """Divides by a norm over all its parameters, which each process would take of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        torch._foreach_div_(gradients, torch.nn.utils.get_total_norm(gradients))
        super().step()


class ClipSGD(torch.optim.SGD):
    """Clips the norm of each parameter's gradient, if it is large."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                torch.nn.utils.clip_grad_norm_(p, 10.0)
        super().step()


def steps_parts_alike(cls, **given):
    optimizer = grass_fx.subspace(cls)([torch.nn.Parameter(torch.ones(2, 2))], **given)
    return optimizer._x.ask(probe.steps_parts_alike, optimizer.param_groups[0])


ALIKE = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, amsgrad=True),
    "adam for graphs": partial(torch.optim.Adam, capturable=True),  # torch has it on GPUs alone
    "adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.1),
    "lion": partial(Lion),
    "rmsprop": partial(torch.optim.RMSprop, centered=True),
}
OTHERS = (torch.optim.Adafactor, torch.optim.Muon, NormedSGD, ClipSGD)


@pytest.mark.parametrize("name", ALIKE)
def test_elementwise_classes_do(name):
    assert steps_parts_alike(ALIKE[name].func, **ALIKE[name].keywords)


@pytest.mark.parametrize("cls", OTHERS)
def test_classes_that_mix_rows_do_not(cls):
    assert not steps_parts_alike(cls)
