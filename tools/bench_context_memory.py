#!/usr/bin/env python
"""Count the bytes that one block of the model takes on a context-parallel rank: a table and docs/context_memory.png.

    python tools/bench_context_memory.py            # 1, 2, 4 and 8 CPU ranks, every strategy

Bytes are counted at torch's allocator, not resident size: the peak of forward and backward of one block of 8 heads of
16 at 8192 tokens, fp32, inputs included, weights and their gradients left out. The kernel of self-attention is a
stand-in that allocates what the real one gives back and computes nothing; --real runs the real one, in minutes.

  layer       peak of the whole block in MB, and times the ranks over that of one rank: 1.00 is a fall as 1 / CP
  attention   peak of self-attention alone, in tensors of this rank's tokens and the model's width
"""

import argparse
import pickle
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megavid.parallel.launch import RankEnv, init_distributed, run_local_ranks
from megavid.plan.context import ContextPlan
from megavid.profiling.context_memory import ContextMemory, measure_context_memory
from megavid.training.plots import COLORS, GRID, INK, MUTED

PLANS = {
    "ring": [ContextPlan(), *(ContextPlan(1, n) for n in (2, 4, 8))],
    "ulysses": [ContextPlan(), *(ContextPlan(n, 1) for n in (2, 4, 8))],
    "hybrid (ulysses 2)": [ContextPlan(2, 2), ContextPlan(2, 4)],
    "all-gather": [ContextPlan(), *(ContextPlan(1, n, "allgather") for n in (2, 4, 8))],
}


def measure(plans: Sequence[ContextPlan], is_hollow: bool) -> list[ContextMemory]:
    """The rank with the most, for each plan of as many ranks, which are started for it."""
    world = plans[0].cp
    with tempfile.TemporaryDirectory() as folder:
        run_local_ranks(partial(entry, plans, is_hollow, Path(folder)), world)
        told = [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world)]
    return [max(ranks, key=lambda memory: memory.layer) for ranks in zip(*told)]


def entry(plans: Sequence[ContextPlan], is_hollow: bool, folder: Path, env: RankEnv) -> None:
    """One rank."""
    torch.set_num_threads(1)
    init_distributed(env, "cpu")
    memory = [measure_context_memory(plan, is_hollow=is_hollow) for plan in plans]
    (folder / str(env.rank)).write_bytes(pickle.dumps(memory))
    dist.barrier()
    dist.destroy_process_group()


def table(results: dict[ContextPlan, ContextMemory]) -> str:
    """One line for each strategy and number of ranks."""
    alone = results[ContextPlan()]
    lines = [f"{'strategy':<24}{'ranks':>5}{'layer MB':>10}{'x ranks / one':>15}{'attention':>11}"]
    for plan, memory in sorted(results.items(), key=lambda item: item[0].cp):
        share = memory.layer * plan.cp / alone.layer
        name = plan.describe() if plan.cp > 1 else "one rank"
        lines.append(
            f"{name:<24}{plan.cp:>5}{memory.layer / 1e6:>10.1f}{share:>15.2f}{memory.attention / memory.shard:>11.1f}"
        )
    return "\n".join(lines)


def draw(results: dict[ContextPlan, ContextMemory], file: Path) -> None:
    """Bytes of the block against the number of ranks, and the buffers of self-attention alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks, alone = [1, 2, 4, 8], results[ContextPlan()]
    left.plot(ranks, [alone.layer / 1e6 / n for n in ranks], "--", color=MUTED, label="one rank / CP")
    for number, (name, plans) in enumerate(PLANS.items()):
        style = {"marker": "osD^"[number], "color": COLORS[number], "label": name, "markersize": 5}
        counts = [plan.cp for plan in plans]
        left.plot(counts, [results[plan].layer / 1e6 for plan in plans], **style)
        right.plot(counts, [results[plan].attention / results[plan].shard for plan in plans], **style)
    left.set(yscale="log", ylabel="peak MB on a rank", title="One block, forward and backward")
    right.set(ylabel="tensors [tokens / CP, width]", title="Self-attention alone", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(n) for n in ranks])
        axes.set_xlabel("context-parallel ranks", color=INK)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.set_yticks([20, 40, 80, 160], ["20", "40", "80", "160"])
    left.minorticks_off()
    left.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=140)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/context_memory.png"), help="the picture to write")
    parser.add_argument("--real", action="store_true", help="compute self-attention too")
    args = parser.parse_args(argv)
    results = {}
    for world in (2, 4, 8, 1):  # one rank runs in this process and starts threads, after which none may be forked
        plans = list(dict.fromkeys(plan for group in PLANS.values() for plan in group if plan.cp == world))
        results |= dict(zip(plans, measure(plans, not args.real)))
    print(table(results))
    draw(results, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
