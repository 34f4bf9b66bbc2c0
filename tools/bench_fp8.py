"""Train a model of width 512 in every recipe of FP8, and without FP8 in three seeds: a table and one plot.

    python tools/bench_fp8.py --out runs/fp8                      # what is not finished yet, then the table
    python tools/bench_fp8.py --out runs/fp8 --only tensorwise    # one run of them

Six dense blocks, the inner four in FP8, on procedural clips. Every run is `megavid train` in a folder of its own under
``--out``: a run that was stopped goes on where it was, a finished one is not taken again. The runs in FP8 begin like
the first one without FP8: same weights, clips and noise. A run passes where its last validation loss is above that of
its twin without FP8 by at most the spread of the seeds plus 2%.

Without FP8 means fp32 here, not bf16: on a CPU without bf16 instructions a product in bf16 takes several times as long
as one in fp32. ``--dtype bf16`` takes the runs in bf16.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megavid.training.plots import column, smooth

SEEDS = (1234, 1235, 1236)
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
ALLOWED = 0.02
"""What a validation loss may be above its twin's beside the seeds' spread, as a part of the twin's."""
COLORS = {"tensorwise": "#d97706", "delayed": "#059669", "blockwise": "#9333ea", "mxfp8": "#dc2626"}
PRESET = """\
# megavid train PRESET --out DIR
# Hardware: any CPU. Wide enough for scales of 128 x 128 numbers; written by tools/bench_fp8.py.
base = "tiny"

[model]
family = "wan"
num_layers = 6
hidden_size = 512
num_heads = 8
ffn_size = 512
patch_size = [1, 4, 4]
text_length = 16

[train]
steps = {steps}
global_batch_size = 1

[optimizer]
schedule_steps = {steps}
ema_decay = 0.0

[precision]
dtype = "{dtype}"

[data]
pack_tokens = 96
validation_samples = 32

[checkpoint]
interval_steps = 50
keep_last = 1

[log]
interval_steps = 50
tensorboard = false
validation_interval_steps = {validation}
fp8_interval_steps = 50
"""


@dataclass(frozen=True)
class Trial:
    """One training run: its name, seed and recipe."""

    name: str
    seed: int
    recipe: str = "off"


TRIALS = (
    *(Trial(f"wide_{seed}", seed) for seed in SEEDS),
    *(Trial(recipe, SEEDS[0], recipe) for recipe in RECIPES),
)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; none where it is missing."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def final_loss(folder: Path, steps: int) -> float | None:
    """Validation loss after the last step; None where the run is not there yet."""
    found = [row for row in rows_of(folder / "events.jsonl") if row.get("event") == "validated"]
    return float(found[-1]["loss"]) if found and found[-1]["step"] == steps else None


def train(trial: Trial, out: Path, steps: int) -> None:
    """Run one trial to its end, from where it stopped."""
    if final_loss(out / trial.name, steps) is not None:
        return
    command = [sys.executable, "-m", "megavid", "train", str(out / "preset.toml"), "--out", str(out / trial.name)]
    command += ["--train.seed", str(trial.seed), "--precision.fp8", trial.recipe]
    began = time.perf_counter()
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(f"bench_fp8: {trial.name} ended with status {done.returncode}; call again to go on")
    print(f"{trial.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def table_of(out: Path, steps: int) -> list[str]:
    """The table of all trials that are there, and what the runs in FP8 are allowed."""
    losses = {trial.name: final_loss(out / trial.name, steps) for trial in TRIALS}
    wide = [loss for trial in TRIALS[: len(SEEDS)] if (loss := losses[trial.name]) is not None]
    lines = [
        "| run | seed | validation loss | to its twin | allowed | underflow | overflow | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for trial in TRIALS:
        loss, twin = losses[trial.name], losses[TRIALS[0].name]
        cells = [trial.name, str(trial.seed), "not run" if loss is None else f"{loss:.5f}"]
        if trial.recipe == "off" or loss is None or twin is None or len(wide) < len(SEEDS):
            cells += [""] * 5
        else:
            allowed = (max(wide) - min(wide)) / twin + ALLOWED
            gap = loss / twin - 1
            cells += [f"{gap:+.2%}", f"{allowed:+.2%}{'' if gap <= allowed else ': ABOVE'}"]
            cells += [f"{value:.2g}" for value in worst_of(out / trial.name)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def worst_of(folder: Path) -> tuple[float, float, float]:
    """The worst underflow, overflow and error of any layer's operand in any row of fp8.jsonl."""
    found = [
        (role["underflow"], role["overflow"], role["error"])
        for row in rows_of(folder / "fp8.jsonl")
        for layer in row["layers"].values()
        for role in layer.values()
    ]
    under, over, error = zip(*found) if found else ((0.0,), (0.0,), (0.0,))
    return max(under), max(over), max(error)


def plot(out: Path, file: Path) -> None:
    """Running means of the training losses, and how far each run in FP8 is from its twin."""
    figure = Figure(figsize=(8.5, 5.6), layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    means: dict[str, list[float]] = {}
    for trial in TRIALS:
        steps, losses = column(rows_of(out / trial.name / "metrics.jsonl"), "loss")
        means[trial.name] = smooth(losses, 20)
        color = COLORS.get(trial.recipe, "#9ca3af" if trial.seed != SEEDS[0] else "#2563eb")
        top.plot(steps, means[trial.name], color=color, linewidth=1.2, label=trial.name.replace("_", ", seed "))
        if trial.recipe != "off":
            gaps = [100 * (loss / twin - 1) for loss, twin in zip(means[trial.name], means[TRIALS[0].name])]
            bottom.plot(steps[: len(gaps)], gaps, color=color, linewidth=1.2)
    top.set_yscale("log")
    top.set_ylabel("training loss, mean of 20 steps")
    bottom.set_ylabel("to the twin, %")
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.grid(True, color="#e5e7eb", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    top.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table; status 1 where a run in FP8 is above what it is allowed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="format of what is not in FP8")
    names = [trial.name for trial in TRIALS]
    parser.add_argument("--only", nargs="+", choices=names, help="take these runs alone", metavar="RUN")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file, a PNG")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.steps % 3:
        parser.error(f"--steps {options.steps} must be a multiple of 3: the last of three validations is the result")
    options.out.mkdir(parents=True, exist_ok=True)
    validation = options.steps // 3
    preset = PRESET.format(steps=options.steps, dtype=options.dtype, validation=validation)
    (options.out / "preset.toml").write_text(preset)
    for trial in TRIALS:
        if options.only is None or trial.name in options.only:
            train(trial, options.out, options.steps)
    table = "\n".join(table_of(options.out, options.steps))
    print(table)
    if options.plot is not None:
        plot(options.out, options.plot)
    return 1 if "ABOVE" in table else 0


if __name__ == "__main__":
    sys.exit(main())
