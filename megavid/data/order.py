"""The order of samples: draw d = 0, 1, 2, ... of a run -> which sample, a pure function of (seed, data set).

Owns what is held out for validation, the permutation of every bucket in every epoch, and how buckets mix.
Knows no rank, no pack and no file. Memory: a few words per bucket and the source's table of runs; no list
of samples.

An epoch is every training sample once. Inside it each bucket is permuted by a key of (seed, epoch, shape),
and the buckets mix evenly: after i draws of an epoch of m, a bucket of n samples has given i * n / m of
them, rounded. Buckets that are equally due take turns in the order of a hash of their shapes, not of their
sizes. So every batch has the mixture of the data set, with no clusters of one resolution or length.
"""

import hashlib
import json
from collections.abc import Iterator

import numpy as np

from megavid.config.schema import require
from megavid.data.permutation import Permutation
from megavid.data.sample import Bucket, ClipSource, Indices, Shape
from megavid.ops.philox import key_of

MIXING_RULE = 2
"""Number of the rule by which sizes take turns and fill packs; raised when clips of several sizes come otherwise."""


def held_out_samples(source: ClipSource, count: int) -> tuple[int, ...]:
    """The samples that are kept from training, ascending: ``count`` places of a permutation with a fixed key.

    It depends on the number of samples only, so runs with other seeds have the same validation set.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    require(
        count < len(source),
        f"data.validation_samples = {count} must be below the {len(source)} clips of {source.name}; "
        "lower it (0 for no validation)",
    )
    if count == 0:
        return ()
    permute = Permutation(len(source), "held out")
    return tuple(sorted(permute(np.arange(count, dtype=np.int64)).tolist()))


class SampleOrder:
    """Which sample each draw is.

    Args:
        source: the data set.
        seed: ``train.seed``.
        held_out: samples that no draw takes.
    """

    def __init__(self, source: ClipSource, seed: int, held_out: tuple[int, ...] = ()) -> None:
        self._seed = seed
        held: dict[Shape, list[int]] = {}
        for index in held_out:
            held.setdefault(source.shape(index), []).append(index)
        self._buckets: list[Bucket] = []
        self._held: list[Indices] = []
        for bucket in sorted(source.buckets, key=lambda bucket: key_of("turns", str(bucket.shape))):
            members = sorted(bucket.member(index) for index in held.get(bucket.shape, []))
            if len(members) < len(bucket):
                self._buckets.append(bucket)
                self._held.append(np.array(members, np.int64) - np.arange(len(members), dtype=np.int64))
        self.sizes = tuple(len(b) - len(h) for b, h in zip(self._buckets, self._held, strict=True))
        """Training samples of each bucket."""
        self.epoch_size = sum(self.sizes)
        """Training samples."""
        # ``places`` multiplies two numbers up to this one in 64 bits.
        assert self.epoch_size < 3_000_000_000, f"{self.epoch_size} samples"

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Latent shape of each bucket that training draws from."""
        return tuple(bucket.shape for bucket in self._buckets)

    def fingerprint(self) -> str:
        """Short hash of what the order is a function of. A resumed run must find the same."""
        facts: list[object] = [self._seed, self.shapes, self.sizes, [held.tolist() for held in self._held]]
        if len(self.sizes) > 1:
            facts.append(MIXING_RULE)
        facts_text = json.dumps(facts)
        return hashlib.blake2b(facts_text.encode(), digest_size=8).hexdigest()

    def places(self, draws: Indices) -> tuple[Indices, Indices]:
        """Bucket of each draw, and how many draws of the same epoch that bucket gave before.

        Needs no permutation, so that skipping over packs, which only looks at shapes, is quick.
        """
        at, left = draws % self.epoch_size, self.epoch_size
        number = np.full_like(draws, len(self.sizes) - 1)
        rank = np.zeros_like(draws)
        open_ = np.ones(draws.shape, bool)
        for bucket, size in enumerate(self.sizes):
            before = (at * size + left // 2) // left
            here = open_ & ((at + 1) * size + left // 2 >= (before + 1) * left)
            number[here], rank[here] = bucket, before[here]
            open_ &= ~here
            # What this bucket did not take is, seen alone, the same kind of sequence for the buckets after it.
            at, left = at - before, left - size
            if left == 0:
                break
        return number, rank

    def samples(self, draws: Indices) -> Indices:
        """Sample index of each draw."""
        number, rank = self.places(draws)
        epoch = draws // self.epoch_size
        out = np.empty_like(draws)
        for bucket, turn in {*zip(number.tolist(), epoch.tolist(), strict=True)}:
            chosen = (number == bucket) & (epoch == turn)
            out[chosen] = self._take(bucket, turn, rank[chosen])
        return out

    def substitutes(self, draw: int) -> Iterator[int]:
        """The sample of ``draw``, then those that may stand in for it, best first, none twice.

        First the ones that its bucket gives next in the same epoch, round to the first: they have the same
        grid. Then those of buckets of smaller volume, largest first: they fit in its place, and what they
        leave is padding. A function of the draw alone, so every rank that meets a damaged sample takes the
        same one in its stead.
        """
        bucket, rank = (int(values[0]) for values in self.places(np.array([draw], np.int64)))
        epoch = draw // self.epoch_size
        yield from self._round(bucket, epoch, rank)
        extent = self.shapes[bucket][1:]
        smaller = [
            (-int(np.prod(shape)), number)
            for number, shape in enumerate(self.shapes)
            if number != bucket and all(mine <= his for mine, his in zip(shape[1:], extent, strict=True))
        ]
        for _, other in sorted(smaller):
            yield from self._round(other, epoch, rank)

    def _round(self, bucket: int, epoch: int, first: int) -> Iterator[int]:
        size = self.sizes[bucket]
        for step in range(size):
            yield int(self._take(bucket, epoch, np.array([(first + step) % size], np.int64))[0])

    def _take(self, bucket: int, epoch: int, ranks: Indices) -> Indices:
        permute = Permutation(self.sizes[bucket], self._seed, "order", epoch, str(self.shapes[bucket]))
        members = permute(ranks)
        # held[j] counts the members before the j-th held-out one that may be drawn: step over as many as
        # lie at or before.
        members = members + np.searchsorted(self._held[bucket], members, side="right")
        return self._buckets[bucket].samples(members)
