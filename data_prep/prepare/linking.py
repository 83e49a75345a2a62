"""Linking the rows of lists to originals: to what is there, to what other rows ask for, or to new batches.

A row is linked to what is there already under its URL, whoever asked for it (`catalogue` says what counts). A URL that
stands in many rows, or in many lists of one plan, is asked for once. All that nobody has asked for becomes batches, in
the order of the rows.

No more is in memory than eight bytes a row and a 64th of all that is known: the rest goes through files. A URL is known
by 128 bits of its sha256, and whoever uses an original compares the URL itself (`linked`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeVar

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
from data_prep.web.fetch import FetchSettings
from infra import layout
from infra.records import put_data, write_record
from infra.store import Store

T = TypeVar("T")


class Asking(NamedTuple):
    """A list, or what is tried again of it, whose rows are to be linked."""

    source: UrlSource
    at: At
    whole: Rows


def link(store: Store, settings: FetchSettings, asking: Sequence[Asking]) -> dict[At, LinksRecord]:
    """The links of these lists; made now, all together, for those that have none."""
    while True:
        there = {each.at: found for each in asking if (found := links.read_links(store, each.at)) is not None}
        left = list({each.at: each for each in asking if each.at not in there}.values())
        if not left:
            return there
        limit, again = left[0].source.max_bytes, left[0].at.generation > 0
        alike = [each for each in left if (each.source.max_bytes, each.at.generation > 0) == (limit, again)]
        for record in _linked(store, alike, asked_with(settings, limit), there.values(), again=again):
            if not write_record(store, record.at.key, record):
                break  # somebody has done so with others: what is linked to it must be looked up once more


def _linked(
    store: Store, lists: Sequence[Asking], now: Asked, there: Iterable[LinksRecord], *, again: bool
) -> Iterator[LinksRecord]:
    with ExitStack() as files:
        known = files.enter_context(catalogue.opened(store))
        found = files.enter_context(_read(store, lists))
        coming = files.enter_context(_coming(store, known, there, now))
        _look_up(known, coming, found, Rules(known, now, again=again))
        yield from found.written(store, coming, now)


def _look_up(known: catalogue.Catalogue, coming: _Coming, lists: _Lists, rules: Rules) -> None:
    for number in range(PILES):
        wanted = lists.piles.read(number)
        if not len(wanted):
            continue
        rows, soon = known.pile(number), coming.piles.read(number)
        preference = rules.preference(rows)
        found = np.concatenate([rows[preference < 0], soon])
        preference = np.concatenate([preference[preference < 0], np.full(len(soon), COMING, np.int64)])
        best = catalogue.joined(found, preference, wanted)
        is_known = best < len(found)
        of = found[best[is_known]]
        made_of = np.empty(len(wanted), np.int64)
        made_of[is_known] = -1 - (of["batch"].astype(np.int64) << _AT | of["at"])
        made_of[~is_known] = wanted["row"][best[~is_known] - len(found)]
        lists.made_of[wanted["row"]] = made_of


# The lists


NO_URL = np.iinfo(np.int64).min
_AT = 20  # bits of a place in a batch, below the batch's number


class _Lists:
    """The URLs of lists, in files, and what each row is made of.

    `made_of` is the first row with its URL, which asks for it, counted over all lists; or tells of an original that is
    known, as a number below 0; or is NO_URL.
    """

    def __init__(self, lists: Sequence[Asking], folder: Path) -> None:
        self._lists, self._folder = lists, folder
        self._starts = np.cumsum([0, *(each.whole.rows for each in lists)])
        self.piles = Piles(Wanted)
        self.made_of = np.full(int(self._starts[-1]), NO_URL, np.int64)

    def fill(self, store: Store) -> None:
        start = 0
        packed = pa.ipc.IpcWriteOptions(compression="zstd")
        with (
            (self._folder / "hashes").open("wb") as hashes,
            pa.ipc.new_stream(str(self._folder / "urls"), _TEXTS, options=packed) as texts,
        ):
            for each in self._lists:
                for urls in _chunks(_plain_urls(store, each), GROUP):
                    texts.write_batch(pa.record_batch([pa.array(urls, pa.string())], schema=_TEXTS))
                    there = np.array([url is not None for url in urls], bool)
                    found = np.zeros(len(urls), Hashed)
                    found[there] = hashed([url for url in urls if url is not None])
                    hashes.write(found.tobytes())
                    self.piles.add(catalogue.rows_of(Wanted, found, row=np.arange(start, start + len(urls)))[there])
                    start += len(urls)

    def written(self, store: Store, coming: _Coming, now: Asked) -> Iterator[LinksRecord]:
        """The links of each list, with new batches for all that is known nowhere."""
        names, owners = list(coming.names), list(coming.owners)
        numbers = np.zeros(len(self.made_of), np.int32)  # of each row that asks, among those of its list
        bases: list[int] = []  # where the names of a list's batches begin
        for each, first, end in self._ranges():
            own = self.made_of[first:end] == np.arange(first, end)
            numbers[first:end] = np.cumsum(own, dtype=np.int32) - 1
            bases.append(len(names))
            owners.append((len(names), each.at.key))
            names += self._named(each, first + np.flatnonzero(own), now)
        with pa.OSFile(str(self._folder / "urls")) as file, pa.ipc.open_stream(file) as texts:
            for base, (each, first, end) in zip(bases, self._ranges(), strict=True):
                used = np.zeros(len(names), bool)
                path = self._folder / "links"
                with pq.ParquetWriter(path, LINKS, compression="zstd") as writer:
                    for start in range(first, end, GROUP):
                        batch, at = self._places(self.made_of[start : min(start + GROUP, end)], numbers, bases)
                        used[batch[batch >= 0]] = True
                        writer.write_table(_links(batch, at, names))
                asked, urls = self._asked(texts, first, end, names[base:])
                others = {key for key in _of(owners, np.flatnonzero(used)) if key not in ("", each.at.key)}
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

    def _named(self, each: Asking, own: npt.NDArray[np.int64], now: Asked) -> list[str]:
        """The batches of the rows that ask; a retry's is another than that of the first try of the same URLs."""
        if not len(own):
            return []
        nonce = f"{each.at.place}/{each.at.generation}" if each.at.generation else ""
        hashes = np.memmap(self._folder / "hashes", Hashed, "r")
        parts = (own[first : first + originals.ROWS] for first in range(0, len(own), originals.ROWS))
        return [batch_name(hashes[part].tobytes(), now, nonce) for part in parts]

    def _places(
        self, made_of: npt.NDArray[np.int64], numbers: npt.NDArray[np.int32], bases: list[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For each row the batch, -1 for what is no URL, and the place in it."""
        known = -1 - made_of
        batch, at = known >> _AT, known & ((1 << _AT) - 1)
        own = made_of >= 0
        asking = np.searchsorted(self._starts[1:], made_of[own], "right")
        number = numbers[made_of[own]]
        batch[own] = np.array(bases)[asking] + number // originals.ROWS
        at[own] = number % originals.ROWS
        nothing = made_of == NO_URL
        batch[nothing], at[nothing] = -1, 0
        return batch, at

    def _asked(self, texts: pa.RecordBatchReader, first: int, end: int, names: list[str]) -> tuple[Path, int]:
        """The URLs of the rows that ask, in order, and how many they are."""
        path, urls, size = self._folder / "asked", 0, BATCHES_READ * originals.ROWS
        held = pa.chunked_array([], pa.string())
        with pq.ParquetWriter(path, ASKED, compression="zstd") as writer:
            while first < end:
                here = texts.read_next_batch().column(0)
                own = self.made_of[first : first + len(here)] == np.arange(first, first + len(here))
                held = pa.chunked_array([*held.chunks, here.filter(pa.array(own))])
                first += len(here)
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
    nothing = batch < 0
    used, codes = np.unique(batch[~nothing], return_inverse=True)
    indices = np.zeros(len(batch), np.int32)
    indices[~nothing] = codes
    of = pa.array([names[number] for number in used.tolist()], pa.string())
    column = pa.DictionaryArray.from_arrays(pa.array(indices, mask=nothing), of)
    return pa.Table.from_arrays([column, pa.array(at.astype(np.int32), mask=nothing)], schema=LINKS)


def _of(owners: Sequence[tuple[int, str]], batches: npt.NDArray[np.int64]) -> set[str]:
    """The lists, by their records, that ask for these batches; "" for what is there."""
    places = np.searchsorted([first for first, _ in owners], batches, "right") - 1
    return {owners[place][1] for place in np.unique(places).tolist()}


_TEXTS = pa.schema([("url", pa.string())])


@contextmanager
def _read(store: Store, lists: Sequence[Asking]) -> Iterator[_Lists]:
    with TemporaryDirectory(prefix="pixnerd-links-") as folder:
        found = _Lists(lists, Path(folder))
        try:
            found.fill(store)
            yield found
        finally:
            found.piles.close()


def _plain_urls(store: Store, each: Asking) -> Iterator[str | None]:
    """None for what is no URL. They are held by tens of thousands, so they are plain texts, which are no garbage's."""
    for _, url in each.source.urls(store, each.whole):
        yield None if isinstance(url, Rejection) else str(url)


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


# What is to come


class _Coming:
    """What linked lists of this plan will ask for: their batches, which count on from those that are known."""

    def __init__(self, known: catalogue.Catalogue) -> None:
        self.names = [batch.name for batch in known.batches]
        self.owners = [(0, "")]  # from which batch on they are whose
        self.piles = Piles(Known)
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
                at = np.arange(len(urls))
                found = hashed(urls.to_pylist())
                self.piles.add(catalogue.rows_of(Known, found, batch=base + batch.number, at=at, cause=0))


@contextmanager
def _coming(store: Store, known: catalogue.Catalogue, there: Iterable[LinksRecord], now: Asked) -> Iterator[_Coming]:
    found = _Coming(known)
    try:
        for record in there:
            if not reopened(record.asked_with, now):
                found.add(store, record)
        yield found
    finally:
        found.piles.close()
