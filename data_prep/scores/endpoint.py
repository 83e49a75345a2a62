"""Captions by a server that speaks OpenAI's protocol, many requests at once.

What may pass (a timeout, 429, 5xx, nobody there) is tried again until the answer's deadline. An answer that fails for
good is a null with its cause; but when too many fail it is the server that is broken, and the shard is left undone for
the next run instead of being recorded as a thousand failures.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp
import pyarrow as pa

from data_prep.images.decode import sniff
from data_prep.scores import Failure, Row, Sample
from data_prep.scores.replies import caption_fields, caption_row
from data_prep.scores.settings import Ask, EndpointSettings
from infra.errors import PixnerdError, SettingsError
from infra.text import printable

MOST_BYTES = 1 << 20  # of a response
LONGEST_PAUSE = 60.0  # seconds between two tries, also where the server asks for more
_KINDS = ("JPEG", "PNG", "WEBP")  # what servers decode


class _Refusal(NamedTuple):
    """An attempt without an answer."""

    cause: Failure
    detail: str
    passes: bool = False  # it is worth another try
    pause: float = 0.0  # seconds that the server asks for


class EndpointScorer:
    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.headers = _headers(settings)

    @property
    def fields(self) -> list[pa.Field]:
        return caption_fields(self.settings.failure)

    def versions(self) -> dict[str, str]:
        return {}  # the server's, which it does not tell

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        try:
            yield from asyncio.run(self._shard(samples))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _shard(self, samples: Iterable[Sample]) -> list[Row]:
        health = _Health(self.settings)
        room = asyncio.Semaphore(self.settings.concurrency)
        answers: list[list[asyncio.Task[str | Failure]]] = []

        async def answer(image: str, ask: Ask) -> str | Failure:
            try:
                found = await self._answer(session, image, ask)
            finally:
                room.release()
            return health.count(found)

        async with self._session() as session, asyncio.TaskGroup() as group:
            for sample in samples:
                here: list[asyncio.Task[str | Failure]] = []
                answers.append(here)
                if sniff(sample.image) not in _KINDS:
                    continue
                image = _data_url(sample.image)
                for ask in self.settings.asks:
                    await room.acquire()  # before the next image is read: memory holds those under way alone
                    here.append(group.create_task(answer(image, ask)))
        health.check()
        return [self._row([task.result() for task in here]) for here in answers]

    def _row(self, answers: list[str | Failure]) -> Row:
        if not answers:
            return {self.settings.failure: Failure.UNREADABLE_IMAGE.value}
        return caption_row(self.settings.failure, zip(self.settings.asks, answers, strict=True))

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(
            headers=self.headers,
            connector=aiohttp.TCPConnector(limit=self.settings.concurrency),
            timeout=aiohttp.ClientTimeout(total=self.settings.timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            yield session

    async def _answer(self, session: aiohttp.ClientSession, image: str, ask: Ask) -> str | _Refusal:
        """An answer, or the last attempt's refusal, within the deadline."""
        found: str | _Refusal = _Refusal(Failure.TIMEOUT, f"no answer in {self.settings.deadline:g} s")
        try:
            async with asyncio.timeout(self.settings.deadline):
                for attempt in range(1 + self.settings.retries):
                    found = await self._attempt(session, image, ask)
                    if isinstance(found, str) or not found.passes or attempt == self.settings.retries:
                        break
                    wait = self.settings.backoff * 2**attempt * random.uniform(0.5, 1.5)
                    await asyncio.sleep(min(max(wait, found.pause), LONGEST_PAUSE))
        except TimeoutError:
            pass
        return found

    async def _attempt(self, session: aiohttp.ClientSession, image: str, ask: Ask) -> str | _Refusal:
        url = f"{self.settings.url}/chat/completions"
        try:
            # A redirect is not followed: the key would go to whoever it names.
            async with session.post(url, json=self._request(image, ask), allow_redirects=False) as response:
                body = await _read(response)
                return _said(body) if response.status == 200 else self._refusal(response, body)
        except TimeoutError:
            return _Refusal(Failure.TIMEOUT, f"no answer in {self.settings.timeout:g} s", passes=True)
        except aiohttp.ClientConnectionError as error:
            return _Refusal(Failure.UNREACHABLE, type(error).__name__, passes=True)
        except aiohttp.ClientError as error:
            return _Refusal(Failure.BAD_RESPONSE, type(error).__name__, passes=True)

    def _request(self, image: str, ask: Ask) -> dict[str, Any]:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": ask.prompt}]
        return {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": ask.max_tokens,
            "temperature": self.settings.temperature,
            "seed": self.settings.seed,
        }

    def _refusal(self, response: aiohttp.ClientResponse, body: bytes | None) -> _Refusal:
        status = response.status
        if status in (401, 403, 404) or 300 <= status < 400:
            raise SettingsError(
                f"{self.settings.url} answers {status} to a request for the model `{self.settings.model}`",
                remedy="check the endpoint's `url`, `model` and `api_key`",
            )
        if status in (408, 425, 429) or status >= 500:
            asked = response.headers.get("Retry-After", "")
            return _Refusal(Failure.SERVER_ERROR, f"status {status}", True, float(asked) if asked.isdecimal() else 0.0)
        return _Refusal(Failure.REFUSED, f"status {status}: {self._excerpt(body)}")

    def _excerpt(self, body: bytes | None) -> str:
        """What the server says of a refusal, on one line and without the key, should it repeat that."""
        text = " ".join((body or b"")[:2000].decode(errors="replace").split())
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        text = text.replace(key, "***") if key else text
        return printable(text)[:200]


class _Health:
    """Whether it is the images that fail or the server."""

    def __init__(self, settings: EndpointSettings) -> None:
        self.settings = settings
        self.asked = self.in_a_row = 0
        self.failed: Counter[str] = Counter()

    def count(self, found: str | _Refusal) -> str | Failure:
        self.asked += 1
        if isinstance(found, str):
            self.in_a_row = 0
            return found
        self.in_a_row += 1
        self.failed[f"{found.cause.value} ({found.detail})"] += 1
        if self.settings.tolerated < 1 and self.in_a_row > 2 * self.settings.concurrency + 16:
            raise self._broken()
        return found.cause

    def check(self) -> None:
        # One failure is no sign of a broken server, however few the images are, unless there was no other answer.
        if self.failed.total() > max(self.settings.tolerated * self.asked, min(1, self.asked - 1)):
            raise self._broken()

    def _broken(self) -> PixnerdError:
        said, _ = self.failed.most_common(1)[0]
        return PixnerdError(
            f"{self.settings.url} gave no caption for {self.failed.total()} of {self.asked} requests, mostly: {said}",
            remedy="look at the server's log, then run again; or raise the endpoint's `tolerated` to record these",
        )


def _headers(settings: EndpointSettings) -> dict[str, str]:
    if settings.api_key is None:
        return {}
    key = settings.api_key.reveal()
    if not key or not key.isascii() or not key.isprintable():
        raise SettingsError("the endpoint's key is no line of ASCII", remedy=f"check {settings.api_key.reference}")
    return {"Authorization": f"Bearer {key}"}


def _data_url(image: bytes) -> str:
    return f"data:image/{str(sniff(image)).lower()};base64,{base64.b64encode(image).decode()}"


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """The body, or None if it is longer than any answer."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > MOST_BYTES:
            return None
    return bytes(body)


def _said(body: bytes | None) -> str | _Refusal:
    if body is None:
        return _Refusal(Failure.BAD_RESPONSE, f"more than {MOST_BYTES} bytes")
    try:
        said = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return _Refusal(Failure.BAD_RESPONSE, "no choices[0].message.content", passes=True)
    if said is None:
        return ""
    return said if isinstance(said, str) else _Refusal(Failure.BAD_RESPONSE, "its content is no text")
