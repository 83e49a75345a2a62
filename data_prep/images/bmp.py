"""BMP of 16 or 32 bits a pixel, whose header says by masks where each colour lies, and alpha."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.rejections import Cause, Refused

_PLAIN, _BITFIELDS, _ALPHA_BITFIELDS = 0, 3, 6
_HEADERS = (40, 52, 56, 64, 108, 124)
_OTHER_HEADER = 16  # of OS/2
_WITH_ALPHA = 56  # bytes of the first header that has a mask for it
_STRIP = 1 << 18  # pixels at a time

_Levels = npt.NDArray[np.uint8]


class Masked(NamedTuple):
    """What the header says of a picture with masks."""

    width: int
    height: int
    from_top: bool
    bits: int
    masks: tuple[int, int, int, int]  # red, green, blue, alpha
    at: int  # of the pixels


def masked(data: bytes) -> Masked | None:
    """None where no masks count, as in most."""
    size = int.from_bytes(data[14:18], "little")
    if len(data) < 54 or size < 40:
        return None
    width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    # Masks lie in the longer headers, and behind the shorter ones if the pixels are packed by them.
    places = 4 if size >= _WITH_ALPHA or packing == _ALPHA_BITFIELDS else 3
    masks = struct.unpack_from(f"<{places}I", data.ljust(70, b"\0"), 54)
    alpha = masks[3] if places == 4 else 0
    if size not in _HEADERS or bits not in (16, 32):
        return None
    if packing == _PLAIN and size >= _WITH_ALPHA and alpha and bits == 32:
        masks = (0xFF0000, 0xFF00, 0xFF)  # those of the header do not count, but for alpha's
    elif packing not in (_BITFIELDS, _ALPHA_BITFIELDS):
        return None
    if not any(masks[:3]) or any(mask >> bits for mask in (*masks[:3], alpha)):
        raise Refused(Cause.CORRUPT, "BMP with masks beyond its bits")
    at = int.from_bytes(data[10:14], "little")
    return Masked(width, abs(height), height < 0, bits, (*masks[:3], alpha), at)


def unsupported(data: bytes) -> bool:
    """Whether its header is that of a kind which nobody here reads."""
    size, bits, packing = struct.unpack_from("<I10xHI", data.ljust(34, b"\0"), 14)
    return size == _OTHER_HEADER or (size in _HEADERS and (bits == 2 or packing in (4, 5)))


def pixels(data: bytes, found: Masked, matte: tuple[int, int, int]) -> _Levels:
    """Its colours on the matte. Where alpha is zero all over, its writer knew of none."""
    row = (found.width * found.bits + 31) // 32 * 4
    if found.at + row * found.height > len(data):
        raise Refused(Cause.TRUNCATED, "BMP that ends early")
    stored = np.frombuffer(data, np.uint8, row * found.height, found.at).reshape(found.height, row)
    words = stored.view("<u2" if found.bits == 16 else "<u4")[:, : found.width]
    words = words if found.from_top else words[::-1]
    alpha = found.masks[3] if np.any(words & np.array(found.masks[3], words.dtype)) else 0
    out = np.empty((found.height, found.width, 3), np.uint8)
    for rows in _strips(found.height, found.width):
        level_of = _reader(words[rows])
        colours = np.stack([level_of(mask) for mask in found.masks[:3]], -1)
        out[rows] = _laid(colours, level_of(alpha), matte) if alpha else colours
    return out


def _strips(height: int, width: int) -> Iterator[slice]:
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield slice(top, top + rows)


def _reader(words: npt.NDArray[np.unsignedinteger]) -> Callable[[int], _Levels]:
    wide = words.astype(np.uint64)

    def level_of(mask: int) -> _Levels:
        if not mask:
            return np.zeros(words.shape, np.uint8)
        shift = (mask & -mask).bit_length() - 1
        most = mask >> shift
        return np.asarray((((wide & mask) >> shift) * 255 + most // 2) // most).astype(np.uint8)

    return level_of


def _laid(colours: _Levels, alpha: _Levels, matte: tuple[int, int, int]) -> _Levels:
    share = alpha[..., None].astype(np.uint32)
    mixed = colours * share + np.array(matte, np.uint32) * (255 - share)
    return np.asarray((mixed + 127) // 255).astype(np.uint8)
