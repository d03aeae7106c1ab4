"""Small models through the stages of the backend, as listings that can be read and compared.

    python examples/inspect_graphs.py              # print all listings
    python examples/inspect_graphs.py pushed       # print one
    python examples/inspect_graphs.py --update     # write them into the documentation

The graphs are what the option `dump_dir` writes, shortened by `tidy`. docs/inspecting-graphs.md
walks through them and README.md shows two; tests/test_docs.py compares both with `stages()`.
"""

import argparse
import math
import re
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils.checkpoint import checkpoint

from grass_fx.compile.dump import graph_part, graph_text

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "inspecting-graphs.md")

# A fenced block under the comment <!-- listing: NAME -->.
LISTING = re.compile(r"(<!-- listing: ([\w-]+) -->\n```\w*\n)(.*?)(?=^```$)", re.M | re.S)


class TwoLayers(nn.Module):
    """The input of `up` is an input of the graph; nothing but `down` needs the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.up(x)))


class SwiGLU(nn.Module):
    """The MLP of a transformer block, as in llama.py: `gate` and `up` read the same x."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 32, bias=False)
        self.up = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Checkpointed(TwoLayers):
    """The two layers, whose activations are computed again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def one_step(backend: str, options: dict, kind: type[nn.Module] = TwoLayers) -> nn.Module:
    """A model after one forward and one backward, compiled anew."""
    torch._dynamo.reset()
    model = kind()
    torch.compile(model, backend=backend, options=options)(torch.ones(64, 16)).sum().backward()
    return model


@cache
def stages() -> dict[str, str]:
    """Every listing by name, in the order of compilation."""
    with fresh_cache():  # on a warm cache no pass runs, and there is no graph to show
        found = dumped(rank=4)
        out = dumped(rank=4, side="out")
        scored = dumped(rank=4, selection="top")
        tiled = dumped(rank=4, selection="top", scoring="tiles")
        products = {name: matrix_products(name) for name in ("inductor", "grass")}
        block = dumped(SwiGLU, rank=4)
        again = dumped(Checkpointed, rank=4)
        _, backward = halves(Checkpointed)
    joint, pushed = tidy(found["joint_regular"]), tidy(found["pushed_regular"])
    kept = tidy(found["kept_regular"])
    mlp, mlp_kept = tidy(block["joint_regular"]), tidy(block["kept_regular"])
    return {
        "dynamo": tidy(found["dynamo"]),
        "tapped": tidy(found["tapped_regular"]),
        "joint": joint,
        "pushed": only_for(gradients(pushed), pushed),
        "kept": kept,
        "before": gradient_of_down(joint),
        "after": gradient_of_down(kept),
        "out": gradient_of_down(tidy(out["pushed_regular"])),
        "scoring": gradient_of_down(tidy(scored["pushed_scoring"])),
        "tiles": gradient_of_down(tidy(tiled["pushed_scoring"])),
        "inductor": side_by_side(products),
        "swiglu-dynamo": tidy(block["dynamo"]),
        "swiglu-joint": only_for(gradients(mlp), mlp),
        "swiglu-kept": only_for(gradients(mlp_kept), mlp_kept),
        "checkpoint-tapped": tidy(again["tapped_regular"]),
        "checkpoint-backward": backward,
    }


def dumped(kind: type[nn.Module] = TwoLayers, **options) -> dict[str, str]:
    """What `dump_dir` receives, by stage: {"dynamo": ..., "joint_regular": ...}."""
    options = {"compiler": "aot_eager", **options}
    with tempfile.TemporaryDirectory() as folder:
        one_step("grass", {**options, "dump_dir": folder}, kind)
        files = sorted(Path(folder).iterdir())  # 02_joint_regular.py
        return {file.stem.partition("_")[2]: graph_part(file.read_text("utf-8")) for file in files}


def tidy(graph: str) -> str:
    """A dumped graph without what says nothing here.

    Gone: lines that are only a comment, the class, pytree plumbing, `x = x` that renames an
    input, and `;  x = None` that frees a value. `L_self_modules_up_parameters_weight_` reads
    `up_weight`.
    """
    graph = re.sub(r"[lL]_self_modules_(\w+?)_parameters_weight_(?=[a-z])", r"\1_weight_", graph)
    graph = re.sub(r"[lL]_self_modules_(\w+?)_parameters_weight_", r"\1_weight", graph)
    graph = re.sub(r"\b[lL]_x_", "x", graph)
    graph = re.sub(r";  [\w = ]+ = None$", "", graph, flags=re.M)
    gone = re.compile(r"\s*$|\s*#|class |.*fx_pytree|\s*(\w+) = \1$")
    lines = [line for line in graph.splitlines() if not gone.match(line)]
    return "".join(line.removeprefix("    ") + "\n" for line in lines)


def gradient_of_down(graph: str) -> str:
    """The lines of a tidy joint graph that nothing but the last weight's gradient needs."""
    returned = gradients(graph)
    return only_for(returned[len(returned) // 2 :], graph)  # the first half is the first weight's


def gradients(graph: str) -> list[str]:
    """What a tidy joint graph returns for the weights' proxies."""
    return [name for name in re.findall(r"(\w+),  # GradAOT", graph) if name != "None"]


def only_for(wanted: list[str], graph: str) -> str:
    """The lines of a tidy graph that nothing but the values `wanted` needs."""
    lines = graph.splitlines()
    kept: list[str] = []
    for index in reversed(range(len(lines))):
        assignment = re.match(r" +(\w+): .* = ", lines[index])
        if not assignment:
            continue
        name = rf"(?<![.\w]){assignment[1]}(?![.\w])"
        users = [line for line in lines[index + 1 :] if re.search(name, line)]
        if assignment[1] in wanted or (users and all(user in kept for user in users)):
            kept.insert(0, lines[index])
    return "".join(line.strip() + "\n" for line in kept)


def halves(kind: type[nn.Module]) -> list[str]:
    """The forward and the backward graph that Inductor makes code of, without its own patterns."""
    found: list[str] = []

    def look(graph: torch.fx.Graph) -> None:
        found.append(tidy(graph_text(graph)))

    options = {"rank": 4, "inductor": {"post_grad_custom_pre_pass": look}}
    one_step("grass", options, kind)
    return found


def matrix_products(backend: str) -> dict[str, list[str]]:
    """Shapes of the matrix products in the code that Inductor generates, by half of the step."""
    options = {"rank": 4} if backend == "grass" else {}
    _, codes = run_and_get_code(one_step, backend, options)
    halves = {}
    for half, code in zip(("forward", "backward"), codes, strict=True):
        shapes = dict(re.findall(r"(\w+) = empty_strided_cpu\((\(.*?\)),", code))
        results = re.findall(r"extern_kernels\.mm\(.*out=(\w+)\)", code)
        halves[half] = sorted((shapes[result] for result in results), key=by_size)
    return halves


def by_size(shape: str) -> tuple[int, str]:
    return math.prod(int(size) for size in re.findall(r"\d+", shape)), shape


def side_by_side(products: dict[str, dict[str, list[str]]]) -> str:
    lines = [f"{'':<10}{'Inductor alone':<20}grass"]
    for half in ("forward", "backward"):
        for index, pair in enumerate(zip(*(each[half] for each in products.values()), strict=True)):
            alone, grass = (f"mm -> {shape}" for shape in pair)
            lines.append(f"{'' if index else half:<10}{alone:<20}{grass}")
    return "\n".join(lines) + "\n"


def written(document: str, listings: dict[str, str]) -> str:
    """The text of a document with its listings as they should be."""
    return LISTING.sub(lambda block: block[1] + listings[block[2]], document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="which listings to print (default: all)")
    parser.add_argument("--update", action="store_true", help="write them into the documentation")
    args = parser.parse_args()
    listings = stages()
    if args.update:
        for document in DOCUMENTS:
            text = document.read_text(encoding="utf-8")
            document.write_text(written(text, listings), encoding="utf-8")
        return
    for name in args.names or listings:
        print(f"--- {name}\n{listings[name]}")


if __name__ == "__main__":
    main()
