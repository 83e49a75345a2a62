from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infra.errors import SettingsError
from tests.bench.bench_memory import peak
from tests.training import golden
from training.diffusion.samplers import (
    SOLVERS,
    adams,
    adams_weights,
    euler,
    guided,
    noise_for,
    solver,
    timesteps,
    to_uint8,
)
from training.model import Text


def decay(x: Tensor, t: float) -> Tensor:
    """dx/dt = -2 x + cos(3 t)."""
    return -2 * x + math.cos(3 * t)


def decay_end(x0: Tensor) -> Tensor:
    """Its solution at t = 1: a particular one, (2 cos 3t + 3 sin 3t) / 13, and what is left of the start."""
    return (2 * math.cos(3) + 3 * math.sin(3)) / 13 + (x0 - 2 / 13) * math.exp(-2)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("adams2", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(name: str, order: int, shift: float):
    # One first-order step, at the start or at the end, costs no more than second order does. (It does cost the third:
    # Adams-3 begins with an Euler step too, so it is not here.)
    x0 = torch.tensor([1.0, -0.5])
    errors = [float((solver(name)(decay, x0, timesteps(n, shift)) - decay_end(x0)).abs().max()) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True), st.integers(1, 10))
def test_adams_weights_integrate_every_polynomial_that_they_should(places: list[int], steps: int):
    # Fortieths: nodes that all but coincide would measure the arithmetic's noise instead.
    nodes = [place / 40 for place in sorted(places)]
    start, step = nodes[-1], steps / 40
    end = start + step
    weights = adams_weights(nodes, start, end)
    assert sum(weights) == pytest.approx(1)
    for power in range(len(nodes)):
        exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1) / step
        assert sum(w * t**power for w, t in zip(weights, nodes, strict=True)) == pytest.approx(exact, abs=1e-6)


def test_adams_2_with_even_steps_is_the_textbooks():
    assert adams_weights([0.1, 0.2], 0.2, 0.3) == pytest.approx([-0.5, 1.5])


def test_adams_1_is_euler():
    g = golden.load("euler")
    velocity = guided(golden.network("t2i"), g["in/cond"], g["in/uncond"], 3.0)
    times = timesteps(5, 2.0)
    x = euler(velocity, g["in/noise"], times)
    assert torch.equal(adams(velocity, g["in/noise"], times, order=1), x)
    by_hand = g["in/noise"]
    for now, then in itertools.pairwise(times):
        by_hand = by_hand + (then - now) * velocity(by_hand, now)
    torch.testing.assert_close(x, by_hand.detach())


def test_guidance_of_1_is_the_conditional_model():
    g = golden.load("euler")
    net = golden.network("t2i")
    x, cond = g["in/noise"], g["in/cond"]
    torch.testing.assert_close(guided(net, cond, g["in/uncond"], 1.0)(x, 0.4), net(x, torch.full((2,), 0.4), cond))
    # and so it is by the formula, a hair away from 1
    torch.testing.assert_close(
        guided(net, cond, g["in/uncond"], 1 + 1e-6)(x, 0.4), net(x, torch.full((2,), 0.4), cond), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["labels", "features", "text"])
def test_both_passes_in_one_call_are_the_two_passes(kind: str):
    net = golden.network("c2i" if kind == "labels" else "t2i")
    x = golden.load("euler")["in/noise"]
    x, t = torch.cat([x, x.flip(0)]), torch.full((4,), 0.3)
    g = golden.load("euler")
    condition: Tensor | Text
    nothing: Tensor | Text
    if kind == "labels":
        condition, nothing = torch.tensor([1, 2, 3, 4]), torch.tensor([10])
        v_c, v_u = net(x, t, condition), net(x, t, nothing.expand(4))
    elif kind == "features":
        condition, nothing = torch.cat([g["in/cond"]] * 2), g["in/uncond"][:1]
        v_c, v_u = net(x, t, condition), net(x, t, g["in/uncond"][:1].expand(4, -1, -1))
    else:
        condition, nothing = Text(g["in/cond"], None, torch.tensor([0, 0, 1, 1])), Text(g["in/uncond"][:1])
        v_c = net(x, t, g["in/cond"].repeat_interleave(2, 0))
        v_u = net(x, t, g["in/uncond"][:1].expand(4, -1, -1))
    found = guided(net, condition, nothing, 3.0)(x, 0.3)
    torch.testing.assert_close(found, v_u + 3 * (v_c - v_u), rtol=1e-4, atol=1e-4)


def test_the_unconditional_pass_is_not_run_where_it_is_not_used():
    rows: list[int] = []

    class Net:
        def __call__(self, x: Tensor, t_B: Tensor, condition: Any, /) -> Tensor:
            rows.append(len(x))
            return -x

        def embed(self, condition: Any) -> Any:
            return condition

    velocity = guided(Net(), torch.tensor([1, 2]), torch.tensor([5]), 2.0, (0.1, 0.9))
    x = torch.zeros(2, 3, 4, 4)
    for t in (0.0, 0.1, 0.100001, 0.899999, 0.9, 1.0):  # both ends are strict
        velocity(x, t)
    assert rows == [2, 2, 4, 4, 2, 2]


def test_heun_judges_the_interval_at_each_evaluation_and_ends_with_euler():
    seen: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    solver("heun")(velocity, torch.zeros(1), timesteps(2))
    assert seen == [0.0, 0.5, 0.5]


def test_the_state_is_fp32_and_every_step_is_shown():
    frames: list[tuple[int, torch.dtype]] = []
    for name in SOLVERS:
        frames.clear()
        x = solver(name)(
            lambda x, t: x.bfloat16().float(),
            torch.ones(2, dtype=torch.bfloat16),
            timesteps(3),
            lambda step, x: frames.append((step, x.dtype)),
        )
        assert x.dtype == torch.float32
        assert frames == [(step, torch.float32) for step in (1, 2, 3)]


def test_timesteps():
    assert timesteps(4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert timesteps(2, 3.0) == pytest.approx([0.0, 0.25, 1.0])
    assert 0.1 in timesteps(50)  # exactly: a strict interval from 0.1 leaves this step unguided


@pytest.mark.filterwarnings("error")
def test_times_that_coincide_are_found_in_the_result_and_not_told_by_numpy():
    assert not all(map(math.isfinite, adams_weights([0.0, 1e-300, 2e-300], 2e-300, 3e-300)))


def test_noise_belongs_to_its_seed():
    assert torch.equal(noise_for(2, (3, 4, 4)), noise_for(2, (3, 4, 4)))
    assert not torch.equal(noise_for(2, (3, 4, 4)), noise_for(3, (3, 4, 4)))
    torch.manual_seed(2)
    assert torch.equal(noise_for(2, (3, 4, 4)), torch.randn(3, 4, 4))


def test_eight_bits_are_rounded_and_clamped():
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))


def test_an_unknown_solver_names_the_nearest():
    with pytest.raises(SettingsError, match="adams2"):
        solver("adam2")


def test_memory_does_not_grow_with_the_steps():
    few, many = (peak("tiny", 320, steps) for steps in (8, 48))
    frame = 3 * 320 * 320 * 4 / 2**20
    assert many - few < 20 * frame  # a kept trajectory would be 80 frames: the states and the velocities
