"""Selections below collectives: what is not selected does not travel."""

import re

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from test_push_selection import traced

from grass_fx.ops import SELECT
from grass_fx.passes.facts import JointFacts
from grass_fx.passes.push_selection import push_selection_pass
from helpers import text
from ranks import spawn

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
ROWS = torch.tensor([0, 2, 3])


def product(d, x):
    return aten.mm.default(aten.permute.default(d, [1, 0]), x)


def reduced(d, x, group, ranks):
    return c10d.wait_tensor.default(c10d.all_reduce.default(product(d, x), "avg", group))


def scattered(d, x, group, ranks):
    total = c10d.reduce_scatter_tensor.default(product(d, x), "sum", ranks, group)
    return c10d.wait_tensor.default(total)


@pytest.fixture
def group(tmp_path):
    """A group of this process alone, under a name that does not change."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def rewritten(gradient, group, scale=None, dim=0):
    def run(indices, scale, d, x):
        return SELECT(gradient(d, x, group, 1), indices, scale, dim)

    inputs = ROWS, scale, torch.randn(6, 4), torch.randn(6, 4)
    gm = traced(run, *inputs)
    result = push_selection_pass(gm.graph, JointFacts())
    gm.graph.lint()
    lines = text(gm.graph).replace("torch.ops.", "").replace(".default", "").splitlines()
    lines = [line.strip().replace(f"'{group}'", "'group'") for line in lines[1:]]
    lines = [re.sub(r", device = device\(.*?\), requires_grad = False", "", x) for x in lines]
    return result, "\n".join(lines) + "\n"


def test_an_all_reduce_sums_what_is_selected(group):
    result, code = rewritten(reduced, group)
    assert result.rewritten and not result.stopped
    assert_expected_inline(
        code,
        """\
permute = aten.permute(d_1, [1, 0])
selected_mm = grass.selected_mm(permute, x_1, indices_1, None, 0)
all_reduce_1 = _c10d_functional.all_reduce(selected_mm, 'avg', 'group')
wait_tensor_1 = _c10d_functional.wait_tensor(all_reduce_1)
return wait_tensor_1
""",
    )


def test_a_reduce_scatter_sums_the_rows_of_all_ranks(group):
    result, code = rewritten(scattered, group, torch.rand(3))
    assert result.rewritten and not result.stopped
    assert_expected_inline(
        code,
        """\
permute = aten.permute(d_1, [1, 0])
all_gather_into_tensor = _c10d_functional.all_gather_into_tensor(indices_1, 1, 'group')
wait_tensor_1 = _c10d_functional.wait_tensor(all_gather_into_tensor)
all_gather_into_tensor_1 = _c10d_functional.all_gather_into_tensor(scale_1, 1, 'group')
wait_tensor_2 = _c10d_functional.wait_tensor(all_gather_into_tensor_1)
iota = prims.iota(1, start = 0, step = 4, dtype = torch.int64)
reshape = aten.reshape(wait_tensor_1, [1, 3])
unsqueeze = aten.unsqueeze(iota, 1)
add = aten.add.Tensor(reshape, unsqueeze)
reshape_1 = aten.reshape(add, [-1])
selected_mm = grass.selected_mm(permute, x_1, reshape_1, wait_tensor_2, 0)
reduce_scatter_tensor_1 = _c10d_functional.reduce_scatter_tensor(selected_mm, 'sum', 1, 'group')
wait_tensor_3 = _c10d_functional.wait_tensor(reduce_scatter_tensor_1)
return wait_tensor_3
""",
    )


def test_columns_of_parts_and_other_reductions_stop(group):
    result, _ = rewritten(scattered, group, dim=1)
    assert "ranks may select different columns" in next(iter(result.stopped.values()))

    def largest(d, x, group, ranks):
        return c10d.wait_tensor.default(c10d.all_reduce.default(product(d, x), "max", group))

    result, _ = rewritten(largest, group)
    assert "is no sum" in next(iter(result.stopped.values()))


def selecting(gradient, ranks):
    """``select`` of a gradient that is made with other ranks."""

    def run(indices, scale, d, x):
        g = gradient(d, x, dist.group.WORLD.group_name, ranks)
        return SELECT(g, indices, scale, 0)

    return run


def compare(rank, ranks):
    """One of several processes: the rewritten graph and the original agree on every rank."""
    gen = torch.Generator().manual_seed(rank)
    d, x = (torch.randn(6, 8, dtype=torch.float64, generator=gen) for _ in range(2))
    for gradient, rows in (
        (reduced, [1, 2, 6]),
        (scattered, [0, 1 + rank, 3]),  # other rows of its part on each rank
    ):
        for scale in (None, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)):
            inputs, run = (torch.tensor(rows), scale, d, x), selecting(gradient, ranks)
            want = run(*inputs)
            gm = traced(run, *inputs)
            assert push_selection_pass(gm.graph, JointFacts()).rewritten
            gm.recompile()
            torch.testing.assert_close(gm(*inputs), want)


def test_two_ranks_get_the_same_numbers_as_before():
    spawn(compare, 2, 2)
