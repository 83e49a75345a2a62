"""Which columns of a table are captions, URLs or names of files, by their names and by the values of some rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from data_prep.rejections import Rejection
from data_prep.sources import words
from data_prep.sources.base import IMAGE_SUFFIXES
from data_prep.web.addresses import http_url

Rows = Sequence[Mapping[str, Any]]

MOSTLY = 0.8  # the share of a column's values that must be what the column is taken for
_CAPTION = re.compile(
    r"(^|_|\.)(re)?(captions?|texts?|txt|prompts?|descriptions?|desc|titles?|alt|sentences?|llava|blip2?|cogvlm|words)"
    r"(_|\.|\d|$)",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"(?<=[a-z])(?=[A-Z])|[-\s]")  # altText and alt-text are read as alt_text
_NO_CAPTION = re.compile(
    r"(^|_)(licen[cs]e|credit|author|photographer|hash|md5|sha\d*|id|uid|key|path|file)(_|$)", re.I
)
_URLS = re.compile(r"(^|_)(image|img|picture|photo|media)?_?(url|uri|link|src|href)s?(_|$)", re.IGNORECASE)
_FEWEST_WORDS = 3.0  # on average, of a column whose name does not tell that it has captions


class Captions(NamedTuple):
    chosen: list[str]
    others: list[str]  # further columns of text that may be captions, too


def captions_of(rows: Rows, names: Sequence[str]) -> Captions:
    """The columns of captions: those whose names tell it, or else the one with the longest texts."""
    lengths = {name: length for name in names if (length := _mean_words(rows, name)) is not None}
    named = [name for name in lengths if _tells_captions(name, lengths[name]) and not _NO_CAPTION.search(_plain(name))]
    if named:
        return Captions(named, [name for name in lengths if name not in named and lengths[name] >= _FEWEST_WORDS])
    wordy = sorted((name for name in lengths if lengths[name] >= _FEWEST_WORDS), key=lambda name: -lengths[name])
    wordy = [name for name in wordy if not _NO_CAPTION.search(_plain(name))]
    return Captions(wordy[:1], wordy[1:])


def _tells_captions(name: str, length: float) -> bool:
    """Whether the name tells of captions. A short field of a struct, as in `sentences.tokens`, must tell it itself."""
    plain = _plain(name)
    return bool(_CAPTION.search(plain) and (length >= _FEWEST_WORDS or _CAPTION.search(plain.split(".")[-1])))


def _plain(name: str) -> str:
    return _SEPARATOR.sub("_", name)


def texts_in(rows: Rows, *columns: str) -> list[str]:
    """The texts of these columns, row by row; a cell is a text or a list of texts."""
    cells = (row.get(column) for row in rows for column in columns)
    values = (value for cell in cells for value in (cell if isinstance(cell, list) else [cell]))
    texts = (words.text(value) for value in values if isinstance(value, str | bytes))
    return [text.strip() for text in texts if text and text.strip()]


def _mean_words(rows: Rows, name: str) -> float | None:
    """The mean length of a column's texts; None if it is mostly numbers, dates, URLs, names of files, or empty."""
    texts = texts_in(rows, name)
    if len(texts) < 0.2 * len(rows) or not texts:
        return None
    if _share(texts, _is_url) > 1 - MOSTLY or _share(texts, _is_file) > MOSTLY or _share(texts, _is_number) > MOSTLY:
        return None
    return sum(len(text.split()) for text in texts) / len(texts)


def _share(texts: Sequence[str], condition: Callable[[str], bool]) -> float:
    return sum(map(condition, texts)) / max(1, len(texts))


def is_header(names: Sequence[str]) -> bool:
    """Whether a table's first line can be the names of its columns and not a row of values."""
    return not any(_is_url(name) or _is_file(name) for name in names)


def _is_url(text: str) -> bool:
    return "://" in text and not isinstance(http_url(text), Rejection)


def _is_file(text: str) -> bool:
    return text.lower().endswith(IMAGE_SUFFIXES) and "://" not in text


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[\d.,:;/+\-eE\s]+(T[\d:.]+Z?)?|[0-9a-f-]{16,}|true|false", text, re.IGNORECASE))


def urls_in(rows: Rows, names: Sequence[str]) -> list[str]:
    """The columns of URLs, the one that most likely leads to pictures first."""
    scores = {}
    for name in names:
        texts = texts_in(rows, name)
        if texts and len(texts) >= 0.5 * len(rows) and _share(texts, _is_url) >= MOSTLY:
            suffixed = _share(texts, lambda text: text.lower().partition("?")[0].endswith(IMAGE_SUFFIXES))
            scores[name] = suffixed + bool(_URLS.search(_plain(name)))
    return sorted(scores, key=lambda name: -scores[name])


def files_in(rows: Rows, names: Sequence[str]) -> list[str]:
    """The columns that look like names of pictures."""
    return [name for name in names if _share(texts_in(rows, name), _is_file) >= MOSTLY]
