"""What the checkpoint commands print, and that they refuse in one line; training/test_published.py holds the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import nn

from orchestration import cli
from orchestration.commands.checkpoint import export, import_, preset_of, show
from tests.training import golden
from tests.training.reference_files import state, write
from training import model as models

CHOICES: dict[str, Any] = {"network": None, "trained_size": 16, "text_encoder": "someone/encoder", "json_": True}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.ckpt", state("t2i", head=True) | {"vae.scale": golden.load("t2i")["in/t"]})


@pytest.fixture
def folder(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    import_(file, tmp_path / "out", **CHOICES)
    capsys.readouterr()
    return tmp_path / "out"


def printed(capsys: pytest.CaptureFixture[str], checkpoint: Path) -> tuple[str, dict[str, Any]]:
    show(checkpoint, json_=False)
    text = capsys.readouterr().out
    show(checkpoint, json_=True)
    return text, json.loads(capsys.readouterr().out)


def test_an_import_says_what_was_taken_and_what_is_not_known(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import_(file, tmp_path / "one", **CHOICES)
    facts = json.loads(capsys.readouterr().out)
    assert facts["settings"] == golden.config_of(golden.load("t2i")["cfg"]).model_dump(mode="json")
    assert facts["extra"]["provenance"]["imported_from"] == "model.ckpt"
    nothing = {"network": None, "trained_size": None, "text_encoder": None}
    import_(file, tmp_path / "two", **nothing, json_=False)
    text = capsys.readouterr().out
    assert "the network ema of model.ckpt, text to image" in text
    assert "not imported: denoiser. (55 tensors), vae. (1 tensors)" in text
    assert "--trained-size" in text and "--text-encoder" in text


def test_a_folder_is_shown_with_every_parameter_in_its_part(folder: Path, capsys: pytest.CaptureFixture[str]):
    text, facts = printed(capsys, folder)
    net = models.load(folder)
    assert net.field is not None and net.text is not None
    parts: dict[str, nn.Module] = {"stem": net.stem, "time embedding": net.time, "trunk": net.trunk, "field": net.field}
    parts["text-refine blocks"] = net.text.blocks
    for name, part in parts.items():
        assert facts["parameters"][name] == sum(p.numel() for p in part.parameters()), name
    assert sum(facts["parameters"].values()) == sum(p.numel() for p in net.parameters())
    assert facts["repa_head"] == 2 * (24 * 24 + 24) + 24 * 12 + 12
    assert facts["dtypes"] == {"float32": 55}
    assert "trained size: 16 x 16" in text
    assert "text encoder: someone/encoder" in text
    assert "imported from: model.ckpt" in text


class Closed:
    """A safetensors file, or a tensor in it, that tells what it is and gives nothing away."""

    def __init__(self, within: Any) -> None:
        self._within = within

    def __enter__(self) -> Closed:
        return Closed(self._within.__enter__())

    def __exit__(self, *error: object) -> None:
        self._within.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        assert name in ("keys", "get_slice", "get_shape", "get_dtype"), f"{name} reads weights"
        if name == "get_slice":
            return lambda tensor: Closed(self._within.get_slice(tensor))
        return getattr(self._within, name)


def test_weights_are_not_read_to_be_shown(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    opened: list[Path] = []

    def closed(path: Path, framework: str) -> Closed:
        opened.append(path)
        return Closed(safe_open(path, framework=framework))

    monkeypatch.setattr(models, "safe_open", closed)
    monkeypatch.setattr(models, "load_file", None)
    with pytest.raises(TypeError):
        models.load(folder)
    opened.clear()
    _, facts = printed(capsys, folder)
    assert facts["dtypes"] == {"float32": 55}
    assert {path.name for path in opened} == {models.WEIGHTS, models.HEAD}


def test_a_file_is_shown_as_import_would_find_it(file: Path, folder: Path, capsys: pytest.CaptureFixture[str]):
    text, facts = printed(capsys, file)
    assert "it holds the networks ema and raw" in text
    assert "not imported: 1 tensors of vae." in text
    assert "trained size: not known" in text
    assert facts["networks"]["raw"]["dtypes"] == {"bfloat16": 55}
    _, shown = printed(capsys, folder)
    assert facts["networks"]["ema"]["parameters"] == shown["parameters"]
    assert facts["networks"]["ema"]["repa_head"] == shown["repa_head"]


def test_published_sizes_are_called_by_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models.save(tmp_path / "tiny", models.PixNerd(models.preset("tiny")), {"text_encoder": "text"})
    text, facts = printed(capsys, tmp_path / "tiny")
    assert facts["preset"] == "tiny"
    assert "PixNerd, text to image (tiny)" in text
    assert "its own, in the folder text" in text


def test_the_published_names_do_not_depend_on_the_trained_size():
    assert preset_of(models.preset("XXL/16").model_copy(update={"image_size": None})) == "XXL/16"
    assert preset_of(models.preset("XL/16").model_copy(update={"blocks": 25})) is None


def test_labels_and_linear_heads_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = {"task": "class", "classes": 3, "hidden": 8, "heads": 1, "blocks": 1, "patch_size": 4, "image_size": None}
    models.save(tmp_path / "a", models.PixNerd(models.ModelConfig(**sizes, field_blocks=0)))
    text, facts = printed(capsys, tmp_path / "a")
    assert "labels: 3 classes" in text
    assert "drawn by a linear head" in text
    assert "trained size: not known" in text
    assert "linear head" in facts["parameters"]
    assert "text" not in " ".join(facts["parameters"])


def test_an_export_says_what_is_in_the_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    export(folder, tmp_path / "again.ckpt", network="both", json_=False)
    text = capsys.readouterr().out
    assert "116 tensors under denoiser., ema_denoiser., diffusion_trainer.proj.0." in text
    export(folder, tmp_path / "more.ckpt", network=None, json_=True)
    assert json.loads(capsys.readouterr().out)["prefixes"] == ["ema_denoiser.", "diffusion_trainer.proj.0."]


Line = Callable[..., tuple[int, str]]


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Line:
    """The command in this process, which spares each call the start of another: its exit code, and what it printed."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pixnerd", "checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        printed = capsys.readouterr()
        code = int(caught.value.code or 0)
        assert not code or printed.err.count("\n") == 1, printed.err
        return code, printed.err if code else printed.out

    return call


def test_the_commands_work_from_the_line(line: Line, file: Path, tmp_path: Path):
    out, again = tmp_path / "out", tmp_path / "again.ckpt"
    code, text = line("import", file, out, "--network", "raw", "--trained-size", "16", "--json")
    assert code == 0
    assert json.loads(text)["extra"]["provenance"]["dtypes"] == {"bfloat16": 55}
    assert line("export", out, again)[0] == 0
    assert "the network raw" in line("show", again)[1]


def test_bad_usage_and_bad_files_are_one_line_each(line: Line, file: Path, tmp_path: Path):
    out = tmp_path / "out"
    models.save(tmp_path / "mine", models.PixNerd(models.preset("tiny")))
    wrong: list[tuple[int, str, list[str | Path]]] = [
        (2, "no multiple of the patch size 4", ["import", file, out, "--trained-size", "18"]),
        (2, "best", ["import", file, out, "--network", "best"]),
        (2, "is there already", ["import", file, tmp_path]),
        (1, "holds a NaN", ["import", _with_nan(tmp_path), out]),
        (1, "there is no file", ["import", tmp_path / "nowhere.ckpt", out]),
        (1, "no published layout", ["export", tmp_path / "mine", tmp_path / "mine.ckpt"]),
        (1, "no whole PyTorch file", ["show", tmp_path / "mine" / "config.json"]),
    ]
    for code, says, arguments in wrong:
        found = line(*arguments)
        assert found[0] == code, found
        assert says in found[1]
    assert not out.exists()
    assert not (tmp_path / "mine.ckpt").exists()


def _with_nan(folder: Path) -> Path:
    theirs = state("c2i")
    theirs["ema_denoiser.final_layer.norm.weight"][0] = float("nan")
    return write(folder / "nan.ckpt", theirs)
