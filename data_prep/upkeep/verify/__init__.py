"""`verify`: read all that was prepared once more, and hold it against its records.

    shards      of every plan's last edition: tars, indexes, rows
    scores      tables of scores and captions beside them
    selections  what snapshots list of them
    strays      records of snapshots that cannot be read or are gone
    originals   downloads, and what tells of them

What is damaged is listed, with what keeps the same run from making it again: objects whose bytes do not have the hash
in their own names, and the records that name them. A damaged object is in the way of every record that names it, of
whatever plan, since nobody writes over one of the same size; an object that has its hash is never among them.
"""

from __future__ import annotations

from typing import NamedTuple

from data_prep.prepare.plan import read_plan
from data_prep.upkeep.verify.looking import Report
from data_prep.upkeep.verify.originals import Originals
from data_prep.upkeep.verify.scores import ScoreTables
from data_prep.upkeep.verify.selections import Selections
from data_prep.upkeep.verify.shards import Shards
from data_prep.upkeep.verify.strays import Strays
from infra.store import Store


class Verified(NamedTuple):
    shards: int
    inputs: int
    images: int
    scores: int  # tables
    snapshots: int
    problems: list[str]  # none: everything is as its record says
    lasting: int  # of these: what no new work mends, as the store fails or a record is in no plan
    again: list[str]  # keys of the records of shards that must be made again, whether they are there or not
    scores_again: list[str]  # the same of scores, or of their summaries
    snapshots_again: list[str]
    objects: list[str]  # keys of damaged objects, which keep them from being made again
    records: list[str]  # keys of the records of shards that do so as well

    @property
    def damaged(self) -> bool:
        return bool(self.again or self.scores_again or self.snapshots_again)


class Shared(NamedTuple):
    """Of what belongs to no plan alone."""

    batches: int  # of downloads
    problems: list[str]
    lasting: int
    snapshots_again: list[str]
    tars_again: list[str]  # keys of the records of batches whose tars are downloaded again where they are needed
    objects: list[str]
    records: list[str]  # keys of records of downloads that speak of what is not there

    @property
    def damaged(self) -> bool:
        return bool(self.snapshots_again or self.tars_again or self.records)


def verify(store: Store, plan: str, edition: str) -> Verified:
    """Hashes, counts and order of every shard at every size, and of what was made of them; damage is not raised."""
    planned = read_plan(store, plan, edition)
    shards = {size: Shards(store, planned, size) for size in planned.sizes}
    for of_size in shards.values():
        of_size.read()
    scores = [ScoreTables(store, planned, size, of_size) for size, of_size in shards.items()]
    for tables in scores:
        tables.read()
    selections = Selections(store, planned, shards)
    selections.read()
    reports: list[Report] = [*shards.values(), *scores, selections]
    objects = [key for report in reports for key in report.objects()]  # first, as reading them may tell of more
    return Verified(
        shards=sum(of_size.shards for of_size in shards.values()),
        inputs=sum(of_size.inputs for of_size in shards.values()),
        images=sum(of_size.images for of_size in shards.values()),
        scores=sum(tables.tables for tables in scores),
        snapshots=selections.snapshots,
        problems=[problem for report in reports for problem in report.problems],
        lasting=sum(report.lasting for report in reports),
        again=[key for of_size in shards.values() for key in of_size.keys_again()],
        scores_again=[key for tables in scores for key in tables.again],
        snapshots_again=selections.again,
        objects=list(dict.fromkeys(objects)),
        records=[key for of_size in shards.values() for key in of_size.records()],
    )


def verify_shared(store: Store) -> Shared:
    strays, downloads = Strays(store), Originals(store)
    reports: list[Report] = [strays, downloads]
    for report in reports:
        report.read()
    objects = [key for report in reports for key in report.objects()]
    return Shared(
        batches=downloads.batches,
        problems=[problem for report in reports for problem in report.problems],
        lasting=sum(report.lasting for report in reports),
        snapshots_again=strays.again,
        tars_again=downloads.tars,
        objects=objects,
        records=downloads.again,
    )
