"""The matcher of recordings finds what is wrong with a schedule, and nothing where nothing is."""

from dataclasses import replace

import pytest

from megavid.plan.layout import Layout
from megavid.profiling.collectives import Call
from tests.support.schedule_match import check, differences


def call(operation: str, group: str, ranks: tuple[int, ...], size: int = 4, **more: object) -> Call:
    return Call(operation, group, ranks, (size,), "float32", 4 * size, **{"peer": None, **more})  # type: ignore[arg-type]


def numbered(*calls: Call) -> list[Call]:
    return [replace(each, batch=number) for number, each in enumerate(calls)]


def send(peer: int, size: int = 4) -> Call:
    return call("send", "pp", (0, 1), size, peer=peer)


def receive(peer: int, size: int = 4) -> Call:
    return call("recv", "pp", (0, 1), size, peer=peer)


SUM = call("all_reduce", "tp", (0, 1), reduction="SUM")
GATHER = call("all_gather", "tp", (0, 1))
OTHER = call("all_reduce", "ep", (0, 1), reduction="SUM")


def test_right_schedule_has_no_problem() -> None:
    match = check({0: numbered(SUM, send(1), GATHER, receive(1)), 1: numbered(SUM, receive(0), GATHER, send(0))})
    assert (match.problems, match.sends, match.collectives, match.unseen) == ([], 2, 4, 0)


def test_dropped_send_is_found() -> None:
    match = check({0: numbered(SUM, GATHER), 1: numbered(SUM, receive(0), GATHER)})
    assert match.problems[0] == "pp from 0 to 1: 0 sends, 1 receives"
    assert "rank 0 in all_gather [4] float32 in tp; rank 1 in recv [4] float32 in pp with 0" in match.problems[1]


def test_two_orders_in_one_group_are_found() -> None:
    match = check({0: numbered(SUM, GATHER), 1: numbered(GATHER, SUM)})
    assert match.problems == [
        "tp, call 0: rank 0 says all_reduce [4] float32 in tp, rank 1 all_gather [4] float32 in tp"
    ]


def test_orders_that_cross_between_groups_never_end() -> None:
    match = check({0: numbered(SUM, OTHER), 1: numbered(OTHER, SUM)})
    assert len(match.problems) == 1
    assert match.problems[0].startswith("2 ranks wait for ever: rank 0 in all_reduce [4] float32 in tp; rank 1")


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (5,)},
        {"dtype": "bfloat16"},
        {"reduction": "MAX"},
        {"ranks": (0, 1, 2)},
    ],
)
def test_calls_that_do_not_fit_are_found(wrong: dict[str, object]) -> None:
    assert check({0: numbered(SUM), 1: numbered(replace(SUM, **wrong))}).problems  # type: ignore[arg-type]


def test_send_of_another_shape_is_found() -> None:
    match = check({0: numbered(send(1, 4)), 1: numbered(receive(0, 5))})
    assert match.problems == [
        "pp from 0 to 1, number 0: send [4] float32 in pp with 1 meets recv [5] float32 in pp with 0"
    ]


def test_collective_that_a_rank_leaves_out_is_found() -> None:
    assert check({0: numbered(SUM, GATHER), 1: numbered(SUM)}).problems[0] == ("tp: rank 0 makes 2 calls, rank 1 1")
    assert check({0: numbered(SUM), 1: []}).problems[0] == "tp: rank 0 makes 1 calls, rank 1 0"


def test_uneven_exchange_must_fit_from_both_sides() -> None:
    def exchange(sent: tuple[int, int], received: tuple[int, int]) -> Call:
        return call("all_to_all", "ep", (0, 1), sum(sent), splits=(sent, received))

    right = {0: numbered(exchange((1, 3), (1, 5))), 1: numbered(exchange((5, 2), (3, 2)))}
    assert check(right).problems == []
    wrong = {0: numbered(exchange((1, 3), (1, 4))), 1: numbered(exchange((5, 2), (3, 2)))}
    assert check(wrong).problems


def test_two_sends_at_once_wait_for_ever_unless_they_are_one_batch() -> None:
    apart = {0: numbered(send(1), receive(1)), 1: numbered(send(0), receive(0))}
    assert check(apart).problems[0].startswith("2 ranks wait for ever")
    together = {rank: [replace(each, batch=0) for each in calls] for rank, calls in apart.items()}
    assert check(together).problems == []


def test_messages_to_ranks_without_recordings_are_counted() -> None:
    assert check({0: numbered(send(1))}).unseen == 1


RING = Layout(cp=2, dp=2)


def hop(to: int, come: int) -> list[Call]:
    ranks = (0, 1)
    return [
        call("send", "cp", ranks, peer=to),
        call("recv", "cp", ranks, peer=come),
    ]


def test_folded_ring_meets_itself() -> None:
    assert check({0: hop(1, 1)}, RING).problems == []
    # Four ranks on the ring: what goes one step on must come from one step back.
    ring = Layout(cp=4)
    assert check({0: hop(1, 3)}, ring).problems == []
    assert check({0: hop(1, 1)}, ring).problems


def test_folded_exchange_must_be_even() -> None:
    uneven = call("all_to_all", "ep", (0, 1), splits=((1, 3), (1, 3)))
    assert "record all of its ranks" in check({0: numbered(uneven)}, Layout(dp=2, ep=2)).problems[0]


def test_ranks_of_a_stage_that_say_different_things_are_found() -> None:
    layout = Layout(tp=2, dp=2)
    first, same, other = (0, numbered(SUM)), (2, numbered(replace(SUM, ranks=(2, 3)))), (2, numbered(GATHER))
    assert list(differences(layout, first, same)) == []
    assert list(differences(layout, first, other)) == [
        "call 0: rank 0 all_reduce [4] float32 in tp, rank 2 all_gather [4] float32 in tp"
    ]
    assert list(differences(layout, first, (2, []))) == ["rank 0 makes 1 calls, rank 2 0"]
