"""`plan` for models by name, a config.json, or a function: shapes, activations, full rank."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import which_card

import grass_fx
from grass_fx.__main__ import main
from grass_fx.config import GrassConfig
from grass_fx.errors import OptionError
from grass_fx.inspect import hf
from grass_fx.inspect.activations import of_decoder, of_layers, traced
from grass_fx.inspect.explain import explain
from grass_fx.inspect.shapes import ALIASES, DECODERS, Decoder, decoder, named_shapes
from llama import build

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/memory-planning.md").read_text(encoding="utf-8")
PARAMETERS = {  # as published
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824, "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496, "Qwen2.5-0.5B": 494_032_768, "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920, "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200, "Qwen3-32B": 32_762_123_264, "Gemma-2-2B": 2_614_341_888,
    "Gemma-2-9B": 9_241_705_984, "Gemma-3-270M": 268_098_176, "Gemma-3-1B": 999_885_952,
    "Mistral-7B": 7_241_732_096, "Mixtral-8x7B": 46_702_792_704, "Llama-3-8B": 8_030_261_248,
}  # fmt: skip
CLASSES = {
    "Llama-3.1-8B": "LlamaConfig", "Llama-3.2-1B": "LlamaConfig", "Qwen2.5-7B": "Qwen2Config",
    "Qwen3-8B": "Qwen3Config", "Gemma-2-2B": "Gemma2Config", "Gemma-3-1B": "Gemma3TextConfig",
    "Mistral-7B": "MistralConfig", "Mixtral-8x7B": "MixtralConfig",
}  # fmt: skip
TINY = Decoder(320, 64, 160, 3, 4, 2, 16)


def config_of(it, kind):
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, kind)(
        vocab_size=it.vocab, hidden_size=it.hidden, intermediate_size=it.ffn,
        num_hidden_layers=it.layers, num_attention_heads=it.heads, num_key_value_heads=it.kv_heads,
        head_dim=it.head_dim, tie_word_embeddings=it.tied,
        **({"num_local_experts": it.experts} if it.experts else {}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What save_pretrained writes of a small model's configuration."""
    path = tmp_path_factory.mktemp("model")
    config_of(TINY, "LlamaConfig").save_pretrained(path)
    return str(path)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DECODERS])
def test_named_models_have_the_published_number_of_parameters(name):
    shapes, embedding = named_shapes(name.lower())
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[name]
    counted = json.loads((ROOT / "docs/families.json").read_text())  # models of transformers
    if name in counted:
        assert counted[name]["parameters"] == PARAMETERS[name]
    assert embedding in shapes


@pytest.mark.parametrize("name", [*CLASSES])
def test_named_models_have_the_parameters_of_transformers(name):
    it = decoder(name)
    model = hf.build(config_of(it, CLASSES[name]), None, layers=1)
    shapes, _ = named_shapes(name)
    first = {key: shape for key, shape in shapes.items() if ".layers." not in key}
    first |= {key: shape for key, shape in shapes.items() if ".layers.0." in key}
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == first


def test_short_names_and_capitals_do_not_matter():
    for short, name in ALIASES.items():
        assert decoder(short) is decoder(name) is decoder(name.upper())


def test_unknown_names_list_the_known_ones(capsys):
    assert main(["plan", "--memory", "24GB", "--shape", "qwen3-8c"]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'Qwen3-8B'" in told and "Llama-3.3-70B" in told and "--hf PATH" in told


def test_help_is_plain_text_with_real_flags_only(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    told = capsys.readouterr().out
    assert "`" not in told and ":func:" not in told and "Args:" not in told
    for flag in ("--shape", "--hf", "--model", "--gpus", "--checkpointing", "--tokens", "--card"):
        assert flag in told


# --- what fits ------------------------------------------------------------------------------------


def test_full_rank_that_fits_is_said_to_fit():
    fits = grass_fx.plan("llama-1b", "24GB")
    assert fits.full_rank_fits and fits.full_total == sum(fits.full_parts.values())
    assert str(fits).startswith("full rank fits: 10.713 GB of 24.000 GB.")
    assert "weights in the subspace" not in str(fits)
    asked = grass_fx.plan("llama-1b", "24GB", rank=0.25)
    assert "weights in the subspace" in str(asked)
    less = grass_fx.plan("llama-1b", "8GB")
    assert not less.full_rank_fits and str(less).startswith("rank ")
    assert less.to_dict()["full_rank_fits"] is False


def test_activations_count_into_what_fits():
    plans = [grass_fx.plan("llama-7b", "40GB", tokens=tokens) for tokens in (None, 2048)]
    assert plans[1].rank < plans[0].rank and plans[1].total <= plans[1].memory
    assert plans[1].parts["logits"] == 2 * 2 * 2048 * 32000
    again = grass_fx.plan("llama-7b", "40GB", tokens=2048, checkpointing=True)
    assert again.rank > plans[1].rank
    assert again.parts["activations"] < plans[1].parts["activations"] / 5
    with pytest.raises(OptionError, match="checkpointing"):
        grass_fx.plan([(64, 64)], "1MB", checkpointing=True)


def test_frozen_parameters_have_no_gradient(capsys):
    given = ["plan", "--memory", "40GB", "--shape", "llama-8b", "--rank", "0.0625", "--json"]
    found = []
    for more in ([], ["--freeze", "*embed_tokens*"], ["--freeze", "*embed_tokens*", "*q_proj*"]):
        assert main([*given, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["parts"])
    embedding = 2 * 128256 * 4096
    assert found[0]["dense gradients"] - found[1]["dense gradients"] == embedding
    assert found[0]["dense state"] - found[1]["dense state"] > 2 * embedding - 100
    r = 32 * 2 * 4096 * 256
    assert found[1]["compact gradients"] - found[2]["compact gradients"] == r
    assert found[0]["weights"] == found[2]["weights"]
    assert main([*given, "--freeze", "embed"]) == 2
    assert "frozen: 'embed' matches no parameter; the nearest is" in capsys.readouterr().err


def test_several_gpus_share_all_but_activations():
    alone, shared = (
        grass_fx.plan("llama-8b", "80GB", rank=0.25, tokens=512, gpus=gpus) for gpus in (1, 8)
    )
    for part in ("weights", "compact gradients", "dense gradients", "compact state"):
        assert shared.parts[part] == -(-alone.parts[part] // 8)
    assert shared.parts["activations"] == alone.parts["activations"]
    layer = {n: s for n, s in named_shapes("llama-8b")[0].items() if ".layers.0." in n}
    root = 2 * 128256 * 4096 + 4096
    gathered = 2 * (2 * sum(map(math.prod, layer.values())) + root)
    assert shared.parts["gathered weights"] == gathered
    assert "divided by 8" in str(shared) and "on each of 8 GPUs" in str(shared)
    with pytest.raises(OptionError, match="gpus=0"):
        grass_fx.plan("llama-8b", "80GB", gpus=0)


MEASURED = [  # GiB on an H100 at 1 x 256 tokens, docs/benchmarks.md: "Memory on a GPU"
    ("llama-13b", 0.125, False, 35.77), ("llama-13b", 64, False, 27.69),
    ("llama-7b", 0.125, False, 19.10), ("llama-7b", 0.125, True, 17.18),
]  # fmt: skip


def test_the_page_has_the_cards_that_the_script_prints():
    for gpus, model in ((1, "Llama-3.2-3B"), (8, "Llama-3.2-1B")):
        assert f"| {' | '.join(which_card.row(model, gpus, [2048, 8192], False))} |" in PAGE
    assert [which_card.smallest(size) for size in (15, 15.1, 79, 79.1)] == ["16", "24", "80", "-"]


@pytest.mark.parametrize(("name", "rank", "in_backward", "gib"), MEASURED)
def test_plans_are_what_a_gpu_took(name, rank, in_backward, gib):
    plan = grass_fx.plan(
        name, "40GB", rank=rank, tokens=256, checkpointing=True, in_backward=in_backward,
        options={"exclude": ["head*"]},
    )  # fmt: skip
    assert plan.total / 2**30 == pytest.approx(gib, rel=0.01)


# --- speed ----------------------------------------------------------------------------------------


STEPS = [  # layers, sequences of 1024 tokens, tokens/s of an H100: full rank, r = 1/8, their ratio
    ("1b", 24, 16, 63_284, 76_934, 1.216), ("7b", 4, 8, 97_696, 132_321, 1.354),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layers", "batch", "full", "grass", "ratio"), STEPS)
def test_predictions_are_near_what_a_gpu_did(name, layers, batch, full, grass, ratio):
    """docs/benchmarks.md, "Whole steps", and docs/memory-planning.md beside predictions."""
    it = replace(decoder(f"llama-{name}"), layers=layers)
    with torch.device("meta"):
        model = build(name, layers=layers).to(torch.bfloat16)
    found = grass_fx.plan(
        model, "80GB", rank=0.125, tokens=(batch, 1024), card="H100",
        activations=of_decoder(it, batch * 1024, 2),
    ).speed  # fmt: skip
    assert found.tokens["full rank"] == pytest.approx(full, rel=0.07)
    assert found.tokens["subspace"] == pytest.approx(grass, rel=0.07)
    assert found.ratio == pytest.approx(ratio, abs=0.06)
    for value in (*found.tokens.values(), *found.seconds.values(), found.ratio):
        assert value == float(f"{value:.2g}")
    predicted = [f"{value:,.0f}" for value in found.tokens.values()]
    cells = f"| {full:,} | {predicted[0]} | {grass:,} | {predicted[1]} | {ratio} | {found.ratio} |"
    assert cells in PAGE


def test_the_prediction_follows_what_is_counted():
    def at(**given):
        given = {"rank": 0.25, "tokens": (8, 1024), "card": "rtx4090", **given}
        return grass_fx.plan("llama-7b", "80GB", **given).speed

    plain, again, long = at(), at(checkpointing=True), at(tokens=(1, 8192))
    assert again.tokens["subspace"] < plain.tokens["subspace"]
    assert long.tokens["full rank"] < plain.tokens["full rank"]  # attention
    assert again.ratio < plain.ratio and at(rank=0.5).ratio < plain.ratio < at(rank=64).ratio
    assert at(card="h200").tokens["full rank"] > 4 * plain.tokens["full rank"]


def test_no_time_is_told_where_something_is_not_known():
    known = {"rank": 0.25, "tokens": (1, 512), "card": "h100"}
    for model, given, why in (
        ("llama-60m", {"tokens": None}, "give tokens"),
        ({"up": (64, 64)}, {}, "give tokens"),
        ("llama-60m", {"activations": "1GB"}, "give tokens"),
        ("llama-60m", {"gpus": 8}, "the network"),
        ("llama-60m", {"dtype": torch.float32}, "rates are those of"),
        ("mixtral-8x7b", {}, "products of mixtures"),
    ):
        found = grass_fx.plan(model, "900GB", **{**known, **given})
        assert found.speed is None and f"tokens/s are not predicted: {why}" in str(found)
    assert "tokens/s" not in str(grass_fx.plan("llama-60m", "1GB", tokens=512))
    with pytest.raises(OptionError, match="card='tpu' is not known. Known are h100, h200, a100"):
        grass_fx.plan("llama-60m", "1GB", tokens=512, card="tpu")


def test_the_command_line_predicts_tokens_a_second(capsys):
    given = ["plan", "--shape", "llama-13b", "--tokens", "1x2048", "--card", "a100", "--memory"]
    assert main([*given, "200GB"]) == 0
    assert "for one a100: 2,100 tokens/s at full rank\n" in capsys.readouterr().out
    assert main([*given, "40GB", "--rank", "64"]) == 0
    told = "3,100 tokens/s, 1.5 times full rank's 2,100, which does not fit\n"
    assert told in capsys.readouterr().out
    assert main([*given, "200GB", "--rank", "64", "--json"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["card"] == "a100" and speed["tokens"] == {"full rank": 2100, "subspace": 3100}


# --- activations ----------------------------------------------------------------------------------


def test_tracing_without_data_counts_what_explain_counts():
    model, tokens = build("smoke"), torch.randint(256, (2, 32))
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {"rank": 0.25}
    assert (
        traced(model, [tokens], {}, options) == explain(model, tokens, options=options).activations
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.slow
def test_the_formula_is_what_tracing_counts():
    it = Decoder(320, 1024, 2816, 3, 16, 4, 64)
    config, options = config_of(it, "LlamaConfig"), {"rank": 0.25}
    sizes = {
        "hidden": it.hidden, "vocab": it.vocab, "itemsize": 2, "width": it.heads * it.head_dim,
    }  # fmt: skip
    counted = of_layers(lambda k: hf.build(config, None, k), 3, sizes, (1, 512), options)
    formula, ranked = of_decoder(it, 512, 2), GrassConfig.from_options(options)
    for checkpointing in (False, True):
        for given in (None, ranked):
            found, told = (sum(a.parts(given, checkpointing).values()) for a in (formula, counted))
            assert found == pytest.approx(told, rel=0.03), (checkpointing, given)


# --- command line ---------------------------------------------------------------------------------


def test_a_config_of_transformers_is_planned(folder, capsys):
    given = ["--memory", "3MB", "--tokens", "1x64", "--rank", "16", "--json"]
    for path, more in ((folder, []), (f"{folder}/config.json", ["--activations", "1kB"])):
        main(["plan", "--hf", path, *given, *more])
        found = json.loads(capsys.readouterr().out)
        assert found["parts"]["weights"] == 2 * sum(map(math.prod, TINY.shapes().values()))
        assert found["parts"]["activations"] > 0
        assert any("counted by explain" in note for note in found["notes"]) == (not more)


def test_a_missing_config_or_library_is_told(tmp_path, folder, capsys, monkeypatch):
    assert main(["plan", "--memory", "1GB", "--hf", str(tmp_path)]) == 2
    assert "there is no" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["plan", "--memory", "1GB", "--hf", folder]) == 2
    assert "pip install transformers" in capsys.readouterr().err


@pytest.mark.slow
def test_a_function_is_planned_with_activations(capsys):
    given = ["plan", "--memory", "1GB", "--model", "llama:build", "--inputs", "2x64:int64:256"]
    assert main([*given, "--json", "--rank", "0.25"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = build()
    assert found["parts"]["weights"] == sum(p.nbytes for p in model.parameters())
    kept = explain(model, torch.zeros(2, 64, dtype=torch.int64), options={"rank": 0.25}).activations
    assert (found["full_parts"]["activations"], found["parts"]["activations"]) == kept
