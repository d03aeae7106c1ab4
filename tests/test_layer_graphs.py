"""python -m grass_fx graphs: the graph of one layer, before and after each pass."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from grass_fx.__main__ import main
from grass_fx.errors import OptionError
from grass_fx.inspect.graphs import layer_graphs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)) * 2)


def test_one_layer_before_and_after_each_pass():
    model = nn.Sequential(Block(), Block())
    stages = layer_graphs(model, "1.down", [torch.randn(32, 8)], {}, {"rank": 4})
    assert list(stages) == ["joint", "push_selection", "keep_selected"]
    assert "aten.mm" in stages["joint"] and "selected_mm" in stages["push_selection"]
    assert_expected_inline(
        stages["keep_selected"],
        """\
permute_3: "f32[16, 8]" = torch.ops.aten.permute.default(view_3, [1, 0])
mm_3: "f32[32, 8]" = torch.ops.aten.mm.default(mul_1, permute_3)
select_default: "f32[32, 4]" = torch.ops.grass.select.default(mul_1, primals_13, None, 1)
permute_4: "f32[8, 32]" = torch.ops.aten.permute.default(tangents_1, [1, 0])
permute_6: "f32[8, 16]" = torch.ops.aten.permute.default(permute_3, [1, 0])
mm_5: "f32[32, 16]" = torch.ops.aten.mm.default(tangents_1, permute_6)
mm_11: "f32[8, 4]" = torch.ops.aten.mm.default(permute_4, select_default)""",
    )


def test_a_pattern_matches_modules_and_what_is_within_them():
    model, x = nn.Sequential(Block(), Block()), torch.randn(32, 8)
    one, both = (layer_graphs(model, name, [x], {}, {"rank": 4}) for name in ("0", "*.up"))
    assert one["joint"].count("grass.select") == both["joint"].count("grass.select") == 2
    assert "tanh" in one["joint"] and "tanh" not in both["joint"]


def test_an_unknown_layer_is_an_error_that_names_those_there_are():
    with pytest.raises(OptionError, match=r"layer 'head'.*They are .*0\.up"):
        layer_graphs(nn.Sequential(Block()), "head", [torch.randn(4, 8)], {}, {"rank": 4})


def test_the_command(capsys, monkeypatch):
    monkeypatch.syspath_prepend("tests")
    given = ["graphs", "--model", "test_layer_graphs:Block", "--layer", "up", "--rank", "4"]
    assert main(given) == 0
    joint, pushed, kept = capsys.readouterr().out.strip().split("\n\n")
    assert {line[0] for line in joint.splitlines()[1:]} == {" "}
    (_, *gone), new = ([x for x in pushed.splitlines() if x[0] == mark] for mark in "-+")
    assert "grass.select." in gone[-1] and [x.count("grass.selected_mm") for x in new] == [1, 1]
    _, *rewritten = (x for x in kept.splitlines() if x[0] == "-")
    assert [x[1:] for x in rewritten] == [new[0][1:]]
    assert main([*given[:4], "none", "--rank", "4"]) == 2
    assert "no module of the graphs" in capsys.readouterr().err
