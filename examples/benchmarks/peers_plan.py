"""Which runs peers.py makes: contenders, sweeps of their rates, seeds, ablations, finetuning.

A plan is a generator. It yields lists of runs, finds their results in the dict that it was given
once it goes on, and decides by them what comes next. So a plan that is started again asks for the
same runs, and those that have results are not made twice; a run that two stages ask for is one.
"""

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

from contenders import Run
from finetune import matches

Results = dict[str, dict]
Plan = Generator[list[Run], None, dict]

RULES = ("uniform", "top", "multinomial_norm", "multinomial_norm_sq", "frozen_top")
RANKS = {"1/4": 0.25, "1/8": 0.125}
ATTENTION, MLP = "layers.*.attention.*", "layers.*.mlp.*"
# Where the sweeps of `linear_lr` begin: the neighbours of what others have found, or advise.
FULL_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
LOW_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
DENSE_RATE = 8e-3
SWEPT = ("lr", "linear_lr", "refresh_every")
"""The settings that a sweep finds."""
PERIODIC = ("galore", "apollo", "grass")
"""Methods with an interval K of projections or selections, which is swept like their rates."""


@dataclass(frozen=True)
class Contender:
    """A method with its settings; its rates are yet to be found."""

    name: str
    run: Run
    rates: Sequence[float] = ()
    """Candidates of `linear_lr`."""
    like: str = ""
    """The contender whose rates and K it takes over; without one it sweeps all of its own."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    base: Run
    only: tuple[str, ...] = ("*",)
    """Patterns of contenders' names."""
    rules: tuple[str, ...] = RULES
    """Beside the default."""
    details: bool = True
    """Whether blocks and resets are contenders, too, and the weights taken an ablation."""
    seeds: int = 3
    workers: int = 2
    seconds_per_step: float = 0.03
    """Until there are runs to tell it."""
    candidates: int = 4
    """Of `linear_lr`."""
    neighbours: tuple[float, ...] = (0.5, 1, 2)
    """Of a best rate or K, as factors."""
    followers: tuple[float, ...] = (0.5, 1, 2)
    """Of the `linear_lr` that a contender like another takes over; no more beyond an edge."""
    ranks: tuple[str, ...] = tuple(RANKS)
    periods: tuple[int, ...] = (10, 25, 50, 100, 200, 400)
    warmups: tuple[int, ...] = (0, 10, 20, 40)
    factors: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)
    """Of the best `linear_lr`, in the ablation of `scale`."""
    finetune_steps: int = 240


def contenders(scale: Scale) -> list[Contender]:
    """One thing at a time is varied around grass's defaults, not everything by everything."""
    base, found = scale.base, []

    def add(name: str, rates: Sequence[float], like: str = "", **changes) -> None:
        if matches(name, scale.only):
            run = replace(base, **changes)
            found.append(Contender(name, run, rates[: scale.candidates], like))

    add("adamw", FULL_RATES, method="adamw")
    for name in scale.ranks:
        for method in PERIODIC:
            add(f"{method} {name}", LOW_RATES, method=method, rank=RANKS[name])
    add("lora 1/4", LOW_RATES, method="lora", rank=0.25)
    add("adamw8bit", (), "adamw", method="adamw8bit")
    add("grass8bit 1/4", (), "grass 1/4", method="grass8bit", rank=0.25)
    add("grass 1/4 with head", (), "grass 1/4", method="grass", rank=0.25, include_head=True)
    for name in scale.ranks:
        like, grass = f"grass {name}", {"method": "grass", "rank": RANKS[name]}
        for side in ("auto", "out"):
            add(f"grass {name} side {side}", (), like, side=side, **grass)
        for rule in scale.rules:
            add(f"grass {name} {rule}", (), like, selection=rule, **grass)
        if scale.details:
            add(f"grass {name} block 8", (), like, block=8, **grass)
            scored = {**grass, "selection": "multinomial_norm"}
            add(f"grass {name} multinomial_norm block 8", (), like, block=8, **scored)
            add(f"grass {name} multinomial_norm reset", (), like, on_refresh="reset", **scored)
    return found


def loss_of(run: Run, results: Results) -> float:
    """Its held-out loss; infinite for a run that is missing or has diverged."""
    result = results.get(run.key)
    if result is None or not result["finite"] or not math.isfinite(result["held_out"]):
        return math.inf
    return result["held_out"]


def best_of(runs: Iterable[Run], results: Results) -> Run | None:
    best = min(runs, key=lambda run: loss_of(run, results), default=None)
    return best if best and math.isfinite(loss_of(best, results)) else None


def beyond(rate: str, runs: Iterable[Run], results: Results) -> list[Run]:
    """One more run where the best has no neighbour on one side: the grid is extended once."""
    runs = list(runs)
    best = best_of(runs, results)
    if best is None:
        return []
    values = {getattr(run, rate) for run in runs}
    value = getattr(best, rate)
    if len(values) == 1:
        return []
    if value == max(values):
        return [times(2, best, rate)]
    if value == min(values):
        return [times(0.5, best, rate)]
    return []


def times(factor: float, run: Run, name: str) -> Run:
    """The run with one of its numbers multiplied; K stays whole."""
    value = getattr(run, name)
    return replace(run, **{name: type(value)(factor * value)})


def sweep(scale: Scale, entries: Sequence[Contender], dense_lr: float, results: Results) -> Plan:
    """The best run of each contender, and all that it tried, by name.

    First the candidates of `linear_lr`, then, with the best of them, the neighbours of `lr`, then
    those of K where there is one. Who is `like` another takes over what that has found, and tries
    `followers` of its `linear_lr`.
    """
    best: dict[str, Run | None] = {}
    tried: dict[str, list[Run]] = {}

    def settle(lines: dict[str, list[Run]], rate: str = "") -> Generator[list[Run], None, None]:
        """Where each is best along its line, which goes on beyond an edge if there is a `rate`."""
        yield [run for line in lines.values() for run in line]
        if rate:
            lines = {name: line + beyond(rate, line, results) for name, line in lines.items()}
            yield [run for line in lines.values() for run in line]
        for name, line in lines.items():
            known = tried.setdefault(name, [])
            known += [run for run in line if run not in known]
            best[name] = best_of(known, results)

    def around(name: str, run: Run, rate: str, factors: Sequence[float]) -> list[Run]:
        found = best.get(name)
        if found is None:
            return []
        swept = {each: getattr(found, each) for each in SWEPT}
        return [times(factor, replace(run, **swept), rate) for factor in factors]

    heads = [each for each in entries if not each.like]
    lines = {
        each.name: [replace(each.run, lr=dense_lr, linear_lr=rate) for rate in each.rates]
        for each in heads
    }
    yield from settle(lines, "linear_lr")
    for rate, those in (
        ("lr", heads),
        ("refresh_every", [each for each in heads if each.run.method in PERIODIC]),
    ):
        lines = {each.name: around(each.name, each.run, rate, scale.neighbours) for each in those}
        yield from settle(lines, rate)
    lines = {
        each.name: around(each.like, each.run, "linear_lr", scale.followers)
        for each in entries
        if each.like
    }
    yield from settle(lines)
    return {"best": {name: run for name, run in best.items() if run}, "tried": tried}


def with_seeds(run: Run, seeds: int) -> list[Run]:
    return [replace(run, seed=run.seed + k) for k in range(seeds)]


def pretraining(scale: Scale, results: Results, available: Sequence[Contender]) -> Plan:
    """The sweeps and the finalists' further seeds."""
    swept = yield from sweep(scale, available, DENSE_RATE, results)
    yield [run for best in swept["best"].values() for run in with_seeds(best, scale.seeds)]
    return swept


Panels = dict[str, dict[str, dict[str, Run]]]


def panels(scale: Scale, best: dict[str, Run]) -> Panels:
    """Title of a small figure: label of a curve or group: what is varied: the run."""
    found: Panels = {name: {} for name in ("refresh_every", "warmup_steps", "scale")}
    for name in scale.ranks:
        if f"grass {name}" not in best:
            continue
        run = best[f"grass {name}"]
        found["refresh_every"][name] = {
            str(k): replace(run, refresh_every=k) for k in scale.periods if k <= run.steps
        }
        found["warmup_steps"][name] = {
            str(steps): replace(run, warmup_steps=steps) for steps in scale.warmups
        }
        found["scale"][name] = {
            f"{factor:g}": replace(run, linear_lr=factor * run.linear_lr)
            for factor in scale.factors
        }
    if "galore 1/4" in best:
        run = best["galore 1/4"]
        found["refresh_every"]["GaLore 1/4"] = {
            str(k): replace(run, refresh_every=k) for k in scale.periods if k <= run.steps
        }
    if scale.details and "grass 1/4" in best and "adamw" in best:
        run, linear_lr = best["grass 1/4"], best["adamw"].linear_lr
        found["weights taken"] = {
            "1/4": {
                "attention": replace(run, take=(ATTENTION,), untaken_lr=linear_lr),
                "mlp": replace(run, take=(MLP,), untaken_lr=linear_lr),
                "both": run,
                "both, head": replace(run, include_head=True),
            }
        }
    # The rest has its own swept rates, and is in the table as well.
    rest = {
        "side": {"in": "", "auto": " side auto", "out": " side out"},
        "selection": {"cyclic": "", **{rule: f" {rule}" for rule in RULES}},
        "on_refresh": {
            "multinomial": " multinomial_norm",
            "multinomial, reset": " multinomial_norm reset",
        },
        "block": {
            "cyclic": "",
            "cyclic, 8": " block 8",
            "multinomial": " multinomial_norm",
            "multinomial, 8": " multinomial_norm block 8",
        },
    }
    for title, endings in rest.items():
        found[title] = {}
        for name in scale.ranks:
            points = {x: best.get(f"grass {name}{ending}") for x, ending in endings.items()}
            found[title][name] = {x: run for x, run in points.items() if run}
    return {title: line for title, line in found.items() if any(len(x) > 1 for x in line.values())}


def ablations(scale: Scale, best: dict[str, Run]) -> Plan:
    found = panels(scale, best)
    yield [run for series in found.values() for line in series.values() for run in line.values()]
    return found


def finetuning(scale: Scale, results: Results, best: dict[str, Run], usable: set[str]) -> Plan:
    """From the weights of the best AdamW run to other text."""
    if "adamw" not in best:
        return {"best": {}, "tried": {}}
    source = replace(best["adamw"], keep=True)
    yield [source]
    if source.key not in results:
        return {"best": {}, "tried": {}}
    base = replace(
        scale.base,
        steps=scale.finetune_steps,
        data="reference",
        old_data=scale.base.data,
        start=source.key,
    )
    rates = FULL_RATES[: scale.candidates]
    entries = [Contender("adamw", replace(base, method="adamw"), rates)]
    for method in ("lora", "grass"):
        for name in scale.ranks:
            run = replace(base, method=method, rank=RANKS[name])
            entries.append(Contender(f"{method} {name}", run, LOW_RATES[: scale.candidates]))
    entries = [each for each in entries if each.run.method in usable]
    swept = yield from sweep(scale, entries, 2e-3, results)
    yield [run for run_ in swept["best"].values() for run in with_seeds(run_, scale.seeds)]
    return swept
