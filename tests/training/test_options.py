"""Options of the objective: each changes what it should and nothing else, and left out it changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from infra.config import parse
from infra.errors import CheckpointError, SettingsError
from tests.training import small_run
from training import model as models
from training import sampling
from training.diffusion.draws import draw, words
from training.diffusion.prediction import image_of_velocity, velocity_of_image
from training.diffusion.samplers import noise_for
from training.diffusion.settings import ObjectiveSettings, PerceptualSettings, RoutingSettings
from training.encoders import hub, vision
from training.encoders import lpips as lpips_module
from training.encoders.lpips import BLOCKS, Lpips
from training.encoders.shapes import LpipsShape, tiny_vision
from training.encoders.vision import VisionEncoder
from training.loader.batches import Batch
from training.model import ModelConfig, PixNerd, Text
from training.model.repa_head import RepaHead
from training.model.routing import Route
from training.perceptual import Perceptual
from training.sampling import Artist, SampleSettings
from training.settings import TrainSettings
from training.step import Inputs, Preparer, Trained, drawn

CONFIG = ModelConfig(**(small_run.MODEL | {"image_size": 32, "blocks": 4, "prediction": "image"}))
SHAPE, PATCHES = (3, 32, 32), 16
WIDTHS = (4, 6, 8, 8, 8)


@pytest.fixture(scope="module")
def lpips_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_run.write_lpips(tmp_path_factory.mktemp("lpips") / "own", WIDTHS)


@pytest.fixture(scope="module")
def eye(tmp_path_factory: pytest.TempPathFactory) -> VisionEncoder:
    folder = tmp_path_factory.mktemp("vision")
    vision.build_tiny(folder, hidden=16, layers=2, heads=2, patch_size=4, image_size=16)
    return VisionEncoder(folder)


def network(seed: int = 0, **changes: Any) -> PixNerd:
    """With an output layer that is not zero, so that gradients arrive everywhere."""
    torch.manual_seed(seed)
    net = PixNerd(CONFIG.model_copy(update=changes))
    assert net.field is not None
    torch.nn.init.normal_(net.field.out.weight, std=0.1)
    return net


def caption(images: int) -> Text:
    features = torch.randn(images, CONFIG.text_tokens, CONFIG.text_dim, generator=torch.Generator().manual_seed(1))
    return Text(features, torch.arange(CONFIG.text_tokens) < torch.arange(3, 3 + images)[:, None])


def routing(shape: tuple[int, ...]) -> tuple[int, int]:
    return PATCHES, RoutingSettings(share=0.5).kept(PATCHES)


def test_an_objective_without_options_is_what_it_was():
    plain, explicit = draw(3, range(40), SHAPE, shift=2.0), draw(3, range(40), SHAPE, shift=2.0, mean=0, deviation=1)
    assert all(torch.equal(a, b) for a, b in zip(plain, explicit, strict=True))
    assert plain.kept_BM.shape == (40, 0)
    objective = ObjectiveSettings()
    assert objective.aligns(10**9)
    assert not objective.perceptual.any


# Times


def test_times_have_the_mean_and_deviation_that_are_asked_for():
    plain = draw(0, range(20_000), (1, 2, 2))
    moved = draw(0, range(20_000), (1, 2, 2), mean=-0.8, deviation=0.5)
    logit = torch.logit(moved.t_B.double())
    assert abs(float(logit.mean()) + 0.8) < 0.02
    assert abs(float(logit.std()) - 0.5) < 0.02
    torch.testing.assert_close(logit, -0.8 + 0.5 * torch.logit(plain.t_B.double()), rtol=1e-3, atol=1e-3)
    assert torch.equal(plain.bits_BN, moved.bits_BN)
    assert torch.equal(plain.drop_B, moved.drop_B)


# Noise


def batch_of(images: int, **changes: Any) -> Batch:
    drawn = draw(0, range(images), SHAPE, routing=changes.get("routing"))
    return Batch(
        images_BCHW=torch.randint(0, 256, (images, *SHAPE), dtype=torch.uint8),
        weight_B=torch.ones(images),
        bits_BN=drawn.bits_BN,
        t_B=drawn.t_B,
        kept_BM=drawn.kept_BM,
        ids_BT=torch.zeros(images, 4, dtype=torch.int64),
        mask_BT=torch.ones(images, 4, dtype=torch.int64),
        truncated_B=torch.zeros(images, dtype=torch.bool),
        captions=[""] * images,
        positions=np.arange(images),
        lengths=np.full(images, 4),
    )


def preparer(vision: VisionEncoder | None, objective: ObjectiveSettings, **changes: Any) -> Preparer:
    return Preparer(torch.device("cpu"), None, vision, CONFIG.model_copy(update=changes), objective)


def test_noise_is_scaled_in_training_and_in_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain, twice = (
        preparer(None, ObjectiveSettings(repa=0), noise_scale=scale)(batch_of(8), 0).noise_BCHW for scale in (1.0, 2.0)
    )
    assert torch.equal(twice, 2 * plain)
    assert float(twice.var()) == pytest.approx(4, rel=0.05)

    starts: list[Tensor] = []

    def solve(velocity: Any, x: Tensor, times: Any, watch: Any) -> Tensor:
        starts.append(x)
        return x

    monkeypatch.setattr(sampling, "solver", lambda name: solve)
    for scale in (1.0, 3.0):
        folder = tmp_path / str(scale)
        models.save(
            folder,
            PixNerd(
                ModelConfig(
                    task="class",
                    hidden=8,
                    heads=2,
                    blocks=1,
                    image_size=16,
                    patch_size=8,
                    classes=3,
                    field_channels=8,
                    noise_scale=scale,
                )
            ),
        )
        written = json.loads((folder / "config.json").read_text())["model"]
        assert written.get("noise_scale") == (None if scale == 1 else scale)  # files of before are not changed
        Artist.load(folder).draw([1, 2], [7, 8], SampleSettings(steps=1))
    noise = torch.stack([noise_for(seed, (3, 16, 16)) for seed in (7, 8)])
    assert torch.equal(starts[0], noise)
    assert torch.equal(starts[1], 3 * noise)


# Token routing


def test_a_route_follows_from_the_position_alone_and_is_fair():
    many = draw(5, range(4000), SHAPE, routing=routing)
    assert many.kept_BM.shape == (4000, 8)
    assert bool((many.kept_BM.diff(dim=1) > 0).all())
    assert torch.equal(draw(5, range(100, 200), SHAPE, routing=routing).kept_BM, many.kept_BM[100:200])
    plain = draw(5, range(4000), SHAPE)
    assert torch.equal(plain.bits_BN, many.bits_BN)
    assert torch.equal(plain.t_B, many.t_B)
    assert torch.equal(plain.drop_B, many.drop_B)
    often = torch.bincount(many.kept_BM.flatten(), minlength=PATCHES) / 4000
    assert bool(((often - 0.5).abs() < 5 * 0.5 / 4000**0.5).all())
    assert len(torch.unique(many.kept_BM, dim=0)) > 3000  # of 12,870


def test_a_route_keeps_its_share_of_the_patches_of_each_size():
    objective = ObjectiveSettings(routing=RoutingSettings(share=0.5))
    for config, patches in ((CONFIG, 32), (CONFIG.model_copy(update={"fixed_grid": True}), PATCHES)):
        bits_BN = torch.empty(40, words((3, 32, 64)), dtype=torch.int16)
        kept_BM = drawn(objective, config, 0)(range(40), (3, 32, 64), bits_BN=bits_BN).kept_BM
        assert kept_BM.shape == (40, patches // 2)
        assert int(kept_BM.max()) == patches - 1


def test_routed_tokens_come_back_as_they_went():
    net, images = network(), torch.randn(3, *SHAPE)
    kept = draw(0, range(3), SHAPE, routing=routing).kept_BM
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(index: int) -> Any:
        def see(_: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            seen[index] = given[0], out

        return see

    for index, block in enumerate(net.trunk, start=1):
        block.register_forward_hook(watch(index))
    with torch.no_grad():
        net(images, torch.rand(3), caption(3), route=Route(kept, 2, 3))
    assert [len(seen[index][0][0]) for index in (1, 2, 3, 4)] == [16, 8, 8, 16]
    before, after = seen[1][1], seen[4][0]
    is_kept = torch.zeros(3, PATCHES, dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal(after[~is_kept], before[~is_kept])
    assert torch.equal(after[is_kept].view(3, 8, -1), seen[3][1])
    assert not torch.isclose(after[is_kept], before[is_kept]).all()


def test_a_route_that_keeps_all_tokens_is_none_and_images_do_not_meet():
    """Positions and captions of the kept tokens are those of their own image."""
    net, images, t = network(), torch.randn(3, *SHAPE), torch.rand(3)
    with torch.no_grad():
        everything = Route(torch.arange(PATCHES).expand(3, -1), 2, 3)
        routed, plain = net(images, t, caption(3), route=everything), net(images, t, caption(3))
        torch.testing.assert_close(routed, plain, rtol=1e-4, atol=1e-5)
        kept = draw(0, range(3), SHAPE, routing=routing).kept_BM
        together = net(images, t, caption(3), route=Route(kept, 2, 3))
        assert isinstance(together, Tensor)
        for i in range(3):
            features, mask, _ = caption(3)
            assert mask is not None
            text = Text(features[i : i + 1], mask[i : i + 1])
            alone = net(images[i : i + 1], t[i : i + 1], text, route=Route(kept[i : i + 1], 2, 3))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def inputs(images: int, kept: Tensor, **changes: Any) -> Inputs:
    torch.manual_seed(4)
    given: dict[str, Any] = {
        "images_BCHW": torch.rand(images, *SHAPE) * 2 - 1,
        "weight_B": torch.ones(images),
        "ids_BT": torch.zeros(0),
        "mask_BT": torch.zeros(0),
        "truncated_B": torch.zeros(images, dtype=torch.bool),
        "lengths": [],
        "noise_BCHW": torch.randn(images, *SHAPE),
        "t_B": torch.tensor([0.1, 0.5, 0.9])[:images],
        "condition": caption(images),
        "features_BNV": None,
        "kept_BM": kept,
        "aligned": False,
    }
    return Inputs(**(given | changes))


NONE = torch.zeros(3, 0, dtype=torch.int64)


def test_gradients_arrive_through_a_route_and_at_its_aligned_block(eye: VisionEncoder):
    net, head = network(), RepaHead(CONFIG.hidden, eye.width)
    settings = ObjectiveSettings(repa=0.5, repa_block=2, routing=RoutingSettings(share=0.5, blocks=(2, 3)))
    kept = draw(0, range(3), SHAPE, routing=routing).kept_BM
    features = torch.randn(3, PATCHES, eye.width)
    loss, report = Trained(net, head, None, settings)(inputs(3, kept, features_BNV=features, aligned=True))
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.trunk.parameters())
    assert all(p.grad is not None for p in head.parameters())
    assert report.means.keys() == {"repa/cosine", "repa/cosine_shuffled"}
    # Features of patches that the block does not see play no part.
    others = features.clone()
    others[torch.ones(3, PATCHES, dtype=torch.bool).scatter(1, kept, False)] = 99.0
    again, _ = Trained(net, head, None, settings)(inputs(3, kept, features_BNV=others, aligned=True))
    assert torch.equal(loss, again)


# REPA for a while


def test_the_vision_encoder_does_not_run_once_alignment_ends(eye: VisionEncoder):
    calls = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1

    handle = eye.register_forward_hook(counted)
    try:
        prepare = preparer(eye, ObjectiveSettings(repa=0.5, repa_until=3))
        given = [prepare(batch_of(2), step) for step in range(5)]
    finally:
        handle.remove()
    assert [each.aligned for each in given] == [True, True, True, False, False]
    assert [each.features_BNV is not None for each in given] == [True, True, True, False, False]
    assert calls == 3
    watching = ObjectiveSettings(repa=0.5, repa_until=1, perceptual=PerceptualSettings(dino=0.1))
    late = preparer(eye, watching)(batch_of(2), 7)
    assert late.features_BNV is not None
    assert not late.aligned


# Perceptual losses


def by_hand(folder: Path, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Zhang et al. 2018, Eq. 1, in float64 and with loops over everything but pixels and channels."""
    weights = load_file(folder / "vgg16.safetensors") | torch.load(folder / "vgg.pth", weights_only=True)
    plain = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def features(image: np.ndarray) -> list[np.ndarray]:
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        image, taken = (image - shift[:, None, None]) / scale[:, None, None], []
        for number, block in enumerate(BLOCKS):
            if number:
                _, height, width = image.shape
                image = image.reshape(-1, height // 2, 2, width // 2, 2).max((2, 4))
            for index in block:
                padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
                height, width = image.shape[1:]
                image = plain[f"features.{index}.bias"][:, None, None] + sum(
                    np.einsum(
                        "oi,ihw->ohw",
                        plain[f"features.{index}.weight"][:, :, row, column],
                        padded[:, row : row + height, column : column + width],
                    )
                    for row in range(3)
                    for column in range(3)
                )
                image = np.maximum(image, 0)
            taken.append(image / (np.sqrt((image**2).sum(0)) + 1e-10))
        return taken

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return sum(
            float((plain[f"lin{k}.model.1.weight"][0] * (a - b) ** 2).sum(0).mean())
            for k, (a, b) in enumerate(zip(features(one), features(other), strict=True))
        )

    return np.array([distance(one, other) for one, other in zip(x, y, strict=True)])


def test_lpips_is_the_published_formula(lpips_folder: Path):
    lpips, (x, y) = Lpips(lpips_folder), torch.rand(2, 3, *SHAPE) * 2 - 1
    assert torch.equal(lpips(x, x), torch.zeros(3))
    expected = by_hand(lpips_folder, x.double().numpy(), y.double().numpy())
    assert bool((expected > 0.01).all())
    np.testing.assert_allclose(lpips(x, y).numpy(), expected, rtol=1e-3)
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_gives_a_gradient_even_where_nothing_is_seen(lpips_folder: Path, tmp_path: Path):
    weights = load_file(lpips_folder / "vgg16.safetensors")
    blind = {name: t if "weight" in name else torch.full_like(t, -1e3) for name, t in weights.items()}
    save_file(blind, tmp_path / "vgg16.safetensors")
    (tmp_path / "vgg.pth").write_bytes((lpips_folder / "vgg.pth").read_bytes())
    for folder, moved in ((lpips_folder, True), (tmp_path, False)):
        x = torch.rand(1, *SHAPE, requires_grad=True)
        Lpips(folder)(x, torch.rand(1, *SHAPE)).sum().backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
        assert bool(x.grad.abs().sum() > 0) == moved


def test_lpips_reads_the_names_of_its_own_package_and_refuses_what_lacks(lpips_folder: Path, tmp_path: Path):
    weights = load_file(lpips_folder / "vgg16.safetensors")
    heads = torch.load(lpips_folder / "vgg.pth", weights_only=True)
    slices = {index: number for number, block in enumerate(BLOCKS, start=1) for index in block}
    whole = {f"lins.{name[3]}{name[4:]}": tensor for name, tensor in heads.items()}
    for name, tensor in weights.items():
        _, index, part = name.split(".")
        whole[f"net.slice{slices[int(index)]}.{index}.{part}"] = tensor
    whole["scaling_layer.shift"] = torch.zeros(1)
    save_file(whole, tmp_path / "lpips.safetensors")
    x, y = torch.rand(2, 1, *SHAPE)
    assert torch.equal(Lpips(tmp_path)(x, y), Lpips(lpips_folder)(x, y))
    del whole["net.slice3.12.bias"], whole["lins.4.model.1.weight"]
    save_file(whole, tmp_path / "lpips.safetensors")
    with pytest.raises(CheckpointError, match=r"features\.12\.bias is missing; lin4\.model\.1\.weight is missing"):
        Lpips(tmp_path)
    save_file(weights | {"features.5.weight": torch.zeros(6, 5, 3, 3)}, tmp_path / "vgg16.safetensors")
    torch.save(heads, tmp_path / "vgg.pth")
    (tmp_path / "lpips.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"features\.5\.weight is \[6, 5, 3, 3\] instead of \[6, 4, 3, 3\]"):
        Lpips(tmp_path)
    (tmp_path / "vgg.pth").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"vgg\.pth holds no tensors"):
        Lpips(tmp_path)


def test_an_images_velocity_gives_the_image_back():
    image, x_t, t = torch.randn(4, *SHAPE), torch.randn(4, *SHAPE), torch.tensor([0.0, 0.3, 0.9, 1.0])
    torch.testing.assert_close(image_of_velocity(velocity_of_image(image, x_t, t), x_t, t), image, rtol=1e-5, atol=1e-5)


def test_lpips_of_the_hub_is_named_by_commit_and_fetched_as_encoders_are(
    lpips_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ranks that ask at different times, while a branch moves, must not get different weights."""
    asked: list[str | None] = []

    def download(name: str, revision: str | None, patterns: Iterable[str]) -> Path:
        asked.append(revision)
        commit = tmp_path / (revision if revision not in (None, "main") else "c0ffee")
        shutil.copytree(lpips_folder, commit, dirs_exist_ok=True)
        return commit

    monkeypatch.setattr(hub, "_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert lpips_module.pinned("somebody/lpips@main") == "somebody/lpips@c0ffee"
    assert lpips_module.pinned(str(lpips_folder)) == str(lpips_folder)
    x, y = torch.rand(2, 3, *SHAPE)
    assert torch.equal(Lpips("somebody/lpips@c0ffee")(x, y), Lpips(lpips_folder)(x, y))
    assert asked == ["main", "c0ffee"]


@pytest.mark.parametrize("which", ["lpips", "dino"])
def test_a_perceptual_loss_counts_at_its_times_only(which: str, lpips_folder: Path, eye: VisionEncoder):
    net = network()
    settings = ObjectiveSettings(repa=0, perceptual=parse(PerceptualSettings, {which: 0.5, "times": [0.5, 0.8]}))
    lpips, seen = (Lpips(lpips_folder), None) if which == "lpips" else (None, eye)
    perceptual = Perceptual(settings.perceptual, lpips, seen)
    given = inputs(3, NONE)
    with torch.no_grad():
        given.features_BNV = eye(given.images_BCHW, (4, 4)) if seen else None
    plain, _ = Trained(net, None, None, settings)(given)
    total, report = Trained(net, None, None, settings, perceptual)(given)
    [(name, (sums, count))] = report.means.items()
    assert name == f"perceptual/{which}"
    assert int(count) == 1  # of the times 0.1, 0.5 and 0.9
    torch.testing.assert_close((total - plain).detach(), 0.5 * sums / 3, rtol=1e-3, atol=1e-6)
    assert float(sums) > 0
    t = given.t_B.view(-1, 1, 1, 1)
    image = net(t * given.images_BCHW + (1 - t) * given.noise_BCHW, given.t_B, caption(3))
    assert isinstance(image, Tensor)
    [distance] = perceptual.distances(image, given.images_BCHW, given.features_BNV, (4, 4))
    torch.testing.assert_close(sums, distance.apart_B[1].detach(), rtol=1e-3, atol=1e-6)
    [gradient] = torch.autograd.grad(total - plain, [net.stem.weight])
    [expected] = torch.autograd.grad(0.5 * distance.apart_B[1] / 3, [net.stem.weight])
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(gradient, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
    assert set(Trained(net, None, None, settings, perceptual).state_dict()) == {f"net.{n}" for n in net.state_dict()}


# Settings, and what a run will need


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"perceptual": {"lpips": 0.1}}, "needs model.prediction: image"),
        ({"perceptual": {"dino": 0.1}}, "needs model.prediction: image"),
        ({"perceptual": {"times": [0.5, 0.2]}}, "earlier of the two times"),
        ({"routing": {"share": 0.5, "blocks": [2, 16]}}, "only the first 15 of 16 blocks"),
        ({"routing": {"share": 0.5, "blocks": [5, 4]}}, "must not come after"),
        ({"routing": {"share": 1.0}}, "share"),
        ({"repa_until": 0}, "repa_until"),
        ({"time_deviation": 0}, "time_deviation"),
    ],
)
def test_objectives_that_cannot_be_had_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(SettingsError, match=told):
        parse(TrainSettings, {"preset": "XXL/16-dct", "steps": 1, "batch": 2, "objective": changes})


def saved_bytes(run: Any) -> int:
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


def test_what_perceptual_networks_cost_is_counted(lpips_folder: Path, eye: VisionEncoder):
    shape, lpips = LpipsShape(WIDTHS), Lpips(lpips_folder)
    assert shape.parameters == sum(t.numel() for t in lpips.state_dict().values()) - 6  # but for shift and scale
    assert LpipsShape().parameters == 14_714_688 + 1472  # VGG-16's convolutions, and LPIPS's weights
    assert LpipsShape().forward(224) == pytest.approx(30.7e9, rel=0.01)  # 15.35 GMAC
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        lpips(x, x.detach())
    assert counter.get_total_flops() == 2 * 2 * shape.forward(64)
    own = sum(t.untyped_storage().nbytes() for t in lpips.state_dict().values())
    assert saved_bytes(lambda: lpips(x, x.detach())) - own == pytest.approx(2 * shape.kept(64), rel=0.15)
    told = tiny_vision(16, 2, 4, 16).kept(PATCHES)
    own = sum(p.numel() * 4 for p in eye.parameters())
    images = torch.rand(64, *SHAPE, requires_grad=True)
    assert saved_bytes(lambda: eye(images, (4, 4))) - own == pytest.approx(64 * told, rel=0.25)
