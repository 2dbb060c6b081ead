"""Which steps are skipped, and when enough is enough, without any training."""

import json
import math
import random

import pytest
from scipy.stats import median_abs_deviation

from megatron_ext.config.skip_options import RollbackOptions, SkipOptions
from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.train.step_guard import StepGuard, robust_limit

SPIKES = SkipOptions(loss_deviations=6.0, grad_norm_deviations=8.0, window=8, min_steps=4)


def noisy(seed: int, count: int) -> list[tuple[float, float]]:
    generator = random.Random(seed)
    return [(3.0 + generator.gauss(0, 0.1), 1.0 + generator.gauss(0, 0.05)) for _ in range(count)]


def run(guard: StepGuard, steps: list[tuple[float, float]], first: int = 1, stage: int = 0) -> list[bool]:
    """Which steps are taken."""
    taken = []
    for step, numbers in enumerate(steps, first):
        guard.begin_step(step, stage)
        taken.append(guard.judge(*numbers))
    return taken


def test_the_limit_is_that_of_scipy() -> None:
    values = [loss for loss, _ in noisy(0, 101)]
    median = sorted(values)[50]
    assert robust_limit(values, 5.0) == pytest.approx(median + 5 * median_abs_deviation(values, scale="normal"), rel=1e-5)
    assert robust_limit([*values, 1e9], 5.0) == pytest.approx(robust_limit(values, 5.0), rel=0.02), "one outlier moves it little"
    assert robust_limit([2.0] * 50 + [9.0], 5.0) == math.inf


def test_spikes_are_skipped_and_stay_out_of_the_window() -> None:
    guard = StepGuard(SPIKES)
    assert all(run(guard, noisy(1, 8)))
    before = guard.state()["window"]
    assert run(guard, [(9.0, 1.0), (3.0, 9.0), (9.0, 9.0), (-5.0, 0.0)], first=9) == [False, False, False, True]
    assert guard.skipped == 3 and guard.by_reason == {"loss_spike": 2, "grad_norm_spike": 2}
    assert guard.state()["window"] == [*before[1:], [-5.0, 0.0]]


def test_nothing_is_a_spike_before_the_window_has_its_steps() -> None:
    assert run(StepGuard(SPIKES), [*noisy(2, 3), (99.0, 99.0)]) == [True] * 4
    assert run(StepGuard(SPIKES), [*noisy(2, 4), (99.0, 99.0)]) == [True] * 4 + [False]
    assert run(StepGuard(SkipOptions()), [*noisy(2, 40), (99.0, 99.0)]) == [True] * 41, "off unless asked for"


def test_a_new_stage_of_the_data_begins_a_new_window() -> None:
    guard = StepGuard(SPIKES)
    run(guard, noisy(3, 8))
    assert run(guard, [(9.0, 1.0)], first=9, stage=1000) == [True]


@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (3.0, math.inf), (math.inf, math.nan)])
def test_what_is_not_finite_is_never_taken(numbers: tuple[float, float]) -> None:
    guard = StepGuard(SkipOptions())
    assert run(guard, [(3.0, 1.0), numbers]) == [True, False]
    assert guard.bad is not None and guard.bad.reasons == ["non_finite"]
    guard.check(has_checkpoint=False)
    stopping = StepGuard(SkipOptions(non_finite="stop"))
    run(stopping, [numbers])
    with pytest.raises(TrainingError, match=r"non_finite is stop, and the update of step 1 \(non_finite: loss .*gradient norm"):
        stopping.check(has_checkpoint=True)


def test_a_row_of_skipped_steps_stops_the_run_and_names_them() -> None:
    guard = StepGuard(SkipOptions(most_consecutive=3))
    run(guard, [(math.nan, 1.0), (math.nan, 1.0), (3.0, 1.0), (math.nan, 1.0), (math.inf, 2.5)])
    guard.check(has_checkpoint=False)
    run(guard, [(3.0, math.nan)], first=6)
    with pytest.raises(TrainingError, match=r"skipped 3 steps in a row .*step 4 .*; step 5 \(.*loss inf, gradient norm 2.5\); step 6"):
        guard.check(has_checkpoint=False)


def test_a_run_that_was_saved_anywhere_decides_as_one_that_was_not() -> None:
    options = SkipOptions(loss_deviations=3.0, grad_norm_deviations=3.0, window=8, min_steps=4, rollback=RollbackOptions(skips=2, within=5))
    steps = [(math.nan, 1.0) if number % 11 == 5 else each for number, each in enumerate(noisy(4, 80))]
    straight = StepGuard(options)
    expected = run(straight, steps)
    assert 5 < expected.count(False) < 60
    for at in range(1, 80, 7):
        first, second = StepGuard(options), StepGuard(options)
        run(first, steps[:at])
        second.load(json.loads(json.dumps(first.state())))
        assert run(second, steps[at:], first=at + 1) == expected[at:]
        assert second.state() == straight.state() and second.goes_back == straight.goes_back
    forgetful = [run(StepGuard(options), steps[at:], first=at + 1) != expected[at:] for at in range(1, 80, 7)]
    assert any(forgetful), "the control: without its window it decides otherwise"


def test_going_back_needs_enough_skips_within_the_span() -> None:
    options = SkipOptions(rollback=RollbackOptions(skips=2, within=4, most=1))
    bad, good = (math.nan, 1.0), (3.0, 1.0)
    guard = StepGuard(options)
    run(guard, [bad, good, good, good, bad])
    assert not guard.goes_back, "five steps apart"
    run(guard, [good, good, bad], first=6)
    assert guard.goes_back and [cause["step"] for cause in guard.causes()] == [5, 8]
    guard.check(has_checkpoint=True)
    guard.went_back(1)
    run(guard, [bad], first=6)
    assert not guard.goes_back, "it counts anew"
    run(guard, [bad], first=7)
    with pytest.raises(TrainingError, match="went back 1 times .*step 6 .*step 7"):
        guard.check(has_checkpoint=True)


def test_without_a_checkpoint_the_row_still_ends() -> None:
    guard = StepGuard(SkipOptions(most_consecutive=2, rollback=RollbackOptions(skips=1)))
    run(guard, [(math.nan, 1.0)] * 2)
    guard.check(has_checkpoint=True)
    with pytest.raises(TrainingError, match="in a row"):
        guard.check(has_checkpoint=False)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"loss_deviations": 0.0}, "loss_deviations"),
        ({"window": 1, "min_steps": 1}, "window"),
        ({"min_steps": 200}, "min_steps"),
        ({"most_consecutive": 0}, "most_consecutive"),
        ({"most_consecutive": 2, "rollback": RollbackOptions()}, "most_consecutive"),
    ],
)
def test_rules_that_cannot_work_are_refused(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .*accepted"):
        SkipOptions(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"skips": 0}, {"within": 2}, {"most": 0}])
def test_ways_back_that_cannot_work_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}: .*accepted"):
        RollbackOptions(**changes)
