"""Uses of a matrix (12, 8) inside of other people's functions, for tests: of x (10, 8), and w."""

import torch
import torch.nn.functional as F
from torch import nn

ROWS, COLUMNS, TOKENS = 12, 8, 10


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, d):
        x, w = ctx.saved_tensors
        return d @ w, d.t() @ x


class ByEinsum(torch.autograd.Function):
    """Of the newer form, with setup_context; addmm and einsum in the backward."""

    @staticmethod
    def forward(x, w):
        return torch.addmm(x.new_zeros(ROWS), x, w.t())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d):
        x, w = ctx.saved_tensors
        return d @ w, torch.einsum("bo,bi->oi", d, x)


class OfATransposedCopy(torch.autograd.Function):
    """Saves x transposed and wider, and returns a gradient that it has converted."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x.double().t().contiguous(), w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, d):
        xt, w = ctx.saved_tensors
        return d @ w, (xt @ d.double()).t().to(w.dtype)


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, d):
        return d @ ctx.saved_tensors[0], None


class Lookup(torch.autograd.Function):
    """Rows of w by their indices."""

    @staticmethod
    def forward(ctx, tokens, w):
        ctx.save_for_backward(tokens)
        return w[tokens]

    @staticmethod
    def backward(ctx, d):
        (tokens,) = ctx.saved_tensors
        zeros = d.new_zeros(ROWS, d.shape[-1])
        return None, zeros.index_add(0, tokens, d)


class FusedCrossEntropy(torch.autograd.Function):
    """As Liger's: chunk by chunk, with gradients that the forward makes and the backward scales."""

    @staticmethod
    def forward(ctx, x, w, targets):
        loss, gw, gx = x.new_zeros(()), torch.zeros_like(w), torch.empty_like(x)
        for k in range(0, len(x), 4):
            chunk = slice(k, k + 4)
            logits = x[chunk] @ w.t()
            loss = loss + F.cross_entropy(logits, targets[chunk], reduction="sum")
            d = logits.softmax(-1) - F.one_hot(targets[chunk], len(w)).to(x.dtype)
            gx[chunk] = d @ w
            torch.addmm(gw, d.t(), x[chunk], out=gw)
        ctx.save_for_backward(gx, gw)
        return loss

    @staticmethod
    def backward(ctx, d):
        gx, gw = ctx.saved_tensors
        return gx * d, gw * d, None


class TiledCrossEntropy(torch.autograd.Function):
    """As TRL's: tiles of the logits, made again in the backward, where they are added in place."""

    @staticmethod
    def forward(ctx, x, w, targets):
        ctx.save_for_backward(x, w, targets)
        return F.cross_entropy(x @ w.t(), targets, reduction="sum")

    @staticmethod
    def backward(ctx, d):
        x, w, targets = ctx.saved_tensors
        gx, gw = torch.zeros_like(x), torch.zeros_like(w)
        for k in range(0, len(x), 5):
            part = x[k : k + 5]
            norm = (part @ w.t()).logsumexp(-1, keepdim=True)
            for start in range(0, len(w), 6):
                rows = slice(start, start + 6)
                tile = (part @ w[rows].t() - norm).exp()
                hit = torch.arange(start, start + 6) == targets[k : k + 5, None]
                tile = (tile - hit.to(tile.dtype)) * d
                gx[k : k + 5].addmm_(tile, w[rows])
                gw[rows].addmm_(tile.t(), part)
        return gx, gw, None


@torch.library.custom_op("grass_fx_tests::linear", mutates_args=())
def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.t()


@torch.library.custom_op("grass_fx_tests::linear_backward", mutates_args=())
def linear_backward(d: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return d.t() @ x


linear.register_fake(lambda x, w: x.new_empty(len(x), len(w)))
linear_backward.register_fake(lambda d, x: d.new_empty(d.shape[1], x.shape[1]))
opaque = torch.library.custom_op("grass_fx_tests::opaque", lambda x, w: x @ w.t(), mutates_args=(),
                                 schema="(Tensor x, Tensor w) -> Tensor")  # fmt: skip
opaque.register_fake(lambda x, w: x.new_empty(len(x), len(w)))


def _saved(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _open(ctx, d):
    x, w = ctx.saved_tensors
    return d @ w, d.t() @ x


def _closed(ctx, d):
    x, w = ctx.saved_tensors
    return d @ w, linear_backward(d, x)


linear.register_autograd(_open, setup_context=_saved)
opaque.register_autograd(_closed, setup_context=_saved)

TARGETS = torch.arange(TOKENS) % ROWS

LINEAR = {
    "autograd function": lambda x, w: Linear.apply(x, w),
    "setup_context, einsum": lambda x, w: ByEinsum.apply(x, w),
    "transposed copy, converted": lambda x, w: OfATransposedCopy.apply(x, w),
    "no gradient, and a product": lambda x, w: WithoutGradient.apply(x, w) + x @ w.t(),
    "cross entropy, fused": lambda x, w: FusedCrossEntropy.apply(x, w, TARGETS),
    "cross entropy, tiled": lambda x, w: TiledCrossEntropy.apply(x, w, TARGETS),
    "operator with an open backward": lambda x, w: linear(x, w),
    "function of the weight": lambda x, w: x @ w.t().sin(),
    "scaled": lambda x, w: F.linear(x, 2 * w),
    "masked": lambda x, w: F.linear(x, w * torch.ones_like(w).tril()),
    "added to a constant": lambda x, w: F.linear(x, w + torch.ones(ROWS, COLUMNS)),
    "decayed in the loss": lambda x, w: F.linear(x, w).sum() + w.square().sum(),
    "stacked with itself": lambda x, w: x @ torch.stack([w, w])[1].t(),
}
"""Uses that a Dynamo graph does not show to be linear, and the joint graph does."""

ONE_SIDE = {
    "heads": (lambda x, w: x @ w.view(3, 4, COLUMNS).transpose(1, 2), "splits or merges"),
}
"""Of these only side "in" is known; the reason for the other."""

LEFT = {
    "operator with an opaque backward": (lambda x, w: opaque(x, w), "no rule for grass_fx_tests"),
    "normalised": (lambda x, w: F.linear(x, F.normalize(w)), "is needed whole by"),
    "added": (lambda x, w: x.new_zeros(ROWS, COLUMNS) + w, "is an input of the graph"),
    "three factors": (
        lambda x, w: torch.einsum("bi,oi,i->bo", x, w, x[0]), "no matrix product makes its gradient"
    ),
    "a convolution": (lambda x, w: F.conv1d(x[..., None], w[..., None]), "convolution_backward"),
}  # fmt: skip


class Uses(nn.Module):
    """A matrix that is used as ``use`` says, behind a layer."""

    def __init__(self, use):
        super().__init__()
        self.first = nn.Linear(COLUMNS, COLUMNS)
        self.w, self.use = nn.Parameter(torch.randn(ROWS, COLUMNS) / 4), use

    def forward(self, x):
        return self.use(torch.tanh(self.first(x)), self.w)
