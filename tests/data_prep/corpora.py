"""Small corpora with every kind of bad input, and `prepare` without Ray for tests of what comes after it."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare.downloads import Downloads, download
from data_prep.prepare.job import begin_retries, failed_downloads
from data_prep.prepare.plan import Plan, PrepareSettings, make_plan
from data_prep.prepare.shard import make_shard, plain_outcomes
from data_prep.rejections import Cause
from infra import layout
from infra.config import parse
from infra.store import Store
from tests.data_prep import zoo

BAD = {  # by place in every ten rows: what is wrong with the input
    3: Cause.TRUNCATED,
    5: Cause.MISSING,
    6: Cause.TOO_SMALL,
    7: Cause.NO_CAPTION,
}


DOWNLOADED = ("downloads/", layout.ORIGINALS.at(), layout.TABLES.at())  # what came from the web, and from which lists


def write_corpus(folder: Path, count: int) -> dict[str, int]:
    """`count` rows, four in ten bad, every tenth a copy of the one before; the causes expected, counted."""
    (folder / "images").mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    causes: dict[str, int] = {}
    for number in range(count):
        bad = BAD.get(number % 10)
        kind = ("JPEG", "PNG")[number % 2]
        name = f"images/{number:05d}.{kind.lower()}"
        picture = shaded(number - 1 if number % 10 == 9 else number, 12 if bad is Cause.TOO_SMALL else 40)
        data = zoo.saved(picture, "PNG" if number % 10 in (8, 9) else kind)
        if bad is not Cause.MISSING:
            (folder / name).write_bytes(data[: len(data) // 2] if bad is Cause.TRUNCATED else data)
        said = None if bad is Cause.NO_CAPTION else f"picture {number}"
        long = said and f"a long caption of {said}"
        rows.append({"image": name, "short": said, "long": long, "objects": number % 4, "score": number / count})
        if bad:
            causes[bad] = causes.get(bad, 0) + 1
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet", row_group_size=max(1, count // 3))
    return dict(sorted(causes.items()))


_BEGAN = re.compile(rb'"began":"[^"]*"')
# The type that `datasets` gives Image(), whether it decodes or not.
HUGGING_FACE_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_as_datasets(path: Path, table: pa.Table, features: dict[str, Any], **options: Any) -> None:
    """As `Dataset.to_parquet` and `push_to_hub` of the library `datasets` write it, in the layout of version 5.2.0.

    The features stand in the schema's metadata; a column of images is neither compressed nor a dictionary, and the
    pages are cut where the content says so, and have an index.
    """
    images = {name for name in table.column_names if table.schema.field(name).type == HUGGING_FACE_IMAGE}
    plain = {f"{name}.{part}": "NONE" for name in images for part in ("bytes", "path")}
    leaves = _leaves(table.select([name for name in table.column_names if name not in images]))
    info = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata(info),
        path,
        compression={**dict.fromkeys(leaves, "SNAPPY"), **plain},
        use_dictionary=leaves,
        use_content_defined_chunking=True,
        write_page_index=True,
        **options,
    )


def _leaves(table: pa.Table) -> list[str]:
    out = pa.BufferOutputStream()
    pq.write_table(table.slice(0, 0), out)
    schema = pq.ParquetFile(pa.BufferReader(out.getvalue())).schema
    return [schema.column(number).path for number in range(len(schema))]


def shaded(number: int, side: int) -> zoo.Pixels:
    return (zoo.picture(side, side + 5).astype(int) * (50 + number % 50) // 100 + number // 50).astype(np.uint8)


def settings_for(folder: Path, **changes: Any) -> PrepareSettings:
    source = {
        "kind": "table_folder",
        "name": "small",
        "url": str(folder),
        "tables": ["table.parquet"],
        "captions": ["short", "long"],
        "keep": ["objects", "score"],
        "licence": "CC0-1.0",
    }
    return parse(PrepareSettings, {"sources": [source], "sizes": [32, 16], "rows_per_shard": 8} | changes)


def prepare_here(store: Store, settings: PrepareSettings, plan: Plan | None = None) -> Plan:
    """All downloads and all shards of a plan, one after the other."""
    plan = plan or make_plan(store, settings)
    downloads = Downloads(store, settings, plan, plan.shards)
    for work in downloads.works:
        download(store, settings.fetch, work, keep=settings.keep_originals)
        list(downloads.finished(work))
    for shard in plan.shards:
        linked = downloads.linked(shard)
        make_shard(store, settings, plan, shard, linked, partial(plain_outcomes, settings=settings))
    return plan


def contents(store: Store) -> dict[str, bytes]:
    """All that is there, but for when its downloads began, and for what tells of attempts at stages."""
    keys = [entry.key for entry in store.list() if not entry.key.startswith(layout.ATTEMPTS.under())]
    found = {key: store.get(key) for key in keys}
    return found | {
        key: _BEGAN.sub(b'"began":""', data) for key, data in found.items() if key.startswith(layout.BATCH.under())
    }


def retry_failed(store: Store, settings: PrepareSettings) -> int:
    """Let the next `prepare` try failed downloads again; returns how many."""
    return begin_retries(store, failed_downloads(store, settings))
