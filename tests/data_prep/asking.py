"""How tests ask the loopback web for one URL, in haste."""

from __future__ import annotations

from typing import Any

from data_prep.rejections import Cause, Rejection
from data_prep.web.addresses import Lookup
from data_prep.web.fetch import Fetched, FetchSettings, fetch

MEGABYTE = 10**6
QUICK: dict[str, Any] = {"allow_private": True, "seconds": 10.0, "retries": 1, "backoff": 0.01}


def at_home(host: str) -> list[str]:
    return ["127.0.0.1"]


def one(url: str, *, max_bytes: int = MEGABYTE, lookup: Lookup | None = at_home, **changed: Any) -> Fetched:
    [found] = fetch([url], FetchSettings(**{**QUICK, **changed}), max_bytes, lookup)
    return found


def cause(found: Fetched) -> Cause | None:
    return found.data.cause if isinstance(found.data, Rejection) else None
