"""How looking up the URLs of a list grows with it: a new list, the same under another name, in another order, grown.

The lists are made up and nothing is downloaded: the batches of the first are written as if all had been. Each step runs
in a process of its own, so that its peak memory is its own too. The scratch folder is removed at the end.

    python -m tests.bench.bench_links [--rows 1000000,5000000] [--folder /large/disk]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare import catalogue, links, originals
from data_prep.prepare.linking import Asking, link
from data_prep.prepare.links import At, LinksRecord
from data_prep.prepare.originals import BatchRecord
from data_prep.prepare.plan import PrepareSettings
from data_prep.sources import Rows, UrlList
from infra import layout
from infra.config import parse
from infra.records import DataObject
from infra.shards import parquet_bytes
from infra.store import FileStore

GROUP = 1 << 18


def urls(first: int, rows: int) -> Iterator[str]:
    for number in range(first, first + rows):
        yield f"https://images-{number % 977}.example.org/{number:x}/photographs/{number:08d}.jpg?size=large&v={number}"


def write_list(path: Path, rows: int, *, more: int = 0) -> None:
    schema = pa.schema([("url", pa.string()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for first in range(0, rows + more, GROUP):
            found = list(urls(first, min(GROUP, rows + more - first)))
            writer.write_table(pa.table({"url": found, "caption": ["a photograph"] * len(found)}, schema=schema))


def shuffle(path: Path, to: Path) -> None:
    table = pq.read_table(path)
    order = np.random.default_rng(0).permutation(table.num_rows)
    pq.write_table(table.take(pa.array(order)), to, row_group_size=GROUP)


def linked(store: FileStore, name: str) -> LinksRecord:
    folder = store.root / "lists"
    source = {"kind": "url_list", "name": "web", "url": str(folder), "tables": [name]}
    settings = parse(PrepareSettings, {"sources": [source]})
    found = settings.sources[0]
    assert isinstance(found, UrlList)
    rows = pq.ParquetFile(folder / name).metadata.num_rows
    at = At(links.place(found, name, "0" * 64, settings.fetch))
    return link(store, settings.fetch, [Asking(found, at, Rows(name, name, False, 0, rows))])[at]


def nothing(store: FileStore) -> str:
    return "the imports alone"


def new(store: FileStore) -> str:
    record = linked(store, "first.parquet")
    return f"{record.urls:,} URLs to ask for; {(record.links.size + record.asked.size) / 1e6:.0f} MB written"


def answer(store: FileStore) -> str:
    """The batches, as if all had been downloaded; past the store, which would wait for the disk."""
    record, count = linked(store, "first.parquet"), 0
    for batch, found in links.batches(store, record):
        rows = len(found)
        lengths = np.random.default_rng(batch.number).integers(20_000, 400_000, rows)
        random = np.random.default_rng(batch.number).integers(0, 256, (rows, 32), np.uint8)
        gone = np.arange(rows) % 10 == 3
        columns: dict[str, Any] = {
            "url": found,
            "cause": pa.array(np.full(rows, "gone", object), pa.string(), mask=~gone),
            "status": pa.array(np.where(gone, 404, 200), pa.int32()),
            "answered_by": found,
            "content_type": pa.array(["image/jpeg"] * rows),
            "tries": pa.array(np.ones(rows), pa.int32()),
            "redirects": pa.array(np.zeros(rows), pa.int32()),
            "offset": pa.array(np.cumsum(lengths), mask=gone),
            "length": pa.array(lengths, mask=gone),
            "sha256": pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, pa.py_buffer(random)]),
        }
        table = pa.table({f.name: columns.get(f.name, pa.nulls(rows, f.type)) for f in originals.SCHEMA}).cast(
            originals.SCHEMA
        )
        data = parquet_bytes(table)
        sha256 = hashlib.sha256(data).hexdigest()
        index = DataObject(key=f"{layout.ORIGINALS.at()}/{batch.name}-{sha256}.parquet", sha256=sha256, size=len(data))
        made = BatchRecord(
            batch=batch.name,
            attempt=0,
            began="2026-11-30T09:00:00+00:00",
            asked=record.asked_with,
            kept=True,
            tar=DataObject(key=f"{layout.ORIGINALS.at()}/{batch.name}-{'0' * 64}.tar", sha256="0" * 64, size=0),
            index=index,
            accepted=int((~gone).sum()),
            rejected={"gone": int(gone.sum())},
        )
        for key, value in ((index.key, data), (originals.batch_key(batch.name, 0), made.model_dump_json().encode())):
            path = store.root / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value)
        count += 1
    return f"{count:,} batches"


def known(name: str, store: FileStore) -> str:
    record = linked(store, name)
    return f"{record.urls:,} URLs to ask for; {(record.links.size + record.asked.size) / 1e6:.0f} MB written"


def write_catalogue(store: FileStore) -> str:
    catalogue.update(store)
    sizes = [entry.size for entry in store.list(f"{layout.ORIGINALS.at()}/entries-")]
    return f"{sum(sizes) / 1e6:.0f} MB"


# A step is given the store and says in a line what it found.
STEPS: dict[str, Callable[[FileStore], str]] = {
    "import": nothing,
    "new": new,
    "answer": answer,
    "renamed-0": lambda store: known("renamed-0.parquet", store),  # without a catalogue
    "catalogue": write_catalogue,
    "renamed": lambda store: known("renamed.parquet", store),
    "shuffled": lambda store: known("shuffled.parquet", store),
    "grown": lambda store: known("grown.parquet", store),
}


def run_step(name: str, folder: str) -> None:
    """In a process of its own: seconds, peak memory and CPU seconds as a line of JSON."""
    store = FileStore(Path(folder))
    began = time.perf_counter()
    said = STEPS[name](store)
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
    print(json.dumps({**figures, "said": said}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1000000,5000000")
    parser.add_argument("--folder", help="where the lists go for the while")
    parser.add_argument("--run", nargs=2, metavar=("STEP", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_step(*options.run)
        return
    for rows in map(int, options.rows.split(",")):
        folder = Path(tempfile.mkdtemp(prefix="pixnerd-links-bench-", dir=options.folder))
        try:
            measure(folder, rows)
        finally:
            shutil.rmtree(folder)


def measure(folder: Path, rows: int) -> None:
    (folder / "lists").mkdir()
    write_list(folder / "lists" / "first.parquet", rows)
    for name in ("renamed-0", "renamed"):
        shutil.copyfile(folder / "lists" / "first.parquet", folder / "lists" / f"{name}.parquet")
    shuffle(folder / "lists" / "first.parquet", folder / "lists" / "shuffled.parquet")
    write_list(folder / "lists" / "grown.parquet", rows, more=1)
    print(f"{rows / 1e6:.2f} M rows")
    for name in STEPS:
        command = [sys.executable, "-m", "tests.bench.bench_links", "--run", name, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"  {name:12} failed: {done.stderr.strip().splitlines()[-1]}")
            continue
        found = json.loads(done.stdout)
        print(
            f"  {name:12} {found['seconds']:8.1f} s  {found['cpu']:8.1f} CPU s  {found['peak_mib']:7.0f} MiB  "
            f"{found['said']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
