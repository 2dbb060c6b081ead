"""Loss as a power law of the mixture and of the tokens, and the largest share of new data that keeps the old loss (CMR).

Gu et al. 2024 (arXiv:2407.17467) find that after some tokens the loss is a power law of the domain's share, ``a * share ** s + b``, at some
share a power law of the tokens, and call the largest share whose general loss stays within a tolerance of the loss before training the
critical mixture ratio. What is fitted here has both forms at once, for a share r of domain data and t tokens in units of their geometric
mean:

    general loss:  E + A * r ** p * t ** m + B * t ** -q
    domain loss:   E + A * r ** -p * t ** -q

So forgetting may grow or fade with tokens (m), beside what general data go on to teach (B, q).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_ext.errors import DataError

Resample = Literal["residuals", "runs"]
_LARGEST_EXPONENT = 20.0
_LEAST_SHARE = 1e-12
_MOST_ITERATIONS = 300
_WEBB = np.sqrt([0.5, 1.0, 1.5])


@dataclass(frozen=True)
class Form:
    """A family of laws: a sum of powers."""

    names: tuple[str, ...]
    """Of its numbers: E and the other factors, then the exponents."""
    exponents: int
    positive: np.ndarray
    """Which exponents are more than 0, bool [exponents]."""
    starts: np.ndarray
    """Exponents to begin a fit from, float64 [starts, exponents]."""
    terms: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    """(share [points], tokens in units [points], exponents [..., exponents]) -> what the factors multiply, [..., factors, points]."""
    slopes: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    """(share, tokens, summands [..., factors, points]) -> derivatives of the sum by the exponents, [..., exponents, points]."""

    def bounded(self, numbers: np.ndarray) -> np.ndarray:
        """``numbers`` with exponents moved into their range, [..., numbers]."""
        factors, exponents = numbers[..., : -self.exponents], numbers[..., -self.exponents :]
        low = np.where(self.positive, 1e-3, -_LARGEST_EXPONENT)
        return np.concatenate([factors, np.clip(exponents, low, _LARGEST_EXPONENT)], axis=-1)

    def value(self, numbers: np.ndarray, share: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Losses of laws, [..., points]."""
        return np.einsum("...f,...fp->...p", numbers[..., : -self.exponents], self.terms(share, tokens, numbers[..., -self.exponents :]))

    def jacobian(self, numbers: np.ndarray, share: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Derivatives of the losses by the numbers, [..., points, numbers]."""
        terms = self.terms(share, tokens, numbers[..., -self.exponents :])
        slopes = self.slopes(share, tokens, terms * numbers[..., : -self.exponents, None])
        return np.concatenate([terms, slopes], axis=-2).swapaxes(-1, -2)


def _general_terms(share: np.ndarray, tokens: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    p, m, q = (exponents[..., number, None] for number in range(3))
    return np.stack([np.ones_like(share + 0 * p), share**p * tokens**m, tokens**-q + 0 * share], axis=-2)


def _general_slopes(share: np.ndarray, tokens: np.ndarray, summands: np.ndarray) -> np.ndarray:
    log_share, log_tokens = np.log(np.maximum(share, _LEAST_SHARE)), np.log(tokens)
    forgetting, learning = summands[..., 1, :], summands[..., 2, :]
    return np.stack([forgetting * log_share, forgetting * log_tokens, -learning * log_tokens], axis=-2)


def _domain_terms(share: np.ndarray, tokens: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    p, q = (exponents[..., number, None] for number in range(2))
    return np.stack([np.ones_like(share + 0 * p), share**-p * tokens**-q], axis=-2)


def _domain_slopes(share: np.ndarray, tokens: np.ndarray, summands: np.ndarray) -> np.ndarray:
    return np.stack([-summands[..., 1, :] * np.log(share), -summands[..., 1, :] * np.log(tokens)], axis=-2)


GENERAL = Form(
    names=("E", "A", "B", "p", "m", "q"),
    exponents=3,
    positive=np.array([True, False, True]),
    starts=np.array([(1.0, 0.1, 0.3), (2.0, 0.3, 0.1), (0.5, -0.1, 1.0)]),
    terms=_general_terms,
    slopes=_general_slopes,
)
DOMAIN = Form(
    names=("E", "A", "p", "q"),
    exponents=2,
    positive=np.array([True, True]),
    starts=np.array([(0.3, 0.3), (0.1, 0.1), (1.0, 1.0)]),
    terms=_domain_terms,
    slopes=_domain_slopes,
)


@dataclass(frozen=True)
class Points:
    """Losses of runs, each float64 [points] but ``run``."""

    share: np.ndarray
    """Of domain data among the training tokens, 0 to 1."""
    tokens: np.ndarray
    """Trained on since the start."""
    loss: np.ndarray
    """Nats per token."""
    run: np.ndarray
    """Number of the run, int64 [points]."""


@dataclass(frozen=True)
class Law:
    """A fitted law, and the same fitted to resampled losses."""

    form: Form
    unit: float
    """Tokens that t is counted in."""
    numbers: np.ndarray
    """In the order of ``form.names``, float64 [numbers]."""
    replicates: np.ndarray
    """float64 [replicates, numbers]."""
    rmse: float
    """Root of the mean squared residual, nats per token."""

    def loss(self, share: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """Loss at shares and tokens that broadcast, float64."""
        share, tokens = np.broadcast_arrays(share, np.divide(tokens, self.unit))
        return self.form.value(self.numbers, share.reshape(-1), tokens.reshape(-1)).reshape(share.shape)

    def loss_interval(self, share: float, tokens: float, confidence: float) -> tuple[float, float]:
        """Interval of the loss at one share and number of tokens."""
        return _interval(self.form.value(self.replicates, np.array([share]), np.array([tokens / self.unit])), confidence)

    def interval(self, name: str, confidence: float) -> tuple[float, float]:
        """Percentile interval of one of the numbers."""
        return _interval(self.replicates[:, self.form.names.index(name)], confidence)

    def critical_share(self, tokens: float, bound: float) -> float:
        """Largest share whose general loss after ``tokens`` is at most ``bound``; 0 where no share has it, 1 where all have it."""
        return _critical(self.numbers, tokens / self.unit, bound)

    def critical_interval(self, tokens: float, bound: float, confidence: float) -> tuple[float, float]:
        """Percentile interval of ``critical_share``. It says nothing about how far the law itself is wrong."""
        return _interval(np.array([_critical(numbers, tokens / self.unit, bound) for numbers in self.replicates]), confidence)


def fit(form: Form, points: Points, replicates: int, resample: Resample, seed: int) -> Law:
    """Least squares from several starting points; then refitted to ``replicates`` resampled sets of losses.

    Args:
        form: ``GENERAL`` or ``DOMAIN``.
        points: the losses.
        replicates: number of resampled sets.
        resample: ``residuals``: each loss gets the residual of another one, corrected for leverage (Davison and Hinkley 1997, 6.2.3),
            for losses that deviate independently. ``runs``: the residuals of each run, corrected for its leverage, are multiplied by one
            random factor (wild cluster bootstrap, MacKinnon, Nielsen and Webb 2023), for runs whose losses deviate together.
        seed: of the resampling.

    Raises:
        DataError: too few points, shares, token counts or runs.
    """
    _check_enough(form, points, resample)
    unit = float(np.exp(np.log(points.tokens).mean()))
    share, scaled = points.share, points.tokens / unit
    terms = form.terms(share, scaled, form.starts)
    factors = np.stack([np.linalg.lstsq(each.T, points.loss, rcond=None)[0] for each in terms])
    starts = np.concatenate([factors, form.starts], axis=-1)
    fits = _least_squares(form, share, scaled, np.tile(points.loss, (len(starts), 1)), starts)
    numbers = min(fits, key=lambda found: float(np.square(form.value(found, share, scaled) - points.loss).sum()))
    fitted = form.value(numbers, share, scaled)
    hat = _hat(form.jacobian(numbers, share, scaled))
    draws = _resampled(points.loss - fitted, hat, points.run, replicates, resample, np.random.default_rng(seed))
    refitted = _least_squares(form, share, scaled, fitted + draws, np.tile(numbers, (replicates, 1)))
    return Law(form, unit, numbers, refitted, float(np.sqrt(np.square(points.loss - fitted).mean())))


def _check_enough(form: Form, points: Points, resample: Resample) -> None:
    least = len(form.names) + 3
    counts = {
        f"losses, because the law has {len(form.names)} numbers": (len(points.loss), least),
        "shares, because three fit every power law exactly": (len(np.unique(points.share.round(3))), 4),
        "token counts": (len(np.unique(points.tokens)), 3),
        "runs with resampling by runs": (len(np.unique(points.run)), 8 if resample == "runs" else 1),
    }
    for what, (count, needed) in counts.items():
        if count < needed:
            raise DataError(f"{count} are too few for a mixture law: accepted are at least {needed} different {what}")


def _least_squares(form: Form, share: np.ndarray, tokens: np.ndarray, losses: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Numbers of the laws with the least squared residuals, many fits at once (Levenberg-Marquardt, Marquardt 1963).

    Args:
        form: of the laws.
        share: float64 [points].
        tokens: in units, float64 [points].
        losses: float64 [fits, points].
        numbers: to begin from, float64 [fits, numbers].
    """
    numbers, damping = form.bounded(numbers), np.full(len(losses), 1e-3)
    errors = np.square(losses - form.value(numbers, share, tokens)).sum(-1)
    going = np.arange(len(losses))
    for _ in range(_MOST_ITERATIONS):
        here, residuals = numbers[going], losses[going] - form.value(numbers[going], share, tokens)
        jacobian = form.jacobian(here, share, tokens)
        normal = np.einsum("fpi,fpj->fij", jacobian, jacobian)
        scale = np.einsum("fii->fi", normal)
        normal = normal + np.eye(normal.shape[-1]) * (damping[going, None] * scale + 1e-30)[:, None, :]
        step = np.linalg.solve(normal, np.einsum("fpi,fp->fi", jacobian, residuals)[..., None])[..., 0]
        trial = form.bounded(here + step)
        found = np.square(losses[going] - form.value(trial, share, tokens)).sum(-1)
        better = found < errors[going]
        gain = np.where(better, 1.0 - found / errors[going], 1.0)
        numbers[going[better]], errors[going[better]] = trial[better], found[better]
        damping[going] *= np.where(better, 0.2, 5.0)
        going = going[(gain > 1e-10) & (damping[going] < 1e10)]
        if not len(going):
            break
    return numbers


def _hat(jacobian: np.ndarray) -> np.ndarray:
    """What takes losses to fitted losses near a fit, float64 [points, points]."""
    columns = jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), np.finfo(np.float64).tiny)
    basis, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    basis = basis[:, sizes > 1e-8 * sizes[0]]
    return basis @ basis.T


def _resampled(
    residuals: np.ndarray, hat: np.ndarray, run: np.ndarray, replicates: int, resample: Resample, generator: np.random.Generator
) -> np.ndarray:
    """What is added to the fitted losses, float64 [replicates, points]."""
    if resample == "residuals":
        modified = residuals / np.sqrt(1.0 - np.minimum(hat.diagonal(), 0.99))
        return generator.choice(modified - modified.mean(), size=(replicates, len(residuals)))
    runs, where = np.unique(run, return_inverse=True)
    modified = np.empty_like(residuals)
    for number in range(len(runs)):
        mine = np.flatnonzero(where == number)
        modified[mine] = np.linalg.lstsq(np.eye(len(mine)) - hat[np.ix_(mine, mine)], residuals[mine], rcond=1e-6)[0]
    factors = generator.choice(np.concatenate([-_WEBB, _WEBB]), size=(replicates, len(runs)))
    return modified * factors[:, where]


def _critical(numbers: np.ndarray, tokens: float, bound: float) -> float:
    floor, forgetting, learning, p, m, q = numbers
    room = bound - floor - learning * tokens**-q
    rise = forgetting * tokens**m
    if rise <= 0:
        return float(rise <= room)
    return float(min(1.0, max(0.0, room) / rise) ** (1 / p))


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
