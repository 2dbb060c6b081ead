"""The adapter to PyTorch's products of scaled matrices, torch.nn.functional.scaled_mm: what runs where, padding, layouts of scales.

Written against torch 2.13: the signature in torch/nn/functional.py, and the conditions of GPUs in aten/src/ATen/native/cuda/ScaledBlas.cpp.
Run on the CPU; on no GPU so far. Nothing else here calls scaled_mm.
"""

from inspect import signature

import torch
from torch import Tensor
from torch.nn import functional

from megatron_ext.kernels.quantized import FP8Tensor, NVFP4Tensor

TENSORWISE, ROWWISE, TILEWISE, SQUARE, MXFP8 = "TensorWise", "RowWise", "BlockWise1x128", "BlockWise128x128", "BlockWise1x32"
"""PyTorch's names of the scalings of FP8Tensors."""
SCALES = ("scale_a", "scale_recipe_a", "scale_b", "scale_recipe_b", "swizzle_a", "swizzle_b")
ARGUMENTS = ("mat_a", "mat_b", *SCALES, "output_dtype", "use_fast_accum")
"""Of scaled_mm, as they are used here."""


def fp8_scaling(x: FP8Tensor) -> str | None:
    """The scaling of ``x`` in PyTorch's names; None if PyTorch has none like it."""
    if x.scales.dtype == torch.float8_e8m0fnu:
        return MXFP8 if x.block == (1, 32) else None
    if x.scales.numel() == 1:
        return TENSORWISE
    if x.block[0] == 1 and x.scales.shape[1] == 1:
        return ROWWISE
    return {(1, 128): TILEWISE, (128, 128): SQUARE}.get(x.block)


def fp8_obstacle(a: FP8Tensor, b: FP8Tensor, device: torch.device | None = None) -> str | None:
    """Why scaled_mm cannot multiply ``a`` and ``b`` on ``device`` (None: theirs), or None if it can."""
    device, scalings = device or a.codes.device, (fp8_scaling(a), fp8_scaling(b))
    whole = set(scalings) <= {TENSORWISE, ROWWISE}
    e4m3 = a.dtype == b.dtype == torch.float8_e4m3fn
    if None in scalings or not (whole or scalings == (MXFP8, MXFP8) or set(scalings) <= {TILEWISE, SQUARE}):
        return f"has no scaling of blocks {a.block} with {b.block}"
    if device.type == "cpu":
        return _signature_obstacle() or (None if whole else "has, on the CPU, one scale for a tensor or a row, none for blocks")
    if obstacle := _cuda_obstacle(device, (8, 9)):
        return obstacle
    if not e4m3 and (not whole or a.dtype == b.dtype):
        return f"needs float8_e4m3fn here, not {a.dtype} with {b.dtype}"
    major = torch.cuda.get_device_capability(device)[0]
    if scalings == (MXFP8, MXFP8):
        return None if major >= 10 else f"needs compute capability 10.0 or more for blocks of 1 x 32, not {major}.x"
    if not whole and (major != 9 or scalings == (SQUARE, SQUARE) or _cuda_version() < (12, 9)):
        return "needs compute capability 9.x, CUDA 12.9 or later and one side of 1 x 128 for blocks of 128"
    return None


def nvfp4_obstacle(device: torch.device) -> str | None:
    """Why scaled_mm cannot multiply NVFP4 matrices on ``device``, or None if it can."""
    return _cuda_obstacle(device, (10, 0))


def fp8_scaled_mm(a: FP8Tensor, b: FP8Tensor, out_dtype: torch.dtype, fast_accumulation: bool) -> Tensor:
    """a b^T [M, N] by scaled_mm, where ``fp8_obstacle`` finds none.

    Sides are padded to the multiples that GPUs need on the CPU too, which takes any: what runs there has run what GPUs will.
    """
    scalings = [fp8_scaling(x) for x in (a, b)]
    if ROWWISE in scalings:
        scalings = [ROWWISE, ROWWISE]
    row_multiples, multiple = (4, 16), 128 if {TILEWISE, SQUARE} & set(scalings) else 32
    operands, scales = [], []
    for x, scaling, row_multiple in zip((a, b), scalings, row_multiples, strict=True):
        operands.append(_padded(x.codes, row_multiple, multiple).view(x.dtype))
        scales.append(_laid_out(x.scales, scaling, len(operands[-1])))
    if scalings[1] == ROWWISE:
        scales[1] = scales[1].mT
    recipes = [getattr(functional.ScalingType, scaling) for scaling in scalings]
    swizzle = functional.SwizzleType.SWIZZLE_32_4_4 if MXFP8 in scalings else functional.SwizzleType.NO_SWIZZLE
    out = functional.scaled_mm(
        operands[0], operands[1].mT, scales[0], recipes[0], scales[1], recipes[1], swizzle, swizzle,
        output_dtype=out_dtype, use_fast_accum=fast_accumulation,
    )  # fmt: skip
    return out[: a.shape[0], : b.shape[0]].contiguous()


def nvfp4_scaled_mm(a: NVFP4Tensor, b: NVFP4Tensor, tensor_scales: tuple[Tensor, Tensor], out_dtype: torch.dtype) -> Tensor:
    """a b^T [M, N] by scaled_mm, where ``nvfp4_obstacle`` finds none; ``tensor_scales`` (float32 []) are those of ``a`` and ``b``."""
    operands, scales = [], []
    for x, tensor_scale in zip((a, b), tensor_scales, strict=True):
        # 128 rows, because products of fewer fail; 16 bytes, 32 numbers, of a row.
        operands.append(_padded(x.codes, 128, 16).view(torch.float4_e2m1fn_x2))
        scales.append([swizzled(x.row_scales()), tensor_scale.reshape(1)])
    recipe = [functional.ScalingType.BlockWise1x16, functional.ScalingType.TensorWise]
    swizzle = [functional.SwizzleType.SWIZZLE_32_4_4, functional.SwizzleType.NO_SWIZZLE]
    out = functional.scaled_mm(operands[0], operands[1].mT, scales[0], recipe, scales[1], recipe, swizzle, swizzle, output_dtype=out_dtype)
    return out[: a.shape[0], : b.shape[0]].contiguous()


def swizzled(scales: Tensor) -> Tensor:
    """Scales of 8 bits [M, B] as the tensor cores of Blackwell read them: filled up with zeros to tiles of 128 x 4, a tile 512 bytes.

    In a tile, the scale of row r and block c is byte 16 (r % 32) + 4 (r / 32) + c (cuBLAS: layout of 1D block scaling factors).
    """
    tiles = _padded(scales.view(torch.uint8), 128, 4).unflatten(0, (-1, 4, 32)).unflatten(-1, (-1, 4))
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(scales.dtype)


def _laid_out(scales: Tensor, scaling: str, rows: int) -> Tensor:
    """Scales of a matrix that is padded to ``rows``, in the order that ``scaling`` asks for. Those of padding count for nothing."""
    if scaling == MXFP8:
        return swizzled(scales)
    if scaling == ROWWISE:
        return _padded(scales, rows, 1) if scales.numel() > 1 else scales.expand(rows, 1)
    if scaling == TILEWISE:
        return _padded(scales, rows, 1).mT.contiguous().mT
    return _padded(scales, 1, 4).mT if scaling == SQUARE else scales


def _padded(x: Tensor, row_multiple: int, column_multiple: int) -> Tensor:
    """``x`` [M, K] with both sides filled up with zeros to multiples, contiguous."""
    missing = (0, -x.shape[1] % column_multiple, 0, -x.shape[0] % row_multiple)
    return functional.pad(x, missing) if any(missing) else x.contiguous()


def _cuda_obstacle(device: torch.device, capability: tuple[int, int]) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU of compute capability {capability[0]}.{capability[1]} or more, not {device.type}"
    present = torch.cuda.get_device_capability(device)
    if present < capability:
        return f"needs compute capability {capability[0]}.{capability[1]} or more, not {present[0]}.{present[1]}"
    return _signature_obstacle()


def _signature_obstacle() -> str | None:
    """Whether this PyTorch has the function that this file was written against."""
    function = getattr(functional, "scaled_mm", None)
    if function is None or not set(ARGUMENTS) <= set(signature(function).parameters):
        return f"is not in torch {torch.__version__} as it is in 2.13"
    return None


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
