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


def expected(scores):
    """Bytes of gradients: of the matrices that multiply r columns; and the scores."""
    numbers = 0
    for name, p in build("smoke").named_parameters():
        if p.dim() < 2 or name.startswith("embed"):
            numbers += p.numel()
            continue
        m, n = p.shape
        numbers += m * GrassConfig(rank=0.125).rank_and_block(n)[0] + scores * n
    return 4 * numbers


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("traffic") / "traffic.json"
    command = [sys.executable, str(SCRIPT), "--smoke", "--rate", "none", "--json", str(out)]
    command += ["--compiler", "aot_eager", "--warmup", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert "not throttled" in done.stdout and "| data, mean " in done.stdout
    return json.loads(out.read_text())["results"]


@pytest.mark.parametrize("way, scores", [("data", 0), ("data_scoring", 1)])
def test_data_parallel_reduces_compact_gradients(measured, way, scores):
    row = measured[way]
    assert row["all_reduce"] == row["sum"] == expected(scores)
    assert row["sent"] > row["all_reduce"]  # of two processes each sends as much, and headers


def test_sharded_training_scatters_compact_gradients(measured):
    whole = sum(p.nbytes for p in build("smoke").parameters())
    assert measured["ddp"]["all_reduce"] == measured["fsdp2"]["reduce_scatter"] == whole
    row = measured["sharded"]
    assert row["reduce_scatter"] == expected(0) < 0.4 * whole
    assert row["all_gather"] <= 2 * whole and row["all_reduce"] == 0
    scores = measured["sharded_scoring"]["all_reduce"]
    assert scores == expected(1) - expected(0)


def test_the_mean_over_a_period(measured):
    regular, scoring = measured["data"], measured["data_scoring"]
    mean = regular["sum"] + (scoring["sum"] - regular["sum"]) / 100
    assert measured["data, mean"]["sum"] == pytest.approx(mean)
