"""JPEG: metadata, whether all scans are complete, and the pixels if they are not damaged."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from data_prep.rejections import Cause, Refused

# More than any camera or program writes. Without a limit a small file could take hours: each progressive scan, however
# few its bytes, passes over the whole picture, and no library limits their number.
MAX_SCANS = 100
MAX_SEGMENTS = 4096

_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_READ = frozenset({0xC0, 0xC1, 0xC2})  # Huffman codes, baseline to progressive
_PIXELS = _FRAMES | {0xC4, 0xCC, 0xDA, 0xDB, 0xDD}  # segments that are needed to decode the pixels

_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_UNSENT = 16  # bits of a coefficient before any scan; none has more


class Segment(NamedTuple):
    """A marker with its offset, and the offsets at which its body begins and ends, without the length before it."""

    marker: int
    at: int
    body: int
    end: int


class Metadata(NamedTuple):
    exif: bytes
    profile: bytes | None


# Stuffed zeros and restart markers are part of a scan; between segments the decoder skips both, too.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")


def segments(data: bytes) -> Iterator[Segment]:
    """Each segment up to the end marker, which is the last. Damage is left for the decoder to find."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        match = _MARKER.search(data, at)
        if match is None:
            return
        marker, at = match[1][0], match.end()
        if marker == _END:
            yield Segment(marker, match.start(), at, at)
            return
        end = at + int.from_bytes(data[at : at + 2], "big")
        yield Segment(marker, match.start(), at + 2, end)
        at = max(end, at + 2)
    raise Refused(Cause.CORRUPT, f"JPEG of more than {MAX_SEGMENTS} segments")


def read(data: bytes) -> Metadata:
    """EXIF and the ICC profile. A file that is not of 8 bits, or has too many or too few scans, is refused."""
    exif: bytes | None = None
    profile: list[bytes] = []  # segments, with their numbers
    components, scans, progressive = 0, 0, False
    unsent: dict[int, list[int]] = {}  # by component: the bits of each coefficient that no scan has sent yet
    for marker, _, start, end in segments(data):
        body = data[start:end]
        if marker == 0xE1 and exif is None and body.startswith(b"Exif\0\0"):
            exif = body
        elif marker == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
            profile.append(body)
        elif marker in _FRAMES and len(body) > 5:
            if body[0] != 8:
                raise Refused(Cause.UNSUPPORTED, f"JPEG of {body[0]} bits a sample")
            components, progressive = body[5], marker in _PROGRESSIVE
            unsent = {number: [_UNSENT] * 64 for number in body[6 : 6 + 3 * components : 3]}
        elif marker == _SCAN:
            scans += 1
            if scans > MAX_SCANS:
                raise Refused(Cause.CORRUPT, f"JPEG of more than {MAX_SCANS} scans")
            if not progressive and body[:1] == bytes([components]):
                unsent.clear()
                break  # one scan has everything, and the decoder accepts no other
            _note_sent(body, unsent, progressive)
    if any(map(any, unsent.values())):
        raise Refused(Cause.TRUNCATED, "JPEG without its last scans")
    profile.sort()
    is_whole = bool(profile) and profile[0][13] == len(profile)
    return Metadata(exif or b"", b"".join(segment[14:] for segment in profile) if is_whole else None)


def _note_sent(scan: bytes, unsent: dict[int, list[int]], progressive: bool) -> None:
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
    """The decoded pixels. The strict decoder fails on any warning, so it is tried again without metadata."""
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, colours))
    except ValueError:
        return np.asarray(simplejpeg.decode_jpeg(bare(data), colours))


def bare(data: bytes) -> bytes:
    """The file without anything that a decoder may warn of though it does not matter to the pixels.

    Metadata and bytes between segments are dropped, and a missing end marker is added. The result decodes to the same
    pixels, and a warning about it is about them.
    """
    parts: list[bytes | memoryview] = [b"\xff\xd8"]
    all_segments, view = list(segments(data)), memoryview(data)
    progressive = any(segment.marker in _PROGRESSIVE for segment in all_segments)
    for number, (marker, at, start, end) in enumerate(all_segments, 1):
        if marker == 0xE0 and data[start : start + 5] == b"JFIF\0":
            parts.append(_JFIF)  # of whatever version
        elif marker == 0xEE and data[start : start + 5] == b"Adobe":
            parts.append(view[at:end])
        elif marker == _SCAN:
            after = all_segments[number].at if number < len(all_segments) else len(data)
            # The last three bytes of a scan's header matter only if it is progressive; some writers put nonsense there.
            parts += [view[at:end]] if progressive else [view[at : max(end - 3, at)], b"\0\x3f\0"]
            parts.append(view[end:after])
        elif marker in _PIXELS:
            parts.append(view[at:end])
    if not all_segments or all_segments[-1].marker != _END:
        while parts[-1][-1:] == b"\xff":  # the first half of an end marker that was cut off
            parts[-1] = parts[-1][:-1]
    return b"".join([*parts, b"\xff\xd9"])


def damage(data: bytes, error: BaseException) -> Refused:
    """Why the decoder failed on it."""
    markers = {segment.marker for segment in segments(data)}
    if _END not in markers:
        return Refused(Cause.TRUNCATED, "JPEG that ends before its picture does")
    frames = markers & _FRAMES
    if frames and not frames & _READ:
        return Refused(Cause.UNSUPPORTED, "JPEG with another coding than Huffman's, or lossless")
    if "subsampling" in str(error):
        return Refused(Cause.UNSUPPORTED, "JPEG of unusual sampling")
    return Refused(Cause.CORRUPT, "JPEG with damage in its picture")
