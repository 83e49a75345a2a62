"""DPG-Bench's arithmetic, by hand: as published, and without its faults."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import EvaluationError, SettingsError
from orchestration.cli import app
from pipelines.evaluation import dpg
from pipelines.evaluation.dpg import Answers, Question, by_item, read_answers, read_questions, score

COLUMNS = [
    *("item_id", "text", "keywords", "proposition_id", "dependency"),
    *("category_broad", "category_detailed", "tuple", "question_natural_language"),
]
WHOLE, PART, COLOUR = "entity - whole", "entity - part", "attribute - color"


def row(item: str, number: int, dependency: str = "0", category: str = WHOLE) -> list[str]:
    about = f"{category} ({item}, {number})"
    return [item, f"a {item}", "", str(number), dependency, "", "", about, f"Is it {item} {number}?"]


def written(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def asked(tmp_path: Path, *rows: list[str]) -> list[Question]:
    return read_questions(written(tmp_path / "questions.csv", *rows))


def said(**items: list[dict[int, str | None]]) -> Answers:
    return {item: dict(enumerate(pictures)) for item, pictures in items.items()}


# The first row is alone with its item. `kite`: a child (1) stands before its parent (2), a grandchild (3) before both;
# the rows of `split` do not stand together.
ROWS = [
    row("lone", 1),
    row("kite", 3, "1", COLOUR),
    row("split", 1),
    row("kite", 1, "2", PART),
    row("kite", 2),
    row("split", 2, "1", COLOUR),
]
TOGETHER = [ROWS[0], ROWS[1], ROWS[3], ROWS[4]]


def test_by_hand_as_published(tmp_path: Path):
    """`kite`: 2 is no, so 1 falls; 3, which stands before 1, was looked at when 1 was still yes."""
    answers = said(lone=[{1: "yes"}], kite=[{1: "yes", 2: "no", 3: "yes"}, {1: "yes", 2: "yes", 3: "no"}])
    scores = score(asked(tmp_path, *TOGETHER), answers, "compat")
    assert scores.items == {"kite": pytest.approx(100 * (1 / 3 + 2 / 3) / 2)}
    assert scores.overall == pytest.approx(50)
    # The published script takes categories from the last picture only, before questions are zeroed.
    assert scores.l2 == {COLOUR: 0, PART: 100, WHOLE: 100}
    assert scores.l1 == {"attribute": 0, "entity": 100}
    assert vars(scores.coverage) == {"items": 2, "scored": 1, "failed": 1, "missing": 0}
    assert "first of the file" in scores.failures["lone"]


def test_by_hand_without_faults(tmp_path: Path):
    """The same answers: in the first picture 2 is no, so 1 falls and 3 with it; the lone first row counts."""
    answers = said(lone=[{1: "yes"}], kite=[{1: "yes", 2: "no", 3: "yes"}, {1: "yes", 2: "yes", 3: "no"}])
    scores = score(asked(tmp_path, *TOGETHER), answers, "fixed")
    assert scores.items == {"lone": 100, "kite": pytest.approx(100 * (0 + 2 / 3) / 2)}
    assert scores.overall == pytest.approx((100 + 100 / 3) / 2)
    assert scores.l2 == {COLOUR: 0, PART: 50, WHOLE: pytest.approx((100 + 50) / 2)}
    assert scores.l1 == {"attribute": 0, "entity": pytest.approx((100 + 50 + 50) / 3)}
    assert vars(scores.coverage) == {"items": 2, "scored": 2, "failed": 0, "missing": 0}


def test_categories_as_published_are_of_the_last_picture_and_from_before_zeroing(tmp_path: Path):
    questions = asked(tmp_path, row("lone", 1), row("dog", 1), row("dog", 2, "1", COLOUR))
    answers = said(lone=[{1: "no"}], dog=[{1: "yes", 2: "no"}, {1: "no", 2: "yes"}])
    assert score(questions, answers, "compat").l2 == {COLOUR: 100, WHOLE: 0}
    assert score(questions, answers, "fixed").l2 == {COLOUR: 0, WHOLE: 25}


def test_zeroing_passes_through_a_parent_that_stands_before_its_child_in_both_modes(tmp_path: Path):
    questions = asked(tmp_path, row("lone", 1), row("dog", 1), row("dog", 2, "1"), row("dog", 3, "0, 2"))
    answers = said(dog=[{1: "no", 2: "yes", 3: "yes"}])
    assert score(questions, answers, "compat").items["dog"] == 0
    assert score(questions, answers, "fixed").items["dog"] == 0


def test_rows_of_an_item_that_stand_apart(tmp_path: Path):
    """As published the last block replaces those before: of `split`, whose parent is lost, no score is left."""
    questions = asked(tmp_path, *ROWS)
    answers = said(kite=[{1: "yes", 2: "yes", 3: "no"}], split=[{1: "yes", 2: "yes"}])
    compat, fixed = score(questions, answers, "compat"), score(questions, answers, "fixed")
    assert compat.items == {"kite": 100}, "its first row, the only no, was replaced"
    assert compat.failures == {"split": "question 2 depends on question 1, which the script does not see"}
    assert fixed.items == {"lone": 0, "kite": pytest.approx(200 / 3), "split": 100}
    assert vars(fixed.coverage) == {"items": 3, "scored": 2, "failed": 0, "missing": 1}


def test_the_published_script_looks_no_further_than_a_parent_that_counts_0(tmp_path: Path):
    """Whether it stumbles over an unknown parent depends on the answers."""
    questions = asked(tmp_path, row("lone", 1), row("dog", 1), row("dog", 2, "1, 9"))
    assert score(questions, said(dog=[{1: "no", 2: "yes"}]), "compat").items == {"dog": 0}
    assert score(questions, said(dog=[{1: "yes", 2: "yes"}]), "compat").items == {}
    assert score(questions, said(dog=[{1: "yes", 2: "yes"}]), "fixed").items["dog"] == 100


@pytest.mark.parametrize("word", ["Yes", "yes.", " yes", "yes ", "YES", "y", "", "no", "yes, it is"])
@pytest.mark.parametrize("mode", ["compat", "fixed"])
def test_only_the_word_yes_counts(tmp_path: Path, word: str, mode: dpg.Mode):
    questions = asked(tmp_path, row("lone", 1), row("dog", 1), row("dog", 2))
    scores = score(questions, said(dog=[{1: "yes", 2: word}]), mode)
    assert scores.items["dog"] == 50 and scores.coverage.failed == 0


def test_a_judge_that_raised_is_counted(tmp_path: Path):
    questions = asked(tmp_path, row("lone", 1), row("dog", 1), row("dog", 2), row("cat", 1), row("owl", 1))
    answers = said(lone=[{1: "yes"}], dog=[{1: "yes", 2: None}], cat=[{1: "yes"}])
    compat, fixed = score(questions, answers, "compat"), score(questions, answers, "fixed")
    assert compat.items == {"cat": 100} and compat.overall == 100
    assert vars(compat.coverage) == {"items": 4, "scored": 1, "failed": 2, "missing": 1}
    assert fixed.items == {"lone": 100, "dog": 50, "cat": 100, "owl": 0} and fixed.overall == 62.5
    assert vars(fixed.coverage) == {"items": 4, "scored": 2, "failed": 1, "missing": 1}
    assert fixed.failures == {"dog": "question 2 has no answer"}
    assert score(questions, said(dog=[{1: "yes"}]), "fixed").failures == fixed.failures, "absent is as good as null"


def test_a_mean_over_questions_then_pictures_then_items(tmp_path: Path):
    questions = asked(tmp_path, row("lone", 1), row("a", 1), row("b", 1), row("b", 2), row("b", 3), row("b", 4))
    answers = said(
        lone=[{1: "yes"}],
        a=[{1: "no"}],
        b=[{1: "yes", 2: "yes", 3: "yes", 4: "no"}, dict.fromkeys((1, 2, 3, 4), "yes")],
    )
    assert score(questions, answers, "compat").overall == pytest.approx((0 + 87.5) / 2)
    assert score(questions, answers, "fixed").overall == pytest.approx((100 + 0 + 87.5) / 3)


def test_without_any_score_there_is_no_overall(tmp_path: Path):
    scores = score(asked(tmp_path, row("lone", 1)), said(lone=[{1: "yes"}]), "compat")
    assert scores.overall is None and scores.plain()["coverage"]["failed"] == 1


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Question], dict[int, str]]:
    numbers = draw(st.permutations(range(1, draw(st.integers(1, 6)) + 1)))
    parents = {n: draw(st.lists(st.integers(1, len(numbers)), max_size=3)) for n in numbers}
    questions = [Question("x", "x", n, tuple(parents[n]), "entity (x)", f"{n}?") for n in numbers]
    return questions, {n: draw(st.sampled_from(["yes", "no"])) for n in numbers}


@given(graphs(), st.randoms(use_true_random=False))
def test_without_faults_the_order_of_rows_does_not_matter(graph: Any, random: Any):
    questions, answers = graph
    shuffled = list(questions)
    random.shuffle(shuffled)
    first, second = (score(some, {"x": {0: answers}}, "fixed") for some in (questions, shuffled))
    assert first.items == second.items
    yes = sum(_holds(n, {q.number: q.parents for q in questions}, answers, set()) for n in answers)
    assert first.items["x"] == pytest.approx(100 * yes / len(answers))


def _holds(number: int, parents: dict[int, tuple[int, ...]], answers: dict[int, str], seen: set[int]) -> bool:
    """It and all that it depends on, directly or not, are answered with yes."""
    if number in seen:
        return True
    return answers[number] == "yes" and all(_holds(p, parents, answers, seen | {number}) for p in parents[number])


def test_what_is_wrong_with_a_picture_names_no_question_that_had_to_fall(tmp_path: Path):
    of_dog = by_item(asked(tmp_path, row("dog", 1), row("dog", 2, "1"), row("dog", 3)))["dog"]
    assert list(dpg.unmet(of_dog, {1: "no", 2: "no", 3: None})) == ["Is it dog 1? no", "Is it dog 3? no answer"]


# ------------------------------------------------------------------------------------------------- files


def test_answers_name_questions_by_number_or_text(tmp_path: Path):
    questions = asked(tmp_path, row("dog", 1), row("dog", 2))
    lines = [
        {"item": "dog", "crop": 0, "question": 1, "answer": "yes"},
        {"item": "dog", "crop": "1", "question": "2", "answer": None},
        {"item": "dog", "crop": 1, "question": "Is it dog 1?", "answer": "no", "seconds": 0.1},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_answers(path, questions) == {"dog": {0: {1: "yes"}, 1: {1: "no", 2: None}}}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{}", "line 2 is no answer"),
        ("yes", "line 2 is no answer"),
        ('{"item": "dog", "crop": 0, "question": 1, "answer": true}', "line 2 is no answer"),
        ('{"item": "dog", "crop": [0], "question": 1, "answer": "no"}', "line 2 is no answer"),
        ('{"item": "dog", "crop": 0, "question": 5, "answer": "no"}', "line 2: its item has no such question"),
        ('{"item": "dog", "crop": 0, "question": 1, "answer": "no"}', "question 1 is answered again, and otherwise"),
    ],
)
def test_lines_that_are_no_answers(tmp_path: Path, line: str, why: str):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"item": "dog", "crop": 0, "question": 1, "answer": "yes"}\n' + line)
    with pytest.raises(EvaluationError, match=why):
        read_answers(path, asked(tmp_path, row("dog", 1)))


@pytest.mark.parametrize("mode", ["compat", "fixed"])
def test_an_item_that_nobody_has_asked_about_is_counted(tmp_path: Path, mode: dpg.Mode):
    questions, path = asked(tmp_path, row("lone", 1), row("dog", 1)), tmp_path / "answers.jsonl"
    lines = [{"item": item, "crop": 0, "question": 1, "answer": "yes"} for item in ("cat", "lone", "dog")]
    path.write_text("\n".join(map(json.dumps, lines)))
    scores = score(questions, read_answers(path, questions), mode)
    assert scores.overall == 100 and scores.failures["cat"] == "there are no questions about it"
    assert scores.coverage.items == 3 == scores.coverage.scored + scores.coverage.failed
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(EvaluationError, match="answers none of these questions"):
        read_answers(path, questions)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (row("dog", 1, ""), "line 3: the question's number or those that it depends on"),
        (row("dog", 1, "one"), "line 3: the question's number or those that it depends on"),
        (row("../dog", 1), "line 3: the item has no name that a file can have|line 3: the question is empty"),
        (row("", 1), "line 3: the item has no name"),
        (["dog"], "line 3: the question's number"),
    ],
)
def test_rows_that_are_no_questions(tmp_path: Path, bad: list[str], why: str):
    with pytest.raises(EvaluationError, match=why):
        asked(tmp_path, row("dog", 1), bad)


def test_files_of_questions_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(EvaluationError) as raised:
        read_questions(tmp_path / "dpg_bench.csv")
    assert dpg.OFFICIAL in str(raised.value) and dpg.OFFICIAL_BLOB in str(raised.value)
    (tmp_path / "other.csv").write_text("item_id,text\nx,y\n")
    with pytest.raises(EvaluationError, match="has no column `proposition_id`"):
        read_questions(tmp_path / "other.csv")
    with pytest.raises(EvaluationError, match="holds no questions"):
        asked(tmp_path)


def test_the_official_file_is_known_by_gits_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.csv"
    path.write_bytes(b"hello\n")
    assert not dpg.is_official(path)
    monkeypatch.setattr(dpg, "OFFICIAL_BLOB", "ce013625030ba8dba906f756967f9e9ca394464a")  # git's, of these six bytes
    assert dpg.is_official(path)


# ------------------------------------------------------------------------------------------------- the command


def test_answers_are_scored_by_the_command_without_ray_and_without_torch(tmp_path: Path):
    questions = written(tmp_path / "questions.csv", *TOGETHER)
    lines = [
        {"item": item, "crop": crop, "question": number, "answer": answer}
        for item, crop, answers in (
            ("lone", 0, {1: "yes"}),
            ("kite", 0, {1: "yes", 2: "no", 3: "yes"}),
            ("kite", 1, {1: "yes", 2: "yes", 3: "no"}),
        )
        for number, answer in answers.items()
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["evaluate", "dpg", "--questions", str(questions), "--answers", str(answers), "--json"]
    code = (
        "import sys; from orchestration.cli import app\n"
        f"app({arguments!r} + sys.argv[1:], standalone_mode=False)\n"
        "assert not {'ray', 'torch', 'pyarrow', 'numpy'} & sys.modules.keys()"
    )
    for mode, overall in (("compat", 50.0), ("fixed", 200 / 3)):
        result = subprocess.run(
            [sys.executable, "-c", code, "--mode", mode], capture_output=True, text=True, check=True
        )
        told = json.loads(result.stdout)
        assert told.keys() == {"overall", "items", "l1", "l2", "coverage"}
        assert told["overall"] == pytest.approx(overall)
        assert told["coverage"].keys() == {"items", "scored", "failed", "missing"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "name a checkpoint, or a folder of pictures"),
        (["net", "--images", "x", "--out", "y"], "name a checkpoint, or a folder of pictures"),
        (["--images", "x", "--out", "y"], "--images and --resolution go together"),
        (["net", "--out", "y", "--mode", "best"], "`best` is no mode of scoring"),
        (["--answers", "a.jsonl"], "--answers scores what was kept, with --questions"),
        (["net", "--answers", "a.jsonl", "--questions", "q.csv"], "--answers scores what was kept, with --questions"),
    ],
)
def test_what_does_not_go_together_is_told(arguments: list[str], why: str):
    with pytest.raises(SettingsError, match=why):
        app(["evaluate", "dpg", *arguments], standalone_mode=False)
