"""The experts of one rank on Transformer Engine's grouped linears, in the place of ``GroupedExperts``.

Owns who multiplies, and that rows fit its products in FP8; names, placements and biases are ``ExpertShare``'s, and all
but the products with the matrices is ``megavid.ops.grouped_experts``'s, the same for both.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megavid.models.build import Build
from megavid.models.moe.experts import ExpertShare, Matrix
from megavid.models.te import InFp8, row_multiple, te_grouped
from megavid.ops.filled_rows import fill_rows
from megavid.ops.grouped_experts import ExpertBiases, ExpertProducts, activate_plainly, expert_of_rows, feed_forward


class TEMatrices(nn.Module):
    """Matrix ``which`` of a rank's experts, ``weight0`` and so on in Transformer Engine's grouped linear.

    Args:
        build: what the block is built from.
        share: the rank's experts.
        which: "up", "gate" or "down".
    """

    def __init__(self, build: Build, share: ExpertShare, which: Matrix) -> None:
        super().__init__()
        hidden, is_row = build.model.moe.expert_ffn_size, which == "down"
        linear = te_grouped(build.fp8, is_row=is_row)(
            share.count,
            *((hidden, share.width) if is_row else (share.width, hidden)),
            config=build.transformer,
            init_method=nn.Identity(),
            pg_collection=build.mesh.groups,
        )
        for expert in range(share.count):
            share.place_matrices(getattr(linear, f"weight{expert}"), which, range(expert, expert + 1))
        self.linear: Any = linear if build.fp8 is None else InFp8(linear)

    def forward(self, x_SI: Tensor, sizes: list[int]) -> Tensor:
        """``x @ matrix[expert of the row].T``, in FP8 where the block is and gradients are wanted.

        Args:
            x_SI: rows sorted by expert; in FP8 those of each expert are a multiple of ``row_multiple``.
            sizes: rows of each expert.
        """
        if not x_SI.shape[0]:  # not every version is known to take no rows at all
            return torch.cat([x_SI @ weight.t() for weight in self.linear.parameters()])
        out: Tensor = self.linear(x_SI, sizes)[0]
        return out


class TEExperts(nn.Module):
    """Routed experts of a rank, as ``GroupedExperts``; build it where ``build.is_te``.

    Args:
        build: what the block is built from.
        name: the layer's name in model space, such as ``blocks.3.moe``.

    Raises:
        ConfigError: ``parallel.expert_tensor`` does not divide the widths.
    """

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        self.share, self.row_multiple = ExpertShare.of(build, name), row_multiple(build.fp8)
        self.activate = build.ops.moe.activate or activate_plainly
        self.up = TEMatrices(build, self.share, "up")
        self.gate = TEMatrices(build, self.share, "gate") if "gate" in self.share.matrices else None
        self.down = TEMatrices(build, self.share, "down")
        self.up_bias = self.share.bias(build, "up")
        self.gate_bias = self.share.bias(build, "gate")
        self.down_bias = self.share.bias(build, "down")

    def forward(
        self, permuted_hidden: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """See ``GroupedExperts.forward``; rows are filled up once for all three products."""
        # Products are in FP8 while gradients are wanted only, see InFp8.
        multiple = self.row_multiple if torch.is_grad_enabled() else 1
        rows = fill_rows(permuted_hidden, permuted_probs.reshape(-1), tokens_per_expert, multiple=multiple)
        sizes = rows.tokens_per_expert.tolist()
        out_SD = feed_forward(
            rows.x_SD,
            expert_of_rows(rows.tokens_per_expert, rows.x_SD),
            ExpertProducts(
                partial(self.up, sizes=sizes),
                partial(self.down, sizes=sizes),
                None if self.gate is None else partial(self.gate, sizes=sizes),
            ),
            ExpertBiases(self.up_bias, self.gate_bias, self.down_bias),
            rows.probability_S,
            activate=self.activate,
            first_column=self.share.first_column,
        )
        return rows.take_out(out_SD), None
