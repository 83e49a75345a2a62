"""The section of what is right and what is wrong: the judged evaluation's pictures of each task, apart."""

from __future__ import annotations

from pipelines.page.elements import section, words
from pipelines.page.markup import Html, tag
from pipelines.page.samples import tile
from pipelines.page.story import Picture, Story


def section_of(story: Story) -> Html | None:
    judged = story.judged()
    pictures = [] if judged is None else story.outcomes.get(judged, [])
    if judged is None or not pictures:
        return None
    tasks = dict.fromkeys(picture.task for picture in pictures)
    head = tag("div", tag("span"), tag("strong", "right"), tag("strong", "wrong"), class_="samples head")
    rows = [_row(task, [picture for picture in pictures if picture.task == task]) for task in tasks]
    about = f"The first pictures of each task that the judge found right, and wrong, in {story.stages[judged].stage}."
    return section("Right and wrong", about, tag("div", head, rows, class_="grid", style="--columns:2"))


def _row(task: str, pictures: list[Picture]) -> Html:
    right, wrong = ([picture for picture in pictures if picture.correct is correct] for correct in (True, False))
    reasons = tag("ul", [_reason(picture) for picture in wrong], class_="reasons")
    return tag(
        "div",
        tag("div", tag("b", words(task)), class_="prompt"),
        tag("div", _four(right, "none is right")),
        tag("div", _four(wrong, "none is wrong"), reasons),
        class_="samples",
    )


def _four(pictures: list[Picture], otherwise: str) -> Html:
    if not pictures:
        return tag("p", otherwise)
    return tag("div", [tile(picture) for picture in pictures], class_="four")


def _reason(picture: Picture) -> Html:
    return tag("li", tag("bdi", picture.text), tag("small", tag("bdi", f" – {picture.reasons}")))
