"""Captions by a server that speaks OpenAI's protocol, many requests at once.

What may be temporary (a timeout, 429, 5xx, no connection) is tried again until the request's deadline. A request that
fails for good gives a null with its cause. But if too many fail, the server must be broken: that is an error, and the
shard is left to the next run instead of being recorded with a thousand failures.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import aiohttp
import pyarrow as pa

from data_prep.images.decode import sniff
from data_prep.scores import Failure, Row, Sample
from data_prep.scores.replies import caption_fields, caption_row
from data_prep.scores.settings import Ask, EndpointSettings, Server
from infra.errors import PixnerdError, SettingsError
from infra.text import printable

MOST_BYTES = 1 << 20  # of a response
LONGEST_PAUSE = 60.0  # seconds between two tries, even if the server asks for more
_FORMATS = ("JPEG", "PNG", "WEBP")  # that servers decode


class _Failed(NamedTuple):
    """Why an attempt gave no reply."""

    cause: Failure
    detail: str
    retry: bool = False  # whether another try may succeed
    pause: float = 0.0  # seconds that the server asks to wait before it


class EndpointScorer:
    def __init__(self, settings: EndpointSettings) -> None:
        self.settings, self.client = settings, Client(settings)

    @property
    def fields(self) -> list[pa.Field]:
        return caption_fields(self.settings.failure)

    def versions(self) -> dict[str, str]:
        return {}  # the server does not tell its own

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        for replies in self.client.replies((sample.image, self.settings.asks) for sample in samples):
            if replies:
                yield caption_row(self.settings.failure, zip(self.settings.asks, replies, strict=True))
            else:
                yield {self.settings.failure: Failure.UNREADABLE_IMAGE.value}


class Client:
    """Asks a server about images."""

    def __init__(self, settings: Server) -> None:
        self.settings, self.headers = settings, _headers(settings)

    def replies(self, asked: Iterable[tuple[bytes, Sequence[Ask]]]) -> list[list[str | Failure]]:
        """Every reply about each image, none if servers do not decode its format."""
        try:
            return asyncio.run(self._replies(asked))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _replies(self, asked: Iterable[tuple[bytes, Sequence[Ask]]]) -> list[list[str | Failure]]:
        health = _Health(self.settings)
        slots = asyncio.Semaphore(self.settings.concurrency)
        by_image: list[list[asyncio.Task[str | Failure]]] = []

        async def reply(image: str, ask: Ask) -> str | Failure:
            try:
                outcome = await self._with_retries(session, image, ask)
            finally:
                slots.release()
            return health.count(outcome)

        async with self._session() as session, asyncio.TaskGroup() as group:
            for content, asks in asked:
                tasks: list[asyncio.Task[str | Failure]] = []
                by_image.append(tasks)
                if (format := sniff(content)) not in _FORMATS:
                    continue
                image = f"data:image/{format.lower()};base64,{base64.b64encode(content).decode()}"
                for ask in asks:
                    await slots.acquire()  # before the next image is read, so that memory holds only those in flight
                    tasks.append(group.create_task(reply(image, ask)))
        health.check()
        return [[task.result() for task in tasks] for tasks in by_image]

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self.headers,
            connector=aiohttp.TCPConnector(limit=self.settings.concurrency),
            timeout=aiohttp.ClientTimeout(total=self.settings.timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def _with_retries(self, session: aiohttp.ClientSession, image: str, ask: Ask) -> str | _Failed:
        """A reply, or why the last attempt within the deadline failed."""
        outcome: str | _Failed = _Failed(Failure.TIMEOUT, f"no answer in {self.settings.deadline:g} s")
        with suppress(TimeoutError):
            async with asyncio.timeout(self.settings.deadline):
                for attempt in range(1 + self.settings.retries):
                    outcome = await self._attempt(session, image, ask)
                    if isinstance(outcome, str) or not outcome.retry or attempt == self.settings.retries:
                        break
                    wait = self.settings.backoff * 2**attempt * random.uniform(0.5, 1.5)
                    await asyncio.sleep(min(max(wait, outcome.pause), LONGEST_PAUSE))
        return outcome

    async def _attempt(self, session: aiohttp.ClientSession, image: str, ask: Ask) -> str | _Failed:
        url = f"{self.settings.url}/chat/completions"
        try:
            # A redirect is not followed, since the API key would be sent to the host that it names.
            async with session.post(url, json=self._request(image, ask), allow_redirects=False) as response:
                body = await _read(response)
                return _reply(body) if response.status == 200 else self._failed(response, body)
        except TimeoutError:
            return _Failed(Failure.TIMEOUT, f"no answer in {self.settings.timeout:g} s", retry=True)
        except aiohttp.ClientConnectionError as error:
            return _Failed(Failure.UNREACHABLE, type(error).__name__, retry=True)
        except aiohttp.ClientError as error:
            return _Failed(Failure.BAD_RESPONSE, type(error).__name__, retry=True)

    def _request(self, image: str, ask: Ask) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": ask.prompt}]
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": ask.max_tokens,
            "temperature": self.settings.temperature,
            "seed": self.settings.seed,
        }

    def _failed(self, response: aiohttp.ClientResponse, body: bytes | None) -> _Failed:
        """What a status other than 200 means; an error if no request with these settings can succeed."""
        status = response.status
        if status in (401, 403, 404) or 300 <= status < 400:
            raise SettingsError(
                f"{self.settings.url} answers {status} to a request for the model `{self.settings.model}`",
                remedy="check the endpoint's `url`, `model` and `api_key`",
            )
        if status in (408, 425, 429) or status >= 500:
            pause = response.headers.get("Retry-After", "")
            return _Failed(Failure.SERVER_ERROR, f"status {status}", True, float(pause) if pause.isdecimal() else 0.0)
        return _Failed(Failure.REFUSED, f"status {status}: {self._excerpt(body)}")

    def _excerpt(self, body: bytes | None) -> str:
        """The beginning of an error's body, on one line; the API key is masked in case the server repeats it."""
        text = " ".join((body or b"")[:2000].decode(errors="replace").split())
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        text = text.replace(key, "***") if key else text
        return printable(text)[:200]


class _Health:
    """Counts a shard's failures, to tell images that fail from a server that is broken, which is an error."""

    def __init__(self, settings: Server) -> None:
        self.settings = settings
        self.requests = self.in_a_row = 0
        self.failures: Counter[str] = Counter()

    def count(self, outcome: str | _Failed) -> str | Failure:
        self.requests += 1
        if isinstance(outcome, str):
            self.in_a_row = 0
            return outcome
        self.in_a_row += 1
        self.failures[f"{outcome.cause.value} ({outcome.detail})"] += 1
        if self.settings.tolerated < 1 and self.in_a_row > 2 * self.settings.concurrency + 16:
            raise self._broken()
        return outcome.cause

    def check(self) -> None:
        # One failure is no sign of a broken server, however few the requests, unless it was the only request.
        if self.failures.total() > max(self.settings.tolerated * self.requests, min(1, self.requests - 1)):
            raise self._broken()

    def _broken(self) -> PixnerdError:
        failed, (commonest, _) = self.failures.total(), self.failures.most_common(1)[0]
        return PixnerdError(
            f"{self.settings.url} gave no answer to {failed} of {self.requests} requests, mostly: {commonest}",
            remedy="look at the server's log, then run again; or raise the endpoint's `tolerated` to record these",
        )


def _headers(settings: Server) -> dict[str, str]:
    if settings.api_key is None:
        return {}
    key = settings.api_key.reveal()
    if not key or not key.isascii() or not key.isprintable():
        raise SettingsError("the endpoint's key is no line of ASCII", remedy=f"check {settings.api_key.reference}")
    return {"Authorization": f"Bearer {key}"}


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """The body, or None if it is longer than MOST_BYTES."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > MOST_BYTES:
            return None
    return bytes(body)


def _reply(body: bytes | None) -> str | _Failed:
    """The text in a response such as `{"choices": [{"message": {"content": "a red circle"}}]}`."""
    if body is None:
        return _Failed(Failure.BAD_RESPONSE, f"more than {MOST_BYTES} bytes")
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return _Failed(Failure.BAD_RESPONSE, "no choices[0].message.content", retry=True)
    if content is None:
        return ""
    return content if isinstance(content, str) else _Failed(Failure.BAD_RESPONSE, "its content is no text")
