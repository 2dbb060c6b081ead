"""Methods around the update: what they freeze stays to the bit under every rule, what they keep is saved and read with the part."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.optim.adamp import AdamP
from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.muon import Muon
from megatron_ext.optim.ownership import OwnedBox
from megatron_ext.optim.rules import Named
from megatron_ext.parallel.placement import Box
from megatron_ext.parallel.world import World
from tests.distributed import RunRanks
from tests.grids import owner_optimizer
from tests.optim.test_sharded import SHAPES, by_torch, give_gradients, parameters

MATRICES = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
RULES = {
    "adamw": lambda owned: torch.optim.AdamW([tensor for _, tensor in owned], lr=0.01, weight_decay=0.5),
    "adamp": lambda owned: AdamP([tensor for _, tensor in owned], lr=0.01, weight_decay=0.5),
    "muon": lambda owned: Muon(owned, lr=0.01, weight_decay=0.5, normuon=True),
}
Boxes = dict[tuple[str, Box], dict[str, Tensor]]


class Odd(UpdateExtension):
    """From step 3 on freezes ``head`` whole and the odd rows of ``embedding``; counts updates by row; halves those of ``weight``."""

    needs_before = True

    def prepare(self, step: int) -> None:
        self.freezes = step >= 3

    def updated(self, part: OwnedBox) -> bool | Tensor:
        if not self.freezes or part.name not in ("head", "embedding"):
            return True
        return part.name != "head" and torch.arange(*part.box[0]) % 2 == 0

    def first_state(self, part: OwnedBox, master: Tensor) -> dict[str, Tensor]:
        return {"updates": master.new_zeros(master.shape[:1])}

    def on_gradient(self, part: OwnedBox, gradient: Tensor) -> None:
        if part.name == "embedding":
            gradient.mul_(2.0)

    def on_update(self, part: OwnedBox, master: Tensor, state: dict[str, Tensor], before: Tensor | None) -> None:
        state["updates"] += 1
        if part.name == "weight":
            master.copy_((before + master) / 2)


class Whole(UpdateExtension):
    """Only looks at which parts there are."""

    needs_whole = True


def matrices(dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in parameters(dtype).items() if name in MATRICES}


def stepped(world: World, rule: str, saved: Boxes | None = None) -> list[Boxes]:
    """Everything that this rank owns after each of five steps, or of the last three from what was ``saved`` after two."""
    named = matrices()
    optimizer = owner_optimizer(named.items(), RULES[rule], world, extensions=[Odd()])
    if saved is not None:
        assert optimizer.load_owned_state(lambda part: {k: v.clone() for k, v in saved[part.name, part.box].items()}) == []
        optimizer.updates = 2
    seen = []
    for step in range(optimizer.updates, 5):
        give_gradients(named, step, world)
        optimizer.step()
        seen.append({(part.name, part.box): {k: v.clone() for k, v in state.items()} for part, state in optimizer.owned_state()})
    return seen


@pytest.mark.parametrize("rule", RULES)
def test_frozen_stays_to_the_bit_with_all_state(run_ranks: RunRanks, rule: str) -> None:
    for seen in run_ranks(2, stepped, rule):
        for name, box in seen[0]:
            for kind, value in seen[4][name, box].items():
                before, moved = seen[1][name, box][kind], not torch.equal(value, seen[1][name, box][kind])
                if name == "head":
                    assert not moved, f"{kind} of what is frozen whole"
                elif name == "embedding" and value.ndim:
                    odd = torch.arange(*box[0]) % 2 == 1
                    assert torch.equal(value[odd], before[odd]) and (value[~odd] != before[~odd]).any(), kind
                else:
                    assert moved, kind


@pytest.mark.parametrize("rule", ["adamw", "adamp"])
def test_state_of_methods_is_saved_and_read(run_ranks: RunRanks, rule: str) -> None:
    first = run_ranks(1, stepped, rule)[0]
    [resumed] = run_ranks(1, stepped, rule, first[1])
    for part, state in first[4].items():
        assert all(torch.equal(value, resumed[2][part][kind]) for kind, value in state.items()), part
        assert state["updates"].tolist() == [2.0 if frozen else 5.0 for frozen in frozen_rows(*part)]


def frozen_rows(name: str, box: Box) -> list[bool]:
    return [name == "head" or (name == "embedding" and row % 2 == 1) for row in range(*box[0])]


def test_methods_change_gradients_and_updates(run_ranks: RunRanks) -> None:
    [with_method] = run_ranks(1, stepped, "adamw")
    named = matrices()
    rule = RULES["adamw"](list(named.items()))
    for step in range(2):
        rule.zero_grad()
        give_gradients(named, step, World(0, 1, torch.device("cpu")))
        before = {name: value.detach().clone() for name, value in named.items()}
        named["embedding"].grad *= 2.0
        rule.step()
        with torch.no_grad():
            named["weight"].copy_((before["weight"] + named["weight"]) / 2)
    for (name, _), state in with_method[1].items():
        assert torch.equal(state["master"], named[name].detach()), name


def owned(world: World, extensions: list[UpdateExtension]) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the parts that this rank owns, and the parameters after ten steps."""
    named = parameters(torch.float32)

    def make(owned: Named) -> torch.optim.Optimizer:
        return torch.optim.AdamW([tensor for _, tensor in owned], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    optimizer = owner_optimizer(named.items(), make, world, extensions=extensions)
    for step in range(10):
        give_gradients(named, step, world)
        optimizer.step()
    return [part.part.name for part in optimizer.owned], {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize(("extensions", "pieces"), [([], 6), ([UpdateExtension()], 6), ([Whole()], 5)], ids=["none", "rows", "whole"])
def test_parameters_are_cut_unless_a_method_needs_them_whole(run_ranks: RunRanks, extensions: list[Any], pieces: int) -> None:
    results = run_ranks(2, owned, extensions)
    assert sum(len(names) for names, _ in results) == pieces
    for name, expected in by_torch(torch.float32, 0.0)[1].items():
        torch.testing.assert_close(results[0][1][name], expected, rtol=1e-5, atol=1e-6)
