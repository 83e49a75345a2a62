"""Looks at pictures with the Inception network, chunk by chunk: what an actor does, and how the driver adds it up.

A chunk's file holds what the network saw. The driver reads one after the other, adds up moments, and keeps the
features of so many pictures as precision, recall and KID need, so any number of pictures takes the same memory.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.scores import Sample
from data_prep.scores.settings import ClipSettings
from infra.causes import first_line
from infra.records import get_data
from infra.store import Store
from pipelines.evaluation.chunks import Chunk, Made, Maker
from pipelines.evaluation.fid import Gathering, Gaussian, InceptionScore
from pipelines.evaluation.tars import place, png_of

KEPT = 10_000  # pictures whose features are kept, as the published precision and recall have it
_SEEN = "seen"
Picture = npt.NDArray[np.uint8]


class Readable(Protocol):
    """A chunk's pictures, drawn or real."""

    @property
    def there(self) -> list[str]: ...

    def read(self, store: Store) -> Iterator[tuple[str, Picture | str]]: ...


class Rows(NamedTuple):
    """Real pictures in the tars of shards: the number of the first, and where each lies."""

    first: int
    places: tuple[tuple[str, int, int], ...]  # key of the tar, offset, length

    @property
    def there(self) -> list[str]:
        return [f"{self.first + number:05d}-0" for number in range(len(self.places))]

    def read(self, store: Store) -> Iterator[tuple[str, Picture | str]]:
        for name, (tar, offset, length) in zip(self.there, self.places, strict=True):
            yield name, _decoded(store.get(tar, offset, offset + length))


def _decoded(data: bytes) -> Picture | str:
    from data_prep.images.decode import decode
    from data_prep.rejections import Rejection

    decoded = decode(data)
    return f"it cannot be read ({decoded.cause})" if isinstance(decoded, Rejection) else decoded.pixels


class Seeing(Maker[Readable]):
    noun = "batches of features"

    def __init__(
        self, store: Store, weights: Path, batch: int, clip: ClipSettings | None = None, prompts: Sequence[str] = ()
    ) -> None:
        """With `clip`, pictures are compared with their prompts as well."""
        self.store, self.weights, self.batch, self.clip, self.prompts = store, weights, batch, clip, prompts

    def load(self, device: str) -> None:
        from pipelines.evaluation.inception import Inception

        self.network = Inception(self.weights, device)
        if self.clip is not None:
            from data_prep.scores.clip import ClipScorer

            self.scorer = ClipScorer(self.clip, device)

    def pictures(self, item: Readable) -> list[str]:
        return item.there

    def make(self, item: Readable) -> Made:
        failed, there = dict[str, str](), dict[str, Picture]()
        for name, picture in item.read(self.store):
            if isinstance(picture, str):
                failed[name] = picture
            else:
                there[name] = picture
        pictures = list(there.values())
        seen = [self.network.see(np.stack(batch)) for batch in _batches(pictures, self.batch)]
        if not seen:
            return Made({}, failed)
        content = io.BytesIO()
        features, spatial, logits = (np.concatenate(parts) for parts in zip(*seen, strict=True))
        np.savez(content, features=features, spatial=spatial, logits=logits, clip=self._clip_scores(there))
        return Made({f"{_SEEN}.npz": content.getvalue()}, failed)

    def _clip_scores(self, there: Mapping[str, Picture]) -> npt.NDArray[np.float64]:
        """The cosine of each picture and its prompt, as far as there is one."""
        if self.clip is None:
            return np.zeros(0)
        column = f"{self.clip.name}_score"
        samples = (
            Sample(name, [{"kind": "prompt", "text": self.prompts[place(name)[0]]}], png_of(picture))
            for name, picture in there.items()
        )
        return np.array([row[column] for row in self.scorer.rows(samples) if column in row])


def _batches(pictures: Sequence[Picture], size: int) -> Iterator[list[Picture]]:
    """In their order; pictures of other sizes cannot share a batch."""
    batch: list[Picture] = []
    for picture in pictures:
        if batch and (len(batch) == size or picture.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(picture)
    if batch:
        yield batch


class Side(NamedTuple):
    """What is known of a set of pictures; an npz of ADM tells no more than its moments."""

    pictures: Gaussian
    spatial: Gaussian | None
    features: npt.NDArray[np.float32] | None  # of the first `KEPT` pictures
    inception_score: float | None
    clip_score: float | None = None


def added_up(store: Store, chunks: Iterable[Chunk]) -> Side:
    """A set's chunks as one."""
    of_pictures, of_places, score = Gathering(), Gathering(), InceptionScore()
    kept: list[npt.NDArray[np.float32]] = []
    cosines: list[float] = []
    for chunk in chunks:
        if _SEEN not in chunk.data:
            continue
        with np.load(io.BytesIO(get_data(store, chunk.data[_SEEN])), allow_pickle=False) as seen:
            features, spatial, logits = seen["features"], seen["spatial"], seen["logits"]
            cosines += seen["clip"].tolist()
        of_pictures.add(features)
        of_places.add(spatial)
        score.add(logits)
        kept.append(features[: KEPT - sum(map(len, kept))])
    clip = math.fsum(cosines) / len(cosines) if cosines else None
    return Side(of_pictures.gaussian(), of_places.gaussian(), np.concatenate(kept), score.value(), clip)


def of_adm(path: Path) -> Side | None:
    """The moments in an npz of ADM's evaluations; None if it has none, only pictures."""
    from infra.errors import EvaluationError

    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "mu" not in arrays:
                return None
            places = _told(arrays, "mu_s", "sigma_s") if "mu_s" in arrays else None
            return Side(_told(arrays, "mu", "sigma"), places, None, None)
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"{path} is no reference that can be read ({first_line(error)})",
            remedy="name an .npz file with `mu` and `sigma`, or with pictures `arr_0`; or a folder of pictures",
        ) from None


def _told(arrays: Any, mean: str, covariance: str) -> Gaussian:
    mean_D, covariance_DD = (arrays[name].astype(np.float64, casting="same_kind") for name in (mean, covariance))
    if mean_D.ndim != 1 or covariance_DD.shape != (len(mean_D), len(mean_D)):
        raise ValueError(f"{covariance} does not fit {mean}")
    if not (np.isfinite(mean_D).all() and np.isfinite(covariance_DD).all()):
        raise ValueError(f"{mean} or {covariance} is not finite")
    if (np.diag(covariance_DD) < 0).any():
        raise ValueError(f"{covariance} has negative variances")
    return Gaussian.of_covariance(mean_D, covariance_DD)
