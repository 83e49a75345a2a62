"""Tables of captions -> one table by image id, however they were ordered, in bounded memory; and looking one up in it.

The rows are sorted by a number made of the id: the ids are read first and cut into ranges of equal size, then every row
goes to the file of its range, and each file is sorted by itself. A row group of the result holds neighbours, and the
file says with which number each begins.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import re
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources import parquet, words
from data_prep.sources.convert import Columns, converted
from data_prep.sources.fields import element, is_list, kind_of, listed
from data_prep.sources.folders import Folder, StoreFolder, fingerprint
from data_prep.sources.lines import is_parquet
from data_prep.sources.tables import check_columns
from infra import layout
from infra.errors import SettingsError
from infra.records import put_data
from infra.store import Store

BATCH = 4096  # rows
GROUP = 4096  # rows of a row group, the least that a look-up reads
PILES, PILE = 128, 50_000  # at most so many files, with at least so many rows each
HELD = 8  # row groups in memory

NUMBER, ID = "pixnerd_number", "pixnerd_id"
FIRSTS = b"firsts"

_log = logging.getLogger(__name__)

_DIGITS = re.compile(r"(?:sa_)?0*([0-9]{1,18})")


def identity(value: Any) -> str | None:
    """What an id comes to, as a number or as the name of a file: 223750, sa_223750 and x/sa_223750.jpg are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    found = str(value) if isinstance(value, int) else words.text(value)
    if not found or len(found) > words.LONGEST_NAME:
        return None
    stem = found.strip().rpartition("/")[2].partition(".")[0]
    match = _DIGITS.fullmatch(stem)
    return match[1] if match else stem or None


def _number(name: str | None) -> int:
    """Numbers keep their order, so that the images of a tar, numbered in a row, lie side by side."""
    if name is None:
        return 2**64 - 1
    if name.isascii() and name.isdigit() and len(name) <= 18:
        return int(name)
    return 2**63 | int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "little") >> 1


def join(store: Store, source: str, folder: Folder, names: Sequence[str], columns: Columns) -> str:
    """The key of the join; made once in a process for the same tables, as every tar of a corpus asks for it."""
    prints = [fingerprint(folder, name) for name in names]
    asked = json.dumps([store.url, source, names, prints, columns])
    if asked not in _made:
        opened = [_opened(store, source, folder, name, columns) for name in names]
        tables = [table for table in opened if table is not None]
        _made.clear()
        _made[asked] = _join(store, source, tables, columns)
    return _made[asked]


_made: dict[str, str] = {}


class _Table(NamedTuple):
    name: str
    folder: Folder  # it lies in the corpus, or, converted, in the store
    schema: pa.Schema
    is_ours: bool


def _opened(store: Store, source: str, folder: Folder, title: str, columns: Columns) -> _Table | None:
    """None for a table without rows."""
    name, is_ours = title, not is_parquet(title)
    if is_ours:
        made = converted(store, source, folder, name, columns)
        if made is None:
            return None
        name, folder = made[0].key, StoreFolder(store)
    with parquet.opened(folder.open(name), name) as file:
        schema = file.schema_arrow
        if not file.metadata.num_rows:
            return None
    check_columns(columns, title, schema)
    return _Table(name, folder, schema, is_ours)


def _join(store: Store, source: str, tables: Sequence[_Table], columns: Columns) -> str:
    schema = _schema(tables, columns)
    numbers = array("Q")
    for batch in _batches(tables, columns.subject):
        numbers.extend(_number(identity(value)) for value in parquet.values(batch, columns.subject[0]))
    ordered = np.sort(np.frombuffer(numbers, np.uint64))
    starts = np.unique(ordered[:: max(PILE, -(-len(ordered) // PILES))])  # equal ids are never parted
    with TemporaryDirectory() as place:
        piles = [Path(place, f"{number}") for number in range(len(starts))]
        _pile_up(_batches(tables, columns.names), columns, schema, starts, piles)
        joined = Path(place, "joined.parquet")
        _write_sorted(piles, schema, joined)
        return put_data(store, layout.TABLES.at(), f"{source}.parquet", joined).key


def _pile_up(
    batches: Iterator[pa.Table],
    columns: Columns,
    schema: pa.Schema,
    starts: npt.NDArray[np.uint64],
    piles: Sequence[Path],
) -> None:
    with ExitStack() as files:
        writers = [files.enter_context(pa.ipc.new_stream(str(pile), schema)) for pile in piles]
        for batch in batches:
            ids = [identity(value) for value in parquet.values(batch, columns.subject[0])]
            numbers = np.array([_number(name) for name in ids], np.uint64)
            rows = _uniform(batch, ids, numbers, schema)
            at = np.maximum(np.searchsorted(starts, numbers, "right"), 1) - 1
            for pile in np.unique(at):
                writers[pile].write_table(rows.filter(pa.array(at == pile)))


def _write_sorted(piles: Sequence[Path], schema: pa.Schema, path: Path) -> None:
    firsts: list[int] = []
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for pile in piles:
            with pa.OSFile(str(pile)) as file:
                table = pa.ipc.open_stream(file).read_all()
            table = table.take(pa.array(np.argsort(table[NUMBER].to_numpy(), kind="stable")))
            for start in range(0, table.num_rows, GROUP):
                firsts.append(table[NUMBER][start].as_py())
                writer.write_table(table.slice(start, GROUP))
        writer.add_key_value_metadata({FIRSTS: json.dumps(firsts)})


def _schema(tables: Sequence[_Table], columns: Columns) -> pa.Schema:
    """One schema for all tables: texts as bytes, captions as lists of them, kept columns as the index has them."""
    fields = [pa.field(NUMBER, pa.uint64()), pa.field(ID, pa.string())]
    fields += [pa.field(name, pa.binary()) for name in columns.texts]
    fields += [pa.field(name, pa.list_(pa.binary())) for name in columns.captions]
    for name in columns.kept:
        kinds = {str(kind): kind for kind in (parquet.plain_type(kind_of(table.schema, name)) for table in tables)}
        if len(kinds) > 1:
            kinds.pop(str(pa.null()), None)
        if len(kinds) > 1:
            raise SettingsError(
                f"the column `{name}` is {' in one table and '.join(sorted(kinds))} in another",
                remedy="write the tables with one type for it",
            )
        fields.append(pa.field(name, next(iter(kinds.values()), pa.null())))
    return pa.schema(fields)


def _batches(tables: Sequence[_Table], columns: Sequence[str]) -> Iterator[pa.Table]:
    for table in tables:
        with parquet.opened(table.folder.open(table.name), table.name) as file:
            for batch in parquet.batches(file, table.name, columns, BATCH, whole=table.is_ours):
                if isinstance(batch, parquet.Lost):
                    _log.warning("%s: %d rows of captions are lost (%s)", table.name, batch.rows, batch.why.detail)
                else:
                    yield batch


def _uniform(
    batch: pa.Table, ids: Sequence[str | None], numbers: npt.NDArray[np.uint64], schema: pa.Schema
) -> pa.Table:
    arrays = [pa.array(numbers), pa.array(ids, pa.string())]
    for column in list(schema)[len(arrays) :]:
        arrays.append(_column(batch, column).cast(column.type, safe=False))
    return pa.Table.from_arrays(arrays, schema=schema)


def _column(batch: pa.Table, column: pa.Field) -> pa.ChunkedArray | pa.Array:
    """As it is; texts as lists of one, and what nests deeper as lists of all that is in it."""
    name = column.name
    is_captions = column.type == pa.list_(pa.binary())
    if name not in batch.column_names or pa.types.is_struct(element(batch.schema.field(name).type)):
        found = parquet.values(batch, name)
        return pa.array([None if value is None else listed(value) for value in found] if is_captions else found)
    plain = parquet.unchecked(batch.select([name])).column(0)
    if not is_captions or is_list(plain.type):
        return plain
    values = plain.cast(pa.binary()).combine_chunks()
    return pa.ListArray.from_arrays(pa.array(range(len(values) + 1), pa.int32()), values)


class Captions:
    """The join, to look up in. Neighbours are in memory already."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name = name
        with parquet.readable(name):
            self._file = pq.ParquetFile(file, buffer_size=parquet.BUFFER)
        self._firsts: list[int] = json.loads((self._file.metadata.metadata or {}).get(FIRSTS, b"[]"))
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def of(self, image: str) -> dict[str, Any] | None:
        """The first row for the image; None if there is none."""
        name = identity(image)
        number = _number(name)
        if name is None:
            return None
        at = bisect.bisect_left(self._firsts, number)
        for group in (at - 1, at):  # a group may begin with the id, or the one before may end with it
            if 0 <= group < len(self._firsts):
                table = self._group(group)
                place = int(np.searchsorted(table[NUMBER].to_numpy(), np.uint64(number)))
                found = table.slice(place, 1).to_pylist()
                if found and words.text(found[0][ID]) == name:
                    return dict(found[0])
        return None

    def _group(self, number: int) -> pa.Table:
        if number not in self._held:
            if len(self._held) == HELD:
                self._held.popitem(last=False)
            with parquet.readable(self._name):
                self._held[number] = parquet.unchecked(self._file.read_row_group(number)).combine_chunks()
        self._held.move_to_end(number)
        return self._held[number]
