"""All of a run of pretrain.py in one file: a run that loads it goes on as if it had not stopped."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from parallel import is_first, whole_state

# A resumed run may differ in these; anything else would make it another run.
FREE = {"device", "compiler", "eval_every", "data", "tokenizer"}


@dataclass(frozen=True)
class Checkpoints:
    """Where a run is saved, how often besides at its end, and what it begins with."""

    save: Path | None = None
    every: int = 0
    resume: Path | None = None

    def wants(self, step: int, last: int) -> bool:
        """Whether the run is saved after this step."""
        often = self.every and step % self.every == 0
        return self.save is not None and bool(often or step == last)


def write(path: Path, settings: Any, step: int, text: int, parts: dict[str, Any]) -> None:
    """Write the states of `parts`; of a sharded model the weights alone."""
    weights = whole_state(parts["model"])  # on several processes all of them take part
    saved = {"model": weights, "settings": asdict(settings), "step": step, "text": text}
    if settings.parallel != "sharded":
        others = {name: part for name, part in parts.items() if name != "model"}
        saved |= {name: state_of(part) for name, part in others.items()}
    if is_first():
        put(saved, path)


def put(saved: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    torch.save(saved, unfinished)
    unfinished.replace(path)  # whoever finds the file finds all of it


def state_of(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def read(path: Path, settings: Any, text: int, parts: dict[str, Any]) -> int:
    """Load into `parts` what `write` wrote; the step after which it was written."""
    if settings.parallel == "sharded":
        raise SystemExit("--resume: not with --parallel sharded, whose files have weights only")
    if not path.is_file():
        raise SystemExit(f"--resume {path}: there is no such file")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if "optimizer" not in saved:
        raise SystemExit(f"--resume {path}: it has weights, but no state of an optimizer")
    given, then = asdict(settings), saved["settings"]
    differ = [name for name in given if name not in FREE and given[name] != then.get(name)]
    if differ:
        flags = ", ".join(f"--{name.replace('_', '-')} {then.get(name)}" for name in differ)
        raise SystemExit(f"--resume {path}: the saved run had {flags}")
    if saved["text"] != text:
        raise SystemExit(f"--resume {path}: it had {saved['text']:,} tokens of text, not {text:,}")
    for name, part in parts.items():
        if isinstance(part, torch.Generator):
            part.set_state(saved[name])
        else:
            part.load_state_dict(saved[name])
    if saved["step"] >= settings.steps:
        raise SystemExit(f"--resume {path}: that run is at its end, after {settings.steps} steps")
    return saved["step"]
