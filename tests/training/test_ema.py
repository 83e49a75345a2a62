"""Averages of the weights: each is what it is alone, and others can be made of those that were kept."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from infra.records import Profile
from training.ema import Ema, EmaSettings
from training.profiles import GROUPS, Kept, exponent, fit, weights

WIDTHS = [0.05, 0.1]


def walk(steps: int, size: int = 50) -> torch.Tensor:
    """Weights after each update, [steps + 1, size]; the first are those before any."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps + 1, size, generator=generator).cumsum(0)


def averaged(path: torch.Tensor, settings: EmaSettings) -> dict[str, list[torch.Tensor]]:
    """Every average after each update."""
    ema = Ema([path[0]], settings)
    after: dict[str, list[torch.Tensor]] = {name: [] for name in ema.profiles}
    for step, master in enumerate(path[1:]):
        ema.update([master], step)
        for name, [shard] in ema.shards.items():
            after[name].append(shard.clone())
    return after


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_beside_each_other_are_those_of_runs_with_one_each(warmup: bool):
    path = walk(40)
    together = averaged(path, EmaSettings(decay=0.9, warmup=warmup, more_decays=[0.5, 0.99], sigma_rel=WIDTHS))
    assert list(together) == ["ema", "ema-decay-0.5", "ema-decay-0.99", "ema-sigma-0.05", "ema-sigma-0.1"]
    for name, decay in {"ema": 0.9, "ema-decay-0.5": 0.5, "ema-decay-0.99": 0.99}.items():
        alone = averaged(path, EmaSettings(decay=decay, warmup=warmup))["ema"]
        assert all(torch.equal(one, other) for one, other in zip(together[name], alone, strict=True))


def test_the_published_average_moves_as_it_always_did():
    path, decay = walk(30), 0.8
    expected = path[0].clone()
    for step, master in enumerate(path[1:]):
        torch._foreach_lerp_([expected], [master], 1 - min(decay, (1 + step) / (10 + step)))
    assert torch.equal(averaged(path, EmaSettings(decay=decay, warmup=True))["ema"][-1], expected)


def test_widths_have_the_exponents_of_the_paper():
    assert [exponent(width) for width in WIDTHS] == pytest.approx([16.97, 6.94], abs=0.005)


@pytest.mark.parametrize(
    "profile",
    [Profile(sigma_rel=0.1), Profile(decay=0.9), Profile(decay=0.9, warmup=True), Profile(decay=0.0)],
    ids=str,
)
def test_an_average_is_the_sum_that_its_profile_tells(profile: Profile):
    path = walk(60)
    if profile.sigma_rel is None:
        assert profile.decay is not None
        settings, name = EmaSettings(decay=profile.decay, warmup=profile.warmup), "ema"
    else:
        settings, name = EmaSettings(sigma_rel=[profile.sigma_rel]), f"ema-sigma-{profile.sigma_rel}"
    for update in (1, 2, 60):
        told = weights(profile, update, 70)
        assert float(told.sum()) == pytest.approx(1)
        assert not told[update + 1 :].any()
        expected = told[:61] @ path.double()
        assert torch.allclose(averaged(path, settings)[name][update - 1].double(), expected, atol=1e-4)


def test_a_power_function_profile_has_its_shape_and_width():
    t, width = 5000, 0.1
    told, gamma = weights(Profile(sigma_rel=width), t, t), exponent(width)
    k = torch.arange(1, t + 1, dtype=torch.float64)
    assert torch.allclose(told[1:], ((k / t) ** (gamma + 1) - ((k - 1) / t) ** (gamma + 1)), atol=1e-12)
    mean = float((told[1:] * k).sum())
    assert float((told[1:] * (k - mean) ** 2).sum()) ** 0.5 / t == pytest.approx(width, rel=1e-2)


@pytest.mark.parametrize("wanted", [Profile(sigma_rel=0.08), Profile(sigma_rel=0.15), Profile(decay=0.98)], ids=str)
def test_another_average_is_made_of_kept_ones_within_what_it_says(wanted: Profile):
    """A profile off by so much moves the sum by twice that at most, times how far the weights went from the last."""
    steps = 400
    path = walk(steps)
    tracked = averaged(path, EmaSettings(decay=0.9, sigma_rel=WIDTHS))
    kept = [(Kept(Profile(sigma_rel=width), at), width) for at in range(50, steps + 1, 50) for width in WIDTHS]
    shares, misplaced = fit(Kept(wanted, steps), [each for each, _ in kept])
    made = sum(
        share * tracked[f"ema-sigma-{width}"][each.update - 1].double()
        for share, (each, width) in zip(shares, kept, strict=True)
    )
    name, settings = ("ema", EmaSettings(decay=wanted.decay)) if wanted.decay else ("x", EmaSettings())
    if wanted.sigma_rel:
        name, settings = f"ema-sigma-{wanted.sigma_rel}", EmaSettings(sigma_rel=[wanted.sigma_rel])
    direct = averaged(path, settings)[name][-1].double()
    bound = 2 * misplaced * (path - path[-1]).abs().max(0).values
    assert 0 < misplaced < 0.03
    assert ((made - direct).abs() <= bound + 1e-4).all()
    assert (made - direct).abs().max() < 0.05 * (direct - tracked["ema-sigma-0.05"][-1].double()).abs().max()


def test_what_was_tracked_is_taken_as_it_is():
    kept = [Kept(Profile(sigma_rel=width), at) for at in (5, 10) for width in WIDTHS]
    assert fit(kept[2], kept) == ([0, 0, 1, 0], 0)


def test_what_the_kept_averages_do_not_span_is_told():
    kept = [Kept(Profile(sigma_rel=width), 1000) for width in WIDTHS]
    assert fit(Kept(Profile(sigma_rel=0.28), 1000), kept).misplaced > 0.1
    assert fit(Kept(Profile(decay=0.5), 1000), kept[:1]).misplaced > 0.8


def test_a_long_run_is_fitted_by_groups_and_judged_by_steps():
    last = 3 * GROUPS
    kept = [Kept(Profile(sigma_rel=width), at) for at in range(last // 8, last + 1, last // 8) for width in WIDTHS]
    shares, misplaced = fit(Kept(Profile(sigma_rel=0.07), last), kept)
    assert sum(shares) == pytest.approx(1)
    assert misplaced < 0.01
    assert fit(Kept(Profile(decay=0.5), last), kept).misplaced > 0.8  # two steps long, far less than a group


@pytest.mark.parametrize("twice", [{"decay": 0.9, "more_decays": [0.9]}, {"sigma_rel": [0.1, 0.1]}], ids=str)
def test_an_average_that_is_asked_for_twice_is_refused(twice: dict[str, object]):
    with pytest.raises(ValidationError, match="asked for twice"):
        EmaSettings.model_validate(twice)


def test_new_settings_at_their_defaults_name_no_other_work():
    assert EmaSettings(decay=0.99, keep_every=500).chosen() == {"decay": 0.99}
    assert EmaSettings(more_decays=[0.5]).chosen() == {"more_decays": [0.5]}
