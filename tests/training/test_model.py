from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import SettingsError
from training.diffusion.prediction import as_velocity
from training.kernels import field_product, plain, tiled
from training.model import PRESETS, ModelConfig, PixNerd, Text, preset
from training.model.field import Field, FieldBlock, coordinates

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden": 32,
    "heads": 2,
    "blocks": 2,
    "text_blocks": 1,
    "text_dim": 12,
    "text_tokens": 5,
    "classes": 7,
    "field_channels": 8,
}


def network(**changes: object) -> PixNerd:
    """A small network whose every output depends on its weights: nothing is left at zero."""
    torch.manual_seed(0)
    net = PixNerd(ModelConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.eval().requires_grad_(False)


def inputs(batch: int, height: int, width: int, task: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch + height + width)
    x, t = torch.randn(batch, 3, height, width, generator=g), torch.rand(batch, generator=g)
    labels = torch.randint(0, 8, (batch,), generator=g)
    return x, t, labels if task == "class" else torch.randn(batch, 5, 12, generator=g)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("XXL/16", 1_171_518_019), ("XL/16", 700_590_000), ("XL/8", 699_900_000), ("L/16", 452_100_000)],
)
def test_parameters_of_the_published_sizes(name: str, parameters: int):
    with torch.device("meta"):
        count = sum(p.numel() for p in PixNerd(preset(name)).parameters())
    assert abs(count - parameters) <= (0 if name == "XXL/16" else 50_000)


def test_every_preset_runs_at_a_small_width():
    for config in PRESETS.values():
        small = config.model_copy(update={"hidden": 32, "heads": 2, "blocks": 1, "text_blocks": 1, "image_size": 32})
        condition = torch.tensor([3]) if small.task == "class" else torch.randn(1, 4, small.text_dim)
        v = PixNerd(small)(torch.randn(1, 3, 32, 32), torch.rand(1), condition)
        assert v.shape == (1, 3, 32, 32)
        assert not v.any()  # the last layer starts at zero


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(SettingsError, match="XXL/16"):
        preset("XXL16")


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    task=st.sampled_from(["text", "class"]),
    code=st.sampled_from(["cosine", "dct", "sincos"]),
    norm=st.sampled_from(["fc1", "fc1_fc2", "fc1_fc2_out"]),
    depth=st.sampled_from([0, 1, 4]),
)
def test_any_size_and_a_permutation_of_the_batch(
    batch: int, rows: int, columns: int, task: str, code: str, norm: str, depth: int
):
    net = network(task=task, coordinate_code=code, field_norm=norm, field_blocks=depth)
    x, t, y = inputs(batch, 4 * rows, 4 * columns, task)
    v = net(x, t, y)
    assert v.shape == x.shape
    assert v.isfinite().all()
    order = torch.arange(batch).flip(0)
    torch.testing.assert_close(net(x[order], t[order], y[order]), v[order], rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_a_fixed_grid_draws_any_multiple_of_it(rows: int, columns: int):
    net = network(fixed_grid=True)
    x, t, y = inputs(2, 4 * rows, 4 * columns, "text")
    assert net(x, t, y).shape == x.shape


def test_a_fixed_grid_changes_nothing_at_the_training_size():
    x, t, y = inputs(2, 16, 16, "text")
    torch.testing.assert_close(network(fixed_grid=True)(x, t, y), network()(x, t, y), rtol=0, atol=0)


def test_a_size_that_does_not_fit_names_those_near():
    with pytest.raises(SettingsError, match=r"multiples of 4: ask for 16x20 or 20x20"):
        network()(*inputs(1, 18, 20, "text"))
    with pytest.raises(SettingsError, match="multiples of 32"):
        ModelConfig(image_size=512, fixed_grid=True).check_size(768, 1000)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"image_size": 18}, "multiple of patch_size"),
        ({"hidden": 12}, "rotary"),
        ({"fixed_grid": True, "field_blocks": 0}, "linear head"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(wrong: dict[str, object], why: str):
    with pytest.raises(ValueError, match=why):
        ModelConfig(**{**SMALL, **wrong})


def test_published_padding_attends_to_pads_and_masked_padding_does_not():
    x, t, y = inputs(2, 16, 16, "text")
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    other = torch.where(mask.bool()[:, :, None], y, y + 1)
    published, masked = network(), network(text_padding="masked")
    assert not torch.allclose(published(x, t, Text(y, mask)), published(x, t, Text(other, mask)))
    torch.testing.assert_close(masked(x, t, Text(y, mask)), masked(x, t, Text(other, mask)))
    # A masked pad is as good as no pad at all.
    torch.testing.assert_close(
        masked(x[:1], t[:1], Text(y[:1], mask[:1])), masked(x[:1], t[:1], y[:1, :2]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("padding", ["published", "masked"])
def test_text_that_images_share_is_worth_the_same_as_text_of_their_own(padding: str):
    net = network(text_padding=padding)
    x, _, y = inputs(6, 16, 16, "text")
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    t = torch.tensor([0.2, 0.2, 0.2, 0.7, 0.7, 0.7])
    shared = Text(y[:2], mask, torch.tensor([0, 0, 0, 1, 1, 1]))
    own = Text(y[:2].repeat_interleave(3, 0), mask.repeat_interleave(3, 0))
    torch.testing.assert_close(net(x, t, shared), net(x, t, own), rtol=1e-4, atol=1e-5)


def test_images_that_share_text_but_not_their_time_are_refused():
    net = network()
    x, t, y = inputs(3, 16, 16, "text")
    rows = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="must have the same time"):
        net(x, t, Text(y[:2], None, rows))
    with pytest.raises(ValueError, match="must have the same time"):
        net(x, t, net.embed(Text(y[:2], None, rows)))
    net(x, t[[0, 1, 0]], Text(y[:2], None, rows))


@pytest.mark.parametrize("task", ["text", "class"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_nothing_is_nothing(task: str, dtype: torch.dtype):
    x, t, y = inputs(2, 16, 24, task)
    net = network(task=task).to(dtype).requires_grad_(True)
    v = net(x[:0], t[:0], y[:0])
    assert v.shape == (0, 3, 16, 24)
    v.sum().backward()


def test_shared_text_gives_the_gradients_of_text_of_its_own():
    net = network().requires_grad_(True)
    x, _, y = inputs(4, 16, 16, "text")
    t = torch.full((4,), 0.4)
    grads = []
    for condition in (Text(y[:1], None, torch.zeros(4, dtype=torch.long)), Text(y[:1].expand(4, -1, -1))):
        net.zero_grad()
        net(x, t, condition).square().sum().backward()
        grads.append([p.grad.clone() for p in net.time.parameters() if p.grad is not None])
    for shared, own in zip(*grads, strict=True):
        torch.testing.assert_close(shared, own, rtol=1e-3, atol=1e-4)


def test_tap_gives_the_tokens_after_a_block_and_leaves_the_velocity_alone():
    net = network()
    x, t, y = inputs(2, 16, 16, "text")
    seen: list[Tensor] = []
    net.trunk[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    v, tokens = net(x, t, y, 1)
    assert torch.equal(tokens, seen[0])
    assert torch.equal(v, net(x, t, y))


def test_of_a_predicted_image_a_velocity_is_made():
    x, t, y = inputs(2, 16, 16, "text")
    t = torch.tensor([0.5, 0.99])
    image = network()(x, t, y)
    v = as_velocity(network(prediction="image"))(x, t, y)
    torch.testing.assert_close(v[0], (image[0] - x[0]) / 0.5)
    torch.testing.assert_close(v[1], (image[1] - x[1]) / 0.05)  # bounded near t = 1


@pytest.mark.parametrize("normalise2", [False, True])
def test_gradients_of_the_field_product(normalise2: bool):
    torch.manual_seed(0)
    x, gain, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5, 4), (4,), (3, 64)))
    assert torch.autograd.gradcheck(lambda x, gain, w: field_product(x, gain, w, normalise2), (x, gain, w))


@pytest.mark.parametrize("norm", ["fc1", "fc1_fc2", "fc1_fc2_out"])
@pytest.mark.parametrize("task", ["text", "class"])
def test_gradients_of_the_whole_field(norm: str, task: str):
    torch.manual_seed(0)
    field = Field(ModelConfig(**{**SMALL, "hidden": 8, "field_channels": 4, "field_norm": norm, "task": task})).double()
    pixels, s = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 6, 3), (2, 8)))
    assert torch.autograd.gradcheck(lambda *a: field(*a, 2, 3), (pixels, s))


@pytest.mark.parametrize("normalise2", [False, True])
def test_the_tiled_field_product_is_the_plain_one_over_several_tiles(normalise2: bool):
    torch.manual_seed(0)
    # 200 patches of 64 pixels x 32 values, 128 to a tile: the last one is not full
    values = [torch.randn(200, 64, 16), torch.randn(16), torch.randn(200, 2 * 16 * 32)]
    results = []
    for product in (tiled.field_product, plain.field_product):
        x, gain, w = (value.clone().requires_grad_() for value in values)
        out = product(x, gain, w, normalise2)
        out.square().sum().backward()
        results.append((out, x.grad, gain.grad, w.grad))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=float(slow.detach().abs().max()) * 1e-5)


def test_field_weights_matter_only_by_their_columns_directions():
    config = ModelConfig(**{**SMALL, "field_norm": "fc1_fc2"})
    block = FieldBlock(config)
    x, s = torch.randn(2, 16, 8), torch.randn(2, 32)
    before = block(x, s)
    with torch.no_grad():
        block.weights.weight.mul_(3)
        block.weights.bias.mul_(3)
    torch.testing.assert_close(block(x, s), before)


@pytest.mark.parametrize("code", ["cosine", "dct", "sincos"])
def test_the_coordinate_code_spans_the_same_range_at_every_patch_size(code: str):
    small, large = (coordinates(code, n, n, torch.device("cpu")) for n in (4, 7))
    assert small.shape == (16, 64)
    # Corners are the same points, whatever stands between them.
    torch.testing.assert_close(small[[0, 3, 12, 15]], large[[0, 6, 42, 48]])
    assert len(small.unique(dim=0)) == 16


def test_tables_made_while_sampling_can_be_trained_with():
    net = network().requires_grad_(True)
    x, t, y = inputs(1, 28, 36, "text")  # a size that no other test uses
    with torch.inference_mode():
        net(x, t, y)
    net(x, t, y).sum().backward()


def test_bf16_stays_close_to_fp32():
    x, t, y = inputs(2, 16, 16, "text")
    wide = network()(x, t, y)
    narrow = network().bfloat16()(x, t, y)
    assert narrow.dtype == torch.bfloat16
    assert float((narrow.float() - wide).norm() / wide.norm()) < 0.05
