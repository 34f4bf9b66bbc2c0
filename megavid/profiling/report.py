"""report.json of a profile: every figure, with what it was measured on and how.

Owns the keys. The page for people is ``megavid.profiling.page``'s and shows nothing that is not here. Plain data in,
plain data out: no rank is asked and nothing is timed.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megavid.config.schema import ModelConfig
from megavid.plan.flops import PARTS, Flops
from megavid.profiling.attribution import Owner, Split
from megavid.profiling.peak import Peak
from megavid.profiling.records import RankRecord
from megavid.profiling.waterfall import imbalance_of, mean_owners, waterfall

FORMAT = 1
"""Version of report.json."""
PERCENTILES = (5, 50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What one measured step did, over all ranks."""

    tokens: int
    clips: int
    model_flops: float
    hardware_flops: float


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """All that the report of one run is made of.

    Attributes:
        routing: "real" or "forced".
        steps: measured steps.
        ranks: what every rank measured.
        counts: tokens of each expert by noise bucket, summed over the measured steps: layer to [bucket][expert].
        forward: FLOPs of one step's forward pass by part, mean over the measured steps.
        recompute: FLOPs that a step computes again, likewise.
        pack_tokens: tokens of all packs of a step, padding included.
    """

    routing: str
    steps: Sequence[StepFigures]
    ranks: Sequence[RankRecord]
    counts: Mapping[int, Sequence[Sequence[float]]]
    forward: Flops
    recompute: Flops
    pack_tokens: int


def run_report(run: RunFigures, peak: Peak) -> dict[str, Any]:
    """The part of report.json that is one run."""
    ranks, num = run.ranks, len(run.ranks)
    step_s = [max(record.step_s[i] for record in ranks) for i in range(len(run.steps))]
    total_s = sum(step_s)
    model = sum(step.model_flops for step in run.steps) / total_s / num
    computed = sum(step.hardware_flops for step in run.steps) / total_s / num
    splits = [split for record in ranks for split in record.splits]
    owners = mean_owners(splits)
    traced_s = statistics.fmean(split.seconds for split in splits)
    mean_flops = statistics.fmean(step.model_flops for step in run.steps)
    bars = waterfall(
        owners, ideal_s=mean_flops / (peak.flops_per_s * num), imbalance_s=imbalance_of(expert_groups(ranks))
    )
    tokens = sum(step.tokens for step in run.steps)
    return {
        "routing": run.routing,
        "steps": len(run.steps),
        "mfu": model / peak.flops_per_s,
        "hfu": computed / peak.flops_per_s,
        "tflops_per_rank": model / 1e12,
        "hardware_tflops_per_rank": computed / 1e12,
        "tokens_per_s": tokens / total_s,
        "clips_per_s": sum(step.clips for step in run.steps) / total_s,
        "tokens_per_step": tokens / len(run.steps),
        "pack_fill": tokens / len(run.steps) / run.pack_tokens,
        "step_time_s": percentiles(step_s),
        "data_wait_s": statistics.fmean(max(record.data_wait_s[i] for record in ranks) for i in range(len(run.steps))),
        "comm_wait_s": waits_of(ranks, len(run.steps)),
        "traced_step_s": traced_s,
        "trace_overhead": traced_s / statistics.fmean(step_s) - 1.0,
        "unattributed": statistics.fmean(split.unattributed_s / split.seconds for split in splits),
        "waterfall": [{**bar.to_json(), "share": bar.seconds / traced_s} for bar in bars],
        "parts": part_rows(owners, run, num),
        "experts": expert_rows(run.counts),
        "memory": memory_rows(ranks),
        "ranks": rank_rows(ranks),
        "slowest": slowest(ranks),
    }


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """Mean, extremes and percentiles (linear between neighbours) of ``values``, and the values in order."""
    ordered = sorted(values)
    rows: dict[str, Any] = {"mean": statistics.fmean(ordered), "min": ordered[0], "max": ordered[-1]}
    for percentile in PERCENTILES:
        at = (len(ordered) - 1) * percentile / 100
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        rows[f"p{percentile}"] = ordered[low] + (ordered[high] - ordered[low]) * (at - low)
    return {**rows, "all": list(values)}


def waits_of(ranks: Sequence[RankRecord], steps: int) -> dict[str, float] | None:
    """Seconds of a measured step in collectives, by axis, mean over ranks; None where they were not measured."""
    sums: dict[str, float] = defaultdict(float)
    for record in ranks:
        if record.wait_s is None:
            return None
        for axis, seconds in record.wait_s.items():
            sums[axis] += seconds / steps / len(ranks)
    return dict(sorted(sums.items()))


def part_rows(owners: Mapping[Owner, float], run: RunFigures, num_ranks: int) -> list[dict[str, Any]]:
    """Seconds of every part in every phase, and what its operators reach of FLOPs; longest first."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: {"operators": 0.0, "host": 0.0})
    for owner, value in owners.items():
        found[owner.phase, owner.part][owner.kind] += value
    rows: list[dict[str, Any]] = []
    for (phase, part), seconds in found.items():
        flops = flops_of(phase, part, run) / num_ranks
        work = seconds["operators"]
        rows.append(
            {
                "phase": phase,
                "part": part,
                "operators_s": work,
                "host_s": seconds["host"],
                "flops_per_rank": flops or None,
                "tflops_per_s": flops / work / 1e12 if flops and work > 0 else None,
            }
        )
    return sorted(rows, key=lambda row: -(row["operators_s"] + row["host_s"]))


def flops_of(phase: str, part: str, run: RunFigures) -> float:
    """FLOPs of a step that a part has in a phase, on all ranks; 0 for parts whose operators have none."""
    if part not in PARTS:
        return 0.0
    by_phase = {"forward": run.forward, "backward": run.forward * 2.0, "recompute": run.recompute}
    return by_phase[phase][part] if phase in by_phase else 0.0


def expert_groups(ranks: Sequence[RankRecord]) -> list[list[Split]]:
    """For every expert group and traced step, the splits of its ranks."""
    groups: dict[tuple[int, int], list[RankRecord]] = defaultdict(list)
    for record in ranks:
        groups[record.coordinates["edp"], record.coordinates["pp"]].append(record)
    return [
        [record.splits[step] for record in members]
        for members in groups.values()
        for step in range(len(members[0].splits))
    ]


def expert_rows(counts: Mapping[int, Sequence[Sequence[float]]]) -> dict[str, Any] | None:
    """Load of every expert by layer and noise bucket as a factor of the mean load; None for a dense model."""
    if not counts:
        return None
    layers: list[dict[str, Any]] = []
    for layer, by_bucket in sorted(counts.items()):
        total = [sum(column) for column in zip(*by_bucket, strict=True)]
        layers.append(
            {
                "layer": layer,
                "tokens": [round(sum(bucket)) for bucket in by_bucket],
                "load": _over_mean(total),
                "load_by_noise": [_over_mean(bucket) for bucket in by_bucket],
                "max_load": max(_over_mean(total)),
            }
        )
    return {"layers": layers, "worst_max_load": max(row["max_load"] for row in layers)}


def _over_mean(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [round(value / mean, 4) if mean else 0.0 for value in values]


def memory_rows(ranks: Sequence[RankRecord]) -> dict[str, Any]:
    """Peaks and held bytes of every rank, and the timeline of the rank with the highest peak."""
    worst = max(ranks, key=lambda record: record.memory_peak_bytes)
    timeline = worst.memory
    return {
        "worst_rank": worst.rank,
        "peak_bytes": worst.memory_peak_bytes,
        "held_bytes": worst.held_bytes,
        "timeline": None
        if timeline is None
        else {
            "at_ms": [round(at, 3) for at in timeline.at_ms],
            "bytes": list(timeline.total_bytes),
            "phases": [phase._asdict() for phase in timeline.phases],
            "is_absolute": timeline.is_absolute,
        },
    }


def rank_rows(ranks: Sequence[RankRecord]) -> list[dict[str, Any]]:
    """Every rank: where it stands, how long its steps took, how much of that it worked."""
    return [
        {
            "rank": record.rank,
            "host": record.host,
            "coordinates": record.coordinates,
            "step_time_s": statistics.fmean(record.step_s),
            "data_wait_s": statistics.fmean(record.data_wait_s),
            "busy_s": record.busy_s,
            "waiting_s": record.traced_s - record.busy_s,
            "memory_peak_gib": record.memory_peak_bytes / (1 << 30),
        }
        for record in ranks
    ]


def slowest(ranks: Sequence[RankRecord]) -> dict[str, Any]:
    """The rank that the others wait for: it is busy longest in a traced step."""
    record = max(ranks, key=lambda record: (record.busy_s, -record.rank))
    median = statistics.median(other.busy_s for other in ranks)
    return {
        "rank": record.rank,
        "host": record.host,
        "busy_s": record.busy_s,
        "over_median": record.busy_s / median - 1,
    }


def model_rows(model: ModelConfig, total: int, active: int) -> dict[str, Any]:
    """What is trained."""
    return {
        "family": model.family,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "experts": model.moe.num_experts if model.family == "wan_moe" else 0,
        "top_k": model.moe.top_k if model.family == "wan_moe" else 0,
        "parameters": total,
        "active_parameters": active,
    }
