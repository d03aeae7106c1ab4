"""Sharded parameters are gathered again in the backward; what else is gathered is not."""

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from test_push_selection import traced
from torch.utils.checkpoint import CheckpointPolicy

from grass_fx.passes.facts import JointFacts
from grass_fx.passes.pipeline import GrassPasses
from grass_fx.passes.recompute_gathers import recompute_gathers_pass

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def gather(x, group):
    return c10d.wait_tensor.default(c10d.all_gather_into_tensor.default(x, 1, group))


def marked(gm):
    """The nodes that the partitioner is to compute again, and how many gatherings there are."""
    count = recompute_gathers_pass(gm.graph, JointFacts()).count
    marks = {CheckpointPolicy.MUST_RECOMPUTE: "again: ", None: "once:  "}
    lines = [
        f"{marks[node.meta.get('recompute')]}{node.name}"
        for node in gm.graph.nodes
        if node.op == "call_function"
    ]
    return count, "\n".join(lines) + "\n"


def test_what_a_parameter_is_gathered_by_is_marked(group):
    def run(w, x):
        full = aten.permute.default(
            gather(aten._to_copy.default(w, dtype=torch.float64), group), [1, 0]
        )
        y = aten.mm.default(x, full)
        return aten.mul.Tensor(y, gather(y, group))

    inputs = torch.randn(4, 3), torch.randn(5, 3, dtype=torch.float64)
    gm = traced(run, *inputs)
    count, text = marked(gm)
    assert count == 1  # y is no parameter
    assert_expected_inline(
        text,
        """\
once:  _to_copy
again: all_gather_into_tensor
again: wait_tensor
again: permute
once:  mm
once:  all_gather_into_tensor_1
once:  wait_tensor_1
once:  mul
""",
    )
    torch.testing.assert_close(gm(*inputs), run(*inputs))


def test_a_shared_parameter_and_graphs_without_any(group):
    def twice(w):
        return aten.add.Tensor(gather(w, group), gather(aten.view.default(w, [3, 4]), group).t())

    assert marked(traced(twice, torch.randn(4, 3)))[0] == 2
    count, text = marked(traced(lambda x: x.sin().cos(), torch.randn(3)))
    assert count == 0 and "again" not in text


def test_the_cache_knows_of_it():
    uuids = {GrassPasses(JointFacts(reshards=each)).uuid() for each in (True, False)}
    assert len(uuids) == 2
