"""HTML and SVG elements. Every string is escaped unless `tag` made it, so no caption can become markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

Child: TypeAlias = "str | int | float | Iterable[Child] | None"

_VOID = frozenset(("br", "col", "hr", "img", "link", "meta"))
# What HTML forbids even when escaped (control characters), and what UTF-8 cannot write (lone surrogates).
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Markup. A string of any other class is text and will be escaped."""


def text(value: object) -> Html:
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", str(value))))


def tag(name: str, /, *children: Child, **attributes: str | int | float | None) -> Html:
    """An element. `class_` becomes the attribute `class`, `stroke_width` `stroke-width`; None leaves one out."""
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items() if value is not None
    )
    start = f"<{name}{written}>"
    return Html(start if name in _VOID else f"{start}{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(text(child))
        elif child is not None:
            parts.append(join(*child))
    return Html("".join(parts))


def page(title: str, style: str, body: Html) -> str:
    """A whole document. Its Content-Security-Policy allows no script and no request, whatever it contains."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n"
