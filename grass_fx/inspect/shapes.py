"""Published models by name: the shapes of their parameters, without transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from grass_fx.config import nearest
from grass_fx.errors import OptionError
from grass_fx.inspect.cost import LLAMA

NORMS = "input_layernorm", "post_attention_layernorm"
GEMMA = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Decoder:
    """A language model of LLaMA's kind: attention and a gated MLP in each layer."""

    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    """Whether the embedding is the head."""
    bias: bool = False
    """Of queries, keys and values."""
    qk_norm: bool = False
    norms: tuple[str, ...] = NORMS
    experts: int = 0
    used: int = 1
    """Experts of a token."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, named as in transformers."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for k in range(self.layers):
            found |= {f"model.layers.{k}.{name}": shape for name, shape in self._layer()}
        found["model.norm.weight"] = (self.hidden,)
        return found if self.tied else {**found, "lm_head.weight": (self.vocab, self.hidden)}

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for part, size in (("q", wide), ("k", narrow), ("v", narrow)):
            yield f"self_attn.{part}_proj.weight", (size, self.hidden)
            if self.bias:
                yield f"self_attn.{part}_proj.bias", (size,)
            if self.qk_norm and part != "v":
                yield f"self_attn.{part}_norm.weight", (self.head_dim,)
        yield "self_attn.o_proj.weight", (self.hidden, wide)
        if self.experts:
            yield "mlp.gate.weight", (self.experts, self.hidden)
            yield "mlp.experts.gate_up_proj", (self.experts, 2 * self.ffn, self.hidden)
            yield "mlp.experts.down_proj", (self.experts, self.hidden, self.ffn)
        else:
            yield "mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield "mlp.up_proj.weight", (self.ffn, self.hidden)
            yield "mlp.down_proj.weight", (self.hidden, self.ffn)
        for norm in self.norms:
            yield f"{norm}.weight", (self.hidden,)


_LLAMA_8B = Decoder(128256, 4096, 14336, 32, 32, 8, 128)
DECODERS = {
    "Llama-3.2-1B": Decoder(128256, 2048, 8192, 16, 32, 8, 64, tied=True),
    "Llama-3.2-3B": Decoder(128256, 3072, 8192, 28, 24, 8, 128, tied=True),
    "Llama-3-8B": _LLAMA_8B,
    "Llama-3.1-8B": _LLAMA_8B,
    "Llama-3.3-70B": Decoder(128256, 8192, 28672, 80, 64, 8, 128),
    "Qwen2.5-0.5B": Decoder(151936, 896, 4864, 24, 14, 2, 64, tied=True, bias=True),
    "Qwen2.5-7B": Decoder(152064, 3584, 18944, 28, 28, 4, 128, bias=True),
    "Qwen3-0.6B": Decoder(151936, 1024, 3072, 28, 16, 8, 128, tied=True, qk_norm=True),
    "Qwen3-4B": Decoder(151936, 2560, 9728, 36, 32, 8, 128, tied=True, qk_norm=True),
    "Qwen3-8B": Decoder(151936, 4096, 12288, 36, 32, 8, 128, qk_norm=True),
    "Qwen3-14B": Decoder(151936, 5120, 17408, 40, 40, 8, 128, qk_norm=True),
    "Qwen3-32B": Decoder(151936, 5120, 25600, 64, 64, 8, 128, qk_norm=True),
    "Gemma-2-2B": Decoder(256000, 2304, 9216, 26, 8, 4, 256, tied=True, norms=GEMMA),
    "Gemma-2-9B": Decoder(256000, 3584, 14336, 42, 16, 8, 256, tied=True, norms=GEMMA),
    "Gemma-3-270M": Decoder(
        262144, 640, 2048, 18, 4, 1, 256, tied=True, qk_norm=True, norms=GEMMA
    ),
    "Gemma-3-1B": Decoder(262144, 1152, 6912, 26, 4, 1, 256, tied=True, qk_norm=True, norms=GEMMA),
    "Mistral-7B": Decoder(32000, 4096, 14336, 32, 32, 8, 128),
    "Mixtral-8x7B": Decoder(32000, 4096, 14336, 32, 32, 8, 128, experts=8, used=2),
}  # fmt: skip
"""Language models whose shapes `plan` knows. tests/test_plan_shapes.py compares them with
transformers."""

NAMES = (*LLAMA, *DECODERS)
"""All names that `plan` knows. Capital letters do not matter."""
ALIASES = {"llama-8b": "Llama-3.1-8B", "llama-70b": "Llama-3.3-70B"}


def decoder(name: str) -> Decoder:
    """The model with this name.

    Raises:
        OptionError: the name is not known.
    """
    known = {each.lower(): each for each in NAMES} | ALIASES
    found = known.get(name.lower(), "")
    if found in LLAMA:
        hidden, ffn, layers, vocabulary = LLAMA[found]
        return Decoder(vocabulary, hidden, ffn, layers, hidden // 64, hidden // 64, 64)
    if found:
        return DECODERS[found]
    close = nearest(name, [*NAMES, *ALIASES])
    close = f": {close}" if close.startswith("did") else "."
    raise OptionError(
        f"shape {name!r} is not known{close} Known are {', '.join(NAMES)}. "
        "For any other model give a folder with its config.json: --hf PATH."
    )


def named_shapes(name: str) -> tuple[dict[str, tuple[int, ...]], str]:
    """The parameters of a model that is known by name, and which of them is the embedding.

    The LLaMAs of ``inspect.cost.LLAMA`` have the names of examples/llama.py, all others those of
    transformers.

    Raises:
        OptionError: the name is not known.
    """
    if (lower := name.lower()) in LLAMA:
        return llama_shapes(lower), "embed.weight"
    return decoder(name).shapes(), "model.embed_tokens.weight"


def llama_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The parameters of the LLaMA called ``name`` in ``inspect.cost.LLAMA``: name -> shape."""
    hidden, ffn, layers, vocabulary = LLAMA[name]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocabulary, hidden)}
    for k in range(layers):
        for part in ("wq", "wk", "wv", "wo"):
            shapes[f"layers.{k}.attention.{part}.weight"] = (hidden, hidden)
        for part in ("gate", "up"):
            shapes[f"layers.{k}.mlp.{part}.weight"] = (ffn, hidden)
        shapes[f"layers.{k}.mlp.down.weight"] = (hidden, ffn)
        for part in ("attention_norm", "mlp_norm"):
            shapes[f"layers.{k}.{part}.weight"] = (hidden,)
    return {**shapes, "norm.weight": (hidden,), "head.weight": (vocabulary, hidden)}
