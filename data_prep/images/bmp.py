"""BMP of 16 or 32 bits a pixel whose header has a bit mask for each colour and for alpha."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_prep.rejections import Cause, Refused

_PLAIN, _BITFIELDS, _ALPHA_BITFIELDS = 0, 3, 6
_HEADERS = (40, 52, 56, 64, 108, 124)
_OS2_HEADER = 16  # bytes of OS/2's second header, in its short form
_WITH_ALPHA = 56  # bytes of the shortest header that has a mask for alpha
_STRIP = 1 << 18  # pixels at a time

_Levels = npt.NDArray[np.uint8]


class Masked(NamedTuple):
    """The header of a BMP with masks."""

    width: int
    height: int
    from_top: bool
    bits: int
    masks: tuple[int, int, int, int]  # red, green, blue, alpha
    at: int  # the offset of the pixels


def masked(data: bytes) -> Masked | None:
    """The header, if it has masks that count; None for all other BMPs, which Pillow reads."""
    size = int.from_bytes(data[14:18], "little")
    if len(data) < 54 or size < 40:
        return None
    width, height, _, bits, packing = struct.unpack_from("<iiHHI", data, 18)
    # The masks are in the longer headers and, if the pixels are packed by masks, behind the shorter ones.
    places = 4 if size >= _WITH_ALPHA or packing == _ALPHA_BITFIELDS else 3
    masks = struct.unpack_from(f"<{places}I", data.ljust(70, b"\0"), 54)
    alpha = masks[3] if places == 4 else 0
    if size not in _HEADERS or bits not in (16, 32):
        return None
    if packing == _PLAIN and size >= _WITH_ALPHA and alpha and bits == 32:
        masks = (0xFF0000, 0xFF00, 0xFF)  # of the header's masks only that of alpha counts
    elif packing not in (_BITFIELDS, _ALPHA_BITFIELDS):
        return None
    if not any(masks[:3]) or any(mask >> bits for mask in (*masks[:3], alpha)):
        raise Refused(Cause.CORRUPT, "BMP with masks beyond its bits")
    at = int.from_bytes(data[10:14], "little")
    return Masked(width, abs(height), height < 0, bits, (*masks[:3], alpha), at)


def unsupported(data: bytes) -> bool:
    """Whether its header is that of a kind of BMP that is not read."""
    size, bits, packing = struct.unpack_from("<I10xHI", data.ljust(34, b"\0"), 14)
    return size == _OS2_HEADER or (size in _HEADERS and (bits == 2 or packing in (4, 5)))


def pixels(data: bytes, header: Masked, matte: tuple[int, int, int]) -> _Levels:
    """The colours, blended with the matte. An alpha that is zero everywhere is taken for an unused field."""
    width, height, *_ = header
    stride = (width * header.bits + 31) // 32 * 4
    if header.at + stride * height > len(data):
        raise Refused(Cause.TRUNCATED, "BMP that ends early")
    stored = np.frombuffer(data, np.uint8, stride * height, header.at).reshape(height, stride)
    packed = stored.view("<u2" if header.bits == 16 else "<u4")[:, :width]
    packed = packed if header.from_top else packed[::-1]
    *colour_masks, alpha = header.masks
    has_alpha = np.any(packed & np.array(alpha, packed.dtype))
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        strip = packed[top : top + rows].astype(np.uint64)
        colours = np.stack([_levels(strip, mask) for mask in colour_masks], -1)
        out[top : top + rows] = _blended(colours, _levels(strip, alpha), matte) if has_alpha else colours
    return out


def _levels(packed: npt.NDArray[np.uint64], mask: int) -> _Levels:
    """The bits of a mask, scaled to 0 .. 255."""
    if not mask:
        return np.zeros(packed.shape, np.uint8)
    shift = (mask & -mask).bit_length() - 1
    most = mask >> shift
    return np.asarray((((packed & mask) >> shift) * 255 + most // 2) // most).astype(np.uint8)


def _blended(colours: _Levels, alpha: _Levels, matte: tuple[int, int, int]) -> _Levels:
    share = alpha[..., None].astype(np.uint32)
    mixed = colours * share + np.array(matte, np.uint32) * (255 - share)
    return np.asarray((mixed + 127) // 255).astype(np.uint8)
