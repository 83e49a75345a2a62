"""`export`: a snapshot as files that others train from, in a folder or another store.

    exports/<digest>.json    ExportRecord, in the store that it comes from: who holds copies of what
    export.begun.json        at the place that it goes to: which export is being written there
    train/..., validation/...  its samples, those held out as `validation`; see data_prep.export.layouts
    export.json              the same as export.begun.json, and what was written; it exists, so all is there

What is held out is a split of its own. An export that was stopped goes on where it was if it is begun again; one that
is there is left alone. What somebody has asked to forget since the snapshot was made is not given out: the snapshot is
to be made again first.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from data_prep.export.layouts import HuggingFace, Layout, WebDataset
from data_prep.export.listing import Listing
from data_prep.images.sizes import SUFFIX, Format
from data_prep.prepare.plan import Edition
from data_prep.snapshots.forget import Gone, lists_about
from data_prep.sources.reading import column, in_order
from infra.errors import DataError, SettingsError
from infra.layout import EDITION, EXPORT
from infra.records import (
    DataObject,
    ExportRecord,
    Record,
    SnapshotRecord,
    fetch_data,
    read_record,
    write_record,
)
from infra.shards import list_shards, read_index
from infra.store import SCRATCH, FileStore, Store

FORMAT = 1  # raised when the same snapshot would give other files
WRITERS = 4  # parts that are written at once
BEGUN, DONE = "export.begun.json", "export.json"

LayoutName = Literal["webdataset", "huggingface"]
TAR_MIB = 256


class Begun(Record):
    """Which export it is."""

    format: int
    snapshot: str  # key of its record
    digest_of_snapshot: str  # of the record
    layout: LayoutName
    tar_mib: int | None


class Split(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    rows: int
    parts: int  # tars, or folders of pictures


class Exported(Begun):
    splits: dict[str, Split]

    @property
    def begun(self) -> Begun:
        return Begun(**self.model_dump(exclude={"splits"}))


def export(store: Store, snapshot: str, to: Store, layout: LayoutName, tar_mib: int = TAR_MIB) -> Exported:
    """Write a snapshot's samples, or what is missing of them. `tar_mib` is what a tar may come to."""
    record = read_record(store, snapshot, SnapshotRecord)
    begun = Begun(
        format=FORMAT,
        snapshot=snapshot,
        digest_of_snapshot=record.digest(),
        layout=layout,
        tar_mib=tar_mib if layout == "webdataset" else None,
    )
    _check_place(store, to)
    _check_forgotten(store, record)
    done = _earlier(to, begun)
    if done is not None:
        return done
    copy = ExportRecord(snapshot=snapshot, digest_of_snapshot=record.digest(), to=to.url, layout=layout)
    write_record(store, EXPORT.at(digest=copy.digest()), copy)  # first: what is half there is a copy, too
    write_record(to, BEGUN, begun)
    halves = {"train": (record.selection, record.rows), "validation": (record.held_out, record.held_out_rows)}
    splits = {split: _split(store, to, begun, record, split, *half) for split, half in halves.items() if half[1]}
    done = Exported(**begun.model_dump(), splits=splits)
    write_record(to, DONE, done)
    to.delete(BEGUN)
    if isinstance(to, FileStore):
        with suppress(OSError):  # somebody else may be writing there
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
    _, plan, size, _ = shards.split("/")
    listing, suffix = Listing(store, plan, size, path), _suffix(store, plan)
    if begun.tar_mib is not None:
        return WebDataset(to, split, suffix, listing, begun.tar_mib)
    return HuggingFace(to, split, suffix, listing)


def _suffix(store: Store, plan: str) -> str:
    """Of the images: as a plan's settings say, which are the same in all editions."""
    for key in EDITION.keys(store, plan=plan):
        image_format: Format = read_record(store, key, Edition).settings["format"]
        return SUFFIX[image_format]
    raise DataError(f"there is no plan {plan} in {store.url}", remedy="export from the store that it was prepared in")


# ------------------------------------------------------------------------------------------------ what is against it


def _check_place(store: Store, to: Store) -> None:
    ours, theirs = (f"{one.url.rstrip('/')}/" for one in (store, to))
    if ours.startswith(theirs) or theirs.startswith(ours):
        raise SettingsError(f"{to.url} and the store lie in one another", remedy="name another place for --out")


def _earlier(to: Store, begun: Begun) -> Exported | None:
    """The same export, if it is there. Another one, or whatever else lies there, is an error."""
    done = read_record(to, DONE, Exported) if to.exists(DONE) else None
    there = done.begun if done else read_record(to, BEGUN, Begun) if to.exists(BEGUN) else None
    if there is not None and there != begun:
        another = "another export" if done else "the beginning of another export"
        raise SettingsError(
            f"{to.url} holds {another}, of {there.snapshot} as {there.layout}",
            remedy="name another place for --out, or remove what is there",
        )
    if there is None and next(to.list_unchecked(), None) is not None:
        raise SettingsError(f"{to.url} is not empty", remedy="name a new or an empty place for --out")
    return done


def _check_forgotten(store: Store, record: SnapshotRecord) -> None:
    """Nothing is given out that somebody has asked to forget since the snapshot was made."""
    halves = (record.selection, record.held_out)
    tars = {name for half in halves for part in column(store, half, "tar") for name in part.unique().to_pylist()}
    numbers = {int(Path(tar).name.partition("-")[0]) for tar in tars}
    lists = lists_about(store, record.shards, numbers)
    gone = Gone(store, {name: found for name, found in lists.items() if name not in record.forgotten})
    if not gone:
        return
    shards = list(list_shards(store, record.shards, numbers))
    read = partial(read_index, store, columns=["key", "pixels_sha256"])
    for table in in_order(read, shards):
        gone.learn(table)
    keys: set[str] = set()
    for table in in_order(read, shards):
        keys.update(table["key"].filter(pa.array(gone.mask(table))).to_pylist())
    count = len({key for half in halves for part in column(store, half, "key") for key in keys & set(part.to_pylist())})
    if count:
        raise DataError(
            f"{count:,} samples of this snapshot have been forgotten since it was made",
            remedy="run its recipe again, which makes the snapshot without them, then export that one",
        )
