"""Surveys a folder of pictures, whose captions are text files beside them or the names of their folders (classes)."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from data_prep.sources import words
from data_prep.survey.candidates import PICTURES, Candidate, spread
from data_prep.survey.place import Place
from data_prep.survey.tables import MOST_BYTES, Wanted
from infra.errors import DataError

SAMPLED = 200  # pictures whose captions are looked for
_SUFFIXES = (".txt", ".caption", ".text", ".prompt")
_NO_CLASSES = {"images", "image", "img", "imgs", "train", "training", "val", "valid", "validation", "test", "data"}


def candidates_in(place: Place, wanted: Wanted) -> list[Candidate]:
    pictures = place.pictures
    sample = spread(pictures, SAMPLED)
    images = [place.folder.read(name, MOST_BYTES) for name in spread(pictures, PICTURES)]
    if wanted.kind != "imagenet" and (text_files := _text_files(place, sample)):
        suffix, captions = text_files
        source = {"kind": "text_folder", "url": place.url}
        if suffix != ".txt":
            source["caption_suffix"] = suffix
        missing = len(sample) - len(captions)
        warning = f"{missing} of {len(sample)} pictures have no {suffix} beside them: they are refused"
        remarks = {"kind": f"a caption in a {suffix} file beside each picture"}
        warnings = [warning] if missing else []
        return [Candidate(source, captions, len(pictures), place.whole, images, remarks=remarks, warnings=warnings)]
    classes = Counter(name.partition("/")[0] for name in pictures if "/" in name)
    named = [name for name in classes if name.lower() not in _NO_CLASSES]
    if wanted.kind != "text_folder" and len(named) > 1 and len(named) == len(classes):
        source = {"kind": "imagenet", "url": place.url, "template": "a photo of a {name}"}
        remarks = {"template": "the name is that of the folder; write captions beside the pictures for more than that"}
        captions = [f"a photo of a {name.partition('/')[0]}" for name in sample]
        warning = f"no captions: they are made of the names of {len(named)} folders ({', '.join(named[:3])}, ...)"
        return [Candidate(source, captions, len(pictures), place.whole, images, remarks=remarks, warnings=[warning])]
    return []


def _text_files(place: Place, pictures: list[str]) -> tuple[str, list[str]] | None:
    """The suffix of text files that most of the pictures have beside them, and the captions in those files."""
    best: tuple[str, list[str]] | None = None
    for suffix in _SUFFIXES:
        captions = []
        for name in pictures:
            paths = [str(PurePosixPath(name).with_suffix(s)) for s in (suffix, suffix.upper())]
            paths = [path for path in paths if not place.whole or path in place.names]
            data = place.folder.read(paths[0], 1 << 20) if paths else b""
            text = words.text(data) if isinstance(data, bytes) else None
            if text and text.strip():
                captions.append(text.strip())
        if captions and (best is None or len(captions) > len(best[1])):
            best = suffix, captions
    return best


def without_captions(place: Place) -> DataError:
    picture = PurePosixPath(place.pictures[0])
    return DataError(
        f"the {len(place.pictures):,} pictures of {place.path} have no captions, and a text-to-image model learns "
        "from those",
        remedy=f"write what {picture.name} shows into {picture.with_suffix('.txt').name} beside it, or write a table "
        f'metadata.jsonl with a line such as {{"file_name": "{picture}", "text": "..."}} for each',
    )
