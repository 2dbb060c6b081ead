"""Rectangles whose strength of colour is a value."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from megatron_ext.report.canvas import series_color

LEVELS = 10
"""Shades of a map."""

_FAINTEST = 0.07


@dataclass(frozen=True)
class Scale:
    """Shades of the values from ``low`` to ``high``: those below are as faint, those above as strong as can be."""

    low: float
    high: float
    is_log: bool

    def shades(self, values: np.ndarray) -> np.ndarray:
        """Whole numbers from 0 to ``LEVELS`` - 1 in float64, NaN where there is no value."""
        low, high, values = (self._position(np.asarray(each, dtype=np.float64)) for each in (self.low, self.high, values))
        shares = np.clip((values - low) / (high - low), 0, 1) if high > low else np.where(np.isnan(values), np.nan, 1.0)
        return np.round(shares * (LEVELS - 1))

    def _position(self, values: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(values, np.finfo(np.float64).tiny)) if self.is_log else values


def paint(axes: Axes, rectangles: np.ndarray, shade: float, **placement: object) -> None:
    """Rectangles [n, 4] of left, right, bottom and top: more of the colour on the page, the higher the shade, on light and on dark."""
    left, right, bottom, top = rectangles.T
    corners = np.stack([(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]).transpose(2, 0, 1).reshape(-1, 2)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(rectangles)
    alpha = _FAINTEST + (1 - _FAINTEST) * shade / (LEVELS - 1)
    axes.add_patch(PathPatch(Path(corners, codes), facecolor=series_color(0), linewidth=0, alpha=alpha, **placement))
