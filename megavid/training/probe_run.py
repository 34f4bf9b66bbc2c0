"""The probe of a machine at hand: kernels, links, and training steps of small models, timed on CPU ranks.

Owns the models that are timed, the ranks that time them, and their order. What the seconds mean is
``megavid.profiling.probe``'s; the planner reads the file. Ranks have one thread each, as local ranks that fill a
machine do.
"""

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megavid.config.schema import DataConfig, ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainConfig
from megavid.diffusion.objective import FlowObjective
from megavid.errors import MegavidError
from megavid.models.runner import build_engine
from megavid.ops.packs import Clip, LatentBatch, Pack
from megavid.parallel.launch import RankEnv, run_local_ranks
from megavid.parallel.mesh import Mesh
from megavid.parallel.parent import die_with_parent
from megavid.parallel.world import open_world
from megavid.plan.calibration import Calibration, save_probe
from megavid.plan.hardware import Hardware
from megavid.plan.layout import Layout, layout_of, microbatches_of_step
from megavid.plan.workload import Workload
from megavid.profiling.links import time_links
from megavid.profiling.probe import TimedStep, fit_to_steps, hardware_of, start_of, time_kernels
from megavid.training.profile_report import cpu_name
from megavid.training.state import TrainState
from megavid.training.step import TrainStep

STEP_SECONDS = 1.2
"""Time for the steps of one model of the probe, its warm-up left out."""
PROBE_SECONDS = 29.0
"""Of a whole probe: collectives are timed for what the kernels and the steps leave of it."""
OVERHEAD_SECONDS, LEAST_LINK_SECONDS = 2.0, 3.0
"""Of starting two ranks and of fitting; of the collectives, however long the rest took."""
LEAST_STEPS, MOST_STEPS = 3, 60
WARMUP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A small model in a layout, with the packs that it trains on.

    Attributes:
        name: for tables.
        ranks: of this machine.
        layers: blocks; with experts the first and the last are dense.
        width: of the residual stream; heads are 64 wide where they can.
        ffn: hidden width of the dense feed-forward.
        clips: tokens of the clips of one pack, multiples of 16.
        padding: tokens of a pack behind them.
        packs: of one step, all ranks together.
        micro: packs of one microbatch.
        experts: routed experts; 0 for a dense model.
        top_k: experts of a token.
        expert_ffn: hidden width of one expert.
        shared_ffn: of the shared expert, 0 for none.
        parallel: fields of ``ParallelConfig``.
    """

    name: str
    ranks: int = 1
    layers: int = 2
    width: int = 128
    ffn: int = 512
    clips: tuple[int, ...] = (384,)
    padding: int = 0
    packs: int = 1
    micro: int = 1
    experts: int = 0
    top_k: int = 2
    expert_ffn: int = 128
    shared_ffn: int = 0
    parallel: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> RunConfig:
        """The run."""
        moe = MoEConfig(
            num_experts=max(self.experts, 1), top_k=self.top_k if self.experts else 1,
            expert_ffn_size=self.expert_ffn, shared_ffn_size=self.shared_ffn,
        )  # fmt: skip
        model = ModelConfig(
            family="wan_moe" if self.experts else "wan", num_layers=self.layers, hidden_size=self.width,
            num_heads=max(self.width // 64, 2), ffn_size=self.ffn, text_size=64, text_length=32,
            frequency_size=64, moe=moe,
        )  # fmt: skip
        return RunConfig(
            model=model,
            parallel=ParallelConfig(**dict(self.parallel)),
            # In plain torch, whose operators the plan counts.
            train=TrainConfig(global_batch_size=self.packs, micro_batch_size=self.micro, ops="reference"),
            data=DataConfig(pack_tokens=sum(self.clips) + self.padding),
        )

    @property
    def layout(self) -> Layout:
        """Of its ranks."""
        return layout_of(self.config, self.ranks)

    @property
    def workload(self) -> Workload:
        """Its packs as the planner knows them."""
        return Workload(self.clips, sum(self.clips) + self.padding, self.packs, self.name)

    def timed(self, seconds: float) -> TimedStep:
        """With the seconds of a step."""
        return TimedStep(self.config, self.layout, self.workload, seconds)


PROBE_CASES = (
    Case(name="once a step", layers=2, width=64, ffn=128, clips=(64,)),
    Case(name="operators", layers=8, width=64, ffn=128, clips=(64,), packs=2),
    Case(name="operators of experts", layers=6, width=64, ffn=128, clips=(64,), packs=2, experts=4, expert_ffn=64),
    Case(name="products", layers=2, width=512, ffn=2048, clips=(320,)),
    Case(name="memory", layers=3, width=192, ffn=384, clips=(256, 256)),
    Case(name="attention", layers=2, width=128, ffn=256, clips=(1536,)),
    Case(name="attention of two clips", layers=2, width=192, ffn=384, clips=(896, 640)),
    Case(name="experts", layers=4, width=256, ffn=1024, clips=(384,), experts=8, expert_ffn=256),
)
"""Models that the numbers are fitted to: each is slow for a reason of its own. All have one rank: what several ranks
cost each other is measured by itself, so that every layout of theirs is predicted, not fitted."""


# One rank


def time_cases(
    cases: Sequence[Case], seconds: float, env: RankEnv, least_steps: int = LEAST_STEPS
) -> dict[str, list[float]]:
    """Seconds of the steps of each case by name, one after another on this rank.

    Args:
        cases: all of as many ranks as ``env`` has.
        seconds: for the steps of one case.
        env: who this rank is; ``torch.distributed`` is started.
        least_steps: of one case, however long they take.

    Ranks: collective over the world.
    """
    return {case.name: _time_case(case, seconds, least_steps) for case in cases}


def _time_case(case: Case, seconds: float, least_steps: int) -> list[float]:
    config = case.config
    with Mesh.open(case.layout, "cpu", config.train.seed) as mesh:
        engine = build_engine(config, mesh)
        engine.initialize(config.train.seed)
        state = TrainState()
        take_step = TrainStep(config, engine, FlowObjective(config.diffusion, config.train.seed))
        batches = _microbatches(case, microbatches_of_step(config, case.layout))
        warm_s = [take_step(state, batches, 0.0).step_time_s for _ in range(WARMUP)][-1]
        # The ranks agree how many: each sees its own clock.
        slowest = float(mesh.max(torch.tensor(warm_s), over="world"))
        count = max(least_steps, min(MOST_STEPS, int(seconds / slowest)))
        return [take_step(state, batches, 0.0).step_time_s for _ in range(count)]


def _microbatches(case: Case, count: int) -> list[LatentBatch]:
    """Packs of noise; what is in them does not change how long a step takes."""
    model, workload = case.config.model, case.workload
    generator = torch.Generator().manual_seed(1)
    found, draw = [], 0
    for _ in range(count):
        packs = []
        for _ in range(case.micro):
            clips, start = [], 0
            for tokens in case.clips:
                clips.append(Clip(draw=draw, sample=draw, start=start, grid=(tokens // 16, 4, 4), frame_rate=4.0))
                start, draw = start + tokens, draw + 1
            packs.append(Pack(tuple(clips), workload.pack_tokens))
        clean_BTP = torch.randn(
            case.micro, workload.pack_tokens, model.in_channels * model.patch_volume, generator=generator
        )
        clean_BTP[:, workload.tokens :] = 0.0
        num_clips = case.micro * len(case.clips)
        text_GLD = torch.randn(num_clips, model.text_length, model.text_size, generator=generator)
        found.append(LatentBatch(tuple(packs), clean_BTP, text_GLD))
    return found


# Ranks


def on_ranks(job: Callable[[RankEnv], Any], ranks: int) -> Any:
    """Run ``job`` on ``ranks`` CPU ranks of one thread each; what it returns on rank 0.

    The ranks descend from a fork of this process, so that it stays clean for the next call: it must not have computed
    a gradient itself.

    Raises:
        MegavidError: a rank failed.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    launcher = context.Process(target=_launch, args=(job, ranks, theirs, os.getpid()))
    launcher.start()
    theirs.close()
    try:
        kind, result = ours.recv()
    except EOFError as error:
        raise MegavidError(f"the {ranks} ranks of a measurement ended without a word") from error
    finally:
        launcher.join()
    if kind == "failed":
        raise MegavidError(result)
    return result


def _launch(job: Callable[[RankEnv], Any], ranks: int, pipe: Any, parent: int) -> None:
    die_with_parent(parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)

    def entry(env: RankEnv) -> None:
        with open_world(env):
            result = job(env)
            if env.is_main:
                pipe.send(("done", result))

    try:
        run_local_ranks(entry, ranks)
    except (MegavidError, SystemExit) as error:
        pipe.send(("failed", f"{ranks} ranks of a measurement failed: {error}"))


# The probe


def run_probe(cases: Sequence[Case] = PROBE_CASES, seconds: float = STEP_SECONDS) -> "Probed":
    """Probe this machine, within ``PROBE_SECONDS`` where it is not very slow.

    Args:
        cases: models of one rank whose steps the numbers are fitted to.
        seconds: for the steps of each.
    """
    began = time.perf_counter()
    kernels = on_ranks(lambda env: time_kernels(seconds / 5), 1)
    found = on_ranks(functools.partial(time_cases, cases, seconds), 1)
    left_s = began + PROBE_SECONDS - OVERHEAD_SECONDS - time.perf_counter()
    links = on_ranks(lambda env: time_links(max(left_s, LEAST_LINK_SECONDS)), 2)
    steps = {case.name: case.timed(statistics.median(found[case.name])) for case in cases}
    machine = hardware_of(kernels, links, cpu_name())
    calibration = fit_to_steps(machine, start_of(kernels, links, cpu_name()), list(steps.values()))
    return Probed(machine, calibration, steps, time.perf_counter() - began)


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Attributes:
        machine: its rates.
        calibration: what steps reach of them.
        steps: that the calibration was fitted to, by the name of their case.
        wall_s: that the probe took.
    """

    machine: Hardware
    calibration: Calibration
    steps: dict[str, TimedStep]
    wall_s: float

    def save(self, path: Path) -> None:
        """Write what the planner reads.

        Raises:
            MegavidError: the file cannot be written.
        """
        try:
            save_probe(path, self.machine, self.calibration)
        except OSError as error:
            raise MegavidError(f"cannot write the probe to {path}: {error.strerror}") from error
