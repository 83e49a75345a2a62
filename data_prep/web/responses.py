"""What a server's answer says before and after its body: a file, another place, a wish to be left alone, a trouble.

Everything in it is a stranger's: its texts are made fit for a table and a terminal, and what it claims of itself, a
length, a wait or a packing, is believed only where it makes sense.
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

RESERVATION = "tdm-reservation"  # of rights to text and data mining: a header of its own, or a tag like the others
GZIP = b"\x1f\x8b"

# What a certificate lacks, by OpenSSL's codes, and why a name was not resolved, by the system's.
_CERTIFICATE = {9: "not valid yet", 10: "expired", 18: "self-signed", 19: "self-signed", 20: "of an unknown issuer"}
_CERTIFICATE |= {62: "another host's", 64: "another host's"}
_RESOLVER = {number: name for name, number in vars(socket).items() if name.startswith("EAI_")}

_VALUED = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview", RESERVATION, "tdm-policy"}
)


class Failure(NamedTuple):
    rejection: Rejection
    wait: float = 0.0  # seconds that the server asks for before another try


class Answer(aiohttp.ClientResponse):
    """One that knows from which address it came, also when its connection has been given back."""

    peer = ""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        if connection.transport is not None:
            self.peer = str((connection.transport.get_extra_info("peername") or ("",))[0])
        return await super().start(connection)


def refusal(answer: aiohttp.ClientResponse, asked: HttpUrl, wish: str) -> HttpUrl | Failure | None:
    """What the head of an answer already settles; none if the body is to be read. `wish` is one that is heeded."""
    status, headers = answer.status, answer.headers
    if status not in REDIRECTS and not is_whole(status):
        return Failure(Rejection(_cause_of(status), str(status)), retry_after(headers.get("Retry-After", "")))
    if wish:
        return Failure(Rejection(Cause.OPTED_OUT, wish))
    return _redirect(status, headers, asked) if status in REDIRECTS else None


def wish(headers: MultiMapping[str], agent: str) -> str:
    """That the answer's item be left alone by this agent; empty where nothing is wished."""
    wishes = [RESERVATION for value in headers.getall(RESERVATION, []) if reserves(value)]
    wishes += filter(None, (opts_out(tag, agent) for tag in headers.getall("X-Robots-Tag", [])))
    return wishes[0] if wishes else ""


def is_whole(status: int) -> bool:
    return 200 <= status < 300 and status != 206  # that is a part, which nobody asked for


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
        found = http_url(urljoin(asked.text, location.strip()))
    except ValueError:
        found = Rejection(Cause.BAD_URL, "not a URL")
    if isinstance(found, Rejection):
        return Failure(found._replace(detail=f"a redirect to it: {found.detail}"))
    return found


def retry_after(text: str) -> float:
    """Seconds, from either form of the header; 0 where it says nothing sensible."""
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        when = parsedate_to_datetime(text)
        return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def opts_out(tag: str, agent: str) -> str | None:
    """The wish in one X-Robots-Tag that we leave its item alone: `noai`, `noindex, nofollow`, `pixnerd: noai`.

    A name and a colon address all that follows it in the header to that agent alone.
    """
    ours = True
    for part in tag.lower().split(","):
        name, colon, rest = part.partition(":")
        if colon and name.strip() not in _VALUED:
            ours = name.strip() in (agent.lower(), "*")
            part = rest
        wish, _, value = (word.strip() for word in part.partition(":"))
        if ours and (wish in OPT_OUTS or (wish == RESERVATION and reserves(value))):
            return wish
    return None


def reserves(value: str) -> bool:
    """Whether a reservation's value says yes: 1, as its protocol has it, or as headers and people write truth."""
    words = (part.partition(";")[0].strip().strip('"').lower() for part in value.split(","))
    return any(word in ("1", "?1", "true") for word in words)


def too_long(limit: int) -> Failure:
    return Failure(Rejection(Cause.TOO_MANY_BYTES, f"more than {limit} bytes"))


def unpacked(data: bytes, coding: str, limit: int) -> bytes | Failure:
    """The body, of a server that packs it though it was asked not to. What only claims to be packed is left alone.

    What is packed ends with its length and a sum: without them, or with others, it was damaged on its way.
    """
    if coding.lower() not in ("gzip", "x-gzip") or not data.startswith(GZIP):
        return data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        found = unpacker.decompress(data, limit + 1)
    except zlib.error:
        return Failure(Rejection(Cause.CONNECTION, "the packed answer is damaged"))
    if len(found) > limit:
        return too_long(limit)
    return found if unpacker.eof else Failure(Rejection(Cause.CONNECTION, "the packed answer is cut short"))


def trouble(error: Exception) -> Rejection:
    """Why a connection gave no answer, in words of ours: a library's own may hold addresses and others' texts."""
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
    """ECONNRESET and the like; empty for what is no error of the system."""
    if isinstance(error, ssl.SSLError):
        return "TLS failed"
    known: Mapping[int, str] = _RESOLVER if isinstance(error, socket.gaierror) else errno.errorcode
    return known.get(getattr(error, "errno", None) or 0, "")
