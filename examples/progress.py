"""What a run shows while it trains: a bar on a terminal, lines in a file, TensorBoard's scalars."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm


def bar(steps: Iterable, total: int, name: str, shown: bool = True) -> tqdm:
    """A progress bar if someone can see it: none where the output goes to a file."""
    return tqdm(steps, total=total, desc=name, disable=not (shown and sys.stderr.isatty()))


def line(name: str, record: dict, steps: int) -> str:
    """One line for an evaluated step, where there is no bar."""
    return (
        f"{name}: step {record['step']} of {steps}, loss {record['loss']:.3f}, "
        f"held out {record['held_out']:.3f}"
    )


class Scalars:
    """Writes the numbers of records to a folder for TensorBoard; without a folder does nothing."""

    def __init__(self, folder: Path | None):
        self.writer = None
        if folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise SystemExit("--tensorboard needs a package: pip install tensorboard") from None
            self.writer = SummaryWriter(str(folder))

    def add(self, record: dict, tokens: int) -> None:
        """`tokens`: how many a step reads."""
        if self.writer is None:
            return
        for name, value in scalars_of(record, tokens):
            self.writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def scalars_of(record: dict, tokens: int) -> Iterator[tuple[str, float]]:
    """A record as TensorBoard's names and numbers."""
    yield "loss/train", record["loss"]
    yield "tokens per second", tokens / record["seconds"]
    yield "learning rate", record["lr"]
    if "held_out" in record:
        yield "loss/held out", record["held_out"]
        for part, count in record["bytes"].items():
            yield f"MB/{part}", count / 1e6
