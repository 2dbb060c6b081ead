"""Every schedule against its formula at each boundary, and as a whole against implementations that are not ours."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from megatron_ext.optim.options import ScheduleOptions
from megatron_ext.optim.schedules import learning_rate_factor

TOTAL = 100


def factors(**options: object) -> dict[int, float]:
    return {step: learning_rate_factor(ScheduleOptions(**options), step, TOTAL) for step in range(1, TOTAL + 1)}


@pytest.mark.parametrize("kind", ["cosine", "wsd", "infinite", "constant"])
def test_warm_up_is_linear_and_reaches_one(kind: str) -> None:
    seen = factors(kind=kind, warmup_steps=20, **({"cooldown_steps": 10} if kind == "infinite" else {}))
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


def rates_of(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """Factors that a scheduler of a base rate of 1 gives to steps 1 to ``steps``."""
    found = []
    for _ in range(steps):
        scheduler.optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


@pytest.fixture
def unit_rate() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.mark.parametrize(("shape", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("one_minus_sqrt", "1-sqrt")])
def test_wsd_is_that_of_transformers(unit_rate: torch.optim.Optimizer, shape: str, theirs: str) -> None:
    scheduler = get_wsd_schedule(unit_rate, 10, 30, num_training_steps=TOTAL, decay_type=theirs, min_lr_ratio=0.3)
    seen = factors(kind="wsd", warmup_steps=10, warmup_from=0.3, decay_steps=30, decay_shape=shape, min_factor=0.3)
    assert list(seen.values()) == pytest.approx(rates_of(scheduler, TOTAL), rel=1e-12)


def test_cosine_is_that_of_transformers(unit_rate: torch.optim.Optimizer) -> None:
    scheduler = get_cosine_with_min_lr_schedule_with_warmup(unit_rate, 10, TOTAL, min_lr_rate=0.2)
    assert list(factors(warmup_steps=10, min_factor=0.2).values()) == pytest.approx(rates_of(scheduler, TOTAL), rel=1e-12)


def test_decay_shapes_that_are_straight_in_the_logarithm_and_in_the_inverse() -> None:
    """Straight lines by numpy, through the first and the last point only."""
    for shape, way, back in (("exponential", np.log, np.exp), ("inverse", np.reciprocal, np.reciprocal)):
        seen = factors(kind="wsd", decay_steps=40, decay_shape=shape, min_factor=0.05)
        expected = back(np.linspace(way(1.0), way(0.05), 41))
        np.testing.assert_allclose([seen[step] for step in range(60, 101)], expected, rtol=1e-12)
    assert factors(kind="wsd", decay_shape="exponential")[95] != pytest.approx(factors(kind="wsd", decay_shape="inverse")[95], rel=0.01)


def test_moderate_decay_ends_at_its_floor() -> None:
    for shape in ("linear", "cosine", "one_minus_sqrt", "exponential", "inverse"):
        seen = factors(kind="wsd", decay_steps=20, decay_shape=shape, min_factor=0.4)
        assert seen[80] == 1.0 and seen[81] < 1.0 and seen[100] == pytest.approx(0.4, rel=1e-12)
        assert all(a > b for a, b in pairwise(seen[step] for step in range(80, 101)))


@pytest.mark.parametrize("cooldown", ["inverse_sqrt", "cosine", "linear"])
def test_infinite_has_four_phases(cooldown: str) -> None:
    """Warm-up 1-10, cool-down 11-40, constant 41-80, exponential decay 81-100 (Ibrahim et al. 2024)."""
    seen = factors(
        kind="infinite",
        warmup_steps=10,
        cooldown_steps=30,
        cooldown_shape=cooldown,
        cooldown_steepness=4.0,
        constant_factor=0.5,
        decay_steps=20,
        decay_shape="exponential",
        min_factor=0.01,
    )
    x = np.arange(1, 31) / 30
    h = 1 / np.sqrt(1 + 4.0 * x) - 1
    shapes = {"inverse_sqrt": 1 - 0.5 * h / h[-1], "cosine": 0.5 + 0.25 * (1 + np.cos(np.pi * x)), "linear": 1 - 0.5 * x}
    decay = 0.5 * (0.01 / 0.5) ** (np.arange(1, 21) / 20)
    expected = np.concatenate([np.arange(1, 11) / 10, shapes[cooldown], np.full(40, 0.5), decay])
    np.testing.assert_allclose(list(seen.values()), expected, rtol=1e-12)
    assert seen[10] == 1.0 > seen[11] and seen[39] > 0.5 and seen[40] == seen[80] == pytest.approx(0.5, rel=1e-15) and seen[81] < 0.5


def test_infinite_never_jumps() -> None:
    """No step changes the factor by more than its phase is steep, whatever its lengths; without a cool-down it is wsd."""
    for cooldown in (1, 5, 30):
        seen = factors(kind="infinite", warmup_steps=10, cooldown_steps=cooldown, cooldown_shape="linear", decay_steps=20)
        assert max(abs(b - a) for a, b in pairwise(seen.values())) <= max(0.1, 0.5 / cooldown) + 1e-12
    alike = dict(warmup_steps=10, decay_steps=20, decay_shape="cosine", min_factor=0.2)
    assert factors(kind="infinite", constant_factor=1.0, **alike) == factors(kind="wsd", **alike)


def test_infinite_without_decay_is_constant_to_the_end_and_a_branch_shares_the_constant_phase() -> None:
    options = dict(kind="infinite", warmup_steps=5, cooldown_steps=15, constant_factor=0.4, min_factor=0.1)
    trunk = factors(**options, decay_steps=0)
    assert {trunk[step] for step in range(20, 101)} == {trunk[20]} and trunk[20] == pytest.approx(0.4)
    branch = ScheduleOptions(**options, decay_steps=10)
    assert all(learning_rate_factor(branch, step, 60) == trunk[step] for step in range(1, 51))
    assert learning_rate_factor(branch, 60, 60) == pytest.approx(0.1) and learning_rate_factor(branch, 51, 60) < 0.4


def test_a_warm_up_may_begin_where_another_run_ended() -> None:
    seen = factors(kind="cosine", warmup_steps=4, warmup_from=0.2)
    assert [seen[step] for step in range(1, 5)] == pytest.approx([0.4, 0.6, 0.8, 1.0])


def test_a_longer_cosine_run_warms_up_and_decays_again() -> None:
    """Steps up to the end of the first decay are those of the run that ended there."""
    seen = factors(warmup_steps=5, min_factor=0.1, decay_ends=[40], rewarm_steps=10)
    short = ScheduleOptions(warmup_steps=5, min_factor=0.1)
    assert all(seen[step] == learning_rate_factor(short, step, 40) for step in range(1, 41))
    assert (seen[40], seen[41], seen[45], seen[50]) == pytest.approx((0.1, 0.19, 0.55, 1.0))
    again = {step: 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 50) / 50)) for step in range(50, 101)}
    assert {step: seen[step] for step in again} == pytest.approx(again, rel=1e-12) and seen[51] < 1.0


def test_wsd_s_jumps_back_and_decays_again_by_a_tenth_of_each_period() -> None:
    seen = factors(kind="wsd", warmup_steps=2, decay_shape="inverse", min_factor=0.1, decay_ends=[20, 60])
    decays = [(18, 20), (56, 60), (96, 100)]
    for begin, end in decays:
        steps = np.arange(1, end - begin + 1) / (end - begin)
        np.testing.assert_allclose([seen[step] for step in range(begin + 1, end + 1)], 1 / (steps / 0.1 + 1 - steps), rtol=1e-12)
    decaying = {step for begin, end in decays for step in range(begin + 1, end + 1)}
    assert {seen[step] for step in range(2, 101) if step not in decaying} == {1.0}
