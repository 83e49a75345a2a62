from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import CheckpointError
from tests.training import golden
from training.model import PixNerd, load, read_config, save


@pytest.fixture
def net() -> PixNerd:
    return golden.network("t2i")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_comes_back_as_it_was(net: PixNerd, tmp_path: Path, dtype: torch.dtype):
    net.to(dtype)
    save(tmp_path / "a", net, {"step": 7})
    again = load(tmp_path / "a")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["SHA256SUMS", "config.json", "model.safetensors"]
    assert again.config == net.config
    assert read_config(tmp_path / "a")[1] == {"step": 7}
    for name, tensor in net.state_dict().items():
        assert again.state_dict()[name].dtype == dtype
        assert torch.equal(again.state_dict()[name], tensor), name
    g = golden.load("t2i")
    assert torch.equal(again(g["in/x"], g["in/t"], g["in/y"]), net(g["in/x"], g["in/t"], g["in/y"]))
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_other_weights_may_stand_in(net: PixNerd, tmp_path: Path):
    ema = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    save(tmp_path / "a", net, weights=ema)
    assert torch.equal(load(tmp_path / "a").state_dict()["stem.bias"], ema["stem.bias"])
    ema.pop("stem.bias")
    with pytest.raises(CheckpointError, match=r"stem\.bias is missing"):
        save(tmp_path / "b", net, weights=ema)
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_is_never_written_over(net: PixNerd, tmp_path: Path):
    save(tmp_path, net)
    with pytest.raises(CheckpointError, match="already"):
        save(tmp_path, net)


@pytest.mark.parametrize("dies_at", ["config.json", "model.safetensors", "SHA256SUMS"])
def test_a_save_that_dies_leaves_no_checkpoint(
    net: PixNerd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
):
    real = Path.replace

    def full_disk(self: Path, target: Path) -> Path:
        if target.name == dies_at:
            raise OSError("no space left")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, net)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load(tmp_path)
    save(tmp_path, net)  # and the next try is not in its way
    load(tmp_path)


def _change(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in state.items() if t is not None}, folder / "model.safetensors")


def test_what_does_not_fit_is_named(net: PixNerd, tmp_path: Path):
    save(tmp_path, net)
    _change(tmp_path, **{"stem.bias": None, "time.fc1.bias": torch.zeros(3), "stem.scale": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert "stem.bias is missing" in message
    assert "time.fc1.bias is [3] instead of [24]" in message
    assert "stem.scale is left over" in message


def test_damage_is_told_from_absence(net: PixNerd, tmp_path: Path):
    save(tmp_path, net)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        load(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema_version": 2}, "schema 2"),
        ({"model": {"hiden": 3}}, "hiden.*hidden"),
        ({"model": {"hidden": -1}}, "hidden"),
    ],
)
def test_settings_that_are_not_ours_are_refused(net: PixNerd, tmp_path: Path, change: dict[str, object], why: str):
    save(tmp_path, net)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(CheckpointError, match=why):
        load(tmp_path)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_is_refused(net: PixNerd, tmp_path: Path, name: str):
    """In the weights it would draw another picture; in the settings a digit is another one, and still valid."""
    save(tmp_path, net, {"note": "0"})
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[-1 if name == "model.safetensors" else data.rindex(b"0")] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged.*take its line out of SHA256SUMS"):
        load(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()  # a folder from elsewhere carries no hashes, and is taken as it is
    load(tmp_path)


def test_the_hashes_are_those_that_coreutils_check(net: PixNerd, tmp_path: Path):
    save(tmp_path, net)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path, check=True)
