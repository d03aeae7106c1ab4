"""The lab's texts: folders as tokens of a byte-level BPE that is trained on one of them.

A text is named `FOLDER` or `FOLDER:suffix,suffix`, such as "/usr/share/perl/5.36:pm,pod". One file
in twelve is held out, whole, since neighbouring parts of one file would give the answer away. Files
that are hidden or have a zero byte are no text. What is read ends at `LIMIT`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data import HELD_OUT_EVERY, texts_in

LIMIT = 16_000_000  # bytes


@dataclass(frozen=True)
class Text:
    """A text as tokens, and what identifies it."""

    name: str
    train: Tensor  # (tokens,) int16
    held_out: Tensor  # (tokens,) int16, of files that `train` holds nothing of
    bytes: int  # all that was read
    sha256: str  # of the same
    held_out_bytes: int

    @property
    def bytes_per_token(self) -> float:
        return self.held_out_bytes / len(self.held_out)

    def facts(self) -> dict[str, str | int | float]:
        return {
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "tokens": len(self.train),
            "held_out_tokens": len(self.held_out),
            "bytes_per_token": round(self.bytes_per_token, 3),
        }


def read(name: str) -> tuple[bytes, bytes, str]:
    """The two parts of a text, and the sha256 of all of it."""
    folder, _, suffixes = name.partition(":")
    train, held_out, digest = bytearray(), bytearray(), hashlib.sha256()
    endings = tuple(f".{suffix}" for suffix in suffixes.split(",")) if suffixes else ("",)
    for count, text in enumerate(texts_in(Path(folder), endings)):
        if len(train) + len(held_out) + len(text) > LIMIT:
            break
        part = held_out if count % HELD_OUT_EVERY == 0 else train
        part += text
        digest.update(text)
    if not train:
        raise ValueError(f"{name}: no text there, or one file of it. Name another folder by --data")
    return bytes(train), bytes(held_out), digest.hexdigest()


def load(name: str, tokens_of: str, vocab: int, cache: Path) -> Text:
    """The text `name`, in the `vocab` tokens that are best for the text `tokens_of`.

    Tokens are kept in `cache`, under the hashes of both texts.
    """
    train, held_out, sha256 = read(name)
    source, _, source_sha = (train, held_out, sha256) if tokens_of == name else read(tokens_of)
    file = cache / f"{sha256[:16]}-{source_sha[:16]}-{vocab}.pt"
    if not file.exists():
        tokenizer = byte_pairs(source, vocab)
        parts = [encode(tokenizer, part) for part in (train, held_out)]
        cache.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(f".{torch.initial_seed()}")  # no other process reads half of it
        torch.save(parts, half)
        half.replace(file)
    parts = torch.load(file)
    return Text(name, *parts, len(train) + len(held_out), sha256, len(held_out))


def byte_pairs(text: bytes, vocab: int):
    """A byte-level BPE by Hugging Face's tokenizers: it has a token for every byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(as_lines(text), trainer)
    return tokenizer


def encode(tokenizer, text: bytes) -> Tensor:
    encoded = tokenizer.encode_batch_fast(as_lines(text), add_special_tokens=False)
    return torch.tensor([token for each in encoded for token in each.ids], dtype=torch.int16)


def as_lines(text: bytes) -> list[str]:
    """Some files are Latin-1: bytes that are no UTF-8 become the replacement character."""
    return text.decode("utf-8", "replace").splitlines(keepends=True)
