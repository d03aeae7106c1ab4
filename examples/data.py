"""Text to train on without a download: the source of Python's own standard library, as bytes.

Every machine that runs the examples has it, it is real text with structure at many lengths, and a
byte vocabulary needs no tokenizer. Losses are in nats per byte. For fine-tuning there is other text
that comes with Python, the prose of `help("topics")`.
"""

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

# Installed packages differ between machines; tests, codec tables and help texts read unlike code.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
LIMIT = 8_000_000  # bytes of the texts that come with Python
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
    return hold_out(path.read_bytes() for path in files)


def language_reference() -> Corpus:
    """What `help("while")` and its like print: the prose of Python's language reference.

    `standard_library` has none of it (`pydoc_data` is skipped there). Topics quote each other: a
    paragraph is kept where it first stands only, so that none is both trained on and held out.
    """
    from pydoc_data.topics import topics

    texts, seen = [], set()
    for _, topic in sorted(topics.items()):
        paragraphs = dict.fromkeys(each.strip("\n") for each in topic.split("\n\n"))
        texts.append("\n\n".join(each for each in paragraphs if each not in seen) + "\n\n")
        seen.update(paragraphs)
    return hold_out(text.encode() for text in texts)


def hold_out(texts: Iterable[bytes]) -> Corpus:
    """Whole texts are held out, one in twelve, and nothing is read beyond the limit."""
    train, held_out, total = bytearray(), bytearray(), 0
    for index, text in enumerate(texts):
        if total + len(text) > LIMIT:
            break
        total += len(text)
        part = held_out if index % HELD_OUT_EVERY == 0 else train
        part += text
    return Corpus(as_tensor(train), as_tensor(held_out))


def from_path(path: str | Path) -> Corpus:
    """A file of text (or of anything), or the texts of a folder: the last twelfth of each file is
    held out. In a folder whatever is hidden or has a zero byte is no text."""
    path = Path(path)
    texts = [path.read_bytes()] if path.is_file() else texts_in(path)
    train, held_out = bytearray(), bytearray()
    for text in texts:
        end = len(text) - len(text) // HELD_OUT_EVERY
        train += text[:end]
        held_out += text[end:]
    if not held_out:
        raise ValueError(f"no text, or too little to hold some out, in {path}")
    return Corpus(as_tensor(train), as_tensor(held_out))


def texts_in(folder: Path, endings: tuple[str, ...] = ("",)) -> Iterable[bytes]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or not path.name.endswith(endings) or not path.is_file():
            continue
        if b"\0" not in (text := path.read_bytes()):
            yield text


def load(path: str | Path | None = None) -> Corpus:
    return from_path(path) if path else standard_library()


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
    if len(text) <= seq:
        raise ValueError(f"{len(text)} held-out bytes are too few for sequences of {seq}")
    starts = torch.linspace(0, len(text) - seq - 1, batch * batches).long()
    losses = [model(*cut(text, part, seq, device)) for part in starts.split(batch)]
    return torch.stack(losses).mean().item()
