"""Pictures of a training run's checkpoints on the way: drawn beside the training, one at a time, the newest first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.snapshots.build import snapshot
from data_prep.snapshots.settings import SnapshotSettings
from infra.records import CheckpointRecord, SnapshotRecord, write_record
from infra.store import Store, open_store
from pipelines.evaluation import generate, run
from pipelines.evaluation.chunks import Chunk
from pipelines.evaluation.generate import DrawingSettings
from pipelines.sample import held_out
from pipelines.sample.previews import Preview, Previews, PreviewSettings
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus
from tests.pipelines.drawn_here import drawn_here
from tests.training import small_checkpoint
from training import checkpoint as checkpoints

SETTINGS = PreviewSettings(count=2, prompts=["a red circle"], images=1, sampling=DrawingSettings(steps=2))
KEY = "training/run/checkpoints/{step:08d}.json"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def data(store: Store, tmp_path_factory: pytest.TempPathFactory) -> SnapshotRecord:
    folder = tmp_path_factory.mktemp("corpus") / "new"
    write_corpus(folder, 60)
    plan = prepare_here(store, settings_for(folder))
    settings = SnapshotSettings(size=16, held_out=0.2, captions={"short": 0.2, "long": 0.8})
    return snapshot(store, plan.digest, plan.edition, settings)


@pytest.fixture(scope="module")
def checkpoint(store: Store, tmp_path_factory: pytest.TempPathFactory) -> CheckpointRecord:
    record = checkpoints.publish_folder(store, small_checkpoint.write_text(tmp_path_factory.mktemp("net") / "net"))
    for step in range(1, 5):
        write_record(store, KEY.format(step=step), record)
    return record


class Said:
    def __init__(self) -> None:
        self.previews: list[Preview] = []
        self.lines: list[str] = []


@pytest.fixture
def begin(store: Store, data: SnapshotRecord, checkpoint: CheckpointRecord, tmp_path: Path) -> Callable[..., Any]:
    def begin(said: Said, name: str, settings: PreviewSettings = SETTINGS) -> Previews:
        return Previews(store, name, tmp_path, data, settings, said.previews.append, said.lines.append)

    return begin


def test_the_newest_checkpoint_that_waits_is_the_next(begin: Any, monkeypatch: pytest.MonkeyPatch):
    began, may_end = threading.Event(), threading.Event()

    def here(order: generate.Order, prompts: Sequence[str], show: Any) -> list[Chunk]:
        began.set()
        assert may_end.wait(60)
        return drawn_here(order, prompts)

    monkeypatch.setattr(held_out, "generate", here)
    said = Said()
    with begin(said, "newest") as previews:
        previews.begin(1, KEY.format(step=1))
        assert began.wait(60)
        for step in (2, 3, 4):
            previews.begin(step, KEY.format(step=step))
        may_end.set()
    assert [preview.step for preview in said.previews] == [1, 4]
    assert all(preview.sheet.stat().st_size for preview in said.previews)
    assert said.lines == []


def test_what_cannot_be_drawn_is_told_and_the_next_is_drawn(begin: Any, monkeypatch: pytest.MonkeyPatch):
    def here(order: generate.Order, prompts: Sequence[str], show: Any) -> list[Chunk]:
        if "00000002" in order.stage:
            raise RuntimeError("no room\nand more lines")
        return drawn_here(order, prompts)

    monkeypatch.setattr(held_out, "generate", here)
    said = Said()
    for step in (1, 2, 3):  # each its own, so that none takes the place of another
        with begin(said, "faulty") as previews:
            previews.begin(step, KEY.format(step=step))
    assert [preview.step for preview in said.previews] == [1, 3]
    assert said.lines == ["no preview of step 2: no room"]


def test_a_run_that_is_stopped_does_not_wait(begin: Any, monkeypatch: pytest.MonkeyPatch):
    began, may_end, ended = (threading.Event() for _ in range(3))

    def here(order: generate.Order, prompts: Sequence[str], show: Any) -> list[Chunk]:
        began.set()
        may_end.wait(20)
        ended.set()
        return drawn_here(order, prompts)

    monkeypatch.setattr(held_out, "generate", here)
    previews = begin(Said(), "stopped")
    previews.begin(1, KEY.format(step=1))
    assert began.wait(60)
    previews.__exit__(KeyboardInterrupt)
    assert not ended.is_set()
    may_end.set()
    previews._thread.join(60)


def test_training_may_have_all_cpus(begin: Any, ray_cluster: str):
    import ray

    free = ray.remote(num_cpus=0)(lambda: ray.available_resources().get("CPU", 0.0))
    holder = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(_Holder).remote()
    try:
        ray.get(holder.hold.remote())
        assert ray.get(free.remote()) == 0
        said = Said()
        with begin(said, "busy", SETTINGS.model_copy(update={"per_task": 2})) as previews:
            previews.begin(1, KEY.format(step=1))
        assert said.lines == []
        [preview] = said.previews
        assert preview.report is not None
        assert preview.report.images == 12
    finally:
        ray.kill(holder)


class _Holder:
    def hold(self) -> None:
        """Its actor has the CPUs until it is killed."""


def test_one_prompt_a_task_is_too_few():
    with pytest.raises(ValueError, match="per_task must be 0, or at least 2"):
        PreviewSettings(per_task=1)
    assert run.GenevalSettings(per_task=2)
