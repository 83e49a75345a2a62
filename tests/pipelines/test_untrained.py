"""The score means something: a model that has learnt nothing scores next to nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from pipelines.evaluation import geneval
from pipelines.evaluation.judges import ShapeJudge
from pipelines.evaluation.prompts import shape_prompts
from pipelines.evaluation.statistics import intervals
from training import model as models
from training.encoders import text
from training.sampling import Artist, SampleSettings


def test_an_untrained_model_scores_at_most_015(tmp_path: Path):
    prompts = shape_prompts(6)
    config = models.preset("tiny")
    text.build_tiny(tmp_path / "text", [prompt.prompt for prompt in prompts], hidden=config.text_dim, vocab=300)
    torch.manual_seed(0)
    artist = Artist(models.PixNerd(config), text.TextEncoder(tmp_path / "text", config.text_tokens))
    pictures = artist.draw(
        [p.prompt for p in prompts for _ in range(2)], [0, 1] * len(prompts), SampleSettings(steps=6)
    )
    verdicts = geneval.evaluate(ShapeJudge(), prompts, [list(pictures[2 * k : 2 * k + 2]) for k in range(len(prompts))])
    assert intervals(geneval.by_task(verdicts))["overall"].value <= 0.15
