"""What one rank holds of a tensor in model space, as boxes: the currency between the optimizer and the checkpoint.

A sharded optimizer owns a flat range of each rank's parameter shard. A flat range of a row-major n-dimensional array is
at most 2n - 1 axis-aligned boxes, and boxes of the global tensor are what any other layout can read. Owns that
arithmetic and the record; knows neither files nor megatron-core.
"""

import math
from dataclasses import dataclass

from torch import Tensor

HISTORY = "fp8/"
"""Beginning of the names of what a layer in FP8 remembers of its magnitudes: of use to the run that saved it only."""


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box: where it begins and how far it reaches on each dim."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in the box."""
        return math.prod(self.shape)

    def moved_by(self, offset: tuple[int, ...]) -> "Box":
        """This box with its origin moved by ``offset``."""
        return Box(tuple(a + b for a, b in zip(self.offset, offset)), self.shape)


@dataclass(frozen=True)
class Fragment:
    """This rank's elements of one global tensor.

    Attributes:
        name: ``kind/name``, such as ``exp_avg/blocks.0.self_attention.q.weight``.
        global_shape: shape in model space.
        boxes: disjoint boxes in model space; their elements, each box row-major, lie one after another in ``data``.
        data: 1-D contiguous; loading writes into it in place.
        is_owner: False where another rank holds the same elements and writes them.
    """

    name: str
    global_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    data: Tensor
    is_owner: bool = True


def boxes_of_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the flat range ``[start, stop)`` of a row-major array of ``shape`` into boxes, in order."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)

    def within(index: int, low: int, high: int) -> list[Box]:
        inner = boxes_of_range(shape[1:], low, high)
        return [Box((index, *box.offset), (1, *box.shape)) for box in inner]

    if first == last:
        return within(first, head, tail)
    boxes = []
    if head:
        boxes += within(first, head, row)
        first += 1
    if last > first:
        boxes.append(Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    if tail:
        boxes += within(last, 0, tail)
    return boxes
