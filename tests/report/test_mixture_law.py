"""The mixture law finds laws that are known, and its intervals hold the truth as often as they say."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import approx_fprime, least_squares

from megatron_ext.errors import DataError
from megatron_ext.report.mixture_law import DOMAIN, GENERAL, Form, Law, Points, fit

UNIT = 2e6
TRUE = {GENERAL.names: np.array([2.5, 0.26, 0.28, 1.5, 0.1, 0.4]), DOMAIN.names: np.array([2.0, 0.6, 0.25, 0.2])}
SHARES, TOKENS = (0.1, 0.25, 0.5, 0.75, 0.9), UNIT * 2.0 ** np.arange(-2, 4)
TARGET, BOUND = 5e7, 2.65


def simulated(form: Form, generator: np.random.Generator, noise: float, seeds: int = 1, run_noise: float = 0.0) -> Points:
    """Runs of every share, each with ``seeds`` repetitions; losses deviate one by one, or whole runs together."""
    runs = np.repeat(np.arange(len(SHARES) * seeds), len(TOKENS))
    share, tokens = np.repeat(np.repeat(SHARES, seeds), len(TOKENS)), np.tile(TOKENS, len(SHARES) * seeds)
    loss = form.value(TRUE[form.names], share, tokens / UNIT) + noise * generator.standard_normal(len(runs))
    return Points(share, tokens, loss + run_noise * generator.standard_normal(len(SHARES) * seeds)[runs], runs)


def true_share(tokens: float, bound: float) -> float:
    """By bisection of the true law, without its inverse."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        inside = GENERAL.value(TRUE[GENERAL.names], np.array([middle]), np.array([tokens / UNIT]))[0] <= bound
        low, high = (middle, high) if inside else (low, middle)
    return low


@pytest.mark.parametrize("form", [GENERAL, DOMAIN], ids=["general", "domain"])
def test_losses_without_noise_give_the_law_back(form: Form) -> None:
    law = fit(form, simulated(form, np.random.default_rng(0), 0.0), 20, "residuals", 0)
    np.testing.assert_allclose(
        law.loss(np.array([0.3, 1.0]), 1e9), form.value(TRUE[form.names], np.array([0.3, 1.0]), np.full(2, 500.0)), rtol=1e-6
    )
    exponents = slice(-form.exponents, None)
    np.testing.assert_allclose(law.numbers[exponents], TRUE[form.names][exponents], rtol=1e-4)
    assert law.rmse < 1e-8
    if form is GENERAL:
        assert law.critical_share(TARGET, BOUND) == pytest.approx(true_share(TARGET, BOUND), rel=1e-5)


@pytest.mark.parametrize("form", [GENERAL, DOMAIN], ids=["general", "domain"])
def test_a_fit_is_that_of_scipy(form: Form) -> None:
    for seed in range(3):
        points = simulated(form, np.random.default_rng(seed), 0.003)
        law = fit(form, points, 20, "residuals", 0)
        scaled = points.tokens / law.unit

        def residuals(numbers: np.ndarray, points: Points = points, scaled: np.ndarray = scaled) -> np.ndarray:
            return form.value(numbers, points.share, scaled) - points.loss

        theirs = least_squares(residuals, law.numbers * 1.1, method="lm", xtol=1e-14, ftol=1e-14)
        assert len(points.loss) * law.rmse**2 == pytest.approx(2 * theirs.cost, rel=1e-6)
        np.testing.assert_allclose(law.numbers, theirs.x, rtol=1e-3)


@pytest.mark.parametrize("form", [GENERAL, DOMAIN], ids=["general", "domain"])
def test_the_jacobian_is_that_of_finite_differences(form: Form) -> None:
    share, tokens, numbers = np.array([0.2, 0.9]), np.array([0.5, 3.0]), TRUE[form.names]
    for point in range(2):
        expected = approx_fprime(numbers, lambda at, point=point: float(form.value(at, share, tokens)[point]), 1e-7)
        np.testing.assert_allclose(form.jacobian(numbers, share, tokens)[point], expected, atol=1e-5)


def coverage(resample: str, sets: int, at: tuple[float, float], **noise: float) -> dict[float, float]:
    """Share of simulated data sets whose interval of the critical share, named 0.9 or 0.5, holds the true one."""
    generator, truth, hits = np.random.default_rng(1), true_share(*at), {0.9: 0, 0.5: 0}
    for seed in range(sets):
        law = fit(GENERAL, simulated(GENERAL, generator, **noise), 100, resample, seed)
        for confidence in hits:
            low, high = law.critical_interval(*at, confidence)
            hits[confidence] += low <= truth <= high
    return {confidence: count / sets for confidence, count in hits.items()}


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of two hundred data sets, 0.9 and 0.5 come out with standard deviations of 0.02 and 0.035; the bounds are three of them."""
    found = coverage("residuals", 200, (TARGET, BOUND), noise=0.003)
    assert 0.84 <= found[0.9] <= 0.96 and 0.395 <= found[0.5] <= 0.605


def test_intervals_by_runs_hold_it_where_whole_runs_deviate_and_those_by_residuals_do_not() -> None:
    at, together = (UNIT, 2.87), {"noise": 0.001, "seeds": 3, "run_noise": 0.004}
    assert 0.82 <= coverage("runs", 100, at, **together)[0.9] <= 0.98
    assert coverage("residuals", 50, at, **together)[0.9] < 0.75


def test_intervals_of_numbers_narrow_with_the_noise() -> None:
    widths = []
    for noise in (0.004, 0.001):
        law = fit(DOMAIN, simulated(DOMAIN, np.random.default_rng(2), noise), 200, "residuals", 0)
        low, high = law.interval("p", 0.9)
        assert low < 0.25 < high
        widths.append(high - low)
    assert 2 < widths[0] / widths[1] < 8
    assert law.loss_interval(0.5, TARGET, 0.9)[0] < float(law.loss(0.5, TARGET)) < law.loss_interval(0.5, TARGET, 0.9)[1]


def law_of(numbers: list[float]) -> Law:
    return Law(GENERAL, UNIT, np.array(numbers), np.array([numbers]), 0.0)


def test_the_ends_of_the_critical_share() -> None:
    assert law_of([2.5, 0.5, 0.0, 1.0, 0.0, 0.1]).critical_share(UNIT, 2.6) == pytest.approx(0.2)
    assert law_of([2.5, 0.5, 0.0, 1.0, 0.0, 0.1]).critical_share(UNIT, 2.4) == 0.0, "not even the general data alone"
    assert law_of([2.5, 0.5, 0.0, 1.0, 0.0, 0.1]).critical_share(UNIT, 3.1) == 1.0
    assert law_of([2.5, -0.1, 0.0, 1.0, 0.0, 0.1]).critical_share(UNIT, 2.45) == 1.0, "domain data lower the general loss"
    assert law_of([2.5, -0.1, 0.0, 1.0, 0.0, 0.1]).critical_share(UNIT, 2.35) == 0.0


def test_the_critical_share_grows_with_tokens_where_general_data_go_on_to_teach() -> None:
    law = law_of([2.5, 0.5, 0.3, 1.0, 0.0, 0.5])
    shares = [law.critical_share(tokens, 2.7) for tokens in (UNIT, 4 * UNIT, 16 * UNIT)]
    assert shares == sorted(shares) and shares[0] < shares[2]


def test_too_few_points_are_refused() -> None:
    points = simulated(GENERAL, np.random.default_rng(0), 0.001)

    def some(kept: np.ndarray) -> Points:
        return replace(points, share=points.share[kept], tokens=points.tokens[kept], loss=points.loss[kept], run=points.run[kept])

    every = np.arange(len(points.loss))
    for kept, resample, message in (
        (every[:8], "residuals", "8 are too few for a mixture law: accepted are at least 9 different losses"),
        (points.share < 0.6, "residuals", "3 are too few for a mixture law: accepted are at least 4 different shares"),
        (points.tokens < UNIT / 1.5, "residuals", "2 are too few for a mixture law: accepted are at least 3 different token counts"),
        (every, "runs", "5 are too few for a mixture law: accepted are at least 8 different runs"),
    ):
        with pytest.raises(DataError, match=message):
            fit(GENERAL, some(kept), 20, resample, 0)
