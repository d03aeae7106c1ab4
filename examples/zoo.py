"""Tiny models with random weights: what examples/model_coverage.py compiles, one step each.

`ZOO` maps a name to a builder that returns a `Case`. The language and vision models are those of
`transformers`, made from explicit configurations: nothing is downloaded. The others are a few lines
of plain torch, one for each way of using a weight. Nothing in them is random after `Case` is built.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, TOKENS, HIDDEN, VOCABULARY = 2, 8, 32, 48


@dataclass
class Case:
    """A model, what it is called with, and what is differentiated."""

    model: nn.Module
    inputs: dict[str, Any]
    loss: Callable[[Any], Tensor]
    declared: tuple[str, ...] = ()
    """Patterns of linear weights that no module class tells: parameters of the model itself."""
    dtype: torch.dtype = torch.float64
    """What the model is converted to, and its gradients agree in."""
    how: dict[str, Any] = field(default_factory=dict)
    """More arguments of torch.compile."""


ZOO: dict[str, Callable[[], Case]] = {}
FROM_TRANSFORMERS: list[str] = []


# --- transformers -------------------------------------------------------------------------------

DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 32, "attention_dropout": 0.0, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def tokens(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (BATCH, TOKENS), generator=generator)


def loss_of(output: Any) -> Tensor:
    return output.loss


def _transformers(
    name: str, model: str, config: str, options: dict[str, Any], **case: Any
) -> Callable[[Callable[..., dict]], None]:
    """Register a model of transformers; the decorated function makes its inputs."""

    def register(inputs: Callable[[], dict]) -> None:
        def build() -> Case:
            import transformers

            made = getattr(transformers, model)(getattr(transformers, config)(**options))
            if case.get("checkpointing"):
                made.gradient_checkpointing_enable({"use_reentrant": False})
            more = {k: v for k, v in case.items() if k != "checkpointing"}
            return Case(made, inputs(), **{"loss": loss_of, **more})

        ZOO[name] = build
        FROM_TRANSFORMERS.append(name)

    return register


def language_model(
    name: str, model: str, config: str, options: dict[str, Any], **case: Any
) -> None:
    """Tokens in, and the loss of predicting others."""
    _transformers(name, model, config, options, **case)(
        lambda: {"input_ids": tokens(), "labels": tokens(2)}
    )


# Norms and losses in float32, whatever the model's dtype, are why so few of these are in float64.
llama = ("LlamaForCausalLM", "LlamaConfig")
language_model("llama", *llama, DECODER, dtype=torch.float32)
language_model(
    "llama, tied head", *llama, {**DECODER, "tie_word_embeddings": True}, dtype=torch.float32
)
language_model(
    "llama, gradient checkpointing", *llama, DECODER, dtype=torch.float32, checkpointing=True
)
language_model("mistral", "MistralForCausalLM", "MistralConfig", DECODER, dtype=torch.float32)
language_model("qwen2", "Qwen2ForCausalLM", "Qwen2Config", DECODER, dtype=torch.float32)
language_model("gemma", "GemmaForCausalLM", "GemmaConfig", DECODER, dtype=torch.float32)
SMALL = {**DECODER, "num_hidden_layers": 1}
language_model(
    "qwen2, tied head",
    "Qwen2ForCausalLM",
    "Qwen2Config",
    {**SMALL, "tie_word_embeddings": True},
    dtype=torch.float32,
)
language_model("gemma2", "Gemma2ForCausalLM", "Gemma2Config", SMALL, dtype=torch.float32)
language_model("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", SMALL, dtype=torch.float32)
MIXTRAL = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
for how in (None, "eager", "batched_mm"):
    language_model(
        f"mixtral, {how} experts" if how else "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        MIXTRAL if how is None else {**MIXTRAL, "experts_implementation": how},
        declared=("*.gate.weight", "*.experts.*_proj"),
        dtype=torch.float32,
    )
language_model(
    "mixtral, bfloat16",  # the products of all experts are one node, which torch has for bfloat16
    "MixtralForCausalLM",
    "MixtralConfig",
    MIXTRAL,
    declared=("*.gate.weight", "*.experts.*_proj"),
    dtype=torch.bfloat16,
)
language_model(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT2Config",
    {
        "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    dtype=torch.float32,
)  # fmt: skip
language_model(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN,
        "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "dropout": 0.0,
        "max_position_embeddings": 32, "use_cache": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    },
    loss=lambda output: weighted(output.logits),  # its own is in float32
)  # fmt: skip
language_model("bert", "BertForMaskedLM", "BertConfig", ENCODER)
language_model("roberta", "RobertaForMaskedLM", "RobertaConfig", {**ENCODER, "pad_token_id": 1})
language_model(
    "t5",
    "T5ForConditionalGeneration",
    "T5Config",
    {
        "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2,
        "num_heads": 4, "dropout_rate": 0.0, "use_cache": False, "decoder_start_token_id": 0,
    },
    dtype=torch.float32,
)  # fmt: skip


@_transformers(
    "vit",
    "ViTForImageClassification",
    "ViTConfig",
    {
        "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "image_size": 16, "patch_size": 8, "num_labels": 12,
    },
)  # fmt: skip
def vit() -> dict:
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.tensor([1, 2])}


@_transformers(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    {
        "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": HIDDEN, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 8,
        "max_target_positions": 16, "dropout": 0.0, "attention_dropout": 0.0, "use_cache": False,
        "activation_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 3,
    },
)  # fmt: skip
def whisper() -> dict:
    return {"input_features": torch.randn(BATCH, 8, 16), "labels": tokens(2)}


# --- plain torch --------------------------------------------------------------------------------


def weighted(output: Tensor) -> Tensor:
    """A loss whose gradient differs from place to place."""
    return (output * torch.linspace(-1, 1, output.numel()).view(output.shape).to(output)).sum()


class Uses(nn.Module):
    """Parameters and modules, used as `use` says."""

    def __init__(self, use: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.use = use
        for name, part in parts.items():
            made = part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part) / 4)
            setattr(self, name, made)

    def forward(self, **inputs: Tensor) -> Any:
        return self.use(self, *inputs.values())


def add(name: str, use: Callable[..., Any], *shapes: tuple[int, ...], **parts: Any) -> None:
    """A case that calls `use(model, *inputs)` on random inputs; parts that are shapes are weights.

    A part that can be called makes a module. ``loss``, ``declared``, ``dtype`` and ``how`` are the
    case's own.
    """
    special = {k: parts.pop(k) for k in ("loss", "dtype", "how", "declared") if k in parts}
    special.setdefault("declared", tuple(k for k, part in parts.items() if not callable(part)))

    def build() -> Case:
        made = {k: part() if callable(part) else part for k, part in parts.items()}
        inputs = {f"input_{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
        return Case(Uses(use, **made), inputs, **{"loss": weighted, **special})

    ZOO[name] = build


def module(name: str, make: Callable[[], nn.Module], *shapes: tuple[int, ...], **case: Any) -> None:
    """A case that calls one module, and takes the first of what it returns."""
    add(name, lambda m, *x: first(m.it(*x)), *shapes, it=make, **case)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def linear(fan_out: int = 24, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(16, fan_out, bias=bias)


def layer(kind: type[nn.Module]) -> nn.Module:
    return kind(16, 4, dim_feedforward=24, dropout=0.0, batch_first=True)


def attention(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(16, 4, batch_first=True, **options)


X, SHORT = (2, 5, 16), (2, 3, 16)
module(
    "nn.TransformerEncoder",
    lambda: nn.TransformerEncoder(layer(nn.TransformerEncoderLayer), 2, enable_nested_tensor=False),
    X,
)
module(
    "nn.TransformerDecoder",
    lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2),
    *(X, SHORT),
)
add("nn.MultiheadAttention, self", lambda m, x: m.it(x, x, x)[0], X, it=attention())
add("nn.MultiheadAttention, cross", lambda m, x, y: m.it(x, y, y)[0], X, SHORT, it=attention())
module("nn.MultiheadAttention, three inputs", attention(), X, SHORT, SHORT)
module(
    "nn.MultiheadAttention, kdim and vdim",
    attention(kdim=12, vdim=20),
    *(X, (2, 3, 12), (2, 3, 20)),
)


def fused_qkv(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in m.qkv(x).chunk(3, dim=-1))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return m.out(y.transpose(1, 2).flatten(2))


def loop(m: nn.Module, x: Tensor) -> Tensor:
    for _ in range(3):
        x = torch.tanh(m.square(x))
    return x


def broken(m: nn.Module, x: Tensor) -> Tensor:
    x = m.before(x)
    torch._dynamo.graph_break()
    return m.after(x)


def autocast(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.down(torch.relu(m.up(x))).float()


def embedding() -> nn.Module:
    return nn.Embedding(24, 16)


def ids(x: Tensor) -> Tensor:
    return x[..., 0].abs().long() % 24


def tied(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(m.inner(m.table(ids(x))), m.table.weight)


def tied_across_a_break(m: nn.Module, x: Tensor) -> Tensor:
    x = m.inner(m.table(ids(x)))
    torch._dynamo.graph_break()
    return F.linear(x, m.table.weight)


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(16, 24))


TIED = {"table": embedding, "inner": linear(16), "declared": ("table.weight",)}
add("fused QKV", fused_qkv, X, qkv=linear(48), out=linear(16))
add("head tied to an embedding", tied, X, **TIED)
add("head tied across a graph break", tied_across_a_break, X, **TIED)
add("weight used twice", lambda m, x: m.square(torch.tanh(m.square(x))), X, square=linear(16))
add("linear in a loop", loop, X, square=linear(16))
add("graph break between two layers", broken, X, before=linear(16), after=linear())
add("bias", lambda m, x: m.it(x), X, it=linear())
add("no bias", lambda m, x: m.it(x), X, it=linear(bias=False))
add("autocast", autocast, X, up=linear(), down=lambda: nn.Linear(24, 16), dtype=torch.float32)
add("dynamic shapes", lambda m, x: m.it(x) @ m.w, X, it=linear(), w=(24, 16), how={"dynamic": True})
module("nn.LSTMCell", lambda: nn.LSTMCell(16, 24), (2, 16), declared=("it.weight_*",))
module("weight norm", weight_norm, X, declared=("it.parametrizations.weight.original1",))

add("x @ w", lambda m, x: x @ m.w, X, w=(16, 24))
add("x @ w.T", lambda m, x: x @ m.w.T, X, w=(24, 16))
add("w @ x, 2-D", lambda m, x: m.w @ x, (16, 5), w=(24, 16))
add("w @ x, 3-D", lambda m, x: m.w @ x, (2, 16, 5), w=(24, 16))
add("w @ x, 1-D", lambda m, x: m.w @ x, (16,), w=(24, 16))
add("x @ w, 1-D", lambda m, x: x @ m.w, (16,), w=(16, 24))
add("addmm", lambda m, x: torch.addmm(m.b, x, m.w), (5, 16), w=(16, 24), b=(24,))
for equation, shape in {
    "bi,io->bo": (5, 16), "bti,oi->bto": X, "abti,io->abto": (2, 2, 3, 16), "oi,bti->bot": X,
    "bti,io": X, "...i,io->...o": X,
}.items():  # fmt: skip
    size = (24, 16) if "oi" in equation else (16, 24)
    first_is_weight = equation.startswith("oi")
    add(
        f"einsum {equation}",
        (lambda e: lambda m, x: torch.einsum(e, m.w, x))(equation)
        if first_is_weight
        else (lambda e: lambda m, x: torch.einsum(e, x, m.w))(equation),
        shape,
        w=size,
    )
for shape in ((16,), (5, 16), (2, 5, 16), (2, 3, 5, 16)):
    add(f"nn.Linear, input {len(shape)}-D", lambda m, x: m.it(x), shape, it=linear())
add("x @ w, 4-D", lambda m, x: x @ m.w, (2, 3, 5, 16), w=(16, 24))
add("transposed input", lambda m, x: m.it(x.transpose(1, 2)), (2, 16, 5), it=linear())
add("transposed input @ w", lambda m, x: x.transpose(1, 2) @ m.w, (2, 16, 5), w=(16, 24))
add("expanded input", lambda m, x: m.it(x.expand(4, 5, 16)), (1, 5, 16), it=linear())
add("expanded input @ w", lambda m, x: x.expand(4, 5, 16) @ m.w, (1, 5, 16), w=(16, 24))


# What the loss does with (2, 5, 24) decides the strides of the output's gradient.
OUTPUT_GRADIENTS = {
    "expanded": lambda y: y.sum(),
    "expanded along one dimension": lambda y: weighted(y.mean(1)),
    "expanded along features": lambda y: weighted(y.sum(-1)),
    "transposed": lambda y: weighted(y.transpose(1, 2).contiguous()),
    "permuted": lambda y: weighted(y.permute(2, 0, 1).reshape(24, 10)),
    "of one token": lambda y: weighted(y[:, -1]),
    "of every other feature": lambda y: weighted(y[..., ::2]),
    "of a broadcast output": lambda y: weighted(y.unsqueeze(1) * torch.ones(2, 3, 5, 24).to(y)),
}
for what, of in OUTPUT_GRADIENTS.items():
    add(f"gradient {what}", lambda m, x: m.it(x), X, it=linear(), loss=of)
    add(f"gradient {what}, x @ w", lambda m, x: x @ m.w, X, w=(16, 24), loss=of)
