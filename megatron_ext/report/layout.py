"""What all pages have in common: the document around them, and figures with their words."""

from megatron_ext.report.html import Html, element
from megatron_ext.report.phase_axes import Figure
from megatron_ext.report.style import PAGE_CSS


def document(title: str, *body: str) -> str:
    """A whole page as text: no script, nothing loaded from elsewhere."""
    head = element(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(PAGE_CSS)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', *body), lang='en')}\n"


def figure_element(figure: Figure) -> Html:
    """A figure under its title, caption and legend."""
    legend = [element("span", swatch(color), text) for color, text in figure.legend]
    words = [element("h3", figure.title), element("figcaption", figure.caption)]
    return element("figure", *words, *([element("div", *legend, class_="legend")] if legend else []), Html(figure.svg))


def swatch(color: str) -> Html:
    """A dot in the page's colour of that name."""
    return element("span", class_="swatch", style=f"background: var(--{color})")
