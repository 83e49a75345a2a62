"""Why an input did not become a sample: a closed list, so that what was lost can be counted and shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
    BAD_METADATA = "bad_metadata"  # a JSON beside the image that is huge, too deep, or not JSON
    # the web
    BAD_URL = "bad_url"  # not http or https, no host, a password in it, control characters
    PRIVATE_ADDRESS = "private_address"  # it leads to loopback or into a private network
    DNS = "dns"  # its host's name leads nowhere
    CONNECTION = "connection"  # refused, reset, or cut off before the end
    CERTIFICATE = "certificate"  # the host cannot show that it is who it says
    TIMEOUT = "timeout"
    RATE_LIMITED = "rate_limited"  # 429
    SERVER_ERROR = "server_error"  # 5xx
    GONE = "gone"  # 404 or 410
    HTTP_ERROR = "http_error"  # any other answer that is not the file, or no HTTP at all
    TOO_MANY_REDIRECTS = "too_many_redirects"
    OPTED_OUT = "opted_out"  # the X-Robots-Tag asks that it be left alone
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


# What can pass, so that trying again may help.
TRANSIENT: frozenset[Cause] = frozenset(
    {Cause.DNS, Cause.CONNECTION, Cause.TIMEOUT, Cause.RATE_LIMITED, Cause.SERVER_ERROR}
)


class Rejection(NamedTuple):
    cause: Cause
    detail: str = ""


WORST = 3  # causes that are named


def counted(rejected: Mapping[str, int]) -> str:
    """For a line of text: how many were rejected, and the worst causes: `4 rejected (3 gone, 1 dns)`."""
    counts = Counter(rejected)
    worst = counts.most_common(WORST)
    causes = [f"{count:,} {cause}" for cause, count in worst]
    if rest := counts.total() - sum(count for _, count in worst):
        causes.append(f"{rest:,} other")
    return f"{counts.total():,} rejected" + (f" ({', '.join(causes)})" if causes else "")
