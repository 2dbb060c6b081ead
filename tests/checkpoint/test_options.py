from typing import Any

import pytest

from megatron_ext.checkpoint.options import CheckpointOptions
from megatron_ext.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "key"),
    [({"keep_every": 0}, "keep_every"), ({"keep_last": 0}, "keep_last"), ({"every": 0}, "every"), ({"resume": ""}, "resume")],
)
def test_values_that_mean_nothing_are_refused_by_name(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.*accepted"):
        CheckpointOptions(**values)


def test_what_is_accepted() -> None:
    options = CheckpointOptions(every=1, keep_last=1, keep_every=10, asynchronous=True, on_failure="continue")
    assert options.keep_every == 10 and CheckpointOptions().asynchronous is None and CheckpointOptions().on_failure == "stop"
