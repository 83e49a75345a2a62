"""Why an input did not become a sample: a closed list, so that what was lost can be counted and shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Cause(StrEnum):
    """`remedy` says what to do where a cause refuses most inputs, and names the setting that decides it."""

    remedy: str

    def __new__(cls, value: str, remedy: str = "") -> Cause:
        member = str.__new__(cls, value)
        member._value_, member.remedy = value, remedy
        return member

    # ---- the source

    # a line of a table that cannot be read, or a row that went with a damaged page
    BAD_ROW = "bad_row", "write the tables again, or fetch them again: lines or pages of them are damaged"
    # empty, or not text that a table can hold
    BAD_NAME = "bad_name", "let the source's `image` name the column that holds the files' names"
    # absolute, with "..", or a link that leads out
    OUTSIDE_FOLDER = "outside_folder", "let `url` be the folder that all files lie in, and `image` their names in it"
    MISSING = "missing", "let `url` be the folder that the files lie in, and `image` the column of their names in it"
    # no permission, not a regular file, an I/O error
    UNREADABLE = "unreadable", "let this user read the files below the source's `url`"
    TOO_MANY_BYTES = "too_many_bytes", "raise the source's `max_bytes`"
    NO_CAPTION = (
        "no_caption",
        "let the source's `captions` (of a text_folder: `caption_suffix`) name what holds the captions; "
        "empty, it takes images alone",
    )
    # not text, control characters, or far too long
    BAD_CAPTION = "bad_caption", "raise the source's `max_caption`, or write the captions as UTF-8"
    # a JSON beside the image that is huge, too deep, or not JSON
    BAD_METADATA = "bad_metadata", "write whole JSON beside the images, or let `captions` and `keep` name none of it"

    # ---- the web

    # not http or https, no host, a password in it, control characters
    BAD_URL = "bad_url", "let the source's `image` name the column of URLs, http or https"
    # the host resolves to loopback or to a private network
    PRIVATE_ADDRESS = (
        "private_address",
        "name the network in `fetch.allow_networks`, such as [10.0.0.0/8], if its servers may be asked; "
        "`fetch.allow_private` opens this machine's own",
    )
    # the host's name does not resolve
    DNS = "dns", "look at the hosts' names and at this network, then run again with --retry-failed"
    # refused, reset, or cut off before the end
    CONNECTION = "connection", "look at the hosts and at this network, then run again with --retry-failed"
    # the certificate does not hold for the host
    CERTIFICATE = "certificate", "let the hosts show whole certificates, or list their files by http"
    TIMEOUT = "timeout", "raise `fetch.seconds`, or lower `fetch.at_once`, and run again with --retry-failed"
    # 429
    RATE_LIMITED = "rate_limited", "lower `fetch.per_host`, and run again with --retry-failed"
    # 5xx
    SERVER_ERROR = "server_error", "look at the hosts, then run again with --retry-failed"
    # 404 or 410
    GONE = "gone", "list URLs that are still there"
    # any other answer that is not the file, or no HTTP at all
    HTTP_ERROR = "http_error", "list URLs that lead to the files themselves, without a log-in"
    TOO_MANY_REDIRECTS = "too_many_redirects", "raise `fetch.redirects`, or list the URLs that it ends at"
    # a header or robots.txt asks that the image be left alone
    OPTED_OUT = (
        "opted_out",
        "ask the hosts' owners; `fetch.opt_out` and `fetch.robots` say which of their wishes are honoured",
    )

    # ---- the file

    EMPTY = "empty", "fetch the files again: they are empty"
    UNKNOWN_FORMAT = "unknown_format", "convert the files: JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are read"
    # refused from the header, before anything is decoded
    TOO_MANY_PIXELS = "too_many_pixels", "raise `max_pixels`"
    # the file, its scans or its rows end before the picture is whole
    TRUNCATED = "truncated", "fetch the files again: they end too early"
    CORRUPT = "corrupt", "fetch the files again: they are damaged"
    # a picture in a format, or a variant of one, that is not read
    UNSUPPORTED = "unsupported", "convert the files to JPEG or PNG of 8 bits a colour"
    # the file killed the process that decoded it, twice
    DECODER_CRASH = "decoder_crash", "convert the files with another program"

    # ---- the picture

    # a picture is never enlarged
    TOO_SMALL = "too_small", "lower `sizes`: pictures are never enlarged"


# Causes that may pass by themselves, so that trying again may help.
TRANSIENT: frozenset[Cause] = frozenset(
    {Cause.DNS, Cause.CONNECTION, Cause.TIMEOUT, Cause.RATE_LIMITED, Cause.SERVER_ERROR}
)


def remedy(rejected: Mapping[str, int]) -> str:
    """What to do about the most frequent cause."""
    return Cause(Counter(rejected).most_common(1)[0][0]).remedy


class Rejection(NamedTuple):
    """`detail` is our own text and depends on the input alone, so that two runs write the same bytes.

    A library's message is never part of it: such messages name objects in memory, and change with the version.
    """

    cause: Cause
    detail: str = ""


class Refused(Exception):
    """Raised by a reader that refuses its file; the caller takes its `rejection`."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.rejection = Rejection(cause, detail)


WORST = 3  # causes that `counted` names


def counted(rejected: Mapping[str, int]) -> str:
    """How many inputs were rejected, with the most frequent causes: `4 rejected (3 gone, 1 dns)`."""
    counts = Counter(rejected)
    worst = counts.most_common(WORST)
    causes = [f"{count:,} {cause}" for cause, count in worst]
    if rest := counts.total() - sum(count for _, count in worst):
        causes.append(f"{rest:,} other")
    return f"{counts.total():,} rejected" + (f" ({', '.join(causes)})" if causes else "")
