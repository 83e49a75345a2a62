"""What the files of a corpus were when they were read, so that it is noticed when one is replaced by one of its size.

    looked/<place>/<first>-<rows>.parquet    of each row of a planned piece: its file's size, stamp and checksum

The place is that of a listing or a table as it is, whoever plans it. A piece is written once, by the first task that
has read it, and never again: what is in the store now was made of that.

A stamp (a file's time, or a store's ETag) is a hint and no more: a corpus that is copied has new ones everywhere. So a
file that has its size but another stamp is read, and only another checksum makes it another file. Of more files than
MOST a thousand are read, evenly spread, and all of them where one of these has changed.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.rejections import Rejection
from data_prep.sources.base import Rows
from data_prep.sources.folders import Folder
from data_prep.sources.reading import in_order
from infra import layout
from infra.config import digest
from infra.shards import parquet_bytes
from infra.store import Store

MOST = 1000  # files that are read to see whether they are others
READERS = 16  # at once

SCHEMA = pa.schema([("size", pa.int64()), ("stamp", pa.int64()), ("check", pa.uint32())])

Column = npt.NDArray[np.int64]
_log = logging.getLogger(__name__)


def place(*what: Any) -> str:
    return digest(what)


class Looks:
    """A piece that is being read; what was seen of it is written at the end."""

    def __init__(self, store: Store, where: str, part: Rows) -> None:
        self._store, self._part = store, part
        self._key = layout.LOOKED.at(listing=where, first=part.first, rows=part.rows)
        self._seen: dict[int, tuple[int, int, int]] = {}

    def read(self, folder: Folder, row: int, name: str, limit: int) -> bytes | Rejection:
        data, stamp = folder.look(name, limit)
        if isinstance(data, bytes) and stamp:
            self._seen[row] = len(data), stamp, zlib.crc32(data)
        return data

    def put(self) -> None:
        if self._seen:
            rows = (self._seen.get(self._part.first + row, (None, None, None)) for row in range(self._part.rows))
            typed = zip(zip(*rows, strict=True), SCHEMA.types, strict=True)
            table = pa.table([pa.array(column, kind) for column, kind in typed], schema=SCHEMA)
            self._store.create(self._key, parquet_bytes(table))


class Files(NamedTuple):
    """Files of neighbouring rows as a folder lists them now."""

    names: Sequence[str | None]
    sizes: Column
    stamps: Column


def replaced(
    store: Store, where: str, folder: Folder, limit: int, rows: Callable[[], Iterator[Files]]
) -> Iterator[tuple[int, bytes]]:
    """The rows whose files are not what they were, and a hash of what they are; `rows` tells them from the start."""
    pieces = [_Piece.of(key) for key in layout.LOOKED.keys(store, listing=where)]
    if not pieces:
        return
    count = sum(1 for _ in _suspects(store, pieces, rows))
    step = -(-count // MOST)
    if step > 1:
        _log.info("%d files have other times or tags than when they were read; %d are looked at", count, count // step)
        if next(_changed(_suspects(store, pieces, rows, step), folder, limit), None) is None:
            return
    if count:
        yield from _changed(_suspects(store, pieces, rows), folder, limit)


class _Suspect(NamedTuple):
    row: int
    name: str
    checks: set[int]  # of its bytes, as the pieces know them


def _suspects(
    store: Store, pieces: Sequence[_Piece], rows: Callable[[], Iterator[Files]], step: int = 1
) -> Iterator[_Suspect]:
    """Each file, or each of so many, that has its size and another stamp."""
    tracks = [_Track(store, track) for track in _tracks(pieces)]
    first = met = 0
    for files in rows():
        found: dict[int, set[int]] = {}
        for track in tracks:
            then = track.window(first, len(files.names))
            here = (then.sizes == files.sizes) & (then.stamps != files.stamps) & (files.stamps != 0)
            for place in np.flatnonzero(here):
                found.setdefault(int(place), set()).add(int(then.checks[place]))
        for at in sorted(found):
            if met % step == 0:
                yield _Suspect(first + at, files.names[at] or "", found[at])
            met += 1
        first += len(files.names)


def _changed(suspects: Iterator[_Suspect], folder: Folder, limit: int) -> Iterator[tuple[int, bytes]]:
    def look(suspect: _Suspect) -> bytes | None:
        data = folder.read(suspect.name, limit)
        if isinstance(data, Rejection) or {zlib.crc32(data)} == suspect.checks:
            return None
        return hashlib.sha256(data).digest()

    def paired(suspect: _Suspect) -> tuple[int, bytes | None]:
        return suspect.row, look(suspect)

    for row, sha256 in in_order(paired, suspects, READERS):
        if sha256 is not None:
            yield row, sha256


# What was seen


class _Piece(NamedTuple):
    first: int
    rows: int
    key: str

    @classmethod
    def of(cls, key: str) -> _Piece:
        parts = layout.LOOKED.parts(key)
        return cls(parts["first"], parts["rows"], key)

    @property
    def end(self) -> int:
        return self.first + self.rows


def _tracks(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces that do not overlap lie in one track: plans of other sizes cut the same rows in other places."""
    tracks: list[list[_Piece]] = []
    for piece in sorted(pieces):
        for track in tracks:
            if track[-1].end <= piece.first:
                track.append(piece)
                break
        else:
            tracks.append([piece])
    return tracks


class _Then(NamedTuple):
    sizes: Column  # -1 where nobody has looked
    stamps: Column
    checks: Column


class _Track:
    """Pieces read one behind the other, by windows that go on and never back."""

    def __init__(self, store: Store, pieces: Sequence[_Piece]) -> None:
        self._pieces = in_order(lambda piece: (piece, _read(store, piece)), pieces)
        self._held = next(self._pieces, None)

    def window(self, first: int, count: int) -> _Then:
        found = _Then(np.full(count, -1, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64))
        while self._held is not None and self._held[0].first < first + count:
            piece, then = self._held
            low, high = max(first, piece.first), min(first + count, piece.end)
            for to, come in zip(found, then, strict=True):
                to[low - first : high - first] = come[low - piece.first : high - piece.first]
            if piece.end > first + count:
                break
            self._held = next(self._pieces, None)
        return found


def _read(store: Store, piece: _Piece) -> _Then:
    try:
        table = pq.read_table(pa.BufferReader(store.get(piece.key)), schema=SCHEMA)
        if table.num_rows == piece.rows:
            blanks = zip(SCHEMA.names, (-1, 0, 0), strict=True)
            return _Then(*(table[name].fill_null(blank).to_numpy().astype(np.int64) for name, blank in blanks))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        _log.warning("%s/%s cannot be read: its files are taken for what they were", store.url, piece.key)
    return _Then(np.full(piece.rows, -1, np.int64), np.zeros(piece.rows, np.int64), np.zeros(piece.rows, np.int64))
