"""A rule that the lab tries: half of the columns in turn, half by the norms of a layer's inputs."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from grass_fx.state import rules
from grass_fx.state.subspace import Subspace


class Halves:
    """Makes scores by which the rule "top" selects what this rule wants.

    r/2 columns come in turn, as of the rule "cyclic". The others are drawn without replacement from
    those that are left, with q as the norms of their inputs.
    """

    def __init__(self, model: nn.Module, within: Mapping[str, Subspace]) -> None:
        self.model, self.within = model, within
        sizes = {name: subspace.spec.size for name, subspace in within.items()}
        self.walks = {name: (torch.arange(size), size) for name, size in sizes.items()}

    def scores(self, *batch: Tensor) -> dict[str, Tensor]:
        """Of the subspaces whose step scores: 1 for a column that is wanted, else 0."""
        due = [name for name, subspace in self.within.items() if subspace.scoring_due]
        norms = input_norms(self.model, due, *batch) if due else {}
        found = {}
        for name, norm in norms.items():
            subspace = self.within[name]
            count = subspace.spec.rank
            stream = rules.stream(subspace.spec.seed, subspace.key, subspace.period, "halves")
            in_turn, *self.walks[name] = rules.cyclic(*self.walks[name], count // 2, stream)
            left = norm.index_fill(0, in_turn, 0)
            drawn, _ = rules.multinomial(left, count - count // 2, False, stream)
            found[name] = torch.zeros_like(norm).index_fill(0, torch.cat([in_turn, drawn]), 1)
        return found


@torch.no_grad()
def input_norms(model: nn.Module, names: Iterable[str], *batch: Tensor) -> dict[str, Tensor]:
    """The norms of the columns of X, (n,), of linear layers by the names of their weights."""
    found, hooks = dict[str, Tensor](), []
    for name in names:

        def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = args[0].flatten(0, -2).norm(dim=0)

        layer = model.get_submodule(name.removesuffix(".weight"))
        hooks.append(layer.register_forward_pre_hook(keep))
    model(*batch)
    for hook in hooks:
        hook.remove()
    return found
