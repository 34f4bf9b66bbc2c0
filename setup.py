"""Build script: pyproject.toml says everything about the package; this adds the compiled ops of csrc/.

The CPU kernels are compiled once for each instruction set, and one thin binding registers them with torch's dispatcher;
the CUDA kernels join them where nvcc and a CUDA build of torch are there. Without a compiler, or without torch at build
time (build isolation), nothing is built and every op runs on its reference: `megavid doctor` says which it is.
"""

import os
import platform
import shutil
import sys
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
CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildOps(build_ext):
    """Compiles and links megavid/ops/_C.so by hand: setuptools compiles a file once, these are compiled per set."""

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils import cpp_extension

        objects: list[Path] = []
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        compiler = shutil.which(os.environ.get("CXX", "g++")) or "c++"
        sets = INSTRUCTION_SETS.get(platform.machine(), {"baseline": []})
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            for name, flags in sets.items():
                target = temp / f"{source.stem}_{name}.o"
                self._run(compiler, *CPU_FLAGS, *flags, f"-DMEGAVID_ISA={name}", "-c", source, "-o", target)
                objects.append(target)
        includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
        bindings = ["cpu"]
        libraries = ["-ltorch_cpu", "-lc10"]
        if nvcc := _nvcc(torch):
            bindings.append("cuda")
            libraries += ["-ltorch_cuda", "-lc10_cuda", f"-L{Path(nvcc).parents[1]}/lib64", "-lcudart"]
            includes += ["-isystem", str(Path(nvcc).parents[1] / "include")]
            architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                target = temp / f"{source.stem}_cuda.o"
                self._run(nvcc, *CUDA_FLAGS, *architectures, "-c", source, "-o", target)
                objects.append(target)
        # torch's own headers ask for its own standard and its own choice of the string ABI.
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        for binding in bindings:
            target = temp / f"bind_{binding}.o"
            source = ROOT / f"csrc/bind/{binding}.cpp"
            flags = ["-std=c++20", "-O2", "-fopenmp", "-fPIC", "-Wall", abi]
            self._run(compiler, *flags, *includes, "-c", source, "-o", target)
            objects.append(target)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        paths = [f"-L{path}" for path in cpp_extension.library_paths()]
        self._run(compiler, "-shared", *objects, *paths, *libraries, "-o", output)

    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split(".")).with_suffix(".so"))

    def _run(self, *command: object) -> None:
        self.spawn([str(part) for part in command])


def _nvcc(torch) -> str:  # type: ignore[no-untyped-def]
    """nvcc where this torch can use what it compiles, else nothing."""
    return (shutil.which("nvcc") or "") if torch.version.cuda else ""


def _can_build() -> bool:
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("c++") is None:
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
    ext_modules=[Extension("megavid.ops._C", sources=[])] if _can_build() else [],
    cmdclass={"build_ext": BuildOps},
)
