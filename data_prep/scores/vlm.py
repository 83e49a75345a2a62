"""Captions by a vision-language model through transformers: Qwen2.5-VL, Qwen3-VL, or another of the same interface.

An answer does not depend on its batch: prompts are padded on the left and masked, and the model's own habits for
sampling and against repetition, which would count the padding as words, are put aside for the likeliest token.
What is left is rounding, which in half precision may turn a near tie between two words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from data_prep.images.decode import decode
from data_prep.rejections import Rejection
from data_prep.scores import Failure, Row, Sample, prepared
from data_prep.scores.replies import caption_fields, caption_row
from data_prep.scores.settings import Ask, VlmSettings, local_folder
from infra.errors import CheckpointError, SettingsError

LONGEST_SIDES = 200  # Qwen's image processor refuses narrower strips


class VlmScorer:
    def __init__(self, settings: VlmSettings, device: str = "cpu", threads: int = 1) -> None:
        self.settings, self.device, self.threads = settings, device, threads
        self.processor, self.model = _load(settings)
        self.model.to(device)
        self.prompts = [self._prompt(ask) for ask in settings.asks]

    @property
    def fields(self) -> list[pa.Field]:
        return caption_fields(self.settings.failure)

    def versions(self) -> dict[str, str]:
        libraries = {name: version(name) for name in ("torch", "torchvision", "transformers", "pillow", "simplejpeg")}
        return libraries | {"device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu"}

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        for batch in prepared(samples, _picture, self.settings.batch_size, self.threads):
            pictures = [found for _, found in batch if isinstance(found, Image.Image)]
            answers = [self._answers(prompt, ask, pictures) for prompt, ask in self._asks()] if pictures else []
            said = iter(zip(*answers, strict=True))
            for _, found in batch:
                if isinstance(found, Failure):
                    yield {self.settings.failure: found.value}
                else:
                    yield caption_row(self.settings.failure, zip(self.settings.asks, next(said), strict=True))

    def _asks(self) -> Iterator[tuple[str, Ask]]:
        return zip(self.prompts, self.settings.asks, strict=True)

    def _prompt(self, ask: Ask) -> str:
        content = [{"type": "image"}, {"type": "text", "text": ask.prompt}]
        said: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return said

    @torch.inference_mode()
    def _answers(self, prompt: str, ask: Ask, pictures: list[Image.Image]) -> list[str]:
        given = self.processor(
            text=[prompt] * len(pictures), images=pictures, padding=True, padding_side="left", return_tensors="pt"
        ).to(self.device)
        ids_BT = self.model.generate(**given, max_new_tokens=ask.max_tokens)
        answers: list[str] = self.processor.batch_decode(
            ids_BT[:, given["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return answers


def _picture(sample: Sample) -> Image.Image | Failure:
    found = decode(sample.image)
    if isinstance(found, Rejection):
        return Failure.UNREADABLE_IMAGE
    height, width, _ = found.pixels.shape
    if max(height, width) > LONGEST_SIDES * min(height, width):
        return Failure.UNREADABLE_IMAGE
    return Image.fromarray(found.pixels)


def _load(settings: VlmSettings) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = local_folder(settings.model) or settings.model
    where = {"revision": settings.revision, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source, **where)
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, settings.dtype), use_safetensors=True, **where
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CheckpointError(
            f"transformers cannot load a vision-language model from {settings.model} ({said})",
            remedy="name a folder or hub model such as Qwen/Qwen3-VL-4B-Instruct, with its processor and safetensors",
        ) from None
    _answer_plainly(model, processor.tokenizer)
    if settings.max_pixels is not None:
        _limit_pixels(processor.image_processor, settings.max_pixels)
    return processor, model.eval()


def _answer_plainly(model: Any, tokenizer: Any) -> None:
    """The likeliest token each time, whatever the model's own generation_config.json says."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )


def _limit_pixels(image_processor: Any, most: int) -> None:
    size = dict(image_processor.size)
    if "longest_edge" not in size or "shortest_edge" not in size:
        raise SettingsError("this model has one size for all images", remedy="leave `max_pixels` out")
    size = {"longest_edge": most, "shortest_edge": min(most, size["shortest_edge"])}
    image_processor.size = type(image_processor.size)(**size)
