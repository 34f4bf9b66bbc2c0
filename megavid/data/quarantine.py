"""Reading around damaged samples: each is named, replaced by rule, counted, and bounded.

Owns the list of damaged samples of one rank's reader. What stands in for one follows from the draw
(``SampleOrder.substitutes``), so every rank that meets it, in whatever layout, takes the same clip. Failing
storage is not damage: it raises, else one rank with a broken mount would silently train on other data than
its neighbours.
"""

import threading
from collections.abc import Iterable

from megavid.data.sample import BadSample, ClipSource, Sample
from megavid.errors import DataError


class SampleReader:
    """Reads samples, or what stands in for them. Safe for several threads.

    Args:
        source: the data set.
        max_bad: ``data.max_bad_samples``: damaged samples that this reader passes over before it gives up.
            A start counts anew.
    """

    def __init__(self, source: ClipSource, max_bad: int) -> None:
        self._source, self._max_bad = source, max_bad
        self._bad: dict[int, BadSample] = {}
        self._reported = 0
        self._lock = threading.Lock()

    @property
    def num_bad(self) -> int:
        """Damaged samples met so far, each counted once."""
        return len(self._bad)

    def take_new(self) -> list[str]:
        """One line (name: reason) for each damaged sample met since the last call, for the run's events."""
        with self._lock:
            lines = [str(error) for error in self._bad.values()]
        new, self._reported = lines[self._reported :], len(lines)
        return new

    def name(self, index: int) -> str:
        """Name of a sample for logs."""
        with self._lock:
            return self._source.sample_name(index)

    def read(self, candidates: Iterable[int]) -> tuple[int, Sample]:
        """The first of ``candidates`` (sample indices) that is sound, and its index.

        Raises:
            DataError: more than ``max_bad`` samples are damaged, or no candidate is sound.
            StorageError: storage failed.
        """
        first = ""
        for index in candidates:
            sample = self.read_sound(index)
            if sample is not None:
                return index, sample
            first = first or str(self._bad[index])
        raise DataError(f"{first}; {self._source.name} has no sound sample that fits in its place; prepare it again")

    def read_sound(self, index: int) -> Sample | None:
        """The sample with ``index``, or None if it is damaged.

        Raises:
            DataError: more than ``max_bad`` samples are damaged.
            StorageError: storage failed.
        """
        with self._lock:
            if index in self._bad:
                return None
            try:
                return self._checked(index)
            except BadSample as error:
                self._bad[index] = error
            if len(self._bad) > self._max_bad:
                raise DataError(
                    f"{self._source.name}: {len(self._bad)} samples are damaged, more than data.max_bad_samples = "
                    f"{self._max_bad}; the last is {self._bad[index]}; prepare the data again or raise the limit"
                )
            return None

    def _checked(self, index: int) -> Sample:
        sample = self._source.read(index)
        if sample.shape != self._source.shape(index):
            raise BadSample(
                self._source.sample_name(index),
                f"latents of shape {sample.shape}, the index says {self._source.shape(index)}",
            )
        if not bool(sample.latents_CFHW.isfinite().all()):
            raise BadSample(self._source.sample_name(index), "latents are not finite")
        return sample
