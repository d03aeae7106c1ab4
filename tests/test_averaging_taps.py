"""The taps of a weight that several processes train: select first, average then."""

import re

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import nn

import grass_fx
from grass_fx.distributed import data_parallel
from helpers import Captured


@pytest.fixture
def group(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return x @ self.weight.T


class Experts(nn.Module):
    """A stack of matrices (out, in), of which a product makes a transposed gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x):
        return x @ self.weight.transpose(1, 2)


def backward_of(tmp_path, variant, make=Scale, shape=(5, 6), **options):
    """The operations of the joint graph after the passes that make gradients; C is checked."""
    torch._dynamo.reset()
    model = data_parallel(make())
    backend = Captured(rank=3, dump_dir=str(tmp_path), **options)
    x = torch.randn(shape)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    (full,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    grad = model.weight.grad
    assert isinstance(grad, grass_fx.CompactGrad) and not grad.local
    torch.testing.assert_close(grad.compact, grad.selection.project(full))
    (file,) = tmp_path.rglob(f"*pushed_{variant}.py")
    names = re.findall(r"= torch\.ops\.([\w.]+?)(?:\.default)?\((.*?)\)", file.read_text())
    start = max(k for k, (name, _) in enumerate(names) if name.endswith("mm"))
    return "".join(f"{name}({args})\n" for name, args in names[start:])


def test_a_regular_step_averages_what_is_selected(group, tmp_path):
    assert_expected_inline(
        backward_of(tmp_path, "regular"),
        """\
grass.selected_mm(permute_1, primals_2, primals_4, None, 1)
_c10d_functional.all_reduce(selected_mm, 'avg', '0')
_c10d_functional.wait_tensor(all_reduce)
""",
    )


def test_what_is_sent_is_contiguous(group, tmp_path):
    """A selection that has gone below a transpose is copied: NCCL takes nothing else."""
    assert_expected_inline(
        backward_of(tmp_path, "regular", Experts, (2, 5, 6)),
        """\
aten.bmm(permute_1, select_1)
aten.reshape(bmm_2, [2, 6, 3])
aten.permute(reshape, [0, 2, 1])
aten.clone(permute_3, memory_format = torch.contiguous_format)
_c10d_functional.all_reduce(clone, 'avg', '0')
_c10d_functional.wait_tensor(all_reduce)
""",
    )


def test_a_micro_batch_averages_nothing(group, tmp_path):
    assert "all_reduce" not in backward_of(tmp_path, "regular_local")


def test_a_scoring_step_averages_what_is_selected(group, tmp_path):
    assert_expected_inline(
        backward_of(tmp_path, "scoring", selection="top"),
        """\
aten.mm(permute_1, primals_2)
aten.permute(mm_1, [1, 0])
aten.permute(permute_2, [1, 0])
grass.select(permute_3, primals_5, None, 1)
grass.squared_norms(permute_3, 1)
_c10d_functional.all_reduce(select, 'avg', '0')
_c10d_functional.wait_tensor(all_reduce)
""",
    )


def test_it_may_score_the_averaged_gradient(group, tmp_path):
    got = backward_of(tmp_path, "scoring", selection="top", score_sync="gradient")
    assert_expected_inline(
        got,
        """\
aten.mm(permute_1, primals_2)
aten.permute(mm_1, [1, 0])
aten.permute(permute_2, [1, 0])
_c10d_functional.all_reduce(permute_3, 'avg', '0')
_c10d_functional.wait_tensor(all_reduce)
grass.select(wait_tensor, primals_5, None, 1)
grass.squared_norms(wait_tensor, 1)
""",
    )
