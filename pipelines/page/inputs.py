"""The section on the inputs: how many were accepted, rejected by cause, filtered out, trained on and held out."""

from __future__ import annotations

from infra.records import SizeSummary
from pipelines.page.elements import QUIET, check, image, section, table, words
from pipelines.page.markup import Child, Html, tag
from pipelines.page.shape_outcomes import ABOUT, Fate
from pipelines.page.story import Story

GOOD, BAD = "var(--good)", "var(--bad)"


def section_of(story: Story) -> Html | None:
    if not story.prepared and not story.snapshots:
        return None
    about = "Nothing vanishes: what went in is a sample, or was left out for a reason that is counted here."
    prepared = [[_prepared(story, k), _by_kind(story, k)] for k in story.prepared]
    funnels = tag("div", [_funnel(story, k) for k in story.snapshots], class_="funnels")
    return section("What became of every input", about, prepared, funnels)


def _prepared(story: Story, number: int) -> Html:
    summary = story.prepared[number]
    sizes, inputs = summary.sizes, summary.inputs
    head = [
        tag("span", f"{name} px ", _bar(inputs, (s.accepted, GOOD), (_rejected(s), BAD))) for name, s in sizes.items()
    ]
    body: list[list[Child]] = [["accepted", *(_count(size.accepted, inputs) for size in sizes.values())]]
    for cause in sorted({cause for size in sizes.values() for cause in size.rejected}):
        body.append([words(cause), *(_count(size.rejected.get(cause, 0), inputs) for size in sizes.values())])
    checks = []
    for name, size in sizes.items():
        sums = f"{name} px: {size.accepted:,} accepted + {_rejected(size):,} rejected"
        holds = size.accepted + _rejected(size) == inputs
        checks.append(check(holds, f"{sums} {'= all' if holds else 'are not the'} {inputs:,} inputs"))
    title = tag("h3", f"{story.stages[number].stage}: {inputs:,} inputs")
    return tag("div", title, table(["", *head], body, "counts"), checks)


def _rejected(size: SizeSummary) -> int:
    return sum(size.rejected.values())


def _count(count: int, of: int) -> Child:
    return [tag("span", f"{count:,}", class_="number"), " ", tag("small", f"{count / max(of, 1):.1%}" if count else "")]


def _bar(of: int, *shares: tuple[int, str]) -> Html:
    widths = [tag("i", style=f"width:{100 * count / max(of, 1):.2f}%;--ink:{ink}") for count, ink in shares if count]
    return tag("span", widths, class_="bar")


def _by_kind(story: Story, number: int) -> Html | None:
    fates = story.fates.get(number)
    if not fates:
        return None
    names = [story.stages[k].stage for k in story.snapshots_of(number)]
    head = ["made as", "files", "accepted", "rejected", *(f"in {name}" for name in names), "as training sees it"]
    return tag("div", tag("h3", "By kind of file"), table(head, [_fate(fate, len(names)) for fate in fates], "fates"))


def _fate(fate: Fate, snapshots: int) -> list[Child]:
    causes = [f"{count:,} {words(cause)}" for cause, count in sorted(fate.causes.items())]
    return [
        [words(fate.kind), " ", tag("small", ABOUT.get(fate.kind))],
        f"{fate.files:,}",
        _number(fate.accepted),
        ", ".join(causes) or _number(0),
        *(_number(fate.kept[k]) for k in range(snapshots)),
        image(fate.example, f"an accepted file, made as {words(fate.kind)}") if fate.example else None,
    ]


def _number(count: int) -> Child:
    return f"{count:,}" if count else tag("span", "0", class_="muted")


def _funnel(story: Story, number: int) -> Html:
    record = story.snapshots[number]
    start = record.counts[0][1] if record.counts else 0
    body: list[list[Child]] = []
    before = start
    for label, count in record.counts:
        change = f"{count - before:+,}".replace("-", "−") if count != before else ""  # weights may repeat samples
        body.append([label, f"{count:,}", _bar(start, (count, QUIET)), change])
        before = count
    for label, count in (("→ training", record.rows), ("→ held out", record.held_out_rows)):
        body.append([tag("b", label), tag("b", f"{count:,}"), _bar(start, (count, GOOD)), ""])
    sizes = [size for summary in story.prepared.values() for size in summary.sizes.values()]
    accepted = {size.accepted for size in sizes if size.shards == record.shards} or {start}
    kept = record.rows + record.held_out_rows
    holds = accepted == {start} and kept == before
    sums = f"{record.rows:,} training + {record.held_out_rows:,} held out + {start - before:,} filtered out"
    total = check(holds, f"{sums} {'= all' if holds else 'are not the'} {max(accepted):,} accepted")
    title = tag("h3", f"{story.stages[number].stage}: {record.size} px")
    return tag("div", title, table([], body, "funnel"), total)
