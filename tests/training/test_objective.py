from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.diffusion import path
from training.diffusion.objective import by_time, draw, velocity_loss
from training.diffusion.prediction import velocity_of_image
from training.diffusion.repa import alignment, alignment_loss
from training.model.repa_head import RepaHead

SHAPE = (3, 4, 4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63), start=st.integers(0, 2**50), cut=st.integers(0, 8), order=st.permutations(range(8)))
def test_a_samples_draws_do_not_depend_on_who_draws_them_with_it(seed: int, start: int, cut: int, order: list[int]):
    positions = [start + i for i in range(8)]
    whole = draw(seed, positions, SHAPE)
    parts = [draw(seed, part, SHAPE) for part in (positions[:cut], positions[cut:])]
    shuffled = draw(seed, [positions[i] for i in order], SHAPE)
    for all_of_them, first, second, other in zip(whole, *parts, shuffled, strict=True):
        assert torch.equal(all_of_them, torch.cat([first, second]))
        assert torch.equal(all_of_them[order], other)


def test_the_second_epoch_and_another_seed_draw_anew():
    images = 64
    first, second = draw(0, range(images), SHAPE), draw(0, range(images, 2 * images), SHAPE)
    other = draw(1, range(images), SHAPE)
    for again in (second, other):
        assert not any(torch.equal(a, b) for a, b in zip(first.noise_BCHW, again.noise_BCHW, strict=True))
        assert not torch.isin(first.t_B, again.t_B).any()


def test_a_larger_image_and_another_rate_leave_time_and_drop_alone():
    small, large = draw(3, range(50), SHAPE), draw(3, range(50), (3, 8, 8))
    assert torch.equal(small.t_B, large.t_B)
    assert torch.equal(small.drop_B, large.drop_B)
    often = draw(3, range(50), SHAPE, drop=0.5)
    assert torch.equal(often.drop_B | small.drop_B, often.drop_B)


def test_draws_have_the_distributions_that_they_should():
    many = draw(0, range(20_000), (1, 2, 2), shift=2.0, drop=0.1)
    noise = many.noise_BCHW.flatten()
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float(many.drop_B.float().mean()) - 0.1) < 0.01
    # The logit of a shifted time is a normal, moved by -ln(shift).
    logit = torch.logit(many.t_B)
    assert abs(float(logit.mean()) + math.log(2)) < 0.03
    assert abs(float(logit.std()) - 1) < 0.03
    # Streams of one sample are independent of each other.
    spread = (logit + math.log(2)).abs()
    assert abs(float(spread[many.drop_B].mean() / spread[~many.drop_B].mean()) - 1) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([logit, many.noise_BCHW[:, 0, 0, 0]]))[0, 1])) < 0.03


@given(st.floats(0, 1), st.floats(0.5, 8))
def test_time_shift_keeps_the_ends_and_the_order(t: float, shift: float):
    shifted = path.shift_time(torch.tensor([0.0, t, 1.0], dtype=torch.float64), shift)
    assert shifted[0] == 0
    assert shifted[2] == 1
    assert shifted[0] <= shifted[1] <= shifted[2]


def test_path_ends_and_its_velocity_lead_from_noise_to_data():
    x, noise = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    t = torch.tensor([0.0, 0.6, 1.0])
    x_t, v = path.interpolate(x, noise, t), path.velocity(x, noise)
    assert torch.equal(x_t[0], noise[0])
    assert torch.equal(x_t[2], x[2])
    torch.testing.assert_close(velocity_of_image(x[:2], x_t[:2], t[:2]), v[:2], rtol=1e-5, atol=1e-5)


def test_the_loss_is_nought_for_the_true_velocity_and_counts_each_sample_alone():
    x, noise, t = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE), torch.rand(3)
    wrong = torch.tensor([0.0, 1.0, 2.0])

    def net(x_t: Tensor, t_B: Tensor, condition: Tensor) -> Tensor:
        return x - noise + wrong.view(-1, 1, 1, 1)

    torch.testing.assert_close(velocity_loss(net, x, torch.zeros(3), noise, t).per_sample_B, wrong**2)


def test_loss_by_time_adds_up():
    each, t = torch.rand(100), torch.cat([torch.rand(98), torch.tensor([0.0, 1.0])])
    sums, counts = by_time(each, t, 10)
    assert int(counts.sum()) == 100
    torch.testing.assert_close(sums.sum(), each.sum())
    third = (t >= 0.2) & (t < 0.3)
    torch.testing.assert_close(sums[2], each[third].sum())
    assert int(counts[2]) == int(third.sum())


def test_alignment_tells_matched_from_shuffled():
    features = torch.randn(8, 16, 12)
    result = alignment(3 * features, features)
    assert float(result.matched) == pytest.approx(1)
    assert abs(float(result.shuffled)) < 0.1
    assert float(alignment_loss(3 * features, features)) == pytest.approx(0, abs=1e-6)
    assert float(alignment_loss(-features, features)) == pytest.approx(2)


def test_the_alignment_head_learns():
    torch.manual_seed(0)
    head, tokens, features = RepaHead(16, 8), torch.randn(4, 9, 16), torch.randn(4, 9, 8)
    optimiser = torch.optim.Adam(head.parameters(), lr=1e-2)
    before = alignment_loss(head(tokens), features).item()
    for _ in range(60):
        optimiser.zero_grad()
        alignment_loss(head(tokens), features).backward()
        optimiser.step()
    assert alignment_loss(head(tokens), features).item() < before / 2
