"""Surveys tars in WebDataset's format: which members are pictures, and which text beside them is the caption."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from data_prep.rejections import Rejection
from data_prep.sources import tars, unpacked
from data_prep.sources.packed import Unpacked
from data_prep.sources.tarwalk import Broken
from data_prep.survey.candidates import PICTURES, Candidate, files_needed, first
from data_prep.survey.columns import captions_of, texts_in
from data_prep.survey.place import TARS, Place
from data_prep.survey.tables import Wanted
from infra.errors import DataError

SAMPLES = 64
TEXTS = ("txt", "caption", "text", "prompt", "json")
_MOST_TEXT = 1 << 20
_UNPACKED = 64 << 20  # bytes of a compressed tar that are unpacked for the survey


def candidates_in(place: Place, wanted: Wanted) -> list[Candidate]:
    names = place.tars
    packed = bool(unpacked.packing(place.folder, names[0]))
    with _opened(place, names[0]) as (file, size):
        members = first(tars.samples(file, tars.IMAGE_EXTENSIONS, TEXTS, range(1 << 62)), SAMPLES)
        if members and isinstance(members[0], Broken):
            why = members[0].why
            raise DataError(f"{names[0]} cannot be read ({why.cause}: {why.detail})", remedy="write it again")
        samples = [sample for sample in members if isinstance(sample, tars.Sample)]
        pictures = [picture for sample in samples for picture in tars.pictures(sample, tars.IMAGE_EXTENSIONS)]
        if all(isinstance(picture.member, Rejection) for picture in pictures):
            raise DataError(f"{names[0]} holds no pictures", remedy="name tars with .jpg, .png or .webp members")
        images = [
            tars.content(file, sample, picture.extension, size)
            for sample in samples[:PICTURES]
            for picture in tars.pictures(sample, tars.IMAGE_EXTENSIONS)
            if not isinstance(picture.member, Rejection)
        ]
        rows = [_texts(file, sample) for sample in samples]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    texts = captions_of(rows, columns)
    chosen = list(wanted.captions) or texts.chosen
    if not chosen:
        texts_there = f"beside them: {', '.join(columns)}" if columns else f"no .{', no .'.join(TEXTS)} is there"
        raise DataError(
            f"nothing beside the pictures of {names[0]} looks like captions ({texts_there})",
            remedy="name it: --captions txt, or --captions json.FIELD",
        )
    remarks = {"captions": f"other texts: {', '.join(texts.others)}"} if texts.others else {}
    sampled_bytes = size if len(samples) < SAMPLES else samples[-1].first
    rows_per_tar = max(1, round(size * len(samples) / max(1, sampled_bytes)))
    needed = files_needed(len(names), rows_per_tar)
    source: dict[str, Any] = {"kind": "webdataset", "url": place.url, "tars": names[:needed], "captions": chosen}
    if packed:
        source["unpack"] = True
        remarks["unpack"] = "the tars are packed: they are unpacked into the store, once"
    ends = sorted({next(end for end in TARS if name.lower().endswith(end)) for name in names})
    if needed < len(names):
        everything = [f"**/*{end}" for end in ends]
        remarks["tars"] = f"{needed} of {len(names):,}, enough for a first model; all of them: {everything}"
    elif len(names) > 1:
        folders = {(name.rpartition("/")[0], end) for name in names for end in ends if name.lower().endswith(end)}
        source["tars"] = [f"{folder}/*{end}".removeprefix("/") for folder, end in sorted(folders)]
    kinds = Counter(picture.extension for picture in pictures if not isinstance(picture.member, Rejection))
    remarks["kind"] = f"pictures as .{kinds.most_common(1)[0][0]}"
    return [Candidate(source, texts_in(rows, *chosen), needed * rows_per_tar, False, images, remarks=remarks)]


@contextmanager
def _opened(place: Place, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A tar and its size; of a compressed one, its first unpacked bytes and an estimate of its unpacked size."""
    size = place.names[name]
    with place.folder.open(name) as file:
        packing = unpacked.packing(place.folder, name)
        if not packing:
            yield file, size
            return
        stream = Unpacked(file, packing, name)
        with tempfile.TemporaryFile() as head:
            while head.tell() < _UNPACKED and (data := stream.read(1 << 20)):
                head.write(data)
            yield head, round(size * stream.times)


def _texts(file: Any, sample: tars.Sample) -> dict[str, Any]:
    """The texts beside a picture by their extension, such as `txt`; the fields of a JSON file as `json.name`."""
    texts: dict[str, Any] = {}
    for extension in TEXTS:
        if extension not in sample.members:
            continue
        data = tars.content(file, sample, extension, _MOST_TEXT)
        if isinstance(data, Rejection):
            continue
        if extension != "json":
            texts[extension] = data
            continue
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            continue
        for name, inner in value.items() if isinstance(value, dict) else ():
            if isinstance(inner, dict):
                texts |= {f"json.{name}.{key}": deeper for key, deeper in inner.items()}
            else:
                texts[f"json.{name}"] = inner
    return texts
