"""JPEG: what stands beside the pixels, whether all scans are there, and the pixels if nothing in them is damaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from data_prep.rejections import Cause, Refused

# What no camera or program writes, and what only costs time: a progressive scan goes over all of a picture, however few
# its bytes are, and no library stops at any number of scans.
MAX_SCANS = 100
MAX_SEGMENTS = 4096

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_READ = frozenset({0xC0, 0xC1, 0xC2})  # Huffman codes, baseline to progressive
_PIXELS = _FRAMES | {0xC4, 0xCC, 0xDA, 0xDB, 0xDD}  # segments without which the pixels cannot be told

_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_UNSEEN = 16  # bits of a coefficient of which no scan has told anything, as no coefficient has more


class Segment(NamedTuple):
    """Where a marker, the body behind its length, and the body's end are."""

    marker: int
    at: int
    body: int
    end: int


class Beside(NamedTuple):
    exif: bytes
    profile: bytes | None


# Stuffed zeros and restarts are part of a scan; the decoder skips both between segments, too.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")


def segments(data: bytes) -> Iterator[Segment]:
    """Each segment up to the end of the picture, which is the last. Damage is for the decoder to find."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            return
        marker, at = found[1][0], found.end()
        if marker == _END:
            yield Segment(marker, found.start(), at, at)
            return
        end = at + int.from_bytes(data[at : at + 2], "big")
        yield Segment(marker, found.start(), at + 2, end)
        at = max(end, at + 2)
    raise Refused(Cause.CORRUPT, f"JPEG of more than {MAX_SEGMENTS} segments")


def read(data: bytes) -> Beside:
    """EXIF and the ICC profile; refused are other than 8 bits, too many scans, and scans that are not all there."""
    exif: bytes | None = None
    parts: list[bytes] = []
    components, scans, progressive = 0, 0, False
    unsent: dict[int, list[int]] = {}  # by component: bits of each coefficient that no scan has brought
    for marker, _, start, end in segments(data):
        body = data[start:end]
        if marker == 0xE1 and exif is None and body.startswith(b"Exif\0\0"):
            exif = body
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            parts.append(body)
        elif marker in _FRAMES and len(body) > 5:
            if body[0] != 8:
                raise Refused(Cause.UNSUPPORTED, f"JPEG of {body[0]} bits a sample")
            components, progressive = body[5], marker in _PROGRESSIVE
            unsent = {number: [_UNSEEN] * 64 for number in body[6 : 6 + 3 * components : 3]}
        elif marker == _SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise Refused(Cause.CORRUPT, f"JPEG of more than {MAX_SCANS} scans")
            if not progressive and body[:1] == bytes([components]):
                unsent.clear()
                break  # all there is in one scan, and the decoder accepts no other
            _note(body, unsent, progressive)
    if any(map(any, unsent.values())):
        raise Refused(Cause.TRUNCATED, "JPEG without its last scans")
    parts.sort()
    whole = bool(parts) and parts[0][13] == len(parts)
    return Beside(exif or b"", b"".join(part[14:] for part in parts) if whole else None)


def _note(scan: bytes, unsent: dict[int, list[int]], progressive: bool) -> None:
    count = scan[0] if scan else 0
    if len(scan) < 4 + 2 * count:
        return
    first, last, bits = scan[1 + 2 * count : 4 + 2 * count]
    if not progressive:
        first, last, bits = 0, 63, 0
    for number in scan[1 : 1 + 2 * count : 2]:
        if number in unsent and first <= last < 64:
            unsent[number][first : last + 1] = [bits & 15] * (last + 1 - first)


def pixels(data: bytes, colours: str) -> npt.NDArray[np.uint8]:
    """The decoder is strict, which refuses a file for any warning; one that is not of the pixels says nothing."""
    try:
        found: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours)
    except ValueError:
        found = simplejpeg.decode_jpeg(bare(data), colours)
    return found


def bare(data: bytes) -> bytes:
    """The file without anything that a decoder may warn of and that says nothing against the pixels.

    What stands between two segments goes, with all that only describes the picture; an end that is not there is added.
    What is left is decoded to the same pixels, and a warning is about them.
    """
    parts: list[bytes | memoryview] = [b"\xff\xd8"]
    found, view = list(segments(data)), memoryview(data)
    progressive = any(segment.marker in _PROGRESSIVE for segment in found)
    for place, (marker, at, start, end) in enumerate(found):
        if marker == 0xE0 and data[start : start + 5] == b"JFIF\0":
            parts.append(_JFIF)  # of whatever version
        elif marker == 0xEE and data[start : start + 5] == b"Adobe":
            parts.append(view[at:end])
        elif marker == _SCAN:
            after = found[place + 1].at if place + 1 < len(found) else len(data)
            # The last three bytes of a scan's head mean nothing unless it is progressive, and some write nonsense.
            parts += [view[at:end]] if progressive else [view[at : max(end - 3, at)], b"\0\x3f\0"]
            parts.append(view[end:after])
        elif marker in _PIXELS:
            parts.append(view[at:end])
    if not found or found[-1].marker != _END:
        while parts[-1][-1:] == b"\xff":  # the first half of the end that was cut off
            parts[-1] = parts[-1][:-1]
    return b"".join([*parts, b"\xff\xd9"])


def damage(data: bytes, error: BaseException) -> Refused:
    """Why the decoder did not read it."""
    markers = {segment.marker for segment in segments(data)}
    if _END not in markers:
        return Refused(Cause.TRUNCATED, "JPEG that ends before its picture does")
    frames = markers & _FRAMES
    if frames and not frames & _READ:
        return Refused(Cause.UNSUPPORTED, "JPEG with another coding than Huffman's, or lossless")
    if "subsampling" in str(error):
        return Refused(Cause.UNSUPPORTED, "JPEG of unusual sampling")
    return Refused(Cause.CORRUPT, "JPEG with damage in its picture")
