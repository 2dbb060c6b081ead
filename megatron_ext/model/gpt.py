"""The decoder: embedding, blocks, final norm and head, with the parameter names of Hugging Face's Llama."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.model.block import Block
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.context import PackContext
from megatron_ext.model.init import initialize_parameter
from megatron_ext.model.loss import linear_cross_entropy
from megatron_ext.model.norm import RMSNorm
from megatron_ext.model.rope import rope_tables


class Decoder(nn.Module):
    """Everything under the name ``model.`` in a checkpoint."""

    def __init__(self, config: ModelConfig, attention: str, activation_checkpointing: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, attention, activation_checkpointing) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class GPT(nn.Module):
    """A language model of the Llama family over packs: documents laid end to end, each attending only to itself.

    Weights are drawn by ``reset_parameters``; until then, or until a checkpoint is loaded, they are PyTorch's default. The model can be
    built on the meta device and given memory by ``to_empty``: it has no buffers.
    """

    def __init__(self, config: ModelConfig, attention: str = "auto", activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, attention, activation_checkpointing)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, hidden]: the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def flat_layers(self) -> list[nn.Module]:
        """Embedding, blocks, final norm and head, in order of execution; a tied head is the embedding again."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return [self.model.embed_tokens, *self.model.layers, self.model.norm, head]

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight anew: a function of ``seed`` and the parameter's name alone."""
        for name, parameter in self.named_parameters():
            initialize_parameter(name, parameter, self.config, seed)

    def hidden_states(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Final normalised hidden states [T, hidden]; arguments as in ``forward``."""
        x = F.embedding(tokens, self.model.embed_tokens.weight)
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        pack = PackContext(cu_seqlens, max_seqlen, cos, sin)
        for layer in self.model.layers:
            x = layer(x, pack)
        return self.model.norm(x)

    def logits(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """Logits [T, V] in the model's dtype; arguments as in ``forward``."""
        return F.linear(self.hidden_states(tokens, positions, cu_seqlens, max_seqlen), self.head_weight)

    def forward(
        self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, labels: Tensor, loss_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of a pack.

        ``tokens`` int [T]; ``positions`` int [T], from 0 in each document; ``cu_seqlens`` int32 [documents + 1], from 0 to T;
        ``max_seqlen`` at least the longest document; ``labels`` int64 [T]; ``loss_weight`` float32 [T]. T may be 0. Returns the sum of
        ``loss_weight`` times cross-entropy (differentiable) and the unweighted cross-entropy of each token [T] (0 where the weight
        is 0), float32, or float64 for a float64 model.
        """
        hidden = self.hidden_states(tokens, positions, cu_seqlens, max_seqlen)
        return linear_cross_entropy(hidden, self.head_weight, labels, loss_weight)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of a model, in order, without allocating it."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
