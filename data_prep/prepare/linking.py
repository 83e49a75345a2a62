"""Linking the rows of lists to originals: to existing ones, to those that other rows ask for, or to new batches.

A row is linked to an original that was downloaded for its URL, for whatever list (`catalogue` says which of them
count). A URL that is in many rows, or in many lists of one plan, is asked for once. URLs that no list has asked for
become new batches, in the order of the rows.

Memory holds eight bytes a row and a 64th of all known URLs; the rest goes through files. URLs are compared by 128 bits
of their sha256, and by themselves when an original is used (`linked`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.prepare import catalogue, links, originals
from data_prep.prepare.catalogue import COMING, PILES, Hashed, Known, Piles, Rules, Wanted, hashed
from data_prep.prepare.links import ASKED, BATCHES_READ, GROUP, LINKS, At, LinksRecord
from data_prep.prepare.originals import Asked, asked_with, batch_name, reopened
from data_prep.rejections import Rejection
from data_prep.sources import Rows, UrlSource
from data_prep.sources.reading import chunks
from data_prep.web.fetch import FetchSettings
from infra import layout
from infra.records import put_data, write_record
from infra.store import Store


class Asking(NamedTuple):
    """A list, or a later generation of one, whose rows are to be linked."""

    source: UrlSource
    at: At
    whole: Rows  # all rows of it


def link(store: Store, settings: FetchSettings, asking: Sequence[Asking]) -> dict[At, LinksRecord]:
    """The links of these lists; those that have none yet are linked now, all together."""
    while True:
        linked = {each.at: record for each in asking if (record := links.read_links(store, each.at)) is not None}
        unlinked = list({each.at: each for each in asking if each.at not in linked}.values())
        if not unlinked:
            return linked
        limit, again = unlinked[0].source.max_bytes, unlinked[0].at.generation > 0
        alike = [each for each in unlinked if (each.source.max_bytes, each.at.generation > 0) == (limit, again)]
        for record in _link_all(store, alike, asked_with(settings, limit), linked.values(), again=again):
            if not write_record(store, record.at.key, record):
                break  # another driver linked this list otherwise, so the links of those after it must be made anew


def _link_all(
    store: Store, asking: Sequence[Asking], now: Asked, linked: Iterable[LinksRecord], *, again: bool
) -> Iterator[LinksRecord]:
    with (
        catalogue.opened(store) as known,
        TemporaryDirectory(prefix="pixnerd-links-") as folder,
        closing(Piles(Wanted)) as wanted,
        closing(Piles(Known)) as coming_piles,
    ):
        lists = _Lists(asking, Path(folder), wanted)
        lists.fill(store)
        coming = _Coming(known, coming_piles)
        for record in linked:
            if not reopened(record.asked_with, now):
                coming.add(store, record)
        _look_up(known, coming, lists, Rules(known, now, again=again))
        yield from lists.written(store, coming, now)


def _look_up(known: catalogue.Catalogue, coming: _Coming, lists: _Lists, rules: Rules) -> None:
    for number in range(PILES):
        wanted = lists.piles.read(number)
        if not len(wanted):
            continue
        rows, soon = known.pile(number), coming.piles.read(number)
        preference = rules.preference(rows)
        usable = np.concatenate([rows[preference < 0], soon])
        preference = np.concatenate([preference[preference < 0], np.full(len(soon), COMING, np.int64)])
        best = catalogue.joined(usable, preference, wanted)
        is_known = best < len(usable)
        entries = usable[best[is_known]]
        resolved = np.empty(len(wanted), np.int64)
        resolved[is_known] = -1 - (entries["batch"].astype(np.int64) << _AT | entries["at"])
        resolved[~is_known] = wanted["row"][best[~is_known] - len(usable)]
        lists.resolved[wanted["row"]] = resolved


# The lists


NO_URL = np.iinfo(np.int64).min
_AT = 20  # the low bits of a number that stands for an original: its place in the batch; above them, the batch


class _Lists:
    """The URLs of all rows, in files, and for each row where its original is.

    `resolved` holds, for each row of all lists: NO_URL; or a known original (its batch and place), as a number below 0;
    or the number of the first row with the same URL, which asks for it: a row with its own number asks for its URL.
    """

    def __init__(self, lists: Sequence[Asking], folder: Path, piles: Piles) -> None:
        self._lists, self._folder, self.piles = lists, folder, piles
        self._starts = np.cumsum([0, *(each.whole.rows for each in lists)])
        self.resolved = np.full(int(self._starts[-1]), NO_URL, np.int64)

    def fill(self, store: Store) -> None:
        start = 0
        compressed = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            (self._folder / "hashes").open("wb") as hashes,
            pa.ipc.new_stream(str(self._folder / "urls"), _TEXTS, options=compressed) as texts,
        ):
            for each in self._lists:
                for urls in chunks(_plain_urls(store, each), GROUP):
                    texts.write_batch(pa.record_batch([pa.array(urls, pa.string())], schema=_TEXTS))
                    is_url = np.array([url is not None for url in urls], bool)
                    rows = np.zeros(len(urls), Hashed)
                    rows[is_url] = hashed([url for url in urls if url is not None])
                    hashes.write(rows.tobytes())
                    self.piles.add(catalogue.rows_of(Wanted, rows, row=np.arange(start, start + len(urls)))[is_url])
                    start += len(urls)

    def written(self, store: Store, coming: _Coming, now: Asked) -> Iterator[LinksRecord]:
        """Store the links of each list and the URLs that it asks for, and yield its record."""
        names, owners = list(coming.names), list(coming.owners)
        numbers = np.zeros(len(self.resolved), np.int32)  # of a row that asks: its place among those of its list
        bases: list[int] = []  # of each list: the place of its first new batch among `names`
        for each, first, end in self._ranges():
            asks = self.resolved[first:end] == np.arange(first, end)
            numbers[first:end] = np.cumsum(asks, dtype=np.int32) - 1
            bases.append(len(names))
            owners.append((len(names), each.at.key))
            names += self._batch_names(each, first + np.flatnonzero(asks), now)
        with pa.OSFile(str(self._folder / "urls")) as file, pa.ipc.open_stream(file) as texts:
            for base, (each, first, end) in zip(bases, self._ranges(), strict=True):
                used = np.zeros(len(names), bool)
                path = self._folder / "links"
                with pq.ParquetWriter(path, LINKS, compression="zstd") as writer:
                    for start in range(first, end, GROUP):
                        batch, at = self._places(self.resolved[start : min(start + GROUP, end)], numbers, bases)
                        used[batch[batch >= 0]] = True
                        writer.write_table(_links(batch, at, names))
                asked, urls = self._asked(texts, first, end, names[base:])
                others = {key for key in _owners_of(owners, np.flatnonzero(used)) if key not in ("", each.at.key)}
                yield LinksRecord(
                    place=each.at.place,
                    generation=each.at.generation,
                    rows=end - first,
                    links=put_data(store, layout.ORIGINALS.at(), "links.parquet", path),
                    asked=put_data(store, layout.ORIGINALS.at(), "asked.parquet", asked),
                    urls=urls,
                    asked_with=now,
                    others=sorted(others),
                )

    def _ranges(self) -> Iterator[tuple[Asking, int, int]]:
        return zip(self._lists, self._starts[:-1].tolist(), self._starts[1:].tolist(), strict=True)

    def _batch_names(self, asking: Asking, rows: npt.NDArray[np.int64], now: Asked) -> list[str]:
        """The names of the new batches; those of a retry differ from those of the first try of the same URLs."""
        if not len(rows):
            return []
        nonce = f"{asking.at.place}/{asking.at.generation}" if asking.at.generation else ""
        hashes = np.memmap(self._folder / "hashes", Hashed, "r")
        batches = (rows[first : first + originals.ROWS] for first in range(0, len(rows), originals.ROWS))
        return [batch_name(hashes[batch].tobytes(), now, nonce) for batch in batches]

    def _places(
        self, resolved: npt.NDArray[np.int64], numbers: npt.NDArray[np.int32], bases: list[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each row its batch, -1 if it has no URL, and its place in the batch."""
        known = -1 - resolved
        batch, at = known >> _AT, known & ((1 << _AT) - 1)
        is_new = resolved >= 0
        asking = np.searchsorted(self._starts[1:], resolved[is_new], "right")
        number = numbers[resolved[is_new]]
        batch[is_new] = np.array(bases)[asking] + number // originals.ROWS
        at[is_new] = number % originals.ROWS
        no_url = resolved == NO_URL
        batch[no_url], at[no_url] = -1, 0
        return batch, at

    def _asked(self, texts: pa.RecordBatchReader, first: int, end: int, names: list[str]) -> tuple[Path, int]:
        """A table of the URLs of the rows that ask, in order, and how many they are."""
        path, urls, size = self._folder / "asked", 0, BATCHES_READ * originals.ROWS
        held = pa.chunked_array([], pa.string())
        with pq.ParquetWriter(path, ASKED, compression="zstd") as writer:
            while first < end:
                chunk = texts.read_next_batch().column(0)
                asks = self.resolved[first : first + len(chunk)] == np.arange(first, first + len(chunk))
                held = pa.chunked_array([*held.chunks, chunk.filter(pa.array(asks))])
                first += len(chunk)
                while len(held) >= size or (first == end and len(held)):
                    part = held.slice(0, size).combine_chunks()
                    codes = (urls + np.arange(len(part))) // originals.ROWS
                    used, codes = np.unique(codes, return_inverse=True)
                    batch = pa.DictionaryArray.from_arrays(
                        pa.array(codes.astype(np.int32)), [names[number] for number in used.tolist()]
                    )
                    writer.write_table(pa.Table.from_arrays([batch, part], schema=ASKED))
                    urls, held = urls + len(part), held.slice(size)
        return path, urls


def _links(batch: npt.NDArray[np.int64], at: npt.NDArray[np.int64], names: Sequence[str]) -> pa.Table:
    no_url = batch < 0
    used, codes = np.unique(batch[~no_url], return_inverse=True)
    indices = np.zeros(len(batch), np.int32)
    indices[~no_url] = codes
    dictionary = pa.array([names[number] for number in used.tolist()], pa.string())
    column = pa.DictionaryArray.from_arrays(pa.array(indices, mask=no_url), dictionary)
    return pa.Table.from_arrays([column, pa.array(at.astype(np.int32), mask=no_url)], schema=LINKS)


def _owners_of(owners: Sequence[tuple[int, str]], batches: npt.NDArray[np.int64]) -> set[str]:
    """The keys of the records of the lists that ask for these batches; "" for downloaded ones."""
    places = np.searchsorted([first for first, _ in owners], batches, "right") - 1
    return {owners[place][1] for place in np.unique(places).tolist()}


_TEXTS = pa.schema([("url", pa.string())])


def _plain_urls(store: Store, asking: Asking) -> Iterator[str | None]:
    """The URL of each row, or None: plain strings, as tens of thousands are held and Python's GC skips those."""
    for _, url in asking.source.urls(store, asking.whole):
        yield None if isinstance(url, Rejection) else str(url)


# Batches that are still to be downloaded


class _Coming:
    """The batches that linked lists of this plan will ask for, numbered on from those of the catalogue."""

    def __init__(self, known: catalogue.Catalogue, piles: Piles) -> None:
        self.names = [batch.name for batch in known.batches]
        self.owners = [(0, "")]  # the first batch of each list, and the key of the list's record
        self.piles = piles
        self._states = known.states

    def add(self, store: Store, record: LinksRecord) -> None:
        batches = links.asked(store, record)
        if all(self._states.get(batch.name, originals.NOTHING).is_done for batch in batches):
            return
        base = len(self.names)
        self.owners.append((base, record.at.key))
        self.names += [batch.name for batch in batches]
        for batch, urls in links.batches(store, record):
            if not self._states.get(batch.name, originals.NOTHING).is_done:
                hashes, at = hashed(urls.to_pylist()), np.arange(len(urls))
                self.piles.add(catalogue.rows_of(Known, hashes, batch=base + batch.number, at=at, cause=0))
