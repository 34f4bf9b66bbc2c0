"""Saving behind the step loop: faults end a save with an error on every rank, and never the checkpoint before it."""

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megavid.checkpoint import AsyncSaver, SingleRank, latest, list_steps, load, tidy
from megavid.checkpoint import files as files_module
from megavid.checkpoint import saver as saver_module
from megavid.config.schema import CheckpointConfig
from megavid.errors import NumericalStop, StorageError
from megavid.parallel.fragment import Box, Fragment
from tests.support.checkpoint_world import (
    RUN_TOML,
    ThreadRanks,
    assert_holds,
    fragments_of,
    load_world,
    run_ranks,
    save_world,
)


@contextmanager
def _file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes; Python ignores SIGXFSZ, so a write fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _save_step(
    folder: Path, step: int, then: Callable[[AsyncSaver], object] | None = None, **options: object
) -> list[object]:
    """Save one step from four ranks and return the error of each."""

    def body(ranks: ThreadRanks) -> None:
        saver = AsyncSaver(folder, ranks, CheckpointConfig(), run_toml=RUN_TOML, **options)  # type: ignore[arg-type]
        saver.save(step, fragments_of(ranks.rank, 2, 2, step), {})
        if then is not None:
            then(saver)
        saver.wait()

    return run_ranks(4, body)


def _assert_all_storage(errors: list[object], *words: str) -> None:
    assert [type(error) for error in errors] == [StorageError] * 4, errors
    assert len({str(error) for error in errors}) == 1
    text = str(errors[0])
    assert "\n" not in text
    for word in words:
        assert word in text
    assert errors[0].exit_code == 3  # type: ignore[attr-defined]


def test_full_disk_ends_the_save_on_every_rank_and_the_former_checkpoint_loads(tmp_path: Path) -> None:
    save_world(tmp_path, steps=(1,))
    with _file_limit(1500):
        errors = _save_step(tmp_path, 2)
    _assert_all_storage(errors, "rank_0000", "safetensors", "File too large", "earlier checkpoints are intact")
    assert latest(tmp_path) == tmp_path / "step_00000001"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000001"]
    load_world(tmp_path / "step_00000001", 1, tp=1, dp=3)
    assert _save_step(tmp_path, 2) == [None] * 4  # there is space again
    load_world(tmp_path / "step_00000002", 2, tp=1, dp=3)


def test_one_rank_that_cannot_write_fails_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_world(tmp_path, steps=(1,))
    write = files_module.write_file

    def failing(path: Path, *args: object, **named: object) -> object:
        if path.name == "rank_00002.safetensors":
            with files_module.storage_errors("write", path):
                raise OSError(28, "No space left on device")
        return write(path, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("megavid.checkpoint.write.write_file", failing)
    _assert_all_storage(_save_step(tmp_path, 2), "rank_00002.safetensors: No space left on device")
    assert list_steps(tmp_path) == [1]


def test_poll_reports_a_failed_save_and_costs_nothing_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver_module, "commit", lambda *args, **named: 1 / 0)

    def poll(saver: AsyncSaver) -> None:
        assert saver.ranks.world_size == 4
        deadline = time.monotonic() + 10
        while not saver.poll():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    _assert_all_storage(_save_step(tmp_path, 1, poll), "ZeroDivisionError")

    class Deaf(SingleRank):
        def all_gather_object(self, value: object, /) -> list[object]:
            assert value is None, "communicates though nothing is being saved"
            return [value]

    assert AsyncSaver(tmp_path, Deaf(), CheckpointConfig(), run_toml="").poll()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("dying_rank", [0, 3])
def test_writer_that_dies_without_a_word_ends_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dying_rank: int
) -> None:
    write_part = saver_module.write_part

    def dying(*args: object, rank: int, **named: object) -> None:
        if rank == dying_rank:
            raise SystemExit  # ends a thread without a trace, and no ``except Exception`` sees it
        write_part(*args, rank=rank, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(saver_module, "write_part", dying)
    began = time.monotonic()
    _assert_all_storage(_save_step(tmp_path, 1), "the thread that writes step_00000001 died")
    assert time.monotonic() - began < 10
    assert latest(tmp_path) is None


def test_writer_that_stands_still_ends_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, write_part = threading.Event(), saver_module.write_part

    def stuck(*args: object, rank: int, **named: object) -> None:
        if rank == 1:
            release.wait(30)
        write_part(*args, rank=rank, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(saver_module, "write_part", stuck)
    errors = _save_step(tmp_path, 1, stall_s=0.3)
    release.set()
    _assert_all_storage(errors, "step_00000001.partial")
    assert latest(tmp_path) is None


def test_step_loop_goes_on_while_the_writer_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, write_part = threading.Event(), saver_module.write_part

    def slow(*args: object, **named: object) -> None:
        assert go_on.wait(20)
        write_part(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(saver_module, "write_part", slow)
    fragment = Fragment("x", (8,), (Box((0,), (8,)),), torch.arange(8.0))
    with AsyncSaver(tmp_path, SingleRank(), CheckpointConfig(), run_toml="") as saver:
        saver.save(1, [fragment], {})
        fragment.data.add_(1)  # a step
        assert not saver.poll()
        go_on.set()
        saver.save(2, [fragment], {})  # waits for the former one
        assert list_steps(tmp_path)[0] == 1
    for step in (1, 2):
        found = Fragment("x", (8,), (Box((0,), (8,)),), torch.zeros(8))
        load(tmp_path / f"step_0000000{step}", [found], SingleRank())
        assert torch.equal(found.data, torch.arange(8.0) + step - 1)


def test_staging_memory_is_reused(tmp_path: Path) -> None:
    fragment = Fragment("x", (8,), (Box((0,), (8,)),), torch.arange(8.0))
    with AsyncSaver(tmp_path, SingleRank(), CheckpointConfig(async_save=False), run_toml="") as saver:
        saver.save(1, [fragment], {})
        first = [buffer.data_ptr() for buffer in saver._staging._buffers]
        saver.save(2, [fragment], {})
        assert saver.poll()  # a blocking save leaves nothing under way
        assert [buffer.data_ptr() for buffer in saver._staging._buffers] == first


def test_numerical_stop_lets_the_save_finish(tmp_path: Path) -> None:
    def run() -> None:
        with AsyncSaver(tmp_path, SingleRank(), CheckpointConfig(), run_toml="") as saver:
            saver.save(1, fragments_of(0, 1, 1, 1), {})
            raise NumericalStop("too many bad steps")

    with pytest.raises(NumericalStop):
        run()
    load_world(tmp_path / "step_00000001", 1, tp=1, dp=1)


def test_body_that_raises_calls_the_save_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megavid.checkpoint.commit.part_file", lambda rank: "never")
    began = time.monotonic()

    def run() -> None:
        with AsyncSaver(tmp_path, SingleRank(), CheckpointConfig(), run_toml="") as saver:
            saver.save(1, fragments_of(0, 1, 1, 1), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert time.monotonic() - began < 5
    assert latest(tmp_path) is None
    tidy(tmp_path)
    assert not list(tmp_path.iterdir())


CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")


def _die_at(call: int) -> None:
    """Have this process end, as if killed, just before its ``call``-th change of the file system."""
    left = [call]

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def wrapper(*args: object, **named: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return function(*args, **named)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def test_kill_between_any_two_phases_leaves_a_whole_latest(tmp_path: Path) -> None:
    """Save step 2, and then step 2 once more over it, killed at every single change of the file system in turn."""
    for call in range(1, 200):
        folder = tmp_path / str(call)
        config = CheckpointConfig(keep_last=1, async_save=False)
        save_world(folder, steps=(1,), tp=1, dp=1, config=config)
        child = os.fork()
        if child == 0:
            _die_at(call)
            try:
                save_world(folder, steps=(2, 2), tp=1, dp=1, config=config)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for is_tidied in (False, True):
            if is_tidied:
                tidy(folder)
            found = latest(folder)
            assert found is not None
            step = int(found.name.split("_")[1].split(".")[0])
            fragments = fragments_of(0, 1, 1, None)
            load(found, fragments, SingleRank())
            assert_holds(fragments, step)
        assert not [p for p in folder.iterdir() if p.name != "latest" and "." in p.name]
        if status == 0:
            assert step == 2
            assert call > 40, "the calls that matter were not seen"
            return
        assert status == 9
    raise AssertionError("the child never came to its end")
