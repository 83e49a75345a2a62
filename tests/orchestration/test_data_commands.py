"""`pixnerd data` over a store that was really prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
import yaml
from PIL import Image

from data_prep.prepare.job import prepare
from data_prep.prepare.plan import read_plan
from data_prep.scores.job import Place
from data_prep.snapshots.build import snapshot
from data_prep.snapshots.settings import SnapshotSettings
from data_prep.upkeep.drop import drop
from data_prep.upkeep.verify import verify
from infra.errors import DataError, SettingsError
from infra.records import (
    PrepareSummary,
    ScoreRecord,
    ScoreSummary,
    ShardRecord,
    SnapshotOutput,
    SnapshotRecord,
    put_data,
    read_record,
    write_record,
)
from infra.shards import list_shards, read_index, shard_prefix
from infra.store import FileStore, Store, open_store
from infra.tracking import NOWHERE
from orchestration import workflow
from orchestration.artifacts import stage_records
from orchestration.commands import data
from pipelines import recipes
from pipelines.stages.base import Context
from tests.data_prep.corpora import contents, settings_for, write_corpus
from tests.data_prep.test_snapshot import scored
from tests.infra.stage_records import record_of
from tests.infra.stores import misplaced
from tests.orchestration.test_workflow import NoTracker

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Store:
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "corpus", 30)
    store = open_store(str(folder / "store"))
    summary = prepare(store, settings_for(folder / "corpus"))
    write_record(store, "stages/prepare/d.json", record_of(summary, "prepare"))
    return store


def test_show_says_what_became_of_every_input(made: Store, capsys: pytest.CaptureFixture[str]):
    data.show(made.url, size=None, column=["score"], out=None, seed=0, json_=False)
    text = capsys.readouterr().out
    assert "prepare, size 32: 18 images in 4 shards" in text
    assert "prepare, size 16: 18 images" in text
    for part in ("truncated", "no_caption", "words of long: 6 to 6", "licences: CC0-1.0 18", "score: "):
        assert part in text
    data.show(made.url, size="16", column=[], out=None, seed=0, json_=True)
    [summary] = json.loads(capsys.readouterr().out)
    assert (summary["size"], summary["accepted"], summary["inputs"]) == ("16", 18, 30)
    assert sum(summary["rejected"].values()) == 12


def summary_of(place: Place) -> ScoreSummary:
    facts = {"settings": {}, "columns": [], "shards": 4, "rows": 18, "failures": {}, "versions": []}
    return ScoreSummary(**place._asdict(), **facts)


def test_show_joins_the_scores_of_a_stage(made: Store, capsys: pytest.CaptureFixture[str]):
    prepared = stage_records(made, "prepare")[0].of(PrepareSummary)
    plan, edition = prepared.plan, prepared.edition
    with pytest.raises(SettingsError, match="no scores called `clip`"):
        data.show(made.url, size=None, column=[], score=["clip"], out=None, seed=0, json_=False)
    scored(
        (made, read_plan(made, plan, edition)),
        "0123456789abcdef",
        clip_score=lambda keys: pa.array([0.25] * len(keys)),
        clip_failure=lambda keys: pa.array(["no_caption"] + [None] * (len(keys) - 1)),
    )
    [stage] = stage_records(made, "prepare")
    output = summary_of(Place(plan, "16", "0123456789abcdef"))
    made_by = stage.model_copy(update={"stage": "clip", "kind": "score", "output": output})
    write_record(made, "stages/score/d.json", made_by)
    for name in ("clip", "0123456789abcdef"):
        data.show(made.url, size=None, column=[], score=[name], out=None, seed=0, json_=False)
        at_32, at_16 = capsys.readouterr().out.split("size 16:")
        assert "clip_score: 0.25 to 0.25" in at_16 and "clip_failure: no_caption" in at_16
        assert "clip_score" not in at_32


def test_show_draws(made: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data.show(made.url, size="32", column=[], out=tmp_path / "out", seed=0, json_=True)
    [summary] = json.loads(capsys.readouterr().out)
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(summary["pictures"].values())
    for path in summary["pictures"].values():
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_a_size_that_is_not_there(made: Store):
    with pytest.raises(SettingsError, match=r"size `64`.*16, 32"):
        data.show(made.url, size="64", column=[], out=None, seed=0, json_=False)


def test_an_empty_store_says_what_to_do(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing has been prepared"):
        data.verify(str(tmp_path / "empty"), json_=False)


def test_verify(made: Store, capsys: pytest.CaptureFixture[str]):
    data.verify(made.url, json_=False)
    assert "8 shards, 60 inputs, 36 images read again" in capsys.readouterr().out


def test_forget_names_who_holds_the_items(made: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = json.loads(made.get("stages/prepare/d.json"))["output"]
    shards = list_shards(made, shard_prefix(output["plan"], "16"))
    [gone, *_] = [row for shard in shards for row in read_index(made, shard).to_pylist() if row["accepted"]]
    before = snapshot(made, output["plan"], output["edition"], SnapshotSettings(size=16))
    (tmp_path / "list.txt").write_text(f"{gone['name']}\nunheard-of.png\n")
    data.forget(tmp_path / "list.txt", made.url, reason="asked", twins=True, dry_run=True, json_=False)
    text = capsys.readouterr().out
    assert "would forget 1 samples" in text
    assert "not known here: 1 of 2 ('unheard-of.png')" in text
    assert "snapshots/" in text and "no checkpoint saw any of them" in text
    assert snapshot(made, output["plan"], output["edition"], SnapshotSettings(size=16)) == before
    data.forget(tmp_path / "list.txt", made.url, reason="asked", twins=True, dry_run=False, json_=True)
    found = json.loads(capsys.readouterr().out)
    after = snapshot(made, output["plan"], output["edition"], SnapshotSettings(size=16))
    assert after.rows == before.rows - 1 - found["twins"]


class Run(NamedTuple):
    """A recipe of prepare stages over one corpus, and its store."""

    store: Store
    nodes: list[workflow.Node]
    context: Context

    def __call__(self) -> None:
        workflow.run(self.nodes, self.context, lambda node, event, text: None)

    def records(self, size: str = "16") -> list[str]:
        [plan, *_] = dict.fromkeys(entry.key.split("/")[1] for entry in self.store.list("shards/"))
        return [entry.key for entry in self.store.list(shard_prefix(plan, size))]

    def shard(self, key: str) -> ShardRecord:
        return read_record(self.store, key, ShardRecord)

    def tar(self, key: str) -> str:
        tar = self.shard(key).tar
        assert tar is not None
        return tar.key


def run_of(folder: Path, **stages: dict[str, Any]) -> Run:
    write_corpus(folder / "corpus", 30)
    source = settings_for(folder / "corpus").sources[0].model_dump(exclude_unset=True)
    prepared = {"kind": "prepare", "sources": [source], "rows_per_shard": 8}
    whole = {name: more if "kind" in more else prepared | more for name, more in stages.items()}
    recipe = folder / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"name": "mine", "stages": whole}))
    store = open_store(str(folder / "store"))
    context = Context(store, folder, NoTracker(), NOWHERE, lambda stage, progress: None)  # type: ignore[arg-type]
    return Run(store, workflow.graph(recipes.load(str(recipe)), store), context)


def spoil(store: Store, key: str) -> None:
    """Other bytes, as many as before."""
    store.put(key, store.get(key)[:-1] + b"!")


def test_what_verify_says_to_do_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_of(tmp_path, prepare={"sizes": [32, 16]})
    run()
    before = contents(run.store)
    tar_of, index_of, unread, healthy = run.records()
    broken = [run.tar(tar_of), run.shard(index_of).index.key]
    for key in broken:
        spoil(run.store, key)
    run.store.put(unread, b"not JSON")
    damaged = contents(run.store)
    with pytest.raises(DataError, match=r"3 things .* `pixnerd data verify --store .*/store --drop-damaged`, then the"):
        data.verify(run.store.url, json_=False)
    assert contents(run.store) == damaged, "without the flag nothing is deleted"

    capsys.readouterr()
    data.verify(run.store.url, drop_damaged=True, json_=True)
    said, _ = json.loads(capsys.readouterr().out).values()
    left = contents(run.store)
    gone = damaged.keys() - left.keys()
    assert gone == set(said["dropped"]) == {*broken, tar_of, index_of, unread, *done_in(run.store, before)}
    assert healthy in left
    assert all(left[key] == before[key] for key in left)
    run()
    data.verify(run.store.url, json_=True)
    assert without_times(contents(run.store)) == without_times(before)


def test_what_was_made_of_damaged_shards_is_made_again_as_well(tmp_path: Path):
    chosen = {"kind": "snapshot", "shards": "prepare"}
    run = run_of(tmp_path, prepare={"sizes": [32, 16]}, small=chosen | {"size": 16}, large=chosen | {"size": 32})
    run()
    [stage] = stage_records(run.store, "prepare")
    plan, edition = stage.of(PrepareSummary).plan, stage.of(PrepareSummary).edition
    scored(
        (run.store, read_plan(run.store, plan, edition)), "clip", clip_score=lambda keys: pa.array([1.0] * len(keys))
    )
    before = contents(run.store)
    small, large = (
        next(
            record.of(SnapshotOutput).record for record in stage_records(run.store, "snapshot") if record.stage == name
        )
        for name in ("small", "large")
    )
    broken = run.records()[1]
    spoil(run.store, run.tar(broken))
    data.verify(run.store.url, drop_damaged=True, json_=True)
    left = contents(run.store)
    assert small not in left and large in left
    assert [key for key in left if key.startswith("stages/snapshot/")] == [
        key for key in before if key.startswith("stages/snapshot/") and large.encode() in before[key]
    ]
    scores = [key for key in before if key.startswith("scores/")]
    assert [key for key in scores if key not in left] == [f"scores/{plan}/16/clip/00001.json"]
    run()
    found = contents(run.store)
    assert without_times({key: data for key, data in found.items() if key in before}) == without_times(
        {key: data for key, data in before.items() if key in found}
    )
    assert before.keys() - found.keys() == {f"scores/{plan}/16/clip/00001.json"}


def test_export_writes_the_newest_snapshot_of_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_of(tmp_path, prepare={"sizes": [16]}, data={"kind": "snapshot", "shards": "prepare", "size": 16})
    run()
    capsys.readouterr()
    out = str(tmp_path / "out")
    data.export("data", run.store.url, out, layout="huggingface", tar_mib=None, json_=False)
    assert capsys.readouterr().out == f"file://{out}/train: 18 samples in 1 folders of pictures\n"
    lines = (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == len(list((tmp_path / "out").rglob("*.jpg"))) == 18
    [key] = {record.of(SnapshotOutput).record for record in stage_records(run.store, "snapshot")}
    data.export(Path(key).stem, run.store.url, f"{out}2", layout="webdataset", tar_mib=1, json_=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["snapshot"], told["splits"], told["tar_mib"]) == (key, {"train": {"rows": 18, "parts": 1}}, 1)
    with pytest.raises(SettingsError, match=r"no snapshot called `datta` .*snapshots: data"):
        data.export("datta", run.store.url, out, layout="webdataset", tar_mib=None, json_=False)
    with pytest.raises(SettingsError, match="--tar-mib means nothing"):
        data.export("data", run.store.url, out, layout="huggingface", tar_mib=1, json_=False)
    gone = json.loads(lines[0])["name"]
    (tmp_path / "list.txt").write_text(gone)
    data.forget(tmp_path / "list.txt", run.store.url, reason="asked", twins=True, dry_run=False, json_=False)
    assert f"file://{out}2" in capsys.readouterr().out


def test_damaged_snapshots_are_made_again_by_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chosen = {"kind": "snapshot", "shards": "prepare", "size": 16}
    run = run_of(
        tmp_path,
        prepare={"sizes": [16]},
        whole=chosen,
        spoilt=chosen | {"held_out": 0.3},
        unread=chosen | {"filter": "objects > 0"},
        gone=chosen | {"filter": "objects > 1"},
    )
    run()
    before = contents(run.store)
    made = {record.stage: record.of(SnapshotOutput).record for record in stage_records(run.store, "snapshot")}
    held_out = read_record(run.store, made["spoilt"], SnapshotRecord).held_out.key
    spoil(run.store, held_out)
    run.store.put(made["unread"], b"{not JSON")
    run.store.delete(made["gone"])
    with pytest.raises(DataError, match=r"3 things .*--drop-damaged`, then the recipe again"):
        data.verify(run.store.url, json_=False)
    capsys.readouterr()
    data.verify(run.store.url, drop_damaged=True, json_=False)
    text = capsys.readouterr().out
    assert f"now `pixnerd run RECIPE --store {run.store.url}` makes the scores and snapshots again" in text
    assert "pixnerd prepare" not in text
    left = contents(run.store)
    names = {key: json.loads(before[key])["stage"] for key in before if key.startswith("stages/snapshot/")}
    stages = {key for key, name in names.items() if name != "whole"}
    assert before.keys() - left.keys() == {held_out, *stages, made["spoilt"], made["unread"], made["gone"]}
    run()
    data.verify(run.store.url, json_=True)
    assert without_times(contents(run.store)) == without_times(before)


def test_damaged_scores_go_with_what_says_that_they_are_done(tmp_path: Path):
    run = run_of(tmp_path, prepare={"sizes": [16]}, data={"kind": "snapshot", "shards": "prepare", "size": 16})
    run()
    assert misplaced(run.store) == []
    [stage] = stage_records(run.store, "prepare")
    plan, edition = stage.of(PrepareSummary).plan, stage.of(PrepareSummary).edition
    planned = read_plan(run.store, plan, edition)
    for scorer in ("clip", "vlm"):
        scored((run.store, planned), scorer, score=lambda keys: pa.array([1.0] * len(keys)))
        place = Place(plan, "16", scorer)
        output = summary_of(place)
        write_record(run.store, place.summary_key(sorted(planned.all_numbers("16"))), output)
        record = stage.model_copy(update={"stage": scorer, "kind": "score", "output": output})
        write_record(run.store, f"stages/score/{scorer}.json", record)
    data.verify(run.store.url, json_=True)
    before = contents(run.store)
    table = read_record(run.store, Place(plan, "16", "clip").key(2), ScoreRecord).table.key
    spoil(run.store, table)
    data.verify(run.store.url, drop_damaged=True, json_=True)
    summary = next(key for key in before if key.startswith(f"scored/{plan}/16/clip/"))
    assert before.keys() - contents(run.store).keys() == {
        *(table, Place(plan, "16", "clip").key(2), summary, "stages/score/clip.json")
    }
    data.verify(run.store.url, json_=True)


def test_one_that_is_killed_while_it_drops_is_finished_by_the_next(tmp_path: Path):
    """Wherever it ends, what is left tells another one what is to go, and the run mends it."""
    chosen = {"kind": "snapshot", "shards": "prepare", "size": 16}
    run = run_of(tmp_path, prepare={"sizes": [16]}, data=chosen)
    run()
    before = contents(run.store)
    [stage] = stage_records(run.store, "prepare")
    plan, edition = stage.of(PrepareSummary).plan, stage.of(PrepareSummary).edition
    [key] = [record.of(SnapshotOutput).record for record in stage_records(run.store, "snapshot")]
    spoil(run.store, read_record(run.store, key, SnapshotRecord).selection.key)
    spoil(run.store, run.tar(run.records()[1]))

    class Killed(FileStore):
        left = 0

        def delete(self, key: str) -> None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            super().delete(key)

    assert isinstance(run.store, FileStore)
    kills = 0
    while True:
        store = Killed(run.store.root)
        store.left = 1
        found = verify(store, plan, edition)
        if not found.damaged:
            break
        try:
            drop(store, plan, found)
        except KeyboardInterrupt:
            kills += 1
        if kills > 3:  # what is left is done at once: its shard is not there
            drop(run.store, plan, verify(run.store, plan, edition))
            break
    assert kills > 3
    run()
    data.verify(run.store.url, json_=True)
    assert without_times(contents(run.store)) == without_times(before)


def done_in(store: Store, before: dict[str, bytes]) -> list[str]:
    return [key for key in before if key.startswith(("stages/prepare/", "prepared/"))]


def without_times(found: dict[str, bytes]) -> dict[str, bytes]:
    """A stage's record says when it ran, and how long."""
    return {key: b"" if key.startswith("stages/") else data for key, data in found.items()}


def test_dropping_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_of(tmp_path, mine={"sizes": [16]})
    run()
    data.verify(run.store.url, drop_damaged=True, json_=False)
    assert "deleted" not in capsys.readouterr().out
    run.store.delete(run.records()[0])
    data.verify(run.store.url, drop_damaged=True, json_=False)
    text = capsys.readouterr().out
    assert "deleted 2 objects and records" in text
    assert (
        f"now run `pixnerd prepare RECIPE --store {run.store.url}`, with the recipe that has the stage `mine`" in text
    )
    run()
    data.verify(run.store.url, json_=False)


def test_plans_that_share_damaged_data_are_mended_together(tmp_path: Path):
    run = run_of(tmp_path, one={"sizes": [16]}, both={"sizes": [16, 32]})
    run()
    before = contents(run.store)
    first = run.records()[0]
    shared = run.tar(first)
    sharing = [key for key in before if key.startswith("shards/") and shared.encode() in before[key]]
    assert len(sharing) == 2
    spoil(run.store, shared)
    data.verify(run.store.url, drop_damaged=True, json_=True)
    gone = before.keys() - contents(run.store).keys()
    assert gone == {shared, *sharing, *done_in(run.store, before)}
    run()
    data.verify(run.store.url, json_=True)
    assert without_times(contents(run.store)) == without_times(before)


def test_a_plan_without_damage_stays_done(tmp_path: Path):
    run = run_of(tmp_path, small={"sizes": [16]}, large={"sizes": [32]})
    run()
    before = contents(run.store)
    [large] = {key for key in before if key.startswith("shards/") and key.endswith("/32/00000.json")}
    spoil(run.store, run.shard(large).index.key)
    data.verify(run.store.url, drop_damaged=True, json_=True)
    plan = large.split("/")[1]
    gone = before.keys() - contents(run.store).keys()
    assert {key.split("/")[0] for key in gone} == {"data", "shards", "prepared", "stages"} and len(gone) == 4
    assert all(plan in key for key in gone if key.startswith(("shards/", "prepared/")))


def test_every_edition_that_says_that_it_is_done_is_told_otherwise(tmp_path: Path):
    run = run_of(tmp_path, prepare={"sizes": [16]})
    run()
    [stage] = stage_records(run.store, "prepare")
    older = stage.model_copy(
        update={
            "digest_of_work": "older",
            "started": "2020-01-01",
            "output": stage.output.model_copy(update={"edition": "older"}),
        }
    )
    write_record(run.store, "stages/prepare/older.json", older)
    run.store.put(f"prepared/{stage.of(PrepareSummary).plan}/older.json", b"{}")
    spoil(run.store, run.tar(run.records()[0]))
    data.verify(run.store.url, drop_damaged=True, json_=True)
    assert done_in(run.store, contents(run.store)) == []


def test_what_no_new_shard_mends_is_not_dropped(tmp_path: Path):
    run = run_of(tmp_path, prepare={"sizes": [16]})
    run()
    stray = run.records()[0].replace("/00000.", "/00099.")
    run.store.put(stray, b"{}")
    before = contents(run.store)
    for drop_damaged in (False, True):
        with pytest.raises(DataError, match=r"1 things .* no new work mends.*in no plan"):
            data.verify(run.store.url, drop_damaged=drop_damaged, json_=True)
        assert contents(run.store) == before


def test_gc_tells_and_deletes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = run_of(tmp_path, prepare={"sizes": [16]})
    run()
    before = contents(run.store)
    keys = [put_data(run.store, prefix, "00000.tar", b"x" * 2**20).key for prefix in ("data/16", "data/originals")]
    data.gc(run.store.url, older_than_hours=24.0, dry_run=True, json_=False)
    text = capsys.readouterr().out
    assert f"would delete 0 of {sum(key.startswith('data/') for key in before) + 2} data objects, 0.0 MiB" in text
    assert "left alone: 2 younger than 24 hours" in text
    data.gc(run.store.url, older_than_hours=0.0, dry_run=True, json_=False)
    text = capsys.readouterr().out
    assert "would delete 2 of" in text and "2.0 MiB" in text and f"the first: {', '.join(keys)}" in text
    assert all(map(run.store.exists, keys))
    data.gc(run.store.url, older_than_hours=0.0, dry_run=False, json_=True)
    found = json.loads(capsys.readouterr().out)
    assert found["orphans"] == {folder: {"objects": 1, "bytes": 2**20} for folder in ("data/16", "data/originals")}
    assert (found["dry_run"], found["first"]) == (False, keys)
    assert contents(run.store) == before
    data.verify(run.store.url, json_=True)
