"""The CUDA kernels' arithmetic, barriers and bindings without a GPU: run on a CPU, thread by thread."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.gpu_on_cpu import EMULATOR, ROOT, compile_kernel, link, translated

TESTS = [
    *(f"tests/unit/test_ops_{name}.py" for name in ("compiled", "moe", "quantize_fp8", "expert_activation_fp8")),
    "tests/support/gpu_emulator/device_checks.py",
]
"""Of the compiled ops: against their references, and what they are registered as."""
BLOCKS = 5

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ on this machine")

Run = Callable[[str], tuple[str, Tensor, Tensor]]


def test_the_kernels_pass_the_tests_of_the_compiled_ops(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.gpu_on_cpu", "-q", "--no-header", *TESTS]
    environment = os.environ | {"MEGAVID_GPU_ON_CPU": str(tmp_path), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert not re.search(r"\d+ skipped", done.stdout), done.stdout[-2000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An example kernel by its name: what the launch says, the sums it gave, and those that are right."""
    folder = tmp_path_factory.mktemp("examples")
    source = folder / "examples.cu"
    source.write_text(translated((EMULATOR / "examples.cu").read_text()))
    compile_kernel(source, folder / "examples.o")
    library = ctypes.CDLL(str(link([folder / "examples.o"], folder / "examples.so")))
    library.run.restype = ctypes.c_char_p

    def call(name: str) -> tuple[str, Tensor, Tensor]:
        x_BT, out_B = torch.arange(BLOCKS * 64, dtype=torch.float32).view(BLOCKS, 64), torch.zeros(BLOCKS)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_BT, out_B)]
        said = library.run(name.encode(), *pointers, BLOCKS).decode()
        return said, out_B, x_BT.sum(1)

    return call


@pytest.mark.parametrize("name", ["sum", "sum of warps"])
def test_a_kernel_that_is_right_gives_what_it_should(run: Run, name: str) -> None:
    for _ in range(5):
        said, found, right = run(name)
        assert said == ""
        assert torch.equal(found, right)


def test_a_missing_barrier_shows_in_the_sum(run: Run) -> None:
    said, found, right = run("sum without barriers")
    assert said == ""
    assert not torch.equal(found, right)


def test_memory_of_a_block_is_nothing_to_rely_on(run: Run) -> None:
    _, found, _ = run("unwritten")
    assert found[0] == 1
    assert found[1:].isnan().all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shuffle after some left", r"line \d+ waits for a lane that has left"),
        ("barriers in both branches", "threads wait at two barriers of the block"),
        ("warp that parts", r"lanes of a warp wait at line \d+ and at line \d+"),
        ("writes beyond", "a write beyond the memory of the block"),
        ("no blocks", "a launch of nothing"),
        ("tall grid", "too many blocks"),
        ("wide block", "too many threads for a block"),
        ("much memory", "more memory of the block than the kernel has asked for"),
        ("refuses", r"device-side assert: x\[0\] < 0\.0f"),
    ],
)
def test_what_a_device_would_not_survive_is_told(run: Run, name: str, message: str) -> None:
    said, _, _ = run(name)
    assert re.fullmatch(message, said)
    assert run("sum")[0] == ""  # the next launch begins afresh
