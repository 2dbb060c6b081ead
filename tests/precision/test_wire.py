"""Codes on the wire: their numbers are those of the formats, rows stand for themselves, and ranks send as few bytes as they say."""

import ml_dtypes
import numpy as np
import pytest
import torch

from megatron_ext.parallel.grid import Grid, GridShape
from megatron_ext.parallel.tensor import TensorParallel
from megatron_ext.parallel.world import World
from megatron_ext.precision.state import PrecisionState
from megatron_ext.precision.wire import Wire, WireFormat, rounded_backward, rounded_forward
from tests.distributed import RunRanks

FORMATS: tuple[WireFormat, ...] = ("mxfp8", "mxfp4")


def wire_of(name: WireFormat) -> Wire:
    return Wire(name, PrecisionState(seed=0))


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp2()).to(dtype)


@pytest.mark.parametrize(
    ("name", "largest", "element"), [("mxfp8", 448.0, ml_dtypes.float8_e4m3fn), ("mxfp4", 6.0, ml_dtypes.float4_e2m1fn)]
)
def test_rounded_is_the_nearest_of_the_format(name: WireFormat, largest: float, element: type) -> None:
    x = values(7, 96)
    blocks = x.view(7, 3, 32).numpy()
    scale = np.exp2(np.ceil(np.log2(np.abs(blocks).max(-1, keepdims=True).astype(np.float64) / largest)))
    expected = (blocks / scale).astype(np.float32).astype(element).astype(np.float64) * scale
    assert np.array_equal(wire_of(name).rounded(x).view(7, 3, 32).double().numpy(), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_any_shape_keeps_shape_and_type_and_is_small(name: WireFormat, dtype: torch.dtype) -> None:
    wire = wire_of(name)
    for shape in ((0, 33), (5, 1), (3, 4, 40), (2, 0, 64), (1, 129)):
        x = values(*shape, dtype=dtype)
        coded = wire.encode(x)
        assert coded.dtype == torch.uint8 and coded.shape == (*shape[:-1], wire.row_bytes(shape[-1]))
        back = wire.decode(coded, shape[-1], dtype)
        assert back.shape == x.shape and back.dtype == dtype
        assert torch.equal(wire.rounded(back), back), "codes of codes are the codes"


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_others_and_nan_stays(name: WireFormat) -> None:
    wire, x = wire_of(name), values(9, 70)
    x[4, 3], x[5, 3] = float("nan"), float("inf")
    rounded = wire.rounded(x)
    assert torch.equal(torch.cat([wire.rounded(row[None]) for row in x]).view(torch.int32), rounded.view(torch.int32))
    assert rounded[4, :32].isnan().all()
    assert not rounded[4].isfinite().all() and not rounded[5].isfinite().all()
    assert rounded[[0, 1, 2, 3, 6, 7, 8]].isfinite().all()


def test_one_direction_is_rounded_and_the_late_switch_ends_it() -> None:
    state = PrecisionState(seed=0, switch_at_tokens=10)
    wire, x, upstream = Wire("mxfp4", state), values(4, 64).requires_grad_(), values(4, 65)[:, :64]
    for function, forward, backward in ((rounded_forward, True, False), (rounded_backward, False, True)):
        y = function(x, wire)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        assert torch.equal(y, wire.rounded(x) if forward else x)
        assert torch.equal(gradient, wire.rounded(upstream) if backward else upstream)
    state.begin_step(2, tokens=10)
    assert rounded_forward(x, wire) is x and rounded_backward(x, wire) is x


def sent_by_region(world: World, name: WireFormat | None) -> dict[str, int]:
    """Bytes that one rank sends for 8 tokens of 64 bfloat16 channels through a region and back."""
    grid = Grid(world, GridShape(1, 1, world.size))
    tp = TensorParallel(grid.tp, shard_tokens=True, wire=name and wire_of(name))
    x = values(8 // world.size, 64, dtype=torch.bfloat16).requires_grad_()
    tp.leave(tp.enter(x, 8)).sum().backward()
    return {collective: sent for (_, collective), sent in grid.traffic.sent.items()}


def test_gathers_send_codes_and_sums_do_not(run_ranks: RunRanks) -> None:
    plain, fp8, fp4 = (run_ranks(2, sent_by_region, name)[0] for name in (None, *FORMATS))
    assert plain == {"all_gather": 2 * 4 * 64 * 2, "reduce_scatter": 2 * 4 * 64 * 2}
    assert fp8 == plain | {"all_gather": 2 * 4 * (64 + 2)}
    assert fp4 == plain | {"all_gather": 2 * 4 * (32 + 2)}
