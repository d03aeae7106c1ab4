"""The options: their defaults, what they accept, and what a mistake is told."""

import dataclasses
import inspect
import math
import textwrap

import pytest
import torch
from expecttest import assert_expected_inline

import grass_fx
from grass_fx.config import ON_REFRESH, RULES, SCALE, WARMUP_STEPS, GrassConfig
from grass_fx.errors import GrassError, OptionError


def message(**options):
    """What the user is told about ``options``."""
    with pytest.raises(OptionError) as caught:
        GrassConfig.from_options(options)
    return str(caught.value)


def test_defaults_are_those_of_the_method():
    assert dataclasses.asdict(GrassConfig()) == {
        "rank": 0.25,
        "refresh_every": 100,
        "selection": "cyclic",
        "block": 1,
        "replacement": False,
        "scoring": "auto",
        "side": "in",
        "rest": "none",
        "rest_every": 1,
        "lookups": False,
        "include": None,
        "exclude": (),
        "seed": 0,
        "compiler": "inductor",
        "mode": None,
        "inductor": {},
        "process_group": None,
        "score_sync": "norms",
        "dump_dir": None,
        "disable_passes": (),
    }
    assert (SCALE, WARMUP_STEPS, ON_REFRESH) == ("auto", 20, "carry")


def test_the_optimizer_takes_its_defaults_from_here():
    parameters = inspect.signature(grass_fx.AdamW).parameters
    names = ("scale", "warmup_steps", "on_refresh")
    assert [parameters[name].default for name in names] == [SCALE, WARMUP_STEPS, ON_REFRESH]


def test_rules_that_need_scores_and_rules_that_can_replace():
    scored = {name for name in RULES if GrassConfig(selection=name).scores}
    assert scored == {"top", "frozen_top", "multinomial_norm", "multinomial_norm_sq", "input_norm"}
    replaceable = set()
    for name in RULES:
        try:
            GrassConfig(selection=name, replacement=True)
        except OptionError:
            continue
        replaceable.add(name)
    assert replaceable == {"uniform", "multinomial_norm", "multinomial_norm_sq", "input_norm"}


def test_no_options_are_the_defaults():
    assert GrassConfig.from_options(None) == GrassConfig.from_options({}) == GrassConfig()


def test_options_are_frozen_and_hold_no_list_of_the_caller():
    patterns = ["head.*"]
    config = GrassConfig(exclude=patterns)
    patterns.append("*")
    assert config.exclude == ("head.*",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8


VALID = [
    {"rank": 1},
    {"rank": 0.999},
    {"rank": 16, "block": 8},
    {"rank": 0.25, "block": 8},
    {"refresh_every": 1},
    {"refresh_every": math.inf},
    {"seed": 2**40},
    {"side": "in", "compiler": "aot_eager"},
    {"selection": "uniform", "replacement": True},
    {"inductor": {"max_autotune": True}},
    {"include": None, "exclude": []},
]


@pytest.mark.parametrize("options", VALID, ids=str)
def test_valid_options_are_kept(options):
    config = GrassConfig.from_options(options)
    kept = {name: getattr(config, name) for name in options}
    assert kept == {**options, **({"exclude": ()} if "exclude" in options else {})}


INVALID = {
    "rank": [0, -8, 0.0, 1.0, -0.25, math.nan, math.inf, True, False, "8", None],
    "block": [0, -1, 2.0, True, "8", None],
    "refresh_every": [0, -1, 100.0, 0.5, math.nan, -math.inf, True, "100", None],
    "selection": ["Cyclic", "", None, 1, ["top"]],
    "side": ["left", None, 0],
    "compiler": ["eager", None, 0],
    "replacement": [0, 1, None, "True"],
    "seed": [-1, 0.0, True, "0", None],
    "include": [[1], ["head.*", None], [True], 5, True],
    "exclude": [[1], ["head.*", None], [True], 5, True, None],
    "mode": ["fast", 1],
    "inductor": [None, ["max_autotune"], "max_autotune"],
    "process_group": [3, "world"],
    "score_sync": ["norm", None],
    "dump_dir": [5, True],
}


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option in INVALID for value in INVALID[option]]
)
def test_an_impossible_value_is_an_error_that_names_option_and_value(option, value):
    assert message(**{option: value}).startswith(f"{option}={value!r} ")


def test_an_option_error_is_a_value_error_of_grass():
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, GrassError)


def told(*mistakes):
    """The messages of several mistakes, one below the other."""
    texts = [textwrap.fill(message(**options), 96, subsequent_indent="  ") for options in mistakes]
    return "\n".join(texts) + "\n"


def test_messages_of_unknown_options():
    assert_expected_inline(
        told({"rnak": 8}, {"max_autotune": True}),
        """\
grass has no option 'rnak': did you mean 'rank'? Options of Inductor go into
  options={"inductor": {...}}.
grass has no option 'max_autotune': valid: 'rank', 'refresh_every', 'selection', 'block',
  'replacement', 'scoring', 'side', 'lookups', 'rest', 'rest_every', 'include', 'exclude',
  'seed', 'process_group', 'score_sync', 'compiler', 'mode', 'inductor', 'dump_dir',
  'disable_passes'. Options of Inductor go into options={"inductor": {...}}.
""",
    )


def test_messages_of_rank_and_block():
    assert_expected_inline(
        told({"rank": 0}, {"rank": 1.5}, {"rank": True}, {"block": 0}, {"rank": 12, "block": 8}),
        """\
rank=0 must be at least 1.
rank=1.5 must be a number of rows, or a fraction in (0, 1) of each weight's selected dimension.
rank=True must be a number of rows, or a fraction in (0, 1) of each weight's selected dimension.
block=0 must be a number of rows >= 1.
block=8 does not divide rank=12: make rank a multiple of block.
""",
    )


def test_messages_of_names():
    assert_expected_inline(
        told({"selection": "multinomial"}, {"side": "output"}, {"compiler": "tvm"}),
        """\
selection='multinomial' is not known: did you mean 'multinomial_norm'?
side='output' is not known: did you mean 'out'?
compiler='tvm' is not known: valid: 'inductor', 'aot_eager'.
""",
    )


def test_messages_of_other_values():
    assert_expected_inline(
        told(
            {"refresh_every": 0},
            {"seed": -1},
            {"replacement": 1},
            {"lookups": "yes"},
            {"selection": "top", "replacement": True},
            {"include": [1, "head"]},
            {"inductor": "max-autotune"},
        ),
        """\
refresh_every=0 must be a number of optimizer steps >= 1, or math.inf to keep the first
  selection.
seed=-1 must be an integer >= 0.
replacement=1 must be True or False.
lookups='yes' must be True or False.
selection='top' cannot draw with replacement: use replacement=False, or one of uniform,
  multinomial_norm, multinomial_norm_sq, input_norm.
include=[1, 'head'] must be patterns of parameter names.
inductor='max-autotune' must be a dict of Inductor's options.
""",
    )


@pytest.mark.parametrize("name", ["epilogue_fusion", "triton.cudagraphs", "max_autotune_gemm"])
def test_an_option_of_inductor_is_told_its_place(name):
    assert 'go into options={"inductor": {...}}' in message(**{name: True})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(GrassConfig)])
def test_a_misspelt_option_is_told_the_right_one(name):
    assert f"did you mean {name!r}?" in message(**{name[:-1] + "x": 1})


# rank, block, size -> r
RANKS = [
    (64, 1, 768, 64),
    (64, 8, 768, 64),
    (64, 8, 100, 64),  # 8 does not divide 100: the last of 13 blocks is shorter
    (64, 1, 32, 64),  # r > size: the weight stays dense
    (64, 1, 64, 64),
    (0.25, 1, 768, 192),
    (0.25, 1, 100, 24),  # 25, to the nearest multiple of 8
    (0.25, 1, 112, 32),  # 28 lies between: up
    (0.01, 1, 768, 8),  # at least 8
    (0.25, 8, 768, 192),
    (0.25, 8, 100, 24),
    (0.25, 16, 768, 192),
    (0.25, 16, 96, 32),  # 24 lies between: up
    (0.25, 16, 80, 16),  # 20, to the nearest multiple of 16
    (0.01, 16, 768, 16),
    (0.25, 12, 240, 60),  # max(8, B) = 12, and 60 is five blocks
    # 8, the least, reaches the dimension:
    (0.25, 1, 9, 8),
    (0.25, 1, 8, 2),
    (0.25, 1, 5, 1),
    (0.1, 1, 4, 1),
    (0.9, 1, 1, 1),
    (0.99, 1, 24, 23),
    (0.25, 4, 8, 4),
    (0.75, 4, 8, 4),  # ⌊6 / 4⌋ blocks
    (0.25, 4, 6, 4),  # one block
    (0.25, 8, 8, 8),
    (0.25, 16, 16, 16),
    (0.25, 16, 10, 16),  # a block exceeds the dimension: the weight stays dense
    (0.125, 32, 5461, 672),
    (0.125, 16, 5461, 688),
    (0.9, 8, 17, 16),
]


@pytest.mark.parametrize(("rank", "block", "size", "r"), RANKS)
def test_rank_of(rank, block, size, r):
    assert GrassConfig(rank=rank, block=block).rank_of(size) == r


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 3, 12])
@pytest.mark.parametrize("rank", [0.01, 0.25, 1 / 3, 0.5, 0.99])
def test_a_fraction_fits_every_dimension(rank, block):
    config = GrassConfig(rank=rank, block=block)
    for size in range(1, 200):
        r = config.rank_of(size)
        assert r % block == 0
        assert block <= r <= size or (r == block > size)  # then the weight stays dense


NAME = "model.layers.0.self_attn.q_proj.weight"
WANTS = [
    ({}, None),
    ({"include": "*"}, None),
    ({"include": NAME}, None),
    ({"include": "*.q_proj.weight"}, None),
    ({"include": ["*.mlp.*", "model.layers.[01].*"]}, None),
    ({"include": []}, "not in include"),
    ({"include": ["*.mlp.*"]}, "not in include"),
    ({"include": "layers.0"}, "not in include"),  # patterns match the whole name
    ({"include": "*.Q_proj.*"}, "not in include"),  # and its case
    ({"exclude": "*.mlp.*"}, None),
    ({"exclude": "*.q_proj.weight"}, "excluded by '*.q_proj.weight'"),
    ({"exclude": ["*.mlp.*", "model.layers.?.*"]}, "excluded by 'model.layers.?.*'"),
    ({"include": "*", "exclude": "*"}, "excluded by '*'"),
    ({"include": "*.mlp.*", "exclude": NAME}, f"excluded by {NAME!r}"),
]


@pytest.mark.parametrize(("options", "reason"), WANTS)
def test_patterns_choose_parameters(options, reason):
    assert GrassConfig(**options).wants(NAME) == reason


# --- options by names -----------------------------------------------------------------------------


def test_the_first_pattern_that_matches_counts_and_others_have_the_default():
    patterns = {"*.mlp.*": 8, "*.layers.0.*": 0.5, "model.*.q_proj.*": 16}
    config = GrassConfig(rank=patterns, side={"head*": "out"}, refresh_every=7)
    patterns.clear()  # the options hold no dict of the caller
    for names, rank, side in (
        (["model.layers.0.mlp.up.weight"], 8, "in"),
        ([NAME], 0.5, "in"),
        (["model.layers.1.self_attn.q_proj.weight"], 16, "in"),
        (["q_proj.weight", "model.layers.1.self_attn.q_proj.weight"], 16, "in"),  # two names of one
        (["head.weight"], 0.25, "out"),
        (["MODEL.MLP.up"], 0.25, "in"),
    ):
        assert config.of(*names) == GrassConfig(rank=rank, side=side, refresh_every=7)
    plain = GrassConfig(rank=4)
    assert plain.of(NAME) is plain and plain.matched([NAME]) == {}


def test_what_patterns_match():
    config = GrassConfig(rank={"*.mlp.*": 8, "*": 4}, selection={"head": "top"})
    assert config.scores and not GrassConfig(selection={"head": "cyclic"}).scores
    assert config.matched(["a.mlp.w", "b"]) == {
        ("rank", "*.mlp.*"): True, ("rank", "*"): True, ("selection", "head"): False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"rank": {"a": 12, "b": 16}, "block": {"a": 4, "b": 8}},  # where they meet, they fit
        {"rank": {"a": 16, "b": 0.5}, "block": 8, "refresh_every": {"*": math.inf}},
        {"selection": {"a": "uniform", "*": "top"}, "side": {"a": "auto"}},
        {"selection": {"*": "uniform"}, "replacement": True},
    ],
    ids=str,
)
def test_options_by_names_that_fit(options):
    GrassConfig.from_options(options)


def test_messages_of_options_by_names():
    assert_expected_inline(
        told(
            {"rank": {"a": 8, "b": 0}},
            {"rank": {"a": 1, "b": True}, "block": {"*": 8}},
            {"block": {"a": 0}},
            {"rank": {"a": 16, "b": 12}, "block": 8},
            {"rank": 12, "block": {"a": 4, "b": 8}},
            {"refresh_every": {"a": 5, "b": 0}},
            {"selection": {"a": "cyclic", "b": "multinomial"}},
            {"selection": {"a": "uniform", "b": "top"}, "replacement": True},
            {"side": {"a": "output"}},
            {"rank": {}},
            {"rank": {1: 4}},
            {"side": {"a": {"b": "in"}}, "rank": {"a": 4}},
            {"seed": {"a": 1}},
            {"lookups": {"embed*": True}},
        ),
        """\
rank of the pattern 'b': rank=0 must be at least 1.
rank of the pattern 'b': rank=True must be a number of rows, or a fraction in (0, 1) of each
  weight's selected dimension.
block of the pattern 'a': block=0 must be a number of rows >= 1.
rank of the pattern 'b': block=8 does not divide rank=12: make rank a multiple of block.
block of the pattern 'b': block=8 does not divide rank=12: make rank a multiple of block.
refresh_every of the pattern 'b': refresh_every=0 must be a number of optimizer steps >= 1, or
  math.inf to keep the first selection.
selection of the pattern 'b': selection='multinomial' is not known: did you mean
  'multinomial_norm'?
selection of the pattern 'b': selection='top' cannot draw with replacement: use
  replacement=False, or one of uniform, multinomial_norm, multinomial_norm_sq, input_norm.
side of the pattern 'a': side='output' is not known: did you mean 'out'?
rank={} must have patterns of parameter names, such as {"*.mlp.*": ..., "*": ...}.
rank={1: 4} must have patterns of parameter names, such as {"*.mlp.*": ..., "*": ...}.
side: {'b': 'in'} must not be by names again.
seed={'a': 1} must be an integer >= 0.
lookups={'embed*': True} must be True or False.
""",
    )


def test_what_meets_at_one_weight_and_does_not_fit_names_the_weight():
    config = GrassConfig(rank={"*.q_proj.*": 12}, block={"*.layers.*": 8})
    drawn = GrassConfig(selection={"*.mlp.*": "uniform"}, replacement=True)
    with pytest.raises(OptionError) as error:
        config.of("q_proj.weight", NAME)
    assert str(error.value).startswith("q_proj.weight: block=8 does not divide rank=12")
    with pytest.raises(OptionError, match=f"{NAME}: selection='cyclic' cannot draw with"):
        drawn.of(NAME)
    assert config.of("model.layers.0.mlp.weight").block == 8
    how = {"backend": "grass", "options": {"rank": {"w*": 12}, "block": {"*": 8}}}
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="weight: block=8 does not"):
        torch.compile(torch.nn.Linear(16, 8), **how)(torch.randn(4, 16))


# --- options by a backend's name, or from the environment -----------------------------------------


def trained_rank(**how):
    """r of a weight of 16 columns, as the backend takes it."""
    torch._dynamo.reset()
    model = torch.nn.Linear(16, 8)
    torch.compile(model, **how)(torch.randn(4, 16)).sum().backward()
    return model.weight.grad.compact.shape[1]


def test_a_backend_may_have_a_name_for_its_options(caplog):
    plain = {"compiler": "aot_eager"}
    grass_fx.register_backend("grass_quarter", rank=4, **plain)
    grass_fx.register_backend("grass_quarter", rank=4, **plain)  # as a second process start does
    with caplog.at_level("INFO", logger="grass_fx"):
        assert trained_rank(backend="grass_quarter") == 4
    assert "backend grass_quarter: options {'rank': 4" in caplog.text
    assert trained_rank(backend="grass_quarter", options={"rank": 2, **plain}) == 2
    for name, options, says in (
        ("grass_quarter", {"rank": 8}, "already, with other options"),
        ("inductor", {"rank": 8}, "already, with other options or of another kind"),
        ("grass_wrong", {"rnk": 8}, "did you mean 'rank'"),
        ("not a name", {}, "must be a Python identifier"),
    ):
        with pytest.raises(OptionError, match=says):
            grass_fx.register_backend(name, **options)


def test_options_come_from_the_environment_where_none_are_passed(monkeypatch, caplog):
    monkeypatch.setenv("GRASS_FX_OPTIONS", '{"rank": 6, "compiler": "aot_eager"}')
    with caplog.at_level("INFO", logger="grass_fx"):
        assert trained_rank(backend="grass") == 6
    assert "GRASS_FX_OPTIONS: options {'rank': 6" in caplog.text
    assert trained_rank(backend="grass", options={"rank": 2, "compiler": "aot_eager"}) == 2
    for text, says in (("{rank", "is not JSON"), ("[1]", "JSON object"), ('{"rnk": 1}', "'rank'")):
        monkeypatch.setenv("GRASS_FX_OPTIONS", text)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=says):
            trained_rank(backend="grass")
