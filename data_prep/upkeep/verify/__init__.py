"""`verify`: read everything that was prepared again, and compare it with its records.

    shards      the tars, indexes and rows of every plan's last edition
    scores      tables of scores and captions beside the shards
    selections  the rows of snapshots that list images of the shards, and snapshots whose records cannot be read
    originals   batches of downloads, links to them, retries, the catalogue
    report      what these checks share

Damaged things are listed, and also what keeps the next run from making them again (`drop` deletes it): objects whose
bytes do not have the hash in their names, and the records that name them. A damaged object must go whichever plan's
record names it, as an existing object of the same size is never written over. Undamaged objects are never listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data_prep.prepare.plan import read_plan
from data_prep.upkeep.verify.originals import Originals
from data_prep.upkeep.verify.report import Report
from data_prep.upkeep.verify.scores import ScoreTables
from data_prep.upkeep.verify.selections import Selections, Strays
from data_prep.upkeep.verify.shards import Shards
from infra.store import Store


class Verified(NamedTuple):
    """The result for one plan."""

    shards: int
    inputs: int
    images: int
    scores: int  # how many tables
    snapshots: int
    problems: list[str]  # empty if everything is as its record says
    lasting: int  # how many of the problems no new work repairs: the store fails, or no plan has the record's shard
    again: list[str]  # keys of the records, existing or not, of shards that must be made again
    scores_again: list[str]  # the same for tables of scores and for their summaries
    snapshots_again: list[str]  # the same for snapshots
    objects: list[str]  # keys of damaged objects, which keep all these from being made again
    records: list[str]  # keys of the existing ones of the records in `again`

    @property
    def damaged(self) -> bool:
        return bool(self.again or self.scores_again or self.snapshots_again)


class Shared(NamedTuple):
    """The result for what belongs to no single plan."""

    batches: int  # of downloads
    problems: list[str]
    lasting: int
    snapshots_again: list[str]
    tars_again: list[str]  # keys of the records of batches whose tars are downloaded again where they are needed
    objects: list[str]
    records: list[str]  # keys of records of downloads, lists and catalogues that name damaged or missing data

    @property
    def damaged(self) -> bool:
        return bool(self.snapshots_again or self.tars_again or self.records)


def verify(store: Store, plan: str, edition: str) -> Verified:
    """Check hashes, counts and order of all shards of a plan, of their scores and snapshots; damage is not raised."""
    planned = read_plan(store, plan, edition)
    shards = {size: Shards(store, planned, size) for size in planned.sizes}
    scores = [ScoreTables(store, planned, size, of_size) for size, of_size in shards.items()]
    selections = Selections(store, planned, shards)
    objects, problems, lasting = _read([*shards.values(), *scores, selections])
    return Verified(
        shards=sum(of_size.shards for of_size in shards.values()),
        inputs=sum(of_size.inputs for of_size in shards.values()),
        images=sum(of_size.images for of_size in shards.values()),
        scores=sum(tables.tables for tables in scores),
        snapshots=selections.snapshots,
        problems=problems,
        lasting=lasting,
        again=[key for of_size in shards.values() for key in of_size.keys_again()],
        scores_again=[key for tables in scores for key in tables.again],
        snapshots_again=selections.again,
        objects=objects,
        records=[key for of_size in shards.values() for key in of_size.records()],
    )


def verify_shared(store: Store) -> Shared:
    strays, downloads = Strays(store), Originals(store)
    objects, problems, lasting = _read([strays, downloads])
    return Shared(
        batches=downloads.batches,
        problems=problems,
        lasting=lasting,
        snapshots_again=strays.again,
        tars_again=downloads.tars,
        objects=objects,
        records=downloads.again,
    )


def _read(reports: Sequence[Report]) -> tuple[list[str], list[str], int]:
    """Read everything, in this order; returns keys of damaged objects, the problems, and how many of them last."""
    for report in reports:
        report.read()
    objects = dict.fromkeys(key for report in reports for key in report.objects())  # first, as this may add problems
    problems = [problem for report in reports for problem in report.problems]
    return list(objects), problems, sum(report.lasting for report in reports)
