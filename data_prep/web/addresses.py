"""Which URLs may be requested and which addresses may be connected to: protects this machine's network from untrusted
URLs (server-side request forgery).

A URL is checked as text (`http_url`). Which addresses it leads to is known only when its host is resolved, so they are
checked then (`Resolver`), and again when the socket is made (`Opened.socket`), through which IP addresses in URLs pass
too. The addresses that were checked are connected to. The blocks are those of IANA's special-purpose registries.

Addresses that are not public are closed unless the settings open them: this machine, networks by name and, with a
setting of their own, link-local addresses and clouds' metadata services, which tell secrets to any client inside.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
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
ASKABLE = "!$&'()*+,;=:@/?%[]|"  # these are not quoted, since signed URLs break when they are quoted anew

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NAME = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# Matches most URLs, which are requested exactly as they are written and need no parsing.
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
    "168.63.129.16/32",  # Azure's access to its hosts, on a public address
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
_OPEN_V6 = IPv6Network("2000::/3")  # all that IANA assigns to the public internet
_CLOSED_V6 = _blocks(
    "2001::/23",  # protocols' own: Teredo, ORCHID, benchmarks
    "2001:db8::/32",
    "2002::/16",  # 6to4: it contains any IPv4 address
    "3fff::/20",
)
_NAT64 = IPv6Network("64:ff9b::/96")
_LOOPBACK = _blocks("127.0.0.0/8", "::1")
# Link-local addresses, and others on which clouds have metadata services.
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
# Addresses of these lead to the IPv4 address that they contain, whichever that is.
_TUNNELS = _blocks("::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")


Lookup = Callable[[str], list[str]]  # a host's name -> its addresses; raises an OSError


class HttpUrl(NamedTuple):
    """A URL that may be requested: ASCII, no password, no fragment; `host` in lower case, IDN in its ASCII form."""

    text: str
    host: str


def http_url(text: str) -> HttpUrl | Rejection:
    """The URL as it will be requested, or why it is refused. No detail repeats the URL, which may hold a password.

    `http_url("HTTP://Host.Example./a b#c")` is `http://host.example/a%20b`.
    """
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
        target = quote(path or "/", ASKABLE, errors="surrogateescape")
        if query:
            target += "?" + quote(query, ASKABLE, errors="surrogateescape")
    except ValueError:  # UnicodeError is one
        return _bad("not a URL")
    if not host:
        return _bad("no host, or one that no name can be")
    literal = f"[{host}]" if ":" in host else host
    return HttpUrl(f"{scheme}://{literal}{'' if port is None else f':{port}'}{target}", host)


def _bad(detail: str) -> Rejection:
    return Rejection(Cause.BAD_URL, detail)


def _host_and_port(place: str) -> tuple[str, int | None]:
    """The host as it will be looked up ("" for none, or one that is not allowed), and the port if one is written."""
    netloc = urlsplit(f"//{place}")
    host, port = netloc.hostname or "", netloc.port
    if port == 0:
        raise ValueError("port 0")
    if place.startswith("["):
        return str(IPv6Address(host)) if "%" not in host else "", port  # a zone names an interface of this machine
    if not host.isascii():
        host = URL.build(scheme="http", host=host).raw_host or ""
    host = host.removesuffix(".")
    if not _NAME.fullmatch(host):
        return "", port
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        # 2130706433, 0x7f.1 and 0177.0.0.1 are IPv4 addresses too: in plain form, all are checked.
        try:
            return str(IPv4Address(socket.inet_aton(host))), port
        except OSError:
            return "", port
    return host, port


def is_public(address: str) -> bool:
    """Whether an address, as a resolver or a socket writes it, is on the public internet."""
    target = _effective(address)
    if isinstance(target, IPv4Address):
        return not _within(target, _CLOSED_V4)
    return target is not None and target.scope_id is None and target in _OPEN_V6 and not _within(target, _CLOSED_V6)


def _effective(address: str) -> IPv4Address | IPv6Address | None:
    """The address that is really connected to, as an IPv6 address may stand for an IPv4 one; None for no address."""
    try:
        written = ipaddress.ip_address(address)
    except ValueError:
        return None
    if isinstance(written, IPv6Address) and written.scope_id is None:
        return written.ipv4_mapped or (IPv4Address(int(written) & 0xFFFFFFFF) if written in _NAT64 else written)
    return written


def _within(address: IPv4Address | IPv6Address, blocks: Iterable[IpNetwork]) -> bool:
    return any(address in block for block in blocks)


def _openable(text: str) -> str:
    """A setting's value, if it is a network that can be opened by name."""
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Refused(f"{shown(text)} is no network", remedy="write one such as 10.0.0.0/8, or an address") from None
    if "/" in text and str(network.network_address) != text.partition("/")[0]:
        raise Refused(f"{shown(text)} is an address in a network", remedy=f"write {network}, or the address alone")
    if _inside(network, _METADATA):
        raise Refused(
            f"{shown(text)} is link-local, or a cloud's metadata service", remedy="only `fetch.allow_metadata` opens it"
        )
    if _inside(network, _TUNNELS) and not _inside(network, _LOOPBACK):
        raise Refused(f"{shown(text)} leads to IPv4 addresses", remedy="name the IPv4 network")
    return str(network)


def _inside(network: IpNetwork, blocks: Iterable[IpNetwork]) -> bool:
    """Whether all of the network is in one of the blocks."""
    return any(network.network_address in block and network.broadcast_address in block for block in blocks)


OpenableNetwork = Annotated[str, AfterValidator(_openable)]


class PrivateAddress(Exception):
    pass


@dataclass(frozen=True)
class Opened:
    """What may be connected to: the public internet, and what the settings open in addition."""

    loopback: bool = False
    networks: tuple[IpNetwork, ...] = ()
    metadata: bool = False  # link-local addresses, too

    def admits(self, address: str) -> bool:
        if is_public(address):
            return True
        target = _effective(address)
        if target is None:
            return False
        if _within(target, _METADATA):
            return self.metadata
        if _within(target, _LOOPBACK):
            return self.loopback or _within(target, self.networks)
        return not _within(target, _TUNNELS) and _within(target, self.networks)

    def socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for an address, if it is admitted. Every connection of the downloader is made with it."""
        address = str(info[4][0])
        if not self.admits(address):
            raise PrivateAddress(address)
        return socket.socket(*info[:3])


def opening(addresses: Iterable[str]) -> dict[str, Any]:
    """The settings that open these addresses and no others; they leave out what only `allow_metadata` opens."""
    closed = [target for target in map(_effective, addresses) if target is not None and not is_public(str(target))]
    inside = [target for target in closed if not _within(target, _LOOPBACK)]
    networks = {str(target): None for target in inside if not _within(target, [*_METADATA, *_TUNNELS])}
    settings: dict[str, Any] = {"allow_private": True} if len(inside) < len(closed) else {}
    return settings | ({"allow_networks": list(networks)} if networks else {})


def look_up(host: str) -> list[str]:
    infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [str(info[4][0]) for info in infos]


def looked_up(host: str, lookup: Lookup) -> Future[list[str]]:
    """The lookup in a daemon thread: it takes no timeout, and must not keep the process from ending."""
    future: Future[list[str]] = Future()
    future.set_running_or_notify_cancel()  # who stops waiting does not stop the lookup

    def run() -> None:
        try:
            future.set_result(lookup(host))
        except Exception as error:  # noqa: BLE001 - it is raised by future.result()
            future.set_exception(error)

    threading.Thread(target=run, name="dns", daemon=True).start()
    return future


class Resolver(AbstractResolver):
    """The system's resolver, with a thread for each lookup: one that hangs delays no other."""

    def __init__(self, lookup: Lookup, opened: Opened) -> None:
        self._lookup = lookup
        self._opened = opened

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        try:
            resolved = await asyncio.wrap_future(looked_up(host, self._lookup))
        except ValueError as error:  # the name cannot be encoded for a lookup
            raise OSError(str(error)) from None
        allowed = [address for address in resolved if self._opened.admits(address)]
        if not resolved:
            raise OSError(f"{host} has no address")
        if not allowed:
            raise PrivateAddress(resolved[0])
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
