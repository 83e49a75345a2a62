"""`pixnerd data` over a store that was really prepared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data_prep.job import prepare
from data_prep.snapshot import SnapshotSettings, snapshot
from infra.errors import DataError, SettingsError
from infra.records import StageRecord, write_record
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import Store, open_store
from orchestration import workflow
from orchestration.data import forget_data, show_data, verify_data
from pipelines import recipes
from pipelines.stages import NOWHERE, Context
from tests.data_prep.corpora import contents, settings_for, write_corpus
from tests.orchestration.test_workflow import NoTracker

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Store:
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "corpus", 30)
    store = open_store(str(folder / "store"))
    summary = prepare(store, settings_for(folder / "corpus"))
    record = StageRecord(
        stage="prepare",
        kind="prepare",
        digest_of_work="d",
        inputs={},
        settings={},
        output=summary.model_dump(mode="json"),
        versions={},
        started="2026-01-01T00:00:00+00:00",
        seconds=1.0,
    )
    write_record(store, "stages/prepare/d.json", record)
    return store


def test_show_says_what_became_of_every_input(made: Store, capsys: pytest.CaptureFixture[str]):
    show_data(made.url, size=None, columns=["score"], out=None, seed=0, as_json=False)
    text = capsys.readouterr().out
    assert "prepare, size 32: 18 images in 4 shards" in text
    assert "prepare, size 16: 18 images" in text
    for part in ("truncated", "no_caption", "words of long: 6 to 6", "licences: CC0-1.0 18", "score: "):
        assert part in text
    show_data(made.url, size="16", columns=[], out=None, seed=0, as_json=True)
    [summary] = json.loads(capsys.readouterr().out)
    assert (summary["size"], summary["accepted"], summary["inputs"]) == ("16", 18, 30)
    assert sum(summary["rejected"].values()) == 12


def test_show_draws(made: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    show_data(made.url, size="32", columns=[], out=tmp_path / "out", seed=0, as_json=True)
    [summary] = json.loads(capsys.readouterr().out)
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(summary["pictures"].values())
    for path in summary["pictures"].values():
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_a_size_that_is_not_there(made: Store):
    with pytest.raises(SettingsError, match=r"size `64`.*16, 32"):
        show_data(made.url, size="64", columns=[], out=None, seed=0, as_json=False)


def test_an_empty_store_says_what_to_do(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing has been prepared"):
        verify_data(str(tmp_path / "empty"), as_json=False)


def test_verify(made: Store, capsys: pytest.CaptureFixture[str]):
    verify_data(made.url, as_json=False)
    assert "8 shards, 60 inputs, 36 images read again" in capsys.readouterr().out


def test_forget_names_who_holds_the_items(made: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = json.loads(made.get("stages/prepare/d.json"))["output"]
    shards = list_shards(made, shard_prefix(output["plan"], "16"))
    [gone, *_] = [row for shard in shards for row in read_index(made, shard).to_pylist() if row["accepted"]]
    before = snapshot(made, output["plan"], output["edition"], SnapshotSettings(size=16))
    (tmp_path / "list.txt").write_text(f"{gone['name']}\nunheard-of.png\n")
    forget_data(tmp_path / "list.txt", made.url, reason="asked", twins=True, dry_run=True, as_json=False)
    text = capsys.readouterr().out
    assert "would forget 1 samples" in text
    assert "not known here: 1 of 2 ('unheard-of.png')" in text
    assert "snapshots/" in text and "no checkpoint saw any of them" in text
    assert snapshot(made, output["plan"], output["edition"], SnapshotSettings(size=16)) == before
    forget_data(tmp_path / "list.txt", made.url, reason="asked", twins=True, dry_run=False, as_json=True)
    found = json.loads(capsys.readouterr().out)
    after = snapshot(made, output["plan"], output["edition"], SnapshotSettings(size=16))
    assert after.rows == before.rows - 1 - found["twins"]


def test_what_verify_says_to_do_mends_it(tmp_path: Path):
    write_corpus(tmp_path / "corpus", 20)
    source = settings_for(tmp_path / "corpus").sources[0].model_dump(exclude_unset=True)
    stage = {"kind": "prepare", "sources": [source], "sizes": [16], "rows_per_shard": 8}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"name": "mine", "stages": {"prepare": stage}}))
    store = open_store(str(tmp_path / "store"))
    nodes = workflow.graph(recipes.load(str(recipe)), store)
    context = Context(store, tmp_path, NoTracker(), NOWHERE, lambda stage, progress: None)  # type: ignore[arg-type]

    def run() -> None:
        workflow.run(nodes, context, lambda node, event, text: None)

    run()
    before = contents(store)
    broken = next(key for key in before if key.startswith("data/16/") and key.endswith(".tar"))
    store.put(broken, before[broken][:-1] + b"!")
    with pytest.raises(DataError) as error:
        verify_data(store.url, as_json=True)
    shard = next(key for key in before if key.startswith("shards/") and broken.encode() in before[key])
    for key in [broken, shard, *re.findall(r"[a-z]+/[^ ,;]+\.json", error.value.remedy)]:
        store.delete(key)
    run()
    verify_data(store.url, as_json=True)
    assert contents(store).keys() == before.keys()
