"""A checkpoint that grass_fx 0.1.0 saved goes on as it went on there, to rounding.

The file has what these four runs saved after 7 of 12 steps, and their weights after the last one.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import grass_fx

SAVED = torch.load(Path(__file__).parent / "data/checkpoint_0.1.0.pt", weights_only=True)

RUNS = {
    "AdamW": (
        lambda p: grass_fx.AdamW(p, lr=1e-2, weight_decay=0.1),
        {"rank": 4, "refresh_every": 3},
    ),
    "AdamW, drawn with replacement": (
        lambda p: grass_fx.AdamW(p, lr=1e-2),
        {"rank": 4, "refresh_every": 2, "selection": "multinomial_norm", "replacement": True},
    ),
    "SGD": (
        lambda p: grass_fx.subspace(torch.optim.SGD)(p, lr=1e-2, momentum=0.9),
        {"rank": 4, "refresh_every": 3, "side": "out"},
    ),
    "Adam": (
        lambda p: grass_fx.subspace(torch.optim.Adam)(p, lr=1e-2),
        {"rank": 2, "refresh_every": 4, "selection": "top"},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_loads_and_the_run_goes_on(name):
    (make, options), saved = RUNS[name], SAVED["cases"][name]
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).double()
    model.load_state_dict(saved["model"])
    compiled = torch.compile(model, backend="grass", options={**options, "compiler": "aot_eager"})
    optimizer = make(model.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    for x in SAVED["data"][7:]:
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, want in saved["after"].items():
        # That version decayed all rows in each step; here some decay is pending. A lost moment or
        # age would move a row by a part of lr = 1e-2.
        torch.testing.assert_close(model.state_dict()[key], want, rtol=5e-4, atol=5e-5)
        assert not torch.equal(want, saved["model"][key])
