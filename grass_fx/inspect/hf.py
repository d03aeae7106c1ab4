"""Models of transformers from their config.json, on the meta device, for ``plan``."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_fx.errors import OptionError
from grass_fx.inspect.activations import Activations, of_decoder, of_layers
from grass_fx.inspect.shapes import Decoder


def read_config(path: str | os.PathLike[str]) -> Any:
    """The configuration in a folder's config.json, or in that file itself.

    Raises:
        OptionError: transformers is not installed, or there is no such file.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise OptionError(
            f"--hf {path}: there is no {file}. Give a config.json, or the folder that has it, as "
            "save_pretrained writes it. For a model on the Hub download its config.json first."
        )
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise OptionError(
            "--hf needs transformers, which is not installed: pip install transformers"
        ) from error
    try:
        config: Any = AutoConfig.from_pretrained(str(file))
    except (ValueError, OSError, KeyError) as error:
        raise OptionError(f"--hf {path}: transformers cannot read {file}: {error}") from error
    return config.get_text_config()


def build(config: Any, dtype: torch.dtype | None, layers: int | None = None) -> nn.Module:
    """The language model on the meta device, in bfloat16 or ``dtype``, or one of fewer layers.

    Raises:
        OptionError: it is no language model.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    if layers is not None:
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        config.num_hidden_layers = layers
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype or torch.bfloat16
            )
    except ValueError as error:
        raise OptionError(
            f"--hf: transformers makes no causal language model of a {type(config).__name__}. "
            "Give --model MODULE:FUNCTION, a function that makes the model."
        ) from error
    return model.train()


def activations(
    config: Any, dtype: torch.dtype | None, batch: tuple[int, int], options: dict[str, Any]
) -> Activations:
    """Counted on models of one and two layers; by the formula for LLaMAs if these do not trace."""
    itemsize = (dtype or torch.bfloat16).itemsize
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "hidden": config.hidden_size, "vocab": config.vocab_size, "itemsize": itemsize,
        "width": heads * width,
    }  # fmt: skip
    try:
        return of_layers(
            lambda layers: build(config, dtype, layers),
            config.num_hidden_layers, sizes, batch, options,
        )  # fmt: skip
    except Exception as error:
        ffn = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        it = Decoder(
            config.vocab_size, config.hidden_size, ffn, config.num_hidden_layers, heads, heads,
            width, used=getattr(config, "num_experts_per_tok", None) or 1,
            experts=getattr(config, "num_experts_per_tok", None) or 0,
        )  # fmt: skip
        found = of_decoder(it, batch[0] * batch[1], itemsize)
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return replace(found, how=f"{found.how}, since the model was not traced ({reason})")
