"""Where two runs part: the first step, and of it the sample, the layer, the routing or the gradient.

Owns the order of the search and its words. It looks at what the runs wrote (rows, checkpoints, routing) and reads the
samples of the first step that differs again; it takes no step. Runs of another layout differ in the last bits by right:
``tolerance`` says from where on two numbers differ.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavid.checkpoint import Checkpoint, SingleRank, list_steps
from megavid.checkpoint.format import DTYPES, step_name
from megavid.config.resume import differences
from megavid.config.schema import RunConfig
from megavid.data.build import build_source, build_text_encoder
from megavid.data.loader import Loader
from megavid.diffusion.objective import FlowObjective
from megavid.errors import DataError
from megavid.parallel.fragment import Box, Fragment
from megavid.training.metrics import read_rows
from megavid.training.run_dir import RunDir

SHOWN = 3
"""Differences of one kind that are printed; more are counted."""

Row = dict[str, Any]


@dataclass
class Parting:
    """Where two runs part.

    Attributes:
        step: the first step whose rows differ; None where all common rows are the same.
        cause: one line: what parted, as far as it can be told; "" where nothing did.
        details: lines that support it.
    """

    step: int | None
    cause: str = ""
    details: list[str] = field(default_factory=list)


def parting_of(one: Path, other: Path, *, tolerance: float = 0.0) -> Parting:
    """Find where two runs part.

    Args:
        one: a run's folder.
        other: another's; both of one model.
        tolerance: relative difference of losses, gradient norms and weights that counts as none.

    Raises:
        ConfigError: one of them is no run's folder.
        CheckpointError: a checkpoint of theirs is damaged: the message names the file.
    """
    runs = (RunDir(one), RunDir(other))
    configs = (runs[0].config(), runs[1].config())
    step, row_lines = first_row(read_rows(runs[0].metrics_file), read_rows(runs[1].metrics_file), tolerance)
    found = Parting(step, details=[*config_lines(*configs), *row_lines])
    weights = first_weights(runs[0].checkpoints, runs[1].checkpoints, before=step, tolerance=tolerance)
    if weights:
        found.cause, lines = weights
        found.details += lines
        return found
    if step is None:
        return found
    samples = sample_lines(configs, (step + left_out(runs[0], step), step + left_out(runs[1], step)), step)
    if samples:
        found.cause = f"data: {samples[0]}"
        found.details += samples[1:]
        return found
    found.cause = execution_cause(runs, step, tolerance)
    return found


def execution_cause(runs: tuple[RunDir, RunDir], step: int, tolerance: float) -> str:
    """What parted where weights and samples are the same: routing, the forward pass, or the gradient."""
    rows = [{row["step"]: row for row in read_rows(run.metrics_file)}[step] for run in runs]
    routing = first_routing(runs[0].router_file, runs[1].router_file, step)
    if routing:
        return f"routing: {routing}"
    if differ(rows[0]["loss"], rows[1]["loss"], tolerance):
        return f"forward pass: the loss of step {step} differs, with the same samples and the same routing where logged"
    return (
        f"gradient: the loss of step {step} is the same and its gradient norm is not, with the same samples: the "
        "backward pass or its reduction is wrong on one side"
    )


def differ(one: object, other: object, tolerance: float) -> bool:
    """Whether two figures of rows differ; None is a number that was not finite."""
    if not isinstance(one, (int, float)) or not isinstance(other, (int, float)):
        return one != other
    return abs(one - other) > tolerance * max(abs(one), abs(other))


def first_row(one: list[Row], other: list[Row], tolerance: float) -> tuple[int | None, list[str]]:
    """The first common step whose loss or gradient norm differs, and what differs."""
    known = {row["step"]: row for row in other}
    for row in one:
        twin = known.get(row["step"])
        names = ("loss", "grad_norm")
        if twin is not None and any(differ(row[name], twin[name], tolerance) for name in names):
            return int(row["step"]), [f"{name:<11} {row[name]!r}, {twin[name]!r}" for name in names]
    return None, []


def config_lines(one: RunConfig, other: RunConfig) -> list[str]:
    """Keys that differ."""
    found = [f"{key:<11} {was!r}, {now!r}" for key, was, now in differences(one, other)]
    return found[: 4 * SHOWN]


def first_weights(one: Path, other: Path, *, before: int | None, tolerance: float) -> tuple[str, list[str]] | None:
    """The first common checkpoint whose tensors differ, in the order of the model; None where all are the same."""
    common = sorted(set(list_steps(one)) & set(list_steps(other)))
    for step in [step for step in common if before is None or step < before]:
        pair = (Checkpoint(one / step_name(step)), Checkpoint(other / step_name(step)))
        lines = [line for line, _ in zip(tensor_lines(*pair, tolerance), range(SHOWN), strict=False)]
        if lines:
            return f"weights: checkpoint of step {step}: {lines[0]}", lines[1:]
    return None


def tensor_lines(one: Checkpoint, other: Checkpoint, tolerance: float) -> Iterator[str]:
    """A line for each tensor that differs: weights in the order of the model, then what belongs to them."""
    for checkpoint in (one, other):
        checkpoint.verify(SingleRank())
    names = one.index.tensors.keys() | other.index.tensors.keys()
    for name in sorted(names, key=model_order):
        missing = [c.folder for c in (one, other) if name not in c.index.tensors]
        if missing:
            yield f"{name} is missing in {missing[0]}"
            continue
        a, b = read_tensor(one, name), read_tensor(other, name)
        if a.shape != b.shape:
            yield f"{layer_of(name)}: {name} has shape {list(a.shape)}, {list(b.shape)}"
            continue
        gap = (a.double() - b.double()).abs()
        bad = gap > tolerance * torch.maximum(a.double().abs(), b.double().abs())
        bad |= a.isnan() != b.isnan()
        if bool(bad.any()):
            place = [int(i) for i in bad.nonzero()[0]] if a.dim() else []
            yield (
                f"{layer_of(name)}: {name} differs in {int(bad.sum())} of {bad.numel()} numbers, the first at {place}: "
                f"{float(a[tuple(place)])!r}, {float(b[tuple(place)])!r}"
            )


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One whole tensor of a checkpoint, in its shape; fp32 where it is a narrower float."""
    row = checkpoint.index.tensors[name]
    shape, dtype = tuple(row["shape"]), DTYPES[row["dtype"]]
    wide = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
    box = Box((0,) * len(shape), shape)
    data = torch.zeros(box.numel, dtype=wide)
    checkpoint.fill([Fragment(name, shape, (box,), data)], SingleRank(), allow_unread=("",))
    return data.view(shape)


def model_order(name: str) -> tuple[int, int, int, str]:
    """Sorts tensors: weights first, and of them embedders, blocks by number, head."""
    kind, _, rest = name.partition("/")
    block = re.match(r"blocks\.(\d+)\.", rest)
    place = 1 if block else 2 if rest.startswith("head.") else 0
    return int(kind != "model"), place, int(block[1]) if block else 0, name


def layer_of(name: str) -> str:
    """Layer that a tensor belongs to, for people."""
    block = re.search(r"/blocks\.(\d+)\.", name)
    return f"layer {block[1]}" if block else name.partition("/")[2].partition(".")[0]


def left_out(run: RunDir, step: int) -> int:
    """Steps whose samples a run had left out when it took a step."""
    row = next(row for row in read_rows(run.metrics_file) if row["step"] == step)
    found = row.get("left_out", 0)
    assert isinstance(found, int)
    return found


def sample_lines(configs: tuple[RunConfig, RunConfig], data_steps: tuple[int, int], step: int) -> list[str]:
    """What differs between the samples that two runs saw in a step; empty where they saw the same bits.

    Args:
        configs: of both.
        data_steps: which step's samples each of them saw: ``TrainState.data_step``.
        step: for the words.
    """
    seen = [samples_of(*one) for one in zip(configs, data_steps, strict=True)]
    if seen[0].keys() != seen[1].keys():
        return [f"step {step} holds other draws: {len(seen[0])} and {len(seen[1])} clips; another data set or batch"]
    lines = []
    for draw in sorted(seen[0]):
        a, b = seen[0][draw], seen[1][draw]
        if a.name != b.name:
            lines.append(f"draw {draw} is sample {a.name} in one run and {b.name} in the other")
        elif a.latents.shape != b.latents.shape or not torch.equal(a.latents, b.latents):
            count = int((a.latents != b.latents).sum()) if a.latents.shape == b.latents.shape else -1
            what = f"{count} of {a.latents.numel()} latents differ" if count >= 0 else "its shape differs"
            lines.append(f"sample {a.name}, draw {draw}: {what}")
        elif not torch.equal(a.text, b.text):
            lines.append(f"sample {a.name}, draw {draw}: its caption's features differ")
    return lines


@dataclass(frozen=True)
class _Seen:
    """A clip as the model saw it."""

    name: str
    latents: Tensor
    text: Tensor


def samples_of(config: RunConfig, step: int) -> dict[int, _Seen]:
    """The clips of one step of samples, by draw."""
    batch = config.train.global_batch_size
    whole = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch_size=batch))
    source = build_source(whole)
    objective = FlowObjective(config.diffusion, config.train.seed)
    found = {}
    with Loader(
        whole, source, build_text_encoder(whole), dp_rank=0, dp_size=1, start_step=step,
        drops_caption=objective.drops_caption,
    ) as loader:  # fmt: skip
        (batches,) = next(loader)
        clips = [(row, clip) for row, pack in enumerate(batches.packs) for clip in pack.clips]
        for number, (row, clip) in enumerate(clips):
            latents = batches.clean_BTP[row, clip.start : clip.start + clip.tokens]
            found[clip.draw] = _Seen(loader.sample_name(clip.sample), latents, batches.text_GLD[number])
    return found


def first_routing(one: Path, other: Path, step: int) -> str:
    """The first expert layer whose counts of tokens differ in a step; "" where they agree, or were not logged."""
    try:
        rows = [{row["step"]: row for row in read_rows(file)}.get(step) for file in (one, other)]
    except DataError:
        return ""
    if rows[0] is None or rows[1] is None:
        return ""
    layers: list[Row] = [row["layers"] for row in rows if row is not None]  # type: ignore[misc]
    for layer in sorted(layers[0], key=int):
        counts = [torch.tensor(table[layer]["counts"]).sum(0) for table in layers]
        moved = int((counts[0] - counts[1]).abs().sum()) // 2
        if moved:
            return (
                f"layer {layer}: {moved} of {int(counts[0].sum())} choices of an expert fell otherwise in step {step} "
                "(a flipped top-k), with the same samples"
            )
    return ""
