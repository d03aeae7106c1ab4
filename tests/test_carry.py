"""What goes along to a next selection: moments and ages of rows that stay."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grass_fx.optim.carry import Move, carried, carried_rows
from grass_fx.state.selection import Selection


def selected(rows, dim=0, scale=None):
    scale = None if scale is None else torch.tensor(scale)
    return Selection(torch.tensor(rows), scale, dim, 0)


def moments(move, place, fresh, first, second):
    where = move.old, move.new, place, fresh
    return carried_rows(first, *where, power=1), carried_rows(second, *where, power=2)


def test_rows_that_stay_keep_their_moments_and_age():
    move = Move(selected([1, 3, 5]), selected([0, 3, 4]), torch.tensor([7, 8, 9]), 6)
    first, second = torch.randn(3, 4), torch.rand(3, 4)
    first[0] = float("nan")  # of a row that leaves
    [(place, fresh, age)] = carried([move])
    zero = torch.zeros(4)
    got = moments(move, place, fresh, first, second)
    torch.testing.assert_close(got[0], torch.stack([zero, first[1], zero]))
    torch.testing.assert_close(got[1], torch.stack([zero, second[1], zero]))
    assert age.tolist() == [0, 8, 0]


def test_with_replacement_moments_are_scaled_and_copies_inherit():
    old, new = selected([1, 1, 5], 1, [2.0, 2.0, 3.0]), selected([1, 5, 5], 1, [1.0, 6.0, 6.0])
    move = Move(old, new, torch.tensor([7, 7, 9]), 6)
    first, second = torch.randn(4, 3), torch.rand(4, 3)
    [(place, fresh, age)] = carried([move])
    got = moments(move, place, fresh, first, second)
    torch.testing.assert_close(got[0], first[:, [0, 2, 2]] * torch.tensor([0.5, 2.0, 2.0]))
    torch.testing.assert_close(got[1], second[:, [0, 2, 2]] * torch.tensor([0.25, 4.0, 4.0]))
    assert age.tolist() == [7, 9, 9]


def random_moves(count):
    """Of weights of many sizes; every third draws with replacement."""
    gen = torch.Generator().manual_seed(count)
    for k in range(count):
        size = int(torch.randint(1, 12, (), generator=gen))
        rank = int(torch.randint(1, size + 1, (), generator=gen))
        age = torch.randint(1, 9, (rank,), generator=gen)
        if k % 3:
            rows = (torch.randperm(size, generator=gen)[:rank].sort().values for _ in range(2))
            yield Move(*(Selection(each, None, k % 2, 0) for each in rows), age, size)
        else:
            rows = (torch.randint(size, (rank,), generator=gen).sort().values for _ in range(2))
            scale = torch.ones(rank)
            yield Move(*(Selection(each, scale, k % 2, 0) for each in rows), age, size)


def test_many_weights_are_carried_as_each_alone():
    moves = list(random_moves(60))
    stayed = 0
    for move, (place, fresh, age) in zip(moves, carried(moves), strict=True):
        old, new = move.old.indices.tolist(), move.new.indices.tolist()
        assert fresh.tolist() == [row not in old for row in new]
        for row, j, is_new, years in zip(new, place, fresh, age.tolist(), strict=True):
            assert 0 <= j < len(old)  # of a new row too: it is looked up before it is filled
            assert is_new or old[j] == row
            assert years == (0 if is_new else move.age[j])
        stayed += len(new) - int(fresh.sum())
        assert age.untyped_storage().nbytes() == age.nbytes  # it becomes state
    assert stayed
    assert carried([]) == []


def test_rows_are_found_by_one_search_however_many_weights_there_are():
    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count[func] += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for count in (4, 40):
        moves = [m for m in random_moves(2 * count) if m.old.scale is None][:count]
        with Calls() as calls:
            carried(moves)
        views = (torch.ops.aten.empty_like.default,)
        counts.append({op: n for op, n in calls.count.items() if op not in views})
    assert counts[0] == counts[1] and counts[0][torch.ops.aten.searchsorted.Tensor] == 1
