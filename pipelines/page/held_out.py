"""The section of pictures drawn for held-out captions, each beside the original picture that has the caption."""

from __future__ import annotations

from pipelines.page.elements import image, section, swatch
from pipelines.page.markup import Html, tag
from pipelines.page.story import Shown, Story

MOST = 4  # drawn pictures shown of a prompt


def section_of(story: Story) -> Html | None:
    if not story.drawn:
        return None
    grids = [_grid(story, number, shown) for number, shown in story.drawn.items()]
    return section("What it draws", _about(story), grids)


def _about(story: Story) -> str:
    seen = all(shown.record.seen for shown in story.drawn.values())
    whose = "from the training data, as nothing is held out of it" if seen else "that training never saw"
    return f"Captions {whose}, the picture that each belongs to, and what is drawn for it, from seeds 0, 1, …"


def _grid(story: Story, number: int, shown: Shown) -> Html:
    owner = story.checkpoint_number(shown.record.checkpoint)
    name = tag("span", story.stages[number].stage) if owner is None else swatch(story, owner, story.stages[owner].stage)
    heads = [tag("strong", "the picture itself"), tag("strong", name)]
    rows = [tag("div", tag("span"), heads, class_="samples head")]
    for prompt, original, pngs in shown.pictures:
        originals = [] if prompt.original is None else [_tile(original, prompt.text)]
        cells = [_cell(heads[0], originals), _cell(heads[1], [_tile(png, prompt.text) for png in pngs[:MOST]])]
        rows.append(tag("div", tag("div", tag("bdi", prompt.text), class_="prompt"), cells, class_="samples"))
    return tag("div", rows, class_="grid", style="--columns:2")


def _cell(head: Html, tiles: list[Html]) -> Html:
    return tag("div", head, tag("div", tiles, class_="four"))


def _tile(data: bytes | None, tip: str) -> Html:
    return tag("span", image(data, tip) if data else tag("span", "gone", class_="none"), title=tip, class_="tile")


def mosaic(story: Story) -> list[Html]:
    """The first drawn picture of each of six captions, for the head of the page."""
    last = next(reversed(story.drawn.values()), None)
    return [] if last is None else [_tile(pngs[0], prompt.text) for prompt, _, pngs in last.pictures[:6]]
