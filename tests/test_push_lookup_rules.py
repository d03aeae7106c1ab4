"""push_lookup_rules: what a selection becomes below the gradient of a lookup."""

from functools import partial

import pytest
import torch
from expecttest import assert_expected_inline
from test_push_rules import TESTED, rewritten
from test_push_selection import count, pushed

from grass_fx.ops import SELECT
from grass_fx.passes.push_lookup_rules import LOOKUP_RULES

aten = torch.ops.aten
V, N = 7, 4
TOKENS = torch.tensor([[1, 3, 3], [0, 6, 3]])
D = torch.randn(2, 3, N, dtype=torch.float64)
COLUMNS, RHO = torch.tensor([0, 2, 2]), torch.rand(3, dtype=torch.float64)
INPUTS = (D, TOKENS)


def zeros(*shape):
    return aten.full.default([*shape], 0, dtype=torch.float64)


def embedding(d, tokens, padding_idx=-1, by_frequency=False):
    return aten.embedding_dense_backward.default(d, tokens, V, padding_idx, by_frequency)


def masked(d, tokens):
    mask = aten.unsqueeze.default(tokens != 3, -1)
    return aten._unsafe_masked_index_put_accumulate.default(zeros(V, N), mask, [tokens], d)


def index_put(d, tokens, *accumulate):
    return aten.index_put.default(zeros(V, N), [tokens], d, *accumulate)


def index_put_of_columns(d, tokens):
    d = aten.permute.default(d, [2, 0, 1])
    return aten._unsafe_index_put.default(zeros(N, V), [None, tokens], d, True)


def test_embedding_dense_backward():
    """As AOTAutograd alone leaves it."""
    assert_expected_inline(
        rewritten(embedding, 1, INPUTS, COLUMNS),
        """\
select_1 = grass.select(arg2_1, arg0_1, None, 2)
embedding_dense_backward_1 = aten.embedding_dense_backward(select_1, arg3_1, 7, -1, False)
return embedding_dense_backward_1
""",
    )


def test_unsafe_masked_index_put_accumulate():
    """What Inductor makes of it."""
    assert_expected_inline(
        rewritten(masked, 1, INPUTS, COLUMNS, RHO).replace("index_put_accumulate_1", "1"),
        """\
ne = aten.ne.Scalar(arg3_1, 3)
unsqueeze = aten.unsqueeze(ne, -1)
full_1 = aten.full([7, 3], 0, dtype = torch.float64)
select_1 = grass.select(arg2_1, arg0_1, arg1_1, 2)
_unsafe_masked_1 = aten._unsafe_masked_index_put_accumulate(full_1, unsqueeze, [arg3_1], select_1)
return _unsafe_masked_1
""",
    )


def test_index_put():
    assert_expected_inline(
        rewritten(lambda *given: index_put(*given, True), 1, INPUTS, COLUMNS),
        """\
full_1 = aten.full([7, 3], 0, dtype = torch.float64)
select_1 = grass.select(arg2_1, arg0_1, None, 2)
index_put_1 = aten.index_put(full_1, [arg3_1], select_1, True)
return index_put_1
""",
    )


def test_index_put_of_columns():
    """Of a transposed table."""
    assert_expected_inline(
        rewritten(index_put_of_columns, 0, INPUTS, COLUMNS, RHO),
        """\
permute = aten.permute(arg2_1, [2, 0, 1])
full_1 = aten.full([3, 7], 0, dtype = torch.float64)
select_1 = grass.select(permute, arg0_1, arg1_1, 0)
_unsafe_index_put_1 = aten._unsafe_index_put(full_1, [None, arg3_1], select_1, True)
return _unsafe_index_put_1
""",
    )


KINDS = {
    "padding_idx": lambda *given: embedding(*given, 3),
    "scale_grad_by_freq": lambda *given: embedding(*given, -1, True),
    "masked": masked,
    "index_put": lambda *given: index_put(*given, True),
    "index_put that replaces": lambda d, x: index_put(d[0, :2], x[0, :2]),
    "into another gradient": lambda d, x: aten.index_put.default(
        aten.mm.default(aten.full.default([V, 6], 0.5, dtype=d.dtype), d.view(6, N)), [x], d, True
    ),
    "of one token": lambda d, x: aten.index_put.default(zeros(V, N), [x[0, 0]], d[0, 0], True),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_are_added_of_what_is_selected(name, scaled):
    """With ρ, which counts once."""

    def gradient(d, tokens, columns, scale):
        return SELECT(KINDS[name](d, tokens), columns, scale if scaled else None, 1)

    _, graph, result = pushed(gradient, *INPUTS, COLUMNS, RHO)
    assert result.count == 1 and not result.stopped
    whole = [
        n.name for n in graph.nodes if n.op == "call_function" and n.meta["val"].shape == (V, N)
    ]
    assert not whole


STOPS = {
    "adds into rows that are selected": [
        (embedding, 0), (masked, 0), (index_put, 0), (index_put_of_columns, 1),
    ],
    "adds to single elements": [
        (lambda d, x: index_put(d[0, 0, 0], zeros(V, N) == 0), 1),
        (lambda d, x: aten.index_put.default(zeros(V, N), [x, x % N], d[..., 0], True), 1),
    ],
    "broadcasts what it adds": [
        (lambda d, x: index_put(d[0, 0], x, True), 1),
        (lambda d, x: index_put(d[..., :1], x, True), 1),
        (lambda d, x: masked(d[..., :1], x), 1),
        (lambda d, x: masked(d[0, 0], x), 1),
    ],
    "masks along the selected dimension": [
        (lambda d, x: aten._unsafe_masked_index_put_accumulate.default(
            zeros(V, N), d > 0, [x], d), 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", STOPS)
def test_others_stop_with_their_reason(reason):
    def selected(gradient, dim, d, tokens, rows):
        return SELECT(gradient(d, tokens), rows, None, dim)

    for gradient, dim in STOPS[reason]:
        _, graph, result = pushed(partial(selected, gradient, dim), *INPUTS, COLUMNS)
        (why,) = result.stopped.values()
        assert reason in why and count(graph, SELECT) == 1


def test_every_rule_has_its_golden():
    assert set(LOOKUP_RULES) <= TESTED
