"""Tensors that are read when they are asked for, a range of elements at a time.

Owns ``LazyTensor`` and what can be done with one unread: other shapes, one row, rows in another order, several as one.
Everything is a range of elements in row-major order, so that no step ever needs a whole tensor in memory. Knows no
file and no name of a model.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20
"""Bytes of a tensor that are in memory at a time, as it streams from one file to another."""

Fetch = Callable[[int, int], Tensor]
"""Elements [start, stop) of a tensor in row-major order, as a 1-D tensor on the CPU."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read.

    Attributes:
        shape: its shape.
        dtype: the number format that ``fetch`` gives.
        fetch: reads a range of its elements.
        where: file and key, for messages.
        key: the source tensor whose bytes these are, all and in order; "" where they are not those of one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Fetch
    where: str
    key: str = ""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor."""
        return self.fetch(0, self.numel).view(self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of dim 0.

        Raises:
            IndexError: there are no such rows.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.where} has {self.shape[0]} rows, asked for {start} to {stop}")
        width = math.prod(self.shape[1:])
        return self.fetch(start * width, stop * width).view(stop - start, *self.shape[1:])

    def blocks(self, max_bytes: int = BLOCK_BYTES) -> Iterator[Tensor]:
        """All elements, in order, as 1-D tensors of at most ``max_bytes``."""
        step = max(1, max_bytes // self.dtype.itemsize)
        for first in range(0, self.numel, step):
            yield self.fetch(first, min(first + step, self.numel))

    def viewed(self, shape: tuple[int, ...]) -> "LazyTensor":
        """The same elements in another shape."""
        assert math.prod(shape) == self.numel, (self.where, self.shape, shape)
        return replace(self, shape=shape)

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same numbers in another number format, rounded to nearest; fp16's overflow is the caller's to notice."""
        if dtype == self.dtype:
            return self
        fetch = self.fetch
        return replace(self, dtype=dtype, fetch=lambda start, stop: fetch(start, stop).to(dtype), key="")

    def row(self, index: int) -> "LazyTensor":
        """Row ``index`` of dim 0, without that dim."""
        size, fetch = self.numel // self.shape[0], self.fetch
        first = index * size
        return replace(self, shape=self.shape[1:], fetch=lambda start, stop: fetch(first + start, first + stop), key="")

    def permuted(self, order: Sequence[int]) -> "LazyTensor":
        """Rows of dim 0 in another order: row i of the result is row ``order[i]``."""
        assert sorted(order) == list(range(self.shape[0])), self.where
        width, fetch = self.numel // self.shape[0], self.fetch

        def gather(start: int, stop: int) -> Tensor:
            first, last = start // width, -(-stop // width)
            rows = [fetch(order[i] * width, (order[i] + 1) * width) for i in range(first, last)]
            return torch.cat(rows)[start - first * width : stop - first * width]

        return replace(self, fetch=gather, key="")


def stacked(parts: Sequence[LazyTensor], where: str) -> LazyTensor:
    """Tensors of one shape and dtype, one after another along a new dim 0; each is read only when its turn comes."""
    first = parts[0]
    assert all(part.shape == first.shape and part.dtype == first.dtype for part in parts), where
    ends = list(accumulate(part.numel for part in parts))

    def fetch(start: int, stop: int) -> Tensor:
        pieces = []
        while start < stop:
            number = bisect_right(ends, start)
            base = ends[number] - parts[number].numel
            upto = min(stop, ends[number])
            pieces.append(parts[number].fetch(start - base, upto - base))
            start = upto
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return LazyTensor((len(parts), *first.shape), first.dtype, fetch, where)
