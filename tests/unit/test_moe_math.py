"""The choice of experts as pure functions: ties, groups, capacity, per-clip losses."""

import torch

from megavid.ops import moe_math


def scores(tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_top_experts_are_the_best_and_ties_go_to_the_lower_number() -> None:
    ids = moe_math.top_experts(torch.tensor([[0.5, 0.9, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]), 2)
    assert ids.tolist() == [[1, 0], [0, 1]]


def test_group_limit_keeps_every_choice_in_the_best_groups() -> None:
    table = scores(50, 8)
    limited = moe_math.within_top_groups(table, num_groups=4, top_groups=2, top_k=4)
    groups = moe_math.top_experts(limited, 4) // 2
    assert all(len(set(row)) == 2 for row in groups.tolist())
    sums = table.view(50, 4, 2).sum(-1).topk(2).indices
    assert all(set(a) == set(b) for a, b in zip(groups.tolist(), sums.tolist()))


def test_group_limit_of_all_groups_is_no_limit() -> None:
    table = scores(5, 8)
    assert moe_math.within_top_groups(table, num_groups=4, top_groups=4, top_k=2) is table


def test_gates_sum_to_one_and_keep_proportions() -> None:
    table = scores(9, 6)
    ids = moe_math.top_experts(table, 3)
    gates = moe_math.gates_of(table, ids)
    torch.testing.assert_close(gates.sum(-1), torch.ones(9, dtype=torch.float64))
    torch.testing.assert_close(gates[:, 0] / gates[:, 1], table.gather(1, ids)[:, 0] / table.gather(1, ids)[:, 1])


def test_the_gate_of_a_single_expert_is_its_score() -> None:
    table = scores(4, 6)
    ids = moe_math.top_experts(table, 1)
    torch.testing.assert_close(moe_math.gates_of(table, ids), table.max(-1, keepdim=True).values)


def test_expert_choice_equals_its_slow_twin() -> None:
    clip = torch.tensor([0, 1, 0, 1, 2, 2, 2, 0, 1, -1, 2, -1, 2, 2, 0])
    sizes = torch.tensor([4, 3, 6])
    capacity = moe_math.expert_capacity(sizes, top_k=2, num_experts=5)
    assert capacity.tolist() == [2, 2, 3]
    for seed in range(20):
        # Rounded, so that many scores tie.
        table = (scores(15, 5, seed) * 4).round() / 4
        fast = moe_math.expert_choice(table, clip, capacity)
        assert torch.equal(fast, moe_math.expert_choice_reference(table, clip, capacity))
        assert fast[clip < 0].sum() == 0
        assert torch.equal(moe_math.count_by_clip(fast, clip, 3).long(), capacity.unsqueeze(1).expand(3, 5))


def test_capacity_is_never_zero_and_never_more_than_the_clip() -> None:
    sizes = torch.tensor([1, 2, 3, 100])
    assert moe_math.expert_capacity(sizes, top_k=1, num_experts=64).tolist() == [1, 1, 1, 2]
    assert moe_math.expert_capacity(sizes, top_k=8, num_experts=8).tolist() == [1, 2, 3, 100]


def test_balance_loss_is_one_for_a_balanced_clip() -> None:
    clip = torch.zeros(8, dtype=torch.int64)
    even = torch.full((8, 4), 0.25)
    chosen = torch.eye(4).repeat(2, 1) > 0
    counts = moe_math.count_by_clip(chosen, clip, 1)
    loss = moe_math.balance_loss(even, counts, clip, torch.tensor([8]), top_k=1)
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_router_losses_of_a_clip_ignore_the_others_and_the_padding() -> None:
    clip = torch.tensor([0, 0, 1, 1, 1, -1])
    logits = scores(6, 4) * 3
    table, sizes = logits.softmax(-1), torch.tensor([2, 3])
    chosen = torch.zeros_like(table, dtype=torch.bool).scatter_(1, moe_math.top_experts(table, 2), True)
    together = moe_math.balance_loss(table, moe_math.count_by_clip(chosen, clip, 2), clip, sizes, 2)
    z = moe_math.z_loss(logits, clip, sizes)
    apart, z_apart = [], []
    for number in range(2):
        own = clip == number
        alone, size = torch.zeros(int(own.sum()), dtype=torch.int64), sizes[number : number + 1]
        counts = moe_math.count_by_clip(chosen[own], alone, 1)
        apart.append(moe_math.balance_loss(table[own], counts, alone, size, 2))
        z_apart.append(logits[own].logsumexp(-1).square().mean())
        share = chosen[own].double().mean(0)
        torch.testing.assert_close(apart[-1], (4 / 2 * share * table[own].mean(0)).sum())
    torch.testing.assert_close(together, sum(apart))
    torch.testing.assert_close(z, sum(z_apart))
