"""The prompts of an evaluation: a set by its name, a file, or a set that is drawn from a seed.

It imports no torch, since scores are also computed from detections that were kept.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from infra.config import Settings, digest
from pipelines.evaluation import official
from pipelines.evaluation.prompts import Prompt, load_prompts, other_shape_prompts, parse_prompts, shape_prompts

OTHER_SHAPES = "other shapes"
_PUBLISHED = {"official": official.official, "rephrased": official.rephrased}


class SeededPrompts(Settings):
    """A set in the official form: objects, colours and positions are drawn as GenEval's own were."""

    seeded: int = Field(ge=1, le=100_000, description="prompts a task, less those that are drawn twice")
    seed: int = Field(official.SEED, ge=0, description="of the draws; 100 a task of seed 43 are the official set")


class PromptSettings(Settings):
    prompts: str | SeededPrompts = Field(
        "shapes",
        description="`shapes`: the shape world's own; `other shapes`: what its training scenes show; `official`; "
        "`rephrased`; or a JSONL file of GenEval metadata",
    )
    per_task: int = Field(12, ge=2, description="prompts a task of the shape world's set")


def prompts_digest(settings: PromptSettings) -> str:
    """A digest of the prompts themselves, as a file may change while its name does not."""
    return digest([prompt.metadata() for prompt in read_prompts(settings)])


def read_prompts(settings: PromptSettings) -> list[Prompt]:
    asked = settings.prompts
    if isinstance(asked, SeededPrompts):
        return parse_prompts(official.seeded(asked.seeded, asked.seed).splitlines(), prompt_set(settings))
    if asked == "shapes":
        return shape_prompts(settings.per_task)
    if asked == OTHER_SHAPES:
        return other_shape_prompts(settings.per_task)
    if asked in _PUBLISHED:
        return parse_prompts(_PUBLISHED[asked]().splitlines(), asked)
    return load_prompts(Path(asked))


def prompt_set(settings: PromptSettings) -> str:
    """The name of the set, for the report: scores of different sets must not be compared."""
    asked = settings.prompts
    if isinstance(asked, SeededPrompts):
        return f"seeded {asked.seeded} {asked.seed}"
    return asked if asked in ("shapes", OTHER_SHAPES, *_PUBLISHED) else Path(asked).name
