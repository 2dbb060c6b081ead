"""Reads figures back: what stands at which place of an SVG."""

import re

import numpy as np


def paths(svg: str, style: str) -> list[np.ndarray]:
    """The points, float [points, 2], of each path whose style holds ``style``."""
    found = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg)
    numbers = [re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", path) for path, css in found if style in css]
    return [np.array(values, dtype=np.float64).reshape(-1, 2) for values in numbers]


def texts(svg: str) -> list[str]:
    """All texts, in their order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def first_drawing(svg: str) -> str:
    """Of a figure that is drawn for wide and for narrow pages, the wide one."""
    return svg[: svg.index("</svg>")]
