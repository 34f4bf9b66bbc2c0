"""Compiled ops against plain torch and against torch.compile of it, and a training step of `tiny` with either.

    OMP_NUM_THREADS=2 python tools/bench_ops.py --out docs/benchmarks/ops_cpu.md
    OMP_NUM_THREADS=2 python tools/bench_ops.py --only step
    OMP_NUM_THREADS=2 python tools/bench_ops.py --only step --step-key capture

Every op of a block on ``--tokens`` tokens of ``--width`` numbers, in fp32 and bf16, forward alone (keeping what
backward needs) and with the backward pass. In every round each of the three is timed once, in turns that change, so
that what disturbs the machine disturbs all of them; ratios are of the rounds' least and median times. torch.compile is
given the same function and the time to compile before the first round.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavid.ops.block_ops import COMPILED, REFERENCE, BlockOps
from megavid.ops.compiled import instruction_set, why_not_compiled_for
from megavid.ops.fp8 import E4M3, scale_of
from megavid.ops.grouped_experts import activate_plainly
from megavid.parallel import mcore
from megavid.training.profile_report import cpu_name

EPS, CLIPS = 1e-6, 4
EXPERTS, TOP_K, BUCKETS = 64, 8, 4
CALLS, HOST_CYCLES = 10, 10**8
"""Calls timed together on a GPU, and how long it is kept busy meanwhile: some 50 ms, longer than the host needs."""
WARM_STEPS = 2
"""Training steps left out, the first of a process."""
STEP_KEYS = {"ops": ("reference", "compiled"), "capture": ("off", "compile")}
"""Keys of the table train that training steps are timed for: the slow value, and the other. What capture compiles is
plain torch."""


@dataclass(frozen=True)
class Case:
    """One op of a block: its name, what it is called with, the dtypes of its tokens, and whether it has a gradient."""

    name: str
    function: Callable[[BlockOps], Callable[..., Any]]
    inputs: Callable[["Sizes", torch.dtype], list[Tensor]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    has_gradient: bool = True


@dataclass(frozen=True)
class Sizes:
    """Tokens, width and head size of what the ops work on."""

    tokens: int
    width: int
    head: int


def normal(*shape: int) -> Tensor:
    """A leaf in fp32."""
    return torch.randn(*shape).requires_grad_()


def stream(sizes: Sizes, dtype: torch.dtype) -> Tensor:
    """Activations of one pack."""
    return torch.randn(sizes.tokens, 1, sizes.width).to(dtype).requires_grad_()


def rows(sizes: Sizes) -> Tensor:
    """Every token's row: the pack holds a few clips."""
    return (torch.arange(sizes.tokens) * CLIPS // sizes.tokens).unsqueeze(1)


def norm_rope(ops: BlockOps) -> Callable[..., Any]:
    """Queries or keys from their product to attention."""

    def call(x_TBn: Tensor, weight_n: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.norm_rope(x_TBn, ops.sum_of_squares(x_TBn), weight_n, cos, sin, x_TBn.shape[-1], EPS)

    return call


def _angles(sizes: Sizes) -> list[Tensor]:
    angles = torch.randn(sizes.tokens, 1, 1, sizes.head // 2)
    return [angles.cos(), angles.sin()]


def _table(sizes: Sizes) -> Tensor:
    return normal(CLIPS, sizes.width)


def activate(ops: BlockOps) -> Callable[..., Any]:
    """An expert's activation; rows of an expert stand together."""
    function = ops.moe.activate or activate_plainly

    def gelu(up: Tensor, bias: Tensor, expert: Tensor, probability: Tensor) -> Tensor:
        return function(up, None, bias, None, expert, probability)

    return gelu


def swiglu(ops: BlockOps) -> Callable[..., Any]:
    """Likewise with a gate, and no biases."""
    function = ops.moe.activate or activate_plainly

    def call(up: Tensor, gate: Tensor, expert: Tensor, probability: Tensor) -> Tensor:
        return function(up, gate, None, None, expert, probability)

    return call


def permute(ops: BlockOps) -> Callable[..., Any]:
    """Tokens to rows and back, as a dispatcher on one rank does it: its rows' gates, and no product between."""
    permutation = ops.moe.permutation

    def own(x_TD: Tensor, gates_TE: Tensor, map_TE: Tensor) -> tuple[Tensor, Tensor]:
        assert permutation is not None
        rows = permutation.forth(x_TD, gates_TE, map_TE, x_TD.shape[0] * TOP_K)
        return permutation.back(rows.x_SD, rows), rows.probability_S

    def megatron(x_TD: Tensor, gates_TE: Tensor, map_TE: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates, order, *_ = mcore.moe_utils.permute(
            x_TD, map_TE, probs=gates_TE, num_out_tokens=x_TD.shape[0] * TOP_K
        )
        return mcore.moe_utils.unpermute(rows, order, restore_shape=x_TD.shape), gates

    return megatron if permutation is None else own


def route(ops: BlockOps) -> Callable[..., Any]:
    """Scores to gates, map and counts, with groups of experts."""

    def call(scores_TE: Tensor, bias_E: Tensor, bucket_T: Tensor) -> Tensor:
        choice = ops.moe.router_topk(
            scores_TE, bias_E, bucket_T, num_buckets=BUCKETS, top_k=TOP_K, num_groups=8, top_groups=4, scale=2.5
        )
        return choice.probs_TE

    return call


def round_whole(ops: BlockOps) -> Callable[..., Any]:
    """An operand in FP8 with one scale, its largest magnitude found before."""

    def call(x_TD: Tensor) -> Tensor:
        return ops.fp8.quantize(x_TD, scale_of(ops.fp8.amax(x_TD), E4M3), E4M3).data

    return call


def round_tiles(ops: BlockOps) -> Callable[..., Any]:
    """An input of a layer as `blockwise` rounds it: along its width, and along the tokens."""

    def call(x_TD: Tensor) -> tuple[Tensor, ...]:
        along, turned = (ops.fp8.quantize_tiles(x, (1, 128), E4M3) for x in (x_TD, x_TD.t()))
        return along.data, along.scale, turned.data, turned.scale

    return call


def _rows_of_experts(sizes: Sizes) -> list[Tensor]:
    return [torch.randint(EXPERTS, (sizes.tokens,)).sort().values, torch.rand(sizes.tokens).requires_grad_()]


def _flat(sizes: Sizes, dtype: torch.dtype, rows: int) -> Tensor:
    return torch.randn(rows, sizes.width).to(dtype).requires_grad_()


def _routing(tokens: int) -> list[Tensor]:
    chosen = torch.rand(tokens, EXPERTS).topk(TOP_K).indices
    map_TE = torch.zeros(tokens, EXPERTS, dtype=torch.bool).scatter_(1, chosen, True)
    return [torch.rand(tokens, EXPERTS).requires_grad_(), map_TE]


CASES = (
    Case(
        "modulated_norm",
        lambda ops: lambda *given: ops.modulated_norm(*given, EPS),
        lambda s, dtype: [stream(s, dtype), _table(s), _table(s), rows(s)],
    ),
    Case(
        "gated_residual_norm, affine",
        lambda ops: lambda *given: ops.residual_affine_norm(*given, EPS),
        lambda s, dtype: [stream(s, dtype), stream(s, dtype), _table(s), rows(s), normal(s.width), normal(s.width)],
    ),
    Case(
        "gated_residual_norm, modulated",
        lambda ops: lambda *given: ops.residual_modulated_norm(*given, EPS),
        lambda s, dtype: [stream(s, dtype), stream(s, dtype), _table(s), _table(s), rows(s)],
    ),
    Case(
        "gated_residual",
        lambda ops: ops.gated_residual,
        lambda s, dtype: [stream(s, dtype), stream(s, dtype), _table(s), rows(s)],
    ),
    Case(
        "sum_of_squares, norm_rope",
        norm_rope,
        lambda s, dtype: [stream(s, dtype), normal(s.width), *_angles(s)],
    ),
    Case(
        "expert_activation, GELU and bias",
        activate,
        lambda s, dtype: [
            _flat(s, dtype, s.tokens),
            normal(EXPERTS, s.width).to(dtype).detach().requires_grad_(),
            *_rows_of_experts(s),
        ],
    ),
    Case(
        "expert_activation, SwiGLU",
        swiglu,
        lambda s, dtype: [_flat(s, dtype, s.tokens), _flat(s, dtype, s.tokens), *_rows_of_experts(s)],
    ),
    Case(
        "moe_permute, moe_unpermute",
        permute,
        lambda s, dtype: [_flat(s, dtype, s.tokens // TOP_K), *_routing(s.tokens // TOP_K)],
    ),
    Case(
        "router_topk",
        route,
        lambda s, dtype: [
            torch.rand(s.tokens, EXPERTS).requires_grad_(),
            torch.randn(EXPERTS) / 8,
            torch.arange(s.tokens) % BUCKETS,
        ],
        (torch.float32,),
    ),
    Case(
        "fp8_amax, quantize_fp8", round_whole, lambda s, dtype: [_flat(s, dtype, s.tokens).detach()], has_gradient=False
    ),
    Case("quantize_fp8_tiles", round_tiles, lambda s, dtype: [_flat(s, dtype, s.tokens).detach()], has_gradient=False),
)


def passes(function: Callable[..., Any], inputs: list[Tensor], is_backward: bool) -> Callable[[], None]:
    """A forward pass, or a forward and a backward pass, as a call."""
    leaves = [x for x in inputs if x.requires_grad]
    grads = []
    if is_backward:
        found = function(*inputs)
        grads = [torch.randn_like(out) for out in ([found] if isinstance(found, Tensor) else found)]

    def call() -> None:
        found = function(*inputs)
        if is_backward:
            torch.autograd.grad([found] if isinstance(found, Tensor) else list(found), leaves, grads)

    return call


def seconds_of(call: Callable[[], None], device: str) -> float:
    """Of one call; on a GPU its own time alone, of several that the host has handed in before the first begins."""
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HOST_CYCLES)
    began.record()
    for _ in range(CALLS):
        call()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) * 1e-3 / CALLS


def time_in_turn(calls: Sequence[Callable[[], None]], rounds: int, device: str) -> list[list[float]]:
    """Seconds of every call in every round; the order turns from round to round."""
    for call in calls:
        call()
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for number in range(len(calls)):
            which = (number + turn) % len(calls)
            seconds[which].append(seconds_of(calls[which], device))
    return seconds


def copy_line(sizes: Sizes, rounds: int, device: str) -> str:
    """What writing the tokens once into new memory costs, in words: the floor of every op that gives as much."""
    cells = []
    for dtype in (torch.float32, torch.bfloat16):
        x = stream(sizes, dtype).detach()
        (seconds,) = time_in_turn([lambda x=x: x.clone()], rounds, device)  # type: ignore[misc]
        cells.append(f"{min(seconds) * 1e3:.1f} / {statistics.median(seconds) * 1e3:.1f} ms in {str(dtype)[6:]}")
    return f"A copy of the tokens into new memory takes {', '.join(cells)}."


def bytes_of(function: Callable[..., Any], inputs: list[Tensor]) -> int:
    """What a forward pass reads and writes at least: its inputs and outputs."""
    found = function(*inputs)
    return sum(tensor.nbytes for tensor in (*inputs, *([found] if isinstance(found, Tensor) else found)))


def time_ops(sizes: Sizes, rounds: int, device: str, only: str, bandwidth: float) -> list[str]:
    """The table of ops; where a copy's bandwidth is given (bytes a second), with the forward passes' share of it."""
    lines = [
        "| op | dtype | pass | plain torch, ms | op, ms | torch.compile, ms | plain / op | torch.compile / op |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    if only == "step":
        return []
    lines = [copy_line(sizes, rounds, device), "", *lines]
    if bandwidth:
        lines[-2:] = [f"{lines[-2]} of a copy's bandwidth |", f"{lines[-1]} ---: |"]
    for case in (case for case in CASES if only in case.name):
        compiled = torch.compile(case.function(REFERENCE), dynamic=False)
        functions = (case.function(REFERENCE), case.function(COMPILED), compiled)
        for dtype in case.dtypes:
            torch.manual_seed(0)
            inputs = case.inputs(sizes, dtype)
            for is_backward in (False, True) if case.has_gradient else (False,):
                seconds = time_in_turn([passes(f, inputs, is_backward) for f in functions], rounds, device)
                least, middle = [min(s) for s in seconds], [statistics.median(s) for s in seconds]
                cells = [f"{low * 1e3:.1f} / {mid * 1e3:.1f}" for low, mid in zip(least, middle, strict=True)]
                ratios = [f"{least[i] / least[1]:.1f} / {middle[i] / middle[1]:.1f}" for i in (0, 2)]
                both = "forward + backward" if is_backward else "forward"
                if bandwidth:
                    share = bytes_of(functions[1], inputs) / least[1] / bandwidth
                    ratios.append("" if is_backward else f"{share:.0%}")
                lines.append(f"| {' | '.join([case.name, str(dtype)[6:], both, *cells, *ratios])} |")
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


def steps_of(folder: Path, key: str, value: str, steps: int) -> list[float]:
    """Seconds of the steps of a run of `tiny` in a process of its own, without the first ones."""
    out = folder / f"{value}_{time.monotonic_ns()}"
    changes = ["--train.steps", str(steps + WARM_STEPS), "--train.ops", "reference", f"--train.{key}", value]
    command = [sys.executable, "-m", "megavid", "train", "tiny", "--out", str(out), *changes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bench_ops: training failed: {done.stderr[-800:]}")
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["step_time_s"] for row in found][WARM_STEPS:]


def time_steps(steps: int, rounds: int, key: str) -> list[str]:
    """The table of training steps with either value of ``train.KEY``."""
    values = STEP_KEYS[key]
    seconds: dict[str, list[float]] = {value: [] for value in values}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for value in sorted(seconds, reverse=bool(turn % 2)):
                seconds[value] += steps_of(Path(folder), key, value, steps)
    least, middle = ([measure(seconds[value]) * 1e3 for value in values] for measure in (min, statistics.median))
    cells = [f"{low:.0f} / {mid:.0f}" for low, mid in zip(least, middle, strict=True)]
    ratio = f"{least[0] / least[1]:.2f} / {middle[0] / middle[1]:.2f}"
    return [
        f'| `train.{key} = "{values[0]}"`, ms | `"{values[1]}"`, ms | {" / ".join(values)} |',
        "| ---: | ---: | ---: |",
        f"| {' | '.join([*cells, ratio])} |",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the ops (default %(default)s)")
    parser.add_argument("--width", type=int, default=1536, help="numbers of a token (default %(default)s)")
    parser.add_argument("--head", type=int, default=128, help="numbers of a head (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of every op (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="training steps of a process; 0: none (%(default)s)")
    parser.add_argument("--step-rounds", type=int, default=2, help="processes of each setting (default %(default)s)")
    parser.add_argument("--step-key", choices=sorted(STEP_KEYS), default="ops", help="of train (default %(default)s)")
    parser.add_argument("--only", default="", help="ops whose names have this in them; step: the training steps alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the ops (default %(default)s)")
    parser.add_argument(
        "--ceiling", type=Path, help="what `gpu_check.py ceiling` wrote: tell shares of a copy's bandwidth"
    )
    parser.add_argument("--out", type=Path, help="write the page there too")
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = parser.parse_args(given)
    if reason := why_not_compiled_for(torch.device(arguments.device), torch.float32):
        print(f"bench_ops: {reason}", file=sys.stderr)
        return 2
    bandwidth = json.loads(arguments.ceiling.read_text())["copy_gbs"] * 1e9 if arguments.ceiling else 0.0
    torch.set_default_device(arguments.device)
    sizes, load = Sizes(arguments.tokens, arguments.width, arguments.head), os.getloadavg()[0]
    page = [
        "# Compiled ops on " + ("CPU" if arguments.device == "cpu" else "a GPU"),
        "",
        f"Command: `OMP_NUM_THREADS={torch.get_num_threads()} python tools/bench_ops.py {shlex.join(given)}`",
        "",
        f"{cpu_name()}, {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, ops for {instruction_set()}; load average at the start {load:.2f}. "
        f"{arguments.tokens:,} tokens x {arguments.width:,}; times and ratios are least / median of {arguments.rounds} "
        "interleaved rounds.",
        "",
        *time_ops(sizes, arguments.rounds, arguments.device, arguments.only, bandwidth),
    ]
    if arguments.steps:
        page += [
            "",
            f"A training step of `tiny` on one rank, from {arguments.step_rounds} x {arguments.steps} steps of each "
            "setting in turn, in processes of their own, without their first steps; least / median.",
            "",
            *time_steps(arguments.steps, arguments.step_rounds, arguments.step_key),
        ]
    print("\n".join(page))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(page) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
