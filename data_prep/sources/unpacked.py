"""Compressed tars, unpacked once into the store: ranges of a tar need random access, which a compressed one has not.

    unpacked/<fingerprint>.json            names the unpacked tar; the fingerprint is that of the packed one
    data/unpacked/<source>-<sha256>.tar    the unpacked tar

In a plan it has another identity than the packed tar, which was refused as a whole. So if `unpack` is set later, only
the samples of such tars are added.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from data_prep.sources.base import Input
from data_prep.sources.folders import BUFFER, Folder, StoreFolder, fingerprint
from data_prep.sources.packed import Unpacked, packing_in
from data_prep.sources.tarwalk import BLOCK, Broken, members
from infra import layout
from infra.config import digest
from infra.errors import DataError
from infra.records import DataObject, Record, put_data, read_record, write_record
from infra.store import Store, spool_path


class UnpackedRecord(Record):
    tar: DataObject
    broken: str  # why the tar is not complete; empty if it is


def packing(folder: Folder, name: str) -> str:
    """The compression of a tar by its first bytes, whatever its name; empty for a plain tar."""
    with folder.open(name, BLOCK) as file:
        return packing_in(file.read(BLOCK))


def identity(packed: Input) -> Input:
    """The input with the identity of the unpacked tar instead of the packed one's."""
    return packed._replace(sha256=hashlib.sha256(f"unpacked {packed.sha256}".encode()).hexdigest())


def unpack(store: Store, source: str, folder: Folder, name: str) -> int:
    """Unpack a tar if that was not done before; returns the size of the unpacked one."""
    key = _key(folder, name)
    if store.exists(key):
        tar = read_record(store, key, UnpackedRecord).tar
        if store.size(tar.key) == tar.size:
            return tar.size
    with folder.open(name, BUFFER) as file, store.spool() as spool:
        stream = Unpacked(file, packing(folder, name), name)
        sha256 = _copy(stream, spool)
        tar = put_data(store, layout.UNPACKED_TARS.at(), f"{source}.tar", spool_path(spool), sha256)
    write_record(store, key, UnpackedRecord(tar=tar, broken=stream.broken))
    return tar.size


def _copy(stream: Unpacked, spool: BinaryIO) -> str:
    """Copy the stream; returns the sha256. If it breaks off between members, a byte is added that is read as damage."""
    sha256 = hashlib.sha256()
    blocks = io.BufferedReader(stream, BUFFER)
    while data := blocks.read(BUFFER):
        if stream.broken:
            data = data[: len(data) // BLOCK * BLOCK]
        sha256.update(data)
        spool.write(data)
    if stream.broken and not (spool.tell() and any(isinstance(member, Broken) for member in members(spool))):
        spool.seek(0, io.SEEK_END)
        spool.write(b"!")
        sha256.update(b"!")
    return sha256.hexdigest()


@contextmanager
def opened(store: Store, folder: Folder, name: str, buffer: int) -> Iterator[BinaryIO]:
    """The unpacked tar of a packed one."""
    key = _key(folder, name)
    if not store.exists(key):
        raise DataError(f"{name} has changed since it was planned", remedy="run prepare again")
    tar = read_record(store, key, UnpackedRecord).tar
    if store.size(tar.key) is None:
        raise DataError(
            f"what {name} was unpacked to is gone ({store.url}/{tar.key})",
            remedy=f"delete {store.url}/{key} as well, then it is unpacked again",
        )
    with StoreFolder(store).open(tar.key, buffer) as file:
        yield file


def _key(folder: Folder, name: str) -> str:
    return layout.UNPACKED.at(tar=digest(fingerprint(folder, name)))
