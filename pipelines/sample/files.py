"""PNGs that say how they were made: the facts are JSON in a text chunk of the file, under the key `pixnerd`."""

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


def save(path: Path, image: Image.Image, description: str, facts: Mapping[str, Any], *, level: int = 6) -> None:
    """Write the PNG whole or not at all; the same pixels and facts give the same bytes.

    `description` is shown by other programs. `level` is that of the compression.
    """
    chunks = PngInfo()
    chunks.add_itxt("Description", description)
    chunks.add_itxt("Software", f"pixnerd {version()}")
    chunks.add_itxt(KEY, json.dumps(facts, ensure_ascii=False))
    with written_whole(path) as unfinished:
        image.save(unfinished, "PNG", pnginfo=chunks, compress_level=level)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file that is renamed to `path` when all of it is written; its folder is made if it is missing."""
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
            facts = json.loads(image.info[KEY])  # it precedes the pixels, which are not read
    except (OSError, SyntaxError, KeyError, ValueError, Image.DecompressionBombError):
        return None
    return facts if isinstance(facts, dict) else None
