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

from safetensors.torch import save
from torch import Tensor

from megavid.checkpoint import Checkpoint
from megavid.checkpoint.base import manifest_digest
from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.checkpoint.convert.ledger import Ledger
from megavid.checkpoint.convert.saved import run_of, saved_tensors
from megavid.checkpoint.convert.shards import OpenFiles, open_file
from megavid.checkpoint.convert.tables import INFERENCE, Link, check_same_tensors, links
from megavid.checkpoint.files import replace_bytes, storage_errors
from megavid.checkpoint.manifest import decode
from megavid.config.schema import ModelConfig
from megavid.errors import CheckpointError
from megavid.plan import adapters

ADAPTER = "pytorch_lora_weights.safetensors"
"""The file's name, where diffusers looks for it."""
PREFIX = "transformer."
"""Before every name: which part of a pipeline it belongs to."""
METADATA = "lora_adapter_metadata"
"""Key of the file's metadata under which diffusers keeps the fields of PEFT's LoraConfig, as JSON."""
A, B, ALPHA = f".{adapters.A}", f".{adapters.B}", ".alpha"


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


def matrix_links(model: ModelConfig) -> list[Link]:
    """Everything that an adapter can be of: matrices that lie in diffusers' layout as in model space."""
    return [
        link
        for link in links(model, INFERENCE)
        if link.transform == "same" and link.other.endswith(".weight") and len(link.shape) == 2
    ]


def names_in_diffusers(model: ModelConfig) -> dict[str, str]:
    """What diffusers calls each module with a matrix, by its name in model space."""
    return {link.names[0].removesuffix(".weight"): link.other.removesuffix(".weight") for link in matrix_links(model)}


def saved_adapter(checkpoint: Checkpoint, weights: str) -> Adapter:
    """The adapters in a checkpoint of a run that trains them.

    Args:
        checkpoint: of the run.
        weights: "model", or "ema" for their moving average.

    Raises:
        CheckpointError: it has not those that its config asks for, or no moving average.
    """
    run = run_of(checkpoint, weights)
    expected = {f"{weights}/{name}": shape for name, shape in adapters.adapter_tensors(run.model, run.lora).items()}
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
    found, metadata = open_file(file, OpenFiles())
    text = metadata.get(METADATA)  # without it diffusers infers the fields too
    given = decode(str(text).encode(), Path(f"{file} ({METADATA})")) if text is not None else {}
    prefix = PREFIX if any(key.startswith(PREFIX) for key in found) else ""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in found.items()}
    fields = {key.removeprefix(prefix): value for key, value in given.items()}
    for kind in ("use_dora", "lora_bias"):
        if fields.get(kind):
            raise CheckpointError(f"{file} has {kind} = {fields[kind]}: only W + scale * B A can be merged")
    matrices = {link.other.removesuffix(".weight"): link for link in matrix_links(model)}
    modules = {key.removesuffix(A): key for key in tensors if key.endswith(A)}
    known = {module + suffix for module in modules for suffix in (A, B, ALPHA)}
    strange = [key for key in tensors if key not in known] + [f"{m}{A}" for m in modules if m not in matrices]
    if strange or not modules:
        told = f"tensor {strange[0]} ({len(strange)} such)" if strange else "no tensor"
        raise CheckpointError(
            f"{file} has {told} that this model has a place for; names are diffusers', such as "
            f"{PREFIX}blocks.0.attn1.to_q{A}"
        )
    pairs = {}
    for module in modules:
        if module + B not in tensors:
            raise CheckpointError(f"{file} has {module}{A} but no {module}{B}")
        a, b, link = tensors[module + A], tensors[module + B], matrices[module]
        outputs, inputs = link.shape
        rank = a.shape[0] if a.shape else 0
        if not rank or a.shape != (rank, inputs) or b.shape != (outputs, rank):
            raise CheckpointError(
                f"{file}: {module} has A {list(a.shape)} and B {list(b.shape)}, the matrix is {[outputs, inputs]}"
            )
        try:
            scale = _scale(module, rank, fields, tensors)
        except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"{file}: no scale of {module} follows from its alpha and {METADATA}: {error}"
            ) from error
        pairs[link.names[0].removesuffix(".weight")] = Pair(a, b, scale)
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


def _scale(module: str, rank: int, fields: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> float:
    """alpha / rank of one matrix: its own tensor, else the metadata's, else 1; raises what malformed fields raise."""
    if module + ALPHA in tensors:
        return float(tensors[module + ALPHA].read()) / rank
    alpha = fields.get("lora_alpha", rank)
    for pattern, value in fields.get("alpha_pattern", {}).items():  # matched as PEFT does
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break  # the first that matches
    scale = float(alpha) / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    if not math.isfinite(scale):
        raise ValueError(f"alpha {alpha} is not finite")
    return scale
