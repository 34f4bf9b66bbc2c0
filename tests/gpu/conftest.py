"""What tests of the CUDA kernels need: a GPU and the compiled ops for it."""

import os

import pytest
import torch

from megavid.errors import ConfigError
from megavid.ops.choose import block_ops


@pytest.fixture(scope="session")
def cuda_kernels() -> None:
    """Skips where there are none; fails there if MEGAVID_NEEDS_KERNELS is set, as tools/gpu_check.sh does."""
    absent = pytest.fail if os.environ.get("MEGAVID_NEEDS_KERNELS") else pytest.skip
    if not torch.cuda.is_available():
        absent("needs a GPU")
    try:
        block_ops("compiled", torch.device("cuda"), torch.float32)
    except ConfigError as error:
        absent(str(error))
