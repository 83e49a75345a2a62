"""Published checkpoints in and out: what goes in comes out bit for bit, what does not fit leaves no trace."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from infra.errors import CheckpointError, SettingsError
from tests.training import golden
from tests.training.reference_files import State, part, repa_head, same, state, write
from training import checkpoint
from training import model as models
from training.model import PRESETS, ModelConfig, PixNerd
from training.model.fit import shapes
from training.model.published import reference
from training.model.published.exchange import export_folder, import_file
from training.model.published.file import read
from training.model.repa_head import RepaHead

LIMIT = 5e-6


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", ["XXL/16", "XL/16", "XL/8", "L/16"])
def test_the_published_networks_are_recognised(name: str):
    net = models.outline(PRESETS[name])
    theirs = shapes(reference.to_reference(net.state_dict(), net.config))
    assert reference.find_config(theirs) == PRESETS[name].model_copy(update={"image_size": None})
    reference.check_layout(theirs, net.config, shapes(net.state_dict()))


@pytest.mark.parametrize("name", ["t2i", "c2i"])
def test_published_names_in_and_out_are_exact(name: str):
    theirs = golden.weights(golden.load(name))
    net = golden.network(name)
    assert same(reference.to_reference(net.state_dict(), net.config), theirs)
    found = reference.find_config(shapes(theirs))
    assert found == golden.config_of(golden.load(name)["cfg"]).model_copy(update={"image_size": None})


def test_a_file_of_endless_blocks_is_refused_before_they_are_built():
    theirs = shapes(golden.weights(golden.load("t2i")))
    theirs |= {f"blocks.{i}.norm.weight": (1,) for i in range(4, 1002)}
    with pytest.raises(CheckpointError, match=r"mean\.blocks\.1000 is one of more than 1000 blocks"):
        reference.find_config(theirs, "mean.")


@st.composite
def configs(draw: Callable[..., Any]) -> ModelConfig:
    def few(most: int) -> int:
        return int(draw(st.integers(1, most)))

    task = draw(st.sampled_from(["text", "class"]))
    heads = few(3)
    sizes: dict[str, Any] = {"heads": heads, "hidden": 4 * heads * few(3), "blocks": few(3), "patch_size": few(5)}
    sizes |= {"field_blocks": few(3), "field_channels": few(6), "field_ratio": few(3), "image_size": None}
    if task == "class":
        return ModelConfig(task="class", classes=few(7), **sizes)
    sizes |= {"text_blocks": few(3) - 1, "text_dim": few(9), "text_tokens": few(5)}
    return ModelConfig(coordinate_code="cosine", field_norm="fc1", round_text=True, **sizes)


@given(config=configs())
@settings(max_examples=25)
def test_import_finds_the_settings_that_were_exported(config: ModelConfig):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        net = PixNerd(config)
        models.save(folder / "mine", net)
        export_folder(folder / "mine", folder / "file.ckpt")
        import_file(folder / "file.ckpt", folder / "back")
        again = models.load(folder / "back")
    assert again.config == config
    assert same(again.state_dict(), net.state_dict())


# ------------------------------------------------------------------------------------------------ in and out


@pytest.mark.parametrize("name", ["t2i", "c2i"])
@pytest.mark.parametrize("kind", ["lightning", "bare", "safetensors", "unnamed"])
def test_an_imported_network_computes_what_the_published_one_does(tmp_path: Path, name: str, kind: str):
    theirs, path = state(name), tmp_path / "model.ckpt"
    if kind == "lightning":
        write(path, theirs)
    elif kind == "bare":
        torch.save(theirs, path)
    elif kind == "unnamed":
        torch.save(golden.weights(golden.load(name)), path)
    else:
        save_file(theirs, path := tmp_path / "model.safetensors")
    import_file(path, tmp_path / "out", trained_size=16)
    net, g = models.load(tmp_path / "out"), golden.load(name)
    assert net.config == golden.config_of(g["cfg"])
    with torch.no_grad():
        assert golden.error(net(g["in/x"], g["in/t"], g["in/y"]), g["out/v"]) < LIMIT
    if name == "t2i":
        net.config = net.config.model_copy(update={"fixed_grid": True})
        g = golden.load("t2i_anyres")
        with torch.no_grad():
            assert golden.error(net(g["in/x"], g["in/t"], g["in/y"]), g["out/v"]) < LIMIT


def test_tensors_of_a_gpu_are_read_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = write(tmp_path / "model.ckpt", state("t2i"))
    import_file(path, tmp_path / "out")
    assert same(models.load(tmp_path / "out").state_dict(), golden.network("t2i").state_dict())


@pytest.mark.parametrize("name", ["t2i", "c2i"])
@pytest.mark.parametrize("network", ["ema", "raw"])
def test_a_file_comes_out_bit_for_bit(tmp_path: Path, name: str, network: Any):
    theirs = state(name, head=True)
    import_file(write(tmp_path / "model.ckpt", theirs), tmp_path / "out", network=network)
    export_folder(tmp_path / "out", tmp_path / "again.ckpt")
    file = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert file.keys() == {"state_dict"}
    prefix = "ema_denoiser." if network == "ema" else "denoiser."
    assert same(file["state_dict"], part(theirs, prefix) | part(theirs, "diffusion_trainer."))


def test_every_tensor_keeps_a_type_of_its_own(tmp_path: Path):
    theirs = part(state("t2i"), "ema_denoiser.")
    theirs["ema_denoiser.y_pos_embedding"] = theirs["ema_denoiser.y_pos_embedding"].half()
    theirs["ema_denoiser.blocks.0.norm1.weight"] = theirs["ema_denoiser.blocks.0.norm1.weight"].double()
    extra = import_file(write(tmp_path / "model.ckpt", theirs), tmp_path / "out")
    assert extra["provenance"]["dtypes"] == {"float32": len(theirs) - 2, "float16": 1, "float64": 1}
    export_folder(tmp_path / "out", tmp_path / "again.ckpt")
    assert same(torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"], theirs)


def test_a_network_can_be_exported_under_both_names(tmp_path: Path):
    theirs = state("c2i")
    import_file(write(tmp_path / "model.ckpt", theirs), tmp_path / "out")
    export_folder(tmp_path / "out", tmp_path / "both.ckpt", network="both")
    found = torch.load(tmp_path / "both.ckpt", weights_only=True)["state_dict"]
    assert same(part(found, "ema_denoiser."), part(theirs, "ema_denoiser."))
    assert same({f"ema_{name}": t for name, t in part(found, "denoiser.").items()}, part(theirs, "ema_denoiser."))
    assert set(read(tmp_path / "both.ckpt").networks) == {"ema", "raw"}


def test_an_exported_file_holds_no_more_than_its_tensors(tmp_path: Path):
    import_file(write(tmp_path / "model.ckpt", part(state("c2i"), "ema_")), tmp_path / "out")
    export_folder(tmp_path / "out", tmp_path / "again.ckpt")
    found = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())


def test_the_head_goes_where_training_reads_it(tmp_path: Path):
    import_file(write(tmp_path / "model.ckpt", state("t2i", head=True)), tmp_path / "out")
    head = RepaHead(24, 12)
    checkpoint.load_part(tmp_path / "out" / "repa.safetensors", head, "the REPA head")
    assert torch.equal(head.state_dict()["4.bias"], golden.load("objective")["in/proj.0.4.bias"])


def test_frozen_encoders_are_skipped_and_told(tmp_path: Path):
    theirs: dict[str, Any] = dict(state("t2i"))
    theirs |= {"vae.scale": torch.ones(1, dtype=torch.int64), "vae.steps": 3, "conditioner.m.weight": torch.ones(2)}
    theirs |= {"diffusion_trainer.encoder.cls_token": torch.ones(2)}
    path = write(tmp_path / "model.ckpt", theirs)
    extra = import_file(path, tmp_path / "out", text_encoder="someone/encoder")
    assert models.read_config(tmp_path / "out")[1] == extra
    assert extra["text_encoder"] == "someone/encoder"
    origin = extra["provenance"]
    assert origin["imported_from"] == "model.ckpt"
    assert origin["network"] == "ema"
    assert len(origin["sha256"]) == 64
    counts = {"denoiser.": 55, "vae.": 2, "conditioner.": 1, "diffusion_trainer.encoder.": 1}
    assert origin["skipped"] == [f"{prefix} ({count} tensors)" for prefix, count in counts.items()]


def test_tensors_that_share_memory_in_the_file_are_weights_of_their_own(tmp_path: Path):
    theirs = part(state("t2i"), "ema_denoiser.")
    flat = torch.cat([tensor.flatten() for tensor in theirs.values()])
    pieces = flat.split([tensor.numel() for tensor in theirs.values()])
    theirs = {name: piece.view(t.shape) for (name, t), piece in zip(theirs.items(), pieces, strict=True)}
    tied = "ema_denoiser.blocks.{}.attn.q_norm.weight"
    theirs[tied.format(1)] = theirs[tied.format(0)]
    import_file(write(tmp_path / "model.ckpt", theirs), tmp_path / "out")
    export_folder(tmp_path / "out", tmp_path / "again.ckpt")
    assert same(torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"], theirs)


# ------------------------------------------------------------------------------------------------ choices


def test_the_trained_size_is_told_or_not_known(tmp_path: Path):
    path = write(tmp_path / "model.ckpt", state("t2i"))
    with pytest.raises(SettingsError, match="--trained-size 18 is no multiple of the patch size 4"):
        import_file(path, tmp_path / "out", trained_size=18)
    import_file(path, tmp_path / "known", trained_size=64)
    assert models.load(tmp_path / "known").config.image_size == 64
    import_file(path, tmp_path / "unknown")
    net = models.load(tmp_path / "unknown")
    assert net.config.image_size is None
    net.config.check_size(16, 24)
    fixed = net.config.model_copy(update={"fixed_grid": True})
    with pytest.raises(SettingsError, match=r"not known: import again with --trained-size N"):
        fixed.check_size(16, 24)
    with pytest.raises(ValueError, match=r"fixed_grid needs image_size.*--trained-size N"):
        ModelConfig(image_size=None, fixed_grid=True)


def test_the_text_encoder_is_known_by_its_width_or_told(tmp_path: Path):
    def encoder(path: Path, out: str, **more: Any) -> str | None:
        found: str | None = import_file(path, tmp_path / out, **more).get("text_encoder")
        return found

    theirs = part(state("t2i"), "ema_denoiser.")
    path = write(tmp_path / "narrow.ckpt", theirs)
    assert encoder(path, "narrow") is None
    name = "ema_denoiser.y_embedder.proj.weight"
    wide = write(tmp_path / "wide.ckpt", theirs | {name: torch.ones(24, 2048)})
    assert encoder(wide, "wide") == "Qwen/Qwen3-1.7B"
    own = tmp_path / "encoder"
    own.mkdir()
    with pytest.raises(SettingsError, match="is no text encoder"):
        encoder(path, "own", text_encoder=str(own))
    (own / "config.json").write_text(json.dumps({"hidden_size": 2048}))
    assert encoder(wide, "own", text_encoder=os.path.relpath(own)) == str(own)
    with pytest.raises(SettingsError, match="makes features of 2048, the network needs 24"):
        encoder(path, "no", text_encoder=str(own))
    for missing in ("./nowhere", str(tmp_path / "nowhere"), "text"):
        with pytest.raises(SettingsError, match="there is no folder"):
            encoder(path, "no", text_encoder=missing)
    with pytest.raises(SettingsError, match="reads no text"):
        encoder(write(tmp_path / "labels.ckpt", state("c2i")), "no", text_encoder="someone/encoder")
    assert not (tmp_path / "no").exists()


def test_a_network_that_is_not_there_is_not_replaced(tmp_path: Path):
    raw = write(tmp_path / "raw.ckpt", part(state("t2i"), "denoiser."))
    with pytest.raises(SettingsError, match=r"no ema network \(ema_denoiser\.\): .*--network: raw"):
        import_file(raw, tmp_path / "out")
    unnamed = write(tmp_path / "unnamed.ckpt", golden.weights(golden.load("t2i")))
    with pytest.raises(SettingsError, match="does not say which network"):
        import_file(unnamed, tmp_path / "out", network="raw")
    assert not (tmp_path / "out").exists()
    assert import_file(unnamed, tmp_path / "out")["provenance"]["network"] == "unnamed"


# ------------------------------------------------------------------------------------------------ refusals

Change = Callable[[dict[str, Any]], Any]
E = "ema_denoiser."


def put(name: Any, value: Any) -> Change:  # a file may hold names that are no text
    return lambda state: state.update({name: value})


def drop(*names: str) -> Change:
    return lambda state: [state.pop(name) for name in names]


def with_nan(name: str, value: float) -> Change:
    def change(state: dict[str, Any]) -> None:
        state[name] = state[name].clone()
        state[name].view(-1)[-1] = value

    return change


FIELD = [f"{E}blocks.{i}.{n}" for i in (2, 3) for n in ("param_generator1.0.weight", "param_generator1.0.bias")]
FIELD += [f"{E}blocks.{i}.norm.weight" for i in (2, 3)]

REFUSED: list[tuple[str, Change, str]] = [
    ("t2i", drop(f"{E}final_layer.linear.bias"), r"ema_denoiser\.final_layer\.linear\.bias is missing"),
    ("t2i", drop(f"{E}s_embedder.proj.weight"), r"ema_denoiser\.s_embedder\.proj\.weight is missing"),
    ("t2i", drop(f"{E}y_embedder.proj.weight"), r"neither ema_denoiser\.y_embedder\.proj\.weight nor"),
    ("c2i", drop(f"{E}final_layer.norm.weight"), r"ema_denoiser\.final_layer\.norm\.weight is missing"),
    ("t2i", put(f"{E}final_layer.norm.weight", torch.ones(16)), r"final_layer\.norm\.weight is left over"),
    ("t2i", put(f"{E}blocks.0.norm3.weight", torch.ones(24)), r"ema_denoiser\.blocks\.0\.norm3\.weight is left over"),
    ("t2i", put(f"{E}blocks.07.norm.weight", torch.ones(24)), r"blocks\.07\.norm\.weight is left over"),
    ("t2i", put(f"{E}blocks.5.norm.weight", torch.ones(24)), r"ema_denoiser\.blocks\.4 is missing"),
    ("t2i", put(f"{E}blocks.99999.norm.weight", torch.ones(24)), r"ema_denoiser\.blocks\.4 is missing"),
    ("t2i", put(f"{E}text_refine_blocks.2.a", torch.ones(1)), r"text_refine_blocks\.1 is missing"),
    ("c2i", put(f"{E}blocks.1.mlp.w1.weight", torch.ones(3, 24)), r"mlp\.w1\.weight is \[3, 24\] instead of \[64, 24"),
    ("t2i", put(f"{E}y_pos_embedding", torch.ones(1, 6, 25)), r"y_pos_embedding is \[1, 6, 25\] instead of \[1, 6, 24"),
    ("t2i", put(f"{E}y_pos_embedding", torch.ones(6, 24)), r"ema_denoiser\.y_pos_embedding is \[6, 24\], not 3 sizes"),
    ("t2i", put(f"{E}blocks.0.attn.q_norm.weight", torch.ones(7)), r"blocks\.0\.attn\.q_norm\.weight has 7 values.*24"),
    ("t2i", put(f"{E}blocks.0.attn.q_norm.weight", torch.ones(6)), r"q_norm\.weight has 6 values: .*multiple of 4"),
    ("t2i", put(f"{E}t_embedder.mlp.2.weight", torch.ones(24, 25)), r"t_embedder\.mlp\.2\.weight is .*not square"),
    ("t2i", put(f"{E}s_embedder.proj.weight", torch.ones(24, 50)), r"s_embedder\.proj\.weight takes 50 values"),
    ("t2i", put(f"{E}blocks.2.param_generator1.0.bias", torch.ones(1000)), r"generator1\.0\.bias has 1000 values"),
    ("c2i", put(f"{E}y_embedder.embedding_table.weight", torch.ones(1, 24)), r"embedding_table\.weight has one row"),
    ("t2i", drop(*FIELD), "there is no neural field"),
    ("t2i", put(f"{E}y_pos_embedding", [1.0, 2.0]), r"ema_denoiser\.y_pos_embedding is of type list, not a tensor"),
    ("t2i", put(f"{E}s_embedder.proj.bias", torch.ones(24, dtype=torch.int8)), r"embedder\.proj\.bias is of type int8"),
    ("t2i", put(f"{E}s_embedder.proj.bias", torch.ones(24, dtype=torch.bool)), r"proj\.bias is of type bool"),
    ("t2i", put(f"{E}s_embedder.proj.bias", torch.ones(24, dtype=torch.cfloat)), r"proj\.bias is of type complex64"),
    ("t2i", put(f"{E}s_embedder.proj.bias", torch.ones(24).to_sparse()), r"more than weights .*_rebuild_sparse_tensor"),
    ("t2i", put(f"{E}s_embedder.proj.bias", torch.ones(24, device="meta")), r"more than weights .*_rebuild_meta"),
    ("t2i", put(f"{E}y_embedder.proj.weight", torch.ones(0, 10**12)), r"y_embedder\.proj\.weight is empty"),
    ("t2i", put(f"{E}y_embedder.proj.weight", torch.ones(1).expand(24, 10**12)), r"claim 96,.* bytes, the whole file"),
    ("t2i", put(f"{E}t_embedder.mlp.2.weight", torch.ones(1).expand(10**9, 10**9)), "the whole file has"),
    ("t2i", with_nan(f"{E}blocks.1.norm2.weight", float("nan")), r"ema_denoiser\.blocks\.1\.norm2\.weight holds a NaN"),
    ("t2i", with_nan(f"{E}y_pos_embedding", float("-inf")), r"y_pos_embedding holds a NaN or an infinity"),
    ("c2i", put(f"{E}blocks.1.mlp.w3.weight", torch.ones(64, 24).half()),
     r"blocks\.1\.mlp\.w1\.weight float32 and ema_denoiser\.blocks\.1\.mlp\.w3\.weight float16 are of different types"),
    ("t2i", put("ema_denoise.x", torch.ones(1)), r"ema_denoise\.x is unknown"),
    ("t2i", put("diffusion_trainer.proj.1.0.bias", torch.ones(1)), r"diffusion_trainer\.proj\.1\.0\.bias is unknown"),
    ("t2i", put("two\nlines", torch.ones(1)), r"is called 'two"),
    ("t2i", put(7, torch.ones(1)), "is called 7"),
    ("t2i", put("diffusion_trainer.proj.0.0.bias", torch.ones(24)), r"diffusion_trainer\.proj\.0\.2\.bias is missing"),
    ("t2i", lambda s: s.update(repa_head() | {"diffusion_trainer.proj.0.2.weight": torch.ones(25, 24)}),
     r"diffusion_trainer\.proj\.0\.2\.weight is \[25, 24\] instead of \[24, 24\]"),
    ("t2i", lambda s: s.update(repa_head() | {"diffusion_trainer.proj.0.4.bias": torch.full((12,), torch.nan)}),
     r"diffusion_trainer\.proj\.0\.4\.bias holds a NaN"),
    ("t2i", lambda s: s.clear(), "it holds no network"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "why"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused_by_its_name(tmp_path: Path, name: str, change: Change, why: str):
    theirs: dict[str, Any] = dict(state(name))
    change(theirs)
    refused(write(tmp_path / "model.ckpt", theirs), why)


def refused(path: Path, why: str) -> None:
    """In one line that names the file, and with nothing beside it."""
    there = sorted(path.parent.iterdir())
    with pytest.raises(CheckpointError, match=why) as caught:
        import_file(path, path.parent / "new" / "out")
    assert str(path) in caught.value.message
    assert caught.value.message.isprintable()
    assert sorted(path.parent.iterdir()) == there


@pytest.mark.parametrize("value", [[1, 2], 3, {"state_dict": 3}, {"state_dict": {}}, None, torch.ones(3)])
def test_other_things_than_a_state_dict_are_refused(tmp_path: Path, value: Any):
    torch.save(value, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", "holds a|holds no network|s_embedder")


class Call:
    """Pickles as a call, whose result it is when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("place", ["state_dict", "beside it"])
def test_a_file_that_would_run_a_command_does_not(tmp_path: Path, place: str):
    marker, theirs = tmp_path / "marker", state("t2i")
    data = {"state_dict": theirs | ({"vae.x": Call(os.system, f"touch {marker}")} if place == "state_dict" else {})}
    torch.save(
        data | ({"callbacks": Call(os.system, f"touch {marker}")} if place == "beside it" else {}),
        tmp_path / "model.ckpt",
    )
    refused(tmp_path / "model.ckpt", r"more than weights \(it asks for posix\.system\)")
    assert not marker.exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert marker.exists(), "the file would not have run anything"


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (Call(bytearray, 10**9), "bytearray"),
        (Call(codecs.encode, b"0" * 9, "hex"), "_codecs.encode"),
        (
            Call(torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.ones(1).expand(10**9), torch.double, "cpu"),
            "_rebuild_device",
        ),
        (Call(torch.FloatTensor, 10**9), "torch.FloatTensor"),
    ],
)
def test_calls_that_fill_the_memory_are_not_made(tmp_path: Path, call: Call, why: str):
    """PyTorch takes them for weights."""
    torch.save({"state_dict": state("t2i"), "beside": call}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", f"more than weights .*{why}")


def test_objects_beside_the_weights_are_refused_too(tmp_path: Path):
    torch.save({"state_dict": state("t2i"), "hyper_parameters": {"where": tmp_path}}, tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", r"asks for pathlib\.")


def test_files_of_other_kinds_are_refused(tmp_path: Path):
    torch.save(state("t2i"), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.ckpt", "no whole PyTorch file")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    refused(tmp_path / "text.ckpt", "no whole PyTorch file")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    refused(tmp_path / "text.safetensors", "damaged")
    with pytest.raises(CheckpointError, match="there is no file"):
        import_file(tmp_path / "nowhere.ckpt", tmp_path / "out")


def _packed(path: Path, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    """The file again, with its records changed."""
    changed = path.with_name(f"changed-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w", kind) as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    return changed


def test_records_are_as_long_as_their_tensors_and_not_compressed(tmp_path: Path):
    path = write(tmp_path / "model.ckpt", state("t2i"))
    import_file(
        _packed(path, lambda name, data: data), tmp_path / "whole"
    )  # so the change, not the packing, is refused
    refused(_packed(path, lambda name, data: data, zipfile.ZIP_DEFLATED), "compressed")
    refused(
        _packed(path, lambda name, data: data[:-4] if name.endswith("data/9") else data), "longer than their record"
    )
    refused(_packed(path, lambda name, data: data[:-40] if name.endswith("data.pkl") else data), "damaged|no whole")


def test_wrong_bytes_in_a_tensor_are_told_by_their_check_sum(tmp_path: Path):
    path = write(tmp_path / "model.ckpt", state("t2i"))
    data = bytearray(path.read_bytes())
    at = data.index(state("t2i")["ema_denoiser.y_pos_embedding"].numpy().tobytes())
    data[at] ^= 1  # still a number, of the same size
    path.write_bytes(data)
    refused(path, r"the file is damaged: .*/data/\d+ is not what was saved")


def test_a_broken_network_beside_the_one_that_is_taken_is_called_so(tmp_path: Path):
    theirs = state("t2i")
    del theirs["denoiser.y_pos_embedding"]
    extra = import_file(write(tmp_path / "model.ckpt", theirs), tmp_path / "out")
    assert extra["provenance"]["skipped"] == ["denoiser. (54 tensors, which are no whole network)"]


@pytest.fixture(scope="module")
def whole() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": part(state("t2i"), E)}, buffer)
    return buffer.getvalue()


@given(st.data())
@settings(max_examples=60)
def test_a_file_that_was_cut_or_has_wrong_bytes_is_refused_or_whole(whole: bytes, data: st.DataObject):
    broken = bytearray(whole)
    if data.draw(st.booleans()):
        del broken[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        start = whole.index(b"data.pkl")
        for _ in range(data.draw(st.integers(1, 3))):
            broken[data.draw(st.integers(start, start + 6000))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as name:
        path, out = Path(name) / "model.ckpt", Path(name) / "out"
        path.write_bytes(broken)
        with contextlib.suppress(CheckpointError):
            import_file(path, out)
            assert len(broken) == len(whole)
        if out.exists():
            models.load(out)


# ------------------------------------------------------------------------------------------------ writing


def test_import_never_writes_over_anything(tmp_path: Path):
    path = write(tmp_path / "model.ckpt", state("t2i"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for out in ("file", "full"):
        with pytest.raises(SettingsError, match="is there already"):
            import_file(path, tmp_path / out)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine").read_text() == "mine"
    with pytest.raises(CheckpointError, match="cannot be written"):
        import_file(path, tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    import_file(path, tmp_path / "empty")
    import_file(path, tmp_path / "new" / "folder")
    written = sorted(p.name for p in (tmp_path / "new" / "folder").iterdir())
    assert written == ["SHA256SUMS", "config.json", "model.safetensors"]


@pytest.mark.parametrize("way", ["import", "export"])
def test_what_dies_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str):
    path = write(tmp_path / "model.ckpt", state("t2i", head=True))
    import_file(path, ready := tmp_path / "ready")
    there = sorted(tmp_path.iterdir())

    def full_disk(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        import_file(path, tmp_path / "out") if way == "import" else export_folder(ready, tmp_path / "again.ckpt")
    assert sorted(tmp_path.iterdir()) == there


def test_a_mistake_in_pytorch_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "model.ckpt", state("t2i"))

    def fail(*arguments: Any) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(models, "save_file", fail)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        import_file(path, tmp_path / "out")
    monkeypatch.undo()
    import_file(path, tmp_path / "out")
    monkeypatch.setattr(torch, "save", fail)  # as it reports one
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_folder(tmp_path / "out", tmp_path / "again.ckpt")


def test_settings_from_before_a_setting_was_there_are_read(tmp_path: Path):
    import_file(write(tmp_path / "model.ckpt", state("t2i")), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["model"].pop("round_text") is True
    path.write_text(json.dumps(config))
    models.write_sums(tmp_path / "out")
    assert models.load(tmp_path / "out").config.round_text is False


def test_export_never_writes_over_a_file(tmp_path: Path):
    import_file(write(tmp_path / "model.ckpt", state("t2i")), tmp_path / "out")
    with pytest.raises(SettingsError, match="is there already"):
        export_folder(tmp_path / "out", tmp_path / "model.ckpt")
    with pytest.raises(SettingsError, match="is a PyTorch file"):
        export_folder(tmp_path / "out", tmp_path / "again.safetensors")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        export_folder(tmp_path / "nowhere", tmp_path / "again.ckpt")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"coordinate_code": "dct"}, "coordinate_code is dct, the published code has cosine"),
        ({"field_norm": "fc1_fc2"}, "field_norm is fc1_fc2, the published code has fc1"),
        ({"text_padding": "masked"}, "text_padding is masked, the published code has published"),
        ({"round_text": False}, "round_text is False, the published code has True"),
        ({"prediction": "image"}, "prediction is image, the published code has velocity"),
        ({"field_blocks": 0}, "field_blocks is 0"),
        ({"task": "class"}, "field_norm is fc1, the published code has fc1_fc2_out"),
        ({"task": "class", "field_norm": "fc1_fc2_out"}, "coordinate_code is cosine, the published code has dct"),
    ],
)
def test_what_the_published_code_would_compute_otherwise_is_not_exported(tmp_path: Path, change: Any, why: str):
    sizes: dict[str, Any] = {"hidden": 8, "heads": 1, "blocks": 1, "text_blocks": 1, "text_dim": 4, "text_tokens": 3}
    sizes |= {"classes": 3, "patch_size": 4, "field_channels": 4, "coordinate_code": "cosine", "field_norm": "fc1"}
    sizes |= {"round_text": True}
    models.save(tmp_path / "mine", PixNerd(ModelConfig(**sizes | change)))
    with pytest.raises(CheckpointError, match=why):
        export_folder(tmp_path / "mine", tmp_path / "file.ckpt")
    assert not (tmp_path / "file.ckpt").exists()


def test_what_only_training_or_drawing_decides_is_no_hindrance(tmp_path: Path):
    config = golden.network("t2i").config
    config = config.model_copy(update={"open_gates": True, "fixed_grid": True, "image_size": 32})
    net = PixNerd(config)
    models.save(tmp_path / "mine", net, {"text_encoder": "text"})
    facts = export_folder(tmp_path / "mine", tmp_path / "file.ckpt")
    assert facts["prefixes"] == ["ema_denoiser."]
    assert facts["left_out"] == ["text"]
    import_file(tmp_path / "file.ckpt", tmp_path / "again", trained_size=32)
    assert same(models.load(tmp_path / "again").state_dict(), net.state_dict())


def test_a_head_of_another_shape_is_not_exported(tmp_path: Path):
    import_file(write(tmp_path / "model.ckpt", state("t2i", head=True)), tmp_path / "out")
    path = tmp_path / "out" / "repa.safetensors"
    head: State = load_file(path)
    save_file({name: tensor for name, tensor in head.items() if name != "2.bias"}, path)
    with pytest.raises(CheckpointError, match=r"repa\.safetensors has no published layout: 2\.bias is missing"):
        export_folder(tmp_path / "out", tmp_path / "again.ckpt")
    assert not (tmp_path / "again.ckpt").exists()
