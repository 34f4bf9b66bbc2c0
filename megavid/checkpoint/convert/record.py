"""``conversion.json``: what was converted from what, with the SHA-256 of every tensor on both sides.

Owns its form. It lies beside the weights; whoever reads them again checks each tensor against it, and takes from it
what their config.json has no word for.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megavid import __version__
from megavid.checkpoint.convert.ledger import overall
from megavid.checkpoint.files import reading
from megavid.checkpoint.manifest import decode
from megavid.config.schema import ModelConfig
from megavid.errors import CheckpointError

RECORD = "conversion.json"
_FORMAT, _VERSION = "megavid.conversion", 1


@dataclass(frozen=True, slots=True)
class TensorNote:
    """One tensor: its number format in safetensors' words, its shape, and the SHA-256 of its bytes, row-major."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a conversion.

    Attributes:
        path: as the user gave it.
        layout: how the tensors were named.
        tensors: every one of them.
    """

    path: str
    layout: str
    tensors: dict[str, TensorNote]

    def to_json(self) -> dict[str, Any]:
        """For the file; ``sha256`` is that of the lines "digest  name" in order of name."""
        notes = {name: [note.dtype, list(note.shape), note.sha256] for name, note in self.tensors.items()}
        digest = overall({name: note.sha256 for name, note in self.tensors.items()})
        return {"path": self.path, "layout": self.layout, "sha256": digest, "tensors": notes}


def record_bytes(
    source: Side, target: Side, model: ModelConfig, diffusion: Mapping[str, float], *, command: str
) -> bytes:
    """The content of conversion.json; ``diffusion`` is what the weights know of noise levels, keys of that table."""
    fields = {
        "format": _FORMAT,
        "version": _VERSION,
        "megavid": __version__,
        "command": command,
        "columns": ["dtype", "shape", "sha256"],
        "model": asdict(model),
        "diffusion": dict(diffusion),
        "source": source.to_json(),
        "target": target.to_json(),
    }
    return (json.dumps(fields, indent=None, separators=(",", ": ")) + "\n").encode()


@dataclass(frozen=True, slots=True)
class Record:
    """A conversion.json that was read.

    Attributes:
        model: table ``model`` of the config then.
        diffusion: keys of ``diffusion`` then: noise levels and shift.
        tensors: what lies beside it, by name.
    """

    model: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    tensors: Mapping[str, TensorNote]

    @property
    def digests(self) -> dict[str, str]:
        """Digest of every tensor beside it."""
        return {name: note.sha256 for name, note in self.tensors.items()}


def read_record(folder: Path) -> Record | None:
    """The record in ``folder``; None where there is none.

    Raises:
        CheckpointError: it is damaged, or of a newer version.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    with reading(path):
        return parse_record(path.read_bytes(), path)


def parse_record(content: bytes, path: Path) -> Record:
    """The record in ``content``; ``path`` is its file, for messages. Raises as ``read_record``."""
    fields = decode(content, path)
    if (fields.get("format"), fields.get("version")) != (_FORMAT, _VERSION):
        raise CheckpointError(
            f"{path} is of format {fields.get('format')} version {fields.get('version')}; this megavid reads {_FORMAT} "
            f"version {_VERSION}; remove the file to convert without its checks"
        )
    try:
        target = fields["target"]
        tensors = {
            str(name): TensorNote(str(dtype), tuple(shape), str(digest))
            for name, (dtype, shape, digest) in target["tensors"].items()
        }
        record = Record(dict(fields["model"]), dict(fields.get("diffusion", {})), tensors)
        is_whole = overall(record.digests) == target["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not what this megavid writes: {type(error).__name__} {error}") from error
    if not is_whole:
        raise CheckpointError(f"{path}: the SHA-256 of its tensors do not add up to its own: it was changed or damaged")
    return record
