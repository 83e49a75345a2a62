"""The parts of a day with a GPU: what each needs, and which figures it gives, beside the floor of each.

A floor is what the matrix products, or the traffic to memory, take at the rates below; a bound is what a figure must
not pass. Nothing here imports more than Python, so the list can be had on a machine that has nothing yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PEAK_TFLOPS = 790  # bf16, measured on one H200 in a large matrix product
TB_PER_SECOND = 4.8  # of an H200's memory
MINUTES = 8  # that a part may take

SIZES = (256, 512)
# Of XXL/16 by image size, an image: a training step with both encoders, and images a second at the peak rate with the
# encoders and without; milliseconds of 25 guided steps.
TRAIN_TFLOP = {256: 1.65, 512: 5.23}
TRAIN_FLOOR, BARE_FLOOR, SAMPLE_FLOOR = {256: 479, 512: 151}, {256: 642, 512: 171}, {256: 25.9, 512: 97.3}
BATCH, BARE_BATCH = {256: 96, 512: 24}, {256: 48, 512: 12}  # of a training step; the plain network keeps far more

OPERATIONS = ("field", "norm and modulation", "norm and rotary")
TYPES = ("fp32", "bf16")
MODES = ("forward", "forward and backward")
# Milliseconds of reading every input and writing every output once, for 8 images of 512 px in bf16, by mode.
TRAFFIC_FLOOR = {"field": (0.168, 0.447), "norm and modulation": (0.0105, 0.0262), "norm and rotary": (0.0105, 0.0262)}
SIDES = ("plain, eager", "plain, compiled", "ours, eager", "ours, compiled")
DRAWN = ((1, 1), (2, 4))  # prompts, pictures of each
COMPARED = DRAWN[-1]  # with the plain network at one size only, as every size is compiled anew for minutes
STATES = ("fp32", "bf16")
APART = 4  # times what two equal runs differ by, which a resumed one may

_TORCH = {"torch": "torch", "numpy": "numpy"}
_NETWORK = _TORCH | {"pydantic": "pydantic", "safetensors": "safetensors"}
_ENCODERS = _NETWORK | {"transformers": "transformers", "tokenizers": "tokenizers"}
_TRAINING = _ENCODERS | {"deepspeed": "deepspeed", "pyarrow": "pyarrow", "PIL": "pillow"}


@dataclass(frozen=True)
class Part:
    name: str
    about: str
    function: str  # module:function in this folder, called with the report, the options and `given`
    needs: dict[str, str]  # module -> the package that brings it
    figures: dict[str, str]  # name -> floor or bound
    given: dict[str, object] = field(default_factory=dict)


def _kernels() -> Part:
    bound = "bound: 1.5 times the twin's and some roundings"
    figures = {f"{name}, {dtype}: error forward, backward": bound for name in OPERATIONS for dtype in TYPES}
    return Part("kernels", "each kernel against its twin, both ways", "kernels:check", _TORCH, figures)


def _bench_kernels() -> Part:
    figures = {
        f"{name}, {mode}: ms": f"{floor:g} ms at {TB_PER_SECOND:g} TB/s"
        for name in OPERATIONS
        for mode, floor in zip(MODES, TRAFFIC_FLOOR[name], strict=True)
    }
    return Part("bench_kernels", "each kernel beside its twin, timed", "timed_kernels:measure", _TORCH, figures)


def _resume() -> Part:
    figures = {}
    for precision in STATES:
        figures[f"{precision}: the state of a fused AdamW, loaded"] = "bound: as it was saved, bit for bit"
        resumed = f"{precision}: a killed and resumed run against a straight one"
        figures[resumed] = f"bound: {APART} times what two straight ones differ by"
    return Part("resume", "a small run with DeepSpeed and NCCL, killed and resumed", "resume:check", _TRAINING, figures)


def _train(size: int, compiled: bool) -> Part:
    figures = {
        "images a second": f"{TRAIN_FLOOR[size]}",
        f"MFU of {PEAK_TFLOPS} TFLOP/s": "100 %",
        "peak memory": "none",
        "share of time that waits for data": "0 %",
        "share of time in which kernels run": "100 %",
        "profile: the kernels that take most": "none",
    }
    return Part(
        f"train{size}" + ("_compiled" if compiled else ""),
        f"XXL/16 at {size} px with Qwen3-1.7B and DINOv2-B through the loop" + (", compiled" if compiled else ""),
        "train:measure",
        _TRAINING,
        figures,
        {"size": size, "compiled": compiled},
    )


def _sample(size: int) -> Part:
    figures = {
        f"{pictures(prompts, each)}, {how}: ms a picture": f"{SAMPLE_FLOOR[size]} ms"
        for how in ("eager", "CUDA graphs")
        for prompts, each in DRAWN
    }
    figures["CUDA graphs against eager: most grey levels between"] = "none"
    about = f"25 guided steps of XXL/16 in bf16 at {size} px, eager and with CUDA graphs"
    return Part(f"sample{size}", about, "sample:measure", _ENCODERS, figures, {"size": size})


def _bench_model(size: int) -> Part:
    figures = {f"training step, {side}: images a second": f"{BARE_FLOOR[size]}" for side in SIDES}
    about = f"a training step of XXL/16 at {size} px without encoders, beside the plainly written network"
    return Part(f"bench_model{size}", about, "timed_models:train", _NETWORK, figures, {"size": size})


def _bench_sampling(size: int) -> Part:
    figures = {f"{pictures(*COMPARED)}, {side}: ms a picture": f"{SAMPLE_FLOOR[size]} ms" for side in SIDES}
    about = f"guided sampling of XXL/16 at {size} px, beside the plainly written network"
    return Part(f"bench_sampling{size}", about, "timed_models:sampling", _NETWORK, figures, {"size": size})


def pictures(prompts: int, each: int) -> str:
    return f"{prompts * each} picture{'s' if prompts * each > 1 else ''}"


# In the order in which they are run: what must hold first, then what is most wanted.
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        _kernels(),
        _resume(),
        *(_train(size, compiled) for size in SIZES for compiled in (False, True)),
        *(_sample(size) for size in SIZES),
        _bench_kernels(),
        *(_bench_model(size) for size in SIZES),
        *(_bench_sampling(size) for size in SIZES),
    )
}
