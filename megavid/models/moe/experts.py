"""The experts of one rank as a module: weights stacked by expert, each placed in model space under its expert's name.

Owns parameters and placements, those of ``megavid.models.moe.te_experts`` too; the math is
``megavid.ops.grouped_experts``. Satisfies megatron-core's interface of experts, and adds the second bias itself, times
the gate, which Wan's feed-forward needs and megatron-core's lack.

Over expert-tensor ranks hidden units are split, so the output is a part of a sum, which the dispatcher adds up. The
last bias is split too, by output column: no rank holds a copy of another's numbers, so none can drift or count twice.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megavid.errors import ConfigError
from megavid.models.build import Build
from megavid.models.fp8 import Fp8Build
from megavid.ops.grouped_experts import ExpertScalings, ExpertSums, ExpertWeights, grouped_experts
from megavid.parallel.placement import Init, Piece, Placement, place
from megavid.parallel.weight_gradients import AddsInPlace, sum_of

Matrix = Literal["up", "gate", "down"]


@dataclass(frozen=True)
class ExpertShare:
    """Which experts of a layer a rank holds, and which part of their hidden units.

    Attributes:
        name: of the experts in model space, such as ``blocks.3.moe.experts``.
        first: the first of them.
        count: how many.
        part: which part of their hidden units, and of the columns of the last bias, from 0.
        parts: in how many these are cut.
        width: of the model.
        hidden: units of an expert on this rank.
        matrices: what an expert has, in the order of its parameters.
        has_bias: beside every matrix there is a bias.
    """

    name: str
    first: int
    count: int
    part: int
    parts: int
    width: int
    hidden: int
    matrices: tuple[Matrix, ...]
    has_bias: bool

    @classmethod
    def of(cls, build: Build, name: str) -> "ExpertShare":
        """This rank's share of the expert layer ``name``.

        Raises:
            ConfigError: ``parallel.expert_tensor`` does not divide the widths.
        """
        moe, width = build.model.moe, build.model.hidden_size
        layout, coordinates = build.mesh.layout, build.mesh.coordinates
        for key, size in (("model.moe.expert_ffn_size", moe.expert_ffn_size), ("model.hidden_size", width)):
            if size % layout.etp:
                raise ConfigError(f"parallel.expert_tensor = {layout.etp} must divide {key} = {size}")
        count = moe.num_experts // layout.ep
        return cls(
            name=f"{name}.experts",
            first=coordinates["ep"] * count,
            count=count,
            part=coordinates["etp"],
            parts=layout.etp,
            width=width,
            hidden=moe.expert_ffn_size // layout.etp,
            matrices=("up", "gate", "down") if moe.activation == "swiglu" else ("up", "down"),
            has_bias=moe.has_bias,
        )

    @property
    def first_column(self) -> int:
        """First output column of this rank's part of the last bias."""
        return self.part * (self.width // self.parts)

    def matrix(self, build: Build, which: Matrix) -> nn.Parameter:
        """Matrix ``which`` of all experts of this rank, stacked."""
        rows, columns = (self.width, self.hidden) if which == "down" else (self.hidden, self.width)
        matrices = build.empty(self.count, rows, columns)
        self.place_matrices(matrices, which, range(self.count))
        return matrices

    def place_matrices(self, matrices: nn.Parameter, which: Matrix, experts: range) -> None:
        """Place matrix ``which`` of some of this rank's experts (from 0), which lie one after the other.

        Hidden units are rows of ``up`` and ``gate``, columns of ``down``.
        """
        units, first = self.hidden * self.parts, self.part * self.hidden
        whole, offset, local = (units, self.width), (first, 0), (self.hidden, self.width)
        if which == "down":
            whole, offset, local = whole[::-1], offset[::-1], local[::-1]
        init = Init(std=whole[1] ** -0.5)
        self._place(matrices, f"{which}.weight", whole, offset, local, experts, init, has_decay=True)

    def bias(self, build: Build, which: Matrix) -> nn.Parameter | None:
        """Bias ``which`` of all experts of this rank, stacked; None where there is none."""
        if not self.has_bias or which not in self.matrices:
            return None
        size = self.width // self.parts if which == "down" else self.hidden
        bias, whole, offset = build.empty(self.count, size), (size * self.parts,), (self.part * size,)
        self._place(bias, f"{which}.bias", whole, offset, (size,), range(self.count), Init(), has_decay=False)
        return bias

    def _place(
        self,
        parameter: nn.Parameter,
        suffix: str,
        whole: tuple[int, ...],
        offset: tuple[int, ...],
        local: tuple[int, ...],
        experts: range,
        init: Init,
        *,
        has_decay: bool,
    ) -> None:
        pieces = tuple(
            Piece(f"{self.name}.{self.first + expert}.{suffix}", whole, offset, local, start=at * math.prod(local))
            for at, expert in enumerate(experts)
        )
        sharded = Placement(pieces, frozenset({"ep", "etp"}), is_expert=True, has_decay=has_decay, init=init)
        place(parameter, sharded)


class GroupedExperts(AddsInPlace):
    """Routed experts ``ep_rank * e`` to ``(ep_rank + 1) * e - 1`` of a layer, this rank's part of their hidden units.

    Args:
        build: what the block is built from.
        name: the layer's name in model space, such as ``blocks.3.moe``.

    Raises:
        ConfigError: ``parallel.expert_tensor`` does not divide the widths.
    """

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        self.share, self.ops = ExpertShare.of(build, name), build.ops.moe
        self.up_weight = self.share.matrix(build, "up")
        self.up_bias = self.share.bias(build, "up")
        self.gate_weight = self.share.matrix(build, "gate") if "gate" in self.share.matrices else None
        self.gate_bias = self.share.bias(build, "gate")
        self.down_weight = self.share.matrix(build, "down")
        self.down_bias = self.share.bias(build, "down")
        self.scalings: nn.ModuleDict = nn.ModuleDict()

    def in_fp8(self, fp8: Fp8Build, group: ProcessGroup) -> "GroupedExperts":
        """Compute the products in FP8, or NVFP4, from now on, the ranks of ``group`` sharing scales; returns itself."""
        name = self.share.name
        matrices = ["up", "down"] if self.gate_weight is None else ["up", "down", "gate"]
        self.scalings = nn.ModuleDict(
            {which: fp8.scaling(f"{name}.{which}", group, is_expert=True) for which in matrices}
        )
        return self

    def forward(
        self, permuted_hidden: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Gated outputs of rows sorted by local expert; this rank's part of them over expert-tensor ranks.

        Args:
            permuted_hidden: rows, [S, D].
            tokens_per_expert: rows of each local expert, int64 [e].
            permuted_probs: gate of each row, fp32 [S].

        Returns:
            ([S, D], None): megatron-core's second value is a bias still to be added; there is none.
        """
        weights = ExpertWeights(
            self.up_weight, self.down_weight, self.gate_weight, self.up_bias, self.gate_bias, self.down_bias
        )
        out_SD = grouped_experts(
            permuted_hidden,
            tokens_per_expert,
            weights,
            permuted_probs.reshape(-1),
            first_column=self.share.first_column,
            activate=self.ops.activate,
            activate_fp8=self.ops.activate_fp8,
            scalings=ExpertScalings(**self.scalings) if self.scalings else None,
            sums=self._sums() if self.is_in_place else None,
        )
        return out_SD, None

    def matrices(self) -> list[nn.Parameter]:
        """See ``AddsInPlace``; in FP8 there are none."""
        matrices = (self.up_weight, self.down_weight, self.gate_weight)
        return [] if self.scalings else [matrix for matrix in matrices if matrix is not None]

    def _sums(self) -> ExpertSums:
        gate = None if self.gate_weight is None else sum_of(self.gate_weight)
        return ExpertSums(sum_of(self.up_weight), sum_of(self.down_weight), gate)
