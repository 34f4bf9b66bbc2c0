"""A small model for checkpoint tests, its fragments in any layout, and ranks that are threads of one process."""

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megavid.checkpoint import AsyncSaver, Checkpoint, load
from megavid.config.schema import CheckpointConfig
from megavid.parallel.fragment import Box, Fragment, boxes_of_range

SHAPES = {"a": (16, 12), "b": (12,), "experts": (8, 6, 10), "conv": (4, 3, 6, 2), "table": (1, 6, 12)}
TENSORS = {
    **{f"model/{name}": (shape, torch.float32) for name, shape in SHAPES.items()},
    **{f"exp_avg/{name}": (shape, torch.float32) for name, shape in SHAPES.items()},
    "buffer/bias": ((8,), torch.float64),
    "buffer/count": ((), torch.int64),
    "ema/a": ((16, 12), torch.bfloat16),
}
RUN_TOML = "[train]\nsteps = 7\n"


def truth(name: str, step: int = 0) -> torch.Tensor:
    """What tensor ``name`` holds after ``step``; no two elements or steps are alike."""
    shape, dtype = TENSORS[name]
    ramp = torch.arange(math.prod(shape), dtype=torch.float64) + 1000 * step + sum(map(ord, name)) / 7
    return ramp.to(dtype).reshape(shape)


def cut(name: str, box: Box, start: int, stop: int, step: int | None, is_owner: bool = True) -> Fragment:
    """The flat range ``[start, stop)`` of one rank's shard ``box``; ``step`` None for data that is yet to be loaded."""
    shape, dtype = TENSORS[name]
    boxes = boxes_of_range(box.shape, start, stop) if box.shape else [box]
    placed = tuple(Box(tuple(a + b for a, b in zip(inner.offset, box.offset)), inner.shape) for inner in boxes)
    if step is None:
        data = torch.full((stop - start,), 77, dtype=dtype)
    else:
        shard = truth(name, step)[tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))]
        data = shard.reshape(-1)[start:stop].clone()
    return Fragment(name, shape, placed, data, is_owner)


def fragments_of(rank: int, tp: int, dp: int, step: int | None, dim: int = 0) -> list[Fragment]:
    """What ``rank`` of a TP x DP world holds: shards over ``dim``, their flat storage cut over DP at uneven points."""
    t, d = rank % tp, rank // tp
    found = []
    for name, (shape, _) in TENSORS.items():
        along = dim if len(shape) > dim and shape[dim] % tp == 0 else 0
        if len(shape) == 0 or shape[along] % tp:  # replicated: rank 0 writes it, all load it
            found.append(cut(name, Box((0,) * len(shape), shape), 0, math.prod(shape), step, is_owner=rank == 0))
            continue
        extent = shape[along] // tp
        box = Box(
            tuple(t * extent if i == along else 0 for i in range(len(shape))),
            tuple(extent if i == along else full for i, full in enumerate(shape)),
        )
        size = box.numel
        cuts = [size * i // dp + (i % 2 if 0 < i < dp else 0) for i in range(dp)] + [size]
        found.append(cut(name, box, cuts[d], cuts[d + 1], step))
    return found


def assert_holds(fragments: Sequence[Fragment], step: int) -> None:
    """Every fragment holds what it must after ``step``, bit for bit."""
    for fragment in fragments:
        want = [truth(fragment.name, step)[_slices(box)].reshape(-1) for box in fragment.boxes]
        want_data = torch.cat(want).to(fragment.data.dtype) if want else fragment.data[:0]
        assert torch.equal(fragment.data, want_data), fragment.name


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape))


class ThreadRanks:
    """One of several ranks that are threads; its gather is the real one's."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.world_size, self._barrier, self._slots = rank, world_size, barrier, slots

    def all_gather_object(self, value: Any, /) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait(20)
        gathered = list(self._slots)
        self._barrier.wait(20)
        return gathered


def run_ranks(world_size: int, body: Callable[[ThreadRanks], Any]) -> list[Any]:
    """Run ``body`` on every rank and return what each returned, or the exception it raised."""
    barrier, slots = threading.Barrier(world_size), [None] * world_size
    results: list[Any] = [None] * world_size

    def work(rank: int) -> None:
        try:
            results[rank] = body(ThreadRanks(rank, world_size, barrier, slots))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    return results


def results_of(world_size: int, body: Callable[[ThreadRanks], Any]) -> list[Any]:
    """``run_ranks``, where no rank may raise."""
    results = run_ranks(world_size, body)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def save_world(
    folder: Path, steps: Sequence[int] = (1,), *, tp: int = 2, dp: int = 2, dim: int = 0, **options: Any
) -> None:
    """Save the model after each of ``steps`` from a TP x DP world of threads."""
    config = options.pop("config", CheckpointConfig())

    def body(ranks: ThreadRanks) -> None:
        with AsyncSaver(folder, ranks, config, run_toml=RUN_TOML, layout=f"dp{dp} tp{tp}", **options) as saver:
            for step in steps:
                fragments = fragments_of(ranks.rank, tp, dp, step, dim)
                saver.save(step, fragments, {"samples": 8 * step})
                for fragment in fragments:  # the step loop goes on and changes everything
                    fragment.data.zero_()

    results_of(tp * dp, body)


def load_world(folder: Path, step: int, *, tp: int, dp: int, dim: int = 0) -> list[Checkpoint]:
    """Load a checkpoint in a TP x DP world of threads and compare every element."""

    def body(ranks: ThreadRanks) -> Checkpoint:
        fragments = fragments_of(ranks.rank, tp, dp, None, dim)
        checkpoint = load(folder, fragments, ranks)
        assert_holds(fragments, step)
        return checkpoint

    return results_of(tp * dp, body)
