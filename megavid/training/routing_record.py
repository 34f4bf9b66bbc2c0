"""Which experts every token of a step went to: written by a run, forced in a replay.

Owns the files, ``DIR/routing/step_XXXXXXXX/rank_RRRRR.safetensors``, and who writes them. A tensor is what one router
chose for one pack's run of tokens, named ``layer/draw/token``: the layer, the draw of the pack's first clip (draws are
never repeated in a run), and the first of the tokens in the pack. Nothing in a name is a rank's, so any layout finds
its tokens; each rank writes its own, because those of a large step would not fit one.
"""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavid.checkpoint.format import step_name
from megavid.checkpoint.ranks import agreed
from megavid.errors import DataError
from megavid.models.moe.router import OnChoice, Router
from megavid.models.moe.tokens import TokenInfo
from megavid.parallel.engine import Engine
from megavid.parallel.mesh import Mesh
from megavid.training.callbacks import Callback, Run
from megavid.training.step import StepReport


def routers_of(engine: Engine[Any]) -> Iterator[tuple[int, Router]]:
    """Layer and router of every expert layer on this rank."""
    for chunk in engine.chunks:
        for block in chunk.blocks:
            if block.is_moe:
                yield block.layer, block.feed_forward.router


def watch(engine: Engine[Any], hook: Any) -> None:
    """Have every router tell ``hook(layer, choice, info)`` what it chooses, and take its answer; None for no more."""
    for layer, router in routers_of(engine):
        watcher: OnChoice | None = None if hook is None else partial(hook, layer)
        router.on_choice = watcher


def has_own_tokens(mesh: Mesh) -> bool:
    """Whether no other rank's routers see the same tokens, or this is the first that does."""
    return mesh.is_sequence_parallel or mesh.coordinate("tp") == 0


class RoutingLog(Callback):
    """Writes the choices of every ``interval``-th step; stands on every rank."""

    def __init__(self, interval: int, num_experts: int) -> None:
        """Choose the steps, and the narrowest numbers that name all experts."""
        self.interval, self.narrow = interval, torch.uint8 if num_experts <= 256 else torch.int16
        self.is_on = False
        self.pieces: dict[str, Tensor] = {}

    def before_training(self, run: Run) -> None:
        """Watch the routers."""
        watch(run.engine, self.see)
        self.is_on = (run.state.step + 1) % self.interval == 0

    def see(self, layer: int, choice: Tensor, info: TokenInfo) -> Tensor:
        """Keep what a router chose for the packs of a microbatch; called again where activations are recomputed."""
        if self.is_on and torch.is_grad_enabled():  # without, it is validation
            narrow = torch.bool if choice.dtype == torch.bool else self.narrow
            rows_TBx = choice.detach().view(-1, len(info.draw_B), choice.shape[-1])
            for row, draw in enumerate(info.draw_B):
                if draw >= 0:
                    self.pieces[f"{layer}/{draw}/{info.first_token}"] = rows_TBx[:, row].to("cpu", narrow).contiguous()
        return choice

    def after_step(self, run: Run, report: StepReport) -> None:
        """Write the step, if it is one of those, and look whether the next one is."""
        if self.is_on:
            self.write(run.run_dir.routing, report.step, run.mesh, run.run_dir.fence.check)
        self.is_on = (report.step + 1) % self.interval == 0

    def write(self, folder: Path, step: int, mesh: Mesh, check: Any) -> None:
        """Write aside what was seen, and rename it once every rank has.

        Raises:
            StorageError: on every rank, where one cannot write.

        Ranks: collective.
        """
        final = folder / step_name(step)
        aside = final.with_suffix(".partial")
        with agreed(mesh):
            if mesh.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
        with agreed(mesh):
            if self.pieces and has_own_tokens(mesh):
                save_file(self.pieces, aside / f"rank_{mesh.rank:05d}.safetensors")
        self.pieces = {}
        with agreed(mesh):
            if mesh.is_main:
                check()
                shutil.rmtree(final, ignore_errors=True)
                os.rename(aside, final)

    def after_training(self, run: Run) -> None:
        """Leave the routers alone."""
        watch(run.engine, None)


class RecordedRouting:
    """Has the routers of an engine choose as they did when the run took the step; gates follow from today's scores.

    Attributes:
        steps: that were forced so far.
    """

    def __init__(self, engine: Engine[Any], folder: Path) -> None:
        """Watch the routers of ``engine``; ``folder`` is the run's ``routing``."""
        self.mesh, self.folder = engine.mesh, folder
        self.steps = 0
        # Choices that would have fallen otherwise, of how many; by what was routed, as recomputation routes it again.
        self._moved: dict[tuple[int, int, tuple[int, ...], int], tuple[int, int]] = {}
        self._places: dict[tuple[int, int], list[tuple[int, Any, str]]] | None = None
        watch(engine, self.force)

    def begin(self, step: int) -> None:
        """Force the choices of ``step``; where it was not recorded, the routers choose for themselves.

        Raises:
            DataError: a file is damaged.
        """
        folder = self.folder / step_name(step)
        self._places = None
        if not folder.is_dir():
            return
        self.steps += 1
        self._places = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                handle: Any = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise DataError(f"{file} is damaged: {error}; replay without --routing recorded") from error
            for name in handle.keys():  # noqa: SIM118  # a safetensors file, which cannot be iterated
                layer, draw, token = map(int, name.split("/"))
                self._places.setdefault((layer, draw), []).append((token, handle, name))

    def force(self, layer: int, choice: Tensor, info: TokenInfo) -> Tensor:
        """What was chosen for these tokens then, in the shape of ``choice``.

        Raises:
            DataError: the record has other samples, or is not whole.
        """
        if self._places is None:
            return choice
        rows_TBx = choice.view(-1, len(info.draw_B), choice.shape[-1]).clone()
        for row, draw in enumerate(info.draw_B):
            if draw >= 0:
                rows_TBx[:, row] = self._read(layer, draw, info.first_token, len(rows_TBx)).to(choice)
        forced = rows_TBx.view_as(choice)
        if torch.is_grad_enabled() and has_own_tokens(self.mesh):
            one, other = (x if x.dtype == torch.bool else x.sort(-1).values for x in (choice, forced))
            moved = int((one != other).any(-1)[info.is_valid].sum())
            self._moved[self.steps, layer, info.draw_B, info.first_token] = moved, int(info.is_valid.sum())
        return forced

    def _read(self, layer: int, draw: int, first: int, count: int) -> Tensor:
        assert self._places is not None
        found: list[Tensor] = []
        at = first
        for token, handle, name in sorted(self._places.get((layer, draw), []), key=lambda place: place[0]):
            piece = handle.get_slice(name)
            stop = token + piece.get_shape()[0]
            if token <= at < min(stop, first + count):
                found.append(piece[at - token : first + count - token])
                at = min(stop, first + count)
        if at < first + count:
            raise DataError(
                f"{self.folder}: no routing of layer {layer}, draw {draw}, token {at}: the record is of other samples, "
                "or of another model; replay without --routing recorded"
            )
        return torch.cat(found)

    def summary(self) -> str:
        """One line: how much was forced, and what it changed.

        Ranks: collective.
        """
        counts = [sum(counts) for counts in zip(*self._moved.values(), strict=True)] or [0, 0]
        local = torch.tensor(counts, dtype=torch.int64, device=self.mesh.device)
        moved, decisions = self.mesh.sum(local, over="world").tolist()
        return f"recorded, of {self.steps} steps; {moved} of {decisions} choices would have fallen otherwise here"
