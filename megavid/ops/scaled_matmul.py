"""Products of tensors in eight bits, by the fastest way that a device has.

One scale each: ``torch._scaled_mm``, on CPU and on NVIDIA GPUs of compute capability 8.9 and up. Tiles, and experts
that share one scale: ``megavid.ops.device_products``' where they run. Everything else is turned back into wide numbers
and multiplied as such, which is right everywhere and no faster than a wide product.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megavid.ops.device_products import (
    ALIGNMENT,
    Format,
    filled_up,
    grouped_product,
    has_grouped_product,
    has_tiled_product,
    tiled_product,
)
from megavid.ops.fp8 import E5M2, Quantized, scaled_matmul_reference


def scaled_matmul(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """``a @ b.T`` of two matrices, summed in fp32.

    Args:
        a: [M, K].
        b: [N, K]; not both e5m2, which GPUs cannot multiply.
        dtype: of the result.

    Returns:
        [M, N].

    Raises:
        ValueError: the widths differ, or both are e5m2.
    """
    _check(a, b)
    device = a.data.device
    if a.data.numel() == 0 or b.data.numel() == 0:
        return torch.zeros(a.data.shape[0], b.data.shape[0], dtype=dtype, device=device)
    if a.tile is b.tile is None:
        if device.type == "cpu":
            return _one_scale(a.data, b.data, a.scale, b.scale, dtype)
        if has_scaled_mm(device) and b.data.shape[0] % ALIGNMENT == 0:
            left, right = filled_up(a.data, 1, ALIGNMENT), filled_up(b.data, 1, ALIGNMENT)
            return _one_scale(left, right, a.scale, b.scale, dtype)
    elif has_tiled_product(device, Format.of(a), Format.of(b), dtype):
        return tiled_product(a, b, dtype)
    return scaled_matmul_reference(a, b, dtype)


def scaled_grouped_matmul(a: Quantized, b: Quantized, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``a @ b[group of the row].T``: rows of ``a`` group by group, each group with a matrix.

    Args:
        a: [S, K], with one scale or with tiles one row high.
        b: [groups, N, K]; not both e5m2.
        sizes: rows of each group; they sum to S.
        dtype: of the result.

    Returns:
        [S, N].

    Raises:
        ValueError: the widths differ, or both are e5m2.
    """
    _check(a, b)
    is_aligned = b.data.shape[-2] % ALIGNMENT == b.data.shape[-1] % ALIGNMENT == 0
    is_grouped = len(sizes) > 1 and a.data.numel() > 0 and is_aligned
    if is_grouped and has_grouped_product(a.data.device, Format.of(a), Format.of(b), dtype):
        return grouped_product(a, b, sizes, dtype)
    ends = accumulate(sizes)
    parts = [
        scaled_matmul(a.rows(end - size, end), b.matrix(group), dtype)
        for group, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def has_scaled_mm(device: torch.device) -> bool:
    """Whether ``device`` multiplies eight-bit matrices with one scale each."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def _check(a: Quantized, b: Quantized) -> None:
    if a.data.shape[-1] != b.data.shape[-1]:
        raise ValueError(f"scaled_matmul: a and b must have one width, got {a.data.shape[-1]} and {b.data.shape[-1]}")
    if a.data.dtype == b.data.dtype == E5M2:
        raise ValueError("scaled_matmul: a and b must not both be e5m2; GPUs have no such product")


def _one_scale(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    return torch._scaled_mm(left, right.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=narrow).to(dtype)
