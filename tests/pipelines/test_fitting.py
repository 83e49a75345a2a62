"""What is told before anything is built: encoders that cannot be had or do not fit, data of another size."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from infra.config import Settings, parse
from infra.errors import CheckpointError, SettingsError
from infra.records import EncodersOutput, Output, SnapshotOutput
from infra.store import open_store
from infra.tracking import NOWHERE
from orchestration import launch, parsing
from pipelines.stages import train as stages
from pipelines.stages.base import Context
from pipelines.stages.fitting import check_training, classes_of
from pipelines.stages.train import TrainStage, check_train, fitted
from tests.infra.stage_records import record_of
from tests.training.small_run import write_lpips
from training.encoders import known as encoders
from training.settings import TrainSettings

DATA = {"kind": "snapshot", "shards": "prepare", "size": 64}
TINY = {"kind": "train", "preset": "tiny", "data": "data", "encoders": "encoders", "steps": 10, "batch": 4}


def recipe(**train: Any) -> dict[str, Settings]:
    """The stages of a recipe whose one train stage has these settings besides those it must have."""
    source = {"kind": "text_folder", "name": "own", "url": "photos"}
    plain: dict[str, dict[str, Any]] = {
        "prepare": {"kind": "prepare", "sources": [source], "sizes": [64]},
        "data": DATA,
        "encoders": {"kind": "encoders", "captions": "data"},
        "train": {k: v for k, v in (TINY | train).items() if v is not None},
    }
    return {name: parsing.parse_stage(name, stage)[1] for name, stage in plain.items()}


def check(**train: Any) -> None:
    check_training(recipe(**train), ["train"])


def folder_with(path: Path, **config: Any) -> str:
    """An encoder's folder as far as anybody looks before loading it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"")
    return str(path)


# A preset's defaults


def test_a_preset_alone_is_enough():
    check()
    made = parse(TrainSettings, {"preset": "tiny", "steps": 10, "batch": 4})
    assert (made.precision, made.objective.repa_block, made.ema.decay) == ("fp32", 2, 0.99)


def test_what_is_set_stands_over_the_preset():
    given = {"optim": {"lr": 0.5}, "objective": {"repa_block": 3}, "precision": "bf16"}
    made = parse(TrainSettings, {"preset": "tiny", "steps": 10, "batch": 4, **given})
    assert (made.optim.lr, made.optim.betas) == (0.5, (0.9, 0.99))
    assert (made.objective.repa_block, made.precision) == (3, "bf16")


def test_a_shallow_network_is_aligned_at_a_block_that_it_has():
    made = parse(TrainSettings, {"preset": "XXL/16", "model": {"blocks": 4}, "steps": 1, "batch": 4})
    assert made.objective.repa_block == 2
    assert parse(TrainSettings, {"preset": "XXL/16", "steps": 1, "batch": 4}).objective.repa_block == 6


def test_width_and_sides_follow_the_encoder_and_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What a train stage gives to the training run, from the records of the stages before it."""
    from infra.records import SnapshotRecord, put_data, write_record
    from training import ray_train

    jobs: list[Any] = []

    def fit(job: Any, show: Any) -> Any:
        jobs.append(job)
        raise CheckpointError("far enough", remedy="none")

    monkeypatch.setattr(ray_train, "fit", fit)
    store = open_store(str(tmp_path))
    data = put_data(store, "x", "rows", b"")
    names = {"selection": data, "held_out": data, "by_shard": data}
    counts = {"rows": 1, "held_out_rows": 0, "counts": [], "by_source": {}, "caption_shares": {}, "forgotten": []}
    write_record(store, "snapshot.json", SnapshotRecord(shards="s", size="24", **names, **counts))
    config = put_data(store, "x", "config.json", b'{"hidden_size": 40}')
    outputs: dict[str, Output] = {
        "data": SnapshotOutput(record="snapshot.json", rows=1, counts=[], size="24"),
        "encoders": EncodersOutput(text={"config.json": config}, vision={}),
    }
    inputs = {name: record_of(output) for name, output in outputs.items()}
    context = Context(store, tmp_path, None, NOWHERE, lambda stage, progress: None, digest="d")  # type: ignore[arg-type]
    settings = parse(TrainStage, {k: v for k, v in TINY.items() if k != "kind"})
    with pytest.raises(CheckpointError, match="far enough"):
        stages.train(context, settings, inputs)
    network = jobs[0].settings.network()
    assert (network.text_dim, network.image_size) == (40, 24)


# What does not fit


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"model": {"image_size": 32}}, "`train.model.image_size` is 32, but the images of `data` are of size 64"),
        ({"model": {"text_dim": 128}}, "`train.model.text_dim` is 128, but the text encoder's features are 96 wide"),
        ({"objective": {"repa": 0.5, "repa_block": 4}}, "objective.repa_block is 4, but there are 3 blocks"),
    ],
)
def test_what_does_not_fit_is_refused(train: dict[str, Any], says: str):
    with pytest.raises(SettingsError, match=says):
        check(**train)


def test_sides_that_the_network_cannot_draw_are_refused():
    plain = recipe()
    plain["data"] = plain["data"].model_copy(update={"size": 36})
    with pytest.raises(SettingsError, match="image_size 36 is not a multiple of patch_size 8"):
        check_training(plain, ["train"])


def test_a_folder_tells_its_width(tmp_path: Path):
    wide = folder_with(tmp_path / "wide", hidden_size=2048)
    check(encoders=None, text_encoder=wide)
    with pytest.raises(SettingsError, match="the text encoder's features are 2048 wide"):
        check(encoders=None, text_encoder=wide, model={"text_dim": 96})


def test_the_weights_of_lpips_are_looked_at(tmp_path: Path):
    wants = {"model": {"prediction": "image"}, "objective": {"perceptual": {"lpips": 0.1}}}
    check(**wants, lpips=str(write_lpips(tmp_path / "lpips")))
    (tmp_path / "lpips" / "vgg.pth").unlink()
    with pytest.raises(CheckpointError, match=r"`train\.lpips`: .*lin0\.model\.1\.weight is missing"):
        check(**wants, lpips=str(tmp_path / "lpips"))
    with pytest.raises(SettingsError, match="there is no folder nowhere"):
        check(**wants, lpips="nowhere")
    check(**wants, lpips="somebody/lpips-vgg@v0.1")  # the hub is asked when it is loaded


def test_an_inherited_encoder_is_not_looked_for():
    plain = recipe()
    later = parse(TrainStage, {"preset": "tiny", "data": "data", "start_from": "train", "steps": 9, "batch": 4})
    check_training({**plain, "later": later}, ["later"])


def test_a_text_encoder_is_no_vision_encoder(tmp_path: Path):
    blind = folder_with(tmp_path / "blind", hidden_size=2048)
    with pytest.raises(SettingsError, match="has no patches"):
        check(encoders=None, text_encoder=blind, vision_encoder=blind, objective={"repa": 0.5})


# What cannot be had


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub of one model, `some/model`, and a secret one; the paths that were asked for."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            body = b'{"hidden_size": 72}'
            if self.path.startswith("/some/model/resolve/main/config.json"):
                self.send_response(200)
                self.send_header("ETag", '"1"')
                self.send_header("X-Repo-Commit", "0" * 40)
            else:
                secret = self.path.startswith("/some/secret/")
                self.send_response(403 if secret else 404)
                self.send_header("X-Error-Code", "GatedRepo" if secret else "RepoNotFound")
                body = b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *args: Any) -> None:
            pass

    encoders.known.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            point_at(monkeypatch, server.server_address[1])
            yield asked
        finally:
            server.shutdown()
            thread.join()


def point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """As HF_ENDPOINT does for a process of its own."""
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def test_a_model_of_the_hub_tells_its_width(hub: list[str]):
    with pytest.raises(SettingsError, match="the text encoder's features are 72 wide"):
        check(encoders=None, text_encoder="some/model", model={"text_dim": 96})
    check(encoders=None, text_encoder="some/model")


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("some/modle", SettingsError, "the hub has no model some/modle: correct the name"),
        ("some/secret", CheckpointError, "only to those who have agreed to its terms: agree on its page"),
        ("/no/such/folder", SettingsError, "there is no folder /no/such/folder: name a folder or hub model"),
        ("../models/qwen", SettingsError, "there is no folder ../models/qwen"),
    ],
)
def test_an_encoder_that_is_not_there_is_told_with_ways_out(hub: list[str], name: str, error: type, says: str):
    with pytest.raises(error, match=f"`train` cannot have its text encoder {name}: .*{says}") as told:
        check(encoders=None, text_encoder=name)
    assert "`train.encoders`" in str(told.value)
    assert "`preset: tiny`" in str(told.value)


def test_a_hub_that_does_not_answer_is_given_up_soon(hub: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoders, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_at(monkeypatch, silent.getsockname()[1])
        # Two clocks run, ours and the hub's library's: on a busy machine either may be first.
        with pytest.raises(CheckpointError, match=r"cannot be reached \((no answer within 0.3 s|.*timed out.*)\)"):
            check(encoders=None, text_encoder="some/model")


def test_a_hub_that_is_away_is_asked_once(hub: list[str], monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    point_at(monkeypatch, port)  # nobody listens there now
    with pytest.raises(CheckpointError, match=f"the hub at http://127.0.0.1:{port} cannot be reached"):
        check(encoders=None, text_encoder="some/model")


def test_the_machines_own_copy_needs_no_hub(hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check(encoders=None, text_encoder="some/model")
    [config] = (tmp_path / "cache").rglob("config.json")
    (config.parent / "model.safetensors").write_bytes(b"")
    encoders.known.cache_clear()
    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check(encoders=None, text_encoder="some/model")
    assert not hub
    encoders.known.cache_clear()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids to ask the hub"):
        check(encoders=None, text_encoder="some/other")


def test_a_run_and_a_dry_run_tell_it_before_anything_is_built(
    hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "photos").mkdir()
    source = {"kind": "text_folder", "name": "own", "url": str(tmp_path / "photos")}
    plain = {
        "prepare": {"kind": "prepare", "sources": [source], "sizes": [64]},
        "data": DATA,
        "train": {k: v for k, v in TINY.items() if k != "encoders"} | {"text_encoder": "some/modle"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "stages": plain}))

    def go(*, dry_run: bool, address: str | None = None) -> None:
        launch.run(
            str(tmp_path / "mine.yaml"),
            store=str(tmp_path / "store"),
            assignments=[],
            address=address,
            dry_run=dry_run,
            as_json=False,
        )

    for dry_run in (True, False):
        with pytest.raises(SettingsError, match="the hub has no model some/modle"):
            go(dry_run=dry_run)
    assert "> train" in capsys.readouterr().out
    assert not list(open_store(str(tmp_path / "store")).list("plans/"))


# Labels and buckets

BUCKETS = {"name": "b48", "side": 48, "step": 16}


def with_data(train: dict[str, Any], data: dict[str, Any], sizes: list[Any] | None = None) -> dict[str, Settings]:
    kept = {"kind": "table_folder", "name": "own", "url": "photos", "tables": ["t.parquet"], "captions": ["c"]}
    plain: dict[str, dict[str, Any]] = {
        "prepare": {"kind": "prepare", "sources": [kept | {"keep": ["label"]}], "sizes": sizes or [64]},
        "data": DATA | data,
        "train": {"kind": "train", "preset": "XL/16", "data": "data", "steps": 10, "batch": 4} | train,
    }
    return {name: parsing.parse_stage(name, stage)[1] for name, stage in plain.items()}


def wrongs(stages: dict[str, Settings]) -> list[str]:
    train = stages["train"]
    assert isinstance(train, TrainStage)
    return [f"{wrong.field} {wrong.message}" for wrong in check_train(train, {"data": stages["data"]})]


LABELS = {"labels": {"classes": 10}}
NO_REPA = {"objective": {"repa": 0.0}}


def test_a_network_that_draws_from_labels_takes_its_classes_from_the_data():
    stages = with_data(NO_REPA, LABELS)
    check_training(stages, ["train"])
    assert not wrongs(stages)
    assert isinstance(stages["train"], TrainStage)
    assert fitted(stages["train"], 64, None, classes_of(stages["data"]))["model"] == {"image_size": 64, "classes": 10}


@pytest.mark.parametrize(
    ("train", "data", "says"),
    [
        ({}, {}, "which has no labels"),
        ({"model": {"classes": 9}}, LABELS, "has 9 classes, and the labels of `data` 10"),
        ({"preset": "tiny"}, LABELS, "made for training by labels"),
        ({"previews": {"per_task": 2}, "export_every": 500}, LABELS, "is a GenEval, whose prompts are texts"),
    ],
)
def test_a_condition_that_the_data_do_not_have_is_told(train: dict[str, Any], data: dict[str, Any], says: str):
    assert says in wrongs(with_data(train, data))[0]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({}, "is 256, but the buckets of `data` have as many pixels as a square of 48"),
        ({"image_size": 48, "patch_size": 8, "fixed_grid": True}, "a fixed grid is square"),
        ({"image_size": 48, "patch_size": 12}, "its patches have a side of 12"),
    ],
)
def test_buckets_that_do_not_fit_the_network_are_told(model: dict[str, Any], says: str):
    with pytest.raises(SettingsError, match=says):
        check_training(with_data(NO_REPA | {"model": model}, LABELS | {"size": "b48"}, [BUCKETS]), ["train"])


def test_buckets_that_fit_are_accepted():
    model = {"image_size": 48, "patch_size": 8}
    check_training(with_data(NO_REPA | {"model": model}, LABELS | {"size": "b48"}, [BUCKETS]), ["train"])
