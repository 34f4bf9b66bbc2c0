"""Noise levels: what a clip is trained at, what validation looks at, and the steps of a sampler.

Owns the distributions over sigma and their shift by resolution. Each is the image of a uniform number, so that
the same code serves random draws and even strata. Host arithmetic in fp64: a handful of numbers per microbatch.
"""

import math
from statistics import NormalDist

from megavid.config.schema import DiffusionConfig
from megavid.diffusion.flow import shift_sigma
from megavid.errors import ConfigError
from megavid.ops.philox import key_of, uniform_at

TIMESTEP_SCALE = 1000.0
"""A model is told timestep = 1000 * sigma."""

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
    """Noise level at which draw number ``draw`` of the run is trained, shifted."""
    sigma = sigma_at(uniform_at(key_of(seed, "timestep"), draw), config)
    return shift_sigma(sigma, shift=shift_of_clip(tokens, config))


def stratified_sigma(number: int, *, repeat: int = 0) -> float:
    """Noise level of validation clip ``number`` (from 0): evenly spread over (0, 1), however many clips there are.

    Weyl's sequence of the golden ratio, moved on by another irrational for each further pass over the clips. It
    knows no shift and no distribution, so that validation losses of runs with different recipes compare, and every
    noise bucket gets its share.
    """
    return (0.5 + number * _GOLDEN + repeat * math.sqrt(2)) % 1.0


def sigma_schedule(steps: int, *, shift: float) -> tuple[float, ...]:
    """The ``steps + 1`` noise levels of a sampler, from 1 down to 0: even steps, shifted.

    Raises:
        ValueError: steps is below 1, or shift is not above 0.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1; change --steps or log.sample_steps")
    return tuple(shift_sigma(1 - step / steps, shift=shift) for step in range(steps + 1))
