"""A corpus with a source of every family and, in each, every kind of bad input; what becomes of each item is noted.

    with mixed_corpus(folder, count) as corpus:      writes the folder, and serves its web
        corpus.settings                              of one `prepare` over all of it
        corpus.verdicts["tables"]                    what its items come to, in the order in which they are planned

Every second item is good; the others take turns through all that can be wrong. The web's names lead to this machine,
which only a prepare in workers of its own may be told is public: `python -m tests.data_prep.mixed` is such a one.
"""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.images.decode import Decoded, decode
from data_prep.rejections import Cause, Rejection
from tests.data_prep import test_fetch as pages
from tests.data_prep import zoo
from tests.data_prep.corpora import shaded
from tests.data_prep.test_sources_tars import ENDS, member, tar_bytes
from tests.data_prep.web import Page, Stream, Web

SIZES = [32, 16]
MAX_BYTES = 150_000
SHARES = {"tables": 0.2, "texts": 0.16, "tars": 0.2, "embedded": 0.13, "web": 0.31}
SECONDS = 8.0  # of a download: long, since a busy machine must not make a good one late
DEADLY = b"DEADLY"

Bytes = bytes | Callable[[], bytes]


class Verdict(NamedTuple):
    """The cause at each of SIZES; None: accepted."""

    at_32: Cause | None
    at_16: Cause | None


def both(cause: Cause | None) -> Verdict:
    return Verdict(cause, cause)


GOOD = both(None)


class Kind(NamedTuple):
    """One way to be good or bad. What `make` is and gives depends on the source."""

    make: Any
    verdict: Verdict = GOOD


@dataclass
class Corpus:
    settings: dict[str, Any]
    verdicts: dict[str, list[Verdict]]
    web: Web


# Files


def good_file(number: int) -> bytes:
    kind = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")[number // 2 % 6]  # the good ones have even numbers
    data = zoo.saved(shaded(number, 40), kind)
    return data[:-2] if kind == "JPEG" and number % 4 else data  # a JPEG may lack its end


def _jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header lies."""
    data = bytearray(zoo.saved(shaded(0, 40), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    return bytes(data)


_UNDECODABLE = {cause: cycle(files) for cause, files in zoo.undecodable().items()}


def _turns(cause: Cause) -> tuple[Bytes, Verdict]:
    """Another file of these each time."""
    return lambda: next(_UNDECODABLE[cause]), both(cause)


BAD_FILES: list[tuple[Bytes, Verdict]] = [
    _turns(Cause.EMPTY),
    *[_turns(Cause.UNKNOWN_FORMAT)] * 2,
    _turns(Cause.TOO_MANY_PIXELS),
    (_jpeg_of(65_000, 65_000), both(Cause.TOO_MANY_PIXELS)),
    *[_turns(Cause.TRUNCATED)] * 3,
    *[_turns(Cause.CORRUPT)] * 2,
    *[_turns(Cause.UNSUPPORTED)] * 3,
    (bytes(MAX_BYTES + 1), both(Cause.TOO_MANY_BYTES)),
    (zoo.saved(shaded(0, 12), "PNG"), both(Cause.TOO_SMALL)),
    (zoo.saved(shaded(0, 24), "PNG"), Verdict(Cause.TOO_SMALL, None)),
]


def _file(data: Bytes | None, number: int) -> bytes:
    return good_file(number) if data is None else data() if callable(data) else data


BAD_CAPTIONS: list[tuple[str | bytes | None, Cause]] = [
    (None, Cause.NO_CAPTION),
    ("", Cause.NO_CAPTION),
    (" \n", Cause.NO_CAPTION),
    ("a bell \x07", Cause.BAD_CAPTION),
    ("x" * 1_000_000, Cause.BAD_CAPTION),
    (b"caf\xe9", Cause.BAD_CAPTION),
]


def deadly(data: bytes, **options: Any) -> Decoded | Rejection:
    """A decoder that some file kills."""
    if data == DEADLY:
        os.kill(os.getpid(), 9)
    return decode(data, **options)


# Dealing out


@dataclass
class _Deck:
    """Good and bad by turns, the bad by turns among themselves; of rare kinds as many as there are, one in each lap."""

    bad: list[Kind]
    good: list[Kind]
    rare: list[Kind] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    dealt: int = 0

    def deal(self, count: int) -> Iterator[tuple[int, Kind]]:
        """`count` kinds with their numbers in the source; their verdicts are noted in this order."""
        for number in range(self.dealt, self.dealt + count):
            lap, place = divmod(number // 2, len(self.bad) + 1)
            if number % 2 == 0:
                kind = self.good[number // 2 % len(self.good)]
            elif place == len(self.bad):
                kind = self.rare.pop() if self.rare else self.bad[lap % len(self.bad)]
            else:
                kind = self.bad[place]
            self.verdicts.append(kind.verdict)
            self.dealt += 1
            yield number, kind

    def check(self) -> None:
        assert self.dealt >= 2 * len(self.bad) + 2, "too few items for each kind to come once"


def _fixed(value: Any) -> Callable[..., Any]:
    return lambda *_: value


# A table beside its images: `make` writes the file of a name, if there is to be one, and gives the row's name


def _tables(folder: Path, count: int) -> list[Verdict]:
    (folder / "images").mkdir(parents=True)
    outside = folder.parent / "outside.png"
    outside.write_bytes(good_file(0))

    def file(data: Bytes | None, caption: Any = "said") -> Any:
        def make(number: int) -> tuple[str, Any]:
            path = folder / "images" / f"{number:05d}"
            path.write_bytes(_file(data, number))
            return f"images/{path.name}", caption

        return make

    def link(target: str) -> Any:
        def make(number: int) -> tuple[str, str]:
            (folder / "images" / f"{number:05d}").symlink_to(target)
            return f"images/{number:05d}", "said"

        return make

    def pipe(number: int) -> tuple[str, str]:
        os.mkfifo(folder / "images" / f"{number:05d}")
        return f"images/{number:05d}", "said"

    bad = [Kind(file(data), verdict) for data, verdict in BAD_FILES]
    bad += [Kind(file(None, caption), both(cause)) for caption, cause in BAD_CAPTIONS]
    bad += [
        Kind(_fixed((None, "said")), both(Cause.BAD_NAME)),
        Kind(_fixed(("", "said")), both(Cause.BAD_NAME)),
        Kind(_fixed((b"images/\xff", "said")), both(Cause.BAD_NAME)),
        Kind(_fixed(("images/nowhere.png", "said")), both(Cause.MISSING)),
        Kind(link("nowhere"), both(Cause.MISSING)),
        Kind(_fixed((str(outside), "said")), both(Cause.OUTSIDE_FOLDER)),
        Kind(_fixed(("images/../../outside.png", "said")), both(Cause.OUTSIDE_FOLDER)),
        Kind(_fixed(("images/\0", "said")), both(Cause.OUTSIDE_FOLDER)),
        Kind(link("../../outside.png"), both(Cause.OUTSIDE_FOLDER)),
        Kind(link("/etc/passwd"), both(Cause.OUTSIDE_FOLDER)),
        Kind(_fixed(("images", "said")), both(Cause.UNREADABLE)),
        Kind(_fixed(("images/" + "x" * 300, "said")), both(Cause.UNREADABLE)),
        Kind(pipe, both(Cause.UNREADABLE)),
    ]
    crashes = [Kind(file(DEADLY), both(Cause.DECODER_CRASH))] * max(1, count // 1000)
    deck = _Deck(bad, [Kind(file(None))], crashes)
    half = count // 2
    for name, rows in (("a.parquet", half), ("b.parquet", count - half)):
        made = [kind.make(number) for number, kind in deck.deal(rows)]
        columns = [[_bytes(value) for value in column] for column in zip(*made, strict=True)]
        pq.write_table(
            pa.table([pa.array(column, pa.binary()) for column in columns], ["image", "caption"]),
            folder / name,
            row_group_size=max(1, rows // 3),
        )
    deck.check()
    return deck.verdicts


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


# Images with texts beside them: `make` writes both at a path without its suffix


def _texts(folder: Path, count: int) -> list[Verdict]:
    folder.mkdir()

    def pair(data: Bytes | None, caption: Any = "said") -> Any:
        def make(number: int, path: Path) -> None:
            path.with_suffix(".png").write_bytes(_file(data, number))
            if caption is not None:
                path.with_suffix(".txt").write_bytes(_bytes(caption) or b"")

        return make

    def linked(suffix: str, target: str) -> Any:
        def make(number: int, path: Path) -> None:
            pair(None)(number, path)
            path.with_suffix(suffix).unlink()
            path.with_suffix(suffix).symlink_to(target.format(path.name))

        return make

    def pipe(number: int, path: Path) -> None:
        os.mkfifo(path.with_suffix(".jpg"))
        path.with_suffix(".txt").write_text("said")

    def folder_for_text(number: int, path: Path) -> None:
        pair(None, None)(number, path)
        path.with_suffix(".txt").mkdir()

    def linked_folder(number: int, path: Path) -> None:
        path.symlink_to("..")

    def no_text_name(number: int, path: Path) -> None:
        Path(os.fsdecode(os.fsencode(path) + b"-\xff.png")).write_bytes(good_file(number))

    def upper_case(number: int, path: Path) -> None:
        path.with_suffix(".JPEG").write_bytes(good_file(number))
        path.with_suffix(".txt").write_text("tabs\tand\r\nlines")

    bad = [Kind(pair(data), verdict) for data, verdict in BAD_FILES]
    bad += [Kind(pair(None, caption), both(cause)) for caption, cause in BAD_CAPTIONS]
    bad += [
        Kind(linked(".txt", "nowhere"), both(Cause.NO_CAPTION)),
        Kind(folder_for_text, both(Cause.BAD_CAPTION)),
        Kind(linked_folder, both(Cause.UNREADABLE)),
        Kind(linked(".png", "../../outside.png"), both(Cause.OUTSIDE_FOLDER)),
        Kind(linked(".png", "nowhere"), both(Cause.MISSING)),
        Kind(linked(".png", "{}.png"), both(Cause.UNREADABLE)),  # a link to itself
        Kind(pipe, both(Cause.UNREADABLE)),
        Kind(no_text_name, both(Cause.BAD_NAME)),
    ]
    deck = _Deck(bad, [Kind(pair(None)), Kind(upper_case)])
    for number, kind in deck.deal(count):
        (folder / f"{number // 1000:02d}").mkdir(exist_ok=True)
        kind.make(number, folder / f"{number // 1000:02d}" / f"{number:05d}")
    deck.check()
    return deck.verdicts


# Tars: `make` gives a sample's members


def _tars(folder: Path, count: int) -> list[Verdict]:
    folder.mkdir()

    def sample(data: Bytes | None = None, caption: Any = "said", said: bytes = b'{"n": 1}') -> Any:
        def make(number: int) -> list[Any]:
            members = [member(f"{number}.png", _file(data, number))]
            if caption is not None:
                members.append(member(f"{number}.txt", _bytes(caption) or b""))
            return [*members, member(f"{number}.json", said)]

        return make

    def odd(name: str, **changes: Any) -> Any:
        def make(number: int) -> list[Any]:
            return [member(name.format(number), **{"data": b"I", **changes}), member(f"{number}.txt", b"said")]

        return make

    link = {"linkname": "/etc/passwd", "data": b""}
    bad = [Kind(sample(data), verdict) for data, verdict in BAD_FILES]
    bad += [Kind(sample(None, caption), both(cause)) for caption, cause in BAD_CAPTIONS]
    bad += [
        Kind(sample(said=b"{"), both(Cause.BAD_METADATA)),
        Kind(sample(said=b"[" * 200_000 + b"]" * 200_000), both(Cause.BAD_METADATA)),
        Kind(sample(said=b" " * (2 << 20)), both(Cause.BAD_METADATA)),
        Kind(odd("{}.png", type=tarfile.SYMTYPE, **link), both(Cause.UNREADABLE)),
        Kind(odd("{}.png", type=tarfile.LNKTYPE, **link), both(Cause.UNREADABLE)),
        Kind(odd("{}.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5, data=b""), both(Cause.UNREADABLE)),
        Kind(odd("{}.png", type=tarfile.FIFOTYPE, data=b""), both(Cause.UNREADABLE)),
        Kind(odd("/{}.png"), both(Cause.OUTSIDE_FOLDER)),
        Kind(odd("../{}.png"), both(Cause.OUTSIDE_FOLDER)),
        Kind(odd("a/../../{}.png"), both(Cause.OUTSIDE_FOLDER)),
        Kind(odd("bad-{}-\udcff.png"), both(Cause.BAD_NAME)),
        Kind(odd("./.{}.png"), both(Cause.BAD_NAME)),
    ]
    deck = _Deck(bad, [Kind(sample())])
    ends = [ENDS[name] for name in ("half its data", "a terabyte", "an endless pax header", "wrong checksum")]
    ends += [(b"", Cause.EMPTY), (b"\x1f\x8b" + bytes(1000), Cause.UNKNOWN_FORMAT)]
    left = count - len(ends)
    for number, (end, cause) in enumerate(ends):  # the last two break off at once
        rows = left // 4 + (number == 0) * (left % 4) if number < 4 else 0
        members = [each for n, kind in deck.deal(rows) for each in kind.make(n)]
        whole = tar_bytes(*members, form=(tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[number % 2]) if rows else b""
        # A writer pads its archive with zeros, which would be its end.
        (folder / f"{number:05d}.tar").write_bytes(whole[: _end_of_members(whole)] + end)
        deck.verdicts.append(both(cause))
    deck.check()
    return deck.verdicts


def _end_of_members(whole: bytes) -> int:
    """Where the last member's data ends: two blocks of zeros follow it, and more to fill a record."""
    if not whole:
        return 0
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512 * last.isreg()


# Images in a table: `make` gives the row


def _embedded(folder: Path, count: int) -> list[Verdict]:
    folder.mkdir()

    def row(data: Bytes | None, caption: Any = "said") -> Any:
        return lambda number: ({"bytes": _file(data, number), "path": f"{number}"}, caption)

    bad = [Kind(row(data), verdict) for data, verdict in BAD_FILES]
    bad += [Kind(row(None, caption), both(cause)) for caption, cause in BAD_CAPTIONS]
    bad += [Kind(_fixed(({"bytes": None, "path": "x"}, "said")), both(Cause.MISSING))]
    deck = _Deck(bad, [Kind(row(None))])
    made = [kind.make(number) for number, kind in deck.deal(count)]
    images, captions = zip(*made, strict=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = [pa.array(images, image), pa.array(map(_bytes, captions), pa.binary())]
    pq.write_table(pa.table(table, ["image", "caption"]), folder / "a.parquet", row_group_size=max(1, count // 7))
    deck.check()
    return deck.verdicts


# The web: `make` puts up what is behind a URL, and gives the row's URL and caption


def _web(folder: Path, count: int, web: Web, tls: Web, closed: int) -> list[Verdict]:
    folder.mkdir()

    def page(found: Page | None, caption: Any = "said") -> Any:
        def make(number: int) -> tuple[str, Any]:
            web.pages[f"/{number}"] = good_file(number) if found is None else found
            return web.url(f"/{number}", f"host-{number % 100}.test"), caption

        return make

    def broken(data: Bytes) -> Any:
        return lambda number: page(_file(data, number))(number)

    def url(text: str | None) -> Any:
        return _fixed((text, "said"))

    def answer(status: int, **headers: str) -> Any:
        return page(lambda _, stream: stream.answer(b"", status, **headers))

    def tagged(tag: str) -> Any:
        return page(lambda _, stream: stream.answer(good_file(0), X_Robots_Tag=tag))

    def moved(number: int) -> Any:
        web.pages[f"/{number}/there"] = good_file(number)
        return answer(302, Location=f"/{number}/there")(number)

    def in_circles(number: int) -> Any:
        return answer(301, Location=f"/{number}")(number)

    async def no_http(_: Any, stream: Stream) -> None:
        await stream.send(b"SSH-2.0-OpenSSH_9.2\r\n")
        stream.writer.close()

    causes: list[tuple[Any, Cause]] = [
        *((url(text), Cause.BAD_URL) for text in (None, "", "file:///etc/passwd", "http://a:b@host-1.test/")),
        *((url(text), Cause.BAD_URL) for text in ("http://[::1/", "http://exa mple.test/", "x" * 9000)),
        *((url(f"http://{host}/"), Cause.PRIVATE_ADDRESS) for host in ("127.0.0.2", "169.254.169.254", "[::1]")),
        *((url(f"http://{host}/"), Cause.PRIVATE_ADDRESS) for host in ("inside.test", "0x7f.2", "10.1")),
        (answer(302, Location=f"http://127.0.0.2:{web.port}/"), Cause.PRIVATE_ADDRESS),
        (answer(302, Location="file:///etc/passwd"), Cause.BAD_URL),
        (url("http://nowhere.test/"), Cause.DNS),
        (url(f"http://host-1.test:{closed}/"), Cause.CONNECTION),
        *((page(broken), Cause.CONNECTION) for broken in (pages.reset, pages.cut_short, pages.silent_end)),
        (url(tls.url("/", "other.test")), Cause.CERTIFICATE),
        (answer(408), Cause.TIMEOUT),
        (answer(429), Cause.RATE_LIMITED),
        (answer(429, Retry_After="3600"), Cause.RATE_LIMITED),
        *((answer(status), Cause.SERVER_ERROR) for status in (500, 503)),
        *((answer(status), Cause.GONE) for status in (404, 410)),
        *((answer(status), Cause.HTTP_ERROR) for status in (206, 302, 403)),
        (page(no_http), Cause.HTTP_ERROR),
        (in_circles, Cause.TOO_MANY_REDIRECTS),
        *((tagged(tag), Cause.OPTED_OUT) for tag in ("noai", "noindex, nofollow", "pixnerd: noimageai")),
        *((page(large), Cause.TOO_MANY_BYTES) for large in (pages.declared_huge, pages.endless)),
    ]
    bad = [Kind(make, both(cause)) for make, cause in causes]
    bad += [Kind(broken(data), verdict) for data, verdict in BAD_FILES]
    # JSON and CSV know no bytes; text that is no UTF-8 is in the tables.
    bad += [Kind(page(None, said), both(cause)) for said, cause in BAD_CAPTIONS if not isinstance(said, bytes)]
    rare = [Kind(page(pages.hang), both(Cause.TIMEOUT))]
    deck = _Deck(bad, [Kind(page(None)), Kind(moved)], rare)
    parts = [count // 3, count // 3, count - 2 * (count // 3) - 2]
    rows = [[kind.make(number) for number, kind in deck.deal(part)] for part in parts[:2]]
    pq.write_table(pa.Table.from_pylist([{"url": url, "caption": said} for url, said in rows[0]]), folder / "a.parquet")
    with (folder / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows(chain([("url", "caption")], rows[1]))
    lines = [json.dumps({"url": url, "caption": said}) for url, said in (k.make(n) for n, k in deck.deal(parts[2]))]
    (folder / "c.jsonl").write_text("\n".join([*lines, '{"url": "http', "[" * 100_000]))
    deck.verdicts += repeat(both(Cause.BAD_ROW), 2)  # lines that cannot be read
    deck.check()
    return deck.verdicts


# All of it


@contextmanager
def mixed_corpus(folder: Path, count: int, **changes: Any) -> Iterator[Corpus]:
    context, _ = pages.certificate(folder, "photos.test")
    counts = {name: round(count * share) for name, share in SHARES.items()}
    counts["tables"] += count - sum(counts.values())
    # A port where nobody listens, held so that nobody begins to.
    with Web() as web, Web(tls=context) as tls, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        verdicts = {
            "tables": _tables(folder / "tables", counts["tables"]),
            "texts": _texts(folder / "texts", counts["texts"]),
            "tars": _tars(folder / "tars", counts["tars"]),
            "embedded": _embedded(folder / "embedded", counts["embedded"]),
            "web": _web(folder / "web", counts["web"], web, tls, closed.getsockname()[1]),
        }
        yield Corpus(_settings(folder) | changes, verdicts, web)


def _settings(folder: Path) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "tables": {"kind": "table_folder", "tables": ["*.parquet"]},
        "texts": {"kind": "text_folder"},
        "tars": {"kind": "webdataset", "keep": {"n": "int"}},
        "embedded": {"kind": "parquet_images", "tables": ["*.parquet"]},
        "web": {"kind": "url_list", "tables": ["a.parquet", "b.csv", "c.jsonl"]},
    }
    sources = [{"name": n, "url": str(folder / n), "max_bytes": MAX_BYTES, **kind} for n, kind in kinds.items()]
    fetch = {"seconds": SECONDS, "retries": 1, "backoff": 0.01}
    return {"sources": sources, "sizes": SIZES, "fetch": fetch}


# The prepare


def at_home() -> None:
    """Run in each worker: 127.0.0.1 counts as public, and every name but two leads to it."""
    from data_prep.web import addresses, fetch

    is_public = addresses.is_public
    addresses.is_public = lambda address: address == "127.0.0.1" or is_public(address)
    vars(fetch)["look_up"] = _look_up


def _look_up(host: str) -> list[str]:
    if host == "nowhere.test":
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return ["10.0.0.1"] if host == "inside.test" else [host if host[0].isdigit() or ":" in host else "127.0.0.1"]


def main() -> None:
    """ADDRESS STORE SETTINGS: prepare on that Ray cluster, with the decoder that some file kills."""
    import ray

    from data_prep.prepare.job import prepare
    from data_prep.prepare.plan import PrepareSettings
    from infra.config import parse
    from infra.store import open_store

    address, store, settings = sys.argv[1:]
    ray.init(
        address=address, runtime_env={"worker_process_setup_hook": at_home}, log_to_driver=False, logging_level="ERROR"
    )
    print(prepare(open_store(store), parse(PrepareSettings, json.loads(settings)), decoder=deadly).model_dump_json())


if __name__ == "__main__":
    main()
