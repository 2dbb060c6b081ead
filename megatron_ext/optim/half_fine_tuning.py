"""Half fine-tuning (HFT: Hui et al. 2024, arXiv:2404.18466): half of the parameters of every block are frozen, drawn anew at each stage."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable

from megatron_ext.optim.extension import UpdateExtension
from megatron_ext.optim.ownership import OwnedBox

_OF_BLOCK = re.compile(r"model\.layers\.(\d+)\.((self_attn|mlp)\.\w+_proj|[\w.]+)\.\w+")
"""Number of the layer, module in it, and what the module belongs to where it is no norm."""


class HalfFineTuning(UpdateExtension):
    """Freezes half of the linears of attention, half of those of the MLP and half of the norms of every block.

    Of an odd number of modules, half of the blocks freeze one more than the others: of three linears of the MLP, two in half of the
    blocks and one in the rest. A linear's bias goes with its weight. Embedding, head and what else is outside blocks is always updated.
    Moments of frozen parameters rest, too, and go on when these are updated again.

    Args:
        names: of all parameters of the whole model.
        seed: of the draws, which follow from it, the number of the stage and the names.
        stage_steps: updates of a stage.
    """

    def __init__(self, names: Iterable[str], seed: int, stage_steps: int) -> None:
        self._seed, self._stage_steps = seed, stage_steps
        self._module_of: dict[str, str] = {}
        self._blocks: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        """Modules by category and layer."""
        for name in names:
            if (found := _OF_BLOCK.fullmatch(name)) is not None:
                layer, module, category = found.groups()
                self._module_of[name] = f"{layer}.{module}"
                self._blocks[category or "norms"][layer].add(f"{layer}.{module}")
        self._stage, self._frozen = 0, self._drawn(0)

    def prepare(self, step: int) -> None:
        """See ``UpdateExtension``."""
        stage = (step - 1) // self._stage_steps
        if stage != self._stage:
            self._stage, self._frozen = stage, self._drawn(stage)

    def updated(self, part: OwnedBox) -> bool:
        """See ``UpdateExtension``."""
        return self._module_of.get(part.name) not in self._frozen

    def _drawn(self, stage: int) -> frozenset[str]:
        """The modules that are frozen in a stage, counted from 0."""
        frozen: set[str] = set()
        for category, layers in self._blocks.items():
            for place, layer in enumerate(self._shuffled(stage, category, layers)):
                modules = self._shuffled(stage, category, layers[layer])
                frozen |= set(modules[: (len(modules) + (place < len(layers) // 2)) // 2])
        return frozenset(frozen)

    def _shuffled(self, stage: int, category: str, words: Iterable[str]) -> list[str]:
        def place(word: str) -> bytes:
            return hashlib.blake2b(f"{self._seed}/{stage}/{category}/{word}".encode(), digest_size=16).digest()

        return sorted(words, key=place)
