"""What `pixnerd sample` is asked to draw: prompts or classes of the command line and of a file, each with seeds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infra.config import nearest
from infra.errors import CheckpointError, SettingsError
from infra.files import read_text
from infra.text import cut

MOST_SEEDS = 100_000  # in one range; more can only be a typing error
_NUMBER = r"\d{1,99}"  # int() refuses more than 4,300 digits
_KEYS = ("prompt", "seed", "seeds")  # in a row of a .jsonl file


class Subject(NamedTuple):
    """One prompt, or one class (`prompt` is then its name), and the seeds that it is drawn from."""

    prompt: str
    label: int | None
    seeds: tuple[int, ...]


class Request(NamedTuple):
    text: str
    seeds: tuple[int, ...] | None  # None: the seeds of the command line


def subjects(
    line: Sequence[str], file: Path | None, seeds: Sequence[int], labels: Labels | None = None
) -> list[Subject]:
    """Everything asked for; what is asked for twice is drawn once, at its first place, with the seeds of both."""
    requests = [Request(prompt, None) for prompt in line] + (read_prompts(file) if file is not None else [])
    if not requests:
        raise SettingsError(
            "there is nothing to draw", remedy='give a prompt (an empty one, "", is one too), or --prompts FILE'
        )
    seeds_of: dict[tuple[str, int | None], dict[int, None]] = {}  # the inner keys are an ordered set
    for text, own_seeds in requests:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"the prompt {text!r} is not valid text", remedy="write it in UTF-8") from None
        subject: tuple[str, int | None] = (text, None) if labels is None else labels.find(text)
        seeds_of.setdefault(subject, {}).update(dict.fromkeys(seeds if own_seeds is None else own_seeds))
    return [Subject(name, label, tuple(numbers)) for (name, label), numbers in seeds_of.items()]


# ------------------------------------------------------------------------------------------------ seeds


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds and ranges, each seed once and in the order given: 5,0-2,1 is (5, 0, 1, 2)."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        numbers = [first, last] if dash else [first, first]
        if not all(re.fullmatch(_NUMBER, number, re.ASCII) for number in numbers):
            raise _no_seeds(text)
        low, high = map(int, numbers)
        if not low <= high < 2**64:
            raise _no_seeds(text)
        if high - low >= MOST_SEEDS:
            raise SettingsError(f"`{cut(text)}` names more than {MOST_SEEDS:,} seeds", remedy="draw fewer in one call")
        seeds.update(dict.fromkeys(range(low, high + 1)))
    return tuple(seeds)


def _no_seeds(text: str) -> SettingsError:
    return SettingsError(f"`{cut(text)}` names no seeds", remedy="write 0, 0-3, or 1,5,9")


# ------------------------------------------------------------------------------------------------ files


def read_prompts(path: Path) -> list[Request]:
    """.txt: one prompt a line; .jsonl: {"prompt": "two cats", "seeds": [0, 1]} a line; # begins a comment in both."""
    if path.suffix not in (".txt", ".jsonl"):
        raise SettingsError(f"{path} is of no known kind of prompt file", remedy="name a .txt or a .jsonl file")
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), start=1)]
    kept = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not kept:
        raise SettingsError(f"{path} holds no prompts", remedy="write one a line")
    if path.suffix == ".txt":
        return [Request(line, None) for _, line in kept]
    return [_row(line, f"line {number} of {path}") for number, line in kept]


def _row(line: str, where: str) -> Request:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
        raise SettingsError(f"{where} is not JSON ({why})", remedy='write {"prompt": "..."}') from None
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, int) and not isinstance(prompt, bool):
        prompt = str(prompt)
    if not isinstance(prompt, str):
        raise SettingsError(f"{where} has no `prompt`", remedy='write {"prompt": "...", "seeds": [0, 1]}')
    if "seed" in row and "seeds" in row:
        raise SettingsError(f"{where} has both `seed` and `seeds`", remedy="write one of them")
    for key in row.keys() - _KEYS:  # other keys are allowed, as evaluation's prompt files have tags; typing errors not
        if near := nearest(key, _KEYS):
            raise SettingsError(f"{where} has `{cut(key)}`", remedy=f"did you mean `{near}`?")
    seeds = row.get("seeds", row.get("seed"))
    if seeds is None:
        return Request(prompt, None)
    text = ",".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)
    try:
        return Request(prompt, parse_seeds(text))
    except SettingsError as error:
        raise SettingsError(f"{where}: {error.message}", remedy=error.remedy) from None


# ------------------------------------------------------------------------------------------------ labels


class Labels:
    """The classes of a class-to-image checkpoint, found by number and, if they have names, by name."""

    def __init__(self, classes: int, names: Sequence[str] | None = None) -> None:
        self.classes, self.names = classes, names
        # A whole name, or one of its synonyms between commas (`tench, Tinca tinca`), in lower case -> class numbers.
        self._numbers: dict[str, list[int]] = {}
        for number, name in enumerate(names or []):
            for part in dict.fromkeys([name, *name.split(",")]):
                self._numbers.setdefault(part.strip().casefold(), []).append(number)

    def find(self, text: str) -> tuple[str, int]:
        """A class's name and number; an empty text means no class, for which the network has one label more."""
        text = text.strip()
        if not text:
            return "", self.classes
        if re.fullmatch(r"-?\d+", text):
            if not re.fullmatch(f"-?{_NUMBER}", text):
                raise self._no_class(cut(text))
            return self._numbered(int(text))
        if not self.names:
            raise SettingsError(
                f"{text!r} is no label number, and this checkpoint's classes have no names",
                remedy=f"give a number from 0 to {self.classes - 1}, or --labels FILE with a name a line",
            )
        # A whole name goes before a synonym: `crane` may be the only name of a bird and the second of a machine.
        exact = [number for number, name in enumerate(self.names) if name.strip().casefold() == text.casefold()]
        numbers = exact or list(dict.fromkeys(self._numbers.get(text.casefold(), [])))
        if len(numbers) > 1:
            raise SettingsError(
                f"{len(numbers)} classes are called {text!r}", remedy=f"give the number: {_either(numbers)}"
            )
        if not numbers:
            near = nearest(text.casefold(), self._numbers)
            hint = f"did you mean {near!r} ({_either(self._numbers[near])})?" if near else "give its number instead"
            raise SettingsError(f"there is no class {text!r}", remedy=hint)
        return self._numbered(numbers[0])

    def _numbered(self, number: int) -> tuple[str, int]:
        if not 0 <= number < self.classes:
            raise self._no_class(str(number))
        return (self.names[number] if self.names else str(number)), number

    def _no_class(self, number: str) -> SettingsError:
        return SettingsError(
            f"there is no class {number}",
            remedy=f'give a number from 0 to {self.classes - 1}, or "" for a picture of no class',
        )


def _either(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, dict.fromkeys(numbers)))


def read_labels(folder: Path, classes: int, extra: Mapping[str, Any], file: Path | None) -> Labels:
    """The checkpoint's classes, with the names in `file`, else those in its config.json (`extra`), else without."""
    if file is not None:
        names = [line.strip() for line in read_text(file).splitlines()]
        if len(names) != classes:
            raise SettingsError(
                f"{file} has {len(names)} lines, {folder} has {classes} classes", remedy="write one name a line"
            )
        return Labels(classes, names)
    own_names = extra.get("labels")
    if own_names is None:
        return Labels(classes)
    if not (isinstance(own_names, list) and len(own_names) == classes and all(isinstance(n, str) for n in own_names)):
        raise CheckpointError(
            f"{folder}: extra.labels of its config.json is not a list of {classes} names",
            remedy="correct it, or take it out and give --labels FILE",
        )
    return Labels(classes, own_names)
