"""Pictures for captions that training never saw: which captions, beside which originals, and what a page shows."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.snapshots.build import snapshot
from data_prep.snapshots.settings import SnapshotSettings
from infra.config import parse
from infra.errors import SettingsError
from infra.records import CheckpointRecord, SnapshotRecord
from infra.shards import read_selection
from infra.store import Store, open_store
from pipelines.evaluation import generate
from pipelines.evaluation.chunks import Chunk
from pipelines.evaluation.rows import spread
from pipelines.page.report import build
from pipelines.sample import held_out
from pipelines.sample.held_out import Drawn, DrawSettings
from tests.data_prep.corpora import prepare_here, settings_for, write_corpus
from tests.pipelines.drawn_here import drawn_here
from tests.pipelines.small_story import make
from tests.training import small_checkpoint
from training import checkpoint as checkpoints


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def data(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], SnapshotRecord]:
    folder = tmp_path_factory.mktemp("corpus") / "new"
    write_corpus(folder, 60)
    plan = prepare_here(store, settings_for(folder))

    def of(held_out: float) -> SnapshotRecord:
        settings = SnapshotSettings(size=16, held_out=held_out, captions={"short": 0.2, "long": 0.8})
        return snapshot(store, plan.digest, plan.edition, settings)

    return of


@pytest.fixture(scope="module")
def checkpoint(store: Store, tmp_path_factory: pytest.TempPathFactory) -> CheckpointRecord:
    return checkpoints.publish_folder(store, small_checkpoint.write_text(tmp_path_factory.mktemp("net") / "net"))


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Drawing in this process, as a worker of Ray does it; the prompts of every call."""
    calls: list[list[str]] = []

    def here(order: generate.Order, prompts: Sequence[str], show: Any) -> list[Chunk]:
        calls.append(list(prompts))
        return drawn_here(order, prompts)

    monkeypatch.setattr(held_out, "generate", here)
    return calls


FEW = {"count": 3, "images": 2, "sampling": {"steps": 1}}


def draw(store: Store, checkpoint: CheckpointRecord, data: SnapshotRecord, prefix: str, **changes: Any) -> Drawn:
    settings = parse(DrawSettings, FEW | changes)
    return held_out.draw(store, prefix, checkpoint, data, settings, lambda text, done, total: None)


def test_held_out_captions_are_drawn_beside_their_pictures(
    store: Store, checkpoint: CheckpointRecord, data: Any, drawing: list[list[str]], tmp_path: Path
):
    record = data(0.3)
    drawn = draw(store, checkpoint, record, "one", prompts=["my own"])
    texts = [prompt.text for prompt in drawn.prompts]
    assert texts[0] == "my own" and len(set(texts)) == 4
    assert all(text.startswith("a long caption") for text in texts[1:]), "the likeliest"
    rows = read_selection(store, record, held_out=True).to_pylist()
    assert set(texts[1:]) <= {text for row in rows for text in row["captions"]}
    assert not drawn.seen
    own, *others = held_out.pictures(store, drawn)
    assert own[1] is None and len(own[2]) == 2
    for prompt, original, pngs in others:
        assert original is not None
        assert f"picture {sizes(original)}" and prompt.original is not None
        assert {sizes(png) for png in pngs} == {(16, 16)} == {sizes(original)}
    held_out.write_sheet(store, drawn, "a title", tmp_path / "sheet.png")
    assert sizes((tmp_path / "sheet.png").read_bytes())[0] >= 640
    assert draw(store, checkpoint, record, "one", prompts=["my own"]) == drawn
    assert len(drawing) == 1, "what is drawn is not drawn again"


def sizes(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def test_captions_lie_far_from_each_other():
    assert list(spread(11)) == [0, 8, 4, 2, 6, 10, 1, 3, 5, 7, 9]
    assert list(spread(1)) == [0]
    assert list(spread(0)) == []


def test_where_nothing_is_held_out_it_says_so(
    store: Store, checkpoint: CheckpointRecord, data: Any, drawing: list[list[str]]
):
    drawn = draw(store, checkpoint, data(0.0), "all")
    assert drawn.seen
    assert "from the training data, as nothing is held out of it" in page_of(store, drawn)


def test_the_page_shows_them_and_outlives_the_originals(
    store: Store, checkpoint: CheckpointRecord, data: Any, drawing: list[list[str]]
):
    drawn = draw(store, checkpoint, data(0.3), "page", prompts=["<b>mine</b>"])
    page = page_of(store, drawn)
    assert "that training never saw" in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert page.count("data:image/png;base64") == 8 and page.count("data:image/jpeg;base64") == 3
    gone = [prompt.model_copy(update={"original": at.model_copy(update={"tar": "data/gone.tar"})})
            for prompt in drawn.prompts if (at := prompt.original)]  # fmt: skip
    page = page_of(store, drawn.model_copy(update={"prompts": gone}))
    assert ">gone<" in page


def page_of(store: Store, drawn: Drawn) -> str:
    made = make(store)
    key = made.put(f"drawn-{drawn.digest()}", drawn)
    made.stage("samples", "sample", {"record": key, "sheet": "s.png", "prompts": 1}, checkpoint="sft", data="sft_data")
    page = build(store, "A page", made.stages)
    return page.partition(">What it draws<")[2].partition("<section")[0]


def test_nothing_to_draw_is_refused():
    with pytest.raises(SettingsError, match="nothing is drawn: give `prompts`, or a `count` of captions"):
        parse(DrawSettings, {"count": 0})
