"""DPG-Bench on pictures: from a checkpoint or a folder of grids to a report; all that fails is counted with its cause.

The pool of actors is held by `test_evaluation`; here its actor works in this process.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from infra.config import parse
from infra.errors import EvaluationError, SettingsError
from infra.layout import REPORT
from infra.records import DpgOutput, EvalReport, GateOutput, get_data, read_record
from infra.store import Store, open_store
from infra.tracking import NOWHERE, Tracker
from orchestration import workflow
from orchestration.cli import app
from pipelines import recipes
from pipelines.evaluation import asking, dpg_run, generate, grids
from pipelines.evaluation.answering import Unanswered
from pipelines.evaluation.asking import answers_in
from pipelines.evaluation.chunks import Chunk, Maker, Shelf, _Actor
from pipelines.evaluation.dpg import read_questions
from pipelines.evaluation.dpg_run import DpgSettings, dpg, dpg_of_folder, items_of, kept_scores, questions_of
from pipelines.evaluation.dpg_shapes import ShapeAnswerer
from pipelines.evaluation.judging import verdict_rows
from pipelines.evaluation.tars import read_pictures
from pipelines.page.report import build
from pipelines.stages import dpg as stage
from pipelines.stages import gate
from pipelines.stages.base import Context
from tests.data_prep.small_scorers import build_vlm
from tests.drawing import correct_picture
from tests.pipelines import small_story
from tests.training import small_checkpoint
from training import checkpoint as checkpoints

SETTINGS: dict[str, Any] = {"per_task": 1, "sampling": {"steps": 1, "batch": 9}}
SIDE = 32


def settings(**changes: Any) -> DpgSettings:
    return parse(DpgSettings, SETTINGS | changes)


def nothing(text: str, done: int, total: int) -> None: ...


def made_here(shelf: Shelf, maker: Maker[Any], items: Mapping[int, Any], *_: Any) -> list[Chunk]:
    actor = _Actor(shelf, maker, "cpu")
    return [actor.do(number, item) for number, item in items.items()]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dpg_run, generate):
        monkeypatch.setattr(module, "make", made_here)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Another model's grids: right ones."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for item in items_of(settings()):
        grid = Image.new("RGB", (2 * SIDE, 2 * SIDE))
        for seed in range(4):
            picture = Image.fromarray(correct_picture(item.prompt, seed, SIDE))
            grid.paste(picture, (SIDE * (seed % 2), SIDE * (seed // 2)))
        grid.save(folder / f"{item.name}.png")
    return folder


def rows(store: Store, report: EvalReport) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["item"], row["image"]): row for row in verdict_rows(store, report.details)}


def test_right_grids_have_all_points_and_what_is_wrong_with_files_is_counted(theirs: Path, store: Store):
    right = dpg_of_folder(store, theirs, SIDE, settings(), nothing)
    assert (right.protocol, right.judge, right.images, right.failed) == ("dpg", "shapes", 24, 0)
    assert {score.value for score in right.scores.values()} == {100.0}
    assert {"dpg/overall", "dpg/entity", "dpg/attribute - color"} <= right.scores.keys()

    (theirs / "single_object-0.png").unlink()
    torn = theirs / "two_object-0.png"
    torn.write_bytes(torn.read_bytes()[:-40])
    Image.new("RGB", (2 * SIDE, SIDE)).save(theirs / "counting-0.png")
    (theirs / "colors-0.png").write_bytes(b"no picture")
    report = dpg_of_folder(store, theirs, SIDE, settings(), nothing)
    told = {item: row["failure"] for (item, image), row in rows(store, report).items() if image == 3}
    assert told["single_object-0"] == "its grid is not in the folder"
    assert told["two_object-0"].startswith("its grid cannot be read (")
    assert told["counting-0"] == f"its grid is {2 * SIDE} x {SIDE}, not {2 * SIDE} x {2 * SIDE}"
    assert told["colors-0"].startswith("its grid cannot be read (") and str(theirs) not in told["colors-0"]
    assert told["position-0"] is told["color_attr-0"] is None
    assert (report.images, report.failed) == (24, 16)
    assert report.scores["dpg/overall"].value == pytest.approx(100 * 2 / 6)
    assert report.checkpoint != right.checkpoint
    scores = kept_scores(store, report, questions_of(settings()), "fixed")
    assert vars(scores.coverage) == {"items": 6, "scored": 2, "failed": 4, "missing": 0}


def test_wrong_pictures_lose_the_points_that_their_questions_have(theirs: Path, store: Store):
    """One grid in the place of another: there is no circle, so its size and colour fall too."""
    report = dpg_of_folder(store, theirs, SIDE, settings(), nothing)
    name = "single_object-0"
    asked = {item.name: item for item in items_of(settings())}[name].asked
    grid = Image.new("RGB", (2 * SIDE, 2 * SIDE), "white")
    grid.save(theirs / f"{name}.png")
    wrong = dpg_of_folder(store, theirs, SIDE, settings(), nothing)
    row = rows(store, wrong)[name, 0]
    assert not row["correct"] and row["reasons"] == "Is there a circle? no" and row["failure"] is None
    lost = 100 * (1 - 1 / len(asked)) / 6  # what is left of this item: its background is white
    assert report.scores["dpg/overall"].value - wrong.scores["dpg/overall"].value == pytest.approx(lost)


def test_a_judge_that_raises_is_counted(theirs: Path, store: Store, monkeypatch: pytest.MonkeyPatch):
    whole = ShapeAnswerer.answers

    def sometimes(self: ShapeAnswerer, asked: Any) -> Any:
        words = whole(self, asked)
        return [[Unanswered("broken"), *of_picture[1:]] if n == 1 else of_picture for n, of_picture in enumerate(words)]

    monkeypatch.setattr(ShapeAnswerer, "answers", sometimes)
    report = dpg_of_folder(store, theirs, SIDE, settings(sampling={"batch": 24}), nothing)
    item = items_of(settings())[0]
    assert report.failed == 1
    assert rows(store, report)[item.name, 1]["failure"] == "the judge failed: broken"
    answers = answers_in(store, report.details)
    assert answers[item.name][1][1] is None and answers[item.name][0][1] == "yes"
    for mode, scored, overall in (("compat", 5, 100.0), ("fixed", 5, None)):
        scores = kept_scores(store, report, questions_of(settings()), mode)  # type: ignore[arg-type]
        assert (scores.coverage.scored, scores.coverage.failed) == (scored, 1)
        assert overall is None or scores.overall == overall


def test_the_table_of_a_report_is_scored_again_by_the_command(
    theirs: Path, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = tmp_path / "questions.csv"
    with own.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"])
        for question in questions_of(settings()):
            parents = ", ".join(map(str, question.parents)) or "0"
            lines.writerow([question.item, question.prompt, question.number, parents, question.about, question.text])
    assert read_questions(own) == questions_of(settings())
    Image.new("RGB", (2 * SIDE, 2 * SIDE), "white").save(theirs / "position-0.png")
    (theirs / "colors-0.png").unlink()
    report = dpg_of_folder(store, theirs, SIDE, settings(questions=str(own)), nothing)
    table = tmp_path / "answers.parquet"
    table.write_bytes(get_data(store, report.details))
    app(["evaluate", "dpg", "--questions", str(own), "--answers", str(table), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["overall"] == pytest.approx(report.scores["dpg/overall"].value) and told["overall"] < 100
    assert told["coverage"] == {"items": 6, "scored": 5, "failed": 1, "missing": 0}
    table.write_bytes(b"no table")
    with pytest.raises(EvaluationError, match="is no table of answers"):
        asking.read_answers(table)


def test_as_published_the_judge_is_named_so(theirs: Path, store: Store):
    report = dpg_of_folder(store, theirs, SIDE, settings(mode="compat"), nothing)
    assert report.judge == "shapes, compat"
    with pytest.raises(EvaluationError, match="no item has a score"):
        dpg_of_folder(store, theirs, SIDE, settings(mode="compat", questions=str(_lone(theirs))), nothing)


def _lone(folder: Path) -> Path:
    path = folder / "lone.csv"
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"])
        lines.writerow(["position-0", "a circle", 1, 0, "entity (circle)", "Is there a circle?"])
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint.write_text(tmp_path_factory.mktemp("net") / "net")


@pytest.mark.parametrize("images", [1, 3, 4])
def test_an_exported_folder_imported_again_gives_the_same_report(
    folder: Path, store: Store, tmp_path: Path, images: int
):
    checkpoint = checkpoints.publish_folder(store, folder)
    drawn = settings(images=images)
    report = dpg(store, "one", checkpoint, drawn, nothing)
    assert report.images == 6 * images and report.failed == 0
    items = [item.name for item in items_of(drawn)]
    out = tmp_path / "out"
    assert grids.laid_out(store, report, items, images, out) == 6
    with Image.open(out / f"{items[0]}.png") as grid:
        side = grid.width if images == 1 else grid.width // 2
    again = dpg_of_folder(store, out, side, drawn, nothing)
    assert again.scores == report.scores
    assert again.details.sha256 == report.details.sha256
    assert [tar.sha256 for tar in again.pictures] == [tar.sha256 for tar in report.pictures]
    assert read_record(store, REPORT.at(stage="one"), EvalReport) == report


def test_pictures_lie_in_their_grid_as_the_published_script_cuts_them(theirs: Path, store: Store, tmp_path: Path):
    report = dpg_of_folder(store, theirs, SIDE, settings(), nothing)
    items = [item.name for item in items_of(settings())]
    first = items_of(settings())[0]
    for (number, image), data in read_pictures(store, report.pictures).items():
        if number == 0:
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.tobytes() == correct_picture(first.prompt, image, SIDE).tobytes()
    grids.laid_out(store, report, items, 4, tmp_path / "out")
    for item in items:
        with Image.open(theirs / f"{item}.png") as theirs_, Image.open(tmp_path / f"out/{item}.png") as ours:
            assert theirs_.tobytes() == ours.tobytes()


def test_what_is_missing_stays_black_in_its_grid_or_has_none(theirs: Path, store: Store, tmp_path: Path):
    (theirs / "position-0.png").unlink()
    Image.new("RGB", (2 * SIDE, 2 * SIDE), "white").save(theirs / "colors-0.png", "GIF")
    report = dpg_of_folder(store, theirs, SIDE, settings(), nothing)
    assert rows(store, report)["colors-0", 0]["failure"].startswith("its grid cannot be read"), "it is no PNG"
    items = [item.name for item in items_of(settings())]
    assert grids.laid_out(store, report, items, 4, tmp_path / "out") == 4
    one = {0: Path(theirs / "counting-0.png").read_bytes()}
    corners = [grids._grid(one, 4).getpixel(at) for at in ((0, 0), (4 * SIDE - 1, 0), (0, 4 * SIDE - 1))]
    assert corners == [(255, 255, 255), (0, 0, 0), (0, 0, 0)]


def test_a_folder_without_any_grid_is_refused(store: Store, tmp_path: Path):
    with pytest.raises(EvaluationError, match="holds no pictures of these items"):
        dpg_of_folder(store, tmp_path, SIDE, settings(), nothing)


@pytest.mark.parametrize("answer", ["likelier", "generated"])
def test_a_vision_language_model_judges_by_the_whole_path(theirs: Path, store: Store, tmp_path: Path, answer: str):
    build_vlm(tmp_path / "tiny-vl", "qwen3")
    judge = {"kind": "vlm", "model": str(tmp_path / "tiny-vl"), "dtype": "float32", "answer": answer}
    by_model = settings(judge=judge)
    report = dpg_of_folder(store, theirs, SIDE, by_model, nothing)
    assert report.judge == f"tiny-vl ({answer})" and report.failed == 0
    words = {
        word for item in answers_in(store, report.details).values() for crop in item.values() for word in crop.values()
    }
    assert words <= {"yes", "no"} if answer == "likelier" else not words & {"yes", "no", None}
    before = dpg_run.outside(by_model)
    (tmp_path / "tiny-vl" / "chat_template.jinja").write_text("another")
    assert dpg_run.outside(by_model) != before, "the judge's files count"


def test_the_digest_holds_the_questions_and_not_the_name_of_their_file(theirs: Path, tmp_path: Path):
    path = _lone(theirs)
    (tmp_path / "copy.csv").write_bytes(path.read_bytes())
    one, other = (dpg_run.outside(settings(questions=str(name))) for name in (path, tmp_path / "copy.csv"))
    assert one == other
    (tmp_path / "copy.csv").write_text(path.read_text().replace("Is there", "Do you see"))
    assert dpg_run.outside(settings(questions=str(tmp_path / "copy.csv"))) != one
    assert dpg_run.counted(settings()) == dpg_run.counted(settings(questions=str(path), workers=3))


def test_prompts_may_lie_in_files_of_their_own(tmp_path: Path):
    own = items_of(settings())
    for item in own[:-1]:
        (tmp_path / f"{item.name}.txt").write_text(f"{item.prompt}, seen at night\n")
    at_night = settings(prompts=str(tmp_path))
    with pytest.raises(EvaluationError, match=rf"{own[-1].name}.txt cannot be read.*TencentQQGYLab"):
        items_of(at_night)
    last = tmp_path / f"{own[-1].name}.txt"
    last.write_text(" \n")
    with pytest.raises(EvaluationError, match="has no prompt"):
        items_of(at_night)
    last.write_text("a dog")
    assert [item.prompt for item in items_of(at_night)][-2:] == [f"{own[-2].prompt}, seen at night", "a dog"]
    before = dpg_run.outside(at_night)
    last.write_text("a cat")
    assert dpg_run.outside(at_night) != before != dpg_run.outside(settings())


def test_metrics_name_the_judge():
    assert stage._metric("dpg/overall", "Qwen/Qwen2.5-VL-7B-Instruct (likelier)") == (
        "dpg/Qwen-Qwen2.5-VL-7B-Instruct likelier/overall"
    )
    assert stage._metric("dpg/attribute - color", "shapes") == "dpg/shapes/attribute - color"


GATED = """
name: gated
extends: demo
stages:
  low_dpg: {kind: dpg, checkpoint: low}
  sft_dpg: {kind: dpg, checkpoint: sft}
  gate:
    scores: [sft_score, sft_dpg, low_dpg]
    rules:
      - {score: dpg/overall, at_least: 60}
      - {score: dpg/overall, above: low_dpg}
      - {score: geneval/overall, at_least: 0.6}
"""


def test_a_recipe_gates_by_both_protocols(tmp_path: Path):
    path = tmp_path / "gated.yaml"
    path.write_text(GATED)
    assert {"low_dpg", "sft_dpg"} <= {node.name for node in workflow.graph(recipes.load(str(path)))}
    path.write_text(GATED.replace("dpg/overall, at", "dgp/overall, at"))
    with pytest.raises(SettingsError, match="is dgp/overall, which no evaluation has: did you mean `dpg/overall`"):
        workflow.graph(recipes.load(str(path)))
    path.write_text(GATED.replace("sft_dpg, low_dpg", "sft_dpg, low"))
    with pytest.raises(SettingsError, match="whose kind is train, not evaluate or dpg"):
        workflow.graph(recipes.load(str(path)))


def test_a_stage_of_a_workflow_and_the_gate_behind_it(folder: Path, store: Store, tmp_path: Path):
    made = small_story.Made(store)
    record = made.put("net", checkpoints.publish_folder(store, folder))
    made.stage("low", "train", {"record": record, "parameters": 1, "images_seen": 1})
    context = Context(store, tmp_path, cast(Tracker, None), NOWHERE, lambda *_: None, "low_dpg", "one")
    asked = parse(stage.DpgStage, SETTINGS | {"checkpoint": "low"})
    output = stage.evaluate(context, asked, {"checkpoint": made.stages[-1]})
    assert isinstance(output, DpgOutput) and output.scores["dpg/overall"] <= 100
    made.stage("low_dpg", "dpg", output.model_dump(), checkpoint="low")
    for least, passed in ((0.0, True), (100.5, False)):
        rules = {"scores": ["low_dpg"], "rules": [{"score": "dpg/overall", "at_least": least}]}
        verdict = gate.gate(context, parse(gate.GateStage, rules), {"scores.0": made.stages[-1]})
        assert isinstance(verdict, GateOutput) and verdict.passed is passed


def test_the_page_shows_both_protocols_apart(theirs: Path, store: Store):
    made = small_story.make(store)
    report = dpg_of_folder(store, theirs, SIDE, settings(), nothing)
    output = {"record": made.put("low_dpg", report), "scores": {k: v.value for k, v in report.scores.items()}}
    made.stage("low_dpg", "dpg", output, checkpoint="low")
    page = build(store, "both", made.stages)
    assert "dpg by the judge “shapes”" in page and "geneval by the judge “shapes”" in page
    assert "a photo of a large" in page


def test_who_judges_is_refused_if_its_weights_changed_on_the_way(theirs: Path, store: Store, tmp_path: Path):
    build_vlm(tmp_path / "tiny-vl", "qwen3")
    by_model = settings(judge={"kind": "vlm", "model": str(tmp_path / "tiny-vl"), "dtype": "float32"})
    maker = asking.Asking(store, by_model.judge.located(), items_of(by_model))
    (tmp_path / "tiny-vl" / "chat_template.jinja").write_text("another")
    with pytest.raises(EvaluationError, match="differ between machines"):
        maker.load("cpu")
