"""Walks an untrusted tar from header to header: the members' names, offsets and sizes, and what is wrong with them.

Nothing is extracted and no member's data are read, so a walk reads headers only. It always begins at the tar's start:
in the middle a header would have to be guessed, and a tar within the tar is full of wrong ones. The standard library
parses a member's header. The pax and GNU headers before it are read here, since the library reads each of them whole,
however large it claims to be, and recurses for each.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data_prep.rejections import Cause, Rejection
from data_prep.sources.words import shown

BLOCK = tarfile.BLOCKSIZE
MOST_HEADER = 1 << 20  # bytes of all headers of one member: long names, pax records, maps of sparse files
TRAILER = 64 << 10  # bytes behind the end of an archive that are checked to be zeros

# Files that are named like a tar and are something else, by their first bytes, with what to do about each.
_UNPACK = "set the source's `unpack`, as a tar is read from any place"
_OTHERS = {
    b"\x1f\x8b": f"packed with gzip: {_UNPACK}",
    b"BZh": f"packed with bzip2: {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"packed with zstd: {_UNPACK}",
    b"\xfd7zXZ": "packed with xz: unpack it",
    b"PK\x03\x04": "a ZIP archive: unpack it into a folder",
    b"PK\x05\x06": "a ZIP archive: unpack it into a folder",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it into a folder",
    b"Rar!": "a RAR archive: unpack it into a folder",
    b"PAR1": "a Parquet table: name it in `tables` of another source",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with `git lfs pull`",
    b"<!DOCTYPE": "a page of the web: fetch the file itself",
    b"<html": "a page of the web: fetch the file itself",
}
_LONG = {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_PAX = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class Member(NamedTuple):
    offset: int  # of its first header
    name: str  # bytes that are no UTF-8 as surrogates
    data: int  # the offset of its data
    size: int
    odd: str  # what it is instead of a plain file; empty for a plain file


class Broken(NamedTuple):
    """From here on the archive cannot be read."""

    first: int
    why: Rejection


class _Damaged(Exception):
    def __init__(self, detail: str, cause: Cause = Cause.CORRUPT) -> None:
        super().__init__(detail)
        self.why = Rejection(cause, detail)


def members(file: BinaryIO) -> Iterator[Member | Broken]:
    """Every member but folders and, if the archive breaks off, where and why."""
    size = file.seek(0, io.SEEK_END)
    at = 0
    while True:
        try:
            walked = _member(file, at, size)
        except _Damaged as error:
            yield Broken(at, _other_format(file, at) or error.why)
            return
        if walked is None:
            break
        member, is_folder, at = walked
        if not is_folder:
            yield member
    if at < size and any(_read(file, at, TRAILER)):
        yield Broken(at, Rejection(Cause.CORRUPT, "more behind the end of the archive"))
    elif not size:
        yield Broken(0, Rejection(Cause.EMPTY))


def _other_format(file: BinaryIO, at: int) -> Rejection | None:
    """Why the file is refused if its first bytes, at which the walk failed, are those of another format."""
    head = _read(file, 0, BLOCK) if at == 0 else b""
    what = next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)
    return Rejection(Cause.UNKNOWN_FORMAT, what) if what else None


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _member(file: BinaryIO, start: int, size: int) -> tuple[Member, bool, int] | None:
    """The member whose headers begin at `start`, whether it is a folder, and where the next one's begin."""
    at, long_name, pax = start, None, dict[bytes, bytes]()
    while True:
        if at - start > MOST_HEADER:
            raise _Damaged(f"more than {MOST_HEADER} bytes of headers for one member")
        block = _read(file, at, BLOCK)
        if not block or not any(block):
            if at > start:
                raise _Damaged("a header is announced that is not there", Cause.TRUNCATED)
            return None
        info = _parsed(block)
        at += BLOCK
        if info.type not in _LONG | _PAX:
            break
        data = _header_data(file, at, info.size, size)
        at += _padded(info.size)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = data.partition(b"\0")[0]
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            pax |= _pax_records(data)  # those of global headers are not used
    if info.type == tarfile.GNUTYPE_SPARSE:
        at = _after_sparse_map(file, block, at, start)
    return _with_long_headers(info, start, at, size, long_name, pax)


def _parsed(block: bytes) -> tarfile.TarInfo:
    if len(block) < BLOCK:
        raise _Damaged("half a header", Cause.TRUNCATED)
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise _Damaged(str(error)) from None
    if info.size < 0:
        raise _Damaged("a negative size")
    return info


def _with_long_headers(
    info: tarfile.TarInfo, start: int, at: int, size: int, long_name: bytes | None, pax: dict[bytes, bytes]
) -> tuple[Member, bool, int]:
    """The member of a parsed header, with the name and size that GNU and pax headers before it give it."""
    name = info.name
    if (whole := pax.get(b"path", long_name)) is not None:
        name = whole.decode("utf-8", "surrogateescape")
    length = info.size
    if b"size" in pax:
        if not re.fullmatch(rb"[0-9]{1,19}", pax[b"size"]):
            raise _Damaged("a size that is no number")
        length = int(pax[b"size"])
    odd = _KINDS.get(info.type, "")
    if any(key.startswith(b"GNU.sparse") for key in pax):
        odd = _KINDS[tarfile.GNUTYPE_SPARSE]
    # Links, devices and folders have no data, whatever size they declare.
    stored = length if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
    if at + stored > size:
        raise _Damaged(f"{shown(name[:200])}: {stored} bytes that reach past the end", Cause.TRUNCATED)
    return Member(start, name, at, stored, odd), info.isdir(), at + _padded(stored)


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _header_data(file: BinaryIO, at: int, length: int, size: int) -> bytes:
    if length > MOST_HEADER:
        raise _Damaged(f"a header of {length} bytes")
    if at + length > size:
        raise _Damaged("a header that reaches past the end", Cause.TRUNCATED)
    return _read(file, at, length)


_RECORD = re.compile(rb"([0-9]{1,7}) ([^=\n]{1,1000})=")


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """`30 path=name\\n`: the length of the whole record, a key and a value."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data) and data[at]:
        match = _RECORD.match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise _Damaged("a pax header that cannot be read")
        records[match[2]] = data[match.end() : end - 1]
        at = end
    return records


def _after_sparse_map(file: BinaryIO, block: bytes, at: int, start: int) -> int:
    """The offset behind the further blocks of a sparse file's map of holes, in the old GNU format."""
    more = block[482]
    while more:
        if at - start > MOST_HEADER:
            raise _Damaged("an endless map of a sparse file")
        block = _read(file, at, BLOCK)
        if len(block) < BLOCK:
            raise _Damaged("a map that reaches past the end", Cause.TRUNCATED)
        at, more = at + BLOCK, block[504]
    return at
