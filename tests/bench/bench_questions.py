"""How long a vision-language model takes for the questions about an image, with and without encoding it once for all.

one by one: every question with the image, through the whole network.
batched: the same, all questions about an image at once.
shared: as the judge of DPG-Bench does it; the image passes through the network once.

Without `--model` it is a random Qwen3-VL, far smaller than a published one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from infra.config import parse
from pipelines.evaluation.answering import VlmAnswers
from pipelines.evaluation.vqa import VlmAnswerer
from tests.bench.sides import compare, show
from tests.data_prep.small_scorers import build_vlm

TEXT = "Is the {} of the large dog on the left of the picture {}? Answer yes or no, in lower case."


@torch.inference_mode()
def whole(judge: VlmAnswerer, image: Image.Image, texts: list[str]) -> Tensor:
    """The same log odds, from prompts that each contain the image."""
    inputs = judge.processor(
        text=[f"{judge.before}{text}{judge.after}" for text in texts],
        images=[image] * len(texts),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    hidden = judge.model.model(**inputs.to(judge.model.device), use_cache=False).last_hidden_state
    return judge.margin(hidden[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a hub model")
    parser.add_argument("--questions", type=int, default=13, help="of an image; DPG-Bench has about as many")
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(coarse).resize((given.size, given.size))
    texts = [TEXT.format("head" if n % 2 else "tail", "red" if n % 3 else "dark blue") for n in range(given.questions)]
    with TemporaryDirectory() as folder:
        if not given.model:
            build_vlm(Path(folder, "model"), "qwen3", scale=8)
        plain = {"kind": "vlm", "model": given.model or f"{folder}/model", "dtype": given.dtype}
        judge = VlmAnswerer(parse(VlmAnswers, plain | {"batch": given.questions}), given.device)
    sides = {
        "one by one": lambda: [whole(judge, image, [text]) for text in texts],
        "batched": lambda: whole(judge, image, texts),
        "shared": lambda: judge.margins(image, texts),
    }
    if given.dtype == "float32":
        torch.testing.assert_close(sides["shared"](), sides["batched"](), rtol=1e-3, atol=1e-3)
    model = f"{given.model or 'random'}, {sum(weight.numel() for weight in judge.model.parameters()) / 1e6:.1f} M"
    print(f"{model}, {given.dtype}, {given.device}, {given.questions} questions about an image of {given.size} px")
    show(compare(sides, given.rounds), ("one by one", "batched"))


if __name__ == "__main__":
    main()
