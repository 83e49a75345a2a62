"""Corpora that are their folder: every image in it, with a caption from a text beside it or from its class's name.

The folder's listing is their table, in parts of LISTED images. It is stored as Parquet, sorted by name, so that
everybody plans and works by the same one. When the folder has grown, what was planned stays as it is, and the images
that came are a listing of their own. An image that goes, or changes, costs the part that it is in: also one that was
replaced by another of the same size (`looked`).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from data_prep.rejections import Cause, Rejection
from data_prep.sources import looked, parquet, words
from data_prep.sources.folders import File, Folder, open_folder, text_of
from data_prep.sources.listed import Listed, Stored, Whole, merged, put
from data_prep.sources.raw import IMAGE_SUFFIXES, Corpus, Input, Range, RawItem
from infra.config import operational, spelt
from infra.errors import SettingsError
from infra.shards import sample_key
from infra.store import Store

LABEL = pa.field("label", pa.int32())
BATCH = 4096  # files whose stamps are compared at once
MOST_CLASSES = 16 << 20  # bytes of a file of class names

_log = logging.getLogger(__name__)


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


def inputs(source: ListingSource, store: Store | None, planned: Sequence[Range] = ()) -> list[Input]:
    """The listings that were planned, as far as all of their rows are still there, and those of everything else."""
    folder = open_folder(source.url)
    with TemporaryDirectory() as place:
        whole = Whole(Path(place))
        for row, stamp in _listed(source, folder):
            whole.add(row, stamp)
        whole.close()
        before, others = _still_there(source, folder, whole, store, planned) if store else ([], None)
        found = [listing.input() for listing in before]
        fresh = (row._replace(others=others) for row in _without(whole, before))
        made = list(put(source.name, store, Path(place), fresh))
        return [*found, *(new for new in made if new.size or not found)]


def _without(whole: Whole, planned: Sequence[Stored]) -> Iterator[Listed]:
    """The rows that no listing has."""
    listed = merged(planned)
    known = next(listed, None)
    for row, _ in whole.rows():
        if known is not None and row == known._replace(others=None):
            known = next(listed, None)
        else:
            yield row


def _still_there(
    source: ListingSource, folder: Folder, whole: Whole, store: Store, planned: Sequence[Range]
) -> tuple[list[Stored], bytes | None]:
    """The listings that hold, and a hash of what has replaced images of the others.

    The newest come first: one that replaced others has their rows as well.
    """
    kept: list[Stored] = []
    sha256, others = hashlib.sha256(), 0
    for key in reversed(dict.fromkeys(part.table for part in planned)):
        listing = Stored(store, key)
        if not all(stamp is not None for _, stamp in _found(listing, whole)) or listing.meets(kept):
            continue
        before, files = others, partial(_files, listing, whole)
        for row, content in looked.replaced(store, _place(key), folder, source.max_bytes, files):
            sha256.update(b"%s %d %s\n" % (key.encode(), row, content))
            others += 1
        if others == before:
            kept.insert(0, listing)
    if others:
        _log.warning("%d images of the source `%s` were replaced by others of their sizes", others, source.name)
    return kept, sha256.digest()[:16] if others else None


def _found(listing: Stored, whole: Whole) -> Iterator[tuple[Listed, int | None]]:
    """A listing's rows with the stamps that their files have now; None for the first that is not there, and the end."""
    rows: Iterator[tuple[Listed, int]] | None = None
    for row in listing:
        rows = rows or whole.rows(row.name)
        for here, stamp in rows:  # both are sorted, so it is searched but once
            if here == row._replace(others=None):
                yield row, stamp
                break
        else:
            yield row, None
            return


def _files(listing: Stored, whole: Whole) -> Iterator[looked.Files]:
    found = _found(listing, whole)
    while batch := list(islice(found, BATCH)):
        sizes, stamps = [row.size for row, _ in batch], [stamp or 0 for _, stamp in batch]
        yield looked.Files([row.name for row, _ in batch], np.array(sizes, np.int64), np.array(stamps, np.int64))


def _place(table: str) -> str:
    return looked.place("listing", table)


def ranges(source: ListingSource, store: Store, found: Input, rows: int) -> Iterator[Range]:
    assert found.table or not found.size, "inputs() was not given the store"
    for first in range(0, found.size, rows):
        yield Range(found.name, found.table, True, first, min(rows, found.size - first))


def kept_fields(source: ListingSource, store: Store, part: Range) -> list[pa.Field]:
    return [LABEL] if isinstance(source, ImageNet) else []


def kept_columns(source: ListingSource) -> dict[str, pa.DataType]:
    return {LABEL.name: LABEL.type} if isinstance(source, ImageNet) else {}


def items(source: ListingSource, store: Store, part: Range) -> Iterator[RawItem]:
    folder, looks = open_folder(source.url), looked.Looks(store, _place(part.table), part)
    for number, row in parquet.rows(source, store, part, ["name", "size", "refused", "label", "classes"]):
        assert not isinstance(row, Rejection), "a listing is our own"
        name, refused, classes = (words.text(row[column]) for column in ("name", "refused", "classes"))
        listed = Listed(name or "", row["size"], refused, None, row["label"], classes)
        yield _item(source, folder, looks, number, listed)
    looks.put()


def _item(source: ListingSource, folder: Folder, looks: looked.Looks, number: int, row: Listed) -> RawItem:
    image: bytes | Rejection
    captions: list[dict[str, str]] = []
    found = _refusal(row) or (
        _text_beside(source, folder, row.name) if isinstance(source, TextFolder) else _named(source, row)
    )
    if isinstance(found, Rejection):
        image = found
    else:
        image, captions = looks.read(folder, number, row.name, source.max_bytes), found
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


def _listed(source: ListingSource, folder: Folder) -> Iterator[tuple[Listed, int]]:
    """The folder's images with their stamps, sorted by name, whatever order the folder gives them in."""
    classes = _classes(source, folder) if isinstance(source, ImageNet) else {}
    for name, size, refused, stamp in _images(folder):
        known, text = classes.get(name.partition("/")[0], (None, None)), None
        if isinstance(source, TextFolder) and source.caption_suffix and not refused:
            beside = _read_beside(source, folder, name)
            said = beside if isinstance(beside, bytes) else beside.cause.encode()
            text = hashlib.blake2b(said, digest_size=16).digest()
        row = Listed(name, size, refused and refused.value, text, *(known if "/" in name else (None, None)))
        yield row, stamp


def _images(folder: Folder) -> Iterator[File]:
    """The pictures; and the folders that are not entered, whose pictures nobody has counted."""
    for file in folder.names():
        if file.name.endswith("/") or PurePosixPath(file.name).suffix.lower() in IMAGE_SUFFIXES:
            text, name = text_of(file.name).rstrip("/"), file.name.rstrip("/")
            yield file._replace(name=text, refused=file.refused or (Cause.BAD_NAME if text != name else None))


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
