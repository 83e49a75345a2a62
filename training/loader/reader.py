"""Reads rows of a selection as images and captions."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from training.diffusion.draws import chosen
from training.loader.cache import Tars
from training.loader.selection import Sample, Selection


class Unreadable(ValueError):
    """Bytes that are no image of their size, although they are those that the shard was written with."""


class Reader:
    def __init__(self, selection: Selection, tars: Tars) -> None:
        self.selection, self.tars = selection, tars

    def image(self, sample: Sample, out_HWC: np.ndarray) -> None:
        """Decode a sample's image into an array of its size; Unreadable if it cannot be."""
        data = self.tars.read(sample.tar, sample.offset, sample.length)
        try:
            _decode(data, out_HWC)
        except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise Unreadable(f"the image {sample.key} of {sample.tar} cannot be decoded ({error})") from None

    def caption(self, row: int, choice: float) -> str:
        """The one of the row's captions that a choice in [0, 1) falls on, by weight."""
        texts, weights = self.selection.captions(row)
        return texts[chosen(choice, weights)]

    def settle(self) -> None:
        self.tars.settle()

    def close(self) -> None:
        self.tars.close()


def _decode(data: bytes, out_HWC: np.ndarray) -> None:
    """An image of a shard, which `prepare` has written as JPEG, PNG or WebP, upright and of its final size."""
    height, width, _ = out_HWC.shape
    if data.startswith(b"\xff\xd8"):
        import simplejpeg  # where no image is a JPEG, training needs no JPEG library

        size = simplejpeg.decode_jpeg_header(data)[:2]
        if size == (height, width):
            simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out_HWC)
    else:
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as image:
            size = (image.height, image.width)
            if size == (height, width):
                out_HWC[:] = np.asarray(image.convert("RGB"))
    if size != (height, width):
        raise ValueError(f"it is {size[1]} x {size[0]} and not {width} x {height}")
