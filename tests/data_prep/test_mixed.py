"""One prepare over every kind of source with every kind of bad input: each item ends as its writer says it must."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare.job import prepare
from data_prep.prepare.plan import PrepareSettings
from data_prep.rejections import Cause
from data_prep.upkeep.drop import drop
from data_prep.upkeep.verify import verify
from infra.config import parse
from infra.records import PrepareSummary
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import Store, open_store
from tests.data_prep.corpora import DOWNLOADED, contents
from tests.data_prep.mixed import SHARES, SIZES, Corpus, Verdict, mixed_corpus
from tests.data_prep.test_job import refuse


def prepare_apart(address: str, store: Store, corpus: Corpus, **changes: Any) -> PrepareSummary:
    """In a process whose workers hold this machine for a part of the web; a crash is its exit code."""
    command = [sys.executable, "-m", "tests.data_prep.mixed", address, store.url, json.dumps(corpus.settings | changes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    said = next(line for line in done.stdout.splitlines() if line.startswith("{"))  # Ray has its say before and after
    return PrepareSummary.model_validate_json(said)


def found_verdicts(store: Store, summary: PrepareSummary) -> dict[str, list[Verdict]]:
    """What became of each source's items, in the order in which they are planned."""
    found: dict[str, list[list[Cause | None]]] = {source: [] for source in SHARES}
    for size in SIZES:
        here: dict[str, list[Cause | None]] = {source: [] for source in SHARES}
        for record in list_shards(store, shard_prefix(summary.plan, str(size))):
            for row in read_index(store, record).select(["source", "cause"]).to_pylist():
                here[row["source"]].append(row["cause"] and Cause(row["cause"]))
        for source, causes in here.items():
            found[source].append(causes)
    return {source: [Verdict(*pair) for pair in zip(*causes, strict=True)] for source, causes in found.items()}


def copy_downloads(store: Store, other: Store) -> None:
    for entry in store.list():
        if entry.key.startswith(DOWNLOADED):
            other.put(entry.key, store.get(entry.key))


def copy_all(store: Store, other: Store) -> None:
    for entry in store.list():
        other.put(entry.key, store.get(entry.key))


def drop_some(store: Store, summary: PrepareSummary) -> None:
    """Every third index or tar is damaged, and its shard dropped."""
    hurt = [
        entry.key for entry in store.list("data/") if entry.key.startswith(tuple(f"data/{size}/" for size in SIZES))
    ]
    for key in sorted(hurt)[::3]:
        store.put(key, store.get(key)[:-9] + bytes(9))
    drop(store, summary.plan, verify(store, summary.plan, summary.edition))


def check(address: str, folder: Path, count: int, rows_per_shard: int, *, twice: bool) -> None:
    """`twice`: all of it is prepared again from the downloads, by one worker, before some is dropped."""
    store, other = open_store(str(folder / "store")), open_store(str(folder / "other"))
    with mixed_corpus(folder, count, rows_per_shard=rows_per_shard) as corpus:
        summary = prepare_apart(address, store, corpus)
    made = contents(store)
    # The web is away: whatever asked for anything again would get something else.
    if twice:
        copy_downloads(store, other)
        assert prepare_apart(address, other, corpus, in_flight=1) == summary
    else:
        copy_all(store, other)
    assert contents(other) == made  # data, indexes and records, of what is rejected, too
    drop_some(other, summary)
    assert contents(other) != made
    assert prepare_apart(address, other, corpus, **({} if twice else {"in_flight": 1})) == summary
    assert contents(other) == made
    assert prepare(store, parse(PrepareSettings, corpus.settings), decoder=refuse) == summary
    found = found_verdicts(store, summary)
    assert {source: len(verdicts) for source, verdicts in found.items()} == {
        source: len(verdicts) for source, verdicts in corpus.verdicts.items()
    }
    wrong = [
        (source, place, *pair)
        for source, verdicts in corpus.verdicts.items()
        for place, pair in enumerate(zip(verdicts, found[source], strict=True))
        if pair[0] != pair[1]
    ]
    assert not wrong, f"item, expected, found: {wrong[:20]}"
    assert summary.inputs == count == sum(map(len, corpus.verdicts.values()))
    for place, size in enumerate(map(str, SIZES)):
        here = [verdict[place] for verdicts in corpus.verdicts.values() for verdict in verdicts]
        counted = Counter(cause for cause in here if cause is not None)
        assert summary.sizes[size].accepted == count - counted.total()
        assert summary.sizes[size].rejected == {cause: counted[cause] for cause in sorted(counted)}
        assert set(counted) == set(Cause)  # nothing that can be wrong is left out
    verified = verify(store, summary.plan, summary.edition)
    assert verified.problems == []
    assert verified.inputs == 2 * count
    assert verified.images == sum(size.accepted for size in summary.sizes.values())


@pytest.mark.timeout(600)  # it starts three jobs
def test_four_hundred_items_end_as_they_must(ray_cluster: str, tmp_path: Path) -> None:
    check(ray_cluster, tmp_path, 400, 40, twice=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_thousand_items_end_as_they_must(ray_cluster: str, tmp_path: Path) -> None:
    check(ray_cluster, tmp_path, 20_000, 500, twice=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_items_are_the_same_from_their_downloads(ray_cluster: str, tmp_path: Path) -> None:
    check(ray_cluster, tmp_path, 1_000, 100, twice=True)
