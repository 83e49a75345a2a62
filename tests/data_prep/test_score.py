from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from aiohttp import web
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from data_prep.images.decode import Decoded, decode
from data_prep.prepare.plan import Plan
from data_prep.scores import Row, Sample
from data_prep.scores import job as score_module
from data_prep.scores.clip import ClipScorer
from data_prep.scores.job import Place, Progress, ScoreSettings, read_scores, score, scorer_digest
from data_prep.scores.settings import ClipSettings
from infra.config import digest, parse
from infra.errors import CheckpointError, ClusterError, DataError, PixnerdError, SettingsError
from infra.records import PrepareSummary, ScoreRecord, ScoreSummary, ShardRecord, read_record
from infra.shards import list_shards, read_index, shard_key, shard_prefix
from infra.store import FileStore, Store, open_store
from infra.tracking import NOWHERE
from pipelines.stages.base import Context
from pipelines.stages.data import ScoreStage
from pipelines.stages.data import score as score_stage
from tests.data_prep.corpora import contents, prepare_here, settings_for, write_corpus
from tests.data_prep.small_scorers import (
    CLIP_WIDTH,
    CONTEXT,
    DiesAlways,
    DiesOnce,
    build_clip,
    endpoint,
    said,
    sample,
    serve,
)
from tests.infra.stage_records import record_of
from tests.orchestration.test_workflow import NoTracker

# ------------------------------------------------------------------------------------------------ CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("clip") / "model"
    build_clip(folder)
    return folder


def clip_settings(folder: Path, **changes: Any) -> ClipSettings:
    return parse(ClipSettings, {"kind": "clip", "model": str(folder)} | changes)


def rows_of(settings: ClipSettings, samples: list[Sample]) -> list[Row]:
    return list(ClipScorer(settings).rows(samples))


def cosine(folder: Path, sample: Sample, text: str) -> float:
    """What open_clip's own few lines say."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    found = decode(sample.image)
    assert isinstance(found, Decoded)
    with torch.inference_mode():
        image = model.eval().encode_image(preprocess(Image.fromarray(found.pixels))[None], normalize=True)
        words = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")([text]), normalize=True)
    return float((image * words).sum())


SAMPLES = [
    sample(0, 40, 40, short="a red dog", long="a red dog that sits on a mat by the door"),
    sample(1, 32, 64, short="two cats"),
    sample(2, 50, 33, short="a boat", other="something else"),
    sample(3, 32, 32),
    sample(4, 64, 64, long="word " * 500),
    sample(5, 37, 41, short="", long="ein Boot, 猫 🐈"),
]


def test_the_score_is_the_cosine_with_the_best_caption(clip: Path):
    rows = rows_of(clip_settings(clip), SAMPLES)
    for found, row in zip(SAMPLES, rows, strict=True):
        if not found.captions:
            assert row == {"clip_failure": "no_caption"}
            continue
        expected = max(cosine(clip, found, caption["text"]) for caption in found.captions)
        assert row["clip_score"] == pytest.approx(expected, abs=1e-5)
        assert row["clip_failure"] is None
    scores = [row["clip_score"] for row in rows if "clip_score" in row]
    assert np.ptp(scores) > 0.05


def test_kinds_of_captions_have_columns_of_their_own(clip: Path):
    scorer = ClipScorer(clip_settings(clip, name="fit", kinds=["short", "long"]))
    assert [field.name for field in scorer.fields] == ["fit_score", "fit_score_short", "fit_score_long", "fit_failure"]
    rows = list(scorer.rows(SAMPLES))
    both, short, other, none, long = rows[:5]
    assert both["fit_score"] == max(both["fit_score_short"], both["fit_score_long"])
    assert both["fit_score_short"] != both["fit_score_long"]
    assert both["fit_score_long"] == pytest.approx(cosine(clip, SAMPLES[0], SAMPLES[0].captions[1]["text"]), abs=1e-5)
    assert "fit_score_long" not in short and short["fit_score"] == short["fit_score_short"]
    assert other["fit_score"] == pytest.approx(cosine(clip, SAMPLES[2], "a boat"), abs=1e-5)
    assert none == {"fit_failure": "no_caption"}
    assert long["fit_score"] == pytest.approx(cosine(clip, SAMPLES[4], "word " * CONTEXT), abs=1e-5)


@pytest.mark.parametrize(("batch_size", "threads"), [(2, 1), (3, 2), (32, 2)])
def test_a_batch_scores_as_each_image_alone(clip: Path, tmp_path: Path, batch_size: int, threads: int):
    save_file({"weight": torch.randn(1, CLIP_WIDTH)}, tmp_path / "head.safetensors")
    heads = [{"name": "aesthetic", "file": str(tmp_path / "head.safetensors")}]
    samples = [*SAMPLES[:3], Sample("bad", [], b"\xff\xd8\xff no picture"), *SAMPLES[3:], *SAMPLES[::-1]]
    alone = rows_of(clip_settings(clip, batch_size=1, heads=heads), samples)
    assert alone[3] == {"clip_failure": "unreadable_image"}
    together = list(ClipScorer(clip_settings(clip, batch_size=batch_size, heads=heads), threads=threads).rows(samples))
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        assert one["clip_failure"] == other["clip_failure"]
        for name in one.keys() - {"clip_failure"}:
            assert one[name] == pytest.approx(other[name], abs=1e-5)


def test_features_are_computed_once_for_the_score_and_all_heads(clip: Path, tmp_path: Path):
    save_file({"weight": torch.randn(1, CLIP_WIDTH)}, tmp_path / "head.safetensors")
    heads = [{"name": name, "file": str(tmp_path / "head.safetensors")} for name in ("aesthetic", "nsfw", "watermark")]
    scorer = ClipScorer(clip_settings(clip, heads=heads, batch_size=3))
    seen: list[int] = []
    scorer.model.visual.register_forward_hook(lambda module, given, found: seen.append(len(given[0])))
    list(scorer.rows(SAMPLES))
    assert seen == [3, 3]


# ------------------------------------------------------------------------------------------------ heads


def improved_aesthetic() -> nn.Sequential:
    """As LAION's: layers.0, .2, .4, ... with dropouts between, eleven so that names sort as numbers or wrongly."""
    widths = [CLIP_WIDTH, 12, 10, 8, 6, 4]
    layers: list[nn.Module] = []
    for first, second in pairwise(widths):
        layers += [nn.Linear(first, second), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(4, 1)).eval()


def nsfw() -> nn.Sequential:
    return nn.Sequential(nn.Linear(CLIP_WIDTH, 8), nn.ReLU(), nn.Linear(8, 3))


def head_values(clip: Path, tmp_path: Path, state: Any, suffix: str = ".pt", **settings: Any) -> list[float]:
    file = tmp_path / f"head{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    head = {"name": "value", "file": str(file)} | settings
    return [row["value"] for row in rows_of(clip_settings(clip, heads=[head]), SAMPLES[:3])]


def features(clip: Path) -> torch.Tensor:
    scorer = ClipScorer(clip_settings(clip))
    images = torch.stack([torch.as_tensor(scorer._prepare(found)) for found in SAMPLES[:3]])
    with torch.inference_mode():
        return scorer.model.encode_image(images)


@torch.inference_mode()
def test_heads_of_every_shape_and_file(clip: Path, tmp_path: Path):
    raw = features(clip)
    unit = F.normalize(raw, dim=-1)
    chain, layered = improved_aesthetic(), nsfw()
    state = {f"layers.{name}": value for name, value in chain.state_dict().items()}

    def expect(values: list[float], expected: torch.Tensor) -> None:
        assert values == pytest.approx(expected.tolist(), abs=1e-5)

    expect(head_values(clip, tmp_path, state, ".safetensors"), chain(unit)[:, 0])
    expect(head_values(clip, tmp_path, {"state_dict": state}, ".pth"), chain(unit)[:, 0])
    expect(head_values(clip, tmp_path, state, normalise=False), chain(raw)[:, 0])
    found: dict[str, Any] = {"between": "relu", "output": "softmax", "index": 2}
    expect(head_values(clip, tmp_path, layered.state_dict(), **found), layered(unit).softmax(-1)[:, 2])
    plain = nn.Linear(CLIP_WIDTH, 1).half()
    expected = F.linear(unit, plain.weight.float(), plain.bias.float()).sigmoid()[:, 0]
    expect(head_values(clip, tmp_path, plain.state_dict(), output="sigmoid"), expected)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.place),)

    def __init__(self, place: Path) -> None:
        self.place = place


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")  # which torch says of what is no file of its own
def test_heads_that_are_none_are_refused(clip: Path, tmp_path: Path):
    wide = torch.randn(1, CLIP_WIDTH)
    bad: list[tuple[Any, str]] = [
        ({"weight": torch.randn(1, CLIP_WIDTH + 1)}, "this CLIP gives 16"),
        ({"weight": torch.randn(CLIP_WIDTH)}, "not a linear layer"),
        ({"weight": wide, "bias": torch.randn(2)}, "not a linear layer"),
        ({"0.weight": torch.randn(4, CLIP_WIDTH), "1.weight": torch.randn(1, 5)}, "takes 5 values"),
        ({"weight": wide, "running_mean": torch.randn(1)}, "running_mean"),
        ({}, "nothing"),
        ([wide], "no head"),
        ({1: wide}, "no head"),
        (Bomb(tmp_path / "owned"), "no head"),
    ]
    for state, message in bad:
        with pytest.raises(CheckpointError, match=message):
            head_values(clip, tmp_path, state)
    with pytest.raises(CheckpointError, match="gives 1 values"):
        head_values(clip, tmp_path, {"weight": wide}, index=1)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "owned")))
    for file in ("plain.pth", "missing.pt", "missing.safetensors"):
        with pytest.raises(CheckpointError, match="no head"):
            rows_of(clip_settings(clip, heads=[{"name": "value", "file": str(tmp_path / file)}]), SAMPLES)
    assert not (tmp_path / "owned").exists()


def test_a_value_that_is_no_number_is_a_counted_null(clip: Path, tmp_path: Path):
    torch.save({"weight": torch.full((1, CLIP_WIDTH), torch.nan)}, tmp_path / "head.pt")
    row, *_ = rows_of(clip_settings(clip, heads=[{"name": "value", "file": str(tmp_path / "head.pt")}]), SAMPLES)
    assert row.keys() == {"clip_score", "clip_failure"}
    assert row["clip_failure"] == "not_finite"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": [{"name": "key", "file": "x"}]}, "the index's"),
        ({"heads": [{"name": "captions", "file": "x"}]}, "the index's"),
        ({"heads": [{"name": "a", "file": "x"}, {"name": "a", "file": "y"}]}, "occurs twice"),
        ({"heads": [{"name": "no word", "file": "x"}]}, "cannot be used: write a word"),
        ({"pretrained": "openai"}, "has its own"),
        ({"model": "ViT-B-32"}, "names the weights"),
        ({"batch": 3}, "unknown setting"),
    ],
)
def test_settings_that_make_no_sense_are_refused(clip: Path, changes: dict[str, Any], message: str):
    with pytest.raises(SettingsError, match=message):
        clip_settings(**{"folder": clip} | changes)


def test_a_clip_without_weights_is_refused_not_made_up(clip: Path, tmp_path: Path):
    (tmp_path / "open_clip_config.json").write_bytes((clip / "open_clip_config.json").read_bytes())
    with pytest.raises(CheckpointError, match="open_clip cannot load"):
        ClipScorer(clip_settings(tmp_path))


def test_code_beside_the_weights_is_not_run(clip: Path, tmp_path: Path):
    """A folder may ask for it, in its own settings for its tokenizer."""
    from safetensors.torch import load_file

    from tests.data_prep.small_scorers import ascii_tokenizer

    ascii_tokenizer().save_pretrained(tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    said |= {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.Strange", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    (tmp_path / "strange.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Strange(PreTrainedTokenizerFast): pass\n"
    )
    config = json.loads((clip / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(load_file(clip / "open_clip_model.safetensors"), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="custom code"):
        ClipScorer(clip_settings(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_file_for_a_model_by_name(tmp_path: Path):
    """The file's bytes name the tables; a name that is none is refused when it is loaded."""
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, file)
    settings = parse(ClipSettings, {"model": "ViT-B-32", "pretrained": str(file)})
    assert settings.identity()["pretrained"] == {"sha256": sha256(file.read_bytes()).hexdigest()}
    assert settings.located().pretrained == str(file)
    for pretrained in (str(file), "no-such-tag"):
        with pytest.raises(CheckpointError, match="open_clip cannot load ViT-B-32"):
            ClipScorer(parse(ClipSettings, {"model": "ViT-B-32", "pretrained": pretrained}))


def test_settings_and_weights_name_the_tables_and_paths_do_not(clip: Path, tmp_path: Path):
    head = tmp_path / "head.pt"
    torch.save({"weight": torch.zeros(1, CLIP_WIDTH)}, head)

    def name(folder: Path = clip, **changes: Any) -> str:
        heads = [{"name": "value", "file": str(head)}]
        plain = {"kind": "clip", "model": str(folder), "heads": heads} | changes
        return scorer_digest(parse(ScoreSettings, {"scorer": plain, "workers": 2}))

    first = name()
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in clip.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert name(moved, batch_size=1) == first
    assert name(kinds=["short"]) != first
    torch.save({"weight": torch.ones(1, CLIP_WIDTH)}, head)
    os.utime(head, ns=(1, 1))
    assert name() != first


# ------------------------------------------------------------------------------------------------ the pool

COUNT = 40


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A store with five shards of two sizes, its plan and edition."""
    folder = tmp_path_factory.mktemp("prepared")
    write_corpus(folder / "corpus", COUNT)
    store = folder / "store"
    plan = prepare_here(open_store(str(store)), settings_for(folder / "corpus"))
    return store, plan.digest, plan.edition


@pytest.fixture
def store(prepared: tuple[Path, str, str], tmp_path: Path) -> Store:
    """A copy of the prepared one."""
    copied = open_store(str(tmp_path / "store"))
    for entry in (original := open_store(str(prepared[0]))).list():
        copied.put(entry.key, original.get(entry.key))
    return copied


@pytest.fixture
def plan(prepared: tuple[Path, str, str]) -> str:
    return prepared[1]


@pytest.fixture
def edition(prepared: tuple[Path, str, str]) -> str:
    return prepared[2]


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return []


@pytest.fixture(scope="module")
def url(asked: list[str]) -> Iterator[str]:
    """A captioner that says what it was shown; one picture in four gets an empty answer."""

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        image = body["messages"][0]["content"][0]["image_url"]["url"]
        name = sha256(image.encode()).hexdigest()
        asked.append(name)
        await asyncio.sleep(0.01)
        return said("" if int(name, 16) % 4 == 0 else f"picture {name}")

    with serve(handler) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(
    prepared: tuple[Path, str, str], url: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What one process makes of it without Ray: the bytes that every other way must give."""
    store = open_store(str(tmp_path_factory.mktemp("undisturbed")))
    for entry in (original := open_store(str(prepared[0]))).list():
        store.put(entry.key, original.get(entry.key))
    settings = endpoint(url)
    place = Place(prepared[1], "32", scorer_digest(settings))
    for number in range(COUNT // 8):
        score_module.score_shard(store, score_module.load(settings), place, number)
    return contents(store)


def assert_as_undisturbed(store: Store, undisturbed: dict[str, bytes], summary: ScoreSummary) -> None:
    found = contents(store)
    key = Place(summary.plan, summary.size, summary.scorer).summary_key(list(range(COUNT // 8)))
    assert json.loads(found.pop(key)) == summary.model_dump(mode="json")
    assert sorted(found) == sorted(undisturbed)
    assert found == undisturbed


def accepted(store: Store, plan: str, number: int) -> pa.Table:
    shard = next(record for record in list_shards(store, shard_prefix(plan, "32")) if record.number == number)
    index = read_index(store, shard)
    return index.filter(index["accepted"])


@pytest.mark.usefixtures("ray_cluster")
def test_clip_scores_and_heads_beside_the_prepared_shards(
    store: Store, plan: str, edition: str, clip: Path, tmp_path: Path
):
    save_file({"weight": torch.randn(1, CLIP_WIDTH)}, tmp_path / "head.safetensors")
    heads = [{"name": "aesthetic", "file": str(tmp_path / "head.safetensors")}]
    scorer = {"kind": "clip", "model": str(clip), "heads": heads, "kinds": ["short", "long"], "batch_size": 4}
    settings = parse(ScoreSettings, {"scorer": scorer, "workers": 1})
    before = contents(store)
    seen: list[Progress] = []
    summary = score(store, plan, edition, "32", settings, seen.append)
    total = sum(record.accepted for record in list_shards(store, shard_prefix(plan, "32")))
    assert (summary.shards, summary.rows, summary.failures) == (COUNT // 8, total, {})
    assert summary.columns == ["clip_score", "clip_score_short", "clip_score_long", "aesthetic", "clip_failure"]
    assert summary.settings["model"]["sha256"] and str(clip) not in summary.model_dump_json()
    assert summary.versions[0]["device"] == "cpu"
    assert [progress.shards for progress in seen] == list(range(COUNT // 8 + 1))
    assert seen[-1].rows == total and seen[-1].per_second > 0
    for number in range(summary.shards):
        table = read_scores(store, plan, "32", summary.scorer, number)
        index = accepted(store, plan, number)
        assert table.column_names == ["key", *summary.columns]
        assert table["key"].to_pylist() == index["key"].to_pylist()
        assert table["clip_score"].type == pa.float32() and table["aesthetic"].null_count == 0
    assert {key: value for key, value in contents(store).items() if key in before} == before, "images are not rewritten"


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing was left to do")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_whoever_did_the_work_and_a_second_run_does_nothing(
    store: Store,
    plan: str,
    edition: str,
    url: str,
    undisturbed: dict[str, bytes],
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
):
    settings = endpoint(url, workers=workers)
    summary = score(store, plan, edition, "32", settings)
    assert_as_undisturbed(store, undisturbed, summary)
    tables = [read_scores(store, plan, "32", summary.scorer, number) for number in range(summary.shards)]
    rows = [row for table in tables for row in table.to_pylist()]
    empty = [row for row in rows if row["captioner_failure"]]
    assert summary.failures == {"empty_answer": len(empty)} and 0 < len(empty) < len(rows) == summary.rows
    for row in rows:
        assert (row["captions"] is None) == (row["captioner_failure"] == "empty_answer")
        assert row["captions"] is None or [caption["kind"] for caption in row["captions"]] == ["recaption"]
    monkeypatch.setattr(score_module, "Actors", refuse)
    assert score(store, plan, edition, "32", settings) == summary
    store.delete(Place(plan, "32", summary.scorer).summary_key(list(range(COUNT // 8))))
    assert score(store, plan, edition, "32", settings) == summary


@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_scores_its_edition_and_no_older_one(tmp_path: Path, url: str, asked: list[str]):
    write_corpus(tmp_path / "corpus", 16)
    table = pq.read_table(tmp_path / "corpus" / "table.parquet")
    store = open_store(str(tmp_path / "store"))
    source = settings_for(tmp_path / "corpus").sources[0].model_dump() | {"tables": ["*.parquet"]}
    plans = []
    for first in (0, 8):  # the second replaces the first
        pq.write_table(table.slice(first, 8), tmp_path / "corpus" / "changing.parquet")
        plans.append(prepare_here(store, settings_for(tmp_path / "corpus", sources=[source])))
    old, new = plans
    assert old.digest == new.digest
    assert [[shard.number for shard in plan.shards] for plan in plans] == [[0, 1, 2], [1, 2, 3]]

    def scored(plan: Plan) -> set[int]:
        """Which shards have scores once the stage has run."""
        settings = parse(ScoreStage, {**endpoint(url).model_dump(), "shards": "prepare", "size": 32})
        context = Context(store, tmp_path, NoTracker(), NOWHERE, lambda stage, progress: None)  # type: ignore[arg-type]
        prepared = PrepareSummary(
            plan=plan.digest, edition=plan.edition, inputs=plan.rows, tried_again={}, sizes={}, versions=[]
        )
        summary = score_stage(context, settings, {"shards": record_of(prepared)})
        assert isinstance(summary, ScoreSummary) and summary.shards == 3
        return {read_record(store, entry.key, ScoreRecord).number for entry in store.list("scores/")}

    place = shard_key(new.digest, "32", 3)
    missing = store.get(place)
    store.delete(place)
    with pytest.raises(DataError, match=r"only 2 of 3 shards are there: run prepare again"):
        scored(new)
    store.put(place, missing)
    asked.clear()
    assert scored(new) == {1, 2, 3}
    assert len(asked) == sum(accepted(store, new.digest, number).num_rows for number in (1, 2, 3))
    asked.clear()
    assert scored(old) == {0, 1, 2, 3}
    assert len(asked) == accepted(store, old.digest, 0).num_rows, "shards of both editions are scored once"


def test_nothing_prepared_is_an_error(store: Store, plan: str, edition: str, url: str):
    with pytest.raises(DataError, match="no shards of size 48"):
        score(store, plan, edition, "48", endpoint(url))


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_no_node_holds_is_an_error_and_no_endless_wait(store: Store, plan: str, edition: str, url: str):
    with pytest.raises(ClusterError, match="no worker of 1 CPUs and 64 GPUs"):
        score(store, plan, edition, "32", endpoint(url, gpus=64))
    with pytest.raises(ClusterError, match="no worker of 4096 CPUs"):
        score(store, plan, edition, "32", endpoint(url, cpus=4096))


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_in_a_worker_reaches_the_caller_as_it_was(store: Store, plan: str, edition: str, tmp_path: Path):
    async def broken(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(status=401)

    with serve(broken) as url, pytest.raises(SettingsError) as error:
        score(store, plan, edition, "32", endpoint(url))
    assert error.value.remedy == "check the endpoint's `url`, `model` and `api_key`"
    assert not list(store.list("scores/"))


DRIVER = """
import os, signal, sys
from data_prep.scores.job import score
from infra.cluster import ClusterSettings, connect
from infra.store import open_store
from tests.data_prep.small_scorers import endpoint

def die(progress):
    if progress.shards == 2:
        os.kill(os.getpid(), signal.SIGKILL)

connect(ClusterSettings(cpus=1))
score(open_store(sys.argv[1]), sys.argv[2], sys.argv[3], "32", endpoint(sys.argv[4]), die)
"""


@pytest.mark.usefixtures("ray_cluster")
def test_a_driver_killed_half_way_is_finished_by_the_next_and_nothing_is_asked_twice(
    store: Store, plan: str, edition: str, url: str, undisturbed: dict[str, bytes], asked: list[str]
):
    # A cluster of its own, as on a laptop: it dies with its driver, and the tests' own one stays out of it.
    driver = subprocess.run([sys.executable, "-c", DRIVER, store.url, plan, edition, url], timeout=120)
    assert driver.returncode == -signal.SIGKILL
    settings = endpoint(url)
    prefix = Place(plan, "32", scorer_digest(settings)).prefix
    done = [read_record(store, entry.key, ScoreRecord) for entry in store.list(prefix)]
    assert 2 <= len(done) < COUNT // 8
    assert not list(store.list("scored/"))
    asked.clear()
    summary = score(store, plan, edition, "32", settings)
    assert len(asked) == summary.rows - sum(record.rows for record in done)
    assert_as_undisturbed(store, undisturbed, summary)


def stop(progress: Progress) -> None:
    if progress.shards == 1:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("ray_cluster")
def test_sigterm_stops_between_shards_and_the_next_run_goes_on(
    store: Store, plan: str, edition: str, url: str, undisturbed: dict[str, bytes]
):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PixnerdError, match=r"stopped by SIGTERM.*run the same command again"):
        score(store, plan, edition, "32", endpoint(url), stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert 1 <= len(list(store.list("scores/"))) < COUNT // 8
    assert_as_undisturbed(store, undisturbed, score(store, plan, edition, "32", endpoint(url)))


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_once_costs_nothing(
    store: Store, plan: str, edition: str, url: str, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(score_module, "_Worker", DiesOnce)
    summary = score(store, plan, edition, "32", endpoint(url, workers=2))
    assert isinstance(store, FileStore) and (store.root / ".tmp" / "marker").exists()
    assert_as_undisturbed(store, undisturbed, summary)


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_that_kills_every_worker_is_an_error(
    store: Store, plan: str, edition: str, url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(score_module, "_Worker", DiesAlways)
    with pytest.raises(ClusterError, match="shard 2 kills its worker, and did so before"):
        score(store, plan, edition, "32", endpoint(url))
    place = Place(plan, "32", scorer_digest(endpoint(url)))
    assert not store.exists(place.key(2)), "the record is written last"
    assert len(list(store.list(f"data/scores/{place.scorer}/00002-"))) == 1


def test_weights_that_differ_between_machines_are_noticed(store: Store, plan: str, url: str):
    worker = score_module._Worker(store, endpoint(url), Place(plan, "32", "another"))
    with pytest.raises(DataError, match="differ between machines"):
        worker.do(0)


def test_a_shard_without_samples_has_an_empty_table(store: Store, plan: str, url: str):
    """Every input of it was rejected, so there is no tar."""
    [key] = [entry.key for entry in store.list(shard_prefix(plan, "32")) if entry.key.endswith("00000.json")]
    record = read_record(store, key, ShardRecord)
    assert record.tar is not None
    store.put(key, record.model_copy(update={"tar": None, "accepted": 0}).model_dump_json().encode())
    settings = endpoint(url)
    place = Place(plan, "32", scorer_digest(settings))
    assert score_module.score_shard(store, score_module.load(settings), place, 0).rows == 0
    table = read_scores(store, plan, "32", place.scorer, 0)
    assert table.num_rows == 0 and table.column_names == ["key", "captions", "captioner_failure"]


def test_a_damaged_tar_is_an_error_and_no_score(store: Store, plan: str, url: str):
    [record, *_] = list_shards(store, shard_prefix(plan, "32"))
    assert record.tar is not None
    data = bytearray(store.get(record.tar.key))
    data[600] ^= 1
    store.put(record.tar.key, bytes(data))
    settings = endpoint(url)
    place = Place(plan, "32", scorer_digest(settings))
    with pytest.raises(DataError, match="is damaged"):
        score_module.score_shard(store, score_module.load(settings), place, 0)
    assert not list(store.list("scores/"))


def test_more_shards_are_another_summary(plan: str):
    place = Place(plan, "32", "scorer")
    assert place.summary_key([0, 1]) != place.summary_key([0, 1, 2])
    assert digest([0, 1]) in place.summary_key([0, 1])
