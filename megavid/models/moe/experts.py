"""The experts of one rank as a module: weights stacked by expert, each placed in model space under its expert's name.

Owns parameters and placements; the math is ``megavid.ops.grouped_experts``. Satisfies megatron-core's interface of
experts, and adds the second bias itself, times the gate, which Wan's feed-forward needs and megatron-core's lack.

Over expert-tensor ranks hidden units are split, so the output is a part of a sum, which the dispatcher adds up. The
last bias is split too, by output column: no rank holds a copy of another's numbers, so none can drift or count twice.
"""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megavid.errors import ConfigError
from megavid.models.build import Build
from megavid.models.fp8 import Fp8Build
from megavid.ops.grouped_experts import ExpertScalings, ExpertSums, ExpertWeights, grouped_experts
from megavid.parallel.placement import Init, Piece, Placement, place
from megavid.parallel.weight_gradients import AddsInPlace, sum_of


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
        moe, width = build.model.moe, build.model.hidden_size
        layout, coordinates = build.mesh.layout, build.mesh.coordinates
        for key, size in (("model.moe.expert_ffn_size", moe.expert_ffn_size), ("model.hidden_size", width)):
            if size % layout.etp:
                raise ConfigError(f"parallel.expert_tensor = {layout.etp} must divide {key} = {size}")
        self.name, self.hidden_size, self.ffn_size = f"{name}.experts", width, moe.expert_ffn_size
        self.num_local_experts, self.ops = moe.num_experts // layout.ep, build.ops.moe
        self.first_expert = coordinates["ep"] * self.num_local_experts
        self.part, self.parts = coordinates["etp"], layout.etp
        hidden = moe.expert_ffn_size // layout.etp
        self.first_column = self.part * (width // layout.etp)
        self.up_weight = self._matrix(build, "up", hidden, width)
        self.up_bias = self._bias(build, "up", hidden) if moe.has_bias else None
        self.gate_weight = self._matrix(build, "gate", hidden, width) if moe.activation == "swiglu" else None
        self.gate_bias = self._bias(build, "gate", hidden) if moe.has_bias and moe.activation == "swiglu" else None
        self.down_weight = self._matrix(build, "down", width, hidden)
        self.down_bias = self._bias(build, "down", width // layout.etp) if moe.has_bias else None
        self.scalings: nn.ModuleDict = nn.ModuleDict()

    def in_fp8(self, fp8: Fp8Build, group: ProcessGroup) -> "GroupedExperts":
        """Compute the products in FP8, or NVFP4, from now on, the ranks of ``group`` sharing scales; returns itself."""
        matrices = ["up", "down"] if self.gate_weight is None else ["up", "down", "gate"]
        self.scalings = nn.ModuleDict(
            {which: fp8.scaling(f"{self.name}.{which}", group, is_expert=True) for which in matrices}
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
            first_column=self.first_column,
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

    def _matrix(self, build: Build, which: str, rows: int, columns: int) -> nn.Parameter:
        """Matrix ``which`` of the local experts; hidden units are rows of ``up`` and ``gate``, columns of ``down``."""
        is_down = which == "down"
        whole = (rows, columns * self.parts) if is_down else (rows * self.parts, columns)
        offset = (0, self.part * columns) if is_down else (self.part * rows, 0)
        init = Init(std=whole[1] ** -0.5)
        return self._placed(build, f"{which}.weight", whole, offset, (rows, columns), init, has_decay=True)

    def _bias(self, build: Build, which: str, size: int) -> nn.Parameter:
        whole, offset = (size * self.parts,), (self.part * size,)
        return self._placed(build, f"{which}.bias", whole, offset, (size,), Init(), has_decay=False)

    def _placed(
        self,
        build: Build,
        suffix: str,
        whole: tuple[int, ...],
        offset: tuple[int, ...],
        local: tuple[int, ...],
        init: Init,
        *,
        has_decay: bool,
    ) -> nn.Parameter:
        parameter = build.empty(self.num_local_experts, *local)
        size = parameter.numel() // self.num_local_experts
        pieces = tuple(
            Piece(f"{self.name}.{self.first_expert + e}.{suffix}", whole, offset, local, start=e * size)
            for e in range(self.num_local_experts)
        )
        sharded = Placement(pieces, frozenset({"ep", "etp"}), is_expert=True, has_decay=has_decay, init=init)
        place(parameter, sharded)
        return parameter
