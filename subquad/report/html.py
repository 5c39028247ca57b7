"""HTML by construction: text is escaped unless it was made here, so nothing that a record holds can become markup.

Two embeddings need more than escaping: JSON inside a script element, and text that plotly shows, which understands a
small markup of its own.
"""

import html
import json
from collections.abc import Iterable
from typing import Final, final

_VOID: Final = frozenset({"br", "hr", "img", "input", "meta", "rect", "path", "circle", "line"})


@final
class Html(str):
    """Markup that is already safe: everything made by `element` and `join`."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Return `text` as markup that shows exactly it; a string that is already `Html` stays."""
    return text if isinstance(text, Html) else Html(html.escape(text, quote=True))


def element(tag: str, *children: str, **attributes: str) -> Html:
    """Return one element with escaped children and attributes.

    Args:
        tag: the element's name; children of a void element are an error.
        children: text, escaped, or `Html`, taken as it is.
        attributes: values are escaped. A trailing underscore is dropped (`class_`), other underscores become hyphens.

    Raises:
        ValueError: children were given to a void element.
    """
    pairs = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    if tag in _VOID:
        if children:
            raise ValueError(f"<{tag}> is a void element and takes no children, got {len(children)}")
        return Html(f"<{tag}{pairs}/>")
    return Html(f"<{tag}{pairs}>{join(children)}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    """Return the parts one after the other, each escaped unless it is `Html`."""
    return Html("".join(escape(part) for part in parts))


def script_json(value: object) -> str:
    """Return `value` as JSON that can stand inside a script element: no character in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plot_text(text: str) -> str:
    """Return `text` so that plotly, which reads a few tags and entities in its labels, shows exactly it."""
    return html.escape(text, quote=False).replace("\n", " ")
