"""Tars looked at: which members are the pictures, and what stands beside them says what is in them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from data_prep.rejections import Rejection
from data_prep.sources import tars
from data_prep.sources.tarwalk import Broken
from data_prep.survey.columns import captions_of, texts_of
from data_prep.survey.place import Place
from data_prep.survey.seen import ENOUGH, PICTURES, Seen, first
from data_prep.survey.tables import Wanted
from infra.errors import DataError

SAMPLES = 64
TEXTS = ("txt", "caption", "text", "prompt", "json")
_MOST_TEXT = 1 << 20


def seen_in(place: Place, wanted: Wanted) -> list[Seen]:
    names = place.tars
    with place.folder.open(names[0]) as file:
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
            tars.content(file, sample, picture.extension, place.names[names[0]])
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
    each = max(1, round(place.names[names[0]] * len(samples) / max(1, _reach(samples, place.names[names[0]]))))
    needed = min(len(names), max(1, -(-ENOUGH // each)))
    source: dict[str, Any] = {"kind": "webdataset", "url": place.url, "tars": names[:needed], "captions": chosen}
    if needed < len(names):
        remarks["tars"] = f"{needed} of {len(names):,}, enough for a first model; all of them: ['**/*.tar']"
    elif len(names) > 1:
        folders = {name.rpartition("/")[0] for name in names}
        source["tars"] = [f"{folder}/*.tar".removeprefix("/") for folder in sorted(folders)]
    kinds = Counter(picture.extension for picture in pictures if not isinstance(picture.found, Rejection))
    remarks["kind"] = f"pictures as .{kinds.most_common(1)[0][0]}"
    said = [text for row in rows for column in chosen for text in texts_of(row.get(column))]
    return [Seen(source, said, needed * each, False, images, remarks=remarks)]


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
