"""SHA-256 of every tensor of a source, taken from its bytes as they pass by, and held against what is known of them.

Owns the digests of source tensors. A tensor that is read from its first to its last element is hashed on the way; one
that was read otherwise (rows in another order, experts apart) is read once more at the end.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.errors import CheckpointError

_BLOCKS_AHEAD = 3


class Digest(Protocol):
    """A hash under way, as ``hashlib`` makes it."""

    def update(self, data: memoryview, /) -> None:
        """Add bytes."""

    def hexdigest(self) -> str:
        """The digest so far, hexadecimal."""


def bytes_of(data: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return data.contiguous().view(-1).view(torch.uint8).numpy().data


class HashThread:
    """Hashes blocks in order behind its caller's back: hashing leaves Python's lock, so it costs a core, not time.

    Use it as a context manager; few blocks are kept waiting, so memory stays bounded.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def update(self, digest: Digest, data: memoryview) -> None:
        """Add ``data``, which must not change, to ``digest``."""
        self._waiting.append(self._pool.submit(digest.update, data))
        while len(self._waiting) > _BLOCKS_AHEAD:
            self._waiting.popleft().result()

    def wait(self) -> None:
        """Return when everything was added."""
        while self._waiting:
            self._waiting.popleft().result()

    def __enter__(self) -> "HashThread":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()


class Ledger:
    """The tensors of one source by key, and the digest of each that was read.

    Attributes:
        known: digests that the source must have, by key: what an earlier conversion wrote down. Empty where nothing is
            known.
        digests: what was found so far.
    """

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        self.known = dict(known or {})
        self.digests: dict[str, str] = {}
        self._tensors: dict[str, LazyTensor] = {}
        self._at: dict[str, tuple[int, Digest]] = {}
        self._hashed_elsewhere: set[str] = set()
        self._thread = HashThread()

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Every tensor that is watched, by key; reading one of these is not seen."""
        return self._tensors

    def watch(self, key: str, tensor: LazyTensor) -> LazyTensor:
        """``tensor``, which lies in the source under ``key``, such that reading it is seen."""
        self._tensors[key] = tensor
        fetch = tensor.fetch

        def seen(start: int, stop: int) -> Tensor:
            data = fetch(start, stop)
            self._see(key, start, stop, data)
            return data

        return replace(tensor, fetch=seen, key=key)

    def _see(self, key: str, start: int, stop: int, data: Tensor) -> None:
        if key in self.digests or key in self._hashed_elsewhere:
            return
        at, digest = self._at.get(key) or (0, hashlib.sha256())
        if start != at:
            return
        self._thread.update(digest, bytes_of(data))
        self._at[key] = stop, digest
        if stop == self._tensors[key].numel:
            self._thread.wait()
            del self._at[key]
            self.record(key, digest.hexdigest())

    @contextmanager
    def elsewhere(self, key: str) -> Iterator[None]:
        """Inside, ``key`` is hashed by somebody else, who calls ``record``."""
        self._hashed_elsewhere.add(key)
        try:
            yield
        finally:
            self._hashed_elsewhere.discard(key)

    def record(self, key: str, digest: str) -> None:
        """Take down the digest of a tensor.

        Raises:
            CheckpointError: another one is known.
        """
        expected = self.known.get(key, digest)
        if digest != expected:
            raise CheckpointError(
                f"{self._tensors[key].where}: tensor {key} has SHA-256 {digest[:16]}..., its conversion.json says "
                f"{expected[:16]}...: one of the two was changed or damaged"
            )
        self.digests[key] = digest

    def complete(self) -> None:
        """Hash what was not yet read as a whole; raises as ``record`` does."""
        for key, tensor in self._tensors.items():
            if key in self.digests:
                continue
            digest = hashlib.sha256()
            for block in tensor.blocks():
                self._thread.update(digest, bytes_of(block))
            self._thread.wait()
            self.record(key, digest.hexdigest())


def overall(digests: Mapping[str, str]) -> str:
    """One digest of many: of the lines "digest  name" in order of name, as ``sha256sum`` prints them."""
    lines = (f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
