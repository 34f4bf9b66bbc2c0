"""``megavid convert --verify``: loads the model that serves a folder, and holds megavid's engine against it.

Owns which of the two sides the engine runs, and which one diffusers or megavid.inference loads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megavid.checkpoint.convert.adapter import A, Adapter, B, names_in_diffusers
from megavid.checkpoint.convert.source import TABLES, ModelSource, open_checkpoint, open_model
from megavid.checkpoint.convert.tables import links
from megavid.checkpoint.convert.verify import check_gaps, compare, gap_lines
from megavid.errors import ConfigError


def require_verifiable(sources: Sequence[ModelSource], to: str) -> None:
    """Refuse to verify what nobody else can run.

    Raises:
        ConfigError: both sides are megavid's, or one is a first-last-frame model in the original layout.
    """
    for source in sources:
        if source.layout == "megavid" and to == "megavid":
            raise ConfigError("--verify runs one side in diffusers or megavid.inference; here both are megavid's")
        served_as = to if source.layout == "megavid" else source.layout
        if served_as == "original" and source.config.image_positions:
            raise ConfigError(
                "--verify loads the original layout by diffusers' own renaming, which does not know the positions of "
                "first-last-frame models; leave --verify out, or convert to or from diffusers' layout"
            )


def verify(source: ModelSource, folder: Path) -> None:
    """Compare a source with the folder that was made of it, and print the difference of every block.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    is_checkpoint = (folder / "manifest.json").is_file()
    target = open_checkpoint(folder, "model") if is_checkpoint else open_model(folder)
    served = target if source.layout == "megavid" else source
    engine_side = source if served is target else target
    reference = load_served(served)
    # Weights that were rounded on the way are rounded on both sides.
    tensors = {name: tensor.to(target.tensors[name].dtype) for name, tensor in engine_side.tensors.items()}
    round_as(reference, served, target)
    gaps = compare(target.config, tensors, reference)
    for line in gap_lines(gaps):
        print(line)
    check_gaps(gaps)


def load_served(source: ModelSource) -> nn.Module:
    """The model in a folder of diffusers, of megavid.inference or of the original layout, in fp32.

    The original layout is read with diffusers' own renaming, which knows nothing of our tables.
    """
    model: Any
    if source.layout == "inference":
        from megavid.inference import MegavidTransformer3DModel

        model = MegavidTransformer3DModel.from_pretrained(source.path, dtype=torch.float32)
    elif source.layout == "diffusers":
        from diffusers import WanTransformer3DModel

        model = WanTransformer3DModel.from_pretrained(source.path, dtype=torch.float32)
    else:
        from diffusers import WanTransformer3DModel
        from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

        from megavid.checkpoint.convert.configs import config_json

        config = {key: value for key, value in config_json(source.config, "diffusers").items() if key[0] != "_"}
        model = WanTransformer3DModel(**config)
        files = source.ledger.tensors.items()
        state = {name: tensor.read().float() for name, tensor in files if not name.endswith((A, B))}
        model.load_state_dict(convert_wan_transformer_to_diffusers(state), strict=True)
    module: nn.Module = model.eval()
    for adapter, factor in source.adapters:
        merge(module, adapter, factor)
    return module


@torch.no_grad()
def merge(module: nn.Module, adapter: Adapter, factor: float) -> None:
    """Add an adapter to the matrices of a served model, each as a whole: the twin of the merge that streams."""
    names = names_in_diffusers(adapter.model)
    for matrix, pair in adapter.pairs.items():
        weight = module.get_parameter(f"{names[matrix]}.weight")
        weight.add_(pair.b.read().float() @ pair.a.read().float(), alpha=factor * pair.scale)


@torch.no_grad()
def round_as(reference: nn.Module, served: ModelSource, target: ModelSource) -> None:
    """Round the weights of ``reference`` to the number formats of the target."""
    table = TABLES["inference" if served.layout == "inference" else "diffusers"]
    formats = {link.other: target.tensors[link.names[0]].dtype for link in links(target.config, table)}
    for name, value in reference.state_dict().items():
        if name in formats:
            value.copy_(value.to(formats[name]))
