"""Experts of a served model spread over ranks: each holds E / ranks of every layer.

Owns the two ways in which tokens reach them, and loading a folder so that a rank never holds another's experts.

- ``inputs="same"``: every rank runs the same call (one clip on several GPUs because one does not hold the experts).
  Each computes its experts' part for all tokens, and one all-reduce adds the parts up.
- ``inputs="own"``: every rank runs its own clips. Two all-to-alls take rows to their experts and back. All ranks must
  make the same number of calls; sizes may differ.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from megavid.config.schema import ModelConfig
from megavid.errors import ConfigError, DataError
from megavid.inference.moe import Experts, Slots
from megavid.ops.norm import wide

if TYPE_CHECKING:
    from megavid.inference.transformer import MegavidTransformer3DModel

Inputs = Literal["same", "own"]
WEIGHTS = "diffusion_pytorch_model"


def exchange_over(group: Any, model: ModelConfig, inputs: Inputs) -> "SameInputs | OwnInputs":
    """How the ranks of ``group`` exchange tokens.

    Raises:
        ConfigError: the model has no experts, or the group does not divide them.
    """
    ranks = dist.get_world_size(group)
    if model.family != "wan_moe":
        raise ConfigError(f"expert parallelism over {ranks} ranks needs experts; this model's family is {model.family}")
    if model.moe.num_experts % ranks:
        raise ConfigError(f"{ranks} expert ranks must divide num_experts = {model.moe.num_experts}")
    local = model.moe.num_experts // ranks
    kind = {"same": SameInputs, "own": OwnInputs}[inputs]
    return kind(group, model.moe.num_experts, local, dist.get_rank(group) * local)


def keep_experts_(experts: Experts, first: int, stop: int) -> None:
    """Drop all experts of a layer but ``first`` to ``stop - 1``."""
    for matrix in experts.children():
        for name, parameter in list(matrix.named_parameters(recurse=False)):
            own = parameter.detach()[first:stop].clone()
            setattr(matrix, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


@dataclass(frozen=True)
class SameInputs:
    """Every rank has the same tokens; see the module's text.

    Attributes:
        group: the ranks.
        num_experts: E.
        local: experts of each rank.
        first: number of this rank's first expert.
    """

    group: Any
    num_experts: int
    local: int
    first: int

    def __call__(self, x_TD: Tensor, slots: Slots, experts: Experts) -> Tensor:
        """See ``megavid.inference.moe.Exchange``. Ranks: one all-reduce of [T, D], summed in fp32."""
        order_S, counts_E = slots.by_expert(), slots.counts(self.num_experts)
        here = counts_E[self.first : self.first + self.local]
        start, rows = int(counts_E[: self.first].sum()), int(here.sum())
        own = order_S[start : start + rows]
        token_S = slots.token_S[own]
        total = wide(torch.zeros_like(x_TD))
        if rows:
            total.index_add_(0, token_S, wide(experts(x_TD.index_select(0, token_S), here, slots.gate_S[own])))
        dist.all_reduce(total, group=self.group)
        return total.type_as(x_TD)


@dataclass(frozen=True)
class OwnInputs(SameInputs):
    """Every rank has its own tokens; see the module's text."""

    def __call__(self, x_TD: Tensor, slots: Slots, experts: Experts) -> Tensor:
        """See ``megavid.inference.moe.Exchange``. Ranks: all-to-all of counts, rows and gates, and of rows back."""
        order_S, counts_E = slots.by_expert(), slots.counts(self.num_experts)
        arriving_E = torch.empty_like(counts_E)  # by rank it comes from, then by expert of this rank
        dist.all_to_all_single(arriving_E, counts_E, group=self.group)
        sends, takes = (c.view(-1, self.local).sum(1).tolist() for c in (counts_E, arriving_E))
        rows_SD = self._exchanged(x_TD.index_select(0, slots.token_S[order_S]), sends, takes)
        gate_S = self._exchanged(slots.gate_S[order_S], sends, takes)
        number = torch.arange(self.num_experts, device=x_TD.device) % self.local
        expert_S = torch.repeat_interleave(number, arriving_E, output_size=sum(takes))
        sorted_S = expert_S.argsort(stable=True)
        out_SD = torch.empty_like(rows_SD)
        if sum(takes):
            here = arriving_E.view(-1, self.local).sum(0)
            out_SD[sorted_S] = experts(rows_SD[sorted_S], here, gate_S[sorted_S])
        return slots.combine(self._exchanged(out_SD, takes, sends), order_S, x_TD.shape[0])

    def _exchanged(self, rows: Tensor, sends: list[int], takes: list[int]) -> Tensor:
        arrived = rows.new_empty(sum(takes), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), takes, sends, group=self.group)
        return arrived


def load_expert_parallel(
    folder: str | Path,
    group: Any,
    *,
    inputs: Inputs = "same",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> "MegavidTransformer3DModel":
    """The model of a folder with this rank's experts only, read straight from the files to ``device``.

    Args:
        folder: as for ``from_pretrained``.
        group: the ranks that share the experts.
        inputs: see ``MegavidTransformer3DModel.shard_experts_``.
        dtype: of what does not stay fp32.
        device: where the weights go.

    Raises:
        ConfigError: the ranks do not divide the experts.
        DataError: weights are missing, or there are some that the model does not have.
    """
    from megavid.inference.transformer import MegavidTransformer3DModel as Model

    folder = Path(folder)
    with torch.device("meta"):
        model: MegavidTransformer3DModel = Model.from_config(Model.load_config(folder, local_files_only=True))
    model.shard_experts_(group, inputs)
    local = model.shape.moe.num_experts // dist.get_world_size(group)
    first = dist.get_rank(group) * local
    state: dict[str, Tensor] = {}
    for name, tensor in _tensors(folder, lambda name: slice(first, first + local) if _is_expert(name) else slice(None)):
        if tensor.is_floating_point():
            stays = any(part in name.split(".") for part in Model._keep_in_fp32_modules)
            tensor = tensor.to(torch.float32 if stays else dtype)
        state[name] = tensor.to(device)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise DataError(f"{folder}: {' '.join(str(error).split())}") from error
    model.eval()
    return model


def _is_expert(name: str) -> bool:
    return ".ffn.experts." in name


def _tensors(folder: Path, part_of: Any) -> Any:
    """Name and part of every tensor of the folder's safetensors files, one at a time."""
    index, single = folder / f"{WEIGHTS}.safetensors.index.json", folder / f"{WEIGHTS}.safetensors"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [single.name]
        for file in files:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    yield name, opened.get_slice(name)[part_of(name)]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{folder} holds no readable {WEIGHTS}*.safetensors ({error})") from error
