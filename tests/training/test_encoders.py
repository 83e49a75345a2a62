from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from infra.errors import CheckpointError
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
    ids, mask = encoder.tokenize([caption])
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
