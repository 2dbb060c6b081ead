"""The decoder: embedding, blocks, final norm and head, with the parameter names of Hugging Face's Llama."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ext.model.block import Block
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.context import PackContext
from megatron_ext.model.embedding_projection import EmbeddingProjection, shrink_gradient
from megatron_ext.model.evaluation_window import EvaluationWindow
from megatron_ext.model.init import initialize_parameter
from megatron_ext.model.loss import linear_cross_entropy
from megatron_ext.model.max_logits import MaxLogits
from megatron_ext.model.norm_kinds import build_norm, normalized
from megatron_ext.model.offload import kept_on_host
from megatron_ext.model.placements import parameter_boxes
from megatron_ext.model.rope import rope_tables
from megatron_ext.model.window_options import WindowOptions
from megatron_ext.parallel.device import HostTransfer
from megatron_ext.parallel.pipeline import Stage, whole_model
from megatron_ext.parallel.placement import slices, whole_box
from megatron_ext.parallel.sequence import Sharing
from megatron_ext.parallel.tensor import ColumnLinear, TensorParallel, VocabularyEmbedding, single
from megatron_ext.precision.state import PrecisionState


class Decoder(nn.Module):
    """Everything under the name ``model.`` in a checkpoint that this stage holds. A tied embedding is on the last stage too.

    The norm and the projection behind the embedding, and the projection before the head, are there where the configuration says so.
    The last norm is there with every placement.
    """

    def __init__(
        self, config: ModelConfig, attention: str, recompute: str, tp: TensorParallel, stage: Stage, max_logits: MaxLogits | None
    ) -> None:
        super().__init__()
        embeds = stage.is_first or (stage.is_last and config.tie_embeddings)
        self.embed_tokens = VocabularyEmbedding(tp.rows(config.vocab_size), config.hidden_size) if embeds else None
        projects, size, partial = config.embedding_projection, config.hidden_size, tp.shard_tokens
        self.embed_projection = EmbeddingProjection(size, partial) if projects and stage.is_first else None
        self.embed_norm = build_norm(config, partial) if config.norm.embedding_norm and stage.is_first else None
        blocks = {str(layer): Block(config, attention, tp, layer, recompute, max_logits) for layer in stage.layers}
        self.layers = nn.ModuleDict(blocks)
        self.norm = build_norm(config, partial) if stage.is_last else None
        self.head_projection = EmbeddingProjection(size, partial) if projects and stage.is_last else None


class GPT(nn.Module):
    """A language model of the Llama family over packs: documents laid end to end, each attending only to itself.

    Weights are drawn by ``reset_parameters``; until then, or until a checkpoint is loaded, they are PyTorch's default. The model can be
    built on the meta device and given memory by ``to_empty``: it has no buffers.

    Args:
        config: shape of the whole model.
        attention: backend of ``varlen_attention``.
        recompute: activation checkpointing, see ``recomputed``.
        tp: tensor-parallel ranks; None: this rank has all of every matrix.
        stage: the layers of this rank; None: all.
        max_logits: takes the largest attention logits of every forward pass in training mode; None: they are not computed.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: str = "auto",
        recompute: str = "none",
        tp: TensorParallel | None = None,
        stage: Stage | None = None,
        max_logits: MaxLogits | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.tp = tp or single()
        self.max_logits = max_logits
        self.window: WindowOptions | None = None
        """What attention sees of longer documents, see ``seeing``; None: all before a query."""
        self.precision: PrecisionState | None = None
        self.observe_head: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None
        """Told by ``loss`` what it is computed from: the head's input, its matrix (this rank's rows), labels and weights."""
        self.extend_loss: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        """Given the sum of the weighted losses, the head's input and its matrix by ``loss``, which returns what this makes of the sum."""
        self.loss_tile: int | None = None
        """Most tokens whose logits exist at once; None: what suits the device."""
        self.offload: HostTransfer | None = None
        """Takes what blocks that are recomputed keep, their inputs, to the host; None: they stay on the device."""
        self.stage = stage or whole_model(config.num_layers)
        self.model = Decoder(config, attention, recompute, self.tp, self.stage, max_logits)
        has_head = self.stage.is_last and not config.tie_embeddings
        rows, bias = self.tp.rows(config.vocab_size), config.head_bias
        self.lm_head = ColumnLinear(config.hidden_size, rows, bias=bias) if has_head else None

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix [V, hidden]: of the embedding itself when tied. Only on the last stage."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        assert head is not None, "the last stage has a head"
        return head.weight

    def head_operands(self, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Hidden states and output matrix whose product are the logits; a bias is one more column, against ones. ``x`` as in ``loss``."""
        hidden, weight = self.head_input(x, tokens), self.head_weight
        if self.lm_head is None or self.lm_head.bias is None:
            return hidden, weight
        return torch.cat([hidden, hidden.new_ones(tokens, 1)], 1), torch.cat([weight, self.lm_head.bias[:, None]], 1)

    def reset_parameters(self, seed: int) -> None:
        """Draw every weight anew: a function of ``seed`` and the parameter's name alone, whatever the ranks."""
        parameters = dict(self.named_parameters())
        for name, (shape, box) in parameter_boxes(self).items():
            whole = torch.empty(shape, device="cpu")
            initialize_parameter(name, whole, self.config, seed)
            with torch.no_grad():
                parameters[name].copy_(whole[slices(box, whole_box(shape))])

    @contextmanager
    def seeing(self, window: WindowOptions | None) -> Iterator[None]:
        """From here to the end of the context attention sees what ``window`` says, as only an evaluation wants it."""
        before, self.window = self.window, window
        try:
            yield
        finally:
            self.window = before

    def context(self, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, sharing: Sharing | None = None) -> PackContext:
        """What the blocks need to know of a pack, before its forward pass; arguments as in ``forward``."""
        if self.precision is not None:
            self.precision.next_pack()
        dtype = next(self.parameters()).dtype
        cos, sin = rope_tables(positions, self.config.head_dim, self.config.rope_theta, dtype, self.config.rope)
        window = None
        if self.window is not None and max_seqlen > self.window.local_tokens:
            window = EvaluationWindow.of_pack(self.window, self.config, cu_seqlens, dtype)
        return PackContext(cu_seqlens, max_seqlen, sharing, cos, sin, window)

    def embed(self, tokens: Tensor) -> Tensor:
        """Residual stream [T, hidden] of ``tokens`` int [T], as it is outside a tensor-parallel region. Only on the first stage."""
        assert self.model.embed_tokens is not None, "the first stage has the embedding"
        x = shrink_gradient(self.tp.leave(self.model.embed_tokens(tokens)), self.config.embedding_gradient_shrink)
        x = x if self.model.embed_projection is None else self.model.embed_projection(x)
        return x if self.model.embed_norm is None else normalized(self.model.embed_norm, x, self.tp, len(tokens))

    def blocks(self, x: Tensor, pack: PackContext) -> Tensor:
        """Map the residual stream ``x`` through the blocks of this stage."""
        keeping = nullcontext() if self.offload is None or not self.training else kept_on_host(self.offload)
        with keeping:
            for layer in self.model.layers.values():
                x = layer(x, pack)
        return x

    def head_input(self, x: Tensor, tokens: int) -> Tensor:
        """What the head reads [T, hidden], on every tensor-parallel rank. Only on the last stage; ``tokens`` is T."""
        assert self.model.norm is not None, "the last stage has the final norm"
        x = normalized(self.model.norm, x, self.tp, tokens)
        x = x if self.model.head_projection is None else self.model.head_projection(x)
        return self.tp.enter(x, tokens)

    def loss(self, x: Tensor, labels: Tensor, loss_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of a pack from the residual stream after the last block; arguments and results as in ``forward``. Only on the last stage."""
        hidden, weight = self.head_operands(x, len(labels))
        if self.observe_head is not None:
            self.observe_head(hidden, weight, labels, loss_weight)
        rows = self.tp.rows(self.config.vocab_size)
        loss, token_loss = linear_cross_entropy(hidden, weight, labels, loss_weight, rows, self.tp.group, self.loss_tile)
        return loss if self.extend_loss is None else self.extend_loss(loss, hidden, weight), token_loss

    def logits(self, tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, max_seqlen: int, places: Tensor | None = None) -> Tensor:
        """This rank's columns of the logits [T, V] in the model's dtype, on one stage; arguments as in ``forward``.

        ``places``, int64 [n], are the tokens whose logits [n, V] are wanted, where activations are not divided by tokens; None: all.
        """
        x = self.blocks(self.embed(tokens), self.context(positions, cu_seqlens, max_seqlen))
        return F.linear(*(self.head_operands(x, len(tokens)) if places is None else self.head_operands(x[places], len(places))))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor,
        loss_weight: Tensor,
        sharing: Sharing | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss of a pack, or of this rank's tokens of it, where one stage has all layers.

        ``tokens`` int [T]; ``positions`` int [T], from 0 in each document; ``cu_seqlens`` int32 [documents + 1], from 0 to the tokens
        of the whole pack; ``max_seqlen`` at least the longest document; ``labels`` int64 [T]; ``loss_weight`` float32 [T]; ``sharing``:
        who has the other tokens, None if the pack is T tokens. T may be 0. Returns the sum of
        ``loss_weight`` times cross-entropy (differentiable) and the unweighted cross-entropy of each token [T] (0 where the weight
        is 0), float32, or float64 for a float64 model; the same on every tensor-parallel rank.
        """
        x = self.blocks(self.embed(tokens), self.context(positions, cu_seqlens, max_seqlen, sharing))
        return self.loss(x, labels, loss_weight)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter of a model, in order, without allocating it."""
    with torch.device("meta"):
        model = GPT(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
