import math

import pytest

from megatron_ext.optim.options import ScheduleOptions
from megatron_ext.optim.schedules import learning_rate_factor

TOTAL = 100


def factors(**options: object) -> dict[int, float]:
    return {step: learning_rate_factor(ScheduleOptions(**options), step, TOTAL) for step in range(1, TOTAL + 1)}


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_one(kind: str) -> None:
    seen = factors(kind=kind, warmup_steps=20)
    assert [seen[step] for step in (1, 10, 20)] == [0.05, 0.5, 1.0]
    assert seen[21] <= 1.0


def test_cosine() -> None:
    seen = factors(kind="cosine", warmup_steps=20, min_factor=0.1)
    expected = {step: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 20) / 80)) for step in range(20, 101)}
    assert {step: seen[step] for step in expected} == pytest.approx(expected, rel=1e-12)
    assert (seen[20], seen[60], seen[100]) == pytest.approx((1.0, 0.55, 0.1))


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("one_minus_sqrt", 1 - math.sqrt(0.5))])
def test_wsd_is_stable_and_then_decays(shape: str, halfway: float) -> None:
    seen = factors(kind="wsd", warmup_steps=10, decay_steps=40, decay_shape=shape, min_factor=0.2)
    assert {seen[step] for step in range(10, 61)} == {1.0}
    assert 0.2 < seen[61] < 1.0
    assert seen[80] == pytest.approx(0.2 + 0.8 * halfway, rel=1e-12)
    assert seen[100] == pytest.approx(0.2)
    assert all(seen[step] > seen[step + 1] for step in range(60, 100))


def test_wsd_decays_over_the_last_tenth_by_default() -> None:
    seen = factors(kind="wsd", min_factor=0.0)
    assert (seen[1], seen[90], seen[95], seen[100]) == (1.0, 1.0, 0.5, 0.0)


def test_constant_without_warm_up_is_one_everywhere() -> None:
    assert set(factors(kind="constant").values()) == {1.0}


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_a_run_that_is_all_warm_up_or_has_one_step(kind: str) -> None:
    assert learning_rate_factor(ScheduleOptions(kind=kind, warmup_steps=5), 5, 5) == 1.0
    assert learning_rate_factor(ScheduleOptions(kind=kind, min_factor=0.25), 1, 1) == 0.25
