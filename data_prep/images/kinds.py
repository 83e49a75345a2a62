"""The formats of files that are not read, and whether a file that could not be decoded is cut off.

A format is told by a file's first bytes and never by its name.
"""

from __future__ import annotations

import re

from data_prep.rejections import Cause, Rejection

# The first bytes of image formats that are not read.
_PICTURES: tuple[tuple[bytes, str], ...] = (
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc\1", "JPEG XR"),
    (b"8BPS", "PSD"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\2\0", "CUR"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"v/1\1", "OpenEXR"),
    (b"#?R", "Radiance HDR"),
    (b"farbfeld", "farbfeld"),
    (b"gimp xcf", "XCF"),
    (b"\x01\xda", "SGI"),
    (b"Y\xa6j\x95", "Sun raster"),
    (b"SIMPLE  =", "FITS"),
    (b"FUJIFILMCCD-RAW", "camera raw"),
    (b"IIU\0", "camera raw"),
)
_PNM = re.compile(rb"P[1-7FfPh]\s")

# The first bytes of other files that are often found in place of images.
_NO_PICTURES: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "packed with gzip"),
    (b"\x28\xb5\x2f\xfd", "packed with Zstandard"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x1aE\xdf\xa3", "a video"),
    (b"version https://git-lfs", "a pointer of Git LFS, without the file"),
)
_HEIF = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_HEAD = 1024  # bytes at the start of a text that are searched for what it is


def refusal(data: bytes) -> Rejection:
    """Why a file is refused whose first bytes are not those of a format that is read."""
    if not data:
        return Rejection(Cause.EMPTY)
    if picture := _picture(data):
        return Rejection(Cause.UNSUPPORTED, f"{picture} is not read")
    return Rejection(Cause.UNKNOWN_FORMAT, _no_picture(data))


def brands(data: bytes) -> frozenset[bytes]:
    """The brands in the `ftyp` box of an ISO base media file: the formats that it may be read as."""
    if data[4:8] != b"ftyp":
        return frozenset()
    end = min(int.from_bytes(data[:4], "big"), len(data), _HEAD)
    return frozenset([data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))])


def _picture(data: bytes) -> str | None:
    if _is_targa(data):  # before ICO, whose signature is mostly zeros
        return "TGA"
    for start, name in _PICTURES:
        if data.startswith(start):
            return name
    if _PNM.match(data):
        return "PNM"
    if data[:4] == b"\x28\0\0\0" and data[12:14] == b"\1\0":
        return "DIB"  # a BMP without the header that a file has
    if brands(data) & _HEIF:
        return "HEIC"
    head = data[:_HEAD].lower()
    return "SVG" if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") and _first_tag(head) == b"svg" else None


def _no_picture(data: bytes) -> str:
    for start, name in _NO_PICTURES:
        if data.startswith(start):
            return name
    if brands(data):
        return "a video"
    head = data[:_HEAD].lower().lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"<"):
        return "HTML" if b"<html" in head or b"<!doctype html" in head else "XML"
    if head.startswith((b"{", b"[")):
        return "JSON"
    return "nothing but zeros" if not any(data[:_HEAD]) else "no picture of a known kind"


_TAG = re.compile(rb"<([a-z][a-z0-9:]*)")


def _first_tag(head: bytes) -> bytes:
    """The first tag of an XML, behind declarations and comments."""
    match = _TAG.search(re.sub(rb"<!--.*?-->", b"", head, flags=re.DOTALL))
    return match[1].rpartition(b":")[2] if match else b""


def _is_targa(data: bytes) -> bool:
    """Whether it ends in TGA's signature or, as TGA's first version has none, its header is consistent as one."""
    if data.endswith(b"TRUEVISION-XFILE.\0"):
        return True
    if len(data) < 19 or data[1] > 1 or data[16] not in (8, 15, 16, 24, 32):
        return False
    width, height = (int.from_bytes(data[at : at + 2], "little") for at in (12, 14))
    colours = int.from_bytes(data[5:7], "little")
    with_map = data[2] in (1, 9) and data[1] == 1 and colours > 0 and data[7] in (15, 16, 24, 32)
    without = data[2] in (2, 3, 10, 11) and data[1] == 0 and not any(data[3:8])
    whole = data[2] > 8 or len(data) >= 18 + data[0] + width * height * data[16] // 8
    return (with_map or without) and width > 0 and height > 0 and whole


def webp_frame(data: bytes) -> tuple[int, int, int, int] | None:
    """The box (left, top, right, bottom) of an animation's first frame on its canvas; None without an animation."""
    at = 12
    while data[at : at + 4] != b"ANMF":
        if at + 8 > len(data):
            return None
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    left, top, width, height = (int.from_bytes(data[at + 8 + 3 * n : at + 11 + 3 * n], "little") for n in range(4))
    return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1


def ends_early(kind: str, data: bytes) -> bool:
    """Whether a file that could not be decoded is cut off, by the lengths that it declares."""
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if kind == "GIF":
        return _gif_ends_early(data)
    if kind == "BMP":
        return _bmp_ends_early(data)
    if kind == "AVIF":
        return _boxes_end_early(data)
    return False


def _boxes_end_early(data: bytes) -> bool:
    """Whether a box reaches beyond the end, or there is no box of data, which comes after the metadata."""
    at, names = 0, set[bytes]()
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        names.add(data[at + 4 : at + 8])
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:  # it extends to the end of the file
            return False
        at += max(size, 8)
    return at != len(data) or not names & {b"mdat", b"moov"}


def _bmp_ends_early(data: bytes) -> bool:
    if len(data) < 34:
        return True
    pixels, header = (int.from_bytes(data[at : at + 4], "little") for at in (10, 14))
    if header < 20:
        return False  # OS/2's first header, in which Pillow finds such damage itself
    width, height = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in (18, 22))
    bits, packing = int.from_bytes(data[28:30], "little"), int.from_bytes(data[30:34], "little")
    stored = int.from_bytes(data[34:38], "little") if packing else (width * bits + 31) // 32 * 4 * abs(height)
    return bits in (1, 2, 4, 8, 16, 24, 32) and pixels + stored > len(data)


def _gif_ends_early(data: bytes) -> bool:
    """Whether the file ends before the first frame does, within a block."""
    at = 13 + (3 << 1 + (data[10] & 7) if len(data) > 10 and data[10] & 128 else 0)
    while at < len(data) and (name := data[at]) in b",!":
        colours = data[at + 9] if name == b","[0] and at + 9 < len(data) else 0
        at += (11 if name == b","[0] else 2) + (3 << 1 + (colours & 7) if colours & 128 else 0)
        while at < len(data) and data[at]:
            at += data[at] + 1
        if name == b","[0]:
            break
        at += 1
    return at >= len(data)
