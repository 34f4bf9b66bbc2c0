"""One ``megavid convert``: a model, or the two experts of a pipeline, from any layout to any other.

Owns what the command line asks for, where each model goes in the new folder, and what is said of tensors that stay
behind.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from megavid.checkpoint.convert import pipeline
from megavid.checkpoint.convert.adapter import open_adapter
from megavid.checkpoint.convert.configs import config_json
from megavid.checkpoint.convert.journal import JOURNAL
from megavid.checkpoint.convert.pipeline import EXPERTS, ORIGINAL_EXPERTS
from megavid.checkpoint.convert.shards import OpenFiles, open_shards
from megavid.checkpoint.convert.source import MOMENTS, TRAINING, ModelSource, open_model
from megavid.checkpoint.convert.target import MAX_SHARD_BYTES, plan_target
from megavid.checkpoint.convert.write import (
    ASKED,
    Progress,
    clear_folder,
    layout_for,
    new_folder,
    refuse_existing,
    write_model,
)
from megavid.config.schema import ModelConfig, MoEConfig
from megavid.errors import ConfigError

Check = Callable[[ModelSource, Path], None]
"""Called with a source and the folder that was made of it, before that gets its name; raises to call it off."""


@dataclass(frozen=True, slots=True)
class ConvertRequest:
    """What the command line asks for; "" and 0 stand for "not given".

    Attributes:
        src: a model or a pipeline.
        dst: must not exist.
        to: layout of the target.
        command: the command line, for conversion.json.
        dtype: number format of the matrices; None for as stored.
        dtype_of: a folder whose tensors' number formats are taken.
        use_ema: take the moving average for the weights.
        keep_optimizer: keep what a run goes on from: Adam's moments, FP8 histories (megavid to megavid).
        max_shard_bytes: size at which a new file begins.
        base: a pipeline whose other parts are copied.
        second: the low-noise expert.
        boundary: between the two, timestep / 1000 after the shift.
        lora: an adapter to merge: a file in the naming of PEFT and diffusers, or its folder.
        lora_scale: factor on it.
    """

    src: Path
    dst: Path
    to: str
    command: str = ""
    dtype: torch.dtype | None = None
    dtype_of: str = ""
    use_ema: bool = False
    keep_optimizer: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    base: str = ""
    second: str = ""
    boundary: float = 0.0
    lora: str = ""
    lora_scale: float = 1.0


@dataclass(frozen=True)
class ConvertJob:
    """A request, its sources opened and checked for names and shapes.

    Attributes:
        request: what was asked.
        sources: one, or the high-noise and the low-noise expert.
        folders: where each goes, relative to the target; "" for the target itself.
        boundary: between the two experts; None for one model.
    """

    request: ConvertRequest
    sources: Sequence[ModelSource]
    folders: Sequence[str]
    boundary: float | None

    @classmethod
    def of(cls, request: ConvertRequest) -> "ConvertJob":
        """Open everything.

        Raises:
            MegavidError: of the kind that fits; nothing was written.
        """
        refuse_existing(request.dst)
        weights = "ema" if request.use_ema else "model"
        sources = [open_model(path, weights=weights) for path in _model_folders(request)]
        _refuse_unread(request, sources)
        if request.lora:
            adapter = open_adapter(Path(request.lora), sources[0].config)
            sources = [sources[0].with_adapter(adapter, request.lora_scale)]
        boundary = None
        if len(sources) == 2:
            _refuse_unlike(sources)
            boundary = _boundary(request, sources)
            sources = [_within(sources[0], sigma_min=boundary), _within(sources[1], sigma_max=boundary)]
        names = ORIGINAL_EXPERTS if request.to == "original" else EXPERTS
        folders = [""] if len(sources) == 1 and not request.base else list(names[: len(sources)])
        job = cls(request, sources, folders, boundary)
        for source in sources:
            plan_target(source, layout_for(source, request.to), **job._options())
        if request.base:
            _shift(sources)
            _refuse_part_of_levels(sources)
            pipeline.index_of(pipeline.base_parts(Path(request.base)), [s.config for s in sources], boundary)
        return job

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        to = self.request.to
        return sum(plan_target(source, layout_for(source, to), **self._options()).nbytes for source in self.sources)

    def _options(self) -> dict[str, Any]:
        request = self.request
        return {
            "dtype": request.dtype,
            "dtype_of": _formats(request),
            "max_shard_bytes": request.max_shard_bytes,
            "keep": ("ema/", *(TRAINING if request.keep_optimizer else ())) if not request.use_ema else (),
        }

    def notices(self) -> Iterator[str]:
        """What a user should know of the sources, and what of them is not in the target, a line each."""
        for source in self.sources:
            yield from source.notes
            target = plan_target(source, layout_for(source, self.request.to), **self._options())
            kinds: dict[str, int] = {}
            for name in source.extra.keys() - target.tensors.keys():
                kind = name.partition("/")[0]
                kinds[kind] = kinds.get(kind, 0) + 1
            if kinds:
                told = ", ".join(f"{count} tensors of {kind}" for kind, count in sorted(kinds.items()))
                yield f"{source.path}: not in the target: {told}"

    def run(self, *, progress: Progress = lambda count: None, check: Check | None = None) -> None:
        """Convert; raises as ``write_model``."""
        request = self.request
        if self.folders == [""]:
            self._write(self.sources[0], request.dst, progress, check)
            return
        with new_folder(request.dst, ASKED) as (partial, note):
            self._take_up(partial, note)
            for source, name in zip(self.sources, self.folders, strict=True):
                if (partial / name).exists():  # whole, else it would have another name
                    (partial / name / JOURNAL).unlink(missing_ok=True)
                    progress(plan_target(source, layout_for(source, request.to), **self._options()).nbytes)
                else:
                    self._write(source, partial / name, progress, check)
            if request.to == "diffusers":
                models = [source.config for source in self.sources]
                base = pipeline.base_parts(Path(request.base)) if request.base else None
                index = pipeline.index_of(base, models, self.boundary)
                if base is not None:
                    pipeline.copy_parts(Path(request.base), index, partial)
                    if (shift := _shift(self.sources)) is not None:
                        pipeline.write_shift(partial, shift)
                pipeline.write_index(partial, index)

    def _write(self, source: ModelSource, dst: Path, progress: Progress, check: Check | None) -> None:
        write_model(
            source,
            dst,
            to=self.request.to,
            command=self.request.command,
            progress=progress,
            check=(lambda folder: check(source, folder)) if check else None,
            **self._options(),
        )

    def _take_up(self, partial: Path, note: IO[bytes]) -> None:
        """Go on with what an interrupted run of the same request has done, or begin anew."""
        base = pipeline.base_identity(Path(self.request.base)) if self.request.base else []
        facts = [self.request.command, *(source.identity for source in self.sources), base]
        asked = hashlib.sha256(json.dumps(facts).encode()).hexdigest().encode()
        note.seek(0)
        if note.read() != asked:
            clear_folder(partial)
            note.truncate(0)
            note.write(asked)
            note.flush()


def _model_folders(request: ConvertRequest) -> list[Path]:
    """The folders of the one model, or of the two experts."""
    src = request.src
    for names in (EXPERTS, ORIGINAL_EXPERTS):
        if all((src / name).is_dir() for name in names):
            if request.second:
                raise ConfigError(
                    f"--second {request.second}: {src} holds two experts already; give one of them as SRC"
                )
            return [src / name for name in names]
    return [src, Path(request.second)] if request.second else [src]


def _refuse_unread(request: ConvertRequest, sources: Sequence[ModelSource]) -> None:
    """Refuse options that would do nothing here."""
    is_pair = len(sources) == 2
    if request.boundary and not is_pair:
        raise ConfigError(
            f"--boundary {request.boundary:g} stands between two experts; give the low-noise one: --second"
        )
    if request.base and request.to != "diffusers":
        raise ConfigError(f"--pipeline {request.base} goes with --to diffusers only, got --to {request.to}")
    is_resave = request.to == "megavid" and all(source.layout == "megavid" for source in sources)
    if request.keep_optimizer and not is_resave:
        raise ConfigError("--optimizer goes from megavid to megavid only: no other layout has a place for it")
    if request.keep_optimizer and not all(any(n.startswith(MOMENTS) for n in source.extra) for source in sources):
        raise ConfigError(f"--optimizer: {request.src} has no moments of the whole model to keep; leave it out")
    if request.keep_optimizer and request.use_ema:
        raise ConfigError("--optimizer and --ema exclude each other: the moments belong to the weights")
    if request.lora and is_pair:
        raise ConfigError(f"--lora {request.lora}: an adapter is of one expert; convert the two apart, then --second")
    if request.lora_scale != 1.0 and not request.lora:
        raise ConfigError(f"--lora-scale {request.lora_scale:g} needs --lora FILE, the adapter that it is a factor on")
    if request.lora and request.keep_optimizer:
        raise ConfigError("--optimizer and --lora exclude each other: the moments belong to the weights without it")
    if request.dtype is not None and request.dtype_of:
        raise ConfigError("--dtype and --dtype-of exclude each other")
    if request.dtype_of and request.to == "megavid":
        raise ConfigError("--dtype-of goes by the names of --to diffusers or original; with --to megavid give --dtype")
    if request.keep_optimizer and request.dtype is not None:
        raise ConfigError("--optimizer goes with the weights as stored; leave --dtype out")


def _refuse_unlike(sources: Sequence[ModelSource]) -> None:
    """Raise ``ConfigError`` for two experts that are not of one shape, which no published pair is."""
    high, low = (_computed(source.config) for source in sources)
    key = next((key for key in high if high[key] != low[key]), None)
    if key is not None:
        raise ConfigError(
            f"the two experts are different models: {key} = {high[key]!r} in {sources[0].path}, {low[key]!r} in "
            f"{sources[1].path}; a pipeline switches between two of one shape"
        )


def _computed(model: ModelConfig) -> dict[str, Any]:
    """What decides what a model computes; how its router is trained does not."""
    shown = model if model.family == "wan_moe" else replace(model, moe=MoEConfig())
    image_length = model.image_length if model.image_size else 0
    return {**config_json(shown, "inference"), "task": model.task, "image_length": image_length}


def _boundary(request: ConvertRequest, sources: Sequence[ModelSource]) -> float:
    """Between two experts: as given, and as the sources say; they must agree."""
    high, low = (source.run.diffusion for source in sources)
    told = {
        f"--boundary {request.boundary:g}": request.boundary,
        f"sigma_min of {sources[0].path}": high.sigma_min,
        f"sigma_max of {sources[1].path}": low.sigma_max if low.sigma_max < 1 else 0.0,
    }
    known = {what: value for what, value in told.items() if value}
    if not known:
        raise ConfigError(
            "--boundary X is missing: where inference switches between the experts, timestep / 1000 after the shift "
            "(Wan 2.2: 0.875 for text-to-video, 0.9 for image-to-video)"
        )
    if len(set(known.values())) > 1:
        raise ConfigError(f"the boundary between the experts is told twice: {', '.join(known)}: {[*known.values()]}")
    for source, is_wrong in zip(sources, (high.sigma_max < 1, low.sigma_min > 0), strict=True):
        if is_wrong:
            raise ConfigError(
                f"{source.path} was trained on noise levels {source.run.diffusion.sigma_min:g} to "
                f"{source.run.diffusion.sigma_max:g}: SRC must be the high-noise expert, --second the low-noise one"
            )
    return pipeline.check_boundary(next(iter(known.values())), "--boundary")


def _shift(sources: Sequence[ModelSource]) -> float | None:
    """The shift of noise levels that runs trained with, for the pipeline's scheduler; None where none was trained.

    Raises:
        ConfigError: two experts differ in it, or it follows the size of the clip.
    """
    trained = [source.run.diffusion for source in sources if source.is_trained]
    told = {diffusion.flow_shift for diffusion in trained}
    if len(told) > 1:
        raise ConfigError(
            f"the experts were trained with diffusion.flow_shift = {' and '.join(f'{shift:g}' for shift in told)}; "
            "the one scheduler of a pipeline has one shift"
        )
    if any(diffusion.shift_reference_tokens for diffusion in trained):
        raise ConfigError(
            "--pipeline: this run's shift follows the size of the clip (diffusion.shift_reference_tokens > 0), a "
            "pipeline's scheduler has one; convert without --pipeline and set the shift of each size where it is served"
        )
    return next(iter(told), None)


def _refuse_part_of_levels(sources: Sequence[ModelSource]) -> None:
    """Raise ``ConfigError`` for a pipeline of one expert alone: nothing would say that it is half a model."""
    levels = sources[0].run.diffusion
    if len(sources) == 1 and not levels.has_all_levels:
        raise ConfigError(
            f"{sources[0].path} was trained on noise levels {levels.sigma_min:g} to {levels.sigma_max:g} only, and "
            "cannot sample alone; give the other expert with --second"
        )


def _within(source: ModelSource, **levels: Any) -> ModelSource:
    return replace(source, run=replace(source.run, diffusion=replace(source.run.diffusion, **levels)))


def _formats(request: ConvertRequest) -> Mapping[str, torch.dtype] | None:
    """Number format of every tensor of the folder that ``--dtype-of`` names."""
    if not request.dtype_of:
        return None
    files = OpenFiles()
    return {name: tensor.dtype for name, tensor in open_shards(Path(request.dtype_of), files).items()}
