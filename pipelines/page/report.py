"""One self-contained page about a workflow: what went in, what came out, and how the one became the other.

It is made from what is in the store alone, so it can be made again at any time and says the same. It loads nothing: no
script, no font, no request. What is missing (no evaluation yet, a stage that failed, an object that was removed) is
left out or named as missing; the rest of the page stays.
"""

from __future__ import annotations

from datetime import datetime

from infra.records import GateOutput, RegisterOutput, StageRecord
from infra.store import Store
from pipelines.evaluation.statistics import ends, without_interval
from pipelines.page import comparison, curves, held_out, inputs, lineage, outcomes, samples, scores, settings
from pipelines.page.elements import amount, check, duration, overall
from pipelines.page.markup import Child, Html, page, tag
from pipelines.page.story import Picture, Story, read
from pipelines.page.style import STYLE


def build(store: Store, title: str, records: list[StageRecord]) -> str:
    """The page, from the records of a workflow's finished stages in the order of the workflow."""
    story = read(store, records)
    sections = (
        lineage.section_of(story),
        held_out.section_of(story),
        scores.section_of(story),
        comparison.section_of(story),
        outcomes.section_of(story),
        samples.section_of(story),
        curves.section_of(story),
        inputs.section_of(story),
        settings.section_of(story),
    )
    return page(title, STYLE, tag("main", _head(story, title), sections, _foot(story)))


def _head(story: Story, title: str) -> Html:
    text = tag("div", tag("h1", title), tag("p", _summary(story), class_="lead"), _verdict(story))
    return tag("header", tag("div", text, _mosaic(story), class_="top"), tag("dl", _tiles(story), class_="tiles"))


def _seconds(story: Story) -> float:
    return sum(stage.seconds for stage in story.stages)


def _model(story: Story) -> tuple[int, int, str] | None:
    """Of the judged model, else the last: its parameters, the images it has seen, and "in 3 training stages"."""
    judged, last = story.judged(), max(story.checkpoints, default=None)
    trained = last if judged is None else story.checkpoint_number(story.reports[judged].checkpoint)
    if trained is None:
        return None
    chain = [trained, *story.before(trained)]
    stages = f"in {len(chain)} training stages" if len(chain) > 1 else "in one training stage"
    return story.checkpoints[trained].parameters, sum(story.checkpoints[k].position for k in chain), stages


def _summary(story: Story) -> str:
    took = f"{len(story.stages)} stages took {duration(_seconds(story))} in all."
    model, judged = _model(story), story.judged()
    if model is None:
        return took
    parameters, images, stages = model
    seen = f"A PixNerd of {amount(parameters)} parameters that has seen {images:,} images {stages}"
    name = None if judged is None else overall(story.reports[judged])
    if judged is None or name is None:
        return f"{seen} is not measured yet. {took}"
    report = story.reports[judged]
    score = report.scores[name]
    interval = "" if without_interval(score) else f" {ends(score)}"
    return f"{seen} scores {score.value:.3f}{interval} on {name}. {took}"


def _tiles(story: Story) -> list[Html]:
    model, judged = _model(story), story.judged()
    tiles = []
    if judged is not None and (name := overall(story.reports[judged])):
        score = story.reports[judged].scores[name]
        interval = "no 95 % interval" if without_interval(score) else f"95 % interval {ends(score)}"
        tiles.append(_tile(name, f"{score.value:.3f}", interval, "first"))
    if model is not None:
        parameters, images, stages = model
        tiles.append(_tile("parameters", amount(parameters), f"{parameters:,}"))
        tiles.append(_tile("images seen", f"{images:,}", stages))
    return [*tiles, _tile("time", duration(_seconds(story)), f"{len(story.stages)} stages")]


def _tile(name: str, value: str, more: str, class_: str | None = None) -> Html:
    return tag("div", tag("dt", name), tag("dd", tag("b", value), tag("small", more)), class_=class_)


def _verdict(story: Story) -> Html:
    outputs = [stage.output for stage in story.stages]
    gates = [output for output in outputs if isinstance(output, GateOutput)]
    models = [output for output in outputs if isinstance(output, RegisterOutput)]
    chips: list[Child] = [tag("b", "No gate yet", class_="chip")]
    if gates:
        passed = gates[-1].passed
        chips = [tag("b", "Gate passed" if passed else "Gate closed", class_="chip good" if passed else "chip bad")]
        for rule in gates[-1].verdicts:
            mark, holds = ("✓", "is") if rule.passed else ("✗", "is not")
            chips.append(tag("span", f"{mark} {rule.score} {rule.value:.3f} {holds} {rule.limit}"))
    if not models:
        return tag("p", chips, tag("b", "Not registered", class_="chip"), class_="verdict")
    version = tag("span", f"{models[-1].model} version {models[-1].version}, alias {models[-1].alias}")
    return tag("p", chips, tag("b", "Registered", class_="chip good"), version, class_="verdict")


def _mosaic(story: Story) -> Html | None:
    """The judged model's first picture of each task, right or wrong; without an evaluation, of each caption drawn."""
    judged, first = story.judged(), dict[str, Picture]()
    for picture in [] if judged is None else story.pictures.get(judged, []):
        first.setdefault(picture.task, picture)
    tiles = [samples.tile(picture) for picture in first.values()] or held_out.mosaic(story)
    return tag("div", tiles, class_="mosaic") if tiles else None


def _foot(story: Story) -> Html:
    lost = [check(False, f"not in the store any more: {missing}") for missing in story.lost]
    began = min((stage.started for stage in story.stages), default=None)
    when = f"; the first stage began {_moment(began)}" if began else ""
    return tag("footer", lost, tag("p", f"Made of the records in {story.store.url}{when}."))


def _moment(iso: str) -> str:
    try:
        return f"{datetime.fromisoformat(iso):%d %B %Y, %H:%M UTC}".lstrip("0")
    except ValueError:
        return iso
