"""One self-contained page about a workflow: what went in, what came out, and how the one became the other.

It is made of records alone, so it can be made again at any time, and says the same. Nothing in it comes from elsewhere:
no script, no font, no request. What is missing (no evaluation yet, a stage that failed, a record that was removed) is
left out or named as missing; the rest of the page stays.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from data_prep.job import SizeSummary
from infra.records import EvalReport, StageRecord
from infra.store import Store
from pipelines import plots
from pipelines.evaluation.prompts import TASKS
from pipelines.fates import ABOUT, Fate
from pipelines.markup import Child, Html, page, tag
from pipelines.report_style import SERIES, STYLE
from pipelines.story import Picture, Story, read

LANES = {"corpus": 0, "prepare": 0, "snapshot": 1, "encoders": 2, "train": 2, "evaluate": 3, "gate": 4, "register": 4}
QUIET = "var(--quiet)"
THUMBNAIL = 160  # px; larger pictures are shown smaller


def build(store: Store, title: str, records: list[StageRecord]) -> str:
    """The page, from the records of a workflow's finished stages in the order of the workflow."""
    told = read(store, records)
    parts = (_stages, _scores, _samples, _curves, _inputs, _settings, _foot)
    return page(title, STYLE, tag("main", _head(told, title), [part(told) for part in parts]))


# ------------------------------------------------------------------------------------------------ small parts


def _section(title: str, about: Child, *parts: Child) -> Html:
    return tag("section", tag("h2", title), tag("p", about, class_="about") if about else None, parts)


def _rows(head: Sequence[Child], body: Sequence[Sequence[Child]], class_: str = "") -> Html:
    top = tag("thead", tag("tr", [tag("th", cell, scope="col") for cell in head])) if head else None
    rows = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in body]
    return tag("div", tag("table", top, tag("tbody", rows), class_=class_ or None), class_="scroll")


def _id(of: str) -> Html:
    return tag("code", of[:8], title=of)


def _bar(share: float, ink: str = QUIET) -> Html:
    return tag("span", tag("i", style=f"width:{100 * share:.2f}%;--ink:{ink}"), class_="bar")


def _check(holds: bool, said: str, otherwise: str) -> Html:
    return tag(
        "p", "✓ " if holds else "✗ ", said if holds else otherwise, class_="check good" if holds else "check bad"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s".replace(" ", NARROW)
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _amount(count: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def _range(report: EvalReport, name: str) -> str:
    score = report.scores[name]
    return f"[{score.low:.3f}, {score.high:.3f}]"


def _ink(story: Story, number: int) -> str:
    """A training stage has one colour on the whole page, and lends it to its evaluation."""
    owner = story.checkpoint_of(story.reports[number]) if number in story.reports else number
    if owner not in story.checkpoints:
        return QUIET
    return f"var(--series-{list(story.checkpoints).index(owner) % SERIES})"


# ------------------------------------------------------------------------------------------------ the head


def _head(story: Story, title: str) -> Html:
    judged = story.judged()
    seconds = sum(record.seconds for record in story.stages)
    tiles, said = [], f"{len(story.stages)} stages are done, in {_duration(seconds)}."
    owner = max(story.checkpoints, default=None)
    if judged is not None:
        report = story.reports[judged]
        owner = story.checkpoint_of(report)
        name = _overall(report)
        if name is not None:
            value = f"{report.scores[name].value:.3f}"
            tiles.append((value, name, f"95 % interval {_range(report, name)}", "first"))
    if owner is not None:
        chain = [owner, *story.before(owner)]
        images = sum(story.checkpoints[k].position for k in chain)
        parameters = story.checkpoints[owner].parameters
        tiles.append((_amount(parameters), "parameters", f"{parameters:,}", ""))
        runs = f"in {len(chain)} training stages" if len(chain) > 1 else "in one training stage"
        tiles.append((f"{images:,}", "images seen", runs, ""))
        said = f"A PixNerd of {_amount(parameters)} parameters that has seen {images:,} images {runs}"
        if judged is not None and tiles[0][3]:
            said += f" scores {tiles[0][0]} {_range(story.reports[judged], tiles[0][1])} on {tiles[0][1]}"
        said += f", {_duration(seconds)} from raw files to this page."
    tiles.append((_duration(seconds), "in all", f"{len(story.stages)} stages", ""))
    boxes = [
        tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", more)), class_=class_ or None)
        for value, name, more, class_ in tiles
    ]
    words = tag("div", tag("h1", title), tag("p", said, class_="lead"), _verdict(story))
    return tag("header", tag("div", words, _mosaic(story, judged), class_="top"), tag("dl", boxes, class_="tiles"))


def _overall(report: EvalReport) -> str | None:
    name = f"{report.protocol}/overall"
    return name if name in report.scores else next(iter(report.scores), None)


def _mosaic(story: Story, judged: int | None) -> Html | None:
    """The first picture of each task, right or wrong."""
    shown: dict[str, Picture] = {}
    for picture in story.pictures.get(judged, []) if judged is not None else []:
        shown.setdefault(picture.task, picture)
    return tag("div", [_tile(picture) for picture in shown.values()], class_="mosaic") if shown else None


def _verdict(story: Story) -> Html:
    gates = [record.output for record in story.stages if record.kind == "gate"]
    models = [record.output for record in story.stages if record.kind == "register"]
    parts: list[Child] = []
    if gates:
        passed = bool(gates[-1].get("passed"))
        parts.append(tag("b", "Gate passed" if passed else "Gate closed", class_="chip good" if passed else "chip bad"))
        for rule in gates[-1].get("verdicts", []):
            mark = "✓" if rule["passed"] else "✗"
            parts.append(tag("span", f"{mark} {rule['score']} {rule['value']:.3f} is {rule['limit']}" if rule["passed"]
                             else f"{mark} {rule['score']} {rule['value']:.3f} is not {rule['limit']}"))  # fmt: skip
    else:
        parts.append(tag("b", "No gate yet", class_="chip"))
    if models:
        made = models[-1]
        parts.append(tag("b", "Registered", class_="chip good"))
        parts.append(tag("span", f"{made.get('model')} version {made.get('version')}, alias {made.get('alias')}"))
    else:
        parts.append(tag("b", "Not registered", class_="chip"))
    return tag("p", parts, class_="verdict")


# ------------------------------------------------------------------------------------------------ stages and lineage


def _stages(story: Story) -> Html:
    boxes = []
    for number, record in enumerate(story.stages):
        edges = _edges(story, number)
        tip = f"{record.stage} ({record.kind}), {_duration(record.seconds)}\n{_fact(story, number)}"
        lane = LANES.get(record.kind, max((boxes[k].lane for k in edges), default=0))
        boxes.append(
            plots.Box(
                title=record.stage,
                facts=_fact(story, number),
                small=_duration(record.seconds),
                ink=_ink(story, number),
                tip=tip,
                link=f"#stage-{number}",
                lane=lane,
                parents=edges,
            )
        )
    about = "Each box is a record in the store; an arrow leads from what a stage read. A colour is a training stage."
    return _section(
        "From data to score", about, tag("div", plots.graph(boxes), class_="scroll"), _times(story), _lineage(story)
    )


def _edges(story: Story, number: int) -> tuple[int, ...]:
    """The stages that this one reads from. What it also reaches through another of them is left out, but not its data."""
    inputs = story.inputs(number)
    far = {k for near in set(inputs.values()) for k in _above(story, near)}
    return tuple(sorted({k for name, k in inputs.items() if name == "data" or k not in far}))


def _above(story: Story, number: int) -> set[int]:
    inputs = set(story.inputs(number).values())
    return inputs.union(*(_above(story, k) for k in inputs))


def _fact(story: Story, number: int) -> str:
    """The one thing to know about what a stage made."""
    record = story.stages[number]
    if number in story.prepared:
        summary = story.prepared[number]
        least = min((size.accepted for size in summary.sizes.values()), default=0)
        return f"{least:,} of {summary.inputs:,} kept"
    if number in story.snapshots:
        return f"{story.snapshots[number].rows:,} samples, {story.snapshots[number].size} px"
    if number in story.checkpoints:
        size = record.output.get("image_size")
        return f"{story.checkpoints[number].position:,} images" + (f", {size} px" if size else "")
    if number in story.reports:
        report = story.reports[number]
        name = _overall(report)
        return f"{report.scores[name].value:.3f} {_range(report, name)}" if name else report.protocol
    if record.kind == "corpus":
        return f"{sum(record.output.get('files', {}).values()):,} files"
    if record.kind == "gate":
        return "passed" if record.output.get("passed") else "closed"
    if record.kind == "register":
        return f"version {record.output.get('version')}, {record.output.get('alias')}"
    return _words(record.kind)


def _times(story: Story) -> Html:
    total = sum(record.seconds for record in story.stages) or 1.0
    parts = []
    for number, record in enumerate(story.stages):
        share = record.seconds / total
        label = f"{record.stage} {_duration(record.seconds)}"
        said = label if share > 0.14 else record.stage if share > 0.07 else ""
        class_ = "dim" if number in story.reports else None
        style = f"flex:{max(share, 0.001):.4f} 0 0;--ink:{_ink(story, number)}"
        parts.append(tag("span", said, title=f"{label}, {share:.0%}", style=style, class_=class_))
    return tag("div", parts, class_="times")


def _lineage(story: Story) -> Html | None:
    """Joined by the digests that the records themselves hold, so what stands in one line belongs together."""
    body: list[list[Child]] = []
    for number, checkpoint in story.checkpoints.items():
        data = [(k, s) for k, s in story.snapshots.items() if s.digest() == checkpoint.snapshot]
        start = story.before(number)[:1]
        origin = story.stages[start[0]].stage if start else "scratch" if checkpoint.start_from is None else ""
        scores: list[Child] = []
        for k, report in story.reports.items():
            if report.checkpoint == checkpoint.digest() and (name := _overall(report)):
                value = f"{report.scores[name].value:.3f}"
                scores += [tag("b", value), f" {name} ", _id(report.digest()), tag("small", story.stages[k].stage)]
        rows = f"{data[0][1].rows:,} samples" if data else ""
        body.append(
            [
                tag("span", story.stages[number].stage, class_="swatch", style=f"--ink:{_ink(story, number)}"),
                [_id(checkpoint.snapshot), tag("small", story.stages[data[0][0]].stage if data else "", " ", rows)],
                [origin, " ", _id(checkpoint.start_from) if checkpoint.start_from else None],
                [_id(checkpoint.digest()), tag("small", f"step {checkpoint.step:,}, {checkpoint.position:,} images")],
                scores or "not measured",
            ]
        )
    if not body:
        return None
    head = ("training stage", "data: snapshot", "started from", "checkpoint", "score")
    return _rows(head, body, "lineage")


# ------------------------------------------------------------------------------------------------ scores


def _groups(story: Story) -> Iterator[list[int]]:
    """Evaluations that can be compared: one protocol, one judge, the same prompts."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for number, report in story.reports.items():
        groups.setdefault((report.protocol, report.judge, report.prompts), []).append(number)
    yield from groups.values()


def _scores(story: Story) -> Html:
    if not story.reports:
        return _section("Scores", "Nothing has been evaluated yet.")
    return _section("Scores", None, [_score_table(story, group) for group in _groups(story)])


def _score_table(story: Story, group: list[int]) -> Html:
    reports = [story.reports[k] for k in group]
    first = reports[0]
    names = sorted({name for report in reports for name in report.scores}, key=_score_order)
    most = max([1.0, *(score.high for report in reports for score in report.scores.values())])
    body = [
        [tag("span", _words(name.rpartition("/")[2]), title=name),
         *(_score(report, name, most, _ink(story, k)) for k, report in zip(group, reports, strict=True))]
        for name in names
    ]  # fmt: skip
    failed = ", ".join(f"{story.stages[k].stage} {r.failed}" for k, r in zip(group, reports, strict=True) if r.failed)
    about = [
        f"{first.protocol}, {first.images:,} pictures each, judge “{first.judge}”, prompts ",
        _id(first.prompts),
        ". Bars are 95 % intervals, from a bootstrap over prompts. ",
        f"Pictures that failed and count as wrong: {failed}." if failed else "No picture failed.",
    ]
    return tag("div", tag("p", about, class_="about"), _rows(["", *(_column(story, k) for k in group)], body, "scores"))


def _score_order(name: str) -> tuple[int, str]:
    last = name.rpartition("/")[2]
    tasks: tuple[str, ...] = TASKS
    return (tasks.index(last) if last in tasks else len(tasks) + (last == "overall"), name)


def _score(report: EvalReport, name: str, most: float, ink: str) -> Child:
    if name not in report.scores:
        return "–"
    score = report.scores[name]
    bar = plots.interval(score.value, score.low, score.high, most, ink)
    return [tag("b", f"{score.value:.3f}"), bar, tag("small", _range(report, name))]


def _column(story: Story, number: int) -> Html:
    """An evaluation is headed by the training stage that it measures."""
    owner, own = story.checkpoint_of(story.reports[number]), story.stages[number].stage
    name = own if owner is None else story.stages[owner].stage
    small = tag("small", own) if name != own else None
    return tag("span", name, small, class_="swatch", style=f"--ink:{_ink(story, number)}")


# ------------------------------------------------------------------------------------------------ samples


def _samples(story: Story) -> Html | None:
    grids = [_grid(story, group) for group in _groups(story) if any(story.pictures.get(k) for k in group)]
    if not grids:
        return None
    about = [
        "The first and the middle prompt of each task, every picture from the same seed in each column. ",
        tag("span", "A red corner", class_="cut"),
        " marks what the judge found wrong; its reason stands below, and appears over the picture.",
    ]
    return _section("Samples", about, grids)


def _grid(story: Story, group: list[int]) -> Html:
    columns = [{p: [x for x in story.pictures.get(k, []) if x.prompt == p] for p in _prompts(story, k)} for k in group]
    head = tag("div", tag("span"), [tag("strong", _column(story, k)) for k in group], class_="samples head")
    rows = []
    for prompt in sorted(set().union(*columns)):
        pictures = next(column[prompt][0] for column in columns if column.get(prompt))
        said = tag("div", tag("small", _words(pictures.task)), tag("bdi", pictures.text), class_="prompt")
        cells = [_cell(column.get(prompt, []), _column(story, k)) for k, column in zip(group, columns, strict=True)]
        rows.append(tag("div", said, cells, class_="samples"))
    return tag("div", head, rows, class_="grid", style=f"--columns:{len(group)}")


def _prompts(story: Story, number: int) -> list[int]:
    return sorted({picture.prompt for picture in story.pictures.get(number, [])})


def _cell(pictures: list[Picture], name: Html) -> Html:
    right = sum(picture.correct for picture in pictures)
    reasons = "; ".join(dict.fromkeys(picture.reasons for picture in pictures if not picture.correct))
    said = tag("bdi", reasons, class_="why", title=reasons) if reasons else None
    line = tag("p", tag("b", f"{right} of {len(pictures)} "), said)
    return tag("div", tag("strong", name), tag("div", [_tile(p) for p in pictures], class_="four"), line)


def _tile(picture: Picture) -> Html:
    verdict = "right" if picture.correct else f"wrong: {picture.reasons}"
    tip = f"{picture.text}\nseed {picture.image}, {verdict}"
    shown = _image(picture.png, tip) if picture.png else tag("span", "no picture", class_="none")
    return tag("span", shown, title=tip, class_="tile" if picture.correct else "tile wrong")


def _image(data: bytes, tip: str) -> Html:
    """As a data URI; small pictures keep their pixels, large ones become thumbnails."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            kind, small = str(image.format).lower(), max(image.size) <= THUMBNAIL
            if not small:
                buffer, kind = io.BytesIO(), "jpeg"
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                image.convert("RGB").save(buffer, "JPEG", quality=88)
                data = buffer.getvalue()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return tag("span", "unreadable", class_="none")
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=tip, class_="pixels" if small else None)


# ------------------------------------------------------------------------------------------------ curves


def _curves(story: Story) -> Html | None:
    if not story.checkpoints:
        return None
    loss, cosines, speed = [], [], []
    for number in story.checkpoints:
        name, ink = story.stages[number].stage, _ink(story, number)
        loss.append(plots.Line(name, ink, _points(story, number, "train/loss")))
        cosines.append(plots.Line(name, ink, _points(story, number, "repa/cosine")))
        cosines.append(
            plots.Line(f"{name}, shuffled", ink, _points(story, number, "repa/cosine_shuffled"), dashed=True)
        )
        speed.append(plots.Line(name, ink, _points(story, number, "train/images_per_second")))
    marks = {float(_offset(story, number)): story.stages[number].stage for number in story.checkpoints}
    charts = [
        _chart("Velocity loss", "Mean squared error of the velocity.", loss, marks, log=True),
        _chart("Loss by time", "From t = 0, the noise, to t = 1, the image, in tenths.", _by_time(story), marks, log=True),
        _chart("REPA", "Cosine with the image's own features; dashed, with another image's.", cosines, marks),
        _chart("Speed", ["Images a second.", _waiting(story)], speed, marks, zero=True),
    ]
    return _section("Training", None, tag("div", charts, class_="charts"))


def _chart(title: str, about: Child, found: list[plots.Line], marks: dict[float, str], **kind: bool) -> Html | None:
    found = [line for line in found if any(y is not None for _, y in line.points)]
    if not found:
        return None
    drawn = plots.lines(found, title, marks=marks if len(marks) > 1 else None, **kind)
    said = tag("figcaption", tag("b", title), " ", tag("span", about), plots.legend(found))
    return tag("figure", said, drawn)


def _offset(story: Story, number: int) -> int:
    """Images that were seen before this stage began, by the weights that it started from."""
    return sum(story.checkpoints[k].position for k in story.before(number))


def _points(story: Story, number: int, column: str) -> list[plots.Point]:
    offset = _offset(story, number)
    return [(offset + row["images"], row.get(column)) for row in story.curves.get(number, [])]


def _by_time(story: Story) -> list[plots.Line]:
    columns = sorted({c for rows in story.curves.values() for row in rows for c in row if c.startswith("train/loss_t")})
    found = []
    for k, column in enumerate(columns):
        points: list[plots.Point] = []
        for number in story.checkpoints:
            points += [*_points(story, number, column), (0.0, None)]
        hue = 265 - 235 * k / max(len(columns) - 1, 1)
        found.append(
            plots.Line(column.removeprefix("train/loss_t"), f"hsl({hue:.0f} 62% 54%)", points)
        )
    return found


def _waiting(story: Story) -> str | None:
    shares = [row["data/wait_share"] for rows in story.curves.values() for row in rows if row.get("data/wait_share")]
    return f" Waiting for data took {sum(shares) / len(shares):.1%} of the time." if shares else None


# ------------------------------------------------------------------------------------------------ inputs


def _inputs(story: Story) -> Html | None:
    if not story.prepared and not story.snapshots:
        return None
    about = "Nothing vanishes: what went in is a sample, or was left out for a reason that is counted here."
    prepared = [_prepared(story, number) for number in story.prepared]
    funnels = tag("div", [_funnel(story, number) for number in story.snapshots], class_="funnels")
    return _section(
        "What became of every input", about, prepared, [_by_kind(story, k) for k in story.prepared], funnels
    )


def _prepared(story: Story, number: int) -> Html:
    summary = story.prepared[number]
    sizes = summary.sizes
    head = [tag("span", f"{name} px ", _shares(size, summary.inputs)) for name, size in sizes.items()]
    body: list[list[Child]] = [["accepted", *(_count(size.accepted, summary.inputs) for size in sizes.values())]]
    for cause in sorted({cause for size in sizes.values() for cause in size.rejected}):
        body.append([_words(cause), *(_count(size.rejected.get(cause, 0), summary.inputs) for size in sizes.values())])
    checks = []
    for name, size in sizes.items():
        rejected = sum(size.rejected.values())
        left, right = f"{size.accepted:,} accepted + {rejected:,} rejected", f"{summary.inputs:,} inputs"
        holds = size.accepted + rejected == summary.inputs
        checks.append(_check(holds, f"{name} px: {left} = {right}", f"{name} px: {left} are not the {right}"))
    title = tag("h3", f"{story.stages[number].stage}: {summary.inputs:,} inputs")
    return tag("div", title, _rows(["", *head], body, "counts"), checks)


def _shares(size: SizeSummary, inputs: int) -> Html:
    parts = ((size.accepted, "var(--good)"), (sum(size.rejected.values()), "var(--bad)"))
    return tag("span", [tag("i", style=f"width:{100 * n / (inputs or 1):.2f}%;--ink:{ink}") for n, ink in parts], class_="bar")


def _count(count: int, inputs: int) -> Child:
    return [tag("span", f"{count:,}", class_="number"), tag("small", f"{count / (inputs or 1):.1%}" if count else "")]


def _by_kind(story: Story, number: int) -> Html | None:
    """The corpus of which we know what is odd about each file."""
    found = story.fates.get(number)
    if not found:
        return None
    names = [story.stages[k].stage for k in story.read_of(number)]
    head = ["made as", "files", "accepted", "rejected", *(f"in {name}" for name in names), "as training sees it"]
    body = [_fate(fate, len(names)) for fate in found]
    return tag("div", tag("h3", "By kind of file"), _rows(head, body, "fates"))


def _fate(fate: Fate, snapshots: int) -> list[Child]:
    causes = [f"{count:,} {_words(cause)}" for cause, count in sorted(fate.causes.items())]
    example = _image(fate.example, f"an accepted file made as {_words(fate.kind)}") if fate.example else None
    return [
        [_words(fate.kind), tag("small", ABOUT.get(fate.kind))],
        f"{fate.files:,}",
        f"{fate.accepted:,}",
        ", ".join(causes) or "0",
        *(f"{fate.kept[k]:,}" for k in range(snapshots)),
        example,
    ]


def _funnel(story: Story, number: int) -> Html:
    record = story.snapshots[number]
    most = max([1, *(count for _, count in record.counts)])
    body: list[list[Child]] = []
    before = None
    for label, count in record.counts:
        lost = f"−{before - count:,}" if before is not None and before != count else ""
        body.append([label, f"{count:,}", _bar(count / most), lost])
        before = count
    body.append(["→ training", tag("b", f"{record.rows:,}"), _bar(record.rows / most, "var(--good)"), ""])
    body.append(
        ["→ held out", tag("b", f"{record.held_out_rows:,}"), _bar(record.held_out_rows / most, "var(--good)"), ""]
    )
    sizes = [
        size for summary in story.prepared.values() for size in summary.sizes.values() if size.shards == record.shards
    ]
    begun = record.counts[0][1] if record.counts else 0
    begins = all(size.accepted == begun for size in sizes)
    total = record.rows + record.held_out_rows
    ends = not record.counts or record.counts[-1][1] == total
    left = begun - total
    sums = f"{record.rows:,} training + {record.held_out_rows:,} held out + {left:,} filtered out = {begun:,} accepted"
    title = tag("h3", f"{story.stages[number].stage}: {record.size} px")
    return tag(
        "div", title, _rows([], body, "funnel"), _check(begins and ends, sums, f"these counts do not add up: {sums}")
    )


# ------------------------------------------------------------------------------------------------ settings


def _settings(story: Story) -> Html:
    about = "The settings that change results. A stage is found again by its digest, which is made of them and of its inputs."
    return _section(
        "Settings and versions", about, [_details(story, k) for k in range(len(story.stages))], _versions(story)
    )


def _details(story: Story, number: int) -> Html:
    record = story.stages[number]
    title = tag(
        "summary",
        tag("span", record.stage, class_="swatch", style=f"--ink:{_ink(story, number)}"),
        tag("small", f"{record.kind}, {_duration(record.seconds)}, {record.started} "),
        _id(record.digest_of_work),
    )
    above = story.inputs(number)
    inputs: list[list[Child]] = [
        [name, [story.stages[above[name]].stage if name in above else "not on this page", " ", _id(work)]]
        for name, work in record.inputs.items()
    ]
    settings: list[list[Child]] = [[name, tag("code", value)] for name, value in _flat(record.settings)]
    parts = [_rows([], inputs, "settings") if inputs else None, _rows([], settings, "settings") if settings else None]
    return tag("details", title, parts, id=f"stage-{number}")


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as lines `a.b.0.c` -> value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, dict | list) for inner in value):
        for key, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{key}")
    elif path:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _versions(story: Story) -> Html | None:
    """Each set of versions once, with the stages that ran with it."""
    sets: dict[str, list[str]] = {}
    for record in story.stages:
        sets.setdefault(_said(record.versions), []).append(record.stage)
    for number, summary in story.prepared.items():
        for versions in summary.versions:
            sets.setdefault(_said(versions), []).append(f"{story.stages[number].stage} (decoders)")
    body: list[list[Child]] = [
        ["every stage" if len(names) == len(story.stages) else ", ".join(names), said]
        for said, names in sets.items()
        if said
    ]
    return _rows([], body, "settings") if body else None


def _said(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _foot(story: Story) -> Html:
    began = min((record.started for record in story.stages), default="")
    lost = [_check(False, "", f"not in the store any more: {said}") for said in story.lost]
    return tag(
        "footer", lost, tag("p", f"Made of the records in {story.store.url}; the first stage began {_day(began)}.")
    )


def _day(moment: str) -> str:
    try:
        return datetime.fromisoformat(moment).strftime("%-d %B %Y, %H:%M UTC")
    except ValueError:
        return moment
