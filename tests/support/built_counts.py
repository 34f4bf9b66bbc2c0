"""Build one rank of a layout of any size on the meta device, with process groups that talk to nobody.

Run as a program: JSON list of [preset, flags, world size, rank] on standard input; one JSON object a case on standard
output: what ``megavid.plan.parameters`` says that this rank holds, and what the built model's placements say.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megavid.config.load import load_run
from megavid.models.video_dit import build_chunks
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import is_owner, placement_of
from megavid.plan.layout import layout_of
from megavid.plan.parameters import count_rank, tensors


def compare(preset: str, flags: list[str], world_size: int, rank: int) -> dict[str, object]:
    """Counts of both, and the names whose global shapes differ or that only one of them knows."""
    config = load_run(preset, flags)
    layout = layout_of(config, world_size)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    built: dict[str, tuple[int, ...]] = {}
    held = unique = 0
    with Mesh.open(layout, "cpu") as mesh:
        with torch.device("meta"):
            chunks = build_chunks(config, mesh)
        seen: set[str] = set()
        for chunk in chunks:
            for parameter in chunk.parameters():
                placement = placement_of(parameter)
                built |= {piece.name: piece.global_shape for piece in placement.pieces}
                names = {piece.name for piece in placement.pieces}
                if names <= seen:
                    continue  # every chunk has its copy of the embedders; a rank counts one
                seen |= names
                held += parameter.numel()
                copies = ("edp",) if placement.is_expert else ("dp", "cp")
                is_first = all(mesh.coordinate(axis) == 0 for axis in copies)
                unique += parameter.numel() * (is_first and is_owner(parameter, mesh.coordinates))
    dist.destroy_process_group()
    planned = {tensor.name: tensor.shape for tensor in tensors(config.model)}
    counts = count_rank(config.model, layout, rank)
    return {
        "planned": [counts.held, counts.unique],
        "built": [held, unique],
        "wrong": sorted(name for name in built if planned.get(name) != built[name]),
        "missing": sorted(set(planned) - set(built)) if world_size == 1 else [],
    }


if __name__ == "__main__":
    for case in json.load(sys.stdin):
        print(json.dumps(compare(*case)), flush=True)
