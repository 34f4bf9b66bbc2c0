"""The command: dispatch, one-line errors, exit statuses."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavid import __version__, errors
from megavid.cli import doctor, main
from megavid.cli.help import config_help
from megavid.cli.versions import VERSIONS, Versions
from megavid.config.load import leaf_keys, load_run
from megavid.ops import block_attention_fp8, block_attention_library, fp8_linear
from tests.support.flash3 import stand_in


def _command(monkeypatch: pytest.MonkeyPatch, run: Callable[[list[str]], int]) -> None:
    monkeypatch.setattr(main.importlib, "import_module", lambda name: SimpleNamespace(main=run, HELP=name))


def _raising(error: BaseException) -> Callable[[list[str]], int]:
    def run(argv: list[str]) -> int:
        raise error

    return run


def test_the_rest_of_the_line_goes_to_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    _command(monkeypatch, run)
    assert main.main(["train", "tiny", "--out", "x"]) == 7
    assert seen == [["tiny", "--out", "x"]]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (errors.ConfigError("parallel.tensor = 3\nis odd"), 2, "parallel.tensor = 3 is odd"),
        (errors.DataError("shard"), 2, "shard"),
        (errors.CheckpointError("manifest"), 2, "manifest"),
        (errors.StorageError("disk"), 3, "disk"),
        (errors.NumericalStop("nan"), 4, "nan"),
        (errors.RankLost("rank 3"), 5, "rank 3"),
        (errors.StopRequested("saved"), 75, "saved"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 3, "/x/y: No space left on device"),
        (OSError(errno.EFBIG, "File too large"), 3, "storage: File too large"),
        (OSError(errno.EIO, "Input/output error", "/x"), 3, "/x: Input/output error"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
) -> None:
    _command(monkeypatch, _raising(error))
    assert main.main(["train"]) == status
    assert capsys.readouterr().err == f"megavid: error: {message}\n"


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _command(monkeypatch, _raising(FileNotFoundError(errno.ENOENT, "No such file", "/x")))
    with pytest.raises(FileNotFoundError):
        main.main(["train"])


def test_unknown_commands_are_answered_with_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["trian"]) == 2
    assert capsys.readouterr().err == "megavid: error: unknown command 'trian'; did you mean 'train'?\n"
    assert main.main(["qqq"]) == 2
    assert f"commands: {', '.join(main.COMMANDS)}" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--version"], ["-V"], ["version"]])
def test_version(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(argv) == 0
    assert capsys.readouterr().out == f"megavid {__version__}\n"


def test_a_reader_who_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "megavid", "--version"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr


def test_help_of_the_schema_lists_every_key_with_a_value_and_the_presets_defaults() -> None:
    text = config_help(load_run("tiny", []))
    for key in leaf_keys():
        assert f"--{key} " in text, key
    assert "no-" not in text
    assert "--log.tensorboard {True,False}" in text
    assert "\u256d" not in text


def test_doctor_reports_every_probe(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for name in (
        "Python",
        "torch",
        "megatron-core",
        "CUDA",
        "gloo",
        "Transformer Engine",
        "apex",
        "DeepSpeed",
        "DeepEP",
        "FP8",
        "attention",
    ):
        assert name in out


def attention_row(monkeypatch: pytest.MonkeyPatch, generation: tuple[int, int] = (9, 0)) -> doctor.Finding:
    """The row of a GPU of this compute capability, whose tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    example = block_attention_fp8.example
    monkeypatch.setattr(block_attention_fp8, "example", lambda device, width: example(torch.device("cpu"), width))
    monkeypatch.setattr(block_attention_library, "installed", lambda: frozenset({"aten", "flash_attn_3"}))
    for cache in (block_attention_library._generation, block_attention_library._block_attention):
        cache.cache_clear()
    try:
        return doctor._attention()
    finally:
        for cache in (block_attention_library._generation, block_attention_library._block_attention):
            cache.cache_clear()


@pytest.mark.parametrize(
    ("generation", "failure", "state", "is_taken", "words"),
    [
        ((9, 0), None, "on", True, "FlashAttention-3 multiplies heads of 128 in eight bits, tried just now"),
        (
            (8, 0),
            None,
            "warn",
            False,
            "this one has 8.0; set parallel.attention_backend to one of aten, cudnn, flash_attn, reference",
        ),
        ((9, 0), RuntimeError("does not support FP8"), "warn", True, "turned back to wide numbers"),
        ((9, 0), torch.OutOfMemoryError("CUDA out of\nmemory"), "warn", False, "CUDA out of memory"),
    ],
)
def test_doctor_says_what_flash_attention_3_does_here(
    monkeypatch: pytest.MonkeyPatch,
    generation: tuple[int, int],
    failure: Exception | None,
    state: str,
    is_taken: bool,
    words: str,
) -> None:
    with stand_in() as (kernel, _):
        if failure is not None:
            monkeypatch.setattr(type(kernel), "forward_fp8", lambda *_: _raising(failure)([]))
        row = attention_row(monkeypatch, generation)
    assert (row.state, row.found) == (state, "flash_attn_interface")
    assert ("takes 'flash_attn_3'" in row.effect) == is_taken
    assert words in row.effect


def test_doctor_without_memory_has_rows_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fp8_linear, "multiplies_in_eight_bits", full)
    row = doctor._fp8()
    assert (row.state, row.found) == ("warn", "OutOfMemoryError: CUDA out of memory")
    with stand_in():
        monkeypatch.setattr(block_attention_fp8, "has_fp8_forward", full)
        row = attention_row(monkeypatch)
    assert row.state == "warn"
    assert "CUDA out of memory" in row.effect


def test_doctor_names_a_broken_package_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"transformer-engine": "2.20.2", "apex": "0.9.10"}
    monkeypatch.setattr(doctor, "version_of", lambda package: installed.get(package, ""))
    monkeypatch.setattr(doctor, "why_not", lambda module: f"RuntimeError: {module} needs CUDA")
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["Transformer Engine"].state == "warn"
    assert "pip uninstall transformer-engine" in findings["Transformer Engine"].effect
    assert findings["apex"].state == "warn"
    assert "PyPI's apex is another project" in findings["apex"].effect
    assert findings["torch"].state == "missing"
    assert findings["versions together"].state == "warn"


def test_why_not_answers_instead_of_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("no CUDA\nhere")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert doctor.why_not("transformer_engine") == "RuntimeError: no CUDA here"


@pytest.mark.parametrize(
    ("torch", "accepted"), [("2.13.0", True), ("2.13.0+cpu", True), ("2.13.01", False), ("2.12.0", False), ("", False)]
)
def test_a_row_of_versions_takes_its_prefix_only(torch: str, accepted: bool) -> None:
    row = Versions("pip", "3.11", "2.13.0", "0.16.1", "-", "-", "-", "not yet")
    found = row.accepts(python="3.11.7", torch=torch, megatron_core="0.16.1", transformer_engine="", cuda="")
    assert found is accepted


def test_rows_that_are_tested_come_first() -> None:
    tested = [row.tested.startswith("tested") for row in VERSIONS]
    assert tested == sorted(tested, reverse=True)


def test_first_exit_status_is_told_to_the_script_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "status"
    _command(monkeypatch, _raising(errors.StorageError("full")))
    assert main.main(["train"]) == 3  # without a script that asks
    monkeypatch.setenv("MEGAVID_STATUS_FILE", str(file))
    assert main.main(["--version"]) == 0
    assert not file.exists()
    assert main.main(["train"]) == 3
    errors.tell_job(5)  # of another rank, a moment later
    assert file.read_text() == "3\n"


def test_unexpected_error_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAVID_STATUS_FILE", str(tmp_path / "status"))
    _command(monkeypatch, _raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main.main(["train"])
    assert (tmp_path / "status").read_text() == "1\n"
