"""One file per operation: its signature, its definition in plain PyTorch, its backends."""

from megatron_ext.kernels.fp8_gemm import fp8_gemm
from megatron_ext.kernels.fp8_quantize import fp8_dequantize, fp8_quantize, fp8_quantize_both
from megatron_ext.kernels.hadamard import hadamard_transform
from megatron_ext.kernels.mxfp4_quantize import mxfp4_dequantize, mxfp4_quantize, mxfp4_quantize_both
from megatron_ext.kernels.newton_schulz import newton_schulz
from megatron_ext.kernels.norm import rms_norm, ss_norm
from megatron_ext.kernels.norm_quantize import rms_norm_quantize
from megatron_ext.kernels.nvfp4_gemm import nvfp4_gemm
from megatron_ext.kernels.nvfp4_quantize import nvfp4_dequantize, nvfp4_quantize, nvfp4_quantize_both
from megatron_ext.kernels.varlen_attention import varlen_attention

__all__ = [
    "fp8_dequantize",
    "fp8_gemm",
    "fp8_quantize",
    "fp8_quantize_both",
    "hadamard_transform",
    "mxfp4_dequantize",
    "mxfp4_quantize",
    "mxfp4_quantize_both",
    "newton_schulz",
    "nvfp4_dequantize",
    "nvfp4_gemm",
    "nvfp4_quantize",
    "nvfp4_quantize_both",
    "rms_norm",
    "rms_norm_quantize",
    "ss_norm",
    "varlen_attention",
]
