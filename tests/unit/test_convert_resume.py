"""All or nothing: a killed conversion goes on, a failed one leaves no trace, and nothing is done twice."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megavid.checkpoint.convert import ModelSource, open_model, write_model
from megavid.checkpoint.convert import write as writing
from megavid.checkpoint.convert.job import ConvertJob, ConvertRequest
from megavid.errors import CheckpointError, ConfigError, StorageError
from tests.support.wan_folders import assert_same_files, save_wan

KILLED = """
import os, signal, sys
from pathlib import Path
from megavid.checkpoint.convert import open_model, write_model
from megavid.checkpoint.convert import write
src, dst, to, limit, sync, shard = sys.argv[1:]
write.SYNC_BYTES = int(sync)
done = 0
def progress(count):
    global done
    done += count
    if done > int(limit):
        os.kill(os.getpid(), signal.SIGKILL)
write_model(open_model(Path(src)), Path(dst), to=to, max_shard_bytes=int(shard), progress=progress)
"""


def killed_at(src: Path, dst: Path, to: str, limit: int, sync: int = 1 << 30, shard: int = 60_000) -> None:
    """A conversion that kills itself, as ``kill -9`` does, once it has written more than ``limit`` bytes."""
    argv = [sys.executable, "-c", KILLED, str(src), str(dst), to, str(limit), str(sync), str(shard)]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    assert not dst.exists()
    assert dst.with_name(dst.name + ".partial").is_dir()


def counted(source: ModelSource, read: dict[str, int]) -> ModelSource:
    """``source``, with the elements of each tensor that are read from now on counted in ``read``."""

    def watch(name: str, fetch: Any) -> Any:
        def seen(start: int, stop: int) -> Tensor:
            read[name] = read.get(name, 0) + stop - start
            return fetch(start, stop)

        return seen

    return replace(source, tensors={n: replace(t, fetch=watch(n, t.fetch)) for n, t in source.tensors.items()})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, the folder's own name taken out; not the manifest, whose hashes have it in them."""
    files = [path for path in folder.iterdir() if not path.name.startswith("manifest")]
    return {path.name: path.read_bytes().replace(str(folder).encode(), b"DST") for path in files}


@pytest.mark.parametrize("to", ["megavid", "diffusers", "original"])
def test_killed_conversion_goes_on_where_it_ended(tmp_path: Path, to: str) -> None:
    src = save_wan(tmp_path / "src")
    write_model(open_model(src), tmp_path / "whole", to=to, max_shard_bytes=60_000)
    killed_at(src, tmp_path / "dst", to, 200_000)
    partial = tmp_path / "dst.partial"
    facts = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in partial.glob("*.safetensors")}
    done = [
        json.loads(line)["file"] for line in (partial / "journal.jsonl").read_text().splitlines() if '"file"' in line
    ]
    assert 1 < len(done) < len(list((tmp_path / "whole").glob("*.safetensors")))

    read: dict[str, int] = {}
    write_model(counted(open_model(src), read), tmp_path / "dst", to=to, max_shard_bytes=60_000)
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "dst")
    assert resumed == whole
    open_model(tmp_path / "dst").verify()
    for name in done:
        stat = (tmp_path / "dst" / name).stat()
        assert (stat.st_ino, stat.st_mtime_ns) == facts[name], f"{name} was written again"
    assert 0 < sum(read.values()) < sum(tensor.numel for tensor in open_model(src).tensors.values()) - 40_000
    assert not partial.exists()


def test_tensors_of_an_unfinished_file_are_not_read_again(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    killed_at(src, tmp_path / "dst", "megavid", 200_000, sync=1, shard=10**9)
    lines = (tmp_path / "dst.partial" / "journal.jsonl").read_text().splitlines()
    done = {json.loads(line)["tensor"].removeprefix("model/") for line in lines if '"tensor"' in line}
    assert done
    assert not any('"file"' in line for line in lines)
    read: dict[str, int] = {}
    source = open_model(src)
    write_model(counted(source, read), tmp_path / "dst", to="megavid", max_shard_bytes=10**9)
    assert read.keys() == source.tensors.keys() - done
    write_model(open_model(tmp_path / "dst"), tmp_path / "back", to="diffusers")
    assert_same_files(tmp_path / "back", src)


def test_bytes_lost_behind_the_journal_are_written_again(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    killed_at(src, tmp_path / "dst", "diffusers", 200_000, sync=1, shard=10**9)
    (file,) = (tmp_path / "dst.partial").glob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.seek(60_000)  # within a tensor that the journal lists
        opened.write(bytes(3000))
    write_model(open_model(src), tmp_path / "dst", to="diffusers", max_shard_bytes=10**9)
    assert_same_files(tmp_path / "dst", src)


def test_finished_file_that_changed_since_is_written_again(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    killed_at(src, tmp_path / "dst", "diffusers", 200_000)
    file = next((tmp_path / "dst.partial").glob("*00001-of-*.safetensors"))
    with open(file, "r+b") as opened:
        opened.seek(-5, os.SEEK_END)
        opened.write(b"\x01")
    write_model(open_model(src), tmp_path / "dst", to="diffusers", max_shard_bytes=60_000)
    assert_same_files(tmp_path / "dst", src)


def test_folder_that_no_conversion_made_is_left_alone(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    (tmp_path / "dst.partial").mkdir()
    (tmp_path / "dst.partial" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"dst\.partial exists and is no interrupted conversion"):
        write_model(open_model(src), tmp_path / "dst", to="megavid")
    assert (tmp_path / "dst.partial" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "dst").exists()


def test_another_conversion_does_not_go_on_with_what_it_finds(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    killed_at(src, tmp_path / "dst", "megavid", 200_000)
    write_model(open_model(src), tmp_path / "dst", to="diffusers", dtype=torch.bfloat16)
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert names == {"config.json", "conversion.json", "diffusion_pytorch_model.safetensors"}


def test_changed_source_begins_anew(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    killed_at(src, tmp_path / "dst", "diffusers", 200_000)
    other = save_wan(tmp_path / "other", dtype=torch.float32)
    (file,) = other.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    (src / file.name).write_bytes(content)
    write_model(open_model(src), tmp_path / "dst", to="diffusers", max_shard_bytes=60_000)
    assert_same_files(tmp_path / "dst", src)


def test_changed_source_of_the_same_size_and_time_begins_anew(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    killed_at(src, tmp_path / "dst", "diffusers", 200_000)
    (file,) = src.glob("*.safetensors")
    times = file.stat()
    content = bytearray(file.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[length + 3] ^= 1  # in a tensor that was written already
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    write_model(open_model(src), tmp_path / "dst", to="diffusers", max_shard_bytes=60_000)
    assert_same_files(tmp_path / "dst", src)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from megavid.cli.main import main
sys.exit(main(["convert", sys.argv[1], sys.argv[2], "--to", "megavid"]))
"""


def test_full_disk_is_exit_status_3_and_leaves_nothing(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    argv = [sys.executable, "-c", LIMITED, str(src), str(tmp_path / "dst")]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("megavid: error:")]
    assert "cannot write" in line
    assert "free space" in line
    assert sorted(os.listdir(tmp_path)) == ["src"]


def test_failing_storage_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = save_wan(tmp_path / "src")

    def broken(out: Any, data: memoryview) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_write_all", broken)
        with pytest.raises(StorageError, match="Input/output error; check the storage; the same command goes on"):
            write_model(open_model(src), tmp_path / "dst", to="megavid")
    assert sorted(os.listdir(tmp_path)) == ["dst.partial", "src"]
    write_model(open_model(src), tmp_path / "dst", to="megavid")
    assert sorted(os.listdir(tmp_path)) == ["dst", "src"]


def test_two_conversions_do_not_write_to_one_place(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")

    def second(folder: Path) -> None:
        with pytest.raises(CheckpointError, match="is being written by another process"):
            write_model(open_model(src), tmp_path / "dst", to="megavid")

    write_model(open_model(src), tmp_path / "dst", to="megavid", check=second)
    open_model(tmp_path / "dst").verify()


@pytest.mark.parametrize("second", ["", "src"], ids=["one model", "two experts"])
def test_killed_just_before_it_gets_its_name_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_wan(Path("src"))
    boundary = 0.9 if second else 0.0
    request = ConvertRequest(Path("src"), Path("dst"), "diffusers", "convert", second=second, boundary=boundary)
    rename = os.rename

    def killed(src: Path, dst: Path) -> None:
        if dst == Path("dst"):
            raise KeyboardInterrupt
        rename(src, dst)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            ConvertJob.of(request).run()
    first = {path.relative_to("dst.partial"): path.stat().st_ino for path in Path("dst.partial").rglob("*.safetensors")}
    ConvertJob.of(request).run()
    assert sorted(os.listdir()) == ["dst", "src"]
    again = {path.relative_to("dst"): path.stat().st_ino for path in Path("dst").rglob("*.safetensors")}
    assert again == first
    assert {path.name for path in Path("dst").rglob("*") if path.is_file()} <= {
        "config.json", "conversion.json", "diffusion_pytorch_model.safetensors", "model_index.json",
    }  # fmt: skip


def test_a_check_that_fails_leaves_nothing(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")

    def refuse(folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        raise CheckpointError("they differ")

    with pytest.raises(CheckpointError, match="they differ"):
        write_model(open_model(src), tmp_path / "dst", to="megavid", check=refuse)
    assert sorted(os.listdir(tmp_path)) == ["src"]
