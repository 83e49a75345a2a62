"""Folders of pictures looked at: with their captions in texts beside them, or in folders that are their classes."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from data_prep.sources import words
from data_prep.survey.place import Place
from data_prep.survey.seen import PICTURES, Seen, spread
from data_prep.survey.tables import MOST_BYTES, Wanted
from infra.errors import DataError

LOOKED = 200  # pictures for whose captions the folder is searched
_SUFFIXES = (".txt", ".caption", ".text", ".prompt")
_NO_CLASSES = {"images", "image", "img", "imgs", "train", "training", "val", "valid", "validation", "test", "data"}


def seen_in(place: Place, wanted: Wanted) -> list[Seen]:
    pictures = place.pictures
    some = spread(pictures, LOOKED)
    images = [place.folder.read(name, MOST_BYTES) for name in spread(pictures, PICTURES)]
    if wanted.kind != "imagenet" and (beside := _texts_beside(place, some)):
        suffix, captions = beside
        source = {"kind": "text_folder", "url": place.url}
        if suffix != ".txt":
            source["caption_suffix"] = suffix
        without = len(some) - len(captions)
        warnings = [f"{without} of {len(some)} pictures have no {suffix} beside them: they are refused"]
        remarks = {"kind": f"a caption in a {suffix} file beside each picture"}
        return [
            Seen(
                source, captions, len(pictures), place.whole, images, remarks=remarks, warnings=warnings * bool(without)
            )
        ]
    classes = Counter(name.partition("/")[0] for name in pictures if "/" in name)
    named = [name for name in classes if name.lower() not in _NO_CLASSES]
    if wanted.kind != "text_folder" and len(named) > 1 and len(named) == len(classes):
        source = {"kind": "imagenet", "url": place.url, "template": "a photo of a {name}"}
        remarks = {"template": "the name is that of the folder; write captions beside the pictures for more than that"}
        captions = [f"a photo of a {name.partition('/')[0]}" for name in some]
        said = f"no captions: they are made of the names of {len(named)} folders ({', '.join(named[:3])}, ...)"
        return [Seen(source, captions, len(pictures), place.whole, images, remarks=remarks, warnings=[said])]
    return []


def _texts_beside(place: Place, pictures: list[str]) -> tuple[str, list[str]] | None:
    """The suffix that most pictures have a text of beside them, and those texts."""
    best: tuple[str, list[str]] | None = None
    for suffix in _SUFFIXES:
        said = []
        for name in pictures:
            path = PurePosixPath(name)
            there = [str(path.with_suffix(s)) for s in (suffix, suffix.upper())]
            there = [text for text in there if not place.whole or text in place.names]
            data = place.folder.read(there[0], 1 << 20) if there else b""
            text = words.text(data) if isinstance(data, bytes) else None
            if text and text.strip():
                said.append(text.strip())
        if said and (best is None or len(said) > len(best[1])):
            best = suffix, said
    return best


def without_captions(place: Place) -> DataError:
    picture = PurePosixPath(place.pictures[0])
    return DataError(
        f"the {len(place.pictures):,} pictures of {place.given} have no captions, and a text-to-image model learns "
        "from those",
        remedy=f"write what {picture.name} shows into {picture.with_suffix('.txt').name} beside it, or write a table "
        f'metadata.jsonl with a line such as {{"file_name": "{picture}", "text": "..."}} for each',
    )
