"""Which block attention runs where: the one place that looks for installed backends.

Owns the choice by name and device. What each can do is the table in ``block_attention``.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch

from megavid.errors import ConfigError
from megavid.ops.block_attention import (
    CAPABILITIES,
    BlockAttention,
    ReferenceAttention,
    check_capability,
    check_generation,
)
from megavid.ops.block_attention_aten import CpuFlash, CudaAten, CudaCudnn

NEEDS = {"flash_attn": "flash_attn", "flash_attn_3": "flash_attn_interface"}
"""Module that a backend comes with, where it is not torch."""


def installed() -> frozenset[str]:
    """Backends whose package is there, whatever the device."""
    names = {name for name, _ in CAPABILITIES}
    return frozenset(name for name in names if name not in NEEDS or find_spec(NEEDS[name]) is not None)


def block_attention(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> BlockAttention:
    """The backend ``name`` for tensors of this device, dtype and head width.

    Raises:
        ConfigError: unknown, not installed, or not able.
    """
    kernel = _block_attention(name, device.type, dtype, head_size)
    if device.type == "cuda":
        check_generation(name, _generation(device), dtype, head_size)
    return kernel


@lru_cache
def _generation(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache
def _block_attention(name: str, device: str, dtype: torch.dtype, head_size: int) -> BlockAttention:
    check_capability(name, device, dtype, head_size)
    if name not in installed():
        raise ConfigError(f"attention backend '{name}' needs the package {NEEDS[name]}; install it, or set 'aten'")
    match name:
        case "aten":
            return CudaAten() if device == "cuda" else CpuFlash()
        case "cudnn":
            return CudaCudnn()
        case "reference":
            return ReferenceAttention()
    try:
        return _of_package(name)
    except (ImportError, OSError) as error:  # built for another torch, or for another CUDA
        raise ConfigError(
            f"attention backend '{name}': the package {NEEDS[name]} is there and cannot be imported "
            f"({' '.join(str(error).split())[:160]}); install a build for torch {torch.__version__}, or set 'aten'"
        ) from error


def _of_package(name: str) -> BlockAttention:
    """A backend whose package starts CUDA when it is imported."""
    if name == "flash_attn":
        from megavid.ops.block_attention_flash import FlashAttn

        return FlashAttn()
    assert name == "flash_attn_3", name
    from megavid.ops.block_attention_flash3 import FlashAttn3, check_interface

    check_interface()
    return FlashAttn3()
