"""`pixnerd data`: show, verify and export prepared data, take items out of later snapshots, and delete leftovers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from infra.errors import DataError, SettingsError
from infra.text import printable
from orchestration import terminal
from orchestration.options import JsonOption, StoreOfShards
from orchestration.patience import doing
from orchestration.terminal import print_json

if TYPE_CHECKING:
    from data_prep.snapshots.forget import Forgotten
    from data_prep.upkeep.statistics import Histogram, Summary
    from data_prep.upkeep.verify import Shared, Verified
    from infra.store import Store

app = typer.Typer(no_args_is_help=True, help="Show, verify, export and tidy up prepared data.", rich_markup_mode=None)


@app.command("show", epilog="Example: pixnerd data show --store runs/demo --out pictures")
def show(
    store: StoreOfShards,
    size: Annotated[str | None, typer.Option(help="One of the sizes that were prepared. [default: all]")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="A numeric column to summarise as well; may be repeated.")
    ] = None,
    score: Annotated[
        list[str] | None,
        typer.Option(help="Scores or captions to summarise as well: a stage or a digest; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write charts and a sheet of sample images to.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of sample images.")] = 0,
    json_: JsonOption = False,
) -> None:
    """Show what was prepared: sources, sizes, captions, and what became of every input."""
    from data_prep.upkeep.statistics import summarise
    from infra.store import open_store
    from orchestration import artifacts

    doing("reading what was prepared")
    opened = open_store(store)
    shown = []
    scored = artifacts.scores_of(opened, score or [])
    chosen = artifacts.sizes_of(artifacts.prepared(opened), size)
    if scored and not {(plan, of_size) for plan, of_size, _ in scored} & {(data.plan, one) for data, one in chosen}:
        known = ", ".join(sorted({of_size for _, of_size, _ in scored}))
        raise SettingsError(f"there are no such scores at the size `{size}`", remedy=f"sizes that have them: {known}")
    for data, one in chosen:
        digests = [scorer for plan, of_size, scorer in scored if (plan, of_size) == (data.plan, one)]
        summary = summarise(opened, data.plan, data.edition, one, columns=column or [], scores=digests)
        pictures = {} if out is None else _pictures(opened, summary, out, seed)
        shown.append(summary.model_dump(mode="json") | ({"pictures": pictures} if out else {}))
        if not json_:
            _print(data.stage, summary)
            for path in pictures.values():
                print(f"  {path}")
    if json_:
        print_json(shown)


def _pictures(store: Store, summary: Summary, out: Path, seed: int) -> dict[str, str]:
    from pipelines.pictures.samples import contact_sheet
    from pipelines.pictures.statistics import draw

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
    """A table of counts: a row for each cause, a column for each source, and one for the sum if there are several."""
    sources = list(summary.sources.values())
    fates = {"accepted": [source.accepted for source in sources]}
    fates |= {cause: [source.rejected.get(cause, 0) for source in sources] for cause in summary.rejected}
    several = len(sources) > 1
    rows = [
        [name, *(f"{count:,}" for count in ([*counts, sum(counts)] if several else counts))]
        for name, counts in fates.items()
    ]
    terminal.table(["", *summary.sources, *(["all"] if several else [])], rows)


def _range(histogram: Histogram) -> str:
    if histogram.least is None or histogram.mean is None or histogram.most is None:
        return "none"
    return f"{histogram.least:.4g} to {histogram.most:.4g}, {histogram.mean:.4g} in the mean"


@app.command("verify", epilog="Example: pixnerd data verify --store runs/demo")
def verify(
    store: StoreOfShards,
    drop_damaged: Annotated[
        bool,
        typer.Option(
            "--drop-damaged",
            help="Delete damaged objects and the records that name them, so that the next run makes them again.",
        ),
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Read every shard, score and snapshot again, and compare hashes, counts and order with the records."""
    from data_prep.upkeep.drop import drop, drop_shared
    from data_prep.upkeep.verify import verify as verify_plan
    from data_prep.upkeep.verify import verify_shared
    from infra.store import open_store
    from orchestration import artifacts

    opened = open_store(store)
    doing("reading every shard again")
    all_prepared = artifacts.prepared(opened)
    checked = {data.plan: verify_plan(opened, data.plan, data.edition) for data in all_prepared}
    doing("reading the downloads again")
    shared = verify_shared(opened)
    results: dict[str, Verified | Shared] = {**checked, "shared": shared}
    dropped: dict[str, list[str]] = {}
    if drop_damaged:
        dropped = {plan: drop(opened, plan, result) for plan, result in checked.items() if result.damaged}
        dropped |= {"shared": drop_shared(opened, shared)} if shared.damaged else {}
    if json_:
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
    again = [data.stage for data in all_prepared if checked[data.plan].again]
    if dropped and not json_:
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
    """`again`: the stages that must prepare damaged shards again."""
    from orchestration import artifacts

    count = len({key for keys in dropped.values() for key in keys})
    print(f"deleted {count:,} objects and records: they kept damaged shards, and what came of them, from being made")
    if again:
        stages = " and ".join(f"`{stage}`" for stage in dict.fromkeys(again))
        print(f"now run `pixnerd prepare RECIPE --store {store}`, with the recipe that has the stage {stages}")
    if any(artifacts.makes_again(key) for keys in dropped.values() for key in keys):
        print(f"{'then' if again else 'now'} `pixnerd run RECIPE --store {store}` makes the scores and snapshots again")


@app.command("forget", epilog="Example: pixnerd data forget withdrawn.txt --store runs/demo --reason 'asked to'")
def forget(
    items: Annotated[
        Path,
        typer.Argument(
            help="A text file (UTF-8) with an item a line, or a .parquet file with a column of them, called key, name, "
            "url, origin, sha256, image_sha256 or pixels_sha256."
        ),
    ],
    store: StoreOfShards,
    reason: Annotated[str, typer.Option(help="Why they are withdrawn; stored with the list.")],
    twins: Annotated[bool, typer.Option(help="Also forget images with the same pixels.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be forgotten.")] = False,
    json_: JsonOption = False,
) -> None:
    """Take items out of every later snapshot, and say which snapshots and checkpoints have seen them.

    An item is named as in its corpus (images/00012.jpg), by its URL, by its key in the index, or by the sha256 of its
    encoded image or of its pixels, in hex.
    """
    from data_prep.snapshots.forget import forget as forget_items
    from data_prep.snapshots.forget import read_list
    from infra.store import open_store

    listed = read_list(items)
    doing("looking for the items in every index")
    forgotten = forget_items(open_store(store), listed, reason, twins=twins, dry_run=dry_run)
    if json_:
        print_json(forgotten._asdict())
    else:
        _print_forgotten(forgotten, len(listed), dry_run=dry_run)


def _print_forgotten(report: Forgotten, asked: int, *, dry_run: bool) -> None:
    verb = "would forget" if dry_run else "forgot"
    print(f"{verb} {report.keys:,} samples and {report.twins:,} with the same pixels")
    if report.unknown:
        some = ", ".join(ascii(item)[:80] for item in report.unknown[:3])
        print(f"not known here: {len(report.unknown):,} of {asked:,} ({some})")
    if report.snapshots:
        terminal.table(
            ["snapshot that holds some", "training", "held out"],
            [[holder.snapshot, f"{holder.training:,}", f"{holder.held_out:,}"] for holder in report.snapshots],
        )
    if report.exports:
        terminal.table(
            ["copy that was exported", "as", "snapshot"],
            [[copy.to, copy.layout, copy.snapshot] for copy in report.exports],
        )
    if report.checkpoints:
        terminal.table(
            ["checkpoint that saw some", "step", "how"],
            [[seen.checkpoint, f"{seen.step:,}", seen.how] for seen in report.checkpoints],
        )
    if not report.snapshots:
        print("no snapshot holds any of them")
    elif not report.checkpoints:
        print("no checkpoint saw any of them")


@app.command("export", epilog="Example: pixnerd data export data --store runs/mine --out exported")
def export(
    snapshot: Annotated[str, typer.Argument(help="Name of a snapshot stage, for its newest snapshot; or a digest.")],
    store: StoreOfShards,
    out: Annotated[str, typer.Option("--out", help="Folder or store URL to write it to; new, or empty.")],
    layout: Annotated[
        Literal["webdataset", "huggingface"],
        typer.Option(help="Tars of .jpg, .json and .txt; or folders of pictures with a metadata.jsonl."),
    ] = "webdataset",
    tar_mib: Annotated[
        int | None, typer.Option("--tar-mib", min=1, help="Largest size of a webdataset tar, in MiB. [default: 256]")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write a snapshot's samples as files that others train from.

    A sample is written as often as training lists it. Its text is one of its captions, drawn by the snapshot's weights;
    all captions are in its metadata, with their weights. A second call goes on where the first was stopped.
    """
    from data_prep.export import TAR_MIB
    from data_prep.export import export as export_snapshot
    from infra.store import open_store
    from orchestration import artifacts

    if tar_mib is not None and layout != "webdataset":
        raise SettingsError(f"--tar-mib means nothing to the layout {layout}", remedy="leave it out")
    opened, to = open_store(store), open_store(out)
    key = artifacts.snapshot_key(opened, snapshot)
    doing(f"writing {key} to {to.url}")
    done = export_snapshot(opened, key, to, layout, tar_mib or TAR_MIB)
    if json_:
        print_json(done.model_dump(mode="json") | {"out": to.url})
        return
    for split, counts in done.splits.items():
        kind = "tars" if layout == "webdataset" else "folders of pictures"
        print(f"{to.url}/{split}: {counts.rows:,} samples in {counts.parts:,} {kind}")


@app.command("gc", epilog="Example: pixnerd data gc --store runs/demo --dry-run")
def gc(
    store: StoreOfShards,
    older_than_hours: Annotated[
        float, typer.Option(min=0, help="Keep younger data: a job may be about to write the record that names it.")
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    json_: JsonOption = False,
) -> None:
    """Delete the data that no record names, such as what killed jobs left."""
    from data_prep.upkeep.gc import SHOWN, collect
    from infra.store import open_store
    from orchestration import leftovers

    doing("looking for data that no record names")
    opened = open_store(store)
    report = collect(opened, older_than_hours, dry_run=dry_run)
    if not report.objects and not any(True for _ in opened.list_unchecked()):
        raise DataError(f"there is no data in {store}", remedy="check --store")
    left = leftovers.remove(opened, None, older_than_hours, dry_run=dry_run)
    if json_:
        orphans = {folder: count._asdict() for folder, count in report.orphans.items()}
        counts = {"orphans": orphans, "temporary": left.folders._asdict(), "states": left.states._asdict()}
        print_json(report._asdict() | counts | {"dry_run": dry_run})
        return
    count = sum(count.objects for count in report.orphans.values())
    size = sum(count.bytes for count in report.orphans.values())
    verb = "would delete" if dry_run else "deleted"
    print(f"{verb} {count:,} of {report.objects:,} data objects, {_mebibytes(size)} MiB: no record names them")
    if report.orphans:
        rows = [[folder, f"{count.objects:,}", _mebibytes(count.bytes)] for folder, count in report.orphans.items()]
        terminal.table(["under", "objects", "MiB"], rows)
        print(f"the first: {', '.join(report.first)}")
    if report.young:
        print(f"left alone: {report.young:,} younger than {older_than_hours:g} hours, which a job may be about to name")
    if report.foreign:
        print(f"left alone: {report.foreign:,} whose names hold no hash, so that they are not pixnerd's")
    if report.unknown:
        some = ", ".join(map(printable, report.unknown[:SHOWN]))
        print(f"left alone: {len(report.unknown):,} JSON objects that are no records of this pixnerd's: {some}")
    print(f"{verb} of what killed runs had left: {left}" if str(left) else "killed runs have left nothing else")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
