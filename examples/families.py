"""How much of published models the backend takes, and what that saves: traced on the meta device.

    python examples/model_coverage.py --families --update   # docs/families.json, docs/coverage.md

`FAMILIES` has their configurations: all numbers that decide the shapes of weights, and what is
needed to trace. Anything else is a default of `transformers`. These defaults are the published
configurations of GPT-2, OPT-125M, Gemma-2-2B, Mistral-7B, Mixtral-8x7B, BERT-base and ViT-B/16
(without the number of classes). Nothing is downloaded or allocated.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import grass_fx
from grass_fx.inspect.findings import Cost, Weight

DATA = Path(__file__).resolve().parents[1] / "docs" / "families.json"
RANK, DEPTH, TOKENS = 0.125, 2, 64


def tokens(*names: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.zeros(1, TOKENS, dtype=torch.int64) for name in names}


def sounds() -> dict[str, Tensor]:
    return {"input_features": torch.zeros(1, 80, 3000), **tokens("decoder_input_ids")()}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.zeros(1, 3, 224, 224)}


@dataclass
class Family:
    """A published model: its class, its configuration, and what it is called with."""

    model: str
    config: str
    options: Mapping[str, Any]
    depths: tuple[str, ...] = ("num_hidden_layers",)
    """The options that have a number of layers."""
    inputs: Callable[[], dict[str, Tensor]] = tokens("input_ids")

    def build(self, depth: int | None = None) -> nn.Module:
        """The model on the meta device, or one of ``depth`` layers."""
        import transformers

        options = {**self.options, **{name: depth for name in self.depths if depth}}
        config = getattr(transformers, self.config)(**options)
        with torch.device("meta"):
            return getattr(transformers, self.model)(config).to(torch.bfloat16)


def decoder(
    name: str, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int,
    key_value_heads: int, *, config: str = "Config", **more: Any,
) -> Family:  # fmt: skip
    """A language model of LLaMA's kind."""
    options = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads, "use_cache": False, **more,
    }  # fmt: skip
    return Family(f"{name}ForCausalLM", f"{name}{config}", options)


TIED = {"tie_word_embeddings": True}
FAMILIES = {
    "GPT-2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
            "use_cache": False,
        },
        ("n_layer",),
    ),
    "OPT-125M": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 50272, "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 2048,
            "use_cache": False,
        },
    ),
    "Llama-3.2-1B": decoder("Llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED),
    "Llama-3-8B": decoder("Llama", 128256, 4096, 14336, 32, 32, 8),
    "Qwen2.5-0.5B": decoder("Qwen2", 151936, 896, 4864, 24, 14, 2, **TIED),
    "Gemma-2-2B": decoder("Gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256, **TIED),
    "Gemma-3-270M": decoder(
        "Gemma3", 262144, 640, 2048, 18, 4, 1, config="TextConfig", head_dim=256, **TIED
    ),
    "Gemma-3-1B": decoder(
        "Gemma3", 262144, 1152, 6912, 26, 4, 1, config="TextConfig", head_dim=256, **TIED
    ),
    "Mistral-7B": decoder("Mistral", 32000, 4096, 14336, 32, 32, 8),
    "Mixtral-8x7B": decoder("Mixtral", 32000, 4096, 14336, 32, 32, 8, num_local_experts=8),
    "T5-base": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12,
            "num_decoder_layers": 12, "num_heads": 12, "use_cache": False,
        },
        ("num_layers", "num_decoder_layers"),
        tokens("input_ids", "decoder_input_ids"),
    ),
    "BERT-base": Family(
        "BertForMaskedLM",
        "BertConfig",
        {
            "vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
            "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
            "type_vocab_size": 2,
        },
    ),
    "Whisper-small": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 51865, "num_mel_bins": 80, "d_model": 768, "encoder_layers": 12,
            "decoder_layers": 12, "encoder_attention_heads": 12, "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "max_source_positions": 1500,
            "max_target_positions": 448, "use_cache": False,
        },
        ("encoder_layers", "decoder_layers"),
        sounds,
    ),
    "ViT-B/16": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "num_labels": 1000,
        },
        inputs=images,
    ),
}  # fmt: skip


def traced(family: Family, depth: int, lookups: bool) -> dict[str, Weight]:
    """What `grass_fx.explain` says of the parameters of a model of ``depth`` layers."""
    inputs = {
        name: value.to("meta", torch.bfloat16 if value.is_floating_point() else None)
        for name, value in family.inputs().items()
    }
    options = {"rank": RANK, "lookups": lookups}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "aten::where: an autograd kernel")  # on meta, by torch
        report = grass_fx.explain(family.build(depth), options=options, **inputs)
    return {weight.name: weight for weight in report.weights}


def stand_in(name: str, depth: int) -> str:
    """The parameter of a model of ``depth`` layers that stands for this one of a deeper model."""
    return re.sub(r"(?<=\.)\d+(?=\.)", lambda n: str(min(int(n[0]), depth - 1)), name, count=1)


def trace(family: Family, depth: int = DEPTH) -> dict[str, Any]:
    """The parameters of a model, how many are taken, and the bytes of gradients and AdamW's state.

    "taken" is by default and with ``lookups``, "bytes" are at full rank, by default and with
    ``lookups``. A parameter is counted as its stand-in, which must have the same shape.
    """
    parameters = {k: p for k, p in family.build().named_parameters() if p.requires_grad}

    def of_the_whole(lookups: bool) -> list[Weight]:
        weights = traced(family, depth, lookups)
        found = [weights[stand_in(name, depth)] for name in parameters]
        for name, weight in zip(parameters, found, strict=True):
            if weight.shape != parameters[name].shape:
                raise ValueError(f"{name} has another shape than {weight.name}, its stand-in.")
        return found

    def held(costs: Iterable[Cost]) -> int:
        return sum(cost.gradient + cost.state for cost in costs)

    plain, wider = of_the_whole(False), of_the_whole(True)
    return {
        "parameters": sum(p.numel() for p in parameters.values()),
        "taken": [sum(math.prod(w.shape) for w in each if w.taken) for each in (plain, wider)],
        "bytes": [held(w.before for w in plain)]
        + [held(w.after for w in each) for each in (plain, wider)],
    }


def trace_all() -> dict[str, Any]:
    """`trace` of every family, by its name."""
    return {name: trace(family) for name, family in FAMILIES.items()}


def saved() -> dict[str, Any]:
    """What `trace_all` had found when the page was last updated."""
    return json.loads(DATA.read_text(encoding="utf-8"))


def save(found: Mapping[str, Any]) -> None:
    """Keep what `trace_all` has found."""
    DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
