"""What docs/coverage.md says of published models is what `grass_fx.explain` finds.

To change the page: python examples/model_coverage.py --families --update, and read the diff.
"""

import pytest
import torch
from torch import nn

import families
import model_coverage
from families import FAMILIES, saved


@pytest.fixture
def transformers():
    module = pytest.importorskip("transformers")
    module.utils.logging.set_verbosity_error()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_has_the_line_of_every_family(name):
    row = model_coverage.row_of_family(name, saved()[name])
    assert row in model_coverage.PAGE.read_text(encoding="utf-8").splitlines()


def test_only_these_families_are_saved():
    assert [*saved()] == [*FAMILIES]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_fits_together(name):
    """lookups=True takes more, and a taken parameter needs an eighth and a little bookkeeping."""
    found = saved()[name]
    count, (default, lookups), (full, *compact) = (
        found[k] for k in ("parameters", "taken", "bytes")
    )
    assert default <= lookups < count
    assert full == pytest.approx(6 * count, rel=1e-4)  # a gradient and two moments
    for taken, held in zip((default, lookups), compact, strict=True):
        assert held == pytest.approx(6 * (count - 7 / 8 * taken), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_of_parameters_are_those_of_the_configurations(name, transformers):
    parameters = [p.numel() for p in FAMILIES[name].build().parameters() if p.requires_grad]
    found = saved()[name]
    assert sum(parameters) == found["parameters"]
    assert found["bytes"][0] == sum(6 * count + 4 for count in parameters)  # and a step count


@pytest.mark.slow
def test_tracing_finds_what_is_saved(transformers):
    assert families.trace(FAMILIES["BERT-base"]) == saved()["BERT-base"]


@pytest.mark.slow
def test_two_layers_tell_as_much_as_six(transformers):
    """Gemma-3's first five layers have another attention than the sixth."""
    assert families.trace(FAMILIES["Gemma-3-270M"], depth=6) == saved()["Gemma-3-270M"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.31.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("encoder.block.7.layer.2.layer_norm.weight", "encoder.block.1.layer.2.layer_norm.weight"),
        ("model.encoder.conv2.weight", "model.encoder.conv2.weight"),
    ],
)
def test_a_parameter_of_a_later_layer_has_its_stand_in(name, expected):
    assert families.stand_in(name, 2) == expected


class Widening(nn.Module):
    """Its third layer is wider than its second."""

    def __init__(self, depth):
        super().__init__()
        sizes = [8, 8, 8, 16][: depth + 1]
        self.layers = nn.Sequential(*map(nn.Linear, sizes, sizes[1:]))

    def forward(self, x):
        return self.layers(x)


class OfWidening(families.Family):
    def build(self, depth=3):
        return Widening(depth).to("meta", torch.bfloat16)


def test_a_stand_in_of_another_shape_is_an_error():
    family = OfWidening("", "", {}, inputs=lambda: {"x": torch.zeros(2, 8)})
    with pytest.raises(ValueError, match=r"layers\.2\.weight has another shape than layers\.1\.w"):
        families.trace(family)
    assert families.trace(family, depth=3)["parameters"] == 72 + 72 + 144
