"""From noise to clips: solvers of the flow's differential equation, d state / d sigma = velocity.

Owns the solvers and the loop over noise levels. Knows neither packs' contents nor what computes the velocity.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megavid.diffusion.flow import clean_of
from megavid.diffusion.guidance import PromptPacks
from megavid.diffusion.timesteps import TIMESTEP_SCALE, sigma_schedule
from megavid.errors import ConfigError
from megavid.models.inputs import ModelInput

SamplerKind = Literal["euler", "unipc"]

_FIRST_GAP = 1e-6  # how far below 1 diffusers begins, where 1 - sigma has a logarithm


class Levels(NamedTuple):
    """The noise levels of a sampler and what the model is told of them.

    Attributes:
        sigmas: steps + 1 of them, falling to 0.
        timesteps: of each but the last.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]


def sampler_levels(kind: SamplerKind, steps: int, *, shift: float) -> Levels:
    """The noise levels that a solver goes through.

    ``euler``: even steps from 1 to 0, shifted; timestep = 1000 * sigma. ``unipc``: those of diffusers'
    UniPCMultistepScheduler with ``use_flow_sigmas``, which Wan's pipelines run, to the last bit, so that what is
    sampled here is what is served: even steps from 1 to 0.001 of which the last is left out, shifted, in fp32, and
    timesteps cut down to whole numbers.

    Raises:
        ValueError: steps is below 1, or shift is not above 0.
    """
    if kind == "euler":
        sigmas = sigma_schedule(steps, shift=shift)
        return Levels(sigmas, tuple(TIMESTEP_SCALE * sigma for sigma in sigmas[:-1]))
    sigma_schedule(steps, shift=shift)  # refuses what cannot be
    even = [1 + step * ((1 / TIMESTEP_SCALE - 1) / steps) for step in range(steps)]
    # diffusers' form of shift_sigma: another may round to another whole timestep.
    shifted = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    if abs(shifted[0] - 1) < _FIRST_GAP:
        shifted[0] -= _FIRST_GAP
    sigmas = (*torch.tensor(shifted, dtype=torch.float32).tolist(), 0.0)
    return Levels(sigmas, tuple(float(int(TIMESTEP_SCALE * sigma)) for sigma in shifted))


@torch.no_grad()
def sample(
    velocity_of: Callable[[ModelInput], Tensor],
    prompts: PromptPacks,
    start_noise_BTP: Tensor,
    sigmas: Sequence[float],
    *,
    timesteps: Sequence[float] | None = None,
    kind: SamplerKind = "unipc",
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample the clips of ``prompts``.

    Args:
        velocity_of: the model: velocity [B, T, P] at the tokens of an input.
        prompts: what to sample, with or without guidance; ``prompts.span`` says which tokens are here.
        start_noise_BTP: state at sigmas[0], from ``prompts.start_noise``.
        sigmas: noise levels, falling, from ``sampler_levels``.
        timesteps: what the model is told of each but the last; None: 1000 * sigma.
        kind: solver.
        on_step: called with (steps done, steps in all) after each.

    Returns:
        Clean clips as patches, [B, T, P] of the span; ``prompts.clips_of`` takes them out of whole packs.

    Raises:
        ConfigError: a solver that is not known.
    """

    told = dict(zip(sigmas, timesteps)) if timesteps is not None else {}

    def velocity_at(state_BTP: Tensor, sigma: float) -> Tensor:
        velocity_BTP = velocity_of(prompts.input_at(state_BTP, sigma, told.get(sigma)))
        return prompts.guide(velocity_BTP.to(state_BTP.dtype))

    return prompts.with_known(integrate(velocity_at, start_noise_BTP, sigmas, kind=kind, on_step=on_step))


def by_noise_level(
    high: Callable[[ModelInput], Tensor], low: Callable[[ModelInput], Tensor], boundary: float
) -> Callable[[ModelInput], Tensor]:
    """The velocity of two experts, for ``sample``: the high-noise one from the boundary on, the low-noise one below.

    Args:
        high: trained on ``diffusion.sigma_min = boundary`` to 1.
        low: trained on 0 to ``diffusion.sigma_max = boundary``.
        boundary: noise level after the shift, timestep / 1000: the ``boundary_ratio`` of diffusers' pipelines, which
            switch by timestep as well.
    """

    def velocity_of(model_input: ModelInput) -> Tensor:
        # The largest: rows of known tokens are at 0.
        is_high = float(model_input.timestep_R.max()) >= TIMESTEP_SCALE * boundary
        return (high if is_high else low)(model_input)

    return velocity_of


def integrate(
    velocity_at: Callable[[Tensor, float], Tensor],
    start: Tensor,
    sigmas: Sequence[float],
    *,
    kind: SamplerKind = "unipc",
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Carry a state from noise level sigmas[0] to sigmas[-1].

    Args:
        velocity_at: velocity of a state at a noise level.
        start: state at sigmas[0], any shape.
        sigmas: noise levels, strictly falling, from 1 or less to 0 or more.
        kind: ``euler`` (first order) or ``unipc`` (second order); one velocity per step each.
        on_step: called with (steps done, steps in all) after each.

    Raises:
        ConfigError: a solver that is not known.
    """
    match kind:
        case "euler":
            solver: EulerSolver | UniPCSolver = EulerSolver(sigmas)
        case "unipc":
            solver = UniPCSolver(sigmas)
        case unknown:
            raise ConfigError(f"sampler = {unknown!r} must be 'euler' or 'unipc'; change --sampler")
    state, steps = start, len(sigmas) - 1
    for step in range(steps):
        state = solver.advance(state, velocity_at(state, sigmas[step]), step)
        if on_step is not None:
            on_step(step + 1, steps)
    return state


class EulerSolver:
    """Straight steps: first order."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        """Bind the noise levels."""
        self.sigmas = sigmas

    def advance(self, state: Tensor, velocity: Tensor, step: int) -> Tensor:
        """State at sigmas[step + 1] from state and velocity at sigmas[step]."""
        return state + (self.sigmas[step + 1] - self.sigmas[step]) * velocity


class UniPCSolver:
    """UniPC-2 on predictions of the clean clip, B(h) = e^h - 1: a predictor, and a corrector that costs no velocity.

    With lambda = ln((1 - sigma) / sigma), half the log signal-to-noise ratio, the exact step from s to t is
    sigma_t / sigma_s * state + (1 - sigma_t) * integral of e^(l - lambda_t) * clean(l) over l; clean(l) is
    extrapolated from the last two predictions, and once the next one is known, interpolated with it. The last step
    is of first order, as its lambda is infinite. At sigma = 1 lambda is minus infinity: all terms have their limits.

    Source: Zhao et al. 2023 (arXiv:2302.04867), algorithms 1 and 2, variant B2; the same choices as diffusers'
    UniPCMultistepScheduler with ``use_flow_sigmas`` and ``lower_order_final``.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        """Bind the noise levels."""
        self.sigmas = sigmas
        self.lambdas = [_log_ratio(sigma) for sigma in sigmas]
        self.history: list[Tensor] = []  # predictions at the steps so far, the last two of them
        self._state: Tensor | None = None  # corrected state at the step before
        self._order = 0  # of the step before

    def advance(self, state: Tensor, velocity: Tensor, step: int) -> Tensor:
        """State at sigmas[step + 1] from state and velocity at sigmas[step]; to be called for each step in turn."""
        clean = clean_of(state, velocity, self.sigmas[step])
        if self._state is not None:
            state = self._step(self._state, step - 1, self._order, corrected_by=clean)
        self.history = [*self.history[-1:], clean]
        self._state = state
        self._order = min(2, step + 1, len(self.sigmas) - 1 - step)
        return self._step(state, step, self._order, corrected_by=None)

    def _step(self, state: Tensor, step: int, order: int, *, corrected_by: Tensor | None) -> Tensor:
        """One step from sigmas[step], extrapolating, or interpolating with the prediction at its end."""
        sigma, following = self.sigmas[step], self.sigmas[step + 1]
        h = self.lambdas[step + 1] - self.lambdas[step]
        gain = -(1 - following) * math.expm1(-h)  # (1 - sigma_t) * (1 - e^-h): weight of a constant prediction
        clean = self.history[-1]
        mean = clean
        # Distance, in units of h, from this step to the prediction before it: below 0; minus infinity behind sigma = 1.
        back = (self.lambdas[step - 1] - self.lambdas[step]) / h if order == 2 else -math.inf
        slope = (self.history[0] - clean) / back if order == 2 else torch.zeros_like(clean)
        if corrected_by is None:
            mean = clean + 0.5 * slope
        else:
            weight_back, weight_end = _corrector_weights(h, back) if order == 2 else (0.0, 0.5)
            mean = clean + weight_back * slope + weight_end * (corrected_by - clean)
        return (following / sigma) * state + gain * mean


def _log_ratio(sigma: float) -> float:
    """ln((1 - sigma) / sigma), with its limits."""
    if sigma >= 1:
        return -math.inf
    return math.inf if sigma <= 0 else math.log((1 - sigma) / sigma)


def _corrector_weights(h: float, back: float) -> tuple[float, float]:
    """Weights of the differences at ``back`` (divided by it) and at the step's end that make the step exact for
    predictions quadratic in lambda: the 2 x 2 system of UniPC's eq. 11 for data prediction, solved."""
    base = math.expm1(-h)
    first = base / -h - 1
    second = first / -h - 0.5
    b1, b2 = first / base, 2 * second / base
    weight_back = (b1 - b2) / (1 - back)
    return weight_back, b1 - weight_back
