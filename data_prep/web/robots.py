"""robots.txt, as RFC 9309 has it: what of a host an agent is asked not to ask for.

The rules are those of all groups that name the agent or, where none does, of those for everybody. The longest pattern
that matches decides; of two as long, the one that allows. Patterns are matched in one walk over the path, so that none
can be made to be slow.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import quote

from data_prep.rejections import Cause, Rejection
from data_prep.web.addresses import HttpUrl

LARGEST = 512 << 10  # bytes of a file that are looked at: the RFC asks for 500 KiB at least
REDIRECTS = 5  # that are followed to it
PATH = "/robots.txt"

_TOKEN = re.compile(r"(?:%[0-9A-Fa-f]{2})|(?s:.)")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# What stands for itself: in a query fewer do, as an address in it may be written either way.
_IN_PATH = _UNRESERVED | frozenset("/:@!&'()*+,;=[]|")
_IN_QUERY = _UNRESERVED | frozenset("&=+*")


class Rule(NamedTuple):
    allows: bool
    text: str  # as it was written
    pieces: tuple[str, ...]  # what stands between its stars
    ends: bool  # nothing may follow

    @property
    def weight(self) -> int:
        return sum(map(len, self.pieces)) + len(self.pieces) - 1 + self.ends

    def matches(self, path: str) -> bool:
        first, *others = self.pieces
        if not path.startswith(first):
            return False
        at = len(first)
        if not others:
            return not self.ends or at == len(path)
        for piece in others[:-1]:
            if (found := path.find(piece, at)) < 0:
                return False
            at = found + len(piece)
        last = others[-1]
        return path.endswith(last) and at + len(last) <= len(path) if self.ends else path.find(last, at) >= 0


class Rules:
    """Those for one agent."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules = sorted(rules, key=lambda rule: (-rule.weight, not rule.allows))
        self.weight = sum(len(rule.text) + rule.weight for rule in self._rules) + 500  # of memory, roughly

    def forbids(self, url: HttpUrl) -> Rejection | None:
        _, path = parted(url)
        if path == PATH:
            return None
        said = _coded(path.replace("*", "%2A").replace("$", "%24"))
        decides = next((rule for rule in self._rules if rule.matches(said)), None)
        if decides is None or decides.allows:
            return None
        return Rejection(Cause.OPTED_OUT, f"robots.txt: Disallow: {decides.text[:100]}")


def parted(url: HttpUrl) -> tuple[str, str]:
    """Its scheme, host and port, to which one robots.txt belongs, and what follows."""
    scheme, _, host, path = url.text.split("/", 3)
    return f"{scheme}//{host}", f"/{path}"


def parse(data: bytes, agent: str) -> Rules:
    """The rules for an agent, of a file that may be cut after LARGEST bytes."""
    if len(data) >= LARGEST:  # its last line may be half of one
        data = data[: max(data.rfind(b"\n", 0, LARGEST), data.rfind(b"\r", 0, LARGEST), 0)]
    ours, everybody = agent.lower(), "*"
    groups: dict[str, list[Rule]] = {}
    addressed: set[str] = set()
    in_rules = False
    for line in re.split(r"[\r\n]+", data.decode("utf-8-sig", "surrogateescape")):
        name, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        if (name := name.lower()) == "user-agent":
            addressed = set() if in_rules else addressed
            in_rules = False
            if (agent := _agent_in(value)) in (ours, everybody):
                addressed.add(agent)
                groups.setdefault(agent, [])
        elif name in ("allow", "disallow"):
            in_rules = True
            for agent in addressed if value else ():
                groups[agent].append(_rule(name == "allow", value))
    return Rules(groups.get(ours, groups.get(everybody, [])))


def _agent_in(value: str) -> str:
    """The name that stands there; versions and remarks may follow it."""
    found = re.match(r"\*|[A-Za-z0-9_-]*", value)
    return found[0].lower() if found else ""


def _rule(allows: bool, value: str) -> Rule:
    pattern = value.removesuffix("$")
    pieces = _coded(pattern.replace("$", "%24")).split("*")
    return Rule(allows, value, tuple(pieces), pattern != value)


def _coded(path: str) -> str:
    """With whatever may be written in several ways written in one."""
    path, mark, query = path.partition("?")
    return _written(path, _IN_PATH) + mark + _written(query, _IN_QUERY)


def _written(text: str, kept: frozenset[str]) -> str:
    def one(found: re.Match[str]) -> str:
        letter = found[0]
        if len(letter) == 3:
            meant = chr(int(letter[1:], 16))
            return meant if meant in _UNRESERVED else letter.upper()
        return letter if letter in kept else quote(letter, "", errors="surrogateescape")

    return _TOKEN.sub(one, text)


def without(refused: Rejection, status: int | None, astray: bool) -> Rules | Rejection:
    """What holds where there are no rules to read, after RFC 9309, 2.3.1.

    What is unavailable allows all; what cannot be reached forbids all for the time being. `astray`: a redirect led on.
    """
    if status is not None:
        unavailable = 400 <= status < 500 or refused.cause in (Cause.HTTP_ERROR, Cause.BAD_URL)
    else:
        unavailable = astray and refused.cause in (Cause.PRIVATE_ADDRESS, Cause.BAD_URL)
    if unavailable or refused.cause is Cause.TOO_MANY_REDIRECTS:
        return Rules()
    return refused._replace(detail=f"robots.txt: {refused.detail}")


class Memory:
    """What hosts have said, bounded in memory: what was not needed for longest is forgotten, and what is a day old."""

    def __init__(
        self, most: int = 32 << 20, seconds: float = 24 * 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._seconds, self._clock = most, seconds, clock
        self._known: OrderedDict[str, tuple[float, Rules]] = OrderedDict()
        self._weight = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> Rules | None:
        with self._lock:
            since, rules = self._known.get(key, (0.0, None))
            if rules is None:
                return None
            if self._clock() - since > self._seconds:
                self._forget(key)
                return None
            self._known.move_to_end(key)
            return rules

    def put(self, key: str, rules: Rules) -> None:
        with self._lock:
            self._forget(key)
            self._known[key] = self._clock(), rules
            self._weight += rules.weight
            while self._weight > self._most and len(self._known) > 1:
                self._forget(next(iter(self._known)))

    def _forget(self, key: str) -> None:
        if key in self._known:
            self._weight -= self._known.pop(key)[1].weight


REMEMBERED = Memory()  # by this process, for all that it downloads


class Known:
    """What one downloader knows of origins: rules, which the process remembers, and for now what cannot be reached."""

    def __init__(self, agent: str, most: int) -> None:
        """`most`: unreachable origins that are told from those that nobody has asked."""
        self._agent, self._most = agent, most
        self._unreachable: dict[str, Rejection] = {}

    def of(self, origin: str) -> Rules | Rejection | None:
        return self._unreachable.get(origin) or REMEMBERED.get(f"{self._agent} {origin}")

    def learn(self, origin: str, answer: bytes | Rejection, status: int | None, *, astray: bool) -> None:
        rules = parse(answer, self._agent) if isinstance(answer, bytes) else without(answer, status, astray)
        if not isinstance(rules, Rejection):
            REMEMBERED.put(f"{self._agent} {origin}", rules)
            return
        self._unreachable[origin] = rules
        if len(self._unreachable) > self._most:
            del self._unreachable[next(iter(self._unreachable))]
