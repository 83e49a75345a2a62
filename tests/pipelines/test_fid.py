"""FID and kin: equal to direct computations, from any split, with singular covariances and from hostile files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import EvaluationError
from pipelines.evaluation import fid
from pipelines.evaluation.fid import Gaussian, InceptionScore, Moments, frechet

Floats = Any


def pictures(count: int, width: int, seed: int, shift: float = 0.0) -> Floats:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(width, width))
    return rng.normal(size=(count, width)) @ mixed / np.sqrt(width) + shift


def direct(real: Floats, made: Floats) -> float:
    """As the definition has it, by the roots of the eigenvalues of the product of covariances."""
    covariances = [np.atleast_2d(np.cov(features, rowvar=False)) for features in (real, made)]
    values = np.linalg.eigvals(covariances[0] @ covariances[1])
    roots = np.sqrt(np.maximum(values.real, 0)).sum()
    offset = real.mean(0) - made.mean(0)
    return float(offset @ offset + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots)


def test_it_is_the_direct_computation():
    real, made = pictures(300, 12, 0), pictures(200, 12, 1, 0.3)
    expected = direct(real, made)
    assert fid.of_features(real, made)["fid"] == pytest.approx(expected, abs=1e-9)
    by_moments = frechet(*(Gaussian.of_moments(Moments.of(features)) for features in (real, made)))
    assert by_moments == pytest.approx(expected, abs=1e-9)


def test_of_scaled_copies_it_is_known():
    """Of x and c·x + s: |mean offset|² + (1 - c)² tr(covariance)."""
    real = pictures(60, 40, 0)
    made = 1.5 * real + 2.0
    offset = real.mean(0) - made.mean(0)
    expected = offset @ offset + 0.25 * np.trace(np.cov(real, rowvar=False))
    assert frechet(Gaussian.of_features(real), Gaussian.of_features(made)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [5, 30, 80])
def test_singular_covariances(count: int):
    """With fewer pictures than features; two such sets in orthogonal spaces have no overlap at all."""
    real, made = pictures(count, 64, 2), pictures(count + 3, 64, 3)
    found = frechet(Gaussian.of_features(real), Gaussian.of_features(made))
    by_moments = frechet(*(Gaussian.of_moments(Moments.of(features)) for features in (real, made)))
    assert by_moments == pytest.approx(found, abs=1e-6)
    assert found == pytest.approx(direct(real, made), abs=1e-4)  # whose roots of rounding errors are 1e-8 each
    left, right = np.zeros((count, 64)), np.zeros((count, 64))
    left[:, :20], right[:, 30:50] = pictures(count, 20, 4), pictures(count, 20, 5)
    apart = sum(np.trace(np.cov(features, rowvar=False)) for features in (left, right))
    offset = left.mean(0) - right.mean(0)
    found = frechet(Gaussian.of_features(left), Gaussian.of_features(right))
    assert found == pytest.approx(apart + offset @ offset, abs=1e-9)


@pytest.mark.parametrize(("count", "width"), [(10, 64), (200, 8), (40, 1)])
def test_a_set_is_no_distance_from_itself(count: int, width: int):
    real = pictures(count, width, 6, 10.0)
    found = fid.of_features(real, real[::-1])
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert (found["precision"], found["recall"]) == (1.0, 1.0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_moments_of_any_split_are_those_of_the_whole(sizes: list[int], rng: Any):
    features = pictures(sum(sizes), 5, 7, 100.0)
    parts = [Moments.of(part) for part in np.split(features, np.cumsum(sizes)[:-1])]
    rng.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    whole = Moments.of(features)
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean_D, whole.mean_D, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter_DD, whole.scatter_DD, atol=1e-9)


def test_kernel_distance_is_the_sum_over_pairs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fid, "_ROWS", 4)
    real, made = pictures(9, 6, 8), pictures(7, 6, 9, 0.5)

    def k(x: Floats, y: Floats) -> float:
        return float((x @ y / 6 + 1) ** 3)

    within = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (real, made)
    ]
    between = np.mean([[k(x, y) for y in made] for x in real])
    assert fid.kernel_distance(real, made) == pytest.approx(sum(within) - 2 * between, abs=1e-10)


def test_precision_and_recall_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fid, "_ROWS", 8)
    real, made = pictures(30, 4, 10), np.concatenate([pictures(15, 4, 11, 0.5), pictures(10, 4, 12, 5.0)])

    def within(points: Floats, manifold: Floats) -> float:
        inside = 0
        for point in points:
            for index, centre in enumerate(manifold):
                others = np.delete(manifold, index, axis=0)
                radius = np.sort(np.sqrt(((others - centre) ** 2).sum(1)))[2]
                if np.sqrt(((point - centre) ** 2).sum()) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    expected = within(made, real), within(real, made)
    assert fid.precision_recall(real, made) == pytest.approx(expected)
    assert expected[0] < 1 and expected[1] < 1


def test_copies_of_a_picture_are_within_it():
    real = np.repeat(pictures(3, 5, 13, 7.0), 5, axis=0)
    assert fid.precision_recall(real, real[:10]) == (1.0, pytest.approx(10 / 15))


def test_the_inception_score_is_the_definition_in_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fid, "BLOCK", 20)
    logits = np.random.default_rng(14).normal(size=(50, 6)) * 3

    def of(some: Floats) -> float:
        p = np.exp(some) / np.exp(some).sum(1, keepdims=True)
        return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))

    score = InceptionScore()
    for part in np.split(logits, [7, 31]):
        score.add(part)
    assert score.value() == pytest.approx(np.mean([of(logits[:20]), of(logits[20:40])]))
    few = InceptionScore()
    few.add(logits[:11])
    assert few.value() == pytest.approx(of(logits[:11]))


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_files_that_cannot_be_meant_are_refused(tmp_path: Path):
    good = saved(tmp_path / "good.npz", features=pictures(8, 4, 0))
    spoilt = pictures(8, 4, 0)
    spoilt[3, 1] = np.nan
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-40])
    for path, message in [
        (tmp_path / "none.npz", "has no features that can be read"),
        (tmp_path / "cut.npz", "has no features that can be read"),
        (saved(tmp_path / "other.npz", arr_0=spoilt), "has no features that can be read"),
        (saved(tmp_path / "pickle.npz", features=np.array([{"a": 1}], object)), "has no features that can be read"),
        (saved(tmp_path / "nan.npz", features=spoilt), "row 3 of the features"),
        (saved(tmp_path / "flat.npz", features=spoilt[0]), "have the shape"),
        (saved(tmp_path / "wide.npz", features=pictures(8, 5, 0)), "are 4 and 5 wide"),
    ]:
        with pytest.raises(EvaluationError, match=message):
            fid.read_features([good, path])


def test_the_command_scores_features_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from orchestration.commands.evaluate_fid import fid as command

    real, made = pictures(40, 6, 0), pictures(30, 6, 1)
    paths = saved(tmp_path / "real.npz", features=real), saved(tmp_path / "made.npz", features=made)
    command(features=paths[0], more=[str(paths[1])], json_=True)
    assert json.loads(capsys.readouterr().out) == pytest.approx(fid.of_features(real, made))
