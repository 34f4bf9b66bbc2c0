"""Build script: pyproject.toml says everything about the package; this adds the compiled ops of csrc/.

The CPU kernels are compiled once for each instruction set, and one thin binding registers them with torch's dispatcher;
the CUDA kernels join them where nvcc and a CUDA build of torch are there. Without a compiler, or without torch at build
time (build isolation), nothing is built and every op runs on its reference: `megavid doctor` says which it is.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# What the compiler may use where; which of them runs is asked of the machine at run time.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    },
}
# `omp simd` may reorder sums; nothing else may, so -ffast-math stays away.
CPU_FLAGS = ["-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wall", "-Wextra"]
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC"]
CUDA_ARCHITECTURES = ("80", "90", "100")  # of these, the ones that the nvcc at hand knows


class BuildOps(build_ext):
    """Compiles and links megavid/ops/_C.so by hand: setuptools compiles a file once, these are compiled per set."""

    def run(self) -> None:
        self._forget()
        super().run()

    def _forget(self) -> None:
        """Remove what was built before: what does not compile is not there, so nothing old is taken for it."""
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils import cpp_extension

        self._forget()  # in the build folder now, from where setuptools copies; run() did so in place
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        has_cuda = bool(torch.version.cuda and cpp_extension.CUDA_HOME)
        device = "cuda" if has_cuda else "cpu"
        compiler = _compiler()
        jobs = _cpu_jobs(compiler, temp)
        libraries = ["-ltorch_cpu", "-lc10"]
        if has_cuda:
            jobs += _cuda_jobs(str(Path(cpp_extension.CUDA_HOME) / "bin/nvcc"), temp)
            libraries += ["-ltorch_cuda", "-lc10_cuda", "-lcudart"]
        # torch's own headers ask for its own standard and its own choice of the string ABI.
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        sources = runpy.run_path(str(ROOT / "megavid/ops/sources.py"))["hash_of_sources"]()
        built = [f'-DMEGAVID_TORCH="{torch.__version__}"', f'-DMEGAVID_SOURCES="{sources}"']
        flags = ["-std=c++20", "-O2", "-fopenmp", "-fPIC", "-Wall", abi, *built]
        flags += [flag for path in cpp_extension.include_paths(device) for flag in ("-isystem", path)]
        for binding in ["cpu", "cpu_moe", "cuda", "cuda_moe"] if has_cuda else ["cpu", "cpu_moe"]:
            target = temp / f"bind_{binding}.o"
            jobs.append([compiler, *flags, "-c", ROOT / f"csrc/bind/{binding}.cpp", "-o", target])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._run, jobs))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        paths = [f"-L{path}" for path in cpp_extension.library_paths(device)]
        # Linked beside its place and moved: a process that has the old one loaded keeps it.
        linked = temp / output.name
        self._run([compiler, "-shared", *(job[-1] for job in jobs), *paths, *libraries, "-o", linked])
        shutil.copy2(linked, output.with_suffix(".new"))
        output.with_suffix(".new").replace(output)

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split(".")).with_suffix(".so"))

    def _run(self, command: Sequence[object]) -> None:
        self.spawn([str(part) for part in command])


def _cpu_jobs(compiler: str, temp: Path) -> list[list[object]]:
    """A command for every CPU kernel file and instruction set; the last word is the object file."""
    sets = INSTRUCTION_SETS.get(platform.machine(), {"baseline": []})
    return [
        [compiler, *CPU_FLAGS, *flags, f"-DMEGAVID_ISA={name}", "-c", source, "-o", temp / f"{source.stem}_{name}.o"]
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        for name, flags in sets.items()
    ]


def _cuda_jobs(nvcc: str, temp: Path) -> list[list[object]]:
    """A command for every CUDA kernel file, for all architectures that this nvcc knows, and for what follows them."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    architectures = [a for a in CUDA_ARCHITECTURES if f"sm_{a}" in known]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in architectures[-1:]]
    return [
        [nvcc, *CUDA_FLAGS, *codes, "-c", source, "-o", temp / f"{source.stem}_cuda.o"]
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ]


def _compiler() -> str:
    """The C++ compiler, "" where there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++") or ""


def _can_build() -> bool:
    if not (ROOT / "csrc/cpu").is_dir():  # an installation without the sources of the ops
        return False
    if not _compiler():
        print("megavid: no C++ compiler; ops run on their references", file=sys.stderr)
        return False
    try:
        import torch  # noqa: F401
    except ImportError:
        hint = "install torch first and pass --no-build-isolation"
        print(f"megavid: no torch at build time; ops run on their references ({hint})", file=sys.stderr)
        return False
    return True


setup(
    # Optional: where it does not compile, setuptools says so and goes on.
    ext_modules=[Extension("megavid.ops._C", sources=[], optional=True)] if _can_build() else [],
    cmdclass={"build_ext": BuildOps},
)
