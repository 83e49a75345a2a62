"""Tables of captions -> one table sorted by image id, in bounded memory; and looking up an image's row in it.

It is an external bucket sort by a number made of the id. The ids are read first, to cut their numbers into ranges with
equally many rows; then every row is written to the file of its range, and each file is sorted in memory. The result's
metadata hold the first number of each row group, so that a look-up reads one or two row groups.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
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
PILES, PILE = 128, 50_000  # the most files that the rows are sorted into, and the fewest rows of each
HELD = 8  # row groups that a look-up keeps in memory

NUMBER, ID = "pixnerd_number", "pixnerd_id"
FIRSTS = b"firsts"  # the metadata key of the first number of each row group

_log = logging.getLogger(__name__)

_DIGITS = re.compile(r"(?:sa_)?0*([0-9]{1,18})")


def identity(value: Any) -> str | None:
    """The form in which ids are compared: 223750, sa_223750 and x/sa_223750.jpg are all 223750. None for no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value) if isinstance(value, int) else words.text(value)
    if not text or len(text) > words.LONGEST_NAME:
        return None
    stem = text.strip().rpartition("/")[2].partition(".")[0]
    match = _DIGITS.fullmatch(stem)
    return match[1] if match else stem or None


def _number(name: str | None) -> int:
    """The sort key of an id. Numeric ids keep their order, so that the images of a tar are often neighbours."""
    if name is None:
        return 2**64 - 1
    if name.isascii() and name.isdigit() and len(name) <= 18:
        return int(name)
    return 2**63 | int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "little") >> 1


def join(store: Store, source: str, folder: Folder, names: Sequence[str], columns: Columns) -> str:
    """The store key of the joined table. The last one is remembered, since every tar of a corpus asks for it."""
    prints = [fingerprint(folder, name) for name in names]
    request = json.dumps([store.url, source, names, prints, columns])
    if request not in _last_joined:
        opened = [_opened(store, source, folder, name, columns) for name in names]
        tables = [table for table in opened if table is not None]
        _last_joined.clear()
        _last_joined[request] = _join(store, source, tables, columns)
    return _last_joined[request]


_last_joined: dict[str, str] = {}


class _Table(NamedTuple):
    name: str
    folder: Folder  # the corpus's or, of a converted table, the store
    schema: pa.Schema
    is_converted: bool


def _opened(store: Store, source: str, folder: Folder, title: str, columns: Columns) -> _Table | None:
    """None for a table without rows."""
    name, is_converted = title, not is_parquet(title)
    if is_converted:
        stored = converted(store, source, folder, name, columns)
        if stored is None:
            return None
        name, folder = stored[0].key, StoreFolder(store)
    with parquet.opened(folder.open(name), name) as file:
        schema = file.schema_arrow
        if not file.metadata.num_rows:
            return None
    check_columns(columns, title, schema)
    return _Table(name, folder, schema, is_converted)


def _join(store: Store, source: str, tables: Sequence[_Table], columns: Columns) -> str:
    schema = _schema(tables, columns)
    numbers = array("Q")
    for batch in _batches(tables, columns.subject):
        numbers.extend(_number(identity(value)) for value in parquet.values(batch, columns.subject[0]))
    ordered = np.sort(np.frombuffer(numbers, np.uint64))
    starts = np.unique(ordered[:: max(PILE, -(-len(ordered) // PILES))])  # equal ids stay in one file
    with TemporaryDirectory() as scratch:
        piles = [Path(scratch, f"{number}") for number in range(len(starts))]
        _pile_up(_batches(tables, columns.names), columns, schema, starts, piles)
        joined = Path(scratch, "joined.parquet")
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
    """The joined schema: texts as bytes, captions as lists of bytes, kept columns with the types of the index."""
    fields = [pa.field(NUMBER, pa.uint64()), pa.field(ID, pa.string())]
    fields += [pa.field(name, pa.binary()) for name in columns.texts]
    fields += [pa.field(name, pa.list_(pa.binary())) for name in columns.captions]
    for name in columns.kept:
        kinds = {str(kind): kind for kind in (parquet.plain_type(kind_of(table.schema, name)) for table in tables)}
        kinds.pop(str(pa.null()), None)  # it fits every other type
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
            for batch in parquet.batches(file, table.name, columns, BATCH, whole=table.is_converted):
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
    """A batch's column; of captions, a list in every row: of one text, or of all values that are nested in it."""
    name = column.name
    is_captions = column.type == pa.list_(pa.binary())
    if name not in batch.column_names or pa.types.is_struct(element(batch.schema.field(name).type)):
        values = parquet.values(batch, name)
        return pa.array([None if value is None else listed(value) for value in values] if is_captions else values)
    plain = parquet.unchecked(batch.select([name])).column(0)
    if not is_captions or is_list(plain.type):
        return plain
    texts = plain.cast(pa.binary()).combine_chunks()
    return pa.ListArray.from_arrays(pa.array(range(len(texts) + 1), pa.int32()), texts)


class Captions:
    """The joined table, opened for look-ups. Recent row groups stay in memory, which neighbours are found in."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._name = name
        with parquet.readable(name):
            self._file = pq.ParquetFile(file, buffer_size=parquet.BUFFER)
        self._firsts: list[int] = json.loads((self._file.metadata.metadata or {}).get(FIRSTS, b"[]"))
        self._group = lru_cache(HELD)(self._read)

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
                rows: list[dict[str, Any]] = table.slice(place, 1).to_pylist()
                if rows and words.text(rows[0][ID]) == name:
                    return rows[0]
        return None

    def _read(self, number: int) -> pa.Table:
        with parquet.readable(self._name):
            return parquet.unchecked(self._file.read_row_group(number)).combine_chunks()
