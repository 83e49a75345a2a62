"""The section from data to score: the graph of stages, the time each took, which data led to which checkpoint."""

from __future__ import annotations

from infra.records import CorpusOutput, EncodersOutput, GateOutput, RegisterOutput, TrainOutput
from pipelines.evaluation.statistics import ends
from pipelines.page.elements import duration, ink, overall, section, short, swatch, table, words
from pipelines.page.graph import Box, graph
from pipelines.page.markup import Child, Html, tag
from pipelines.page.story import Story

LANES = {"corpus": 0, "prepare": 0, "snapshot": 1, "encoders": 2, "train": 2, "sample": 3, "evaluate": 3}
LANES |= {"gate": 4, "register": 4}


def section_of(story: Story) -> Html:
    about = "A box is a record in the store; arrows come from what it was made of. A colour is a training stage."
    svg = tag("div", graph(_boxes(story)), class_="scroll")
    return section("From data to score", about, svg, _times(story), _lineage(story))


def _boxes(story: Story) -> list[Box]:
    boxes: list[Box] = []
    for number, stage in enumerate(story.stages):
        parents, took, fact = _parents(story, number), duration(stage.seconds), _fact(story, number)
        boxes.append(
            Box(
                title=stage.stage,
                fact=fact,
                corner=took,
                ink=ink(story, number),
                tip=f"{stage.stage} ({stage.kind}), {took}\n{fact}",
                link=f"#stage-{number}",
                lane=LANES.get(stage.kind, max((boxes[k].lane for k in parents), default=0)),
                parents=parents,
            )
        )
    return boxes


def _parents(story: Story, number: int) -> tuple[int, ...]:
    """The stages that this one reads from, without those that others of them lead to; but its `data` always."""
    inputs = story.inputs(number)
    indirect = {k for parent in set(inputs.values()) for k in _ancestors(story, parent)}
    return tuple(sorted({k for name, k in inputs.items() if name == "data" or k not in indirect}))


def _ancestors(story: Story, number: int) -> set[int]:
    inputs = set(story.inputs(number).values())
    return inputs.union(*(_ancestors(story, k) for k in inputs))


def _fact(story: Story, number: int) -> str:
    """The most important figure about what a stage made, for its box."""
    output = story.stages[number].output
    if number in story.prepared:
        summary = story.prepared[number]
        return f"{min(size.accepted for size in summary.sizes.values()):,} of {summary.inputs:,} kept"
    if number in story.snapshots:
        return f"{story.snapshots[number].rows:,} samples, {story.snapshots[number].size} px"
    if number in story.checkpoints and isinstance(output, TrainOutput):
        size = f", {output.image_size} px" if output.image_size else ""
        return f"{story.checkpoints[number].position:,} images{size}"
    if number in story.reports and (name := overall(story.reports[number])):
        score = story.reports[number].scores[name]
        return f"{score.value:.3f} {ends(score)}"
    if number in story.drawn:
        return f"{len(story.drawn[number].record.prompts):,} captions drawn"
    if isinstance(output, CorpusOutput):
        return f"{sum(output.files.values()):,} files"
    if isinstance(output, EncodersOutput):
        return "text and vision"
    if isinstance(output, GateOutput):
        return "passed" if output.passed else "closed"
    if isinstance(output, RegisterOutput):
        return f"version {output.version}, {output.alias}"
    return words(story.stages[number].kind)


def _times(story: Story) -> Html:
    total = sum(stage.seconds for stage in story.stages) or 1.0
    bars = []
    for number, stage in enumerate(story.stages):
        share, label = stage.seconds / total, f"{stage.stage} {duration(stage.seconds)}"
        text = label if share > 0.12 else stage.stage if share > 0.06 else ""  # what there is room for
        style = f"flex:{max(share, 0.001):.4f} 0 0;--ink:{ink(story, number)}"
        class_ = "dim" if number in story.reports else None
        bars.append(tag("span", text, title=f"{label}, {share:.0%}", style=style, class_=class_))
    return tag("div", tag("h3", f"Where {duration(total)} went"), tag("div", bars, class_="times"))


def _lineage(story: Story) -> Html | None:
    """A table of checkpoints. It is joined by the digests in the records, so each line holds what belongs together."""
    if not story.checkpoints:
        return None
    head = ("trained", "on the snapshot", "started from", "giving the checkpoint", "which scores")
    body = [[swatch(story, k, story.stages[k].stage), *_cells(story, k)] for k in story.checkpoints]
    return tag("div", tag("h3", "Which data, which checkpoint, which score"), table(head, body, "lineage"))


def _cells(story: Story, number: int) -> list[Child]:
    checkpoint, digest = story.checkpoints[number], story.checkpoints[number].digest()
    data = [k for k, snapshot in story.snapshots.items() if snapshot.digest() == checkpoint.snapshot]
    read = [f"{story.stages[k].stage}, {story.snapshots[k].rows:,} samples" for k in data[:1]]
    before = [story.stages[k].stage for k in story.before(number)[:1]]
    scores: list[Child] = []
    for k, report in story.reports.items():
        if report.checkpoint == digest and (name := overall(report)):
            source = [short(report.digest()), " ", tag("small", f"{name}, {story.stages[k].stage}")]
            scores.append(tag("div", tag("b", f"{report.scores[name].value:.3f} "), source))
    return [
        [short(checkpoint.snapshot), " ", tag("small", read)],
        [short(checkpoint.start_from), " ", tag("small", before)] if checkpoint.start_from else "nothing",
        [short(digest), " ", tag("small", f"step {checkpoint.step:,}, {checkpoint.position:,} images")],
        scores or "–",
    ]
