"""The CUDA kernels and their bindings on a CPU: a build of csrc/ whose threads are fibers, in the place of ``_C.so``.

A library of ops that takes CPU tensors and runs what a GPU would run, thread by thread, strict about barriers
(gpu_emulator/emulator.h). As a pytest plugin it has tests of the compiled ops load that library:

    MEGAVID_GPU_ON_CPU=FOLDER pytest -p tests.support.gpu_on_cpu tests/unit/test_ops_compiled.py
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from megavid.ops import compiled
from megavid.ops.sources import hash_of_sources

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "gpu_emulator"
BINDINGS = ("cuda", "cuda_moe")
LAUNCH = re.compile(r"(\S+)<<<(.*?)>>>\((.*?)\);")
"""A kernel's name, its grid, its arguments: what nvcc alone can read."""
TELLS = """
#include <string>
TORCH_LIBRARY_IMPL(megavid, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", [] { return std::string("cuda on a CPU"); });
  m.impl("built_with", [] { return std::string(MEGAVID_TORCH); });
  m.impl("built_from", [] { return std::string(MEGAVID_SOURCES); });
}
"""
"""What a library tells of itself; in csrc/ the CPU's binding does."""
CHECKED_ON_DEVICE = re.compile(r"must be in \\+\[|num_rows must be at least")
"""Messages of the CPU's binding about numbers that on a GPU the kernels check."""


def pytest_configure() -> None:
    """Have everything that asks for compiled ops load the build for this test run."""
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN: an output that is not written shows
    compiled.BINARY = build_library(Path(os.environ["MEGAVID_GPU_ON_CPU"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of these kernels: references alone, threads of a CPU, and checks of numbers by the host.

    And all that torch asks of an operator, which takes a second for each; gpu_emulator/device_checks.py asks what a
    binding could have wrong.
    """
    others = re.compile(rf"written_out|threads|registered_as_torch|{CHECKED_ON_DEVICE.pattern}")
    out = [item for item in items if others.search(item.name)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


def translated(source: str) -> str:
    """CUDA's source as C++: launches are calls, memory of a block's own a pointer, functions local to their file."""
    source = LAUNCH.sub(r"emulator::launch([&] { \1(\3); }, \2);", source)
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"auto* \2 = static_cast<\1*>(emulator::shared_memory());", source
    )
    return re.sub(r"^__device__ inline", "static inline", source, flags=re.M)


def compile_kernel(source: Path, target: Path, *flags: object) -> None:
    """Compile a file that has been translated, and all that it includes, to an object."""
    given = ["-O1", f"-I{EMULATOR}/kernels", "-D__CUDACC__", "-include", EMULATOR / "emulator.h", *flags]
    _compile(source, target, *given, "-x", "c++")


def link(objects: Sequence[Path], library: Path, *flags: object) -> Path:
    """A library of these objects and the emulator."""
    emulator = library.with_suffix(".emulator.o")
    _compile(EMULATOR / "emulator.cpp", emulator, "-O2")
    _run(["g++", "-shared", *objects, emulator, *flags, "-o", library])
    return library


def build_library(folder: Path) -> Path:
    """Compile csrc/cuda and its bindings, registered for CPU tensors, into a library in ``folder``."""
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    for path in sources.glob("cuda/*.cu*"):
        path.write_text(translated(path.read_text()))
    for name in BINDINGS:
        path = sources / f"bind/{name}.cpp"
        text = path.read_text().replace("TORCH_LIBRARY_IMPL(megavid, CUDA, m)", "TORCH_LIBRARY_IMPL(megavid, CPU, m)")
        path.write_text(text + (TELLS if name == BINDINGS[0] else ""))
    headers = [flag for path in cpp_extension.include_paths("cpu") for flag in ("-isystem", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    told = [f'-DMEGAVID_TORCH="{torch.__version__}"', f'-DMEGAVID_SOURCES="{hash_of_sources()}"']
    bindings, kernels = (sorted(sources.glob(pattern)) for pattern in ("bind/cuda*.cpp", "cuda/*.cu"))
    objects = {path: folder / f"{path.parent.name}_{path.stem}.o" for path in [*bindings, *kernels]}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_compile, path, objects[path], "-O0", abi, *told, *headers) for path in bindings]
        jobs += [pool.submit(compile_kernel, path, objects[path]) for path in kernels]
        for job in jobs:
            job.result()
    paths = [f"-L{path}" for path in cpp_extension.library_paths("cpu")]
    return link([*objects.values()], folder / "gpu_on_cpu.so", *paths, "-ltorch_cpu", "-lc10")


def _compile(source: Path, target: Path, *flags: object) -> None:
    said = _run(["g++", "-std=c++20", "-fPIC", "-Wall", f"-I{EMULATOR}", *flags, "-c", source, "-o", target])
    assert "warning" not in said, said


def _run(command: Sequence[object]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(str(part) for part in command)}\n{done.stderr[-4000:]}"
    return done.stderr
