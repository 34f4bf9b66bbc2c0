"""Context parallelism on paper: which degrees a strategy means, what is refused, and what `auto` weighs."""

import pytest

from megavid.errors import ConfigError
from megavid.plan.context import (
    ContextPlan,
    Strategy,
    context_plan,
    exposed_fraction,
    tokens_that_hide_a_hop,
    ulysses_degrees,
)

RATES = {"attention_rate": 600e12, "inner_rate": 350e9, "outer_rate": 50e9}


@pytest.mark.parametrize(("strategy", "heads", "cp", "plan"), [
    ("ulysses", 40, 8, ContextPlan(8, 1)),
    ("ring", 12, 8, ContextPlan(1, 8, "ring")),
    ("allgather", 12, 8, ContextPlan(1, 8, "allgather")),
    ("hybrid", 12, 8, ContextPlan(4, 2, "ring")),
    ("hybrid", 40, 16, ContextPlan(8, 2, "ring")),
    ("auto", 40, 8, ContextPlan(8, 1)),
    ("auto", 12, 8, ContextPlan(4, 2)),
    ("auto", 7, 8, ContextPlan(1, 8)),
    ("auto", 40, 1, ContextPlan(1, 1)),
    ("ulysses", 40, 1, ContextPlan(1, 1)),
    ("ring", 40, 1, ContextPlan(1, 1)),
])  # fmt: skip
def test_a_strategy_is_degrees(strategy: Strategy, heads: int, cp: int, plan: ContextPlan) -> None:
    assert context_plan(strategy, heads_per_tp=heads, cp=cp, tokens=100_000) == plan


@pytest.mark.parametrize(("strategy", "heads", "cp", "words"), [
    ("ulysses", 12, 8, r"'ulysses' needs parallel.context = 8 to divide heads per tensor-parallel rank = 12; set"),
    ("hybrid", 12, 5, r"'hybrid' needs a divisor of parallel.context = 5 between 1 and 5 .* = 12; set .*'ulysses'"),
    ("hybrid", 9, 8, r"'hybrid' needs a divisor of parallel.context = 8"),
    ("hybrid", 8, 1, r"'hybrid' needs a divisor of parallel.context = 1"),
])  # fmt: skip
def test_what_heads_do_not_allow_is_refused(strategy: Strategy, heads: int, cp: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        context_plan(strategy, heads_per_tp=heads, cp=cp, tokens=1000)


def test_key_heads_limit_ulysses() -> None:
    assert ulysses_degrees(cp=16, heads_per_tp=64, kv_heads_per_tp=8) == (1, 2, 4, 8)
    assert context_plan("auto", heads_per_tp=64, kv_heads_per_tp=8, cp=16, tokens=1000, domain=16) == ContextPlan(8, 2)
    with pytest.raises(ConfigError, match=r"rank = 8"):
        context_plan("ulysses", heads_per_tp=64, kv_heads_per_tp=8, cp=16, tokens=1000)


def test_ulysses_leaves_its_domain_only_for_long_videos_and_known_rates() -> None:
    rates = {"attention_rate": 600e12, "inner_rate": 350e9, "outer_rate": 50e9}
    assert context_plan("auto", heads_per_tp=40, cp=40, tokens=75_600, **rates).ulysses == 8
    assert context_plan("auto", heads_per_tp=40, cp=40, tokens=867_600, **rates) == ContextPlan(40, 1)
    # A pack of many tokens may hold short clips: its length alone tells nothing.
    assert context_plan("auto", heads_per_tp=40, cp=40, tokens=867_600) == ContextPlan(8, 5)


def test_a_hop_hides_behind_as_many_tokens_as_were_published() -> None:
    assert tokens_that_hide_a_hop(600e12, 50e9) == 12_000
    assert tokens_that_hide_a_hop(600e12, 100e9) == 6_000
    assert tokens_that_hide_a_hop(600e12, 350e9) == pytest.approx(1_714, rel=1e-3)
    assert tokens_that_hide_a_hop(600e12, 50e9, kv_share=1 / 8) == 1_500


def test_all_to_alls_cost_what_was_published() -> None:
    wide = {"attention_rate": 600e12, "tokens": 75_600}
    assert exposed_fraction(1, rate=50e9, **wide) == 0
    assert exposed_fraction(8, rate=350e9, **wide) == pytest.approx(0.04, abs=5e-3)
    assert exposed_fraction(8, rate=50e9, **wide) == pytest.approx(0.28, abs=5e-3)
    longest = exposed_fraction(40, rate=50e9, attention_rate=600e12, tokens=867_600)
    assert longest == pytest.approx(0.024 + 0.003, abs=5e-3)


def test_with_rates_auto_weighs_domain_and_length() -> None:
    # 720p for 5 s on 16 ranks in two domains: inside the domain by heads, across it by a ring that hides.
    short = context_plan("auto", heads_per_tp=40, cp=16, tokens=75_600, **RATES)
    assert short == ContextPlan(8, 2, "ring")
    # Few tokens on many ranks: a hop cannot hide, so that larger kernels are worth more than memory.
    tiny = context_plan("auto", heads_per_tp=2, cp=16, tokens=16_000, **RATES)
    assert (tiny.ulysses, tiny.kind) == (2, "allgather")
    # A minute: heads may cross the domains.
    assert context_plan("auto", heads_per_tp=40, cp=40, tokens=867_600, **RATES) == ContextPlan(40, 1)
    assert context_plan("auto", heads_per_tp=40, cp=40, tokens=200_000, **RATES) == ContextPlan(8, 5)
    # Ranks of one domain: all by heads where heads allow it.
    assert context_plan("auto", heads_per_tp=40, cp=8, tokens=75_600, **RATES) == ContextPlan(8, 1)


def test_plans_say_what_they_are() -> None:
    plans = (ContextPlan(), ContextPlan(4, 1), ContextPlan(1, 3), ContextPlan(4, 2, "allgather"))
    assert [plan.describe() for plan in plans] == ["none", "ulysses4", "ring3", "ulysses4 x allgather2"]
    assert [plan.cp for plan in plans] == [1, 4, 3, 8]
