"""Tars in the webdataset format: beside each image, captions in text files or in fields of a JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from data_prep.rejections import Cause, Rejection
from data_prep.sources import tars, words
from data_prep.sources.base import Bytes, Input, Range, RawItem, check_kept
from data_prep.sources.fields import field
from infra.config import Refused, spelt
from infra.errors import SettingsError
from infra.store import Store

MOST_JSON = 1 << 20  # bytes

Kept = Literal["int", "float", "text", "bool"]

_TYPES = {"int": pa.int64(), "float": pa.float64(), "text": pa.string(), "bool": pa.bool_()}


class WebDataset(tars.Tars):
    kind: Literal["webdataset"]
    captions: list[str] = Field(
        ["txt"],
        description="texts by their extension (txt) and fields of the JSON (json.prompt, json.turns.1.value); "
        "a caption's kind is the extension or the field (txt, prompt, turns.1.value); none: images alone",
    )
    json_extension: Annotated[str, spelt(r"\w+", "an extension without its point")] = "json"
    keep: dict[str, Kept] = Field(
        {}, description="fields of the JSON to carry into the index; a value of another type becomes null"
    )
    fields: dict[str, str] = Field({}, description="kept column -> its field of the JSON, where that has another name")
    licence_field: str | None = None
    origin_field: str | None = None

    @field_validator("keep")
    @classmethod
    def _free_names(cls, keep: dict[str, Kept]) -> dict[str, Kept]:
        for name in keep:
            try:
                check_kept(name)
            except SettingsError as error:
                raise Refused(error.message, remedy="keep it as another, and say in `fields` what it is") from None
        return keep

    @model_validator(mode="after")
    def _known_fields(self) -> WebDataset:
        for caption in self.captions:
            extension, dot, _ = caption.partition(".")
            if dot and extension != self.json_extension:
                raise ValueError(f"`{caption}` is no field of the JSON; write {self.json_extension}.name")
        for column in self.fields:
            if column not in self.keep:
                raise ValueError(f"`fields` names the column `{column}`, which is not kept")
        return self

    def sidecars(self) -> list[str]:
        """The extensions of members that are read beside the image."""
        fields = [*self.keep, *filter(None, (self.licence_field, self.origin_field))]
        extensions = [caption.partition(".")[0] for caption in self.captions] + [self.json_extension] * bool(fields)
        return list(dict.fromkeys(extensions))

    def ranges(self, store: Store, entry: Input, rows: int) -> Iterator[Range]:
        for first, size in self.pieces(store, entry, rows):
            yield Bytes(entry.name, entry.name, False, first, size)

    def kept_columns(self) -> dict[str, pa.DataType | None]:
        return {name: _TYPES[kind] for name, kind in self.keep.items()}

    def read(self, store: Store, part: Range) -> Iterator[RawItem]:
        assert isinstance(part, Bytes)
        with tars.opened(self, store, part) as file:
            for tar_item in tars.items(self, part, file, self.sidecars()):
                yield _item(self, file, tar_item)


def _item(source: WebDataset, file: BinaryIO, tar_item: tars.TarItem) -> RawItem:
    metadata = _metadata(source, file, tar_item)
    fields = {} if isinstance(metadata, Rejection) else metadata
    texts = metadata if isinstance(metadata, Rejection) else _captions(source, file, tar_item, metadata)
    licence = field(fields, source.licence_field) if source.licence_field else None
    origin = field(fields, source.origin_field) if source.origin_field else None
    kept = {name: _typed(field(fields, source.fields.get(name, name)), kind) for name, kind in source.keep.items()}
    return source.item(tar_item, texts, licence, origin, kept)


def _captions(
    source: WebDataset, file: BinaryIO, tar_item: tars.TarItem, fields: dict[str, Any]
) -> list[dict[str, str]] | Rejection:
    values: list[tuple[str, Any]] = []
    for caption in source.captions:
        extension, dot, path = caption.partition(".")
        if dot:
            values.append((path, field(fields, path)))
            continue
        data = _sidecar(file, tar_item, extension, 4 * source.max_caption)
        if isinstance(data, Rejection):
            return Rejection(Cause.BAD_CAPTION, f".{extension}: {data.cause}")
        values.append((extension, data))
    return words.captions(values, source.max_caption)


def _sidecar(file: BinaryIO, tar_item: tars.TarItem, extension: str, limit: int) -> bytes | Rejection | None:
    """The member with this extension: of photo.v2.jpg, photo.v2.txt or else photo.txt."""
    for name in (tar_item.prefix + extension, extension):
        if name in tar_item.sample.members:
            return tars.content(file, tar_item.sample, name, limit)
    return None


def _metadata(source: WebDataset, file: BinaryIO, tar_item: tars.TarItem) -> dict[str, Any] | Rejection:
    """The JSON beside the image; empty if there is none or no setting names a field of it."""
    if source.json_extension not in source.sidecars():
        return {}
    data = _sidecar(file, tar_item, source.json_extension, MOST_JSON)
    if data is None:
        return {}
    if isinstance(data, Rejection):
        return Rejection(Cause.BAD_METADATA, f".{source.json_extension}: {data.cause}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return Rejection(Cause.BAD_METADATA, f".{source.json_extension}: {type(error).__name__}")
    if not isinstance(value, dict):
        return Rejection(Cause.BAD_METADATA, f".{source.json_extension}: {type(value).__name__}, not an object")
    return value


def _typed(value: Any, kind: Kept) -> Any:
    """A field of the JSON as a value of its column's type; None if it is of another type."""
    if kind == "bool":
        return value if isinstance(value, bool) else None
    if kind == "text":
        return words.kept(value) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind == "int":
        return value if isinstance(value, int) and -(2**63) <= value < 2**63 else None
    return float(value) if abs(value) < 1e308 or isinstance(value, float) else None
