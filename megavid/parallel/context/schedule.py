"""What a rank computes at each hop: its rows of queries against the rows of keys that it then holds.

Owns the step from rectangles in global tokens to slices of tensors. Host arithmetic, done once for a microbatch; it
decides what is computed, never what is sent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megavid.errors import ConfigError
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.context.layout import CPLayout, Run
from megavid.plan.context import Kind


class Block(NamedTuple):
    """One call of a kernel: packs [row_start, row_stop), queries [q_start, q_stop) and keys [k_start, k_stop) of rows.

    ``is_first`` says that nothing was added to these queries before, so that the result needs no merging.
    """

    row_start: int
    row_stop: int
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    is_first: bool = True


@dataclass(frozen=True)
class Schedule:
    """The blocks of every hop of one rank.

    Attributes:
        hops: blocks by hop; at hop h a ring holds the keys of ring shard ``(ring_rank - h) % R``, an all-gather has one
            hop with all keys.
        queries_once: no query is in two blocks, so that nothing is merged.
        keys_once: no key is in two blocks, so that no gradient of it is a sum.
    """

    hops: tuple[tuple[Block, ...], ...]
    queries_once: bool
    keys_once: bool


def schedule_of(layout: CPLayout, plans: tuple[AttnPlan, ...], kind: Kind) -> Schedule:
    """The blocks of this rank for the packs of a microbatch, one plan each.

    Raises:
        ConfigError: a plan's pack has not as many tokens as the layout.
    """
    for plan in plans:
        if plan.num_tokens != layout.num_tokens:
            raise ConfigError(
                f"an attention plan of {plan.num_tokens} tokens does not fit the context-parallel layout of "
                f"{layout.num_tokens}; data.pack_tokens is the length of both"
            )
    ring, mine = layout.groups.plan.ring, layout.groups.ring_rank
    queries = layout.shard_runs(mine)
    if kind == "ring":
        keys = [layout.shard_runs((mine - hop) % ring) for hop in range(ring)]
    else:
        keys = [gathered_runs(layout)]
    hops = _mark_first([_blocks(queries, runs, plans) for runs in keys])
    # Keys are other ones at each hop of a ring.
    return Schedule(
        tuple(hops),
        queries_once=all(block.is_first for hop in hops for block in hop),
        keys_once=all(_is_disjoint((b.row_start, b.row_stop, b.k_start, b.k_stop) for b in hop) for hop in hops),
    )


def gathered_runs(layout: CPLayout) -> tuple[Run, ...]:
    """Rows of all ring shards as the all-gather lays them: each padded to the longest."""
    longest = max(layout.ring_lengths)
    runs: list[Run] = []
    for shard in range(layout.groups.plan.ring):
        for run in layout.shard_runs(shard, shard * longest):
            last = runs[-1] if runs else None
            if last and last.stop == run.start and last.row + last.stop - last.start == run.row:
                runs[-1] = Run(last.start, run.stop, last.row)
            else:
                runs.append(run)
    return tuple(runs)


def _blocks(queries: tuple[Run, ...], keys: tuple[Run, ...], plans: tuple[AttnPlan, ...]) -> list[Block]:
    """Blocks of one hop; packs side by side with the same plan share theirs."""
    blocks: list[Block] = []
    first = 0
    for row in range(1, len(plans) + 1):
        if row < len(plans) and plans[row] == plans[first]:
            continue
        pieces = [
            (q_start, q_stop, k_start, k_stop)
            for rectangle in plans[first].rectangles
            for q_start, q_stop in _rows(queries, rectangle.q_start, rectangle.q_stop)
            for k_start, k_stop in _rows(keys, rectangle.k_start, rectangle.k_stop)
        ]
        blocks += [Block(first, row, *piece) for piece in merged(pieces)]
        first = row
    return blocks


def _rows(runs: tuple[Run, ...], start: int, stop: int) -> list[tuple[int, int]]:
    """Rows of tokens [start, stop), as few ranges as can be."""
    rows: list[tuple[int, int]] = []
    for run in runs:
        low, high = max(run.start, start), min(run.stop, stop)
        if low >= high:
            continue
        first, last = run.row + low - run.start, run.row + high - run.start
        if rows and rows[-1][1] == first:
            rows[-1] = (rows[-1][0], last)
        else:
            rows.append((first, last))
    return rows


def merged(pieces: Iterable[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """The same pairs in fewer rectangles: those side by side become one."""
    current = list(pieces)
    while True:
        joined = _joined_keys(_joined_queries(current))
        if len(joined) == len(current):
            return joined
        current = joined


def _joined_queries(pieces: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    joined: list[tuple[int, int, int, int]] = []
    for q_start, q_stop, k_start, k_stop in sorted(pieces, key=lambda p: (p[2], p[3], p[0])):
        last = joined[-1] if joined else None
        if last and last[1] == q_start and last[2:] == (k_start, k_stop):
            joined[-1] = (last[0], q_stop, k_start, k_stop)
        else:
            joined.append((q_start, q_stop, k_start, k_stop))
    return joined


def _joined_keys(pieces: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    joined: list[tuple[int, int, int, int]] = []
    for q_start, q_stop, k_start, k_stop in sorted(pieces):
        last = joined[-1] if joined else None
        if last and last[3] == k_start and last[:2] == (q_start, q_stop):
            joined[-1] = (q_start, q_stop, last[2], k_stop)
        else:
            joined.append((q_start, q_stop, k_start, k_stop))
    return joined


def _mark_first(hops: list[list[Block]]) -> list[tuple[Block, ...]]:
    """Mark the blocks whose queries no block before them has."""
    seen: list[tuple[int, int, int, int]] = []
    marked = []
    for hop in hops:
        blocks = []
        for block in hop:
            area = (block.row_start, block.row_stop, block.q_start, block.q_stop)
            blocks.append(block._replace(is_first=not any(_meet(area, other) for other in seen)))
            seen.append(area)
        marked.append(tuple(blocks))
    return marked


def _is_disjoint(areas: Iterable[tuple[int, int, int, int]]) -> bool:
    seen: list[tuple[int, int, int, int]] = []
    for area in areas:
        if any(_meet(area, other) for other in seen):
            return False
        seen.append(area)
    return True


def _meet(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[2] < other[3] and other[2] < one[3]
