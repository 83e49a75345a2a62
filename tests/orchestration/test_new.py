"""`pixnerd new` as its user meets it: a recipe for every kind of corpus, which runs as it is, and what to do next."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from data_prep.web.fetch import FetchSettings
from infra.errors import PixnerdError, SettingsError
from orchestration import cli, launch, parsing
from pipelines import recipes
from pipelines.recipes import own
from tests.data_prep.test_survey import PHOTO, WORDS, numbered, tar_of, write_hugging_face, write_urls


def write_folder(folder: Path) -> None:
    for name, words in zip(numbered(folder), WORDS, strict=True):
        (folder / name).with_suffix(".txt").write_text(words)


def write_table(folder: Path) -> None:
    numbered(folder, "pictures/{}.jpg")
    lines = [f"pictures/{number}.jpg,{words}" for number, words in enumerate(WORDS)]
    (folder / "t.csv").write_text("\n".join(["file,caption", *lines]))


def write_list(folder: Path) -> None:
    write_urls(folder, "csv", host="127.0.0.1:1")


def write_parquet(folder: Path) -> None:
    names: list[str | None] = [f"{number}.jpg" for number in range(6)]
    write_hugging_face(folder / "data" / "train.parquet", names, [PHOTO] * 6)


def write_tars(folder: Path) -> None:
    members = {f"{number}.jpg": PHOTO for number in range(6)}
    members |= {f"{number}.txt": words.encode() for number, words in enumerate(WORDS)}
    (folder / "a.tar").write_bytes(tar_of(dict(sorted(members.items()))))


CORPORA = {
    "text_folder": write_folder,
    "table_folder": write_table,
    "url_list": write_list,
    "parquet_images": write_parquet,
    "webdataset": write_tars,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus to come, seen from the folder above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def new(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["new", *arguments])
    if isinstance(result.exception, PixnerdError):
        raise result.exception
    assert result.exit_code == 0, result.exception
    return result


@pytest.mark.parametrize("kind", CORPORA)
def test_the_recipe_of_every_kind_is_one_that_can_be_run(
    folder: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CORPORA[kind](folder)
    result = new("photos", "--out", "mine.yaml")
    assert result.stdout.splitlines()[0].startswith(f"found    {kind}: ")
    assert result.stdout.splitlines()[-1] == "next:    pixnerd run mine.yaml"
    recipe = recipes.load("mine.yaml")
    assert recipe.name == "photos"
    stages = {name: parsing.parse_stage(name, stage)[0].name for name, stage in recipe.stages.items()}
    assert list(stages.values()) == ["prepare", "snapshot", "encoders", "train", "sample", "report"]
    launch.run("mine.yaml", store="store", assignments=[], address=None, dry_run=True, as_json=False)
    assert capsys.readouterr().out.count(" new ") == len(stages)


def test_the_recipe_is_explained_and_the_same_each_time(folder: Path) -> None:
    write_folder(folder)
    new("photos", "--out", "mine.yaml")
    text = Path("mine.yaml").read_text()
    blocks = re.split(r"\n\n", text)
    assert all(block.lstrip().startswith(("#", "stages:")) for block in blocks), "each stage is told what it is for"
    assert "#     pixnerd run mine.yaml " in text
    assert max(map(len, text.splitlines())) <= 120
    Path("mine.yaml").unlink()
    new("photos", "--out", "mine.yaml")
    assert Path("mine.yaml").read_text() == text


def test_the_recipe_fits_small_pictures_and_long_captions(folder: Path) -> None:
    write_folder(folder)
    (folder / "0.txt").write_text("word " * 400)
    new("photos")
    stages = yaml.safe_load(Path("photos.yaml").read_text())["stages"]
    assert stages["prepare"]["sizes"] == [32], "the pictures have sides of 40"
    assert stages["data"]["held_out"] == 0.2, "of six pictures"
    network = parsing.parse_stage("train", stages["train"])[1].network()  # type: ignore[attr-defined]
    assert (network.patch_size, network.text_tokens) == (8, 16), "one caption alone is long"


def test_an_internal_servers_list_may_be_downloaded(folder: Path) -> None:
    write_list(folder)
    result = new("photos/t.csv", "--out", "mine.yaml", "--name", "ours")
    assert "127.0.0.1 lies inside of a network: the recipe sets fetch.allow_private" in result.stderr
    stage = recipes.load("mine.yaml").stages["prepare"]
    assert parsing.parse_stage("prepare", stage)[1].fetch.allow_private  # type: ignore[attr-defined]
    assert recipes.load("mine.yaml").name == "ours"


def test_a_list_inside_of_a_network_names_its_servers_alone(folder: Path) -> None:
    write_urls(folder, "csv", host="10.1.2.3")
    result = new("photos", "--out", "mine.yaml")
    assert "10.1.2.3 lies inside of a network: the recipe sets fetch.allow_networks" in result.stderr
    stage = recipes.load("mine.yaml").stages["prepare"]
    fetch = parsing.parse_stage("prepare", stage)[1].fetch  # type: ignore[attr-defined]
    assert (fetch.allow_private, fetch.allow_networks) == (False, ["10.1.2.3/32"])


def test_a_public_list_is_not_let_in(folder: Path) -> None:
    write_urls(folder, "csv", host="93.184.215.14")
    new("photos", "--out", "mine.yaml")
    stage = recipes.load("mine.yaml").stages["prepare"]
    assert parsing.parse_stage("prepare", stage)[1].fetch == FetchSettings()  # type: ignore[attr-defined]
    assert "# fetch: {contact: " in Path("mine.yaml").read_text()


def test_json_tells_what_was_found(folder: Path) -> None:
    write_parquet(folder)
    told = json.loads(new("photos", "--json").stdout)
    assert told["recipe"] == "photos.yaml"
    assert told["next"] == "pixnerd run photos.yaml"
    assert told["sources"][0]["captions"] == ["text"]
    assert (told["pictures"], told["counted"], told["shorter_side"]) == (6, True, 40)


def test_a_recipe_is_not_written_over(folder: Path) -> None:
    write_folder(folder)
    Path("mine.yaml").write_text("name: other")
    with pytest.raises(SettingsError, match=r"mine\.yaml is there already: name another --out, or remove it"):
        new("photos", "--out", "mine.yaml")
    with pytest.raises(SettingsError, match=r"nowhere/mine\.yaml cannot be written"):
        new("photos", "--out", "nowhere/mine.yaml")
    assert Path("mine.yaml").read_text() == "name: other"


def test_strangers_names_are_values_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / 'a: "b" # c\nstages: {}'
    odd.mkdir()
    column = "text: {x}\n  evil: 1 #"
    rows = [{"link": f"http://127.0.0.1/{n}", column: words, f"{column}2": words} for n, words in enumerate(WORDS)]
    (odd / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    new(str(odd), "--out", "mine.yaml", "--captions", column)
    recipe = recipes.load("mine.yaml")
    assert recipe.stages["prepare"]["sources"][0]["captions"] == [column]
    assert recipe.stages["prepare"]["sources"][0]["url"] == str(odd)
    assert list(recipe.stages) == ["prepare", "data", "encoders", "train", "samples", "report"]


@pytest.mark.parametrize("pictures", [1, 300, 45_000_000])
def test_what_is_held_out_suffices_to_draw_and_no_more(pictures: int) -> None:
    from data_prep.survey import Survey

    chosen = own.fit(Survey([], [], pictures, True, 512, 9.0, 12, [], None, []))
    assert 0.01 <= chosen.held_out <= 0.2
    assert chosen.side % chosen.patch == 0
