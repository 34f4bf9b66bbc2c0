"""Building the compiled ops: what `megavid doctor` says of them, and when a library that is there is not taken."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megavid.cli import doctor
from megavid.errors import ConfigError
from megavid.ops import compiled, sources
from megavid.ops.choose import block_ops

ROOT = Path(__file__).parents[2]

needs_compiled = pytest.mark.skipif(
    bool(compiled.why_not_compiled()), reason=f"compiled ops: {compiled.why_not_compiled()}"
)


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    """The answer is kept for the process: every test here asks for itself."""
    compiled.why_not_compiled.cache_clear()
    yield
    compiled.why_not_compiled.cache_clear()


def row() -> doctor.Finding:
    return next(finding for finding in doctor.examine() if finding.name == "compiled ops")


@needs_compiled
def test_doctor_names_devices_and_instruction_set() -> None:
    assert compiled.instruction_set() in ("baseline", "avx2", "avx512")
    assert row().state == "on"
    assert row().found.startswith(f"built for cpu ({compiled.instruction_set()})")
    assert 'train.ops = "auto", the default' in row().effect


@needs_compiled
def test_doctor_warns_of_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "compiled_devices", lambda: ("cpu",))
    finding = doctor._compiled_ops()
    assert (finding.state, "not for cuda" in finding.found) == ("warn", True)


def test_doctor_says_how_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "BINARY", tmp_path / "_C.so")
    assert row().state == "off"
    assert "python setup.py build_ext --inplace" in row().found
    assert compiled.instruction_set() == ""
    assert compiled.compiled_devices() == ()


def test_a_library_that_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_C.so").write_text("not a library")
    monkeypatch.setattr(compiled, "BINARY", tmp_path / "_C.so")
    assert f"_C.so does not load with torch {torch.__version__}" in compiled.why_not_compiled()
    assert row().state == "off"


@needs_compiled
def test_a_library_of_another_torch_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert compiled.why_not_compiled().startswith("built with torch ")
    assert "this is 2.99.0" in compiled.why_not_compiled()


@needs_compiled
def test_a_library_of_other_sources_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, text in (("cpu", "int one;"), ("cuda", "int two;")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.cpp").write_text(text)
    monkeypatch.setattr(sources, "SOURCES", tmp_path)
    assert compiled.why_not_compiled().startswith("built from other sources than csrc/ has now; python setup.py")
    before = sources.hash_of_sources()
    (tmp_path / "cuda/kernel.cpp").write_text("int three;")
    assert sources.hash_of_sources() != before
    compiled.why_not_compiled.cache_clear()
    monkeypatch.setattr(sources, "SOURCES", tmp_path / "an installation")
    assert not compiled.why_not_compiled()


@needs_compiled
def test_a_library_without_one_of_the_ops_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(compiled.DECLARED) == 22
    monkeypatch.setattr(compiled, "DECLARED", [*compiled.DECLARED, "built_with"])  # one without a kernel for CPU
    assert compiled.compiled_devices() == ()
    with pytest.raises(ConfigError, match=r"_C\.so was built without all kernels for cpu; python setup\.py"):
        block_ops("compiled", torch.device("cpu"), torch.float32)


def test_what_does_not_compile_is_not_what_was_built_before(tmp_path: Path) -> None:
    (tmp_path / "megavid/ops").mkdir(parents=True)
    for name in ("setup.py", "csrc", "megavid/ops/sources.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    old = [tmp_path / folder / "megavid/ops/_C.so" for folder in (".", "lib")]
    for file in old:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("built before")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--build-lib", "lib"]
    command += ["--build-temp", "temp"]
    environment = dict(os.environ) | {"CXX": shutil.which("false") or ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr  # the extension is optional
    assert "megavid.ops._C" in done.stderr
    assert not any(file.exists() for file in old)


@pytest.mark.skipif("cuda" in compiled.compiled_devices(), reason="the ops are compiled for a GPU here")
def test_ops_are_not_timed_on_a_device_without_kernels() -> None:
    command = [sys.executable, str(ROOT / "tools/bench_ops.py"), "--device", "cuda", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"bench_ops: (_C\.so was built without all kernels for cuda|not built)", done.stderr)
