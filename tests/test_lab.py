"""examples/benchmarks/lab.py: all of it in small, resuming, and what its plan decides by."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "benchmarks"))

import lab
import lab_methods
import lab_rates
import lab_report
import lab_train
from lab_finetuning import NEVER, finetuning, of_lora
from lab_lora import SCALING, LoRA
from lab_model import copied
from lab_plan import Cell, Plan
from lab_questions import of_peers, resting
from lab_settings import singly, tuned_at
from lab_train import Job

ROOT = Path(__file__).resolve().parent.parent
JOB = Job("a text")


@pytest.fixture
def one_thread():
    threads, limit = torch.get_num_threads(), torch._dynamo.config.recompile_limit
    yield
    torch.set_num_threads(threads)
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.slow
def test_all_questions_and_resuming(tmp_path, monkeypatch, capsys, one_thread):
    made = []

    def train(job, out):
        made.append(job.key)
        return lab_train.train(job, out)

    monkeypatch.setattr(lab, "train", train)
    file = tmp_path / "lab.json"
    given = [str(file), "--smoke", "--out", str(tmp_path)]
    lab.main(["work", *given])
    assert len(made) == len(set(made)) > 30
    results = lab.read(tmp_path)
    assert results.keys() == {*made, "equal"}
    assert all(math.isfinite(results[key]["held_out"]) for key in made)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    (tmp_path / "results.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    lost = made[-1]
    made.clear()
    lab.main(["work", *given])
    assert made == [lost]

    source = next(run["job"]["start"] for run in results.values() if run["job"].get("start"))
    later = next(key for key, run in results.items() if run["job"].get("start") == source)
    kept = [line for line in lines if json.loads(line)["key"] != later]
    (tmp_path / "results.jsonl").write_text("\n".join(kept) + "\n")
    lab_train.weights_file(tmp_path, source).unlink()
    made.clear()
    lab.main(["work", *given])
    assert made == [source, later]  # it is made again, since its weights are wanted

    lab.main(["save", *given])
    contents = json.loads(file.read_text())
    assert len(contents["runs"]) == len(lines) and contents["texts"][0]["sha256"]
    capsys.readouterr()
    lab.main(["rates", *given])
    shown = capsys.readouterr().out
    assert "| 1/8 | 100 |" in shown and "fine-tuning" in shown and "low bits" in shown


def test_a_run_is_of_one_worker(tmp_path):
    with lab.claim(tmp_path, "a") as first, lab.claim(tmp_path, "a") as second:
        assert first and not second
    with lab.claim(tmp_path, "a") as again:
        assert again
    lab.keep(tmp_path, {"key": "a"})
    with lab.claim(tmp_path, "a") as done:
        assert not done


def test_new_settings_leave_the_keys_of_old_runs():
    assert JOB.settings == {"data": "a text"}
    assert replace(JOB, rank=0.0).key == JOB.key != replace(JOB, rank=0.5).key


def decided(loss, plan_of):
    """Carry a plan out where `loss` gives a run's loss, None if it diverges."""
    results = {}
    while (plan := plan_of(Plan(results))).wanted:
        job = plan.wanted[0]
        results[job.key] = {"held_out": loss(job), "job": job.settings}
    return plan


def test_a_sweep_ends_where_both_neighbours_are_worse():
    def loss(job):
        if job.scale > 32 or job.linear_lr > 0.1:
            return None
        best = 0.032 if not job.rank else 2e-3 * (1 / job.rank) ** 0.5
        rate = job.linear_lr * job.scale
        return math.log2(rate / best) ** 2 + math.log2(job.lr / 2e-3) ** 2

    def plan_of(plan):
        plan.sweep("a", JOB, (1 / 16,))
        return plan

    plan = decided(loss, plan_of)
    (cell,) = plan.cells
    assert (cell.full.lr, cell.full.linear_lr) == (2e-3, 0.032)
    assert cell.best.scale == 0.25 and set(cell.tried) == {0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32}
    assert lab_rates.ratio(cell) == pytest.approx(0.25)


def test_peers_stand_beside_grass_at_their_own_rates():
    best = {"adamw": 1e-3, "galore": 2e-3, "apollo": 0.016}

    def loss(job):
        return (
            2 + abs(math.log2(job.linear_lr / best[job.method])) + job.rank * (job.rest_scale == 0)
        )

    def plan_of(plan):
        of_peers(plan, JOB, (0.25,), (2,), (0, 1))
        of_peers(plan, JOB, (0.25,), (2,), (1,), "another text")
        return plan

    plan = decided(loss, plan_of)
    assert len(plan.peers) == 3 and {job.steps for job in plan.peers[1]} == {1200}
    assert plan.peers[2] == [replace(job, text="another text") for job in plan.peers[1]]
    other = lab_report.finalists_table(plan).splitlines()[2:]
    assert other[2] == "| grass | 1/4 | +12.5, +12.5 | +12.5 |"
    shown = lab_report.peers_table(plan).splitlines()[3:7]
    assert [line.split(" | ", 4)[4] for line in shown] == [
        "grass | 1/4 | 100 | 4e-3 | 2.250 | +12.5 % |",
        'grass, rest="sign" | 1/4 | 100 | 2.5e-3 | 2.000 | +0.0 % |',
        "GaLore | 1/4 | 100 | 2e-3 | 2.250 | +12.5 % |",
        "APOLLO | 1/4 | 200 | 1.6e-2 | 2.250 | +12.5 % |",
    ]


def test_fine_tuning_sweeps_every_way_from_the_weights_of_one_run():
    best = {"adamw": 2e-3, "lora": 8e-3}

    def loss(job):
        rate = job.linear_lr * (job.rank if job.grass else 1) * job.scale
        return 2 + abs(math.log2(rate / best[job.method])) + abs(math.log2(job.lr / 1e-3))

    def plan_of(plan):
        if full := finetuning(plan, JOB, "other", (0.25,), before=5):
            of_lora(plan, full, (0.25,), (0, 1))
        return plan

    plan = decided(loss, plan_of)
    source, *tuned = (run["job"] for run in plan.results.values())
    assert source["steps"] == 5 * JOB.steps and source["save"] and "text" not in source
    assert {(job["text"], job["start"], job["steps"]) for job in tuned} == {
        ("other", replace(JOB, **source).key, JOB.steps // 2)
    }
    assert plan.cells[0].name == "3.7m, fine-tuning" and plan.cells[0].full.lr == 1e-3
    for seed, jobs in enumerate(plan.peers):
        assert {job.seed for job in jobs} == {seed} and all(loss(job) == 2 for job in jobs)
        assert [job.method for job in jobs] == ["adamw", "adamw", "adamw", "lora"]
        assert [job.refresh_every for job in jobs] == [100, 100, NEVER, 100]
    assert len(plan.peers) == 2


def test_lora_steps_as_a_model_with_two_factors_would():
    w, x = torch.nn.Parameter(torch.randn(6, 8)), torch.randn(5, 8)
    groups = [{"params": [w], "rank": 2, "lr": 0.1}]
    lora = LoRA(groups, lr=1.0, weight_decay=0.0)
    ((_, start, a, b),) = lora.factors
    own = [t.clone().requires_grad_() for t in (a, b)]
    other = torch.optim.AdamW(own, lr=0.1, weight_decay=0.0)
    for _ in range(4):
        (x @ w.T).square().sum().backward()
        (x @ (start + SCALING * own[1] @ own[0]).T).square().sum().backward()
        for optimizer in (lora, other):
            optimizer.step()
        w.grad = None
        other.zero_grad()
    assert (b != 0).all() and (w != start).all()
    torch.testing.assert_close((a, b), tuple(own), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w, start + SCALING * own[1] @ own[0], rtol=1e-4, atol=1e-5)


def test_what_a_rule_costs():
    tried = {2.0: 1.3, 4.0: 1.0, 8.0: 1.1}
    cell = Cell(
        "a", JOB, 1 / 8, 100, replace(JOB, scale=4.0), tried, {5e-4: 2.0, 1e-3: 1.0, 2e-3: 1.5}
    )
    assert lab_rates.excess(cell) == pytest.approx(0.1)
    assert lab_rates.at(cell, 8**0.5) == pytest.approx(1.15)
    assert math.isnan(lab_rates.at(cell, 16.0))
    assert lab_rates.vertex(tried, 4.0) == pytest.approx(4 * 2**0.25)
    assert lab_rates.ratio(cell) == pytest.approx(4 * 2**0.25 / 2 ** (1 / 6))
    shown = "\n".join(lab_rates.conclusion([cell]))
    assert "in 0 of 1 cells" in shown and "| (n/r)^1 | 0.100 | 0.100 | 0 of 1 |" in shown


@pytest.mark.parametrize("how", ["nearest", "stochastic", "low bits"])
def test_rounding_keeps_values_of_bfloat16(tmp_path, how):
    data = f"{ROOT / 'examples'}:py"
    job = Job(data, size="smoke", steps=4, rank=0.25, refresh_every=2, compiler="aot_eager")
    run = lab_train.Training(replace(job, batch=1, seq=16, rounding=how), tmp_path)
    for step in range(3):
        run.step(step)
        for name, p in run.stepped.items():
            exact = (p.bfloat16().float() == p).all(0)
            if how == "low bits" and name in run.within:
                selected = run.within[name].selection.indices
                assert bool(exact[selected].all()) == (step == 1)  # new ones have not moved yet
                exact[selected] = True
            assert exact.all()


def test_periods_grow_with_the_steps_so_far(tmp_path):
    assert [*lab_train.growing(250, 0.5)] == [25, 50, 75, 113, 169]
    data = f"{ROOT / 'examples'}:py"
    job = Job(data, size="smoke", steps=80, rank=0.25, compiler="aot_eager", batch=1, seq=8)
    run = lab_train.Training(replace(job, grow=4.0), tmp_path)
    (subspace, *_), ends, before = run.within.values(), [], None
    for step in range(job.steps):
        run.step(step)
        if before is not None and subspace.selection is not before:
            ends.append(step + 1)
        before = subspace.selection
    assert ends == [*lab_train.growing(job.steps, 1.0)] == [25, 50]


def test_half_in_turn_and_half_by_norms_of_inputs(tmp_path):
    data = f"{ROOT / 'examples'}:py"
    job = Job(data, size="smoke", steps=99, rank=0.25, compiler="aot_eager", batch=1, seq=8)
    run = lab_train.Training(replace(job, selection="halves", refresh_every=2), tmp_path)
    name, subspace = next(iter(run.within.items()))
    assert run.model.get_parameter(name).shape[1] == 64
    turns, drawn = [], []
    for step in range(17):
        with torch.no_grad():
            run.model.layers[0].attention_norm.weight[:8] = 0  # their inputs' norms, too
        before = subspace.selection
        run.step(step)
        if subspace.selection is before:
            continue
        after, now = run.halves.walks[name]
        turn = after[now - 8 : now]
        turns.append(turn)
        selected = subspace.selection.indices
        assert torch.isin(turn, selected).all() and len(selected.unique()) == 16
        drawn.append(selected[~torch.isin(selected, turn)])
    assert len(turns) == 9
    assert torch.equal(torch.cat(turns[:8]).sort().values, torch.arange(64))  # one turn of all
    assert all(len(units) == 8 and (units >= 8).all() for units in drawn)


def test_what_stands_over_full_gradients_is_told_by_both_losses():
    def plan_of(plan):
        resting(plan, JOB, (1 / 4,), (1,), (0, 1))
        tuned_at(plan, JOB, (2,))
        return plan

    plan = decided(lambda job: 2 + job.rank + math.log2(job.linear_lr / 2e-3) ** 2, plan_of)
    for result in plan.results.values():
        result["train"] = [9.0, result["held_out"] - 1]
    held_out, training = lab_report.gaps_table(plan).splitlines()[2:]
    assert held_out == "| 3.7m | the first | 600 | held-out | +8.3, +8.3 | +8.3, +8.3 |"
    assert training == "| 3.7m | the first | 600 | training | +12.5, +12.5 | +12.5, +12.5 |"
    (line,) = lab_report.varied_table(plan).splitlines()[2:]
    assert "| full | linear rate | 5e-4: 6.000, 1e-3: 3.000, 2e-3: 2.000, 4e-3: 3.000 |" in line


class Copies(torch.nn.Module):
    """Is sure of what stood so many tokens ago; knows nothing else."""

    def forward(self, tokens, ago=8, vocab=50):
        logits = torch.zeros(*tokens.shape, vocab)
        return logits.index_put_(
            (torch.arange(len(tokens))[:, None], torch.arange(ago - 1, tokens.shape[1]),
             tokens[:, : 1 - ago]),
            torch.tensor(100.0),
        )  # fmt: skip


def test_what_a_model_has_learnt_of_copying():
    text = torch.arange(50, dtype=torch.int16)
    assert copied(Copies(), text, 16) == pytest.approx(math.log(50))
    assert copied(Copies(), text, 32) < 0  # what it is sure of is not what comes


def test_single_settings_stand_beside_the_default():
    def loss(job):
        return 2 - job.rank - 0.1 * (job.beta2 == 0.99) + job.seed + 0.3 * bool(job.head_scale)

    def plan_of(plan):
        singly(plan, replace(JOB, size="0.7m"), (0.25,), 2, (0, 1), signs=False)
        return plan

    shown = lab_report.single_table(decided(loss, plan_of)).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][2:] for line in shown]
    assert cells[1] == ["full", "", "β₂ 0.99", "1.900 2.900", "-0.100 -0.100"]
    assert cells[4] == ["1/4", "none", "the default", "1.750 2.750", "+0.000 +0.000"]
    assert [row[0] for row in cells[4:]] == ["1/4"] * 13
    assert {"K 200", "moments of 8 bits"} < {row[2] for row in cells}
    assert ["1/4", "none", "attention 1/8, MLP 5/16", "1.875 2.875", "+0.125 +0.125"] in cells
    assert cells[-4][2] == "with the head, at 4 times the linear rate"


def test_a_gradient_is_that_of_a_grass_graph_or_the_run_stops(tmp_path, monkeypatch):
    data = f"{ROOT / 'examples'}:py"
    job = Job(data, size="smoke", rank=0.25, scale=4.0, refresh_every=2, compiler="aot_eager")
    job = replace(job, steps=6, batch=2, seq=32)
    assert lab_train.compare(replace(job, rest_scale=0.125), tmp_path)["losses"] < 1e-3
    assert lab_train.compare(job, tmp_path)["weights"] < 1e-3
    ways = (
        {"rank": 0.5, "mlp_rank": 0.125},
        {"head_scale": 2.0},
        {"method": "sgd", "rest_scale": 1.0},
    )
    for more in ways:
        assert lab_train.compare(replace(job, **more), tmp_path)["weights"] < 1e-3
    assert lab_train.compare(replace(job, products="bfloat16"), tmp_path)["weights"] < 5e-2
    give = lab_methods.give

    def wrong(read, stepped, subspace, *more):
        read.grad = read.grad if subspace is None else read.grad.roll(1, -1)
        give(read, stepped, subspace, *more)

    monkeypatch.setattr(lab_methods, "give", wrong)
    with pytest.raises(AssertionError, match="differ"):
        lab_train.compare(job, tmp_path)


def test_the_pages_have_the_tables_of_the_file():
    """If this fails and should: the command is on the page."""
    pages = [ROOT / "docs" / name for name in ("quality.md", "comparison.md")]
    page = "\n".join(each.read_text(encoding="utf-8") for each in pages).splitlines()
    plan = lab.found(ROOT / "docs" / "lab.json")
    for table in lab_report.TABLES:
        for line in table(plan).splitlines():
            assert not line.startswith("|") or line in page
    assert len(plan.cells) > 4 and plan.results["equal"]["losses"] < 1e-3


def test_runs_of_one_folder_have_one_text(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text"
    for name in "abc":
        (text / name).parent.mkdir(exist_ok=True)
        (text / name).write_text(f"{name} few words more " * 40)
    monkeypatch.setattr(lab, "SMOKE_TEXT", str(text))
    given = ["work", "--smoke", "--minutes", "0", "--out", str(tmp_path / "out")]
    lab.main(given)
    lab.main(given)
    (text / "b").write_text("other words")
    lab_train.text_of.cache_clear()
    with pytest.raises(SystemExit, match="the texts have changed since the runs in"):
        lab.main(given)
