"""Finding duplicates among many rows: seconds, peak memory, and whether all that was planted is found.

The rows are made up: `uniform` hashes with no duplicates, and `planted`, of which 1 % share 100 hot hashes, 1 % differ
from another row's hash in one to four places, and 1 % have another row's pixels. Each line is a process of its own,
since a process never forgets its peak; making the rows up is not in its seconds, gathering them is.

Unrelated hashes meet by chance: at 45 million, some 37 pairs of uniform ones are within 4 bits. They are found as well.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep.snapshots.dedup import KEY_BYTES, Rows

SIZES = (450_000, 4_500_000, 45_000_000)
CASES = ("uniform", "planted")
SHARD = 5000  # rows in an index
PRIME = 1_000_003  # spreads the planted pairs over the shards
KINDS = 100  # of every 100 samples, by number: which one is what
HOT, NEAR, NEAR_TO, EXACT, EXACT_TO = 0, 1, 10, 2, 20
HOT_HASHES = 100

Words = npt.NDArray[np.uint64]


def mixed(numbers: Words) -> Words:
    """splitmix64: as if random, and another value for each number."""
    numbers = numbers * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ numbers >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ numbers >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return numbers ^ numbers >> np.uint64(31)


def hashes(sample: Words, planted: bool) -> tuple[Words, Words]:
    """Each sample's pHash, and the sample whose pixels it has."""
    if not planted:
        return mixed(sample), sample
    kind = sample % KINDS
    pixels = np.where(kind == EXACT, sample + (EXACT_TO - EXACT), sample)
    phash = mixed(np.where(kind == NEAR, sample + (NEAR_TO - NEAR), pixels))
    flips = np.zeros_like(sample)
    for step in range(4):
        wanted = (kind == NEAR) & (sample // KINDS % 4 >= step)
        flips |= np.where(wanted, np.uint64(1) << mixed(sample + np.uint64(step << 40)) % 64, 0)
    hot = mixed(sample // KINDS % HOT_HASHES + np.uint64(1 << 50))
    return np.where(kind == HOT, hot, phash ^ flips), pixels


def indexes(rows: int, planted: bool) -> Iterator[pa.Table]:
    for start in range(0, rows, SHARD):
        sample = np.arange(start, min(start + SHARD, rows), dtype=np.uint64) * PRIME % rows
        phash, pixels = hashes(sample, planted)
        words = np.stack([mixed(pixels * 4 + np.uint64(part) + np.uint64(1 << 40)) for part in range(4)], axis=1)
        side = (512 + mixed(sample + np.uint64(1 << 45)) % 1024).astype(np.int32)
        yield pa.table(
            {
                "key": _hex(np.stack([mixed(sample + np.uint64(1 << 46)), sample], axis=1)),
                "pixels_sha256": _binary(words.tobytes(), 32),
                "original_width": side,
                "original_height": side,
                "phash": phash,
            }
        )


def _hex(words: Words) -> pa.Array:
    digits = 2 * KEY_BYTES
    text = "".join(part.tobytes().hex()[:digits] for part in words)
    ends = np.arange(len(words) + 1, dtype=np.int32) * digits
    return pa.StringArray.from_buffers(len(words), pa.py_buffer(ends), pa.py_buffer(text.encode()))


def _binary(data: bytes, width: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data) // width, [None, pa.py_buffer(data)])


def expected(rows: int, planted: bool) -> tuple[int, float]:
    """The duplicates that were planted, and the pairs that meet by chance."""
    close = sum(math.comb(64, places) for places in range(5))
    chance = (rows * 0.97 if planted else rows) ** 2 / 2 * close / 2**64
    return (3 * (rows // KINDS) - HOT_HASHES if planted else 0), chance


def missed(found: npt.NDArray[np.bool_], rows: int) -> int:
    """Planted pairs of which both are left."""
    row = np.empty(rows, np.int32)
    row[np.arange(rows, dtype=np.int64) * PRIME % rows] = np.arange(rows, dtype=np.int32)
    first = np.arange(0, rows, KINDS)
    pairs = ((NEAR, NEAR_TO), (EXACT, EXACT_TO))
    return sum(int((~found[row[first + a]] & ~found[row[first + b]]).sum()) for a, b in pairs)


def measure(rows: int, case: str) -> dict[str, Any]:
    planted = case == "planted"
    gathered, adding, busy = Rows(4), 0.0, 0.0
    for table in indexes(rows, planted):
        start, start_busy = time.perf_counter(), time.process_time()
        gathered.add(table)
        adding += time.perf_counter() - start
        busy += time.process_time() - start_busy
    start, start_busy = time.perf_counter(), time.process_time()
    found = gathered.duplicates()
    searching = time.perf_counter() - start
    busy += time.process_time() - start_busy
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lost = missed(found, rows) if planted else 0
    seconds = {"add": adding, "search": searching, "CPU": busy}
    return seconds | {"MiB": memory, "found": int(found.sum()), "missed": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="multiples of 10,000")
    parser.add_argument("--case", choices=CASES, nargs="+", default=CASES)
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.rows[0], options.case[0])))
        return
    print("      rows  case     gather   search  in all      CPU  peak MiB  duplicates   planted  by chance  missed")
    for rows in options.rows:
        for case in options.case:
            command = [sys.executable, "-m", "tests.bench.bench_dedup", "--one", "--rows", str(rows), "--case", case]
            line = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            planted, chance = expected(rows, case == "planted")
            print(
                f"{rows:10,}  {case:7} {line['add']:6.1f} s {line['search']:6.1f} s"
                f" {line['add'] + line['search']:5.1f} s {line['CPU']:6.1f} s {line['MiB']:9.0f}"
                f" {line['found']:11,} {planted:9,} {chance:10.2f} {line['missed']:7}",
                flush=True,
            )


if __name__ == "__main__":
    main()
