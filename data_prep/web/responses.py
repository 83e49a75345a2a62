"""What follows from a server's response: a body, a redirect, an opt-out, or a failure with its cause.

A response is not trusted: its texts are not stored as they are, and what it declares (a wait, an encoding, the target
of a redirect) is used only where it is valid.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import urljoin

import aiohttp
from aiohttp.connector import Connection
from multidict import MultiMapping

from data_prep.rejections import Cause, Rejection
from data_prep.web.addresses import HttpUrl, http_url

REDIRECTS = frozenset({301, 302, 303, 307, 308})
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})  # "none" is "noindex, nofollow"

RESERVATION = "tdm-reservation"  # of the rights to text and data mining: a header, or a tag in X-Robots-Tag
GZIP = b"\x1f\x8b"

# What is wrong with a certificate, by OpenSSL's codes, and why a host was not resolved, by the system's.
_CERTIFICATE = {9: "not valid yet", 10: "expired", 18: "self-signed", 19: "self-signed", 20: "of an unknown issuer"}
_CERTIFICATE |= {62: "another host's", 64: "another host's"}
_RESOLVER = {number: name for name, number in vars(socket).items() if name.startswith("EAI_")}

# Tags of X-Robots-Tag that have a value behind a colon. Before any other colon is the name of an agent.
_VALUED = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview", RESERVATION, "tdm-policy"}
)


class Failure(NamedTuple):
    rejection: Rejection
    wait: float = 0.0  # seconds before another try, which the server asks for


class Answer(aiohttp.ClientResponse):
    """A response that keeps the address of its server, which aiohttp's loses with the connection."""

    peer = ""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        if connection.transport is not None:
            self.peer = str((connection.transport.get_extra_info("peername") or ("",))[0])
        return await super().start(connection)


def refusal(answer: aiohttp.ClientResponse, asked: HttpUrl, wish: str) -> HttpUrl | Failure | None:
    """The redirect or failure that a response's head settles; None if its body is to be read. `wish`: one to honour."""
    status, headers = answer.status, answer.headers
    if status not in REDIRECTS and not is_whole(status):
        return Failure(Rejection(_cause_of(status), str(status)), retry_after(headers.get("Retry-After", "")))
    if wish:
        return Failure(Rejection(Cause.OPTED_OUT, wish))
    return _redirect(status, headers, asked) if status in REDIRECTS else None


def wish(headers: MultiMapping[str], agent: str) -> str:
    """The opt-out in a response's headers that this agent is meant by; empty without one."""
    wishes = [RESERVATION for value in headers.getall(RESERVATION, []) if reserves(value)]
    wishes += filter(None, (opts_out(tag, agent) for tag in headers.getall("X-Robots-Tag", [])))
    return wishes[0] if wishes else ""


def is_whole(status: int) -> bool:
    return 200 <= status < 300 and status != 206  # partial content, which is never requested


def _cause_of(status: int) -> Cause:
    if status == 429:
        return Cause.RATE_LIMITED
    if status == 408:
        return Cause.TIMEOUT
    if status in (404, 410):
        return Cause.GONE
    return Cause.SERVER_ERROR if 500 <= status < 600 else Cause.HTTP_ERROR


def _redirect(status: int, headers: Mapping[str, str], asked: HttpUrl) -> HttpUrl | Failure:
    if not (location := headers.get("Location", "")):
        return Failure(Rejection(Cause.HTTP_ERROR, f"{status} that leads nowhere"))
    try:
        target = http_url(urljoin(asked.text, location.strip()))
    except ValueError:
        target = Rejection(Cause.BAD_URL, "not a URL")
    if isinstance(target, Rejection):
        return Failure(target._replace(detail=f"a redirect to it: {target.detail}"))
    return target


def retry_after(text: str) -> float:
    """The seconds of a Retry-After header, which is a number or a date; 0 if it is neither."""
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        when = parsedate_to_datetime(text)
        return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def opts_out(tag: str, agent: str) -> str | None:
    """The opt-out in one X-Robots-Tag header: "noai" of `noai`, "noindex" of `noindex, nofollow` or `pixnerd: noindex`.

    Behind an agent's name and a colon, all that follows in the header is for that agent alone.
    """
    ours = True
    for directive in tag.lower().split(","):
        name, colon, rest = directive.partition(":")
        if colon and name.strip() not in _VALUED:
            ours = name.strip() in (agent.lower(), "*")
            directive = rest
        wish, _, value = (word.strip() for word in directive.partition(":"))
        if ours and (wish in OPT_OUTS or (wish == RESERVATION and reserves(value))):
            return wish
    return None


def reserves(value: str) -> bool:
    """Whether a reservation's value is true: `1` by its protocol; `?1` (a structured header's) and `true` count too."""
    values = (element.partition(";")[0].strip().strip('"').lower() for element in value.split(","))
    return any(value in ("1", "?1", "true") for value in values)


def too_long(limit: int) -> Failure:
    return Failure(Rejection(Cause.TOO_MANY_BYTES, f"more than {limit} bytes"))


def unpacked(data: bytes, coding: str, limit: int) -> bytes | Failure:
    """A body without the gzip encoding that some servers apply though they were asked not to.

    A body that is only declared to be gzip is returned as it is. Without the length and checksum at gzip's end, or with
    wrong ones, it was damaged in transfer.
    """
    if coding.lower() not in ("gzip", "x-gzip") or not data.startswith(GZIP):
        return data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        body = unpacker.decompress(data, limit + 1)
    except zlib.error:
        return Failure(Rejection(Cause.CONNECTION, "the packed answer is damaged"))
    if len(body) > limit:
        return too_long(limit)
    return body if unpacker.eof else Failure(Rejection(Cause.CONNECTION, "the packed answer is cut short"))


def trouble(error: Exception) -> Rejection:
    """Why a request failed, without the libraries' own messages: these may hold addresses and untrusted text."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Rejection(Cause.DNS, _code(error.os_error) or "the name leads nowhere")
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        code = getattr(error.certificate_error, "verify_code", 0)
        return Rejection(Cause.CERTIFICATE, _CERTIFICATE.get(code, "not trusted"))
    if isinstance(error, TimeoutError):
        return Rejection(Cause.TIMEOUT, "no connection in time")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Rejection(Cause.CONNECTION, _code(error.os_error) or "no connection")
    if isinstance(error, aiohttp.ClientResponseError):
        return Rejection(Cause.HTTP_ERROR, "not HTTP")
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return Rejection(Cause.BAD_URL, "cannot be asked for")
    return Rejection(Cause.CONNECTION, _code(error) or "closed before all had come")


def _code(error: BaseException) -> str:
    """The name of a system error, such as ECONNRESET; empty for other errors."""
    if isinstance(error, ssl.SSLError):
        return "TLS failed"
    known: Mapping[int, str] = _RESOLVER if isinstance(error, socket.gaierror) else errno.errorcode
    return known.get(getattr(error, "errno", None) or 0, "")
