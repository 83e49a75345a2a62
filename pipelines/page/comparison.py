"""The section that compares the judged evaluation with the others, prompt by prompt."""

from __future__ import annotations

from infra.errors import EvaluationError, NotFound
from pipelines.evaluation.compare import Compared, Side, compared
from pipelines.evaluation.statistics import ends
from pipelines.page.elements import section, table, words
from pipelines.page.markup import Child, Html, tag
from pipelines.page.scores import column, groups, order
from pipelines.page.story import Story


def section_of(story: Story) -> Html | None:
    tables = [_table(story, group) for group in groups(story)]
    shown = [each for each in tables if each is not None]
    if not shown:
        return None
    about = (
        "How the evaluation that the gate judges, or else the last one, differs from the others on the same prompts "
        "and seeds: its 95 % interval from a bootstrap that resamples the same prompts in both, and the share of draws "
        "in which it is the better one."
    )
    return section("Compared", about, shown)


def _table(story: Story, group: list[int]) -> Html | None:
    judged = story.judged()
    first = judged if judged in group else group[-1]
    found = {k: _compared(story, first, k) for k in group if k != first}
    differences = {k: each for k, each in found.items() if each is not None}
    if not differences:
        return None
    names = sorted(next(iter(differences.values())), key=order)
    head: list[Child] = [column(story, first), *([tag("small", "against "), column(story, k)] for k in differences)]
    body: list[list[Child]] = [[words(name), *(_cell(each[name]) for each in differences.values())] for name in names]
    return table(head, body, "compared")


def _compared(story: Story, first: int, other: int) -> dict[str, Compared] | None:
    a, b = (Side(story.stages[k].stage, story.store, story.reports[k]) for k in (first, other))
    try:
        return compared(a, b)
    except (EvaluationError, NotFound):  # other numbers of pictures, or a table that was removed
        return None


def _cell(score: Compared) -> Child:
    difference = score.difference
    sure = f"{ends(difference.interval)}, better in {difference.better:.0%} of draws"
    return [tag("b", f"{difference.interval.value:+.3f}"), " ", tag("small", sure)]
