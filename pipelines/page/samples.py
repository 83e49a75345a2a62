"""The section of evaluation pictures: the same prompts and seeds, with a column for each evaluation."""

from __future__ import annotations

from pipelines.page.elements import image, section, words
from pipelines.page.markup import Html, tag
from pipelines.page.scores import column, groups
from pipelines.page.story import Picture, Story


def section_of(story: Story) -> Html | None:
    grids = [_grid(story, group) for group in groups(story) if any(story.pictures.get(k) for k in group)]
    if not grids:
        return None
    about = [
        "The first and the middle prompt of each task, from seeds 0, 1, … in every column. A ",
        tag("span", "red corner", class_="cut"),
        " marks a picture that the judge found wrong; why stands below it.",
    ]
    return section("Samples", about, grids)


def _grid(story: Story, group: list[int]) -> Html:
    names = [column(story, k) for k in group]
    rows = [tag("div", tag("span"), [tag("strong", name) for name in names], class_="samples head")]
    by_prompt: dict[int, dict[int, list[Picture]]] = {}  # prompt -> evaluation -> pictures
    for k in group:
        for picture in story.pictures.get(k, []):
            by_prompt.setdefault(picture.prompt, {}).setdefault(k, []).append(picture)
    for _, pictures in sorted(by_prompt.items()):
        first = next(iter(pictures.values()))[0]
        prompt = tag("div", tag("small", words(first.task)), tag("bdi", first.text), class_="prompt")
        cells = [_cell(pictures.get(k, []), name) for k, name in zip(group, names, strict=True)]
        rows.append(tag("div", prompt, cells, class_="samples"))
    return tag("div", rows, class_="grid", style=f"--columns:{len(group)}")


def _cell(pictures: list[Picture], name: Html) -> Html:
    right = sum(picture.correct for picture in pictures)
    reasons = "; ".join(dict.fromkeys(picture.reasons for picture in pictures if not picture.correct))
    verdict = tag("p", tag("b", f"{right} of {len(pictures)} "), tag("bdi", reasons, title=reasons))
    return tag("div", tag("strong", name), tag("div", [tile(picture) for picture in pictures], class_="four"), verdict)


def tile(picture: Picture) -> Html:
    tip = f"{picture.text}\nseed {picture.image}, {'right' if picture.correct else f'wrong: {picture.reasons}'}"
    shown = image(picture.png, tip) if picture.png else tag("span", "no picture", class_="none")
    return tag("span", shown, title=tip, class_="tile" if picture.correct else "tile wrong")
