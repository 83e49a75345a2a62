"""The labels of a snapshot's rows, which a class-conditional network is trained on: whole numbers from 0."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.snapshots.filters import suggestion
from data_prep.snapshots.settings import LabelSettings
from infra.errors import DataError, SettingsError


def check_labels(settings: LabelSettings, schema: pa.Schema) -> None:
    """Refuse a column that no shard has, or that is not of whole numbers."""
    if settings.column not in schema.names:
        raise SettingsError(
            f"`labels.column` names `{settings.column}`, which is no column of these shards",
            remedy=suggestion(settings.column, schema.names, "columns"),
        )
    kind = schema.field(settings.column).type
    if not (pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(
            f"the column `{settings.column}` is {kind}, and labels are whole numbers",
            remedy="number the classes from 0 in a column of the corpus, and let its source keep that",
        )


def labels(column: pa.ChunkedArray, settings: LabelSettings) -> pa.Array:
    """A label or null for each row."""
    least, most = pc.min_max(column).as_py().values()
    if least is not None and (least < 0 or most >= settings.classes):
        raise DataError(
            f"the column `{settings.column}` holds {least if least < 0 else most}, "
            f"and labels of {settings.classes} classes are 0 to {settings.classes - 1}",
            remedy="set labels.classes to the number of classes, or leave such rows out with the filter",
        )
    return pa.concat_arrays(column.cast(pa.int32()).chunks) if column.num_chunks else pa.array([], pa.int32())
