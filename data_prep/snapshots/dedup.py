"""Duplicates over the indexes, across sources: the same pixels, and pictures that look the same.

Exact: equal sha256 of the pixels, however the files were stored. Perceptual: the 64 bits of `images.phash` differ in
at most `distance` places; rows without a phash join by their pixels alone. The groups are what union-find makes of both
together, so a group may be a chain: its ends can differ by more than `distance`. Of every group one survives, and
always the same one, whatever the order of rows and shards: the largest original, then the smallest key.

Close hashes are found by bands. Cut 64 bits into `distance` + 3 bands: two hashes that differ in at most `distance`
places agree in three bands at least. So for every choice of three, move their bits to the front, sort, and compare only
neighbours with equal fronts: at distance 4 a front has 27 bits, and 35 sorts find every pair there is. A front that too
many hashes share is searched in the same way by the bits behind it, so crowds cost sorts, not all pairs of the crowd.

45 million rows take 44 bytes each while they are gathered, and minutes on one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from infra.errors import DataError

COLUMNS = ("key", "pixels_sha256", "original_width", "original_height")
FARTHEST = 4  # bits of 64: beyond it, unrelated pictures meet by chance in a corpus of millions

HASH_BITS = 64
EQUAL_BANDS = 3  # more: fewer pairs to compare, but many more sorts
CROWD = 256  # hashes with one front: beyond it, sorting again is cheaper than comparing all pairs. From 64 on, a crowd
#              of different hashes has at least 7 bits behind its front, and so a bit for every band of the next search
BLOCK = 1 << 20  # rows or hashes handled at once
BATCH = 1 << 16  # pairs joined at once: soon, since crowds that have become a group are passed over
KEY_BYTES = 10  # a key is 20 hex digits: see sample_key

Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[Any]
Pairs = tuple[Words, Words]
Found = Iterator[Pairs]
GroupOf = Callable[[Words], Ints]


def columns(distance: int | None) -> tuple[str, ...]:
    """What `duplicates` reads of an index."""
    return COLUMNS if distance is None else (*COLUMNS, "phash")


def duplicates(rows: pa.Table, distance: int | None = None) -> Bools:
    """For each row (see `columns`), whether another one survives in its place. Rejected inputs are neither.

    `distance` None: exact duplicates alone; 0 to 4: those, and the perceptual ones up to that distance.
    """
    gathered = Rows(distance)
    gathered.add(rows)
    return gathered.duplicates()


class Rows:
    """What finding duplicates needs of many indexes, added one at a time and kept as numbers."""

    def __init__(self, distance: int | None = None) -> None:
        if distance is not None and not 0 <= distance <= FARTHEST:
            raise ValueError(f"a distance is 0 to {FARTHEST}, or None")
        self._distance = distance
        self._accepted = _Column(np.bool_)
        # Two words: the sha256's halves, XORed. 128 bits of a sha256 tell any number of pictures apart.
        self._pixels = (_Column(np.uint64), _Column(np.uint64))
        self._key = (_Column(np.uint64), _Column(np.uint16))
        self._area = _Column(np.int64)
        self._phash = _Column(np.uint64)
        self._hashed = _Column(np.bool_)  # whether there is a phash

    def add(self, table: pa.Table) -> None:
        """One index's rows, in their order (see `columns`)."""
        accepted = table["pixels_sha256"].is_valid()
        self._accepted.add(accepted.to_numpy())
        table = table.filter(accepted)
        words = _fixed(table["pixels_sha256"], 32).view("<u8")
        keys = _key_bytes(table["key"])
        width, height = (table[f"original_{side}"].to_numpy().astype(np.int64) for side in ("width", "height"))
        self._pixels[0].add(words[:, 0] ^ words[:, 2])
        self._pixels[1].add(words[:, 1] ^ words[:, 3])
        self._key[0].add(np.ascontiguousarray(keys[:, :8]).view(">u8")[:, 0])
        self._key[1].add(np.ascontiguousarray(keys[:, 8:]).view(">u2")[:, 0])
        self._area.add(width * height)
        if self._distance is not None:
            self._phash.add(table["phash"].fill_null(0).to_numpy())
            self._hashed.add(table["phash"].is_valid().to_numpy())

    def duplicates(self) -> Bools:
        """For each row added, whether another one survives in its place. Takes the rows with it: call it once."""
        accepted = self._accepted.take()
        found = np.zeros(len(accepted), bool)
        groups = _Groups(int(np.count_nonzero(accepted)))
        first = self._pixels[0].take()
        _join_equal_pixels(groups, first, self._pixels[1].take())
        if self._distance is not None:
            hashes, row_U = _join_equal_hashes(groups, self._phash.take(), self._hashed.take())
            if self._distance:
                _join_near_hashes(groups, hashes, row_U, self._distance)
            del hashes, row_U
        # The pixels decide between rows of one area and one key, so that their order never does.
        order = (-self._area.take(), self._key[0].take(), self._key[1].take(), first)
        found[accepted] = groups.all_but_first(order)
        return found


class _Column:
    """Numbers that grow in place: a big array is moved by the page table, not copied, so memory never doubles."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self._values = np.empty(0, dtype)
        self._used = 0

    def add(self, values: Ints) -> None:
        end = self._used + len(values)
        if end > len(self._values):
            self._values.resize(end + BLOCK, refcheck=False)
        self._values[self._used : end] = values
        self._used = end

    def take(self) -> Ints:
        """The numbers, which are then no longer here."""
        values, self._values = self._values, np.empty(0, self._values.dtype)
        values.resize(self._used, refcheck=False)
        self._used = 0
        return values


def _fixed(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.uint8]:
    """(rows, width) bytes of a column of fixed-size binary without nulls."""
    chunks = [np.frombuffer(c.buffers()[1], np.uint8).reshape(-1, width)[c.offset :][: len(c)] for c in column.chunks]
    return np.concatenate([np.empty((0, width), np.uint8), *(chunk for chunk in chunks if len(chunk))])


def _key_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """(rows, 10) bytes, which sort as the keys do."""
    try:
        text = _fixed(column.cast(pa.binary(2 * KEY_BYTES)), 2 * KEY_BYTES)
    except pa.ArrowInvalid:
        text = np.zeros((1, 2 * KEY_BYTES), np.uint8)
    digits: npt.NDArray[np.uint8] = DIGIT_OF[text]
    if (digits > 15).any():
        raise DataError(
            f"an index has keys that are not {2 * KEY_BYTES} hex digits",
            remedy="it was written by another program; run `pixnerd data verify --drop-damaged`, then prepare again",
        )
    return np.left_shift(digits[:, ::2], 4) | digits[:, 1::2]


DIGIT_OF = np.full(256, 255, np.uint8)  # of a character, 255 for those that are none
DIGIT_OF[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


# Groups


class _Groups:
    """Union-find over rows, a whole array of pairs at a time."""

    def __init__(self, rows: int) -> None:
        self.parent = np.arange(rows, dtype=np.int32)

    def join(self, a: Ints, b: Ints) -> None:
        """Put a[i] and b[i] into one group, for each i."""
        while True:
            a, b = self.of(a), self.of(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            high, low = np.maximum(a, b), np.minimum(a, b)
            np.minimum.at(self.parent, high, low)  # the lowest wins: a hub's many neighbours meet in one round
            self._shorten(high)

    def all_but_first(self, order: Iterable[Ints]) -> Bools:
        """The rows that come after another one of their group, by the columns of `order` and then by their number."""
        self._shorten(slice(None))
        later: Bools = self.parent != np.arange(len(self.parent), dtype=np.int32)
        later[self.parent[later]] = True
        left = np.flatnonzero(later).astype(np.int32)
        for column in (*order, None):
            values = left if column is None else column[left]
            root = self.parent[left]
            best = np.full(len(self.parent), np.iinfo(values.dtype).max, values.dtype)
            np.minimum.at(best, root, values)
            left = left[values == best[root]]
        later[left] = False
        return later

    def of(self, rows: Ints) -> Ints:
        """Each row's group: one of its rows."""
        root = self.parent[rows]
        while True:
            up = self.parent[root]
            if np.array_equal(up, root):
                break
            root = up
        self.parent[rows] = root
        return root

    def _shorten(self, rows: Ints | slice) -> None:
        """Double each row's step until it ends at a root: a chain of n takes log n rounds."""
        while True:
            up = self.parent[rows]
            upper = self.parent[up]
            if np.array_equal(up, upper):
                return
            self.parent[rows] = upper


def _join_equal_pixels(groups: _Groups, first: Words, second: Words) -> None:
    order = np.argsort(first)
    row = order[_in_runs(first[order])]  # few, where duplicates are few
    del order
    row = row[np.lexsort((second[row], first[row]))]
    same = _same_as_next(first[row]) & _same_as_next(second[row])
    groups.join(row[:-1][same], row[1:][same])


def _join_equal_hashes(groups: _Groups, phash: Words, hashed: Bools) -> tuple[Words, Ints]:
    """Join the rows of each hash; then the U different hashes, sorted, and a row of each."""
    row = np.flatnonzero(hashed).astype(np.int32)
    phash = phash[hashed]
    order = np.argsort(phash)
    phash, row = phash[order], row[order]
    del order
    same = _same_as_next(phash)
    groups.join(row[:-1][same], row[1:][same])
    fresh = np.ones(len(phash), bool)
    fresh[1:] = ~same
    return phash[fresh], row[fresh]


def _join_near_hashes(groups: _Groups, hash_U: Words, row_U: Ints, distance: int) -> None:
    def group_of(hashes: Words) -> Ints:
        return groups.of(row_U[np.searchsorted(hash_U, hashes)])

    for a, b in _batches(near_pairs(hash_U, distance, group_of)):
        groups.join(row_U[np.searchsorted(hash_U, a)], row_U[np.searchsorted(hash_U, b)])


def _same_as_next(values: Ints) -> Bools:
    same: Bools = values[1:] == values[:-1]
    return same


def _in_runs(values: Ints) -> Bools:
    """Whether each value is the same as the one before or after it."""
    found, same = np.zeros(len(values), bool), _same_as_next(values)
    found[1:] = same
    found[:-1] |= same
    return found


def _batches(pairs: Iterator[Pairs]) -> Iterator[Pairs]:
    """Fewer and longer pairs of arrays."""
    waiting: list[Pairs] = []
    length = 0
    for pair in pairs:
        waiting.append(pair)
        length += len(pair[0])
        if length >= BATCH:
            yield _concatenated(waiting)
            waiting, length = [], 0
    if waiting:
        yield _concatenated(waiting)


def _concatenated(pairs: list[Pairs]) -> Pairs:
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])


# Close hashes


class _Choice(NamedTuple):
    """Some bands of a hash, and where its bits go so that those bands are in front."""

    moves: list[tuple[int, int]]  # (mask, shift to the left) of the bits that move by as much
    behind: int  # how many bits are behind the front
    skipped: list[int]  # masks of bands: a pair that agrees in one of these is found by an earlier choice

    def moved(self, values: Words) -> Words:
        return _moved(values, self.moves)

    def back(self, values: Words) -> Words:
        return _moved(values, [(_shifted(mask, shift), -shift) for mask, shift in self.moves])


def near_pairs(hashes: Words, distance: int, group_of: GroupOf, front: int = 0, differ: Sequence[int] = ()) -> Found:
    """Pairs of these different hashes that differ in at most `distance` places: all, save where a crowd is one group.

    Those that agree in the first `front` bits, that is, and differ in each mask of `differ`: so the crowds of one
    choice are searched in turn, for what no earlier choice has found. No pair comes twice.
    """
    for choice in _choices(front, distance):
        moved = choice.moved(hashes)
        moved.sort()
        masks = choice.moved(np.array([*differ, *choice.skipped], np.uint64)).tolist()
        here = partial(_group_before, choice, group_of)
        crowds: list[Words] = []
        for part in _parts(moved, choice.behind):
            few, crowd = _by_crowd(part, choice.behind, masks, here)
            crowds.append(crowd)
            for a, b in _neighbours(part, few, choice.behind, distance):
                fresh = _all_differ(a ^ b, masks)
                yield choice.back(a[fresh]), choice.back(b[fresh])
        del moved
        crowd = np.concatenate(crowds) if crowds else hashes[:0]
        if len(crowd):
            for a, b in near_pairs(crowd, distance, here, HASH_BITS - choice.behind, masks):
                yield choice.back(a), choice.back(b)


def _group_before(choice: _Choice, group_of: GroupOf, moved: Words) -> Ints:
    return group_of(choice.back(moved))


def _choices(front: int, distance: int) -> Iterator[_Choice]:
    """Every way to choose the bands, of the bits behind the front, that a pair agrees in."""
    bits, count = HASH_BITS - front, distance + EQUAL_BANDS
    edges = [bits * n // count for n in range(count + 1)][::-1]
    bands = list(zip(edges[1:], edges[:-1], strict=True))  # (lowest bit, end), from the left
    masks = [(1 << end) - (1 << low) for low, end in bands]
    for chosen in combinations(range(count), EQUAL_BANDS):
        others = [band for band in range(count) if band not in chosen]
        shifts: dict[int, int] = {0: (1 << HASH_BITS) - (1 << bits)}  # shift -> mask; the front stays
        at = bits
        for band in (*chosen, *others):
            low, end = bands[band]
            at -= end - low
            shifts[at - low] = shifts.get(at - low, 0) | masks[band]
        behind = sum(bands[band][1] - bands[band][0] for band in others)
        skipped = [masks[band] for band in others if band < chosen[-1]]
        yield _Choice([(mask, shift) for shift, mask in shifts.items() if mask], behind, skipped)


def _shifted(value: Any, left: int) -> Any:
    return value << left if left >= 0 else value >> -left


def _moved(values: Words, moves: list[tuple[int, int]]) -> Words:
    moved = np.zeros_like(values)
    block = 1 << 15  # stays in the cache
    for start in range(0, len(values), block):
        part = values[start : start + block]
        for mask, shift in moves:
            moved[start : start + block] |= _shifted(part & np.uint64(mask), shift)
    return moved


def _parts(values: Words, behind: int) -> Iterator[Words]:
    """Sorted values, a part at a time; those with one front stay together."""
    start = 0
    while start < len(values):
        last = values[min(start + BLOCK, len(values)) - 1] | np.uint64((1 << behind) - 1)
        end = int(np.searchsorted(values, last, "right"))
        yield values[start:end]
        start = end


def _by_crowd(values: Words, behind: int, masks: Sequence[int], group_of: GroupOf) -> tuple[Bools, Words]:
    """Of sorted values: which are not in a crowd (they share their front with few), and those in crowds worth a search.

    A crowd that agrees in one of the masks holds no pair that is wanted; one that is a group by now needs none.
    """
    fronts = values >> np.uint64(behind)
    starts = np.flatnonzero(np.concatenate([[True], fronts[1:] != fronts[:-1]]))
    sizes = np.diff(starts, append=len(values))
    few = np.repeat(sizes <= CROWD, sizes)
    crowd = values[~few]
    sizes = sizes[sizes > CROWD]
    if len(crowd):
        worth = _all_differ(_differing(crowd, sizes), masks)
        crowd, sizes = crowd[np.repeat(worth, sizes)], sizes[worth]
    if len(crowd):
        worth = _differing(group_of(crowd), sizes) != 0
        crowd = crowd[np.repeat(worth, sizes)]
    return few, crowd


def _differing(values: Ints, sizes: Ints) -> Ints:
    """For runs of these sizes, the bits in which a run's values are not all the same."""
    starts = np.cumsum(sizes) - sizes
    return np.bitwise_or.reduceat(values ^ np.repeat(values[starts], sizes), starts)


def _all_differ(differing: Words, masks: Sequence[int]) -> Bools:
    found = np.ones(len(differing), bool)
    for mask in masks:
        found &= (differing & np.uint64(mask)) != 0
    return found


def _neighbours(values: Words, wanted: Bools, behind: int, distance: int) -> Iterator[Pairs]:
    """The pairs of sorted values that are close and have one front: each with the next, the next but one, ..."""
    at = np.flatnonzero(wanted)
    step = 0
    while len(at):
        step += 1
        at = at[: np.searchsorted(at, len(values) - step)]
        here, there = values[at], values[at + step]
        differing = here ^ there
        together = differing < np.uint64(1 << behind)
        at = at[together]
        close = together & (np.bitwise_count(differing) <= distance)
        if close.any():
            yield here[close], there[close]
