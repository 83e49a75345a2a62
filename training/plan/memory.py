"""The memory of a rank, on its device and on its host, at the moment of the step when it needs most.

Weights, gradients and the optimiser's state follow from DeepSpeed's stages (Rajbhandari et al. 2019, arXiv 1910.02054)
and from the defaults of its buffers. Activations are what autograd keeps from the forward to the backward pass, counted
operation by operation in `training.model`; of a block that is computed anew, its input is kept.

Shapes: N patches, T text tokens, H hidden, K pixels of a patch, C field channels, W weights of a field block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from training.diffusion.settings import ObjectiveSettings
from training.encoders.shapes import TextShape
from training.model.presets import ModelConfig
from training.plan.machines import GB
from training.plan.work import Encoders, route

FP32 = 4  # bytes
BUCKET = 500_000_000  # DeepSpeed's: elements of gradients that are exchanged at once, in one buffer
# ZeRO 3: elements of weights that are whole at once. Around the turn to the backward pass, DeepSpeed keeps those that
# are used again within 10^9 elements, half of them before it and half after, and fetches 5 x 10^7 ahead.
GATHERED = 550_000_000
CONTEXT = 2 * GB  # the CUDA context, its libraries and NCCL: an allowance, not measured
GAPS = 0.1  # of the activations: what the allocator holds and cannot use, an allowance too

Stage = Literal[1, 2, 3]
Stack = Callable[[int, float, float], float]  # how many blocks, bytes of one, bytes of its input -> bytes of all


class Sizes(NamedTuple):
    """Parameters."""

    trained: int  # that the optimiser updates
    held: int  # of the module that is trained, the frozen layers of its text encoder among them
    moments: int  # of the optimiser: two a parameter, or one of those that Muon moves
    frozen: int  # of frozen encoders


class Setup(NamedTuple):
    """What decides a rank's memory, beside the network."""

    ranks: int
    micro_batch: int
    zero: Stage
    offload: bool
    exact_gradients: bool
    bf16: bool
    gpu: bool
    averages: int = 1
    exports: bool = False  # whether rank 0 brings a whole average together while training goes on
    frozen_bf16: bool = False  # what frozen encoders compute in

    @property
    def width(self) -> int:
        """Bytes of a weight in the forward pass."""
        return 2 if self.bf16 else FP32


class Memory(NamedTuple):
    """Bytes of a rank, by part."""

    device: dict[str, float]
    host: dict[str, float]

    @property
    def on_device(self) -> float:
        return sum(self.device.values())

    @property
    def on_host(self) -> float:
        return sum(self.host.values())


def memory(setup: Setup, sizes: Sizes, image: float, encoding: float) -> Memory:
    """`image`: bytes of an image's activations; `encoding`: of its passing values in frozen encoders."""
    share, width = 1 / setup.ranks, setup.width
    whole = min(sizes.held, GATHERED) if setup.ranks > 1 else 0  # one rank uses its weights where they lie
    state = FP32 * share * (sizes.trained + sizes.moments)
    averages = FP32 * share * sizes.trained * setup.averages
    activations = setup.micro_batch * max(image, encoding)
    # The update takes its gradients in fp32, when the activations are gone.
    update = FP32 * share * sizes.trained if setup.bf16 and not setup.exact_gradients and not setup.offload else 0.0
    device = {
        "weights": width * (sizes.held if setup.zero < 3 else share * sizes.held + whole),
        "gradients": _gradients(setup, sizes),
        "exchange buffer": _bucket(setup, sizes),
        "masters and moments": 0.0 if setup.offload else state,
        "EMA": 0.0 if setup.offload else averages,
        "frozen encoders": float((2 if setup.frozen_bf16 else FP32) * sizes.frozen),
        "activations or update": max(activations, update),
        "allowance": (CONTEXT if setup.gpu else 0.0) + GAPS * activations,
    }
    return Memory(device, _host(setup, sizes, state, averages))


def _gradients(setup: Setup, sizes: Sizes) -> float:
    """ZeRO 1 keeps all until the step; beside sums in fp32, also those of the micro-batch."""
    sums = FP32 if setup.exact_gradients else setup.width
    if setup.zero == 1:
        apart = setup.width if setup.bf16 and setup.exact_gradients else 0
        return float(sizes.trained * (sums + apart))
    return 0.0 if setup.offload else sizes.trained * sums / setup.ranks


def _bucket(setup: Setup, sizes: Sizes) -> float:
    """On a GPU the buffer is made whole, however small the network is; on a CPU gradients are collected as they are."""
    if setup.zero == 1 and setup.bf16 and setup.exact_gradients and not setup.offload:
        return 0.0  # DeepSpeed's BF16_Optimizer exchanges the sums where they lie
    width = FP32 if setup.zero == 1 and setup.exact_gradients else setup.width
    return float(width * (BUCKET if setup.gpu else min(BUCKET, sizes.trained)))


def _host(setup: Setup, sizes: Sizes, state: float, averages: float) -> dict[str, float]:
    """A rank builds all networks in host memory, and copies a state there while it is committed: never both at once.

    A checkpoint on the way is written from that copy; its own text encoder is read for it.
    """
    exact = sizes.trained if setup.bf16 else 0  # the weights before they are rounded
    building = FP32 * (sizes.held + exact) + (2 if setup.frozen_bf16 else FP32) * sizes.frozen
    apart = state + averages + FP32 * sizes.trained / setup.ranks if setup.offload else 0.0  # with the gradients
    saving = state + averages + (FP32 * sizes.held if setup.exports else 0)
    return {"offloaded state": apart, "networks at the start, or a state that is saved": max(building, saving)}


def activations(
    config: ModelConfig,
    encoders: Encoders,
    objective: ObjectiveSettings | None = None,
    *,
    bf16: bool,
    gpu: bool,
    recomputed: int = 0,
) -> dict[str, float]:
    """Bytes that autograd keeps of one image, by part; each `recomputed`-th block of a stack is computed anew.

    Where no kernel of ours runs (on CPUs), a norm keeps more than its input: see `_copies`.
    """
    n, t, h = config.grid**2, config.text_tokens if config.task == "text" else 0, config.hidden
    b = 2 if bf16 else FP32
    objective = objective or ObjectiveSettings()
    skipped, kept = route(config, objective.routing)
    text = t * h * (2 * b + FP32)  # keys, values, a norm in fp32 of the text
    trunk = _block(config, n, t, b, plain=not gpu) + text
    routed = _block(config, kept, t, b, plain=not gpu) + text
    refine = _block(config, t, 0, b, plain=not gpu) if t else 0.0  # there is no text to a label

    def stack(blocks: int, block: float, its_input: float) -> float:
        anew = blocks // recomputed if recomputed else 0
        return (blocks - anew) * block + anew * its_input

    parts = {
        "trunk": stack(config.blocks - skipped, trunk, n * h * b) + stack(skipped, routed, kept * h * b),
        "text refine": stack(config.text_blocks, refine, t * h * b),
        "text in": t * (config.text_dim * (FP32 + (b if bf16 else 0)) + h * (2 * b + FP32)),
        "field": _field(config, n, b, stack, plain=not gpu) if config.field_blocks else n * 2 * h * b,
        "image and loss": 6.0 * FP32 * 3 * n * config.patch_size**2,
        # The largest values of the backward pass itself: the gradients of one block's feed-forward part.
        "gradients of a block": n * b * (4.0 * config.mlp_hidden + h),
    }
    if encoders.vision and objective.perceptual.dino:
        parts["features of predictions"] = float(encoders.vision.kept(n))
    if encoders.lpips:
        parts["LPIPS"] = float(encoders.lpips.kept(config.grid * config.patch_size))
    if recomputed:
        field = n * b * sum(_field_block(config)) if config.field_blocks else 0.0
        parts["a block that is computed anew"] = max(trunk, refine if config.text_blocks else 0.0, field)
    if encoders.vision and objective.repa:
        v = encoders.vision.width
        parts["REPA"] = n * (4.0 * h * b + v * (b + 3 * FP32))
    if encoders.train_text:
        layers = min(encoders.train_text, encoders.text.layers)
        parts["text encoder"] = float(layers * t * _text_layer(encoders.text, b))
    return parts


def _block(config: ModelConfig, tokens: int, text: int, b: int, *, plain: bool) -> float:
    """A transformer block; see `training.model.blocks` for the operations in this order."""
    h, inner = config.hidden, config.mlp_hidden
    norms = 2 * (2 + (_copies(b) + 1 if plain else 0)) * h  # input and output; without the kernel what is between too
    attention = 3 * h + h + 2 * h  # q, k and v together, q with positions, the result before and after its projection
    joined = 2 * h * (tokens + text) / tokens  # k and v, with the text's behind
    # The norms of q and k. Those of text have no kernel, but on a GPU PyTorch's own, which keeps the input in fp32.
    between = 2 * h * (_copies(b) if plain else 0 if text or b == FP32 else 2)
    feed_forward = 4 * inner + h  # gate and value, SiLU(gate), their product; and the result
    return b * tokens * (norms + attention + joined + between + feed_forward)


def _copies(b: int) -> int:
    """What PyTorch's norm on a CPU keeps beside its input, in values of b bytes: the normed one, and both in fp32."""
    return 1 if b == FP32 else 4


def _field_block(config: ModelConfig) -> tuple[int, int]:
    """Values of a patch that a block keeps: its input, and its weights. The product computes the rest anew."""
    return config.patch_size**2 * config.field_channels, 2 * config.field_channels**2 * config.field_ratio


def _field(config: ModelConfig, patches: int, b: int, stack: Stack, *, plain: bool) -> float:
    k, c = config.patch_size**2, config.field_channels
    its_input, weights = _field_block(config)
    blocks = stack(config.field_blocks, b * (its_input + weights), b * its_input)
    normed = k * c * (FP32 + b + (FP32 if plain else 0))
    last = normed if config.field_norm == "fc1_fc2_out" else k * c * b
    return patches * (blocks + last + b * (2 * config.hidden + 2 * 3 * k))


def _text_layer(text: TextShape, b: int) -> int:
    """Bytes of a token in a layer of Qwen3, whose norms are in fp32 and keep input and result."""
    norms = 2 * text.width * (2 * FP32 + 2 * b) + (text.query + text.key) * (2 * FP32 + b)
    attention = b * (3 * text.query + 3 * text.query)  # q, the result; k and v repeated to as many heads
    return norms + attention + b * 4 * text.inner


def encoding(config: ModelConfig, encoders: Encoders) -> float:
    """Bytes of the values that one image and its caption need at once inside of a layer of the frozen encoders."""
    text, vision, b = encoders.text, encoders.vision, 2 if encoders.bf16 else FP32
    most = 0 if encoders.train_text else b * config.text_tokens * (3 * text.inner + 4 * text.width)
    seen = b * (config.grid**2 + 1) * (2 * vision.inner + 4 * vision.width) if vision else 0
    return float(max(most, seen))
