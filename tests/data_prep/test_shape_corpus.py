from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image as PilImage

from data_prep.images.decode import Decoded, decode
from data_prep.rejections import Rejection
from data_prep.shapes import corpus, world

COUNT, SEED, SIZE = 400, 7, 64


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, corpus.write_corpus(folder, COUNT, SEED, SIZE)


def fingerprints(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def scene_of(name: str) -> world.Scene:
    return world.sample_scene(random.Random(f"{SEED}/{int(Path(name).stem)}"))


def test_it_is_an_image_folder_and_a_table(written: tuple[Path, dict[str, list[str]]]) -> None:
    folder, by_kind = written
    table = pq.read_table(folder / "captions.parquet")
    captions = ["caption_short", "caption", "caption_long"]
    assert table.column_names == ["image", *captions, "task", "coloured", "licence", "source"]
    names = table["image"].to_pylist()
    assert len(names) == len(set(names)) == COUNT
    assert sorted(names) == sorted(name for kind in by_kind.values() for name in kind)
    assert {str(path.relative_to(folder)) for path in (folder / "images").iterdir()} == set(names)
    assert all(all(row.values()) for row in table.drop_columns(["coloured"]).to_pylist())
    uncoloured = table.filter(pc.invert(table["coloured"]))["image"].to_pylist()
    assert sorted(uncoloured) == sorted(by_kind["grey16"])


def test_a_few_percent_are_odd(written: tuple[Path, dict[str, list[str]]]) -> None:
    _, by_kind = written
    cycles = COUNT // corpus.CYCLE
    expected = {kind: times * cycles for kind, times in (corpus.GOOD | corpus.BAD).items()}
    expected["duplicate"] = corpus.DUPLICATES * cycles
    counts = Counter({kind: len(names) for kind, names in by_kind.items()})
    assert {kind: counts[kind] for kind in expected} == expected
    assert counts["plain"] == COUNT - sum(expected.values())
    assert 0.02 < (sum(corpus.BAD.values()) + corpus.DUPLICATES) / corpus.CYCLE < 0.05


@pytest.mark.parametrize("kind", ["plain", "rgb16", "cmyk", "rotated", "palette"])
def test_good_files_show_their_scene(written: tuple[Path, dict[str, list[str]]], kind: str) -> None:
    folder, by_kind = written
    for name in by_kind[kind][:20]:
        decoded = decode((folder / name).read_bytes())
        assert isinstance(decoded, Decoded), (name, decoded)
        difference = decoded.pixels.astype(int) - world.render(scene_of(name), SIZE)
        assert np.abs(difference).mean() < 1.5, name  # JPEG's loss; a picture turned or inverted is off by far more


def test_pictures_turned_by_exif_come_out_upright_from_every_side() -> None:
    scene = scene_of("5")
    orientations = set()
    for seed in range(20):
        data, _ = corpus.encode("rotated", scene, SIZE, random.Random(seed))
        orientations.add(PilImage.open(io.BytesIO(data)).getexif()[0x0112])
        decoded = decode(data)
        assert isinstance(decoded, Decoded)
        assert np.abs(decoded.pixels.astype(int) - world.render(scene, SIZE)).mean() < 1.5
    assert orientations == set(corpus.TURNS)


def test_a_grey_picture_is_captioned_without_colours(written: tuple[Path, dict[str, list[str]]]) -> None:
    folder, by_kind = written
    captions = {row["image"]: row for row in pq.read_table(folder / "captions.parquet").to_pylist()}
    for name in by_kind["grey16"]:
        decoded = decode((folder / name).read_bytes())
        assert isinstance(decoded, Decoded)
        assert np.ptp(decoded.pixels, axis=-1).max() == 0
        expected = world.render(scene_of(name), SIZE).min(axis=-1)
        assert np.abs(decoded.pixels[..., 0].astype(int) - expected).max() <= 1
        for column in ("caption_short", "caption", "caption_long"):
            assert not any(colour in captions[name][column] for colour in world.COLOURS)


def test_bad_files_are_bad_in_their_own_ways(written: tuple[Path, dict[str, list[str]]]) -> None:
    folder, by_kind = written
    causes = {"truncated": "truncated", "bomb": "too_many_pixels", "not_an_image": "unknown_format"}
    for kind, cause in causes.items():
        for name in by_kind[kind]:
            data = (folder / name).read_bytes()
            rejection = decode(data)
            assert isinstance(rejection, Rejection), name
            assert rejection.cause == cause, (name, rejection)
            assert len(data) < 10_000
    for name in by_kind["tiny"]:
        decoded = decode((folder / name).read_bytes())
        assert isinstance(decoded, Decoded)
        assert decoded.pixels.shape == (corpus.TINY, corpus.TINY, 3)


def test_duplicates_repeat_a_good_file_with_its_captions(written: tuple[Path, dict[str, list[str]]]) -> None:
    folder, by_kind = written
    rows = {row.pop("image"): row for row in pq.read_table(folder / "captions.parquet").to_pylist()}
    for name in by_kind["duplicate"]:
        path = folder / name
        (first,) = path.parent.glob(f"{int(path.stem) - 1:06d}.*")
        assert first.read_bytes() == path.read_bytes()
        assert f"images/{first.name}" in by_kind["plain"]
        assert rows[name] == rows[f"images/{first.name}"]


def test_bytes_depend_on_the_seed_and_the_index_alone(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    corpus.write_corpus(a, 60, SEED)
    corpus.write_corpus(b, 60, SEED)
    corpus.write_corpus(c, 90, SEED)
    assert fingerprints(a) == fingerprints(b)
    larger = fingerprints(c)
    assert all(larger[name] == digest for name, digest in fingerprints(a).items() if name.startswith("images/"))
    assert (
        pq.read_table(c / "captions.parquet").slice(0, 60).to_pylist()
        == pq.read_table(a / "captions.parquet").to_pylist()
    )
    other = tmp_path / "other"
    corpus.write_corpus(other, 60, SEED + 1)
    assert fingerprints(other) != fingerprints(a)
