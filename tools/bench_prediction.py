"""Predicted against measured step time on this machine's CPU ranks, after a probe of about 30 seconds.

    python tools/bench_prediction.py                     # about 4 minutes on a machine that does nothing else
    python tools/bench_prediction.py --save probe.json   # keep the last probe for `megavid plan --calibration`

Every round probes the machine once, then trains each case for a few steps, in two passes of opposite order; a row
shows what that one probe predicts, the median of the measured steps, and their ratio. Every round is judged by itself,
as a user has one probe. The probe times no case of these, and no training step of more than one rank. A step is what
`megavid train` does between two batches; reading data is not in it. Every rank has one thread. Layouts of more ranks
than cores share cores, which no prediction knows: they are shown and not judged. Nor is anything judged on a machine
that is busy with something else.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavid.cli.quiet import silence_known_warnings
from megavid.errors import MegavidError
from megavid.profiling.probe import predicted_seconds
from megavid.training.probe_run import PROBE_CASES, STEP_SECONDS, Case, on_ranks, run_probe, time_cases
from megavid.training.profile_report import cpu_name

MEDIAN_LIMIT, WORST_LIMIT = 0.20, 0.35
"""Errors up to which the prediction counts as good."""
LOAD_LIMIT = 1.5
"""Load average of the last minute, at the start, above which nothing is judged."""
OTHERS_LIMIT = 0.10
"""Share of the machine that other processes may take meanwhile."""


def _parallel(**degrees: object) -> tuple[tuple[str, object], ...]:
    return tuple(degrees.items())


CASES = (
    Case(name="dense, deeper and wider", layers=5, width=384, ffn=1536, clips=(320,)),
    Case(
        name="dense, 3 clips and padding, recompute full", layers=4, width=256, ffn=768, clips=(320, 192, 64),
        padding=64, packs=2, parallel=_parallel(recompute="full"),
    ),
    Case(
        name="dense, recompute selective", layers=3, width=320, ffn=1280, clips=(960,),
        parallel=_parallel(recompute="selective"),
    ),
    Case(
        name="16 experts, top 4, shared expert", layers=5, width=192, ffn=768, clips=(576,), experts=16, top_k=4,
        expert_ffn=128, shared_ffn=192,
    ),
    Case(name="dense dp2", ranks=2, layers=4, width=256, ffn=1024, clips=(640,), packs=4),
    Case(
        name="dense tp2+sp", ranks=2, layers=4, width=384, ffn=1536, clips=(512,), parallel=_parallel(tensor=2),
    ),
    Case(
        name="dense pp2", ranks=2, layers=6, width=256, ffn=1024, clips=(384,), packs=4,
        parallel=_parallel(pipeline=2),
    ),
    Case(
        name="dense cp2, ulysses", ranks=2, layers=3, width=256, ffn=1024, clips=(1152,),
        parallel=_parallel(context=2),
    ),
    Case(
        name="8 experts, ep2", ranks=2, layers=4, width=320, ffn=640, clips=(512,), packs=2, experts=8,
        expert_ffn=320, parallel=_parallel(expert=2),
    ),
    Case(
        name="8 experts, tp2+sp", ranks=2, layers=4, width=256, ffn=512, clips=(768,), experts=8, expert_ffn=256,
        shared_ffn=256, parallel=_parallel(tensor=2, expert=2),
    ),
    Case(
        name="8 experts, 2 clips, recompute selective", layers=4, width=320, ffn=960, clips=(448, 192), experts=8,
        expert_ffn=192, parallel=_parallel(recompute="selective"),
    ),
    Case(
        name="dense tp2 without sp", ranks=2, layers=5, width=256, ffn=1024, clips=(640,),
        parallel=_parallel(tensor=2, sequence=False),
    ),
    Case(
        name="dense cp2, ring", ranks=2, layers=3, width=320, ffn=1280, clips=(768, 256),
        parallel=_parallel(context=2, context_strategy="ring"),
    ),
    Case(
        name="8 experts, tp2+sp, etp2", ranks=2, layers=5, width=256, ffn=768, clips=(512,), experts=8,
        expert_ffn=384, parallel=_parallel(tensor=2, expert_tensor=2),
    ),
    Case(
        name="8 experts, pp2", ranks=2, layers=6, width=192, ffn=768, clips=(448,), packs=4, experts=8,
        expert_ffn=256, parallel=_parallel(pipeline=2),
    ),
    Case(
        name="dense dp2, 2 packs a microbatch", ranks=2, layers=3, width=320, ffn=960, clips=(256, 64), packs=4,
        micro=2,
    ),
)  # fmt: skip
"""What is predicted and measured: none of it is a case of the probe."""
CROWDED = (
    Case(name="dense dp2 tp2+sp", ranks=4, layers=4, width=256, ffn=1024, clips=(512,), packs=2,
         parallel=_parallel(tensor=2)),
    Case(name="dense dp2 pp2", ranks=4, layers=4, width=256, ffn=1024, clips=(512,), packs=4,
         parallel=_parallel(pipeline=2)),
    Case(name="8 experts, ep4", ranks=4, layers=4, width=256, ffn=512, clips=(512,), packs=4, experts=8,
         expert_ffn=256, parallel=_parallel(expert=4)),
)  # fmt: skip
"""Layouts of four ranks."""


@dataclass
class Found:
    """What one round gave for one case: seconds that its probe predicts, and of every measured step."""

    predicted: float
    measured: Sequence[float]

    @property
    def ratio(self) -> float:
        """Predicted over the median of the measured."""
        return self.predicted / statistics.median(self.measured)


class OtherLoad:
    """Share of the machine's CPU time that went to others than this process and its children, since it was made."""

    def __init__(self) -> None:
        self.busy, self.total = _machine_seconds()
        self.own = _own_seconds()

    def share(self) -> float:
        """From 0 to 1; 0 where the system does not tell."""
        busy, total = _machine_seconds()
        others = (busy - self.busy) - (_own_seconds() - self.own)
        return max(0.0, others / (total - self.total)) if total > self.total else 0.0


def _machine_seconds() -> tuple[float, float]:
    """CPU seconds of all processes, time stolen by the hypervisor included, and all there were."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]
    except OSError:
        return 0.0, 0.0
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in fields]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def one_round(cases: Sequence[Case], seconds: float, save: Path | None) -> tuple[dict[str, Found], str]:
    """Probe, predict and measure every case once: what was found by case, and a line about the probe."""
    probed = run_probe(PROBE_CASES, seconds)
    if save is not None:
        probed.save(save)
    steps = [case.timed(math.nan) for case in cases]
    predicted = predicted_seconds(steps, probed.machine, probed.calibration)
    measured: dict[str, list[float]] = {case.name: [] for case in cases}
    # Two visits, far apart: a slow minute of the machine falls on no case alone.
    for ordered in (cases, cases[::-1]):
        for ranks in sorted({case.ranks for case in cases}):
            group = [case for case in ordered if case.ranks == ranks]
            for name, times in on_ranks(lambda env, group=group: time_cases(group, seconds / 2, env), ranks).items():
                measured[name] += times
    found = {case.name: Found(value, measured[case.name]) for case, value in zip(cases, predicted, strict=True)}
    machine, calibration = probed.machine, probed.calibration
    calls = "; ".join(
        f"{name} {cost.latency_s * 1e6:.0f} us, {cost.rate / 1e9:.2f} GB/s" for name, cost in calibration.calls.items()
    )
    return found, (
        f"probe of {probed.wall_s:.0f} s: {machine.peak['fp32'] / 1e9:.1f} GFLOP/s, memory "
        f"{machine.memory_rate / 1e9:.1f} GB/s, operator {calibration.operator_s * 1e6:.1f} us, matrix efficiency "
        f"{calibration.matrix_efficiency:.2f}, attention {calibration.attention_efficiency:.2f}, glue "
        f"{calibration.glue_factor:.2f}, crowding {calibration.crowding:.2f}\ncollectives: {calls}"
    )


def table(cases: Sequence[Case], found: dict[str, Found]) -> str:
    """The rows as Markdown."""
    lines = [
        "| case | ranks | layout | layers x width | tokens x packs | predicted, s | measured, s | ratio |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in cases:
        one = found[case.name]
        recompute = case.config.parallel.recompute
        layout = case.layout.describe() + ("" if recompute == "none" else f", {recompute}")
        lines.append(
            f"| {case.name} | {case.ranks} | {layout} | {case.layers} x {case.width} | "
            f"{case.workload.pack_tokens} x {case.packs} | {one.predicted:.4f} | "
            f"{statistics.median(one.measured):.4f} | {one.ratio:.2f} |"
        )
    return "\n".join(lines)


def verdict(errors: Sequence[float]) -> tuple[str, bool]:
    """A round's last line, and whether the errors are within the limits."""
    median, worst = statistics.median(errors), max(errors)
    is_good = median <= MEDIAN_LIMIT and worst <= WORST_LIMIT
    return (
        f"{'PASS' if is_good else 'FAIL'}: |predicted / measured - 1| over {len(errors)} cases: median {median:.1%} "
        f"(limit {MEDIAN_LIMIT:.0%}), worst {worst:.1%} (limit {WORST_LIMIT:.0%})"
    ), is_good


def bench(rounds: int, seconds: float, load_limit: float, save: Path | None) -> int:
    """Run the rounds, print the tables; 0 where the prediction is good, 1 where it is not or cannot be judged."""
    cores = len(os.sched_getaffinity(0))
    load, others = os.getloadavg()[0], OtherLoad()
    print(f"{cpu_name()}, {cores} cores, one thread a rank, {rounds} rounds; load average at the start {load:.2f}")
    if load > load_limit:
        print(f"NOT JUDGED: load average {load:.2f} is above {load_limit:.2f}: other processes run (--max-load)")
        return 1
    judged = [case for case in CASES if case.ranks <= cores]
    crowded = [case for case in (*CASES, *CROWDED) if case.ranks > cores]
    all_good, began = True, time.perf_counter()
    for number in range(rounds):
        found, line = one_round([*judged, *crowded], seconds, save)
        print(f"\nround {number + 1}: {line}\n\n{table(judged, found)}")
        if crowded:
            print("\nMore ranks than cores, not judged:\n\n" + table(crowded, found))
        last, is_good = verdict([abs(found[case.name].ratio - 1) for case in judged])
        all_good &= is_good
        print(f"\n{last}", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all; other processes took {others.share():.1%} of the machine")
    if others.share() > OTHERS_LIMIT:
        print(f"NOT JUDGED: other processes took more than {OTHERS_LIMIT:.0%} of the machine")
        return 1
    return 0 if all_good else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="probe, measure and judge so often (default: 1)")
    parser.add_argument("--seconds", type=float, default=STEP_SECONDS, help="steps of one case in one round")
    parser.add_argument("--max-load", type=float, default=LOAD_LIMIT, help=f"load average to start at ({LOAD_LIMIT})")
    parser.add_argument("--save", type=Path, default=None, help="write the last probe here")
    args = parser.parse_args(argv)
    silence_known_warnings()
    try:
        return bench(max(1, args.rounds), args.seconds, args.max_load, args.save)
    except MegavidError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
