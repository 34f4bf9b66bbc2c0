"""Does upcycling pay? A small dense model, then the same tokens for it and for what it is upcycled to; three seeds.

    python tools/bench_upcycle.py --picture docs/upcycle.png

Trains a dense model, saves it, upcycles it as `megavid upcycle` does, and goes on from the same weights with fresh
optimizer states on the same batches: dense; experts with one copy of the feed-forward active (the dense model's FLOPs);
experts with two copies active (as the flagship). Prints every validation loss and draws every curve. Each seed takes
about four minutes of one core; one that is in --out already, with the same sizes, is not run again. What it showed:
docs/upcycle.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megavid import checkpoint
from megavid.checkpoint.convert import open_model, write_model
from megavid.checkpoint.upcycle import Upcycling, upcycled
from megavid.config.load import dump_toml, load_run
from megavid.data.build import build_source, build_text_encoder
from megavid.data.loader import Loader
from megavid.diffusion.objective import FlowObjective
from megavid.models.moe.stats import collapse_alarms
from megavid.models.runner import build_engine
from megavid.ops.packs import LatentBatch
from megavid.parallel.engine import Engine
from megavid.parallel.launch import RankEnv, init_distributed
from megavid.parallel.mesh import Mesh
from megavid.plan.flops import model_flops
from megavid.plan.layout import layout_of
from megavid.training.model_step import train_step
from megavid.training.plots import COLORS, smooth
from megavid.training.resume import load_weights
from megavid.training.schedule import learning_rate
from megavid.training.validation import validation_loss

DENSE = (
    "--model.family", "wan", "--model.hidden_size", "96", "--model.num_layers", "4", "--model.ffn_size", "384",
    "--data.pack_tokens", "768", "--data.validation_samples", "48", "--train.global_batch_size", "1",
    "--optimizer.ema_decay", "0", "--optimizer.schedule", "constant", "--optimizer.end_factor", "0.1",
)  # fmt: skip
KINDS = {
    "dense": None,
    "experts, one copy active": Upcycling(num_experts=16, top_k=2, granularity=2),
    "experts, two copies active": Upcycling(num_experts=16, top_k=4, granularity=2),
}


@dataclass(frozen=True)
class Sizes:
    """How long to train: steps before and after upcycling, and steps between validations."""

    before: int
    after: int
    every: int


@dataclass
class Curves:
    """What one run of one seed showed: (step, value) pairs, steps counted from the start of the dense model."""

    train: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    alarms: int = 0


def main() -> None:
    """Run every seed, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/upcycle"), help="folder for the curves of each seed")
    parser.add_argument("--picture", type=Path, help="file of the picture (default OUT/upcycle.png)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--before", type=int, default=240, help="steps of the dense model before upcycling")
    parser.add_argument("--after", type=int, default=160, help="steps after it")
    parser.add_argument("--every", type=int, default=20, help="steps between validations")
    parser.add_argument("--processes", type=int, default=2, help="seeds at a time")
    parser.add_argument("--seed", type=int, help="run this seed only, and print nothing")
    arguments = parser.parse_args()
    sizes = Sizes(arguments.before, arguments.after, arguments.every)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.seed is not None:
        run_seed(arguments.seed, sizes, arguments.out)
        return
    missing = [seed for seed in range(arguments.seeds) if read(arguments.out, seed, sizes) is None]
    with ThreadPoolExecutor(arguments.processes) as pool:
        list(pool.map(run_apart, missing))
    results = [found for seed in range(arguments.seeds) if (found := read(arguments.out, seed, sizes))]
    print(table(results, sizes), curves_table(results), sep="\n\n")
    draw(results, sizes, arguments.picture or arguments.out / "upcycle.png")


def read(out: Path, seed: int, sizes: Sizes) -> dict[str, Any] | None:
    """The curves of a seed by kind, if it was run with these sizes."""
    path = out / f"seed_{seed}.json"
    saved = json.loads(path.read_text()) if path.is_file() else {}
    curves: dict[str, Any] = saved.get("curves", {})
    return curves if saved.get("sizes") == vars(sizes) else None


def run_apart(seed: int) -> None:
    """Run one seed in a process of its own, on one core."""
    command = [sys.executable, "-W", "ignore", *sys.argv, "--seed", str(seed)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


def run_seed(seed: int, sizes: Sizes, out: Path) -> None:
    """Train the dense model of one seed, upcycle it, go on three times; write the curves as JSON."""
    config = load_run("tiny", [*DENSE, "--train.seed", str(seed)])
    torch.set_num_threads(1)
    init_distributed(RankEnv(), "cpu")
    source, objective = build_source(config), FlowObjective(config.diffusion, seed)
    results: dict[str, Any] = {}
    bar = tqdm(total=sizes.before + len(KINDS) * sizes.after, desc=f"seed {seed}", unit="step", mininterval=5)
    with (
        tempfile.TemporaryDirectory() as folder,
        Loader(
            config, source, build_text_encoder(config), dp_rank=0, dp_size=1, drops_caption=objective.drops_caption
        ) as loader,
        Mesh.open(layout_of(config, 1), "cpu", seed) as mesh,
    ):
        held_out = list(loader.validation_batches())
        # The batches of the dense model for all: what a clip costs, and so how packs are filled, differs by model.
        batches = [next(loader) for _ in range(sizes.before + sizes.after)]
        engine = build_engine(config, mesh)
        engine.initialize(seed)
        first = run(engine, batches[: sizes.before], held_out, 0, sizes.every, bar)
        results["before"] = vars(first)
        start = Path(folder) / "dense"
        checkpoint.save(start, sizes.before, engine.fragments(), {}, mesh, run_toml=dump_toml(config))
        for number, (kind, how) in enumerate(KINDS.items()):
            path, model = start / "latest", config.model
            if how is not None:
                path = Path(folder) / f"upcycled_{number}"
                found = upcycled(open_model(start), how)
                write_model(found, path, to="megavid")
                model = found.config
            # The learning rate warms up again and then falls, so that the last losses are not its noise.
            falling = replace(config.optimizer, schedule="cosine", schedule_steps=sizes.after)
            engine = build_engine(replace(config, model=model, optimizer=falling), mesh)
            load_weights(engine, checkpoint.Checkpoint(checkpoint.resolve(path)), kind="model")
            curves = run(engine, batches[sizes.before :], held_out, sizes.before, sizes.every, bar)
            flops = model_flops(model, [180]).total / model_flops(config.model, [180]).total
            results[kind] = {**vars(curves), "flops": flops}
    dist.destroy_process_group()
    (out / f"seed_{seed}.json").write_text(json.dumps({"sizes": vars(sizes), "curves": results}))


def run(
    engine: "Engine[Any]",
    batches: list[list[LatentBatch]],
    held_out: list[LatentBatch],
    first: int,
    every: int,
    bar: "tqdm[Any]",
) -> Curves:
    """Train on the batches, with a warm-up at the beginning, and validate before the first step and then regularly."""
    config = engine.config
    objective = FlowObjective(config.diffusion, config.train.seed)
    curves = Curves([], [(first, validation_loss(engine, held_out).loss)])
    for number, microbatches in enumerate(batches, 1):
        rate = learning_rate(config.optimizer, number)
        metrics = train_step(engine, microbatches, objective, learning_rate=rate)
        curves.train.append((first + number, metrics.loss))
        curves.alarms += any(collapse_alarms(layer, stats) for layer, stats in metrics.routing.items())
        if number % every == 0:
            curves.validation.append((first + number, validation_loss(engine, held_out).loss))
        bar.update()
    return curves


def table(results: list[dict[str, Any]], sizes: Sizes) -> str:
    """Validation losses at the start and the end of every run, their means, and each seed's gap to dense."""
    rows = [
        "| run | FLOPs | at step 0 | " + " | ".join(f"seed {n}" for n in range(len(results))) + " | mean | to dense |"
    ]
    rows.append("|" + " --- |" * (len(results) + 5))
    dense = [found["dense"]["validation"][-1][1] for found in results]
    for kind in KINDS:
        runs = [found[kind] for found in results]
        last = [run["validation"][-1][1] for run in runs]
        starts = ", ".join(f"{run['validation'][0][1]:.5f}" for run in runs)
        gaps = ", ".join(f"{value - base:+.4f}" for value, base in zip(last, dense, strict=True))
        values = " | ".join(f"{value:.4f}" for value in last)
        rows.append(f"| {kind} | {runs[0]['flops']:.2f} | {starts} | {values} | {statistics.mean(last):.4f} | {gaps} |")
    alarms = {kind: [found[kind]["alarms"] for found in results] for kind in KINDS if kind != "dense"}
    told = "; ".join(f"{kind}: {', '.join(map(str, counts))}" for kind, counts in alarms.items())
    return "\n".join([*rows, "", f"Steps of {sizes.after} with a collapse alarm in some layer, by seed: {told}"])


def curves_table(results: list[dict[str, Any]]) -> str:
    """Every validation loss: a row for each step, a column for each run, its seeds apart by commas."""
    rows = ["| step | " + " | ".join(KINDS) + " |", "|" + " --- |" * (len(KINDS) + 1)]
    for number, (step, _) in enumerate(results[0]["before"]["validation"][:-1]):
        values = ", ".join(f"{found['before']['validation'][number][1]:.4f}" for found in results)
        rows.append(f"| {step} | {values} |" + " |" * (len(KINDS) - 1))
    for number, (step, _) in enumerate(results[0]["dense"]["validation"]):
        cells = [", ".join(f"{found[kind]['validation'][number][1]:.4f}" for found in results) for kind in KINDS]
        rows.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def draw(results: list[dict[str, Any]], sizes: Sizes, file: Path) -> None:
    """A column a seed: losses of every run, on held-out clips and in training; below, how far each is from dense."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, len(results), sharey="row", sharex="col", squeeze=False)
    for seed, found in enumerate(results):
        above, below = panels[0][seed], panels[1][seed]
        base = [loss for _, loss in found["dense"]["validation"]]
        draw_run(above, found["before"], COLORS[0], "")
        for color, kind in zip(COLORS, KINDS):
            draw_run(above, found[kind], color, kind)
            steps, values = zip(*found[kind]["validation"], strict=True)
            below.plot(steps, [v - b for v, b in zip(values, base, strict=True)], "o-", color=color, markersize=3)
        above.set(title=f"seed {seed}", yscale="log", yticks=[1.5, 2, 3, 4], yticklabels=["1.5", "2", "3", "4"])
        above.minorticks_off()
        below.set(xlabel="step")
        for panel in (above, below):
            panel.axvline(sizes.before, color="#6b7280", linewidth=1, linestyle=":")
            panel.grid(color="#e5e7eb")
    panels[0][0].set_ylabel("loss: held-out clips (dots), training (faint)")
    panels[1][0].set_ylabel("held-out loss less the dense model's")
    panels[0][0].legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    print(f"picture: {file}")


def draw_run(panel: Any, curves: dict[str, Any], color: str, label: str) -> None:
    """Both losses of one run."""
    panel.plot(*zip(*curves["validation"], strict=True), "o-", color=color, markersize=3, label=label or None)
    steps, losses = zip(*curves["train"], strict=True)
    panel.plot(steps, smooth(losses), color=color, alpha=0.3, linewidth=1)


if __name__ == "__main__":
    main()
