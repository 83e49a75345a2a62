"""Corpora -> one stream of raw items.

A source is a settings class with a `kind` and three functions behind it:

    inputs(source)                  its input files, by name, size and hash: what a plan's digest is made of
    as_rows(source, input, store)   the input as a Parquet of rows, written to the store where it is not Parquet already
    items(source, shard, store)     the raw items of a planned range of rows, each with its bytes or a Rejection

Names and captions come from strangers: a name never leads out of its folder, a caption is text of bounded length.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from pydantic import Field

from data_prep.folders import Folder, StoreFolder, open_folder
from data_prep.rejections import Cause, Rejection
from infra.config import Settings, nearest, operational
from infra.errors import DataError, SettingsError
from infra.records import put_data
from infra.shards import INDEX_SCHEMA, parquet_bytes, sample_key
from infra.store import Store

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"))
TABLE_SUFFIXES = (".parquet", ".jsonl", ".csv")
TABLES = "data/tables"  # inputs that were turned into Parquet

SourceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class _Folder(Settings):
    name: SourceName  # a sample's key and its `source` column come from it
    # Where the bytes lie is no part of what they are: the inputs' hashes are. A corpus may be moved.
    url: str = operational(description="a folder, or a store URL such as s3://bucket/prefix")
    licence: str = ""
    max_bytes: int = Field(64 * 2**20, ge=1, description="larger files are refused")
    max_caption: int = Field(20_000, ge=1, description="inputs with a longer caption are refused (characters)")


class TableFolder(_Folder):
    """Images in a folder, named by the rows of Parquet, JSONL or CSV tables in it."""

    kind: Literal["table_folder"]
    tables: list[str] = Field(min_length=1, description="paths in the folder")
    image: str = Field("image", description="the column that names the image, relative to the folder")
    captions: list[str] = Field(["caption"], description="columns of text, or of lists of texts; none: images alone")
    keep: list[str] = Field([], description="further columns to carry into the index, to filter by")
    licence_column: str | None = None


class TextFolder(_Folder):
    """Images in a folder and its subfolders, each with its caption in a text file beside it."""

    kind: Literal["text_folder"]
    caption_suffix: str = Field(
        ".txt", pattern=r"^(\.\w+)?$", description="of the text beside an image; empty: images alone"
    )


Source = Annotated[TableFolder | TextFolder, Field(discriminator="kind")]


class Input(NamedTuple):
    """One input file of a source; `listing` is the folder's own, which names images where no table does."""

    name: str
    size: int
    sha256: str


class Rows(NamedTuple):
    """Where the rows of an input lie: in the source's folder, or in the store if they had to be converted."""

    table: str
    in_store: bool
    rows: int


class Range(NamedTuple):
    """A planned shard's part of an input."""

    input: str
    table: str
    in_store: bool
    first: int
    rows: int


class RawItem(NamedTuple):
    row: int
    key: str
    name: str  # for people: what the corpus calls it
    image: bytes | Rejection
    captions: list[dict[str, str]]  # {"kind", "text"}
    licence: str
    kept: dict[str, Any]


def inputs(source: Source) -> list[Input]:
    """Every input file, and the folder's listing, so that images that come, go or change in size are noticed.

    A text beside an image counts with its words: another one of the same length is easily written.
    """
    folder = open_folder(source.url)
    listing = _listing(folder)
    sha256 = hashlib.sha256()
    for name, size in zip(listing["name"].to_pylist(), listing["size"].to_pylist(), strict=True):
        sha256.update(f"{name}\0{size}\n".encode())
        if isinstance(source, TextFolder) and source.caption_suffix:
            text = _read_beside(source, folder, name)
            sha256.update(text if isinstance(text, bytes) else text.cause.encode())
    found = [Input("listing", listing.num_rows, sha256.hexdigest())]
    if isinstance(source, TableFolder):
        found += [_measured(folder, name) for name in source.tables]
    return found


def as_rows(source: Source, store: Store, name: str) -> Rows | None:
    """None for an input without rows of its own (the listing of a folder whose images are named by tables)."""
    folder = open_folder(source.url)
    if isinstance(source, TextFolder):
        return _stored(source, store, _listing(folder))
    if name == "listing":
        return None
    if name.endswith(".parquet"):
        with _parquet(folder.open(name), name) as file:
            _check_columns(source, name, file.schema_arrow)
            return Rows(name, False, file.metadata.num_rows)
    table = _converted(folder, name)
    _check_columns(source, name, table.schema)
    return _stored(source, store, table)


def _stored(source: Source, store: Store, table: pa.Table) -> Rows:
    found = put_data(store, TABLES, f"{source.name}.parquet", parquet_bytes(table))
    return Rows(found.key, True, table.num_rows)


def kept_fields(source: Source, store: Store, part: Range) -> list[pa.Field]:
    """The columns that the source adds to the index, in its order."""
    if isinstance(source, TextFolder):
        return []
    with _parquet(_open_rows(source, store, part), part.table) as file:
        schema = file.schema_arrow
    return [pa.field(name, _plain_type(schema.field(name).type)) for name in source.keep]


def items(source: Source, store: Store, part: Range) -> Iterator[RawItem]:
    folder = open_folder(source.url)
    columns = _columns(source)
    with _parquet(_open_rows(source, store, part), part.table) as file:
        rows = _row_range(file, part, columns).to_pylist()
    for number, row in enumerate(rows, start=part.first):
        if isinstance(source, TextFolder):
            yield _text_item(source, folder, number, row)
        else:
            yield _table_item(source, folder, part.input, number, row)


# One item


def _table_item(source: TableFolder, folder: Folder, table: str, number: int, row: dict[str, Any]) -> RawItem:
    name = _text(row[source.image])
    captions = _captions([(kind, row[kind]) for kind in source.captions], source.max_caption)
    image: bytes | Rejection
    if not name:
        image = Rejection(Cause.BAD_NAME, "empty or not UTF-8")
    elif isinstance(captions, Rejection):
        image = captions
    elif source.captions and not captions:
        image = Rejection(Cause.NO_CAPTION)
    else:
        image = folder.read(name, source.max_bytes)
    return RawItem(
        row=number,
        key=sample_key(source.name, f"{table}#{number}"),  # tables may name an image twice
        name=name or "",
        image=image,
        captions=[] if isinstance(captions, Rejection) else captions,
        licence=(_text(row[source.licence_column]) if source.licence_column else None) or source.licence,
        kept={kept: _kept(row[kept]) for kept in source.keep},
    )


def _text_item(source: TextFolder, folder: Folder, number: int, row: dict[str, Any]) -> RawItem:
    name, refused = row["name"].decode(), _text(row["refused"])
    image: bytes | Rejection
    captions: list[dict[str, str]] = []
    if refused:
        image = Rejection(Cause(refused))
    else:
        found = _text_beside(source, folder, name)
        image = found if isinstance(found, Rejection) else folder.read(name, source.max_bytes)
        captions = [] if isinstance(found, Rejection) else found
    return RawItem(number, sample_key(source.name, name), name, image, captions, source.licence, {})


def _text_beside(source: TextFolder, folder: Folder, name: str) -> list[dict[str, str]] | Rejection:
    if not source.caption_suffix:
        return []
    data = _read_beside(source, folder, name)
    if isinstance(data, Rejection):
        cause = Cause.NO_CAPTION if data.cause is Cause.MISSING else Cause.BAD_CAPTION
        return Rejection(cause, f"{source.caption_suffix} beside the image: {data.cause}")
    return _captions([("caption", data)], source.max_caption) or Rejection(Cause.NO_CAPTION)


def _read_beside(source: TextFolder, folder: Folder, name: str) -> bytes | Rejection:
    return folder.read(str(PurePosixPath(name).with_suffix(source.caption_suffix)), 4 * source.max_caption)


def _captions(values: Sequence[tuple[str, Any]], longest: int) -> list[dict[str, str]] | Rejection:
    """The texts of each kind, stripped, empty ones dropped; or what is wrong with one of them."""
    kept = []
    for kind, value in values:
        for given in value if isinstance(value, list) else [value]:
            if given is None:
                continue
            text = _text(given)
            if text is None:
                return Rejection(Cause.BAD_CAPTION, f"{kind}: not UTF-8")
            text = text.strip()
            if len(text) > longest:
                return Rejection(Cause.BAD_CAPTION, f"{kind}: {len(text)} characters")
            if bad := next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r"), None):
                return Rejection(Cause.BAD_CAPTION, f"{kind}: control character U+{ord(bad):04X}")
            if text:
                kept.append({"kind": kind, "text": text})
    return kept


def _text(value: bytes | str | None) -> str | None:
    """UTF-8 or nothing: Parquet's strings are bytes that nobody has checked."""
    if value is None or isinstance(value, str):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _kept(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return [_kept(part) for part in value] if isinstance(value, list) else value


# Rows


def _columns(source: Source) -> list[str]:
    if isinstance(source, TextFolder):
        return ["name", "refused"]
    named = [source.image, *source.captions, *source.keep, *([source.licence_column] if source.licence_column else [])]
    return list(dict.fromkeys(named))


def _check_columns(source: TableFolder, name: str, schema: pa.Schema) -> None:
    for column in _columns(source):
        if column not in schema.names:
            near = nearest(column, schema.names)
            raise SettingsError(
                f"{name} has no column `{column}`",
                remedy=f"did you mean `{near}`?" if near else f"its columns are {', '.join(schema.names)}",
            )
    texts = [source.image, *source.captions, *([source.licence_column] if source.licence_column else [])]
    for column in texts:
        kind = schema.field(column).type
        if column in source.captions and _is_list(kind):
            kind = kind.value_type
        if not pa.types.is_string(_plain_type(kind)) and not pa.types.is_null(kind):
            raise SettingsError(f"column `{column}` of {name} is {kind}, not text", remedy="name a column of text")
    for column in source.keep:
        kind = schema.field(column).type
        if column in INDEX_SCHEMA.names:
            raise SettingsError(
                f"the index has its own column `{column}`", remedy="rename the corpus's column, or do not keep it"
            )
        if _plain_type(kind) is None:
            raise SettingsError(
                f"column `{column}` of {name} is {kind}", remedy="keep columns of numbers, booleans and texts"
            )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _plain_type(kind: pa.DataType) -> pa.DataType | None:
    """The index's type for a column of this type; None for those that it does not take."""
    types = pa.types
    if types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.string()
    if _is_list(kind):
        inner = _plain_type(kind.value_type)
        return None if inner is None else pa.list_(inner)
    return kind if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) else None


def _binary_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return pa.binary()
    return pa.list_(_binary_type(kind.value_type)) if _is_list(kind) else kind


def _row_range(file: pq.ParquetFile, part: Range, columns: list[str]) -> pa.Table:
    """Rows first to first + rows, from the row groups that hold them; texts as bytes, since nobody has checked them."""
    groups, skip, seen = [], part.first, 0
    for number in range(file.metadata.num_row_groups):
        count = file.metadata.row_group(number).num_rows
        if seen + count <= part.first:
            skip -= count
        elif seen < part.first + part.rows:
            groups.append(number)
        seen += count
    table = file.read_row_groups(groups, columns=columns).slice(skip, part.rows)
    if table.num_rows != part.rows:
        raise DataError(f"{part.table} has become shorter since it was planned", remedy="run prepare again")
    target = [(name, _binary_type(_plain_type(table.schema.field(name).type) or pa.null())) for name in columns]
    return table.select(columns).cast(pa.schema(target))


def _open_rows(source: Source, store: Store, part: Range) -> BinaryIO:
    return StoreFolder(store).open(part.table) if part.in_store else open_folder(source.url).open(part.table)


def _parquet(file: BinaryIO, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{name} is not a readable Parquet file ({error})", remedy="write it again") from None


def _converted(folder: Folder, name: str) -> pa.Table:
    """A JSONL or CSV table, read whole: types are inferred once, not shard by shard."""
    if not name.endswith(TABLE_SUFFIXES):
        raise SettingsError(f"{name} is no table", remedy=f"name a file that ends in {', '.join(TABLE_SUFFIXES)}")
    try:
        with folder.open(name) as file:
            if name.endswith(".csv"):
                quoted = pyarrow.csv.ParseOptions(newlines_in_values=True)
                return pyarrow.csv.read_csv(file, parse_options=quoted)
            return pyarrow.json.read_json(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{name} is not a readable table ({error})", remedy="correct the line named") from None


# What a folder holds


def _measured(folder: Folder, name: str) -> Input:
    with folder.open(name) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return Input(name, file.tell(), sha256)


def _listing(folder: Folder) -> pa.Table:
    """The folder's images: name, size, and why one may not be read; sorted, whatever order the folder gives them in."""
    found = []
    for name, size, refused in folder.names():
        whole = name.encode("utf-8", "surrogateescape").decode(errors="backslashreplace")
        if refused or PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
            found.append((whole, size, refused or (Cause.BAD_NAME if whole != name else None)))
    names, sizes, causes = zip(*sorted(found, key=lambda row: row[0]), strict=True) if found else ((), (), ())
    columns = {
        "name": pa.array(names, pa.string()),
        "size": pa.array(sizes, pa.int64()),
        "refused": pa.array([cause and cause.value for cause in causes], pa.string()),
    }
    return pa.table(columns)
