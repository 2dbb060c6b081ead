import pytest
import torch

from megatron_ext.optim.main_gradients import MainGradients, main_dtype


def accumulate(dtype: torch.dtype, times: int, tied: bool = False) -> tuple[MainGradients, torch.nn.Parameter]:
    """Add ``times`` gradients of 1/256 to a parameter (twice that a time when it is used twice)."""
    parameter = torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype))
    gradients = MainGradients({"weight": parameter})
    for _ in range(times):
        loss = (parameter / 256).sum()
        (loss + (parameter / 256).sum() if tied else loss).backward()
    return gradients, parameter


def test_bf16_gradients_are_summed_in_float32_and_released() -> None:
    gradients, parameter = accumulate(torch.bfloat16, times=1000)
    assert parameter.grad is None
    assert gradients["weight"].dtype == torch.float32
    assert torch.equal(gradients["weight"], torch.full((3, 2), 1000 / 256))


def test_summed_in_bf16_they_would_be_lost() -> None:
    """The control: autograd's own accumulation stops growing at 1, where 1/256 is half of the spacing."""
    parameter = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.bfloat16))
    for _ in range(1000):
        (parameter / 256).sum().backward()
    assert float(parameter.grad.max()) < 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_parameter_used_twice_counts_twice(dtype: torch.dtype) -> None:
    gradients, _ = accumulate(dtype, times=3, tied=True)
    assert torch.equal(gradients["weight"].double(), torch.full((3, 2), 6 / 256, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "main"), [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_without_a_backward_and_after_clear_they_are_zero(dtype: torch.dtype, main: torch.dtype) -> None:
    assert main_dtype(dtype) == main
    gradients, _ = accumulate(dtype, times=0)
    assert gradients["weight"].dtype == main and not gradients["weight"].any()
    gradients, parameter = accumulate(dtype, times=2)
    assert gradients["weight"].any()
    gradients.clear()
    assert parameter.grad is None and not gradients["weight"].any()
