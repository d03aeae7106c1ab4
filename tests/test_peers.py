"""examples/benchmarks/peers.py: every stage in small, resuming, and what it decides by."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))

import contenders
import peers
import peers_plan
import peers_report
import peers_timing
from contenders import Run
from peers_plan import Contender
from pretrain import is_linear

# LoRA takes part in the finetuning.
SMOKE = ["--smoke", "--timing-rounds", "1", "--only", "adamw", "galore 1/4", "apollo 1/4"]
SMOKE += ["grass 1/4", "grass 1/4 multinomial_norm"]


def result(run, held_out, **more):
    found = {"key": run.key, "held_out": held_out, "finite": True, "train": 1.0, "curve": []}
    return {**found, **more}


@pytest.mark.slow
def test_all_stages_and_resuming(tmp_path, monkeypatch, capsys):
    made = []

    def train_once(run, folder):
        made.append(run.key)
        return contenders.train_once(run, folder)

    monkeypatch.setattr(peers, "train_once", train_once)
    with torch._dynamo.config.patch(recompile_limit=64):  # the timing stage raises it
        peers.main([*SMOKE, "--out", str(tmp_path)])
    assert len(made) == len(set(made)) > 10
    for name in ("peers.json", "table.md", "peers.png", "ablations.png", "timing.json"):
        assert (tmp_path / name).stat().st_size > 100
    contents = json.loads((tmp_path / "peers.json").read_text())
    usable = peers.Stages(peers.Runner(peers.scale_of(peers.parse(SMOKE)), tmp_path, 0)).entries
    rows = contents["pretraining"]
    assert set(rows) == {each.name for each in usable} >= {"adamw", "grass 1/4"}
    for row in (*rows.values(), *contents["finetuning"].values()):
        assert math.isfinite(row["mean"]) and row["seeds"] == 2
    adamw, grass = rows["adamw"], rows["grass 1/4"]
    assert grass["traffic"] == grass["bytes"]["gradients"] < adamw["traffic"]
    assert adamw["bytes"]["state"] >= 2 * adamw["bytes"]["gradients"]
    scored = rows["grass 1/4 multinomial_norm"]  # sends its scores once in K = 2 steps
    assert scored["bytes"]["gradients"] < scored["traffic"]
    assert "| grass 1/4 |" in (tmp_path / "table.md").read_text()

    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == len(made)
    # The last line was being written when the machine stopped: that run is made again, no other.
    (tmp_path / "results.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]) + "\n")
    lost = json.loads(lines[-1])["key"]
    made.clear()
    peers.main([*SMOKE, "--out", str(tmp_path)])
    assert made == [lost]
    assert json.loads((tmp_path / "peers.json").read_text())["pretraining"] == rows
    assert "\n1 runs at most" in capsys.readouterr().out


def decided(plan, losses, results):
    """Carry a plan out where `losses` gives a run's loss."""
    asked = []

    def run(runs):
        asked.extend(run for run in runs if run.key not in results)
        results.update({run.key: result(run, losses(run)) for run in runs})

    return peers.carry_out(plan, run), asked


@pytest.mark.slow
def test_the_scale_of_the_lab(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    threads = torch.get_num_threads()
    peers.main(["--scale", "lab", "--smoke", "--workers", "1", "--out", str(tmp_path)])
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "| 1/8 | 100 |" in shown and "256 tokens a step, products in bfloat16" in shown
    assert "| model | text | steps | seed | full | r | none |" in shown
    runs = json.loads((tmp_path / "lab.json").read_text())["runs"]
    assert len(runs) > 10 and runs[0]["key"] == "equal"


def test_the_scale_of_the_lab_has_its_own_settings(capsys):
    with pytest.raises(SystemExit):
        peers.parse(["--scale", "lab", "--timing-rounds", "1"])
    assert "--timing-rounds does not go with --scale lab" in capsys.readouterr().err


def test_a_sweep_goes_on_beyond_an_edge_once():
    entries = [
        Contender("inside", Run(method="adamw"), (1.0, 2.0, 4.0)),
        Contender("outside", Run(method="grass"), (1.0, 2.0, 4.0)),
        Contender("like it", Run(method="grass", block=8), like="outside"),
    ]

    def loss(run):
        best, k = (2.0, 1) if run.method == "adamw" else (100.0, 300)
        swept = (run.linear_lr / best, run.lr / 3.0, run.refresh_every / k)
        return sum(abs(math.log(each)) for each in swept)

    results = {}
    plan = peers_plan.sweep(peers_plan.Scale(Run()), entries, 1.0, results)
    found, asked = decided(plan, loss, results)
    best = {name: (run.lr, run.linear_lr, run.refresh_every) for name, run in found["best"].items()}
    # From 1.0 the dense rates tried are 0.5, 1, 2 and, beyond the edge, 4; each line once. K is
    # swept where there is one, and whoever is like another takes it over.
    assert best == {
        "inside": (4.0, 2.0, 50), "outside": (4.0, 8.0, 200), "like it": (4.0, 16.0, 200)
    }  # fmt: skip
    assert len(found["tried"]["inside"]) == 3 + 3
    assert len(found["tried"]["outside"]) == 4 + 3 + 3
    assert len(found["tried"]["like it"]) == 3  # no more beyond the edge
    assert len(asked) == 6 + 10 + 3
    everything = ["lr", "linear_lr", "refresh_every"]
    for name, edge in (("inside", ["lr"]), ("outside", everything), ("like it", ["linear_lr"])):
        assert peers_report.at_edge(found["best"][name], found["tried"][name]) == edge
    assert peers_report.settings(found["best"]["inside"], ["lr"]) == "4* / 2"
    assert peers_report.settings(found["best"]["outside"]) == "4 / 8 / 200"


def test_a_run_that_diverges_or_is_missing_is_never_the_best():
    runs = [Run(linear_lr=rate) for rate in (1.0, 2.0, 4.0)]
    results = {runs[0].key: result(runs[0], math.nan), runs[1].key: result(runs[1], 2.0)}
    assert peers_plan.best_of(runs, results) == runs[1]
    results[runs[1].key]["finite"] = False
    assert peers_plan.best_of(runs, results) is None
    assert peers_plan.beyond("linear_lr", runs, results) == []


def test_seeds_are_aggregated():
    run = Run()
    losses = (1.0, 1.5, 1.25)
    runs = peers_plan.with_seeds(run, 3)
    results = {each.key: result(each, x) for each, x in zip(runs, losses, strict=True)}
    found = peers_report.over_seeds(run, results)
    assert (found["mean"], found["spread"], found["seeds"]) == (1.25, 0.5, 3)
    line = {"1": run, "8": replace(run, block=8), "none": replace(run, block=16)}
    results[line["8"].key] = result(line["8"], 2.0)
    found = peers_report.beside(line, results)  # one of them has one seed
    assert {x: (each["mean"], each["seeds"]) for x, each in found.items()} == {
        "1": (1.0, 1), "8": (2.0, 1)
    }  # fmt: skip
    curves = ([(5, 2.0), (10, 1.0)], [(5, 4.0), (10, 2.0)], [(5, 6.0), (10, 3.0)])
    for each, curve in zip(runs, curves, strict=True):
        results[each.key]["curve"] = curve
    assert peers_report.mean_curve(run, results) == [(5, 4.0), (10, 2.0)]


@pytest.mark.parametrize(
    ("quarter", "eighth", "met"),
    [
        (1.009, 1.02, [True, True, True, True]),
        (1.02, 1.05, [False, True, False, False]),  # 0.02 nats above GaLore: within the spread
        (1.05, 1.025, [False, False, True, True]),
    ],
)
def test_goals_are_computed(quarter, eighth, met):
    means = {"adamw": 1.0, "galore 1/4": 1.0, "galore 1/8": 1.03}
    means |= {"grass 1/4": quarter, "grass 1/8": eighth}
    rows = {name: {"mean": mean, "spread": 0.03, "seeds": 3} for name, mean in means.items()}
    assert [goal["met"] for goal in peers_report.goals(rows)] == met
    del rows["galore 1/8"]
    assert len(peers_report.goals(rows)) == 3


def test_the_mean_over_a_period():
    measured = {
        "times": [[14.0], [11.0], [10.0, 10.0], [10.0], [12.0]],
        "held": [{"weights": 8, "gradients": 4 + (place == 0), "state": 2} for place in range(5)],
        "peaks_above": [20, 9, 9, 9, 9],
    }
    found = peers_timing.summary(measured, every=7)
    assert found["mean_ms"] == pytest.approx((4 * 10 + 14 + 11 + 12) / 7)
    assert (found["regular_ms"], found["special_ms"]) == (10.0, 14.0)
    assert found["traffic"] == pytest.approx((6 * 4 + 5) / 7)
    assert found["bytes"]["activations"] == 9 - 4 and found["peak"] == 8 + 2 + 20


def test_what_a_step_costs_is_told_without_losses(tmp_path, capsys):
    held = {"weights": 4_000_000, "gradients": 1_000_000, "state": 2_000_000}
    timed = {"times": [[9.0], [1.0], [1.0], [1.0], [3.0]], "held": [held] * 5}
    timed["peaks_above"] = [2_500_000, 1_500_000, 1_500_000, 1_500_000, 1_500_000]
    facts = {"environment": {"date": "that day"}, "threads": 1, "rounds": 1}
    (tmp_path / "timing.json").write_text(json.dumps({**facts, "measured": {"adamw": timed}}))
    peers.main([*SMOKE, "--stage", "report", "--out", str(tmp_path)])
    row = "| adamw | 4.00 | 1.00 | 2.00 | 0.50 | 7.50 | 8.50 | 1.0 | 9.0 | 6.0 | 1000 |"
    assert row in capsys.readouterr().out  # the mean is over the smoke run's period of two steps
    saved = json.loads((tmp_path / "peers.json").read_text())
    assert saved["timing"] == {**facts, "measured": ["adamw"]}


def test_adapters_are_as_large_as_compact_gradients():
    weights = [torch.nn.Parameter(torch.empty(128, 128)) for _ in range(4)]
    weights += [torch.nn.Parameter(torch.empty(344, 128)) for _ in range(3)]
    rank = contenders.adapter_rank(weights, 0.25)
    adapters = sum(rank * sum(weight.shape) for weight in weights)
    compact = sum(32 * max(weight.shape) for weight in weights)
    assert adapters == pytest.approx(compact, rel=0.03)
    assert Run().key == Run().key != Run(seed=1).key


def test_matrices_that_grass_leaves_have_their_rate(tmp_path):
    run = Run(size="smoke", lr=8e-3, linear_lr=4e-3, on_refresh="reset", compiler="aot_eager")
    run = replace(run, take=(peers_plan.ATTENTION,), untaken_lr=1e-3)
    model, _, optimizer = contenders.set_up(run, tmp_path)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[p] == (1e-3 if ".mlp." in name else 8e-3)
    assert optimizer.param_groups[0]["scale"] == 0.5
    assert optimizer.param_groups[0]["on_refresh"] == "reset"


@pytest.mark.parametrize(("side", "dim"), [("in", 1), ("out", 0)])
def test_grass_selects_the_side_of_the_run(tmp_path, side, dim):
    run = Run(size="smoke", lr=8e-3, linear_lr=4e-3, side=side, compiler="aot_eager")
    model, compiled, _ = contenders.set_up(run, tmp_path)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    compiled(tokens, tokens).backward()
    gradients = [p.grad for name, p in model.named_parameters() if is_linear(name, p)]
    assert {gradient.selection.dim for gradient in gradients} == {dim}


def test_every_rule_side_block_and_reset_is_compared_at_both_ranks():
    names = [each.name for each in peers_plan.contenders(peers.SCALES["cpu"])]
    assert len(names) == len(set(names))
    variants = {*peers_plan.RULES, "side auto", "side out", "block 8"}
    variants |= {"multinomial_norm block 8", "multinomial_norm reset"}
    for rank in ("1/4", "1/8"):
        assert {f"grass {rank} {each}" for each in variants} <= set(names)


def test_galore_projects_with_the_rate_of_the_linear_weights(tmp_path):
    pytest.importorskip("galore_torch")
    run = Run(method="galore", size="smoke", lr=8e-3, linear_lr=4e-3, rank=0.25, refresh_every=200)
    _, _, optimizer = contenders.set_up(run, tmp_path)
    groups = {"rank" in group: group for group in optimizer.param_groups}
    assert (groups[True]["lr"], groups[False]["lr"]) == (4e-3, 8e-3)
    assert groups[True]["update_proj_gap"] == 200 and groups[True]["eps"] == 1e-8
