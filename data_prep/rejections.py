"""Why an input did not become a sample: a closed list, so that what was lost can be counted and shown."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Cause(StrEnum):
    # the source
    BAD_NAME = "bad_name"  # empty, or not text that a table can hold
    OUTSIDE_FOLDER = "outside_folder"  # absolute, with "..", or a link that leads out
    MISSING = "missing"
    UNREADABLE = "unreadable"  # no permission, not a regular file, an I/O error
    TOO_MANY_BYTES = "too_many_bytes"
    NO_CAPTION = "no_caption"
    BAD_CAPTION = "bad_caption"  # not text, control characters, or far too long
    # the file
    EMPTY = "empty"
    UNKNOWN_FORMAT = "unknown_format"
    TOO_MANY_PIXELS = "too_many_pixels"  # refused from the header, before anything is decoded
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    UNSUPPORTED = "unsupported"  # a kind we read, in a variant that has no defined 8-bit picture
    DECODER_CRASH = "decoder_crash"  # it killed the process that decoded it, twice
    # the picture
    TOO_SMALL = "too_small"  # never enlarged


class Rejection(NamedTuple):
    cause: Cause
    detail: str = ""
