"""Rows of experts filled up to a multiple and taken out again."""

import pytest
import torch

from megavid.ops.filled_rows import fill_rows
from megavid.ops.grouped_experts import ExpertWeights, grouped_experts


@pytest.mark.parametrize("sizes", [(5, 0, 16, 1), (0, 0, 0, 0), (16, 32, 0, 16), (0, 3, 0, 0)])
def test_rows_stand_where_their_expert_is_and_come_out_in_order(sizes: tuple[int, ...]) -> None:
    own = torch.tensor(sizes)
    x, gate = torch.randn(int(own.sum()), 3), torch.rand(int(own.sum()))
    rows = fill_rows(x, gate, own, multiple=16)
    wanted = [-(-size // 16) * 16 for size in sizes]
    assert rows.tokens_per_expert.tolist() == wanted
    assert torch.equal(rows.take_out(rows.x_SD), x)
    parts = zip(
        sizes, rows.x_SD.split(wanted), rows.probability_S.split(wanted), x.split(list(sizes)), gate.split(list(sizes))
    )
    for size, filled, gates, given, given_gates in parts:
        assert torch.equal(filled[:size], given)
        assert torch.equal(gates[:size], given_gates)
        assert not filled[size:].any()
        assert not gates[size:].any()


def test_multiples_are_left_as_they_are() -> None:
    x, gate = torch.randn(48, 3), torch.rand(48)
    rows = fill_rows(x, gate, torch.tensor([16, 32]), multiple=16)
    assert rows.x_SD is x
    assert rows.probability_S is gate
    assert rows.place_R is None


def test_experts_and_gradients_do_not_see_what_fills_up() -> None:
    own = torch.tensor([5, 0, 9])
    draw = torch.Generator().manual_seed(1)
    shapes = [(14, 4), (14,), (3, 6, 4), (3, 4, 6), (3, 6, 4), (3, 6), (3, 6), (3, 4)]
    given = [torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, gate, weights = given[0], given[1], ExpertWeights(*given[2:])
    plain = grouped_experts(x, own, weights, gate)
    rows = fill_rows(x, gate, own, multiple=8)
    filled = rows.take_out(grouped_experts(rows.x_SD, rows.tokens_per_expert, weights, rows.probability_S))
    torch.testing.assert_close(filled, plain)
    along = torch.randn(plain.shape, generator=draw, dtype=torch.float64)
    wanted, got = (torch.autograd.grad((out * along).sum(), given) for out in (plain, filled))
    torch.testing.assert_close(got, wanted)
