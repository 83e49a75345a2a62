"""Folders that are their own table: listings that grow, classes, and names that are no text."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.rejections import Cause
from data_prep.sources import ImageNet, Input, Range, Source
from data_prep.sources.folders import LocalFolder, StoreFolder, text_of
from infra.config import parse
from infra.errors import SettingsError
from infra.store import Store, open_store
from tests.data_prep.test_sources import all_items, all_ranges, problem, said, text_folder

quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def image_net(folder: Path, **changes: Any) -> ImageNet:
    return parse(ImageNet, {"kind": "imagenet", "name": "s", "url": str(folder)} | changes)


# Suffixes that the world gives pictures, read by us or not.
NAMED = ("mpo", "apng", "dib", "avifs", "j2k", "tga", "psd", "heif", "jp2", "j2c", "jpx", "ico", "ppm", "qoi", "exr")


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.jpg").write_bytes(b"image")
        (folder / f"{name}.txt").write_text(text)


def planned(store: Store, source: Source, found: list[Input]) -> list[Range]:
    return [part for each in found for part in source.ranges(store, each, 2)]


def test_a_folder_that_grows_keeps_what_was_planned(folder: Path, store: Store) -> None:
    source = text_folder(folder)
    write(folder, b="bee", d="dee")
    first = source.inputs(store)
    parts = planned(store, source, first)
    before = [list(source.items(store, part)) for part in parts]
    assert source.inputs(store, parts) == first
    write(folder, a="ay", c="see", e="ee")
    second = source.inputs(store, parts)
    assert second[0] == first[0] and len(second) == 2
    more = planned(store, source, second[1:])
    assert [list(source.items(store, part)) for part in parts] == before
    names = [[item.name for item in source.items(store, part)] for part in parts + more]
    assert names == [["b.jpg", "d.jpg"], ["a.jpg", "c.jpg"], ["e.jpg"]]
    write(folder, f="eff")
    third = source.inputs(store, parts + more)
    assert third[:2] == second and third[2].size == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "b.jpg").unlink(),
        lambda folder: (folder / "b.jpg").write_bytes(b"another size"),
        lambda folder: (folder / "b.txt").write_text("bat"),
        lambda folder: (folder / "b.txt").unlink(),
        lambda folder: (folder / "b.jpg").rename(folder / "z.jpg"),
    ],
)
def test_of_a_folder_that_changed_only_the_listings_that_did_are_others(
    folder: Path, store: Store, change: Callable[[Path], object]
) -> None:
    source = text_folder(folder)
    write(folder, a="ay", b="bee", c="see")
    parts = planned(store, source, source.inputs(store))
    write(folder, d="dee")
    [_, later] = source.inputs(store, parts)
    change(folder)
    found = source.inputs(store, parts + planned(store, source, [later]))
    assert found[0] == later and len(found) == 2
    items = [item for part in planned(store, source, found) for item in source.items(store, part)]
    assert sorted(item.name for item in items) == sorted(path.name for path in folder.glob("*.jpg"))


LISTED = st.dictionaries(
    st.sampled_from([f"{a}{b}" for a in ("", "a/", "a-/", "a/b/") for b in "abcd"]), st.integers(0, 3)
)


@settings(quick, max_examples=20)
@given(steps=st.lists(LISTED, min_size=1, max_size=4), most=st.sampled_from([2, 5, 100]))
def test_any_growth(tmp_path: Path, steps: list[dict[str, int]], most: int) -> None:
    """Whatever comes or changes: the inputs together are the folder, and what was planned comes back as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.sources.listed.LISTED", most)
        grow(tmp_path, steps)


def grow(tmp_path: Path, steps: list[dict[str, int]]) -> None:
    root, store = tmp_path / "growing", open_store(str(tmp_path / "store"))
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    source = text_folder(root, caption_suffix="")
    known: dict[str, int] = {}
    before: list[Input] = []
    parts: list[Range] = []
    for step in steps:
        changed = any(known.get(name, size) != size for name, size in step.items())
        known |= step
        for name, size in step.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{name}.jpg").write_bytes(bytes(size))
        found = source.inputs(store, parts)
        if not changed and before and parts:
            assert found[: len(before)] == before
        now = planned(store, source, found)
        items = [item for part in now for item in source.items(store, part)]
        assert {item.name: item.image for item in items} == {f"{name}.jpg": bytes(size) for name, size in known.items()}
        assert len(items) == len(known)
        parts += [part for part in now if part not in parts]
        before = [one for one in found if one.size]


def test_identities_are_told_without_a_store(folder: Path, store: Store) -> None:
    write(folder, a="ay")
    plain, stored = text_folder(folder).inputs()[0], text_folder(folder).inputs(store)[0]
    assert plain[:3] == stored[:3] and not plain.table and store.exists(stored.table)


def test_every_folder_is_listed_in_one_order(folder: Path) -> None:
    for name in (
        "a/b.jpg",
        "a-b.jpg",
        "a.jpg",
        "a/b/c.jpg",
        "B.jpg",
        "é.jpg",
        "a0/x.jpg",
        "\U0001f600.jpg",
        "\uffff.jpg",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    here = [name for name, *_ in LocalFolder(folder).names()]
    assert here == [name for name, *_ in StoreFolder(open_store(str(folder))).names()] == sorted(here)
    os.mkdir(os.fsencode(folder) + b"/b\xff")
    (folder / "b\udcff" / "x.jpg").write_bytes(b"x")
    names = [text_of(name) for name, *_ in LocalFolder(folder).names()]
    assert names == sorted(names) and "b\\xff/x.jpg" in names


def test_a_folder_that_may_not_be_read_is_refused(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "closed").mkdir()
    write(folder, a="ay")
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    items = all_items(store, text_folder(folder))
    assert {item.name: problem(item) for item in items} == {"a.jpg": None, "closed": Cause.UNREADABLE}


def test_a_link_to_a_folder_is_refused_and_what_it_leads_to_is_met_once(
    folder: Path, store: Store, tmp_path: Path
) -> None:
    (folder / "deep").mkdir()
    write(folder / "deep", a="ay")
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", b="bee")
    for name, target in {"again": "deep", "deep/up": "..", "loop": "loop", "none": "nothing"}.items():
        (folder / name).symlink_to(target)
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "alias.jpg").symlink_to("a.jpg")
    items = all_items(store, text_folder(folder, caption_suffix=""))
    assert {item.name: problem(item) for item in items} == {
        "again": Cause.UNREADABLE,
        "deep/a.jpg": None,
        "deep/alias.jpg": None,
        "deep/up": Cause.UNREADABLE,
        "out": Cause.OUTSIDE_FOLDER,
    }
    assert len(items) == 5
    assert len(all_items(store, image_net(folder))) == 5


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "heic", "jxl", "svg", "HEIC", *NAMED])
def test_pictures_of_kinds_that_cannot_be_read_are_counted(folder: Path, store: Store, suffix: str) -> None:
    (folder / "cat").mkdir()
    (folder / "cat" / f"a.{suffix}").write_bytes(b"?")
    (folder / "cat" / "a.txt").write_text("a cat")
    for source in (text_folder(folder), image_net(folder)):
        assert [(item.name, item.image) for item in all_items(store, source)] == [(f"cat/a.{suffix}", b"?")]


def test_a_text_beside_an_image_may_be_in_upper_case(folder: Path, store: Store) -> None:
    for name, text in {"5.TXT": "five", "6.txt": "six", "6.TXT": "SIX", "7.TXT": "bell\x07"}.items():
        (folder / name).write_text(text)
        (folder / f"{name[0]}.JPG").write_bytes(b"image")
    items = all_items(store, text_folder(folder))
    assert [(problem(item), said(item)) for item in items] == [
        (None, [("caption", "five")]),
        (None, [("caption", "six")]),
        (Cause.BAD_CAPTION, []),
    ]
    first = text_folder(folder).inputs()
    (folder / "5.TXT").write_text("FIVE")
    assert text_folder(folder).inputs() != first, "it is part of the listing"


def test_a_mark_of_the_byte_order_is_no_part_of_what_is_said(folder: Path, store: Store) -> None:
    classes(folder, "0")
    (folder / "0" / "1.txt").write_bytes(b"\xef\xbb\xbf a shark\n")
    assert [said(item) for item in all_items(store, text_folder(folder))] == [[("caption", "a shark")]]
    (folder / "0" / "1.txt").write_bytes(b"\xef\xbb\xbf\n")
    assert [problem(item) for item in all_items(store, text_folder(folder))] == [Cause.NO_CAPTION]
    (folder / "names.txt").write_bytes(b"\xef\xbb\xbf0 shark\n")
    items = all_items(store, image_net(folder, classes="names.txt", template="{name}"))
    assert [said(item) for item in items] == [[("caption", "shark")]]


def test_a_name_that_is_no_text_is_not_taken_for_another(folder: Path, store: Store) -> None:
    (folder / "bad-\udcff.jpg").write_bytes(b"x")
    (folder / "bad-\\xff.jpg").write_bytes(b"x")
    items = all_items(store, text_folder(folder, caption_suffix=""))
    assert [item.name for item in items] == ["bad-\\xff.jpg"] * 2
    assert {problem(item) for item in items} == {None, Cause.BAD_NAME}
    assert len({item.key for item in items}) == 2


def test_deep_folders(folder: Path, store: Store) -> None:
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("a.jpg").write_bytes(b"x")
    finally:
        os.chdir(here)
    try:
        items = all_items(store, text_folder(folder, caption_suffix=""))
        assert [item.image for item in items] == [b"x"]
    finally:
        subprocess.run(["rm", "-rf", str(folder / "d")], check=True)  # deeper than Python's own rmtree can go


# ImageNet


def classes(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "1.JPEG").write_bytes(name.encode())


def labels(store: Store, source: ImageNet) -> dict[str, tuple[int, list[tuple[str, str]]]]:
    return {item.name: (item.kept["label"], said(item)) for item in all_items(store, source)}


def test_classes_by_their_folders_names(folder: Path, store: Store) -> None:
    classes(folder, "golden_retriever", "cat", "cat-2", "dog/deep")
    source = image_net(folder)
    assert labels(store, source) == {
        "cat-2/1.JPEG": (1, [("caption", "a photo of a cat-2")]),
        "cat/1.JPEG": (0, [("caption", "a photo of a cat")]),
        "dog/deep/1.JPEG": (2, [("caption", "a photo of a dog")]),
        "golden_retriever/1.JPEG": (3, [("caption", "a photo of a golden retriever")]),
    }
    part = all_ranges(store, source)[0]
    assert source.kept_fields(store, part) == [pa.field("label", pa.int32())]


def test_class_names_from_a_synset_mapping(folder: Path, store: Store, tmp_path: Path) -> None:
    classes(folder, "n01440764", "n01443537")
    mapping = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\nn99999999 not here\n"
    for where, place in [("map.txt", folder / "map.txt"), (str(tmp_path / "m.txt"), tmp_path / "m.txt")]:
        place.write_text(mapping)
        found = labels(store, image_net(folder, classes=where, template="{name} ({names})"))
        assert found == {
            "n01440764/1.JPEG": (0, [("caption", "tench (tench, Tinca tinca)")]),
            "n01443537/1.JPEG": (1, [("caption", "goldfish (goldfish, Carassius auratus)")]),
        }


def test_class_names_in_the_order_of_the_folders(folder: Path, store: Store) -> None:
    classes(folder, "0", "1")
    (folder / "names.txt").write_text("great white shark\nhen\n\n")
    found = labels(store, image_net(folder, classes="names.txt", template="a {name}"))
    assert [caption for _, caption in found.values()] == [[("caption", "a great white shark")], [("caption", "a hen")]]
    (folder / "names.txt").write_text("shark\n")
    with pytest.raises(SettingsError, match="the folder 0"):
        image_net(folder, classes="names.txt").inputs()
    with pytest.raises(SettingsError, match="a template has"):
        image_net(folder, template="a photo")


def test_images_in_no_class_are_refused(folder: Path, store: Store, tmp_path: Path) -> None:
    classes(folder, "cat")
    (folder / "loose.jpg").write_bytes(b"x")
    (folder / "out").symlink_to(tmp_path)
    found = {item.name: (problem(item), item.kept) for item in all_items(store, image_net(folder))}
    assert found == {
        "cat/1.JPEG": (None, {"label": 0}),
        "loose.jpg": (Cause.NO_CAPTION, {"label": None}),
        "out": (Cause.OUTSIDE_FOLDER, {"label": None}),
    }


def test_a_class_that_comes_moves_the_labels_behind_it(folder: Path, store: Store) -> None:
    classes(folder, "b", "c")
    source = image_net(folder)
    first = source.inputs(store)
    parts = planned(store, source, first)
    classes(folder, "d")
    assert source.inputs(store, parts)[0] == first[0]
    classes(folder, "a")
    found = source.inputs(store, parts)
    assert len(found) == 1 and found[0].size == 4
    named = image_net(folder, template="{names}").inputs(store)
    (folder / "names.txt").write_text("1\n2\n3\n4")
    assert image_net(folder, classes="names.txt", template="{names}").inputs(store) != named


def test_after_a_removal_growth_is_small_again(folder: Path, store: Store) -> None:
    for number in range(6):
        (folder / f"{number}.png").write_bytes(b"x" * number)
    source = text_folder(folder, caption_suffix="")
    parts = planned(store, source, source.inputs(store))
    (folder / "3.png").unlink()
    [rest] = source.inputs(store, parts)
    assert rest.size == 5
    parts += planned(store, source, [rest])
    (folder / "6.png").write_bytes(b"new")
    assert [found.size for found in source.inputs(store, parts)] == [5, 1]
