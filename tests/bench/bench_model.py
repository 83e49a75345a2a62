"""Our network against the published one written down plainly (`plain_pixnerd`), eager and under torch.compile.

A training step is forward, backward and AdamW; sampling is 4 prompts of 4 images, guided, in 25 steps of Adams-2.
On a CPU: fp32, 41 M parameters at 128 px. On a GPU: XXL/16 in bf16 at 256 and 512 px, beside the floor, which is the
time that the matrix products alone take at the rate given by --tflops.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.bench import plain_pixnerd as plain
from tests.bench.sides import Side, compare, show, show_floor
from tests.training import golden
from training.compiled import compile_network
from training.diffusion.objective import velocity_loss
from training.diffusion.samplers import adams, guided, timesteps
from training.model import ModelConfig, PixNerd, Text, preset, reference
from training.optim import OptimSettings, adamw

SMALL = ModelConfig(
    image_size=128,
    hidden=384,
    heads=6,
    blocks=6,
    text_blocks=2,
    field_blocks=2,
    coordinate_code="cosine",
    field_norm="fc1",
)
GUIDANCE, INTERVAL = 4.0, (0.1, 1.0)
AGAINST = ("plain, eager", "plain, compiled")

# Of XXL/16, by image size: TFLOP of a training step (encoders left out) and of a forward pass, an image.
TRAIN_TFLOP = {256: 1.232, 512: 4.614}
FORWARD_TFLOP = {256: 0.4099, 512: 1.5377}


@dataclass
class Bench:
    config: ModelConfig
    device: str
    dtype: torch.dtype
    rounds: int
    sides: list[str]

    def networks(self, *, replay: bool = False) -> dict[str, nn.Module]:
        """The same weights in each of the four."""
        torch.manual_seed(0)
        with torch.device(self.device):
            ours = PixNerd(self.config)
            theirs = plain.PlainPixNerd(self.config)
        assert ours.field is not None
        nn.init.normal_(ours.field.out.weight, std=0.02)  # at zero nothing would reach the weights before it
        theirs.load_state_dict(reference.to_reference(ours.state_dict(), self.config))
        found: dict[str, nn.Module] = {}
        for name in self.sides:
            net = (theirs if name.startswith("plain") else ours).to(self.dtype)
            if name.endswith("compiled"):
                net = _copy(net)
                if isinstance(net, PixNerd):
                    compile_network(net, replay=replay)
                else:
                    net.compile(dynamic=False)
            found[name] = net
        return found

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self.device)

    def features(self, captions: int) -> Tensor:
        return self.random(captions, self.config.text_tokens, self.config.text_dim).to(self.dtype)

    def train(self, batch: int) -> dict[str, list[float]]:
        size = self.config.image_size
        images, noise = self.random(batch, 3, size, size).clamp(-1, 1), self.random(1 + batch, 3, size, size)[1:]
        t, text = torch.linspace(0.02, 0.98, batch, device=self.device), self.features(batch)

        def ours(net: nn.Module) -> Tensor:
            return velocity_loss(net, images, text, noise, t).each_B.mean()

        def theirs(net: nn.Module) -> Tensor:
            return plain.loss(net, images.to(self.dtype), noise.to(self.dtype), t.to(self.dtype), text)

        sides = {
            name: _step(net, theirs if name.startswith("plain") else ours) for name, net in self.networks().items()
        }
        return compare(sides, self.rounds)

    def sample(self, prompts: int, each: int) -> dict[str, list[float]]:
        batch, size = prompts * each, self.config.image_size
        noise, text, nothing = self.random(batch, 3, size, size), self.features(prompts), self.features(prompts + 1)[:1]
        rows, times = torch.arange(prompts, device=self.device).repeat_interleave(each), timesteps(25, 3.0)

        def ours(net: nn.Module) -> Side:
            def draw() -> Tensor:
                velocity = guided(net, Text(text, None, rows), Text(nothing), GUIDANCE, INTERVAL)
                return adams(velocity, noise, times, order=2)

            return draw

        def theirs(net: nn.Module) -> Side:
            own, none = text.repeat_interleave(each, 0), nothing.expand(batch, -1, -1)
            return lambda: plain.sample(net, noise.to(self.dtype), own, none, times, GUIDANCE, INTERVAL)[0]

        networks = self.networks(replay=True)
        sides = {name: (theirs if name.startswith("plain") else ours)(net) for name, net in networks.items()}
        return compare(sides, self.rounds)


def _copy(net: nn.Module) -> nn.Module:
    """A network that shares the weights: compiling it leaves the first one eager."""
    with torch.device("meta"):
        twin = type(net)(net.config)  # type: ignore[operator]
    twin.load_state_dict(net.state_dict(keep_vars=True), assign=True)
    return twin


def _step(net: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Side:
    """Forward, backward, AdamW: ours as training makes it, theirs with PyTorch's defaults."""
    if isinstance(net, PixNerd):
        optimiser = adamw(net.parameters(), OptimSettings(lr=1e-6))
    else:
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def step() -> None:
        loss(net).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def check() -> None:
    """Both sides must be PixNerd before their speed means anything."""
    g = golden.load("t2i")
    ours = golden.network("t2i")
    theirs = plain.PlainPixNerd(ours.config)
    theirs.load_state_dict(golden.weights(g))
    with torch.no_grad():
        for name, net in (("plain", theirs), ("ours", ours)):
            error = golden.error(net(g["in/x"], g["in/t"], g["in/y"]), g["out/v"])
            assert error < 2e-5, f"{name} is off the golden arrays by {error:.1e}"
            print(f"golden arrays: {name} is within {error:.1e}")


def on_cpu(options: argparse.Namespace) -> None:
    bench = Bench(SMALL, "cpu", torch.float32, options.rounds, options.sides)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PixNerd(SMALL).parameters())
    print(f"{count / 1e6:.1f} M parameters, {SMALL.image_size} px, fp32, CPU, {torch.get_num_threads()} threads")
    if "train" in options.what:
        print(f"\ntraining step, batch {options.batch}")
        show(bench.train(options.batch), _there(options.sides))
    if "sample" in options.what:
        print("\nsampling, 4 prompts x 4 images, 25 steps, guidance within (0.1, 1)")
        show(bench.sample(4, 4), _there(options.sides))


def on_gpu(options: argparse.Namespace) -> None:
    print(f"XXL/16, bf16, {torch.cuda.get_device_name()}; floor at {options.tflops:.0f} TFLOP/s")
    for size, batch in ((256, 96), (512, 24)):
        bench = Bench(
            preset("XXL/16").model_copy(update={"image_size": size}),
            "cuda",
            torch.bfloat16,
            options.rounds,
            options.sides,
        )
        if "train" in options.what:
            print(f"\ntraining step, {size} px, batch {batch}")
            times = bench.train(batch)
            show(times, _there(options.sides))
            show_floor(times, TRAIN_TFLOP[size] * batch / options.tflops)
        # Guided steps take two passes; with shift 3, seven of the 25 lie outside of the interval.
        passes = sum(2 if INTERVAL[0] < t < INTERVAL[1] else 1 for t in timesteps(25, 3.0)[:-1])
        for prompts, each in ((1, 1), (2, 4)) if "sample" in options.what else ():
            print(f"\nsampling, {size} px, {prompts} prompts x {each} images, 25 steps")
            times = bench.sample(prompts, each)
            show(times, _there(options.sides))
            show_floor(times, FORWARD_TFLOP[size] * passes * prompts * each / options.tflops)


def _there(sides: list[str]) -> tuple[str, ...]:
    return tuple(name for name in AGAINST if name in sides)


def main() -> None:
    names = [*AGAINST, "ours, eager", "ours, compiled"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=["train", "sample"], default=["train", "sample"])
    parser.add_argument("--sides", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="of a training step on the CPU")
    parser.add_argument("--tflops", type=float, default=790, help="what the GPU reaches in a large matrix product")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU where CUDA is installed
    check()
    torch.set_float32_matmul_precision("highest")
    if torch.cuda.is_available() and not options.cpu:
        on_gpu(options)
    else:
        on_cpu(options)


if __name__ == "__main__":
    main()
