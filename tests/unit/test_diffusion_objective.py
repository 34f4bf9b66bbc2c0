"""Noising and loss: by clip alone, wherever it stands."""

from dataclasses import replace

import pytest
import torch

from megavid.config.schema import DiffusionConfig
from megavid.diffusion.objective import FlowObjective, ValidationObjective
from megavid.ops.packs import Clip, LatentBatch, Pack, Span, clip_index
from megavid.ops.philox import key_of, normal

P = 6
CONFIG = DiffusionConfig(flow_shift=2.0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)


def clip(draw: int, start: int, grid=(2, 2, 3)) -> Clip:
    return Clip(draw=draw, sample=draw + 100, start=start, grid=grid, frame_rate=4.0)


def batch_of(*packs: tuple[Clip, ...], tokens: int = 32) -> LatentBatch:
    """Packs whose clean latents are a function of the draw, so that the same clip is the same anywhere."""
    clean_BTP = torch.zeros(len(packs), tokens, P)
    clips = [one for pack in packs for one in pack]
    for row, pack in enumerate(packs):
        for one in pack:
            numbers = normal(key_of("clean", one.draw), 0, one.tokens * P)
            clean_BTP[row, one.start : one.start + one.tokens] = numbers.view(-1, P)
    text_GLD = torch.stack([torch.full((3, 4), float(one.draw)) for one in clips])
    return LatentBatch(tuple(Pack(pack, tokens) for pack in packs), clean_BTP, text_GLD)


@pytest.fixture
def objective() -> FlowObjective:
    return FlowObjective(CONFIG, seed=1234)


def test_noised_is_the_interpolation_and_the_target_its_derivative(objective):
    batch = batch_of((clip(3, 0), clip(4, 12, (1, 2, 2))), (clip(5, 1),))
    noised = objective.noise(batch)
    clip_BT = clip_index(batch.packs)
    sigma_BT1 = noised.sigma_G[clip_BT.clamp(min=0)].unsqueeze(-1)
    noise_BTP = noised.target_BTP + batch.clean_BTP
    expected = (1 - sigma_BT1) * batch.clean_BTP + sigma_BT1 * noise_BTP
    torch.testing.assert_close(noised.input.patches_BTP, expected)
    torch.testing.assert_close(noise_BTP[0, :12].flatten(), normal(key_of(1234, "noise", 3), 0, 12 * P))
    torch.testing.assert_close(noised.input.timestep_R, 1000 * noised.sigma_G)
    assert torch.equal(noised.valid_BT, clip_BT >= 0)
    assert torch.equal(noised.input.row_BT, clip_BT.clamp(min=0))
    assert noised.input.text_GLD is batch.text_GLD


def test_padding_is_zero(objective):
    noised = objective.noise(batch_of((clip(3, 2), clip(4, 20)), (clip(5, 0),)))
    assert not noised.input.patches_BTP[~noised.valid_BT].any()
    assert not noised.target_BTP[~noised.valid_BT].any()
    assert noised.target_BTP[noised.valid_BT].all()


def test_a_clip_is_noised_alike_in_any_pack_row_position_and_microbatch(objective):
    together = batch_of((clip(7, 0), clip(8, 12)), (clip(9, 5), clip(10, 20)))
    alone = batch_of((clip(9, 0),), tokens=12)
    swapped = batch_of((clip(10, 0), clip(9, 12)), (clip(8, 0), clip(7, 20)))
    seen = {}
    for batch in (together, alone, swapped):
        noised = objective.noise(batch)
        velocity_BTP = noised.input.patches_BTP * 0.5
        losses = objective.loss(velocity_BTP, noised)
        places = [(row, one) for row, pack in enumerate(batch.packs) for one in pack.clips]
        for number, (row, one) in enumerate(places):
            span = slice(one.start, one.start + one.tokens)
            values = (noised.input.patches_BTP[row, span], noised.target_BTP[row, span])
            values += (noised.sigma_G[number], losses.sum_G[number])
            for value, before in zip(values, seen.setdefault(one.draw, values)):
                assert torch.equal(value, before)


def test_spans_of_a_batch_are_noised_alike_and_their_losses_add_up(objective):
    batch = batch_of((clip(7, 0), clip(8, 14, (1, 2, 2))), (clip(9, 5), clip(10, 20)))
    noised = objective.noise(batch)
    error_BTP = torch.randn_like(noised.target_BTP)
    want = objective.loss(noised.target_BTP + error_BTP, noised)
    sums = []
    for start, stop in ((0, 3), (3, 3), (3, 18), (18, 28), (28, 32)):
        part = objective.noise(batch.part(Span(start, stop)))
        assert part.input.span == Span(start, stop)
        for name in ("patches_BTP", "row_BT"):
            assert torch.equal(getattr(part.input, name), getattr(noised.input, name)[:, start:stop])
        assert torch.equal(part.target_BTP, noised.target_BTP[:, start:stop])
        assert torch.equal(part.valid_BT, noised.valid_BT[:, start:stop])
        assert torch.equal(part.sigma_G, noised.sigma_G)
        losses = objective.loss(part.target_BTP + error_BTP[:, start:stop], part)
        assert torch.equal(losses.elements_G, want.elements_G)
        sums.append(losses.sum_G)
    torch.testing.assert_close(torch.stack(sums).sum(0), want.sum_G)
    assert (torch.stack(sums) == 0).any()  # some span has nothing of some clip


def test_draws_and_seeds_differ_from_each_other(objective):
    same_sample = batch_of((clip(7, 0), clip(8, 12)))
    noised = objective.noise(same_sample)
    other = FlowObjective(CONFIG, seed=1235).noise(same_sample)
    assert noised.sigma_G.unique().numel() == 2
    assert not torch.equal(noised.sigma_G, other.sigma_G)
    assert abs(torch.corrcoef(noised.target_BTP[0, :24].reshape(2, -1))[0, 1]) < 0.4
    assert not torch.equal(noised.target_BTP, other.target_BTP)


def test_loss_sums_squares_over_each_clip_and_leaves_the_padding_out(objective):
    batch = batch_of((clip(3, 0), clip(4, 14, (1, 2, 2))), (clip(5, 1),))
    noised = objective.noise(batch)
    error_BTP = torch.randn_like(noised.target_BTP)
    velocity_BTP = (noised.target_BTP + error_BTP).requires_grad_()
    losses = objective.loss(velocity_BTP, noised)
    clip_BT = clip_index(batch.packs)
    for number in range(3):
        torch.testing.assert_close(losses.sum_G[number], error_BTP[clip_BT == number].square().sum())
    assert losses.elements_G.tolist() == [12 * P, 4 * P, 12 * P]
    losses.sum_G.sum().backward()
    assert velocity_BTP.grad is not None
    expected = 2 * error_BTP * noised.valid_BT.unsqueeze(-1)
    torch.testing.assert_close(velocity_BTP.grad, expected, rtol=1e-4, atol=1e-5)


def test_loss_of_low_precision_velocities_is_summed_in_fp32(objective):
    noised = objective.noise(batch_of((clip(3, 0),)))
    assert objective.loss(noised.target_BTP.bfloat16(), noised).sum_G.dtype == torch.float32
    assert objective.loss(noised.target_BTP.double(), noised).sum_G.dtype == torch.float64


def test_captions_are_dropped_at_the_rate_of_the_config_and_by_draw():
    dropped = [FlowObjective(DiffusionConfig(caption_drop=0.1), 1).drops_caption(draw) for draw in range(4000)]
    assert abs(sum(dropped) / 4000 - 0.1) < 0.02
    assert dropped[:50] == [FlowObjective(DiffusionConfig(caption_drop=0.1), 1).drops_caption(d) for d in range(50)]
    assert not any(FlowObjective(DiffusionConfig(caption_drop=0.0), 1).drops_caption(d) for d in range(100))
    assert all(FlowObjective(DiffusionConfig(caption_drop=1.0), 1).drops_caption(d) for d in range(100))


def test_validation_noise_never_changes_and_its_levels_are_even():
    batch = batch_of((clip(0, 0), clip(1, 12)))
    first, again = (ValidationObjective(seed=7).noise(batch) for _ in range(2))
    assert torch.equal(first.input.patches_BTP, again.input.patches_BTP)
    repeat = ValidationObjective(seed=7, repeat=1).noise(batch)
    assert not torch.equal(first.target_BTP, repeat.target_BTP)
    assert (first.sigma_G - repeat.sigma_G).abs().min() > 0.05
    renumbered = ValidationObjective(seed=7).noise(batch, numbers=[5, 6])
    assert torch.equal(first.target_BTP, renumbered.target_BTP)
    assert not torch.equal(first.sigma_G, renumbered.sigma_G)


def test_known_tokens_are_clean_at_level_0_and_no_loss_is_taken_of_them(objective):
    still, moving = clip(4, 12, (1, 2, 2)), replace(clip(3, 0, (3, 2, 2)), known=(0, 2))
    batch = batch_of((moving, still))
    noised = objective.noise(batch)
    known_T = noised.known_BT[0]
    assert known_T.nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(noised.input.patches_BTP[0][known_T], batch.clean_BTP[0][known_T])
    # One row for each clip, and one more for the clip that has known tokens.
    assert noised.input.timestep_R.tolist() == [*(1000 * noised.sigma_G).tolist(), 0.0]
    assert noised.input.row_BT[0, :16].tolist() == [2] * 4 + [0] * 4 + [2] * 4 + [1] * 4
    plain = objective.noise(batch_of((replace(moving, known=()), still)))
    unknown_T = ~known_T
    assert torch.equal(noised.input.patches_BTP[0][unknown_T], plain.input.patches_BTP[0][unknown_T])
    velocity_BTP = torch.randn(1, 32, P, requires_grad=True)
    losses = objective.loss(velocity_BTP, noised)
    assert losses.elements_G.tolist() == [4 * P, 4 * P]
    square_T = (velocity_BTP - noised.target_BTP).square().sum(-1)[0]
    torch.testing.assert_close(losses.sum_G[0], square_T[4:8].sum())
    losses.sum_G.sum().backward()
    assert not velocity_BTP.grad[0][known_T].any()
    for start, stop in ((0, 2), (2, 9), (9, 32)):
        part = objective.noise(batch.part(Span(start, stop)))
        assert torch.equal(part.known_BT, noised.known_BT[:, start:stop])
        assert torch.equal(part.input.row_BT, noised.input.row_BT[:, start:stop])


def test_what_is_known_in_channels_follows_the_noised_latents(objective):
    batch = batch_of((clip(3, 0), clip(4, 12, (1, 2, 2))))
    condition_BTP = torch.randn(1, 32, 5)
    patches_BTP = objective.noise(replace(batch, condition_BTP=condition_BTP)).input.patches_BTP
    assert torch.equal(patches_BTP[..., :P], objective.noise(batch).input.patches_BTP)
    assert torch.equal(patches_BTP[..., P:], condition_BTP)
    part = objective.noise(replace(batch, condition_BTP=condition_BTP).part(Span(5, 20)))
    assert torch.equal(part.input.patches_BTP, patches_BTP[:, 5:20])
