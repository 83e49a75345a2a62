"""Scorers: models that look at prepared images and fill a side table with scores or captions, a row for each image.

    settings.py   each scorer's settings, and the identity (settings and hashes of weights) that its digest covers
    clip.py       CLIP score, and heads on CLIP's image features
    vlm.py        captions by a vision-language model in this process
    endpoint.py   captions by a server that speaks OpenAI's protocol
    replies.py    a model's reply -> a caption, or the cause why there is none
    job.py        the pool of Ray actors that scores all shards of a plan

A scorer gives one row for every sample, in their order. A sample that cannot be scored gets nulls and a cause, and the
work goes on; wrong settings, weights or a broken server raise an error and end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa

from data_prep.sources.reading import chunks, in_order

T = TypeVar("T")
Row = dict[str, Any]  # column -> value; a column that is left out is null


class Failure(StrEnum):
    """Why a sample has no score or no caption: a closed list, counted in every ScoreRecord."""

    UNREADABLE_IMAGE = "unreadable_image"
    NO_CAPTION = "no_caption"  # there is no text to compare the image with
    NOT_FINITE = "not_finite"  # the network's output is NaN or infinite
    EMPTY_ANSWER = "empty_answer"
    TOO_LONG = "too_long"
    # only of an endpoint, after all retries
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    SERVER_ERROR = "server_error"  # 5xx, 408, 425 or 429
    REFUSED = "refused"  # another 4xx
    BAD_RESPONSE = "bad_response"  # it does not follow the protocol


class Sample(NamedTuple):
    key: str
    captions: list[dict[str, str]]  # {"kind", "text"}
    image: bytes  # the encoded file, as stored in the shard


class Scorer(Protocol):
    @property
    def fields(self) -> list[pa.Field]:
        """The side table's columns except `key`; the last one holds the cause of a failure."""

    def versions(self) -> dict[str, str]:
        """The libraries and the device, on which the values depend besides settings, weights and images."""

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        """One row for each sample, in their order."""


def prepared(
    samples: Iterable[Sample], prepare: Callable[[Sample], T], batch: int, threads: int
) -> Iterator[list[tuple[Sample, T]]]:
    """Samples with what `prepare` makes of each, in batches and in order; threads prepare the next batch meanwhile."""
    return chunks(in_order(lambda sample: (sample, prepare(sample)), samples, threads, most=batch), batch)


def library_versions(device: str, *libraries: str) -> dict[str, str]:
    """The versions of what decodes images, of torch, of further libraries, and the name of the device."""
    import torch

    names = ("torch", "torchvision", *libraries, "pillow", "simplejpeg")
    return {name: version(name) for name in names} | {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"
    }
