"""What a conversion will write: every file, and where every tensor lies in it, before a byte is read.

Owns the layouts on disk: shards and index of diffusers and of the original files, and the checkpoint folder of
megavid. Sizes follow from shapes alone, so an interrupted conversion finds its place again.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megavid import __version__
from megavid.checkpoint.convert.configs import Layout, config_json
from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.checkpoint.convert.source import BUFFER, CONFIG, TABLES, ModelSource
from megavid.checkpoint.convert.tables import (
    ALWAYS_FP32,
    KEPT_FP32,
    check_same_tensors,
    expected_tensors,
    links,
    matches,
)
from megavid.checkpoint.files import FileRecord
from megavid.checkpoint.format import DIGEST, INDEX, MANIFEST, RUN, STATE, code_of, entry_name, header, tensor_file
from megavid.checkpoint.index import Index, SavedBox
from megavid.checkpoint.manifest import Manifest, digest_text, versions_here
from megavid.config.load import dump_toml
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError
from megavid.parallel.fragment import Box

SHARD = "diffusion_pytorch_model"
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class TargetFile:
    """One tensor file to be.

    Attributes:
        name: in the folder.
        head: the bytes before the data.
        tensors: its tensors by name, in the order of their bytes.
    """

    name: str
    head: bytes
    tensors: Mapping[str, LazyTensor]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Target:
    """A folder to be.

    Attributes:
        layout: its layout.
        run: the config that a megavid checkpoint carries.
        files: tensor files.
        state: state.json of a megavid checkpoint.
        kit: further files of a megavid checkpoint.
    """

    layout: Layout
    run: RunConfig
    files: Sequence[TargetFile]
    state: Mapping[str, Any]
    kit: Mapping[str, bytes]

    @property
    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor by its name in the target."""
        return {name: tensor for file in self.files for name, tensor in file.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensor files."""
        return sum(file.size for file in self.files)

    def small_files(self, written: Mapping[str, FileRecord], record: tuple[str, bytes]) -> dict[str, bytes]:
        """The files beside the tensors, in the order in which they are to be written.

        Args:
            written: size and digest of every tensor file.
            record: name and content of conversion.json.
        """
        if self.layout == "megavid":
            return _checkpoint_files(self, written, record)
        small = dict([record])
        small[CONFIG] = _pretty(config_json(self.run.model, self.layout))
        if len(self.files) > 1:
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            where = {name: file.name for file in self.files for name in file.tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            small[f"{SHARD}.safetensors.index.json"] = _pretty(index)
        return small


def plan_target(
    source: ModelSource,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    dtype_of: Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    keep: Sequence[str] = (),
) -> Target:
    """Decide every byte's place.

    Args:
        source: the model.
        layout: how to write it.
        dtype: number format of the matrices; what the engine holds in fp32 stays fp32. None for as stored.
        dtype_of: number format by name in the target, in place of ``dtype``.
        max_shard_bytes: begin a new file beyond this.
        keep: beginnings of full names of further tensors to keep (megavid to megavid), such as "ema/".

    Raises:
        ConfigError: the layout cannot hold this model.
        CheckpointError: it has no name for a tensor, or the source lacks one.
    """
    check_same_tensors(expected_tensors(source.config), source.tensors, str(source.path))
    if layout == "megavid":
        tensors = {_saved_name(name): tensor for name, tensor in _converted(source.tensors, dtype).items()}
        for name, tensor in source.extra.items():
            if name.startswith(tuple(keep)):
                tensors[name] = source.ledger.watch(name, tensor)
    else:
        config_json(source.config, layout)  # refuses what the layout has no word for
        converted = _converted(source.tensors, dtype)
        tensors = {link.other: link.from_model(converted) for link in links(source.config, TABLES[layout])}
    if dtype_of is not None:
        unknown = [name for name in tensors if name not in dtype_of]
        if unknown:
            raise ConfigError(
                f"--dtype-of has no tensor {unknown[0]} ({len(unknown)} such); give a folder of this model"
            )
        fp32 = {link.other for link in links(source.config, TABLES[layout]) if matches(link.names[0], ALWAYS_FP32)}
        tensors = {name: t if name in fp32 else t.to(dtype_of[name]) for name, t in tensors.items()}
    groups = _cut(tensors, max_shard_bytes)
    names = [tensor_file(0, n) if layout == "megavid" else _shard_name(n, len(groups)) for n in range(len(groups))]
    files = [
        TargetFile(name, _head(group, layout, int(source.state.get("step", 0))), group)
        for name, group in zip(names, groups, strict=True)
    ]
    return Target(layout, _run_of(source, keep), files, source.state, source.files)


def _run_of(source: ModelSource, keep: Sequence[str]) -> RunConfig:
    """run.toml's config: as the source's, with a moving average only if the target has one."""
    if "ema/" in keep and any(name.startswith("ema/") for name in source.extra):
        return source.run
    return replace(source.run, optimizer=replace(source.run.optimizer, ema_decay=0.0))


def _converted(tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Tensors in model space in the number formats in which they are to be written."""
    result = {}
    for name, tensor in tensors.items():
        if matches(name, ALWAYS_FP32):
            result[name] = tensor.to(torch.float32)
        elif dtype is None:
            result[name] = tensor
        else:
            result[name] = tensor.to(torch.float32 if matches(name, KEPT_FP32) else dtype)
    return result


def _saved_name(name: str) -> str:
    return (BUFFER if name.endswith(".expert_bias") else "model/") + name


def _cut(tensors: Mapping[str, LazyTensor], max_bytes: int) -> list[dict[str, LazyTensor]]:
    """Tensors by file, in the order of the model; in a file wide number formats first, so that all are aligned."""
    groups: list[dict[str, LazyTensor]] = []
    room = 0
    for name, tensor in tensors.items():
        if not groups or tensor.nbytes > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = tensor
        room -= tensor.nbytes
    return [dict(sorted(group.items(), key=lambda item: -item[1].dtype.itemsize)) for group in groups]


def _shard_name(number: int, count: int) -> str:
    return f"{SHARD}.safetensors" if count == 1 else f"{SHARD}-{number + 1:05d}-of-{count:05d}.safetensors"


def _whole(shape: tuple[int, ...]) -> Box:
    return Box((0,) * len(shape), shape)


def _head(tensors: Mapping[str, LazyTensor], layout: Layout, step: int) -> bytes:
    entries, at = [], 0
    for name, tensor in tensors.items():
        label = entry_name(name, _whole(tensor.shape)) if layout == "megavid" else name
        entries.append((label, code_of(tensor.dtype, name), tensor.shape, at, at + tensor.nbytes))
        at += tensor.nbytes
    if layout == "megavid":
        return header(entries, step)
    fields: dict[str, object] = {"__metadata__": {"format": "pt", "megavid": __version__}}
    for label, code, shape, start, stop in entries:
        fields[label] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pretty(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


# A megavid checkpoint


def _checkpoint_files(target: Target, written: Mapping[str, FileRecord], record: tuple[str, bytes]) -> dict[str, bytes]:
    rows: dict[str, tuple[str, tuple[int, ...], list[SavedBox]]] = {}
    for file in target.files:
        at = len(file.head)
        for name, tensor in file.tensors.items():
            rows[name] = (code_of(tensor.dtype, name), tensor.shape, [SavedBox(file.name, at, _whole(tensor.shape))])
            at += tensor.nbytes
    index = Index.of_boxes(dict(sorted(rows.items()))).to_json()
    small = {
        INDEX: json.dumps(index, separators=(",", ":")).encode(),
        STATE: (json.dumps(target.state or _fresh_state(target.run), indent=1) + "\n").encode(),
        RUN: dump_toml(target.run).encode(),
        **target.kit,
        record[0]: record[1],
    }
    known = {name: _facts(content) for name, content in small.items()}
    step = int(target.state.get("step", 0))
    manifest = Manifest(step, "converted", 1, versions_here(), {**written, **known}).to_bytes()
    return {**small, MANIFEST: manifest, DIGEST: digest_text(manifest)}


def _facts(content: bytes) -> FileRecord:
    return FileRecord(len(content), hashlib.sha256(content).hexdigest())


def _fresh_state(run: RunConfig) -> dict[str, Any]:
    """state.json of a model that no run has trained: it can start one (train.init_from), not go on with one."""
    counters = dict.fromkeys(("step", "updates", "skipped", "bad_in_a_row", "tokens", "clips"), 0)
    return {
        "format": 1,
        **counters,
        "random": {"generator": "philox4x32-10", "seed": run.train.seed},
        "loader": {},
        "versions": {"megavid": __version__, "torch": str(torch.__version__)},
    }
