from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from data_prep.rejections import Cause, Rejection
from data_prep.web import addresses
from data_prep.web.addresses import HttpUrl, Opened, http_url, is_public
from data_prep.web.fetch import FetchSettings
from infra.config import parse
from infra.errors import SettingsError
from tests.data_prep.asking import cause, one
from tests.data_prep.web import Web

pytestmark = pytest.mark.filterwarnings("error")

# URLs


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.org/x.jpg",
        "//example.org/x.jpg",
        "file:///etc/passwd",
        "ftp://example.org/x.jpg",
        "gopher://example.org/",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "s3://bucket/x.jpg",
        "http:///x.jpg",
        "http://",
        "http://:80/",
        "https:x.jpg",
        "http://user:hunter2@example.org/",
        "http://hunter2@example.org/",
        "http://@example.org/",
        "http://user:hunter2/@example.org/",
        "http://example.org\\@hunter2.org/",
        "http://exam\nple.org/",
        "http://example.org/\r\nHost: other",
        "http://example.org/\x00",
        "http://example.org:0/",
        "http://example.org:65536/",
        "http://example.org:http/",
        "http://exa mple.org/",
        "http://exam%70le.org/",
        "http://example..org/",
        "http://" + "a" * 64 + ".org/",
        "http://" + "a." * 130 + "org/",
        "http://[::1/",
        "http://[v1.x]/",
        "http://[fe80::1%25eth0]/",
        "http://1.2.3.4.5/",
        "http://256.1.1.1/",
        "http://x.1/",
        "http://example.org/\ud800",
        "http://\udcff.org/",
        "http://" + "\u2603" * 90 + "/",
        "http://example.org/" + "x" * 9000,
    ],
)
def test_what_is_no_web_address_is_refused_unasked(url: str):
    found = one(url)
    assert cause(found) is Cause.BAD_URL
    assert found.url == "" and found.tries == 0 and found.status is None
    assert "hunter2" not in repr(found)


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        (" https://Example.ORG/a \n", "https://example.org/a"),
        ("http://example.org", "http://example.org/"),
        ("http://example.org.:8080/a#part", "http://example.org:8080/a"),
        ("http://example.org/ä b.jpg?ü=1", "http://example.org/%C3%A4%20b.jpg?%C3%BC=1"),
        # signed URLs: quoting must stay as it is
        ("http://example.org/a%2Fb%7e?s=%2B%2f+a%", "http://example.org/a%2Fb%7e?s=%2B%2f+a%"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://２１３０７０６４３３/", "http://127.0.0.1/"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://0177.0.0.1/", "http://127.0.0.1/"),
        ("http://127.1/", "http://127.0.0.1/"),
        ("http://127.0.0.1./", "http://127.0.0.1/"),
        ("http://[0:0::1]:80/", "http://[::1]:80/"),
        ("http://a_b.example.org/", "http://a_b.example.org/"),
    ],
)
def test_a_url_is_asked_for_as_it_stands(url: str, asked: str):
    found = http_url(url)
    assert isinstance(found, HttpUrl) and found.text == asked


@given(st.text() | st.text("htp:/[]@%.#?\\0x1fé\u3002").map("http://".__add__))
def test_any_text_is_a_url_or_a_rejection(text: str):
    found = http_url(text)
    if isinstance(found, Rejection):
        assert found.cause is Cause.BAD_URL
    else:
        # What was checked is what the client will make of it.
        assert URL(found.text, encoded=True).raw_host == found.host
        assert http_url(found.text) == found
        assert found.text.isascii() and found.text.isprintable() and " " not in found.text


@given(st.from_regex(addresses._PLAIN, fullmatch=True))
def test_what_is_taken_as_it_stands_is_what_its_parts_come_to(text: str):
    assert http_url(text) == addresses._parsed(text)


# Addresses

CLOSED = [
    "127.0.0.1",
    "127.255.255.254",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.127.255.255",
    "0.0.0.0",
    "0.1.2.3",
    "192.0.0.192",
    "192.0.2.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "192.88.99.1",
    "168.63.129.16",
    "::1",
    "::",
    "fe80::1",
    "fe80::1%lo",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "3fff::1",
    "100::1",
    "5f00::1",
    "fec0::1",
    "2606:4700::1111%lo",
]
OPEN = [
    "1.1.1.1",
    "8.8.8.8",
    "172.15.255.255",
    "172.32.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "168.63.129.17",
    "192.0.1.1",
    "2606:4700::1111",
    "2a00:1450::1",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]


@pytest.mark.parametrize("address", CLOSED)
def test_private_addresses(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", OPEN)
def test_public_addresses(address: str):
    assert is_public(address)


def test_what_is_no_address_is_not_public():
    assert not is_public("example.org") and not is_public("")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[64:ff9b::127.0.0.1]",
        "[2002:7f00:1::]",
        "[fe80::1]",
        "localhost",
        "１２７.０.０.１",
        "127。0。0。1",
    ],
)
def test_this_machine_is_not_asked(web: Web, host: str):
    web.pages["/"] = b"secret"
    found = one(web.url("/", host), allow_private=False, lookup=None)
    assert cause(found) is Cause.PRIVATE_ADDRESS and found.tries == 1
    assert web.connections == 0
    assert one(web.url("/"), lookup=None).data == b"secret"


@pytest.mark.parametrize("address", CLOSED)
def test_a_name_may_not_lead_into_a_private_network(address: str):
    found = one("http://innocent.example/", allow_private=False, lookup=lambda host: [address])
    assert cause(found) is Cause.PRIVATE_ADDRESS


def test_a_name_with_private_addresses_only():
    found = one("http://innocent.example/", allow_private=False, lookup=lambda host: ["10.0.0.1", "::1", "127.0.0.1"])
    assert found.data == Rejection(Cause.PRIVATE_ADDRESS, "10.0.0.1")


@pytest.fixture
def home_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 counts as public, so that a first hop can succeed; the rest of loopback stays private."""
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or is_public(address))


@pytest.mark.parametrize("target", ["http://127.0.0.2:{}/", "http://inside.example:{}/", "http://[::1]:{}/"])
def test_a_redirect_may_not_lead_inside(web: Web, home_is_public: None, target: str):
    web.pages["/"] = lambda _, stream: stream.answer(status=302, Location=target.format(web.port))
    lookup = {"outside.example": ["127.0.0.1"], "inside.example": ["127.0.0.2"]}.__getitem__
    found = one(web.url("/", "outside.example"), allow_private=False, lookup=lookup)
    assert cause(found) is Cause.PRIVATE_ADDRESS and found.tries == 1
    assert web.connections == 1


def test_only_the_checked_addresses_of_a_name_are_connected_to(web: Web, home_is_public: None):
    web.pages["/"] = b"x"
    found = one(web.url("/", "mixed.example"), allow_private=False, lookup=lambda host: ["127.0.0.2", "127.0.0.1"])
    assert found.data == b"x"


def test_a_name_that_changes_its_mind_is_checked_each_time(web: Web, home_is_public: None):
    """The address that was checked is the one connected to: there is no second look-up in between."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    web.pages["/"] = b"x"
    url = web.url("/", "rebinding.example")
    assert one(url, allow_private=False, lookup=lambda host: next(answers)).data == b"x"
    assert cause(one(url, allow_private=False, lookup=lambda host: next(answers))) is Cause.PRIVATE_ADDRESS
    assert web.connections == 1


# Networks of one's own

LINK_LOCAL_OR_METADATA = [
    "169.254.169.254",
    "169.254.0.1",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fe80::1",
    "fe80::a9fe:a9fe%lo",
    "fd00:ec2::254",
    "fd00:c1::a9fe:a9fe",
    "fd00:42::42",
    "fd20:ce::254",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
]
TUNNELS = ["2002:a9fe:a9fe::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "::169.254.169.254", "64:ff9b:1::a9fe:a9fe"]
EVERYTHING: dict[str, Any] = {"allow_private": True, "allow_networks": ["0.0.0.0/0", "::/0"]}


def opened(**changed: object) -> Opened:
    return FetchSettings.model_validate(changed).opened


@pytest.mark.parametrize("address", [*LINK_LOCAL_OR_METADATA, *TUNNELS])
def test_no_network_that_is_named_opens_link_local_and_metadata_addresses(address: str):
    assert not opened(**EVERYTHING).admits(address)
    found = one("http://innocent.example/", lookup=lambda host: [address], **EVERYTHING)
    assert cause(found) is Cause.PRIVATE_ADDRESS


def test_they_have_a_switch_of_their_own():
    assert all(opened(allow_metadata=True).admits(address) for address in LINK_LOCAL_OR_METADATA)
    assert not any(opened(allow_metadata=True).admits(address) for address in [*TUNNELS, "127.0.0.1", "10.0.0.1"])


@pytest.mark.parametrize("address", CLOSED)
def test_only_this_machine_is_opened_with_what_is_private(address: str):
    loopback = address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1", "64:ff9b::127.0.0.1")
    assert opened(allow_private=True).admits(address) == loopback


def test_a_network_that_is_named_is_opened_and_no_other():
    ours = opened(allow_networks=["10.0.0.0/8", "192.168.7.1", "fd12:3456::/32"])
    assert all(map(ours.admits, ["10.255.0.1", "::ffff:10.0.0.1", "192.168.7.1", "fd12:3456::9", "1.1.1.1"]))
    assert not any(map(ours.admits, ["127.0.0.1", "192.168.7.2", "172.16.0.1", "fd12:3457::9", "::1"]))


def test_a_server_in_a_network_that_is_named_is_asked(web: Web):
    web.pages["/"] = b"ours"
    lookup = {"ours.example": ["127.0.0.1"], "theirs.example": ["127.0.0.9"]}.__getitem__
    settings: dict[str, Any] = {"allow_private": False, "allow_networks": ["127.0.0.0/30"]}
    assert one(web.url("/", "ours.example"), lookup=lookup, **settings).data == b"ours"
    assert one(web.url("/"), lookup=lookup, **settings).data == b"ours"
    assert cause(one(web.url("/", "theirs.example"), lookup=lookup, **settings)) is Cause.PRIVATE_ADDRESS
    assert cause(one(web.url("/", "127.0.0.9"), lookup=lookup, **settings)) is Cause.PRIVATE_ADDRESS
    assert web.connections == 2


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ("10.0.0.1/8", r"write 10\.0\.0\.0/8"),
        ("our network", "such as 10.0.0.0/8"),
        ("10.0.0.0/33", "such as 10.0.0.0/8"),
        ("169.254.0.0/16", "allow_metadata"),
        ("100.100.100.200", "allow_metadata"),
        ("fe80::/64", "allow_metadata"),
        ("2002::/16", "the IPv4 network"),
    ],
)
def test_networks_that_would_open_nothing_are_refused(network: str, said: str):
    with pytest.raises(SettingsError, match=said):
        parse(FetchSettings, {"allow_networks": [network]})


def test_the_settings_that_open_addresses_open_no_others():
    found = addresses.opening(["10.1.2.3", "::ffff:10.1.2.3", "1.1.1.1", "::1", "fd12::9", "169.254.169.254", "no"])
    assert found == {"allow_private": True, "allow_networks": ["10.1.2.3", "fd12::9"]}
    assert all(map(parse(FetchSettings, found).opened.admits, ["10.1.2.3", "127.0.0.1", "fd12::9"]))
    assert not parse(FetchSettings, found).opened.admits("10.1.2.4")
    assert addresses.opening(["1.1.1.1", "169.254.169.254"]) == {}
