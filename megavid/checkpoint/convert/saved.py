"""The tensors of a megavid checkpoint, whatever layout wrote it, as lazy tensors in model space.

Owns the config beside them and the way from a range of a tensor's elements to the boxes that hold them. Verifying files
against the manifest is ``Checkpoint``'s.
"""

import tomllib

import torch
from torch import Tensor

from megavid.checkpoint.convert.lazy import LazyTensor
from megavid.checkpoint.convert.shards import OpenFiles
from megavid.checkpoint.format import DTYPES
from megavid.checkpoint.index import TensorRecord, check_cover
from megavid.checkpoint.read import Checkpoint, RegionRead, read_region, slices
from megavid.config.load import from_table
from megavid.config.schema import RunConfig
from megavid.errors import CheckpointError
from megavid.parallel.fragment import boxes_of_range


def run_of(checkpoint: Checkpoint, weights: str) -> RunConfig:
    """The config of the run that saved a checkpoint.

    Raises:
        CheckpointError: ``weights`` is "ema", and the run has no moving average.
    """
    run = from_table(RunConfig, tomllib.loads(checkpoint.run_toml))
    if weights == "ema" and run.optimizer.ema_decay == 0:
        raise CheckpointError(f"{checkpoint.folder} has no moving average (optimizer.ema_decay = 0); leave --ema out")
    return run


def saved_tensors(checkpoint: Checkpoint, files: OpenFiles) -> dict[str, LazyTensor]:
    """Every tensor of a checkpoint, by its full name: ``model/...``, ``ema/...``, ``exp_avg/...``, ``buffer/...``.

    Raises:
        CheckpointError: the boxes of one do not cover it.
    """
    tensors = {}
    for name in checkpoint.index.tensors:
        record = checkpoint.index.record(name)
        assert record is not None
        check_cover(name, record)
        tensors[name] = _lazy(checkpoint, files, name, record)
    return tensors


def _lazy(checkpoint: Checkpoint, files: OpenFiles, name: str, record: TensorRecord) -> LazyTensor:
    folder, dtype = checkpoint.folder, DTYPES[record.code]
    if len(record.boxes) == 1:  # the box is the tensor
        path, first = folder / record.boxes[0].file, record.boxes[0].start

        def straight(start: int, stop: int) -> Tensor:
            return files.tensor(path, first + start * dtype.itemsize, stop - start, dtype)

        return LazyTensor(record.shape, dtype, straight, f"{folder} ({name})", name)

    def fetch(start: int, stop: int) -> Tensor:
        data, at = torch.empty(stop - start, dtype=dtype), 0
        for box in boxes_of_range(record.shape, start, stop):
            whole = data[at : at + box.numel].view(box.shape)
            at += box.numel
            for saved, region in record.meeting(box):
                path = folder / saved.file
                read = RegionRead(saved, region, dtype, whole[slices(region, box)])
                read_region(files.descriptor(path), path, read)
        return data

    return LazyTensor(record.shape, dtype, fetch, f"{folder} ({name})", name)
