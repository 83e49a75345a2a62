"""CLIP score, and heads on CLIP's image features: an image is encoded once for all of them.

Shapes: B images, C captions, D features, T tokens, H and W the network's own size.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from data_prep.images.decode import decode
from data_prep.rejections import Rejection
from data_prep.scores import Failure, Row, Sample, library_versions, prepared
from data_prep.scores.settings import ClipSettings, Head
from infra.causes import first_line
from infra.errors import CheckpointError

_PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_BETWEEN = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}

# What open_clip, torch and safetensors raise for files of a wrong kind and for hubs that cannot be reached.
_UNUSABLE = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)


class ClipScorer:
    def __init__(self, settings: ClipSettings, device: str = "cpu", threads: int = 1) -> None:
        self.settings, self.device, self.threads = settings, device, threads
        self.model, self.preprocess, self.tokenize = load_clip(settings, device)
        self.heads = [(head, _load_head(head, device)) for head in settings.heads]
        self.dtype = getattr(torch, settings.dtype)

    @property
    def fields(self) -> list[pa.Field]:
        *scores, failure = self.settings.columns()
        return [*(pa.field(name, pa.float32()) for name in scores), pa.field(failure, pa.string())]

    def versions(self) -> dict[str, str]:
        return library_versions(self.device, "open_clip_torch")

    def rows(self, samples: Iterable[Sample]) -> Iterator[Row]:
        for batch in prepared(samples, self._prepare, self.settings.batch_size, self.threads):
            yield from self._score(batch)

    def _prepare(self, sample: Sample) -> Tensor | Failure:
        decoded = decode(sample.image)
        if isinstance(decoded, Rejection):
            return Failure.UNREADABLE_IMAGE
        image_3HW: Tensor = self.preprocess(Image.fromarray(decoded.pixels))
        return image_3HW

    def _score(self, batch: list[tuple[Sample, Tensor | Failure]]) -> Iterator[Row]:
        readable = [(sample, image_3HW) for sample, image_3HW in batch if isinstance(image_3HW, Tensor)]
        rows = iter(self._score_readable(readable) if readable else ())
        for _, image in batch:
            yield {self.settings.failure: image.value} if isinstance(image, Failure) else next(rows)

    @torch.inference_mode()
    def _score_readable(self, batch: list[tuple[Sample, Tensor]]) -> list[Row]:
        images_B3HW = torch.stack([image_3HW for _, image_3HW in batch])
        features_BD = self.model.encode_image(images_B3HW.to(self.device, self.dtype)).float()
        columns = {head.name: _apply(layers, head, features_BD).tolist() for head, layers in self.heads}
        kinds = self.settings.kinds
        captions_B = [[c for c in sample.captions if not kinds or c["kind"] in kinds] for sample, _ in batch]
        image_C = [number for number, captions in enumerate(captions_B) for _ in captions]
        texts_CD = self._encode([caption["text"] for captions in captions_B for caption in captions])
        cosine_C = iter((F.normalize(features_BD, dim=-1)[image_C] * texts_CD).sum(-1).tolist())
        rows = []
        for number, captions in enumerate(captions_B):
            scores = [(caption["kind"], next(cosine_C)) for caption in captions]
            rows.append(self._row(scores, {name: values[number] for name, values in columns.items()}))
        return rows

    def _encode(self, texts: list[str]) -> Tensor:
        """The texts' features, each of length 1; a text longer than the network's context is cut."""
        size = self.settings.batch_size
        batches = [self.tokenize(texts[first : first + size]) for first in range(0, len(texts), size)]
        features = [F.normalize(self.model.encode_text(ids_CT.to(self.device)).float(), dim=-1) for ids_CT in batches]
        return torch.cat(features) if features else torch.zeros(0, 1, device=self.device)

    def _row(self, scores: list[tuple[str, float]], heads: dict[str, float]) -> Row:
        column, row = f"{self.settings.name}_score", dict(heads)
        if scores:
            row[column] = max(score for _, score in scores)
        for kind in self.settings.kinds:
            if of_kind := [score for its_kind, score in scores if its_kind == kind]:
                row[f"{column}_{kind}"] = max(of_kind)
        finite = {name: value for name, value in row.items() if math.isfinite(value)}
        failure = Failure.NOT_FINITE if len(finite) < len(row) else None if scores else Failure.NO_CAPTION
        return {**finite, self.settings.failure: failure and failure.value}


def load_clip(settings: ClipSettings, device: str) -> tuple[Any, Any, Any]:
    """The network, what prepares pictures for it, and its tokenizer."""
    import open_clip

    name = f"local-dir:{settings.folder}" if settings.folder else settings.model
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            name, settings.pretrained, precision=_PRECISION[settings.dtype], device=device
        )
        config = open_clip.get_model_config(name) or {}
        # A model's own config may ask for remote code; open_clip would pass that on, and untrusted code must not run.
        foreign = {"trust_remote_code": False} if config.get("text_cfg", {}).get("hf_tokenizer_name") else {}
        return model.eval(), preprocess, open_clip.get_tokenizer(name, **foreign)
    except _UNUSABLE as error:
        raise CheckpointError(
            f"open_clip cannot load {settings.model} {settings.pretrained or ''} ({first_line(error)})",
            remedy="name one of open_clip's models and tags, or a folder with open_clip_config.json and its weights",
        ) from None


Layers = list[tuple[Tensor, Tensor | None]]


def _load_head(head: Head, device: str) -> Layers:
    path = Path(head.file)
    try:
        layers = _chain(load_file(path) if path.suffix == ".safetensors" else _load_pickle(path))
    except _UNUSABLE as error:
        raise CheckpointError(
            f"{path} is no head for `{head.name}` ({first_line(error)})",
            remedy="give a state dict of linear layers, as safetensors or by torch.save",
        ) from None
    if head.index >= len(layers[-1][0]):
        raise CheckpointError(f"{path} gives {len(layers[-1][0])} values an image", remedy="lower the head's `index`")
    return [(weight.to(device), None if bias is None else bias.to(device)) for weight, bias in layers]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return dict(checkpoint.get("state_dict", checkpoint))


def _chain(state: dict[str, Tensor]) -> Layers:
    """The linear layers in the order of their names, `layers.2` before `layers.10`; each must fit the one before it."""
    layers: Layers = []
    for name in sorted((name for name in state if name.endswith("weight")), key=_by_number):
        weight, bias = state.pop(name).float(), state.pop(name.removesuffix("weight") + "bias", None)
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            raise ValueError(f"{name} is not a linear layer")
        if layers and weight.shape[1] != len(layers[-1][0]):
            raise ValueError(f"{name} takes {weight.shape[1]} values, the layer before it gives {len(layers[-1][0])}")
        layers.append((weight, None if bias is None else bias.float()))
    if state or not layers:
        raise ValueError(f"it holds {', '.join(map(str, list(state)[:3])) or 'nothing'} beside linear layers")
    return layers


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _apply(layers: Layers, head: Head, features_BD: Tensor) -> Tensor:
    x = F.normalize(features_BD, dim=-1) if head.normalise else features_BD
    if x.shape[1] != layers[0][0].shape[1]:
        raise CheckpointError(
            f"{head.file} takes {layers[0][0].shape[1]} features, and this CLIP gives {x.shape[1]}",
            remedy=f"use the CLIP model that the head `{head.name}` was trained on",
        )
    for number, (weight, bias) in enumerate(layers):
        x = F.linear(_BETWEEN[head.between](x) if number else x, weight, bias)
    if head.output == "softmax":
        x = x.softmax(-1)
    return x[:, head.index].sigmoid() if head.output == "sigmoid" else x[:, head.index]
