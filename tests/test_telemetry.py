"""Telemetry against the same numbers recomputed by hand, and the picture."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import grass_fx
from grass_fx.errors import MissingPackageError, OptionError
from grass_fx.state.gradient import CompactGrad
from grass_fx.state.history import BINS, SelectionHistory
from grass_fx.state.registry import registry
from grass_fx.state.selection import matrix
from helpers import Captured, mlp

K, STEPS = 3, 9
ROOT = Path(__file__).resolve().parent.parent


class Stack(nn.Module):
    """Three matrices of 12 rows, and one after them."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 12) / 3)
        self.last = nn.Linear(12, 8)

    def forward(self, x):
        return self.last((x @ self.stack).mean(0).tanh())


class Diary:
    """Trains, and writes down each step's selections, scores and changes, and reads the stats."""

    def __init__(self, model, make=grass_fx.AdamW, optimizer=(), **options):
        self.model, self.options = model, options
        self.compiled = torch.compile(model, backend=Captured(refresh_every=K, **options))
        self.optimizer = make(model.named_parameters(), lr=1e-2, weight_decay=0, **dict(optimizer))
        self.done = 0
        self.used: dict[str, list] = {}  # the selection of each step, and of the next
        self.scores: dict[str, torch.Tensor] = {}
        self.moved: dict[str, float] = {}

    def step(self):
        gen = torch.Generator().manual_seed(self.done)
        self.optimizer.zero_grad()
        self.compiled(torch.randn(5, 6, generator=gen)).square().sum().backward()
        taken = {n: p for n, p in self.model.named_parameters() if isinstance(p.grad, CompactGrad)}
        before = {name: p.detach().clone() for name, p in taken.items()}
        for name, p in taken.items():
            if not self.used.get(name):
                self.used[name] = [p.grad.selection]
            assert p.grad.selection.indices is self.used[name][-1].indices
            if p.grad.scores is not None:
                self.scores[name] = p.grad.scores
        self.optimizer.step()
        self.done += 1
        for name, p in taken.items():
            self.used[name].append(registry.get(p).selection)
            self.moved[name] = (p.detach() - before[name]).norm().item()
        return taken

    def expected(self, name, p):
        """The metrics of a weight, from what was written down since ``self.used`` begins."""
        periods = [self.used[name][0]]
        for selection in self.used[name]:
            if selection.generation != periods[-1].generation:
                periods.append(selection)
        rows = [{*s.indices.tolist()} for s in periods]
        size = matrix(p).shape[periods[0].dim]
        age = sum(s.generation == periods[-1].generation for s in self.used[name]) - 1
        values = {"age": age, "coverage": len(set.union(*rows)) / size}
        if len(rows) > 1:
            values["overlap"] = len(rows[-1] & rows[-2]) / len(rows[-1])
        if name in self.scores:
            scores = self.scores[name].double()
            values["captured"] = (scores[[*rows[-1]]].sum() / scores.sum()).sqrt().item()
        return values


def check(diary, taken, norms=True):
    stats = diary.optimizer.stats()
    assert stats.keys() == taken.keys()
    for name, p in taken.items():
        assert all(type(value) is float for value in stats[name].values())
        measured = stats[name].pop("update_norm", None)
        assert stats[name] == pytest.approx(diary.expected(name, p), rel=1e-6)
        if norms:
            assert measured == pytest.approx(diary.moved[name], rel=1e-3) and measured > 0
        else:
            assert measured is None


CASES = {
    "cyclic": {"selection": "cyclic"},
    "blocks": {"selection": "cyclic", "block": 2},
    "side in": {"selection": "top", "side": "in"},
    "top": {"selection": "top", "side": "out"},
    "frozen": {"selection": "frozen_top"},
    "norms": {"selection": "multinomial_norm"},
    "replacement": {"selection": "multinomial_norm", "replacement": True, "side": "out"},
    "replacement, blocks": {"selection": "multinomial_norm", "replacement": True, "block": 2},
}


@pytest.mark.parametrize("model", [lambda: mlp(6, 20, 8), Stack], ids=["matrices", "stack"])
@pytest.mark.parametrize("case", CASES)
def test_every_metric_is_what_a_diary_says(case, model):
    diary = Diary(model(), rank=4, **CASES[case], optimizer={"scale": 0.5, "warmup_steps": 4})
    assert diary.optimizer.stats() == {}
    for _ in range(STEPS):
        taken = diary.step()
        assert len(taken) == 2
        check(diary, taken)


def test_before_the_first_step_the_selection_is_known_and_no_more():
    diary = Diary(mlp(6, 20, 8), rank=5, side="out", exclude=["2.*"])
    diary.compiled(torch.randn(5, 6)).sum().backward()
    assert diary.optimizer.stats() == {"0.weight": {"age": 0, "coverage": 5 / 20}}


def test_dense_parameters_are_not_told_of():
    diary = Diary(mlp(6, 20, 8), rank=4, exclude=["*"])
    with pytest.warns(grass_fx.GrassWarning):
        diary.step()
    assert diary.optimizer.stats() == {}


def test_the_norm_is_of_the_rates_that_the_step_used():
    diary = Diary(mlp(6, 20, 8), rank=4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(diary.optimizer, 0.5)
    for _ in range(K + 1):
        taken = diary.step()
        schedule.step()
        check(diary, taken)


def test_the_norm_of_a_step_at_rate_zero_is_zero():
    diary = Diary(mlp(6, 20, 8), rank=4)
    diary.optimizer.param_groups[0]["lr"] = 0.0
    diary.step()
    assert diary.optimizer.stats()["0.weight"]["update_norm"] == 0


def test_the_norm_in_bfloat16_is_right_to_rounding():
    diary = Diary(mlp(6, 20, 8).to(torch.bfloat16), rank=4)
    for weight in diary.model.parameters():
        weight.data.mul_(1e-3)  # so that rounding the sum changes little
    for step in range(3):
        gen = torch.Generator().manual_seed(step)
        before = diary.model[0].weight.detach().float()
        diary.optimizer.zero_grad()
        x = torch.randn(5, 6, generator=gen).to(torch.bfloat16)
        (diary.compiled(x) - 1).square().sum().backward()
        diary.optimizer.step()
        moved = (diary.model[0].weight.detach().float() - before).norm().item()
        assert diary.optimizer.stats()["0.weight"]["update_norm"] == pytest.approx(moved, rel=2e-2)


def test_other_optimizers_tell_all_but_the_norm():
    make = grass_fx.subspace(torch.optim.SGD)
    diary = Diary(mlp(6, 20, 8), make, rank=4, selection="top")
    for _ in range(STEPS):
        check(diary, diary.step(), norms=False)


def test_weights_of_one_name_are_told_apart():
    """Layers compiled one by one, and an optimizer that knows no names."""
    one, two = (mlp(6, 6, bias=False) for _ in range(2))
    optimizer = grass_fx.AdamW([*one.parameters(), *two.parameters()])
    for model in (one, two):
        torch.compile(model, backend=Captured(rank=2))(torch.randn(3, 6)).sum().backward()
    assert [*optimizer.stats()] == ["0.weight", "0.weight (1)"]


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False], ids=["loaded before", "loaded after a forward"])
def test_a_resumed_run_tells_what_the_whole_run_tells(early, tmp_path):
    whole = Diary(mlp(6, 20, 8), rank=4, selection="multinomial_norm")
    for _ in range(5):
        whole.step()
    saved = {"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = Diary(mlp(6, 20, 8), rank=4, selection="multinomial_norm")
    if not early:
        resumed.step()
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    again = resumed.optimizer.state_dict()["selection_history"]  # before a graph has used them too
    for key, tensors in saved["optimizer"]["selection_history"].items():
        assert all(torch.equal(again[key][name], value) for name, value in tensors.items())
    resumed.done, resumed.used = whole.done, {}
    for _ in range(4):
        whole.step()
        resumed.step()
        assert resumed.optimizer.stats() == whole.optimizer.stats()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
        if (subspace := registry.get(a)) is not None:
            pictures = [s.history.picture(s.step) for s in (subspace, registry.get(b))]
            assert torch.equal(pictures[0][0], pictures[1][0])


def test_a_checkpoint_without_history_starts_it_anew():
    whole, resumed = (Diary(mlp(6, 20, 8), rank=4) for _ in range(2))
    for _ in range(5):
        whole.step()
    saved = whole.optimizer.state_dict()
    assert not any(k.startswith("history") for s in saved["state"].values() for k in s)
    del saved["selection_history"]
    resumed.step()
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(saved)
    assert "update_norm" not in resumed.optimizer.stats()["0.weight"]
    resumed.done = whole.done
    resumed.used = {}
    for _ in range(4):
        whole.step()
        check(resumed, resumed.step())
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- the history ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, BINS, 3 * BINS + 17])
@pytest.mark.parametrize("lengths", [[1] * 300, [300, 1, 2, 900, 7], [100000, 3], [BINS], [0]])
def test_the_picture_has_all_steps_and_stays_small(rows, lengths):
    """Means over bins, against a table of every step."""
    gen, history, step = torch.Generator().manual_seed(0), SelectionHistory(rows), 0
    densities, bins = [], min(rows, BINS)
    place = torch.arange(rows) * bins // rows
    sizes = place.bincount(minlength=bins)
    for length in lengths:
        chosen = torch.randint(rows, (max(1, rows // 3),), generator=gen)  # rows may repeat
        history.change(chosen, step)
        share = place[chosen.unique()].bincount(minlength=bins) / sizes
        densities.append((step, step + length, share))
        step += length
        assert sum(t.nbytes for t in history.state().values()) <= BINS * BINS + rows + 2000
    picture, begin, width = history.picture(step)
    assert begin == 0 and picture.shape[1] == bins and len(picture) <= BINS
    assert len(picture) == max(1, math.ceil(step / width)) and (width == 1 or step > BINS)
    expected = torch.zeros_like(picture)
    for k in range(len(picture)):
        start, end = k * width, min((k + 1) * width, step)
        for a, b, share in densities:
            expected[k] += share * max(0, min(b, end) - max(a, start)) / max(1, end - start)
    if step == 0:
        expected[0] = densities[0][2]
    torch.testing.assert_close(picture, expected, atol=0.012, rtol=0)  # 255ths, merged
    assert torch.equal(picture, history.picture(step)[0])


# --- the picture ----------------------------------------------------------------------------------


def trained():
    diary = Diary(mlp(6, 20, 8, 8), rank=4)
    diary.step()
    return diary.optimizer


def test_a_picture_of_some_weights_is_written(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    optimizer = trained()
    file = tmp_path / "new" / "rows.png"
    for weights in (None, [], "2.*", ["2.*", "0.weight"]):
        grass_fx.coverage_plot(optimizer, file, weights)
        assert file.read_bytes().startswith(b"\x89PNG")
        file.unlink()
    assert "pyplot" not in dir(figure)


def test_nine_weights_are_shown_evenly_spread(tmp_path):
    pytest.importorskip("matplotlib")
    from grass_fx.inspect.pictures import _chosen

    names = {f"{k}": None for k in range(17)}
    assert [*_chosen(names, None)] == [f"{k}" for k in range(0, 17, 2)]
    assert [*_chosen({"a": None}, None)] == ["a"]
    assert [*_chosen(names, ["1?", "3"])] == ["3", *(f"{k}" for k in range(10, 17))]


def test_what_cannot_be_drawn_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    model, file = mlp(6, 20), tmp_path / "rows.png"
    with pytest.raises(OptionError, match=r"coverage_plot\(AdamW\): it takes an optimizer that"):
        grass_fx.coverage_plot(torch.optim.AdamW(model.parameters()), file)
    with pytest.raises(OptionError, match="no weight of this optimizer is in a subspace yet"):
        grass_fx.coverage_plot(grass_fx.AdamW(model.parameters()), file)
    optimizer = trained()
    with pytest.raises(OptionError, match=r"weights='9\.\*' matches none of 0\.weight, 2\.weight"):
        grass_fx.coverage_plot(optimizer, file, ["9.*"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        grass_fx.coverage_plot(optimizer, file)
    assert not file.exists()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/telemetry.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(block, "docs/telemetry.md", "exec"), names)
    assert (tmp_path / "selected-rows.png").exists()
    assert {"age", "coverage", "overlap", "captured", "update_norm"} == {*names["values"]}
