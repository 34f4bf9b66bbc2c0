"""One rank of a profile: a short training run that is measured first and traced after, once for each kind of routing.

Owns the order of steps and what each rank tells rank 0. It takes the training loop's own steps on its own data; only
checkpoints and pictures are left out. What the figures mean is ``megavid.profiling``'s.
"""

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from megavid.config.schema import RunConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.models.runner import build_engine
from megavid.ops.regions import region, regions_on
from megavid.parallel.engine import Engine
from megavid.parallel.host import host_name
from megavid.parallel.launch import Device, RankEnv
from megavid.parallel.mesh import Mesh
from megavid.parallel.world import open_mesh
from megavid.plan.layout import Layout
from megavid.profiling.attribution import STEP, split_steps
from megavid.profiling.attribution_gpu import split_steps_of_gpu
from megavid.profiling.collectives import names_of
from megavid.profiling.instrument import forced_balance, instrumented
from megavid.profiling.peak import Peak, peak_of
from megavid.profiling.records import (
    TRACE_WARMUP,
    RankRecord,
    RoutingKind,
    Settings,
    memory_timeline,
    peak_memory_bytes,
)
from megavid.profiling.trace import read_trace
from megavid.profiling.waits import WaitClock
from megavid.training.begin import first_weights, open_steps
from megavid.training.metrics import MetricsFile
from megavid.training.state import TrainState
from megavid.training.step import StepReport


@dataclass
class RoutingRun:
    """What rank 0 knows after one run.

    Attributes:
        routing: its kind.
        reports: of the measured steps.
        ranks: what every rank measured, by rank.
    """

    routing: RoutingKind
    reports: list[StepReport]
    ranks: list[RankRecord]


@dataclass
class Profile:
    """What rank 0 knows at the end."""

    layout: Layout
    device: Device
    peak: Peak
    ops: Literal["reference", "compiled"]
    runs: list[RoutingRun] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def profile_rank(
    config: RunConfig, layout: Layout, device: Device, settings: Settings, out: Path, finish: Any, env: RankEnv
) -> None:
    """Profile as one rank; rank 0 hands what it knows to ``finish``.

    Args:
        config: the run.
        layout: of the world that ``env`` names.
        device: where tensors live.
        settings: what is measured.
        out: folder of the report, which exists; traces go there.
        finish: called with the ``Profile`` on rank 0.
        env: who this rank is.
    """
    with open_mesh(config, layout, device, env) as mesh:
        session = Session(config, mesh, settings, out)
        profile = Profile(layout, device, peak_of(config, mesh), session.engine.chunks[0].capture.ops.name)
        with session:
            for routing in settings.routings:
                run = session.measure(routing)
                if mesh.is_main:
                    profile.runs.append(run)
        if mesh.is_main:
            profile.files = sorted(file.name for file in out.iterdir() if file.name.startswith(("trace_", "memory_")))
            finish(profile)


class Session:
    """The training run that is profiled; a context manager."""

    def __init__(self, config: RunConfig, mesh: Mesh, settings: Settings, out: Path) -> None:
        """Build model, data and counters as a training run does."""
        self.config, self.mesh, self.settings, self.out = config, mesh, settings, out
        source = build_source(config)
        self.engine: Engine[Any] = build_engine(config, mesh)
        self.state = TrainState()
        first_weights(self.engine, config, source)
        text_encoder = build_text_encoder(config)
        self.take_step, self.loader = open_steps(config, self.engine, source, text_encoder, self.state)
        self.names = names_of(mesh)
        self.clip_tokens: list[int] = []  # of the last step
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Session":
        """Begin to read clips, open the rows' file and the progress bar."""
        self._stack.enter_context(self.loader)
        is_main = self.mesh.is_main
        self.rows = self._stack.enter_context(MetricsFile(self.out / "steps.jsonl")) if is_main else None
        self.bar = self._stack.enter_context(
            tqdm(
                total=self.settings.all_steps,
                unit="step",
                dynamic_ncols=True,
                disable=not is_main or not sys.stderr.isatty(),
            )
        )
        return self

    def __exit__(self, *error: object) -> None:
        """Close them."""
        self._stack.close()

    def measure(self, routing: RoutingKind) -> RoutingRun:
        """One run: warm up, measure, trace.

        Ranks: collective over the world; the records are complete on each of them.
        """
        settings, mesh = self.settings, self.mesh
        with forced_balance(self.engine) if routing == "forced" else contextlib.nullcontext():
            for _ in range(settings.warmup):
                self._step(f"{routing}, warm-up")
            mesh.barrier()
            record, reports = self._timed(routing)
            self._traced(routing, record)
        return RoutingRun(routing, reports, mesh.all_gather_object(record))

    def _timed(self, routing: RoutingKind) -> tuple[RankRecord, list[StepReport]]:
        reports, step_s, clip_tokens = [], [], []
        waits = self.take_step.waits
        before = {} if waits is None else dict(waits.seconds)
        for _ in range(self.settings.steps):
            began = time.perf_counter()
            reports.append(self._step(f"{routing}, measured"))
            step_s.append(time.perf_counter() - began)
            clip_tokens.append(self.clip_tokens)
        wait_s = None
        if waits is not None:
            wait_s = {axis: seconds - before.get(axis, 0.0) for axis, seconds in waits.seconds.items()}
        record = RankRecord(
            rank=self.mesh.rank,
            host=host_name(),
            coordinates=self.mesh.coordinates,
            step_s=step_s,
            data_wait_s=[report.data_wait_s for report in reports],
            clip_tokens=clip_tokens,
            wait_s=wait_s,
            memory_peak_bytes=peak_memory_bytes(self.mesh.device),
            held_bytes=held_bytes(self.engine),
        )
        return record, reports

    def _traced(self, routing: RoutingKind, record: RankRecord) -> None:
        with self._trace_file(f"trace_{routing}_rank{self.mesh.rank}.json.gz") as file:
            marks = (regions_on(), instrumented(self.engine), WaitClock(self.names, is_marking=True))
            with self._snapshot(routing), self._profiler(file) as profiler, marks[0], marks[1], marks[2]:
                for _ in range(TRACE_WARMUP + self.settings.traced):
                    with region(STEP):
                        self._step(f"{routing}, traced")
                    profiler.step()
            trace = read_trace(file)
        is_cuda = self.mesh.device.type == "cuda"
        record.splits = split_steps_of_gpu(trace) if is_cuda else split_steps(trace.slices)
        record.memory = memory_timeline(trace, self.mesh.device)

    @contextlib.contextmanager
    def _profiler(self, file: Path) -> Iterator[torch.profiler.profile]:
        activities = [ProfilerActivity.CPU]
        if self.mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=0, warmup=TRACE_WARMUP, active=self.settings.traced, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(file)),
            profile_memory=True,
        ) as profiler:
            yield profiler

    @contextlib.contextmanager
    def _trace_file(self, name: str) -> Iterator[Path]:
        """Where this rank's trace goes: the report's folder if it is kept, else away again."""
        kept = self.settings.traces == "all" or (self.settings.traces == "one" and self.mesh.is_main)
        with contextlib.nullcontext(self.out) if kept else tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / name

    @contextlib.contextmanager
    def _snapshot(self, routing: RoutingKind) -> Iterator[None]:
        """CUDA's record of every allocation, for pytorch.org/memory_viz."""
        if not self.settings.has_snapshot:
            yield
            return
        torch.cuda.memory._record_memory_history()
        yield
        file = self.out / f"memory_{routing}_rank{self.mesh.rank}.pickle"
        torch.cuda.memory._dump_snapshot(str(file))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)

    def _step(self, what: str) -> StepReport:
        waited_s = self.loader.waited_s
        with region("input_wait"):
            microbatches = next(self.loader)
        self.clip_tokens = [clip.tokens for batch in microbatches for clip in batch.clips]
        report = self.take_step(self.state, microbatches, self.loader.waited_s - waited_s)
        with region("reports"):
            if self.rows is not None:
                row = {"step": report.step, "run": what, "step_time_s": report.step_time_s, "loss": report.loss}
                self.rows.write(row)
            self.bar.set_description_str(what)
            self.bar.update()
        return report


def held_bytes(engine: Engine[Any]) -> dict[str, int]:
    """Bytes of what stays in memory from step to step on this rank: weights, gradients, optimizer (with average)."""
    parameters = list(engine.parameters())
    optimizer = 0
    for shard in engine.updates.shards:
        is_apart = shard.master.untyped_storage().data_ptr() != shard.parameter.untyped_storage().data_ptr()
        tensors = [*shard.state.values(), *([] if shard.ema is None else [shard.ema])]
        optimizer += sum(tensor.nbytes for tensor in [*tensors, *([shard.master] if is_apart else [])])
    return {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(4 * parameter.numel() for parameter in parameters),
        "optimizer": optimizer,
    }
