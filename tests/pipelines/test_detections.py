"""What a judge saw is kept, and gives the same verdicts again, without pictures, Ray or torch."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures

from infra import layout
from infra.config import parse
from infra.errors import EvaluationError, SettingsError
from infra.records import EvalReport
from infra.store import Store, open_store
from orchestration.commands import evaluate
from pipelines.evaluation import detections, folders, official, run
from pipelines.evaluation import geneval as protocol
from pipelines.evaluation.chunks import Chunk, Shelf, _Actor
from pipelines.evaluation.detections import Kept
from pipelines.evaluation.detector.objects import COLOURS, OBJECTS
from pipelines.evaluation.judges import NO_MASK, BatchJudge, Detection, Image
from pipelines.evaluation.judging import Judging, verdict_rows
from pipelines.evaluation.prompts import Prompt, parse_prompts
from pipelines.evaluation.run import GenevalSettings
from pipelines.evaluation.sets import prompt_set, read_prompts
from pipelines.evaluation.tars import ToJudge, packed
from tests.data_prep.small_scorers import build_clip
from tests.pipelines import small_detector
from tests.pipelines.test_detector import SURE, picture

PROMPTS = [
    '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}',
    '{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of a red cup"}',
    '{"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}],'
    ' "prompt": "a photo of two cups"}',
]


def prompts() -> list[Prompt]:
    return parse_prompts(PROMPTS, "here")


def row(item: int, image: int, label: str, score: float, color: str | None = None) -> dict[str, Any]:
    return {"item": item, "image": image, "class": label, "score": score, "box": [1, 2, 30, 40], "color": color}


ROWS = [
    *(row(0, 0, "bench", 0.31), row(0, 1, "bench", 0.3), row(1, 0, "cup", 0.8, "red"), row(1, 1, "cup", 0.8, "brown")),
    *(row(2, 0, "cup", 0.95), row(2, 0, "cup", 0.92), row(2, 0, "cup", 0.5)),
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    asked, seen = tmp_path / "prompts.jsonl", tmp_path / "detections.jsonl"
    asked.write_text("\n".join(PROMPTS))
    seen.write_text("\n".join(map(json.dumps, ROWS)))
    return asked, seen


def png(image: Image) -> bytes:
    content = io.BytesIO()
    Pictures.fromarray(image).save(content, "PNG")
    return content.getvalue()


# ------------------------------------------------------------------------------------------------- scores


def test_detections_alone_are_scored(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    asked, seen = files
    evaluate.geneval(detections=seen, prompts=str(asked), json_=True)
    found = json.loads(capsys.readouterr().out)
    assert found["tasks"] == {"single_object": 0.5, "counting": 0.5, "colors": 0.5}
    assert found["overall"] == 0.5 and found["items"] == {"0": 0.5, "1": 0.5, "2": 0.5}
    reasons = {(v["item"], v["image"]): v["reason"] for v in found["verdicts"]}
    assert reasons == {
        (0, 0): "",
        (0, 1): "expected bench>=1, found 0",
        (1, 0): "",
        (1, 1): "expected red cup>=1, found 0 red; and 1 brown",
        (2, 0): "",
        (2, 1): "expected cup>=2, found 0",
    }
    assert found["coverage"] == {"items": 3, "scored": 3, "missing": 0} and found["images"] == 6
    evaluate.geneval(detections=seen, prompts=str(asked))
    assert "overall" in capsys.readouterr().out


def test_detections_are_scored_without_ray_and_torch(files: tuple[Path, Path]):
    asked, seen = files
    code = (
        "import sys; from orchestration.commands.evaluate import geneval; from pathlib import Path;"
        f"geneval(detections=Path({str(seen)!r}), prompts={str(asked)!r}, json_=True);"
        "assert not {'torch', 'ray', 'transformers'} & sys.modules.keys(), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=100)


def test_as_many_pictures_as_asked_for_are_scored(files: tuple[Path, Path]):
    pictures = detections.read(files[1])
    assert len(detections.verdicts(prompts(), pictures)) == 6
    assert len(detections.verdicts(prompts(), pictures, 4)) == 12
    with pytest.raises(EvaluationError, match="detections of image 1, but 1 pictures"):
        detections.verdicts(prompts(), pictures, 1)
    with pytest.raises(EvaluationError, match="detections of item 2, but 2 prompts"):
        detections.verdicts(prompts()[:2], pictures)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no JSON object"),
        ('{"item": 0, "class": "cup"}', "a class needs a score and a box"),
        ('{"item": -1}', "item Input should be greater"),
        ('{"item": 0, "class": "cup", "score": 1, "box": [1, 2, 3]}', "box"),
    ],
)
def test_an_unusable_row_is_named(tmp_path: Path, line: str, said: str):
    path = tmp_path / "detections.jsonl"
    path.write_text(f'{{"item": 0, "image": 0}}\n{line}')
    with pytest.raises(EvaluationError, match="line 2") as caught:
        detections.read(path)
    assert said in str(caught.value) and "color" in caught.value.remedy


def test_a_file_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name in ("torn.parquet", "nowhere.jsonl"):
        with pytest.raises(EvaluationError, match="cannot be read"):
            detections.read(tmp_path / name)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(EvaluationError, match="holds no detections"):
        detections.read(tmp_path / "empty.jsonl")


def test_the_command_wants_one_thing_to_score(tmp_path: Path):
    for given_ in ({}, {"detections": tmp_path / "a", "images": tmp_path / "b"}, {"checkpoint": "net"}):
        with pytest.raises(SettingsError):
            evaluate.geneval(**given_)


found = st.builds(
    lambda label, score, box: Detection(label, float(np.float32(score)), box, NO_MASK),
    st.sampled_from(["bench", "cup"]),
    st.sampled_from([0.1, 0.3, 0.31, 0.89, 0.9, 0.91, 0.99]),
    st.tuples(*[st.integers(0, 50).map(float)] * 4),
)
kept = st.lists(st.builds(Kept, found, st.sampled_from([None, *COLOURS])), max_size=20)


@given(st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 3)), kept, min_size=1))
def test_a_table_gives_the_verdicts_of_what_was_seen(pictures: dict[tuple[int, int], list[Kept]]):
    rows = detections.table_of(pictures).to_pylist()
    again = detections.pictures_of((str(number), row) for number, row in enumerate(rows))
    assert again.keys() == pictures.keys()
    assert detections.verdicts(prompts(), again, 4) == detections.verdicts(prompts(), pictures, 4)


@given(kept)
def test_colours_that_are_asked_for_are_those_that_verdicts_need(seen: list[Kept]):
    for prompt in prompts():
        asked = {id(detection) for detection in protocol.coloured(prompt, [detection for detection, _ in seen])}
        only = [Kept(detection, colour if id(detection) in asked else None) for detection, colour in seen]
        assert detections.verdict(prompt, 0, 0, only) == detections.verdict(prompt, 0, 0, seen)


# ------------------------------------------------------------------------------------------------- judging


class Alternate(BatchJudge):
    """Sees a cup in each picture, and fails on those that are black."""

    name, batch = "alternate", 3

    def __init__(self) -> None:
        self.batches: list[int] = []

    def detections(self, images: Sequence[Image]) -> list[list[Detection]]:
        self.batches.append(len(images))
        if not all(image.any() for image in images):
            raise ValueError("it is black")
        return [[Detection("cup", 0.9, (0, 0, 4, 4), np.ones(image.shape[:2], np.bool_))] for image in images]

    def colours(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        assert all(detection.mask_HW.shape == image.shape[:2] for image, detection in objects)
        return ["red" if image.mean() > 100 else "blue" for image, _ in objects]


def chunk_of(store: Store, images: dict[str, Image]) -> ToJudge:
    made = packed({f"{name}.png": png(image) for name, image in images.items()}, {})
    chunk = Shelf(store, layout.DRAWN, "one").put(0, made, "cpu")
    return ToJudge(chunk.data["pictures"], list(images), {})


def test_pictures_are_judged_in_batches_and_one_that_fails_alone_is_counted(tmp_path: Path):
    store = open_store(str(tmp_path))
    images = {f"00001-{n}": np.full((8, 8, 3), 60 * n, np.uint8) for n in range(5)}
    judging = Judging(store, "shapes", prompts())
    judging.judge = judge = Alternate()
    item = chunk_of(store, images)
    made = judging.make(item)
    assert made.failed == {"00001-0": "the judge failed: it is black"}
    assert judge.batches == [3, 1, 1, 1, 2]
    chunk = Shelf(store, layout.ANSWERED, "one").put(0, made, "cpu")
    rows = verdict_rows(store, chunk.data["verdicts"])
    assert [(row["image"], row["correct"]) for row in rows] == [(1, False), (2, True), (3, True), (4, True)]
    assert rows[0]["reasons"] == "expected red cup>=1, found 0 red; and 1 blue"
    again = detections.of_table(store, chunk.data["detections"])
    assert [v.correct for v in detections.verdicts(prompts()[:2], again, 5)][5:] == [False, False, True, True, True]


# ------------------------------------------------------------------------------------------------- the whole path


def here(shelf: Shelf, maker: Any, items: dict[int, Any], *_: Any) -> list[Chunk]:
    actor = _Actor(shelf, maker, "cpu")
    return [actor.do(number, item) for number, item in items.items()]


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, EvalReport, list[Prompt], dict[str, Any]]:
    """Another model's pictures, judged by Mask2Former and CLIP; one is missing."""
    build_clip(tmp_path / "clip")
    weights = small_detector.write(tmp_path / "mask2former.pth", sure=SURE)
    judge = {"kind": "mask2former", "weights": str(weights), "clip": str(tmp_path / "clip")}
    (tmp_path / "prompts.jsonl").write_text("\n".join(PROMPTS))
    asked = {"judge": judge, "prompts": str(tmp_path / "prompts.jsonl"), "images": 2}
    for number in range(3):
        for image in range(2):
            path = tmp_path / f"theirs/{number:05d}/samples/{image:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(picture(64, 64 + 32 * image, number)))
    (tmp_path / "theirs/00002/samples/0001.png").unlink()
    monkeypatch.setattr(run, "make", here)
    settings = parse(GenevalSettings, asked)
    store = open_store(str(tmp_path / "store"))
    made = run.geneval_of_folder(store, tmp_path / "theirs", settings, lambda *_: None)
    return store, made, read_prompts(settings), asked


def test_real_pictures_are_judged_and_what_was_seen_is_kept(
    report: tuple[Store, EvalReport, list[Prompt], dict[str, Any]], tmp_path: Path
):
    store, made, asked, settings = report
    assert (made.images, made.failed) == (6, 1)
    assert made.judge.startswith("mask2former-") and made.prompt_set == "prompts.jsonl"
    weights = hashlib.sha256(Path(settings["judge"]["weights"]).read_bytes()).hexdigest()
    assert made.weights["mask2former"] == weights and len(made.weights["clip"]) == 16
    [table] = made.detections
    rows = pq.read_table(tmp_path / "store" / table.key).to_pylist()
    assert len(rows) == 500 and {row["class"] for row in rows} <= set(OBJECTS)
    kept_ = detections.of_table(store, table)
    judged = {(v.number, v.image): v for v in detections.verdicts(asked, kept_, 2)}
    for row_ in verdict_rows(store, made.details):
        if not row_["reasons"].startswith("no verdict"):
            assert row_["reasons"] == "; ".join(judged[row_["prompt"], row_["image"]].reasons)


def test_exported_results_give_our_overall_by_the_published_arithmetic(
    report: tuple[Store, EvalReport, list[Prompt], dict[str, Any]], tmp_path: Path
):
    store, made, asked, _ = report
    assert folders.laid_out(store, made, asked, tmp_path / "out") == 5
    lines = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [
        {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}
    ] * 6
    assert lines[-1]["reason"] == "no verdict: it is not in the folder" and lines[-1]["details"] == "{}"
    by_tag: dict[str, list[bool]] = {}
    for line in lines:
        by_tag.setdefault(line["tag"], []).append(line["correct"])
    scores = [sum(right) / len(right) for right in by_tag.values()]
    assert sum(scores) / len(scores) == pytest.approx(made.scores["geneval/overall"].value)
    assert {json.loads(line["metadata"])["prompt"] for line in lines} == {prompt.prompt for prompt in asked}
    for line in lines[:5]:
        assert (tmp_path / "out" / Path(line["filename"]).relative_to(tmp_path / "out")).is_file()
        for boxes in json.loads(line["details"]).values():
            assert all(len(box) == 5 and box[4] > 0.3 for box in boxes)
    assert any(json.loads(line["details"]) for line in lines)


# ------------------------------------------------------------------------------------------------- prompts


def test_the_official_prompts_are_the_published_file():
    assert hashlib.sha256(official.seeded(100, 43).encode()).hexdigest() == official.SHA256
    asked = read_prompts(parse(GenevalSettings, {"prompts": "official"}))
    sizes = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
    assert {tag: sum(prompt.tag == tag for prompt in asked) for tag in sizes} == sizes
    assert len(asked) == 553


def test_other_prompts_than_the_official_ones_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(official, "SEED", 44)
    with pytest.raises(EvaluationError) as caught:
        official.official()
    assert official.URL in caught.value.remedy and official.SHA256 in caught.value.remedy


def test_sets_of_any_size_are_made_by_seed():
    def made(**changes: int) -> list[Prompt]:
        return read_prompts(parse(GenevalSettings, {"prompts": {"seeded": 30, **changes}}))

    assert made() == made(seed=43) != made(seed=1)
    assert len(made(seeded=300)) > 900
    for prompt in made(seeded=300, seed=5):
        assert {required.label for required in prompt.include} <= set(OBJECTS)
        assert all(not (required.label == "person" and required.color) for required in prompt.include)
    settings = parse(GenevalSettings, {"prompts": {"seeded": 30, "seed": 1}})
    assert prompt_set(settings) == "seeded 30 1"
    assert settings.chosen() == {"judge": "shapes", "prompts": {"seed": 1, "seeded": 30}}


def test_rephrased_prompts_that_cannot_be_had_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unreachable(url: str, path: Path) -> None:
        raise OSError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(official, "_download", unreachable)
    path = tmp_path / "pixnerd/geneval_rephrased.jsonl"
    with pytest.raises(EvaluationError) as caught:
        official.rephrased()
    said = str(caught.value)
    assert str(path) in said and official.REPHRASED_SHA256 in said and official.REPHRASED_URL in said
    assert "\n" not in said
    path.parent.mkdir()
    path.write_text(PROMPTS[0])
    with pytest.raises(EvaluationError, match="is another file, of sha256"):
        official.rephrased()
    monkeypatch.setattr(official, "REPHRASED_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(read_prompts(parse(GenevalSettings, {"prompts": "rephrased"}))) == 1
    assert prompt_set(parse(GenevalSettings, {"prompts": "rephrased"})) == "rephrased"
