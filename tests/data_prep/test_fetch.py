from __future__ import annotations

import asyncio
import datetime as dt
import gc
import gzip
import itertools
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rejections import TRANSIENT, Cause, Rejection
from data_prep.web import fetch as fetch_module
from data_prep.web.fetch import LOOK_AHEAD, Fetched, FetchSettings, fetch
from data_prep.web.responses import opts_out, retry_after
from tests.data_prep.asking import MEGABYTE, QUICK, at_home, cause, one
from tests.data_prep.web import Page, Request, Stream, Web, head

pytestmark = pytest.mark.filterwarnings("error")


def answering(body: bytes = b"", status: int = 200, **headers: str) -> Page:
    """A page that always gives this answer."""
    return lambda _, stream: stream.answer(body, status, **headers)


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch"]


def test_proxies_of_the_environment_are_not_used(web: Web, monkeypatch: pytest.MonkeyPatch):
    with Web({"/": b"direct"}) as other:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, web.url())
        assert one(other.url("/")).data == b"direct"
    assert web.connections == 0


# Answers


def test_a_file(web: Web):
    async def photo(_: Request, stream: Stream) -> None:
        await stream.answer(b"photo", Content_Type="image/jpeg; charset=\x07x")

    web.pages["/a.jpg"] = photo
    url = web.url("/a.jpg?size=%2B")
    assert one(url) == Fetched(0, b"photo", url, 200, "image/jpeg; charset= x", 1, private="127.0.0.1")
    assert web.requests[0].target == "/a.jpg?size=%2B"


def test_who_is_asking(web: Web):
    async def sticky(_: Request, stream: Stream) -> None:
        await stream.answer(b"", 302, Location="/b", Set_Cookie="id=1; Path=/")

    web.pages |= {"/a": sticky, "/b": b"b"}
    settings = FetchSettings(**QUICK, contact="https://example.org/us")
    urls = [web.url("/a", "photos.example"), web.url("/b", "photos.example")]
    assert [found.data for found in fetch(urls, settings, 10, at_home)] == [b"b", b"b"]
    assert len(web.requests) == 3
    for request in web.requests:
        assert request.headers["user-agent"].startswith("pixnerd/")
        assert request.headers["user-agent"].endswith(" (+https://example.org/us)")
        assert request.headers["accept-encoding"] == "identity"
        assert not {"cookie", "referer", "authorization"} & request.headers.keys()


def test_a_contact_cannot_smuggle_a_header():
    with pytest.raises(ValueError, match="contact"):
        FetchSettings(contact="me\r\nCookie: x")


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (204, None),
        (206, Cause.HTTP_ERROR),
        (304, Cause.HTTP_ERROR),
        (400, Cause.HTTP_ERROR),
        (403, Cause.HTTP_ERROR),
        (404, Cause.GONE),
        (408, Cause.TIMEOUT),
        (410, Cause.GONE),
        (429, Cause.RATE_LIMITED),
        (500, Cause.SERVER_ERROR),
        (503, Cause.SERVER_ERROR),
        (599, Cause.SERVER_ERROR),
        (999, Cause.HTTP_ERROR),
    ],
)
def test_causes_by_status(web: Web, status: int, expected: Cause | None):
    web.pages["/"] = lambda _, stream: stream.answer(status=status)
    found = one(web.url("/"))
    assert cause(found) is expected and found.status == status
    assert found.tries == len(web.requests) == (2 if expected in TRANSIENT else 1)


def test_an_html_page_is_for_the_decoder_to_refuse(web: Web):
    web.pages["/"] = lambda _, stream: stream.answer(b"<html>", Content_Type="text/html")
    found = one(web.url("/"))
    assert found.data == b"<html>" and found.content_type == "text/html"


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(web: Web, status: int):
    web.pages |= {
        "/a": lambda _, stream: stream.answer(b"moved", status, Location="b?x=%2F#part"),
        "/b": lambda _, stream: stream.answer(b"", status, Location=web.url("/c", "other.example")),
        "/c": b"c",
    }
    found = one(web.url("/a"))
    assert found == Fetched(0, b"c", web.url("/c", "other.example"), 200, "", 1, 2, "", "127.0.0.1")
    assert [request.target for request in web.requests] == ["/a", "/b?x=%2F", "/c"]


@pytest.mark.parametrize(
    ("location", "asked"), [("/ä b.jpg", "/%E4%20b.jpg"), ("/ä".encode().decode("latin-1"), "/%C3%A4")]
)
def test_a_place_in_any_bytes_is_asked_for_by_the_same(web: Web, location: str, asked: str):
    web.pages |= {"/": lambda _, stream: stream.answer(status=302, Location=location), asked: b"x"}
    assert one(web.url("/")).data == b"x"


def test_the_cap_on_redirects_and_loops(web: Web):
    web.pages["/loop"] = lambda _, stream: stream.answer(status=302, Location="/loop")
    found = one(web.url("/loop"), redirects=3)
    assert cause(found) is Cause.TOO_MANY_REDIRECTS and found.tries == 1 and len(web.requests) == 4
    web.pages["/once"] = lambda _, stream: stream.answer(status=302, Location="/there")
    web.pages["/there"] = b"x"
    assert one(web.url("/once"), redirects=1).data == b"x"
    assert cause(one(web.url("/once"), redirects=0)) is Cause.TOO_MANY_REDIRECTS


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd",
        "ftp://x/",
        "gopher://x/",
        "http://a:hunter2@x/",
        "http://[",
        "javascript:x",
        "data:,x",
    ],
)
def test_redirects_off_the_web(web: Web, location: str):
    web.pages["/"] = lambda _, stream: stream.answer(status=302, Location=location)
    found = one(web.url("/"))
    assert cause(found) is Cause.BAD_URL and found.url == web.url("/") and found.status == 302 and found.tries == 1
    assert "hunter2" not in repr(found)


def test_a_redirect_without_a_place_to_go(web: Web):
    web.pages["/"] = lambda _, stream: stream.answer(status=301)
    assert cause(one(web.url("/"))) is Cause.HTTP_ERROR


# Wishes to be left alone


@pytest.mark.parametrize(
    ("tag", "wish"),
    [
        ("noai", "noai"),
        ("NoImageAI", "noimageai"),
        ("nofollow, noindex", "noindex"),
        ("none", "none"),
        ("all", None),
        ("nofollow", None),
        ("", None),
        ("noaix, indexnoai", None),
        ("otherbot: noindex", None),
        ("otherbot: nofollow, noindex", None),
        ("otherbot: noindex, pixnerd: nofollow", None),
        ("otherbot: noindex, PixNerd: NoAI", "noai"),
        ("pixnerd:noai", "noai"),
        ("*: noai", "noai"),
        ("unavailable_after: 25 Jun 2030 15:00:00 PST, noai", "noai"),
        ("max-snippet: 20, noindex", "noindex"),
        ("otherbot: max-snippet: 20, noindex", None),
        ("tdm-reservation: 1", "tdm-reservation"),
        ("nofollow, TDM-Reservation:1", "tdm-reservation"),
        ("pixnerd: tdm-reservation: 1", "tdm-reservation"),
        ("otherbot: tdm-reservation: 1", None),
        ("tdm-reservation: 0, noai", "noai"),
        ("tdm-policy: https://example.org/p, noai", "noai"),
    ],
)
def test_the_tags_grammar(tag: str, wish: str | None):
    assert opts_out(tag, "pixnerd") == wish


@pytest.mark.parametrize("value", ["1", " 1 ", "1, 1", "0, 1", '"1"', "?1", "true", "1; policy=x", ["0", "1"]])
def test_a_reservation_of_text_and_data_mining_is_a_wish(web: Web, value: str | list[str]):
    web.pages["/"] = lambda _, stream: stream.answer(b"x", TDM_Reservation=value)
    found = one(web.url("/"))
    assert found.data == Rejection(Cause.OPTED_OUT, "tdm-reservation") and found.tries == 1
    assert one(web.url("/"), opt_out=False).data == b"x"


@pytest.mark.parametrize("value", ["0", "", "?0", "false", "11", "no", ["0", "0"]])
def test_what_is_not_reserved_is_taken(web: Web, value: str | list[str]):
    web.pages["/"] = lambda _, stream: stream.answer(b"x", tdm_reservation=value)
    assert one(web.url("/")).data == b"x"


def test_opting_out(web: Web):
    async def unread(_: Request, stream: Stream) -> None:
        await stream.send(head(200, X_Robots_Tag=["otherbot: noindex", "nofollow, NOAI"], Content_Length="1000"))

    web.pages |= {
        "/": unread,
        "/others": lambda _, stream: stream.answer(b"x", X_Robots_Tag="otherbot: noindex"),
        "/moved": lambda _, stream: stream.answer(b"", 302, Location="/others", X_Robots_Tag="noai"),
    }
    found = one(web.url("/"))
    assert found.data == Rejection(Cause.OPTED_OUT, "noai") and found.tries == 1
    assert one(web.url("/others")).data == b"x"
    assert cause(one(web.url("/others"), user_agent="OtherBot")) is Cause.OPTED_OUT
    assert cause(one(web.url("/moved"))) is Cause.OPTED_OUT
    moved = one(web.url("/moved"), opt_out=False)
    assert (moved.data, moved.wish) == (b"x", "noai"), "it is told, though it is not heeded"
    assert one(web.url("/others"), opt_out=False).wish == ""


# Bytes


async def endless(_: Request, stream: Stream) -> None:
    await stream.send(head(Transfer_Encoding="chunked"))
    while True:
        await stream.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")


async def declared_huge(_: Request, stream: Stream) -> None:
    await stream.send(head(Content_Length=str(10**13)) + b"x")
    await asyncio.Event().wait()


async def until_closed(_: Request, stream: Stream) -> None:
    await stream.send(head(Connection="close") + b"abc")
    stream.writer.close()


async def longer_than_declared(_: Request, stream: Stream) -> None:
    await stream.send(head(Content_Length="3") + b"abcdef")


def test_the_cap_on_bytes(web: Web):
    web.pages |= {"/endless": endless, "/huge": declared_huge, "/more": longer_than_declared, "/open": until_closed}
    for path in ("/endless", "/huge"):
        found = one(web.url(path))
        assert cause(found) is Cause.TOO_MANY_BYTES and found.tries == 1
    assert one(web.url("/open"), max_bytes=3).data == b"abc"
    assert cause(one(web.url("/open"), max_bytes=2)) is Cause.TOO_MANY_BYTES
    # What follows the declared bytes is no HTTP, if it comes in time to be noticed.
    found = one(web.url("/more"))
    assert found.data == b"abc" or cause(found) is Cause.HTTP_ERROR


def test_packed_bodies(web: Web):
    packed = gzip.compress(b"photo" * 100)
    bodies = {
        "/packed": (packed, "GZIP"),
        "/lie": (b"\xff\xd8\xff", "gzip"),
        "/longer": (packed + bytes(9), "x-gzip"),
        "/nothing": (b"", "gzip"),
        "/unknown": (b"\xff\xd8\xff", "aws-chunked"),
    }
    for path, (body, coding) in bodies.items():
        web.pages[path] = answering(body, Content_Encoding=coding)
    assert one(web.url("/packed"), max_bytes=500).data == b"photo" * 100
    assert one(web.url("/longer"), max_bytes=500).data == b"photo" * 100
    assert one(web.url("/lie")).data == one(web.url("/unknown")).data == b"\xff\xd8\xff"
    assert one(web.url("/nothing")).data == b""
    for path in ("/packed", "/longer"):
        assert cause(one(web.url(path), max_bytes=499)) is Cause.TOO_MANY_BYTES


PACKED = gzip.compress(bytes(range(256)) * 9, mtime=0)


@pytest.mark.parametrize(
    "body",
    [
        PACKED[:-1],
        PACKED[:-9],
        PACKED[:40],
        PACKED[:3],
        PACKED[:-8] + bytes(8),
        PACKED[:20] + b"\xff" * 20 + PACKED[40:],
    ],
)
def test_a_packed_answer_that_was_damaged_on_its_way_is_tried_again(web: Web, body: bytes):
    answers = itertools.chain([body], itertools.repeat(PACKED))
    web.pages["/once"] = lambda _, stream: stream.answer(next(answers), Content_Encoding="gzip")
    web.pages["/always"] = lambda _, stream: stream.answer(body, Content_Encoding="gzip")
    found = one(web.url("/once"))
    assert found.data == bytes(range(256)) * 9 and found.tries == 2
    found = one(web.url("/always"))
    assert cause(found) is Cause.CONNECTION and found.tries == 2


def test_a_gzip_bomb(web: Web):
    bomb = gzip.compress(bytes(200 * MEGABYTE), 1)
    assert len(bomb) < MEGABYTE
    web.pages["/"] = lambda _, stream: stream.answer(bomb, Content_Encoding="gzip")
    assert cause(one(web.url("/"))) is Cause.TOO_MANY_BYTES


async def cut_short(_: Request, stream: Stream) -> None:
    await stream.send(head(Content_Length="1000") + b"x" * 10)
    stream.writer.close()


async def chunks_cut_short(_: Request, stream: Stream) -> None:
    await stream.send(head(Transfer_Encoding="chunked") + b"5\r\nabcde\r\n")
    stream.writer.close()


async def reset(_: Request, stream: Stream) -> None:
    stream.reset()


async def silent_end(_: Request, stream: Stream) -> None:
    stream.writer.close()


ENDED = Rejection(Cause.CONNECTION, "closed before all had come")


@pytest.mark.parametrize("page", [cut_short, chunks_cut_short, reset, silent_end])
def test_broken_off(web: Web, page: Page):
    web.pages["/"] = page
    found = one(web.url("/"), retries=2)
    assert found.data in (ENDED, Rejection(Cause.CONNECTION, "ECONNRESET")) and found.tries == 3


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\0" * 1000, b"{}\r\n\r\n"])
def test_no_http(web: Web, answer: bytes):
    async def page(_: Request, stream: Stream) -> None:
        await stream.send(answer)
        stream.writer.close()

    web.pages["/"] = page
    assert cause(one(web.url("/"))) is Cause.HTTP_ERROR


# Deadlines


async def drip_body(_: Request, stream: Stream) -> None:
    await stream.send(head(Content_Length="1000"))
    while True:
        await stream.send(b"x")
        await asyncio.sleep(0.02)


async def drip_headers(_: Request, stream: Stream) -> None:
    await stream.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await stream.send(b"X: y\r\n")
        await asyncio.sleep(0.02)


async def hang(_: Request, stream: Stream) -> None:
    await asyncio.Event().wait()


async def drip_redirects(_: Request, stream: Stream) -> None:
    await asyncio.sleep(0.1)
    await stream.answer(status=302, Location="/")


async def wait_a_bit(_: Request, stream: Stream) -> None:
    await asyncio.sleep(0.1)
    await stream.answer(status=503)


@pytest.mark.parametrize("page", [drip_body, drip_headers, hang, drip_redirects])
def test_one_deadline_for_the_whole_item(web: Web, page: Page):
    web.pages["/"] = page
    began = time.monotonic()
    found = one(web.url("/"), seconds=0.3, retries=10, redirects=20)
    assert 0.25 < time.monotonic() - began < 3
    assert cause(found) is Cause.TIMEOUT and found.tries == 1


def test_tries_share_the_deadline(web: Web):
    web.pages["/"] = wait_a_bit
    found = one(web.url("/"), seconds=0.45, retries=100, backoff=0.0001)
    assert found.tries == len(web.requests) <= 5


def test_waits_between_tries_share_it_too(web: Web, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("random.uniform", lambda low, high: (low + high) / 2)
    web.pages["/"] = lambda _, stream: stream.answer(status=503)
    found = one(web.url("/"), seconds=1.0, retries=100, backoff=0.2)  # 0.2 and 0.4, but 0.8 has no room any more
    assert cause(found) is Cause.SERVER_ERROR and found.tries == 3


@pytest.mark.parametrize("flood", [b"X: y\r\n", b"x" * 1000, b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_floods_before_the_body(web: Web, flood: bytes):
    """Endless headers, an endless header, endless interim answers: refused or timed out, and not kept in memory."""

    async def page(_: Request, stream: Stream) -> None:
        await stream.send(b"" if flood.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\n")
        while True:
            await stream.send(flood * 100)

    web.pages["/"] = page
    _reset_peak()
    before = _peak()
    assert cause(one(web.url("/"), seconds=1.0, retries=0)) in (Cause.HTTP_ERROR, Cause.TIMEOUT)
    assert _peak() - before < 40 * MEGABYTE


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def test_a_connection_that_never_stands():
    """The queue of a listener that never accepts is full, so that a handshake gets no answer at all."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        callers = [socket.socket() for _ in range(4)]
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        found = one(f"http://127.0.0.1:{listener.getsockname()[1]}/", connect_seconds=0.2, retries=1)
        for caller in callers:
            caller.close()
    assert cause(found) is Cause.TIMEOUT and found.tries == 2


def test_a_resolver_that_hangs():
    asked = threading.Event()
    answered = threading.Event()

    def lookup(host: str) -> list[str]:
        asked.set()
        answered.wait(20)
        return ["127.0.0.1"]

    began = time.monotonic()
    found = one("http://slow.example/", lookup=lookup, seconds=0.2)
    assert cause(found) is Cause.TIMEOUT and asked.is_set() and time.monotonic() - began < 5
    answered.set()


# Trying again


def test_what_passes_is_tried_again(web: Web):
    answers = itertools.chain([503, 500], itertools.repeat(200))
    web.pages["/"] = lambda _, stream: stream.answer(b"x", next(answers))
    assert one(web.url("/"), retries=2)[3:6] == (200, "", 3)
    web.pages["/moved"] = lambda _, stream: stream.answer(status=302, Location="/there")
    web.pages["/there"] = lambda _, stream: stream.answer(status=503)
    found = one(web.url("/moved"), retries=2)
    assert cause(found) is Cause.SERVER_ERROR and found.url == web.url("/there") and found.tries == 3
    assert len(web.asked("/moved")) == len(web.asked("/there")) == 3


def test_names_that_lead_nowhere_are_asked_for_again():
    asked = []

    def lookup(host: str) -> list[str]:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    found = one("http://bücher.example:81/", retries=2, lookup=lookup)
    assert found.data == Rejection(Cause.DNS, "EAI_NONAME")
    assert asked == ["xn--bcher-kva.example"] * 3 and found.tries == 3
    assert cause(one("http://no.example/", lookup=lambda host: [])) is Cause.DNS


def test_nobody_listens():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        found = one(f"http://127.0.0.1:{unused.getsockname()[1]}/", retries=2)
    assert found.data == Rejection(Cause.CONNECTION, "ECONNREFUSED") and found.tries == 3


def test_waits_as_long_as_it_is_told(web: Web):
    times: list[float] = []

    async def busy(_: Request, stream: Stream) -> None:
        times.append(time.monotonic())
        await stream.answer(b"x", 200 if len(times) > 1 else 429, Retry_After="1")

    web.pages["/"] = busy
    assert one(web.url("/"), backoff=0).data == b"x"
    assert 1 <= times[1] - times[0] < 5


def test_does_not_wait_beyond_the_deadline(web: Web):
    for wait in ("3600", format_datetime(dt.datetime.now(dt.UTC) + dt.timedelta(hours=1), usegmt=True)):
        web.pages["/"] = answering(status=429, Retry_After=wait)
        began = time.monotonic()
        found = one(web.url("/"))
        assert cause(found) is Cause.RATE_LIMITED and found.tries == 1 and time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["", "-1", "soon", "1e9", "²", "9" * 5000, "Thu, 99 Foo 2020", "nan", "\udcff"])
def test_senseless_waits(text: str):
    assert retry_after(text) == 0


def test_the_date_form_of_a_wait():
    now = dt.datetime.now(dt.UTC)
    assert 28 < retry_after(format_datetime(now + dt.timedelta(seconds=30), usegmt=True)) <= 30
    assert retry_after(format_datetime(now - dt.timedelta(days=1), usegmt=True)) == 0


def test_a_retry_waits_without_a_slot(web: Web):
    web.pages |= {"/flaky": lambda _, stream: stream.answer(status=503), "/other": b"x"}
    urls = [web.url("/flaky"), web.url("/other")]
    list(fetch(urls, FetchSettings(**QUICK | {"at_once": 1, "backoff": 0.5}), 10, at_home))
    assert [request.target for request in web.requests] == ["/flaky", "/other", "/flaky"]


# TLS


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, Path]:
    """A self-signed one for a name."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - dt.timedelta(1), now + dt.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "both.pem"
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(signed.public_bytes(pem) + secret)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context, path


def test_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tls, path = certificate(tmp_path, "photos.example")
    with Web({"/": b"x"}, tls) as web:
        found = one(web.url("/", "photos.example"))
        assert found.data == Rejection(Cause.CERTIFICATE, "self-signed") and found.tries == 1
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert one(web.url("/", "photos.example")).data == b"x"
        assert one(web.url("/", "other.example")).data == Rejection(Cause.CERTIFICATE, "another host's")
    gc.collect()


def test_a_tls_handshake_that_breaks(web: Web):
    web.pages["/"] = b"x"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            for _ in range(2):
                connection, _address = listener.accept()
                connection.recv(10)
                connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        found = one(f"https://127.0.0.1:{listener.getsockname()[1]}/")
        thread.join()
    assert cause(found) is Cause.CONNECTION and found.tries == 2


def test_a_tls_handshake_that_never_ends():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        assert cause(one(url, seconds=0.2)) is Cause.TIMEOUT
        assert cause(one(url, connect_seconds=0.1)) is Cause.TIMEOUT


# Many


def test_a_host_that_hangs_does_not_hold_up_the_others(web: Web):
    """The slow host's pages come first and answer only once all of the other host's have been served."""
    others_done = threading.Event()
    most = 0

    async def slow(_: Request, stream: Stream) -> None:
        nonlocal most
        most = max(most, web.active)
        await asyncio.to_thread(others_done.wait, 20)
        await stream.answer(b"slow")

    async def fast(_: Request, stream: Stream) -> None:
        await stream.answer(b"fast")
        if len(web.asked("/fast")) == 10:
            others_done.set()

    web.pages |= {"/slow": slow, "/fast": fast}
    urls = [web.url("/slow", "slow.example")] * 20 + [web.url("/fast", "fast.example")] * 10
    found = fetch(urls, FetchSettings(**QUICK, at_once=4, per_host=2), 10, at_home)
    assert [result.data for result in sorted(found)] == [b"slow"] * 20 + [b"fast"] * 10
    assert most <= 4 and web.most_active <= 4


def test_a_host_is_not_flooded_through_redirects(web: Web):
    now = most = 0

    async def target(_: Request, stream: Stream) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        await stream.answer(b"x")

    web.pages |= {
        "/from": lambda _, stream: stream.answer(status=302, Location=web.url("/to", "target.example")),
        "/to": target,
    }
    urls = [web.url("/from", f"host{number}.example") for number in range(30)]
    found = list(fetch(urls, FetchSettings(**QUICK, per_host=2), 10, at_home))
    assert [result.data for result in found] == [b"x"] * 30 and most <= 2


def test_time_spent_waiting_for_a_slot_is_not_the_items(web: Web):
    async def slow(_: Request, stream: Stream) -> None:
        await asyncio.sleep(0.1)
        await stream.answer(b"x")

    web.pages["/"] = slow
    found = list(fetch([web.url("/")] * 10, FetchSettings(**QUICK | {"per_host": 1, "seconds": 0.8}), 10, at_home))
    assert [result.data for result in found] == [b"x"] * 10


def test_deadlines_and_downloads_go_on_while_the_caller_is_busy(web: Web):
    web.pages |= {"/x": b"x", "/hang": hang}
    results = fetch([web.url("/x"), web.url("/hang")], FetchSettings(**QUICK | {"seconds": 1.0}), 10, at_home)
    assert next(results).data == b"x"
    time.sleep(1.2)  # the caller at work
    began = time.monotonic()
    assert cause(next(results)) is Cause.TIMEOUT and time.monotonic() - began < 0.8


OUTCOMES = ["ok", "gone", "busy", "reset", "moved", "late", "bad", "rejection", "nowhere", "big", "opted"]


@pytest.fixture(scope="module")
def mixed_web() -> Iterator[Web]:
    async def ok(request: Request, stream: Stream) -> None:
        await stream.answer(request.target.encode())

    async def late(request: Request, stream: Stream) -> None:
        await asyncio.sleep(0.02)
        await stream.answer(request.target.encode())

    async def moved(request: Request, stream: Stream) -> None:
        await stream.answer(status=302, Location=f"/ok?{request.target.partition('?')[2]}")

    pages: dict[str, Page] = {
        "/ok": ok,
        "/late": late,
        "/moved": moved,
        "/busy": lambda _, stream: stream.answer(status=503),
        "/reset": reset,
        "/big": endless,
        "/opted": lambda _, stream: stream.answer(b"x", X_Robots_Tag="noai"),
    }
    with Web(pages) as web:
        yield web


@settings(max_examples=40)
@given(
    outcomes=st.lists(st.sampled_from(OUTCOMES), max_size=60),
    at_once=st.integers(1, 8),
    per_host=st.integers(1, 4),
    hosts=st.integers(1, 3),
)
def test_any_mix_comes_back_complete(mixed_web: Web, outcomes: list[str], at_once: int, per_host: int, hosts: int):
    def url(number: int, outcome: str) -> str | Rejection:
        if outcome == "rejection":
            return Rejection(Cause.BAD_NAME, str(number))
        if outcome == "bad":
            return "file:///etc/passwd"
        host = "nowhere.example" if outcome == "nowhere" else f"host{number % hosts}.example"
        return mixed_web.url(f"/{outcome}?{number}", host)

    def lookup(host: str) -> list[str]:
        if host == "nowhere.example":
            raise socket.gaierror(-2, "no")
        return ["127.0.0.1"]

    expected = {
        "gone": Cause.GONE,
        "busy": Cause.SERVER_ERROR,
        "reset": Cause.CONNECTION,
        "bad": Cause.BAD_URL,
        "rejection": Cause.BAD_NAME,
        "nowhere": Cause.DNS,
        "big": Cause.TOO_MANY_BYTES,
        "opted": Cause.OPTED_OUT,
    }
    quick = FetchSettings(**QUICK | {"backoff": 0.001, "at_once": at_once, "per_host": per_host})
    urls = (url(number, outcome) for number, outcome in enumerate(outcomes))
    found = sorted(fetch(urls, quick, 1000, lookup), key=lambda result: result.number)
    assert [result.number for result in found] == list(range(len(outcomes)))
    for number, (outcome, result) in enumerate(zip(outcomes, found, strict=True)):
        if outcome in expected:
            assert cause(result) is expected[outcome]
        else:
            assert result.data == f"/{'ok' if outcome == 'moved' else outcome}?{number}".encode()
        if outcome not in ("rejection", "bad"):
            assert f"?{number}" in result.url
        if outcome == "rejection":
            assert result.data == Rejection(Cause.BAD_NAME, str(number))
    assert not fetch_threads()


MEMORY = """
import sys
import time
from pathlib import Path
from data_prep.web.fetch import FetchSettings, fetch

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

settings = FetchSettings(allow_private=True, at_once=8, per_host=8, ahead_mib=16)
url = sys.argv[1]
list(fetch([url] * 16, settings, 10**6))
before = peak()
for number, found in enumerate(fetch([url] * 1000, settings, 10**6)):
    assert len(found.data) == 200_000
    if number % 250 == 0:
        time.sleep(0.5)  # the caller at work
print(peak() - before)
"""


def test_a_slow_caller_does_not_pile_up_bodies(web: Web):
    web.pages["/photo"] = bytes(200_000)
    peak = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEMORY, web.url("/photo")], capture_output=True, text=True, check=True
    )
    assert int(peak.stdout) < 16 + 24  # MiB


def test_nothing_is_started_while_there_is_no_room(web: Web):
    web.pages["/photo"] = bytes(200_000)
    small = FetchSettings(**QUICK | {"at_once": 8, "per_host": 8, "ahead_mib": 16})
    results = fetch([web.url("/photo")] * 2000, small, MEGABYTE, at_home)
    next(results)
    asked = 0
    while asked < 84 or len(web.requests) > asked:  # 84 make 16 MiB
        asked = len(web.requests)
        time.sleep(0.5)
    assert asked <= 84 + 2 * 8
    results.close()


@pytest.mark.timeout(60)
def test_one_that_hangs_holds_up_nothing_but_itself(web: Web):
    """It answers once all that come behind it have been handed out, far more than there is room for."""
    taken = threading.Event()

    async def slow(_: Request, stream: Stream) -> None:
        await asyncio.to_thread(taken.wait, 50)
        await stream.answer(b"slow")

    web.pages |= {"/slow": slow, "/photo": bytes(200_000)}
    urls = [web.url("/slow", "slow.example")] + [web.url("/photo")] * 20
    results = fetch(urls, FetchSettings(**QUICK | {"at_once": 2, "ahead_mib": 1, "seconds": 50}), MEGABYTE, at_home)
    assert sorted(next(results).number for _ in range(20)) == list(range(1, 21))
    taken.set()
    assert next(results).data == b"slow"
    assert next(results, None) is None


def test_never_looks_far_ahead(web: Web):
    """An endless list is read no further than a window beyond what is done."""
    web.pages["/"] = b"x"
    read = 0

    def urls() -> Iterator[str]:
        nonlocal read
        for read in itertools.count(1):  # noqa: B007 - counted outside
            yield web.url("/")

    results = fetch(urls(), FetchSettings(**QUICK, at_once=2), 10, at_home)
    for number in range(100):
        assert next(results).data == b"x"
        assert read <= number + 1 + LOOK_AHEAD * 2
    results.close()


# Endings


def test_leaving_early_closes_everything(web: Web):
    web.pages |= {"/x": b"x", "/hang": hang, "/drip": drip_body}
    urls = [web.url("/x"), *[web.url("/hang"), web.url("/drip")] * 10]
    results = fetch(urls, FetchSettings(**QUICK), 10**4, at_home)
    assert next(results).data == b"x"
    assert fetch_threads()
    results.close()
    assert not fetch_threads()
    results = fetch(urls, FetchSettings(**QUICK), 10**4, at_home)
    next(results)
    del results  # as an error in the loop over them does
    gc.collect()
    assert not fetch_threads()


def test_an_error_of_the_list_of_urls_is_the_callers(web: Web):
    def urls() -> Iterator[str]:
        yield web.url("/")
        raise LookupError("no such column")

    with pytest.raises(LookupError, match="column"):
        list(fetch(urls(), FetchSettings(**QUICK), 10, at_home))
    assert not fetch_threads()


@pytest.mark.parametrize("place", ["_go_on", "_ask", "_try_again"])
def test_a_fault_of_ours_is_raised_and_not_waited_for(web: Web, monkeypatch: pytest.MonkeyPatch, place: str):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fetch_module._Downloads, place, broken)
    with pytest.raises(ZeroDivisionError):
        one(web.url("/nothing") if place == "_ask" else "http://127.0.0.1:1/")
    assert not fetch_threads()


def test_an_interrupt_ends_it_at_once(web: Web):
    main = threading.main_thread().ident
    assert main is not None

    async def interrupt(_: Request, stream: Stream) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        await asyncio.Event().wait()

    web.pages["/"] = interrupt
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        one(web.url("/"), seconds=300.0)
    assert time.monotonic() - began < 100
    assert not fetch_threads()


def test_lone_hosts_are_not_kept_open(web: Web):
    """Else thousands of idle connections would use up the files that a process may open."""
    web.pages["/"] = b"x"
    urls = [web.url("/", f"host{number}.example") for number in range(50)] + [web.url("/", "host0.example")]
    before = len(os.listdir("/proc/self/fd"))
    results = fetch(urls, FetchSettings(**QUICK, at_once=4), 10, at_home)
    most = max(len(os.listdir("/proc/self/fd")) for _ in results)
    assert [request.headers.get("connection", "") for request in web.requests].count("close") >= 49
    assert most - before < 40


def test_no_settings_of_haste_are_in_the_digest():
    assert set(FetchSettings().results()) == {
        *("redirects", "opt_out", "robots", "allow_private", "allow_networks", "allow_metadata", "user_agent")
    }
