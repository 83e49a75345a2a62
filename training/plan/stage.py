"""One training stage on given machines: what it computes, needs, exchanges, keeps and takes; and what makes it fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import isqrt
from typing import Any

from pydantic import ValidationError

from training.encoders.shapes import VisionShape
from training.model import ModelConfig, outline
from training.optim import is_in_a_block
from training.plan.machines import Machines
from training.plan.memory import FP32, Memory, Setup, Sizes, Stage, activations, encoding, memory
from training.plan.work import Encoders, Work, work
from training.settings import TrainSettings


@dataclass(frozen=True)
class Rates:
    """What the time and the cost follow from."""

    mfu: float  # the share of the peak that training reaches
    peak: float | None = None  # FLOP/s of a rank, in place of the known ones
    price: float | None = None  # of a GPU for an hour


@dataclass(frozen=True)
class StagePlan:
    """`settings.workers` are as many as the machines have ranks."""

    name: str
    settings: TrainSettings
    encoders: Encoders
    machines: Machines
    rates: Rates
    own_text: bool = False  # whether its checkpoint holds a text encoder

    @cached_property
    def config(self) -> ModelConfig:
        return self.settings.network()

    @cached_property
    def network(self) -> int:
        return sum(count for _, count, _ in self._parameters)

    @cached_property
    def head(self) -> int:
        """Parameters of REPA's head, with its biases."""
        hidden, vision = self.config.hidden, self._aligned_with
        return self._head_matrices + 2 * hidden + vision.width if vision else 0

    @property
    def _aligned_with(self) -> VisionShape | None:
        return self.encoders.vision if self.settings.objective.repa else None

    @cached_property
    def sizes(self) -> Sizes:
        text, vision, layers, _, lpips = self.encoders
        trained = self.network + self.head + text.trained(layers)
        muon = self._moved_by_muon if self.settings.optim.matrices == "muon" else 0
        return Sizes(
            trained=trained,
            held=self.network + self.head + (text.parameters if layers else 0),
            moments=2 * trained - muon,
            frozen=(0 if layers else text.parameters)
            + (vision.parameters if vision else 0)
            + (lpips.parameters if lpips else 0),
        )

    @cached_property
    def _parameters(self) -> list[tuple[str, int, int]]:
        """Name, count and axes of the network's parameters; they take no memory."""
        net = outline(self.config)
        return [(f"net.{name}", p.numel(), p.ndim) for name, p in net.named_parameters()]

    @property
    def _moved_by_muon(self) -> int:
        net = sum(count for name, count, axes in self._parameters if axes == 2 and is_in_a_block(name))
        text = self.encoders.text  # all of the head's layers are numbered as blocks are
        return net + self._head_matrices + text.matrices * min(self.settings.train_text, text.layers)

    @property
    def _head_matrices(self) -> int:
        hidden, vision = self.config.hidden, self._aligned_with
        return 2 * hidden * hidden + hidden * vision.width if vision else 0

    @cached_property
    def work(self) -> Work:
        return work(self.config, self.encoders, self.settings.objective, self.settings.steps)

    @property
    def images(self) -> int:
        return self.settings.steps * self.settings.batch

    @property
    def flop(self) -> float:
        return float(self.work.step) * self.images

    def setup(self, **changes: Any) -> Setup:
        s = self.settings
        share = s.batch // self.machines.ranks
        taken = {
            "ranks": self.machines.ranks,
            "micro_batch": min(s.micro_batch or share, share),
            "zero": s.zero,
            "offload": s.offload,
            "exact_gradients": s.exact_gradients,
            "bf16": s.precision == "bf16",
            "gpu": self.machines.device.gpu,
            "averages": self._averages,
            "exports": bool(s.export_every),
            "frozen_bf16": self.encoders.bf16,
        }
        return Setup(**(taken | changes))

    @cached_property
    def activations(self) -> dict[str, float]:
        return self._activations(self.settings.recomputed)

    def _activations(self, recomputed: int) -> dict[str, float]:
        setup = self.setup()
        objective, how = self.settings.objective, {"bf16": setup.bf16, "gpu": setup.gpu}
        return activations(self.config, self.encoders, objective, **how, recomputed=recomputed)

    def memory(self, **changes: Any) -> Memory:
        """A rank's memory, with settings of the recipe changed."""
        recomputed = 1 if changes.pop("checkpointing", None) else self.settings.recomputed
        image, passing = sum(self._activations(recomputed).values()), encoding(self.config, self.encoders)
        return memory(self.setup(**changes), self.sizes, image, passing)

    def fits(self, **changes: Any) -> bool | None:
        """None: the machines' memory is not known."""
        most = self.machines.device.memory
        return None if most is None else self.memory(**changes).on_device <= most

    def ways(self) -> list[dict[str, Any]]:
        """Changes of settings with which it fits: each setting that is enough alone, or the first pair or three."""
        alone: dict[str, dict[str, Any]] = {}
        for change in self._changes():
            if self.fits(**change) and self._allowed(change):
                if len(change) > 1:
                    return list(alone.values()) or [change]
                alone.setdefault(next(iter(change)), change)
        return list(alone.values())

    def _changes(self) -> list[dict[str, Any]]:
        """What may be changed without changing what is learnt, the fewest settings first and then the cheapest."""
        now = self.setup()
        zeros: list[Stage] = [stage for stage in (2, 3) if stage > now.zero and now.ranks > 1]
        values: dict[str, list[Any]] = {
            "offload": [None] if now.offload else [None, True],
            "checkpointing": [None] if self.settings.recomputed else [None, "blocks"],
            "exact_gradients": [None, False] if now.exact_gradients else [None],
            "zero": [None, *zeros],
            "micro_batch": [None, *self._smaller_micro_batches(now.micro_batch)],
        }
        chosen = (dict(zip(values, choice, strict=True)) for choice in product(*values.values()))
        changes = [{name: value for name, value in c.items() if value is not None} for c in chosen]
        return sorted(filter(None, changes), key=len)

    def _smaller_micro_batches(self, now: int) -> list[int]:
        """Those that divide a rank's share, the largest first."""
        share = self.settings.batch // self.machines.ranks
        small = [micro for micro in range(1, isqrt(share) + 1) if share % micro == 0]
        divisors = {*small, *(share // micro for micro in small)}
        return sorted((micro for micro in divisors if micro < now), reverse=True)

    def _allowed(self, change: dict[str, Any]) -> bool:
        try:
            TrainSettings.model_validate(self.settings.model_dump() | change)
        except ValidationError:
            return False
        return True

    @property
    def step_seconds(self) -> float | None:
        """FLOP / (ranks x peak x mfu), each precision by its own peak; None: the peak is not known.

        What is computed anew takes its time, but is not among the FLOP of a step.
        """
        device, bf16 = self.machines.device, self.settings.precision == "bf16"
        trained = self.rates.peak or (device.bf16 if bf16 else device.fp32)
        frozen = self.rates.peak or (device.bf16 if self.encoders.bf16 else device.fp32)
        if trained is None or frozen is None:
            return None
        seconds = (self.work.trained + self.computed_anew) / trained + self.work.frozen / frozen
        return seconds * self.settings.batch / (self.machines.ranks * self.rates.mfu)

    @property
    def computed_anew(self) -> float:
        """FLOP of an image in blocks whose inside is not kept."""
        if not self.settings.recomputed:
            return 0.0
        parts, config = self.work.forward, self.config
        stacks = (
            (config.blocks, parts["blocks"]),
            (config.text_blocks, parts["text refine"]),
            (config.field_blocks, parts.get("field weights", 0) + parts.get("field products", 0)),
        )
        return sum(flop * (blocks // self.settings.recomputed) / blocks for blocks, flop in stacks if blocks)

    @property
    def hours(self) -> float | None:
        return None if self.step_seconds is None else self.settings.steps * self.step_seconds / 3600

    @property
    def cost(self) -> float | None:
        if self.hours is None or self.rates.price is None:
            return None
        return self.hours * self.machines.ranks * self.rates.price

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a step, and as many that it receives: rings of all ranks, no matter which links.

        ZeRO 1 exchanges gradients once a step, ZeRO 2 and 3 for each micro-batch. Afterwards weights are brought
        together; in ZeRO 3 for each pass, forward and backward.
        """
        setup, sizes = self.setup(), self.sizes
        rounds = self.settings.batch // (setup.ranks * setup.micro_batch)
        gradients, weights = setup.width * sizes.trained, setup.width * sizes.trained
        if setup.zero == 3:
            total = rounds * (2 * setup.width * sizes.held + gradients)
        elif setup.zero == 2:
            total = rounds * gradients + weights
        else:
            whole = setup.bf16 and setup.exact_gradients and not setup.offload  # all-reduced, not scattered
            total = gradients * (2 if whole else 1) + weights
        return total * (setup.ranks - 1) / setup.ranks

    @property
    def state(self) -> int:
        """Bytes of a training state: masters, moments and averages, in fp32."""
        return FP32 * ((1 + self._averages) * self.sizes.trained + self.sizes.moments)

    @property
    def _averages(self) -> int:
        return len(self.settings.ema.profiles())

    @property
    def states(self) -> int:
        """Most states in the store at once: those that are kept, and one that is committed before an old one goes."""
        s = self.settings
        written = (s.steps - 1) // s.save_every
        for_good = (s.steps - 1) // s.keep_every if s.keep_every else 0
        return min(written, s.keep + 1 + for_good)

    @property
    def kept_averages(self) -> int:
        """Bytes of all averages that are kept for good."""
        s = self.settings
        times = (s.steps - 1) // s.ema.keep_every if s.ema.keep_every else 0
        times += s.ema.keeps(s.steps, s.steps)
        return FP32 * self.sizes.trained * self._averages * times

    @property
    def checkpoints(self) -> int:
        """That which it ends with, and those on the way."""
        s = self.settings
        return 1 + ((s.steps - 1) // s.export_every if s.export_every else 0)

    @property
    def checkpoint(self) -> int:
        """Bytes of the EMA weights that it ends with, and of its text encoder if that is not a published one."""
        return FP32 * (self.network + self.head + (self.encoders.text.parameters if self.own_text else 0))
