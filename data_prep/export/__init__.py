"""`export`: a snapshot as files that others train from, in a folder or another store.

    exports/<digest>.json      in the store: ExportRecord, which copies of a snapshot exist where
    export.begun.json          at the destination: which export is being written there
    train/..., validation/...  its samples, those held out as `validation`; see data_prep.export.layouts
    export.json                what export.begun.json says, and what was written; written last, when all is there

An export that was interrupted continues when it is started again, and a finished one is left as it is. A snapshot is
refused if some of its items have been forgotten since it was made: it must be made again first.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pyarrow as pa

from data_prep.export.layouts import HuggingFace, Layout, WebDataset
from data_prep.export.listing import Listing
from data_prep.images.sizes import SUFFIX, Format
from data_prep.prepare.plan import Edition
from data_prep.snapshots.forget import ForgottenItems, count_listed, lists_about
from data_prep.sources.reading import in_order, tars_in
from infra.errors import DataError, SettingsError
from infra.layout import EDITION, EXPORT
from infra.records import DataObject, ExportRecord, Plain, Record, SnapshotRecord, fetch_data, read_record, write_record
from infra.shards import list_shards, read_index, tar_number
from infra.store import SCRATCH, FileStore, Store

FORMAT = 1  # raised when the same snapshot would give other files
WRITERS = 4  # parts that are written at once
BEGUN, DONE = "export.begun.json", "export.json"

LayoutName = Literal["webdataset", "huggingface"]
TAR_MIB = 256


class Begun(Record):
    """The record at the destination of an export that is being written: of which snapshot, in which layout."""

    format: int
    snapshot: str  # key of its record
    digest_of_snapshot: str  # of the record
    layout: LayoutName
    tar_mib: int | None


class Split(Plain):
    rows: int
    parts: int  # tars, or folders of pictures


class Exported(Begun):
    splits: dict[str, Split]

    @property
    def begun(self) -> Begun:
        return Begun(**self.model_dump(exclude={"splits"}))


def export(store: Store, snapshot: str, to: Store, layout: LayoutName, tar_mib: int = TAR_MIB) -> Exported:
    """Write a snapshot's samples, or those that are still missing. `tar_mib` is the size limit of a tar."""
    record = read_record(store, snapshot, SnapshotRecord)
    begun = Begun(
        format=FORMAT,
        snapshot=snapshot,
        digest_of_snapshot=record.digest(),
        layout=layout,
        tar_mib=tar_mib if layout == "webdataset" else None,
    )
    _check_apart(store, to)
    _check_forgotten(store, record)
    done = _earlier_export(to, begun)
    if done is not None:
        return done
    copy = ExportRecord(snapshot=snapshot, digest_of_snapshot=record.digest(), to=to.url, layout=layout)
    write_record(store, EXPORT.at(digest=copy.digest()), copy)  # first, since an unfinished export is a copy, too
    write_record(to, BEGUN, begun)
    halves = {"train": (record.selection, record.rows), "validation": (record.held_out, record.held_out_rows)}
    splits = {split: _split(store, to, begun, record, split, *half) for split, half in halves.items() if half[1]}
    done = Exported(**begun.model_dump(), splits=splits)
    write_record(to, DONE, done)
    to.delete(BEGUN)
    if isinstance(to, FileStore):
        with suppress(OSError):  # not empty, if another process is writing there
            (to.root / SCRATCH).rmdir()
    return done


def _split(
    store: Store, to: Store, begun: Begun, record: SnapshotRecord, split: str, selection: DataObject, rows: int
) -> Split:
    with TemporaryDirectory(prefix="pixnerd-export-") as folder:
        path = Path(folder, "selection.parquet")
        fetch_data(store, selection, path)
        layout = _layout(store, to, begun, record.shards, split, path)

        def write(numbered: tuple[int, pa.Table]) -> int:
            layout.write(*numbered)
            return int(numbered[1].num_rows)

        counts = list(in_order(write, enumerate(layout.parts()), WRITERS))
        if sum(counts) != rows:
            raise DataError(
                f"{selection.key} lists {sum(counts)} samples, and its record {rows}",
                remedy="run `pixnerd data verify --drop-damaged`, then the recipe again",
            )
        layout.close()
    return Split(rows=rows, parts=len(counts))


def _layout(store: Store, to: Store, begun: Begun, shards: str, split: str, path: Path) -> Layout:
    _, plan, size, _ = shards.split("/")  # as in `shards/0a1b2c3d4e5f6a7b/256/`
    listing, suffix = Listing(store, plan, size, path), _suffix(store, plan)
    if begun.tar_mib is not None:
        return WebDataset(to, split, suffix, listing, begun.tar_mib)
    return HuggingFace(to, split, suffix, listing)


def _suffix(store: Store, plan: str) -> str:
    """The suffix of image files, by the plan's `format`, which is the same in all editions."""
    for key in EDITION.keys(store, plan=plan):
        image_format: Format = read_record(store, key, Edition).settings["format"]
        return SUFFIX[image_format]
    raise DataError(f"there is no plan {plan} in {store.url}", remedy="export from the store that it was prepared in")


# ------------------------------------------------------------------------------------------------ checks


def _check_apart(store: Store, to: Store) -> None:
    ours, theirs = (f"{one.url.rstrip('/')}/" for one in (store, to))
    if ours.startswith(theirs) or theirs.startswith(ours):
        raise SettingsError(f"{to.url} and the store lie in one another", remedy="name another place for --out")


def _earlier_export(to: Store, begun: Begun) -> Exported | None:
    """This export if it is finished, None if it is not; another export or other files there are an error."""
    done = read_record(to, DONE, Exported) if to.exists(DONE) else None
    earlier = done.begun if done else read_record(to, BEGUN, Begun) if to.exists(BEGUN) else None
    if earlier is not None and earlier != begun:
        another = "another export" if done else "the beginning of another export"
        raise SettingsError(
            f"{to.url} holds {another}, of {earlier.snapshot} as {earlier.layout}",
            remedy="name another place for --out, or remove what is there",
        )
    if earlier is None and next(to.list_unchecked(), None) is not None:
        raise SettingsError(f"{to.url} is not empty", remedy="name a new or an empty place for --out")
    return done


def _check_forgotten(store: Store, record: SnapshotRecord) -> None:
    """Refuse to export samples that somebody has asked to forget since the snapshot was made."""
    halves = (record.selection, record.held_out)
    numbers = {tar_number(tar) for half in halves for tar in tars_in(store, half)}
    lists = lists_about(store, record.shards, numbers)
    forgotten = ForgottenItems(store, {name: one for name, one in lists.items() if name not in record.forgotten})
    if not forgotten:
        return
    shards = list(list_shards(store, record.shards, numbers))
    read = partial(read_index, store, columns=["key", "pixels_sha256"])
    for table in in_order(read, shards):
        forgotten.learn(table)
    keys: set[str] = set()
    for table in in_order(read, shards):
        keys.update(table["key"].filter(pa.array(forgotten.mask(table))).to_pylist())
    if count := sum(count_listed(store, half, keys) for half in halves):
        raise DataError(
            f"{count:,} samples of this snapshot have been forgotten since it was made",
            remedy="run its recipe again, which makes the snapshot without them, then export that one",
        )
