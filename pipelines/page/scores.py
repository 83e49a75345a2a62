"""The section of scores: evaluations that may be compared stand side by side."""

from __future__ import annotations

from pipelines.evaluation.prompts import TASKS
from pipelines.evaluation.statistics import NO_INTERVAL, ends, without_interval
from pipelines.page import plots
from pipelines.page.elements import ink, section, short, swatch, table, words
from pipelines.page.markup import Child, Html, tag
from pipelines.page.story import Story


def section_of(story: Story) -> Html:
    if not story.reports:
        return section("Scores", "Nothing has been evaluated yet.")
    return section("Scores", None, [_group(story, group) for group in groups(story)])


def groups(story: Story) -> list[list[int]]:
    """Evaluations that may be compared: those with the same protocol, judge and prompts."""
    by_method: dict[tuple[str, str, str], list[int]] = {}
    for number, report in story.reports.items():
        by_method.setdefault((report.protocol, report.judge, report.prompts), []).append(number)
    return list(by_method.values())


def column(story: Story, number: int) -> Html:
    """The heading of an evaluation's column: the training stage that it measures, and its own name."""
    trained, name = story.checkpoint_number(story.reports[number].checkpoint), story.stages[number].stage
    return swatch(story, number, name if trained is None else [story.stages[trained].stage, " ", tag("small", name)])


def _group(story: Story, group: list[int]) -> Html:
    reports = {k: story.reports[k] for k in group}
    names = sorted({name for report in reports.values() for name in report.scores}, key=order)
    scores = [score for report in reports.values() for score in report.scores.values()]
    most = max([1.0, *(score.value if score.high is None else score.high for score in scores)])
    body = [[tag("span", words(name.rpartition("/")[2]), title=name),
             *(_score(story, k, name, most) for k in group)] for name in names]  # fmt: skip
    failed = ", ".join(f"{r.failed:,} of {story.stages[k].stage}" for k, r in reports.items() if r.failed)
    first = reports[group[0]]
    about = [
        f"{first.protocol} by the judge “{first.judge}”, prompts ",
        f"“{first.prompt_set}” " if first.prompt_set else "",
        short(first.prompts),
        f", {' and '.join(sorted({f'{report.images:,}' for report in reports.values()}))} pictures each. ",
        "Bars are 95 % intervals from a bootstrap over prompts. ",
        f"{NO_INTERVAL}. " if any(map(without_interval, scores)) else "",
        f"Pictures without a score count as wrong: {failed}." if failed else "No picture failed.",
    ]
    return tag("div", tag("p", about, class_="about"), table(["", *(column(story, k) for k in group)], body, "scores"))


def order(name: str) -> tuple[int, str]:
    """GenEval's tasks in their order, others by name, the overall score last."""
    last, tasks = name.rpartition("/")[2], list[str](TASKS)
    return tasks.index(last) if last in tasks else len(tasks) + (last == "overall"), name


def _score(story: Story, number: int, name: str, most: float) -> Child:
    score = story.reports[number].scores.get(name)
    if score is None:
        return "–"
    low, high = (score.value if end is None else end for end in (score.low, score.high))
    bar = plots.interval(score.value, low, high, most, ink(story, number))
    return [tag("b", f"{score.value:.3f}"), bar, " ", tag("small", ends(score))]
