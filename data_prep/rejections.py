"""Why an input did not become a sample: a closed list, so that what was lost can be counted and shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple


class Cause(StrEnum):
    # the source
    BAD_ROW = "bad_row"  # a line of a table that cannot be read, or a row that went with a damaged page
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
    OPTED_OUT = "opted_out"  # a header or robots.txt asks that it be left alone
    # the file
    EMPTY = "empty"
    UNKNOWN_FORMAT = "unknown_format"
    TOO_MANY_PIXELS = "too_many_pixels"  # refused from the header, before anything is decoded
    TRUNCATED = "truncated"  # it ends, or its scans or rows do, before the picture is whole
    CORRUPT = "corrupt"
    UNSUPPORTED = "unsupported"  # a picture, of a kind or a variant that is not read
    DECODER_CRASH = "decoder_crash"  # it killed the process that decoded it, twice
    # the picture
    TOO_SMALL = "too_small"  # never enlarged


# What can pass, so that trying again may help.
TRANSIENT: frozenset[Cause] = frozenset(
    {Cause.DNS, Cause.CONNECTION, Cause.TIMEOUT, Cause.RATE_LIMITED, Cause.SERVER_ERROR}
)


# Where a cause took everything: what to do, with the setting that decides it.
REMEDIES: dict[Cause, str] = {
    Cause.BAD_ROW: "write the tables again, or fetch them again: lines or pages of them are damaged",
    Cause.BAD_NAME: "let the source's `image` name the column that holds the files' names",
    Cause.OUTSIDE_FOLDER: "let `url` be the folder that all files lie in, and `image` their names in it",
    Cause.MISSING: "let `url` be the folder that the files lie in, and `image` the column of their names in it",
    Cause.UNREADABLE: "let this user read the files below the source's `url`",
    Cause.TOO_MANY_BYTES: "raise the source's `max_bytes`",
    Cause.NO_CAPTION: "let the source's `captions` (of a text_folder: `caption_suffix`) name what holds the captions; "
    "empty, it takes images alone",
    Cause.BAD_CAPTION: "raise the source's `max_caption`, or write the captions as UTF-8",
    Cause.BAD_METADATA: "write whole JSON beside the images, or let `captions` and `keep` name none of it",
    Cause.BAD_URL: "let the source's `image` name the column of URLs, http or https",
    Cause.PRIVATE_ADDRESS: "name the network in `fetch.allow_networks`, such as [10.0.0.0/8], if its servers may be "
    "asked; `fetch.allow_private` opens this machine's own",
    Cause.DNS: "look at the hosts' names and at this network, then run again with --retry-failed",
    Cause.CONNECTION: "look at the hosts and at this network, then run again with --retry-failed",
    Cause.CERTIFICATE: "let the hosts show whole certificates, or list their files by http",
    Cause.TIMEOUT: "raise `fetch.seconds`, or lower `fetch.at_once`, and run again with --retry-failed",
    Cause.RATE_LIMITED: "lower `fetch.per_host`, and run again with --retry-failed",
    Cause.SERVER_ERROR: "look at the hosts, then run again with --retry-failed",
    Cause.GONE: "list URLs that are still there",
    Cause.HTTP_ERROR: "list URLs that lead to the files themselves, without a log-in",
    Cause.TOO_MANY_REDIRECTS: "raise `fetch.redirects`, or list the URLs that it ends at",
    Cause.OPTED_OUT: "ask the hosts' owners; `fetch.opt_out` and `fetch.robots` say which of their wishes are honoured",
    Cause.EMPTY: "fetch the files again: they are empty",
    Cause.UNKNOWN_FORMAT: "convert the files: JPEG, PNG, WebP, GIF, BMP, TIFF and AVIF are read",
    Cause.TOO_MANY_PIXELS: "raise `max_pixels`",
    Cause.TRUNCATED: "fetch the files again: they end too early",
    Cause.CORRUPT: "fetch the files again: they are damaged",
    Cause.UNSUPPORTED: "convert the files to JPEG or PNG of 8 bits a colour",
    Cause.DECODER_CRASH: "convert the files with another program",
    Cause.TOO_SMALL: "lower `sizes`: pictures are never enlarged",
}


def remedy(rejected: Mapping[str, int]) -> str:
    """For the cause that took most."""
    return REMEDIES[Cause(Counter(rejected).most_common(1)[0][0])]


class Rejection(NamedTuple):
    """`detail` is a text of ours, which depends on the input alone: two runs write the same bytes.

    What a library says is never in it: that names objects in memory, and changes with the library.
    """

    cause: Cause
    detail: str = ""


class Refused(Exception):
    """Raised by what reads a file, and caught by whoever asked for it."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(cause, detail)
        self.rejection = Rejection(cause, detail)


WORST = 3  # causes that are named


def counted(rejected: Mapping[str, int]) -> str:
    """For a line of text: how many were rejected, and the worst causes: `4 rejected (3 gone, 1 dns)`."""
    counts = Counter(rejected)
    worst = counts.most_common(WORST)
    causes = [f"{count:,} {cause}" for cause, count in worst]
    if rest := counts.total() - sum(count for _, count in worst):
        causes.append(f"{rest:,} other")
    return f"{counts.total():,} rejected" + (f" ({', '.join(causes)})" if causes else "")
