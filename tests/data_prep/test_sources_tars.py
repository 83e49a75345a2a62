"""Tars: which members make a sample, ranges that part them exactly, and everything that a hostile tar can hold."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from data_prep.images.decode import decode
from data_prep.rejections import Cause, Rejection
from data_prep.sources import Bytes, RawItem, WebDataset, folders
from data_prep.sources.tars import IMAGE_EXTENSIONS
from data_prep.upkeep.gc import collect
from infra.config import parse
from infra.errors import DataError, SettingsError
from infra.shards import SPLIT_DIGITS
from infra.store import FileStore, Store, open_store
from tests.data_prep.test_sources import all_items, all_ranges, problem, said
from tests.data_prep.test_sources_listings import NAMED
from tests.data_prep.test_sources_packed import PACKERS

quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def web_dataset(folder: Path, **changes: Any) -> WebDataset:
    return parse(WebDataset, {"kind": "webdataset", "name": "s", "url": str(folder)} | changes)


def member(name: str, data: bytes = b"", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in changes.items():
        setattr(info, field, value)
    return info, data


def tar_bytes(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pairs(*names: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [
        each for name in names for each in (member(f"{name}.jpg", b"I" + name.encode()), member(f"{name}.txt", b"t"))
    ]


def outcome(items: list[RawItem]) -> dict[str, Cause | None]:
    assert [item.row for item in items] == list(range(len(items)))
    assert len({item.key for item in items}) == len(items)
    return {item.name: problem(item) for item in items}


def test_a_hubs_tar(folder: Path, store: Store) -> None:
    """BLIP3o-60k's pairs of jpg and txt, JourneyDB's of jpg and json, in one tar."""
    data = {"prompt": "a cat", "Task2": {"Caption": "One cat.", "QA": [{"a": "x"}, {"a": "yes"}]}, "score": 0.5, "n": 3}
    members = [
        member("README.md", b"hello"),
        member("./00/a.jpg", b"A"),
        member("./00/a.txt", b" an a \n"),
        member("./00/b.PNG", b"B"),
        member("./00/b.json", json.dumps(data).encode()),
        member("./00/b.cls", b"7"),
        member("./00/c.txt", b"no image"),
    ]
    (folder / "00.tar").write_bytes(tar_bytes(*members))
    source = web_dataset(
        folder,
        captions=["txt", "json.prompt", "json.Task2.Caption", "json.Task2.QA.1.a"],
        keep={"score": "float", "n": "float", "nothing": "text", "deep": "text"},
        fields={"deep": "Task2.Caption"},
        licence="CC0",
        origin="a hub",
    )
    items = all_items(store, source)
    assert outcome(items) == {"00.tar/./00/a.jpg": None, "00.tar/./00/b.png": None}
    assert [item.image for item in items] == [b"A", b"B"]
    assert said(items[0]) == [("txt", "an a")]
    assert said(items[1]) == [("prompt", "a cat"), ("Task2.Caption", "One cat."), ("Task2.QA.1.a", "yes")]
    assert items[0].kept == {"score": None, "n": None, "nothing": None, "deep": None}
    assert items[1].kept == {"score": 0.5, "n": 3.0, "nothing": None, "deep": "One cat."}
    assert {(item.licence, item.origin) for item in items} == {("CC0", "a hub")}


def test_values_of_another_type_become_null(folder: Path, store: Store) -> None:
    keep = {"i": "int", "f": "float", "t": "text", "b": "bool"}
    values = [1, 2.5, "x", True, None, [1], {"a": 1}, 2**63, 10**400, "\ud800", float("nan")]
    members = [
        each
        for number, value in enumerate(values)
        for each in (
            member(f"{number}.jpg", b"I"),
            member(f"{number}.json", json.dumps(dict.fromkeys(keep, value)).encode()),
        )
    ]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    source = web_dataset(folder, captions=[], keep=keep)
    part = all_ranges(store, source)[0]
    items = all_items(store, source)
    assert not any(map(problem, items))
    kept = {column: [item.kept[column] for item in items] for column in keep}
    fields = source.kept_fields(store, part)
    for field in fields:
        pa.array(kept[field.name], field.type)
    assert kept["i"][:10] == [1, *[None] * 9]
    assert kept["f"][:10] == [1.0, 2.5, None, None, None, None, None, float(2**63), None, None]
    assert kept["t"] == [None, None, "x", *[None] * 6, "?", None]
    assert kept["b"] == [None, None, None, True, *[None] * 7]


def test_licence_and_origin_of_the_sample(folder: Path, store: Store) -> None:
    own = [{"url": "https://a.example/1", "l": "MIT"}, {"url": 3, "l": None}, {}]
    members = [
        each
        for number, value in enumerate(own)
        for each in (member(f"{number}.jpg", b"I"), member(f"{number}.json", json.dumps(value).encode()))
    ]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    source = web_dataset(folder, captions=[], licence="CC0", origin="hub", licence_field="l", origin_field="url")
    items = all_items(store, source)
    assert [(item.licence, item.origin) for item in items] == [("MIT", "https://a.example/1"), *[("CC0", "hub")] * 2]


def test_what_webdataset_writes_is_read(folder: Path, store: Store) -> None:
    long = "folder/" * 30 + "é" * 40
    with webdataset.ShardWriter(str(folder / "%03d.tar"), maxcount=3, verbose=0) as writer:
        for number in range(7):
            name = f"{long}{number}" if number % 2 else f"{number:05d}"
            writer.write({"__key__": name, "jpg": b"I%d" % number, "txt": f"no {number}", "json": {"n": number}})
    items = all_items(store, web_dataset(folder, captions=["txt"], keep={"n": "int"}))
    assert [item.image for item in items] == [b"I%d" % number for number in range(7)]
    assert [said(item) for item in items] == [[("txt", f"no {number}")] for number in range(7)]
    assert [item.kept["n"] for item in items] == list(range(7))
    assert [item.row for item in items] == [0, 1, 2, 0, 1, 2, 0]


def test_names_with_dots_are_samples_of_their_own(folder: Path, store: Store) -> None:
    members = [
        *pairs("photo.v2", "photo.v3"),
        member("a.depth.png", b"not the image"),
        member("a.jpg", b"the image"),
        member("a.txt", b"said"),
    ]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    items = all_items(store, web_dataset(folder))
    assert outcome(items) == dict.fromkeys(["t.tar/photo.v2.jpg", "t.tar/photo.v3.jpg", "t.tar/a.jpg"])
    assert [item.image for item in items] == [b"Iphoto.v2", b"Iphoto.v3", b"the image"]
    assert [said(item) for item in items] == [[("txt", "t")], [("txt", "t")], [("txt", "said")]]


def test_the_image_is_the_one_that_the_settings_name(folder: Path, store: Store) -> None:
    members = [
        member("a.left.jpg", b"L"),
        member("a.right.jpg", b"R"),
        member("b.right.jpg", b"R"),
        member("c.txt", b"x"),
    ]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    items = all_items(store, web_dataset(folder, captions=[], images=["left.jpg"]))
    assert outcome(items) == {"t.tar/a.left.jpg": None, "t.tar/b.left.jpg": Cause.MISSING}


def test_pictures_of_kinds_that_cannot_be_read_are_counted(folder: Path, store: Store) -> None:
    kinds = ("heic", "jxl", "svg", "JFIF", "jpe", *NAMED)
    (folder / "t.tar").write_bytes(tar_bytes(*(member(f"{n}.{kind}", b"?") for n, kind in enumerate(kinds))))
    items = all_items(store, web_dataset(folder, captions=[]))
    assert [item.image for item in items] == [b"?"] * len(kinds)
    for data in (b"<svg/>", b"\0\0\0\x18ftypheic", b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x0a"):
        found = decode(data)
        assert isinstance(found, Rejection) and found.cause is Cause.UNSUPPORTED
    found = decode(b"?")
    assert isinstance(found, Rejection) and found.cause is Cause.UNKNOWN_FORMAT


def test_a_disk_that_fails_is_what_is_told(folder: Path, store: Store) -> None:
    """A process's memory is a file that cannot be read at its start, whoever asks."""
    (folder / "t.tar").write_bytes(tar_bytes(*pairs("a")))
    part = all_ranges(store, web_dataset(folder))[0]
    with pytest.raises(DataError, match=r"/proc/self/mem cannot be read \("):
        list(web_dataset(folder).items(store, part._replace(input="/proc/self/mem")))


def test_a_name_that_comes_again_is_another_sample(folder: Path, store: Store) -> None:
    (folder / "t.tar").write_bytes(tar_bytes(*pairs("a", "a", "b", "a")))
    items = all_items(store, web_dataset(folder))
    assert [item.image for item in items] == [b"Ia", b"Ia", b"Ib", b"Ia"]
    assert len({item.key for item in items}) == 4
    assert len({item.key[:SPLIT_DIGITS] for item in items}) == 2
    alone = {item.key for item in items[:1]}
    (folder / "t.tar").write_bytes(tar_bytes(*pairs("b", "a")))
    assert {all_items(store, web_dataset(folder))[1].key} == alone  # by its name, wherever it stands


def test_files_of_a_mac_do_not_part_a_sample(folder: Path, store: Store) -> None:
    names = ["x/._a.json", "x/a.json", "x/._a.jpg", "x/a.jpg", "x/._b.jpg", "x/b.jpg", "x/.b.json", "x/b.json"]
    members = [member(name, b'{"c": "said"}' if "json" in name else b"I") for name in names]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    items = all_items(store, web_dataset(folder, captions=["json.c"]))
    assert outcome(items) == {
        "t.tar/x/a.jpg": None,
        "t.tar/x/._a.jpg": Cause.BAD_NAME,
        "t.tar/x/._b.jpg": Cause.BAD_NAME,
        "t.tar/x/b.jpg": None,
    }


# Hostile tars


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_that_are_not_plain_files_with_plain_names(folder: Path, store: Store, form: int) -> None:
    link: dict[str, Any] = {"linkname": "/etc/passwd"}
    odd = [
        (member("sym.jpg", type=tarfile.SYMTYPE, **link), Cause.UNREADABLE),
        (member("hard.jpg", type=tarfile.LNKTYPE, **link), Cause.UNREADABLE),
        (member("dev.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5), Cause.UNREADABLE),
        (member("blk.jpg", type=tarfile.BLKTYPE), Cause.UNREADABLE),
        (member("pipe.jpg", type=tarfile.FIFOTYPE), Cause.UNREADABLE),
        (member("/abs.jpg", b"I"), Cause.OUTSIDE_FOLDER),
        (member("../up.jpg", b"I"), Cause.OUTSIDE_FOLDER),
        (member("a/../../up.jpg", b"I"), Cause.OUTSIDE_FOLDER),
        (member("bad-\udcff.jpg", b"I"), Cause.BAD_NAME),
        (member("x" * 9000 + ".jpg", b"I"), Cause.BAD_NAME),
        (member("/" * 3000 + "a.jpg", b"I"), Cause.OUTSIDE_FOLDER),
        (member(".jpg", b"I"), Cause.BAD_NAME),
        (member("large.jpg", b"I" * 1001), Cause.TOO_MANY_BYTES),
        (member("odd.jpg", b"I", type=b"Z"), None),
        (member("old.jpg", b"I", type=tarfile.CONTTYPE), None),
    ]
    between = [each for number, (bad, _) in enumerate(odd) for each in (bad, *pairs(f"good{number}"))]
    folders_ = [member("dir.jpg", type=tarfile.DIRTYPE), member("dir.png/", type=tarfile.DIRTYPE)]
    (folder / "t.tar").write_bytes(tar_bytes(*folders_, *between, form=form))
    items = all_items(store, web_dataset(folder, captions=[], max_bytes=1000))
    outcome(items)
    assert [problem(item) for item in items if "good" not in item.name] == [cause for _, cause in odd]
    assert [item.image for item in items if "good" in item.name] == [b"Igood%d" % n for n in range(len(odd))]


def test_odd_sidecars_are_bad_captions_and_bad_metadata(folder: Path, store: Store) -> None:
    captions = [
        (member("sym.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd"), Cause.BAD_CAPTION),
        (member("a.txt", b"\xff"), Cause.BAD_CAPTION),
        (member("b.txt", b"bell\x07"), Cause.BAD_CAPTION),
        (member("c.txt", b"x" * 1_000_000), Cause.BAD_CAPTION),
        (member("d.txt", b" \n"), Cause.NO_CAPTION),
        (member("e.json", b"{"), Cause.BAD_METADATA),
        (member("f.json", b"[1]"), Cause.BAD_METADATA),
        (member("g.json", b'{"c":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), Cause.BAD_METADATA),
        (member("h.json", b'{"c": "' + b"x" * (2 << 20) + b'"}'), Cause.BAD_METADATA),
        (member("i.json", b"\xff\xfe\xff"), Cause.BAD_METADATA),
        (member("j.json", b'{"c": ' + b"9" * 10_000 + b"}"), Cause.BAD_METADATA),
        (member("k.json", b'{"c": {"not": "text"}}'), Cause.BAD_CAPTION),
        (member("l.json", b'{"c": 5}'), Cause.BAD_CAPTION),
        (member("m.json", b'{"c": "\\ud800"}'), Cause.BAD_CAPTION),
        (member("n.json", b'{"d": "another field"}'), Cause.NO_CAPTION),
        (member("o.json", type=tarfile.LNKTYPE, linkname="e.json"), Cause.BAD_METADATA),
        (member("p.json", b'{"c": ["one", null, "two"]}'), None),
    ]
    members = [each for bad, _ in captions for each in (member(f"{bad[0].name.partition('.')[0]}.jpg", b"I"), bad)]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    items = all_items(store, web_dataset(folder, captions=["txt", "json.c"]))
    assert list(outcome(items).values()) == [cause for _, cause in captions]
    assert said(items[-1]) == [("c", "one"), ("c", "two")]
    assert all(not item.captions for item in items[:-1])


def header(name: str = "a.jpg", size: int = 0, **changes: Any) -> bytes:
    return member(name, b"", **changes | {"size": size})[0].tobuf(tarfile.GNU_FORMAT)


def pax(size: int | None = None, data: bytes = b"", kind: bytes = tarfile.XHDTYPE) -> bytes:
    data = data + bytes(-len(data) % 512)
    return header("././@PaxHeader", len(data) if size is None else size, type=kind) + data


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


GOOD = tar_bytes(*pairs("good"))[:2048]  # two members and no end

ENDS: dict[str, tuple[bytes, Cause]] = {
    "half a header": (header()[:300], Cause.TRUNCATED),
    "wrong checksum": (b"b" + header()[1:], Cause.CORRUPT),
    "no header at all": (b"x" * 512, Cause.CORRUPT),
    "half its data": (header(size=2000) + b"I" * 1000, Cause.TRUNCATED),
    "a terabyte": (header(size=2**40) + b"I" * 512, Cause.TRUNCATED),
    "a negative size": (header(size=-512), Cause.CORRUPT),
    "more behind the end": (bytes(1024) + header(), Cause.CORRUPT),
    "a lone block of zeros": (bytes(512) + header(), Cause.CORRUPT),
    "an endless pax header": (pax(2**33), Cause.CORRUPT),
    "a large pax header": (pax(data=record(b"comment", b"x" * (1 << 20))), Cause.CORRUPT),
    "a long pax header that is cut off": (pax(900_000, b"x" * 512), Cause.TRUNCATED),
    "an endless long name": (pax(2**33, kind=tarfile.GNUTYPE_LONGNAME), Cause.CORRUPT),
    "nothing but headers": (pax(data=record(b"path", b"a")) * 2000, Cause.CORRUPT),
    "a pax header that is none": (pax(data=b"8 path=a\n") + header(), Cause.CORRUPT),
    "a record of no length": (pax(data=b"0 path=a\n") + header(), Cause.CORRUPT),
    "a record of huge length": (pax(data=b"9" * 400 + b" path=a\n") + header(), Cause.CORRUPT),
    "a size that is none": (pax(data=record(b"size", b"-5")) + header(), Cause.CORRUPT),
    "a pax size past the end": (pax(data=record(b"size", b"99999999")) + header(), Cause.TRUNCATED),
    "a pax header without a member": (pax(data=record(b"path", b"a.jpg")), Cause.TRUNCATED),
    "an endless map": ((header(type=b"S")[:482] + b"\1" + header(type=b"S")[483:]), Cause.CORRUPT),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("before", [b"", GOOD], ids=["at once", "later"])
def test_an_archive_that_breaks_off_is_read_up_to_there(folder: Path, store: Store, end: str, before: bytes) -> None:
    data, cause = ENDS[end]
    (folder / "t.tar").write_bytes(before + data)
    items = all_items(store, web_dataset(folder))
    good = {"t.tar/good.jpg": None} if before else {}
    assert outcome(items) == good | {"t.tar": cause}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", {"t.tar": Cause.EMPTY}),
        (bytes(10240), {}),
        (tar_bytes(), {}),
        (GOOD, {"t.tar/good.jpg": None}),  # whoever wrote it left out the end, as some do
        (GOOD[:1024], {"t.tar/good.jpg": Cause.NO_CAPTION}),
        (GOOD + bytes(100), {"t.tar/good.jpg": None}),
        (b"\x1f\x8b" + bytes(1000), {"t.tar": Cause.UNKNOWN_FORMAT}),
        (pax(data=record(b"path", b"b.jpg")) + header(), {"t.tar/b.jpg": Cause.NO_CAPTION}),
        (pax(data=record(b"path", b"b\0.jpg")) + header(), {"t.tar/b\0.jpg": Cause.BAD_NAME}),
        (pax(data=record(b"path", b"b.jpg"), kind=tarfile.XGLTYPE) + header(), {"t.tar/a.jpg": Cause.NO_CAPTION}),
        (pax(data=record(b"size", b"5")) + header() + b"II" + bytes(510), {"t.tar/a.jpg": Cause.NO_CAPTION}),
        (pax(data=record(b"GNU.sparse.major", b"1")) + header(), {"t.tar/a.jpg": Cause.UNREADABLE}),
        (header(type=b"S"), {"t.tar/a.jpg": Cause.UNREADABLE}),
    ],
)
def test_ends_and_headers_that_are_right(folder: Path, store: Store, data: bytes, expected: dict[str, Any]) -> None:
    (folder / "t.tar").write_bytes(data)
    assert outcome(all_items(store, web_dataset(folder))) == expected


def test_one_sample_of_many_members_does_not_fill_the_memory(folder: Path, store: Store) -> None:
    members = [member(f"a.{number}.jpg", b"I%d" % number) for number in range(1000)]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    items = all_items(store, web_dataset(folder, captions=[]))
    outcome(items)
    assert [item.image for item in items] == [data for _, data in members]


@quick
@given(data=st.data())
def test_no_damage_is_an_exception(tmp_path: Path, data: st.DataObject) -> None:
    """Flipped bits, cuts and doubled stretches: every item has its row, and what stands before the damage is there."""
    whole = bytearray(tar_bytes(*pairs(*"abcdef"), member("x" * 150 + ".jpg", b"I"), *pairs("g")))
    place = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "noise"]))
    if how == "flip":
        whole[place] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del whole[place:]
    elif how == "insert":
        whole[place:place] = whole[: data.draw(st.integers(1, 2000))]
    else:
        whole[place : place + 600] = data.draw(st.binary(min_size=600, max_size=600))
    (tmp_path / "fuzz").mkdir(exist_ok=True)
    (tmp_path / "fuzz" / "t.tar").write_bytes(whole)
    source = web_dataset(tmp_path / "fuzz")
    store = open_store(str(tmp_path / "store"))
    items = all_items(store, source)
    assert [item.row for item in items] == list(range(len(items)))
    assert len({item.key for item in items}) == len(items)
    before = place // 2048  # whole pairs, of four blocks each
    assert [item.image for item in items[:before]][:6] == [b"I" + name.encode() for name in "abcdef"][:before]
    cut = all_ranges(store, source, 2)
    assert [item for part in cut for item in source.items(store, part)] == items


# What is no tar, or a packed one

PACKED = [".tar.gz", ".tgz", ".tar.bz2", ".tar.zst", ".tar"]
UNPACKED = tar_bytes(*pairs("a", "b"), member("c.jpg", b"I" * 30_000), *pairs(*(f"d{number}" for number in range(40))))


def packed(folder: Path, name: str, data: bytes = UNPACKED) -> WebDataset:
    """A source of a tar of this name, packed as its name says, or, where it says nothing, by gzip."""
    pack = PACKERS.get(f".{name.rpartition('.')[2]}", PACKERS[".gz"])
    (folder / name).write_bytes(pack(data))
    return web_dataset(folder, tars=[name], unpack=True)


def without_tar(items: list[RawItem]) -> list[tuple[Any, ...]]:
    return [(item.row, item.name.partition("/")[2], item.image, item.captions) for item in items]


@pytest.mark.parametrize("ending", PACKED)
def test_a_packed_tar_is_unpacked_once_into_the_store(folder: Path, store: Store, ending: str) -> None:
    (folder / "plain.tar").write_bytes(UNPACKED)
    expected = all_items(store, web_dataset(folder, tars=["plain.tar"], captions=[]))
    source = packed(folder, f"a{ending}").model_copy(update={"captions": []})
    items = all_items(store, source, 5)
    assert without_tar(items) == without_tar(expected) and len(items) == 43
    assert len(all_ranges(store, source, 5)) > 1
    [record] = [entry.key for entry in store.list("unpacked/")]
    [made] = list(store.list("data/unpacked/"))
    assert store.get(made.key) == UNPACKED
    before = {entry.key: entry.modified for entry in store.list("data/unpacked/")}
    assert all_items(store, source, 5) == items
    assert {entry.key: entry.modified for entry in store.list("data/unpacked/")} == before, "it is not unpacked again"
    assert not collect(store, 0).orphans
    store.delete(made.key)
    with pytest.raises(DataError, match=r"was unpacked to is gone .*delete .*unpacked/"):
        list(source.items(store, Bytes(f"a{ending}", f"a{ending}", False, 0, 100)))
    assert all_items(store, source, 5) == items, "whoever plans it has it again"
    store.delete(record)
    with pytest.raises(DataError, match="has changed since it was planned"):
        list(source.items(store, Bytes(f"a{ending}", f"a{ending}", False, 0, 100)))


def test_whoever_asks_for_unpacking_later_gets_it(folder: Path, store: Store) -> None:
    source = packed(folder, "a.tar.gz")
    refused = source.model_copy(update={"unpack": False})
    [item] = all_items(store, refused)
    why = "packed with gzip: set the source's `unpack`, as a tar is read from any place"
    assert item.image == Rejection(Cause.UNKNOWN_FORMAT, why)
    assert refused.inputs() != source.inputs(), "it is another input"
    assert source.results() == refused.results(), "in the same plan"
    (folder / "plain.tar").write_bytes(UNPACKED)
    plain = web_dataset(folder, tars=["plain.tar"])
    assert plain.inputs() == plain.model_copy(update={"unpack": True}).inputs()


@pytest.mark.parametrize("ending", [".tar.gz", ".tar.bz2", ".tar.zst"])
def test_a_packed_tar_that_breaks_off_is_read_up_to_there(folder: Path, store: Store, ending: str) -> None:
    noise = [member(f"{number}.jpg", os.urandom(700)) for number in range(400)]
    source = packed(folder, f"a{ending}", tar_bytes(*noise)).model_copy(update={"captions": []})
    whole = all_items(store, source)
    data = (folder / f"a{ending}").read_bytes()
    for cut in (len(data) // 2, len(data) - 3):
        (folder / f"a{ending}").write_bytes(data[:cut])
        items = all_items(store, source)
        assert items[:-1] == whole[: len(items) - 1]
        assert items[-1].name == f"a{ending}" and problem(items[-1]) in (Cause.TRUNCATED, Cause.CORRUPT)


@quick
@given(cut=st.integers(1, len(UNPACKED) - 1))
def test_no_member_of_a_broken_packed_tar_is_half_there(tmp_path: Path, cut: int) -> None:
    """Wherever the packing breaks off: also within a member's last block, and just between two of them."""
    folder = tmp_path / "packed"
    folder.mkdir(exist_ok=True)
    store = open_store(str(tmp_path / "store"))
    source = packed(folder, "a.tar.gz").model_copy(update={"captions": []})
    (folder / "a.tar.gz").write_bytes(gzip.compress(UNPACKED[:cut], 0)[:-8])  # without what ends it
    items = all_items(store, source)
    assert items[-1].name == "a.tar.gz" and problem(items[-1]) in (Cause.TRUNCATED, Cause.CORRUPT)
    whole = {f"a.tar.gz/{name}.jpg": b"I" + name.encode() for name in ("a", "b", *(f"d{n}" for n in range(40)))}
    whole["a.tar.gz/c.jpg"] = b"I" * 30_000
    assert {item.name: item.image for item in items[:-1]}.items() <= whole.items()


def test_a_packed_bomb_is_left_where_it_goes_off(folder: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.packed.IN_ANY_CASE", 1 << 20)
    source = packed(folder, "a.tar.gz", UNPACKED[: _end(UNPACKED)] + header("b.png", 1 << 33))
    with (folder / "a.tar.gz").open("ab") as file:
        file.write(gzip.compress(bytes(1 << 20)) * 5000)
    items = all_items(store, source.model_copy(update={"captions": []}))
    assert len(items) == 44 and problem(items[-1]) is Cause.TRUNCATED
    assert sum(entry.size for entry in store.list("data/unpacked/")) < 8 << 20


def _end(data: bytes) -> int:
    return len(data.rstrip(b"\0")) + -len(data.rstrip(b"\0")) % 512


OTHERS = {
    "zip": "a ZIP archive: unpack it into a folder",
    "xz": "packed with xz: unpack it",
    "7z": "a 7z archive: unpack it into a folder",
    "rar": "a RAR archive: unpack it into a folder",
    "lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    "page": "a page of the web: fetch the file itself",
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_called_a_tar_and_is_none_says_what_it_is(folder: Path, store: Store, what: str) -> None:
    if what == "zip":
        with zipfile.ZipFile(folder / "t.tar", "w") as made:
            made.writestr("a.jpg", b"I" * 1000)
    else:
        heads = {
            "xz": lzma.compress(UNPACKED),
            "7z": b"7z\xbc\xaf\x27\x1c" + bytes(600),
            "rar": b"Rar!\x1a\x07\x01\0" + bytes(600),
            "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            "page": b"<!DOCTYPE html><title>Not found</title>",
        }
        (folder / "t.tar").write_bytes(heads[what])
    for unpack in (False, True):
        [item] = all_items(store, web_dataset(folder, unpack=unpack))
        assert item.image == Rejection(Cause.UNKNOWN_FORMAT, OTHERS[what])


def test_mosaics_shards_are_no_tars(folder: Path) -> None:
    (folder / "shard.00000.mds").write_bytes(bytes(64))
    with pytest.raises(SettingsError, match=r"is no tar: MosaicML's MDS .*ShardWriter.write"):
        web_dataset(folder, tars=["*.mds"]).inputs()


# Ranges

NAMES = st.sampled_from(["a", "b", "c/d", "e.f", "./g", ".h"])
EXTENSIONS = st.sampled_from(["jpg", "PNG", "txt", "json", "cls", "x.jpg", "x.txt", "md", ""])


@st.composite
def archives(draw: st.DrawFn, deep: bool = True) -> bytes:
    """Members in any order, some of which are tars themselves, in all of tar's formats."""
    members = []
    for number in range(draw(st.integers(0, 12))):
        name, extension = draw(NAMES), draw(EXTENSIONS)
        inner = (
            draw(archives(deep=False)) if deep and draw(st.booleans()) else b"%d" % number * draw(st.integers(0, 300))
        )
        padding = "y" * draw(st.sampled_from([0, 0, 200]))
        members.append(member(f"{padding}{name}.{extension}", inner))
    form = draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
    return tar_bytes(*members, form=form)


@quick
@given(data=archives(), cuts=st.lists(st.integers(0, 30_000)), rows=st.integers(1, 5))
def test_ranges_of_any_size_part_a_tar_exactly(tmp_path: Path, data: bytes, cuts: list[int], rows: int) -> None:
    (tmp_path / "parts").mkdir(exist_ok=True)
    (tmp_path / "parts" / "t.tar").write_bytes(data)
    store = open_store(str(tmp_path / "store"))
    source = web_dataset(tmp_path / "parts", captions=["txt"])
    whole = list(source.items(store, Bytes("t.tar", "t.tar", False, 0, len(data))))
    assert [item.row for item in whole] == list(range(len(whole)))
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    by_hand = [Bytes("t.tar", "t.tar", False, a, b - a) for a, b in pairwise(edges)]
    planned = all_ranges(store, source, rows)
    assert sum(part.size for part in planned if isinstance(part, Bytes)) == len(data)
    for parts in (by_hand, planned):
        assert [item for part in parts for item in source.items(store, part)] == whole


@quick
@given(data=archives())
def test_samples_are_those_of_webdataset(tmp_path: Path, data: bytes) -> None:
    """Where its rules know an answer: names without hidden files, and no extension twice."""
    files = [{**found, "__url__": "t.tar"} for found in tar_file_iterator(io.BytesIO(data))]
    files = [found for found in files if not found["fname"].rpartition("/")[2].startswith(".")]
    try:
        theirs = list(group_by_keys(files))
    except ValueError:  # an extension twice
        return
    expected = [
        (sample["__key__"], next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample))
        for sample in theirs
        if any(extension in sample for extension in IMAGE_EXTENSIONS)
    ]
    (tmp_path / "theirs").mkdir(exist_ok=True)
    (tmp_path / "theirs" / "t.tar").write_bytes(data)
    source = web_dataset(tmp_path / "theirs", captions=[])
    items = list(source.items(open_store(str(tmp_path)), Bytes("t.tar", "t.tar", False, 0, len(data))))
    # Images that webdataset leaves aside are ours too: hidden ones, and those that stand under compound extensions.
    ours = [(item.name, item.image) for item in items if not isinstance(item.image, Rejection)]
    known = [(name, image) for name, image in ours if name.rpartition("/")[2].count(".") == 1]
    assert [(name.removeprefix("t.tar/").rpartition(".")[0], image) for name, image in known] == expected


# Planning


class Counting(FileStore):
    read = 0

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        Counting.read += len(data)
        return data


@pytest.fixture
def counting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    """The corpus under s3://, read through a store that counts bytes."""
    monkeypatch.setattr(folders, "open_store", lambda url: Counting(folder))
    monkeypatch.setattr(Counting, "read", 0)
    return Counting


def test_a_tar_is_planned_by_its_head_and_its_tail(folder: Path, store: Store, counting: type[Counting]) -> None:
    members = [each for n in range(400) for each in (member(f"{n}.jpg", bytes(100_000)), member(f"{n}.txt", b"t"))]
    (folder / "t.tar").write_bytes(tar_bytes(*members))
    source = web_dataset(folder).model_copy(update={"url": "s3://x/y"})
    parts = all_ranges(store, source, 50)
    assert len(parts) == 8
    assert counting.read < 4 << 20  # of 40 MiB
    counts = [sum(1 for _ in source.items(store, part)) for part in parts]
    assert sum(counts) == 400 and all(48 <= count <= 52 for count in counts)


def test_identity_of_a_tar(folder: Path) -> None:
    (folder / "a.tar").write_bytes(bytes(1 << 20))
    first = web_dataset(folder).inputs()
    assert web_dataset(folder).inputs() == first
    for place in (0, (1 << 20) - 1):
        data = bytearray(1 << 20)
        data[place] = 1
        (folder / "a.tar").write_bytes(data)
        assert web_dataset(folder).inputs() != first
    (folder / "a.tar").write_bytes(bytes(1 << 20))
    (folder / "b.tar").write_bytes(bytes(2 << 20))
    assert web_dataset(folder).inputs()[0] == first[0]


def test_a_tar_that_became_shorter_is_noticed(folder: Path, store: Store) -> None:
    (folder / "t.tar").write_bytes(tar_bytes(*pairs("a")))
    part = all_ranges(store, web_dataset(folder))[0]
    (folder / "t.tar").write_bytes(b"")
    with pytest.raises(DataError, match="has become shorter"):
        list(web_dataset(folder).items(store, part))


def test_settings_that_cannot_be(folder: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keep": {"width": "int"}}, "the index has its own column `width`"),
        ({"keep": {"n": "date"}}, "keep.n"),
        ({"captions": ["jsn.caption"]}, "write json.name"),
        ({"fields": {"a": "b"}}, "`a`, which is not kept"),
    ]
    for changes, message in wrong:
        with pytest.raises(SettingsError) as error:
            web_dataset(folder, **changes)
        assert message in str(error.value)
    (folder / "a.tgz").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"no file matches `\*.tar`.*a.tgz"):
        web_dataset(folder).inputs()
