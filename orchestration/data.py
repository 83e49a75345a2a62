"""`pixnerd data`: look into what was prepared, check it, and take items out of all that comes later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.forget import Forgotten, forget, read_list
from data_prep.job import summary_key
from data_prep.look import Histogram, Summary, contact_sheet, draw, printable, summarise
from data_prep.verify import verify
from infra.errors import DataError, SettingsError
from infra.records import StageRecord
from infra.store import Store, open_store
from orchestration import terminal
from orchestration.session import stage_records
from orchestration.terminal import print_json


class Prepared(NamedTuple):
    """What a prepare stage made last."""

    stage: str
    plan: str
    edition: str
    sizes: list[str]
    done: list[str]  # the records that say so: while they stand, nothing is made again


def prepared(store: Store) -> list[Prepared]:
    """The newest edition of every plan."""
    newest: dict[str, StageRecord] = {}
    for record in sorted(stage_records(store, "prepare"), key=lambda record: record.started):
        newest[record.output["plan"]] = record
    if not newest:
        raise DataError(f"nothing has been prepared in {store.url}", remedy="run `pixnerd prepare` first")
    return [
        Prepared(
            record.stage,
            plan,
            record.output["edition"],
            list(record.output["sizes"]),
            [f"stages/prepare/{record.digest_of_work}.json", summary_key(plan, record.output["edition"])],
        )
        for plan, record in newest.items()
    ]


# ------------------------------------------------------------------------------------------------ show


def show_data(store: str, *, size: str | None, columns: list[str], out: Path | None, seed: int, as_json: bool) -> None:
    opened = open_store(store)
    shown = []
    for found, one in _sizes(prepared(opened), size):
        summary = summarise(opened, found.plan, found.edition, one, columns=columns)
        pictures = {} if out is None else _pictures(opened, summary, out, seed)
        shown.append(summary.model_dump(mode="json") | ({"pictures": pictures} if out else {}))
        if not as_json:
            _print(found.stage, summary)
            for path in pictures.values():
                print(f"  {path}")
    if as_json:
        print_json(shown)


def _sizes(all_prepared: list[Prepared], size: str | None) -> Iterator[tuple[Prepared, str]]:
    chosen = [(found, one) for found in all_prepared for one in found.sizes if size in (None, one)]
    if not chosen:
        known = sorted({one for found in all_prepared for one in found.sizes})
        raise SettingsError(f"nothing was prepared at the size `{size}`", remedy=f"sizes: {', '.join(known)}")
    return iter(chosen)


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


def verify_data(store: str, *, as_json: bool) -> None:
    opened = open_store(store)
    all_prepared = prepared(opened)
    checked = {found.plan: verify(opened, found.plan, found.edition) for found in all_prepared}
    if as_json:
        print_json({plan: result._asdict() for plan, result in checked.items()})
    problems = [problem for result in checked.values() for problem in result.problems]
    if not as_json:
        for plan, result in checked.items():
            print(f"plan {plan}: {result.shards} shards, {result.inputs:,} inputs, {result.images:,} images read again")
        for problem in problems:
            print(f"  {problem}")
    if problems:
        done = ", ".join(key for found in all_prepared if checked[found.plan].problems for key in found.done)
        raise DataError(
            f"{len(problems)} things in {store} are not as recorded",
            remedy=f"delete the damaged objects, their shards' records, and {done}; then run prepare again",
        )


# ------------------------------------------------------------------------------------------------ forget


def forget_data(path: Path, store: str, *, reason: str, twins: bool, dry_run: bool, as_json: bool) -> None:
    items = read_list(path)
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
    if found.checkpoints:
        terminal.table(
            ["checkpoint that saw some", "step", "how"],
            [[seen.checkpoint, f"{seen.step:,}", seen.how] for seen in found.checkpoints],
        )
    if not found.snapshots:
        print("no snapshot holds any of them")
    elif not found.checkpoints:
        print("no checkpoint saw any of them")
