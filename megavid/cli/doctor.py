"""``megavid doctor``: what this machine has, and what is therefore on or off.

Owns the probes. Each answers with a row and never raises: a broken package is what people come here to find.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from megavid import __version__
from megavid.cli.versions import VERSIONS
from megavid.cluster.environment import ORDERED, USUAL, Setting

HELP = "what this machine has (CUDA, Transformer Engine, apex, ...), and what is therefore on or off"


_BROKEN = (ImportError, RuntimeError, OSError, AttributeError, NameError, TypeError, ValueError)
"""What importing a package that does not fit this machine raises; TE without CUDA, a RuntimeError."""


State = Literal["on", "off", "warn", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the report."""

    name: str
    """What was looked for."""
    state: State
    """``off`` is fine (optional), ``missing`` is not (required), ``warn`` works but not as meant."""
    found: str
    """What was found."""
    effect: str
    """What follows from it."""


def main(argv: list[str]) -> int:
    """Print the report; 0 unless something that megavid needs is missing (then 3)."""
    parser = argparse.ArgumentParser(prog="megavid doctor", description=HELP)
    parser.parse_args(argv)
    findings = examine()
    print(f"megavid {__version__} on {platform.platform()}, {os.cpu_count()} CPU cores\n")
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.state:8}{finding.name:{width}}  {finding.found}")
        print(f"{'':8}{'':{width}}  -> {finding.effect}")
    return 3 if any(finding.state == "missing" for finding in findings) else 0


def examine() -> list[Finding]:
    """All findings, required things first."""
    probes: list[Callable[[], Finding]] = [
        *(_python, _torch, _megatron_core, _cuda, _communication),
        *(_transformer_engine, _apex, _deepspeed, _flex_dispatchers, _compiled_ops, _compiler, _fp8, _attention),
        *(_inference, _video, _versions, _job, _caches),
    ]
    return [probe() for probe in probes]


def version_of(package: str) -> str:
    """Version of an installed distribution, "" where there is none; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def why_not(module: str) -> str:
    """Import ``module`` and say why that failed, in one line; "" where it did not."""
    try:
        with warnings.catch_warnings(action="ignore"):  # megatron-core says what it lacks; so do the rows below
            importlib.import_module(module)
    except _BROKEN as error:
        return f"{type(error).__name__}: {_line(error)}"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _python() -> Finding:
    # No check of the least version: an older Python cannot read this file.
    return Finding("Python", "on", f"{platform.python_version()} ({sys.executable})", "supported")


def _torch() -> Finding:
    version = version_of("torch")
    trouble = why_not("torch") if version else "not installed"
    if trouble:
        return Finding("torch", "missing", f"{version} {trouble}".strip(), "nothing trains; see the README")
    return Finding("torch", "on", version, "the engine and the ops")


def _megatron_core() -> Finding:
    version = version_of("megatron-core")
    if not version:
        return Finding("megatron-core", "missing", "not installed", "nothing trains; pip install megatron-core")
    trouble = why_not("megatron.core")
    if trouble:
        return Finding("megatron-core", "missing", f"{version}: {trouble}", "nothing trains")
    return Finding("megatron-core", "on", version, "the parallel engine")


def _cuda() -> Finding:
    if why_not("torch"):
        return Finding("CUDA", "off", "torch cannot be imported", "no device can be asked for")
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or "none (a CPU build of torch)"
        return Finding("CUDA", "off", f"no device; torch's CUDA: {built}", "ranks run on CPU over gloo")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices)
    found = f"{len(devices)} x [{names}], CUDA {torch.version.cuda}, driver {_driver()}"
    return Finding("CUDA", "on", found, "ranks run on GPUs over NCCL")


def _driver() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown (no nvidia-smi)"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return (answer.stdout.split() or ["unknown"])[0]


def _communication() -> Finding:
    if why_not("torch"):
        return Finding("communication", "missing", "torch cannot be imported", "no ranks")
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("communication", "missing", "torch.distributed is not built in", "one rank at most")
    backends = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
    found = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in backends.items())
    state: Literal["on", "missing"] = "on" if any(backends.values()) else "missing"
    return Finding("communication", state, found, "nccl for GPUs, gloo for CPU")


def _transformer_engine() -> Finding:
    name, version = "Transformer Engine", version_of("transformer-engine")
    if not version:
        effect = 'megavid\'s own layers, in FP8 too; precision.linears = "transformer_engine" is refused'
        return Finding(name, "off", "not installed", effect)
    trouble = why_not("transformer_engine.pytorch")
    if not trouble:
        effect = (
            'precision.linears = "transformer_engine" takes its linears on GPUs, tried on none yet; AdamW is torch\'s'
        )
        return Finding(name, "on", version, effect)
    effect = "left out, which changes nothing; pip uninstall transformer-engine where there is no CUDA"
    return Finding(name, "warn", f"{version}: {trouble}", effect)


def _apex() -> Finding:
    version = version_of("apex")
    if not version:
        return Finding("apex", "off", "not installed", "nothing: AdamW is torch's fused one")
    trouble = why_not("apex.optimizers")
    if trouble:
        effect = "PyPI's apex is another project: pip uninstall apex, and build NVIDIA's from source (Dockerfile)"
        return Finding("apex", "warn", f"{version}: {trouble}", effect)
    return Finding("apex", "on", version, "imports, and changes nothing: AdamW is torch's fused one")


def _deepspeed() -> Finding:
    # Only looked up: importing it may start a compiler.
    version = version_of("deepspeed")
    if not version:
        return Finding("DeepSpeed", "off", "not installed", "no train.backend = 'deepspeed'")
    return Finding("DeepSpeed", "on", version, "ZeRO for runs that ask for it: train.backend = 'deepspeed'")


def _flex_dispatchers() -> Finding:
    found = [label for label, package in (("DeepEP", "deep-ep"), ("HybridEP", "hybrid-ep")) if version_of(package)]
    if not found:
        effect = 'parallel.dispatcher = "flex" is refused; alltoall and allgather work'
        return Finding("DeepEP, HybridEP", "off", "not installed", effect)
    return Finding("DeepEP, HybridEP", "on", ", ".join(found), 'parallel.dispatcher = "flex" on GPUs')


def _compiled_ops() -> Finding:
    name, plain = "compiled ops", 'norms, residuals, experts in plain torch; train.ops = "compiled" is refused'
    if trouble := why_not("megavid.ops.block_ops"):  # which declares all ops, so that all of them are asked for
        return Finding(name, "off", trouble, plain)
    import torch

    from megavid.ops.compiled import compiled_devices, instruction_set, why_not_compiled

    if reason := why_not_compiled():
        return Finding(name, "off", reason, plain)
    devices = compiled_devices()
    found = ", ".join(f"{device} ({instruction_set()})" if device == "cpu" else device for device in devices)
    if torch.cuda.is_available() and "cuda" not in devices:
        return Finding(name, "warn", f"built for {found}, not for cuda: no nvcc at build time?", plain + " on GPUs")
    return Finding(name, "on", f"built for {found}", 'train.ops = "auto", the default, and "compiled" take them')


def _compiler() -> Finding:
    name, refused = "torch.compile", 'train.capture = "compile" is refused'
    if trouble := why_not("megavid.models.capture"):
        return Finding(name, "off", trouble, refused)
    import torch

    from megavid.models.capture import why_not_captured

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := why_not_captured(device):
        return Finding(name, "off", reason, refused)
    found = "triton" if device.type == "cuda" else shutil.which(os.environ.get("CXX", "g++")) or ""
    return Finding(name, "on", found, 'train.capture = "compile" takes it; off by default')


def _fp8() -> Finding:
    name = "FP8"
    if trouble := why_not("megavid.ops.fp8_linear"):
        return Finding(name, "off", trouble, "as the row of torch says")
    import torch

    from megavid.ops.fp8_linear import Recipe, RecipeName, multiplies_in_eight_bits

    is_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")
    recipes: tuple[RecipeName, ...] = ("tensorwise", "delayed", "blockwise", "mxfp8")
    try:
        taken = [recipe for recipe in recipes if multiplies_in_eight_bits(Recipe.of(recipe, "auto"), device)]
    except _BROKEN as error:  # no memory left, or a GPU that answers no more
        return Finding(name, "warn", f"{type(error).__name__}: {_line(error)}", "nobody knows; try on a free GPU")
    if not taken:
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        found = f"the GPU's compute capability {capability} has no product in FP8, which begin with 8.9"
        return Finding(name, "warn", found, "every recipe turns back to wide numbers: right, and slower than bf16")
    effect = f"{', '.join(taken)} multiply in eight bits"
    if back := [recipe for recipe in recipes if recipe not in taken]:
        effect += f"; {', '.join(back)} turn back to wide numbers"
    found = (
        "torch's products on the GPU, those with tiles tried just now"
        if is_gpu
        else "torch's product on CPU: right, not fast"
    )
    return Finding(name, "on", found, effect)


def _attention() -> Finding:
    name, torchs = "attention", "'aten' and 'cudnn' are torch's"
    if trouble := why_not("megavid.ops.block_attention_library"):
        return Finding(name, "off", trouble, "as the row of torch says")
    from megavid.ops.block_attention_library import NEEDS, installed

    packages = sorted(NEEDS.keys() & installed())
    if not packages:
        effect = f"parallel.attention_backend: {torchs}; attention in FP8 is turned back to wide numbers"
        return Finding(name, "off", "neither flash-attn nor FlashAttention-3 is installed", effect)
    found, told = ", ".join(NEEDS[package] for package in packages), list[str]()
    state: State = "on"
    if "flash_attn_3" in packages:
        state, is_taken, words = _flash_attention_3()
        told.append(words)
        packages = [package for package in packages if is_taken or package != "flash_attn_3"]
    taken = f"parallel.attention_backend takes {', '.join(map(repr, packages))}" if packages else ""
    return Finding(name, state, found, "; ".join(filter(None, (taken, torchs, *told))))


def _flash_attention_3() -> tuple[State, bool, str]:
    """What FlashAttention-3 does on this machine: as meant or not, whether it is taken at all, and in words."""
    import torch

    from megavid.errors import ConfigError
    from megavid.ops.block_attention_fp8 import has_fp8_forward
    from megavid.ops.block_attention_library import block_attention

    if not torch.cuda.is_available():
        return "on", True, "FlashAttention-3 needs a GPU"
    try:
        device, width = torch.device("cuda", torch.cuda.current_device()), 128
        kernel = block_attention("flash_attn_3", device, torch.bfloat16, width)
        is_narrow = has_fp8_forward(kernel, device, width)
    except ConfigError as error:
        return "warn", False, str(error)
    except _BROKEN as error:
        return "warn", False, _line(error)
    if is_narrow:
        return "on", True, "FlashAttention-3 multiplies heads of 128 in eight bits, tried just now"
    return (
        "warn",
        True,
        "attention in FP8 is turned back to wide numbers, as FlashAttention-3 failed its trial just now",
    )


def _inference() -> Finding:
    versions = {package: version_of(package) for package in ("diffusers", "transformers")}
    found = ", ".join(f"{package} {version or 'not installed'}" for package, version in versions.items())
    if all(versions.values()):
        return Finding("VAE, text encoder", "on", found, "Wan's VAE and UMT5 from a local folder")
    effect = "the built-in DCT and SentencePiece; pip install 'megavid[inference]' for Wan's VAE and UMT5"
    return Finding("VAE, text encoder", "off", found, effect)


def _video() -> Finding:
    version, trouble = version_of("av"), why_not("av")
    if trouble:
        return Finding("video (PyAV)", "missing", trouble, "no video is read or written; pip install av")
    import av

    codecs = [name for name in ("libx264", "h264", "mpeg4") if name in av.codecs_available]
    libraries = av.library_versions.get("libavcodec", ())
    found = f"av {version}, libavcodec {'.'.join(map(str, libraries))}, {', '.join(codecs)}"
    return Finding("video (PyAV)", "on", found, "mp4 and GIF are read and written")


def _versions() -> Finding:
    name = "versions together"
    torch_version = version_of("torch")
    installed = {
        "python": platform.python_version(),
        "torch": torch_version,
        "megatron_core": version_of("megatron-core"),
        "transformer_engine": version_of("transformer-engine"),
        "cuda": _torch_cuda(),
    }
    rows = [row for row in VERSIONS if row.accepts(**installed)]
    found = ", ".join(f"{key} {value or '-'}" for key, value in installed.items())
    if not rows:
        return Finding(name, "warn", found, "not a row of the README's table of versions: it may work, nobody tried")
    tested = rows[0].tested.startswith("tested")
    return Finding(
        name,
        "on" if tested else "warn",
        found,
        f"README's table of versions: {rows[0].setting}, {rows[0].tested}",
    )


def _job() -> Finding:
    name = "job's environment"
    if not {"SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return Finding(name, "off", "not inside a job of Slurm or torchrun", "run me inside one to have it checked")
    wanted = (*USUAL, Setting("CUDA_DEVICE_MAX_CONNECTIONS", "1", f"TP, CP, EP and overlap: {ORDERED}"))
    wrong = [setting for setting in wanted if os.environ.get(setting.name) != setting.value]
    if not wrong:
        return Finding(name, "on", ", ".join(setting.name for setting in wanted), "as examples/slurm/env.sh sets it")
    found = ", ".join(f"{setting.name} = {os.environ.get(setting.name, 'unset')}" for setting in wrong)
    reasons = "; ".join(f"{setting.name}={setting.value}: {setting.reason}" for setting in wrong)
    return Finding(name, "warn", found, f"on GPUs set {reasons}")


def _caches() -> Finding:
    name = "compile caches"
    folders = {key: os.environ[key] for key in CACHES if key in os.environ}
    if not {"SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"} & os.environ.keys() or len(folders) == len(CACHES):
        return Finding(name, "on", ", ".join(folders.values()) or "the defaults, in the home folder", "as set")
    missing = ", ".join(key for key in CACHES if key not in folders)
    return Finding(name, "warn", f"unset: {missing}", "ranks of many nodes share the home folder: name node-local ones")


CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def _torch_cuda() -> str:
    if why_not("torch"):
        return ""
    import torch

    return torch.version.cuda or ""
