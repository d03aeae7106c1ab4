"""examples/benchmarks/traffic.py counts what travels: compact gradients, and nothing larger."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grass_fx.config import GrassConfig
from llama import build

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).resolve().parent.parent / "examples/benchmarks/traffic.py"


SHARDED = ("embed", "head")
"""What trains dense under FSDP2: hooks between the layers end Dynamo's graph of the whole model."""


def expected(scores, dense=("embed",)):
    """Bytes of gradients: of the matrices that multiply r columns; and the scores."""
    numbers = 0
    for name, p in build("smoke").named_parameters():
        if p.dim() < 2 or name.startswith(dense):
            numbers += p.numel()
            continue
        m, n = p.shape
        numbers += m * GrassConfig(rank=0.125).rank_of(n) + scores * n
    return 4 * numbers


def run(folder, *more):
    """The rows of a small run."""
    out = folder / "traffic.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--rate", "none", "--json", str(out)]
    command += ["--compiler", "aot_eager", "--warmup", "2", *more]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "not throttled" in done.stdout
    return json.loads(out.read_text())["results"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run(tmp_path_factory.mktemp("traffic"))


@pytest.mark.parametrize("way, scores", [("data", 0), ("data_scoring", 1)])
def test_data_parallel_reduces_compact_gradients(measured, way, scores):
    row = measured[way]
    assert row["all_reduce"] == row["sum"] == expected(scores)
    assert row["sent"] > row["all_reduce"]  # of two processes each sends as much, and headers


def test_sharded_training_scatters_compact_gradients(measured):
    whole = sum(p.nbytes for p in build("smoke").parameters())
    assert measured["ddp"]["all_reduce"] == measured["fsdp2"]["reduce_scatter"] == whole
    row = measured["sharded"]
    assert row["reduce_scatter"] == expected(0, SHARDED) < 0.5 * whole
    assert row["all_gather"] <= 2 * whole and row["all_reduce"] == 0
    scores = measured["sharded_scoring"]["all_reduce"]
    assert scores == expected(1, SHARDED) - expected(0, SHARDED)


def test_the_mean_over_a_period(measured):
    regular, scoring = measured["data"], measured["data_scoring"]
    mean = regular["sum"] + (scoring["sum"] - regular["sum"]) / 100
    assert measured["data, mean"]["sum"] == pytest.approx(mean)


def test_only_the_last_micro_batch_is_reduced(tmp_path):
    rows = run(tmp_path, "--micro-batches", "2", "--keep-gathered", "--ways", "ddp", "sharded")
    assert rows["ddp"]["all_reduce"] == sum(p.nbytes for p in build("smoke").parameters())
    assert rows["sharded"]["reduce_scatter"] == expected(0, SHARDED)
