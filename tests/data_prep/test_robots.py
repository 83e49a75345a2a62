from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.rejections import Cause, Rejection
from data_prep.web import robots
from data_prep.web.addresses import HttpUrl
from data_prep.web.fetch import Fetched, FetchSettings, fetch
from data_prep.web.robots import LARGEST, Memory, Rules
from tests.data_prep.asking import QUICK, at_home, cause
from tests.data_prep.web import Page, Request, Stream, Web, head

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports come again, and what was learnt of them must not."""
    monkeypatch.setattr(robots, "REMEMBERED", Memory())


def rules(text: str | bytes, agent: str = "pixnerd") -> Rules:
    return robots.parse(text.encode() if isinstance(text, str) else text, agent)


def allows(text: str, path: str, agent: str = "pixnerd") -> bool:
    return rules(text, agent).forbids(HttpUrl(f"http://example.org{path}", "example.org")) is None


# Rules


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("/", ["/", "/a?b"], []),
        ("/fish", ["/fish", "/fish.html", "/fishheads/a", "/fish?x"], ["/Fish", "/catfish", "/?id=fish"]),
        ("/fish/", ["/fish/", "/fish/a.htm"], ["/fish", "/fish.html"]),
        ("/fish*", ["/fish", "/fishheads"], ["/catfish"]),
        ("/*.php", ["/a.php", "/a/b.php5?x", "/.php"], ["/", "/a.PHP"]),
        ("/*.php$", ["/a.php", "/a/.php.php"], ["/a.php?x", "/a.php/", "/a.php5"]),
        ("/fish*.php", ["/fish.php", "/fishheads/catfish.php?x"], ["/Fish.PHP"]),
        ("/$", ["/"], ["/a"]),
        ("*a$", ["/a", "/ba"], ["/ab"]),
        ("/a$b", ["/a$b", "/a%24bc"], ["/a", "/ab"]),
        ("/a%2Ab", ["/a*b", "/a%2ab"], ["/axb"]),
        ("/a%24", ["/a$", "/a$b"], ["/a"]),
        ("/b?baz=https://foo.bar", ["/b?baz=https://foo.bar", "/b?baz=https%3A%2F%2Ffoo.bar"], ["/b?baz=https"]),
        ("/a/ツ", ["/a/%E3%83%84", "/a/%e3%83%84x"], ["/a/"]),
        ("/a/%62%61%7A", ["/a/baz", "/a/%62az"], ["/a/%62"]),
        ("/a%2fb", ["/a%2Fb"], ["/a/b"]),
        ("/a b", ["/a%20b"], ["/a+b"]),
        ("", [], ["/", "/a"]),
        ("a", [], ["/a"]),
    ],
)
def test_what_a_pattern_means(pattern: str, matching: list[str], others: list[str]):
    text = f"User-agent: *\nDisallow: {pattern}\n"
    assert [path for path in matching if allows(text, path)] == []
    assert [path for path in others if not allows(text, path)] == []


@pytest.mark.parametrize(
    ("text", "path", "allowed"),
    [
        ("Allow: /p\nDisallow: /", "/page", True),
        ("Disallow: /\nAllow: /p", "/page", True),
        ("Allow: /folder\nDisallow: /folder", "/folder/page", True),
        ("Disallow: /folder\nAllow: /folder", "/folder/page", True),
        ("Allow: /page\nDisallow: /*.htm", "/page.htm", False),
        ("Allow: /page\nDisallow: /*.ph", "/page.php5", True),
        ("Allow: /$\nDisallow: /", "/", True),
        ("Allow: /$\nDisallow: /", "/page.htm", False),
        ("Disallow: /robots.txt", "/robots.txt", True),
    ],
)
def test_the_longest_match_counts_and_of_two_the_one_that_allows(text: str, path: str, allowed: bool):
    assert allows(f"user-agent: *\n{text}", path) == allowed


GROUPS = """\ufeff# a comment
User-agent: a
User-Agent : B/2.0   # who
Crawl-delay: 10
Disallow: /both
Sitemap: https://example.org/map

user-agent: c
allow: /
USER-AGENT: *
DISALLOW: /\r\rUser-agent: b\r\nDisallow: /more
no rule at all
Disallow
User-agent: d
"""


@pytest.mark.parametrize(
    ("agent", "both", "more", "other"),
    [
        ("a", False, True, True),
        ("b", False, False, True),
        ("B", False, False, True),
        ("c", True, True, True),
        ("d", True, True, True),
        ("bb", False, False, False),
        ("pixnerd", False, False, False),
    ],
)
def test_the_groups_of_an_agent_are_put_together(agent: str, both: bool, more: bool, other: bool):
    assert [allows(GROUPS, path, agent) for path in ("/both", "/more", "/other")] == [both, more, other]


@pytest.mark.parametrize(
    "text", ["", "Disallow: /", "<html>User-agent: *</html>", "\0" * 99, "User-agent: other\nDisallow: /"]
)
def test_without_a_group_of_its_own_an_agent_may_ask_for_all(text: str):
    assert allows(text, "/")


@given(st.binary(max_size=200) | st.text("user-agent: *\n/$disalow%2a").map(str.encode), st.text(max_size=20))
def test_any_bytes_are_rules(data: bytes, path: str):
    found = rules(b"user-agent: *\ndisallow: /x\n" + data)
    found.forbids(HttpUrl(f"http://example.org/{path}", "example.org"))


@settings(max_examples=300)
@given(st.text("ab*$", max_size=7), st.text("ab", max_size=7))
def test_a_pattern_matches_what_a_regular_expression_would(pattern: str, path: str):
    ends = pattern.endswith("$")
    expected = re.escape(pattern[:-1] if ends else pattern).replace(r"\*", ".*") + ("$" if ends else "")
    assert allows(f"user-agent: *\ndisallow: /{pattern}", f"/{path}") == (re.match(f"/{expected}", f"/{path}") is None)


def test_rules_made_to_be_slow_are_not():
    text = "user-agent: *\n" + "disallow: /" + "a*" * 2000 + "b\n"
    began = time.monotonic()
    assert allows(text * 100, "/" + "a" * 7000)
    rules("".join(f"user-agent: {number}\n" for number in range(20_000)) + "allow:/\n" * 20_000)
    assert time.monotonic() - began < 3


def test_only_so_much_is_read():
    start = b"user-agent: *\ndisallow: /a\n"
    filler = b"#" * (LARGEST - len(start) - 20) + b"\n"
    data = start + filler + b"disallow: /cut-in-two-here"
    found = rules(data[:LARGEST])
    assert found.forbids(HttpUrl("http://h/a", "h")) and not found.forbids(HttpUrl("http://h/cut-in", "h"))


def test_what_is_remembered_is_bounded_and_gets_old():
    now = itertools.count(step=1000)
    memory = Memory(most=6000, seconds=4500, clock=lambda: next(now))
    rule = rules("user-agent: *\ndisallow: /" + "x" * 990)
    for name in "abc":
        memory.put(name, rule)
    assert memory.get("a") is None, "there is room for two"
    assert memory.get("b") is rule
    memory.put("d", rule)
    assert memory.get("c") is None and memory.get("d") is rule, "the one that was not needed for longest goes"
    assert memory.get("b") is None, "it is too old"


# Asking for them


def asked_with(urls: list[str], **changed: Any) -> list[Fetched]:
    found = fetch(urls, FetchSettings(**{**QUICK, "robots": True, **changed}), 10**6, at_home)
    return sorted(found, key=lambda one: one.number)


def one(url: str, **changed: Any) -> Fetched:
    [found] = asked_with([url], **changed)
    return found


def test_nobody_asks_unasked(web: Web):
    web.pages |= {"/a": b"a", "/robots.txt": b"User-agent: *\nDisallow: /"}
    [found] = fetch([web.url("/a")], FetchSettings(**QUICK), 10, at_home)
    assert found.data == b"a" and not web.asked("/robots.txt")


def test_a_host_is_asked_once_and_obeyed(web: Web):
    web.pages |= {"/a/1": b"a", "/b/1": b"b", "/robots.txt": b"User-agent: *\nDisallow: /b\nUser-agent: x\nAllow: /"}
    urls = [web.url(f"/{folder}/1?{number}") for number in range(50) for folder in "ab"]
    found = asked_with(urls, opt_out=False)
    assert [one.data for one in found[::2]] == [b"a"] * 50
    refused = Fetched(1, Rejection(Cause.OPTED_OUT, "robots.txt: Disallow: /b"), "", None, "", 0)
    assert [one._replace(number=1) for one in found[1::2]] == [refused] * 50
    assert len(web.asked("/robots.txt")) == 1 and not web.asked("/b/1")
    assert web.requests[0].target == "/robots.txt" and web.requests[0].headers["user-agent"].startswith("pixnerd/")
    assert asked_with(urls[:4])[0].data == b"a" and len(web.asked("/robots.txt")) == 1, "another call knows it, too"
    assert one(web.url("/b/1"), user_agent="X").data == b"b", "another agent has rules of its own"


def test_ports_and_names_have_their_own(web: Web):
    web.pages |= {"/a": b"a"}
    with Web({"/a": b"a", "/robots.txt": b"User-agent: *\nDisallow: /"}) as other:
        urls = [web.url("/a"), other.url("/a"), web.url("/a", "h.example"), other.url("/a", "h.example")]
        assert [cause(found) for found in asked_with(urls)] == [None, Cause.OPTED_OUT] * 2
        assert len(web.asked("/robots.txt")) == len(other.asked("/robots.txt")) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 429, 451, 499, 204, 304])
def test_what_is_unavailable_forbids_nothing(web: Web, status: int):
    body = b"" if status in (204, 304) else b"User-agent: *\nDisallow: /"
    web.pages |= {"/a": b"a", "/robots.txt": lambda _, stream: stream.answer(body, status)}
    assert [found.data for found in asked_with([web.url("/a")] * 2)] == [b"a"] * 2
    assert len(web.asked("/robots.txt")) == (2 if status == 429 else 1)


async def cut_short(_: Request, stream: Stream) -> None:
    await stream.send(head(Content_Length="1000") + b"User-agent: *\n")
    stream.writer.close()


async def reset(_: Request, stream: Stream) -> None:
    stream.reset()


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (lambda _, stream: stream.answer(status=500), Cause.SERVER_ERROR),
        (lambda _, stream: stream.answer(status=503), Cause.SERVER_ERROR),
        (cut_short, Cause.CONNECTION),
        (reset, Cause.CONNECTION),
    ],
)
def test_what_cannot_be_reached_forbids_all_for_now(web: Web, page: Page, expected: Cause):
    web.pages |= {"/a": b"a", "/robots.txt": page}
    found = asked_with([web.url("/a")] * 30, retries=2)
    assert {cause(one) for one in found} == {expected}
    assert all(isinstance(one.data, Rejection) and one.data.detail.startswith("robots.txt: ") for one in found)
    # Where a connection ends before an answer aiohttp itself asks once more.
    assert len(web.asked("/robots.txt")) == (6 if page is reset else 3) and not web.asked("/a")
    web.pages["/robots.txt"] = b""
    assert one(web.url("/a")).data == b"a", "it is no verdict for good"


def test_it_is_asked_for_again_before_anything_is_given_up(web: Web):
    answers = itertools.chain([503], itertools.repeat(200))
    web.pages |= {"/a": b"a", "/robots.txt": lambda _, stream: stream.answer(b"", next(answers))}
    assert [found.data for found in asked_with([web.url("/a")] * 3)] == [b"a"] * 3
    assert len(web.asked("/robots.txt")) == 2


def test_rules_hold_for_where_redirects_lead(web: Web):
    web.pages |= {
        "/from": lambda _, stream: stream.answer(status=302, Location=web.url("/to", "strict.example")),
        "/to": b"x",
        "/robots.txt": b"User-agent: *\nDisallow: /to",
    }
    found = one(web.url("/from", "free.example"))
    assert found == Fetched(
        0,
        Rejection(Cause.OPTED_OUT, "robots.txt: Disallow: /to"),
        web.url("/from", "free.example"),
        302,
        "",
        1,
        redirects=1,
        private="127.0.0.1",
    )
    assert not web.asked("/to") and len(web.asked("/robots.txt")) == 2


@pytest.mark.parametrize(("hops", "expected"), [(5, Cause.OPTED_OUT), (6, None)])
def test_rules_may_lie_elsewhere(web: Web, hops: int, expected: Cause | None):
    def page(number: int) -> Page:
        host = f"h{number}.example"
        return lambda _, stream: stream.answer(status=301, Location=web.url(f"/{number}", host))

    web.pages |= {"/a": b"a", "/robots.txt": page(1), f"/{hops}": b"User-agent: *\nDisallow: /"}
    web.pages |= {f"/{number}": page(number + 1) for number in range(1, hops)}
    assert cause(one(web.url("/a"), redirects=0)) is expected


@pytest.mark.parametrize("location", ["http://10.0.0.1/", "file:///etc/passwd", "http://u:p@h.example/", ""])
def test_rules_that_lead_astray_forbid_nothing(web: Web, location: str):
    web.pages |= {"/a": b"a", "/robots.txt": lambda _, stream: stream.answer(status=302, Location=location)}
    assert one(web.url("/a")).data == b"a"


def test_a_private_host_is_refused_as_such():
    [found] = fetch(["http://h.example/"], FetchSettings(robots=True), 10, lambda host: ["10.0.0.1"])
    assert cause(found) is Cause.PRIVATE_ADDRESS


def test_lone_hosts_are_closed_behind_their_last_file(web: Web):
    web.pages |= {"/a": b"a", "/robots.txt": b""}
    found = asked_with([web.url("/a", f"h{number}.example") for number in range(20)])
    assert [one.data for one in found] == [b"a"] * 20
    closed = {path: [one.headers.get("connection") for one in web.asked(path)] for path in ("/a", "/robots.txt")}
    assert closed == {"/a": ["close"] * 20, "/robots.txt": [None] * 20}
    assert web.connections == 20


async def endless(_: Request, stream: Stream) -> None:
    await stream.send(head(Transfer_Encoding="chunked", X_Robots_Tag="noindex"))
    await stream.send(b"1e\r\nUser-agent: *\nDisallow: /bbb\n\r\n")
    while True:
        await stream.send(b"10000\r\n" + b"#" * 0x10000 + b"\r\n")


def test_rules_without_an_end_are_cut(web: Web):
    web.pages |= {"/a": b"a", "/robots.txt": endless}
    found = asked_with([web.url("/a"), web.url("/bbb")], ahead_mib=1)
    assert [cause(one) for one in found] == [None, Cause.OPTED_OUT]


def test_a_host_whose_rules_hang_holds_up_no_other(web: Web):
    """They are waited for without a slot, and the time is not the item's."""

    async def hang(_: Request, stream: Stream) -> None:
        await asyncio.Event().wait()

    with Web({"/robots.txt": hang}) as stuck:
        web.pages |= {"/a": b"a", "/robots.txt": b""}
        urls = [stuck.url("/x")] * 20 + [web.url("/a")] * 20
        answers = fetch(urls, FetchSettings(**QUICK | {"robots": True, "at_once": 2, "seconds": 2}), 10, at_home)
        first = list(itertools.islice(answers, 20))
        assert {found.data for found in first} == {b"a"}
        assert {cause(found) for found in answers} == {Cause.TIMEOUT}
        assert len(stuck.asked("/robots.txt")) == 1


@pytest.fixture(scope="module")
def strict() -> Iterator[Web]:
    async def answer(request: Request, stream: Stream) -> None:
        await stream.answer(request.target.encode())

    async def moved(request: Request, stream: Stream) -> None:
        await stream.answer(status=302, Location=f"/no?{request.target}")

    async def late(_: Request, stream: Stream) -> None:
        await asyncio.sleep(0.01)
        await stream.answer(b"User-agent: *\nDisallow: /no")

    pages: dict[str, Page] = {"/yes": answer, "/no": answer, "/moved": moved, "/robots.txt": late}
    with Web(pages) as web:
        yield web


@settings(max_examples=30)
@given(
    paths=st.lists(st.sampled_from(["yes", "no", "moved"]), max_size=40),
    at_once=st.integers(1, 4),
    per_host=st.integers(1, 3),
    hosts=st.integers(1, 4),
)
def test_any_mix_comes_back_complete(strict: Web, paths: list[str], at_once: int, per_host: int, hosts: int):
    robots.REMEMBERED = Memory()
    before = len(strict.asked("/robots.txt"))
    urls = [strict.url(f"/{path}?{number}", f"h{number % hosts}.example") for number, path in enumerate(paths)]
    found = asked_with(urls, at_once=at_once, per_host=per_host)
    assert [one.number for one in found] == list(range(len(paths)))
    for one, path, number in zip(found, paths, range(len(paths)), strict=True):
        assert cause(one) is Cause.OPTED_OUT if path != "yes" else one.data == f"/yes?{number}".encode()
    assert len(strict.asked("/robots.txt")) - before == len({number % hosts for number in range(len(paths))})
