"""examples/pretrain.py on two processes trains as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [str(ROOT / "examples/pretrain.py"), "--smoke", "--compiler", "aot_eager"]


def losses(folder, way, processes=2):
    """What a run recorded: its losses, and the held-out ones."""
    log = folder / f"{way}.jsonl"
    start = [sys.executable, *SCRIPT]
    if way != "none":
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--",
        ]
        start += SCRIPT
    command = [*start, "--parallel", way, "--log", str(log), "--data", str(ROOT / "docs/method.md")]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=threads)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 1  # the first process alone reports
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [r[key] for r in records for key in ("loss", "held_out") if key in r]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    assert losses(tmp_path, "data") == pytest.approx(losses(tmp_path, "none"), rel=1e-4)
    # Selections of a sharded model are drawn in parts, on one process too.
    alone = losses(tmp_path, "sharded", processes=1)
    assert losses(tmp_path, "sharded") == pytest.approx(alone, rel=1e-4)
