"""Corpora of tars as dataset hubs ship them: an image and its sidecars are consecutive members with one base name.

Members are grouped into samples as the webdataset package does it: consecutive members whose names are equal up to the
first dot of the file's name; the rest is the extension, in any case. A sample's image is the member whose extension
comes first in `images`. If none has exactly such an extension, `photo.v2.jpg` and `photo.v2.txt` are an image and its
caption, called photo.v2. Members with other extensions (masks, classes) belong to the sample and are not read.

Every sample with an image becomes an item, also if the image is refused, and so does every file that has an image's
suffix and belongs to no sample. Captions without an image and other files (README) are not inputs. If the archive
breaks off, the samples before that place are read, and the rest is one refused item.

A tar is identified by its name, its size, and a hash of its first and last 64 KiB, so that 10 TB are not read to plan.
A range is a range of bytes, whose length follows from the mean size of the first samples; its samples are those that
begin in it. That needs random access: a compressed tar is refused or, with `unpack`, first unpacked into the store.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from pydantic import Field

from data_prep.rejections import Cause, Rejection
from data_prep.sources import unpacked, words
from data_prep.sources.base import IMAGE_SUFFIXES, Bytes, Input, Keys, Range, RawItem, Source, foreign
from data_prep.sources.folders import fingerprint, matching, open_folder, text_of
from data_prep.sources.tarwalk import Broken, Member, members
from infra.config import operational
from infra.errors import DataError, SettingsError
from infra.shards import sample_key
from infra.store import Store

READERS = 16  # tars fingerprinted at once
PLANNING = 512 << 10  # bytes of a read when the first samples are measured
MEASURED, MEASURED_BYTES = 64, 2 << 20  # samples, and bytes of the tar, that are enough to know their mean size
READING = 8 << 20  # bytes of a read: in a store, another request takes longer than reading over so many
MOST_MEMBERS = 100  # images and sidecars of one sample; further ones begin another sample
MOST_HELD = 16 << 20  # bytes of a sample that are read while the tar is walked; the rest is read when it is needed

IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)


class Tars(Source):
    # Operational, since a plan records its inputs: another tar extends the plan and makes no other one.
    tars: list[str] = operational(["*.tar"], min_length=1, description="paths in the folder, or patterns")
    images: list[str] = Field(
        list(IMAGE_EXTENSIONS), min_length=1, description="extensions of the image, the likeliest first"
    )
    # Operational, since an unpacked tar has another identity than the packed one.
    unpack: bool = operational(False, description="tars packed with gzip, bzip2 or zstd are unpacked into the store")

    def inputs(self, store: Store | None = None, planned: Sequence[Range] = ()) -> list[Input]:
        folder = open_folder(self.url)
        names = matching(folder, self.tars, "tars")
        for name in names:
            if remedy := foreign(name):
                raise SettingsError(f"{name} is no tar", remedy=remedy)

        def identified(name: str) -> Input:
            tar = Input(name, *fingerprint(folder, name))
            return unpacked.identity(tar) if self.unpack and unpacked.packing(folder, name) else tar

        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(identified, names))

    def pieces(self, store: Store, tar: Input, rows: int) -> Iterator[tuple[int, int]]:
        """The first byte and the length of each of equal pieces with about `rows` samples."""
        folder, size = open_folder(self.url), tar.size
        if self.unpack and unpacked.packing(folder, tar.name):
            size = unpacked.unpack(store, self.name, folder, tar.name)
        with _file(self, store, tar.name, PLANNING) as file:
            mean = _mean_bytes(self, file)
        size = max(1, size)  # an empty tar has a range, too, whose item is refused
        pieces = max(1, round(size / (rows * mean))) if mean else 1
        for number in range(min(pieces, size)):
            first = size * number // pieces
            yield first, size * (number + 1) // pieces - first

    def item(
        self, of: TarItem, captions: list[dict[str, str]] | Rejection, licence: Any, origin: Any, kept: dict[str, Any]
    ) -> RawItem:
        """An image with its captions; `licence` and `origin` are its own, if it has any."""
        image, texts = words.image_and_captions(of.image, captions)
        licence, origin = words.or_else(licence, self.licence), words.or_else(origin, self.origin)
        return RawItem(of.row, of.key, of.shown, image, texts, licence, origin, kept)


def _mean_bytes(source: Tars, file: BinaryIO) -> float:
    """The mean size of the first samples; 0 if there are none."""
    count, last = 0, 0
    for sample in samples(file, source.images, (), range(0)):
        if isinstance(sample, Broken):
            break
        count += 1
        last = sample.first
        if count > MEASURED or last > MEASURED_BYTES:
            return last / (count - 1) if count > 1 else last
    return file.seek(0, io.SEEK_END) / max(1, count)


# Samples


@dataclass
class Sample:
    """Consecutive members with one base name, an image among them."""

    first: int  # the offset of its first header
    base: str
    members: dict[str, Member] = field(default_factory=dict)  # by extension; images and sidecars only
    strays: list[Member] = field(default_factory=list)  # files between them that look like images and have no base name
    data: dict[str, bytes] = field(default_factory=dict)  # by extension; what was read while the tar was walked


class Picture(NamedTuple):
    """One image of a sample."""

    name: str
    member: Member | Rejection
    extension: str
    prefix: str  # of its sidecars' extensions: `v2.` of photo.v2.txt


def samples(file: BinaryIO, images: Sequence[str], sidecars: Sequence[str], wanted: range) -> Iterator[Sample | Broken]:
    """The samples of the whole tar, in order; of those that begin in `wanted`, data are read up to MOST_HELD."""
    of_interest = {extension.rpartition(".")[2] for extension in (*IMAGE_EXTENSIONS, *images, *sidecars)}
    sample = None
    for member in members(file):
        if isinstance(member, Broken):
            yield from _complete(sample, images)
            yield member
            return
        base, extension = split_name(member.name)
        if base is None:
            if member.name.lower().endswith(IMAGE_SUFFIXES):
                sample = sample or Sample(member.offset, "")
                sample.strays.append(member)
        elif sample is None or sample.base != base or _is_full(sample, extension):
            yield from _complete(sample, images)
            sample = Sample(member.offset, base)
        if base is not None and sample is not None and extension.rpartition(".")[2] in of_interest:
            sample.members[extension] = member
            if sample.first in wanted:
                _read_in_passing(file, sample, extension, member)
    yield from _complete(sample, images)


def split_name(name: str) -> tuple[str, str] | tuple[None, str]:
    """The base name and extension: ("a/photo", "v2.jpg") of a/photo.v2.JPG; (None, "") if it belongs to no sample."""
    from webdataset.tariterators import base_plus_ext  # it imports torch, which planning tables does not need

    last = name.rpartition("/")[2]
    if last.startswith(".") or "." not in last or len(name) > words.LONGEST_NAME:
        return None, ""  # the package would put all hidden files of a folder into one sample
    base, extension = base_plus_ext(name)
    return (None, "") if base is None else (base, extension.lower())


def _is_full(sample: Sample, extension: str) -> bool:
    return extension in sample.members or len(sample.members) + len(sample.strays) >= MOST_MEMBERS


def _read_in_passing(file: BinaryIO, sample: Sample, extension: str, member: Member) -> None:
    """Hold a member's data, so that a walk reads forwards only. MOST_HELD bounds the memory of a sample."""
    if member.size <= MOST_HELD - sum(map(len, sample.data.values())):
        file.seek(member.data)
        sample.data[extension] = file.read(member.size)


def _complete(sample: Sample | None, images: Sequence[str]) -> Iterator[Sample]:
    """The sample, if it has an image."""
    if sample and (sample.strays or any(_like_image(extension, images) for extension in sample.members)):
        yield sample


def _like_image(extension: str, images: Sequence[str]) -> bool:
    return extension in images or extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def pictures(sample: Sample, images: Sequence[str]) -> Iterator[Picture]:
    """The images of a sample that become items: nearly always one."""
    exact = next((extension for extension in images if extension in sample.members), None)
    compound = [extension for extension in sample.members if extension.rpartition(".")[2] in images]
    if exact:
        yield Picture(sample.base, sample.members[exact], exact, "")
    elif compound:
        for extension in compound:
            prefix = extension.rpartition(".")[0]
            yield Picture(f"{sample.base}.{prefix}", sample.members[extension], extension, f"{prefix}.")
    elif sample.members and any(_like_image(extension, images) for extension in sample.members):
        yield Picture(sample.base, Rejection(Cause.MISSING, f"no member ends in .{images[0]}"), images[0], "")
    for stray in sample.strays:
        yield Picture(stray.name, Rejection(Cause.BAD_NAME, "it belongs to no sample"), "", "")


def content(file: BinaryIO, sample: Sample, extension: str, limit: int) -> bytes | Rejection:
    """The data of a sample's member; one of more than `limit` bytes is refused."""
    member = sample.members[extension]
    if refused := _refusal(member):
        return refused
    if member.size > limit:
        return Rejection(Cause.TOO_MANY_BYTES, f"{member.size} bytes")
    data = sample.data.get(extension)
    if data is None:
        file.seek(member.data)
        data = file.read(member.size)
    return data if len(data) == member.size else Rejection(Cause.TRUNCATED)


def _refusal(member: Member) -> Rejection | None:
    if member.odd:
        return Rejection(Cause.UNREADABLE, member.odd)
    if "\0" in member.name or text_of(member.name) != member.name:
        return Rejection(Cause.BAD_NAME, "NUL, or not UTF-8")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return Rejection(Cause.OUTSIDE_FOLDER)
    return None


# Items


class TarItem(NamedTuple):
    """An image of a tar without its captions or, with an empty sample, the rest of a tar that cannot be read."""

    row: int
    key: str
    shown: str
    image: bytes | Rejection
    sample: Sample
    prefix: str = ""  # of its sidecars' extensions


@contextmanager
def opened(source: Tars, store: Store, part: Range) -> Iterator[BinaryIO]:
    """The tar, to read a range of. If its disk fails that is an error, and not a rejection of the item being read."""
    try:
        with _file(source, store, part.input, READING) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"{part.input} cannot be read ({error.strerror or type(error).__name__})",
            remedy="check the disk that it lies on, and run again",
        ) from None


def _file(source: Tars, store: Store, name: str, buffer: int) -> AbstractContextManager[BinaryIO]:
    """The tar or, if it is compressed, the one that it was unpacked to."""
    folder = open_folder(source.url)
    if source.unpack and unpacked.packing(folder, name):
        return unpacked.opened(store, folder, name, buffer)
    return folder.open(name, buffer)


def items(source: Tars, part: Bytes, file: BinaryIO, sidecars: Sequence[str]) -> Iterator[TarItem]:
    """The images of a range, in order, and one item for the rest of an archive that breaks off in it."""
    if part.first + part.size > max(1, file.seek(0, io.SEEK_END)):
        raise DataError(f"{part.input} has become shorter since it was planned", remedy="run prepare again")
    row, wanted, keys = 0, range(part.first, part.first + part.size), Keys()
    for sample in samples(file, source.images, sidecars, wanted):
        if sample.first >= wanted.stop:
            return
        if isinstance(sample, Broken):
            if sample.first in wanted:
                key = sample_key(source.name, f"{part.input}\0{row}")
                yield TarItem(row, key, words.shown(part.input), sample.why, Sample(sample.first, ""))
            return
        for picture in pictures(sample, source.images):
            # A key is made of the name in the tar. Repeated names are counted from the tar's start, whatever the range.
            key = keys.distinct(sample_key(source.name, f"{part.input}/{text_of(picture.name)}"))
            if sample.first in wanted:
                image: Member | bytes | Rejection = picture.member
                if isinstance(image, Member):
                    image = content(file, sample, picture.extension, source.max_bytes)
                yield TarItem(row, key, _shown(part.input, picture), image, sample, picture.prefix)
            row += 1


def _shown(tar: str, picture: Picture) -> str:
    suffix = picture.extension.removeprefix(picture.prefix)
    return words.shown(f"{tar}/{text_of(picture.name)}" + (f".{suffix}" if suffix else ""))
