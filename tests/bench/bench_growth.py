"""How planning, listing, resuming, dedup and snapshots grow with a corpus: 0.45 M, 4.5 M and, with --full, 45 M rows.

The corpus is made up and has no images: indexes, shard records and a plan, written as `prepare` would leave them. Each
step runs in a process of its own, so that its peak memory is its own too. The scratch folder is removed at the end.

    python -m tests.bench.bench_growth [--full] [--steps list,snapshot] [--folder /large/disk]
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare import plan
from data_prep.snapshots import dedup
from data_prep.sources import Rows
from infra import layout
from infra.records import DataObject, ShardRecord
from infra.shards import INDEX_SCHEMA, list_shards, parquet_bytes, read_index, shard_key, shard_prefix
from infra.store import FileStore, Store, open_store

PLAN, EDITION, SIZE = "0123456789abcdef", "fedcba9876543210", "256"
CORPORA = [(90, 5000), (900, 5000)]  # shards, rows of each
FULL = [(9000, 5000), (36000, 1250)]
SOURCES = ("photos", "drawings", "film")
SIDES = np.array([(512, 512), (448, 576), (576, 448), (640, 384)], np.int32)
PLACES = [f"in {where} at {when}" for where in ("the garden", "a street", "the hills") for when in ("dawn", "noon")]
SHORT = [f"{what} {place}" for what in ("a dog", "two cats", "a red bicycle", "an old house") for place in PLACES]
LONG = [f"{text}, {how}, seen from {where}" for text in SHORT for how in ("soft light", "rain") for where in ("afar",)]
LISTS, LIST_ROWS = "lists", 10**6
HOT = 100  # hashes that one row in a hundred shares


# ------------------------------------------------------------------------------------------------ the corpus


def write_corpus(root: Path, shards: int, rows: int) -> int:
    """An index and a record for each shard, and the plan; the bytes written."""
    with ThreadPoolExecutor(2) as pool:
        size = sum(pool.map(partial(write_shard, root, rows), range(shards)))
    write_plan(open_store(str(root)), shards, rows)
    return size


def write_plan(store: Store, shards: int, rows: int) -> None:
    """One input a source, whose ranges the shards are."""
    inputs = [plan.KnownAs(source, f"{source}.parquet", "0" * 64, 0) for source in SOURCES]
    planned = []
    for number in range(shards):
        here = inputs[number % len(inputs)]
        part = Rows(here.input, "", True, number // len(inputs) * rows, rows)
        planned.append(plan.PlannedShard(number, here.source, here.sha256, 0, rows, part))
    edition = plan.Edition(inputs=inputs, sizes={SIZE: 1}, settings={})
    store.put(f"plans/{PLAN}/00000.parquet", plan._to_parquet(planned))
    store.put(layout.EDITION.at(plan=PLAN, edition=EDITION), edition.model_dump_json().encode())


def write_shard(root: Path, rows: int, number: int) -> int:
    table, rejected = index(number, rows)
    data = parquet_bytes(table)
    sha256 = hashlib.sha256(data).hexdigest()
    record = ShardRecord(
        plan=PLAN,
        size=SIZE,
        number=number,
        tar=DataObject(key=f"data/{SIZE}/{number:05d}-{'0' * 64}.tar", sha256="0" * 64, size=0),
        index=DataObject(key=f"data/{SIZE}/{number:05d}-{sha256}.parquet", sha256=sha256, size=len(data)),
        accepted=rows - rejected,
        rejected={"missing": rejected},
        versions={"pillow": "12.0.0"},
    )
    # Past the store, which would wait for the disk twice a shard.
    for key, value in ((record.index.key, data), (shard_key(PLAN, SIZE, number), record.model_dump_json().encode())):
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(value)
    return len(data)


def write_lists(folder: Path, rows: int) -> None:
    """URL lists of a million rows, and one that comes later; all are copies of the first, which a plan cannot know."""
    folder.mkdir()
    first = folder / "00000.parquet"
    count = min(rows, LIST_ROWS)
    urls = pa.array([f"https://example.org/{number:08d}/a-photograph.jpg" for number in range(count)])
    pq.write_table(
        pa.table({"url": urls, "caption": pa.array(LONG).take(pa.array(np.arange(count) % len(LONG)))}), first
    )
    for number in range(1, -(-rows // count)):
        shutil.copyfile(first, folder / f"{number:05d}.parquet")
    shutil.copyfile(first, folder / "later")


def source_of(number: int) -> str:
    return SOURCES[number % len(SOURCES)]


def index(number: int, rows: int) -> tuple[pa.Table, int]:
    rng = np.random.default_rng(number)
    accepted = rng.random(rows) > 0.03
    side = SIDES[rng.integers(len(SIDES), size=rows)]
    length = rng.integers(20_000, 90_000, rows)
    pixels = rng.integers(0, 256, (rows, 32), np.uint8)
    phash = rng.integers(0, 2**64, rows, np.uint64)
    hot = np.flatnonzero(rng.random(rows) < 0.01)
    which = rng.integers(HOT, size=len(hot))
    pixels[hot], phash[hot] = which[:, None].astype(np.uint8), which.astype(np.uint64) << np.uint64(20)
    columns: dict[str, Any] = {
        "key": keys(rng, rows),
        "source": pa.array([source_of(number)] * rows),
        "licence": pa.array(["CC0-1.0"] * rows),
        "origin": pa.array(["https://example.org"] * rows),
        "name": pa.array([f"{number}/{row}" for row in range(rows)]),
        "row": pa.array(np.arange(number * rows, (number + 1) * rows)),
        "accepted": pa.array(accepted),
        "cause": pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32), mask=accepted), ["missing"]),
        "format": known(pa.array(["jpeg"] * rows), accepted),
        "original_width": known(pa.array(rng.integers(400, 3000, rows)), accepted),
        "original_height": known(pa.array(rng.integers(400, 3000, rows)), accepted),
        "width": known(pa.array(side[:, 0]), accepted),
        "height": known(pa.array(side[:, 1]), accepted),
        "offset": known(pa.array(np.cumsum(length)), accepted),
        "length": known(pa.array(length), accepted),
        "pixels_sha256": known(
            pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), rows, [None, buffer(pixels)]), accepted
        ),
        "phash": known(pa.array(phash), accepted),
        "captions": captions(rng, rows),
        "clip_score": known(pa.array(rng.normal(0.28, 0.03, rows).astype(np.float32)), accepted),
    }
    schema = pa.unify_schemas([INDEX_SCHEMA, pa.schema({"phash": pa.uint64(), "clip_score": pa.float32()})])
    table = {f.name: columns.get(f.name, pa.nulls(rows)) for f in schema}
    return pa.table([table[f.name].cast(f.type) for f in schema], schema=schema), int((~accepted).sum())


def known(values: pa.Array, accepted: Any) -> pa.Array:
    return pa.compute.if_else(pa.array(accepted), values, None)


def buffer(values: Any) -> pa.Buffer:
    return pa.py_buffer(np.ascontiguousarray(values))


def keys(rng: np.random.Generator, rows: int) -> pa.Array:
    digits = rng.bytes(10 * rows).hex().encode()
    offsets = np.arange(0, 20 * rows + 1, 20, dtype=np.int32)
    return pa.StringArray.from_buffers(rows, buffer(offsets), pa.py_buffer(digits))


def captions(rng: np.random.Generator, rows: int) -> pa.Array:
    """A short and a long one for each row."""
    which = rng.integers(len(LONG), size=rows)
    text = np.empty(2 * rows, object)
    text[0::2], text[1::2] = np.array(SHORT)[which % len(SHORT)], np.array(LONG)[which]
    kind = pa.array(["short", "long"] * rows)
    both = pa.StructArray.from_arrays([kind, pa.array(text)], ["kind", "text"])
    return pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * rows + 1, 2), pa.int32()), both)


# ------------------------------------------------------------------------------------------------ the steps


def nothing(store: Store) -> str:
    return "the imports alone"


def listing(store: Store) -> str:
    records = list(list_shards(store, shard_prefix(PLAN, SIZE)))
    return f"{len(records)} records, {sum(record.accepted for record in records):,} samples"


def resuming(store: Store) -> str:
    """What `prepare` does to find out what is left to do."""
    from data_prep.prepare.job import _done

    planned = plan.read_plan(store, PLAN, EDITION)
    done = {shard.number for shard, _ in _done(store, planned)}
    return f"{len([shard for shard in planned.shards if shard.number not in done])} shards left"


def exact(store: Store) -> str:
    return deduplicated(store, None)


def perceptual(store: Store) -> str:
    return deduplicated(store, dedup.FARTHEST)


def deduplicated(store: Store, distance: int | None) -> str:
    rows = dedup.Rows(distance)
    for shard in list_shards(store, shard_prefix(PLAN, SIZE)):
        rows.add(read_index(store, shard, dedup.columns(distance)))
    return f"{int(rows.duplicates().sum()):,} duplicates"


def planning(store: Store) -> str:
    """A plan from lists of URLs, the same again, and the same with another list."""
    from infra.config import parse

    lists = Path(store.url.removeprefix("file://"), LISTS)
    source = {"kind": "url_list", "name": "web", "url": str(lists), "tables": ["*.parquet"]}
    settings = parse(plan.PrepareSettings, {"sources": [source]})
    seconds, plans = [], []
    for again in range(3):
        if again == 2:
            (lists / "later").rename(lists / "later.parquet")
        began = time.perf_counter()
        plans.append(plan.make_plan(store, settings))
        seconds.append(time.perf_counter() - began)
    assert plans[1] == plans[0] and plans[2].digest == plans[0].digest
    (lists / "later.parquet").rename(lists / "later")
    return (
        f"{plans[0].rows:,} rows in {len(plans[0].shards):,} shards in {seconds[0]:.1f} s; "
        f"again {seconds[1]:.1f} s; {len(plans[2].shards) - len(plans[0].shards)} shards more {seconds[2]:.1f} s"
    )


def plain_snapshot(store: Store) -> str:
    return selected(store, filter="width >= 512 and clip_score > 0.26")


def full_snapshot(store: Store) -> str:
    return selected(
        store,
        filter="width >= 512 and clip_score > 0.26 and not duplicate",
        weights={"film": 2.0, "drawings": 0.5},
        captions=[
            {"source": "film", "kind": "long", "weight": 1.0},
            {"kind": "long", "words": [8, None], "weight": 0.7},
            {"kind": "short", "weight": 0.3},
        ],
        held_out=0.001,
    )


def selected(store: Store, **settings: Any) -> str:
    from data_prep.snapshots.build import snapshot
    from data_prep.snapshots.settings import SnapshotSettings
    from infra.config import parse

    record = snapshot(store, PLAN, EDITION, parse(SnapshotSettings, settings))
    size = record.selection.size / 1e6
    return f"{record.rows:,} + {record.held_out_rows:,} rows, {size:,.0f} MB; " + ", ".join(
        f"{label} {count:,}" for label, count in record.counts
    )


def summary(store: Store) -> str:
    from data_prep.upkeep.statistics import summarise

    found = summarise(store, PLAN, EDITION, SIZE, columns=["clip_score"])
    return f"{found.accepted:,} samples, {len(found.model_dump_json())} bytes of JSON"


def forgetting(store: Store) -> str:
    """Some items, one of them in a crowd of twins, and a snapshot after it."""
    from data_prep.snapshots.forget import forget

    items = [f"0/{row}" for row in range(500)] + ["unknown"]
    found = forget(store, items, "asked")
    assert found.unknown == ["unknown"]
    said = ", ".join(f"{holder.training:,} in {holder.snapshot[10:16]}" for holder in found.snapshots)
    return f"{found.keys} keys, {found.twins:,} twins; {said}; then " + plain_snapshot(store)


# A step is given the store and says in a line what it found.
STEPS: dict[str, Callable[[Store], str]] = {
    "import": nothing,
    "plan": planning,
    "list": listing,
    "resume": resuming,
    "dedup-exact": exact,
    "dedup-4": perceptual,
    "snapshot": plain_snapshot,
    "snapshot-all": full_snapshot,
    "summary": summary,
    "forget": forgetting,
}


def run_step(name: str, folder: str) -> None:
    """In a process of its own: seconds, peak memory and CPU seconds as a line of JSON."""
    store: Store = FileStore(Path(folder))
    began = time.perf_counter()
    said = STEPS[name](store)
    seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
    print(json.dumps({**figures, "said": said}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="45 M rows as well, in 9,000 and in 36,000 shards")
    parser.add_argument("--only", help="shards x rows of one corpus, such as 9000x5000")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--folder", help="where the corpora go for the while")
    parser.add_argument("--run", nargs=2, metavar=("STEP", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_step(*options.run)
        return
    corpora = CORPORA + (FULL if options.full else [])
    if options.only:
        shards, _, rows = options.only.partition("x")
        corpora = [(int(shards), int(rows))]
    for shards, rows in corpora:
        folder = Path(tempfile.mkdtemp(prefix="pixnerd-growth-", dir=options.folder))
        try:
            measure(folder, shards, rows, options.steps.split(","))
        finally:
            shutil.rmtree(folder)


def measure(folder: Path, shards: int, rows: int, steps: list[str]) -> None:
    began = time.perf_counter()
    size = write_corpus(folder, shards, rows)
    write_lists(folder / LISTS, shards * rows)
    took = time.perf_counter() - began
    print(
        f"{shards * rows / 1e6:.2f} M rows, {shards:,} shards, indexes of {size / 1e6:,.0f} MB (made in {took:.0f} s)"
    )
    for name in steps:
        command = [sys.executable, "-m", "tests.bench.bench_growth", "--run", name, str(folder)]
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
