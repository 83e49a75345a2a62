"""Captions by a vision-language model through transformers: Qwen2.5-VL, Qwen3-VL, or another of the same interface.

A reply does not depend on the batch: prompts are padded on the left and masked, and decoding is greedy. The model's own
generation settings are ignored, since a repetition penalty would count the padding as words. What remains is rounding,
which in half precision may decide a near tie between two tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from data_prep.images.decode import decode
from data_prep.rejections import Rejection
from data_prep.scores import Failure, Row, Sample, library_versions, prepared
from data_prep.scores.replies import caption_fields, caption_row
from data_prep.scores.settings import Ask, Vlm, VlmSettings, local_folder
from infra.causes import first_line
from infra.errors import CheckpointError, SettingsError

MAX_ASPECT = 200  # Qwen's image processor refuses narrower strips


class VlmScorer:
    def __init__(self, settings: VlmSettings, device: str = "cpu", threads: int = 1) -> None:
        self.settings, self.device, self.threads = settings, device, threads
        self.processor, self.model = load(settings, device)
        self.prompts = [self._prompt(ask) for ask in settings.asks]

    @property
    def fields(self) -> list[pa.Field]:
        return caption_fields(self.settings.failure)

    def versions(self) -> dict[str, str]:
        return library_versions(self.device, "transformers")

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        for batch in prepared(samples, _decoded, self.settings.batch_size, self.threads):
            images = [image for _, image in batch if isinstance(image, Image.Image)]
            asks = zip(self.prompts, self.settings.asks, strict=True)
            replies = [self._replies(prompt, ask, images) for prompt, ask in asks] if images else []
            by_image = iter(zip(*replies, strict=True))
            for _, image in batch:
                if isinstance(image, Failure):
                    yield {self.settings.failure: image.value}
                else:
                    yield caption_row(self.settings.failure, zip(self.settings.asks, next(by_image), strict=True))

    def _prompt(self, ask: Ask) -> str:
        return chat(self.processor, ask.prompt)

    def _replies(self, prompt: str, ask: Ask, images: list[Image.Image]) -> list[str]:
        """The model's reply to one prompt about each image."""
        return generated(self.processor, self.model, [prompt] * len(images), images, ask.max_tokens)


def chat(processor: Any, text: str) -> str:
    """A turn of the user, an image and a text, as the model's template writes it."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return prompt


@torch.inference_mode()
def generated(processor: Any, model: Any, prompts: list[str], images: list[Image.Image], max_tokens: int) -> list[str]:
    """The model's reply to each prompt about its image."""
    inputs = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
    ids_BT = model.generate(**inputs.to(model.device), max_new_tokens=max_tokens)
    replies: list[str] = processor.batch_decode(
        ids_BT[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return replies


def _decoded(sample: Sample) -> Image.Image | Failure:
    decoded = decode(sample.image)
    if isinstance(decoded, Rejection):
        return Failure.UNREADABLE_IMAGE
    height, width, _ = decoded.pixels.shape
    if max(height, width) > MAX_ASPECT * min(height, width):
        return Failure.UNREADABLE_IMAGE
    return Image.fromarray(decoded.pixels)


def load(settings: Vlm, device: str) -> tuple[Any, Any]:
    """The processor and the network, which decodes greedily."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = local_folder(settings.model) or settings.model
    options = {"revision": settings.revision, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(source, **options)
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, settings.dtype), use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers cannot load a vision-language model from {settings.model} ({first_line(error)})",
            remedy="name a folder or hub model such as Qwen/Qwen3-VL-4B-Instruct, with its processor and safetensors",
        ) from None
    _decode_greedily(model, processor.tokenizer)
    if settings.max_pixels is not None:
        _limit_pixels(processor.image_processor, settings.max_pixels)
    return processor, model.eval().to(device)


def _decode_greedily(model: Any, tokenizer: Any) -> None:
    """Make the model take the likeliest token each time, whatever its own generation_config.json says."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )


def _limit_pixels(image_processor: Any, max_pixels: int) -> None:
    """Limit images to so many pixels, which is what the processor's `longest_edge` and `shortest_edge` count."""
    size = dict(image_processor.size)
    if "longest_edge" not in size or "shortest_edge" not in size:
        raise SettingsError("this model has one size for all images", remedy="leave `max_pixels` out")
    size = {"longest_edge": max_pixels, "shortest_edge": min(max_pixels, size["shortest_edge"])}
    image_processor.size = type(image_processor.size)(**size)
