"""Checks of a snapshot's or a score's settings against those of the stages before it, before anything is prepared.

What only the data can tell, such as the types of a table's columns or the kinds of captions, is checked when the
snapshot is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product

import pyarrow as pa

from data_prep.images.sizes import size_name
from data_prep.prepare.plan import PrepareSettings
from data_prep.scores.settings import ScorerSettings
from data_prep.snapshots.filters import columns_in, parse_filter, suggestion
from data_prep.snapshots.settings import LabelSettings, SnapshotSettings, wrongs
from infra.errors import SettingsError
from infra.problems import Wrong, did_you_mean
from infra.shards import INDEX_SCHEMA

# The types that a table's column may turn out to have; a filter that accepts fractions accepts whole numbers too.
ANY = (pa.float64(), pa.string(), pa.bool_())
MOST_TRIED = 100  # combinations of the columns' types


def size(asked: int | str, stage: str, prepared: PrepareSettings) -> Iterator[Wrong]:
    sizes = [size_name(size) for size in prepared.sizes]
    if str(asked) not in sizes:
        remedy = did_you_mean(asked if isinstance(asked, str) else "", sizes, f"it prepares {', '.join(sizes)}")
        yield Wrong("size", f"is {asked}, which `{stage}` does not prepare", remedy)


def snapshot(
    settings: SnapshotSettings, prepared: PrepareSettings, scorers: Sequence[ScorerSettings]
) -> Iterator[Wrong]:
    """A filter that cannot be read or names unknown columns, and weights or captions of sources that do not exist."""
    try:
        asked = columns_in(settings.filter)
        yield from wrongs(settings, prepared.by_name)
        columns = _columns(prepared, scorers)
        unknown = sorted(asked - columns.keys()) if not settings.scores else []  # a digest does not tell its columns
        if unknown:
            remedy = suggestion(unknown[0], columns, "columns")
            yield Wrong("filter", f"names `{unknown[0]}`, which is no column of these shards", remedy)
        elif asked <= columns.keys():
            _check_types(settings.filter, asked, columns)
        if settings.labels is not None:
            yield from _labels(settings.labels, columns, known=not settings.scores)
    except SettingsError as error:
        yield Wrong("filter", f"is refused: {error.message}", error.remedy)


def _labels(settings: LabelSettings, columns: dict[str, pa.DataType | None], known: bool) -> Iterator[Wrong]:
    if settings.column not in columns:
        if known:
            remedy = suggestion(settings.column, columns, "columns")
            yield Wrong("labels.column", f"names `{settings.column}`, which is no column of these shards", remedy)
    elif (kind := columns[settings.column]) is not None and not pa.types.is_integer(kind):
        yield Wrong("labels.column", f"names `{settings.column}`, which is {kind}", "name one of whole numbers")


def _check_types(text: str, asked: set[str], columns: dict[str, pa.DataType | None]) -> None:
    """Raise an error if the filter is wrong whatever the types of the tables' columns turn out to be."""
    names = sorted(asked)
    combinations = product(*(ANY if columns[name] is None else (columns[name],) for name in names))
    first: SettingsError | None = None
    for types in islice(combinations, MOST_TRIED):
        try:
            parse_filter(text, pa.schema(list(zip(names, types, strict=True))))
            return
        except SettingsError as error:
            first = first or error
    if first is not None and next(combinations, None) is None:
        raise first


def _columns(prepared: PrepareSettings, scorers: Iterable[ScorerSettings]) -> dict[str, pa.DataType | None]:
    """All columns that a filter may name, with their types as far as the settings tell them."""
    types: dict[str, pa.DataType | None] = {"duplicate": pa.bool_()}
    for source in prepared.sources:
        for name, kept_type in source.kept_columns().items():
            types[name] = kept_type if types.get(name, kept_type) == kept_type else None
    for scorer in scorers:
        names = (name for name in scorer.columns() if name != "captions")
        types |= {name: pa.string() if name == scorer.failure else pa.float32() for name in names}
    return types | {field.name: field.type for field in INDEX_SCHEMA}
