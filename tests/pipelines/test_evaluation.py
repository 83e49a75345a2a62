"""Evaluations chunk by chunk: the same bytes whoever draws and judges, and all that fails is counted with its cause."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.config import parse
from infra.errors import EvaluationError, SettingsError
from infra.records import CheckpointRecord, EvalReport
from infra.store import FileStore, open_store
from pipelines.evaluation import chunks, folders, generate
from pipelines.evaluation.judging import verdict_rows
from pipelines.evaluation.run import GenevalSettings, geneval, geneval_of_folder
from pipelines.evaluation.sets import read_prompts
from pipelines.evaluation.tars import read_pictures
from tests.drawing import correct_picture
from tests.training import small_checkpoint
from training import checkpoint as checkpoints

SETTINGS: dict[str, Any] = {"per_task": 2, "images": 2, "sampling": {"steps": 1, "batch": 6}}
STAGE = "one"


def settings(**changes: Any) -> GenevalSettings:
    return parse(GenevalSettings, SETTINGS | changes)


def nothing(text: str, done: int, total: int) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint.write_text(tmp_path_factory.mktemp("net") / "net")


def new_store(path: Path, folder: Path) -> tuple[FileStore, CheckpointRecord]:
    store = open_store(str(path))
    assert isinstance(store, FileStore)
    return store, checkpoints.publish_folder(store, folder)


def made(store: FileStore) -> dict[str, bytes]:
    """Everything that evaluations have stored."""
    return {entry.key: store.get(entry.key) for entry in store.list("evaluations/")}


@pytest.fixture(scope="module")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> dict[str, bytes]:
    store, checkpoint = new_store(tmp_path_factory.mktemp("undisturbed"), folder)
    report = geneval(store, STAGE, checkpoint, settings(workers=1), nothing)
    assert (report.images, report.failed, report.devices) == (24, 0, ["cpu"])
    return made(store)


def test_two_workers_make_the_same_bytes_as_one(folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]):
    store, checkpoint = new_store(tmp_path, folder)
    geneval(store, STAGE, checkpoint, settings(workers=2), nothing)
    assert made(store) == undisturbed


class DiesOnce(chunks._Actor):
    """Killed at the worst moment of some chunks: what is made is stored, the record is not."""

    def do(self, number: int, item: Any) -> chunks.Chunk:
        store = self.shelf.store
        assert isinstance(store, FileStore)
        marker = store.root / ".tmp" / f"{type(self.maker).__name__}-{number}"
        if number in (0, 6) and not marker.exists():
            marker.parent.mkdir(exist_ok=True)
            marker.touch()
            vars(chunks)["recorded"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        return super().do(number, item)


def test_a_worker_that_dies_in_drawing_and_in_judging_costs_nothing(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunks, "_Actor", DiesOnce)
    store, checkpoint = new_store(tmp_path, folder)
    geneval(store, STAGE, checkpoint, settings(workers=2), nothing)
    assert len(list((store.root / ".tmp").glob("*-*"))) == 4
    assert made(store) == undisturbed


class Fails(generate.Drawing):
    """One picture comes out as NaN, and one chunk raises every time."""

    def make(self, item: generate.Asked) -> chunks.Made:
        if item.first == 3:
            raise RuntimeError("the network is broken\nand more")
        solve = self.artist.solve

        def broken(*arguments: Any) -> Any:
            x_BCHW = solve(*arguments)
            x_BCHW[1] = float("nan")
            return x_BCHW

        self.artist.solve = broken  # type: ignore[method-assign, assignment]
        try:
            return super().make(item)
        finally:
            self.artist.solve = solve  # type: ignore[method-assign]


class AlwaysFails(generate.Drawing):
    def make(self, item: generate.Asked) -> chunks.Made:
        raise RuntimeError("the network is broken")


def test_pictures_that_cannot_be_drawn_are_counted_with_their_causes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: str
):
    monkeypatch.setattr(generate, "Drawing", Fails)
    store, checkpoint = new_store(tmp_path, folder)
    report = geneval(store, STAGE, checkpoint, settings(workers=1), nothing)
    assert (report.images, report.failed) == (24, 6 + 3)
    rows = verdict_rows(store, report.details)
    causes = {(row["prompt"], row["image"]): row["reasons"] for row in rows if row["reasons"].startswith("no verdict")}
    assert causes.pop((0, 1)) == "no verdict: it came out as NaN or infinity"
    assert {causes[number, image] for number in (3, 4, 5) for image in (0, 1)} == {"no verdict: the network is broken"}
    assert len(read_pictures(store, report.pictures)) == 24 - 9
    assert geneval(store, STAGE, checkpoint, settings(), nothing) == report, "what failed is not tried for ever"


def test_if_nothing_can_be_drawn_it_is_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: str
):
    monkeypatch.setattr(generate, "Drawing", AlwaysFails)
    store, checkpoint = new_store(tmp_path, folder)
    with pytest.raises(EvaluationError, match="all batches of pictures failed: the network is broken"):
        geneval(store, STAGE, checkpoint, settings(workers=1, sampling={"steps": 1, "batch": 24}), nothing)


def test_an_error_of_ours_ends_it_at_once(folder: Path, tmp_path: Path, ray_cluster: str):
    store, checkpoint = new_store(tmp_path, folder)
    with pytest.raises(SettingsError, match="multiples of 4"):
        geneval(store, STAGE, checkpoint, settings(sampling={"size": [18, 18]}), nothing)


# ------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Another model's pictures: right ones."""
    for number, prompt in enumerate(read_prompts(settings())):
        for image in range(2):
            path = tmp_path / f"theirs/{number:05d}/samples/{image:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            phrase = prompt.prompt.removeprefix("a photo of ")
            Image.fromarray(correct_picture(phrase, image, 64)).save(path)
    return tmp_path / "theirs"


def test_pictures_of_a_folder_are_judged_and_what_is_wrong_with_them_is_counted(
    pictures: Path, tmp_path: Path, ray_cluster: str
):
    store = open_store(str(tmp_path / "store"))
    right = geneval_of_folder(store, pictures, settings(), nothing)
    assert right.scores["geneval/overall"].value == 1 and right.failed == 0
    (pictures / "00000/samples/0000.png").unlink()
    torn = pictures / "00001/samples/0001.png"
    torn.write_bytes(torn.read_bytes()[:-30])
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(pictures / "00002/samples/0000.png")
    report = geneval_of_folder(store, pictures, settings(), nothing)
    rows = {(r["prompt"], r["image"]): r["reasons"] for r in verdict_rows(store, report.details)}
    assert rows[0, 0] == "no verdict: it is not in the folder"
    assert rows[1, 1].startswith("no verdict: it cannot be read (")
    assert rows[2, 0].startswith("no verdict: the judge failed: the shape world is square")
    assert (report.images, report.failed) == (24, 3)
    assert report.checkpoint != right.checkpoint


def test_an_exported_folder_imported_again_gives_the_same_report(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]
):
    store, checkpoint = new_store(tmp_path / "store", folder)
    report = geneval(store, STAGE, checkpoint, settings(), nothing)
    out = tmp_path / "out"
    assert folders.laid_out(store, report, read_prompts(settings()), out) == 24
    assert json.loads((out / "00003/metadata.jsonl").read_text()) == read_prompts(settings())[3].metadata()
    again = geneval_of_folder(store, out, settings(), nothing)
    assert again.scores == report.scores
    assert again.details.sha256 == report.details.sha256
    assert [tar.sha256 for tar in again.pictures] == [tar.sha256 for tar in report.pictures]


def test_a_folder_of_other_prompts_is_refused(pictures: Path, tmp_path: Path):
    (pictures / "00001/metadata.jsonl").write_text(json.dumps({"prompt": "a photo of a bench"}))
    with pytest.raises(EvaluationError, match=r"is of the prompt 'a photo of a bench', and not of"):
        geneval_of_folder(open_store(str(tmp_path / "store")), pictures, settings(), nothing)
    with pytest.raises(EvaluationError, match="holds no pictures of these prompts"):
        geneval_of_folder(open_store(str(tmp_path / "store")), tmp_path, settings(), nothing)


# ------------------------------------------------------------------------------------------------- kills


DRIVER = """
import os, sys, threading, time
import ray
from infra.records import read_record, CheckpointRecord
from infra.store import open_store
from tests.pipelines.test_evaluation import STAGE, geneval, settings, nothing
url, key, address = sys.argv[1:]
store = open_store(url)
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
print("ready", flush=True)
geneval(store, STAGE, read_record(store, key, CheckpointRecord), settings(workers=2), nothing)
"""


@pytest.mark.slow
def test_a_driver_killed_at_random_moments_leaves_the_undisturbed_report(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes], ray_cluster: str
):
    """Ten kills, in drawing and in judging; what was made before is not made again."""
    moments, kills = random.Random(0), 0
    for number in range(4):
        store, checkpoint = new_store(tmp_path / str(number), folder)
        store.put("checkpoint.json", checkpoint.model_dump_json().encode())
        command = [sys.executable, "-c", DRIVER, str(store.root), "checkpoint.json", ray_cluster]
        for _ in range(3):
            before = made(store)
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
                assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
                try:
                    driver.wait(moments.uniform(0.5, 4))
                except subprocess.TimeoutExpired:
                    driver.kill()
                    kills += 1
            assert before.items() <= made(store).items()
        geneval(store, STAGE, checkpoint, settings(workers=2), nothing)
        assert made(store) == undisturbed
    assert kills >= 6


@pytest.mark.slow
def test_nodes_that_die_in_drawing_and_in_judging_change_nothing(
    folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]
):
    store, checkpoint = new_store(tmp_path / "store", folder)
    store.put("checkpoint.json", checkpoint.model_dump_json().encode())
    command = [sys.executable, "-m", "tests.pipelines.nodes", str(store.root), "checkpoint.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "2"
    assert made(store) == undisturbed


def test_a_report_that_is_there_is_not_made_again(folder: Path, tmp_path: Path, undisturbed: dict[str, bytes]):
    store, checkpoint = new_store(tmp_path, folder)
    for key, data in undisturbed.items():
        store.put(key, data)
    assert isinstance(geneval(store, STAGE, checkpoint, settings(), _unexpected), EvalReport)


def _unexpected(text: str, done: int, total: int) -> None:
    raise AssertionError(text)
