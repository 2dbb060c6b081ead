"""The figures of what probes saw in a study: kurtosis by site, and what becomes of the residual stream with depth."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_ext.report import canvas, formats
from megatron_ext.report.canvas import SERIES, Label, series_color, stand_in
from megatron_ext.report.phase_axes import HALF, NARROW, WIDE, Figure
from megatron_ext.report.study import Variant
from megatron_ext.report.study_inside import floors, gradient_norms, kurtosis, sites, variances

_SPREAD = 0.6
"""Of the place of a site, the part over which its variants stand side by side."""


def kurtosis_figure(variants: Sequence[Variant]) -> Figure:
    """Kurtosis of each variant at each site, with what normal noise would have."""
    title = "Excess kurtosis by site"
    caption = (
        "Logarithmic; mean over tokens and layers at the last probe. Dots: mean over seeds, bars from the lowest to the highest. "
        "Dashes: independent normal channels of that number."
    )
    drawings = []
    for css_class, width, height in (("wide", WIDE, 380), ("narrow", NARROW, 420)):
        figure, (axes,) = canvas.new_figure(width, height)
        figure.subplots_adjust(bottom=(70 if css_class == "wide" else 120) / height)
        _draw_kurtosis(axes, variants)
        if css_class == "narrow":
            axes.tick_params(axis="x", labelrotation=90)
        drawings.append(canvas.to_svg(figure, f"study-kurtosis-{css_class}", f"{title}. {caption}", css_class))
    legend = tuple((f"series-{index % SERIES}", variant.name) for index, variant in enumerate(variants))
    return Figure(title, caption, "".join(drawings), legend)


def _draw_kurtosis(axes: Axes, variants: Sequence[Variant]) -> None:
    places, normal = sites(variants), floors(variants)
    axes.set_yscale("log")
    for place, site in enumerate(places):
        for index, variant in enumerate(variants):
            mean, low, high = kurtosis(variant, site)
            x = place + _SPREAD * ((index + 0.5) / len(variants) - 0.5)
            axes.plot([x, x], [low, high], color=series_color(index), linewidth=2)
            axes.plot([x], [mean], color=series_color(index), marker="o", markersize=6, markeredgecolor=stand_in("surface"))
        if site in normal:
            axes.plot([place - 0.45, place + 0.45], [normal[site]] * 2, color=stand_in("muted"), linewidth=1.5, dashes=(3, 2))
    axes.set_xticks(range(len(places)), [formats.site(site).replace("_layernorm", "\n_layernorm") for site in places])
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def depth_figures(variants: Sequence[Variant]) -> list[Figure]:
    """Variance of the residual stream, and its gradient, against depth."""
    return [
        _depth_figure(variants, "Variance by depth", "Of the residual stream, over the channels of a token", [*map(variances, variants)]),
        _depth_figure(variants, "Gradient norm by depth", "Of the loss, at the residual stream", [*map(gradient_norms, variants)]),
    ]


def _depth_figure(variants: Sequence[Variant], title: str, what: str, values: Sequence[np.ndarray]) -> Figure:
    figure, (axes,) = canvas.new_figure(HALF, 320)
    axes.set_yscale("log")
    labels = []
    for index, (variant, each) in enumerate(zip(variants, values, strict=True)):
        mean, depth, color = np.exp(np.log(each).mean(0)), np.arange(each.shape[1]), series_color(index)
        axes.fill_between(depth, each.min(0), each.max(0), color=color, alpha=0.18, linewidth=0)
        axes.plot(depth, mean, color=color, linewidth=2, dashes=(4, 2) if index >= SERIES else ())
        labels.append(Label(mean[-1], variant.name, color))
    axes.set_xlim(0, max(each.shape[1] for each in values) - 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.tick_params(axis="x", length=4, color=stand_in("muted"))
    axes.set_xlabel("blocks behind", fontsize=11, color=stand_in("muted"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    canvas.label_ends(axes, labels)
    caption = f"{what}, at the last probe; logarithmic. Geometric mean and band over seeds."
    return Figure(title, caption, canvas.to_svg(figure, f"study-{title.split()[0].lower()}", f"{title}. {caption}"))
