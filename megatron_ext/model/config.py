"""The shape of a model, fully resolved: no field is optional and none depends on another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_ext.errors import ConfigError
from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.options import ModelOptions
from megatron_ext.model.rope_scaling import RopeScaling, resolve_rope
from megatron_ext.option_rules import shown

DEFAULT_EPS, SS_EPS = 1e-5, 1e-6
DEFAULT_THETA = 10000.0
LARGEST_SIZE, MOST_LAYERS = 2**31 - 1, 1000
"""Bounds of what sizes may be: names and shapes of all layers are made before any memory is."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. Sizes are in elements, ``max_position`` in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = DEFAULT_THETA
    rope: RopeScaling = field(default_factory=RopeScaling)
    norm_eps: float = 1e-5
    qk_norm: bool = False
    qkv_bias: bool = False
    tie_embeddings: bool = False
    init_std: float = 0.02
    norm: NormOptions = field(default_factory=NormOptions)
    embedding_projection: bool = False
    embedding_gradient_shrink: float = 1.0
    mlp_bias: bool = False
    """Of gate_proj and up_proj. Like ``head_bias`` it comes with a checkpoint whose LayerNorms were converted."""
    head_bias: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that no model can have."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position")
        for name in sizes:
            value, most = getattr(self, name), MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
            if not 1 <= value <= most:
                raise ConfigError(f"model.{name} is {shown(value)}; it must be at least 1 and at most {most}")
        for name in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 < self.embedding_gradient_shrink <= 1:
            shrink = self.embedding_gradient_shrink
            raise ConfigError(f"model.embedding_gradient_shrink is {shrink}; it must be above 0 and at most 1")
        if not 0 <= self.init_std < math.inf:
            raise ConfigError(f"model.init_std is {self.init_std}; it must not be negative")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"model.num_kv_heads is {self.num_kv_heads}; it must divide model.num_heads ({self.num_heads})")
        if self.head_bias and self.tie_embeddings:
            raise ConfigError("model.head_bias is true; accepted is false with model.tie_embeddings")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}; rotary embeddings turn pairs, so it must be even")

    @classmethod
    def from_options(cls, options: ModelOptions, vocab_size: int, sequence_length: int) -> ModelConfig:
        """Resolve what the user left open.

        ``vocab_size`` (rows) and ``sequence_length`` (tokens) stand in where the options say null.
        """
        head_dim = options.hidden_size // options.num_heads if options.head_dim is None else options.head_dim
        max_position = sequence_length if options.max_position is None else options.max_position
        theta = options.rope_theta or DEFAULT_THETA
        theta, rope = resolve_rope(options.rope, theta, head_dim, max_position)
        return cls(
            vocab_size=vocab_size if options.vocab_size is None else options.vocab_size,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            num_layers=options.num_layers,
            num_heads=options.num_heads,
            num_kv_heads=options.num_heads if options.num_kv_heads is None else options.num_kv_heads,
            head_dim=head_dim,
            max_position=max_position,
            rope_theta=theta,
            rope=rope,
            norm_eps=options.norm_eps or (SS_EPS if options.norm.kind == "ss" else DEFAULT_EPS),
            qk_norm=options.qk_norm,
            qkv_bias=options.qkv_bias,
            tie_embeddings=options.tie_embeddings,
            init_std=options.init_std,
            norm=options.norm,
            embedding_projection=options.embedding_projection,
            embedding_gradient_shrink=options.embedding_gradient_shrink,
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def norm_parameters(self) -> int:
        """Number of values of one norm of the residual stream, running statistics among them."""
        others = {"ss": 1, "layer": 2 * self.hidden_size, "power": 3 * self.hidden_size + 1, "unified": 9 * self.hidden_size + 1}
        return others.get(self.norm.kind, self.hidden_size)

    @property
    def projection_parameters(self) -> int:
        """Number of trained values of the matrices behind the embedding and before the head."""
        return 2 * self.hidden_size**2 if self.embedding_projection else 0

    @property
    def _matrix_elements_per_layer(self) -> int:
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def block_parameters(self) -> int:
        """Number of trained values of one block."""
        vectors = (4 if self.norm.placement == "peri" else 2) * self.norm_parameters
        vectors += 2 * self.head_dim if self.qk_norm else 0
        vectors += self.query_size + 2 * self.kv_size if self.qkv_bias else 0
        vectors += 2 * self.intermediate_size if self.mlp_bias else 0
        return self._matrix_elements_per_layer + vectors

    @property
    def embedding_parameters(self) -> int:
        """Number of trained values of the embedding, and of an output head."""
        return self.vocab_size * self.hidden_size

    def num_parameters(self) -> int:
        """Number of trained values; a tied embedding counts once."""
        embeddings = self.embedding_parameters * (1 if self.tie_embeddings else 2)
        norms = (2 if self.norm.embedding_norm else 1) * self.norm_parameters
        outside = self.projection_parameters + norms + (self.vocab_size if self.head_bias else 0)
        return embeddings + self.num_layers * self.block_parameters + outside

    def flops_per_token(self, mean_context: float) -> float:
        """Floating-point operations of the matrix products of forward and backward, per token.

        ``mean_context`` is the mean number of keys that a query sees, itself included (``mean_causal_context``). Counted are 6 per
        matrix element (head included, embedding look-up not) and 12 per key and query channel: scores and values, forward and
        twice backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1, with the causal half counted as what it is).
        """
        matrices = self.num_layers * self._matrix_elements_per_layer + self.vocab_size * self.hidden_size + self.projection_parameters
        return 6.0 * matrices + 12.0 * self.num_layers * self.query_size * mean_context


def mean_causal_context(lengths: Iterable[int]) -> float:
    """Mean number of keys that a query sees, itself included, over documents of these lengths; 0 if there are none."""
    tokens = pairs = 0
    for length in lengths:
        tokens += length
        pairs += length * (length + 1) // 2
    return pairs / tokens if tokens else 0.0
