"""One layer of the decoder."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from megatron_ext.model.attention import Attention
from megatron_ext.model.checkpointing import recomputed
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.context import PackContext
from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.model.mlp import MLP
from megatron_ext.model.norm_kinds import build_norm, normalized
from megatron_ext.parallel.tensor import TensorParallel


class Sites(NamedTuple):
    """Names of the norms around attention or the MLP; None: there is none."""

    before: str | None = None
    """Of what it reads."""
    behind: str | None = None
    """Of what it adds to the stream."""
    stream: str | None = None
    """Of the stream with what it added."""


SITES: Mapping[str, tuple[Sites, Sites]] = {
    "pre": (Sites(before="input_layernorm"), Sites(before="post_attention_layernorm")),
    "post": (Sites(stream="post_attention_layernorm"), Sites(stream="post_feedforward_layernorm")),
    "peri": (
        Sites(before="input_layernorm", behind="post_attention_layernorm"),
        Sites(before="pre_feedforward_layernorm", behind="post_feedforward_layernorm"),
    ),
}
"""Norms around attention and around the MLP, by placement: ``pre`` with the names of Llama, ``peri`` with those of Gemma 2."""


def placement_of(config: ModelConfig, layer: int) -> str:
    """Key of ``SITES`` for block ``layer``, from 0."""
    if config.norm.placement != "mix":
        return config.norm.placement
    return "post" if layer < -(-config.num_layers // 4) else "pre"


class Block(nn.Module):
    """Attention and MLP around a residual stream x, with norms N where ``norm.placement`` says; F is attention, then the MLP.

    - ``pre``: x + F(N(x)).
    - ``post``: N(x + F(x)) (Vaswani et al. 2017, arXiv:1706.03762, section 3.1).
    - ``peri``: x + N'(F(N(x))) (Peri-LN: Kim et al. 2025, arXiv:2502.02732, section 3).
    - ``mix``: ``post`` in the first quarter of the layers, rounded up, then ``pre`` (Mix-LN: Li et al. 2024, arXiv:2412.13795, equation 8).

    Args:
        config: shape.
        attention: backend of ``varlen_attention``.
        tp: tensor-parallel ranks.
        layer: number of the layer in the whole model.
        recompute: what backward computes again instead of keeping it: see ``recomputed``.
        max_logits: as in ``Attention``.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: str,
        tp: TensorParallel,
        layer: int,
        recompute: str = "none",
        max_logits: MaxLogits | None = None,
    ) -> None:
        super().__init__()
        self.tp, self.recompute = tp, recompute
        self.self_attn = Attention(config, attention, tp, layer, max_logits)
        self.mlp = MLP(config, tp)
        self.sites = SITES[placement_of(config, layer)]
        for name in (name for sites in self.sites for name in sites if name is not None):
            self.add_module(name, build_norm(config, tp.shard_tokens, layer))

    def forward(self, x: Tensor, pack: PackContext) -> Tensor:
        """Map the residual stream ``x`` [T, hidden] (this rank's tokens of it, where they are divided) to the same shape."""
        if self.training and self.recompute == "selective" and self.mlp.tile is not None:
            # Its products would be those of all tiles.
            return recomputed("full", self._add_mlp, recomputed("selective", self._add_attention, x, pack), pack)
        if self.training:
            return recomputed(self.recompute, self._forward, x, pack)
        return self._forward(x, pack)

    def _forward(self, x: Tensor, pack: PackContext) -> Tensor:
        return self._add_mlp(self._add_attention(x, pack), pack)

    def _add_attention(self, x: Tensor, pack: PackContext) -> Tensor:
        return self._add(self.sites[0], x, pack.tokens, lambda read: self.self_attn(read, pack))

    def _add_mlp(self, x: Tensor, pack: PackContext) -> Tensor:
        return self._add(self.sites[1], x, pack.tokens, lambda read: self.mlp(read, pack.tokens))

    def _add(self, sites: Sites, x: Tensor, tokens: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        x = x + self._norm(sites.behind, function(self._norm(sites.before, x, tokens)), tokens)
        return self._norm(sites.stream, x, tokens)

    def _norm(self, name: str | None, x: Tensor, tokens: int) -> Tensor:
        return x if name is None else normalized(self.get_submodule(name), x, self.tp, tokens)
