from __future__ import annotations

import hashlib
import random

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from data_prep.dedup import duplicates
from infra.shards import INDEX_SCHEMA

SCHEMA = pa.schema([INDEX_SCHEMA.field(name) for name in ("key", "pixels_sha256", "original_width", "original_height")])


def table(rows: list[tuple[str, bytes | None, int]]) -> pa.Table:
    plain = [
        {"key": key, "pixels_sha256": hash_, "original_width": side if hash_ else None}
        | {"original_height": 10 if hash_ else None}
        for key, hash_, side in rows
    ]
    return pa.Table.from_pylist(plain, schema=SCHEMA)


def sha(value: int) -> bytes:
    return hashlib.sha256(bytes([value])).digest()


ROWS = st.lists(st.tuples(st.none() | st.integers(0, 4), st.integers(1, 3)), max_size=40).map(
    lambda rows: [(f"k{n:02d}", None if h is None else sha(h), side) for n, (h, side) in enumerate(rows)]
)


@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_one_survivor_a_group_and_the_same_one_in_any_order(
    rows: list[tuple[str, bytes | None, int]], rng: random.Random, chunk: int
) -> None:
    dropped = {key for (key, _, _), gone in zip(rows, duplicates(table(rows)), strict=True) if gone}
    for value in {hash_ for _, hash_, _ in rows if hash_}:
        group = [(-side, key) for key, hash_, side in rows if hash_ == value]
        assert [key for _, key in group if key not in dropped] == [min(group)[1]]  # the largest, then the first key
    assert not dropped & {key for key, hash_, _ in rows if hash_ is None}
    mixed = rows[:]
    rng.shuffle(mixed)
    parts = [table(mixed[at : at + chunk]) for at in range(0, len(mixed), chunk)] or [table([])]
    found = duplicates(pa.concat_tables(parts))
    assert {key for (key, _, _), gone in zip(mixed, found, strict=True) if gone} == dropped


def test_hashes_that_end_in_zeros_or_differ_in_one_bit_are_told_apart() -> None:
    rows = [("a", bytes(32), 5), ("b", bytes(31) + b"\1", 5), ("c", b"\1" + bytes(31), 5), ("d", bytes(32), 5)]
    assert duplicates(table(rows)).tolist() == [False, False, False, True]
