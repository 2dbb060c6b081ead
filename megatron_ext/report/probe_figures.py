"""The figures of what probes saw inside the model: maps of layers by tokens, and the kurtosis of each site."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from megatron_ext.report import canvas, formats
from megatron_ext.report.canvas import Label, series_color, stand_in
from megatron_ext.report.phase_axes import HALF, NARROW, WIDE, Figure, finish_token_axis
from megatron_ext.report.records import ProbeRecord
from megatron_ext.report.shades import LEVELS, Scale, paint
from megatron_ext.report.summary import Phase, chain_of

_MOST_COLUMNS = 60
_HEIGHT = 210

Values = Callable[[ProbeRecord], Sequence[float]]
"""What a map shows of a probe, by depth."""


@dataclass(frozen=True)
class Map:
    """A map of layers by tokens, and its words."""

    name: str
    title: str
    caption: str
    values: Values
    scale: Scale
    first: int
    """Number of the lowest row: 0 of values behind 0, 1, ... blocks, 1 of values in blocks."""


def has_probes(phases: Sequence[Phase]) -> bool:
    """Some step of the chain was looked into."""
    return any(phase.run.probes for phase in chain_of(phases))


def kurtosis_by_site(phases: Sequence[Phase]) -> Figure:
    """Mean over layers of the kurtosis of each site over the tokens of all phases, with what normal noise would have."""
    title = "Excess kurtosis by site, mean over layers"
    caption = (
        "Logarithmic; of each token over its channels, fourth powers not centred and negative values cut off. "
        "Dotted: the same for independent normal channels, by their number."
    )
    drawings = []
    for css_class, width, height in (("wide", WIDE, 380), ("narrow", NARROW, 360)):
        figure, (axes,) = canvas.new_figure(width, height)
        _draw_curves(axes, phases)
        drawings.append(canvas.to_svg(figure, f"kurtosis-{css_class}", f"{title}. {caption}", css_class))
    return Figure(title, caption, "".join(drawings))


def _draw_curves(axes: Axes, phases: Sequence[Phase]) -> None:
    axes.set_yscale("log")
    last, floors = {}, {}
    for number, site in enumerate(_sites(phases)):
        for phase in chain_of(phases):
            probes = [probe for probe in phase.run.probes if site in probe.sites]
            tokens = np.array([phase.offset + probe.tokens for probe in probes], dtype=np.float64)
            means = np.array([_mean(_measure(site, "kurtosis_released")(probe)) for probe in probes])
            means[~(means > 0)] = np.nan
            marker = "o" if len(probes) < 40 else None
            axes.plot(*canvas.thin(tokens, means), color=series_color(number), linewidth=2, marker=marker, markersize=3, clip_on=False)
            if len(probes):
                last[site] = Label(means[-1], f"{formats.site(site)} {formats.count(means[-1])}", series_color(number))
                floors[probes[-1].widths[site]] = probes[-1].floors.get(site, {}).get("kurtosis_released", math.nan)
    finish_token_axis(axes, phases)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.count(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_ylim(bottom=min([axes.get_ylim()[0], *(floor / 2 for floor in floors.values() if floor > 0)]))
    for floor in floors.values():
        axes.axhline(floor, color=stand_in("muted"), linewidth=1.5, linestyle=":")
    canvas.label_ends(axes, list(last.values()))
    canvas.label_levels(axes, [Label(floor, f"{width} channels: {floor:.2f}", stand_in("muted")) for width, floor in floors.items()])


def maps(phases: Sequence[Phase]) -> list[Figure]:
    """Every map that has something to show."""
    probes = [probe for phase in chain_of(phases) for probe in phase.run.probes]
    wanted = [*_kurtosis_maps(phases, probes), *_channel_maps(probes), *_depth_maps(probes)]
    return [_draw_map(phases, each) for each in wanted if np.isfinite(_all_values(probes, each.values)).any()]


def _kurtosis_maps(phases: Sequence[Phase], probes: Sequence[ProbeRecord]) -> list[Map]:
    """A map for each site, from its noise floor to the largest value of any site."""
    values = {site: _measure(site, "kurtosis_released") for site in _sites(phases)}
    high = _extreme(np.concatenate([_all_values(probes, each) for each in values.values()]), np.max)
    found = []
    for site, each in values.items():
        floor = next((probe.floors[site]["kurtosis_released"] for probe in reversed(probes) if site in probe.floors), math.nan)
        low = floor if floor > 0 else _lowest(_all_values(probes, each))
        caption = f"Logarithmic, from the {floor:.2g} of normal noise to the largest of all sites." if floor > 0 else "Logarithmic."
        scale = Scale(low, max(low, high), True)
        found.append(Map(f"kurtosis-{site}", f"Kurtosis: {formats.site(site)}", caption, each, scale, int(site != "residual")))
    return found


def _channel_maps(probes: Sequence[ProbeRecord]) -> list[Map]:
    """What one channel has of all, where it matters most."""
    found = []
    for site in ("residual", "down_proj_input"):
        first = int(site != "residual")
        share, ratio = _measure(site, "top_channel_share"), _measure(site, "max_to_mean")
        words = "Part of all squares that is in the largest channel."
        scale = Scale(0.0, _extreme(_all_values(probes, share), np.max), False)
        found.append(Map(f"share-{site}", f"Top channel: {formats.site(site)}", words, share, scale, first))
        values = _all_values(probes, ratio)
        words = "Largest magnitude of a token over its mean magnitude, mean over tokens; logarithmic."
        found.append(Map(f"ratio-{site}", f"Largest to mean: {formats.site(site)}", words, ratio, _log_scale(values), first))
    return found


def _depth_maps(probes: Sequence[ProbeRecord]) -> list[Map]:
    """How the residual stream, its gradient and attention change with depth."""
    variance, uniform = _measure("residual", "variance"), _mean([probe.sink_mass_uniform for probe in probes])

    def gradient(probe: ProbeRecord) -> Sequence[float]:
        return probe.gradient_norm

    def of_parameters(probe: ProbeRecord) -> Sequence[float]:
        return probe.parameter_gradient_norm

    def sink(probe: ProbeRecord) -> Sequence[float]:
        return probe.sink_mass

    def logit(probe: ProbeRecord) -> Sequence[float]:
        return probe.max_logit

    logits = _all_values(probes, logit)
    sinks = f"Mean probability that queries give to the first token of their document; uniform attention gives {uniform:.2g}."
    return [
        Map(
            "variance",
            "Variance: residual",
            "Over the channels of a token; logarithmic.",
            variance,
            _log_scale(_all_values(probes, variance)),
            0,
        ),
        Map(
            "gradient",
            "Gradient norm: residual",
            "Of the loss, behind each block; logarithmic.",
            gradient,
            _log_scale(_all_values(probes, gradient)),
            0,
        ),
        Map(
            "parameter-gradient",
            "Gradient norm: parameters",
            "Of all parameters of a block, before clipping; logarithmic.",
            of_parameters,
            _log_scale(_all_values(probes, of_parameters)),
            1,
        ),
        Map("sink", "Attention sink", sinks, sink, Scale(0.0, _extreme(_all_values(probes, sink), np.max), False), 1),
        Map(
            "logit",
            "Largest attention logit",
            "Of all heads and queries.",
            logit,
            Scale(_extreme(logits, np.min), _extreme(logits, np.max), False),
            1,
        ),
    ]


def _draw_map(phases: Sequence[Phase], each: Map) -> Figure:
    figure, (axes,) = canvas.new_figure(HALF, _HEIGHT)
    named = len(chain_of(phases)) > 1
    figure.subplots_adjust(top=1 - (46 if named else 30) / _HEIGHT)
    axes.grid(False)
    rows = max(len(each.values(probe)) for phase in chain_of(phases) for probe in phase.run.probes)
    for phase in chain_of(phases):
        probes = phase.run.probes
        if probes:
            chosen = [probes[i] for i in np.unique(np.linspace(0, len(probes) - 1, min(len(probes), _MOST_COLUMNS)).round().astype(int))]
            edges = phase.offset + np.array([0, *(probe.tokens for probe in chosen)], dtype=np.float64)
            _fill(axes, edges, each.first, np.array([_padded(each.values(probe), rows) for probe in chosen]).T, each.scale)
    axes.set_ylim(each.first - 0.5, each.first + rows - 0.5)
    stride = 1
    while stride * axes.bbox.height / rows < 14:
        stride *= 2
    axes.set_yticks(np.arange(each.first, each.first + rows, stride))
    finish_token_axis(axes, phases)
    _draw_scale(axes, each.scale, 22 if named else 6)
    return Figure(each.title, each.caption, canvas.to_svg(figure, f"probe-{each.name.replace('_', '-')}", f"{each.title}. {each.caption}"))


def _fill(axes: Axes, edges: np.ndarray, first: int, values: np.ndarray, scale: Scale) -> None:
    """Cells of [rows, columns] values: neighbours of one shade in a row are one rectangle, all of a shade one path."""
    shades = scale.shades(values)
    rectangles: dict[float, list[tuple[float, float, float, float]]] = {}
    for row, line in enumerate(shades):
        borders = [0, *(np.flatnonzero(line[1:] != line[:-1]) + 1).tolist(), len(line)]
        for begin, end in pairwise(borders):
            if np.isfinite(line[begin]):
                rectangles.setdefault(line[begin], []).append((edges[begin], edges[end], first + row - 0.5, first + row + 0.5))
    for shade, found in sorted(rectangles.items()):
        paint(axes, np.array(found), shade)


def _draw_scale(axes: Axes, scale: Scale, above: int) -> None:
    """The shades at the right, ``above`` pixels over the axes and the names of phases, between the values that they stand for."""
    low, high = (formats.count(value) for value in (scale.low, scale.high))
    width, height = axes.bbox.width, axes.bbox.height
    end = width - canvas.text_width(high) - 6
    begin, bottom, top = end - 10 * LEVELS, 1 + above / height, 1 + (above + 10) / height
    for shade in range(LEVELS):
        left, right = ((begin + 10 * place) / width for place in (shade, shade + 1))
        paint(axes, np.array([[left, right, bottom, top]]), shade, transform=axes.transAxes, clip_on=False)
    middle = {"transform": axes.transAxes, "va": "center"}
    canvas.write(axes, (begin - 6) / width, (bottom + top) / 2, low, stand_in("muted"), ha="right", **middle)
    canvas.write(axes, (end + 6) / width, (bottom + top) / 2, high, stand_in("muted"), ha="left", **middle)
    rank = {"transform": axes.transAxes, "ha": "right", "va": "center"}
    canvas.write(axes, -4 / width, (bottom + top) / 2, "layer", stand_in("muted"), **rank)


def _sites(phases: Sequence[Phase]) -> list[str]:
    return list(dict.fromkeys(site for phase in chain_of(phases) for probe in phase.run.probes for site in probe.sites))


def _measure(site: str, name: str) -> Values:
    return lambda probe: probe.sites.get(site, {}).get(name, [])


def _all_values(probes: Sequence[ProbeRecord], values: Values) -> np.ndarray:
    return np.array([value for probe in probes for value in values(probe)], dtype=np.float64)


def _log_scale(values: np.ndarray) -> Scale:
    return Scale(_lowest(values), _extreme(values, np.max), True)


def _lowest(values: np.ndarray) -> float:
    return _extreme(values[values > 0], np.min)


def _extreme(values: np.ndarray, which: Callable[[np.ndarray], float]) -> float:
    finite = values[np.isfinite(values)]
    return float(which(finite)) if len(finite) else 0.0


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _padded(values: Sequence[float], rows: int) -> list[float]:
    return [*values, *[math.nan] * (rows - len(values))]
