from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.diffusion import path
from training.diffusion.draws import draw, normal, words
from training.diffusion.objective import by_time, velocity_loss
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
        assert not any(torch.equal(a, b) for a, b in zip(first.bits_BN, again.bits_BN, strict=True))
        assert not torch.isin(first.t_B, again.t_B).any()


def test_a_larger_image_and_another_rate_leave_time_and_drop_alone():
    small, large = draw(3, range(50), SHAPE), draw(3, range(50), (3, 8, 8))
    assert torch.equal(small.t_B, large.t_B)
    assert torch.equal(small.drop_B, large.drop_B)
    often = draw(3, range(50), SHAPE, drop=0.5)
    assert torch.equal(often.drop_B | small.drop_B, often.drop_B)
    for again in (large, often):
        assert torch.equal(small.choice_B, again.choice_B)


def test_bits_are_drawn_into_what_is_given():
    whole, given = draw(3, range(50), SHAPE), torch.zeros(60, words(SHAPE), dtype=torch.int16)
    draw(3, range(50), SHAPE, bits_BN=given[5:55])
    assert torch.equal(given[5:55], whole.bits_BN)
    assert not given[:5].any() and not given[55:].any()


def test_draws_have_the_distributions_that_they_should():
    many = draw(0, range(20_000), (1, 2, 2), shift=2.0, drop=0.1)
    noise_BCHW = normal(many.bits_BN, (1, 2, 2))
    assert abs(float(noise_BCHW.mean())) < 0.02
    assert abs(float(noise_BCHW.std()) - 1) < 0.02
    assert abs(float(many.drop_B.float().mean()) - 0.1) < 0.01
    # The logit of a shifted time is a normal, moved by -ln(shift).
    logit = torch.logit(many.t_B)
    assert abs(float(logit.mean()) + math.log(2)) < 0.03
    assert abs(float(logit.std()) - 1) < 0.03
    # Streams of one sample are independent of each other.
    spread = (logit + math.log(2)).abs()
    assert abs(float(spread[many.drop_B].mean() / spread[~many.drop_B].mean()) - 1) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([logit, noise_BCHW[:, 0, 0, 0]]))[0, 1])) < 0.03


def test_noise_is_normal_to_its_tails():
    """4.7 million values; each bound is five standard errors of its estimate or more."""
    shape = (3, 256, 256)
    noise = normal(draw(0, range(24), shape).bits_BN, shape).double()
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / count**0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / count) ** 0.5
    assert abs(float((noise**3).mean())) < 5 * (15 / count) ** 0.5
    assert abs(float((noise**4).mean()) - 3) < 5 * (96 / count) ** 0.5
    for limit in (0.5, 1, 2, 3, 4, 4.5):
        expected = math.erfc(limit / 2**0.5) * count
        assert abs(int((noise.abs() > limit).sum()) - expected) < 5 * expected**0.5, limit
    flat = noise.flatten(1)
    half = flat.shape[1] // 2
    for shift in (1, 4, 256, half):  # neighbours, words of one machine word, rows, the two of a pair
        one, other = flat[:, :-shift], flat[:, shift:]
        error = 5 / one.numel() ** 0.5
        assert abs(float((one * other).mean())) < error, shift
        assert abs(float(((one**2 - 1) * (other**2 - 1)).mean())) < 2 * error, shift


def test_no_noise_comes_twice():
    """Over positions, seeds, and the numbers of ranks that a batch may be cut for."""
    shape = (3, 16, 16)
    drawn = torch.cat([draw(seed, range(start, start + 500), shape).bits_BN for seed in (0, 1) for start in (0, 2**40)])
    words = drawn.view(torch.int64)  # of 64 bits, of which none should come twice among 384,000
    assert len(torch.unique(words)) == words.numel()
    assert torch.equal(draw(1, [2**40 + 7], shape).bits_BN[0], drawn[1507])


def test_noise_is_the_same_numbers_for_good():
    """The first values of a position: others would be another format of training."""
    drawn = draw(3, [5], (3, 8, 8))
    assert drawn.bits_BN[0, :4].tolist() == [-18270, 18074, -32200, 28357]
    assert normal(drawn.bits_BN, (3, 8, 8)).flatten()[[0, 1, 96, 97]].tolist() == [
        -0.9084045886993408,
        -1.0620627403259277,
        -0.17778930068016052,
        2.1341443061828613,
    ]


def test_an_odd_number_of_values_is_drawn_too():
    assert normal(draw(0, range(2), (3, 5, 7)).bits_BN, (3, 5, 7)).shape == (2, 3, 5, 7)


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


def test_a_sample_of_weight_nought_counts_in_no_sum():
    losses, t = torch.rand(8), torch.rand(8)
    weight_B = torch.tensor([0.0, 1] * 4)
    sums, counts = by_time(losses, t, 10, weight_B)
    assert float(counts.sum()) == 4
    torch.testing.assert_close(sums.sum(), losses[1::2].sum())
    features = torch.randn(2, 16, 12)
    loss = alignment_loss(torch.stack([-features[0], features[1]]), features, torch.tensor([0.0, 1.0]))
    assert float(loss) == pytest.approx(0, abs=1e-6)


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
