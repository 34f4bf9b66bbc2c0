"""One optimizer step against diffusers' WanTransformer3DModel with torch's AdamW, eager and compiled, on CPU.

    OMP_NUM_THREADS=2 python tools/bench_peer.py --dtype fp32
    OMP_NUM_THREADS=2 python tools/bench_peer.py --dtype bf16

A model of wan_1b's widths with fewer layers, one clip, no recomputation, no moving average. Each contender has a
process of its own, because megavid on CPU ranks replaces some of torch's functions; they work one at a time. A step is
everything from clean latents to updated weights: noise, forward, loss, backward, clipping, update. megavid is its own
engine with fp32 masters and gradients. The peers are what a user would write: `loss.backward(); clip_grad_norm_;
AdamW.step()`, in fp32, or in bf16 either whole (weights and moments in bf16, less work and less exact) or by autocast
over fp32 weights. `compiled` is diffusers' own regional compilation, one graph for all blocks.

In every round each of them takes one step, in turns that change; ratios are of the steps of one round, so that what
disturbs the machine for a while disturbs both sides. Then rounds of steps under torch's profiler, for the share
that is neither matrix product nor attention.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megavid.config.load import load_run
from megavid.config.schema import RunConfig
from megavid.diffusion.objective import FlowObjective
from megavid.models.runner import build_engine
from megavid.ops.compiled import instruction_set, why_not_compiled
from megavid.ops.packs import Clip, LatentBatch, Pack
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.plan.layout import layout_of
from megavid.training.model_step import train_step
from megavid.training.profile_report import cpu_name

LEARNING_RATE, CLIP_NORM, WEIGHT_DECAY = 1e-4, 1.0, 0.01
WARM_STEPS = 1
"""Steps of each before the first round; compilation falls into them."""
PRODUCTS = (
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::mkldnn_convolution",
    "aten::convolution_backward", "aten::_slow_conv2d_forward", "aten::slow_conv3d_forward", "mkl::_mkl_linear",
    "mkldnn::_linear_pointwise", "mkldnn::_convolution_pointwise", "aten::linear", "aten::mkldnn_linear",
)  # fmt: skip
"""Operators that are matrix products, by their own time."""
ATTENTION = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
)

Step = Callable[[], float]
"""Takes one optimizer step and tells its loss."""
Contender = Callable[[str], Any]
"""Takes an order, "step" or "profile", and answers it."""


@dataclass(frozen=True)
class Shape:
    """What is trained on: the clip's grid of tokens (frames, rows, columns) and the number of layers."""

    grid: tuple[int, int, int]
    layers: int

    @property
    def tokens(self) -> int:
        """Of the clip."""
        frames, rows, columns = self.grid
        return frames * rows * columns


def run_config(preset: str, shape: Shape, dtype: str, ops: str) -> RunConfig:
    """The preset with other layers, on one rank, and one clip a step."""
    flags = {
        "model.num_layers": shape.layers,
        "precision.dtype": dtype,
        "parallel.expert": 1,
        "parallel.recompute": "none",
        "train.global_batch_size": 1,
        "train.ops": ops,
        "data.kind": "synthetic",
        "data.pack_tokens": shape.tokens,
        "optimizer.ema_decay": 0,
        "optimizer.weight_decay": WEIGHT_DECAY,
        "optimizer.clip_norm": CLIP_NORM,
    }
    return load_run(preset, [part for key, value in flags.items() for part in (f"--{key}", str(value))])


@dataclass(frozen=True)
class EngineStep:
    """A step of megavid's engine as `megavid train` takes it."""

    engine: Engine[Any]
    batch: LatentBatch
    objective: FlowObjective

    def __call__(self) -> float:
        """Take it."""
        return train_step(self.engine, [self.batch], self.objective, learning_rate=LEARNING_RATE).loss


def ours(config: RunConfig, mesh: Mesh, shape: Shape) -> EngineStep:
    """megavid's engine with fresh weights, on one clip."""
    engine = build_engine(config, mesh)
    engine.initialize(0)
    model = config.model
    clip = Clip(0, 0, 0, shape.grid, frame_rate=model.latent_frame_rate)
    clean_BTP = torch.randn(1, shape.tokens, model.out_channels * model.patch_volume)
    text_GLD = torch.randn(1, model.text_length, model.text_size)
    batch = LatentBatch((Pack((clip,), shape.tokens),), clean_BTP, text_GLD)
    return EngineStep(engine, batch, FlowObjective(config.diffusion, 0))


@contextmanager
def alone(config: RunConfig, device: str) -> Iterator[Mesh]:
    """The mesh of a world of one rank, on "cpu" or "cuda"."""
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Mesh.open(layout_of(config, 1), device) as mesh:
            yield mesh
    finally:
        dist.destroy_process_group()


def peer(config: RunConfig, shape: Shape, *, is_whole_bf16: bool, is_autocast: bool, is_compiled: bool) -> Step:
    """A training step as a user of diffusers and torch writes it."""
    from diffusers import WanTransformer3DModel

    model, (frames, rows, columns) = config.model, shape.grid
    _, high, wide = model.patch_size
    twin = WanTransformer3DModel(
        patch_size=model.patch_size,
        num_attention_heads=model.num_heads,
        attention_head_dim=model.head_size,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        text_dim=model.text_size,
        freq_dim=model.frequency_size,
        ffn_dim=model.ffn_size,
        num_layers=model.num_layers,
    )
    if is_whole_bf16:
        twin.to(torch.bfloat16)
    if is_compiled:
        twin.compile_repeated_blocks(fullgraph=True, dynamic=False)
    optimizer = torch.optim.AdamW(twin.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    dtype = torch.bfloat16 if is_whole_bf16 else torch.float32
    clean = torch.randn(1, model.out_channels, frames, rows * high, columns * wide)
    text = torch.randn(1, model.text_length, model.text_size, dtype=dtype)

    def step() -> float:
        sigma = torch.sigmoid(torch.randn(1, device=clean.device))
        noise = torch.randn_like(clean)
        noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=is_autocast):
            velocity = twin(noisy.to(dtype), sigma * 1000.0, text, return_dict=False)[0]
        loss: Tensor = (velocity.float() - target).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


KINDS: dict[str, dict[str, dict[str, bool]]] = {
    "fp32": {
        "diffusers, eager": {"is_whole_bf16": False, "is_autocast": False, "is_compiled": False},
        "diffusers, compiled": {"is_whole_bf16": False, "is_autocast": False, "is_compiled": True},
    },
    "bf16": {
        "diffusers, eager": {"is_whole_bf16": True, "is_autocast": False, "is_compiled": False},
        "diffusers, compiled": {"is_whole_bf16": True, "is_autocast": False, "is_compiled": True},
        "diffusers, eager, autocast": {"is_whole_bf16": False, "is_autocast": True, "is_compiled": False},
    },
}
"""Peers of each dtype."""


def serve(name: str, dtype: str, ops: str, device: str, shape: Shape, orders: Connection) -> None:
    """Process of one contender: build it, then answer "step" (seconds) and "profile" (operators) until "stop"."""
    torch.manual_seed(0)
    config = run_config("wan_1b", shape, dtype, ops)
    with ExitStack() as stack:
        if name == "megavid":
            step: Step = ours(config, stack.enter_context(alone(config, device)), shape)
        else:
            with torch.device(device):
                step = peer(config, shape, **KINDS[dtype][name])
        while (order := orders.recv()) != "stop":
            began = time.perf_counter()
            answer: Any = operators_of(step) if order == "profile" else step()
            if device == "cuda":
                torch.cuda.synchronize()
            orders.send(answer if order == "profile" else time.perf_counter() - began)


@contextmanager
def contenders(arguments: argparse.Namespace, shape: Shape) -> Iterator[dict[str, Contender]]:
    """The process of megavid, which the others are compared with, and of every peer that is asked for, ready."""
    names = ["megavid", *(name for name in KINDS[arguments.dtype] if arguments.only is None or name in arguments.only)]
    spawn, found, processes = multiprocessing.get_context("spawn"), {}, []
    for name in names:
        mine, theirs = spawn.Pipe()
        given = (name, arguments.dtype, arguments.ops, arguments.device, shape, theirs)
        processes.append(spawn.Process(target=serve, args=given, daemon=True))
        processes[-1].start()
        theirs.close()

        def ask(order: str, mine: Connection = mine) -> Any:
            mine.send(order)
            return mine.recv()

        found[name] = ask
    try:
        yield found
    finally:
        for process in processes:
            process.terminate()


def warm_up(steps: dict[str, Contender]) -> None:
    """First steps of each; a peer that fails is taken out."""
    for name, ask in list(steps.items()):
        try:
            seconds = [ask("step") for _ in range(WARM_STEPS)]
        except (EOFError, ConnectionError):
            if name == "megavid":
                raise SystemExit("bench_peer: megavid failed (above): nothing to compare the others with") from None
            del steps[name]
            print(f"bench_peer: {name} failed (above)", file=sys.stderr, flush=True)
            continue
        told = ", ".join(f"{s:.1f}" for s in seconds)
        print(f"bench_peer: {name}, warming up, s: {told}", file=sys.stderr, flush=True)


def in_turn(steps: dict[str, Contender], order: str, rounds: int, until: float) -> dict[str, list[Any]]:
    """What each answers to ``order`` in every round, the first of them turning; no round may end after ``until``."""
    names = list(steps)
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(rounds):
        began = time.perf_counter()
        for number in range(len(names)):
            name = names[(number + turn) % len(names)]
            answers[name].append(steps[name](order))
        told = ", ".join(f"{name} {_whole(answers[name][-1]):.2f}" for name in names)
        print(f"bench_peer: {order} {turn + 1} of {rounds}, s: {told}", file=sys.stderr, flush=True)
        if 2 * time.perf_counter() - began > until:
            break
    return answers


def _whole(answer: float | Mapping[str, float]) -> float:
    """Seconds of a step, or of one that was taken apart."""
    return sum(answer.values()) if isinstance(answer, Mapping) else answer


def operators_of(step: Step) -> dict[str, float]:
    """Seconds of every operator of one step, and under "" what passes in none."""
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        began = time.perf_counter()
        step()
        whole = time.perf_counter() - began
    own = {event.key: event.self_cpu_time_total * 1e-6 for event in trace.key_averages()}
    return {**own, "": whole - sum(own.values())}


def parts_of(operators: Mapping[str, float]) -> dict[str, float]:
    """Seconds in matrix products, in attention and in all else."""
    products, attention = (sum(operators.get(name, 0.0) for name in names) for names in (PRODUCTS, ATTENTION))
    return {"products": products, "attention": attention, "rest": sum(operators.values()) - products - attention}


def largest(steps: Sequence[Mapping[str, float]], number: int) -> list[tuple[str, float]]:
    """The largest operators outside of products and attention, with the median of their seconds."""
    names = {name for step in steps for name in step} - {*PRODUCTS, *ATTENTION, ""}
    medians = [(name, statistics.median(step.get(name, 0.0) for step in steps)) for name in names]
    return sorted(medians, key=lambda pair: -pair[1])[:number]


def table(seconds: Mapping[str, Sequence[float]], profiled: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Markdown: times, ratios of the rounds, and where they go."""
    lines = [
        "| | step, s: median (least to most) | megavid / it: median (least to most) | products, s | attention, s "
        "| all else, s | megavid's all else / its |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rest = {name: [parts_of(step)["rest"] for step in steps] for name, steps in profiled.items()}
    for name, found in seconds.items():
        cells = [_spread(found, 2), _ratio(seconds, name)]
        if parts := [parts_of(step) for step in profiled.get(name, ())]:
            cells += [f"{statistics.median(step[key] for step in parts):.2f}" for key in ("products", "attention")]
            cells += [_spread(rest[name], 2), _ratio(rest, name)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def _ratio(values: Mapping[str, Sequence[float]], name: str) -> str:
    """megavid's over those of ``name``, round by round."""
    if name == "megavid":
        return ""
    return _spread([a / b for a, b in zip(values["megavid"], values[name], strict=True)], 3)


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; with --json also write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    parser.add_argument("--layers", type=int, default=4, help="of wan_1b's 30 (default %(default)s)")
    parser.add_argument("--grid", type=int, nargs=3, default=(5, 13, 16), help="tokens: frames, rows, columns")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each at most (default %(default)s)")
    parser.add_argument("--budget", type=float, default=600, help="seconds that it may take (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: no profile (%(default)s)")
    parser.add_argument("--ops", default="compiled", help="train.ops (default %(default)s)")
    parser.add_argument("--profiled", type=int, default=3, help="steps of each under the profiler (%(default)s)")
    parser.add_argument("--operators", type=int, default=0, help="print so many of the largest other operators of each")
    parser.add_argument("--only", nargs="*", help="peers to run, by their names (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args(argv)
    if arguments.ops == "compiled" and (reason := why_not_compiled()):
        print(f"bench_peer: {reason}", file=sys.stderr)
        return 2
    if unknown := sorted(set(arguments.only or ()) - {"megavid", *KINDS[arguments.dtype]}):
        known = ", ".join(repr(name) for name in KINDS[arguments.dtype])
        print(f"bench_peer: --only {unknown[0]!r} is no peer in {arguments.dtype}; there are {known}", file=sys.stderr)
        return 2
    shape, load = Shape(tuple(arguments.grid), arguments.layers), os.getloadavg()[0]
    until = time.perf_counter() + arguments.budget
    with contenders(arguments, shape) as steps:
        warm_up(steps)
        seconds = in_turn(steps, "step", arguments.rounds, until)
        profiled = in_turn(steps, "profile", arguments.profiled if arguments.device == "cpu" else 0, until)
    print(
        f"{cpu_name()}, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {arguments.dtype}, train.ops = {arguments.ops} ({instruction_set()}), "
        f"{arguments.layers} layers, {shape.tokens:,} tokens; load average at the start {load:.2f}; "
        f"{len(seconds['megavid'])} rounds, {len(profiled['megavid'])} under the profiler.\n"
    )
    print("\n".join(table(seconds, profiled)))
    for name, traces in profiled.items():
        for operator, spent in largest(traces, arguments.operators):
            print(f"{name}: {operator} {spent * 1e3:.0f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps({"seconds": seconds, "operators": profiled}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
