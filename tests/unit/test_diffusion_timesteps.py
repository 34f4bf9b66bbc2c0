"""Noise levels: the shift, the three distributions against their closed forms, strata and schedules."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from megavid.config.schema import DiffusionConfig
from megavid.diffusion.flow import clean_of, interpolate, shift_sigma, velocity_of
from megavid.diffusion.timesteps import (
    shift_of_clip,
    sigma_at,
    sigma_schedule,
    stratified_sigma,
    training_sigma,
)
from megavid.errors import ConfigError

DRAWS = 4000


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


def levels(config: DiffusionConfig, tokens: int = 96) -> torch.Tensor:
    values = [training_sigma(draw, tokens, config, 1234) for draw in range(DRAWS)]
    return torch.tensor(values, dtype=torch.float64).sort().values


def distance_to(cdf_of_sorted: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance, in units of its 0.1% limit."""
    return float((cdf_of_sorted - torch.arange(1, DRAWS + 1) / DRAWS).abs().max()) / (1.95 / math.sqrt(DRAWS))


def test_shift_is_the_identity_at_one_monotone_and_fixes_the_ends():
    sigma_B = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(shift_sigma(sigma_B, shift=1.0), sigma_B)
    for shift in (0.3, 3.0, 5.0):
        shifted_B = shift_sigma(sigma_B, shift=shift)
        assert (shifted_B.diff() > 0).all()
        assert shifted_B[0] == 0
        assert shifted_B[-1] == 1
        torch.testing.assert_close(shift_sigma(shifted_B, shift=1 / shift), sigma_B)
    assert shift_sigma(0.5, shift=3.0) == pytest.approx(0.75)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match=r"must be above 0; change diffusion.flow_shift"):
        shift_sigma(0.5, shift=shift)


def test_velocity_leads_back_to_the_clean_clip():
    clean, noise = torch.randn(2, 5, 7, dtype=torch.float64)
    noised = interpolate(clean, noise, torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(clean_of(noised, velocity_of(clean, noise), 0.3), clean)


def test_uniform_levels_are_uniform():
    assert distance_to(levels(DiffusionConfig(timestep_sampling="uniform"))) < 1


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.5, 0.7, 3.0)])
def test_logit_normal_levels_follow_the_closed_form(mean, std, shift):
    config = DiffusionConfig(logit_mean=mean, logit_std=std, flow_shift=shift)
    sigma = levels(config)
    # A shift adds ln(shift) to the logit.
    cdf = torch.special.ndtr((torch.logit(sigma) - math.log(shift) - mean) / std)
    assert distance_to(cdf) < 1
    if shift == 1:
        assert abs(float(sigma.mean()) - 0.5) < 0.01


def test_mode_levels_follow_the_closed_form():
    config = DiffusionConfig(timestep_sampling="mode", mode_scale=1.29)
    quantile = torch.linspace(0, 1, 20001, dtype=torch.float64)
    level = 1 - quantile - 1.29 * (torch.cos(math.pi / 2 * quantile) ** 2 - 1 + quantile)
    assert (level.diff() < 0).all()
    sigma = levels(config)
    index = torch.searchsorted(level.flip(0), sigma)
    cdf = 1 - quantile.flip(0)[index.clamp(max=20000)]
    assert distance_to(cdf) < 1
    plain = DiffusionConfig(timestep_sampling="mode", mode_scale=0.0)
    assert sigma_at(0.25, plain) == pytest.approx(0.75)


def test_unknown_sampling_raises():
    config = DiffusionConfig(timestep_sampling="cosmap")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"diffusion.timestep_sampling = 'cosmap' must be 'uniform'"):
        sigma_at(0.5, config)


def test_mode_scale_that_folds_the_levels_is_refused():
    with pytest.raises(ConfigError, match=r"diffusion.mode_scale = 2.0"):
        DiffusionConfig(mode_scale=2.0)


@pytest.mark.parametrize("quantile", [2.0**-53, 1e-12, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "mode"])
def test_levels_stay_from_zero_to_one_at_the_extremes(quantile, sampling):
    config = DiffusionConfig(timestep_sampling=sampling, logit_std=100.0)
    assert 0 <= sigma_at(quantile, config) <= 1


def test_shift_grows_with_the_root_of_the_tokens():
    config = DiffusionConfig(flow_shift=3.0, shift_reference_tokens=100)
    assert shift_of_clip(100, config) == pytest.approx(3.0)
    assert shift_of_clip(400, config) == pytest.approx(6.0)
    assert shift_of_clip(400, DiffusionConfig(flow_shift=3.0)) == 3.0
    assert training_sigma(5, 400, config, 1) > training_sigma(5, 100, config, 1)


@pytest.mark.parametrize("clips", [8, 40])
def test_strata_fill_every_noise_bucket_evenly(clips):
    for repeat in range(3):
        sigma = torch.tensor([stratified_sigma(number, repeat=repeat) for number in range(clips)])
        counts = torch.histc(sigma, bins=4, min=0, max=1)
        assert (counts - clips / 4).abs().max() <= 2


def test_schedule_falls_from_one_to_zero():
    assert sigma_schedule(4, shift=1.0) == pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))
    shifted = sigma_schedule(10, shift=5.0)
    assert shifted[0] == 1
    assert shifted[-1] == 0
    assert all(a > b for a, b in pairwise(shifted))
    with pytest.raises(ValueError, match="steps = 0 must be at least 1"):
        sigma_schedule(0, shift=1.0)


RECIPES = {
    "uniform": DiffusionConfig(timestep_sampling="uniform", flow_shift=5.0),
    "logit_normal": DiffusionConfig(flow_shift=12.0, logit_mean=0.3),
    "mode": DiffusionConfig(timestep_sampling="mode", flow_shift=3.0),
    "by tokens": DiffusionConfig(flow_shift=3.0, shift_reference_tokens=24),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_range_of_levels_is_the_same_distribution_cut_to_it(name):
    recipe = RECIPES[name]
    low = dataclasses.replace(recipe, sigma_max=0.875)
    high = dataclasses.replace(recipe, sigma_min=0.875)
    everything = levels(recipe)
    share = float((everything < 0.875).double().mean())
    for part, expected in ((low, everything[everything < 0.875]), (high, everything[everything >= 0.875])):
        found = levels(part)
        assert part.sigma_min <= found[0]
        assert found[-1] <= part.sigma_max
        for quantile in (0.1, 0.5, 0.9):
            assert float(found.quantile(quantile)) == pytest.approx(float(expected.quantile(quantile)), abs=0.02)
    assert 0.05 < share < 0.95  # both halves were tested


def test_a_range_next_to_all_levels_moves_draws_by_next_to_nothing():
    recipe = RECIPES["logit_normal"]
    nearly = dataclasses.replace(recipe, sigma_min=1e-9, sigma_max=1 - 1e-9)
    torch.testing.assert_close(levels(nearly), levels(recipe), rtol=0, atol=1e-6)


def test_a_range_that_the_distribution_never_meets_is_refused():
    recipe = DiffusionConfig(logit_mean=-3.0, logit_std=0.1, sigma_min=0.9)
    with pytest.raises(ConfigError, match=r"sigma_min = 0.9 to sigma_max = 1.0 holds hardly any .* draw 'uniform'$"):
        training_sigma(0, 96, recipe, 1)


def test_validation_levels_fill_the_range_of_an_expert():
    levels_of_expert = [stratified_sigma(number, levels=(0.875, 1.0)) for number in range(64)]
    assert 0.875 < min(levels_of_expert) < 0.88
    assert 0.995 < max(levels_of_expert) < 1
