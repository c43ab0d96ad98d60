"""HTML and SVG as nested calls.

All text is escaped, so that nothing in a config or a file can become markup.
"""

from __future__ import annotations

from html import escape
from typing import Any


class Markup(str):
    """Text that is already markup and is not escaped."""

    __slots__ = ()


VOID = {"meta", "input", "img", "br"}


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element.

    Children are escaped unless they are Markup; None children and None or False attributes are omitted.

    An underscore at an attribute's end is dropped (`class_`), others become hyphens (`stroke_width`).
    """
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    if name in VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{together(*children)}</{name}>")


def together(*children: Any) -> Markup:
    """Children one after the other, escaped as `tag` does."""
    return Markup(
        "".join(str(c) if isinstance(c, Markup) else escape(str(c)) for c in children if c is not None)
    )
