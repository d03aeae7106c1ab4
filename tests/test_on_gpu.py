"""The one command that measures on a GPU: what it runs, keeps, leaves out and goes on with."""

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))

from on_gpu import PLAN, Measurement, done, in_small, measure_all, summary  # noqa: E402


def measurement(name, code, seconds=1):
    return Measurement(name, seconds, f"what {name} does", shlex.join(["python", "-c", code]))


def test_what_fails_is_told_and_the_rest_runs(tmp_path):
    out = tmp_path / "runs" / "on_gpu.md"
    plan = [measurement("bad", "print('so far'); 1 / 0"), measurement("good", "print('all of it')")]
    assert measure_all(plan, out, None) == {"bad": 1, "good": 0}
    text = out.read_text()
    assert "so far" in text and "ZeroDivisionError" in text and "predicted: what bad does" in text
    assert text.index("all of it") > text.index("ended with 1 after") and [*done(out)] == ["good"]


def test_a_next_call_goes_on(tmp_path, capsys):
    out = tmp_path / "on_gpu.md"
    plan = [measurement("long", "print('long')", seconds=600), measurement("short", "print(1)")]
    assert measure_all(plan, out, minutes=1) == {"short": 0}
    assert "long: left out" in capsys.readouterr().out
    assert measure_all(plan, out, minutes=20) == {"long": 0}
    assert "short: done before" in capsys.readouterr().out
    assert measure_all(plan, out, None) == {} and {*done(out)} == {"long", "short"}


def test_what_takes_longer_than_it_may_is_stopped_and_tried_again(tmp_path):
    out = tmp_path / "on_gpu.md"
    slow = measurement("slow", "import time; print('begun', flush=True); time.sleep(60)", seconds=0)
    assert measure_all([slow], out, minutes=0.05) == {"slow": 124}
    assert "begun" in out.read_text() and not done(out)


def test_a_table_at_the_end_has_what_was_found_beside_what_was_predicted(tmp_path):
    out = tmp_path / "on_gpu.md"
    print_table = "print('a | b', '| regular | 0.8 |', '| other | 1 |', sep=chr(10))"
    good = replace(measurement("good", print_table), shows=r"^\| regular .*")
    plan = [good, measurement("bad", "print('| regular | 0.9 |'); 1 / 0")]
    measure_all(plan, out, None)
    assert summary(plan, out) == "good: predicted what good does\n    | regular | 0.8 |"


def test_in_small_no_gpu_is_needed():
    for each in map(in_small, PLAN):
        assert "--device cuda" not in each.command
        assert "--smoke" in each.command or "--collect-only" in each.command


def test_names_are_unique():
    assert len({each.name for each in PLAN}) == len(PLAN)


def test_the_page_names_measurements_that_exist():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    table = page.partition("### Not measured")[2].partition("\n## ")[0]
    last = "".join(row.rsplit("|", 2)[1] for row in table.splitlines() if row.startswith("| "))
    named = {name for name in re.findall(r"`([^`]*)`", last) if not name.startswith("-")}
    assert len(named) > 9 and named - {each.name for each in PLAN} == set()


@pytest.mark.parametrize("each", PLAN, ids=lambda each: each.name)
def test_what_it_runs_exists(each):
    """That scripts know their options is tested with the documentation's commands."""
    program, *words = shlex.split(each.command)
    files = [word for word in words if word.endswith(".py")]
    assert program == "python" and files and all((ROOT / file).exists() for file in files)
