"""Low-rank adapters as files: from a run's checkpoint or in the form of PEFT and diffusers, written, and merged.

Owns ``pytorch_lora_weights.safetensors`` (names, metadata, scales) and the sum ``W + scale * B A``, computed a few rows
at a time. What the other layouts call a matrix is ``megavid.checkpoint.convert.tables``'s.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megavid.checkpoint import Checkpoint
from megavid.checkpoint.base import manifest_digest
from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.checkpoint.convert.ledger import Ledger
from megavid.checkpoint.convert.saved import run_of, saved_tensors
from megavid.checkpoint.convert.shards import OpenFiles, open_file
from megavid.checkpoint.convert.tables import INFERENCE, check_same_tensors, links
from megavid.checkpoint.files import replace_bytes, storage_errors
from megavid.config.schema import ModelConfig
from megavid.errors import CheckpointError
from megavid.plan.adapters import adapter_tensors

ADAPTER = "pytorch_lora_weights.safetensors"
"""The file's name, where diffusers looks for it."""
PREFIX = "transformer."
"""Before every name: which part of a pipeline it belongs to."""
METADATA = "lora_adapter_metadata"
"""Key of the file's metadata under which diffusers keeps the fields of PEFT's LoraConfig, as JSON."""
A, B, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"


@dataclass(frozen=True)
class Pair:
    """The adapter of one matrix: it adds ``scale * B A``.

    Attributes:
        a: [rank, input].
        b: [output, rank].
        scale: alpha / rank.
    """

    a: LazyTensor
    b: LazyTensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """Adapters of a model.

    Attributes:
        model: the model's shape.
        pairs: by the name of their matrix in model space, without ``.weight``.
        where: folder or file, for messages.
        identity: changes when the file does.
    """

    model: ModelConfig
    pairs: Mapping[str, Pair]
    where: Path
    identity: str = ""

    def write(self, folder: Path) -> Path:
        """Write to ``folder`` what diffusers' ``load_lora_weights`` and ``load_lora_adapter`` take; returns the file.

        Raises:
            StorageError: the storage failed; a former file stands.
        """
        names = names_in_diffusers(self.model)
        tensors: dict[str, Tensor] = {}
        for matrix, pair in self.pairs.items():
            tensors[PREFIX + names[matrix] + A] = pair.a.read()
            tensors[PREFIX + names[matrix] + B] = pair.b.read()
        (rank,) = {pair.a.shape[0] for pair in self.pairs.values()}
        (scale,) = {pair.scale for pair in self.pairs.values()}
        fields: dict[str, Any] = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": scale * rank,
            "target_modules": sorted(names[matrix] for matrix in self.pairs),
            "lora_bias": False,
            "use_dora": False,
            "use_rslora": False,
        }
        fields = {PREFIX + key: value for key, value in fields.items()}
        metadata = {"format": "pt", METADATA: json.dumps(fields, indent=2, sort_keys=True)}
        with storage_errors("create", folder):
            folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(folder / ADAPTER, save(tensors, metadata))
        return folder / ADAPTER


def names_in_diffusers(model: ModelConfig) -> dict[str, str]:
    """What diffusers calls each module with a weight, by its name in model space."""
    return {
        link.names[0].removesuffix(".weight"): link.other.removesuffix(".weight")
        for link in links(model, INFERENCE)
        if link.transform == "same" and link.other.endswith(".weight")
    }


def saved_adapter(checkpoint: Checkpoint, weights: str) -> Adapter:
    """The adapters in a checkpoint of a run that trains them.

    Args:
        checkpoint: of the run.
        weights: "model", or "ema" for their moving average.

    Raises:
        CheckpointError: it has not those that its config asks for, or no moving average.
    """
    run = run_of(checkpoint, weights)
    expected = {f"{weights}/{name}": shape for name, shape in adapter_tensors(run.model, run.lora).items()}
    saved = saved_tensors(checkpoint, OpenFiles())
    check_same_tensors(
        expected, {n: t for n, t in saved.items() if n.startswith(f"{weights}/")}, str(checkpoint.folder)
    )
    stems = [name.removesuffix(A) for name in expected if name.endswith(A)]
    pairs = {stem.partition("/")[2]: Pair(saved[stem + A], saved[stem + B], run.lora.scale) for stem in stems}
    return Adapter(run.model, pairs, checkpoint.folder, manifest_digest(checkpoint.folder))


def open_adapter(path: Path, model: ModelConfig) -> Adapter:
    """An adapter file in the naming of PEFT and diffusers, or the folder that holds one.

    Args:
        path: the file, or a folder with ``ADAPTER`` in it.
        model: what it is to be added to.

    Raises:
        CheckpointError: the file is missing or damaged, is of a kind that is not W + scale * B A, or has a tensor that
            the model has no matrix for.
    """
    file = path / ADAPTER if path.is_dir() else path
    found = open_file(file, OpenFiles())
    metadata = _metadata(file)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in found) else ""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    fields = {key.removeprefix(prefix): value for key, value in metadata.items()}
    for kind in ("use_dora", "lora_bias"):
        if fields.get(kind):
            raise CheckpointError(f"{file} has {kind} = {fields[kind]}: only W + scale * B A can be merged")
    names = {other: name for name, other in names_in_diffusers(model).items()}
    modules = {key.removesuffix(A): key for key in tensors if key.endswith(A)}
    known = {module + suffix for module in modules for suffix in (A, B, ALPHA)}
    strange = [key for key in tensors if key not in known] + [f"{m}{A}" for m in modules if m not in names]
    if strange or not modules:
        told = f"tensor {strange[0]} ({len(strange)} such)" if strange else "no tensor"
        raise CheckpointError(
            f"{file} has {told} that this model has a place for; names are diffusers', such as "
            f"{PREFIX}blocks.0.attn1.to_q{A}"
        )
    shapes = {name.removesuffix(".weight"): shape for name, shape in _matrices(model).items()}
    pairs = {}
    for module in modules:
        if module + B not in tensors:
            raise CheckpointError(f"{file} has {module}{A} but no {module}{B}")
        a, b = tensors[module + A], tensors[module + B]
        outputs, inputs = shapes[names[module]]
        if (b.shape[0], *a.shape[1:]) != (outputs, inputs) or (a.shape[0],) != b.shape[1:]:
            raise CheckpointError(
                f"{file}: {module} has A {list(a.shape)} and B {list(b.shape)}, the matrix is {[outputs, inputs]}"
            )
        pairs[names[module]] = Pair(a, b, _scale(module, a.shape[0], fields, tensors))
    stat = file.stat()
    return Adapter(model, pairs, file, f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}")


def merged(
    tensors: Mapping[str, LazyTensor], adapter: Adapter, ledger: Ledger, factor: float = 1.0
) -> dict[str, LazyTensor]:
    """A model's tensors, its adapted matrices ``W + factor * scale * B A``, in fp32 and rounded to the format of W.

    Nothing is read yet; the adapters' digests are taken by the ledger of the model.
    """
    found = dict(tensors)
    for matrix, pair in adapter.pairs.items():
        a, b = (ledger.watch(matrix + suffix, tensor) for suffix, tensor in ((A, pair.a), (B, pair.b)))
        found[f"{matrix}.weight"] = _sum(found[f"{matrix}.weight"], Pair(a, b, factor * pair.scale))
    return found


def _sum(weight: LazyTensor, pair: Pair) -> LazyTensor:
    width, fetch = weight.shape[1], weight.fetch

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // width, -(-stop // width)
        product = pair.b.read_rows(first, last).float() @ pair.a.read().float()
        added = product.view(-1)[start - first * width : stop - first * width]
        return (fetch(start, stop).float() + pair.scale * added).to(weight.dtype)

    return replace(weight, fetch=rows, key="")


def _matrices(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of everything in model space that is a matrix."""
    return {name: shape for link in links(model, INFERENCE) for name, shape in [(link.names[0], link.shape)]}


def _metadata(file: Path) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that the file carries; none where diffusers infers them too."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA)
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file}: its {METADATA} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: its {METADATA} is no object")
    return fields


def _scale(module: str, rank: int, fields: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> float:
    """alpha / rank of one matrix: its own tensor, else the metadata's, else 1."""
    if module + ALPHA in tensors:
        return float(tensors[module + ALPHA].read()) / rank
    alpha = fields.get("lora_alpha", rank)
    for pattern, value in fields.get("alpha_pattern", {}).items():  # matched as PEFT does
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break  # the first that matches
    return float(alpha) / (math.sqrt(rank) if fields.get("use_rslora") else rank)
