"""What probes saw inside the models of a study at their last look: outliers by site, and the residual stream by depth."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_ext.report import formats
from megatron_ext.report.metrics import Run
from megatron_ext.report.records import ProbeRecord
from megatron_ext.report.study import Spread, Variant
from megatron_ext.report.study_table import Table, cell

SPIKE = 3.0
"""A step spikes whose gradient norm is so many times the median of the steps before it."""
SPIKE_WINDOW = 20
"""The number of these steps."""
KURTOSIS = "kurtosis_released"
"""The measure that the authors of Outlier-Safe Pre-Training released; see ``model.channel_statistics``."""


def has_probes(variants: Sequence[Variant]) -> bool:
    """Every run was looked into."""
    return all(run.probes for variant in variants for run in variant.runs)


def sites(variants: Sequence[Variant]) -> list[str]:
    """Places that were looked at in any run, in the order of a block."""
    return list(dict.fromkeys(site for variant in variants for run in variant.runs for site in run.probes[-1].sites))


def kurtosis(variant: Variant, site: str) -> Spread:
    """Excess kurtosis over the channels of a token, mean over tokens and depths, over seeds; NaN where there is no such site."""
    return Spread.of([_mean(run.probes[-1].sites.get(site, {}).get(KURTOSIS, [])) for run in variant.runs])


def floors(variants: Sequence[Variant]) -> Mapping[str, float]:
    """What the kurtosis of each site would be of independent normal channels; the largest where widths differ."""
    found: dict[str, float] = {}
    for probe in (run.probes[-1] for variant in variants for run in variant.runs):
        for site, floor in probe.floors.items():
            found[site] = max(found.get(site, 0.0), floor[KURTOSIS])
    return found


def variances(variant: Variant) -> np.ndarray:
    """Variance over the channels of the residual stream behind 0, 1, ... blocks, mean over tokens: float64 [seeds, blocks + 1]."""
    return _by_depth(variant, lambda probe: probe.sites["residual"]["variance"])


def gradient_norms(variant: Variant) -> np.ndarray:
    """Norm of the loss's gradient at the residual stream behind 0, 1, ... blocks: float64 [seeds, blocks + 1]."""
    return _by_depth(variant, lambda probe: probe.gradient_norm)


def growth(values: np.ndarray) -> Spread:
    """Of what ``variances`` and ``gradient_norms`` return: the largest of all depths over the smallest, over seeds."""
    return Spread.of((values.max(1) / values.min(1)).tolist())


def spikes(run: Run) -> int:
    """Steps whose gradient norm is not finite, or more than ``SPIKE`` times the median of the ``SPIKE_WINDOW`` steps before it."""
    norms = run.column("grad_norm")
    before = [np.nanmedian(norms[step - SPIKE_WINDOW : step]) for step in range(SPIKE_WINDOW, len(norms))]
    return int(np.sum(~(norms[SPIKE_WINDOW:] <= SPIKE * np.array(before))))


def inside_table(variants: Sequence[Variant]) -> Table:
    """Kurtosis by site, growth over depth, and spikes."""
    places = sites(variants)
    normal = floors(variants)
    kurtoses = [f"kurtosis: {formats.site(site)}" + (f" ({normal[site]:.2f})" if site in normal else "") for site in places]
    rows = [
        [
            *(cell(kurtosis(variant, site), formats.count) for site in places),
            cell(growth(variances(variant)), formats.count, " x"),
            cell(growth(gradient_norms(variant)), formats.count, " x"),
            cell(Spread.of([float(spikes(run)) for run in variant.runs]), formats.count),
        ]
        for variant in variants
    ]
    return Table([*kurtoses, "variance over depth", "gradient over depth", "spikes"], rows)


def _by_depth(variant: Variant, values: Callable[[ProbeRecord], Sequence[float]]) -> np.ndarray:
    return np.array([values(run.probes[-1]) for run in variant.runs], dtype=np.float64)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
