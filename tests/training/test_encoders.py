from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import torch
from huggingface_hub import constants
from torch.nn import functional as F

from infra.errors import CheckpointError, SettingsError
from training.encoders import hub
from training.encoders import text as text_module
from training.encoders import vision as vision_module
from training.encoders.text import TextEncoder
from training.encoders.vision import VisionEncoder

CAPTIONS = ["a red dog sits", "a blue cat on a mat", "two green birds"]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text_module.build_tiny(folder, CAPTIONS, hidden=32, layers=3, heads=2, vocab=300)
    return folder


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    vision_module.build_tiny(folder, hidden=24, layers=2, heads=2, patch_size=4, image_size=20)
    return folder


def test_captions_are_cut_and_padded_and_pads_see_words(text_folder: Path):
    encoder = TextEncoder(text_folder, 6)
    text = encoder.encode(["a red dog sits", "a red", "a red dog sits " * 9])
    assert text.features_RTE.shape == (3, 6, encoder.width)
    assert text.mask_RT is not None
    assert bool(text.mask_RT[2].all())
    pads = text.features_RTE[1][~text.mask_RT[1]]
    assert not torch.allclose(pads[0], pads[1])  # each has its own rotary position
    # A caption's words do not depend on what it is padded with or batched with.
    words = int(text.mask_RT[1].sum())
    alone = TextEncoder(text_folder, words).encode(["a red"]).features_RTE
    torch.testing.assert_close(text.features_RTE[1:2, :words], alone, rtol=1e-4, atol=1e-5)


def test_any_text_survives_the_tokenizer(text_folder: Path):
    encoder = TextEncoder(text_folder, 64)
    caption = "Ünïcode 猫 \t and\nlines 🐈"
    ids, mask, _ = encoder.tokenize([caption])
    assert encoder.tokenizer.decode(ids[0][mask[0].bool()]) == caption
    assert int(ids.max()) < encoder.model.config.vocab_size


def test_the_empty_caption_is_one_vector_wherever_it_stands(text_folder: Path):
    encoder = TextEncoder(text_folder, 6)
    text = encoder.encode(["", "a blue cat"])
    torch.testing.assert_close(text.features_RTE[0], text.features_RTE[0, :1].expand(6, -1))
    torch.testing.assert_close(TextEncoder(text_folder, 1).encode([""]).features_RTE[0], text.features_RTE[0, :1])
    assert text.mask_RT is not None
    assert text.mask_RT[0].tolist() == [True, False, False, False, False, False]


@pytest.mark.parametrize(("layers", "trained"), [(0, ()), (1, ("layers.2.", "norm.")), (3, ("",))])
def test_as_many_layers_learn_as_were_asked_for(text_folder: Path, layers: int, trained: tuple[str, ...]):
    encoder = TextEncoder(text_folder, 6, train_layers=layers)
    features = encoder.encode(["a red dog"]).features_RTE
    assert features.requires_grad == bool(layers)
    if layers:
        features.square().sum().backward()
    for name, parameter in encoder.model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(trained), name


def test_rounded_features_still_teach_the_encoder(text_folder: Path):
    encoder = TextEncoder(text_folder, 6, train_layers=1, rounded=True)
    features = encoder.encode(["a red dog"]).features_RTE
    assert torch.equal(features, features.bfloat16().float())
    features.square().sum().backward()
    assert encoder.model.norm.weight.grad is not None


def test_a_saved_encoder_is_loaded_by_the_same_code(text_folder: Path, tmp_path: Path):
    encoder = TextEncoder(text_folder, 6)
    encoder.save(tmp_path)
    again = TextEncoder(tmp_path, 6)
    assert torch.equal(again.encode(CAPTIONS).features_RTE, encoder.encode(CAPTIONS).features_RTE)
    assert TextEncoder(tmp_path, 6, dtype=torch.bfloat16).encode(CAPTIONS).features_RTE.dtype == torch.bfloat16


def test_tiny_encoders_are_the_same_for_the_same_seed(text_folder: Path, tmp_path: Path):
    text_module.build_tiny(tmp_path, CAPTIONS, hidden=32, layers=3, heads=2, vocab=300)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (text_folder / name).read_bytes()


def test_vision_features_are_transformers_own_at_the_native_grid(vision_folder: Path):
    encoder = VisionEncoder(vision_folder)
    x = torch.rand(2, 3, 40, 40) * 2 - 1
    pixels = F.interpolate((x + 1) / 2, size=(20, 20), mode="bicubic")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    wanted = encoder.model(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder(x, (5, 5)), wanted)


@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 7)])
def test_vision_positions_follow_the_denoisers_grid(vision_folder: Path, grid: tuple[int, int]):
    encoder = VisionEncoder(vision_folder)
    features = encoder(torch.rand(2, 3, 8 * grid[0], 8 * grid[1]) * 2 - 1, grid)
    assert features.shape == (2, grid[0] * grid[1], encoder.width)
    assert not features.requires_grad
    # By hand at one place: the published factor is (grid + 0.1) / side, so sample points lie a little closer.
    table = encoder.model.embeddings.position_embeddings
    square = table[:, 1:].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
    published = F.interpolate(square, scale_factor=[(g + 0.1) / 5 for g in grid], mode="bicubic")
    plain = F.interpolate(square, size=grid, mode="bicubic")
    found = encoder._table(grid)[:, 1:].transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(found, published)
    assert not torch.allclose(found, plain)


@pytest.mark.parametrize("encoder", [lambda path: TextEncoder(path, 6), VisionEncoder])
def test_a_folder_without_an_encoder_is_a_clear_error(encoder: type[VisionEncoder], tmp_path: Path):
    with pytest.raises(CheckpointError, match="no encoder can be loaded"):
        encoder(tmp_path)


MANY = ["a red dog sits", "", "a", "a red dog sits on a mat " * 3, "two green birds", ""]


@pytest.mark.parametrize("needed", ["masked", "published"])
@pytest.mark.parametrize("layers", [0, 1])
def test_what_the_network_looks_at_is_the_same_without_the_other_work(
    text_folder: Path, needed: Literal["masked", "published"], layers: int
):
    whole = TextEncoder(text_folder, 12, train_layers=layers)
    lean = TextEncoder(text_folder, 12, train_layers=layers, needed=needed)
    ours, theirs = lean.encode(MANY), whole.encode(MANY)
    assert ours.mask_RT is not None and theirs.mask_RT is not None
    assert torch.equal(ours.mask_RT, theirs.mask_RT)
    seen = theirs.mask_RT if needed == "masked" else torch.ones_like(theirs.mask_RT)
    torch.testing.assert_close(ours.features_RTE[seen], theirs.features_RTE[seen], rtol=1e-4, atol=1e-5)
    assert bool(ours.features_RTE.isfinite().all())  # a network multiplies with pads, too, before it masks them
    if layers:
        for features in (ours.features_RTE, theirs.features_RTE):
            features[seen].square().sum().backward()
        for (name, one), (_, two) in zip(lean.named_parameters(), whole.named_parameters(), strict=True):
            if two.grad is not None:
                torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("layers", [0, 1])
def test_pads_are_not_encoded_and_the_empty_caption_is_encoded_once(text_folder: Path, layers: int):
    encoder = TextEncoder(text_folder, 12, train_layers=layers, needed="masked")
    rows: list[int] = []
    encoder.model.layers[0].mlp.register_forward_hook(lambda *call: rows.append(call[2].shape[:-1].numel()))
    words = int(encoder.tokenize(MANY).mask_BT.sum())
    encoder.encode(MANY)
    encoder.encode(MANY)
    encoder.encode(["", ""])
    # A trained encoder is called once a batch whatever is in it: ranks that share its weights out wait for each other.
    assert rows == ([words + 1, words + 1, 1] if layers else [words, 1, words])


def test_captions_that_are_cut_are_told(text_folder: Path):
    encoder = TextEncoder(text_folder, 6)
    exact = encoder.tokenizer.decode(encoder.tokenize(["a red dog sits on"]).ids_BT[0])
    captions = ["a", "a red dog sits " * 9, "", exact, "a red dog sits " * 9]
    for _ in range(2):  # the second time they are known already
        assert encoder.tokenize(captions).truncated_B.tolist() == [False, True, False, False, True]


def test_frozen_encoders_compute_in_bf16(text_folder: Path, vision_folder: Path):
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    exact, rounded = (VisionEncoder(vision_folder, dtype=d)(x, (4, 4)) for d in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert F.cosine_similarity(exact, rounded.float(), dim=-1).min() > 0.99
    exact, rounded = (
        TextEncoder(text_folder, 12, dtype=d, needed="masked").encode(CAPTIONS).features_RTE
        for d in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.bfloat16
    words = exact.abs().sum(-1) > 0
    assert F.cosine_similarity(exact[words], rounded[words].float(), dim=-1).min() > 0.99


COMMIT = "c" * 40


def put_into_the_cache(cache: Path, files: Path, *, missing: str = "") -> Path:
    """What the hub's library leaves behind of `me/tiny` at its branch main."""
    home = cache / "models--me--tiny"
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(files, snapshot, ignore=shutil.ignore_patterns(missing), dirs_exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_a_model_of_the_hub_is_taken_by_its_revision(text_folder: Path, cache: Path):
    folder = put_into_the_cache(cache, text_folder)
    assert hub.pinned("me/tiny") == hub.pinned("me/tiny@main") == f"me/tiny@{COMMIT}"
    assert hub.folder_of(f"me/tiny@{COMMIT}") == folder
    named, local = (TextEncoder(source, 6).encode(CAPTIONS) for source in (f"me/tiny@{COMMIT}", text_folder))
    assert torch.equal(named.features_RTE, local.features_RTE)
    with pytest.raises(CheckpointError, match="no encoder can be loaded from me/tiny@other"):
        TextEncoder("me/tiny@other", 6)
    with pytest.raises(SettingsError, match="there is no folder me/tiny@"):
        hub.split("me/tiny@")


def test_a_machine_fetches_a_model_once_and_again_if_a_part_lacks(text_folder: Path, cache: Path):
    put_into_the_cache(cache, text_folder, missing="model.safetensors")  # of a process that was killed
    fetched: list[str | None] = []
    begun = threading.Barrier(4)

    def download(name: str, revision: str | None) -> None:
        fetched.append(revision)
        put_into_the_cache(cache, text_folder)

    def fetch() -> Path:
        begun.wait()
        return hub.folder_of("me/tiny", download)

    with ThreadPoolExecutor(4) as threads:
        folders = {future.result() for future in [threads.submit(fetch) for _ in range(4)]}
    assert fetched == [None]
    assert [path.name for path in folders] == [COMMIT]
