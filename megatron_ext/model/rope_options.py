"""What a user can say about rotary positions for documents longer than those that a model has seen."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from megatron_ext.option_rules import require

RopeKind = Literal["default", "linear", "ntk", "yarn", "llama3"]
KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor", "original_max_position"}),
    "ntk": frozenset({"factor", "original_max_position"}),
    "yarn": frozenset(
        {"factor", "original_max_position", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
    "llama3": frozenset({"factor", "original_max_position", "low_freq_factor", "high_freq_factor"}),
}
"""What may be set with each kind."""


@dataclass(frozen=True)
class RopeOptions:
    """How the angles of rotary positions are changed. The base that they begin from is ``model.rope_theta``; a larger base alone (ABF)
    needs nothing of this."""

    kind: RopeKind
    """``default``: not at all. ``linear``: all divided by ``factor`` (position interpolation). ``ntk``: a larger base, so that the slowest
    pair turns ``factor`` times slower and the fastest as before. ``yarn``: slow pairs divided, fast ones kept, logits made larger.
    ``llama3``: slow pairs divided, fast ones kept, as in Llama 3.1."""
    factor: float | None = None
    """How many times longer documents become, at least 1; null: ``model.max_position`` / ``original_max_position``."""
    original_max_position: int | None = None
    """Longest document, in tokens, that the model was trained on before; null: the longest that the checkpoint of ``model.init_from``
    promises, if its positions are not scaled already."""
    attention_factor: float | None = None
    """yarn: multiplies queries and keys; null: 0.1 ln(factor) + 1, or the quotient of that with ``mscale`` and ``mscale_all_dim``."""
    beta_fast: float | None = None
    """yarn: pairs that turn more often than this in ``original_max_position`` tokens are kept; null: 32."""
    beta_slow: float | None = None
    """yarn: pairs that turn less often than this are divided by ``factor``; null: 1."""
    mscale: float | None = None
    """yarn: see ``attention_factor``; set together with ``mscale_all_dim``."""
    mscale_all_dim: float | None = None
    """yarn: see ``attention_factor``."""
    truncate: bool | None = None
    """yarn: round the pairs at ``beta_fast`` and ``beta_slow`` to whole numbers, outwards; null: true."""
    low_freq_factor: float | None = None
    """llama3: pairs that turn less often than this in ``original_max_position`` tokens are divided by ``factor``; null: 1."""
    high_freq_factor: float | None = None
    """llama3: pairs that turn more often than this are kept; null: 4."""

    def __post_init__(self) -> None:
        fast, slow = 32.0 if self.beta_fast is None else self.beta_fast, 1.0 if self.beta_slow is None else self.beta_slow
        low = 1.0 if self.low_freq_factor is None else self.low_freq_factor
        high = 4.0 if self.high_freq_factor is None else self.high_freq_factor
        given = [(each.name, getattr(self, each.name)) for each in fields(self)[1:] if getattr(self, each.name) is not None]
        mscales = [name for name in ("mscale", "mscale_all_dim") if getattr(self, name) is not None]
        require(
            *((name in KEYS[self.kind], name, value, f"null with kind {self.kind}") for name, value in given),
            *((value > 0, name, value, "more than 0") for name, value in given if name != "truncate"),
            (self.factor is None or self.factor >= 1, "factor", self.factor, "at least 1, or null"),
            (fast > slow, "beta_fast", self.beta_fast, f"more than beta_slow ({slow:g})"),
            (high > low, "high_freq_factor", self.high_freq_factor, f"more than low_freq_factor ({low:g})"),
            (len(mscales) != 1, "mscale", self.mscale, "a number together with mscale_all_dim, or null for both"),
            (not mscales or self.attention_factor is None, "attention_factor", self.attention_factor, "null with mscale"),
        )
