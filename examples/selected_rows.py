"""Which rows a small LLaMA's weights have had selected, step by step: a picture and a table.

python examples/selected_rows.py                  # a minute or two on two CPU cores
python examples/selected_rows.py --steps 400 --selection cyclic --out runs/cyclic.png
python examples/selected_rows.py --smoke          # a few steps of a very small model
"""

import argparse
from dataclasses import replace
from pathlib import Path

import grass_fx
from pretrain import Settings, add_arguments, set_up, settings_from, train
from token_files import corpus_of

DEFAULTS = Settings(
    steps=60,
    batch=4,
    seq=64,
    rank=0.125,
    selection="multinomial_norm",
    refresh_every=4,
    warmup_steps=2,
    compiler="aot_eager",
)
METRICS = ("age", "coverage", "overlap", "captured", "update_norm")


def table(stats: dict[str, dict[str, float]]) -> str:
    """One line for each weight."""
    width = max(len(name) for name in stats)
    lines = [" ".join([" " * width, *(f"{metric:>11}" for metric in METRICS)])]
    for name, values in stats.items():
        numbers = [f"{values[m]:>11.3g}" if m in values else f"{'-':>11}" for m in METRICS]
        lines.append(" ".join([f"{name:<{width}}", *numbers]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, skip=("method", "eval_every"), defaults=DEFAULTS)
    parser.add_argument("--out", type=Path, default=Path("runs/selected-rows.png"))
    args = parser.parse_args()
    settings = replace(settings_from(args), eval_every=10**9)  # only the last step

    parts = set_up(settings)
    train(settings, corpus_of(settings), parts=parts)
    optimizer = parts[2]
    print(table(optimizer.stats()))
    grass_fx.coverage_plot(optimizer, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
