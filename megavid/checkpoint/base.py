"""The frozen model that a run of adapters stands on: its checkpoints name it, and hold none of it.

Owns ``base.json``. The base is named by its folder and by the SHA-256 of its manifest, which has the hashes of all its
files, so that another model in its place is noticed.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megavid.checkpoint.files import reading
from megavid.checkpoint.format import MANIFEST
from megavid.checkpoint.manifest import decode
from megavid.checkpoint.read import Checkpoint
from megavid.checkpoint.retention import resolve
from megavid.errors import CheckpointError

BASE = "base.json"


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint that adapters were trained on.

    Attributes:
        folder: where it was.
        weights: which of its weights: "model", or "ema" for the moving average.
        digest: SHA-256 of its manifest.
    """

    folder: str
    weights: str
    digest: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, weights: str) -> "Base":
        """The record of a checkpoint."""
        return cls(str(checkpoint.folder.resolve()), weights, manifest_digest(checkpoint.folder))

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> "Base":
        """What a checkpoint of adapters says of its base.

        Raises:
            CheckpointError: it says nothing, or the file is damaged.
        """
        where = checkpoint.folder / BASE
        table = decode(checkpoint.read(BASE), where)
        try:
            return cls(str(table["folder"]), str(table["weights"]), str(table["digest"]))
        except KeyError as error:
            raise CheckpointError(f"{where} has no {error}: it is not what megavid writes") from None

    def to_bytes(self) -> bytes:
        """The content of ``base.json``."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    def open(self, elsewhere: str = "") -> Checkpoint:
        """The base, from where it was, or from ``elsewhere`` (a checkpoint or a run) if that is the same one.

        Raises:
            CheckpointError: neither is.
        """
        places = [Path(self.folder), *([Path(elsewhere)] if elsewhere else [])]
        told = []
        for place in places:
            try:
                checkpoint = Checkpoint(resolve(place))
            except CheckpointError:
                told.append(f"{place} holds no checkpoint")
                continue
            if manifest_digest(checkpoint.folder) == self.digest:
                return checkpoint
            told.append(f"{checkpoint.folder} is another one (its {MANIFEST} has another SHA-256)")
        raise CheckpointError(
            f"the model that these adapters were trained on is missing: {'; '.join(told)}; put it back, or name the "
            "same checkpoint elsewhere with --train.init_from (when the run goes on)"
        )


def manifest_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's manifest: another one where a byte of any of its files is."""
    with reading(folder / MANIFEST):
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
