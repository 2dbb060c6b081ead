"""What the quantized linears of a model have to know of the run: which step it is, and what its random numbers come from."""

import hashlib
from typing import Any

import torch
from torch import Tensor

MOST_SIGNS = 32
"""Order of the largest random Hadamard transform: a block of MX formats."""


class PrecisionState:
    """One object of a model, shared by its linears and moved on by the trainer.

    Args:
        seed: of the run; the signs of the Hadamard transform and the random bits of stochastic rounding come from it.
        data_rank: place of this rank among those that compute other packs, so that their rounding errors are independent.
        switch_at_tokens: as in ``PrecisionOptions``.
    """

    def __init__(self, seed: int, data_rank: int = 0, switch_at_tokens: int | None = None) -> None:
        self.seed, self.data_rank = seed, data_rank
        self.switch_at_tokens = switch_at_tokens
        draw = torch.randint(2, (MOST_SIGNS,), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.signs: Tensor = (2 * draw - 1).float()
        """float32 [32] of +-1, the same on all ranks, in all layers and for the whole run."""
        self._signs: dict[tuple[torch.device, int], Tensor] = {}
        self.step = 0
        self.pack = 0
        self.version = 0
        """Another number whenever weights may have changed."""
        self.switched = switch_at_tokens == 0
        """Whether the late switch to high precision has come."""

    def begin_step(self, step: int, tokens: int) -> bool:
        """Before the packs of step ``step``, which follows ``tokens`` of training; True if this is the first step that has switched."""
        before, self.switched = self.switched, self.switch_at_tokens is not None and tokens >= self.switch_at_tokens
        self.step, self.pack = step, 0
        self.version += 1
        return self.switched and not before

    def end_step(self) -> None:
        """After the update of the weights."""
        self.version += 1

    def next_pack(self) -> None:
        """Before the forward pass of a pack."""
        self.pack += 1

    def signs_for(self, x: Tensor, order: int) -> Tensor:
        """float32 [order] of +-1 on the device of ``x``: the same object every time, so that products need not compare them."""
        if (x.device, order) not in self._signs:
            self._signs[x.device, order] = self.signs[:order].to(x.device)
        return self._signs[x.device, order]

    def rounding_seed(self, layer: str, operand: str) -> int:
        """63 bits for stochastic rounding of ``operand`` in ``layer``: others in every step and pack, equal on tensor-parallel ranks."""
        what = f"{self.seed}|{self.step}|{self.data_rank}|{self.pack}|{layer}|{operand}"
        return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "little") >> 1

    def saved(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"seed": self.seed, "signs": [int(sign) for sign in self.signs]}

    def load(self, saved: dict[str, Any] | None) -> None:
        """Go on with the signs and the seed of ``saved``; None, of a run that had none: with one's own."""
        if saved is not None:
            self.seed, self.signs = saved["seed"], torch.tensor(saved["signs"], dtype=torch.float32, device="cpu")
            self._signs.clear()
