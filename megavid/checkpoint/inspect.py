"""What ``megavid inspect`` says of a checkpoint."""

from collections import defaultdict
from pathlib import Path

from megavid.checkpoint.ranks import SingleRank
from megavid.checkpoint.read import Checkpoint
from megavid.checkpoint.retention import resolve


def describe(path: Path) -> str:
    """A page about a checkpoint: its origin, tensors, totals by kind, state and config, once every hash is checked.

    Args:
        path: a run's folder, its checkpoints folder, or one checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint = Checkpoint(resolve(path))
    checkpoint.verify(SingleRank())
    manifest = checkpoint.manifest
    size = sum(file.size for file in manifest.files.values())
    lines = [
        f"checkpoint  {checkpoint.folder}",
        f"step        {manifest.step}",
        f"layout      {manifest.layout or 'not told'} ({manifest.world_size} ranks)",
        f"versions    {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}",
        f"files       {len(manifest.files)}, {_size_text(size)}, all sizes and SHA-256 hashes as in the manifest",
        "",
        *_tensor_lines(checkpoint),
        "",
        "state.json",
        *(f"  {key} = {_short(value)}" for key, value in checkpoint.state.items()),
        "",
        "run.toml",
        *(f"  {line}" for line in checkpoint.run_toml.splitlines()),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _tensor_lines(checkpoint: Checkpoint) -> list[str]:
    rows = [("kind", "name", "dtype", "shape", "boxes", "bytes")]
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for full_name in checkpoint.index.tensors:
        record = checkpoint.index.record(full_name)
        assert record is not None
        kind, _, name = full_name.rpartition("/") if full_name.count("/") != 1 else full_name.partition("/")
        shape = "x".join(map(str, record.shape)) or "scalar"
        rows.append((kind, name, record.code, shape, str(len(record.boxes)), str(record.size)))
        for at, amount in enumerate((1, record.numel, record.size)):
            totals[kind][at] += amount
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    sums = [
        f"{kind or 'no kind'}: {tensors} tensors, {numel} numbers, {_size_text(size)}"
        for kind, (tensors, numel, size) in totals.items()
    ]
    return [*table, "", *sums]


def _size_text(size: int) -> str:
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.4g} {units[0]}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
