"""Measure how full and how even the packs of a run are, beside one clip per row: a table, no training and no GPU.

    python tools/bench_packing.py                                    # small clips and the model `tiny`
    python tools/bench_packing.py --preset wan_14b --clips 480p      # 5 seconds of 480p and Wan 2.1 14B

Clips are the procedural data set's: half of them images, 40% short and 10% long, in three resolutions; the longest one
is at most half a pack. A step has ranks x microbatches x micro-batch size packs, and every rank takes its slice, as the
loader of a run gives it. For each step, in model FLOPs (clips only, padding left out):

  padding        part of the tokens that belongs to no clip
  ranks          work of the rank with the most over the mean: the others wait for it at the end of the step
  microbatches   work of the heaviest microbatch over the mean: a pipeline waits for it at every turn
  efficiency     model FLOPs of the step over what its devices pay for, if all take as long as the heaviest microbatch;
                 padding is paid for, it passes every matrix but the experts'

The rows that packs are compared with are as long as the longest clip and hold one clip each, in the order of the run.
Figures are means over the steps, the worst step in brackets.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from megavid.config.load import load_run
from megavid.config.schema import ModelConfig, RunConfig, require
from megavid.data.order import SampleOrder
from megavid.data.packing import PackStream, tokens_of
from megavid.data.sample import ClipSource, TextSpec
from megavid.data.synthetic import SyntheticSource, mixed_sizes
from megavid.data.tokenizer import DctTokenizer
from megavid.errors import MegavidError
from megavid.plan.flops import forward_flops

CLIPS = {
    "small": mixed_sizes([(64, 64), (64, 96), (96, 96)], 9, 17),
    "480p": mixed_sizes([(240, 416), (352, 624), (480, 832)], 33, 81),
    "720p": mixed_sizes([(352, 624), (480, 832), (720, 1280)], 33, 81),
}
"""Sets of clips by name: frames, height, width."""
MULTIPLE = 96
"""Packs are a multiple of this, as in the presets."""


@dataclass(frozen=True)
class Step:
    """The packs, or rows, of one step: tokens of every clip in each."""

    packs: list[list[int]]
    pack_tokens: int


@dataclass(frozen=True)
class Figures:
    """What is measured of steps; one number for each.

    Attributes:
        clips: clips of a step.
        padding: part of the tokens that belongs to no clip.
        ranks: most work of a rank over the mean.
        microbatches: most work of a microbatch over the mean.
        efficiency: work over what is paid for.
    """

    clips: NDArray[np.float64]
    padding: NDArray[np.float64]
    ranks: NDArray[np.float64]
    microbatches: NDArray[np.float64]
    efficiency: NDArray[np.float64]


def source_of(clips: str) -> ClipSource:
    """The procedural clips of one of ``CLIPS``."""
    return SyntheticSource(1, DctTokenizer(16), TextSpec("none", "1", 1, 1), sizes=CLIPS[clips])


def run_config(
    preset: str, source: ClipSource, ranks: int, microbatches: int, micro_batch_size: int, pack_tokens: int = 0
) -> RunConfig:
    """The run whose packs are looked at; packs of twice the longest clip where ``pack_tokens`` is 0."""
    config = load_run(preset, [])
    longest = max(tokens_of(bucket.shape, config.model.patch_size, source.name) for bucket in source.buckets)
    pack_tokens = pack_tokens or -(-2 * longest // MULTIPLE) * MULTIPLE
    train = replace(
        config.train, global_batch_size=ranks * microbatches * micro_batch_size, micro_batch_size=micro_batch_size
    )
    return replace(config, train=train, data=replace(config.data, pack_tokens=pack_tokens))


def packed(config: RunConfig, source: ClipSource, steps: int) -> tuple[list[Step], float]:
    """The packs of the first steps, and the CPU seconds that filling those of one step took."""
    order = SampleOrder(source, config.train.seed)
    stream = PackStream(order, config, source.name)
    started = time.process_time()
    filled = [stream.next() for _ in range(steps)]
    seconds = (time.process_time() - started) / steps
    tokens = clip_tokens(order, source, config, range(stream.position.next_draw))
    return [
        Step([[tokens[slot.draw] for slot in slots] for slots in packs], config.data.pack_tokens) for packs in filled
    ], seconds


def one_per_row(config: RunConfig, source: ClipSource, steps: int) -> list[Step]:
    """As many rows in a step as the run has packs, each with one clip and as long as the longest one."""
    order, rows = SampleOrder(source, config.train.seed), config.train.global_batch_size
    longest = max(tokens_of(shape, config.model.patch_size, source.name) for shape in order.shapes)
    tokens = clip_tokens(order, source, config, range(steps * rows))
    return [Step([[size] for size in tokens[step * rows : (step + 1) * rows]], longest) for step in range(steps)]


def clip_tokens(order: SampleOrder, source: ClipSource, config: RunConfig, draws: range) -> list[int]:
    """Tokens of the clip of each draw, by the sample's own shape."""
    samples = order.samples(np.arange(draws.start, draws.stop, dtype=np.int64)).tolist()
    return [tokens_of(source.shape(index), config.model.patch_size, source.name) for index in samples]


def measure(model: ModelConfig, steps: Sequence[Step], ranks: int, micro_batch_size: int) -> Figures:
    """The figures of each step when ``ranks`` data-parallel ranks take their slices."""

    @cache
    def work_of(tokens: int) -> float:
        return forward_flops(model, [tokens]).total

    @cache
    def idle_of(tokens: int) -> float:
        return forward_flops(model, [], padding=tokens).total

    rows = []
    for step in steps:
        work = np.array([sum(map(work_of, pack)) for pack in step.packs])
        filled = np.array([sum(pack) for pack in step.packs])
        paid = work + np.array([idle_of(step.pack_tokens - tokens) for tokens in filled.tolist()])
        by_rank, by_microbatch = work.reshape(ranks, -1).sum(1), work.reshape(-1, micro_batch_size).sum(1)
        slowest = paid.reshape(-1, micro_batch_size).sum(1).max()
        rows.append((
            sum(map(len, step.packs)),
            1 - filled.sum() / (len(filled) * step.pack_tokens),
            by_rank.max() / by_rank.mean(),
            by_microbatch.max() / by_microbatch.mean(),
            work.sum() / (len(by_microbatch) * slowest),
        ))  # fmt: skip
    return Figures(*np.array(rows, np.float64).T)


def table(columns: dict[str, Figures], tokens: Sequence[int]) -> str:
    """The figures as text, a column for each way to fill a step."""

    def percent(values: NDArray[np.float64], worst: float) -> str:
        return f"{100 * values.mean():.2f}% ({100 * worst:.2f}%)"

    def ratio(values: NDArray[np.float64]) -> str:
        return f"{values.mean():.3f} ({values.max():.3f})"

    figures = columns.values()
    rows = [
        ("", list(columns)),
        ("tokens of a row", [str(size) for size in tokens]),
        ("clips in a step", [f"{one.clips.mean():.0f}" for one in figures]),
        ("padding", [percent(one.padding, one.padding.max()) for one in figures]),
        ("ranks, max / mean", [ratio(one.ranks) for one in figures]),
        ("microbatches, max / mean", [ratio(one.microbatches) for one in figures]),
        ("efficiency", [percent(one.efficiency, one.efficiency.min()) for one in figures]),
    ]
    return "\n".join(f"{name:26}" + "".join(f"{cell:>22}" for cell in cells) for name, cells in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="whose model says what a clip costs (default: tiny)")
    parser.add_argument("--clips", choices=CLIPS, default="small", help="which clips (default: small)")
    parser.add_argument("--ranks", type=int, default=8, help="data-parallel ranks (default: 8)")
    parser.add_argument("--microbatches", type=int, default=4, help="microbatches of a rank in a step (default: 4)")
    parser.add_argument("--micro-batch-size", type=int, default=1, help="packs of a microbatch (default: 1)")
    parser.add_argument(
        "--pack-tokens", type=int, default=0, help="tokens of a pack (default: two of the longest clip)"
    )
    parser.add_argument("--steps", type=int, default=50, help="steps to measure (default: 50)")
    args = parser.parse_args(argv)
    try:
        for name in ("ranks", "microbatches", "micro_batch_size", "steps"):
            require(vars(args)[name] >= 1, f"--{name.replace('_', '-')} {vars(args)[name]} must be at least 1")
        source = source_of(args.clips)
        config = run_config(args.preset, source, args.ranks, args.microbatches, args.micro_batch_size, args.pack_tokens)
        packs, seconds = packed(config, source, args.steps)
    except MegavidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = one_per_row(config, source, args.steps)
    columns = {
        name: measure(config.model, steps, args.ranks, args.micro_batch_size)
        for name, steps in (("one clip per row", rows), ("packs", packs))
    }
    print(
        f"{args.preset}, {args.clips} clips, {args.steps} steps of {args.ranks} ranks x {args.microbatches} "
        f"microbatches x {args.micro_batch_size}; mean (worst step)"
    )
    print(table(columns, (rows[0].pack_tokens, packs[0].pack_tokens)))
    print(f"filling the packs of a step took {1000 * seconds:.1f} ms of CPU time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
