"""Checksums of a corpus's files when they were read, to notice a file that was replaced by another of the same size.

    looked/<corpus id>/<first>-<rows>.parquet    the size, stamp and checksum of the file of each row of a range

The corpus id is a hash of the listing or table that names the files, whichever plan uses it. A range is recorded once,
by the first task that reads it, and never overwritten, since the shards in the store are made of what that task read.

A stamp (a file's time, or a store's ETag) is only a hint, since all files of a copied corpus have new ones. So a file
of the same size with another stamp is read again, and counts as replaced only if its checksum differs. If more than
MOST files are suspected, an evenly spread sample of about MOST is read first, and all only if one of these differs.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.rejections import Rejection
from data_prep.sources.base import Rows
from data_prep.sources.folders import Folder
from data_prep.sources.reading import in_order
from infra import layout
from infra.shards import parquet_bytes
from infra.store import Store

MOST = 1000  # suspected files that are read before the others are
READERS = 16  # files read at once

SCHEMA = pa.schema([("size", pa.int64()), ("stamp", pa.int64()), ("check", pa.uint32())])
_BLANKS = (-1, 0, 0)  # what stands for null in these columns

Column = npt.NDArray[np.int64]
_log = logging.getLogger(__name__)


class Recorder:
    """Reads the files of a range, and records what they were when all of them are read."""

    def __init__(self, store: Store, corpus: str, part: Rows) -> None:
        self._store, self._part = store, part
        self._key = layout.LOOKED.at(listing=corpus, first=part.first, rows=part.rows)
        self._seen: dict[int, tuple[int, int, int]] = {}  # by row: the file's size, stamp and checksum

    def read(self, folder: Folder, row: int, name: str, limit: int) -> bytes | Rejection:
        data, stamp = folder.read_stamped(name, limit)
        if isinstance(data, bytes) and stamp:
            self._seen[row] = len(data), stamp, zlib.crc32(data)
        return data

    def write(self) -> None:
        if self._seen:
            rows = (self._seen.get(self._part.first + row, (None, None, None)) for row in range(self._part.rows))
            typed = zip(zip(*rows, strict=True), SCHEMA.types, strict=True)
            table = pa.table([pa.array(column, kind) for column, kind in typed], schema=SCHEMA)
            self._store.create(self._key, parquet_bytes(table))


class Files(NamedTuple):
    """The files of consecutive rows, as the folder lists them now."""

    names: Sequence[str | None]
    sizes: Column
    stamps: Column


def replaced(
    store: Store, corpus: str, folder: Folder, limit: int, rows: Callable[[], Iterator[Files]]
) -> Iterator[tuple[int, bytes]]:
    """The rows whose files were replaced since they were read, and a hash of each new file. `rows` starts anew."""
    pieces = [_Piece.of(key) for key in layout.LOOKED.keys(store, listing=corpus)]
    if not pieces:
        return
    count = sum(1 for _ in _suspects(store, pieces, rows))
    step = -(-count // MOST)
    if step > 1:
        _log.info("%d files have other times or tags than when they were read; %d are checked", count, count // step)
        if next(_changed(_suspects(store, pieces, rows, step), folder, limit), None) is None:
            return
    if count:
        yield from _changed(_suspects(store, pieces, rows), folder, limit)


class _Suspect(NamedTuple):
    row: int
    name: str
    checks: set[int]  # the checksums that were recorded of it


def _suspects(
    store: Store, pieces: Sequence[_Piece], rows: Callable[[], Iterator[Files]], step: int = 1
) -> Iterator[_Suspect]:
    """Every `step`-th of the files that have the recorded size and another stamp."""
    tracks = [_Track(store, track) for track in _tracks(pieces)]
    first = count = 0
    for files in rows():
        checks: dict[int, set[int]] = {}  # by the suspect's place among these files
        for track in tracks:
            recorded = track.window(first, len(files.names))
            is_suspect = (recorded.sizes == files.sizes) & (recorded.stamps != files.stamps) & (files.stamps != 0)
            for place in np.flatnonzero(is_suspect).tolist():
                checks.setdefault(place, set()).add(int(recorded.checks[place]))
        for place in sorted(checks):
            if count % step == 0:
                yield _Suspect(first + place, files.names[place] or "", checks[place])
            count += 1
        first += len(files.names)


def _changed(suspects: Iterator[_Suspect], folder: Folder, limit: int) -> Iterator[tuple[int, bytes]]:
    def row_and_hash(suspect: _Suspect) -> tuple[int, bytes | None]:
        data = folder.read(suspect.name, limit)
        if isinstance(data, Rejection) or {zlib.crc32(data)} == suspect.checks:
            return suspect.row, None
        return suspect.row, hashlib.sha256(data).digest()

    for row, sha256 in in_order(row_and_hash, suspects, READERS):
        if sha256 is not None:
            yield row, sha256


# Recorded ranges


class _Piece(NamedTuple):
    first: int
    rows: int
    key: str

    @classmethod
    def of(cls, key: str) -> _Piece:
        spelt = layout.LOOKED.parts(key)
        return cls(spelt["first"], spelt["rows"], key)

    @property
    def end(self) -> int:
        return self.first + self.rows


def _tracks(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Groups of pieces that do not overlap: plans with shards of other sizes cut the same rows in other places."""
    tracks: list[list[_Piece]] = []
    for piece in sorted(pieces):
        for track in tracks:
            if track[-1].end <= piece.first:
                track.append(piece)
                break
        else:
            tracks.append([piece])
    return tracks


class _Recorded(NamedTuple):
    sizes: Column  # -1 where nothing was recorded
    stamps: Column
    checks: Column


class _Track:
    """Reads pieces that do not overlap in order, by windows that only move forwards."""

    def __init__(self, store: Store, pieces: Sequence[_Piece]) -> None:
        self._pieces = in_order(lambda piece: (piece, _read(store, piece)), pieces)
        self._held = next(self._pieces, None)

    def window(self, first: int, count: int) -> _Recorded:
        window = _nothing_recorded(count)
        while self._held is not None and self._held[0].first < first + count:
            piece, recorded = self._held
            low, high = max(first, piece.first), min(first + count, piece.end)
            for target, column in zip(window, recorded, strict=True):
                target[low - first : high - first] = column[low - piece.first : high - piece.first]
            if piece.end > first + count:
                break
            self._held = next(self._pieces, None)
        return window


def _nothing_recorded(rows: int) -> _Recorded:
    return _Recorded(*(np.full(rows, blank, np.int64) for blank in _BLANKS))


def _read(store: Store, piece: _Piece) -> _Recorded:
    try:
        table = pq.read_table(pa.BufferReader(store.get(piece.key)), schema=SCHEMA)
        if table.num_rows == piece.rows:
            columns = zip(table.columns, _BLANKS, strict=True)
            return _Recorded(*(column.fill_null(blank).to_numpy().astype(np.int64) for column, blank in columns))
    except (pa.ArrowException, OSError, KeyError, ValueError):
        _log.warning("%s/%s cannot be read: its files are taken for what they were", store.url, piece.key)
    return _nothing_recorded(piece.rows)
