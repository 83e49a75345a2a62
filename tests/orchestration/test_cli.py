"""The command as a stranger meets it: help at once, one clear line for a mistake, the right exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.prepare.plan import PrepareSettings, make_plan
from infra.config import parse
from infra.records import PrepareSummary, SizeSummary
from infra.store import open_store
from orchestration import terminal
from tests.data_prep import zoo
from tests.data_prep.corpora import contents, prepare_here, shaded
from tests.data_prep.test_sources_sa1b import write_tar
from tests.data_prep.web import Request, Stream, Web
from training import model as models
from training.encoders import text

COMMANDS = [
    ["new"], ["plan"], ["run"], ["prepare"], ["train"], ["stage"], ["sample"], ["report"], ["doctor"],
    ["compare"], ["sweep"], ["status"], ["explain"], ["logs"], ["evaluate", "geneval"], ["evaluate", "dpg"],
    ["evaluate", "fid"],
    ["checkpoint", "show"], ["checkpoint", "import"], ["checkpoint", "export"], ["checkpoint", "fetch"],
    ["data", "show"], ["data", "verify"], ["data", "forget"], ["data", "gc"],
]  # fmt: skip


def pixnerd(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def fails(code: int, *arguments: str | Path, **environment: str) -> str:
    """It fails with this code and says why in one line, which is returned; it may tell of waits as well."""
    result = pixnerd(*arguments, **environment)
    assert result.returncode == code, result.stderr
    waits = re.compile(r"^ +\d+:\d\d +still |; waiting until it comes back")
    lines = [line for line in result.stderr.splitlines() if line.strip() and not waits.search(line)]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_help_answers_within_a_second():
    def took() -> float:
        began = time.perf_counter()
        assert pixnerd("--help").returncode == 0
        return time.perf_counter() - began

    assert min(took() for _ in range(5)) < 1.0


@pytest.mark.parametrize("group", [[], ["data"]], ids=str)
def test_whoever_asks_for_nothing_is_shown_what_there_is(group: list[str]):
    result = pixnerd(*group)
    assert result.returncode == 2
    assert result.stderr.lstrip().startswith(f"Usage: {' '.join(['pixnerd', *group])} [OPTIONS] COMMAND")
    assert "error" not in result.stderr and "(see" not in result.stderr


def test_the_versions_are_told_without_loading_anything():
    result = pixnerd("--version")
    assert result.returncode == 0, result.stderr
    own, others = result.stdout.splitlines()
    assert re.fullmatch(r"pixnerd \d+\.\d+\.\d+\S*", own)
    assert re.fullmatch(r"Python 3\.\d+\.\d+, torch \S+, ray \S+, deepspeed \S+, transformers \S+, mlflow \S+", others)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_shows_an_example(command: list[str]):
    result = pixnerd(*command, "--help")
    assert result.returncode == 0
    assert f"Example: pixnerd {' '.join(command)}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "demo", "--set", "sft.stepz=3"], "unknown setting `sft.stepz`: did you mean `steps`?"),
        (["run", "demo", "--set", "stf.steps=3"], "did you mean `sft`?"),
        (["run", "demo", "--set", "sft.steps=many"], "`sft.steps`"),
        (["run", "demp"], "there is no recipe `demp`: did you mean `demo`?"),
        (["run", "nowhere/mine.yaml"], "there is no file nowhere/mine.yaml"),
        (["run", "demo", "--store", "ftp://host/x"], "ftp"),
        (["runn"], "Did you mean 'run'?"),
        (["run", "demo", "--sett", "a=b"], "--sett"),
        (["checkpoint", "import", "x", "y", "--network", "best"], "'best' is not one of"),
        (["sample", "x", "p", "--out", "o", "--seeds", "a-b"], "names no seeds"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(arguments: list[str], says: str):
    assert says in fails(2, *arguments)


def test_a_mistake_in_a_recipe_is_told_before_anything_heavy_is_loaded(tmp_path: Path):
    (tmp_path / "x.yaml").write_text("name: x\nname: y\n")
    code = (
        "import sys; from orchestration.cli import main\n"
        f"sys.argv = ['pixnerd', 'run', {str(tmp_path / 'x.yaml')!r}]\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert "`name` is set for the second time" in result.stderr


def test_a_store_that_does_not_answer_is_one_line_and_code_1():
    keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2"}
    line = fails(1, "run", "demo", "--store", "s3://bucket/x", AWS_ENDPOINT_URL="http://127.0.0.1:9", **keys)
    assert "127.0.0.1:9" in line
    assert "hunter2" not in line


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that the command takes for a checkpoint: an untrained network with an encoder of its own."""
    folder = tmp_path / "checkpoint"
    config = models.preset("tiny").model_copy(
        update={"image_size": 16, "hidden": 32, "heads": 2, "blocks": 1, "text_dim": 32, "field_channels": 8}
    )
    models.save(folder, models.PixNerd(config), {"text_encoder": "text"})
    text.build_tiny(folder / "text", ["a red circle"] * 9, hidden=32, layers=1, heads=2, vocab=300)
    return folder


def test_a_checkpoint_is_shown(checkpoint: Path):
    result = pixnerd("checkpoint", "show", checkpoint, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["settings"]["hidden"] == 32
    assert sum(facts["parameters"].values()) == sum(p.numel() for p in models.load(checkpoint).parameters())


def test_a_checkpoint_of_another_shape_is_refused(checkpoint: Path):
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"hidden": 32', '"hidden": 64'))
    models.write_sums(checkpoint)
    assert "instead of" in fails(1, "checkpoint", "show", checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    assert "config.json" in fails(1, "checkpoint", "show", tmp_path)
    assert "config.json" in fails(1, "sample", tmp_path, "a circle", "--out", tmp_path / "out")


def test_a_stage_whose_inputs_are_missing_is_told_with_a_code_of_its_own(tmp_path: Path):
    line = fails(75, "stage", "demo", "low_data", "--store", tmp_path / "store")
    assert line == "error: `low_data` needs prepare: try again when that is done"
    assert "no run is recorded" in pixnerd("status", "--store", tmp_path / "store").stdout


def test_debug_shows_the_traceback(tmp_path: Path):
    result = pixnerd("checkpoint", "show", tmp_path, "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path):
    result = pixnerd("run", "demo", "--store", tmp_path / "store", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    stages = json.loads(result.stdout)
    assert {stage["state"] for stage in stages} == {"new"}
    assert "report" in {stage["stage"] for stage in stages}
    assert not list(open_store(str(tmp_path / "store")).list())


# Preparing


def write_recipe(folder: Path, **settings: Any) -> Path:
    """A recipe of one prepare stage, of one source."""
    path = folder / "mine.yaml"
    stage = {"kind": "prepare", "sizes": [16], **settings}
    path.write_text(yaml.safe_dump({"name": "mine", "stages": {"data": stage}}))
    return path


def ends(result: subprocess.CompletedProcess[str]) -> str:
    """What the last line says of the stage, without the times."""
    assert result.returncode == 0, result.stderr
    return re.sub(r"\d+:\d\d|[\d.]+ s\b|[\d-]+T[^ ,]+", "?", result.stderr.splitlines()[-1])


@pytest.mark.slow
def test_downloads_that_failed_are_tried_again_when_asked_for(tmp_path: Path, ray_cluster: str):
    photo = zoo.saved(shaded(1, 40), "PNG")

    async def down(request: Request, stream: Stream) -> None:
        await stream.answer(status=503)

    with Web({"/0": photo, "/1": down, "/2": down, "/3": photo}) as web:
        (tmp_path / "list.jsonl").write_text(
            "\n".join(json.dumps({"url": web.url(f"/{number}"), "caption": f"picture {number}"}) for number in range(5))
        )
        source = {"kind": "url_list", "name": "web", "url": str(tmp_path), "tables": ["*.jsonl"]}
        recipe = write_recipe(tmp_path, sources=[source], fetch={"allow_private": True, "retries": 0})

        def go(*arguments: str) -> subprocess.CompletedProcess[str]:
            return pixnerd(*arguments, recipe, "--store", tmp_path / "store", "--on", ray_cluster)

        counts = "2 accepted, 3 rejected (2 server_error, 1 gone)"
        assert re.fullmatch(rf"  \? \+ data +finished \?, \d images/s; {re.escape(counts)}", ends(go("prepare")))
        web.pages |= {"/1": photo, "/2": photo}
        assert ends(go("prepare")) == f"  ? = data         reused   done ?, took ?, {counts}"
        asked = len(web.requests)
        again = go("run", "--retry-failed")
        assert "data: 2 downloads are tried again" in again.stderr.splitlines()
        assert ends(again).endswith("4 accepted, 1 rejected (1 gone)")
        assert sorted(request.target for request in web.requests[asked:]) == ["/1", "/2"]
        once_more = go("prepare", "--retry-failed")
        assert "data: 0 downloads are tried again" in once_more.stderr.splitlines()
        assert ends(once_more) == "  ? = data         reused   done ?, took ?, 4 accepted, 1 rejected (1 gone)"
        assert len(web.requests) == asked + 2


def test_a_retry_that_cannot_be_is_refused_before_any_is_begun(tmp_path: Path):
    mine = {"kind": "url_list", "tables": ["*.jsonl"]}
    data = {"kind": "prepare", "sources": [mine | {"name": "web", "url": "stage:corpus"}], "sizes": [16]}
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"name": "mine", "stages": {"corpus": {"kind": "corpus"}, "data": data}}))
    given = ("prepare", recipe, "--store", tmp_path / "store", "--retry-failed")
    assert "`data.web` cannot be tried again: another stage makes its list: give the folder" in fails(2, *given)
    assert "leave --dry-run out" in fails(2, *given, "--dry-run")


def test_a_retry_of_a_run_that_is_refused_is_not_begun(tmp_path: Path):
    async def down(_: Request, stream: Stream) -> None:
        await stream.answer(status=503)

    (tmp_path / "list").mkdir()
    with Web({"/0": zoo.saved(shaded(1, 40), "PNG"), "/1": down}) as web:
        rows = [{"url": web.url(f"/{number}"), "caption": "a picture"} for number in range(2)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list" / "list.parquet")
        source = {"kind": "url_list", "name": "web", "url": str(tmp_path / "list"), "tables": ["*.parquet"]}
        data = {"sources": [source], "sizes": [16], "fetch": {"allow_private": True, "retries": 0}}
        store = open_store(str(tmp_path / "store"))
        prepare_here(store, parse(PrepareSettings, data))
    stages = {
        "data": {"kind": "prepare", **data},
        "pictures": {"kind": "snapshot", "shards": "data", "size": 16},
        "encoders": {"kind": "encoders", "captions": "pictures"},
        "train": {
            "kind": "train",
            "data": "pictures",
            "encoders": "encoders",
            "preset": "tiny",
            "model": {"image_size": 32},
            "steps": 1,
            "batch": 1,
        },
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "stages": stages}))
    before = contents(store)
    given = ("run", tmp_path / "mine.yaml", "--store", tmp_path / "store", "--retry-failed")
    assert "`train.model.image_size` is 32, but the images of `pictures` are of size 16" in fails(2, *given)
    assert contents(store) == before


@pytest.mark.slow
def test_warnings_are_shown(tmp_path: Path, ray_cluster: str):
    for name, ids in (("one", (1, 2)), ("two", (3, 4))):
        write_tar(tmp_path, f"{name}.tar", *ids)
    source = {"kind": "sa1b", "name": "sa", "url": str(tmp_path), "tables": ["*.parquet"]}
    pq.write_table(pa.table({"image_id": [1, 2], "caption": ["a", "b"]}), tmp_path / "one.parquet")
    make_plan(open_store(str(tmp_path / "store")), parse(PrepareSettings, {"sources": [source], "sizes": [16]}))
    pq.write_table(pa.table({"image_id": [3, 4], "caption": ["c", "d"]}), tmp_path / "two.parquet")
    recipe = write_recipe(tmp_path, sources=[source])
    result = pixnerd("prepare", recipe, "--store", tmp_path / "store", "--on", ray_cluster)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "no image was accepted: 4 rejected (2 no_caption, 2 unknown_format): let the source's `captions`" in last
    told = [line for line in result.stderr.splitlines() if "new tables of captions" in line]
    assert len(told) == 1, result.stderr
    assert "captions of the source `sa` (1) are not for its tars that are planned already (2)" in told[0]


def test_lines_without_a_terminal_tell_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = 1000.0
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: now))
    screen = terminal.Screen()
    for seconds, said, done, total in [
        (60, "shards, as found", 20, 100),
        (100, "shards", 21, 100),
        (300, "shards", 60, 100),
        (0, "too soon for a line", 70, 100),
        (20, "shards, nearly", 99.5, 100),
        (40, "shards, all", 100, 100),
        (11, "another part", 0, 30),
        (11, "another part", 10, 30),
        (11, "of nobody knows how many", 3, 0),
    ]:
        now += seconds
        screen.count(said, done, total)
    assert capsys.readouterr().err.splitlines() == [
        "  1:00   shards, as found",
        "  2:40   shards, 2:11:40 left",
        "  7:40   shards, 6:40 left",
        "  8:00   shards, nearly, 0:03 left",
        "  8:40   shards, all",
        "  8:51   another part",
        "  9:02   another part, 0:22 left",
        "  9:13   of nobody knows how many",
    ]


def test_the_end_of_a_preparation_names_the_worst_causes():
    sizes = {
        "256": {"accepted": 12_000, "rejected": {"gone": 5_000, "timeout": 20, "truncated": 1, "too_small": 2_979}},
        "512": {"accepted": 9_000, "rejected": {"gone": 5_000, "too_small": 6_000}},
        "64": {"accepted": 20_000, "rejected": {}},
    }
    facts = {"plan": "p", "edition": "e", "inputs": 20_000, "tried_again": {}, "versions": []}
    made = {size: SizeSummary(shards="", count=1, **counts) for size, counts in sizes.items()}
    assert terminal.prepared(PrepareSummary(sizes=made, **facts), 1000.4) == (
        "1,000 images/s; 256: 12,000 accepted, 8,000 rejected (5,000 gone, 2,979 too_small, 20 timeout, 1 other); "
        "512: 9,000 accepted, 11,000 rejected (6,000 too_small, 5,000 gone); 64: 20,000 accepted, 0 rejected"
    )


def test_doctor_finds_this_machine_fit():
    result = pixnerd("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert findings["torch"]["ok"]
    assert result.returncode == 0, [f for f in findings.values() if not f["ok"]]
