"""The global order: one stream of samples whatever the number of ranks, a permutation in every epoch, new in each."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infra.errors import DataError
from infra.records import put_data
from infra.shards import SELECTION_SCHEMA, TarWriter
from infra.store import open_store
from training.loader.batches import Batches
from training.loader.order import DataSettings, Order
from training.loader.reader import Reader

ROWS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)


@given(rows=ROWS, lanes=st.integers(1, 16), window=st.integers(1, 50), seed=st.integers(0, 99))
def test_an_epoch_sees_no_row_twice_and_leaves_out_less_than_a_lane_each(rows, lanes, window, seed):
    order = Order(np.array(rows), seed, DataSettings(lanes=lanes, window=window))
    seen = Counter(order.row(p) for p in range(order.epoch_length))
    assert set(seen.values()) == {1}
    assert set(seen) <= set(range(sum(rows)))
    assert sum(rows) - order.epoch_length < min(lanes, sum(rows))


@given(rows=ROWS, seed=st.integers(0, 99), position=st.integers(0, 10_000))
def test_a_position_has_one_row_however_one_gets_there(rows, seed, position):
    settings = DataSettings(lanes=4, window=8)
    walked = Order(np.array(rows), seed, settings)
    for p in range(max(0, position - 50), position):
        walked.row(p)
    assert walked.row(position) == Order(np.array(rows), seed, settings).row(position)


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


def test_an_empty_snapshot_is_refused():
    with pytest.raises(DataError, match="no rows"):
        Order(np.array([0]), 0, DataSettings())


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return reader_of(tmp_path, "JPEG", [8] * 12)


def saved(image: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def reader_of(tmp_path: Path, kind: str, sides: list[int]) -> Reader:
    """Twelve grey images in three tars; the image's brightness and its caption both tell its row."""
    store = open_store(str(tmp_path / "store"))
    columns: dict[str, list] = {name: [] for name in SELECTION_SCHEMA.names}
    for shard in range(3):
        packed = io.BytesIO()
        tar = TarWriter(packed)
        rows = range(4 * shard, 4 * shard + 4)
        images = [saved(np.full((sides[row], sides[row], 3), 20 * row, np.uint8), kind) for row in rows]
        members = [tar.add(f"{row}.x", image) for row, image in zip(rows, images, strict=True)]
        tar.finish()
        key = put_data(store, "t", f"{shard}.tar", packed.getvalue()).key
        for row, member in zip(rows, members, strict=True):
            captions = [f"row {row}", f"long row {row}"], [0.25, 0.75]
            values = (str(row), key, *member, sides[row], sides[row], *captions, "source", "bucket")
            for name, value in zip(SELECTION_SCHEMA.names, values, strict=True):
                columns[name].append(value)
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in SELECTION_SCHEMA}, schema=SELECTION_SCHEMA)
    (tmp_path / "cache").mkdir()
    return Reader(store, table, tmp_path / "cache", seed=0)


def row_of(caption: str) -> int:
    return int(caption.rpartition(" ")[2])


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_reads_the_same_batches(reader: Reader, ranks: int):
    settings = DataSettings(lanes=4)
    whole = Batches(reader, settings, batch=4).read(8)
    parts = [Batches(reader, settings, batch=4, rank=r, ranks=ranks).read(8) for r in range(ranks)]
    together = {int(p): c for part in parts for p, c in zip(part.positions, part.captions, strict=True)}
    assert together == dict(zip(whole.positions.tolist(), whole.captions, strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_images_belong_to_their_captions(tmp_path: Path, kind: str):
    reader = reader_of(tmp_path, kind, [8] * 12)
    batch = Batches(reader, DataSettings(lanes=4), batch=12).read(0)
    assert [round(float(i.float().mean()) / 20) for i in batch.images_BCHW] == [row_of(c) for c in batch.captions]


def test_buckets_are_refused_until_a_batch_knows_of_them(tmp_path: Path):
    reader = reader_of(tmp_path, "PNG", [8] * 11 + [16])
    with pytest.raises(DataError, match="several sizes"):
        Batches(reader, DataSettings(lanes=4), batch=12).read(0)


def test_captions_are_drawn_by_weight_and_anew_at_each_position(reader: Reader):
    drawn = Counter(reader.caption(3, position).startswith("long") for position in range(400))
    assert 0.68 < drawn[True] / 400 < 0.82


def test_reading_ahead_gives_what_reading_gives(reader: Reader):
    batches = Batches(reader, DataSettings(lanes=4, prefetch=3), batch=4)
    stream = batches.iterate(4)
    ahead = [next(stream) for _ in range(5)]
    stream.close()
    for k, batch in enumerate(ahead):
        assert batch.captions == batches.read(4 + 4 * k).captions


def test_a_damaged_image_is_named(reader: Reader):
    reader.lengths = reader.lengths // 2
    with pytest.raises(DataError, match=r"row 0 of t/0-[0-9a-f]{64}\.tar"):
        reader.image(0)


def test_a_tar_that_lost_a_bit_is_not_read(reader: Reader):
    """The bit lies in a picture's last bytes: it would still decode, to another picture."""
    key = reader.tar_names[1]
    data = bytearray(reader.tars.store.get(key))
    data[int(reader.offsets[4] + reader.lengths[4]) - 3] ^= 1
    reader.tars.store.put(key, bytes(data))
    reader.image(0)
    with pytest.raises(DataError, match="do not have the hash in its name"):
        reader.image(4)
