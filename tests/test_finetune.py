"""examples/finetune.py: what is frozen, what grass takes, what trains dense, and that it learns."""

import sys
from dataclasses import replace

import pytest
import torch

import data
import finetune
import grass_fx
import pretrain

SMALL = {"size": "tiny", "steps": 20, "batch": 4, "seq": 32, "compiler": "aot_eager"}
SETTINGS = replace(finetune.DEFAULTS, **SMALL, eval_every=10, refresh_every=5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights that pretrain.py --save writes, of a model trained on a folder."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "text").mkdir()
    (folder / "text" / "old.txt").write_text("the old text says this over and over\n" * 40)
    (folder / "text" / "no_text").write_bytes(b"\0" * 999)
    flags = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]
    flags += ["--data", str(folder / "text"), "--save", str(folder / "saved" / "tiny.pt")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *flags])
        pretrain.main()
    assert b"\0" not in bytes(data.load(folder / "text").train.tolist())
    return torch.load(folder / "saved" / "tiny.pt")["model"]


def test_every_parameter_trains_as_it_was_told(weights):
    corpus = data.language_reference()
    parts = model, _, optimizer = finetune.continued(
        SETTINGS, weights, finetune.INCLUDE, finetune.FREEZE
    )
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    before = finetune.losses(model, {"new": corpus}, SETTINGS)
    pretrain.train(SETTINGS, corpus, parts=parts)
    after = finetune.losses(model, {"new": corpus}, SETTINGS)
    assert after["new"] < before["new"] - 0.1

    for name, p in model.named_parameters():
        frozen = name.startswith(("embed", "layers.0."))
        assert (p.grad is None) == frozen
        assert torch.equal(p, weights[name]) == frozen
        taken = not frozen and p.dim() == 2 and name != "head.weight"
        assert isinstance(p.grad, grass_fx.CompactGrad) == taken
    counted = finetune.counts(model)
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())
    held = pretrain.bytes_held(list(model.parameters()), optimizer)
    assert 3 * (held["gradients"] + held["state"]) < 1.1 * finetune.bytes_of_full_adamw(model)


def test_a_pattern_that_matches_nothing_is_refused(weights):
    with pytest.raises(SystemExit, match="no parameter matches 'mlp'"):
        finetune.continued(SETTINGS, weights, ["mlp"], [])
