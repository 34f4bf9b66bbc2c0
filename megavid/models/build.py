"""How layers are built and placed: the one record that every layer gets, and the linears that carry their placement.

Owns the step from "a matrix of the model" to "the box of it that this rank holds". Layers name their tensors in model
space and never ask how many ranks there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megavid.config.lora import NO_ADAPTERS, LoraConfig
from megavid.config.schema import ModelConfig, PrecisionConfig
from megavid.models.capture import Capture
from megavid.models.fp8 import Fp8Build, column_class, row_class
from megavid.models.lora import Adapted, ColumnAdapter, RowAdapter
from megavid.models.te import InFp8, te_column, te_row
from megavid.ops.block_ops import REFERENCE, BlockOps
from megavid.parallel.mesh import Mesh
from megavid.parallel.placement import Init, Piece, Placement, place


@dataclass(frozen=True)
class Build:
    """What a layer needs to be built.

    Attributes:
        model: the whole model's shape.
        transformer: megatron-core's config of this layout (a TransformerConfig, which has no type stubs).
        mesh: who stands where.
        is_first_chunk: this is the first chunk of the first stage, whose copies of replicated parameters count.
        attention_backend: ``parallel.attention_backend``.
        ops: what is computed between matrix products and attention, and rounds to eight bits, as ``train.ops`` chose.
        capture: the same ops for calls whose shapes repeat in every block and step, as ``train.capture`` chose.
        lora: which matrices get adapters.
        precision: the run's number formats.
        fp8: how the linears of the block at hand are in FP8; None where they are not.
    """

    model: ModelConfig
    transformer: Any
    mesh: Mesh
    is_first_chunk: bool
    attention_backend: str = "aten"
    ops: BlockOps = REFERENCE
    capture: Capture = field(default_factory=Capture)
    lora: LoraConfig = NO_ADAPTERS
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    fp8: Fp8Build | None = None

    def in_block(self, layer: int) -> "Build":
        """The record for the layers of block ``layer`` (from 0)."""
        is_fp8 = self.precision.is_fp8_layer(layer, self.model.num_layers)
        return replace(self, fp8=Fp8Build.of(self.precision, self.device, self.ops.fp8) if is_fp8 else None)

    @property
    def is_te(self) -> bool:
        """Whether linears of blocks are Transformer Engine's."""
        return self.precision.linears == "transformer_engine"

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks."""
        return self.mesh.size("tp")

    @property
    def tp_rank(self) -> int:
        """Place among them."""
        return self.mesh.coordinate("tp")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights that do not have to stay fp32."""
        dtype: torch.dtype = self.transformer.params_dtype
        return dtype

    def empty(self, *shape: int, is_fp32: bool = False) -> nn.Parameter:
        """A parameter with no values yet: initialisation and loading fill it through its placement."""
        dtype = torch.float32 if is_fp32 and self.dtype != torch.float64 else self.dtype
        return nn.Parameter(torch.empty(*shape, dtype=dtype, device=self.device))

    @property
    def device(self) -> torch.device:
        """Where parameters live; a ``torch.device("meta")`` context wins, to count a model without building it."""
        default = torch.get_default_device()
        return default if default.type == "meta" else self.mesh.device

    def place_whole(
        self,
        parameter: nn.Parameter,
        name: str,
        *,
        init: Init,
        is_partial: bool,
        on_every_stage: bool = False,
        has_decay: bool = True,
    ) -> None:
        """Place a parameter that every tensor-parallel rank holds whole.

        Args:
            parameter: the local parameter, whole.
            name: its name in model space.
            init: distribution of fresh values.
            is_partial: it acts on this rank's tokens only where sequence parallelism is on.
            on_every_stage: every pipeline stage and chunk has a copy.
            has_decay: takes weight decay.
        """
        shape = tuple(parameter.shape)
        placement = Placement(
            pieces=(Piece(name, shape, (0,) * len(shape), shape),),
            is_partial_over_tp=is_partial and self.mesh.is_sequence_parallel,
            is_on_every_stage=on_every_stage,
            has_decay=has_decay,
            init=init,
        )
        place(parameter, placement, is_first_copy=self.is_first_chunk or not on_every_stage)


def column_linear(
    build: Build,
    names: Sequence[str],
    input_size: int,
    output_size: int,
    *,
    of_text: bool = False,
    has_bias: bool = True,
    leaves_bias: bool = False,
) -> Any:
    """Matrices of one input whose outputs are split over tensor-parallel ranks, fused into one product.

    Args:
        build: the layer's record.
        names: one name in model space for each matrix; each is [output_size, input_size] with a bias [output_size].
        input_size: width of the input.
        output_size: width of each output in model space.
        of_text: the input is the whole caption on every rank, not a shard of the tokens.
        has_bias: give the matrices biases.
        leaves_bias: return them beside the output, for the next op to add.

    Returns:
        megatron-core's ColumnParallelLinear, or its twin in FP8 or of Transformer Engine, with adapters where the run
        has some; it gives the matrices' local outputs side by side, and the bias that is still to be added, if any.
    """
    transformer = build.transformer
    if of_text and transformer.sequence_parallel:
        transformer = replace(transformer, sequence_parallel=False)
    # Captions stay out of FP8: they are few rows, and each context-parallel rank has a part of their gradient, so that
    # rounding would depend on the layout.
    fp8 = None if of_text else build.fp8
    build_linear = te_column(fp8) if build.is_te else column_class(fp8, names[0], build.mesh.group("tp_cp"))
    linear = build_linear(
        input_size,
        output_size * len(names),
        config=transformer,
        init_method=nn.Identity(),
        bias=has_bias,
        gather_output=False,
        skip_bias_add=leaves_bias,
        tp_group=build.mesh.group("tp"),
    )
    weights, biases = _columns(build, names, input_size, output_size)
    place(linear.weight, Placement(weights, frozenset({"tp"}), init=Init(std=input_size**-0.5)))
    if has_bias:
        place(linear.bias, Placement(biases, frozenset({"tp"}), has_decay=False))
    if build.is_te and fp8 is not None:
        return InFp8(linear)
    if build.lora.adapts(names[0]):
        return Adapted(linear, ColumnAdapter(build, names, input_size, output_size, of_text=of_text))
    return linear


def _columns(
    build: Build, names: Sequence[str], input_size: int, output_size: int
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Pieces of matrices whose outputs tensor-parallel ranks share, one after the other, and of their biases."""
    local = output_size // build.tp
    first = build.tp_rank * local
    weights, biases = [], []
    for number, name in enumerate(names):
        shape, box = (output_size, input_size), (local, input_size)
        weights.append(Piece(f"{name}.weight", shape, (first, 0), box, start=number * local * input_size))
        biases.append(Piece(f"{name}.bias", (output_size,), (first,), (local,), start=number * local))
    return tuple(weights), tuple(biases)


def row_linear(build: Build, name: str, input_size: int, output_size: int, *, has_bias: bool = True) -> Any:
    """A matrix whose input is split over tensor-parallel ranks; the sum goes to all of them, or to each its tokens.

    Returns:
        megatron-core's RowParallelLinear, or its twin in FP8 or of Transformer Engine, [output_size, input_size] in
        model space, with its bias if it has one, and with an adapter where the run has some.
    """
    build_linear = te_row(build.fp8) if build.is_te else row_class(build.fp8, name, build.mesh.group("tp_cp"))
    linear = build_linear(
        input_size,
        output_size,
        config=build.transformer,
        init_method=nn.Identity(),
        bias=has_bias,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=build.mesh.group("tp"),
    )
    local = input_size // build.tp
    piece = Piece(f"{name}.weight", (output_size, input_size), (0, build.tp_rank * local), (output_size, local))
    place(linear.weight, Placement((piece,), frozenset({"tp"}), init=Init(std=input_size**-0.5)))
    if has_bias:
        build.place_whole(linear.bias, f"{name}.bias", init=Init(), is_partial=True, has_decay=False)
    if build.is_te and build.fp8 is not None:
        return InFp8(linear)
    if build.lora.adapts(name):
        return Adapted(linear, RowAdapter(build, name, input_size, output_size))
    return linear


class PlainLinear(nn.Module):
    """A linear layer that every tensor-parallel rank holds whole, on every pipeline stage if asked."""

    def __init__(
        self,
        build: Build,
        name: str,
        input_size: int,
        output_size: int,
        *,
        init: Init | None = None,
        is_partial: bool = True,
        on_every_stage: bool = False,
        is_fp32: bool = False,
    ) -> None:
        super().__init__()
        self.weight = build.empty(output_size, input_size, is_fp32=is_fp32)
        self.bias = build.empty(output_size, is_fp32=is_fp32)
        init = init or Init(std=input_size**-0.5)
        build.place_whole(
            self.weight, f"{name}.weight", init=init, is_partial=is_partial, on_every_stage=on_every_stage
        )
        build.place_whole(
            self.bias,
            f"{name}.bias",
            init=Init(),
            is_partial=is_partial,
            on_every_stage=on_every_stage,
            has_decay=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` in the weight's dtype."""
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)
