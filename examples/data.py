"""Text to train on without a download: the source of Python's own standard library, as bytes.

Every machine that runs the examples has it, it is real text with structure at many lengths, and a
byte vocabulary needs no tokenizer. Losses are in nats per byte.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# Installed packages differ between machines; tests, codec tables and help texts read unlike code.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
LIMIT = 8_000_000  # bytes: more than any run here reads
HELD_OUT_EVERY = 12  # one file in twelve, about 8 % of the text


@dataclass(frozen=True)
class Corpus:
    train: Tensor  # (bytes,) uint8
    held_out: Tensor  # (bytes,) uint8, from files that `train` holds nothing of


def standard_library() -> Corpus:
    """Whole files are held out: neighbouring bytes of one file would give the answer away."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if SKIPPED.isdisjoint(path.relative_to(root).parts)
    ]
    train, held_out, total = bytearray(), bytearray(), 0
    for index, path in enumerate(files):
        text = path.read_bytes()
        if total + len(text) > LIMIT:
            break
        total += len(text)
        part = held_out if index % HELD_OUT_EVERY == 0 else train
        part += text
    return Corpus(as_tensor(train), as_tensor(held_out))


def from_file(path: str | Path) -> Corpus:
    """One file of text (or of anything): its last twelfth is held out."""
    text = as_tensor(bytearray(Path(path).read_bytes()[:LIMIT]))
    cut = len(text) - len(text) // HELD_OUT_EVERY
    return Corpus(text[:cut], text[cut:])


def load(path: str | Path | None = None) -> Corpus:
    return from_file(path) if path else standard_library()


def as_tensor(text: bytearray) -> Tensor:
    return torch.frombuffer(text, dtype=torch.uint8)


class Batches:
    """An endless iterator of (tokens, targets), each (batch, seq), cut at random places.

    It draws from a generator of its own: the same seed gives the same batches whatever else the
    program draws, so two methods can be trained on exactly the same data.
    """

    def __init__(self, text: Tensor, batch: int, seq: int, seed: int, device: str = "cpu"):
        if len(text) <= seq:
            raise ValueError(f"{len(text)} bytes of text are too few for sequences of {seq}")
        self.text, self.batch, self.seq, self.device = text, batch, seq, device
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        last = len(self.text) - self.seq
        starts = torch.randint(last, (self.batch,), generator=self.generator)
        return cut(self.text, starts, self.seq, self.device)


def cut(text: Tensor, starts: Tensor, seq: int, device: str) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(seq + 1)].long().to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@torch.no_grad()
def held_out_loss(
    model: nn.Module, text: Tensor, batch: int, seq: int, batches: int = 8, device: str = "cpu"
) -> float:
    """Mean nats per byte over evenly spaced windows, the same ones at every call.

    Give it the plain model rather than the compiled one: a forward without gradients would be one
    more graph to compile, and takes no part in what is measured.
    """
    starts = torch.linspace(0, len(text) - seq - 1, batch * batches).long()
    losses = [model(*cut(text, part, seq, device)) for part in starts.split(batch)]
    return torch.stack(losses).mean().item()
