"""Downloads URLs: gives the bytes of each, or a Rejection with its cause, in the order in which they are finished.

An event loop in its own thread downloads, and a generator feeds it URLs and yields results: so deadlines hold while the
caller does something else. The downloads under way, and the results not yet taken, are bounded.

Servers are not trusted. One deadline covers all of an item's network time, since a timeout of each read never ends a
stream that sends a byte now and then. The bytes of a body are counted as they arrive. Every address is checked where it
is connected to, after resolution and on each redirect, so that a host cannot resolve to something else after a check.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush
from importlib.metadata import version
from ipaddress import ip_network
from itertools import islice
from queue import SimpleQueue
from typing import Annotated, NamedTuple

import aiohttp
from pydantic import Field
from yarl import URL

from data_prep.rejections import TRANSIENT, Cause, Rejection
from data_prep.web import robots
from data_prep.web.addresses import (
    HttpUrl,
    Lookup,
    OpenableNetwork,
    Opened,
    PrivateAddress,
    Resolver,
    http_url,
    is_public,
    look_up,
)
from data_prep.web.responses import Answer, Failure, refusal, too_long, trouble, unpacked, wish
from infra.config import Settings, operational, spelt
from infra.text import printable

_log = logging.getLogger(__name__)

LOOK_AHEAD = 64  # unfinished URLs for each slot, so that those of other hosts overtake a host without free slots


class FetchSettings(Settings):
    redirects: int = Field(5, ge=0, le=20)
    opt_out: bool = Field(True, description="honour tdm-reservation, and noai, noimageai and noindex in X-Robots-Tag")
    robots: bool = Field(False, description="honour robots.txt, which each process asks a host for once")
    allow_private: bool = Field(False, description="connect to this machine's own servers too, on loopback")
    allow_networks: list[OpenableNetwork] = Field(
        [], description="private networks that may be connected to, such as 10.0.0.0/8; never what is link-local"
    )
    allow_metadata: bool = Field(
        False, description="connect to link-local addresses too, and to clouds' metadata services, which tell secrets"
    )
    seconds: float = operational(60.0, gt=0, description="what an item may take on the network, all tries together")
    connect_seconds: float = operational(10.0, gt=0, description="what one connection may take to stand")
    retries: int = operational(2, ge=0, le=100, description="further tries, for causes that can pass")
    backoff: float = operational(1.0, ge=0, description="seconds before the first retry; doubled for each after it")
    at_once: int = operational(256, ge=1, description="downloads at once, of one job")
    per_host: int = operational(
        8, ge=1, description="downloads at once from one host, of one job; no more of its tasks than that download"
    )
    ahead_mib: int = operational(256, ge=1, description="finished downloads, of one job, that wait to be stored")
    user_agent: Annotated[str, spelt(r"[A-Za-z0-9_-]+", "a word of letters, digits, `_` and `-`")] = Field(
        "pixnerd", description="also answers to X-Robots-Tag and robots.txt"
    )
    contact: Annotated[str, spelt(r"[!-~]*", "plain ASCII without blanks")] = operational(
        "", description="a page or address where site owners can complain"
    )

    @property
    def opened(self) -> Opened:
        """What may be connected to."""
        return Opened(self.allow_private, tuple(map(ip_network, self.allow_networks)), self.allow_metadata)


class Fetched(NamedTuple):
    number: int  # the place of its URL among those that were given
    data: bytes | Rejection
    url: str  # the last one that was requested; empty if none was
    status: int | None  # of the last answer
    content_type: str  # as the server declares it
    tries: int
    redirects: int = 0  # followed in the last try
    wish: str = ""  # a response's request not to use the item, whether or not it was honoured
    private: str = ""  # the addresses that were connected to and are not public, separated by blanks


def fetch(
    urls: Iterable[str | Rejection], settings: FetchSettings, max_bytes: int, lookup: Lookup | None = None
) -> Generator[Fetched, None, None]:
    """One result for each URL as soon as there is one: a host that hangs delays only its own items.

    A Rejection among the URLs is returned as it is. While bodies of `ahead_mib` are held no download is started, so
    that memory holds at most these and `at_once` bodies under way. The limits in `settings` are those of one call:
    concurrent calls must share them out. `lookup` replaces the system's resolver.
    """
    downloads = _Downloads(settings, max_bytes, lookup or look_up)
    try:
        yield from downloads.results(iter(urls))
    finally:
        downloads.close()


@dataclass(eq=False, slots=True)
class _Item:
    """A URL that is being downloaded, with its redirects and tries; or, with an `origin`, that one's robots.txt."""

    index: int
    url: HttpUrl
    at: HttpUrl  # the URL to which redirects have led
    left: float  # seconds of its network time, in which waiting for a free slot is not counted
    origin: str | None = None
    cleared: bool = False  # whether robots.txt was checked for `at`, and does not forbid it
    asked: str = ""  # the last URL that was requested
    hops: int = 0
    tries: int = 0
    status: int | None = None
    content_type: str = ""
    wish: str = ""
    private: str = ""
    timed_out: bool = False
    task: asyncio.Task[None] | None = None


class _Downloads:
    """The event loop and its queues. Items wait in a heap by number, and take a slot for each hop and each try."""

    def __init__(self, settings: FetchSettings, max_bytes: int, lookup: Lookup) -> None:
        self._settings = settings
        self._max_bytes = max_bytes
        self._lookup = lookup
        self._is_public = lru_cache(10_000)(is_public)
        self._budget = settings.ahead_mib * 2**20
        self._window = LOOK_AHEAD * settings.at_once
        self._accepted = 0  # URLs so far
        self._held = 0  # bytes that were received, and that the caller is not known to have taken
        self._waiting: list[tuple[int, _Item]] = []
        self._waiting_for_host: defaultdict[str, list[tuple[int, _Item]]] = defaultdict(list)
        self._present: Counter[str] = Counter()  # by host: unfinished items
        self._running: Counter[str] = Counter()  # by host: items that hold a slot
        self._slots = settings.at_once  # free slots
        self._later: dict[_Item, asyncio.TimerHandle] = {}  # items that wait to be tried again
        self._for_rules: dict[str, list[_Item]] = {}  # by origin: items that wait for its robots.txt
        self._rules = robots.Known(settings.user_agent, self._window)
        self._results: SimpleQueue[Fetched | BaseException] = SimpleQueue()
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._serve, name="fetch", daemon=True)
        self._thread.start()
        self._loop = self._started.result()

    # In the caller's thread.

    def results(self, urls: Iterator[str | Rejection]) -> Iterator[Fetched]:
        sent = returned = freed = 0
        while True:
            room = self._window - (sent - returned)
            if self._results.empty() or 2 * room > self._window or 8 * freed > self._budget:
                more = list(islice(urls, room))
                sent += len(more)
                self._loop.call_soon_threadsafe(self._guard, self._go_on, more, freed)
                freed = 0
            if sent == returned:
                return
            result = self._results.get()
            if isinstance(result, BaseException):
                raise result
            returned += 1
            freed += len(result.data) if isinstance(result.data, bytes) else 0
            yield result

    def close(self) -> None:
        with suppress(RuntimeError):  # the loop has ended by itself, from an error
            self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    # In the loop's thread.

    def _serve(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - raised where the results are awaited
            if not self._started.done():
                self._started.set_exception(error)
            self._results.put(error)

    async def _main(self) -> None:
        settings = self._settings
        self._closed = asyncio.Event()
        loop = asyncio.get_running_loop()
        # asyncio's messages about broken TLS peers are not logged: each such item has a cause.
        loop.set_exception_handler(lambda _, context: _log.debug(context["message"]))
        connector = aiohttp.TCPConnector(
            limit=0,  # connections are limited by slots
            ssl=_tls(),
            resolver=Resolver(self._lookup, settings.opened),
            ttl_dns_cache=60,
            dns_cache_max_size=10_000,
            socket_factory=settings.opened.socket,
            keepalive_timeout=5,
        )
        agent = f"{settings.user_agent}/{version('pixnerd')}"
        if settings.contact:
            agent += f" (+{settings.contact})"
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"User-Agent": agent, "Accept-Encoding": "identity"},
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, connect=settings.connect_seconds, sock_connect=None),
            trust_env=False,
            response_class=Answer,
        )
        async with self._session:
            self._started.set_result(loop)
            await self._closed.wait()
            for timer in self._later.values():
                timer.cancel()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _go_on(self, urls: list[str | Rejection], freed: int) -> None:
        self._held -= freed
        for url in urls:
            target = http_url(url) if isinstance(url, str) else url
            if isinstance(target, Rejection):
                self._results.put(Fetched(self._accepted, target, "", None, "", 0))
            else:
                self._present[target.host] += 1
                self._wait(_Item(self._accepted, target, target, self._settings.seconds))
            self._accepted += 1
        self._start()

    def _wait(self, item: _Item) -> None:
        heappush(self._waiting, (item.index, item))

    def _start(self) -> None:
        """Start the waiting items that have a slot, in their order."""
        while self._waiting and self._slots and self._held < self._budget:
            index, item = heappop(self._waiting)
            if not item.cleared and not self._clear(item):
                continue
            host = item.at.host
            if self._running[host] >= self._settings.per_host:
                heappush(self._waiting_for_host[host], (index, item))
                continue
            self._running[host] += 1
            self._slots -= 1
            item.task = asyncio.create_task(self._turn(item))
            item.task.add_done_callback(self._check)

    def _clear(self, item: _Item) -> bool:
        """Whether robots.txt lets it be requested now. If not, it is finished or waits for that file."""
        if self._settings.robots:
            origin, _ = robots.parted(item.at)
            rules = self._rules.of(origin)
            if rules is None:
                self._wait_for_rules(item, origin)
                return False
            refused = rules if isinstance(rules, Rejection) else rules.forbids(item.at)
            if refused:
                self._finish(item, refused)
                return False
        item.cleared = True
        return True

    def _wait_for_rules(self, item: _Item, origin: str) -> None:
        """Keep an item until robots.txt is known. It holds no slot, and this time does not count as its own."""
        if origin not in self._for_rules:
            self._for_rules[origin] = []
            url = HttpUrl(f"{origin}{robots.PATH}", item.at.host)
            self._present[url.host] += 1
            self._wait(_Item(item.index, url, url, self._settings.seconds, origin, cleared=True))
        self._for_rules[origin].append(item)

    def _learn(self, item: _Item, origin: str, data: bytes | Rejection) -> None:
        if isinstance(data, bytes):
            self._held -= len(data)
        self._rules.learn(origin, data, item.status, astray=item.hops > 0)
        for waiting in self._for_rules.pop(origin):
            self._wait(waiting)

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._results.put(error)

    def _guard(self, function: Callable[..., None], *arguments: object) -> None:
        """Run a callback of the loop. Its error would only be logged, while the caller waited for results for ever."""
        try:
            function(*arguments)
        except Exception as error:  # noqa: BLE001 - raised where the results are awaited
            self._results.put(error)

    async def _turn(self, item: _Item) -> None:
        """Make one request of an item, and act on the answer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = loop.call_later(item.left, _time_out, item)
        host = item.at.host
        try:
            answer = await self._ask(item)
        except asyncio.CancelledError:
            if not item.timed_out:
                raise
            answer = Failure(Rejection(Cause.TIMEOUT, f"not done within {self._settings.seconds:g} s"))
        finally:
            deadline.cancel()
        item.left -= loop.time() - began
        self._release(host)
        self._follow(item, answer)
        self._start()

    def _release(self, host: str) -> None:
        self._slots += 1
        self._running[host] -= 1
        if not self._running[host]:
            del self._running[host]
        if waiting := self._waiting_for_host.get(host):
            heappush(self._waiting, heappop(waiting))
            if not waiting:
                del self._waiting_for_host[host]

    def _follow(self, item: _Item, answer: bytes | HttpUrl | Failure) -> None:
        if isinstance(answer, HttpUrl):
            most = self._settings.redirects if item.origin is None else robots.REDIRECTS
            if item.hops < most:
                item.hops += 1
                self._move(item, answer)
                self._wait(item)
                return
            answer = Failure(Rejection(Cause.TOO_MANY_REDIRECTS, f"more than {most}"))
        if isinstance(answer, bytes):
            self._finish(item, answer)
            return
        wait = max(answer.wait, self._settings.backoff * 2 ** (item.tries - 1) * random.uniform(0.5, 1.5))
        if answer.rejection.cause in TRANSIENT and item.tries <= self._settings.retries and wait < item.left:
            item.left -= wait
            self._later[item] = asyncio.get_running_loop().call_later(wait, self._guard, self._try_again, item)
        else:
            self._finish(item, answer.rejection)

    def _try_again(self, item: _Item) -> None:
        del self._later[item]
        item.hops = 0
        self._move(item, item.url)
        self._wait(item)
        self._start()

    def _move(self, item: _Item, url: HttpUrl) -> None:
        self._leave(item.at.host)
        item.at, item.cleared = url, item.origin is not None
        self._present[url.host] += 1

    def _leave(self, host: str) -> None:
        self._present[host] -= 1
        if not self._present[host]:
            del self._present[host]

    def _finish(self, item: _Item, data: bytes | Rejection) -> None:
        self._leave(item.at.host)
        if item.origin is not None:
            self._learn(item, item.origin, data)
        else:
            about = (item.asked, item.status, item.content_type, item.tries, item.hops, item.wish, item.private)
            self._results.put(Fetched(item.index, data, *about))

    async def _ask(self, item: _Item) -> bytes | HttpUrl | Failure:
        """Make one request: returns the body, the target of a redirect, or why there is neither."""
        if not item.hops:
            item.tries += 1
            item.wish = item.private = ""
        item.asked, item.status, item.content_type = item.at.text, None, ""
        # A host's last item closes the connection: those to thousands of hosts would use up the file descriptors.
        headers = {"Connection": "close"} if self._present[item.at.host] == 1 else None
        try:
            url = URL(item.at.text, encoded=True)
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                item.status = response.status
                item.content_type = printable(response.headers.get("Content-Type", "")[:100])
                assert isinstance(response, Answer)
                if response.peer not in item.private.split() and not self._is_public(response.peer):
                    item.private = f"{item.private} {response.peer}".lstrip()
                opt_out = wish(response.headers, self._settings.user_agent) if item.origin is None else ""
                item.wish = item.wish or opt_out
                refused = refusal(response, item.at, opt_out if self._settings.opt_out else "")
                if refused is not None:
                    return refused
                if item.origin is not None:
                    return await self._read(response, robots.LARGEST, whole=False)
                if (response.content_length or 0) > self._max_bytes:
                    return too_long(self._max_bytes)
                return await self._read(response, self._max_bytes)
        except PrivateAddress as error:
            return Failure(Rejection(Cause.PRIVATE_ADDRESS, str(error)))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Failure(trouble(error))

    async def _read(self, response: aiohttp.ClientResponse, limit: int, *, whole: bool = True) -> bytes | Failure:
        """The body. One that is too long is refused or, with `whole=False`, cut off at the limit."""
        chunks: list[bytes] = []
        size = 0
        done = False
        try:
            while size <= limit and (chunk := await response.content.readany()):
                chunks.append(chunk)
                size += len(chunk)
                self._held += len(chunk)
            if size > limit:
                response.close()
                if whole:
                    return too_long(limit)
            data = unpacked(b"".join(chunks)[:limit], response.headers.get("Content-Encoding", ""), limit)
            if isinstance(data, bytes):
                self._held += len(data) - size
                done = True
            return data
        finally:
            if not done:
                self._held -= size


def _time_out(item: _Item) -> None:
    item.timed_out = True
    assert item.task is not None
    item.task.cancel()


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
