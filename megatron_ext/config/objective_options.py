"""What a user can say about the objective beside the loss of the next token."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.option_rules import require


@dataclass
class KLOptions:
    """Divergence of the model's predictions from the teacher's, KL(teacher || model) in nats, added to the loss of each token."""

    weight: float
    """Factor of the divergence."""
    sources: list[str] | None = None
    """Names of the sources whose tokens have it, such as those of ``data.replay``; null: all."""

    def __post_init__(self) -> None:
        require((self.weight >= 0, "weight", self.weight, "at least 0"))


@dataclass
class HiddenOptions:
    """Distance of the model's hidden states from the teacher's, added to the loss of each token."""

    weight: float
    """Factor of the sum of the distances of all layers."""
    layers: list[int] | None = None
    """Places of the hidden states, counted as transformers does: 0 the embedding, n what comes out of block n, the last one behind the
    final norm too; null: the last one."""
    kind: Literal["mse", "cosine"] = "mse"
    """``mse``: mean over channels of the squared difference; ``cosine``: 1 - cosine."""
    sources: list[str] | None = None
    """Names of the sources whose tokens have it; null: all."""

    def __post_init__(self) -> None:
        layers = self.layers
        fits = layers is None or (bool(layers) and min(layers) >= 0 and len(set(layers)) == len(layers))
        require(
            (self.weight >= 0, "weight", self.weight, "at least 0"),
            (fits, "layers", layers, "different numbers of at least 0, at least one, or null"),
        )


@dataclass
class DistillationOptions:
    """A second model, frozen, whose predictions or hidden states the model is kept close to.

    KL to the starting checkpoint on replay: its directory as ``teacher`` and ``kl.sources`` those of the replay. Self-distillation as
    published (Lee et al. 2023, arXiv:2210.02871): ``teacher`` a model that was continued once, ``model.init_from`` the one that it began
    from, and ``hidden``.
    """

    teacher: str
    """Directory of a Hugging Face checkpoint, or of one of ours, with the same vocabulary; for ``hidden`` of equal width and depth."""
    kl: KLOptions | None = None
    """Of predictions; null: none."""
    hidden: HiddenOptions | None = None
    """Of hidden states; null: none."""
    decay_steps: int | None = None
    """Both weights fall linearly to 0, which they reach after this many steps: from there on the teacher rests. null: they stay."""

    def __post_init__(self) -> None:
        require(
            (bool(self.teacher), "teacher", self.teacher, "directory of a checkpoint"),
            (self.kl is not None or self.hidden is not None, "kl", self.kl, "at least one of kl and hidden"),
            (self.decay_steps is None or self.decay_steps >= 1, "decay_steps", self.decay_steps, "at least 1, or null"),
        )

    def factor(self, step: int) -> float:
        """Factor of both weights in a step, from 1 on."""
        return 1.0 if self.decay_steps is None else max(0.0, 1.0 - (step - 1) / self.decay_steps)


@dataclass
class LossWeightingOptions:
    """Weights of the documents of a step by their losses in it (Sow et al. 2025, arXiv:2502.06733, sections 3 and 4).

    Costs one more forward pass of every step, without gradients.
    """

    strategy: Literal["linupper", "quadratic", "extremes"] = "linupper"
    """With h the loss scaled from the step's smallest and largest to -1 and 1: ``linupper`` min(h + 1, 1): low losses count less;
    ``quadratic`` 1 - h^2: medium ones count most; ``extremes`` |h|."""
    temperature: float = 1.0
    """Weights are proportional to exp(strategy / temperature): the smaller it is, the more they differ."""
    from_step: int = 1
    """First step that is weighted; before, all documents have weight 1."""
    sources: list[str] = field(default_factory=list)
    """Names of the sources whose documents are weighted among each other, the others having weight 1; empty: all."""

    def __post_init__(self) -> None:
        require(
            (self.temperature > 0, "temperature", self.temperature, "more than 0"),
            (self.from_step >= 1, "from_step", self.from_step, "at least 1"),
        )
