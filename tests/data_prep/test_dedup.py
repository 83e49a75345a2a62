from __future__ import annotations

import hashlib
import random
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.snapshots import dedup
from data_prep.snapshots.dedup import Bools, Rows, columns, near_pairs
from infra.errors import DataError
from infra.shards import INDEX_SCHEMA

SCHEMA = pa.schema([INDEX_SCHEMA.field(name) for name in columns(4)])
Words = npt.NDArray[np.uint64]
Row = tuple[str, bytes | None, int, int | None]  # key, sha256 of the pixels or rejected, side, phash


def table(rows: list[Row]) -> pa.Table:
    plain = [
        {"key": key, "pixels_sha256": pixels, "original_width": side if pixels else None}
        | {"original_height": 10 if pixels else None, "phash": phash if pixels else None}
        for key, pixels, side, phash in rows
    ]
    return pa.Table.from_pylist(plain, schema=SCHEMA)


def key(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()[:20]


def sha(value: int) -> bytes:
    return hashlib.sha256(b"%d" % value).digest()


def survivors(rows: list[Row], distance: int | None) -> list[str]:
    """By comparing every row with every other."""
    rows = [row for row in rows if row[1]]
    group = list(range(len(rows)))
    for i, j in combinations(range(len(rows)), 2):
        (_, pixels, _, one), (_, other_pixels, _, other) = rows[i], rows[j]
        hashed = distance is not None and one is not None and other is not None
        if pixels == other_pixels or (hashed and (one ^ other).bit_count() <= distance):  # type: ignore[operator]
            group = [group[i] if number == group[j] else number for number in group]
    best = [min((-rows[i][2], rows[i][0]) for i in range(len(rows)) if group[i] == number) for number in set(group)]
    return sorted(name for _, name in best)


def duplicates(rows: pa.Table, distance: int | None = None) -> Bools:
    gathered = Rows(distance)
    gathered.add(rows)
    return gathered.duplicates()


def left(rows: list[Row], distance: int | None) -> list[str]:
    return [row[0] for row, gone in zip(rows, duplicates(table(rows), distance), strict=True) if row[1] and not gone]


def flipped(value: int, places: list[int]) -> int:
    for place in places:
        value ^= 1 << place
    return value


# Few bases and few places, so that groups, chains and hashes just outside of the distance are common.
PLACES = st.lists(st.sampled_from([0, 1, 8, 9, 10, 27, 36, 37, 54, 55, 62, 63]), max_size=6)
HASHES = st.builds(flipped, st.sampled_from([0, 2**64 - 1, 0x0123456789ABCDEF]), PLACES)
ROWS = st.lists(
    st.tuples(st.none() | st.integers(0, 12), st.integers(1, 3), st.none() | HASHES, st.integers(0, 10**6)), max_size=30
).map(
    lambda rows: [
        (key(number * 100 + n), None if pixels is None else sha(pixels), side, phash)
        for n, (pixels, side, phash, number) in enumerate(rows)
    ]
)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.none() | st.integers(0, 4), st.randoms(use_true_random=False), st.integers(1, 5))
def test_one_survivor_a_group_and_the_same_one_in_any_order(
    rows: list[Row], distance: int | None, rng: random.Random, chunk: int
) -> None:
    assert sorted(left(rows, distance)) == survivors(rows, distance)
    mixed = rows[:]
    rng.shuffle(mixed)
    gathered = Rows(distance)
    for at in range(0, len(mixed), chunk):
        gathered.add(table(mixed[: at + chunk])[at:])  # a slice: its buffers do not begin at its first row
    found = gathered.duplicates()
    assert sorted(row[0] for row, gone in zip(mixed, found, strict=True) if row[1] and not gone) == survivors(
        rows, distance
    )
    assert not any(gone for row, gone in zip(mixed, found, strict=True) if not row[1])  # rejected: neither


def test_columns_asked_for_are_those_read() -> None:
    rows: list[Row] = [(key(1), sha(1), 1, 5), (key(2), sha(2), 2, 5)]
    assert duplicates(table(rows).select(columns(None))).tolist() == [False, False]
    assert duplicates(table(rows).select(columns(4)), 4).tolist() == [True, False]
    assert duplicates(table(rows).select(columns(0)), 0).tolist() == [True, False]


def test_hashes_that_end_in_zeros_or_differ_in_one_bit_are_told_apart() -> None:
    pixels = [bytes(32), *((1 << bit).to_bytes(32, "big") for bit in range(256)), bytes(32)]
    rows: list[Row] = [(f"{n:020x}", value, 5, None) for n, value in enumerate(pixels)]
    found = duplicates(table(rows[:129] + rows[-1:]))
    assert np.flatnonzero(found).tolist() == [129]
    found = duplicates(table(rows[:1] + rows[129:]))
    assert np.flatnonzero(found).tolist() == [129]


def test_slices_are_read_from_where_they_begin() -> None:
    column = pa.array([b"%02d" % n for n in range(9)], pa.binary(2))
    found = dedup._fixed(pa.chunked_array([column[3:5], column[:0], column[8:]]), 2)
    assert [bytes(value) for value in found] == [b"03", b"04", b"08"]


def test_the_first_key_survives_among_keys_that_differ_in_any_digit() -> None:
    keys = [f"{n:020x}" for n in (1 << 79, 1 << 17, 1 << 15, 255, 16)]
    rows: list[Row] = [(name, sha(0), 5, None) for name in keys]
    assert left(rows, None) == [min(keys)]


def test_a_chain_is_one_group_though_its_ends_are_far_apart() -> None:
    chain = [flipped(0, list(range(4 * n))) for n in range(17)]  # from no bit to all 64
    rows: list[Row] = [(key(n), sha(n), 1 + (n == 9), phash) for n, phash in enumerate(chain)]
    assert left(rows, 4) == [key(9)]
    assert len(left(rows, 3)) == 17


def test_rows_without_a_phash_join_by_their_pixels_alone() -> None:
    rows: list[Row] = [(key(0), sha(0), 3, None), (key(1), sha(1), 2, None), (key(2), sha(1), 1, 0)]
    assert left(rows, 4) == [key(0), key(1)]
    bridge: list[Row] = [*rows, (key(3), sha(3), 9, 3)]  # near the hash of one with the pixels of another
    assert left(bridge, 4) == [key(0), key(3)]


def test_many_rows_of_few_hot_hashes() -> None:
    rows: list[Row] = [(key(n), sha(n), n % 300, n % 7 * 0x0101010101010101 << 3) for n in range(3000)]
    largest = [min((-row[2], row[0]) for row in rows if row[3] == hot) for hot in {row[3] for row in rows}]
    assert sorted(left(rows, 1)) == sorted(name for _, name in largest)


def test_keys_of_another_kind_are_refused() -> None:
    for name in ("k1", "g" * 20, "A" * 20, "0" * 19 + "é"):
        with pytest.raises(DataError, match="20 hex digits"):
            duplicates(table([(name, sha(1), 1, None)]))


@pytest.mark.parametrize("distance", [-1, 5])
def test_a_distance_out_of_reach_is_refused(distance: int) -> None:
    with pytest.raises(ValueError, match="0 to 4"):
        Rows(distance)


# Close hashes: against every pair


def close(hashes: Words, distance: int) -> list[tuple[int, int]]:
    one, other = np.nonzero(np.triu(np.bitwise_count(hashes[:, None] ^ hashes) <= distance, 1))
    return sorted(zip(hashes[one].tolist(), hashes[other].tolist(), strict=True))


def apart(hashes: Words) -> Any:
    return np.arange(len(hashes))  # no two are one group yet


@st.composite
def crowded(draw: st.DrawFn) -> Words:
    """Bases with neighbours one to six places away, and crowds: everything that shares all but some bits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    bases = rng.integers(0, 2**64, draw(st.integers(1, 40)), dtype=np.uint64)
    parts = [bases]
    for places in range(1, 7):
        near = bases.copy()
        for _ in range(places):
            near ^= np.uint64(1) << rng.integers(0, 64, len(near), dtype=np.uint64)
        parts.append(near)
    for base in bases[: draw(st.integers(0, 2))]:
        width = draw(st.integers(1, 14))
        free = rng.integers(0, 2**width, draw(st.integers(1, 500)), dtype=np.uint64)
        spread = rng.permutation(64)[:width].tolist() if draw(st.booleans()) else list(range(width))
        crowd = np.full(len(free), base)
        for n, place in enumerate(spread):
            crowd ^= (free >> np.uint64(n) & np.uint64(1)) << np.uint64(place)
        parts.append(crowd)
    return np.unique(np.concatenate(parts))


@settings(max_examples=60, deadline=None)
@given(crowded(), st.integers(1, 4), st.sampled_from([64, 256]), st.sampled_from([100, 1 << 20]))
def test_every_close_pair_is_found_once(hashes: Words, distance: int, crowd: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "CROWD", crowd)
        patch.setattr(dedup, "BLOCK", block)
        pairs = list(near_pairs(hashes, distance, apart))
    found = [pair for a, b in pairs for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert sorted((min(pair), max(pair)) for pair in found) == close(hashes, distance)


@settings(max_examples=15, deadline=None)
@given(crowded(), st.integers(1, 4))
def test_crowds_that_are_one_group_are_passed_over_without_losing_another(hashes: Words, distance: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "CROWD", 64)
        patch.setattr(dedup, "BATCH", 50)
        found = duplicates(table([(key(n), sha(n), 1, int(value)) for n, value in enumerate(hashes)]), distance)
    group = {value: value for value in hashes.tolist()}
    for one, other in close(hashes, distance):
        old, fresh = group[other], group[one]
        if old != fresh:
            group = {value: fresh if name == old else name for value, name in group.items()}
    assert np.count_nonzero(~found) == len(set(group.values()))


def test_a_crowd_of_many_is_searched_by_sorting() -> None:
    """30,000 hashes with their first 30 bits alike: 450 million pairs, of which the search must look at few."""
    hashes = np.random.default_rng(0).integers(0, 2**34, 30_000, dtype=np.uint64)
    hashes[:1000] = hashes[1000:2000] ^ np.uint64(0b1011 << 11)
    compared = 0
    counted = np.bitwise_count

    def counting(values: Any) -> Any:
        nonlocal compared
        compared += len(values)
        return counted(values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "bitwise_count", counting)
        found = duplicates(table([(f"{n:020x}", sha(n), 1, int(value)) for n, value in enumerate(hashes)]), 3)
    assert not found[:1000].any() and found[1000:2000].all()
    assert compared < 20_000_000
