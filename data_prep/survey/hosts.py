"""Whether the hosts of a list of URLs are public or in a private network, which downloads must be allowed to enter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from data_prep.rejections import Rejection
from data_prep.web.addresses import Lookup, http_url, is_public, look_up, looked_up, opening

MOST = 8  # hosts that are looked up
SECONDS = 3.0  # to wait for each of them


class Hosts(NamedTuple):
    private: list[str]
    public: list[str]
    unknown: list[str]  # that this machine cannot resolve
    fetch: dict[str, Any]  # settings of downloads that allow the private hosts; empty if there is none to allow


def hosts_of(urls: Sequence[str], lookup: Lookup = look_up) -> Hosts:
    """The hosts that the URLs name most often, looked up by DNS alone: nothing is connected to."""
    parsed = [url.host for url in map(http_url, urls) if not isinstance(url, Rejection)]
    lookups = {name: looked_up(name, lookup) for name, _ in Counter(parsed).most_common(MOST)}
    hosts = Hosts([], [], [], {})
    all_addresses: list[str] = []
    for name, pending in lookups.items():
        addresses: list[str] = []
        with suppress(OSError, ValueError, TimeoutError):
            addresses = pending.result(SECONDS)
        kind = hosts.unknown if not addresses else hosts.public if all(map(is_public, addresses)) else hosts.private
        kind.append(name)
        all_addresses += addresses
    return hosts._replace(fetch=opening(all_addresses))
