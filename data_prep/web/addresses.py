"""Which URLs may be asked for, and which addresses may be connected to: the guard between a list of strangers' URLs
and the network that this machine stands in.

A URL is checked as text (`http_url`). Where it leads is only known once its name is resolved, so addresses are checked
there (`Resolver`), and once more where the socket is made (`Opened.socket`), which those written in a URL pass too. The
addresses that were checked are the ones connected to. The blocks are those of IANA's special-purpose registries.

What is not public is closed unless the settings open it: this machine, networks by name, and, by a switch of its own,
what is link-local or a cloud's metadata service, which tells secrets to whoever asks from inside.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Annotated, Any, NamedTuple
from urllib.parse import quote, urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from pydantic import AfterValidator
from yarl import URL

from data_prep.rejections import Cause, Rejection
from infra.config import Refused
from infra.problems import shown

LONGEST_URL = 8000  # characters; servers refuse longer request lines
ASKABLE = "!$&'()*+,;=:@/?%[]|"  # sent as it stands, since signed URLs break when they are quoted anew

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NAME = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Most URLs: asked for just as they are written, which need not be found out part by part.
_PLAIN = re.compile(
    r"https?://(?P<host>(?:[a-z0-9_-]{1,40}\.){1,5}[a-z]{2,20})(?::[1-9][0-9]{0,3})?"
    r"/[A-Za-z0-9_.~!$&'()*+,;=:@/%\[\]|-]{0,3000}(?:\?[A-Za-z0-9_.~!$&'()*+,;=:@/?%\[\]|-]{1,3000})?"
)

IpNetwork = IPv4Network | IPv6Network


def _blocks(*texts: str) -> list[IpNetwork]:
    return [ipaddress.ip_network(text) for text in texts]


_CLOSED_V4 = _blocks(
    "0.0.0.0/8",  # this network
    "10.0.0.0/8",
    "100.64.0.0/10",  # behind a carrier's NAT
    "127.0.0.0/8",
    "168.63.129.16/32",  # Azure's door to its hosts, on a public address
    "169.254.0.0/16",  # link-local, and every cloud's metadata
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",  # 6to4 relays
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
)
_OPEN_V6 = IPv6Network("2000::/3")  # all that is handed out to the world
_CLOSED_V6 = _blocks(
    "2001::/23",  # protocols' own: Teredo, ORCHID, benchmarks
    "2001:db8::/32",
    "2002::/16",  # 6to4: an IPv4 address inside, whoever's that is
    "3fff::/20",
)
_NAT64 = IPv6Network("64:ff9b::/96")
_LOOPBACK = _blocks("127.0.0.0/8", "::1")
# Clouds have metadata services on these, beside what is link-local.
_METADATA = _blocks(
    *("169.254.0.0/16", "fe80::/10"),
    "100.100.100.200",  # Alibaba
    "168.63.129.16",  # Azure
    "192.0.0.192",  # Oracle, on its older machines
    "fd00:42::42",  # Scaleway
    "fd00:c1::/32",  # Oracle
    "fd00:ec2::/32",  # Amazon
    "fd20:ce::/32",  # Google
)
# These lead to an IPv4 address inside of theirs, whichever that is.
_TUNNELS = _blocks("::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")


Lookup = Callable[[str], list[str]]  # a host's name -> its addresses, or an OSError


class HttpUrl(NamedTuple):
    """A URL that may be asked for: ASCII, no password, no fragment; `host` in lower case, IDN in its ASCII form."""

    text: str
    host: str


def http_url(text: str) -> HttpUrl | Rejection:
    """The URL as it will be asked for, or why it will not. No detail repeats the URL: there may be a password in it."""
    if plain := _PLAIN.fullmatch(text):
        return HttpUrl(text, plain["host"])
    return _parsed(text.strip(" \t\r\n\f\v"))


def _parsed(text: str) -> HttpUrl | Rejection:
    if len(text) > LONGEST_URL:
        return _bad(f"{len(text)} characters")
    if _CONTROL.search(text):
        return _bad("a control character")
    try:
        scheme, place, path, query, _ = urlsplit(text)
        if scheme not in ("http", "https"):
            return _bad("not http or https")
        if "@" in place:
            return _bad("a user name or password")
        host, port = _host_and_port(place)
        asked = quote(path or "/", ASKABLE, errors="surrogateescape")
        if query:
            asked += "?" + quote(query, ASKABLE, errors="surrogateescape")
    except ValueError:  # UnicodeError is one
        return _bad("not a URL")
    if not host:
        return _bad("no host, or one that no name can be")
    literal = f"[{host}]" if ":" in host else host
    return HttpUrl(f"{scheme}://{literal}{'' if port is None else f':{port}'}{asked}", host)


def _bad(detail: str) -> Rejection:
    return Rejection(Cause.BAD_URL, detail)


def _host_and_port(place: str) -> tuple[str, int | None]:
    """The host as it will be looked up ("" for none that may be), and the port if one is written."""
    parts = urlsplit(f"//{place}")
    host, port = parts.hostname or "", parts.port
    if port == 0:
        raise ValueError("port 0")
    if place.startswith("["):
        return str(IPv6Address(host)) if "%" not in host else "", port  # a zone means something here only
    if not host.isascii():
        host = URL.build(scheme="http", host=host).raw_host or ""
    host = host.removesuffix(".")
    if not _NAME.fullmatch(host):
        return "", port
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        # 2130706433, 0x7f.1 and 0177.0.0.1 are ways to write an address too: written plainly, all meet the guard.
        try:
            return str(IPv4Address(socket.inet_aton(host))), port
        except OSError:
            return "", port
    return host, port


def is_public(address: str) -> bool:
    """Whether an address, as a resolver or a socket writes it, belongs to the world, not to some network's inside."""
    found = _meant(address)
    if found is None or (isinstance(found, IPv6Address) and found.scope_id is not None):
        return False
    if isinstance(found, IPv4Address):
        return not _within(found, _CLOSED_V4)
    return found in _OPEN_V6 and not _within(found, _CLOSED_V6)


def _meant(address: str) -> IPv4Address | IPv6Address | None:
    """The address that is connected to: IPv4 may be written as IPv6. None for what is no address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(found, IPv6Address) and found.scope_id is None:
        return found.ipv4_mapped or (IPv4Address(int(found) & 0xFFFFFFFF) if found in _NAT64 else found)
    return found


def _within(address: IPv4Address | IPv6Address, blocks: Iterable[IpNetwork]) -> bool:
    return any(address in block for block in blocks)


def _openable(text: str) -> str:
    """For settings: a network that can be opened by its name."""
    try:
        found = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Refused(f"{shown(text)} is no network", remedy="write one such as 10.0.0.0/8, or an address") from None
    if "/" in text and str(found.network_address) != text.partition("/")[0]:
        raise Refused(f"{shown(text)} is an address in a network", remedy=f"write {found}, or the address alone")
    if _inside(found, _METADATA):
        raise Refused(
            f"{shown(text)} is link-local, or a cloud's metadata service", remedy="only `fetch.allow_metadata` opens it"
        )
    if _inside(found, _TUNNELS) and not _inside(found, _LOOPBACK):
        raise Refused(f"{shown(text)} leads to IPv4 addresses", remedy="name the IPv4 network")
    return str(found)


def _inside(network: IpNetwork, blocks: Iterable[IpNetwork]) -> bool:
    """The whole of it: blocks part the addresses, so that the first and the last tell."""
    return any(network.network_address in block and network.broadcast_address in block for block in blocks)


OpenableNetwork = Annotated[str, AfterValidator(_openable)]


class PrivateAddress(Exception):
    pass


@dataclass(frozen=True)
class Opened:
    """What may be connected to: the world, and what the settings open beside it."""

    loopback: bool = False
    networks: tuple[IpNetwork, ...] = ()
    metadata: bool = False  # what is link-local as well

    def admits(self, address: str) -> bool:
        if is_public(address):
            return True
        found = _meant(address)
        if found is None:
            return False
        if _within(found, _METADATA):
            return self.metadata
        if _within(found, _LOOPBACK) and self.loopback:
            return True
        hidden = _within(found, _TUNNELS) and not _within(found, _LOOPBACK)
        return not hidden and _within(found, self.networks)

    def socket(self, info: tuple[Any, ...]) -> socket.socket:
        """For a connection to an address that is admitted; every connection passes here."""
        address = str(info[4][0])
        if not self.admits(address):
            raise PrivateAddress(address)
        return socket.socket(*info[:3])


def opening(addresses: Iterable[str]) -> dict[str, Any]:
    """The settings that open these addresses and no others; none do for what only `allow_metadata` opens."""
    closed = [found for found in map(_meant, addresses) if found is not None and not is_public(str(found))]
    inside = [found for found in closed if not _within(found, _LOOPBACK)]
    networks = {str(found): None for found in inside if not _within(found, [*_METADATA, *_TUNNELS])}
    settings: dict[str, Any] = {"allow_private": True} if len(inside) < len(closed) else {}
    return settings | ({"allow_networks": list(networks)} if networks else {})


def look_up(host: str) -> list[str]:
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(info[4][0]) for info in infos]


class Resolver(AbstractResolver):
    """The system's resolver, each question in a thread of its own: one that hangs delays nobody, nor the end."""

    def __init__(self, lookup: Lookup, opened: Opened) -> None:
        self._lookup = lookup
        self._opened = opened

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()
        threading.Thread(target=_answer, args=(loop, answer, self._lookup, host), name="dns", daemon=True).start()
        found = await answer
        allowed = [address for address in found if self._opened.admits(address)]
        if found and not allowed:
            raise PrivateAddress(found[0])
        if not found:
            raise OSError(f"{host} has no address")
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in allowed
        ]

    async def close(self) -> None:
        pass


def _answer(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[list[str]], lookup: Lookup, host: str) -> None:
    def settle(found: list[str] | OSError) -> None:
        if answer.done():
            return
        if isinstance(found, OSError):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    try:
        found: list[str] | OSError = lookup(host)
    except OSError as error:
        found = error
    except ValueError as error:  # a name that no resolver can be asked about
        found = OSError(str(error))
    with suppress(RuntimeError):  # nobody waits any more
        loop.call_soon_threadsafe(settle, found)
