from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch._dynamo.utils import counters

from infra.errors import CheckpointError, SettingsError
from tests.training import small_checkpoint
from training import model as models
from training.diffusion.samplers import noise_for, to_uint8
from training.sampling import Artist, SampleSettings, defaults, resolved, sized

PROMPTS = ["a red circle", "a red circle", "", "two blue squares", "two blue squares", "two blue squares"]
SEEDS = [0, 1, 0, 0, 1, 2]
FEW = SampleSettings(steps=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint.write_text(tmp_path_factory.mktemp("text") / "net")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint.write_class(tmp_path_factory.mktemp("class") / "net")


def few(**changes: Any) -> SampleSettings:
    return FEW.model_copy(update=changes)


def apart(one: np.ndarray, two: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - two).max())


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_picture_does_not_depend_on_its_batch(text: Path, batch: int):
    together = Artist.load(text).draw(PROMPTS, SEEDS, FEW)
    assert together.shape == (6, 16, 16, 3) and together.dtype == np.uint8
    assert apart(Artist.load(text).draw(PROMPTS, SEEDS, few(batch=batch)), together) <= 1
    assert all(apart(one, two) > 20 for one, two in pairwise(together)), "the test's pictures should differ"


def test_the_same_call_gives_the_same_bytes(text: Path):
    one, two = (Artist.load(text).draw(PROMPTS, SEEDS, few(batch=4)) for _ in range(2))
    assert np.array_equal(one, two)


def test_each_caption_is_encoded_once(text: Path):
    artist = Artist.load(text)
    assert artist.text is not None and artist.net.text is not None
    seen: list[tuple[int, ...]] = []
    artist.text.register_forward_pre_hook(lambda module, args: seen.extend(map(tuple, args[0].tolist())))
    rows: list[int] = []
    artist.net.text.proj.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    artist.draw(PROMPTS, SEEDS, few(batch=4))  # the second batch goes on with a prompt of the first
    assert len(seen) == len(set(seen)) == 3
    assert max(rows) == 4, "three captions and nothing, however many images share them"


def test_a_batch_is_what_the_formulas_say(classes: Path):
    net = models.load(classes)
    x = torch.stack([noise_for(seed, (3, 16, 16)) for seed in (3, 4)])
    times = [u / (u + (1 - u) * 2) for u in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    with torch.no_grad():
        for now, then in pairwise(times):
            t = torch.full((2,), now)
            v_c, v_u = net(x, t, torch.tensor([1, 2])), net(x, t, torch.tensor([5, 5]))
            x = x + (v_u + 3.5 * (v_c - v_u) if 0.1 < now < 0.6 else v_c) * (then - now)
    settings = SampleSettings(steps=5, solver="euler", guidance=3.5, interval=(0.1, 0.6), shift=2)
    assert apart(Artist.load(classes).draw([1, 2], [3, 4], settings), to_uint8(x).permute(0, 2, 3, 1).numpy()) <= 1


def test_every_step_is_seen_in_fp32_and_the_last_is_the_picture(text: Path):
    frames: list[Tensor] = []
    for precision in ("fp32", "bf16"):
        frames.clear()
        settings = few(precision=precision)
        artist = Artist.load(text, settings=settings)
        drawn = artist.batch(PROMPTS[:2], [0, 1], settings, lambda step, x: frames.append(x))
        assert [frame.dtype for frame in frames] == [torch.float32] * 3
        assert np.array_equal(to_uint8(frames[-1]).permute(0, 2, 3, 1).numpy(), drawn)


def test_bf16_is_the_networks_weights_and_activations(text: Path):
    settings = few(precision="bf16")
    artist = Artist.load(text, settings=settings)
    assert {parameter.dtype for parameter in artist.net.parameters()} == {torch.bfloat16}
    inside: list[torch.dtype] = []
    artist.net.trunk[0].register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    low, full = artist.draw(PROMPTS, SEEDS, settings), Artist.load(text).draw(PROMPTS, SEEDS, FEW)
    assert set(inside) == {torch.bfloat16}
    assert 0 < np.abs(low.astype(int) - full).mean() < 8


def test_a_checkpoint_keeps_its_own_precision(text: Path, tmp_path: Path):
    net = models.load(text).bfloat16()
    models.save(tmp_path, net, {"text_encoder": str(text / "text")})
    assert resolved(text, FEW).precision == "fp32"
    assert resolved(tmp_path, FEW).precision == "bf16"
    assert resolved(tmp_path, few(precision="fp32")).precision == "fp32"
    assert resolved(tmp_path, FEW).size == (16, 16)
    own, asked = (Artist.load(tmp_path).draw(PROMPTS[:2], [0, 1], settings) for settings in (FEW, few()))
    assert np.array_equal(own, asked)


@pytest.mark.parametrize(
    ("types", "precision"),
    [
        ((torch.float64, torch.float64), "fp32"),
        ((torch.float16, torch.float16), "fp32"),
        ((torch.bfloat16, torch.bfloat16), "bf16"),
        ((torch.bfloat16, torch.float32), "fp32"),
        ((torch.float32, torch.bfloat16), "fp32"),
        ((torch.bfloat16, torch.float16), "fp32"),
    ],
    ids=str,
)
def test_a_checkpoint_of_any_types_is_drawn(classes: Path, tmp_path: Path, types: tuple[Any, Any], precision: str):
    net = models.load(classes).to(types[1])
    net.stem.to(types[0])
    models.save(tmp_path, net)
    assert resolved(tmp_path, FEW).precision == precision
    own, asked = (
        Artist.load(tmp_path, settings=settings).draw([1, 2], [0, 1], settings)
        for settings in (FEW, few(precision=precision))
    )
    assert np.array_equal(own, asked)


def test_features_are_rounded_if_the_network_learnt_them_so(text: Path, tmp_path: Path):
    plain, rounded = (
        Artist.load(small_checkpoint.write_text(tmp_path / str(value), round_text=value)) for value in (False, True)
    )
    assert plain.text is not None and rounded.text is not None
    ours, theirs = plain.text.encode(PROMPTS).features_RTE, rounded.text.encode(PROMPTS).features_RTE
    assert theirs.dtype == torch.float32
    assert not torch.equal(ours, theirs) and torch.equal(ours.bfloat16().float(), theirs)


def test_what_is_no_number_is_no_picture(classes: Path):
    artist = Artist.load(classes)
    with pytest.raises(CheckpointError, match=r"^1 from seed 7 came out as NaN.*: use shift"):
        artist.draw([1], [7], few(shift=1e300))
    assert artist.net.label is not None
    with torch.no_grad():
        artist.net.label.weight[2] = float("nan")
    with pytest.raises(CheckpointError, match=r"^2 from seed 8 "):
        artist.draw([1, 2, 3], [7, 8, 9], FEW)


@pytest.mark.slow
def test_two_graphs_are_compiled_whatever_the_batches(tmp_path: Path):
    text = small_checkpoint.write_text(tmp_path, blocks=1, text_blocks=0)
    torch._dynamo.reset()
    counters.clear()
    settings = few(compile=True, size=(24, 40), batch=4)
    artist = Artist.load(text, settings=settings)
    drawn = artist.draw(PROMPTS, SEEDS, settings)
    assert counters["stats"]["unique_graphs"] == 2, "guided and not; the smaller second batch is filled up"
    assert apart(drawn, Artist.load(text).draw(PROMPTS, SEEDS, few(size=(24, 40)))) <= 1
    frames: list[int] = []
    artist.batch(PROMPTS[:1], [0], settings, lambda step, x: frames.append(len(x)))
    assert frames == [1, 1, 1]
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_a_compiled_batch_is_filled_up_to_what_will_come(text: Path, monkeypatch: pytest.MonkeyPatch):
    """So that whoever draws only the last one draws it as if all had been."""
    monkeypatch.setattr("training.sampling.compile_network", lambda net, replay: None)
    settings = few(compile=True, batch=4)
    artist = Artist.load(text, settings=settings)
    shapes: set[tuple[int, int]] = set()
    artist.net.register_forward_pre_hook(lambda module, args: shapes.add((len(args[0]), len(args[2].y_RTH))))
    artist.expect([PROMPTS[:4], PROMPTS[4:]])
    artist.batch(PROMPTS[4:], SEEDS[4:], settings)
    assert shapes == {(4, 3), (8, 4)}
    artist.batch(PROMPTS, SEEDS, settings)  # nobody said that more would come
    shapes.clear()
    artist.batch(PROMPTS[4:], SEEDS[4:], settings)
    assert shapes == {(6, 3), (12, 4)}


# ------------------------------------------------------------------------------------------------ sizes


def test_another_size_keeps_the_trained_grid(text: Path):
    settings = few(size=(24, 40))
    artist = Artist.load(text, settings=settings)
    drawn = artist.draw(PROMPTS[:2], [0, 1], settings)
    assert drawn.shape == (2, 24, 40, 3)
    assert artist.net.config.fixed_grid
    tokens: list[int] = []
    artist.net.trunk[0].register_forward_hook(lambda module, args, out: tokens.append(out.shape[1]))
    artist.draw(PROMPTS[:1], [0], settings)
    assert set(tokens) == {16}
    plain = artist.draw(PROMPTS[:2], [0, 1], FEW)  # and back again
    assert np.array_equal(plain, Artist.load(text).draw(PROMPTS[:2], [0, 1], FEW))
    assert not artist.net.config.fixed_grid


def test_a_size_that_does_not_fit_is_refused_with_near_ones(text: Path):
    with pytest.raises(SettingsError, match=r"multiples of 4: ask for 24x16 or 24x20"):
        Artist.load(text, settings=few(size=(24, 18)))


def test_without_a_field_the_grid_grows(tmp_path: Path):
    folder = small_checkpoint.write_class(tmp_path, field_blocks=0)
    assert Artist.load(folder).draw([1], [0], few(size=(16, 24))).shape == (1, 16, 24, 3)


def test_a_trained_size_that_nobody_told():
    config = models.preset("tiny").model_copy(update={"image_size": None})
    for size in (None, (32, 64)):
        with pytest.raises(SettingsError, match="--trained-size"):
            sized(config, size)
    told, size = sized(config, (64, 64))
    assert (told.image_size, told.fixed_grid, size) == (64, False, (64, 64))
    with pytest.raises(SettingsError, match="multiples of 8"):
        sized(config, (60, 60))


# ------------------------------------------------------------------------------------------------ settings


def test_the_defaults_are_the_tasks(text: Path, classes: Path):
    assert defaults(text) == SampleSettings()
    found = defaults(classes)
    assert (found.solver, found.steps, found.guidance, found.interval, found.shift) == ("adams2", 50, 3.5, (0.1, 1), 1)


def test_a_checkpoints_own_defaults_go_before_its_tasks_and_the_callers_before_both(tmp_path: Path):
    folder = small_checkpoint.write_class(tmp_path, extra={"sampling": {"interval": [0.3, 1.0], "steps": 100}})
    found = defaults(folder, {"steps": 10})
    assert (found.interval, found.steps, found.guidance) == ((0.3, 1), 10, 3.5)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"steps"', '"stepz"'))
    models.write_sums(tmp_path)
    with pytest.raises(CheckpointError, match=r"extra\.sampling.*stepz"):
        defaults(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"interval": (0.5, 0.1)},
        {"interval": (-1, 1)},
        {"interval": (0, float("nan"))},
        {"solver": "adam2"},
        {"guidance": float("inf")},
        {"shift": 0},
        {"steps": 0},
        {"size": (0, 16)},
        {"precision": "fp8"},
        {"precision": "fp16"},
        {"batch": 0},
    ],
    ids=str,
)
def test_settings_without_sense_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        SampleSettings(**wrong)


def test_what_only_changes_speed_is_no_result():
    assert SampleSettings(batch=1, compile=True).results() == SampleSettings().results()
    assert SampleSettings(precision="bf16").results() != SampleSettings().results()


# ------------------------------------------------------------------------------------------------ what can go wrong


def test_long_prompts_are_told(text: Path, classes: Path):
    long = "circle " * 20
    tokens = Artist.load(text).too_long(["a red circle", long])
    assert tokens.keys() == {long} and tokens[long] > 12
    assert Artist.load(classes).too_long(["1"]) == {}


def test_an_encoder_that_is_not_there(text: Path, tmp_path: Path):
    config = json.loads((text / "config.json").read_text())
    for extra, why in [({}, "does not say"), ({"text_encoder": "text"}, "lacks its text encoder")]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"extra": extra}))
        with pytest.raises(CheckpointError, match=why):
            Artist.load(tmp_path)


def test_an_encoder_of_another_width(text: Path, tmp_path: Path):
    small_checkpoint.write_text(tmp_path, text_dim=16)
    with pytest.raises(CheckpointError, match="features of 32"):
        Artist.load(tmp_path)


def test_prompts_are_not_labels(classes: Path):
    with pytest.raises(CheckpointError, match="not from prompts"):
        Artist.load(classes).draw(["a red circle"], [0], FEW)


def test_too_little_memory_says_what_to_lower(classes: Path):
    artist = Artist.load(classes)

    def full(module: object, args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    artist.net.register_forward_pre_hook(full)
    with pytest.raises(SettingsError, match="2 images of 16x16 at once: ask for a batch below 2"):
        artist.draw([1, 2], [0, 0], FEW)
