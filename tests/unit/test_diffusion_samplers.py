"""Solvers on flows whose solution is known, and classifier-free guidance over packs."""

import math

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from megavid.diffusion.guidance import PromptGiven, pack_prompts
from megavid.diffusion.samplers import UniPCSolver, by_noise_level, integrate, sample, sampler_levels
from megavid.diffusion.timesteps import sigma_schedule
from megavid.errors import ConfigError
from megavid.ops.packs import Span, clip_index
from megavid.ops.philox import key_of, normal

MEAN, STD = 1.5, 0.3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


def gaussian_velocity(state, sigma):
    """Exact velocity field when clean clips are normal with MEAN and STD: curved, with a solution in closed form."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    return -MEAN + (sigma - (1 - sigma) * STD**2) / variance * (state - (1 - sigma) * MEAN)


def gaussian_solution(state, sigma, following):
    def std(level):
        return math.sqrt((1 - level) ** 2 * STD**2 + level**2)

    return (1 - following) * MEAN + std(following) / std(sigma) * (state - (1 - sigma) * MEAN)


def error(kind, sigmas):
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = gaussian_solution(start, sigmas[0], sigmas[-1])
    return float((integrate(gaussian_velocity, start, sigmas, kind=kind) - exact).abs().max())


@pytest.mark.parametrize("interval", [(0.1, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize(("kind", "order"), [("euler", 1), ("unipc", 2)])
def test_order_of_convergence(kind, order, interval):
    low, high = interval
    errors = [
        error(kind, [low + (high - low) * sigma for sigma in sigma_schedule(steps, shift=1.0)]) for steps in (160, 320)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_unipc_beats_euler_at_equal_steps_on_a_curved_field(steps, shift):
    sigmas = sigma_schedule(steps, shift=shift)
    assert error("unipc", sigmas) < error("euler", sigmas)


@pytest.mark.parametrize("kind", ["euler", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_the_field_of_a_single_clip_leads_to_it(kind, steps):
    clean, start = torch.randn(2, 4, 6)
    state = integrate(lambda state, sigma: (state - clean) / sigma, start, sigma_schedule(steps, shift=3.0), kind=kind)
    torch.testing.assert_close(state, clean, rtol=1e-5, atol=1e-5)


def test_unipc_is_the_published_solver():
    """Three steps written out from the paper's formulas.

    Compared once with diffusers 0.42.1 (UniPCMultistepScheduler, solver_order=2, flow_prediction, use_flow_sigmas,
    its own sigmas, this Gaussian field in fp64): 6e-8, 4e-8 and 3e-8 apart after 5, 10 and 30 steps at flow_shift
    1, 3 and 5, with states of order 1; it computes the ratios in fp32.
    """
    sigmas = (0.95, 0.7, 0.4, 0.1)
    lam = [math.log((1 - s) / s) for s in sigmas]
    x0 = torch.linspace(-2, 2, 5, dtype=torch.float64)
    m0 = x0 - sigmas[0] * gaussian_velocity(x0, sigmas[0])
    h1 = lam[1] - lam[0]
    x1 = sigmas[1] / sigmas[0] * x0 - (1 - sigmas[1]) * math.expm1(-h1) * m0
    m1 = x1 - sigmas[1] * gaussian_velocity(x1, sigmas[1])
    x1 = x1 - (1 - sigmas[1]) * math.expm1(-h1) * 0.5 * (m1 - m0)
    h2 = lam[2] - lam[1]
    r = -h1 / h2
    x2 = sigmas[2] / sigmas[1] * x1 - (1 - sigmas[2]) * math.expm1(-h2) * (m1 + 0.5 * (m0 - m1) / r)
    m2 = x2 - sigmas[2] * gaussian_velocity(x2, sigmas[2])
    phi2 = math.expm1(-h2) / -h2 - 1
    phi3 = phi2 / -h2 - 0.5
    matrix = torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64)
    right = torch.tensor([phi2, 2 * phi3], dtype=torch.float64) / math.expm1(-h2)
    w0, w1 = torch.linalg.solve(matrix, right).tolist()
    mean = m1 + w0 * (m0 - m1) / r + w1 * (m2 - m1)
    x2 = sigmas[2] / sigmas[1] * x1 - (1 - sigmas[2]) * math.expm1(-h2) * mean
    h3 = lam[3] - lam[2]
    x3 = sigmas[3] / sigmas[2] * x2 - (1 - sigmas[3]) * math.expm1(-h3) * m2
    torch.testing.assert_close(integrate(gaussian_velocity, x0, sigmas, kind="unipc"), x3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 20, 30, 50])
def test_unipc_is_what_the_pipelines_of_wan_run(steps, shift):
    """Noise levels and timesteps to the last bit, states to fp32, of diffusers' scheduler as Wan's folders set it."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    levels = sampler_levels("unipc", steps, shift=shift)
    assert list(levels.sigmas) == scheduler.sigmas.tolist()
    assert list(levels.timesteps) == scheduler.timesteps.tolist()
    start = torch.linspace(-2, 2, 9).view(1, 9, 1)
    state = start
    for step, timestep in enumerate(scheduler.timesteps):
        state = scheduler.step(gaussian_velocity(state, levels.sigmas[step]), timestep, state).prev_sample
    ours = integrate(gaussian_velocity, start, levels.sigmas, kind="unipc")
    torch.testing.assert_close(ours, state, rtol=1e-5, atol=1e-5)


def test_the_model_is_told_the_timesteps_of_the_levels():
    prompts, told = prompts_of(1.0), []
    levels = sampler_levels("unipc", 3, shift=3.0)

    def velocity_of(model_input):
        told.append(model_input.timestep_R.unique().item())
        return text_velocity(model_input)

    sample(velocity_of, prompts, prompts.start_noise(2, seed=1), levels.sigmas, timesteps=levels.timesteps)
    assert told == list(levels.timesteps) == [999.0, 857.0, 600.0]


def test_unipc_solver_keeps_two_predictions_at_most():
    solver = UniPCSolver(sigma_schedule(5, shift=1.0))
    state = torch.ones(2)
    for step in range(5):
        state = solver.advance(state, torch.zeros(2), step)
        assert len(solver.history) <= 2


def test_unknown_sampler_raises():
    with pytest.raises(ConfigError, match=r"sampler = 'ddim' must be 'euler' or 'unipc'"):
        integrate(gaussian_velocity, torch.zeros(1), (1.0, 0.0), kind="ddim")  # type: ignore[arg-type]


TEXT_GLD = torch.arange(3.0).view(3, 1, 1) + 1  # prompts 1, 2, 3; the empty caption is 0
EMPTY_LD = torch.zeros(1, 1)
GRIDS = [(2, 2, 2), (1, 2, 2), (2, 2, 2)]


def prompts_of(guidance, pack_tokens=12, **kwargs):
    return pack_prompts(
        TEXT_GLD, EMPTY_LD, grids=GRIDS, frame_rate=4.0, pack_tokens=pack_tokens, guidance=guidance, **kwargs
    )


def text_velocity(model_input):
    """A stand-in for a model: the velocity of each token is its clip's text feature, 7 in the padding."""
    clip_BT = clip_index(model_input.packs, model_input.span)
    value_BT = model_input.text_GLD[:, 0, 0][clip_BT.clamp(min=0)].masked_fill(clip_BT < 0, 7.0)
    return value_BT.unsqueeze(-1).expand_as(model_input.patches_BTP)


def test_prompts_are_laid_out_in_order_in_packs_of_one_size():
    plain, guided = prompts_of(1.0), prompts_of(4.0)
    assert [[clip.draw for clip in pack.clips] for pack in plain.packs] == [[0, 1], [2]]
    assert [[clip.draw for clip in pack.clips] for pack in guided.packs] == [[0, 1], [0, 1], [2], [2]]
    assert plain.text_GLD.flatten().tolist() == [1, 2, 3]
    assert guided.text_GLD.flatten().tolist() == [1, 2, 0, 0, 3, 0]
    assert all(pack.tokens == 12 for pack in guided.packs)
    assert [clip.start for pack in guided.packs for clip in pack.clips] == [0, 8, 0, 8, 0, 0]


def test_guidance_goes_from_the_empty_caption_past_the_prompt():
    prompts = prompts_of(4.0)
    noise_BTP = prompts.start_noise(3, seed=5)
    guided_BTP = prompts.guide(text_velocity(prompts.input_at(noise_BTP, 1.0)))
    for number, tokens in enumerate(prompts.clips_of(guided_BTP)):
        assert (tokens == 4.0 * (number + 1)).all()
    assert not guided_BTP[clip_index(prompts.packs) < 0].any()


def test_both_clips_of_a_prompt_hold_the_same_state_all_the_way():
    prompts = prompts_of(3.0, pack_tokens=48)
    noise_BTP = prompts.start_noise(2, seed=5)
    assert torch.equal(noise_BTP[0], noise_BTP[1])
    clean_BTP = sample(
        lambda model_input: text_velocity(model_input) + model_input.patches_BTP,
        prompts,
        noise_BTP,
        sigma_schedule(6, shift=3.0),
    )
    assert torch.equal(clean_BTP[0], clean_BTP[1])
    assert clean_BTP[0, :20].all()
    assert not clean_BTP[0, 20:].any()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_spans_of_the_tokens_are_sampled_alone_and_make_up_the_whole(guidance):
    prompts = prompts_of(guidance, pack_tokens=24)
    sigmas = sigma_schedule(5, shift=2.0)

    def sampled(span):
        part = prompts.within(span)
        return sample(lambda x: text_velocity(x) + x.patches_BTP, part, part.start_noise(2, seed=5), sigmas)

    parts = [sampled(Span(start, stop)) for start, stop in ((0, 7), (7, 7), (7, 21), (21, 24))]
    assert torch.equal(torch.cat(parts, dim=1), sampled(Span(0, 24)))


@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_sampling_does_not_depend_on_packs_nor_on_other_prompts(kind):
    sigmas = sigma_schedule(5, shift=2.0)

    def clips(pack_tokens):
        prompts = prompts_of(2.0, pack_tokens)
        clean_BTP = sample(text_velocity, prompts, prompts.start_noise(2, seed=9), sigmas, kind=kind)
        return prompts.clips_of(clean_BTP)

    for one, other in zip(clips(8), clips(48)):
        torch.testing.assert_close(one, other)
    alone = pack_prompts(
        TEXT_GLD[2:], EMPTY_LD, grids=GRIDS[2:], frame_rate=4.0, pack_tokens=16, guidance=1.0, first_number=2
    )
    start_BTP = alone.start_noise(2, seed=9)
    torch.testing.assert_close(start_BTP[0, :8].flatten(), normal(key_of(9, "sample", 2), 0, 16))


def test_sampling_reports_every_step_and_tells_the_model_its_timestep():
    steps, timesteps = [], []
    prompts = prompts_of(1.0)

    def velocity_of(model_input):
        timesteps.append(model_input.timestep_R.unique().item())
        return text_velocity(model_input)

    sample(
        velocity_of,
        prompts,
        prompts.start_noise(2, seed=1),
        sigma_schedule(4, shift=1.0),
        on_step=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert timesteps == [1000.0, 750.0, 500.0, 250.0]


def test_clip_longer_than_a_pack_and_no_prompt_at_all_are_refused():
    with pytest.raises(ConfigError, match=r"2 x 2 x 2 = 8 tokens must fit in data.pack_tokens = 6"):
        prompts_of(1.0, pack_tokens=6)
    with pytest.raises(ConfigError, match="no prompt was given"):
        pack_prompts(TEXT_GLD[:0], EMPTY_LD, grids=[], frame_rate=4.0, pack_tokens=8, guidance=1.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["euler", "unipc"])
def test_known_tokens_stay_clean_and_the_model_is_told_so(kind, guidance):
    clean_TP, condition_TP, image_LI = torch.randn(8, 2), torch.randn(8, 3), torch.randn(5, 4)
    given = PromptGiven(known=(0,), clean_TP=clean_TP, condition_TP=condition_TP, image_LI=image_LI)
    prompts = pack_prompts(
        TEXT_GLD[2:], EMPTY_LD, grids=[(2, 2, 2)], frame_rate=4.0, pack_tokens=12, guidance=guidance, given=[given]
    )
    clips = prompts.packs_per_prompt
    seen = []

    def velocity_of(model_input):
        seen.append(model_input)
        return text_velocity(model_input)[..., :2] + model_input.patches_BTP[..., :2] + 1

    for span in (Span(0, 12), Span(2, 7)):
        part = prompts.within(span)
        seen.clear()
        clean_BTP = sample(velocity_of, part, part.start_noise(2, seed=3), sigma_schedule(5, shift=2.0), kind=kind)
        known = slice(0, 4 - span.start)
        for row in range(clips):
            assert torch.equal(clean_BTP[row, known], clean_TP[span.start : 4])
            assert not torch.isclose(clean_BTP[row, 4 - span.start], clean_TP[4]).any()
            for model_input in seen:
                assert torch.equal(model_input.patches_BTP[row, known, :2], clean_TP[span.start : 4])
                upto = min(8, span.stop)
                assert torch.equal(
                    model_input.patches_BTP[row, : upto - span.start, 2:], condition_TP[span.start : upto]
                )
                assert (model_input.timestep_R[model_input.row_BT[row, known]] == 0).all()
                assert (model_input.timestep_R[model_input.row_BT[row, 4 - span.start :]] > 0).all()
                assert torch.equal(model_input.image_GLI[row], image_LI)
        assert all(model_input.has_image_G.tolist() == [True] * clips for model_input in seen)


def test_two_experts_share_the_steps_at_the_boundary_after_the_shift():
    asked = {"high": [], "low": []}

    def expert(name):
        def velocity_of(model_input):
            asked[name].append(float(model_input.timestep_R.max()))
            return text_velocity(model_input)

        return velocity_of

    prompts, sigmas = prompts_of(1.0), (1.0, 0.95, 0.875, 0.8, 0.3, 0.0)
    both = by_noise_level(expert("high"), expert("low"), 0.875)
    sample(both, prompts, prompts.start_noise(2, seed=1), sigmas)
    assert asked == {"high": [1000.0, 950.0, 875.0], "low": [pytest.approx(800.0), pytest.approx(300.0)]}
