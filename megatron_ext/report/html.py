"""Elements of a page as nested calls: whatever comes from a file is escaped, because only elements are not."""

from html import escape


class Html(str):
    """Text that is HTML already."""


def element(tag: str, *children: str, **attributes: str) -> Html:
    """``<tag attributes>children</tag>``; a trailing underscore of an attribute's name is dropped, as in ``class_``."""
    opening = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items() if value)
    inner = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{tag}{opening}>{inner}</{tag}>")


def number_cell(text: str) -> Html:
    """A right-aligned table cell with a true minus sign."""
    return element("td", text.replace("-", "\u2212"), class_="number")


def table(header: list[tuple[str, bool]], rows: list[Html]) -> Html:
    """A table that scrolls by itself on a narrow screen; ``header`` has (text, holds numbers)."""
    cells = [element("th", text, scope="col", class_="number" if is_number else "") for text, is_number in header]
    inner = element("table", element("thead", element("tr", *cells)), element("tbody", *rows))
    return element("div", inner, class_="scroll")
