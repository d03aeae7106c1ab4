"""Tokens to train on: a text through a tokenizer, or a file of numbers that is mapped into memory.

    python examples/token_files.py my/texts --tokenizer PATH --out texts.bin
    python examples/pretrain.py --size 1b --data texts.bin --tokenizer PATH

The file has one number per token and nothing else: uint16 for a vocabulary of at most 65,536, else
uint32. A tokenizer is a folder with a tokenizer.json, as Hugging Face's are saved, or such a file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import Corpus, load, texts_in
from llama import SIZES

PIECE = 1 << 20  # characters of a text that are encoded at a time
HELD_OUT_EVERY, HELD_OUT_AT_MOST = 12, 2_000_000  # tokens at the end of a file
CHECKED = 10_000_000  # tokens of a file that are compared with the vocabulary


def load_tokenizer(path: str | Path):
    """A `tokenizers.Tokenizer`."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SystemExit("--tokenizer needs a package: pip install tokenizers") from None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise SystemExit(f"--tokenizer {path}: there is no file {file}")
    return Tokenizer.from_file(str(file))


def dtype_of(vocab: int) -> torch.dtype:
    return torch.uint16 if vocab <= 1 << 16 else torch.uint32


def encode(tokenizer, text: bytes) -> Iterator[Tensor]:
    """Its tokens, a piece of whole lines at a time."""
    dtype = dtype_of(tokenizer.get_vocab_size())
    piece, size = [], 0
    for line in text.decode("utf-8", errors="replace").splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE:
            yield as_tokens(tokenizer, piece, dtype)
            piece, size = [], 0
    if piece:
        yield as_tokens(tokenizer, piece, dtype)


def as_tokens(tokenizer, lines: list[str], dtype: torch.dtype) -> Tensor:
    ids = tokenizer.encode("".join(lines), add_special_tokens=False).ids
    return torch.tensor(ids, dtype=torch.int64).to(dtype)


def encoded(corpus: Corpus, tokenizer) -> Corpus:
    """The same texts as tokens."""
    parts = (corpus.train, corpus.held_out)
    return Corpus(*(torch.cat([*encode(tokenizer, part.numpy().tobytes())]) for part in parts))


def from_file(path: Path, vocab: int) -> Corpus:
    """The tokens of a file, read where they are used; its last twelfth is held out."""
    dtype = dtype_of(vocab)
    if not path.is_file():
        raise SystemExit(f"--data {path}: there is no such file")
    count, rest = divmod(path.stat().st_size, dtype.itemsize)
    if rest or not count:
        raise SystemExit(f"--data {path}: its size is not that of {dtype} numbers")
    tokens = torch.from_file(str(path), shared=False, size=count, dtype=dtype)
    largest = tokens[:CHECKED].long().max().item()
    if largest >= vocab:
        raise SystemExit(
            f"--data {path}: token {largest} is none of a vocabulary of {vocab}, read as {dtype}. "
            "Give the --tokenizer or the --vocab with which the file was made."
        )
    end = count - min(count // HELD_OUT_EVERY, HELD_OUT_AT_MOST)
    return Corpus(tokens[:end], tokens[end:])


def vocabulary(settings: Any) -> int:
    """How many tokens a model of these settings of pretrain.py knows."""
    if settings.vocab:
        return settings.vocab
    if settings.tokenizer:
        return load_tokenizer(settings.tokenizer).get_vocab_size()
    return SIZES[settings.size].vocab


def corpus_of(settings: Any) -> Corpus:
    """Tokens of a file, a text through a tokenizer, or the bytes of a text."""
    if settings.data.endswith(".bin"):
        return from_file(Path(settings.data), vocabulary(settings))
    corpus = load(settings.data)
    if not settings.tokenizer:
        return corpus
    return encoded(corpus, load_tokenizer(settings.tokenizer))


def unit(settings: Any) -> str:
    """Of the losses."""
    return "nats/token" if settings.tokenizer or settings.data.endswith(".bin") else "nats/byte"


def write(source: Path, tokenizer, out: Path, end: str | None) -> int:
    """Write the tokens of a file's or a folder's texts, each with the token `end`; how many."""
    last = None if end is None else tokenizer.token_to_id(end)
    if end is not None and last is None:
        raise SystemExit(f"--end {end!r}: the tokenizer has no such token")
    texts = [source.read_bytes()] if source.is_file() else texts_in(source)
    dtype, count = dtype_of(tokenizer.get_vocab_size()), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:
        for text in texts:
            parts = [*encode(tokenizer, text)]
            parts += [] if last is None else [torch.tensor([last]).to(dtype)]
            for part in parts:
                file.write(part.numpy().tobytes())
                count += len(part)
    if not count:
        raise SystemExit(f"{source}: there is no text")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a text, or a folder of texts")
    parser.add_argument("--tokenizer", required=True, help="a folder, or a tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.bin")
    parser.add_argument("--end", help="this token after each text, such as '<|endoftext|>'")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    count = write(args.source, tokenizer, args.out, args.end)
    vocab = tokenizer.get_vocab_size()
    print(f"wrote {count:,} tokens of a vocabulary of {vocab:,} to {args.out} ({dtype_of(vocab)})")


if __name__ == "__main__":
    main()
