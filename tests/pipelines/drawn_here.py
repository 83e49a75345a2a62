"""Drawing in this process, as an actor does it."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.evaluation import generate
from pipelines.evaluation.chunks import Chunk, Shelf, _Actor


def drawn_here(order: generate.Order, prompts: Sequence[str]) -> list[Chunk]:
    drawing = generate.Drawing(order.store, order.checkpoint, order.images, order.settings, order.apart)
    actor = _Actor(Shelf(order.store, order.place, order.stage), drawing, "cpu")
    return [actor.do(*chunk) for chunk in generate.chunked(prompts, order.images, order.settings).items()]
