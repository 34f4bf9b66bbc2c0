"""What a profile leaves behind: report.json, report.html, run.toml and a few lines for the terminal.

Owns the files and the step from a run's records to the figures of ``megavid.profiling.report``.
"""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import megavid
from megavid.config.load import dump_toml
from megavid.config.schema import RunConfig
from megavid.plan.calibration import Calibration, gpu_calibration
from megavid.plan.flops import Flops, forward_flops, recompute_flops
from megavid.plan.hardware import Hardware
from megavid.plan.parameters import count
from megavid.profiling.page import page
from megavid.profiling.peak import machine_of
from megavid.profiling.prediction import prediction_rows
from megavid.profiling.records import RankRecord
from megavid.profiling.report import FORMAT, RunFigures, StepFigures, model_rows, run_report
from megavid.profiling.waterfall import mean_owners
from megavid.training.profile_run import Profile, RoutingRun
from megavid.training.run_dir import write_whole


@dataclass(frozen=True)
class Asked:
    """What the command line asked for, as far as the report says it.

    Attributes:
        command: as it was typed.
        preset: its name, or the file.
        out: the report's folder.
        machine: what a probe measured of this machine, to predict by; None to predict on known GPUs only.
    """

    command: tuple[str, ...]
    preset: str
    out: Path
    machine: tuple[Hardware, Calibration] | None


def write_report(config: RunConfig, asked: Asked, profile: Profile) -> None:
    """Write the files and print what matters; on rank 0."""
    report, out = report_of(config, asked, profile), asked.out
    write_whole(out / "run.toml", dump_toml(config))
    write_whole(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_whole(out / "report.html", page(report))
    print(text_of(report))
    print(f"report: {out / 'report.html'}", flush=True)


def report_of(config: RunConfig, asked: Asked, profile: Profile) -> dict[str, Any]:
    """The whole of report.json."""
    counts = count(config.model)
    first = profile.runs[0].ranks[0]
    is_cuda = torch.cuda.is_available() and profile.device == "cuda"
    return {
        "format": FORMAT,
        "megavid": megavid.__version__,
        "torch": str(torch.__version__),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join(asked.command),
        "preset": asked.preset,
        "model": model_rows(config.model, counts.total, counts.active),
        "layout": profile.layout.describe(),
        "ranks": profile.layout.world_size,
        "recompute": config.parallel.recompute,
        "precision": config.precision.describe(),
        "ops": profile.ops,
        "pack_tokens": config.data.pack_tokens,
        "packs_per_step": config.train.global_batch_size,
        "device": profile.device,
        "device_name": torch.cuda.get_device_name() if is_cuda else cpu_name(),
        "host": first.host,
        "threads_per_rank": torch.get_num_threads(),
        "peak": profile.peak.to_json(),
        "runs": [_run_of(config, asked, profile, run) for run in profile.runs],
        "files": profile.files,
    }


def _run_of(config: RunConfig, asked: Asked, profile: Profile, run: RoutingRun) -> dict[str, Any]:
    table = run_report(figures_of(config, run), profile.peak)
    machine = asked.machine or known_machine(profile.device)
    if machine is not None:
        owners = mean_owners([split for record in run.ranks for split in record.splits])
        clips, step_s = clips_of_steps(run.ranks), table["step_time_s"]["p50"]
        ran = replace(config, train=replace(config.train, ops=profile.ops))  # what "auto" took
        table["prediction"] = prediction_rows(ran, profile.layout, clips, machine, owners, step_s)
    return table


def known_machine(device: str) -> tuple[Hardware, Calibration] | None:
    """This GPU in the hardware table, with the calibration that all GPUs share; None for what is not in it."""
    machine = machine_of(torch.cuda.get_device_name()) if device == "cuda" else None
    return None if machine is None else (machine, gpu_calibration())


def figures_of(config: RunConfig, run: RoutingRun) -> RunFigures:
    """What the report of one run is made of."""
    clips = clips_of_steps(run.ranks)
    pack_tokens = config.data.pack_tokens * config.train.global_batch_size
    mean = 1.0 / len(clips)
    forward, again = Flops({}), Flops({})
    for clip_tokens in clips:
        padding = pack_tokens - sum(clip_tokens)
        forward += forward_flops(config.model, clip_tokens) * mean
        again += recompute_flops(config.model, clip_tokens, config.parallel.recompute, padding=padding) * mean
    counts: dict[int, Any] = {}
    for report in run.reports:
        for layer, stats in report.routing.items():
            counts[layer] = counts.get(layer, 0.0) + stats.counts_QE.double()
    return RunFigures(
        routing=run.routing,
        steps=[
            StepFigures(
                tokens=report.tokens,
                clips=report.clips,
                model_flops=report.model_flops,
                hardware_flops=report.hardware_flops,
            )
            for report in run.reports
        ],
        ranks=run.ranks,
        counts={layer: total.tolist() for layer, total in counts.items()},
        forward=forward,
        recompute=again,
        pack_tokens=pack_tokens,
    )


def clips_of_steps(ranks: Sequence[RankRecord]) -> list[list[int]]:
    """Tokens of every clip of each measured step, over the data-parallel ranks."""
    replicas = [record.clip_tokens for record in ranks if record.is_first_of_replica]
    return [[tokens for clips in step for tokens in clips] for step in zip(*replicas, strict=True)]


def text_of(report: Mapping[str, Any]) -> str:
    """The few lines for the terminal."""
    lines = [f"peak of a rank: {report['peak']['flops_per_s_per_rank'] / 1e12:.3g} TFLOP/s, {report['peak']['source']}"]
    for run in report["runs"]:
        times = run["step_time_s"]
        lines += [
            "",
            f"{run['routing']} routing, {run['steps']} steps: MFU {run['mfu']:.1%}  HFU {run['hfu']:.1%}  "
            f"{run['tflops_per_rank']:.3g} TFLOP/s a rank  {run['tokens_per_s']:,.0f} tokens/s",
            f"step: median {times['p50']:.4g} s, 5% to 95% {times['p5']:.4g} to {times['p95']:.4g} s",
        ]
        for bar in run["waterfall"]:
            lines.append(f"  {bar['name']:28} {bar['seconds']:9.4f} s {bar['share']:7.1%}")
        slow = run["slowest"]
        if report["ranks"] > 1:
            lines.append(
                f"slowest rank: {slow['rank']} on {slow['host']}, busy {slow['busy_s']:.4g} s of a traced step, "
                f"{slow['over_median']:.1%} over the median rank"
            )
    return "\n".join(lines)


def cpu_name() -> str:
    """What this machine calls its processor."""
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        rows = []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
