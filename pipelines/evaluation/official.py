"""GenEval's prompts: the official set, sets of any size made as it was made, and the set with rephrased prompts.

The official file was drawn by a seed, so it is drawn again here, and compared with the published file by its sha256.
"""

from __future__ import annotations

import hashlib
import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from infra.causes import first_line
from infra.errors import EvaluationError
from infra.files import appearing, sha256_of
from pipelines.evaluation.detector.objects import COLOURS, OBJECTS

PER_TASK, SEED = 100, 43  # of the official set
URL = (
    "https://raw.githubusercontent.com/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/"
    "evaluation_metadata.jsonl"
)
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
# The rephrased prompts that BAGEL (arXiv 2505.14683) was evaluated with: the same requirements in long sentences.
REPHRASED_URL = (
    "https://raw.githubusercontent.com/zsxkib/cog-bagel/6ed692d940e93865652b32e8074542ed3bac51d8/eval/gen/geneval/"
    "prompts/evaluation_metadata_long.jsonl"
)
REPHRASED_SHA256 = "09472cc9c24e225417b1d5df27e688e5f2a0fcac9ec772f33d9debe4e5d49f27"

Sample = dict[str, Any]  # a line of GenEval's file

_NUMBERS = ("zero", "one", "two", "three", "four")
_POSITIONS = ("left of", "right of", "above", "below")
_NO_PEOPLE = OBJECTS.index("person")  # people are not asked to have a colour


def official() -> str:
    """The published file."""
    text = seeded(PER_TASK, SEED)
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise EvaluationError(
            "this version of numpy draws other prompts than the official ones",
            remedy=f"download {URL} (sha256 {SHA256}), and set prompts to the file",
        )
    return text


def rephrased() -> str:
    """The published file, which is downloaded once."""
    path = _cache() / "geneval_rephrased.jsonl"
    remedy = f"download {REPHRASED_URL} (sha256 {REPHRASED_SHA256}), and put it there"
    if not path.is_file():
        try:
            _download(REPHRASED_URL, path)
        except (OSError, ValueError) as error:
            raise EvaluationError(f"there is no file {path} ({first_line(error)})", remedy=remedy) from None
    if (found := sha256_of(path)) != REPHRASED_SHA256:
        raise EvaluationError(f"{path} is another file, of sha256 {found}", remedy=remedy)
    return path.read_text(encoding="utf-8")


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "pixnerd"


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=30) as reply:
        content = reply.read(4 << 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    with appearing(path) as unfinished:
        unfinished.write_bytes(content)


def seeded(per_task: int, seed: int) -> str:
    """A set of up to `per_task` prompts a task: what is drawn twice is left out, and there are 80 classes."""
    rng, lines = np.random.default_rng(seed), dict[str, None]()
    for sample in _drawn(per_task, rng):
        lines[json.dumps(sample)] = None
    return "".join(f"{line}\n" for line in lines)


def _drawn(per_task: int, rng: np.random.Generator) -> Iterator[Sample]:
    for index in rng.choice(len(OBJECTS), size=len(OBJECTS), replace=False):
        yield _sample("single_object", [_wants(index)], _one(OBJECTS[index]))
    for draw in (_two_objects, _counting, _colour, _position, _two_colours):
        for _ in range(per_task):
            yield draw(rng)


def _two_objects(rng: np.random.Generator) -> Sample:
    a, b = rng.choice(len(OBJECTS), size=2, replace=False)
    return _sample("two_object", [_wants(a), _wants(b)], f"{_one(OBJECTS[a])} and {_one(OBJECTS[b])}")


def _counting(rng: np.random.Generator) -> Sample:
    index = rng.choice(len(OBJECTS))
    count = int(rng.integers(2, len(_NUMBERS) - 1, endpoint=True))
    name = OBJECTS[index]
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    wanted, unwanted = [_wants(index, count)], [_wants(index, count + 1)]
    return _sample("counting", wanted, f"{_NUMBERS[count]} {plural}", exclude=unwanted)


def _colour(rng: np.random.Generator) -> Sample:
    index = _without_people(rng.choice(len(OBJECTS) - 1))
    colour = COLOURS[rng.choice(len(COLOURS))]
    return _sample("colors", [_wants(index, color=colour)], f"{_one(colour)} {OBJECTS[index]}")


def _position(rng: np.random.Generator) -> Sample:
    a, b = rng.choice(len(OBJECTS), size=2, replace=False)
    position = _POSITIONS[rng.choice(len(_POSITIONS))]
    wanted = [_wants(b), _wants(a, position=(position, 0))]
    return _sample("position", wanted, f"{_one(OBJECTS[a])} {position} {_one(OBJECTS[b])}")


def _two_colours(rng: np.random.Generator) -> Sample:
    a, b = map(_without_people, rng.choice(len(OBJECTS) - 1, size=2, replace=False))
    of_a, of_b = (COLOURS[number] for number in rng.choice(len(COLOURS), size=2, replace=False))
    text = f"{_one(of_a)} {OBJECTS[a]} and {_one(of_b)} {OBJECTS[b]}"
    return _sample("color_attr", [_wants(a, color=of_a), _wants(b, color=of_b)], text)


def _without_people(number: int) -> int:
    return (number + 1 + _NO_PEOPLE) % len(OBJECTS)


def _one(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _wants(index: int, count: int = 1, **more: Any) -> Sample:
    return {"class": OBJECTS[index], "count": count, **more}


def _sample(tag: str, include: list[Sample], text: str, exclude: list[Sample] | None = None) -> Sample:
    unwanted = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": include, **unwanted, "prompt": f"a photo of {text}"}
