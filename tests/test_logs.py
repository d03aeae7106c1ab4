"""What the backend tells: logs, torch's structured trace, dumped files, warnings."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import grass_fx
from grass_fx.compile.dump import Dump, random_rows
from grass_fx.config import GrassConfig
from grass_fx.errors import GrassWarning
from helpers import Captured, mlp

TRAIN = (
    "model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 6))\n"
    "options = {'rank': 2, 'compiler': 'aot_eager'}\n"
    "compiled = torch.compile(model, backend='grass', options=options)\n"
    "compiled(torch.ones(3, 8)).sum().backward()\n"
    "assert type(model[0].weight.grad).__name__ == 'CompactGrad'\n"
)


def python(code, **environment):
    """The standard error of a process of its own."""
    env = {**os.environ, **environment}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    return run.stderr


def ours(records):
    return [r.getMessage() for r in records if r.name.startswith("grass_fx")]


# --- Logs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training step in two processes: what it logs, and the trace of the second."""
    trace = tmp_path_factory.mktemp("trace")
    # The user never imports grass_fx; or does so before torch, which parses TORCH_LOGS.
    terse = python("import torch\n" + TRAIN, TORCH_LOGS="grass_fx")
    wordy = python(
        "import grass_fx, torch\n" + TRAIN, TORCH_LOGS="+grass_fx", TORCH_TRACE=str(trace)
    )
    (file,) = trace.iterdir()
    return terse, wordy, file.read_text(encoding="utf-8")


def test_torch_logs(trained):
    for text, levels in zip(trained, ("I", "VVVVVVI"), strict=False):
        lines = [line for line in text.splitlines() if "[0/0]" in line]
        assert "".join(line[0] for line in lines) == levels
        assert "2 weights taken, 0 left; 2 selections pushed, 0 stopped; " in lines[-1]
        assert lines[-1].endswith(" ms; graph 0/0")


class Block(nn.Module):
    def __init__(self, size=8, width=6):
        super().__init__()
        self.linear = nn.Linear(size, width)

    def forward(self, x):
        return torch.tanh(self.linear(x))


def test_each_pass_logs_the_operations_it_changed(caplog):
    with caplog.at_level(logging.DEBUG, "grass_fx"):
        torch.compile(Block(), backend=Captured(rank=2))(torch.randn(4, 8))
    find, tap, norms, push, keep, padded, line = ours(caplog.records)
    assert find.startswith("find_linear_weights: no change, ") and "1 taken, 0 left" in find
    assert tap.startswith("tap_weights: +2 placeholder, +1 tap, ") and tap.endswith("(regular)")
    assert norms.startswith("push_norms: no change")
    assert push.startswith(
        "push_selection: -1 aten.mm, -2 aten.permute, -1 grass.select, +1 grass.selected_mm, "
    )
    assert push.endswith(" ms (regular, 1 pushed, 0 stopped)")
    assert keep.startswith("keep_selected: no change, ") and keep.endswith("(regular, 0 kept)")
    assert padded.startswith("read_padded: no change, ")
    number = Block.forward.__code__.co_firstlineno + 1
    assert line.endswith(f"graph 0/0 of forward (test_logs.py:{number})")


def test_the_scoring_variant_logs_too(caplog):
    with caplog.at_level(logging.DEBUG, "grass_fx"):
        backend = Captured(rank=2, selection="top", scoring="tiles")
        torch.compile(Block(), backend=backend)(torch.randn(4, 8))
    (norms,) = [s for s in ours(caplog.records) if s.startswith("push_norms: -")]
    assert "-1 grass.squared_norms, +1 grass.mm_squared_norms" in norms and "(scoring)" in norms


def test_a_logger_of_python_is_enough(caplog):
    caplog.set_level(logging.INFO, "grass_fx")
    torch.compile(Block(), backend=Captured(rank=2))(torch.randn(4, 8))
    assert len(ours(caplog.records)) == 1
    caplog.clear()
    caplog.set_level(logging.WARNING, "grass_fx")
    torch._dynamo.reset()
    torch.compile(Block(), backend=Captured(rank=2))(torch.randn(4, 8))
    assert ours(caplog.records) == []


# --- The structured trace -------------------------------------------------------------------------


def test_torch_trace_receives_the_graph_of_every_stage(trained):
    graphs, name = {}, None
    for line in trained[-1].splitlines():
        if line.startswith("\t") and name:
            graphs[name].append(line)
        elif not line.startswith("\t"):
            record = json.loads(line.partition("] ")[2])
            name = record.get("artifact", {}).get("name", "")
            name = name if name.startswith("grass_") else None
            if name:
                graphs[name] = []
                assert (record["frame_id"], record["frame_compile_id"]) == (0, 0)
    stages = [
        "dynamo", "tapped_regular", "joint_regular", "pushed_regular", "kept_regular",
    ]  # fmt: skip
    assert list(graphs) == [f"grass_{stage}" for stage in stages]
    assert "grass.select.default" in "".join(graphs["grass_joint_regular"])
    pushed, kept = ("".join(graphs[f"grass_{stage}"]) for stage in stages[-2:])
    assert pushed.count("grass.selected_mm.default") == 2 and "grass.select.default" not in pushed
    assert kept.count("grass.selected_mm.default") == kept.count("grass.select.default") == 1


# --- Files ----------------------------------------------------------------------------------------


def dumped(folder, model, *inputs, dynamic=None, **options):
    """The files of one forward, by stage."""
    backend = Captured(dump_dir=str(folder), **options)
    torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    return {file.stem.partition("_")[2]: file for file in sorted(folder.iterdir())}


def imported(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "case", ["static", "dynamic", "scoring", "replacement", "blocks", "float64", "stack"]
)
def test_the_files_run_and_a_pass_changes_no_number(case, tmp_path):
    options, dynamic, model, x = {}, None, mlp(8, 16, 12), torch.randn(5, 8)
    if case == "dynamic":
        dynamic = True
    elif case == "scoring":
        options = {"selection": "top", "scoring": "tiles"}
    elif case == "replacement":
        options = {"selection": "uniform", "replacement": True}
    elif case == "blocks":
        options = {"block": 2}
    elif case == "float64":
        model, x = model.double(), x.double()
    elif case == "stack":
        model, x = Stack(), torch.randn(3, 5, 8)
    files = dumped(tmp_path, model, x, dynamic=dynamic, rank=4, **options)
    modules = {stage: imported(file) for stage, file in files.items()}
    for variant in ("regular", "scoring") if case == "scoring" else ("regular",):
        before, after = (modules[f"{stage}_{variant}"].run(3) for stage in ("joint", "pushed"))
        compact = [o for o in before if o is not None and 4 in o.shape]
        assert len(compact) == (1 if case == "stack" else 2)
        torch.testing.assert_close(before, after)
        assert not torch.equal(after[0], modules[f"pushed_{variant}"].run(4)[0])
        plain, tapped = modules["dynamo"].run(3)[0], modules[f"tapped_{variant}"].run(3)[0]
        torch.testing.assert_close(tapped, plain)
    if case == "scoring":
        assert list(files)[-3:] == ["joint_scoring", "normed_scoring", "pushed_scoring"]
        torch.testing.assert_close(modules["normed_scoring"].run(3), before)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 8, 6))

    def forward(self, x):
        return torch.bmm(x, self.w)


def test_a_file_runs_as_a_program_and_says_where_it_comes_from(tmp_path):
    files = dumped(tmp_path, Block(), torch.randn(4, 8), rank=2, exclude=("head*",))
    code = "import runpy, sys; [runpy.run_path(f, run_name='__main__') for f in sys.argv[1:]]"
    command = [
        sys.executable,
        "-c",
        code,
        *map(str, (files["joint_regular"], files["pushed_regular"])),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = run.stdout.splitlines()
    half = len(printed) // 2
    assert printed[:half] == printed[half:]  # norms to 6 digits
    assert any("(6, 2) torch.float32, norm " in line for line in printed)
    header = files["pushed_regular"].read_text(encoding="utf-8").splitlines()[:6]
    number = Block.forward.__code__.co_firstlineno + 1
    assert header[0].startswith("# pushed_regular, ") and header[0].endswith(" nodes")
    assert header[1:4] == [
        "# made by push_selection from 02_joint_regular.py",
        f"# graph: 0/0 of forward (test_logs.py:{number})",
        "# options: rank=2, exclude=('head*',), compiler='aot_eager'",
    ]
    assert f"grass_fx {grass_fx.__version__}, torch {torch.__version__}, process " in header[4]


def test_a_file_that_cannot_run_says_why(tmp_path):
    class Checkpointed(Block):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    files = dumped(tmp_path, Checkpointed(), torch.randn(4, 8), rank=2)
    text = files["dynamo"].read_text(encoding="utf-8")
    assert "# This does not run by itself: it holds wrap_body_0 (the body of" in text
    assert not hasattr(imported(files["dynamo"]), "run")  # and importing it harms nobody
    imported(files["pushed_regular"]).run()


def test_no_file_is_ever_overwritten(tmp_path):
    """Two graphs of one model, and two processes at once."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(8, 8), Block(8, 8)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    dumped(tmp_path, Broken(), torch.randn(4, 8), rank=2)
    assert len(list(tmp_path.iterdir())) == 8
    code = (
        "import sys, torch\nfrom torch import fx\n"
        "from grass_fx.config import GrassConfig\nfrom grass_fx.compile.dump import Dump\n"
        f"dump = Dump(GrassConfig(dump_dir={str(tmp_path)!r}), 'none')\n"
        "graph = fx.Graph()\ngraph.output((graph.placeholder('x'),))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for _ in range(20): dump.write('dynamo', graph, 'Dynamo', None, {})\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("\n")
        other.stdin.flush()
        dump, graph = Dump(GrassConfig(dump_dir=str(tmp_path)), "none"), torch.fx.Graph()
        graph.output((graph.placeholder("x"),))
        for _ in range(20):
            dump.write("dynamo", graph, "Dynamo", None, {})
    assert other.returncode == 0
    numbers = sorted(int(file.name.partition("_")[0]) for file in tmp_path.iterdir())
    assert numbers == list(range(48))


def test_each_rank_has_a_folder_of_its_own(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        dumped(tmp_path / "graphs", Block(), torch.randn(4, 8), rank=2)
    finally:
        torch.distributed.destroy_process_group()
    assert [Path(f).name for f in (tmp_path / "graphs").iterdir()] == ["rank0"]
    assert len(list((tmp_path / "graphs" / "rank0").iterdir())) == 4


def test_random_rows_are_a_selection():
    rows = random_rows((3, 4), size=8, block=2)
    assert rows.shape == (3, 4) and rows.dtype == torch.int64
    for chosen in rows.tolist():
        assert chosen == sorted(set(chosen)) and max(chosen) < 8
        assert chosen[0] % 2 == 0 and chosen[1] == chosen[0] + 1 and chosen[3] == chosen[2] + 1


# --- Warnings -------------------------------------------------------------------------------------


def test_nothing_taken_says_what_to_do_and_in_which_graph():
    with pytest.warns(GrassWarning, match="took no weight") as caught:
        torch.compile(Block(), backend=Captured(rank=99))(torch.randn(4, 8))
    (message,) = [str(w.message) for w in caught if w.category is GrassWarning]
    assert "linear.weight: rank 99 exceeds its 8 input features" in message
    assert "options rank, side, include or exclude" in message
    assert "0/0 of forward (test_logs.py:" in message


def test_many_reasons_are_shortened():
    with pytest.warns(GrassWarning, match="; and 2 more[.] If"):
        torch.compile(mlp(*[4] * 11), backend=Captured(rank=99))(torch.randn(4, 4))


def messages(recwarn):
    return [str(w.message) for w in recwarn if issubclass(w.category, GrassWarning)]


def train(compiled, *sizes, width=8):
    for size in sizes:
        compiled(torch.randn(size, width)).sum().backward()


def test_a_frame_that_is_compiled_again_and_again_warns_once(recwarn):
    compiled = torch.compile(Block(), backend=Captured(rank=2), dynamic=False)
    train(compiled, 3, 4, 5, 6)
    assert messages(recwarn) == []
    train(compiled, 7, 8, 9)
    (message,) = messages(recwarn)
    assert "the 5th time, in graph 0/4 of forward (test_logs.py:" in message
    assert "TORCH_LOGS=recompiles" in message and "mark_dynamic" in message


def test_the_remedies_of_that_warning_work(recwarn):
    backend = Captured(rank=2)
    compiled = torch.compile(Block(), backend=backend, dynamic=False)
    for size in range(3, 9):
        x = torch.randn(size, 8)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).sum().backward()
    torch._dynamo.reset()
    train(torch.compile(Block(), backend=backend, dynamic=True), *range(3, 9))
    assert len(backend.graphs) == 2 and messages(recwarn) == []


def test_one_frame_of_many_layers_is_no_reason_to_warn(recwarn):
    """Layers compiled one by one share the code of forward, and Dynamo counts it as one frame."""
    backend = Captured(rank=2)
    layers = [Block(8, width) for width in range(6, 13)]
    for layer in layers:
        compiled = torch.compile(layer, backend=backend, dynamic=False)
        train(compiled, 3)
    assert len(backend.graphs) == 7 and messages(recwarn) == []


def test_many_frames_are_no_reason_to_warn(recwarn):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Block(8, 8) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model = Broken()
    train(torch.compile(model, backend=Captured(rank=2)), 3, 3)
    assert messages(recwarn) == []
    assert all(isinstance(b.linear.weight.grad, grass_fx.CompactGrad) for b in model.layers)
