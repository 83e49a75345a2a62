"""`pixnerd sample` as its user meets it: files, a sheet, an index, a second call, and one clear line for a mistake."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from infra.errors import SettingsError
from orchestration import cli, terminal
from pipelines.pictures import sheet
from pipelines.pictures.text import font, wrap
from pipelines.sample.draw import parse_size
from pipelines.sample.files import facts_of
from pipelines.sample.prompts import Labels, parse_seeds
from tests.training import small_checkpoint
from training import model as models
from training.sampling import _DEFAULTS, Artist

FEW = ("--steps", "3")
RED, BLUE = "a red circle", "two blue squares"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint.write_text(tmp_path_factory.mktemp("text") / "champion")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {"labels": small_checkpoint.NAMES}
    return small_checkpoint.write_class(tmp_path_factory.mktemp("class") / "imagenet", extra=names)


class Result(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Result]


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """The command in this process, whose imports take longer than what is tested."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["pixnerd", "sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return call


def command(*arguments: str | Path, errors: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestration.cli", "sample", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    )


def on_a_terminal(*arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """What the terminal showed is returned as well; a slow machine shows more than one holds unread."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def listen() -> None:
        with contextlib.suppress(OSError):  # nobody holds the other end any more
            while data := os.read(ours, 1 << 16):
                shown.extend(data)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        result = command(*arguments, errors=theirs)
    finally:
        os.close(theirs)
        listener.join()
        os.close(ours)
    return result, shown.decode()


def read(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------ what comes out


def test_the_same_call_gives_the_same_bytes(text: Path, sample: Call, tmp_path: Path):
    asked = (RED, BLUE, "--seeds", "0,3", *FEW, "--batch", "2")
    first, shown = on_a_terminal(text, *asked, "--out", tmp_path / "one")
    assert first.returncode == 0, shown
    assert first.stdout.startswith(f"4 pictures of 16x16 (height x width) in {tmp_path / 'one'}, 4 drawn on ")
    assert "drawing 3-4 of 4, step 3 of 3" in shown and "4/4" in shown, "progress is a bar"
    assert sample(text, *asked, "--out", "two").code == 0
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert sorted(one) == ["000-0.png", "000-3.png", "001-0.png", "001-3.png", "index.json", "sheet.png"]
    assert one == two
    assert len({read(tmp_path / "one" / name).tobytes() for name in one if name[0] == "0"}) == 4


def test_the_batch_is_no_matter(text: Path, sample: Call, tmp_path: Path):
    for batch in ("1", "4"):
        assert sample(text, RED, BLUE, "--seeds", "0-2", *FEW, "--out", batch, "--batch", batch).code == 0
    for name in (f"00{row}-{seed}.png" for row in (0, 1) for seed in range(3)):
        one, four = tmp_path / "1" / name, tmp_path / "4" / name
        assert np.abs(read(one).astype(int) - read(four)).max() <= 1
        assert facts_of(one) == facts_of(four)


def test_a_picture_says_how_it_was_made(text: Path, sample: Call, tmp_path: Path):
    prompt = "Größe 'x' — 円\n\"y\""
    assert (
        sample(text, prompt, "--out", "o", "--seeds", "7", *FEW, "--guidance", "2.5", "--interval", "0.2,0.9").code == 0
    )
    with Image.open(tmp_path / "o" / "000-7.png") as image:
        image.load()
        assert isinstance(image, PngImageFile)
        words = image.text
    facts = json.loads(words["pixnerd"])
    assert words["Description"] == facts["prompt"] == prompt
    assert words["Software"] == f"pixnerd {facts['pixnerd']}"
    assert facts["seed"] == 7
    assert facts["settings"] == {
        "steps": 3, "solver": "adams2", "guidance": 2.5, "interval": [0.2, 0.9], "shift": 3.0, "size": [16, 16],
        "precision": "fp32",
    }  # fmt: skip
    weights = hashlib.sha256((text / "model.safetensors").read_bytes()).hexdigest()
    assert (facts["checkpoint"]["name"], facts["checkpoint"]["weights"]) == ("champion", weights)


def test_the_index_lists_every_picture(text: Path, sample: Call, tmp_path: Path):
    result = sample(text, RED, BLUE, "--out", "o", "--seeds", "0-1", *FEW, "--size", "24x40", "--json")
    assert result.code == 0 and result.err == ""
    index = json.loads((tmp_path / "o" / "index.json").read_text())
    assert json.loads(result.out) == {"folder": "o", **index}
    assert [(entry["prompt"], entry["seed"]) for entry in index["pictures"]] == [
        (RED, 0),
        (RED, 1),
        (BLUE, 0),
        (BLUE, 1),
    ]
    for entry in index["pictures"]:
        picture = read(tmp_path / "o" / entry["file"])
        assert picture.shape == (24, 40, 3) == (entry["height"], entry["width"], 3)
        assert entry["pixels_sha256"] == hashlib.sha256(picture.tobytes()).hexdigest()
        assert entry["settings"]["size"] == [24, 40]
    assert index["sheets"] == ["sheet.png"]


def test_steps_are_only_written_when_asked_for(text: Path, sample: Call, tmp_path: Path):
    asked = (text, RED, "--seeds", "0-1", *FEW, "--out", "o")
    assert sample(*asked).code == 0
    before = contents(tmp_path / "o")
    assert not [name for name in before if "step" in name]
    assert "2 drawn" in sample(*asked, "--save-steps", "--batch", "1").out, (
        "pictures without their steps are not enough"
    )
    for seed in (0, 1):
        frames = sorted((tmp_path / "o" / f"000-{seed}").iterdir())
        assert [frame.name for frame in frames] == ["step-1.png", "step-2.png", "step-3.png"]
        assert np.array_equal(read(frames[-1]), read(tmp_path / "o" / f"000-{seed}.png"))
        assert not np.array_equal(read(frames[0]), read(frames[-1]))
        assert (facts_of(frames[1]) or {})["step"] == 2
    index = json.loads((tmp_path / "o" / "index.json").read_text())
    assert [entry["steps"] for entry in index["pictures"]] == ["000-0", "000-1"]
    assert "there already" in sample(*asked, "--save-steps").out


def test_progress_is_plain_lines_elsewhere(text: Path, sample: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(terminal, "SILENCE", -1.0)
    lines = sample(text, RED, "--out", "o", "--seeds", "0-2", *FEW, "--batch", "2").err.splitlines()
    assert [line.partition("drawing ")[2].partition(", 0:")[0] for line in lines[1:]] == [
        f"{which} of 3, step {step} of 3" for which in ("1-2", "3") for step in (1, 2, 3)
    ]


# ------------------------------------------------------------------------------------------------ classes


def test_a_name_draws_what_its_number_does(classes: Path, sample: Call, tmp_path: Path):
    first = command(classes, "1", "0", "--out", tmp_path / "number", *FEW)
    assert first.returncode == 0, first.stderr
    assert sample(classes, "Goldfish", "tench", "1", "--out", "name", *FEW).code == 0
    number, name = contents(tmp_path / "number"), contents(tmp_path / "name")
    assert number == name
    facts = facts_of(tmp_path / "name" / "000-0.png") or {}
    assert (facts["label"], facts["prompt"]) == (1, "goldfish")
    assert not np.array_equal(read(tmp_path / "name" / "000-0.png"), read(tmp_path / "name" / "001-0.png"))


def test_no_class_is_the_last_label(classes: Path, sample: Call, tmp_path: Path):
    assert sample(classes, "", "--out", "o", *FEW).code == 0
    assert (facts_of(tmp_path / "o" / "000-0.png") or {})["label"] == 5


def test_names_may_come_from_a_file(classes: Path, sample: Call, tmp_path: Path):
    (tmp_path / "names.txt").write_text("\n".join("abcde") + "\n")
    assert sample(classes, "d", "--labels", "names.txt", "--out", "o", *FEW).code == 0
    assert (facts_of(tmp_path / "o" / "000-0.png") or {})["label"] == 3


def test_labels_are_found_by_whole_names_first():
    labels = Labels(5, small_checkpoint.NAMES)
    assert labels.find("crane") == ("crane", 2)
    assert labels.find("MACHINE") == ("crane, machine", 4)
    assert labels.find(" Tinca tinca ") == ("tench, Tinca tinca", 0)
    assert labels.find("03") == ("hen", 3)
    with pytest.raises(SettingsError, match="2 classes are called 'x': give the number: 0 or 2"):
        Labels(3, ["x, a", "y", "x, b"]).find("x")


# ------------------------------------------------------------------------------------------------ a second call


def test_only_what_is_missing_is_drawn(text: Path, sample: Call, tmp_path: Path):
    asked = (text, RED, BLUE, *FEW, "--out", "o", "--batch", "1")
    assert sample(*asked, "--seeds", "0-1").code == 0
    before = contents(tmp_path / "o")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "o").glob("0*.png")}
    (tmp_path / "o" / "001-0.png").unlink()
    assert "4 pictures" in (again := sample(*asked, "--seeds", "0-1").out) and "1 drawn" in again
    assert contents(tmp_path / "o") == before
    kept = {path.name for path in (tmp_path / "o").glob("0*.png") if path.stat().st_mtime_ns == times[path.name]}
    assert kept == {"000-0.png", "000-1.png", "001-1.png"}
    assert "6 pictures" in (more := sample(*asked, "--seeds", "0-2").out) and "2 drawn" in more
    assert len(json.loads((tmp_path / "o" / "index.json").read_text())["pictures"]) == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--guidance", "2"], "000-0.png has settings.guidance 4.0, not 2.0"),
        (["--seeds", "1"], "it holds 000-0.png"),
        (["--precision", "bf16"], 'settings.precision "fp32", not "bf16"'),
    ],
)
def test_another_calls_pictures_are_left_alone(text: Path, sample: Call, tmp_path: Path, change: list[str], says: str):
    assert sample(text, RED, *FEW, "--out", "o", "--save-steps").code == 0
    before = contents(tmp_path / "o")
    result = sample(text, RED, *FEW, "--out", "o", *change)
    assert result.code == 2 and says in result.err
    assert contents(tmp_path / "o") == before


def test_what_a_killed_call_left_is_gone_on_from_by_the_same_call_only(text: Path, sample: Call, tmp_path: Path):
    asked = (text, RED, "--save-steps", "--out", "o")
    assert sample(*asked, *FEW).code == 0
    before = contents(tmp_path / "o")
    for path in (tmp_path / "o").glob("*.*"):  # killed before the first picture was done, while its steps were
        path.unlink()
    assert "000-0/step-1.png has settings.steps 3, not 2" in sample(*asked, "--steps", "2").err
    assert sample(*asked, *FEW).code == 0
    assert contents(tmp_path / "o") == before


def test_a_batch_is_drawn_whole_again_so_that_no_pixel_moves(
    text: Path, sample: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = (text, RED, BLUE, "", "--seeds", "0-7", "--steps", "4", "--out", "o", "--batch", "7")
    assert sample(*asked).code == 0
    before = contents(tmp_path / "o")
    names = sorted(name for name in before if name[0] == "0")
    for name in [names[3], *names[15:]]:
        (tmp_path / "o" / name).unlink()
    batches: list[tuple[Any, ...]] = []
    batch = Artist.batch

    def seen(self: Artist, what: Any, seeds: Any, *rest: Any) -> Any:
        batches.append((*zip(what, seeds, strict=True),))
        return batch(self, what, seeds, *rest)

    monkeypatch.setattr(Artist, "batch", seen)
    assert "10 drawn" in sample(*asked).out
    every = [(prompt, seed) for prompt in (RED, BLUE, "") for seed in range(8)]
    assert batches == [tuple(every[:7]), tuple(every[14:21]), tuple(every[21:])]
    assert contents(tmp_path / "o") == before


def test_a_checkpoint_counts_by_its_content_wherever_it_lies(sample: Call, tmp_path: Path):
    net = small_checkpoint.write_text(tmp_path / "net")
    (net / "text").rename(tmp_path / "encoder")
    config = net / "config.json"

    def encoder_at(place: str) -> None:
        settings = json.loads(config.read_text())
        settings["extra"]["text_encoder"] = str(tmp_path / place)
        config.write_text(json.dumps(settings))
        models.write_sums(net)

    encoder_at("encoder")
    assert sample(net, RED, *FEW, "--out", "o").code == 0
    assert (facts_of(tmp_path / "o" / "000-0.png") or {})["checkpoint"]["name"] == "net"
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "o").values())
    net.rename(tmp_path / "other"), (tmp_path / "encoder").rename(tmp_path / "elsewhere")
    net, config = tmp_path / "other", tmp_path / "other" / "config.json"
    encoder_at("elsewhere")
    (tmp_path / "elsewhere" / ".cache").write_text("when it was fetched")
    assert "there already" in sample(net, RED, *FEW, "--out", "o").out
    weights = tmp_path / "elsewhere" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    result = sample(net, RED, *FEW, "--out", "o")
    assert result.code == 2 and "checkpoint.text_encoder" in result.err


def test_a_full_disk_is_no_bad_usage_and_leaves_no_part(
    text: Path, sample: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left, sync = [2], os.fsync

    def full(file: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = sample(text, RED, *FEW, "--out", "o", "--seeds", "0-3")
    assert result.code == 1
    assert "000-2.png cannot be written (No space left on device): make room there" in result.err
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["000-0.png", "000-1.png"]
    assert "2 drawn" in sample(text, RED, *FEW, "--out", "o", "--seeds", "0-3").out


def test_a_picture_too_large_to_read_is_one_line(
    classes: Path, sample: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    result = sample(classes, "1", *FEW, "--out", "o")
    assert result.code == 1 and "000-0.png is too large to be read" in result.err
    result = sample(classes, "1", *FEW, "--out", "o")
    assert result.code == 2 and "000-0.png is not from this command" in result.err


def test_what_is_no_number_is_no_picture(classes: Path, sample: Call, tmp_path: Path):
    result = sample(classes, "1", "--steps", "3", "--shift", "1e300", "--out", "o", "--save-steps")
    assert result.code == 1 and "1 from seed 0 came out as NaN" in result.err.splitlines()[-1]
    assert not (tmp_path / "o" / "000-0.png").exists()


def test_another_checkpoint_under_the_same_name_is_another(sample: Call, tmp_path: Path):
    for place, channels in (("a", 8), ("b", 16)):
        small_checkpoint.write_class(tmp_path / place / "net", field_channels=channels)
    assert sample(Path("a", "net"), "1", *FEW, "--out", "o").code == 0
    assert "checkpoint." in sample(Path("b", "net"), "1", *FEW, "--out", "o").err


@pytest.mark.parametrize("name", ["000-0.png", "sheet.png", "index.json"])
def test_a_file_of_somebody_else_is_left_alone(text: Path, sample: Call, tmp_path: Path, name: str):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / name).write_bytes(b"{}")
    assert f"{name} is not from this command" in sample(text, RED, *FEW, "--out", "o").err
    assert (tmp_path / "o" / name).read_bytes() == b"{}"


def test_a_damaged_picture_is_named(text: Path, sample: Call, tmp_path: Path):
    assert sample(text, RED, *FEW, "--out", "o").code == 0
    path = tmp_path / "o" / "000-0.png"
    path.write_bytes(path.read_bytes()[:-200])
    result = sample(text, RED, *FEW, "--out", "o")
    assert result.code == 1 and "000-0.png is damaged" in result.err


# ------------------------------------------------------------------------------------------------ what is asked for


def test_prompts_come_from_the_line_and_from_files(text: Path, sample: Call, tmp_path: Path):
    (tmp_path / "p.txt").write_bytes("\ufeff# what we look at\r\n\r\n a red circle \r\nein Kreis\r\n".encode())
    rows: list[Any] = [{"prompt": BLUE, "seeds": [4, 2], "tag": "counting"}, {"prompt": RED, "seed": 9}, {"prompt": ""}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": RED, "seeds": "0,9-10"}])))
    for name, wanted in (
        ("p.txt", [(BLUE, 0), (RED, 0), ("ein Kreis", 0)]),
        ("p.jsonl", [(BLUE, 0), (BLUE, 4), (BLUE, 2), (RED, 9), (RED, 0), (RED, 10), ("", 0)]),
    ):
        index = json.loads(sample(text, BLUE, "--prompts", name, *FEW, "--out", f"{name}.out", "--json").out)
        assert [(entry["prompt"], entry["seed"]) for entry in index["pictures"]] == wanted


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 5)), min_size=1, max_size=5))
def test_seeds_are_read_as_they_are_written(ranges: list[tuple[int, int]]):
    ranges = [(low, min(low + more, 2**64 - 1)) for low, more in ranges]
    written = ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
    assert parse_seeds(written) == tuple(dict.fromkeys(seed for low, high in ranges for seed in range(low, high + 1)))


@pytest.mark.parametrize("wrong", ["", "a", "3-1", "1,3-1", "-1", "1-", "1,,2", "0x1", "²", str(2**64), "0-999999"])
def test_seeds_that_are_none(wrong: str):
    with pytest.raises(SettingsError, match="seeds"):
        parse_seeds(wrong)


@pytest.mark.parametrize(
    ("text_", "size"), [("512", (512, 512)), ("768x1024", (768, 1024)), ("32X16", (32, 16)), ("32×16", (32, 16))]
)
def test_a_size_is_height_then_width(text_: str, size: tuple[int, int]):
    assert parse_size(text_) == size


def test_a_long_prompt_is_one_warning(text: Path, sample: Call):
    result = sample(text, "circle " * 30, RED, "--out", "o", *FEW)
    assert result.code == 0
    (line,) = result.err.splitlines()
    assert line.startswith("warning: a prompt is cut after 12 tokens") and "circle circle" in line


def test_the_help_tells_the_defaults(sample: Call):
    words = " ".join(sample("--help").out.split())
    ours, theirs = _DEFAULTS["text"], _DEFAULTS["class"]
    for name in ("steps", "guidance", "shift"):
        assert f"[default: {getattr(ours, name):g}; for classes: {getattr(theirs, name):g}]" in words
    low, high = theirs.interval
    assert (ours.interval, f"[default: 0,1; for classes: {low:g},{high:g}]" in words) == ((0, 1), True)
    assert ours.solver == theirs.solver and f"[default: {ours.solver}]" in words
    assert ours.batch == theirs.batch and f"[default: {ours.batch}]" in words


LONG = "9" * 5000  # Python reads no number of more than 4,300 digits


def _wrong(*arguments: str, says: str) -> Any:
    return pytest.param(arguments, says, id=" ".join(arguments)[:60])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        _wrong("TEXT", says="nothing to draw: give a prompt"),
        _wrong("TEXT", "--prompts", "empty.txt", says="empty.txt holds no prompts"),
        _wrong("TEXT", "--prompts", "nowhere.txt", says="there is no file nowhere.txt"),
        _wrong("TEXT", "--prompts", "latin.txt", says="latin.txt is not UTF-8"),
        _wrong("TEXT", "--prompts", "p.csv", says="name a .txt or a .jsonl"),
        _wrong("TEXT", "--prompts", "bad.jsonl", says="line 2 of bad.jsonl is not JSON"),
        _wrong("TEXT", "--prompts", "seeds.jsonl", says="line 1 of seeds.jsonl: `x` names no seeds"),
        _wrong("TEXT", "--prompts", "long.jsonl", says="line 1 of long.jsonl is not JSON (too deep, or a number"),
        _wrong("TEXT", "--prompts", "deep.jsonl", says="line 1 of deep.jsonl is not JSON (too deep, or a number"),
        _wrong("TEXT", "--prompts", "sede.jsonl", says="line 1 of sede.jsonl has `sede`: did you mean `seed`?"),
        _wrong("TEXT", "a", "--seeds", LONG, says="9…` names no seeds"),
        _wrong("TEXT", "a", "--size", LONG, says="9…` is no size"),
        _wrong("CLASS", LONG, says="there is no class 999"),
        _wrong("TEXT", "a", "--solver", "adam2", says="did you mean 'adams2'?"),
        _wrong("TEXT", "a", "--interval", "0.1", says="`0.1` is no interval"),
        _wrong("TEXT", "a", "--interval", "0.9,0.1", says="the earlier one first"),
        _wrong("TEXT", "a", "--size", "512x", says="`512x` is no size"),
        _wrong("TEXT", "a", "--size", "18", says="ask for 16x16 or 20x20"),
        _wrong("TEXT", "a", "--seeds", "a-b", says="`a-b` names no seeds"),
        _wrong("TEXT", "a", "--device", "gpu", says="there is no device `gpu`"),
        _wrong("TEXT", "a", "--device", "cuda:99", says="the device cuda:99 is not there"),
        _wrong("TEXT", "a", "--precision", "fp8", says="`precision`"),
        _wrong("TEXT", "a", "--steps", "0", says="`steps`"),
        _wrong("TEXT", "a", "--labels", "p.csv", says="draws from prompts, not from labels"),
        _wrong("TEXT", "a", "--out", "p.csv", says="p.csv cannot be written"),
        _wrong("TEXT", "a\udcff", says="is not valid text"),
        _wrong("CLASS", "5", says="there is no class 5: give a number from 0 to 4"),
        _wrong("CLASS", "-- -1", says="there is no class -1"),
        _wrong("CLASS", "goldfisch", says="did you mean 'goldfish' (1)?"),
        _wrong("CLASS", "a", "--labels", "empty.txt", says="empty.txt has 2 lines"),
        _wrong("NAMELESS", "hen", says="classes have no names: give a number from 0 to 4"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    text: Path, classes: Path, sample: Call, tmp_path: Path, arguments: tuple[str, ...], says: str
):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn\n")
    (tmp_path / "p.csv").write_text("prompt\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt"}\n')
    (tmp_path / "long.jsonl").write_text(f'{{"prompt": "a", "seed": {LONG}}}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "sede.jsonl").write_text('{"prompt": "a", "tag": "counting", "sede": 3}\n')
    (tmp_path / "seeds.jsonl").write_text('{"prompt": "a", "seeds": "x"}\n')
    if arguments[0] == "NAMELESS":
        small_checkpoint.write_class(tmp_path / "nameless")
    folders = {"TEXT": text, "CLASS": classes, "NAMELESS": tmp_path / "nameless"}
    given_ = [part for argument in arguments[1:] for part in (argument.split() if "-- " in argument else [argument])]
    result = sample(folders[arguments[0]], *([] if "--out" in given_ else ["--out", "o"]), *given_)
    assert result.code == 2, result.err
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and says in line
    assert not (tmp_path / "o").exists()


def test_a_folder_that_is_no_checkpoint(text: Path, sample: Call, tmp_path: Path):
    assert "config.json" in (result := sample(tmp_path, "a", "--out", "o")).err and result.code == 1
    config = json.loads((text / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"extra": {}}))
    assert "holds no model.safetensors" in sample(tmp_path, "a", "--out", "o").err
    (tmp_path / "model.safetensors").write_bytes((text / "model.safetensors").read_bytes())
    result = sample(tmp_path, "a", "--out", "o")
    assert "does not say which text encoder" in result.err and result.code == 1
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_whose_trained_size_nobody_told(sample: Call, tmp_path: Path):
    folder = small_checkpoint.write_class(tmp_path / "net")
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"image_size": 16', '"image_size": null'))
    models.write_sums(folder)
    result = sample(folder, "1", *FEW, "--out", "o")
    assert result.code == 2 and "import it again with --trained-size N" in result.err
    result = sample(folder, "1", *FEW, "--out", "o", "--size", "16", "--json")
    (line,) = result.err.splitlines()
    assert "trained at is not known: it is taken to be 16x16" in line and "--trained-size N" in line
    assert json.loads(result.out)["checkpoint"]["assumed_trained_size"] == 16


# ------------------------------------------------------------------------------------------------ the sheet


@pytest.fixture
def grey(tmp_path: Path) -> Callable[[int, int, int], Path]:
    def make(height: int, width: int, level: int) -> Path:
        path = tmp_path / f"{height}x{width}-{level}.png"
        Image.new("RGB", (width, height), (level,) * 3).save(path)
        return path

    return make


def test_small_pictures_are_enlarged_and_stand_in_a_grid(grey: Callable[[int, int, int], Path]):
    rows = [sheet.Row(f"row {r}", [grey(16, 16, 80 * r + 20 * c) for c in range(4)], ["seed"] * 4) for r in range(2)]
    (image,) = sheet.sheets("title", "about", rows, sheet.Layout.of(rows, (16, 16)))
    assert image.width == 4 * 192 + 3 * sheet.GAP + 2 * sheet.MARGIN
    pixels = np.asarray(image)
    for r in range(2):
        for c in range(4):
            ys, xs = np.nonzero((pixels == 80 * r + 20 * c).all(-1))
            left = sheet.MARGIN + c * (192 + sheet.GAP)
            inside = (xs >= left) & (xs < left + 192)
            assert inside.sum() >= 192 * 192 * 0.99
            assert ys[inside].max() - ys[inside].min() >= 191


def test_large_pictures_are_scaled_down_with_their_shape(grey: Callable[[int, int, int], Path]):
    layout = sheet.Layout.of([sheet.Row("", [Path()] * 4, [""] * 4)], (768, 1024))
    assert layout.cell == (384, 288)
    assert (
        sheet.Layout.of([sheet.Row("", [Path()] * 64, [""] * 64)], (512, 512)).width <= sheet.WIDTH + 2 * sheet.MARGIN
    )
    rows = [sheet.Row("", [grey(768, 1024, 7)], ["seed 0"])]
    (image,) = sheet.sheets("t", "a", rows, sheet.Layout.of(rows, (768, 1024)))
    assert (np.asarray(image) == 7).all(-1).sum() == 384 * 288


def test_many_prompts_go_on_the_next_sheet(grey: Callable[[int, int, int], Path]):
    rows = [sheet.Row(f"row {k}", [grey(512, 512, 5)] * 2, ["seed"] * 2) for k in range(40)]
    found = list(sheet.sheets("t", "a", rows, sheet.Layout.of(rows, (512, 512))))
    assert len(found) > 1 and all(image.height <= sheet.TALLEST + sheet.MARGIN for image in found)
    assert sum((np.asarray(image) == 5).all(-1).sum() for image in found) == 80 * 384 * 384


def test_many_seeds_of_one_prompt_go_on_the_next_sheet(grey: Callable[[int, int, int], Path]):
    seeds = 2000
    row = sheet.Row("a caption", [grey(8, 8, 5)] * seeds, ["seed"] * seeds)
    layout = sheet.Layout.of([row], (8, 8))
    found = list(sheet.sheets("t", "a", [row], layout))
    assert len(found) > 1 and all(image.height <= sheet.TALLEST + sheet.MARGIN for image in found)
    assert sum((np.asarray(image) == 5).all(-1).sum() for image in found) == seeds * layout.cell[0] * layout.cell[1]


@given(st.text(alphabet=st.sampled_from("ab W,mi\n"), max_size=200), st.integers(30, 300))
def test_captions_fit_and_lose_nothing_but_their_end(caption: str, width: int):
    letters = font(18)
    lines = wrap(caption, letters, width, lines=3)
    assert 1 <= len(lines) <= 3
    assert all(letters.getlength(line) <= width for line in lines)
    said, whole = "".join("".join(lines).split()), "".join(caption.split())
    assert said == whole or (said.endswith("…") and whole.startswith(said[:-1]) and len(lines) == 3)
