"""What a model said about a picture -> captions: a stranger's words, so bounded and free of control characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import pyarrow as pa

from data_prep.scores import Failure, Row
from data_prep.scores.settings import Ask
from infra.shards import CAPTIONS

LONGEST = 20_000  # characters, as of a corpus's own captions
_UNSEEN = ("Cc", "Cs", "Co", "Cn")  # control characters, halves of characters, characters that nobody has defined
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # they turn the text around them
_BROKEN = "\ufffd"  # where an answer was cut in the middle of a character


def caption_fields(failure: str) -> list[pa.Field]:
    return [pa.field("captions", CAPTIONS), pa.field(failure, pa.string())]


def clean(said: str) -> str | Failure:
    """The answer on one line, without what cannot be seen."""
    if len(said) > 2 * LONGEST:
        return Failure.TOO_LONG
    spaced = (" " if letter.isspace() else letter for letter in said)
    text = "".join(letter for letter in spaced if _is_seen(letter))
    text = " ".join(text.split())
    if len(text) > LONGEST:
        return Failure.TOO_LONG
    return text or Failure.EMPTY_ANSWER


def _is_seen(letter: str) -> bool:
    return letter not in _TURNING and letter != _BROKEN and unicodedata.category(letter) not in _UNSEEN


def caption_row(failure: str, answers: Iterable[tuple[Ask, str | Failure]]) -> Row:
    """The captions that there are, null without any, and the first cause why one is missing."""
    kept, causes = [], []
    for ask, found in answers:
        text = found if isinstance(found, Failure) else clean(found)
        if isinstance(text, Failure):
            causes.append(text.value)
        else:
            kept.append({"kind": ask.kind, "text": text})
    return {"captions": kept or None, failure: causes[0] if causes else None}
