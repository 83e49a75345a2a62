"""Correct pictures for evaluation prompts of the shape world."""

from __future__ import annotations

import random

from data_prep.shapes import world


def correct_picture(prompt: str, seed: int, size: int) -> world.Image:
    return world.render(world.draw(world.parse(prompt), random.Random(f"{seed}/{prompt}")), size)
