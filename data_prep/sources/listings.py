"""Corpora that are their folder: every image in it, with a caption from a text beside it or from its class's name.

The folder's listing is their table. It is stored as Parquet, sorted by name, so that everybody plans and works by the
same one. When the folder has grown, what was planned stays as it is, and the images that came are a listing of their
own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import pairwise
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, field_validator

from data_prep.folders import Folder, StoreFolder, open_folder, text_of
from data_prep.rejections import Cause, Rejection
from data_prep.sources import parquet, words
from data_prep.sources.parquet import RowWriter
from data_prep.sources.raw import IMAGE_SUFFIXES, TABLES, Corpus, Input, Range, RawItem
from infra.config import operational, spelt
from infra.errors import SettingsError
from infra.records import put_data
from infra.shards import sample_key
from infra.store import Store

LISTING = "listing"  # the name of these inputs: what is in them tells them apart
LABEL = pa.field("label", pa.int32())
MOST_CLASSES = 16 << 20  # bytes of a file of class names


class TextFolder(Corpus):
    """Images in a folder and its subfolders, each with its caption in a text file beside it."""

    kind: Literal["text_folder"]
    caption_suffix: Annotated[str, spelt(r"(\.\w+)?", "a suffix such as .txt, or nothing")] = Field(
        ".txt", description="of the text beside an image; empty: images alone"
    )


class ImageNet(Corpus):
    """A folder of class folders. An image's label, kept in the index, is the place of its class among the sorted names
    of the class folders; its caption is the class's name in a template.

    Names come from a file: `n01440764 tench, Tinca tinca` lines, or one name a line in the order of the folders.
    Without one, a folder's own name is its class's, with spaces for underscores.
    """

    kind: Literal["imagenet"]
    # No setting that changes results: the names themselves are part of the listing's identity.
    classes: str | None = operational(None, description="the file of class names: in the folder, a path, or a URL")
    template: str = Field("a photo of a {name}", description="{name}: the first of a class's names; {names}: all")

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, given: str) -> str:
        if "{name}" not in given and "{names}" not in given:
            raise ValueError("a template has a {name} or {names} where the class's name goes")
        return given


ListingSource = TextFolder | ImageNet


class Listed(NamedTuple):
    """An image of the folder."""

    name: str
    size: int
    refused: str | None  # the cause for which it may not be read
    text: bytes | None  # a hash of the words beside it: others of the same length are easily written
    label: int | None
    classes: str | None  # its class's names


SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("size", pa.int64()),
        ("refused", pa.string()),
        ("text", pa.binary()),
        ("label", pa.int32()),
        ("classes", pa.string()),
    ]
)


def inputs(source: ListingSource, store: Store | None, planned: Sequence[Range] = ()) -> list[Input]:
    """The listings that were planned, as far as all of their rows are still there, and one of everything else."""
    folder = open_folder(source.url)
    with TemporaryDirectory() as place:
        with _Spool(Path(place, "whole")) as whole:
            for row in _listed(source, folder):
                whole.add(row)
        before = _still_there(whole, store, planned) if store else []
        if not before:
            return [whole.put(source, store)]
        with _Spool(Path(place, "fresh")) as fresh:
            old = merge(*before, key=_name)
            expected = next(old, None)
            for row in whole.rows_again():
                if row == expected:
                    expected = next(old, None)
                else:
                    fresh.add(row)
        found = [listing.input() for listing in before]
        return [*found, fresh.put(source, store)] if fresh.rows else found


def _still_there(whole: _Spool, store: Store, planned: Sequence[Range]) -> list[_Stored]:
    """The newest listings first: one that replaced others has their rows as well."""
    kept: list[_Stored] = []
    for key in reversed(dict.fromkeys(part.table for part in planned)):
        listing, rows = _Stored(store, key), whole.rows_again()
        holds = all(row in rows for row in listing)  # both are sorted, so `rows` is searched but once
        if holds and not any(a.name == b.name for a, b in pairwise(merge(listing, *kept, key=_name))):
            kept.insert(0, listing)
    return kept


def _name(row: Listed) -> str:
    return row.name


def ranges(source: ListingSource, store: Store, found: Input, rows: int) -> Iterator[Range]:
    assert found.table or not found.size, "inputs() was not given the store"
    for first in range(0, found.size, rows):
        yield Range(found.name, found.table, True, first, min(rows, found.size - first))


def kept_fields(source: ListingSource, store: Store, part: Range) -> list[pa.Field]:
    return [LABEL] if isinstance(source, ImageNet) else []


def kept_columns(source: ListingSource) -> dict[str, pa.DataType]:
    return {LABEL.name: LABEL.type} if isinstance(source, ImageNet) else {}


def items(source: ListingSource, store: Store, part: Range) -> Iterator[RawItem]:
    folder = open_folder(source.url)
    for number, row in parquet.rows(source, store, part, SCHEMA.names):
        name, refused, classes = (words.text(row[column]) for column in ("name", "refused", "classes"))
        yield _item(source, folder, number, Listed(name or "", row["size"], refused, None, row["label"], classes))


def _item(source: ListingSource, folder: Folder, number: int, row: Listed) -> RawItem:
    image: bytes | Rejection
    captions: list[dict[str, str]] = []
    found = _refusal(row) or (
        _text_beside(source, folder, row.name) if isinstance(source, TextFolder) else _named(source, row)
    )
    if isinstance(found, Rejection):
        image = found
    else:
        image, captions = folder.read(row.name, source.max_bytes), found
    kept = {LABEL.name: row.label} if isinstance(source, ImageNet) else {}
    # A name that is no text could be written out like another's.
    key = sample_key(source.name, f"\0{row.name}" if row.refused == Cause.BAD_NAME else row.name)
    return RawItem(number, key, words.shown(row.name), image, captions, source.licence, source.origin, kept)


def _refusal(row: Listed) -> Rejection | None:
    return Rejection(Cause(row.refused)) if row.refused else None


# The words


def _text_beside(source: TextFolder, folder: Folder, name: str) -> list[dict[str, str]] | Rejection:
    if not source.caption_suffix:
        return []
    data = _read_beside(source, folder, name)
    if isinstance(data, Rejection):
        cause = Cause.NO_CAPTION if data.cause is Cause.MISSING else Cause.BAD_CAPTION
        return Rejection(cause, f"{source.caption_suffix} beside the image: {data.cause}")
    return words.captions([("caption", data)], source.max_caption) or Rejection(Cause.NO_CAPTION)


def _read_beside(source: TextFolder, folder: Folder, name: str) -> bytes | Rejection:
    """The text by its suffix as it is set, or else in upper case: beside 5.JPG stands 5.TXT."""
    found: bytes | Rejection = Rejection(Cause.MISSING)
    for suffix in (source.caption_suffix, source.caption_suffix.upper()):
        if isinstance(found, Rejection) and found.cause is Cause.MISSING:
            found = folder.read(str(PurePosixPath(name).with_suffix(suffix)), 4 * source.max_caption)
    return found


def _named(source: ImageNet, row: Listed) -> list[dict[str, str]] | Rejection:
    if row.classes is None:
        return Rejection(Cause.NO_CAPTION, "in no class folder")
    first = row.classes.partition(",")[0].strip()
    said = source.template.replace("{names}", row.classes).replace("{name}", first)
    return words.captions([("caption", said)], source.max_caption) or Rejection(Cause.NO_CAPTION)


# What a folder holds


def _listed(source: ListingSource, folder: Folder) -> Iterator[Listed]:
    """The folder's images, sorted by name, whatever order the folder gives them in."""
    classes = _classes(source, folder) if isinstance(source, ImageNet) else {}
    for name, size, refused in _images(folder):
        known, text = classes.get(name.partition("/")[0], (None, None)), None
        if isinstance(source, TextFolder) and source.caption_suffix and not refused:
            beside = _read_beside(source, folder, name)
            said = beside if isinstance(beside, bytes) else beside.cause.encode()
            text = hashlib.blake2b(said, digest_size=16).digest()
        yield Listed(name, size, refused and refused.value, text, *(known if "/" in name else (None, None)))


def _images(folder: Folder) -> Iterator[tuple[str, int, Cause | None]]:
    """The pictures; and the folders that are not entered, whose pictures nobody has counted."""
    for name, size, refused in folder.names():
        if name.endswith("/") or PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            text, name = text_of(name).rstrip("/"), name.rstrip("/")
            yield text, size, refused or (Cause.BAD_NAME if text != name else None)


def _classes(source: ImageNet, folder: Folder) -> dict[str, tuple[int, str]]:
    """Each class folder's label and names."""
    folders = sorted({name.partition("/")[0] for name, *_ in _images(folder) if "/" in name})
    if source.classes is None:
        named = {name: name.replace("_", " ") for name in folders}
    else:
        named = _class_names(_class_lines(source.classes, folder), folders)
    return {name: (label, named[name]) for label, name in enumerate(folders)}


def _class_lines(where: str, folder: Folder) -> list[str]:
    if "://" in where or where.startswith("/"):
        place, _, where = where.rpartition("/")
        folder = open_folder(place or "/")
    with folder.open(where) as file:
        text = words.text(file.read(MOST_CLASSES))
    if text is None:
        raise SettingsError(f"{where} is not UTF-8", remedy="name a text file of class names")
    return [line.strip() for line in text.removeprefix(words.MARK).splitlines() if line.strip()]


def _class_names(lines: Sequence[str], folders: Sequence[str]) -> dict[str, str]:
    named = {parts[0]: parts[1] for line in lines if len(parts := line.split(maxsplit=1)) == 2}
    if unnamed := [name for name in folders if name not in named]:
        if len(lines) == len(folders):
            return dict(zip(folders, lines, strict=True))
        raise SettingsError(
            f"no class name is given for the folder {unnamed[0]}, nor one for each of {len(folders)} folders",
            remedy="write a line `folder name` for each class folder, or one name a line in the folders' order",
        )
    return named


# Listings in the store


class _Identity:
    """What a listing is, whoever wrote it to what file."""

    def __init__(self) -> None:
        self.rows = 0
        self._sha256 = hashlib.sha256()

    def add(self, row: Listed) -> None:
        self.rows += 1
        self._sha256.update("\0".join(map(str, row)).encode() + b"\n")

    def input(self, table: str) -> Input:
        return Input(LISTING, self.rows, self._sha256.hexdigest(), table)


class _Spool(RowWriter):
    """A listing on its way to the store, on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SCHEMA)
        self._path, self._identity = path, _Identity()

    def __enter__(self) -> _Spool:
        return self

    def add(self, row: Sequence[Any]) -> None:
        super().add(row)
        self._identity.add(Listed(*row))

    def rows_again(self) -> Iterator[Listed]:
        return _rows(self._path.open("rb"), str(self._path))

    def put(self, source: ListingSource, store: Store | None) -> Input:
        found = put_data(store, TABLES, f"{source.name}.parquet", self._path) if store and self.rows else None
        return self._identity.input(found.key if found else "")


class _Stored:
    """A listing that was planned; what it is is known once it has been read through."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key, self._identity = store, key, _Identity()

    def __iter__(self) -> Iterator[Listed]:
        self._identity = _Identity()
        for row in _rows(StoreFolder(self._store).open(self._key), self._key):
            self._identity.add(row)
            yield row

    def input(self) -> Input:
        return self._identity.input(self._key)


def _rows(file: BinaryIO, name: str) -> Iterator[Listed]:
    with parquet.opened(file, name) as listing:
        for batch in listing.iter_batches(parquet.BATCH, columns=SCHEMA.names, use_threads=False):
            for values in zip(*(batch.column(name).to_pylist() for name in SCHEMA.names), strict=True):
                yield Listed(*values)
