"""Tars looked at: which members are the pictures, and what stands beside them says what is in them."""

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
from data_prep.survey.columns import captions_of, texts_of
from data_prep.survey.place import TARS, Place
from data_prep.survey.seen import ENOUGH, PICTURES, Seen, first
from data_prep.survey.tables import Wanted
from infra.errors import DataError

SAMPLES = 64
TEXTS = ("txt", "caption", "text", "prompt", "json")
_MOST_TEXT = 1 << 20
_UNPACKED = 64 << 20  # bytes of a packed tar that are unpacked to be looked at


def seen_in(place: Place, wanted: Wanted) -> list[Seen]:
    names = place.tars
    packed = bool(unpacked.packing(place.folder, names[0]))
    with _opened(place, names[0]) as (file, size):
        found = first(tars.samples(file, tars.IMAGE_EXTENSIONS, TEXTS, range(1 << 62)), SAMPLES)
        for broken in found[:1]:
            if isinstance(broken, Broken):
                why = broken.why
                raise DataError(f"{names[0]} cannot be read ({why.cause}: {why.detail})", remedy="write it again")
        samples = [sample for sample in found if isinstance(sample, tars.Sample)]
        pictures = [picture for sample in samples for picture in tars.pictures(sample, tars.IMAGE_EXTENSIONS)]
        if not any(not isinstance(picture.found, Rejection) for picture in pictures):
            raise DataError(f"{names[0]} holds no pictures", remedy="name tars with .jpg, .png or .webp members")
        images = [
            tars.content(file, sample, picture.extension, size)
            for sample in samples[:PICTURES]
            for picture in tars.pictures(sample, tars.IMAGE_EXTENSIONS)
            if not isinstance(picture.found, Rejection)
        ]
        rows = [_words(file, sample) for sample in samples]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    texts = captions_of(rows, columns)
    chosen = list(wanted.captions) or texts.chosen
    if not chosen:
        there = f"beside them: {', '.join(columns)}" if columns else f"no .{', no .'.join(TEXTS)} is there"
        raise DataError(
            f"nothing beside the pictures of {names[0]} looks like captions ({there})",
            remedy="name it: --captions txt, or --captions json.FIELD",
        )
    remarks = {"captions": f"other texts: {', '.join(texts.others)}"} if texts.others else {}
    each = max(1, round(size * len(samples) / max(1, _reach(samples, size))))
    needed = min(len(names), max(1, -(-ENOUGH // each)))
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
    kinds = Counter(picture.extension for picture in pictures if not isinstance(picture.found, Rejection))
    remarks["kind"] = f"pictures as .{kinds.most_common(1)[0][0]}"
    said = [text for row in rows for column in chosen for text in texts_of(row.get(column))]
    return [Seen(source, said, needed * each, False, images, remarks=remarks)]


@contextmanager
def _opened(place: Place, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """A tar and its size; of a packed one its beginning, and what its size will be, as far as that tells."""
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


def _reach(samples: list[tars.Sample], size: int) -> int:
    """The bytes of the tar that hold these samples."""
    return size if len(samples) < SAMPLES else samples[-1].first


def _words(file: Any, sample: tars.Sample) -> dict[str, Any]:
    """What stands beside a picture: texts by their extension, and the fields of a JSON as `json.name`."""
    found: dict[str, Any] = {}
    for extension in TEXTS:
        if extension not in sample.members:
            continue
        data = tars.content(file, sample, extension, _MOST_TEXT)
        if isinstance(data, Rejection):
            continue
        if extension != "json":
            found[extension] = data
            continue
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            continue
        for name, inner in value.items() if isinstance(value, dict) else ():
            if isinstance(inner, dict):
                found |= {f"json.{name}.{key}": deeper for key, deeper in inner.items()}
            else:
                found[f"json.{name}"] = inner
    return found
