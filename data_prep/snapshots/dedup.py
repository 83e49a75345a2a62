"""Duplicates among the rows of all indexes, across sources: images with the same pixels, and images that look the same.

Exact duplicates have the same sha256 of their pixels, however the files were stored. Perceptual duplicates have hashes
(`images.phash`, 64 bits) that differ in at most `distance` bits; a row without a phash has exact duplicates only.
Union-find joins both kinds of pairs into groups, so a group may be a chain whose ends differ by more than `distance`.
One row of each group survives, the same one whatever the order of rows and shards: the largest original, then the
smallest key.

Close hashes are found by bands. Cut the 64 bits into `distance` + 3 bands: two hashes that differ in at most `distance`
bits agree in at least three bands. So for every choice of three bands, move their bits to the front, sort, and compare
only neighbours with equal fronts: at distance 4 a front has 27 bits, and 35 sorts find every pair. The hashes of a
crowd, a front that too many share, are searched in the same way by the bits behind the front, so that a crowd costs
sorts and not a comparison of all its pairs.

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
FARTHEST = 4  # bits of 64: beyond it, unrelated images are that close by chance in a corpus of millions

HASH_BITS = 64
EQUAL_BANDS = 3  # more of them leave fewer pairs to compare, but need many more sorts
CROWD = 256  # hashes with one front: beyond it, sorting again is cheaper than comparing all pairs. If it is 64 or more,
#              a crowd of distinct hashes has at least 7 bits behind its front: one for every band of the next search
BLOCK = 1 << 20  # rows or hashes handled at once
BATCH = 1 << 16  # pairs joined at once; small, since a crowd that is already one group needs no search
KEY_BYTES = 10  # a key is 20 hex digits: see sample_key

Bools = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[Any]
Pairs = tuple[Words, Words]
GroupOf = Callable[[Words], Ints]


def columns(distance: int | None) -> tuple[str, ...]:
    """The columns of an index that `Rows.add` needs."""
    return COLUMNS if distance is None else (*COLUMNS, "phash")


class Rows:
    """The rows of many indexes, added one index at a time and kept as numbers, in which duplicates are found.

    `distance` None: exact duplicates only; 0 to 4: perceptual ones up to that distance as well.
    """

    def __init__(self, distance: int | None = None) -> None:
        if distance is not None and not 0 <= distance <= FARTHEST:
            raise ValueError(f"a distance is 0 to {FARTHEST}, or None")
        self._distance = distance
        self._accepted = _Column(np.bool_)
        # The two halves of the sha256, XORed: 128 bits of a hash tell any number of images apart.
        self._pixels = (_Column(np.uint64), _Column(np.uint64))
        self._key = (_Column(np.uint64), _Column(np.uint16))
        self._area = _Column(np.int64)
        self._phash = _Column(np.uint64)
        self._hashed = _Column(np.bool_)  # whether there is a phash

    def add(self, table: pa.Table) -> None:
        """Add one index's rows, which have the columns that `columns` names."""
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
        """For each row added, whether another one of its group survives instead; False for rejected inputs.

        It frees the rows as it goes, so it can be called once only.
        """
        accepted = self._accepted.take()
        duplicate = np.zeros(len(accepted), bool)
        groups = _Groups(int(np.count_nonzero(accepted)))
        first = self._pixels[0].take()
        _join_equal_pixels(groups, first, self._pixels[1].take())
        if self._distance is not None:
            hashes, row_U = _join_equal_hashes(groups, self._phash.take(), self._hashed.take())
            if self._distance:
                _join_near_hashes(groups, hashes, row_U, self._distance)
            del hashes, row_U
        # Between rows of the same area and key the pixels decide, so that the order of rows never does.
        order = (-self._area.take(), self._key[0].take(), self._key[1].take(), first)
        duplicate[accepted] = groups.all_but_first(order)
        return duplicate


class _Column:
    """An array that grows in place. The kernel remaps the pages of a large one, so memory never doubles for a copy."""

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
        """The numbers; the column is empty afterwards, so that the caller can free them."""
        values, self._values = self._values, np.empty(0, self._values.dtype)
        values.resize(self._used, refcheck=False)
        self._used = 0
        return values


def _fixed(column: pa.ChunkedArray, width: int) -> npt.NDArray[np.uint8]:
    """(rows, width) bytes of a column of fixed-size binary without nulls."""
    chunks = [np.frombuffer(c.buffers()[1], np.uint8).reshape(-1, width)[c.offset :][: len(c)] for c in column.chunks]
    return np.concatenate([np.empty((0, width), np.uint8), *(chunk for chunk in chunks if len(chunk))])


def _key_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """The keys, hex digits in the index, as (rows, 10) bytes that sort in the same order."""
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


DIGIT_OF = np.full(256, 255, np.uint8)  # character -> its value as a hex digit, 255 if it is none
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
            np.minimum.at(self.parent, high, low)  # the lowest wins, so all neighbours of a row join in one round
            self._shorten(high)

    def all_but_first(self, order: Iterable[Ints]) -> Bools:
        """Whether each row comes after another one of its group, by the columns of `order` and then by row number."""
        self._shorten(slice(None))
        later: Bools = self.parent != np.arange(len(self.parent), dtype=np.int32)
        later[self.parent[later]] = True
        tied = np.flatnonzero(later).astype(np.int32)  # the rows that may still be the first of their group
        for column in (*order, None):
            values = tied if column is None else column[tied]
            root = self.parent[tied]
            best = np.full(len(self.parent), np.iinfo(values.dtype).max, values.dtype)
            np.minimum.at(best, root, values)
            tied = tied[values == best[root]]
        later[tied] = False
        return later

    def of(self, rows: Ints) -> Ints:
        """Each row's group, named by its root, which is one of its rows."""
        root = self.parent[rows]
        while True:
            up = self.parent[root]
            if np.array_equal(up, root):
                break
            root = up
        self.parent[rows] = root
        return root

    def _shorten(self, rows: Ints | slice) -> None:
        """Point each row at its grandparent until it points at a root: a chain of n rows takes log n rounds."""
        while True:
            up = self.parent[rows]
            upper = self.parent[up]
            if np.array_equal(up, upper):
                return
            self.parent[rows] = upper


def _join_equal_pixels(groups: _Groups, first: Words, second: Words) -> None:
    order = np.argsort(first)
    row = order[_in_runs(first[order])]  # the rows that share `first` with another one, usually few
    del order
    row = row[np.lexsort((second[row], first[row]))]
    same = _same_as_next(first[row]) & _same_as_next(second[row])
    groups.join(row[:-1][same], row[1:][same])


def _join_equal_hashes(groups: _Groups, phash: Words, hashed: Bools) -> tuple[Words, Ints]:
    """Join the rows that have the same hash; return the U distinct hashes, sorted, and a row of each."""
    row = np.flatnonzero(hashed).astype(np.int32)
    phash = phash[hashed]
    order = np.argsort(phash)
    phash, row = phash[order], row[order]
    del order
    same = _same_as_next(phash)
    groups.join(row[:-1][same], row[1:][same])
    distinct = np.ones(len(phash), bool)
    distinct[1:] = ~same
    return phash[distinct], row[distinct]


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
    in_run, same = np.zeros(len(values), bool), _same_as_next(values)
    in_run[1:] = same
    in_run[:-1] |= same
    return in_run


def _batches(pairs: Iterator[Pairs]) -> Iterator[Pairs]:
    """The same pairs in fewer and longer arrays."""
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
    """A choice of bands, and the permutation of a hash's bits that moves these bands to the front."""

    moves: list[tuple[int, int]]  # (mask, shift to the left) of the bits that move by the same distance
    behind: int  # the number of bits behind the front
    skipped: list[int]  # masks of bands: an earlier choice finds the pairs that agree in one of these

    def moved(self, values: Words) -> Words:
        return _moved(values, self.moves)

    def back(self, values: Words) -> Words:
        return _moved(values, [(_shifted(mask, shift), -shift) for mask, shift in self.moves])


def near_pairs(
    hashes: Words, distance: int, group_of: GroupOf, front: int = 0, differ: Sequence[int] = ()
) -> Iterator[Pairs]:
    """The pairs of these distinct hashes that differ in at most `distance` bits, each pair once.

    A crowd that is one group already is skipped, as its pairs would change nothing. `front` and `differ` are for the
    search within crowds: only pairs are found that agree in the first `front` bits and differ within every mask of
    `differ`; the choices of bands before found the others.
    """
    for choice in _choices(front, distance):
        moved = choice.moved(hashes)
        moved.sort()
        masks = choice.moved(np.array([*differ, *choice.skipped], np.uint64)).tolist()
        group_of_moved = partial(_group_of_moved, choice, group_of)
        crowds: list[Words] = []
        for block in _blocks(moved, choice.behind):
            few, crowd = _by_crowd(block, choice.behind, masks, group_of_moved)
            crowds.append(crowd)
            for a, b in _neighbours(block, few, choice.behind, distance):
                unseen = _all_differ(a ^ b, masks)
                yield choice.back(a[unseen]), choice.back(b[unseen])
        del moved
        crowd = np.concatenate(crowds) if crowds else hashes[:0]
        if len(crowd):
            for a, b in near_pairs(crowd, distance, group_of_moved, HASH_BITS - choice.behind, masks):
                yield choice.back(a), choice.back(b)


def _group_of_moved(choice: _Choice, group_of: GroupOf, moved: Words) -> Ints:
    return group_of(choice.back(moved))


def _choices(front: int, distance: int) -> Iterator[_Choice]:
    """Every choice of EQUAL_BANDS among the bands into which the bits behind the front are cut."""
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
        for mask, shift in moves:
            moved[start : start + block] |= _shifted(values[start : start + block] & np.uint64(mask), shift)
    return moved


def _blocks(values: Words, behind: int) -> Iterator[Words]:
    """Sorted values in blocks; values with the same front stay in one block."""
    start = 0
    while start < len(values):
        last = values[min(start + BLOCK, len(values)) - 1] | np.uint64((1 << behind) - 1)
        end = int(np.searchsorted(values, last, "right"))
        yield values[start:end]
        start = end


def _by_crowd(values: Words, behind: int, masks: Sequence[int], group_of: GroupOf) -> tuple[Bools, Words]:
    """For sorted values: which of them share their front with few others, and the values in crowds to be searched.

    A crowd whose values all agree within one of the masks has no pair that is wanted; one that is a group needs none.
    """
    fronts = values >> np.uint64(behind)
    starts = np.flatnonzero(np.concatenate([[True], fronts[1:] != fronts[:-1]]))
    sizes = np.diff(starts, append=len(values))
    few = np.repeat(sizes <= CROWD, sizes)
    crowd = values[~few]
    sizes = sizes[sizes > CROWD]
    if len(crowd):
        wanted = _all_differ(_differing(crowd, sizes), masks)
        crowd, sizes = crowd[np.repeat(wanted, sizes)], sizes[wanted]
    if len(crowd):
        wanted = _differing(group_of(crowd), sizes) != 0
        crowd = crowd[np.repeat(wanted, sizes)]
    return few, crowd


def _differing(values: Ints, sizes: Ints) -> Ints:
    """For each run of values, of these sizes, the bits in which its values are not all the same."""
    starts = np.cumsum(sizes) - sizes
    return np.bitwise_or.reduceat(values ^ np.repeat(values[starts], sizes), starts)


def _all_differ(differing: Words, masks: Sequence[int]) -> Bools:
    """Whether each value has a bit within every mask."""
    differ = np.ones(len(differing), bool)
    for mask in masks:
        differ &= (differing & np.uint64(mask)) != 0
    return differ


def _neighbours(values: Words, wanted: Bools, behind: int, distance: int) -> Iterator[Pairs]:
    """The close pairs of sorted values with the same front, by comparing each with the next, the next but one, ..."""
    at = np.flatnonzero(wanted)
    step = 0
    while len(at):
        step += 1
        at = at[: np.searchsorted(at, len(values) - step)]
        a, b = values[at], values[at + step]
        differing = a ^ b
        same_front = differing < np.uint64(1 << behind)
        at = at[same_front]
        close = same_front & (np.bitwise_count(differing) <= distance)
        if close.any():
            yield a[close], b[close]
