"""The DPG-Bench protocol (arXiv 2403.05135): yes-or-no questions about each picture, some of which depend on others.

An item is a prompt with its questions, drawn as up to four pictures (crops of one 2 x 2 grid). A question counts 1 if
the judge says exactly `yes`, and 0 if it says anything else, or if a question that it depends on counts 0: without a
dog there is no brown dog. An item's score is the mean over questions, then over pictures; the overall score is the mean
over items. All scores are in percent, as the published script prints them. A question's category is what stands before
the bracket of its tuple, `attribute - color (dog, brown)`; that of level 1 is what stands before the first dash.

The two modes differ in what the published script (compute_dpg_bench.py) does wrong:

                            compat, as published                          fixed
    the first row           of the questions is dropped                   counts
    an item's rows          only the last of its blocks of rows counts    count wherever they stand
    zeroing                 in the order of rows: it passes through a     passes through every parent
                            parent only if that stands before its child
    an unknown parent       the item has no score (unless a parent        does not matter
                            that is named before it counts 0)
    categories              from the last picture, before zeroing         from all pictures, after zeroing
    a judge that raised     the item has no score                         the question counts 0
    an item without answers has no score                                  counts 0

In both, coverage counts the items by what became of them: `scored`, `failed` (an answer is null or absent, nobody has
asked about it, or, in compat, the script would have raised) and `missing` (there is no answer at all).
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from infra.errors import EvaluationError

Mode = Literal["compat", "fixed"]
YES = "yes"
OFFICIAL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/3c228f1/dpg_bench/dpg_bench.csv"
OFFICIAL_BLOB = "98457fc9901943f51ff9a30367250fc292533bed"  # what `git hash-object` prints for it
OFFICIAL_PROMPTS = (
    "https://github.com/TencentQQGYLab/ELLA/tree/3c228f1/dpg_bench/prompts"  # git tree ac3ba27, 1,065 files
)
_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_FILE_NAME = re.compile(r"(?!\.)[^/\\\x00-\x1f]+")  # items name the files of their grids


class Question(NamedTuple):
    """One row of the file of questions."""

    item: str
    prompt: str
    number: int  # of the question, in its item
    parents: tuple[int, ...]  # questions that it depends on
    about: str  # the tuple, such as `attribute - color (dog, brown)`
    text: str

    @property
    def category(self) -> str:
        return self.about.partition("(")[0].strip()


Questions = dict[int, Question]  # of an item, by their numbers, in the order of their rows
# Item -> picture -> question -> the judge's word; None where it raised.
Answers = Mapping[str, Mapping[int, Mapping[int, str | None]]]


# ------------------------------------------------------------------------------------------------- files


def read_questions(path: Path) -> list[Question]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            absent = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            rows = [] if absent else [_question(row, f"{path}, line {reader.line_num}") for row in reader]
    except FileNotFoundError:
        raise EvaluationError(
            f"the questions {path} are not there",
            remedy=f"download {OFFICIAL} (git blob {OFFICIAL_BLOB}) to that place, or name a file of yours",
        ) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(
            f"the questions in {path} cannot be read ({type(error).__name__})", remedy="name a CSV file in UTF-8"
        ) from None
    if absent:
        raise EvaluationError(f"{path} has no column `{absent[0]}`", remedy=f"DPG-Bench's are {', '.join(_COLUMNS)}")
    if not rows:
        raise EvaluationError(f"{path} holds no questions", remedy="name a CSV file of DPG-Bench's form")
    return rows


def _question(row: Mapping[str, str | None], place: str) -> Question:
    item, prompt, number, dependency, about, text = (row[column] or "" for column in _COLUMNS)
    try:
        parents = tuple(int(part) for part in dependency.split(","))
        read = Question(item, prompt, int(number), tuple(filter(None, parents)), about, text)
    except ValueError:
        raise EvaluationError(
            f"{place}: the question's number or those that it depends on are no numbers",
            remedy="write whole numbers, several of them as `1, 2`, and 0 where it depends on none",
        ) from None
    if not _FILE_NAME.fullmatch(item) or not text:
        raise EvaluationError(
            f"{place}: {'the question is empty' if item else 'the item has no name that a file can have'}",
            remedy="give each row an item_id without slashes, and a question",
        )
    return read


def read_prompts(folder: Path, items: Iterable[str]) -> dict[str, str]:
    """Item -> its prompt, from files as DPG-Bench has them: <item_id>.txt."""
    prompts = {}
    for item in items:
        path = folder / f"{item}.txt"
        try:
            prompts[item] = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(
                f"the prompt {path} cannot be read ({type(error).__name__})",
                remedy=f"name a folder that has a file for each item; the official ones are in {OFFICIAL_PROMPTS}",
            ) from None
    return prompts


def is_official(path: Path) -> bool:
    """Whether these are the published questions, by git's hash of the file."""
    content = path.read_bytes()
    head = f"blob {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest() == OFFICIAL_BLOB


def read_answers(path: Path, questions: Sequence[Question]) -> Answers:
    """Answers from lines such as {"item": "dog", "crop": 0, "question": 3, "answer": "yes"}.

    A question is named by its number, or by its text as in the published script's list of details. Items that nobody
    has asked about are kept, as they are counted; if there are no others, the answers are to another file's questions.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"the answers in {path} cannot be read ({type(error).__name__})", remedy="name a JSONL file of answers"
        ) from None
    known = _Known.of(questions)
    read: dict[str, dict[int, dict[int, str | None]]] = {}
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item, crop, numbers, answer = _answer(line, known, f"{path}, line {place}")
        answers = read.setdefault(item, {}).setdefault(crop, {})
        for number in numbers:
            if answers.setdefault(number, answer) != answer:
                raise EvaluationError(
                    f"{path}, line {place}: question {number} is answered again, and otherwise",
                    remedy="keep one answer to each question about each picture",
                )
    if read and not read.keys() & known.numbers.keys():
        raise EvaluationError(f"{path} answers none of these questions", remedy="name the file of its questions")
    return read


class _Known(NamedTuple):
    """What an answer may name."""

    numbers: dict[str, set[int]]  # of each item
    by_text: dict[tuple[str, str], list[int]]  # item and question

    @classmethod
    def of(cls, questions: Iterable[Question]) -> _Known:
        known = cls({}, {})
        for question in questions:
            known.numbers.setdefault(question.item, set()).add(question.number)
            known.by_text.setdefault((question.item, question.text), []).append(question.number)
        return known


def _answer(line: str, known: _Known, place: str) -> tuple[str, int, list[int], str | None]:
    """The item, its picture, the questions' numbers (several may have one text) and the answer."""
    try:
        told: dict[str, Any] = json.loads(line)
        item, crop, question, answer = (told[name] for name in ("item", "crop", "question", "answer"))
        item, crop = str(item), int(crop)
        if not (answer is None or isinstance(answer, str)):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise EvaluationError(
            f"{place} is no answer",
            remedy='write lines such as {"item": "dog", "crop": 0, "question": 3, "answer": "yes"}, null for no answer',
        ) from None
    if item not in known.numbers:
        return item, crop, [], answer
    numbers = known.by_text.get((item, str(question)), [])
    with_number = isinstance(question, int) or (isinstance(question, str) and question.strip().isdecimal())
    if with_number and int(question) in known.numbers[item]:
        numbers = [int(question)]
    if not numbers:
        raise EvaluationError(
            f"{place}: its item has no such question", remedy="name a question by its proposition_id, or by its text"
        )
    return item, crop, numbers, answer


def by_item(questions: Iterable[Question]) -> dict[str, Questions]:
    """Every item's questions, wherever their rows stand; of two with one number the last counts, as published."""
    items: dict[str, Questions] = {}
    for question in questions:
        items.setdefault(question.item, {})[question.number] = question
    return items


def _published_items(questions: Sequence[Question]) -> dict[str, Questions]:
    """The same as the script reads them: without the first row, and a new block of an item's rows replaces the last."""
    items: dict[str, Questions] = {}
    before = ""
    for question in questions[1:]:
        if question.item != before:
            items[question.item] = {}
        items[question.item][question.number] = question
        before = question.item
    return items


# ------------------------------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Coverage:
    items: int
    scored: int
    failed: int
    missing: int


@dataclass(frozen=True)
class Scores:
    """Scores in percent. The overall one is None if no item has a score."""

    items: dict[str, float]
    by_category: dict[str, dict[str, list[float]]]  # category -> item -> what its questions count
    failures: dict[str, str]  # item -> why it failed
    coverage: Coverage

    @property
    def overall(self) -> float | None:
        return _mean(self.items.values()) if self.items else None

    @property
    def l2(self) -> dict[str, float]:
        """Means over questions, as published, not over items."""
        values = {name: [v for item in items.values() for v in item] for name, items in self.by_category.items()}
        return {name: _mean(values[name]) for name in sorted(values)}

    @property
    def l1(self) -> dict[str, float]:
        return {name: _mean(v for item in items.values() for v in item) for name, items in self.by_l1().items()}

    def by_l1(self) -> dict[str, dict[str, list[float]]]:
        grouped: dict[str, dict[str, list[float]]] = {}
        for category, items in sorted(self.by_category.items()):
            for item, values in items.items():
                grouped.setdefault(category.partition("-")[0].strip(), {}).setdefault(item, []).extend(values)
        return grouped

    def plain(self) -> dict[str, Any]:
        """As the command prints them."""
        scores = {"overall": self.overall, "items": self.items, "l1": self.l1, "l2": self.l2}
        return scores | {"coverage": vars(self.coverage)}


def score(questions: Sequence[Question], answers: Answers, mode: Mode) -> Scores:
    tally = _Tally(by_item(questions))
    published = _published_items(questions)
    for item, asked in tally.items.items():
        pictures = [answers[item][crop] for crop in sorted(answers[item])] if item in answers else []
        if mode == "fixed":
            _fixed(tally, item, asked, pictures)
        elif not pictures:
            tally.missing.append(item)
        else:
            try:
                _published(tally, item, published.get(item), pictures)
            except _ScriptFails as failure:
                tally.failures[item] = str(failure)
    tally.failures |= dict.fromkeys(answers.keys() - tally.items.keys(), "there are no questions about it")
    return tally.scores()


@dataclass
class _Tally:
    items: dict[str, Questions]
    values: dict[str, float] = field(default_factory=dict)
    by_category: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def add(self, item: str, asked: Questions, value: float, by_question: Mapping[int, float]) -> None:
        self.values[item] = 100 * value
        for number, question in asked.items():
            of_category = self.by_category.setdefault(question.category, {})
            of_category.setdefault(item, []).append(100 * by_question[number])

    def scores(self) -> Scores:
        items, failed, missing = len(self.items | self.failures), len(self.failures), len(self.missing)
        coverage = Coverage(items, items - failed - missing, failed, missing)
        return Scores(self.values, self.by_category, self.failures, coverage)


def _fixed(tally: _Tally, item: str, asked: Questions, pictures: Sequence[Mapping[int, str | None]]) -> None:
    """Every question counts, after zeroing, on every picture; one without an answer counts 0."""
    zeroed = [_zeroed(asked, _yes(asked, answers)) for answers in pictures]
    by_question = {number: _mean(marks[number] for marks in zeroed) if zeroed else 0.0 for number in asked}
    tally.add(item, asked, _mean(_mean(marks.values()) for marks in zeroed) if zeroed else 0.0, by_question)
    unanswered = [number for answers in pictures for number in asked if answers.get(number) is None]
    if not pictures:
        tally.missing.append(item)
    elif unanswered:
        tally.failures[item] = f"question {unanswered[0]} has no answer"


def _yes(asked: Questions, answers: Mapping[int, str | None]) -> dict[int, bool]:
    return {number: answers.get(number) == YES for number in asked}


def _zeroed(asked: Questions, marks: dict[int, bool]) -> dict[int, bool]:
    """What counts if a question counts only where all that it depends on do, in whatever order they stand."""
    while fallen := [
        number
        for number, question in asked.items()
        if marks[number] and not all(marks.get(parent, True) for parent in question.parents)
    ]:
        marks |= dict.fromkeys(fallen, False)
    return marks


class _ScriptFails(Exception):
    """The published script raises here, and goes on with the next item."""


def _published(tally: _Tally, item: str, asked: Questions | None, pictures: Sequence[Mapping[int, str | None]]) -> None:
    if not asked:
        raise _ScriptFails("the script drops its only row, which is the first of the file")
    means, before_zeroing = list[float](), dict[int, float]()
    for answers in pictures:
        marks = {number: float(_said(answers, number) == YES) for number in asked}
        before_zeroing = dict(marks)
        for number, question in asked.items():
            if any(_counts_0(marks, question, parent) for parent in question.parents):
                marks[number] = 0.0  # at once, so that it is seen by the rows below and not by those above
        means.append(_mean(marks.values()))
    tally.add(item, asked, _mean(means), before_zeroing)


def _said(answers: Mapping[int, str | None], number: int) -> str:
    answer = answers.get(number)
    if answer is None:
        raise _ScriptFails(f"question {number} has no answer")
    return answer


def _counts_0(marks: Mapping[int, float], question: Question, parent: int) -> bool:
    if parent not in marks:
        raise _ScriptFails(f"question {question.number} depends on question {parent}, which the script does not see")
    return marks[parent] == 0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def met(asked: Questions, answers: Mapping[int, str | None]) -> float:
    """The share of a picture's questions that count, as the mode `fixed` has it."""
    return _mean(_zeroed(asked, _yes(asked, answers)).values())


def unmet(asked: Questions, answers: Mapping[int, str | None]) -> Iterator[str]:
    """What is wrong with a picture: the questions whose answer is not yes, those aside that depend on such a one."""
    marks = _yes(asked, answers)
    for number, question in asked.items():
        if not marks[number] and all(marks.get(parent, True) for parent in question.parents):
            said = answers.get(number)
            yield f"{question.text} {'no answer' if said is None else said}"
