"""robots.txt by RFC 9309: which paths of a host an agent is asked not to request.

The rules of an agent are those of all groups that name it or, without any, of the groups for `*`. The longest pattern
that matches decides; of two of one length, the one that allows. A pattern is matched in a single pass over the path, so
that no pattern is slow.
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

LARGEST = 512 << 10  # bytes of a file that are read: the RFC asks for 500 KiB at least
REDIRECTS = 5  # that are followed, as the RFC asks
PATH = "/robots.txt"

_TOKEN = re.compile(r"(?:%[0-9A-Fa-f]{2})|(?s:.)")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
# Characters that are not quoted. In a query these are fewer, since a URL in it may be written with or without quoting.
_IN_PATH = _UNRESERVED | frozenset("/:@!&'()*+,;=[]|")
_IN_QUERY = _UNRESERVED | frozenset("&=+*")


class Rule(NamedTuple):
    allows: bool
    text: str  # as it was written
    pieces: tuple[str, ...]  # the text between its `*`s
    ends: bool  # it ends in `$`: the path must end with it

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
            if (start := path.find(piece, at)) < 0:
                return False
            at = start + len(piece)
        last = others[-1]
        return path.endswith(last) and at + len(last) <= len(path) if self.ends else path.find(last, at) >= 0


class Rules:
    """The rules for one agent."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules = sorted(rules, key=lambda rule: (-rule.weight, not rule.allows))
        self.weight = sum(len(rule.text) + rule.weight for rule in self._rules) + 500  # of memory, roughly

    def forbids(self, url: HttpUrl) -> Rejection | None:
        _, path = parted(url)
        if path == PATH:
            return None
        normal = _normalised(path.replace("*", "%2A").replace("$", "%24"))
        rule = next((rule for rule in self._rules if rule.matches(normal)), None)
        if rule is None or rule.allows:
            return None
        return Rejection(Cause.OPTED_OUT, f"robots.txt: Disallow: {rule.text[:100]}")


def parted(url: HttpUrl) -> tuple[str, str]:
    """The origin of a URL, which has one robots.txt, and the rest: ("https://host.example", "/a?b")."""
    scheme, _, host, path = url.text.split("/", 3)
    return f"{scheme}//{host}", f"/{path}"


def parse(data: bytes, agent: str) -> Rules:
    """The rules for an agent in a file, which may be cut off after LARGEST bytes."""
    if len(data) >= LARGEST:  # its last line may be incomplete
        data = data[: max(data.rfind(b"\n", 0, LARGEST), data.rfind(b"\r", 0, LARGEST), 0)]
    ours, everybody = agent.lower(), "*"
    groups: dict[str, list[Rule]] = {}
    addressed: set[str] = set()
    in_rules = False
    for line in re.split(r"[\r\n]+", data.decode("utf-8-sig", "surrogateescape")):
        name, _, value = (text.strip() for text in line.partition("#")[0].partition(":"))
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
    """The agent that a line names; a version or a remark may follow the name."""
    match = re.match(r"\*|[A-Za-z0-9_-]*", value)
    return match[0].lower() if match else ""


def _rule(allows: bool, value: str) -> Rule:
    pattern = value.removesuffix("$")
    pieces = _normalised(pattern.replace("$", "%24")).split("*")
    return Rule(allows, value, tuple(pieces), pattern != value)


def _normalised(path: str) -> str:
    """A path or pattern in the one of its percent-encoded forms in which they are compared: `/%7ea b` is `/~a%20b`."""
    path, mark, query = path.partition("?")
    return _quoted(path, _IN_PATH) + mark + _quoted(query, _IN_QUERY)


def _quoted(text: str, kept: frozenset[str]) -> str:
    def token(match: re.Match[str]) -> str:
        written = match[0]
        if len(written) == 3:
            letter = chr(int(written[1:], 16))
            return letter if letter in _UNRESERVED else written.upper()
        return written if written in kept else quote(written, "", errors="surrogateescape")

    return _TOKEN.sub(token, text)


def without(refused: Rejection, status: int | None, astray: bool) -> Rules | Rejection:
    """The rules of a host whose robots.txt could not be read, by RFC 9309, 2.3.1.

    A file that is unavailable allows everything; one that cannot be reached forbids everything for the time being.
    `astray`: a redirect led away from the host, so that an address that may not be requested makes it unavailable.
    """
    if status is not None:
        unavailable = 400 <= status < 500 or refused.cause in (Cause.HTTP_ERROR, Cause.BAD_URL)
    else:
        unavailable = astray and refused.cause in (Cause.PRIVATE_ADDRESS, Cause.BAD_URL)
    if unavailable or refused.cause is Cause.TOO_MANY_REDIRECTS:
        return Rules()
    return refused._replace(detail=f"robots.txt: {refused.detail}")


class Memory:
    """A cache of rules by origin, bounded in memory: the least recently used are dropped, and those a day old."""

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


REMEMBERED = Memory()  # shared by all downloads of this process


class Known:
    """The rules that one downloader uses: those that the process caches, and refusals of unreachable origins."""

    def __init__(self, agent: str, most: int) -> None:
        """`most`: unreachable origins that are remembered."""
        self._agent, self._most = agent, most
        self._unreachable: dict[str, Rejection] = {}

    def of(self, origin: str) -> Rules | Rejection | None:
        """Its rules, or why nothing of it may be requested; None if its robots.txt was not requested yet."""
        return self._unreachable.get(origin) or REMEMBERED.get(f"{self._agent} {origin}")

    def learn(self, origin: str, answer: bytes | Rejection, status: int | None, *, astray: bool) -> None:
        rules = parse(answer, self._agent) if isinstance(answer, bytes) else without(answer, status, astray)
        if not isinstance(rules, Rejection):
            REMEMBERED.put(f"{self._agent} {origin}", rules)
            return
        self._unreachable[origin] = rules
        if len(self._unreachable) > self._most:
            del self._unreachable[next(iter(self._unreachable))]
