"""Our network against the published one, eager and under torch.compile: the authors' code, and a plain twin of it.

`--reference CHECKOUT` runs the authors' code itself (`authors`); without it there is the twin alone (`plain_pixnerd`).
All sides have the same weights and take turns in one process, and what they compute is compared before it is timed. A
training step is forward, backward and AdamW, with times and noise drawn inside; sampling is 4 prompts of 4 images,
guided as published, in 25 steps of Adams-2. On a CPU: fp32, 41 M parameters at 128 px. On a GPU: XXL/16 in bf16 at 256
and 512 px, beside the floor, which is the time that the matrix products alone take at the rate given by --tflops.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from infra.errors import SettingsError
from tests.bench import plain_pixnerd as plain
from tests.bench.authors import Authors
from tests.bench.sides import Side, compare, show, show_floor
from tests.training import golden
from training.diffusion.objective import velocity_loss
from training.diffusion.path import logit_normal_time
from training.diffusion.samplers import adams, guided, timesteps
from training.model import ModelConfig, PixNerd, Text, preset
from training.model.compiled import compile_network
from training.model.published import reference
from training.optim import OptimSettings, optimiser

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
# As the published text-to-image recipe has them; its guidance interval leaves out the first step alone.
GUIDANCE, INTERVAL, STEPS, SAMPLE_SHIFT, TRAIN_SHIFT = 4.0, (0.0, 1.0), 25, 3.0, 4.0
MAKES, HOW = ("authors", "plain", "ours"), ("eager", "compiled")
LIMITS = {"network": 2e-5, "loss": 1e-5, "gradient": 1e-4, "pictures": 1e-3}  # of what sides may differ, in fp32

# Of XXL/16, by image size: TFLOP of a training step (encoders left out) and of a forward pass, an image.
TRAIN_TFLOP = {256: 1.232, 512: 4.614}
FORWARD_TFLOP = {256: 0.4099, 512: 1.5377}


@dataclass(frozen=True)
class Make:
    """One way to write PixNerd down: its network, its loss, its sampler."""

    network: Callable[[ModelConfig], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # of images and text
    sample: Callable[[nn.Module, Tensor, Tensor, Tensor, int], Tensor]  # noise, text, nothing, images a prompt


def our_make() -> Make:
    def loss(net: nn.Module, images: Tensor, text: Tensor) -> Tensor:
        t_B, noise = _drawn(images)
        return velocity_loss(net, images, text, noise, t_B).per_sample_B.mean()

    def sample(net: nn.Module, noise: Tensor, text: Tensor, nothing: Tensor, each: int) -> Tensor:
        rows = torch.arange(len(text), device=text.device).repeat_interleave(each)
        velocity = guided(net, Text(text, None, rows), Text(nothing), GUIDANCE, INTERVAL)  # type: ignore[arg-type]
        return adams(velocity, noise, timesteps(STEPS, SAMPLE_SHIFT), order=2)

    return Make(PixNerd, loss, sample)


def plain_make() -> Make:
    def loss(net: nn.Module, images: Tensor, text: Tensor) -> Tensor:
        t_B, noise = _drawn(images)
        return plain.loss(net, images, noise, t_B, text)

    def sample(net: nn.Module, noise: Tensor, text: Tensor, nothing: Tensor, each: int) -> Tensor:
        noise, own = noise.to(text.dtype), text.repeat_interleave(each, 0)
        times = timesteps(STEPS, SAMPLE_SHIFT)
        return plain.sample(net, noise, own, nothing.expand(len(own), -1, -1), times, GUIDANCE, INTERVAL)[0]

    return Make(plain.PlainPixNerd, loss, sample)


def authors_make(checkout: Path) -> Make:
    code = Authors(checkout)
    drawn = code.sample(STEPS, SAMPLE_SHIFT, GUIDANCE, INTERVAL)

    @torch.no_grad()
    def sample(net: nn.Module, noise: Tensor, text: Tensor, nothing: Tensor, each: int) -> Tensor:
        own = text.repeat_interleave(each, 0)
        return drawn(net, noise.to(text.dtype), own, nothing.expand(len(own), -1, -1))

    return Make(code.network, code.loss(TRAIN_SHIFT), sample)


def _drawn(images: Tensor) -> tuple[Tensor, Tensor]:
    """Times and noise, from PyTorch's own generator and in the order in which the authors' trainer draws them."""
    t_B = logit_normal_time(torch.randn(len(images)).to(images.device, images.dtype), TRAIN_SHIFT)
    return t_B, torch.randn_like(images)


@dataclass
class Bench:
    config: ModelConfig
    device: str
    dtype: torch.dtype
    rounds: int
    makes: Mapping[str, Make]
    sides: list[str]  # "ours, eager"

    def networks(self, *, replay: bool = False) -> dict[str, nn.Module]:
        """The same weights in each; the compiled one of a kind shares its eager one's."""
        torch.manual_seed(0)
        with torch.device(self.device):
            ours = PixNerd(self.config)
        assert ours.field is not None
        nn.init.normal_(ours.field.out.weight, std=0.02)  # at zero nothing would reach the weights before it
        theirs = reference.to_reference(ours.state_dict(), self.config)
        eager: dict[str, nn.Module] = {}
        for name in dict.fromkeys(side.split(", ")[0] for side in self.sides):
            with torch.device(self.device):
                net = ours if name == "ours" else self.makes[name].network(self.config)
            if net is not ours:
                net.load_state_dict(theirs)
            eager[name] = net.to(self.dtype)
        return {side: _built(eager[make], how, replay) for side in self.sides for make, how in [side.split(", ")]}

    def random(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def features(self, captions: int) -> Tensor:
        return self.random(captions, self.config.text_tokens, self.config.text_dim)

    def make_of(self, side: str) -> Make:
        return self.makes[side.split(", ")[0]]

    def step(self, name: str, net: nn.Module, batch: int) -> Side:
        """Forward, backward, AdamW: ours as training makes it, the others' with PyTorch's defaults, as published."""
        images, text = self._images(batch), self.features(batch)
        loss = self.make_of(name).loss
        if isinstance(net, PixNerd):
            adamw = optimiser(net.named_parameters(), OptimSettings(lr=1e-6))
        else:
            adamw = torch.optim.AdamW(net.parameters(), lr=1e-6)

        def step() -> None:
            loss(net, images, text).backward()
            adamw.step()
            adamw.zero_grad()

        return step

    def _images(self, batch: int) -> Tensor:
        assert self.config.image_size is not None
        return self.random(batch, 3, self.config.image_size, self.config.image_size).clamp(-1, 1)

    def drawing(self, name: str, net: nn.Module, prompts: int, each: int) -> Callable[[], Tensor]:
        noise = self._images(prompts * each).float()
        text, nothing = self.features(prompts), self.features(prompts + 1)[:1]
        sample = self.make_of(name).sample
        return lambda: sample(net, noise, text, nothing, each)

    def train(self, batch: int) -> dict[str, list[float]]:
        sides = {name: self.step(name, net, batch) for name, net in self.networks().items()}
        return compare(sides, self.rounds)

    def sample(self, prompts: int, each: int) -> dict[str, list[float]]:
        networks = self.networks(replay=True)
        return compare({name: self.drawing(name, net, prompts, each) for name, net in networks.items()}, self.rounds)

    def check(self) -> None:
        """What each side computes, eager, against ours: the network's output, the loss, a gradient and pictures."""
        names = [name for name in self.sides if name.endswith("eager")]
        nets = Bench(self.config, self.device, self.dtype, 0, self.makes, ["ours, eager", *names]).networks()
        wanted = self._outputs("ours, eager", nets["ours, eager"])
        for name in names:
            found = self._outputs(name, nets[name])
            errors = {what: golden.error(found[what], value) for what, value in wanted.items()}
            print(f"{name}: off ours by " + ", ".join(f"{what} {error:.0e}" for what, error in errors.items()))
            for what, error in errors.items():
                if not error < LIMITS[what]:
                    raise SettingsError(
                        f"{name}: its {what} is another than ours, by {error:.1e}, so their times say nothing",
                        remedy="name a checkout of the code that the published checkpoints were trained with",
                    )

    def _outputs(self, name: str, net: nn.Module) -> dict[str, Tensor]:
        make, images, text = self.make_of(name), self._images(2), self.features(2)
        t_B = torch.tensor([0.2, 0.7], device=self.device)
        with torch.no_grad():
            v = net(images, t_B, text)
        torch.manual_seed(0)
        loss = make.loss(net, images, text)
        loss.backward()
        first = (net.stem if isinstance(net, PixNerd) else net.s_embedder.proj).weight  # type: ignore[union-attr]
        assert isinstance(first, nn.Parameter) and first.grad is not None
        gradient = first.grad.detach().clone()
        net.zero_grad()
        return {
            "network": v,
            "loss": loss.detach(),
            "gradient": gradient,
            "pictures": self.drawing(name, net, 1, 2)(),
        }


def _built(net: nn.Module, how: str, replay: bool) -> nn.Module:
    if how == "eager":
        return net
    net = copy.copy(net)  # it shares the weights, and compiling it leaves the first one eager
    if isinstance(net, PixNerd):
        compile_network(net, replay=replay)
    else:
        net.compile(dynamic=False)
    return net


def check_golden() -> None:
    """Twin and ours must be PixNerd before their speed means anything."""
    g = golden.load("t2i")
    ours = golden.network("t2i")
    theirs = plain.PlainPixNerd(ours.config)
    theirs.load_state_dict(golden.weights(g))
    with torch.no_grad():
        for name, net in (("plain", theirs), ("ours", ours)):
            error = golden.error(net(g["in/x"], g["in/t"], g["in/y"]), g["out/v"])
            assert error < 2e-5, f"{name} is off the golden arrays by {error:.1e}"
            print(f"golden arrays: {name} is within {error:.1e}")


def on_cpu(options: argparse.Namespace, makes: Mapping[str, Make]) -> None:
    bench = Bench(SMALL, "cpu", torch.float32, options.rounds, makes, options.sides)
    bench.check()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in PixNerd(SMALL).parameters())
    print(f"{count / 1e6:.1f} M parameters, {SMALL.image_size} px, fp32, CPU, {torch.get_num_threads()} threads")
    for batch in options.batch if "train" in options.what else ():
        print(f"\ntraining step, batch {batch}{_load()}")
        show(bench.train(batch), _against(options.sides))
    if "sample" in options.what:
        print(f"\nsampling, 4 prompts x 4 images, {STEPS} steps, guidance {GUIDANCE} within {INTERVAL}{_load()}")
        show(bench.sample(4, 4), _against(options.sides))


def _load() -> str:
    """What else the machine does: with more than its cores to run, times are of the crowd."""
    return f"; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def on_gpu(options: argparse.Namespace, makes: Mapping[str, Make]) -> None:
    print(f"XXL/16, bf16, {torch.cuda.get_device_name()}; floor at {options.tflops:.0f} TFLOP/s")
    for size, batch in ((256, 96), (512, 24)):
        config = preset("XXL/16").model_copy(update={"image_size": size})
        bench = Bench(config, "cuda", torch.bfloat16, options.rounds, makes, options.sides)
        if "train" in options.what:
            print(f"\ntraining step, {size} px, batch {batch}")
            times = bench.train(batch)
            show(times, _against(options.sides))
            show_floor(times, TRAIN_TFLOP[size] * batch / options.tflops)
        # Guided steps take two passes.
        passes = sum(2 if INTERVAL[0] < t < INTERVAL[1] else 1 for t in timesteps(STEPS, SAMPLE_SHIFT)[:-1])
        for prompts, each in ((1, 1), (2, 4)) if "sample" in options.what else ():
            print(f"\nsampling, {size} px, {prompts} prompts x {each} images, {STEPS} steps")
            times = bench.sample(prompts, each)
            show(times, _against(options.sides))
            show_floor(times, FORWARD_TFLOP[size] * passes * prompts * each / options.tflops)


def _against(sides: list[str]) -> tuple[str, ...]:
    """What each side's times are divided by: the authors' code where it runs, else the twin."""
    other = "authors" if any(name.startswith("authors") for name in sides) else "plain"
    return tuple(name for name in sides if name.startswith(other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="a checkout of the authors' code, run too")
    parser.add_argument("--what", nargs="+", choices=["train", "sample"], default=["train", "sample"])
    parser.add_argument("--sides", nargs="+", choices=[f"{m}, {h}" for m in MAKES for h in HOW], help="only these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="of a training step on the CPU")
    parser.add_argument("--tflops", type=float, default=790, help="what the GPU reaches in a large matrix product")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it misses a GPU where CUDA is installed
    makes = {"plain": plain_make(), "ours": our_make()}
    if options.reference is not None:
        makes = {"authors": authors_make(options.reference), **makes}
    options.sides = options.sides or [f"{make}, {how}" for make in makes for how in HOW]
    if "authors" not in makes and any(name.startswith("authors") for name in options.sides):
        parser.error("--reference CHECKOUT says where the authors' code lies")
    check_golden()
    torch.set_float32_matmul_precision("highest")
    (on_gpu if torch.cuda.is_available() and not options.cpu else on_cpu)(options, makes)


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        sys.exit(f"{error.message}\n{error.remedy}")
