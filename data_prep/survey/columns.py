"""Which of a table's columns is what: told by some rows, since nobody names columns alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from data_prep.rejections import Rejection
from data_prep.sources import words
from data_prep.sources.base import IMAGE_SUFFIXES
from data_prep.web.addresses import http_url

Rows = Sequence[Mapping[str, Any]]

MOSTLY = 0.8  # the share of a column's values that must be what the column is taken for
_SAYS = re.compile(
    r"(^|_|\.)(re)?(captions?|texts?|txt|prompts?|descriptions?|desc|titles?|alt|sentences?|llava|blip2?|cogvlm|words)"
    r"(_|\.|\d|$)",
    re.IGNORECASE,
)
_SEPARATE = re.compile(r"(?<=[a-z])(?=[A-Z])|[-\s]")  # altText and alt-text are alt_text
_NO_CAPTION = re.compile(
    r"(^|_)(licen[cs]e|credit|author|photographer|hash|md5|sha\d*|id|uid|key|path|file)(_|$)", re.I
)
_URLS = re.compile(r"(^|_)(image|img|picture|photo|media)?_?(url|uri|link|src|href)s?(_|$)", re.IGNORECASE)
_FEWEST_WORDS = 3.0  # on average, of a column that is called like nothing in particular


class Captions(NamedTuple):
    chosen: list[str]
    others: list[str]  # texts as well, perhaps captions


def captions_of(rows: Rows, names: Sequence[str]) -> Captions:
    """The columns that say what is in the picture: by their names, or else the one that says most."""
    told = {name: said for name in names if (said := _mean_words(rows, name)) is not None}
    called = [name for name in told if _is_called(name, told[name]) and not _NO_CAPTION.search(_plain(name))]
    if called:
        return Captions(called, [name for name in told if name not in called and told[name] >= _FEWEST_WORDS])
    wordy = sorted((name for name in told if told[name] >= _FEWEST_WORDS), key=lambda name: -told[name])
    wordy = [name for name in wordy if not _NO_CAPTION.search(_plain(name))]
    return Captions(wordy[:1], wordy[1:])


def _is_called(name: str, words: float) -> bool:
    """Of what is within a column, it may say less than the column that it is in: sentences.tokens."""
    return bool(_SAYS.search(_plain(name)) and (words >= _FEWEST_WORDS or _SAYS.search(_plain(name).split(".")[-1])))


def _plain(name: str) -> str:
    return _SEPARATE.sub("_", name)


def texts_of(value: Any) -> list[str]:
    """A cell as texts: one, or the texts of a list."""
    values = value if isinstance(value, list) else [value]
    found = [words.text(one) for one in values if isinstance(one, str | bytes)]
    return [text.strip() for text in found if text and text.strip()]


def _mean_words(rows: Rows, name: str) -> float | None:
    """None for a column that is no text: numbers, dates, addresses, names of files, or next to nothing."""
    said = [text for row in rows for text in texts_of(row.get(name))]
    if len(said) < 0.2 * len(rows) or not said:
        return None
    if _share(said, _is_address) > 1 - MOSTLY or _share(said, _is_file) > MOSTLY or _share(said, _is_number) > MOSTLY:
        return None
    return sum(len(text.split()) for text in said) / len(said)


def _share(said: Sequence[str], what: Any) -> float:
    return sum(map(bool, map(what, said))) / max(1, len(said))


def is_header(names: Sequence[str]) -> bool:
    """Whether a table's first line may be the names of its columns, and not a row."""
    return not any(_is_address(name) or _is_file(name) for name in names)


def _is_address(text: str) -> bool:
    return "://" in text and not isinstance(http_url(text), Rejection)


def _is_file(text: str) -> bool:
    return text.lower().endswith(IMAGE_SUFFIXES) and "://" not in text


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[\d.,:;/+\-eE\s]+(T[\d:.]+Z?)?|[0-9a-f-]{16,}|true|false", text, re.IGNORECASE))


def urls_in(rows: Rows, names: Sequence[str]) -> list[str]:
    """The columns of addresses, the likeliest to be pictures' first."""
    found = []
    for name in names:
        said = [text for row in rows for text in texts_of(row.get(name))]
        if said and len(said) >= 0.5 * len(rows) and _share(said, _is_address) >= MOSTLY:
            ends = _share(said, lambda text: text.lower().partition("?")[0].endswith(IMAGE_SUFFIXES))
            found.append((name, ends + bool(_URLS.search(_plain(name)))))
    return [name for name, _ in sorted(found, key=lambda pair: -pair[1])]


def files_in(rows: Rows, names: Sequence[str]) -> list[str]:
    """The columns that look like names of pictures."""
    return [
        name
        for name in names
        if (said := [text for row in rows for text in texts_of(row.get(name))]) and _share(said, _is_file) >= MOSTLY
    ]
