"""A model in model space, lazily: what every layout is read into and written from.

Owns ``ModelSource`` and ``open_model``, which finds out what lies in a folder: a megavid checkpoint, a transformer of
diffusers or of megavid.inference, or the original files of Wan. Opening checks names, shapes and sizes of files; the
bytes are checked as they are read, and by ``ModelSource.verify`` where a manifest has hashes of files.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megavid.checkpoint import Checkpoint, SingleRank, resolve
from megavid.checkpoint.base import BASE, Base
from megavid.checkpoint.convert.adapter import Adapter, merged, saved_adapter
from megavid.checkpoint.convert.configs import Layout, Recorded, layout_of_class, model_of
from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.checkpoint.convert.ledger import Ledger
from megavid.checkpoint.convert.pipeline import EXPERTS, ORIGINAL_EXPERTS, surroundings
from megavid.checkpoint.convert.record import RECORD, Record, parse_record, read_record
from megavid.checkpoint.convert.saved import run_of, saved_tensors
from megavid.checkpoint.convert.shards import OpenFiles, open_shards
from megavid.checkpoint.convert.tables import (
    DIFFUSERS,
    INFERENCE,
    KEPT_FP32,
    ORIGINAL,
    Row,
    check_same_tensors,
    expected_tensors,
    matches,
    to_model_space,
)
from megavid.checkpoint.files import reading
from megavid.checkpoint.format import LATEST, MANIFEST
from megavid.checkpoint.manifest import decode
from megavid.config.load import from_table
from megavid.config.schema import (
    DiffusionConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
)
from megavid.errors import CheckpointError, ConfigError
from megavid.parallel.fragment import HISTORY

CONFIG = "config.json"
TABLES: dict[Layout, tuple[Row, ...]] = {"diffusers": DIFFUSERS, "inference": INFERENCE, "original": ORIGINAL}

BUFFER = "buffer/"
MOMENTS = ("exp_avg/", "exp_avg_sq/")
NOT_KIT = ("index.json", "state.json", "run.toml", RECORD, BASE)
"""Small files of a checkpoint that do not go along to another one."""
TRAINING = (*MOMENTS, HISTORY)
"""What only the run that saved it goes on from."""
KINDS = ("model/", "ema/", *TRAINING)
"""Beginnings of the full names of what a run saves beside ``BUFFER``."""


@dataclass(frozen=True)
class ModelSource:
    """A model that has not been read.

    Attributes:
        run: what run.toml says of it; ``config`` is its table ``model``.
        tensors: all of them, by name in model space, in the order of the model; routers' bias included.
        path: the folder it is read from.
        layout: how the tensors are laid out there.
        ledger: digests of the source's own tensors, known ones and those found while reading.
        extra: further tensors of a megavid checkpoint by their full names: ``ema/...``, ``exp_avg/...``.
        files: small files that go along to another megavid checkpoint: tokenizer and vocabulary for sampling.
        state: state.json of a megavid checkpoint.
        identity: changes when a file of the source does.
        check: reads what must be checked before anything is written; see ``verify``.
        notes: what a user should know of it, a line each.
        adapters: what was merged into the tensors of the files, with the factor on it.
        is_trained: a run of megavid has trained it, with what ``run`` says; a converted model has not been.
    """

    run: RunConfig
    tensors: Mapping[str, LazyTensor]
    path: Path
    layout: Layout
    ledger: Ledger
    extra: Mapping[str, LazyTensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""
    check: Callable[[], None] = lambda: None
    notes: tuple[str, ...] = ()
    adapters: tuple[tuple[Adapter, float], ...] = ()
    is_trained: bool = False

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.run.model

    def verify(self) -> None:
        """Check every file against the manifest, where there is one; files are read once for it.

        Raises:
            CheckpointError: one is missing or damaged.
        """
        self.check()

    def with_model(self, config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> "ModelSource":
        """Another model made of this one's tensors, such as an upcycled one; what hung on the old model is left out."""
        return replace(self, run=replace(self.run, model=config), tensors=tensors, extra={}, state={})

    def with_adapter(self, adapter: Adapter, factor: float = 1.0) -> "ModelSource":
        """The model with ``factor`` times an adapter merged into its matrices; what hung on the old one is left out."""
        tensors = merged(self.tensors, adapter, self.ledger, factor)
        identity = hashlib.sha256(json.dumps([self.identity, adapter.identity, factor]).encode()).hexdigest()
        times = "" if factor == 1.0 else f", times {factor:g}"
        note = f"{adapter.where}: adapters of {len(adapter.pairs)} matrices are merged into {self.path}{times}"
        return replace(
            self.with_model(self.config, tensors),
            identity=identity,
            notes=(*self.notes, note),
            adapters=(*self.adapters, (adapter, factor)),
        )


def open_model(path: Path, *, weights: str = "") -> ModelSource:
    """The model in a folder, whatever its layout.

    Args:
        path: a megavid checkpoint (or the run, or its checkpoints), or a folder with config.json and safetensors files.
        weights: of a megavid checkpoint: "model", "ema" for the moving average, "" for the model's.

    Raises:
        CheckpointError: nothing that convert reads is there, a tensor is missing, unexpected or of another shape, a
            file is cut off, or there is no moving average.
    """
    path = Path(path)
    parts = [name for name in (*EXPERTS, *ORIGINAL_EXPERTS) if (path / name).is_dir()]
    if len(parts) > 1:
        raise CheckpointError(f"{path} holds {len(parts)} transformers; give one of them, such as {path / parts[0]}")
    if parts and not (path / MANIFEST).is_file():
        path = path / parts[0]
    if (path / CONFIG).is_file() and not (path / MANIFEST).is_file():
        if weights == "ema":
            raise CheckpointError(f"{path} is no megavid checkpoint and has no moving average; leave --ema out")
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    is_checkpoint = (path / MANIFEST).is_file() or (path / "checkpoints").is_dir() or path.name == LATEST
    if not is_checkpoint and not (path / LATEST).exists() and not path.name.startswith("step_"):
        raise CheckpointError(
            f"{path} holds no {CONFIG} of a transformer and no megavid checkpoint ({MANIFEST}); "
            "give the folder that has one of them"
        )
    return open_checkpoint(resolve(path), weights or "model")


def _open_folder(path: Path) -> ModelSource:
    """A transformer in a layout of inference stacks."""
    where = str(path / CONFIG)
    with reading(path / CONFIG):
        content = (path / CONFIG).read_bytes()
    fields = decode(content, path / CONFIG)
    layout, record, files = layout_of_class(fields, where), read_record(path), OpenFiles()
    raw = open_shards(path, files)
    around = surroundings(path)
    model = model_of(fields, raw, Recorded({**around.model, **(record.model if record else {})}), where)
    _check_floating(raw)
    check_record(record, raw, path)
    ledger = Ledger(record.digests if record else {})
    watched = {key: ledger.watch(key, tensor) for key, tensor in raw.items()}
    tensors = to_model_space(model, TABLES[layout], watched, str(path))
    run = RunConfig(
        model=model,
        precision=PrecisionConfig(dtype=_precision(tensors)),
        optimizer=OptimizerConfig(ema_decay=0.0),
        diffusion=_diffusion({**(record.diffusion if record else {}), **around.diffusion}, path),
    )
    return ModelSource(run, tensors, path, layout, ledger, identity=_identity(path, ["*.safetensors", "*.json"]))


def _diffusion(table: dict[str, Any], path: Path) -> DiffusionConfig:
    """What stands beside the weights of noise levels; raises ``CheckpointError`` for what cannot be."""
    try:
        return from_table(DiffusionConfig, table, "diffusion")
    except ConfigError as error:
        raise CheckpointError(f"{path / RECORD}: {error}") from error


def open_checkpoint(folder: Path, weights: str) -> ModelSource:
    """The model in the folder of a megavid checkpoint, finished or not; raises as ``open_model``."""
    checkpoint = Checkpoint(folder)
    if BASE in checkpoint.manifest.files:
        return _open_adapted(checkpoint, weights)
    run = run_of(checkpoint, weights)
    saved = saved_tensors(checkpoint, OpenFiles())
    record: Record | None = None
    if RECORD in checkpoint.manifest.files:
        record = parse_record(checkpoint.read(RECORD), folder / RECORD)
        check_record(record, saved, folder)
    ledger = Ledger(record.digests if record else {})
    expected = expected_tensors(run.model)
    full = {name: _full_name(name, weights) for name in expected}
    own = {full[name]: shape for name, shape in expected.items()}
    prefixes = (f"{weights}/", BUFFER)
    check_same_tensors(own, {name: saved[name] for name in saved if name.startswith(prefixes)}, str(folder))
    tensors = {name: ledger.watch(full[name], saved[full[name]]) for name in expected}
    extra = {name: tensor for name, tensor in saved.items() if name not in own}
    strange = [name for name in extra if not name.startswith(KINDS)]
    if strange:
        raise CheckpointError(f"{folder} holds tensor {strange[0]} ({len(strange)} such), of a kind unknown to convert")
    _check_floating(saved)
    kit = {
        name: checkpoint.read(name)
        for name in checkpoint.manifest.files
        if name not in NOT_KIT and not name.endswith(".safetensors")
    }
    return ModelSource(
        run=run,
        tensors=tensors,
        path=folder,
        layout="megavid",
        ledger=ledger,
        extra=extra,
        files=kit,
        state=checkpoint.state,
        identity=_identity(folder, ["*"]),
        check=lambda: checkpoint.verify(SingleRank()),
        is_trained=checkpoint.state.get("updates", 0) > 0,
    )


def _open_adapted(checkpoint: Checkpoint, weights: str) -> ModelSource:
    """The model of a run of adapters: its base, as the checkpoint names it, with the adapters merged into it."""
    known = Base.read(checkpoint)
    run = run_of(checkpoint, weights)
    base = open_checkpoint(known.open(run.train.init_from).folder, known.weights)
    source = base.with_adapter(saved_adapter(checkpoint, weights))

    def check() -> None:
        base.verify()
        checkpoint.verify(SingleRank())

    notes = source.notes
    if weights == "model" and run.optimizer.ema_decay > 0:
        notes = (
            *notes,
            f"{checkpoint.folder}: not in the target: the adapters' moving average, which can be taken instead",
        )
    kept = [name for name in checkpoint.manifest.files if name not in NOT_KIT and not name.endswith(".safetensors")]
    return replace(
        source,
        run=replace(run, lora=LoraConfig(), train=replace(run.train, init_from="")),
        path=checkpoint.folder,
        files={name: checkpoint.read(name) for name in kept},
        check=check,
        notes=notes,
        is_trained=True,
    )


def _full_name(name: str, weights: str) -> str:
    """Name in a checkpoint of a tensor in model space."""
    return BUFFER + name if name.endswith(".expert_bias") else f"{weights}/{name}"


def check_record(record: Record | None, tensors: Mapping[str, LazyTensor], where: Path) -> None:
    """Check that a conversion.json speaks of the tensors beside it; their bytes are checked when they are read.

    Raises:
        CheckpointError: it lists others.
    """
    if record is not None:
        told = {name: note.shape for name, note in record.tensors.items()}
        check_same_tensors(told, tensors, f"{where} ({RECORD})")


def _check_floating(tensors: Mapping[str, LazyTensor]) -> None:
    for tensor in tensors.values():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:  # float8 has scales of its own
            raise CheckpointError(f"{tensor.where} has dtype {tensor.dtype}: quantised weights cannot be converted")


def _precision(tensors: Mapping[str, LazyTensor]) -> Any:
    """``precision.dtype`` that fits the matrices as they are stored."""
    wide = {torch.float32, torch.float64}
    matrices = {tensor.dtype for name, tensor in tensors.items() if not matches(name, KEPT_FP32)}
    return "fp32" if matrices & wide else "bf16"


def _identity(folder: Path, patterns: list[str]) -> str:
    """A digest of the names, sizes and times of a source's files; the time of the last change of any kind, which
    nobody can set back, is among them.
    """
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in files]
    return hashlib.sha256(json.dumps([str(folder.resolve()), facts]).encode()).hexdigest()
