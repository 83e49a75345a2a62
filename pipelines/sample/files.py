"""PNGs that say how they were made: the facts stand in a text chunk of the file, as JSON under the key `pixnerd`."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from infra.errors import DataError
from infra.files import appearing

KEY = "pixnerd"


def version() -> str:
    return importlib.metadata.version("pixnerd")


def save(path: Path, image: Image.Image, words: str, facts: Mapping[str, Any], *, level: int = 6) -> None:
    """There whole or not at all; the same pixels and facts give the same bytes. `words` are for other programs."""
    chunks = PngInfo()
    chunks.add_itxt("Description", words)
    chunks.add_itxt("Software", f"pixnerd {version()}")
    chunks.add_itxt(KEY, json.dumps(facts, ensure_ascii=False))
    with written_whole(path) as unfinished:
        image.save(unfinished, "PNG", pnginfo=chunks, compress_level=level)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write into, which takes its name only when all of it is there; its folder is made if need be."""
    try:
        path.parent.mkdir(exist_ok=True)
        with appearing(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror or error})",
            remedy="make room there: the same command goes on from here",
        ) from None


def facts_of(path: Path) -> dict[str, Any] | None:
    """What `save` wrote into a PNG; None for any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            facts = json.loads(image.info[KEY])  # it stands before the pixels, which are not read
    except (OSError, SyntaxError, KeyError, ValueError, Image.DecompressionBombError):
        return None
    return facts if isinstance(facts, dict) else None
