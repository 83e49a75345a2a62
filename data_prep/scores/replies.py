"""A model's replies -> captions. The text is untrusted, so its length is bounded and control characters are removed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import pyarrow as pa

from data_prep.scores import Failure, Row
from data_prep.scores.settings import Ask
from infra.shards import CAPTIONS

LONGEST = 20_000  # characters, the limit of a corpus's own captions too
_UNSEEN = ("Cc", "Cs", "Co", "Cn")  # control characters, surrogates, private use, unassigned
_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they change the direction of the text around them
_REPLACEMENT = "\ufffd"  # decoders put it where a reply was cut in the middle of a character


def caption_fields(failure: str) -> list[pa.Field]:
    return [pa.field("captions", CAPTIONS), pa.field(failure, pa.string())]


def clean(reply: str) -> str | Failure:
    """The reply on one line, without invisible characters: `"A red\\ncircle.\\x07 "` becomes `"A red circle."`."""
    if len(reply) > 2 * LONGEST:
        return Failure.TOO_LONG
    spaced = (" " if letter.isspace() else letter for letter in reply)
    text = " ".join("".join(filter(_is_visible, spaced)).split())
    if len(text) > LONGEST:
        return Failure.TOO_LONG
    return text or Failure.EMPTY_ANSWER


def _is_visible(letter: str) -> bool:
    return letter not in _BIDI and letter != _REPLACEMENT and unicodedata.category(letter) not in _UNSEEN


def caption_row(failure: str, replies: Iterable[tuple[Ask, str | Failure]]) -> Row:
    """An image's captions, null if there are none, and in the column `failure` the first cause why one is missing."""
    captions, causes = [], []
    for ask, reply in replies:
        text = reply if isinstance(reply, Failure) else clean(reply)
        if isinstance(text, Failure):
            causes.append(text.value)
        else:
            captions.append({"kind": ask.kind, "text": text})
    return {"captions": captions or None, failure: causes[0] if causes else None}
