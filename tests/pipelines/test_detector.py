"""GenEval's judge of real pictures: mmdetection's Mask2Former and CLIP, small and random, by the real loading code."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pictures
from torch import Tensor

from infra.config import parse
from infra.errors import CheckpointError, EvaluationError, SettingsError
from pipelines.evaluation import geneval
from pipelines.evaluation.detector import colours, mask2former, published, settings
from pipelines.evaluation.detector.loading import load
from pipelines.evaluation.detector.objects import COLOURS, OBJECTS
from pipelines.evaluation.detector.resize import Image, fitting, resized
from pipelines.evaluation.detector.settings import DetectorSettings
from pipelines.evaluation.judges import BatchJudge, Detection
from pipelines.evaluation.run import GenevalSettings, outside, stage_of
from tests.data_prep.small_scorers import build_clip
from tests.pipelines import small_detector

SURE = 12.0  # so that some classes are above the thresholds


def pattern(height: int, width: int) -> Image:
    y, x, c = np.ogrid[:height, :width, :3]
    return ((y * y * 37 + x * x * 101 + x * y * 13 + c * 71 + (x * 31) // 7) % 256).astype(np.uint8)


def picture(height: int, width: int, seed: int = 0) -> Image:
    """A few large blots."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Pictures.fromarray(coarse).resize((width, height), Pictures.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_detector.write(tmp_path_factory.mktemp("weights") / "mask2former.pth", sure=SURE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "clip"
    build_clip(folder)
    return folder


@pytest.fixture(scope="module")
def detector(weights: Path) -> mask2former.Mask2Former:
    return mask2former.Mask2Former(weights)


# ------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("before", "after", "opencv"),  # the sha256 of what OpenCV 4.10 and 5.0 make of the pattern
    [
        ((64, 64), (800, 800), "2ef0b51537c9756c"),
        ((48, 72), (800, 1200), "03433e9ec59c01e6"),
        ((30, 90), (444, 1333), "d9b709a450b00803"),
        ((100, 151), (33, 50), "abdeb10ab0724bd2"),
        ((1, 2), (5, 7), "59e7761faf8fff3a"),
    ],
)
def test_pictures_are_resized_as_opencv_does_it(before: tuple[int, int], after: tuple[int, int], opencv: str):
    assert hashlib.sha256(resized(pattern(*before), *after).tobytes()).hexdigest()[:16] == opencv


def test_pictures_fit_into_800_by_1333():
    sizes = {(512, 512): (800, 800), (512, 768): (800, 1200), (1024, 1024): (800, 800), (400, 300): (1067, 800)}
    sizes |= {(100, 300): (444, 1333), (900, 300): (1333, 444)}
    assert {before: fitting(*before, mask2former.SHORT, mask2former.LONG) for before in sizes} == sizes


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_a_fitted_picture_touches_a_limit(height: int, width: int):
    fitted = fitting(height, width, 800, 1333)
    assert min(fitted) <= 800 and max(fitted) <= 1333
    assert min(fitted) == 800 or max(fitted) == 1333


def test_the_padding_is_grey_before_pictures_are_normalised():
    x = mask2former.prepared(pattern(33, 64))
    assert x.shape == (3, 64, 64)
    grey = (128 - np.array(mask2former.MEAN)) / np.array(mask2former.STD)
    assert np.allclose(x[:, 33:].numpy(), grey[:, None, None], atol=1e-6)
    assert not np.allclose(x[:, 32].numpy(), grey[:, None], atol=1e-2)


# ------------------------------------------------------------------------------------------------- detections


def stretched(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, with pixels as areas, in float64: what mmdetection makes masks larger or smaller with."""
    for axis, size in ((-2, height), (-1, width)):
        before = x.shape[axis]
        place = np.maximum((np.arange(size) + 0.5) * before / size - 0.5, 0)
        first = np.floor(place).astype(int)
        share = (place - first).reshape([-1 if n == axis else 1 for n in (-2, -1)])
        x = x.take(first, axis) * (1 - share) + x.take(np.minimum(first + 1, before - 1), axis) * share
    return x


def by_hand(net: Any, image: Image) -> list[tuple[int, float, tuple[float, ...], np.ndarray]]:
    """mmdetection's preparation, and its reading of instances, in float64; between them the network in float32."""
    scale = min(1333 / max(image.shape[:2]), 800 / min(image.shape[:2]))
    height, width = (int(side * scale + 0.5) for side in image.shape[:2])
    rows, columns = math.ceil(height / 32) * 32, math.ceil(width / 32) * 32
    padded = np.full((rows, columns, 3), 128.0)
    padded[:height, :width] = resized(image, height, width)
    x = (padded - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    with torch.no_grad():
        out = net(pixel_values=torch.from_numpy(x.transpose(2, 0, 1)[None]).float())
    logits = out.class_queries_logits[0].double().numpy()
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    scores = (odds / odds.sum(-1, keepdims=True))[:, :-1]
    masks = stretched(out.masks_queries_logits[0].double().numpy(), rows, columns)[:, :height, :width]
    masks = stretched(masks, *image.shape[:2])
    pairs = sorted(np.ndindex(scores.shape), key=lambda pair: -scores[pair])[:100]
    found = []
    for query, label in pairs:
        inside = masks[query] > 0
        sure = (inside / (1 + np.exp(-masks[query]))).sum() / (inside.sum() + 1e-6)
        ys, xs = np.nonzero(inside)
        box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(ys) else (0, 0, 0, 0)
        found.append((label, scores[query, label] * sure, tuple(map(float, box)), inside))
    return found


@pytest.mark.parametrize("size", [(96, 96), (80, 120), (120, 80)], ids=str)
def test_detections_equal_a_plain_rewrite_of_mmdetection(detector: mask2former.Mask2Former, size: tuple[int, int]):
    image = picture(*size)
    [found] = detector.detect([image])
    plain = by_hand(detector.net, image)
    assert len(found.scores_N) == 100
    assert found.labels_N.tolist() == [label for label, *_ in plain]
    assert np.allclose(found.scores_N.numpy(), [score for _, score, *_ in plain], atol=1e-4, rtol=0)
    assert np.allclose(found.boxes_N4.numpy(), [box for *_, box, _ in plain], atol=1e-4, rtol=0)
    assert found.masks_NHW.shape == (100, *size)
    assert np.array_equal(found.masks_NHW.numpy(), np.stack([mask for *_, mask in plain]))
    assert 0 < found.masks_NHW.float().mean() < 1, "a test of empty or full masks shows nothing"


def test_pictures_of_several_sizes_are_detected_as_each_alone(detector: mask2former.Mask2Former):
    images = [picture(64, 96, 1), picture(96, 96, 2), picture(64, 96, 3)]
    for found, image in zip(detector.detect(images), images, strict=True):
        [alone] = detector.detect([image])
        assert found.labels_N.tolist() == alone.labels_N.tolist()
        assert torch.allclose(found.scores_N, alone.scores_N, atol=1e-4, rtol=0)
        assert found.masks_NHW.shape[1:] == image.shape[:2]


def test_an_empty_mask_has_no_score_and_no_box():
    classes, masks = torch.zeros(2, 81), torch.full((2, 8, 8), -5.0)
    classes[0, 3] = classes[1, 5] = 20.0
    masks[1, 2:5, 1:4] = 5.0
    found = mask2former.read(classes, masks, (32, 32), (32, 32), (32, 32))
    first, second = ((found.labels_N == label).nonzero()[0, 0] for label in (3, 5))
    assert found.scores_N[first] == 0 and found.boxes_N4[first].tolist() == [0, 0, 0, 0]
    assert found.scores_N[second] > 0.9 and found.boxes_N4[second, 0] > 0


# ------------------------------------------------------------------------------------------------- mmdetection's file


def test_a_converted_checkpoint_gives_the_logits_of_its_own_layout(weights: Path):
    net = mask2former._load(weights).eval().double()
    x_B3HW = torch.randn(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = net(pixel_values=x_B3HW)
    classes, masks = small_detector.ByHand(small_detector.state(sure=SURE)).logits(x_B3HW)
    assert torch.allclose(out.class_queries_logits, classes, atol=1e-9)
    assert torch.allclose(out.masks_queries_logits, masks, atol=1e-9)


def test_each_kind_of_block_gives_what_it_gives_in_its_own_layout(weights: Path):
    net, hand = mask2former._load(weights).eval().double(), small_detector.ByHand(small_detector.state(sure=SURE))
    swin, decoder = net.model.pixel_level_module.encoder.swin.encoder, net.model.transformer_module.decoder

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    x = some(1, 7, 11, 8)
    for number, shift in ((0, 0), (1, 1)):
        ours, _ = swin.layers[0].blocks[number](x.flatten(1, 2), (7, 11), always_partition=True)
        plain = hand.swin_block(f"backbone.stages.0.blocks.{number}", x, small_detector.HEADS[0], shift)
        assert torch.allclose(ours, plain.flatten(1, 2), atol=1e-9)
    merged = swin.layers[0].downsample(x.flatten(1, 2), (7, 11))
    assert torch.allclose(merged, hand.merged("backbone.stages.0.downsample", x).flatten(1, 2), atol=1e-9)

    features = [some(1, 8 * 2**level, 16 >> level, 24 >> level) for level in range(4)]
    pixels = net.model.pixel_level_module.decoder(features)
    plain_pixels, plain_levels = hand.pixel_decoder(features)
    assert torch.allclose(pixels.mask_features, plain_pixels, atol=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(pixels.multi_scale_features, plain_levels, strict=True))

    query, own, seen, at = some(1, 7, 32), some(1, 7, 32) * 2, some(1, 12, 32), small_detector.position(3, 4)[None]
    hidden = some(1, 7, 12) > 1
    turned = [t.transpose(0, 1) for t in (query, own, seen, at)]
    ours = decoder.layers[1](
        turned[0], 0, None, [turned[3]], turned[1], [turned[2]], encoder_attention_mask=hidden.repeat(2, 1, 1)
    )
    plain = hand.decoder_layer("panoptic_head.transformer_decoder.layers.1", query, own, seen, at, hidden)
    assert torch.allclose(ours[0].transpose(0, 1), plain, atol=1e-9)


def rewritten(weights: Path, path: Path, **changes: Tensor | None) -> Path:
    state = small_detector.state() | changes
    torch.save({"state_dict": {name: tensor for name, tensor in state.items() if tensor is not None}}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"panoptic_head.new.weight": torch.zeros(3)}, "holds 1 tensors .* panoptic_head.new.weight"),
        (
            {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": torch.zeros(9, 9, dtype=torch.long)},
            "relative_position_index",
        ),
        ({"panoptic_head.mask_embed.4.bias": None}, "lacks 1 tensors of .*mask_embedder.2.0.bias"),
        ({"panoptic_head.cls_embed.weight": torch.zeros(4, 32)}, "is no Mask2Former"),
        ({"panoptic_head.query_feat.weight": None}, "has no tensor .*query_feat"),
    ],
)
def test_tensors_that_are_unknown_or_missing_are_named(
    weights: Path, tmp_path: Path, changes: dict[str, Tensor | None], message: str
):
    with pytest.raises(CheckpointError, match=message):
        mask2former._load(rewritten(weights, tmp_path / "other.pth", **changes))


def test_every_tensor_of_the_checkpoint_has_a_place():
    named = published.converted(small_detector.state(), Path("it"))
    used = sum(tensor.numel() for tensor in named.values())
    indexes = [t for name, t in small_detector.state().items() if name.endswith("relative_position_index")]
    assert used == sum(t.numel() for t in small_detector.state().values()) - sum(t.numel() for t in indexes)


def test_a_missing_file_says_what_to_download_its_sha256_and_where_to_put_it(tmp_path: Path):
    with pytest.raises(CheckpointError) as error:
        settings.identity(DetectorSettings(weights=str(tmp_path / "weights.pth")))
    said = str(error.value)
    assert said.startswith(f"there is no file {tmp_path / 'weights.pth'}: download https://download.openmmlab.com/")
    assert "20220504_001756-743b7d99.pth (its sha256 begins with 743b7d99" in said and said.endswith("put it there")
    assert "\n" not in said


def test_a_file_that_is_not_what_its_name_tells_is_refused(weights: Path, tmp_path: Path):
    damaged = tmp_path / "mask2former-743b7d99.pth"
    damaged.write_bytes(weights.read_bytes())
    with pytest.raises(CheckpointError, match=r"is damaged: its sha256 is .* and begins with 743b7d99"):
        mask2former._load(damaged)
    torn = tmp_path / "torn.pth"
    torn.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        mask2former._load(torn)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path):
    class Harmful:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return exec, ("raise SystemExit('it ran')",)

    torch.save({"state_dict": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        mask2former._load(tmp_path / "bad.pth")


def test_a_folder_in_transformers_layout_is_loaded_too(weights: Path, tmp_path: Path):
    net = mask2former._load(weights)
    net.save_pretrained(tmp_path / "folder")
    again = mask2former._load(tmp_path / "folder")
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in again.state_dict().items())


# ------------------------------------------------------------------------------------------------- colours


def seen(label: str, box: tuple[float, float, float, float], mask: np.ndarray) -> Detection:
    return Detection(label, 0.9, box, mask)


def test_a_crop_is_grey_where_the_mask_is_not():
    image, mask = picture(40, 60), np.zeros((40, 60), np.bool_)
    mask[10:20, 15:40] = True
    mask[12, 20] = False
    crop = np.asarray(colours.crop(image, seen("cup", (15, 10, 40, 20), mask)))
    assert crop.shape == (10, 25, 3)
    assert crop[2, 5].tolist() == [0x99] * 3
    assert np.array_equal(crop[0], image[10, 15:40])


def test_colours_equal_a_plain_computation_one_crop_at_a_time(clip: Path):
    judged = DetectorSettings(weights="none", clip=str(clip))
    clips = colours.ClipColours(judged.clip_settings)
    labels = ["cup", "tv remote", "cup"]
    whole = np.ones((30, 30), np.bool_)
    objects = [(picture(30, 30, n), seen(labels[n % 3], (2, 3, 28, 29), whole)) for n in range(20)]
    plain = []
    for image, detection in objects:
        with torch.no_grad():
            x = clips.preprocess(Pictures.fromarray(image[3:29, 2:28]))[None]
            feature = clips.model.encode_image(x)[0].double()
            scores = []
            for colour in COLOURS:
                texts = [f"a photo of a {colour} {detection.label}", f"a photo of a {colour}-colored {detection.label}"]
                rows = clips.model.encode_text(clips.tokenize([*texts, f"a photo of a {colour} object"])).double()
                mean = (rows / rows.norm(dim=-1, keepdim=True)).mean(0)
                scores.append(float(feature @ mean / mean.norm() / feature.norm()))
        plain.append(COLOURS[int(np.argmax(scores))])
    assert clips.colours(objects) == plain
    assert len(set(plain)) > 1
    assert set(clips._texts) == {"cup", "tv remote"}, "the texts are encoded once a class"


# ------------------------------------------------------------------------------------------------- settings


def test_the_judge_is_a_setting_and_its_weights_count(weights: Path, clip: Path, tmp_path: Path):
    def asked(path: Path, **more: Any) -> GenevalSettings:
        judge = {"kind": "mask2former", "weights": str(path), "clip": str(clip), **more}
        return parse(GenevalSettings, {"judge": judge, "per_task": 2})

    moved, other = tmp_path / "moved.pth", small_detector.write(tmp_path / "other.pth", seed=3)
    moved.write_bytes(weights.read_bytes())
    plain = parse(GenevalSettings, {"per_task": 2})
    assert plain.judge == "shapes" and plain.chosen() == {"judge": "shapes", "per_task": 2}
    stages = [
        stage_of("net", s) for s in (asked(weights), asked(moved), asked(other), asked(weights, tf32=True), plain)
    ]
    assert stages[0] == stages[1] and len(set(stages)) == 4
    assert outside(asked(weights)) == outside(asked(moved)) != outside(asked(other))
    names = [settings.name_of(asked(path).judge) for path in (weights, moved, other)]
    assert names[0] == names[1] != names[2] and names[0].startswith("mask2former-")
    sha256 = settings.identity(asked(weights).judge)
    assert sha256 is not None and sha256["mask2former"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_a_judge_that_is_none_is_refused():
    with pytest.raises(SettingsError, match="judge"):
        parse(GenevalSettings, {"judge": "mask2former"})
    with pytest.raises(SettingsError, match="weights"):
        parse(GenevalSettings, {"judge": {"kind": "mask2former"}})


# ------------------------------------------------------------------------------------------------- the whole judge


def test_the_judge_finds_names_and_colours_by_the_real_loading_code(weights: Path, clip: Path):
    judged = DetectorSettings(weights=str(weights), clip=str(clip), batch=2)
    judge = load(judged, "cpu")
    assert isinstance(judge, BatchJudge) and judge.batch == 2
    images = [picture(64, 96, 1), picture(64, 64, 2)]
    for found, image in zip(judge.detections(images), images, strict=True):
        assert len(found) == 100 and [d.score for d in found] == sorted((d.score for d in found), reverse=True)
        best = found[0]
        assert best.label in OBJECTS and best.score > geneval.THRESHOLD
        assert best.mask_HW.shape == image.shape[:2] and found[-1].mask_HW.size == 0
        assert judge.colour(image, best) in COLOURS
        assert judge.detect(image)[0].label == best.label


def test_a_gpu_that_is_too_small_ends_the_work_instead_of_counting_pictures_as_wrong(
    weights: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
):
    judge = load(DetectorSettings(weights=str(weights), clip=str(clip)), "cpu")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(mask2former.Mask2Former, "detect", full)
    with pytest.raises(EvaluationError, match=r"too little memory for 1 pictures at once.* lower judge\.batch"):
        judge.detections([picture(64, 64)])


def test_clip_weights_that_cannot_be_had_are_told_in_one_line(weights: Path, monkeypatch: pytest.MonkeyPatch):
    import open_clip

    def unreachable(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to download weights for tag 'openai'")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", unreachable)
    with pytest.raises(CheckpointError) as caught:
        load(DetectorSettings(weights=str(weights)), "cpu")
    assert "vit_large_patch14_clip_224.openai" in caught.value.remedy and "judge.clip" in caught.value.remedy
    with pytest.raises(CheckpointError, match=r"there is no file nowhere\.pt"):
        settings.identity(DetectorSettings(weights=str(weights), clip="nowhere.pt"))


def test_tf32_is_off_unless_asked(weights: Path, clip: Path):
    for asked in (True, False):
        load(DetectorSettings(weights=str(weights), clip=str(clip), tf32=asked), "cpu")
        assert torch.backends.cudnn.allow_tf32 is asked and torch.backends.cuda.matmul.allow_tf32 is asked
