"""The loader: microbatches of each step for one data-parallel rank, read ahead in the background.

Owns the slices that ranks and micro-batches take of a step's packs, the reading of samples into
``LatentBatch``, and the data position of a checkpoint. Step s (from 1) is packs (s-1) * GB to s * GB - 1
(GB = ``train.global_batch_size``) of ``PackStream``; data-parallel rank r takes the r-th of ``dp_size``
equal runs of them, and its microbatches are runs of ``train.micro_batch_size`` packs. So neither can change
what a step sees, and as packs cost alike, no rank and no microbatch holds up the others. All ranks of a model
replica build the same loader and read the same packs.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from megavid.config.schema import RunConfig
from megavid.data.conditioning import given_of, image_features
from megavid.data.order import SampleOrder, held_out_samples
from megavid.data.packing import PackPosition, PackStream, next_fit, tokens_of
from megavid.data.quarantine import SampleReader
from megavid.data.sample import ClipSource, Sample
from megavid.data.text import TextEncoder
from megavid.errors import DataError
from megavid.ops.packs import Clip, LatentBatch, Pack
from megavid.ops.patches import patchify, token_grid

_TEXT_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class _Entry:
    """A sample that is to stand in a pack."""

    draw: int
    index: int
    start: int
    sample: Sample
    is_dropped: bool = False


class CaptionFeatures:
    """Features of captions, the last ones kept: data sets repeat captions, and the empty one comes in every batch.
    Safe for several threads.

    Args:
        encoder: the text encoder.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._limit = max(64, _TEXT_CACHE_BYTES // (4 * encoder.width * encoder.length))

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Features, [G, L, width] fp32."""
        with self._lock:
            missing = list(dict.fromkeys(caption for caption in captions if caption not in self._kept))
            if missing:
                for caption, features_LD in zip(missing, self._encoder.encode(missing), strict=True):
                    self._kept[caption] = features_LD.float()
            for caption in captions:
                self._kept.move_to_end(caption)
            features_GLD = torch.stack([self._kept[caption] for caption in captions])
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
            return features_GLD

    def padded(self, text_LD: Tensor) -> Tensor:
        """Features that were encoded ahead, zero padded or cut to [L, width] fp32."""
        out_LD = torch.zeros(self._encoder.length, self._encoder.width)
        kept = text_LD[: self._encoder.length].float()
        out_LD[: len(kept)] = kept
        return out_LD


class Loader:
    """Iterates over steps; each gives the list of microbatches of this data-parallel rank.

    Use as a context manager, or call ``close``. Reading begins with the first step that is asked for.

    Args:
        config: the run; its batch sizes must fit ``dp_size`` (``megavid.plan.layout`` checks that).
        source: the data set.
        text_encoder: encoder of captions.
        dp_rank: this rank on the data-parallel axis.
        dp_size: its size.
        start_step: first step that is wanted, from 1.
        state: ``state_dict()`` of a checkpoint. Without it the position is found from ``start_step`` alone,
            only slower.
        drops_caption: whether the clip of a draw is trained with the empty caption (``diffusion`` owns the
            rule); None for never.

    Raises:
        ConfigError: a clip is longer than a pack, or all clips are held out.
        DataError: the data set is not the one of ``state``.
    """

    def __init__(
        self,
        config: RunConfig,
        source: ClipSource,
        text_encoder: TextEncoder,
        *,
        dp_rank: int,
        dp_size: int,
        start_step: int = 1,
        state: Mapping[str, object] | None = None,
        drops_caption: Callable[[int], bool] | None = None,
    ) -> None:
        train = config.train
        assert train.global_batch_size % (train.micro_batch_size * dp_size) == 0
        assert start_step >= 1
        self.source = source
        self.waited_s = 0.0
        """Seconds that steps waited for data, in all."""
        self._model, self._patch_size = config.model, config.model.patch_size
        self._pack_tokens = config.data.pack_tokens
        self._micro = train.micro_batch_size
        self._per_step = train.global_batch_size // (train.micro_batch_size * dp_size)
        self._first_pack = dp_rank * self._per_step * train.micro_batch_size
        self._drops_caption = drops_caption or (lambda draw: False)
        self.features = CaptionFeatures(text_encoder)
        """Features of any captions, for prompts too."""
        self._reader = SampleReader(source, config.data.max_bad_samples)
        self._held_out = held_out_samples(source, config.data.validation_samples)
        self._order = SampleOrder(source, train.seed, self._held_out)
        self._stream = PackStream(self._order, config, source.name)
        self._step = start_step - 1
        self._position = self._position_of(state)
        self._microbatches = self._read_ahead()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ready: deque[Future[tuple[LatentBatch, PackPosition]]] = deque()
        self._queue_size = config.data.queue_size

    def _position_of(self, state: Mapping[str, object] | None) -> PackPosition | None:
        if state is None:
            return None
        if state.get("data") != self._order.fingerprint():
            raise DataError(
                f"{self.source.name} is not the data set that the checkpoint was trained on (other clips, shapes or "
                "held-out clips); start a new run from its weights with train.init_from"
            )
        return PackPosition.from_json(state.get("position"))

    def state_dict(self) -> dict[str, object]:
        """Data position after the last step given out, as JSON values; the same on every rank and layout."""
        position = None if self._position is None else self._position.to_json()
        return {"step": self._step, "data": self._order.fingerprint(), "position": position or PackPosition().to_json()}

    @property
    def num_bad_samples(self) -> int:
        """Damaged samples that this rank met so far."""
        return self._reader.num_bad

    def new_bad_samples(self) -> list[str]:
        """A line for each damaged sample that this rank met since the last call."""
        return self._reader.take_new()

    def sample_name(self, index: int) -> str:
        """Name of a sample (``Clip.sample``) for logs: shard and key."""
        return self._reader.name(index)

    @property
    def num_validation_clips(self) -> int:
        """Clips that are held out."""
        return len(self._held_out)

    def __iter__(self) -> Iterator[list[LatentBatch]]:
        return self

    def __next__(self) -> list[LatentBatch]:
        """Microbatches of the next step.

        Raises:
            DataError: too many damaged samples.
            StorageError: storage failed.
        """
        while len(self._ready) < self._queue_size:
            self._ready.append(self._thread.submit(next, self._microbatches))
        batches = []
        for _ in range(self._per_step):
            started = time.monotonic()
            batch, self._position = self._ready.popleft().result()
            self.waited_s += time.monotonic() - started
            self._ready.append(self._thread.submit(next, self._microbatches))
            batches.append(batch)
        self._step += 1
        return batches

    def _read_ahead(self) -> Iterator[tuple[LatentBatch, PackPosition]]:
        """Microbatches for ever, each with the position after its step; runs in the background thread."""
        self._stream.seek(self._step, self._position)
        while True:
            packs = self._stream.next()
            position = self._stream.position
            for number in range(self._per_step):
                first = self._first_pack + number * self._micro
                chosen = packs[first : first + self._micro]
                batch = self._batch([[self._entry(slot.draw, slot.start) for slot in slots] for slots in chosen])
                yield batch, position

    def _entry(self, draw: int, start: int) -> _Entry:
        index, sample = self._reader.read(self._order.substitutes(draw))
        return _Entry(draw, index, start, sample, self._drops_caption(draw))

    def _batch(self, packs: Sequence[Sequence[_Entry]]) -> LatentBatch:
        channels, volume = self.source.tokenizer.channels, self._model.patch_volume
        further = self._model.in_channels - channels
        clean_BTP = torch.zeros(len(packs), self._pack_tokens, channels * volume)
        condition_BTP = torch.zeros(len(packs), self._pack_tokens, further * volume) if further else None
        tables, all_given = [], []
        for row, entries in enumerate(packs):
            clips = []
            for entry in entries:
                _, frames, height, width = entry.sample.shape
                grid = token_grid(frames, height, width, self._patch_size)
                given = given_of(entry.sample, self._model, self.source.tokenizer.temporal)
                rate = entry.sample.frame_rate
                clip = Clip(entry.draw, entry.index, entry.start, grid, rate, known=given.frames)
                here = row, slice(clip.start, clip.start + clip.tokens)
                clean_BTP[here] = patchify(entry.sample.latents_CFHW.float(), self._patch_size)
                if condition_BTP is not None and given.channels_CFHW is not None:
                    condition_BTP[here] = patchify(given.channels_CFHW, self._patch_size)
                clips.append(clip)
                all_given.append(given)
            tables.append(Pack(tuple(clips), self._pack_tokens))
        text_GLD = self._text([entry for entries in packs for entry in entries])
        image_GLI, has_image_G = image_features(all_given, self._model)
        return LatentBatch(
            tuple(tables), clean_BTP, text_GLD,
            condition_BTP=condition_BTP, image_GLI=image_GLI, has_image_G=has_image_G,
        )  # fmt: skip

    def _text(self, entries: Iterable[_Entry]) -> Tensor:
        return torch.stack([self._text_of(entry) for entry in entries])

    def _text_of(self, entry: _Entry) -> Tensor:
        sample = entry.sample
        if entry.is_dropped or not sample.caption:
            return self.features([""])[0]
        if sample.text_LD is not None:
            return self.features.padded(sample.text_LD)
        return self.features([sample.caption])[0]

    def validation_batches(self) -> Iterator[LatentBatch]:
        """The held-out clips, in batches of ``train.micro_batch_size`` packs, the same on every rank.

        ``Clip.draw`` is the number of the clip among the held-out ones. No caption is dropped, damaged
        clips are left out, and the last batch is filled up with packs that hold no clip.
        """
        shapes = [self.source.shape(index) for index in self._held_out]
        tokens = [tokens_of(shape, self._patch_size, self.source.name) for shape in shapes]
        packs = next_fit(tokens, self._pack_tokens)
        for first in range(0, len(packs), self._micro):
            entries: list[list[_Entry]] = []
            for places in packs[first : first + self._micro]:
                read = [(draw, start, self._reader.read_sound(self._held_out[draw])) for draw, start in places]
                entries.append(
                    [_Entry(draw, self._held_out[draw], start, sample) for draw, start, sample in read if sample]
                )
            entries += [[]] * (self._micro - len(entries))
            if any(entries):
                yield self._batch(entries)

    def validation_samples(self) -> Iterator[Sample]:
        """The held-out clips that are sound."""
        samples = (self._reader.read_sound(index) for index in self._held_out)
        return (sample for sample in samples if sample is not None)

    def validation_captions(self) -> list[str]:
        """Captions of the held-out clips that are sound."""
        return [sample.caption for sample in self.validation_samples()]

    def close(self) -> None:
        """Stop the background reader and close files."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ready.clear()
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
