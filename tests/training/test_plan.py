"""What a run will need, against counts of the real networks, published figures, and what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from infra.config import parse
from infra.errors import SettingsError
from training.diffusion.settings import RoutingSettings
from training.encoders.shapes import (
    NO_TEXT,
    PUBLISHED_TEXT,
    PUBLISHED_VISION,
    LpipsShape,
    text_shape,
    tiny_text,
    tiny_vision,
    vision_shape,
)
from training.model import PRESETS, ModelConfig, PixNerd, Text, outline
from training.model.repa_head import RepaHead
from training.model.repeated import recompute
from training.model.routing import Route
from training.optim import OptimSettings, optimiser
from training.plan.machines import DEVICES, machines
from training.plan.memory import Setup, Sizes, activations, memory
from training.plan.stage import Rates, StagePlan
from training.plan.work import Encoders, forward
from training.settings import TrainSettings

QWEN, DINO = PUBLISHED_TEXT["Qwen/Qwen3-1.7B"], PUBLISHED_VISION["facebook/dinov2-base"]
XXL = PRESETS["XXL/16"]
SMALL = Encoders(tiny_text(96, 2, 4, 512), tiny_vision(64, 2, 8, 32), train_text=1)


def plan(gpus: str = "16xH200", encoders: Encoders = Encoders(QWEN, DINO), **settings: Any) -> StagePlan:
    on = machines(gpus)
    base = {"preset": "XXL/16", "steps": 1000, "batch": 1536, "workers": on.ranks}
    return StagePlan("train", parse(TrainSettings, base | settings), encoders, on, Rates(0.4))


# What was counted of the published network, in GFLOP an image.
@pytest.mark.parametrize(
    ("size", "told"),
    [
        (256, {"blocks": 338.7, "text refine": 39.2, "field weights": 25.8, "field products": 4.3, "in all": 409.9}),
        (
            512,
            {"blocks": 1372.7, "text refine": 39.2, "field weights": 103.1, "field products": 17.2, "in all": 1537.7},
        ),
    ],
)
def test_the_published_network_computes_what_was_counted(size: int, told: dict[str, float]):
    parts: dict[str, float] = dict(forward(XXL.model_copy(update={"image_size": size})))
    parts["in all"] = sum(parts.values())
    told = told | {"text refine": 39.2}
    assert {part: parts[part] / 1e9 for part in told} == pytest.approx(told, rel=0.02)


@pytest.mark.parametrize(("size", "dino", "step"), [(256, 46.3, 1.65), (512, 213.8, 5.23)])
def test_encoders_and_a_training_step_compute_what_was_counted(size: int, dino: float, step: float):
    planned = plan(model={"image_size": size})
    assert planned.work.text / 1e9 == pytest.approx(364.5, rel=0.02)
    assert planned.work.vision / 1e9 == pytest.approx(dino, rel=0.02)
    assert planned.work.step / 1e12 == pytest.approx(step, rel=0.02)
    assert planned.network == 1_171_518_019 if size == 256 else planned.network > 0


CONFIGS = {
    "tiny": PRESETS["tiny"],
    "two blocks": XXL.model_copy(update={"blocks": 2, "text_blocks": 1}),
    "no text blocks": ModelConfig(hidden=64, heads=4, blocks=1, text_blocks=0, image_size=64, field_ratio=3),
    "classes": PRESETS["XL/8"].model_copy(update={"blocks": 1}),
    "linear head": PRESETS["PixDiT-L/16"].model_copy(update={"blocks": 1}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_is_what_the_network_multiplies(name: str):
    config, images = CONFIGS[name], 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outline(config)(*inputs(config, images, "meta"))
    # The coordinate code's part of the field's first layer is computed once, however many images there are.
    once = 2 * config.patch_size**2 * 64 * config.field_channels if config.field_blocks else 0
    assert counter.get_total_flops() == images * sum(forward(config).values()) + once


def test_token_routing_spares_what_is_not_multiplied():
    config, images = CONFIGS["tiny"], 3
    routing = RoutingSettings(share=0.5, blocks=(1, 2))
    route = Route(torch.zeros(images, routing.kept(config.grid**2), dtype=torch.long, device="meta"), 1, 2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outline(config)(*inputs(config, images, "meta"), route=route)
    once = 2 * config.patch_size**2 * 64 * config.field_channels
    assert counter.get_total_flops() == images * sum(forward(config, routing).values()) + once


def test_options_of_the_objective_are_counted():
    plain = plan()
    routed = plan(objective={"routing": {"share": 0.5, "blocks": [2, 12]}})
    assert routed.work.trained < 0.75 * plain.work.trained
    assert routed.memory().on_device < plain.memory().on_device
    half = plan(objective={"repa_until": 500})
    assert half.work.vision == pytest.approx(plain.work.vision / 2)
    assert half.work.head == pytest.approx(plain.work.head / 2)
    seeing = {"repa": 0, "perceptual": {"dino": 0.01, "lpips": 0.1}}
    seen = plan(encoders=Encoders(QWEN, DINO, lpips=LpipsShape()), model={"prediction": "image"}, objective=seeing)
    assert (seen.head, seen.work.head) == (0, 0)
    assert seen.work.vision == plain.work.vision
    assert seen.work.perceptual == 2 * plain.work.vision + 3 * LpipsShape().forward(256)
    assert seen.activations["LPIPS"] == LpipsShape().kept(256)
    assert seen.sizes.frozen == plain.sizes.frozen + LpipsShape().parameters


@pytest.mark.parametrize("changes", [{}, {"checkpointing": "blocks"}])
def test_labels_need_nothing_of_a_text_encoder(changes: dict[str, Any]):
    planned = plan(encoders=Encoders(NO_TEXT, DINO), preset="XL/16", **changes)
    assert (planned.work.text, planned.sizes.frozen) == (0, DINO.parameters)
    assert planned.activations["text in"] == planned.activations["text refine"] == 0
    assert planned.fits()


def inputs(config: ModelConfig, images: int, device: str) -> tuple[Tensor, Tensor, Any]:
    assert config.image_size is not None
    x_BCHW = torch.zeros(images, 3, config.image_size, config.image_size, device=device)
    if config.task == "class":
        return x_BCHW, torch.zeros(images, device=device), torch.zeros(images, dtype=torch.long, device=device)
    features_BTE = torch.zeros(images, config.text_tokens, config.text_dim, device=device)
    return x_BCHW, torch.zeros(images, device=device), Text(features_BTE)


TEXT = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "head_dim": 16,
    "intermediate_size": 80,
    "vocab_size": 300,
}


def test_a_text_encoders_shape_is_that_of_the_real_one():
    from transformers import Qwen3Config, Qwen3Model

    model = Qwen3Model(Qwen3Config(**TEXT, attn_implementation="eager"))  # a fused one is not counted on CPUs
    shape = text_shape(TEXT)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.matrices == sum(p.numel() for p in model.layers[0].parameters() if p.ndim == 2)
    last = [*model.layers[-2:].parameters(), *model.norm.parameters()]
    assert shape.trained(2) == sum(p.numel() for p in last)
    assert (shape.trained(0), shape.trained(3)) == (0, shape.parameters)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(2, 10, dtype=torch.long), use_cache=False)
    # The angles of its rotary positions are a product as well: one for each token and pair.
    assert counter.get_total_flops() == pytest.approx(2 * shape.forward(10), rel=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_a_vision_encoders_shape_is_that_of_the_real_one(gated: bool):
    from transformers import Dinov2Config, Dinov2Model

    config = {"hidden_size": 48, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32, "use_swiglu_ffn": gated}
    model = Dinov2Model(Dinov2Config(num_attention_heads=4, attn_implementation="eager", **config))
    shape = vision_shape(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(3, 3, 32, 32))
    assert counter.get_total_flops() == 3 * shape.forward(16)


def test_published_encoders_have_the_size_that_is_told_of_them():
    assert QWEN.parameters == pytest.approx(1.72e9, rel=0.01)
    assert DINO.parameters == pytest.approx(86.6e6, rel=0.001)


def test_the_optimiser_holds_as_many_values_as_are_counted():
    muon, aligned = {"matrices": "muon"}, {"repa": 0.5}
    planned = plan("2xcpu", SMALL, preset="tiny", batch=32, train_text=1, optim=muon, objective=aligned)
    text = torch.nn.ModuleDict({"model": qwen(96, 2, 4, 512)})
    for name, parameter in text.named_parameters():
        parameter.requires_grad_("layers.1." in name or name == "model.norm.weight")
    module = torch.nn.ModuleDict({"net": PixNerd(planned.config), "head": RepaHead(96, 64), "text": text})
    groups = optimiser(module.named_parameters(), OptimSettings(matrices="muon")).param_groups
    values = [(p.numel(), 1 if group["muon"] else 2) for group in groups for p in group["params"]]
    held = sum(p.numel() for p in module.parameters())
    trained, moments = sum(size for size, _ in values), sum(size * kept for size, kept in values)
    assert planned.sizes == Sizes(trained, held, moments, SMALL.vision.parameters if SMALL.vision else 0)


def qwen(hidden: int, layers: int, heads: int, vocab: int) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=hidden // heads,
        )
    )


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(hidden=96, heads=4, blocks=4, text_blocks=2, image_size=64, patch_size=8, text_dim=32),
        ModelConfig(hidden=64, heads=4, blocks=6, text_blocks=0, image_size=64, text_tokens=16, field_norm="fc1"),
        PRESETS["tiny"],
        ModelConfig(task="class", hidden=96, heads=4, blocks=4, image_size=64, patch_size=8),
    ],
    ids=["with text blocks", "one norm", "tiny", "labels"],
)
def test_autograd_keeps_as_much_as_is_counted(config: ModelConfig):
    """On a CPU in fp32, where it can be seen; the forms on a GPU differ by what `plain` says."""
    images, net = 4, PixNerd(config)
    parts = activations(config, Encoders(SMALL.text, None), bf16=False, gpu=False)
    told = images * sum(parts[part] for part in ("trunk", "text refine", "text in", "field"))
    assert kept(net, inputs(config, images, "cpu")) == pytest.approx(told, rel=0.1)


def test_of_a_block_that_is_computed_anew_its_input_is_counted():
    config = ModelConfig(
        hidden=96, heads=4, blocks=4, text_blocks=0, image_size=64, patch_size=8, text_dim=32, field_blocks=0
    )
    all_kept, half, none = (
        activations(config, Encoders(SMALL.text, None), bf16=False, gpu=False, recomputed=n) for n in (0, 2, 1)
    )
    assert none["trunk"] == 4 * 4 * config.grid**2 * config.hidden  # blocks x bytes x tokens x hidden
    assert half["trunk"] == (all_kept["trunk"] + none["trunk"]) / 2
    assert half["a block that is computed anew"] == all_kept["trunk"] / 4
    net, given = PixNerd(config), inputs(config, 4, "cpu")
    before = kept(net, given)
    recompute(net, 1)
    # What is saved outside of such blocks; their inputs they keep by themselves.
    left_out = all_kept["trunk"] + all_kept["text refine"]
    assert before - kept(net, given) > 0.98 * 4 * left_out


def kept(net: PixNerd, given: tuple[Any, ...]) -> int:
    """Bytes of what the forward pass saves, each piece of memory once; parameters are not among it."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # held, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(*given)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("offload", [False, True])
def test_more_ranks_never_need_more_memory_each_at_zero_3(offload: bool):
    ranks = [1, 2, 3, 4, 8, 64, 512]
    if offload:  # one rank alone has no weights to bring together, and no state on its device that sharing would spare
        ranks = ranks[1:]
    for micro in (1, 24):
        setups = [Setup(n, micro, 3, offload, False, True, True) for n in ranks]
        for trained in (10**6, 3 * 10**8, 10**9, 10**10):
            needs = [memory(s, Sizes(trained, trained, 2 * trained, 10**9), 5e8, 1e7).on_device for s in setups]
            assert needs == sorted(needs, reverse=True)


def test_a_higher_stage_of_zero_never_needs_more_memory_for_the_published_network():
    for gpus in ("1xH200", "2xH200", "16xH200"):
        for settings in ({}, {"precision": "fp32"}, {"exact_gradients": True}, {"offload": True}):
            planned = plan(gpus, micro_batch=8, **settings)
            one, two, three = (planned.memory(zero=zero).on_device for zero in (1, 2, 3))
            assert three <= two <= one, (gpus, settings)


def test_each_average_is_one_more_shard_in_memory_and_in_every_state():
    ema = {"more_decays": [0.999], "sigma_rel": [0.05, 0.1]}
    one, four = plan(), plan(ema=ema)
    shard = 4 * one.sizes.trained
    assert four.memory().device["EMA"] == 4 * one.memory().device["EMA"] == 4 * shard / 16
    assert four.state - one.state == 3 * shard
    assert (one.kept_averages, four.kept_averages) == (0, 4 * shard)  # at the end
    assert plan(ema=ema | {"keep_every": 500}, steps=1600).kept_averages == 4 * 4 * shard
    assert [plan(export_every=every).checkpoints for every in (0, 500)] == [1, 2]
    host = [plan("1xH200", export_every=every).memory().on_host for every in (0, 500)]
    assert host[1] - host[0] <= 4 * one.sizes.held
    assert host[1] >= 4 * (5 * one.sizes.trained)  # the copy of a state, and the weights to publish


def test_a_batch_twice_as_large_costs_twice_the_flop_and_the_time():
    once, twice = plan(), plan(batch=3072)
    assert twice.flop == 2 * once.flop
    assert once.hours is not None
    assert twice.hours == pytest.approx(2 * once.hours)
    assert twice.memory().device["activations or update"] > 1.9 * once.memory().device["activations or update"]


def test_time_follows_from_the_peak_of_each_precision():
    planned = plan(batch=1536)
    seconds = 96 / 0.4 * (planned.work.trained / 790e12 + planned.work.frozen / 67e12)
    assert planned.step_seconds == pytest.approx(seconds)
    assert plan("2xcpu", batch=1536).step_seconds is None


def test_what_is_frozen_is_computed_once_and_what_is_trained_thrice():
    frozen, part = plan("1xcpu", SMALL._replace(train_text=0), preset="tiny"), plan("1xcpu", SMALL, preset="tiny")
    layer = SMALL.text.forward(16, 1)
    assert part.work.step - frozen.work.step == 2 * layer
    assert frozen.work.frozen - part.work.frozen == 2 * layer


@pytest.mark.parametrize(
    ("gpus", "settings"),
    [
        ("8xA100-40", {}),
        ("8xRTX4090", {"exact_gradients": True}),
        ("4xL40S", {"micro_batch": 2}),
        ("64xRTX4090", {"reading": {"lanes": 64}}),
    ],
)
def test_the_settings_that_it_names_make_it_fit(gpus: str, settings: dict[str, Any]):
    planned = plan(gpus, **settings)
    limit = planned.machines.device.memory
    assert limit is not None
    if planned.fits():
        assert planned.memory().on_device <= limit
        return
    ways = planned.ways()
    assert ways
    for way in ways:
        changed = plan(gpus, **(settings | way))
        assert changed.memory() == planned.memory(**way)
        assert changed.memory().on_device <= limit


def test_the_largest_micro_batch_that_fits_is_named():
    planned = plan("16xRTX4090")
    way = next(way for way in planned.ways() if "micro_batch" in way)
    larger = [m for m in range(way["micro_batch"] + 1, 97) if 96 % m == 0]
    assert planned.fits(micro_batch=way["micro_batch"])
    assert larger
    assert not any(planned.fits(micro_batch=micro) for micro in larger)


def test_settings_that_a_run_would_refuse_are_not_named():
    """REPA needs two images at once, and Muon whole matrices."""
    large: dict[str, Any] = {"model": {"image_size": 1024}}
    assert plan("16xRTX4090", Encoders(QWEN, None), objective={"repa": 0}, **large).ways()
    ways = plan("16xRTX4090", optim={"matrices": "muon"}, **large).ways()
    assert not any(way.keys() & {"zero", "offload"} for way in ways)


def test_no_setting_helps_where_the_encoders_alone_are_too_large():
    assert plan("2xRTX4090", Encoders(PUBLISHED_TEXT["Qwen/Qwen3-4B"]._replace(layers=80), DINO)).ways() == []


def test_frozen_encoders_in_bf16_take_half_of_the_memory_and_run_at_its_peak():
    exact, rounded = plan(), plan(encoders=Encoders(QWEN, DINO, bf16=True))
    name = "frozen encoders"
    assert rounded.memory().device[name] == exact.memory().device[name] / 2 == 2 * exact.sizes.frozen
    assert rounded.step_seconds == pytest.approx(96 / 0.4 * rounded.work.step / 790e12)
    assert exact.memory().on_host - rounded.memory().on_host in (0, 2 * exact.sizes.frozen)


def test_ranks_exchange_gradients_and_weights():
    one, bytes_ = plan("1xH200"), 2 * plan().sizes.trained
    assert one.sent == 0
    share = 15 / 16
    assert plan().sent == pytest.approx(2 * bytes_ * share)
    assert plan(zero=2, micro_batch=24).sent == pytest.approx((4 + 1) * bytes_ * share)
    assert plan(zero=3, micro_batch=24).sent == pytest.approx(4 * 3 * bytes_ * share)


def test_states_are_counted_with_the_one_that_is_written_before_an_old_one_goes():
    assert plan(steps=500, save_every=500).states == 0
    assert plan(steps=10_000).states == 3
    assert plan(steps=10_001, keep_every=5000).states == 3 + 2
    assert plan().state == 16 * plan().sizes.trained


@pytest.mark.parametrize(
    ("text", "ranks", "name"),
    [("16xH200", 16, "H200"), ("h100", 1, "H100"), ("8 x a100 80GB", 8, "A100-80"), ("2xcpu", 2, "cpu")],
)
def test_machines_are_a_number_and_a_name(text: str, ranks: int, name: str):
    assert machines(text) == (ranks, DEVICES[name])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("16xH20", "did you mean H200"),
        ("8xA100", "A100-80"),
        ("4xTPUv5", "known are B200, H200"),
        ("0xH200", "write a number from 1"),
        ("999999xH200", "write a number from 1"),
        ("", "such as 16xH200"),
        ("٣xH200", "such as 16xH200"),
    ],
)
def test_an_unknown_gpu_is_refused_with_what_is_known(text: str, told: str):
    with pytest.raises(SettingsError) as refused:
        machines(text)
    assert told in refused.value.remedy
