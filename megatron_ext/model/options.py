"""What a user can say about the model."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_ext.model.norm_options import NormOptions
from megatron_ext.model.rope_options import RopeOptions
from megatron_ext.model.window_options import WindowOptions
from megatron_ext.option_rules import require


@dataclass
class ModelOptions:
    """A decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3), or where to take it from."""

    init_from: str | None = None
    """Directory of a Hugging Face checkpoint: weights and shape come from it. ``max_position``, ``rope_theta`` and ``rope`` change what its
    config.json says; of the other keys only ``attention``, ``evaluation_window`` and ``norm_backend`` may be set."""
    vocab_size: int | None = None
    """Rows of the embedding; null: the size of the tokenizer."""
    hidden_size: int = 256
    """Width of the residual stream."""
    intermediate_size: int = 704
    """Width of the SwiGLU MLP."""
    num_layers: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """Number of query heads."""
    num_kv_heads: int | None = None
    """Number of key/value heads (grouped-query attention); null: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; null: hidden_size / num_heads."""
    max_position: int | None = None
    """Longest sequence that the exported config.json promises; null: ``data.sequence_length``; with ``init_from`` what the checkpoint
    promises, or what ``rope`` or ``data.sequence_length`` make of it if that is longer."""
    rope_theta: float | None = None
    """Base of the rotary position embedding; null: that of ``init_from``, or 10000."""
    rope: RopeOptions | None = None
    """How rotary positions reach longer documents; null: as in ``init_from``, or by the base alone."""
    norm: NormOptions = field(default_factory=NormOptions)
    """Kind and places of the norms."""
    norm_eps: float | None = None
    """Added to the mean square in norms; null: 1e-6 with ``norm.kind`` ss, else 1e-5."""
    qk_norm: bool = False
    """RMSNorm on each query and key head, as in Qwen3."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections, as in Qwen2."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    embedding_projection: bool = False
    """A square matrix behind the embedding and one before the head, orthogonal at first (EmbProj: Park et al. 2025, arXiv:2506.19697)."""
    embedding_gradient_shrink: float = 1.0
    """Factor of the gradient of the embedding, above 0 and at most 1, as an input (GLM-130B: Zeng et al. 2022, arXiv:2210.02414: 0.1)."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections into the residual are scaled by 1/sqrt(2 layers), but for
    ``norm.depth_scaling``."""
    attention: Literal["auto", "dense", "sdpa", "varlen", "flash_attn"] = "auto"
    """``dense``, ``sdpa``, ``varlen``, ``flash_attn``; ``auto``: the fastest that the device can run, printed at start."""
    evaluation_window: WindowOptions | None = None
    """What evaluation sees of documents that are longer than those of training; null: all of them, as training does."""
    norm_backend: Literal["torch", "auto", "apex"] = "torch"
    """What computes RMSNorm and SSNorm: PyTorch; ``auto``: fused kernels, in C++ on CPUs (built when first used) and Triton on GPUs, whose
    last bits differ; ``apex``: NVIDIA's package, RMSNorm on GPUs. Printed at start."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_position")
        given = [(name, getattr(self, name)) for name in sizes if getattr(self, name) is not None]
        require(*((size >= 1, name, size, "at least 1") for name, size in given))
        kv_heads = self.num_kv_heads or self.num_heads
        pairs = 2 * self.num_heads
        even_split = self.head_dim is not None or self.hidden_size % pairs == 0
        require(
            (self.num_heads % kv_heads == 0, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads ({self.num_heads})"),
            (
                even_split,
                "hidden_size",
                self.hidden_size,
                f"a multiple of 2 num_heads ({pairs}) while head_dim is null",
            ),
            (not (self.head_dim or 0) % 2, "head_dim", self.head_dim, "an even number: rotary positions turn pairs"),
            (self.rope_theta is None or self.rope_theta > 0, "rope_theta", self.rope_theta, "more than 0, or null"),
            (self.norm_eps is None or self.norm_eps > 0, "norm_eps", self.norm_eps, "more than 0, or null"),
            (0 < self.embedding_gradient_shrink <= 1, "embedding_gradient_shrink", self.embedding_gradient_shrink, "above 0, at most 1"),
            (self.init_std >= 0, "init_std", self.init_std, "at least 0"),
        )
