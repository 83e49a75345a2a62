"""Distances between real and generated pictures by features of an Inception network; pure arithmetic in float64.

FID and sFID (Heusel et al. 2017, arXiv 1706.08500; Nash et al. 2021, arXiv 2103.03841), KID (Binkowski et al. 2018,
arXiv 1801.01401), precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), Inception Score (Salimans et al.
2016, arXiv 1606.03498). No covariance gets an epsilon, singular ones included.

In names of arrays N, M are pictures, D features, K classes, R the rank of a covariance.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from infra.errors import EvaluationError

Floats = npt.NDArray[np.float64]

NEIGHBOURS = 3  # k of precision and recall
BLOCK = 5_000  # pictures of which each gives an Inception Score, as in the published evaluations of ImageNet models
_LARGEST = 1e30  # that a feature may be: the sixth powers of larger ones overflow
_ROWS = 2_048  # of a matrix of distances or kernels that is in memory at once


@dataclass
class Moments:
    """Count, mean and sum of products of deviations; those of parts can be added up in any order."""

    count: int
    mean_D: Floats
    scatter_DD: Floats

    @classmethod
    def of(cls, features_ND: npt.NDArray[np.floating]) -> Moments:
        features = np.asarray(features_ND, np.float64)
        mean_D = features.mean(axis=0)
        centred_ND = features - mean_D
        return cls(len(features), mean_D, centred_ND.T @ centred_ND)

    def __add__(self, other: Moments) -> Moments:
        count, offset_D = self.count + other.count, other.mean_D - self.mean_D
        between_DD = np.outer(offset_D, offset_D) * (self.count * other.count / count)
        mean_D = self.mean_D + offset_D * (other.count / count)
        return Moments(count, mean_D, self.scatter_DD + other.scatter_DD + between_DD)


class Gaussian(NamedTuple):
    """A normal distribution, its covariance as a factor: covariance = factor.T @ factor."""

    mean_D: Floats
    factor_RD: Floats

    @classmethod
    def of_features(cls, features_ND: npt.NDArray[np.floating]) -> Gaussian:
        """From the features themselves, which loses nothing however few or dependent they are."""
        features = np.asarray(features_ND, np.float64)
        _at_least_two(len(features))
        mean_D = features.mean(axis=0)
        centred_ND = (features - mean_D) / np.sqrt(len(features) - 1)
        if centred_ND.shape[0] <= centred_ND.shape[1]:
            return cls(mean_D, centred_ND)
        factor_DD: Floats = np.asarray(np.linalg.qr(centred_ND, mode="r"))
        return cls(mean_D, factor_DD)

    @classmethod
    def of_moments(cls, moments: Moments) -> Gaussian:
        _at_least_two(moments.count)
        return cls.of_covariance(moments.mean_D, moments.scatter_DD / (moments.count - 1))

    @classmethod
    def of_covariance(cls, mean_D: Floats, covariance_DD: Floats) -> Gaussian:
        """Eigenvalues that are only rounding errors become zero, as their roots would be far larger than they are."""
        values_D, vectors_DD = np.linalg.eigh((covariance_DD + covariance_DD.T) / 2)
        real = values_D > len(values_D) * np.finfo(np.float64).eps * values_D[-1]
        return cls(mean_D, (vectors_DD[:, real] * np.sqrt(values_D[real])).T)


def _at_least_two(count: int) -> None:
    if count < 2:
        raise EvaluationError("one picture has no covariance", remedy="give at least two pictures on each side")


@dataclass
class Gathering:
    """A distribution out of parts: rows wait until they are more than they are wide, and then become moments.

    Adding up moments costs as much for one row as for as many as there are features, so they are made of many.
    """

    _moments: Moments | None = None
    _rows: list[npt.NDArray[np.floating]] = field(default_factory=list)

    def add(self, features_ND: npt.NDArray[np.floating]) -> None:
        self._rows.append(features_ND)
        if sum(map(len, self._rows)) > features_ND.shape[1]:
            self._moments = self._added()
            self._rows.clear()

    def gaussian(self) -> Gaussian:
        if self._moments is None:
            return Gaussian.of_features(np.concatenate(self._rows))
        return Gaussian.of_moments(self._added() if self._rows else self._moments)

    def _added(self) -> Moments:
        waiting = Moments.of(np.concatenate(self._rows))
        return waiting if self._moments is None else self._moments + waiting


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mean - mean|² + tr(A + B - 2 (AB)^½).

    The non-zero eigenvalues of AB are the squares of the singular values of the product of the factors, so their roots
    are the singular values themselves. A root of a product of covariances would turn rounding of 1e-16 into 1e-8.
    """
    offset_D = a.mean_D - b.mean_D
    traces = float((a.factor_RD**2).sum() + (b.factor_RD**2).sum())
    overlap = float(np.linalg.svd(a.factor_RD @ b.factor_RD.T, compute_uv=False).sum())
    return float(offset_D @ offset_D) + traces - 2 * overlap


def kernel_distance(real_ND: npt.NDArray[np.floating], made_MD: npt.NDArray[np.floating]) -> float:
    """The unbiased squared maximum mean discrepancy over whole sets, with the kernel (x·y / D + 1)³."""
    real, made = (np.asarray(features, np.float64) for features in (real_ND, made_MD))
    n, m = len(real), len(made)
    _at_least_two(min(n, m))
    within = sum((_kernels(x, x) - _own_kernels(x)) / (len(x) * (len(x) - 1)) for x in (real, made))
    return float(within - 2 * _kernels(real, made) / (n * m))


def _kernels(a_ND: Floats, b_MD: Floats) -> float:
    return sum(float(((rows @ b_MD.T / b_MD.shape[1] + 1) ** 3).sum()) for rows in _blocks(a_ND))


def _own_kernels(a_ND: Floats) -> float:
    return float((((a_ND**2).sum(axis=1) / a_ND.shape[1] + 1) ** 3).sum())


def precision_recall(real_ND: npt.NDArray[np.floating], made_MD: npt.NDArray[np.floating]) -> tuple[float, float]:
    """The share of made pictures in the manifold of the real ones, and the other way round.

    A set's manifold is all that lies as near to one of its pictures as that one's third nearest neighbour does.
    """
    real, made = (np.asarray(features, np.float64) for features in (real_ND, made_MD))
    if min(len(real), len(made)) <= NEIGHBOURS:
        raise EvaluationError(
            f"precision and recall need more than {NEIGHBOURS} pictures on each side", remedy="draw more pictures"
        )
    middle_D = real.mean(axis=0)  # small numbers have small rounding errors
    real, made = real - middle_D, made - middle_D
    return _within(made, real), _within(real, made)


def _within(points_MD: Floats, manifold_ND: Floats) -> float:
    radii_N = np.concatenate([_third(rows) for rows in _squares(manifold_ND, manifold_ND)])
    # Distances of equal pictures come out as some 1e-16 of their lengths; none of them may lie outside for that.
    slack_N = 1e-12 * (manifold_ND**2).sum(axis=1)
    inside = sum(int((rows_BN <= radii_N + slack_N).any(axis=1).sum()) for rows_BN in _squares(points_MD, manifold_ND))
    return inside / len(points_MD)


def _third(squares_BN: Floats) -> Floats:
    """The squared distance to the third nearest neighbour; the nearest of all is the picture itself."""
    nearest: Floats = np.partition(squares_BN, NEIGHBOURS, axis=1)[:, NEIGHBOURS]
    return nearest


def _squares(a_ND: Floats, b_MD: Floats) -> Iterator[Floats]:
    lengths_M = (b_MD**2).sum(axis=1)
    for rows in _blocks(a_ND):
        yield np.maximum((rows**2).sum(axis=1)[:, None] + lengths_M - 2 * rows @ b_MD.T, 0)


def _blocks(a_ND: Floats) -> Iterator[Floats]:
    return (a_ND[start : start + _ROWS] for start in range(0, len(a_ND), _ROWS))


@dataclass
class InceptionScore:
    """exp(mean KL(p(class | picture) || p(class))) of each block of pictures, as they come."""

    _sums: list[tuple[int, float, Floats]] = field(default_factory=list)  # count, sum of p log p, sum of p

    def add(self, logits_NK: npt.NDArray[np.floating]) -> None:
        logits = np.asarray(logits_NK, np.float64)
        while len(logits):
            if not self._sums or self._sums[-1][0] == BLOCK:
                self._sums.append((0, 0.0, np.zeros(logits.shape[1])))
            count, inner, total_K = self._sums[-1]
            some, logits = logits[: BLOCK - count], logits[BLOCK - count :]
            log_NK = some - some.max(axis=1, keepdims=True)
            log_NK -= np.log(np.exp(log_NK).sum(axis=1, keepdims=True))
            p_NK = np.exp(log_NK)
            self._sums[-1] = (count + len(some), inner + float((p_NK * log_NK).sum()), total_K + p_NK.sum(axis=0))

    def value(self) -> float:
        """The mean over whole blocks; of fewer pictures than a block has, that of all of them."""
        whole = [sums for sums in self._sums if sums[0] == BLOCK] or self._sums
        return float(np.mean([_score(*sums) for sums in whole]))


def _score(count: int, inner: float, total_K: Floats) -> float:
    marginal_K = total_K / count
    entropy = -float((marginal_K * np.log(np.maximum(marginal_K, 1e-300))).sum())
    return float(np.exp(inner / count + entropy))


# ------------------------------------------------------------------------------------------------- from files


def of_features(real_ND: npt.NDArray[np.floating], made_MD: npt.NDArray[np.floating]) -> dict[str, float]:
    """All that follows from features alone."""
    precision, recall = precision_recall(real_ND, made_MD)
    distance = frechet(Gaussian.of_features(real_ND), Gaussian.of_features(made_MD))
    return {"fid": distance, "kid": kernel_distance(real_ND, made_MD), "precision": precision, "recall": recall}


def read_features(paths: Iterable[Path]) -> list[Floats]:
    """The array `features` of each file, all of one width."""
    read = [_features(path) for path in paths]
    if len(widths := {features.shape[1] for features in read}) > 1:
        raise EvaluationError(
            f"the features are {' and '.join(map(str, sorted(widths)))} wide", remedy="make both by the same network"
        )
    return read


def _features(path: Path) -> Floats:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features: Floats = arrays["features"].astype(np.float64, casting="same_kind")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        raise EvaluationError(
            f"{path} has no features that can be read ({type(error).__name__})",
            remedy="name an .npz file with an array `features` of shape [pictures, features]",
        ) from None
    if features.ndim != 2 or 0 in features.shape:
        raise EvaluationError(
            f"the features in {path} have the shape {list(features.shape)}", remedy="give one row for each picture"
        )
    usable_ND = np.abs(features) < _LARGEST  # which no NaN is
    if not usable_ND.all():
        bad = int((~usable_ND).any(axis=1).argmax())
        raise EvaluationError(
            f"row {bad} of the features in {path} is not finite, or beyond {_LARGEST:.0e}",
            remedy="leave the picture out, or make it again",
        )
    return features
