import pytest
import torch

from megatron_ext.checkpoint.finite import require_finite
from megatron_ext.errors import CheckpointError, NonFiniteError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_counted_and_placed(dtype: torch.dtype) -> None:
    values = torch.zeros(3, 4, dtype=dtype)
    assert require_finite("a", "master", values) is values
    values[1, 2], values[2, 0] = float("nan"), float("-inf")
    with pytest.raises(NonFiniteError, match=r"2 of 12 values of a \(master\) are not finite, the first at \[1, 2\]"):
        require_finite("a", "master", values)
    assert issubclass(NonFiniteError, CheckpointError)


def test_nothing_and_single_values() -> None:
    require_finite("a", "master", torch.zeros(0, 3))
    with pytest.raises(NonFiniteError, match=r"the first at \[\]"):
        require_finite("a", "master", torch.tensor(float("inf")))
