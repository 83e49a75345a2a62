"""The global order: one stream of samples whatever the number of ranks, a permutation in every epoch, new in each."""

from __future__ import annotations

import io
import itertools
import os
import resource
import threading
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from infra.errors import DataError, NotFound, SettingsError
from infra.records import DataObject, put_data
from infra.shards import TarWriter, parquet_bytes, selection_schema
from infra.store import FileStore, Store, open_store
from training.diffusion.draws import draw
from training.encoders.text import Tokens
from training.loader import selection
from training.loader.batches import Batch, Batches
from training.loader.buckets import Orders
from training.loader.cache import Folder, Tars, default_folder
from training.loader.conditions import Captions, Labels
from training.loader.order import FETCHES_A_SHARD, DataSettings, Fetching, Order
from training.loader.reader import Reader, Unreadable
from training.loader.selection import Sample, Selection

ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)


@given(rows=ROWS, lanes=st.integers(1, 16), window=st.integers(1, 50), seed=st.integers(0, 99))
def test_an_epoch_sees_no_row_twice_and_leaves_out_less_than_a_lane_each(rows, lanes, window, seed):
    order = Order(np.array(rows), seed, DataSettings(lanes=lanes, window=window))
    seen = Counter(order.row(p) for p in range(order.epoch_length))
    assert set(seen.values()) == {1}
    assert set(seen) <= set(range(sum(rows)))
    assert sum(rows) - order.epoch_length < min(lanes, sum(rows))
    for lane in range(order.lanes):  # the windows are cut without gap and overlap
        bounds = [order.bounds(lane, number) for number in range(order.lane_length // window + 2)]
        assert bounds[0][0] == 0 and bounds[-1][1] == order.lane_length
        assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))


@given(rows=ROWS, seed=st.integers(0, 99), position=st.integers(0, 10_000))
def test_a_position_has_one_row_however_one_gets_there(rows, seed, position):
    reading = DataSettings(lanes=4, window=8)
    walked = Order(np.array(rows), seed, reading)
    for p in range(max(0, position - 50), position):
        walked.row(p)
    assert walked.row(position) == Order(np.array(rows), seed, reading).row(position)


def test_epochs_and_seeds_differ():
    rows = np.array([50, 50])
    order, other = (Order(rows, seed, DataSettings(lanes=4)) for seed in (0, 1))
    length = order.epoch_length
    first, second = ([order.row(p) for p in range(k * length, (k + 1) * length)] for k in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != [other.row(p) for p in range(length)]


def test_a_rank_opens_only_the_shards_of_its_lanes():
    order = Order(np.full(64, 100), 0, DataSettings(lanes=8))
    of_rank = {order.row(p) // 100 for p in range(0, order.epoch_length, 8)}
    assert len(of_rank) <= 64 // 8 + 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48])
def test_a_ranks_lanes_open_their_windows_at_different_times(ranks: int):
    """96 lanes are a multiple of each of these numbers of ranks."""
    order = Order(np.full(960, 100), 0, DataSettings(window=960))
    ends = sorted(order.bounds(lane, 0)[1] for lane in range(0, order.lanes, ranks))
    assert set(np.diff(ends)) == {960 * ranks // 96}


@given(
    rows=ROWS, lanes=st.integers(1, 12), window=st.integers(1, 50), ranks=st.integers(1, 4), start=st.integers(0, 999)
)
def test_every_shard_that_is_read_is_due_before(rows, lanes, window, ranks, start):
    order = Order(np.array(rows), 0, DataSettings(lanes=lanes, window=window))
    for rank in range(ranks):
        fetching = Fetching(order, rank, ranks, start)
        fetching._gap = fetching._next = 0  # the pace only spreads what is due
        begun: set[int] = set()
        for position in range(start, start + 3 * order.epoch_length, ranks):
            begun.update(fetching.until(position + ranks))
            assert order.shard(order.row(position + rank)) in begun


def test_shards_are_begun_no_faster_than_their_pace_and_fast_enough():
    rows, ranks, batch = 500, 4, 64
    order = Order(np.full(400, rows), 0, DataSettings(lanes=16, window=800))
    fetching = Fetching(order, 0, ranks, 0)
    begun = [
        (position, shard) for position in range(0, order.epoch_length, batch) for shard in fetching.until(position)
    ]
    gaps = np.diff([position for position, _ in begun])
    assert gaps.min() >= ranks * rows / FETCHES_A_SHARD - batch
    started = {shard: position for position, shard in reversed(begun)}
    own = range(order.epoch_length // 2 // ranks * ranks, order.epoch_length, ranks)
    assert all(started[order.shard(order.row(position))] < position for position in own)


def test_a_small_corpus_is_asked_for_an_epoch_ahead_and_no_more():
    order = Order(np.array([8, 4]), 0, DataSettings())
    fetching = Fetching(order, 0, 1, 0)
    list(fetching.until(4))
    assert len(fetching._due) <= 2 * order.lanes
    assert {start for start, _, _ in fetching._due} <= {0, order.lane_length}


def test_an_empty_snapshot_is_refused():
    with pytest.raises(DataError, match="no rows"):
        Order(np.array([0]), 0, DataSettings())


SIDE = 8


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def reader(tmp_path: Path, store: Store) -> Iterator[Reader]:
    reader = reader_of(tmp_path, store, "JPEG", [SIDE] * 12)
    yield reader
    reader.close()


def saved(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def written(
    store: Store, kind: str, sides: list[int], spoilt: Container[int] = (), labelled: bool = False
) -> DataObject:
    """The selection of grey images in tars of four; an image's brightness, caption and label all tell its row."""
    schema = selection_schema(labelled)
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for shard in range(len(sides) // 4):
        packed = io.BytesIO()
        tar = TarWriter(packed)
        rows = range(4 * shard, 4 * shard + 4)
        images = [saved(np.full((sides[row], sides[row], 3), 20 * (row % 12), np.uint8), kind) for row in rows]
        images = [image[:40] if row in spoilt else image for row, image in zip(rows, images, strict=True)]
        members = [tar.add(f"{row}.x", image) for row, image in zip(rows, images, strict=True)]
        tar.finish()
        key = put_data(store, "t", f"{shard}.tar", packed.getvalue()).key
        for row, member in zip(rows, members, strict=True):
            captions = [f"row {row}", f"long row {row}"], [0.25, 0.75]
            values = [str(row), key, *member, sides[row], sides[row], *captions, "source", "bucket", row]
            for name, value in zip(schema.names, values, strict=False):
                columns[name].append(value)
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in schema}, schema=schema)
    return put_data(store, "selections", "selection.parquet", parquet_bytes(table))


def opened(store: Store, table: DataObject, cache: Path, gigabytes: float = 1) -> Reader:
    folder = Folder(cache, gigabytes)
    return Reader(Selection.open(store, table, folder), Tars(store, folder))


def reader_of(tmp_path: Path, store: Store, kind: str, sides: list[int], spoilt: Container[int] = ()) -> Reader:
    return opened(store, written(store, kind, sides, spoilt), tmp_path / "cache")


def tokenize(captions: Sequence[str]) -> Tokens:
    """A caption's length, three times; it is cut if that is odd."""
    ids_BT = torch.tensor([[len(caption)] * 3 for caption in captions])
    return Tokens(ids_BT, torch.ones_like(ids_BT), ids_BT[:, 0] % 2 == 1)


def batches_of(reader: Reader, *, drop: float = 0.0, **given: Any) -> Batches:
    placed = {name: given.pop(name) for name in ("batch", "rank", "ranks") if name in given}
    condition = given.pop("condition", None) or Captions(reader, tokenize)
    reading = DataSettings(**{"lanes": 4, **given})
    return Batches(reader, reading, **{"batch": 4, **placed}, draw=partial(draw, 0, drop=drop), condition=condition)


def row_of(caption: str) -> int:
    return int(caption.rpartition(" ")[2])


def image_of(reader: Reader, row: int) -> np.ndarray:
    sample = reader.selection.sample(row)
    image = np.empty((sample.height, sample.width, 3), np.uint8)
    reader.image(sample, image)
    return image


def same(one: Batch, other: Batch) -> bool:
    tensors = [name for name, value in vars(one).items() if isinstance(value, torch.Tensor)]
    equal = all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    return equal and one.captions == other.captions and one.unreadable == other.unreadable


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_reads_the_same_batches(reader: Reader, ranks: int):
    whole = batches_of(reader, drop=0.5).read(8)
    for rank in range(ranks):
        part = batches_of(reader, drop=0.5, rank=rank, ranks=ranks).read(8)
        own = slice(rank, None, ranks)
        assert part.positions.tolist() == whole.positions[own].tolist()
        assert same(replace(whole.map(lambda tensor: tensor[own]), captions=whole.captions[own]), part)  # noqa: B023


@pytest.mark.parametrize(("threads", "prefetch"), [(0, 1), (1, 1), (2, 3), (3, 4)])
def test_bytes_depend_neither_on_threads_nor_on_reading_ahead(reader: Reader, threads: int, prefetch: int):
    batches = batches_of(reader, threads=threads, prefetch=prefetch, batch=6, drop=0.5)
    with closing(batches.iterate(4)) as stream:
        for k, batch in enumerate(itertools.islice(stream, 8)):
            assert same(batch, batches.read(4 + 6 * k))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.integers(1, 4),
    threads=st.integers(0, 3),
    lanes=st.integers(1, 12),
    window=st.integers(1, 9),
    share=st.integers(1, 4),
)
def test_two_epochs_read_every_sample_twice_but_for_those_left_out(
    reader: Reader, ranks: int, threads: int, lanes: int, window: int, share: int
):
    """What the ranks' streams deliver, counted by caption; an epoch need not end with a batch."""
    seen: list[Counter[int]] = [Counter(), Counter()]
    for rank in range(ranks):
        placed = {"rank": rank, "ranks": ranks, "batch": share * ranks}
        batches = batches_of(reader, lanes=lanes, window=window, threads=threads, **placed)
        length = batches.orders.epoch_length
        with closing(batches.iterate(0)) as stream:
            for batch in itertools.islice(stream, -(-2 * length // (share * ranks))):
                for position, caption in zip(batch.positions.tolist(), batch.captions, strict=True):
                    if position < 2 * length:
                        seen[position // length][row_of(caption)] += 1
    for epoch in seen:
        assert set(epoch.values()) == {1}
        assert len(epoch) == length == 12 - 12 % lanes


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_images_belong_to_their_captions(tmp_path: Path, store: Store, kind: str):
    reader = reader_of(tmp_path, store, kind, [SIDE] * 12)
    batch = batches_of(reader, batch=12).read(0)
    assert [round(float(i.float().mean()) / 20) for i in batch.images_BCHW] == [row_of(c) for c in batch.captions]
    reader.close()


SIDES = [8, 16, 8, 8, 16, 8, 8, 24, 8, 8, 16, 24, 8, 8, 8, 8, 8, 16, 16, 8, 8, 8, 8, 8]


@pytest.fixture
def mixed(tmp_path: Path, store: Store) -> Iterator[Reader]:
    """Images of three sizes, with labels."""
    reader = opened(store, written(store, "PNG", SIDES, labelled=True), tmp_path / "cache")
    yield reader
    reader.close()


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.integers(1, 4),
    threads=st.integers(0, 3),
    lanes=st.integers(1, 6),
    window=st.integers(1, 9),
    share=st.integers(1, 3),
)
def test_two_epochs_of_buckets_and_labels_read_every_sample_twice_but_for_those_left_out(
    mixed: Reader, ranks: int, threads: int, lanes: int, window: int, share: int
):
    """Each bucket's stream is counted by label, up to the end of its second epoch; images show their labels' rows."""
    batch = share * ranks
    streams: dict[int, dict[int, int]] = {side: {} for side in set(SIDES)}  # side -> place in its stream -> row
    for rank in range(ranks):
        placed = {"rank": rank, "ranks": ranks, "batch": batch, "lanes": lanes, "window": window, "threads": threads}
        batches = batches_of(mixed, condition=Labels(mixed, 24), **placed)
        enough = 2 * batches.orders.epoch_length // batch + 2 * len(streams)
        with closing(batches.iterate(0)) as stream:
            for number, part in enumerate(itertools.islice(stream, enough)):
                side = part.images_BCHW.shape[2]
                before = batches.orders.find(number * batch)[1]
                assert part.labels_B is not None and part.images_BCHW.shape[3] == side
                for place, row in zip((part.positions - number * batch).tolist(), part.labels_B.tolist(), strict=True):
                    assert SIDES[row] == side
                    assert before + place not in streams[side]
                    streams[side][before + place] = row
    for side, order in zip(sorted(streams), batches.orders.of, strict=True):
        length, rows = order.epoch_length, streams[side]
        for epoch in (0, 1):
            seen = [rows[place] for place in range(epoch * length, (epoch + 1) * length)]
            assert len(set(seen)) == length == SIDES.count(side) - SIDES.count(side) % order.lanes


ROWS_OF_BUCKETS = st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=8).filter(
    lambda rows: all(map(sum, zip(*rows, strict=True)))
)


@given(rows=ROWS_OF_BUCKETS, batch=st.integers(1, 9), number=st.integers(0, 500))
def test_batches_are_dealt_to_buckets_in_proportion_one_after_the_other(rows: list[list[int]], batch: int, number: int):
    orders = Orders(np.array(rows), 0, DataSettings(lanes=2), batch)
    dealt, after = orders.dealt(number), orders.dealt(number + 1)
    bucket, before = orders.find(number * batch)
    assert sum(dealt) == number and before == dealt[bucket] * batch
    assert [b - a for a, b in zip(dealt, after, strict=True)] == [k == bucket for k in range(3)]
    for count, order in zip(dealt, orders.of, strict=True):
        assert abs(count - number * order.epoch_length / orders.epoch_length) < 2


def test_buckets_walk_the_same_shards():
    """At any time, two buckets that are spread alike over the shards read from nearly the same of them."""
    orders = Orders(np.tile([30, 10], (96, 1)), 0, DataSettings(lanes=4, window=80), 4)
    place = {int(shard): k for k, shard in enumerate(orders.of[0]._epoch(0)[0])}
    common, other = (
        [place[o.shard(o.row(int(part * o.lane_length) * o.lanes))] for part in np.arange(0, 1, 0.01)]
        for o in orders.of
    )
    assert max(abs(a - b) for a, b in zip(common, other, strict=True)) <= 4  # a window holds rows of 80 / 30 shards


@pytest.mark.parametrize("ranks", [2, 4])
def test_buckets_are_the_same_on_any_number_of_ranks_and_from_any_batch(mixed: Reader, ranks: int):
    whole = batches_of(mixed, condition=Labels(mixed, 24), drop=0.3)
    for position in (0, 4, 20, 44):
        expected = whole.read(position)
        for rank in range(ranks):
            placed = {"rank": rank, "ranks": ranks}
            batches = batches_of(mixed, condition=Labels(mixed, 24), drop=0.3, **placed)
            with closing(batches.iterate(position)) as stream:
                part = next(stream)
            own = slice(rank, None, ranks)
            assert same(replace(expected.map(lambda t: t[own]), captions=expected.captions[own]), part)  # noqa: B023


def test_a_dropped_label_is_that_of_no_class(mixed: Reader):
    batch = batches_of(mixed, condition=Labels(mixed, 24), drop=1.0).read(0)
    assert batch.labels_B is not None and batch.labels_B.tolist() == [24] * 4
    assert batch.ids_BT is None


def test_labels_that_are_missing_or_too_large_are_refused(mixed: Reader, reader: Reader):
    with pytest.raises(DataError, match="no labels"):
        Labels(reader, 24)
    with pytest.raises(DataError, match="the network 3 classes"):
        batches_of(mixed, condition=Labels(mixed, 3), batch=24).read(0)


def test_captions_are_drawn_by_weight_and_anew_at_each_position(reader: Reader):
    choices = draw(0, range(400), (1, 2, 2)).choice_B.tolist()
    drawn = Counter(reader.caption(3, choice).startswith("long") for choice in choices)
    assert 0.68 < drawn[True] / 400 < 0.82
    assert [reader.caption(3, choice) for choice in (0.0, 0.2499)] == ["row 3"] * 2
    assert [reader.caption(3, choice) for choice in (0.25, 1 - 2**-53)] == ["long row 3"] * 2


@pytest.mark.parametrize("threads", [0, 2])
def test_an_image_that_does_not_decode_is_black_and_weighs_nothing(tmp_path: Path, store: Store, threads: int):
    reader = reader_of(tmp_path, store, "PNG", [SIDE] * 12, spoilt=[5])
    batches = batches_of(reader, threads=threads)
    with closing(batches.iterate(0)) as stream:
        found = list(itertools.islice(stream, 3))
    reader.settle()  # the tar has the hash that it was written with
    names = {row: text for batch in found for row, text in batch.unreadable.items()}
    assert names.keys() == {5}
    assert "the image 5 of t/1-" in names[5]
    for batch in found:
        bad = [row_of(caption) == 5 for caption in batch.captions]
        assert batch.weight_B.tolist() == [0.0 if b else 1.0 for b in bad]
        assert not batch.images_BCHW[bad].any()
    reader.close()


def test_an_image_of_another_size_than_its_row_says_is_not_read(reader: Reader):
    wide = reader.selection.sample(3)._replace(width=16)
    with pytest.raises(Unreadable, match="it is 8 x 8 and not 16 x 8"):
        reader.image(wide, np.empty((8, 16, 3), np.uint8))


def test_what_goes_wrong_in_a_thread_is_raised_and_no_thread_stays(tmp_path: Path, store: Store):
    reader = reader_of(tmp_path, store, "JPEG", [SIDE] * 12)
    store.delete(reader.selection.tars[1])
    before = threading.active_count()
    with closing(batches_of(reader, threads=2).iterate(0)) as stream, pytest.raises(NotFound, match="t/1-"):
        list(itertools.islice(stream, 4))
    reader.close()
    assert threading.active_count() <= before


class Counted(FileStore):
    """Counts whole downloads and reads by range; `held` keeps downloads waiting."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.downloads: Counter[str] = Counter()
        self.ranges: Counter[str] = Counter()
        self.free = threading.Event()
        self.free.set()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.ranges[key] += 1
        return super().get(key, start, end)

    def download(self, key: str, path: Path) -> None:
        self.free.wait(60)
        self.downloads[key] += 1
        super().download(key, path)


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path / "store")


def test_samples_are_read_by_range_until_their_shard_is_there(tmp_path: Path, counted: Counted):
    reader = reader_of(tmp_path, counted, "PNG", [SIDE] * 12)
    key = reader.selection.tars[0]
    counted.free.clear()
    fetch = reader.tars.begin(key)
    first = image_of(reader, 1)
    assert (counted.ranges[key], counted.downloads[key]) == (1, 0)
    counted.free.set()
    fetch.result()
    assert np.array_equal(image_of(reader, 1), first)
    reader.settle()
    assert (counted.ranges[key], counted.downloads[key]) == (1, 1)
    reader.close()


def test_ranks_of_a_machine_and_later_runs_fetch_a_shard_once(tmp_path: Path, counted: Counted):
    table = written(counted, "PNG", [SIDE] * 12)
    readers = [opened(counted, table, tmp_path / "cache") for _ in range(3)]
    for fetch in [reader.tars.begin(reader.selection.tars[0]) for reader in readers]:
        fetch.result()
    for reader in readers:
        reader.close()
    later = opened(counted, table, tmp_path / "cache")
    later.tars.begin(later.selection.tars[0]).result()
    assert image_of(later, 2).mean() == 40
    assert set(counted.downloads.values()) == {1}
    assert not counted.ranges[later.selection.tars[0]]
    later.close()


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_kept_file_that_is_damaged_is_fetched_again(tmp_path: Path, counted: Counted, damage: str):
    table = written(counted, "PNG", [SIDE] * 12)
    for _ in range(2):
        reader = opened(counted, table, tmp_path / "cache")
        reader.tars.begin(reader.selection.tars[0]).result()
        assert image_of(reader, 2).mean() == 40
        reader.close()
        for kept in (tmp_path / "cache").glob("*.*"):
            data = bytearray(kept.read_bytes())
            data[1000] ^= 1
            kept.write_bytes(data[:200] if damage == "cut" else data if kept.suffix == ".tar" else kept.read_bytes())
    assert counted.downloads[reader.selection.tars[0]] == 2


def test_what_a_killed_process_left_half_made_is_deleted(tmp_path: Path, store: Store):
    half = tmp_path / "cache" / f"making-{'0' * 64}.tar"
    half.mkdir(parents=True)
    (half / "half").write_bytes(b"x")
    reader_of(tmp_path, store, "PNG", [SIDE] * 12).close()
    assert not half.exists()


def test_the_cache_keeps_to_its_bound_and_deletes_what_was_used_least(tmp_path: Path):
    folder = Folder(tmp_path / "cache", 3e-6)  # three files of 1,000 bytes

    def written(path: Path) -> None:
        path.write_bytes(bytes(1000))

    def make(name: str) -> None:
        folder.made(name, written, 1000, lambda path: True)

    for age, name in enumerate("abc"):
        make(name)
        os.utime(folder.path / name, (age, age))
    assert folder.read("a", 0, 10) == bytes(10)  # which is a use
    make("d")
    assert sorted(path.name for path in folder.path.iterdir() if len(path.name) == 1) == ["a", "c", "d"]
    assert folder.read("b", 0, 10) is None
    assert folder.read("a", 995, 10) is None


def test_a_deleted_file_is_read_from_the_store(tmp_path: Path, counted: Counted):
    reader = reader_of(tmp_path, counted, "PNG", [SIDE] * 12)
    key = reader.selection.tars[0]
    reader.tars.begin(key).result()
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    assert image_of(reader, 2).mean() == 40
    reader.settle()
    assert counted.downloads[key] == 2
    reader.close()


@pytest.fixture
def no_room() -> Iterator[None]:
    """Files of this process may grow to 2,000 bytes, which is as good as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_the_caches_and_not_the_stores(
    tmp_path: Path, counted: Counted, request: pytest.FixtureRequest
):
    """An outage of the store is waited for; this would not pass by itself."""
    reader = reader_of(tmp_path, counted, "PNG", [SIDE] * 12)
    with closing(reader):
        request.getfixturevalue("no_room")
        fetched = reader.tars.begin(reader.selection.tars[0])
        with pytest.raises(SettingsError, match=r"the cache .* cannot be written \(File too large\)") as told:
            fetched.result()
    assert "reading.cache_gb lower" in str(told.value)
    assert not list((tmp_path / "cache").glob("making-*"))


def test_another_users_folder_is_not_read(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    link = tmp_path / default_folder().name
    link.symlink_to(tmp_path / "mine")
    with pytest.raises(SettingsError, match="not this user's own folder"):
        Folder(link, 1)
    Folder(tmp_path / "mine", 1)


def test_a_tar_that_lost_a_bit_is_found_before_a_state_is_committed(reader: Reader):
    """The bit lies in a picture's quantisation: it still decodes, to another picture."""
    sample = reader.selection.sample(4)
    data = bytearray(reader.tars.store.get(sample.tar))
    data[sample.offset + 40] ^= 1
    reader.tars.store.put(sample.tar, bytes(data))
    image_of(reader, 0)
    reader.settle()
    image_of(reader, 4)
    with pytest.raises(DataError, match="do not have the hash in its name"):
        reader.settle()
    with pytest.raises(DataError, match="do not have the hash in its name"):
        image_of(reader, 4)


def test_a_large_selection_is_rewritten_in_even_pieces(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(selection, "_ROWS", 5)
    reader = reader_of(tmp_path, store, "PNG", [SIDE] * 24)
    assert reader.selection.rows_SK.tolist() == [[4]] * 6
    samples = [reader.selection.sample(row) for row in range(24)]
    assert [sample.key for sample in samples] == [str(row) for row in range(24)]
    assert [sample.tar[:3] for sample in samples] == [f"t/{row // 4}" for row in range(24)]
    assert [reader.selection.captions(row)[0][0] for row in range(24)] == [f"row {row}" for row in range(24)]
    assert isinstance(samples[0], Sample)
    reader.close()
