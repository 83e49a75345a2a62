"""What is wrong with the settings of a snapshot or of scores, as far as those of the stages before it tell.

It is found before anything is prepared. What only the data can tell (the types of a table's columns, kinds of captions)
is found when they are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, product

import pyarrow as pa

from data_prep.images.sizes import size_name
from data_prep.prepare.plan import PrepareSettings
from data_prep.scores.settings import ScorerSettings
from data_prep.snapshots.filters import columns_in, parse_filter
from data_prep.snapshots.settings import SnapshotSettings, wrongs
from infra.config import nearest
from infra.errors import SettingsError
from infra.problems import Wrong
from infra.shards import INDEX_SCHEMA

# What a table's column may turn out to be; whole numbers go wherever fractions go.
ANY = (pa.float64(), pa.string(), pa.bool_())
MOST_TRIED = 100


def size(asked: int | str, stage: str, prepared: PrepareSettings) -> Iterator[Wrong]:
    sizes = [size_name(size) for size in prepared.sizes]
    if str(asked) not in sizes:
        near = nearest(str(asked), sizes) if isinstance(asked, str) else None
        remedy = f"did you mean `{near}`?" if near else f"it prepares {', '.join(sizes)}"
        yield Wrong("size", f"is {asked}, which `{stage}` does not prepare", remedy)


def snapshot(
    settings: SnapshotSettings, prepared: PrepareSettings, scorers: Sequence[ScorerSettings]
) -> Iterator[Wrong]:
    """A filter that is no expression, or asks for columns that nobody makes; weights of sources that are none."""
    try:
        asked = columns_in(settings.filter)
        yield from wrongs(settings, prepared.by_name)
        columns = _columns(prepared, scorers)
        unknown = sorted(asked - columns.keys()) if not settings.scores else []  # a digest does not tell its columns
        if unknown:
            near = nearest(unknown[0], columns)
            remedy = f"did you mean `{near}`?" if near else f"columns: {', '.join(sorted(columns))}"
            yield Wrong("filter", f"names `{unknown[0]}`, which is no column of these shards", remedy)
        elif asked <= columns.keys():
            _check_types(settings.filter, asked, columns)
    except SettingsError as error:
        yield Wrong("filter", f"is refused: {error.message}", error.remedy)


def _check_types(text: str, asked: set[str], columns: dict[str, pa.DataType | None]) -> None:
    """Raises what is wrong with the filter if it is so whatever the columns of tables turn out to be."""
    names = sorted(asked)
    kinds = product(*(ANY if columns[name] is None else (columns[name],) for name in names))
    first: SettingsError | None = None
    for chosen in islice(kinds, MOST_TRIED):
        try:
            parse_filter(text, pa.schema(list(zip(names, chosen, strict=True))))
            return
        except SettingsError as error:
            first = first or error
    if first is not None and next(kinds, None) is None:
        raise first


def _columns(prepared: PrepareSettings, scorers: Iterable[ScorerSettings]) -> dict[str, pa.DataType | None]:
    """All that a filter may ask for, with its type where the settings tell it."""
    found: dict[str, pa.DataType | None] = {"duplicate": pa.bool_()}
    for source in prepared.sources:
        for name, kind in source.kept_columns().items():
            found[name] = kind if found.get(name, kind) == kind else None
    for scorer in scorers:
        names = (name for name in scorer.columns() if name != "captions")
        found |= {name: pa.string() if name == scorer.failure else pa.float32() for name in names}
    return found | {field.name: field.type for field in INDEX_SCHEMA}
