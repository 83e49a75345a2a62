"""What looks at prepared images and says something about them: a scorer turns samples into rows of a side table.

    settings.py   what may be set, and which weights a digest stands for
    clip.py       CLIP score, and heads on CLIP's image features
    vlm.py        captions by a vision-language model in this process
    endpoint.py   captions by a server that speaks OpenAI's protocol
    answers.py    what a model said -> a caption, or the cause why it is none

A scorer gives one row for every sample, in their order. What cannot be scored is a null with its cause beside it, and
never an end of the work; what is wrong with the settings, the weights or the server is an error and ends it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa

T = TypeVar("T")
Row = dict[str, Any]  # column -> value; a column that is left out is null


class Failure(StrEnum):
    """Why a sample has no score or no caption: a closed list, counted in every record."""

    UNREADABLE_IMAGE = "unreadable_image"
    NO_CAPTION = "no_caption"  # nothing to hold the image against
    NOT_FINITE = "not_finite"  # the network's answer is no number
    EMPTY_ANSWER = "empty_answer"
    TOO_LONG = "too_long"
    # an endpoint's, after all retries
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    SERVER_ERROR = "server_error"  # 5xx, or 429 to the last try
    REFUSED = "refused"  # another 4xx
    BAD_RESPONSE = "bad_response"  # not what the protocol says


class Sample(NamedTuple):
    key: str
    captions: list[dict[str, str]]  # {"kind", "text"}
    image: bytes  # as it lies in the shard


class Scorer(Protocol):
    @property
    def fields(self) -> list[pa.Field]:
        """The columns, without `key`; the last one is the failure's."""

    def versions(self) -> dict[str, str]:
        """What the values depend on besides settings, weights and images."""

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        """One row for each sample, in their order."""


def prepared(
    samples: Iterable[Sample], prepare: Callable[[Sample], T], batch: int, threads: int
) -> Iterator[list[tuple[Sample, T]]]:
    """Batches in order. While one is being scored, threads prepare the next."""
    ahead: deque[tuple[Sample, Future[T]]] = deque()

    def take() -> list[tuple[Sample, T]]:
        return [(sample, done.result()) for sample, done in (ahead.popleft() for _ in range(min(batch, len(ahead))))]

    with ThreadPoolExecutor(threads) as pool:
        for sample in samples:
            ahead.append((sample, pool.submit(prepare, sample)))
            if len(ahead) == 2 * batch:
                yield take()
        while ahead:
            yield take()
