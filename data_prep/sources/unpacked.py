"""Packed tars, unpacked once into the store: a tar is read from any place, and a packed one only from its start.

    unpacked/<what it is>.json             says which tar came of it
    data/unpacked/<source>-<sha256>.tar    that tar

What it is: its size, head and tail, as of every tar. The plan knows it as another input than the packed one, so that
whoever sets `unpack` later gets its samples, and only its.
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
    broken: str  # why it is not the whole


def packing(folder: Folder, name: str) -> str:
    """By what lies there, whatever it is called; empty for a plain tar."""
    with folder.open(name, BLOCK) as file:
        return packing_in(file.read(BLOCK))


def identity(found: Input) -> Input:
    """Of a tar that is unpacked, instead of the packed one's."""
    return found._replace(sha256=hashlib.sha256(f"unpacked {found.sha256}".encode()).hexdigest())


def unpack(store: Store, source: str, folder: Folder, name: str) -> int:
    """Unpack a tar unless it was; its size."""
    key = _key(folder, name)
    if store.exists(key):
        found = read_record(store, key, UnpackedRecord)
        if store.size(found.tar.key) == found.tar.size:
            return found.tar.size
    with folder.open(name, BUFFER) as file, store.spool() as spool:
        stream = Unpacked(file, packing(folder, name), name)
        sha256 = _copy(stream, spool)
        tar = put_data(store, layout.UNPACKED_TARS.at(), f"{source}.tar", spool_path(spool), sha256)
    write_record(store, key, UnpackedRecord(tar=tar, broken=stream.broken))
    return tar.size


def _copy(stream: Unpacked, spool: BinaryIO) -> str:
    """What comes of the stream. Where it breaks off between two members, half a header says so to whoever walks it."""
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
    """The tar that came of a packed one."""
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
