"""Where the URLs of a list lead: to the world, or into a network of one's own, where downloads must be let in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from threading import Thread
from typing import Any, NamedTuple

from data_prep.rejections import Rejection
from data_prep.web.addresses import Lookup, http_url, is_public, look_up, opening

MOST = 8  # hosts that are looked up
SECONDS = 3.0  # for all of them


class Hosts(NamedTuple):
    private: list[str]
    public: list[str]
    unknown: list[str]  # without an address, as far as this machine can tell
    fetch: dict[str, Any]  # settings of downloads that open the private ones; empty where none should


def hosts_of(urls: Sequence[str], lookup: Lookup = look_up) -> Hosts:
    """The hosts that are named most often. Nothing is connected to."""
    parsed = [found.host for found in map(http_url, urls) if not isinstance(found, Rejection)]
    names = [name for name, _ in Counter(parsed).most_common(MOST)]
    answers = {name: _asked(name, lookup) for name in names}
    found = Hosts([], [], [], {})
    inside: list[str] = []
    for name, answer in answers.items():
        addresses: list[str] = []
        with suppress(OSError, ValueError, TimeoutError):
            addresses = answer.result(SECONDS)
        where = found.unknown if not addresses else found.public if all(map(is_public, addresses)) else found.private
        where.append(name)
        inside += addresses
    return found._replace(fetch=opening(inside))


def _asked(name: str, lookup: Lookup) -> Future[list[str]]:
    """In a thread of its own, for which nobody waits longer than he likes."""
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            answer.set_result(lookup(name))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer.set_exception(error)

    Thread(target=ask, name="dns", daemon=True).start()
    return answer
