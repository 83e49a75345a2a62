"""A chunk's pictures: a tar of PNGs, <prompt>-<image>.png, by the numbers of the prompt and of its picture."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from infra.causes import first_line
from infra.records import DataObject, get_data
from infra.shards import TarWriter
from infra.store import Store
from pipelines.evaluation.chunks import Chunk, Made

PICTURES = "pictures"  # what a chunk calls the tar


def place(name: str) -> tuple[int, int]:
    """The number of the prompt and of its picture, by the picture's name."""
    prompt, _, image = name.partition("-")
    return int(prompt), int(image)


def png_of(pixels_HWC: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(pixels_HWC).save(content, "PNG")
    return content.getvalue()


def packed(pictures: Mapping[str, bytes], failed: dict[str, str]) -> Made:
    """A chunk's pictures, by the names of their files, as its tar."""
    content = io.BytesIO()
    tar = TarWriter(content)
    for name, data in pictures.items():
        tar.add(name, data)
    tar.finish()
    return Made({f"{PICTURES}.tar": content.getvalue()}, failed)


def tars(chunks: Iterable[Chunk]) -> list[DataObject]:
    return [chunk.data[PICTURES] for chunk in chunks if PICTURES in chunk.data]


def read_pictures(store: Store, tars: Sequence[DataObject]) -> dict[tuple[int, int], bytes]:
    """(number of the prompt, number of its image) -> the PNG."""
    pngs = {}
    for data in tars:
        with tarfile.open(fileobj=io.BytesIO(get_data(store, data))) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    pngs[place(Path(member.name).stem)] = file.read()
    return pngs


class ToJudge(NamedTuple):
    """A chunk's pictures, for makers that look at them."""

    tar: DataObject
    names: list[str]  # of all pictures that the chunk should have
    failed: dict[str, str]  # those of them that were not drawn

    @property
    def there(self) -> list[str]:
        return [name for name in self.names if name not in self.failed]

    def read(self, store: Store) -> Iterator[tuple[str, npt.NDArray[np.uint8] | str]]:
        """Each picture that should be there [H, W, 3], or why it cannot be read."""
        from PIL import Image, ImageOps

        pngs = read_pictures(store, [self.tar])
        for name in self.there:
            try:
                with Image.open(io.BytesIO(pngs[place(name)])) as picture:
                    yield name, np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
            except KeyError:
                yield name, "it is missing"
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                yield name, f"it cannot be read ({first_line(error)})"
