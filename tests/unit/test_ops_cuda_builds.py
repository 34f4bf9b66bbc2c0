"""The CUDA sources compile without a GPU: kernels for every architecture, the binding against torch's headers."""

import ast
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ROW = "row >= 0 && row < rows"
CHECKED = {
    "modulated_norm": [ROW],
    "gated_residual_norm": [ROW],
    "gated_residual": [ROW],
    "expert_activation": [ROW],
    "router_topk": [ROW],
    "moe_index": ["begin <= job.num_rows"],
}
"""What a kernel asserts of the numbers it is given."""
NVCC = shutil.which("nvcc")
CXX = shutil.which("g++")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc on this machine")


def of_setup(name: str) -> Any:
    """A constant of setup.py, which runs when it is imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise AssertionError(name)


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def defined_in(kernel: Path) -> list[str]:
    """Names of what a file defines for the bindings, without their prefix."""
    return re.findall(
        r"^(?:cudaError_t megavid_cuda_|MEGAVID_ENTRY\(|MEGAVID_ENTRY_SUMS\()(\w+)", kernel.read_text(), re.M
    )


@needs_nvcc
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_kernels_compile_for_every_architecture(kernel: Path, tmp_path: Path) -> None:
    assert set(of_setup("CUDA_ARCHITECTURES")) == {"80", "90", "100"}
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in of_setup("CUDA_ARCHITECTURES")]
    target = tmp_path / "kernel.o"
    said = run(NVCC, *of_setup("CUDA_FLAGS"), "-Xcompiler=-Wall", *codes, "-c", kernel, "-o", target)
    assert "warning" not in said
    # Under its C name: a definition that does not match its declaration has another.
    symbols = re.findall(r"\bmegavid_cuda_(\w+)", run("nm", "--defined-only", "--extern-only", target))
    assert sorted(symbols) == sorted(defined_in(kernel))
    # Numbers that the host does not check are checked on the device: nothing defines NDEBUG.
    for assertion in CHECKED.get(kernel.stem, ()):
        assert assertion.encode() in target.read_bytes()


def test_every_kernel_of_the_header_is_defined_once() -> None:
    promised = re.findall(r"^cudaError_t megavid_cuda_(\w+)\(", (ROOT / "csrc/cuda/kernels.h").read_text(), re.M)
    assert sorted(promised) == sorted(name for kernel in KERNELS for name in defined_in(kernel))


@needs_nvcc
@pytest.mark.skipif(CXX is None, reason="there is no g++ on this machine")
@pytest.mark.parametrize("binding", ["cuda", "cuda_moe"])
def test_the_binding_compiles_against_this_torch(binding: str, tmp_path: Path) -> None:
    # A CPU build of torch ships the headers but for one, of two lines.
    stub = tmp_path / "include/c10/cuda/impl/cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    said = run(NVCC, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", tmp_path / "nothing.o")
    (toolkit,) = re.findall(r'INCLUDES="-I([^"]+)"', said)
    includes = [*cpp_extension.include_paths(), tmp_path / "include", toolkit.strip()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = ["-std=c++20", "-O0", "-Wall", abi, *(part for path in includes for part in ("-isystem", path))]
    said = run(CXX, *flags, "-c", ROOT / f"csrc/bind/{binding}.cpp", "-o", tmp_path / "cuda.o")
    assert "warning" not in said
