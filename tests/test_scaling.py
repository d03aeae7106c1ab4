"""examples/benchmarks/scaling.py: the model's limits, its bytes, its constants, and its page."""

import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import grass_fx
from grass_fx.inspect import speed
from grass_fx.inspect.cost import LinearCost
from grass_fx.inspect.speed import Times

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

import scaling  # noqa: E402
from scaling_model import (  # noqa: E402
    Model,
    Network,
    Setting,
    compute,
    data_parallel,
    held_bytes,
    passed,
    shape,
    sharded,
)

SCRIPT = ROOT / "examples/benchmarks/scaling.py"
DEVICE, SLOW = scaling.fitted_device(), scaling.fitted_slow()
INSTANT = Network("", math.inf, math.inf, 0, 0)
FULL, GRASS = (Model(shape("1b"), rank) for rank in (None, 0.125))


def test_a_group_of_one_exchanges_nothing():
    network = Network("", 1e9, 1e8)
    assert network.gather(1e9, 1) == network.all_reduce(1e9, 1) == 0
    assert network.gather(1e9, 2) > 0


@pytest.mark.parametrize("ranks", [2, 8, 16, 1024])
@pytest.mark.parametrize("trees", [False, True])
def test_two_levels_of_rings_send_as_much_as_one(ranks, trees):
    """At the same bandwidth everywhere: (p - 1)/p of what is gathered."""
    network = Network("", 1e9, 1e9, 0, 0, trees=trees)
    assert network.gather(4e9, ranks) == pytest.approx(4 * (ranks - 1) / ranks)


def test_a_ring_sends_what_linear_cost_says():
    """docs/distributed.md: 19.7 of 157.8 MB."""
    cost = LinearCost(m=11008, n=4096, r=512, itemsize=2, ranks=8)
    assert 2 * passed(cost.gradient_bytes, 8) == cost.all_reduce_bytes
    assert 2 * passed(cost.full_gradient_bytes, 8) == cost.full_all_reduce_bytes
    network = Network("", 1, 1, 0, 0)
    assert network.all_reduce(cost.gradient_bytes, 8) == cost.all_reduce_bytes


def test_messages_between_nodes_cost_latency():
    network = Network("", math.inf, math.inf, 0, 1)
    assert network.gather(1, 64) == 7
    assert replace(network, trees=True).gather(1, 64) == 3


def test_bytes_are_those_that_were_counted():
    """docs/benchmarks.md, traffic of the example LLaMA "bench" in float32."""
    full, grass = scaling.bench_models()
    assert f"{full.all.gradients / 1e6:.2f}" == "51.66"
    assert f"{grass.all.gradients / 1e6:.2f}" == "6.97"
    gathered = 2 * full.layer.weights * full.shape.layers + full.root.weights
    assert f"{gathered / 1e6:.2f}" == "102.27"


@pytest.mark.parametrize("rank", [0.125, 0.25])
@pytest.mark.parametrize("size", ["1b", "7b"])
def test_bytes_that_are_held_are_those_of_plan(size, rank):
    plan = grass_fx.plan(f"llama-{size}", "80GB", rank=rank)
    held = Model(shape(size), rank).all
    planned = plan.total - plan.parts["selections"] - plan.parts["optimizer step"]
    assert held.weights + held.gradients + held.state == planned
    held = Model(shape(size), None).all
    assert held.weights + held.gradients + held.state == plan.full_total


@pytest.mark.parametrize("micro, once", [(1, True), (4, True), (4, False)])
@pytest.mark.parametrize("model", [FULL, GRASS], ids=["full", "grass"])
def test_without_a_network_only_compute_remains(model, micro, once):
    work = Times(3.0, 5.0, 1.0)
    step = data_parallel(model, work, INSTANT, 64, micro, once)
    assert step == pytest.approx(micro * 8 + 1)
    for group in (8, 64):
        step = sharded(model, work, INSTANT, 64, group, micro, once)
        assert step == pytest.approx(micro * 8 + 1 / group)


def test_with_an_instant_network_the_ratio_is_that_of_compute():
    setting = Setting(DEVICE)
    for way, group in (("data parallel", 1), ("HSDP", 8), ("FSDP2", 64)):
        (full, grass, _), _ = setting.cell(FULL.shape, way, INSTANT, 64, 1)
        times = [compute(DEVICE, model, 8192, 1024) for model in (FULL, GRASS)]
        of_full, of_grass = (it.forward + it.backward + it.optimizer / group for it in times)
        assert full / grass == pytest.approx(of_full / of_grass)
        assert 1.1 < of_full / of_grass < 1.5  # method.md's bound


def test_with_a_very_slow_network_the_ratio_is_that_of_bytes():
    network, work = Network("", 1.0, 1.0, 0, 0), Times(1.0, 2.0, 0.1)
    times = [data_parallel(model, work, network, 8) for model in (FULL, GRASS)]
    assert times[0] / times[1] == pytest.approx(FULL.all.gradients / GRASS.all.gradients)
    times = [sharded(model, work, network, 8, 8) for model in (FULL, GRASS)]
    gathered = 2 * FULL.layer.weights * 24 + FULL.root.weights
    moved = [gathered + model.all.gradients for model in (FULL, GRASS)]
    assert times[0] / times[1] == pytest.approx(moved[0] / moved[1])
    assert moved[0] / moved[1] < 1.5 < FULL.all.gradients / GRASS.all.gradients


@pytest.mark.parametrize("network", scaling.NETWORKS, ids=lambda it: it.name)
def test_more_micro_batches_never_lengthen_a_data_parallel_step_per_sample(network):
    for size, ranks, trees in itertools.product(("1b", "7b"), scaling.GPUS, (False, True)):
        for rank in (None, 0.125, 0.25):
            model, setting = Model(shape(size), rank), Setting(DEVICE)
            link = replace(network, trees=trees)
            times = [
                setting.step(model, "data parallel", link, ranks, micro, True) / micro
                for micro in (1, 2, 3, 4, 8)
            ]
            assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(times)), (size, ranks)


def test_no_step_is_shorter_than_its_compute_or_than_its_bytes():
    for model, ranks in itertools.product((FULL, GRASS), (8, 64)):
        work = compute(DEVICE, model, 8192, 1024)
        least = work.forward + work.backward
        for network in scaling.NETWORKS:
            sent = network.all_reduce(model.all.gradients, ranks)
            assert data_parallel(model, work, network, ranks) >= max(least, sent)
            sent = network.gather(2 * model.layer.weights * 24 + model.root.weights, ranks)
            assert sharded(model, work, network, ranks, ranks) >= max(least, sent)


def test_memory_that_sharding_and_checkpointing_save():
    full, grass = (Model(shape("13b"), rank) for rank in (None, 0.125))
    assert held_bytes(full, 8192, 1, True) > 80e9 > held_bytes(grass, 8192, 1, True)
    assert held_bytes(full, 8192, 64, True) < held_bytes(full, 8192, 8, True)
    assert held_bytes(full, 8192, 8, True) < held_bytes(full, 8192, 8, False)
    more = held_bytes(full, 8192, 8, True, unsharded=True) - held_bytes(full, 8192, 8, True)
    assert more == full.all.gradients - full.layer.gradients
    assert Setting(DEVICE).step(full, "data parallel", INSTANT, 8, 1, True) is None


def test_fitted_runs_are_met_and_held_out_ones_nearly():
    found = list(scaling.checks(DEVICE, SLOW))
    assert len([own for *_, own in found if own]) == 5 < len(found) / 3
    for run, measured, computed, own in found:
        error = 0.15 if not own else 0.1 if "optimizer" in run else 0.02
        assert computed == pytest.approx(measured, rel=error), run


def test_plan_predicts_with_what_is_fitted_here():
    flops, memory = speed.PEAKS["h100"]
    for name, peak in (("products", flops), ("attention", flops), ("memory", memory)):
        fitted = getattr(DEVICE, name) / peak
        assert getattr(speed.ATTAINED, name) == pytest.approx(fitted, abs=0.005)


def test_the_constants_stand_in_the_benchmarks():
    pages = [ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "benchmarks-log")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    rows = [re.findall(r"[\d,.]+", line) for line in text.splitlines() if line.startswith("|")]

    def stands(*numbers):
        wanted = [str(number) for number in numbers]
        return any(set(wanted) <= set(row) for row in rows)

    for *_, full, regular in scaling.WHOLE_STEPS.values():
        assert stands(*full) and stands(*regular)
    for (rate, _), (ddp, grass) in scaling.SLOW.items():
        assert stands(ddp, grass) or (rate == 1e9 and stands(ddp) and stands(grass))
    assert all(map(stands, scaling.SLOW_SHARDED))
    assert stands(scaling.CPU_RATIO, scaling.CPU_OPTIMIZER[1]) and stands(scaling.CPU_OPTIMIZER[0])
    kept, selected = scaling.ACTIVATIONS
    assert f"{kept} were activations and temporaries, {selected} now" in text
    profile = scaling.PROFILE
    assert f"weight gradients are {profile['weight gradients']} ms" in text
    assert f"Attention is {profile['attention']} ms" in text
    assert f"the loss about {profile['pointwise']}" in text


def test_smoke_runs():
    command = [sys.executable, str(SCRIPT), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| 70b | FSDP2 | no" in done.stdout and "### NVLink" in done.stdout
    assert "### PCIe" not in done.stdout


def test_the_page_shows_what_the_script_prints(monkeypatch, capsys):
    """If this fails and should: put what the script prints into docs/scaling.md, and read it."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    scaling.main()
    tables = re.compile(r"(?:^\|.*\n)+", re.M)
    printed = tables.findall(capsys.readouterr().out)
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert tables.findall(page) == printed
