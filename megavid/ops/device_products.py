"""Products of eight-bit tensors that some GPUs have and others have not: with tiles, and of experts in one call.

Owns the layouts in which they take scales, and the trials that find them. Tiles of e4m3: ``scaled_mm`` of
``torch.nn.functional``, which is cuBLASLt's product, of 128 on compute capability 9 and of 32 from 10 on. Experts of
e4m3 with one scale, and results in bf16: ``torch._scaled_grouped_mm`` on compute capability 9; torch lets 10 through to
a kernel that is not built for it.

Whether a GPU has one is found by trying, once in a process: it depends on torch and on cuBLAS too, and where scales do
not lie as cuBLAS reads them some versions give wrong sums and no error (pytorch/pytorch#166752). A product that does
not agree with its slow twin on a small example is not taken. A kernel that traps ends the process, trial or not: hence
the look at the GPU's generation first.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from megavid.ops.fp8 import (
    E4M3,
    E8M0,
    Quantized,
    amax_of,
    dequantize,
    quantize,
    quantize_tiles,
    scale_of,
    scaled_matmul_reference,
)

Tile = tuple[int, int]
ROW_128, SQUARE_128, ROW_32 = (1, 128), (128, 128), (1, 32)
TILED: set[tuple[Tile | None, Tile | None]] = {(ROW_128, SQUARE_128), (ROW_128, ROW_128), (ROW_32, ROW_32)}
"""Tiles of both operands that GPUs multiply: of ``blockwise`` by a matrix and for its gradient, and of ``mxfp8``."""
ALIGNMENT = 16
"""GPUs want widths, and the rows of operands with tiles, to be multiples of this."""
FIRST_TILED = TorchVersion("2.10")
"""torch from which on a product is told how its operands are scaled."""
TRIALS = (((69, 0, 72), 96, 640), ((300, 0, 340), 256, 640), ((300, 0, 340), 2048, 2048))
"""Rows of each group, columns and width of the products of experts that are tried: torch has a kernel for each kind."""
TRIAL_ERROR = 0.01
"""What a product may be off its twin in a trial, of the sum of magnitudes: scales that are read in a wrong place put it
off by factors, a GPU's narrow sums by a thousandth."""


logger = logging.getLogger(__name__)


class Format(NamedTuple):
    """What an operand is, but for its numbers: see ``Quantized``."""

    dtype: torch.dtype
    tile: Tile | None

    @classmethod
    def of(cls, x: Quantized) -> "Format":
        """That of ``x``."""
        return cls(x.data.dtype, x.tile)


@lru_cache
def has_tiled_product(device: torch.device, a: Format, b: Format, dtype: torch.dtype) -> bool:
    """Whether ``tiled_product`` of such operands runs on ``device`` and is right; the first call waits for the GPU."""
    is_offered = device.type == "cuda" and (a.tile, b.tile) in TILED and a.dtype == b.dtype == E4M3
    if not is_offered or TorchVersion(torch.__version__) < FIRST_TILED:
        return False
    generation, _ = torch.cuda.get_device_capability(device)
    if not (generation >= 10 if a.tile == ROW_32 else generation == 9):
        return False
    x, y = example(141, 640, a, device), example(256, 640, b, device, seed=1)
    return agrees(lambda: tiled_product(x, y, dtype), [(x, y)])


@lru_cache
def has_grouped_product(device: torch.device, a: Format, b: Format, dtype: torch.dtype) -> bool:
    """The same of ``grouped_product``."""
    is_offered = device.type == "cuda" and a == b == Format(E4M3, None) and dtype == torch.bfloat16
    if not is_offered or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    return all(is_grouped_product_right(sizes, columns, width, device) for sizes, columns, width in TRIALS)


def is_grouped_product_right(sizes: tuple[int, ...], columns: int, width: int, device: torch.device) -> bool:
    """Whether ``grouped_product`` agrees with its twin where every group has a matrix of its own."""
    form = Format(E4M3, None)
    x, y = example(sum(sizes), width, form, device), example(len(sizes) * columns, width, form, device, seed=1)
    stack = Quantized(y.data.view(len(sizes), columns, width), y.scale)
    ends = accumulate(sizes)
    pairs = [(x.rows(end - size, end), stack.matrix(group)) for group, (size, end) in enumerate(zip(sizes, ends))]
    return agrees(lambda: grouped_product(x, stack, sizes, torch.bfloat16), pairs)


def tiled_product(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """``megavid.ops.scaled_matmul.scaled_matmul`` of operands with tiles, by torch's product.

    Raises:
        RuntimeError, ValueError: the GPU, cuBLAS or torch has none.
    """
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    assert a.tile, "a has tiles"
    assert b.tile, "b has tiles"
    recipes = {
        ROW_128: ScalingType.BlockWise1x128,
        SQUARE_128: ScalingType.BlockWise128x128,
        ROW_32: ScalingType.BlockWise1x32,
    }
    swizzle = SwizzleType.SWIZZLE_32_4_4 if a.tile == ROW_32 else SwizzleType.NO_SWIZZLE
    out = scaled_mm(
        filled_up(a.data, ALIGNMENT, a.tile[1]),
        filled_up(b.data, ALIGNMENT, b.tile[1]).t(),
        laid_out(a),
        recipes[a.tile],
        laid_out(b),
        recipes[b.tile],
        swizzle_a=swizzle,
        swizzle_b=swizzle,
        output_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )
    return out[: a.data.shape[0], : b.data.shape[0]].to(dtype)


def grouped_product(a: Quantized, b: Quantized, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``megavid.ops.scaled_matmul.scaled_grouped_matmul`` of operands with one scale each, by torch's product.

    torch has it for a scale for each row alone, so every row gets the same one.

    Raises:
        RuntimeError, ValueError: the GPU or torch has none.
    """
    groups, columns = b.data.shape[:2]
    ends = torch.tensor(list(accumulate(sizes)), dtype=torch.int32).to(a.data.device, non_blocking=True)
    out = torch._scaled_grouped_mm(
        a.data.contiguous(),
        b.data.contiguous().transpose(-1, -2),
        scale_a=a.scale.expand(a.data.shape[0]).contiguous(),
        scale_b=b.scale.expand(groups, columns).contiguous(),
        offs=ends,
        out_dtype=torch.bfloat16,
    )
    return out.to(dtype)


def filled_up(data: Tensor, rows: int, columns: int) -> Tensor:
    """Eight-bit numbers, contiguous, with zeros behind them up to multiples of ``rows`` and ``columns``."""
    below, behind = -data.shape[0] % rows, -data.shape[1] % columns
    if below or behind:  # as bytes: padding knows no eight-bit floats, and a byte of 0 is their 0
        return torch.nn.functional.pad(data.view(torch.uint8), (0, behind, 0, below)).view(data.dtype)
    return data.contiguous()


def laid_out(x: Quantized) -> Tensor:
    """Scales of ``x`` where cuBLASLt reads them, once ``filled_up``; what belongs to zeros is 0.

    A row's tiles of 128: [rows, tiles], rows one after the other. Squares: [tiles of the width, tiles of the rows], the
    former one after the other and filled up to a multiple of 4. A row's tiles of 32: blocks of 128 rows x 4 tiles, row
    32 i + j of a block at 16 j + 4 i (https://docs.nvidia.com/cuda/cublas/, "scaling factors layouts").
    """
    down, across = x.scale.shape
    if x.tile == SQUARE_128:
        squares = x.scale.new_zeros(down, across + -across % 4)
        squares[:, :across] = x.scale
        return squares.t()
    if x.tile == ROW_128:
        rows = x.scale.new_zeros(across, down + -down % ALIGNMENT)
        rows[:, :down] = x.scale.t()
        return rows.t()
    blocks = x.scale.new_zeros(down + -down % 128, across + -across % 4, dtype=torch.uint8)
    blocks[:down, :across] = x.scale.view(torch.uint8)
    parts = blocks.view(blocks.shape[0] // 128, 4, 32, blocks.shape[1] // 4, 4)
    return parts.permute(0, 3, 2, 1, 4).reshape(-1).view(E8M0)


def example(rows: int, width: int, form: Format, device: torch.device, *, seed: int = 0) -> Quantized:
    """A matrix whose tiles have scales of many magnitudes; five tiles of 128 across cuBLAS fills up to eight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    for high, wide in (SQUARE_128, ROW_32):
        exponent = torch.randint(-4, 5, (-(-rows // high), width // wide), generator=generator)
        x *= (2.0**exponent).repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)
    x = x.to(device)
    if form.tile is None:
        return quantize(x, scale_of(amax_of(x), form.dtype), form.dtype)
    scale_dtype = E8M0 if form.tile == ROW_32 else torch.float32
    return quantize_tiles(x, form.tile, form.dtype, scale_dtype=scale_dtype)


@torch.no_grad()
def agrees(product: Callable[[], Tensor], pairs: Sequence[tuple[Quantized, Quantized]]) -> bool:
    """Whether ``product`` runs, and gives ``a @ b.T`` of each pair, one after the other; says so where not.

    Raises:
        torch.OutOfMemoryError: there was no room to try.
    """
    try:
        found = product().float()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # so torch says that the GPU, cuBLAS or it has no such product
        logger.warning("a product in FP8 is left out: %s", " ".join(str(error).split())[:200])
        return False
    wanted = torch.cat([scaled_matmul_reference(a, b, torch.float32) for a, b in pairs])
    magnitudes = torch.cat([dequantize(a).abs() @ dequantize(b).abs().t() for a, b in pairs])
    if not bool(((found - wanted).abs() <= TRIAL_ERROR * magnitudes).all()):
        logger.warning("a product in FP8 is left out: it differs from its twin on %s; please report it", found.device)
        return False
    return True
