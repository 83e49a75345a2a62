"""Options of the training objective side by side: a tiny network on the shape world, the same images and draws for all.

Each is judged by the velocity loss of images that were not trained on, at fixed noise and times spread evenly over
(0, 1), whatever times it was trained at; so the figures have one unit. The vision encoder has random weights, as none
is downloaded: its rows say what its losses cost and whether they harm, not what DINOv2 would bring.

    python -m tests.bench.bench_objectives [--steps 300] [--only "plain;image"]
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from data_prep.shapes.world import captions, render, sample_scene
from infra.config import parse
from training.diffusion.draws import draw
from training.diffusion.objective import velocity_loss
from training.diffusion.prediction import as_velocity
from training.diffusion.settings import ObjectiveSettings
from training.encoders import text, vision
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder
from training.loader.batches import Batch
from training.model.pixnerd import PixNerd
from training.model.presets import preset
from training.model.repa_head import RepaHead
from training.optim import OptimSettings, learning_rate, optimiser
from training.perceptual import Perceptual
from training.step import Preparer, Trained

SIZE, BLOCKS, TRAINED, HELD_OUT = 16, 4, 4096, 256
PLAIN: dict[str, Any] = {"time_shift": 4.0, "repa": 0.0, "repa_block": 2}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> the objective's settings, and the network's
    "plain": ({}, {}),
    "image": ({}, {"prediction": "image"}),
    "times -0.8, 0.8, no shift": ({"time_shift": 1.0, "time_mean": -0.8, "time_deviation": 0.8}, {}),
    "routing": ({"routing": {"share": 0.5, "blocks": [2, 3]}}, {}),
    "REPA": ({"repa": 0.5}, {}),
    "image, features": ({"perceptual": {"dino": 0.01, "times": [0.3, 1.0]}}, {"prediction": "image"}),
}


class World:
    """Images and captions in memory."""

    def __init__(self, count: int, first: int) -> None:
        scenes = [sample_scene(random.Random(f"objectives/{first + i}")) for i in range(count)]
        self.images = torch.from_numpy(np.stack([render(scene, SIZE) for scene in scenes])).permute(0, 3, 1, 2)
        self.captions = [captions(scene, random.Random(i)).medium for i, scene in enumerate(scenes)]

    def batch(self, start: int, size: int, encoder: TextEncoder, objective: ObjectiveSettings, patch: int) -> Batch:
        rows = [(start + i) % len(self.captions) for i in range(size)]
        routing, patches = objective.routing, (SIZE // patch) ** 2
        drawn = draw(
            0,
            range(start, start + size),
            (3, SIZE, SIZE),
            shift=objective.time_shift,
            mean=objective.time_mean,
            deviation=objective.time_deviation,
            routing=(lambda _: (patches, routing.kept(patches))) if routing.share else None,
        )
        words = ["" if drop else self.captions[row] for row, drop in zip(rows, drawn.drop_B.tolist(), strict=True)]
        ids, mask, truncated = encoder.tokenize(words)
        return Batch(
            images_BCHW=self.images[rows],
            weight_B=torch.ones(size),
            bits_BN=drawn.bits_BN,
            t_B=drawn.t_B,
            kept_BM=drawn.kept_BM,
            ids_BT=ids,
            mask_BT=mask,
            truncated_B=truncated,
            captions=words,
            positions=np.array(rows),
            lengths=mask.sum(1).numpy(),
        )


def train(name: str, folder: Path, worlds: tuple[World, World], given: argparse.Namespace) -> tuple[float, float]:
    """The held-out loss, and milliseconds of CPU a step."""
    torch.manual_seed(0)
    changes, network = OPTIONS[name]
    objective = parse(ObjectiveSettings, PLAIN | changes)
    config = preset("tiny").model_copy(update={"image_size": SIZE, "patch_size": 4, "blocks": BLOCKS} | network)
    net, encoder = PixNerd(config), TextEncoder(folder / "text", config.text_tokens, train_layers=9)
    eye = VisionEncoder(folder / "vision") if objective.sees else None
    head = RepaHead(config.hidden, eye.width) if eye is not None and objective.repa else None
    perceptual = Perceptual(objective.perceptual, None, eye) if objective.perceptual.any else None
    trained = Trained(net, head, encoder, objective, perceptual)
    prepare = Preparer(torch.device("cpu"), None, eye, config, objective)
    settings = parse(OptimSettings, {"lr": 1e-3, "warmup": 50, "betas": [0.9, 0.99]})
    optimizer = optimiser(trained.named_parameters(), settings)
    began = time.process_time()
    for step in range(given.steps):
        batch = worlds[0].batch(step * given.batch, given.batch, encoder, objective, config.patch_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, given.steps) * group["share"]
        loss, _ = trained(prepare(batch, step))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), settings.clip or float("inf"))
        optimizer.step()
    return held_out(trained, worlds[1]), (time.process_time() - began) / given.steps * 1e3


@torch.no_grad()
def held_out(trained: Trained, world: World) -> float:
    assert trained.text is not None
    images = world.images.float() / 127.5 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    t = (torch.arange(len(images)) + 0.5) / len(images)
    losses = velocity_loss(as_velocity(trained.net), images, trained.text.encode(world.captions), noise, t)
    return float(losses.per_sample_B.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", default=";".join(OPTIONS), help="names of rows, with semicolons between them")
    given = parser.parse_args()
    torch.set_num_threads(1)
    worlds = World(TRAINED, 0), World(HELD_OUT, TRAINED)
    with TemporaryDirectory() as name:
        folder = Path(name)
        text.build_tiny(folder / "text", worlds[0].captions, hidden=96, vocab=512)
        vision.build_tiny(folder / "vision")
        print(f"| {given.steps} steps | held-out loss | CPU ms a step |\n|---|---|---|")
        for option in given.only.split(";"):
            loss, milliseconds = train(option, folder, worlds, given)
            print(f"| {option} | {loss:.3f} | {milliseconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
