"""FID and kin: equal to direct computations, from any split, with singular covariances and from hostile files."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.scores import Sample
from data_prep.scores.clip import ClipScorer
from data_prep.scores.settings import ClipSettings
from infra import layout
from infra.config import parse
from infra.errors import CheckpointError, EvaluationError, SettingsError
from infra.records import read_record
from infra.store import open_store
from pipelines.evaluation import chunks, fid, fid_run, inception, seeing
from pipelines.evaluation.fid import Gaussian, InceptionScore, Moments, frechet
from pipelines.evaluation.rows import spread
from pipelines.evaluation.tars import read_pictures
from pipelines.stages.fid import classes_of
from tests.data_prep.small_scorers import build_clip
from tests.pipelines.drawn_here import drawn_here
from tests.pipelines.small_inception import write_inception
from tests.training import small_checkpoint
from training import checkpoint as checkpoints

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


@given(st.lists(st.integers(1, 12), min_size=2, max_size=8))
def test_what_is_gathered_is_the_whole(sizes: list[int]):
    """In parts of any size, whether or not some rows still wait at the end."""
    features, other = pictures(sum(sizes), 8, 15), Gaussian.of_features(pictures(50, 8, 16))
    gathered = fid.Gathering()
    for part in np.split(features, np.cumsum(sizes)[:-1]):
        gathered.add(part)
    whole = frechet(Gaussian.of_features(features), other)
    assert frechet(gathered.gaussian(), other) == pytest.approx(whole, abs=1e-6)
    assert frechet(gathered.gaussian(), other) == pytest.approx(whole, abs=1e-6), "asking changes nothing"


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
    assert fid.precision_recall(real, real[:10]) == (1.0, 10 / 15)


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


# ------------------------------------------------------------------------------------------------- files


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_files_that_cannot_be_meant_are_refused(tmp_path: Path):
    good = saved(tmp_path / "good.npz", features=pictures(8, 4, 0))
    spoilt = pictures(8, 4, 0)
    spoilt[3, 1] = np.nan
    vast = pictures(8, 4, 0)
    vast[3, 1] = 1e200
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-40])
    for path, message in [
        (tmp_path / "none.npz", "has no features that can be read"),
        (tmp_path / "cut.npz", "has no features that can be read"),
        (saved(tmp_path / "other.npz", arr_0=spoilt), "has no features that can be read"),
        (saved(tmp_path / "pickle.npz", features=np.array([{"a": 1}], object)), "has no features that can be read"),
        (saved(tmp_path / "nan.npz", features=spoilt), "row 3 of the features"),
        (saved(tmp_path / "vast.npz", features=vast), "row 3 of the features"),
        (saved(tmp_path / "complex.npz", features=vast * 1j), "has no features that can be read"),
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


# ------------------------------------------------------------------------------------------------- pictures


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("inception") / "weights.pth")


def noise(folder: Path, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are made in this process: the pool has tests of its own."""

    def make(shelf: chunks.Shelf, maker: Any, items: Any, needs: Any, show: Any) -> list[chunks.Chunk]:
        actor = chunks._Actor(shelf, maker, "cpu")
        return [actor.do(*item) for item in items.items()]

    monkeypatch.setattr(fid_run, "make", make)
    monkeypatch.setattr(fid_run, "generate", lambda order, prompts, show: drawn_here(order, prompts))


def real(reference: Path | None, weights: Path, **changes: Any) -> fid_run.Real:
    given = {"inception": str(weights), "count": 6, "sampling": {"steps": 1, "batch": 4, "guidance": 1.0}}
    if reference is not None:
        given["reference"] = str(reference)
    return fid_run.Real(parse(fid_run.FidSettings, given | changes), None)


def nothing(*_: Any) -> None: ...


def test_folders_go_the_whole_path(here: None, weights: Path, tmp_path: Path):
    """Every score is that of the features, which the real network sees in the real order."""
    theirs, ours = noise(tmp_path / "real", 9, 0), noise(tmp_path / "made", 7, 1)
    (ours / "05.png").write_bytes((ours / "05.png").read_bytes()[:-200])
    store = open_store(str(tmp_path / "store"))
    report = fid_run.fid_of_folder(store, ours, real(theirs, weights), nothing)
    assert (report.images, report.failed) == (7, 1)
    assert report.judge.endswith(", 6 pictures")
    network = inception.Inception(weights)
    seen = [
        network.see(np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*")) if path.name != bad]))
        for folder, bad in ((theirs, ""), (ours, "05.png"))
    ]
    expected = fid.of_features(seen[0].features, seen[1].features)
    scores = {name.removeprefix("fid/"): score.value for name, score in report.scores.items()}
    assert scores.keys() == {*expected, "sfid", "inception_score"}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    spatial = [Gaussian.of_features(each.spatial) for each in seen]
    assert seen[0].spatial.shape == (9, 7 * 17 * 17)
    assert scores["sfid"] == pytest.approx(frechet(*spatial), rel=1e-4)
    itself = fid_run.fid_of_folder(store, theirs, real(theirs, weights), nothing)
    assert itself.scores["fid/fid"].value == pytest.approx(0, abs=1e-6)


def test_as_many_real_pictures_as_asked_for_are_looked_at_and_all_generated_ones(
    here: None, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Real ones are spread over their folder, whose order is often that of classes."""
    theirs, ours = noise(tmp_path / "real", 16, 0), noise(tmp_path / "made", 9, 1)
    store = open_store(str(tmp_path / "store"))
    asked = real(theirs, weights, reference_count=4)
    with monkeypatch.context() as patched:
        patched.setattr(fid, "NEIGHBOURS", 1)
        report = fid_run.fid_of_folder(store, ours, asked, nothing)
    assert report.images == 9
    looked_at = [read_record(store, key, chunks.Chunk).data["pictures"] for key in layout.REFERENCE_TAKEN.keys(store)]
    pngs = set(read_pictures(store, looked_at).values())
    assert pngs == {(theirs / f"{number:02d}.png").read_bytes() for number in (0, 4, 8, 12)}


def test_pictures_of_adm_are_a_reference(here: None, weights: Path, tmp_path: Path):
    theirs, ours = noise(tmp_path / "real", 6, 0), noise(tmp_path / "made", 5, 1)
    files = sorted(theirs.glob("*"))
    pictures = np.stack([np.asarray(Image.open(files[number])) for number in spread(len(files))])
    store = open_store(str(tmp_path / "store"))
    of_folder = fid_run.fid_of_folder(store, ours, real(theirs, weights), nothing).scores
    packed = saved(tmp_path / "pictures.npz", arr_0=pictures)
    of_pictures = fid_run.fid_of_folder(store, ours, real(packed, weights), nothing).scores
    assert {name: score.value for name, score in of_pictures.items()} == {
        name: score.value for name, score in of_folder.items()
    }


def test_damaged_references_are_told(tmp_path: Path):
    good = saved(tmp_path / "good.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    torn, short = tmp_path / "torn.npz", tmp_path / "short.npz"
    torn.write_bytes(good.read_bytes()[:-40])
    with zipfile.ZipFile(short, "w") as archive:
        archive.writestr("arr_0.npy", zipfile.ZipFile(good).read("arr_0.npy")[:-100])
    with pytest.raises(EvaluationError, match="is no reference that can be read"):
        seeing.of_adm(torn)
    for path in (torn, short, saved(tmp_path / "other.npz", x=np.zeros(3))):
        with pytest.raises(EvaluationError, match="is no reference that can be read"):
            list(fid_run._of_npz(path))


def test_moments_of_adm_are_a_reference(tmp_path: Path):
    theirs, ours = pictures(30, 6, 0), pictures(20, 6, 1)
    moments = {"mu": theirs.mean(0), "sigma": np.cov(theirs, rowvar=False)}
    told = seeing.of_adm(saved(tmp_path / "moments.npz", **moments))
    assert told is not None
    made = seeing.Side(Gaussian.of_features(ours), None, ours.astype(np.float32), 2.0)
    assert fid_run.scores_of(told, made) == {
        "fid": pytest.approx(direct(theirs, ours), abs=1e-9),
        "inception_score": 2.0,
    }
    both = seeing.of_adm(saved(tmp_path / "both.npz", **moments, mu_s=moments["mu"], sigma_s=moments["sigma"]))
    assert both is not None and fid_run.scores_of(both, made._replace(spatial=made.pictures)).keys() >= {"sfid"}
    assert seeing.of_adm(saved(tmp_path / "pictures.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))) is None
    for name, wrong in {
        "short": {"mu": np.ones(3)},
        "other": {**moments, "mu": np.ones(3)},
        "nan": {**moments, "mu": np.full(6, np.nan)},
        "negative": {**moments, "sigma": -np.eye(6)},
        "places": {**moments, "mu_s": np.ones(3), "sigma_s": np.eye(2)},
        "half": {**moments, "mu_s": np.ones(3)},
    }.items():
        with pytest.raises(EvaluationError, match="is no reference that can be read"):
            seeing.of_adm(saved(tmp_path / f"{name}.npz", **wrong))
    with pytest.raises(EvaluationError, match="the reference has 6 features, and these pictures 5"):
        fid_run.scores_of(told, made._replace(pictures=Gaussian.of_features(pictures(9, 5, 2))))


@pytest.mark.parametrize("kind", ["class", "text"])
def test_a_checkpoint_is_measured_and_no_two_pictures_share_their_noise(
    here: None, weights: Path, tmp_path: Path, kind: str
):
    write = small_checkpoint.write_class if kind == "class" else small_checkpoint.write_text
    store = open_store(str(tmp_path / "store"))
    checkpoint = checkpoints.publish_folder(store, write(tmp_path / "net"))
    asked = real(noise(tmp_path / "real", 5, 0), weights)
    classes = classes_of(store, checkpoint)
    assert (classes is None) == (kind == "text")
    prompts = fid_run.prompts_of(store, None, classes, asked.settings) if kind == "class" else ["a red circle"] * 6
    report = fid_run.fid(store, "one", checkpoint, prompts, asked, nothing)
    assert (report.images, report.failed) == (6, 0)
    pictures = read_pictures(store, report.pictures)
    assert len(set(pictures.values())) == 6


def test_pictures_are_compared_with_their_prompts_by_clip(here: None, weights: Path, tmp_path: Path):
    build_clip(tmp_path / "clip")
    clip = {"model": str(tmp_path / "clip")}
    store = open_store(str(tmp_path / "store"))
    checkpoint = checkpoints.publish_folder(store, small_checkpoint.write_text(tmp_path / "net"))
    asked = real(noise(tmp_path / "real", 5, 0), weights, clip=clip)
    assert asked.identity() != asked._replace(settings=asked.settings.model_copy(update={"clip": None})).identity()
    prompts = ["a red circle", "two blue squares"] * 3
    report = fid_run.fid(store, "one", checkpoint, prompts, asked, nothing)
    scorer = ClipScorer(parse(ClipSettings, clip))
    pngs = sorted(read_pictures(store, report.pictures).items())
    samples = [Sample("", [{"kind": "a", "text": prompts[number]}], png) for (number, _), png in pngs]
    cosines = [row["clip_score"] for row in scorer.rows(samples)]
    assert report.scores["fid/clip_score"].value == pytest.approx(np.mean(cosines), abs=1e-6)


def test_what_is_missing_is_told_with_what_to_download(weights: Path, tmp_path: Path):
    with pytest.raises(SettingsError, match=r"download https://.*6726825d\.pth, .*and set `inception` to the file"):
        real(noise(tmp_path / "real", 2, 0), tmp_path / "none.pth").identity()
    with pytest.raises(SettingsError, match="there are no real pictures"):
        real(None, weights).identity()
    (tmp_path / "other.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"is no file of weights"):
        inception.Inception(tmp_path / "other.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "strange.pth")
    with pytest.raises(CheckpointError, match=r"does not fit torch-fidelity's Inception"):
        inception.Inception(tmp_path / "strange.pth")
