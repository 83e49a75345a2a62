"""`pixnerd data`: look into what was prepared, check it, take items out of all that comes later, and tidy up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.export import TAR_MIB, LayoutName, export
from data_prep.snapshots.forget import Forgotten, forget, read_list
from data_prep.upkeep import gc
from data_prep.upkeep.drop import drop, drop_shared
from data_prep.upkeep.statistics import Histogram, Summary, contact_sheet, draw, summarise
from data_prep.upkeep.verify import Shared, Verified, verify, verify_shared
from infra import layout
from infra.errors import DataError, SettingsError
from infra.records import PrepareSummary, ScoreSummary, SnapshotOutput, StageRecord
from infra.store import Store, open_store
from infra.text import printable
from orchestration import leftovers, terminal
from orchestration.commands.run import stage_records
from orchestration.patience import doing
from orchestration.terminal import print_json


class Prepared(NamedTuple):
    """What a prepare stage made last."""

    stage: str
    plan: str
    edition: str
    sizes: list[str]


def prepared(store: Store) -> list[Prepared]:
    """The newest edition of every plan."""
    newest: dict[str, Prepared] = {}
    for record in _by_start(store, "prepare"):
        made = record.of(PrepareSummary)
        newest[made.plan] = Prepared(record.stage, made.plan, made.edition, list(made.sizes))
    if not newest:
        raise DataError(f"nothing has been prepared in {store.url}", remedy="run `pixnerd prepare` first")
    return list(newest.values())


def _by_start(store: Store, kind: str) -> list[StageRecord]:
    return sorted(stage_records(store, kind), key=lambda record: record.started)


# ------------------------------------------------------------------------------------------------ show


def show_data(
    store: str,
    *,
    size: str | None,
    columns: list[str],
    scores: Sequence[str] = (),
    out: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    doing("reading what was prepared")
    opened = open_store(store)
    shown = []
    scored = _scored(opened, scores)
    chosen = _sizes(prepared(opened), size)
    if scored and not {(plan, of_size) for plan, of_size, _ in scored} & {(found.plan, one) for found, one in chosen}:
        known = ", ".join(sorted({of_size for _, of_size, _ in scored}))
        raise SettingsError(f"there are no such scores at the size `{size}`", remedy=f"sizes that have them: {known}")
    for found, one in chosen:
        digests = [scorer for plan, of_size, scorer in scored if (plan, of_size) == (found.plan, one)]
        summary = summarise(opened, found.plan, found.edition, one, columns=columns, scores=digests)
        pictures = {} if out is None else _pictures(opened, summary, out, seed)
        shown.append(summary.model_dump(mode="json") | ({"pictures": pictures} if out else {}))
        if not as_json:
            _print(found.stage, summary)
            for path in pictures.values():
                print(f"  {path}")
    if as_json:
        print_json(shown)


def _sizes(all_prepared: list[Prepared], size: str | None) -> list[tuple[Prepared, str]]:
    chosen = [(found, one) for found in all_prepared for one in found.sizes if size in (None, one)]
    if not chosen:
        known = sorted({one for found in all_prepared for one in found.sizes})
        raise SettingsError(f"nothing was prepared at the size `{size}`", remedy=f"sizes: {', '.join(known)}")
    return chosen


def _scored(store: Store, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Plan, size and scorer of the scores that are called so: by their stage, whose last ones they are, or a digest."""
    made = [(record.stage, record.of(ScoreSummary)) for record in _by_start(store, "score")] if names else []
    for name in names:
        if not any(name in (stage, scores.scorer) for stage, scores in made):
            known = ", ".join(sorted({stage for stage, _ in made}))
            raise SettingsError(
                f"there are no scores called `{name}` in {store.url}",
                remedy=f"scores: {known}" if known else "run a recipe with a `score` stage first",
            )
    newest = {(stage, scores.plan, scores.size): scores.scorer for stage, scores in made if stage in names}
    by_stage = [(plan, size, scorer) for (_, plan, size), scorer in newest.items()]
    by_digest = [(scores.plan, scores.size, scores.scorer) for _, scores in made if scores.scorer in names]
    return list(dict.fromkeys([*by_stage, *by_digest]))


def _pictures(store: Store, summary: Summary, out: Path, seed: int) -> dict[str, str]:
    out.mkdir(parents=True, exist_ok=True)
    name = f"{summary.plan}-{summary.size}"
    drawn, sheet = out / f"{name}.png", out / f"{name}-samples.png"
    draw(summary, drawn)
    contact_sheet(store, summary.plan, summary.edition, summary.size, sheet, seed=seed)
    return {"summary": str(drawn), "samples": str(sheet)}


def _print(stage: str, summary: Summary) -> None:
    images = f"{summary.accepted:,} images in {summary.shards:,} shards"
    print(f"{stage}, size {summary.size}: {images} (plan {summary.plan})")
    again = f", {summary.tried_again:,} of them tried again" if summary.tried_again else ""
    print(f"  {summary.inputs:,} inputs{again}; {summary.tar_bytes / 2**20:,.1f} MiB")
    _print_fates(summary)
    for name, counts in (("formats", summary.formats), ("licences", summary.licences), ("buckets", summary.buckets)):
        print(
            f"  {name}: " + ", ".join(f"{printable(key) or '-'} {count:,}" for key, count in list(counts.items())[:8])
        )
    measured = {"shorter side": summary.shorter_side, "aspect": summary.aspect, "KiB an image": summary.kibibytes}
    measured |= {f"words of {printable(kind)}": histogram for kind, histogram in summary.words.items()}
    for name, histogram in (measured | summary.values).items():
        print(f"  {name}: {_range(histogram)}")
    for name, causes in summary.failures.items():
        print(f"  {name}: " + (", ".join(f"{cause} {count:,}" for cause, count in causes.items()) or "none"))


def _print_fates(summary: Summary) -> None:
    """A row for each cause, a column for each source, and one for all of several."""
    sources = list(summary.sources.values())
    fates = {"accepted": [source.accepted for source in sources]}
    fates |= {cause: [source.rejected.get(cause, 0) for source in sources] for cause in summary.rejected}
    several = len(sources) > 1
    rows = [
        [name, *(f"{count:,}" for count in ([*counts, sum(counts)] if several else counts))]
        for name, counts in fates.items()
    ]
    terminal.table(["", *summary.sources, *(["all"] if several else [])], rows)


def _range(found: Histogram) -> str:
    if found.least is None or found.mean is None or found.most is None:
        return "none"
    return f"{found.least:.4g} to {found.most:.4g}, {found.mean:.4g} in the mean"


# ------------------------------------------------------------------------------------------------ verify


def verify_data(store: str, *, drop_damaged: bool = False, as_json: bool) -> None:
    opened = open_store(store)
    doing("reading every shard again")
    all_prepared = prepared(opened)
    checked = {found.plan: verify(opened, found.plan, found.edition) for found in all_prepared}
    doing("reading the downloads again")
    shared = verify_shared(opened)
    results: dict[str, Verified | Shared] = {**checked, "shared": shared}
    dropped: dict[str, list[str]] = {}
    if drop_damaged:
        dropped = {plan: drop(opened, plan, result) for plan, result in checked.items() if result.damaged}
        dropped |= {"shared": drop_shared(opened, shared)} if shared.damaged else {}
    if as_json:
        print_json({name: result._asdict() | {"dropped": dropped.get(name, [])} for name, result in results.items()})
    else:
        for plan, result in checked.items():
            beside = f"; {result.scores:,} tables of scores, {result.snapshots:,} snapshots"
            read = f"{result.shards} shards, {result.inputs:,} inputs, {result.images:,} images read again"
            print(f"plan {plan}: {read}{beside if result.scores or result.snapshots else ''}")
            _print_problems(result.problems)
        if shared.batches:
            print(f"downloads: {shared.batches:,} batches of originals read again")
        _print_problems(shared.problems)
    again = [found.stage for found in all_prepared if checked[found.plan].again]
    if dropped and not as_json:
        _print_dropped(store, dropped, again)
    problems = sum(len(result.problems) for result in results.values())
    lasting = sum(result.lasting for result in results.values())
    if not drop_damaged and any(result.damaged for result in results.values()):
        remedy = f"run `pixnerd data verify --store {store} --drop-damaged`, then the recipe again"
        raise DataError(f"{problems} things in {store} are not as recorded", remedy=remedy)
    if lasting:
        remedy = (
            "mend the disk or the server if it fails; delete a shard's record that is in no plan if its input is gone"
        )
        raise DataError(f"{lasting} things in {store} are wrong that no new work mends", remedy=remedy)


def _print_problems(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"  {printable(problem)}")


def _print_dropped(store: str, dropped: dict[str, list[str]], again: Sequence[str]) -> None:
    """`again`: the stages that prepare damaged shards once more."""
    count = len({key for keys in dropped.values() for key in keys})
    print(f"deleted {count:,} objects and records: they kept damaged shards, and what came of them, from being made")
    if again:
        stages = " and ".join(f"`{stage}`" for stage in dict.fromkeys(again))
        print(f"now run `pixnerd prepare RECIPE --store {store}`, with the recipe that has the stage {stages}")
    if any(_makes_again(key) for keys in dropped.values() for key in keys):
        print(f"{'then' if again else 'now'} `pixnerd run RECIPE --store {store}` makes the scores and snapshots again")


def _makes_again(key: str) -> bool:
    """Whether it was the record of a stage that a workflow runs again, and `prepare` alone does not."""
    parts = layout.STAGE.parse(key)
    return parts is not None and parts["kind"] in (ScoreSummary.kind, SnapshotOutput.kind)


# ------------------------------------------------------------------------------------------------ forget


def forget_data(path: Path, store: str, *, reason: str, twins: bool, dry_run: bool, as_json: bool) -> None:
    items = read_list(path)
    doing("looking for the items in every index")
    found = forget(open_store(store), items, reason, twins=twins, dry_run=dry_run)
    if as_json:
        print_json(found._asdict())
    else:
        _print_forgotten(found, len(items), dry_run=dry_run)


def _print_forgotten(found: Forgotten, asked: int, *, dry_run: bool) -> None:
    print(f"{'would forget' if dry_run else 'forgot'} {found.keys:,} samples and {found.twins:,} with the same pixels")
    if found.unknown:
        some = ", ".join(ascii(item)[:80] for item in found.unknown[:3])
        print(f"not known here: {len(found.unknown):,} of {asked:,} ({some})")
    if found.snapshots:
        terminal.table(
            ["snapshot that holds some", "training", "held out"],
            [[holder.snapshot, f"{holder.training:,}", f"{holder.held_out:,}"] for holder in found.snapshots],
        )
    if found.exports:
        terminal.table(
            ["copy that was exported", "as", "snapshot"],
            [[copy.to, copy.layout, copy.snapshot] for copy in found.exports],
        )
    if found.checkpoints:
        terminal.table(
            ["checkpoint that saw some", "step", "how"],
            [[seen.checkpoint, f"{seen.step:,}", seen.how] for seen in found.checkpoints],
        )
    if not found.snapshots:
        print("no snapshot holds any of them")
    elif not found.checkpoints:
        print("no checkpoint saw any of them")


# ------------------------------------------------------------------------------------------------ export


def export_data(name: str, store: str, out: str, *, layout: LayoutName, tar_mib: int | None, as_json: bool) -> None:
    if tar_mib is not None and layout != "webdataset":
        raise SettingsError(f"--tar-mib means nothing to the layout {layout}", remedy="leave it out")
    opened, to = open_store(store), open_store(out)
    key = _snapshot_key(opened, name)
    doing(f"writing {key} to {to.url}")
    done = export(opened, key, to, layout, tar_mib or TAR_MIB)
    if as_json:
        print_json(done.model_dump(mode="json") | {"out": to.url})
        return
    for split, told in done.splits.items():
        kind = "tars" if layout == "webdataset" else "folders of pictures"
        print(f"{to.url}/{split}: {told.rows:,} samples in {told.parts:,} {kind}")


def _snapshot_key(store: Store, name: str) -> str:
    """Of a snapshot that is called so: by its stage, whose last one it is, or by the digest in its key."""
    made = [(record.stage, record.of(SnapshotOutput).record) for record in _by_start(store, "snapshot")]
    found = [key for stage, key in made if name in (stage, key, Path(key).stem)]
    if not found:
        known = ", ".join(dict.fromkeys(stage for stage, _ in made))
        raise SettingsError(
            f"there is no snapshot called `{name}` in {store.url}",
            remedy=f"snapshots: {known}" if known else "run a recipe with a `snapshot` stage first",
        )
    return found[-1]


# ------------------------------------------------------------------------------------------------ gc


def collect_data(store: str, *, older_than_hours: float, dry_run: bool, as_json: bool) -> None:
    doing("looking for data that no record names")
    opened = open_store(store)
    found = gc.collect(opened, older_than_hours, dry_run=dry_run)
    if not found.objects and not any(True for _ in opened.list_unchecked()):
        raise DataError(f"there is no data in {store}", remedy="check --store")
    left = leftovers.remove(opened, None, older_than_hours, dry_run=dry_run)
    if as_json:
        orphans = {folder: count._asdict() for folder, count in found.orphans.items()}
        told = {"orphans": orphans, "temporary": left.folders._asdict(), "states": left.states._asdict()}
        print_json(found._asdict() | told | {"dry_run": dry_run})
        return
    count = sum(count.objects for count in found.orphans.values())
    size = sum(count.bytes for count in found.orphans.values())
    said = "would delete" if dry_run else "deleted"
    print(f"{said} {count:,} of {found.objects:,} data objects, {_mebibytes(size)} MiB: no record names them")
    if found.orphans:
        rows = [[folder, f"{count.objects:,}", _mebibytes(count.bytes)] for folder, count in found.orphans.items()]
        terminal.table(["under", "objects", "MiB"], rows)
        print(f"the first: {', '.join(found.first)}")
    if found.young:
        print(f"left alone: {found.young:,} younger than {older_than_hours:g} hours, which a job may be about to name")
    if found.foreign:
        print(f"left alone: {found.foreign:,} whose names hold no hash, so that they are not pixnerd's")
    if found.unknown:
        some = ", ".join(map(printable, found.unknown[: gc.SHOWN]))
        print(f"left alone: {len(found.unknown):,} JSON objects that are no records of this pixnerd's: {some}")
    print(f"{said} of what killed runs had left: {left}" if str(left) else "killed runs have left nothing else")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
