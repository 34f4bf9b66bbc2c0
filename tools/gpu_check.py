"""The parts of tools/gpu_check.sh that are Python: is there a GPU, what it can do at most, timed steps, the page.

python tools/gpu_check.py device
python tools/gpu_check.py kernels
python tools/gpu_check.py te
python tools/gpu_check.py fa3
python tools/gpu_check.py ceiling --device cuda --json ceiling.json
python tools/gpu_check.py step wan_1b --device cuda --ceiling ceiling.json --json step.json
python tools/gpu_check.py page FOLDER --out docs/benchmarks/gpu_check.md
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_peer import Shape, alone, ours, run_config

from megavid.config.schema import PrecisionConfig, RunConfig
from megavid.errors import ConfigError
from megavid.models.te import check_usable
from megavid.ops.block_attention_fp8 import has_fp8_forward
from megavid.ops.block_attention_library import block_attention
from megavid.ops.compiled import compiled_devices, why_not_compiled_for
from megavid.ops.fp8 import E4M3
from megavid.ops.fp8_linear import Recipe, RecipeName, multiplies_in_eight_bits
from megavid.parallel import mcore
from megavid.plan.flops import model_flops
from megavid.plan.memory import memory_of
from megavid.plan.workload import Workload
from megavid.profiling.instrument import forced_balance
from megavid.training.profile_report import cpu_name

GIB = 2**30
FP8_GOAL = 1.35
"""Speed that FP8 with attention is to reach over bf16, with the same attention backend."""


def device_name(device: str) -> str:
    """What the figures are of."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()} (CPU, dry run)"


def seconds_of(call: Callable[[], Any], device: str, times: int) -> list[float]:
    """Wall time of each call, the first one left out."""
    found = []
    for _ in range(times + 1):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found[1:]


def find_device() -> int:
    """Say which GPU there is; status 2 without one."""
    if not torch.cuda.is_available():
        kind = "a CPU build of torch" if torch.version.cuda is None else "no driver, or no device"
        print(f"gpu_check: no CUDA device ({kind}): nothing was measured on a GPU", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {torch.cuda.device_count()} devices")
    return 0


def find_kernels() -> int:
    """Say which devices the ops are compiled for; status 1 where a GPU is not one of them."""
    if reason := why_not_compiled_for(torch.device("cuda"), torch.float32):
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 1
    print(f"compiled ops for {', '.join(compiled_devices())}")
    return 0


def find_te() -> int:
    """Say whether Transformer Engine's linears can be used here; status 2 where not."""
    try:
        check_usable(PrecisionConfig(linears="transformer_engine"), "cuda")
    except ConfigError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    print(f"Transformer Engine {mcore.get_te_version()}")
    return 0


def find_fa3() -> int:
    """Say whether FlashAttention-3 can be used here, and in eight bits; status 2 where not at all."""
    device, width = torch.device("cuda", torch.cuda.current_device()), 128
    try:
        kernel = block_attention("flash_attn_3", device, torch.bfloat16, width)
    except ConfigError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    print(f"FlashAttention-3, heads of {width} in eight bits: {has_fp8_forward(kernel, device, width)}")
    return 0


def list_recipes(device: str) -> int:
    """Name the recipes whose products run in eight bits on ``device``, those with tiles where their trial passes."""
    recipes: tuple[RecipeName, ...] = ("tensorwise", "delayed", "blockwise", "mxfp8")
    where = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    print(*(recipe for recipe in recipes if multiplies_in_eight_bits(Recipe.of(recipe, "auto"), where)))
    return 0


def measure_ceiling(device: str) -> dict[str, Any]:
    """The most that matrix products in bf16, in FP8 and copies reach here."""
    size = 8192 if device == "cuda" else 128
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product_s = statistics.median(seconds_of(lambda: left @ right, device, 20))
    fp8_s = None
    if device == "cpu" or torch.cuda.get_device_capability() >= (8, 9):
        left8, right8, one = left.to(E4M3), right.to(E4M3).t(), torch.ones((), device=device)
        fp8_s = statistics.median(
            seconds_of(lambda: torch._scaled_mm(left8, right8, one, one, out_dtype=torch.bfloat16), device, 20)
        )
    source = torch.empty(2**28 if device == "cuda" else 2**22, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_s = statistics.median(seconds_of(lambda: target.copy_(source), device, 20))
    return {
        "device": device_name(device),
        "matrix_tflops": 2 * size**3 / product_s / 1e12,
        "fp8_tflops": fp8_s and 2 * size**3 / fp8_s / 1e12,
        "copy_gbs": 2 * source.nbytes / copy_s / 1e9,
    }


def measure_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """TFLOP/s, share of the ceiling, and memory against the plan, of training steps on one clip."""
    device, shape = arguments.device, Shape(tuple(arguments.grid), arguments.layers)
    config = run_config(arguments.preset, shape, "bf16", arguments.ops)
    config = replace(
        config,
        parallel=replace(config.parallel, attention_backend=arguments.attention),
        precision=replace(
            config.precision, fp8=arguments.fp8, fp8_attention=arguments.fp8_attention, linears=arguments.linears
        ),
    )
    with alone(config, device) as mesh:
        torch.manual_seed(0)
        step = ours(config, mesh, shape)
        balance = forced_balance(step.engine) if arguments.routing == "forced" else contextlib.nullcontext()
        with balance:
            seconds = seconds_of(step, device, arguments.steps)
        planned = memory_of(config, mesh.layout, 0, Workload((shape.tokens,), shape.tokens, 1, "gpu_check"))
    flops = model_flops(config.model, (shape.tokens,)).total
    ceiling = json.loads(arguments.ceiling.read_text())
    tflops = flops / statistics.median(seconds) / 1e12
    return {
        "step": f"{arguments.preset}, {arguments.layers} layers, {shape.tokens:,} tokens",
        "precision": config.precision.describe(),
        "routing": arguments.routing,
        "attention": config.parallel.attention_backend,
        "has_fp8_forward": _has_fp8_forward(config, device),
        "ops": arguments.ops,
        "seconds": seconds,
        "tflops": tflops,
        "mfu": tflops / ceiling["matrix_tflops"],
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if device == "cuda" else None,
        "planned_gib": planned.total / GIB,
    }


def _has_fp8_forward(config: RunConfig, device: str) -> bool:
    """Whether attention of the step's layers in FP8 multiplied in eight bits; else it was turned back, or not asked."""
    if config.precision.fp8 == "off" or not config.precision.fp8_attention:
        return False
    where = torch.device(device, torch.cuda.current_device() if device == "cuda" else None)
    width, dtype = config.model.head_size, {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision.dtype]
    return has_fp8_forward(block_attention(config.parallel.attention_backend, where, dtype, width), where, width)


def page_of(folder: Path) -> list[str]:
    """Markdown of everything that a run of gpu_check.sh left in its folder."""
    ceiling = json.loads((folder / "ceiling.json").read_text())
    fp8 = f"{ceiling['fp8_tflops']:.3g}" if ceiling["fp8_tflops"] else "nothing (compute capability below 8.9)"
    lines = ["# Everything that needs a GPU, in one run", "", "Command: `tools/gpu_check.sh`", ""]
    lines += [
        f"{ceiling['device']}. Ceilings of the same run: {ceiling['matrix_tflops']:.3g} TFLOP/s for matrix products in "
        f"bf16, {fp8} in FP8 with one scale for a matrix, {ceiling['copy_gbs']:.0f} GB/s for copies.",
        "",
        "| step | status | seconds |",
        "| --- | --- | ---: |",
    ]
    for row in (folder / "steps.tsv").read_text().splitlines():
        name, status, seconds = row.split("\t")
        lines.append(f"| {name} | {status} | {seconds} |")
    lines += [
        "",
        "Shares are of the ceiling in bf16, for steps in FP8 too.",
        "",
        "| training step | precision | routing | attention | `train.ops` | step, s (least) | TFLOP/s | of the ceiling "
        "| reserved, GiB | planned, GiB |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for file in sorted(folder.glob("step_*.json")):
        found = json.loads(file.read_text())
        reserved = "-" if found["reserved_gib"] is None else f"{found['reserved_gib']:.1f}"
        cells = [found[key] for key in ("step", "precision", "routing", "attention", "ops")]
        cells += [f"{statistics.median(found['seconds']):.3f} ({min(found['seconds']):.3f})", f"{found['tflops']:.3g}"]
        cells += [f"{found['mfu']:.1%}", reserved, f"{found['planned_gib']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", attention_line(folder)]
    for name, title in (("ops", "Compiled ops"), ("peer", "Against diffusers")):
        file = folder / f"{name}.log"
        if rows := _table_of(file):
            lines += ["", f"## {title}", "", *rows]
    return lines


def attention_line(folder: Path) -> str:
    """How much faster steps in FP8 with attention are than in bf16, with FlashAttention-3; or that there are none."""
    files = [folder / f"step_dense_fa3{suffix}.json" for suffix in ("", "_tensorwise_attention")]
    if not all(file.exists() for file in files):
        return f"Attention in FP8 was not timed: FlashAttention-3 cannot be used here (goal: {FP8_GOAL} times bf16)."
    steps = [json.loads(file.read_text()) for file in files]
    wide, narrow = (statistics.median(step["seconds"]) for step in steps)
    name = "FP8 with attention" if steps[1]["has_fp8_forward"] else "FP8 with attention turned back to wide numbers"
    return f"{name} is {wide / narrow:.2f} times as fast as bf16, both FlashAttention-3 (goal: {FP8_GOAL})."


def _table_of(log: Path) -> list[str]:
    """The last table in a log, which also has its rows as they came."""
    rows = [line for line in log.read_text().splitlines() if line.startswith("|")] if log.exists() else []
    headers = [number - 1 for number, row in enumerate(rows) if row.startswith("| ---")]
    return rows[headers[-1] :] if headers else []


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("device", help="name the GPU; status 2 without one")
    parts.add_parser("kernels", help="status 1 where the ops are not compiled for a GPU")
    parts.add_parser("te", help="status 2 where linears of Transformer Engine cannot be used")
    parts.add_parser("fa3", help="status 2 where FlashAttention-3 cannot be used")
    recipes = parts.add_parser("recipes", help="those of precision.fp8 that multiply in eight bits here")
    ceiling = parts.add_parser("ceiling", help="matrix products and copies")
    step = parts.add_parser("step", help="training steps of one clip")
    step.add_argument("preset", help="whose widths")
    step.add_argument("--layers", type=int, default=4, help="of it (default %(default)s)")
    step.add_argument("--grid", type=int, nargs=3, default=(21, 30, 52), help="tokens: frames, rows, columns")
    step.add_argument("--steps", type=int, default=5, help="timed (default %(default)s)")
    step.add_argument("--ops", default="compiled", help="train.ops (default %(default)s)")
    step.add_argument("--fp8", default="off", help="precision.fp8 (default %(default)s)")
    step.add_argument("--fp8-attention", action="store_true", help="precision.fp8_attention")
    step.add_argument("--linears", default="native", help="precision.linears (default %(default)s)")
    step.add_argument("--attention", default="aten", help="parallel.attention_backend (default %(default)s)")
    step.add_argument("--routing", choices=("real", "forced"), default="real", help="of experts (default %(default)s)")
    step.add_argument("--ceiling", type=Path, required=True, help="what `ceiling` wrote")
    page = parts.add_parser("page", help="put the figures together")
    page.add_argument("folder", type=Path, help="of a run of gpu_check.sh")
    page.add_argument("--out", type=Path, required=True, help="the page")
    for part in (recipes, ceiling, step):
        part.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default %(default)s)")
    for measured in (ceiling, step):
        measured.add_argument("--json", type=Path, required=True, help="where the figures go")
    arguments = parser.parse_args(argv)
    match arguments.part:
        case "device":
            return find_device()
        case "kernels":
            return find_kernels()
        case "te":
            return find_te()
        case "fa3":
            return find_fa3()
        case "recipes":
            return list_recipes(arguments.device)
        case "page":
            arguments.out.write_text("\n".join(page_of(arguments.folder)) + "\n")
        case part:
            found = measure_ceiling(arguments.device) if part == "ceiling" else measure_step(arguments)
            print(json.dumps(found))
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
