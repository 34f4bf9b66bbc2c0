"""Noise levels: what a clip is trained at, what validation looks at, and the steps of a sampler.

Owns the distributions over sigma and their shift by resolution. Each is the image of a uniform number, so that
the same code serves random draws and even strata. Host arithmetic in fp64: a handful of numbers per microbatch.
"""

import math
from functools import cache
from statistics import NormalDist

from megavid.config.schema import DiffusionConfig
from megavid.diffusion.flow import shift_sigma
from megavid.errors import ConfigError
from megavid.ops.philox import key_of, uniform_at

TIMESTEP_SCALE = 1000.0
"""A model is told timestep = 1000 * sigma."""

_SMALLEST_SHARE = 1e-6
"""Of a distribution's draws that a range of noise levels must hold: below it few uniform numbers are left."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def sigma_at(quantile: float, config: DiffusionConfig) -> float:
    """Noise level before the shift that ``config``'s distribution has at a uniform number.

    ``uniform``: the number itself. ``logit_normal``: sigmoid(mean + std * z), z its normal quantile. ``mode``:
    1 - u - scale * (cos^2(pi u / 2) - 1 + u), which falls from 1 to 0 and dwells in the middle for scale > 0.

    Args:
        quantile: uniform number, above 0 and below 1.
        config: names the distribution and its parameters.

    Raises:
        ConfigError: a distribution that is not one of the three.

    Source: Esser et al. 2024 (arXiv:2403.03206), eqs. 19 and 20.
    """
    match config.timestep_sampling:
        case "uniform":
            return quantile
        case "logit_normal":
            logit = config.logit_mean + config.logit_std * NormalDist().inv_cdf(quantile)
            return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
        case "mode":
            cosine = math.cos(math.pi / 2 * quantile)
            return 1 - quantile - config.mode_scale * (cosine * cosine - 1 + quantile)
        case unknown:
            raise ConfigError(f"diffusion.timestep_sampling = {unknown!r} must be 'uniform', 'logit_normal' or 'mode'")


def shift_of_clip(tokens: int, config: DiffusionConfig) -> float:
    """Shift of the noise levels of a clip of this many tokens.

    ``flow_shift``, times sqrt(tokens / shift_reference_tokens) where the latter is above 0: at equal sigma, n times
    the tokens of one signal leave sqrt(n) times less doubt about it.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 5.3.2.
    """
    if config.shift_reference_tokens == 0:
        return config.flow_shift
    return config.flow_shift * math.sqrt(tokens / config.shift_reference_tokens)


def training_sigma(draw: int, tokens: int, config: DiffusionConfig, seed: int) -> float:
    """Noise level at which draw number ``draw`` of the run is trained, shifted.

    The distribution of all levels, cut to ``config.sigma_min`` to ``config.sigma_max``: still one uniform number.

    Raises:
        ConfigError: the distribution has no level in that range.
    """
    shift = shift_of_clip(tokens, config)
    low, high = _quantiles(config, shift)
    sigma = sigma_at(low + uniform_at(key_of(seed, "timestep"), draw) * (high - low), config)
    return min(max(shift_sigma(sigma, shift=shift), config.sigma_min), config.sigma_max)


@cache
def _quantiles(config: DiffusionConfig, shift: float) -> tuple[float, float]:
    """Uniform numbers between which the shifted noise level is from sigma_min to sigma_max."""

    def level(quantile: float) -> float:
        return shift_sigma(sigma_at(quantile, config), shift=shift)

    is_rising = level(0.75) > level(0.25)

    def quantile_of(sigma: float) -> float:
        if sigma in (0.0, 1.0):
            return sigma if is_rising else 1 - sigma
        low, high = 0.0, 1.0
        while low < (middle := (low + high) / 2) < high and middle > 1e-300:  # until no number is between them
            is_below = level(middle) < sigma
            low, high = (middle, high) if is_below == is_rising else (low, middle)
        return high

    low, high = sorted(quantile_of(sigma) for sigma in (config.sigma_min, config.sigma_max))
    if not 0 <= low < high <= 1 or high - low < _SMALLEST_SHARE:
        raise ConfigError(
            f"diffusion.sigma_min = {config.sigma_min} to sigma_max = {config.sigma_max} holds hardly any of the noise "
            f"levels that diffusion.timestep_sampling = '{config.timestep_sampling}' draws at shift {shift:g} (a share "
            f"of {high - low:.1e}); widen it, or draw 'uniform'"
        )
    return low, high


def stratified_sigma(number: int, *, repeat: int = 0, levels: tuple[float, float] = (0.0, 1.0)) -> float:
    """Noise level of validation clip ``number`` (from 0): evenly spread over ``levels``, however many clips there are.

    Weyl's sequence of the golden ratio, moved on by another irrational for each further pass over the clips. It
    knows no shift and no distribution, so that validation losses of runs with different recipes compare, and every
    noise bucket gets its share.
    """
    low, high = levels
    return low + (0.5 + number * _GOLDEN + repeat * math.sqrt(2)) % 1.0 * (high - low)


def sigma_schedule(steps: int, *, shift: float) -> tuple[float, ...]:
    """The ``steps + 1`` noise levels of a sampler, from 1 down to 0: even steps, shifted.

    Raises:
        ValueError: steps is below 1, or shift is not above 0.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1; change --steps or log.sample_steps")
    return tuple(shift_sigma(1 - step / steps, shift=shift) for step in range(steps + 1))
