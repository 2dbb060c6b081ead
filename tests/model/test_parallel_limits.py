import pytest

from megatron_ext.errors import ConfigError
from megatron_ext.model.config import ModelConfig
from megatron_ext.model.parallel_limits import check_divides
from megatron_ext.parallel.options import ParallelOptions

MODEL = ModelConfig(50, 48, 24, 4, 12, 4, 4, 64)


@pytest.mark.parametrize("options", [{}, {"tp": 2}, {"tp": 4, "pp": 4}, {"tp": 12}, {"pp": 3, "layers_per_stage": [0, 4, 0]}])
def test_what_divides_is_accepted(options: dict) -> None:
    check_divides(MODEL, ParallelOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 8}, r"parallel\.tp is 8; accepted: 1, 2, 4, 12: it must divide model\.num_heads \(12\)"),
        ({"tp": 3}, r"parallel\.tp is 3; .* model\.num_kv_heads \(4\)"),
        ({"pp": 5}, r"parallel\.pp is 5; accepted: 1 to model\.num_layers \(4\)"),
        ({"pp": 2, "layers_per_stage": [1, 2]}, r"parallel\.layers_per_stage is \[1, 2\]; accepted: numbers whose sum is .*\(4\)"),
        ({"pp": 3, "layers_per_stage": [2, 0, 2]}, r"parallel\.layers_per_stage is \[2, 0, 2\]; accepted: 0 only on the first"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_divides(MODEL, ParallelOptions(**options))
