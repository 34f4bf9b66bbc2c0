"""Which block attention runs where: the one place that looks for installed backends.

Owns the choice by name and device. What each can do is the table in ``block_attention``.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch

from megavid.errors import ConfigError
from megavid.ops.block_attention import CAPABILITIES, BlockAttention, ReferenceAttention, check_capability
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
    _check_generation(name, device)
    return kernel


@lru_cache
def _check_generation(name: str, device: torch.device) -> None:
    wanted = CAPABILITIES[name, device.type].compute_capability
    if wanted is None:
        return
    found = torch.cuda.get_device_capability(device)
    if found != wanted:
        raise ConfigError(
            f"attention backend '{name}' runs on GPUs of compute capability {'.'.join(map(str, wanted))}, {device} has "
            f"{'.'.join(map(str, found))}; set parallel.attention_backend = 'aten'"
        )


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
        case "flash_attn":
            from megavid.ops.block_attention_flash import FlashAttn  # the package starts CUDA when it is imported

            return FlashAttn()
        case "flash_attn_3":
            from megavid.ops.block_attention_flash3 import FlashAttn3  # likewise

            return FlashAttn3()
        case "reference":
            return ReferenceAttention()
    raise AssertionError(name)
