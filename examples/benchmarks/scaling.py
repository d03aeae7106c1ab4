"""Step times on 8 to 1,024 GPUs, computed: data parallel, HSDP and FSDP2, full rank and grass.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --tokens 2048 --itemsize 4
    python examples/benchmarks/scaling.py --smoke

No number here was measured on several GPUs. `scaling_model.py` has the formulas. Its constants are
fitted to some of the runs in docs/benchmarks.md. The last table has the model's error on the
other runs. Latencies and the bandwidths of the networks are assumed, not measured.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grass_fx.inspect.activations import of_decoder
from grass_fx.inspect.speed import Rates, Times, of_other
from scaling_model import (
    MEMORY,
    SHARDS,
    WAYS,
    Model,
    Network,
    Setting,
    compute,
    data_parallel,
    held_bytes,
    saved_bytes,
    shape,
)

SIZES = ("1b", "7b", "13b", "70b")
GPUS, MICRO = (8, 16, 64, 256, 1024), (1, 2, 4, 8)
GBIT = 1e9 / 8
NETWORKS = (
    Network("NVLink", 450e9, 50e9, 5e-6, 1e-5),
    Network("PCIe", 25e9, 10 * GBIT / SHARDS, 1e-5, 5e-5),
    Network("10 Gbit/s", math.inf, 10 * GBIT, 0, 5e-5, node=1),
    Network("1 Gbit/s", math.inf, GBIT, 0, 5e-5, node=1),
)
"""The first two have nodes of 8 GPUs, with 50 GB/s for each GPU and with 10 Gbit/s for all 8. In
the others each GPU is a machine of its own. Bandwidths are for each direction."""

# --- measured, in milliseconds: docs/benchmarks.md and its log ------------------------------------

WHOLE_STEPS = {  # size, layers, sequences of 1024 tokens; (forward + backward, optimizer) of both
    "1b": ("1b", 24, 16, (250.0, 8.9), (207.4, 5.5)),
    "7b, 4 layers": ("7b", 4, 8, (76.4, 7.5), (57.4, 4.5)),
    "1b, 4 layers": ("1b", 4, 16, (50.4, 2.2), (41.3, 1.6)),
}
PROFILE = {"weight gradients": 61, "attention": 25, "pointwise": 45, "optimizer": 8.9}
"""Of the 1b model's step at full rank."""
CPU_RATIO, CPU_OPTIMIZER, CPU_CORES = 0.774, (23.7, 11.9), 2
"""Forward and backward of a regular step / full rank; both optimizers, on so many cores."""
SLOW = {  # (bits/s, tokens of a process): DDP, grass
    (math.inf, 256): (375, 232),
    (1e9, 256): (674, 245),
    (1e9, 1024): (1261, 796),
    (2e8, 256): (2378, 384),
}
SLOW_SHARDED = (1477, 750)
"""FSDP2, and grass by an engine of its own that FSDP2 has replaced, 1 Gbit/s, 256 tokens."""
ACTIVATIONS = (28, 23)
"""MB in float32 with temporaries, 256 tokens: with all inputs kept, and with selected ones only."""


def fitted_device() -> Rates:
    """An H100, from the profile of one step: `ATTAINED` of its peaks, but for rounding."""
    size, layers, batch, *_ = WHOLE_STEPS["1b"]
    tokens, seq, it = 1024 * batch, 1024, shape(size, layers=layers)
    model = Model(it, None)
    took = {name: ms / 1e3 for name, ms in PROFILE.items()}
    kept = of_decoder(it.decoder, tokens, 2)
    as_bytes = Rates(math.inf, math.inf, 1)
    moved = model.all.moved + sum(each.total for each in of_other(kept, tokens, seq, as_bytes))
    return Rates(
        products=2 * tokens * model.elements / took["weight gradients"],
        attention=7 * tokens * seq * it.hidden * it.layers / took["attention"],
        memory=moved / (took["pointwise"] + took["optimizer"]),
    )


@dataclass(frozen=True)
class Slow:
    """Two processes with a core each, over gloo.

    ``products`` are the seconds of forward and backward at 256 tokens. ``host`` is what a core
    needs to send a byte, in seconds, during which it computes nothing. ``wire`` is the part of the
    link's rate that gradients get.
    """

    products: float
    host: float
    wire: float = 1

    def work(self, model: Model, tokens: int) -> Times:
        whole = self.products * tokens / 256
        ratio = 1 if model.rank is None else CPU_RATIO
        optimizer = CPU_CORES * CPU_OPTIMIZER[model.rank is not None] / 1e3
        return Times(whole / 3, whole * (ratio - 1 / 3), optimizer)

    def link(self, bits: float) -> Network:
        return Network("", math.inf, bits / 8 * self.wire, 0, 5e-5, node=1)

    def step(self, model: Model, bits: float, tokens: int) -> float:
        sent = model.all.gradients * self.host
        return data_parallel(model, self.work(model, tokens), self.link(bits), 2) + sent

    def sharded(self, model: Model, bits: float, tokens: int) -> float:
        """As if nothing overlapped. Gloo reduce-scatters by an all-reduce."""
        work, link = self.work(model, tokens), self.link(bits)
        gathers = [*[model.layer.weights] * 2 * model.shape.layers, model.root.weights]
        moved = sum(link.gather(size, 2) for size in gathers)
        moved += link.all_reduce(model.all.gradients, 2)
        sent = (sum(gathers) / 2 + model.all.gradients) * self.host
        return work.forward + work.backward + work.optimizer + moved + sent


def bench_models() -> list[Model]:
    return [Model(shape("bench"), rank, itemsize=4) for rank in (None, 0.125)]


def fitted_slow() -> Slow:
    """``products`` and ``host`` from both runs on the loopback, ``wire`` from DDP at 200 Mbit/s."""
    models = bench_models()
    without = [ms - CPU_CORES * own for ms, own in
               zip(SLOW[math.inf, 256], CPU_OPTIMIZER, strict=True)]  # fmt: skip
    ddp, grass = (ms / 1e3 for ms in without)
    full, compact = (model.all.gradients for model in models)
    # ddp = products + host * full, grass = CPU_RATIO * products + host * compact
    host = (CPU_RATIO * ddp - grass) / (CPU_RATIO * full - compact)
    slow = Slow(ddp - host * full, host)
    # The step is as long as the link is busy, and a constant.
    busy = full / (2e8 / 8)
    constant = slow.step(models[0], 2e8, 256) - busy
    return replace(slow, wire=busy / (SLOW[2e8, 256][0] / 1e3 - constant))


# --- tables ---------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of_constants(device: Rates, slow: Slow) -> str:
    profile = "profile of the 1b step"
    rows = [
        ["products", f"{device.products / 1e12:.0f} TFLOP/s", f"weight gradients, {profile}"],
        ["attention", f"{device.attention / 1e12:.0f} TFLOP/s", profile],
        ["pointwise and optimizer", f"{device.memory / 1e12:.2f} TB/s", profile],
        ["two CPUs: forward and backward", f"{1e3 * slow.products:.0f} ms", "both on the loopback"],
        ["two CPUs: a byte that is sent", f"{1e9 * slow.host:.2f} ns", "both on the loopback"],
        ["part of the rate for gradients", f"{slow.wire:.3f}", "DDP at 200 Mbit/s"],
    ]
    return table(["constant", "value", "fitted to"], rows)


def checks(device: Rates, slow: Slow) -> Iterator[tuple[str, float, float, bool]]:
    """Run and unit, measured, computed, and whether a constant was fitted to it."""
    for name, (size, layers, batch, *measured) in WHOLE_STEPS.items():
        whole = []
        for rank, (products, optimizer) in zip((None, 0.125), measured, strict=True):
            model = Model(shape(size, layers=layers), rank)
            work = compute(device, model, 1024 * batch, 1024)
            label, own = f"H100, {name}, {rank_name(rank)}", name == "1b" and rank is None
            computed = 1e3 * (work.forward + work.backward), 1e3 * work.optimizer
            yield f"{label}, forward + backward, ms", products, computed[0], own
            yield f"{label}, optimizer, ms", optimizer, computed[1], own
            whole.append((products + optimizer, sum(computed)))
        (full, full_computed), (grass, grass_computed) = whole
        ratios = full / grass, full_computed / grass_computed
        yield f"H100, {name}, tokens/s, 1/8 / full rank", *ratios, False
    for (bits, tokens), times in SLOW.items():
        rate = "loopback" if bits == math.inf else f"{bits / 1e6:.0f} Mbit/s"
        for model, measured in zip(bench_models(), times, strict=True):
            label = f"two CPUs, {rate}, {tokens} tokens, {'DDP' if model.rank is None else 'grass'}"
            own = bits == math.inf or (bits == 2e8 and model.rank is None)
            yield f"{label}, ms", measured, 1e3 * slow.step(model, bits, tokens), own
    for model, measured in zip(bench_models(), SLOW_SHARDED, strict=True):
        label = f"two CPUs, 1000 Mbit/s, sharded, {rank_name(model.rank)}, ms"
        yield label, measured, 1e3 * slow.sharded(model, 1e9, 256), False
    for model, measured in zip(bench_models(), ACTIVATIONS, strict=True):
        label = f"CPU, activations, {rank_name(model.rank)}, MB"
        yield label, measured, saved_bytes(model, 256, False, itemsize=4) / 1e6, False


def rank_name(rank: float | None) -> str:
    return "full rank" if rank is None else f"1/{1 / rank:.0f}"


def table_of_checks(device: Rates, slow: Slow) -> str:
    rows = [
        [name, f"{measured:.4g}", f"{computed:.4g}", f"{computed / measured - 1:+.1%}",
         "fitted" if own else "held out"]
        for name, measured, computed, own in checks(device, slow)
    ]  # fmt: skip
    return table(["run", "measured", "model", "error", ""], rows)


def table_of_memory(setting: Setting) -> str:
    """GB of a GPU: without and with activation checkpointing."""
    rows = []
    for size in SIZES:
        for itemsize in (2, 4):
            row = [size, {2: "bfloat16", 4: "float32"}[itemsize]]
            for group in (1, SHARDS, 64):
                cells = []
                for rank in (None, 0.125):
                    model = Model(shape(size), rank, itemsize)
                    held = [held_bytes(model, setting.tokens, group, c) for c in (False, True)]
                    cells.append(" to ".join(marked(each) for each in reversed(held)))
                row.append("; ".join(cells))
            rows.append(row)
    head = ["model", "held in", "data parallel", f"HSDP, {SHARDS} shards", "FSDP2, 64 shards"]
    return table(head, rows)


def marked(held: float) -> str:
    return f"{held / 1e9:.0f}" if held <= MEMORY else f"**{held / 1e9:.0f}**"


def shown(times: list[float | None], recomputed: bool) -> str:
    """Seconds at full rank, and how many times as fast grass is; or seconds of all three."""
    full, *grass = times
    if all(each is None for each in times):
        return "no"
    mark = "\\*" if recomputed else ""
    if full is None:
        return f"no{mark}; {', '.join(map(digits, grass))}"
    return f"{digits(full)}{mark}: {', '.join(f'{full / each:.2f}' for each in grass)}"


def digits(value: float | None) -> str:
    return "no" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table_of_networks() -> str:
    rows = [
        [it.name, str(it.node), f"{it.inner / 1e9:.0f}" if it.node > 1 else "",
         f"{it.outer / 1e9:.4g}", f"{1e6 * it.inner_latency:.0f}" if it.node > 1 else "",
         f"{1e6 * it.outer_latency:.0f}"]
        for it in NETWORKS
    ]  # fmt: skip
    units = [
        "GB/s of a GPU, in a node",
        "between nodes",
        "µs a message, in a node",
        "between nodes",
    ]
    return table(["network", "GPUs of a node", *units], rows)


def table_of_steps(setting: Setting, network: Network, micro: int) -> str:
    rows = [
        [size, way,
         *(shown(*setting.cell(shape(size), way, network, ranks, micro)) for ranks in GPUS)]
        for size in SIZES
        for way in WAYS
    ]  # fmt: skip
    return table(["model", "", *(f"{ranks} GPUs" for ranks in GPUS)], rows)


def table_of_micro_batches(setting: Setting, ranks: int) -> str:
    rows = [
        [network.name, size, way,
         *(shown(*setting.cell(shape(size), way, network, ranks, micro)) for micro in MICRO)]
        for network in NETWORKS
        for size in ("1b", "7b")
        for way in WAYS
    ]  # fmt: skip
    return table(["network", "model", "", *(f"a = {micro}" for micro in MICRO)], rows)


def table_of_trees(setting: Setting, ranks: int) -> str:
    networks = [replace(network, trees=True) for network in NETWORKS]
    rows = [
        [size, way,
         *(shown(*setting.cell(shape(size), way, network, ranks, 1)) for network in networks)]
        for size in ("1b", "7b")
        for way in WAYS
    ]  # fmt: skip
    return table(["model", "", *(network.name for network in networks)], rows)


def ratio(setting: Setting, size: str, way: str, network: Network, ranks: int, micro: int) -> float:
    """How much faster r = 1/8 is; 0 where one of the two does not fit."""
    (full, grass, _), _ = setting.cell(shape(size), way, network, ranks, micro)
    return full / grass if full and grass else 0


def table_of_summary(setting: Setting) -> str:
    rows = []
    for network in NETWORKS:
        for way in WAYS:
            found = {
                (size, ranks, micro): ratio(setting, size, way, network, ranks, micro)
                for size in SIZES for ranks in GPUS for micro in MICRO
            }  # fmt: skip
            found = {place: value for place, value in found.items() if value}
            twice = sum(value >= 2 for value in found.values())
            low, high = (pick(found, key=found.get) for pick in (min, max))
            at = [
                f"{found[place]:.2f} ({place[0]}, {place[1]} GPUs, a = {place[2]})"
                for place in (low, high)
            ]
            rows.append([network.name, way, f"{twice} of {len(found)}", *at])
    return table(["network", "", "at least 2 times", "least", "most"], rows)


def fastest_twice(setting: Setting, size: str, way: str, micro: int) -> str:
    """The largest bandwidth, of a ring of 8 GPUs, at which grass is twice as fast."""
    most = 0
    for exponent in range(240, 79, -1):  # 1 TB/s to 100 MB/s, in steps of 5.9 %
        beta = 10 ** (exponent / 40 + 6)
        found = ratio(setting, size, way, Network("", beta, beta), SHARDS, micro)
        if found >= 2:
            return f"{beta / 1e9:.{0 if beta > 1e10 else 1}f}"
        most = max(most, found)
    return f"never (most {most:.2f})" if most else "does not fit"


def table_of_claim(setting: Setting) -> str:
    rows = [
        [size, way, str(tokens),
         *(fastest_twice(replace(setting, tokens=tokens), size, way, micro) for micro in MICRO)]
        for size in ("1b", "7b")
        for way in ("data parallel", "FSDP2")
        for tokens in (2048, 8192)
    ]  # fmt: skip
    return table(["model", "", "tokens", *(f"a = {micro}" for micro in MICRO)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, default=8192, help="of a GPU in a micro-batch (default: 8192)")
    add("--seq", type=int, default=1024, help="tokens of a sequence (default: 1024)")
    add("--itemsize", type=int, default=2, choices=(2, 4), help="bytes of a weight (default: 2)")
    add("--micro-batches", type=int, default=1, help="of the first tables of steps (default: 1)")
    add("--smoke", action="store_true", help="only constants, errors and one network")
    args = parser.parse_args()
    device, slow = fitted_device(), fitted_slow()
    setting = Setting(device, args.tokens, args.seq, args.itemsize)
    print(f"## Networks\n\n{table_of_networks()}")
    print("\n## Steps: seconds at full rank, and how many times as fast 1/8 and 1/4 are")
    for network in NETWORKS[: 1 if args.smoke else None]:
        found = table_of_steps(setting, network, args.micro_batches)
        print(f"\n### {network.name}\n\n{found}")
    if not args.smoke:
        print(f"\n## Micro-batches, 64 GPUs\n\n{table_of_micro_batches(setting, 64)}")
        print(f"\n## {GPUS[-1]} GPUs, log2 p messages\n\n{table_of_trees(setting, GPUS[-1])}")
        print(f"\n## All of them, 1/8\n\n{table_of_summary(setting)}")
        print(f"\n## GB/s of 8 GPUs at which 1/8 is twice as fast\n\n{table_of_claim(setting)}")
    print(f"\n## Memory, GB: full rank; 1/8\n\n{table_of_memory(setting)}")
    print(f"\n## Constants\n\n{table_of_constants(device, slow)}")
    print(f"\n## Errors\n\n{table_of_checks(device, slow)}")


if __name__ == "__main__":
    main()
