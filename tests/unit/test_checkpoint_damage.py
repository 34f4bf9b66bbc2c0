"""A flipped byte in any file, a truncated or a missing one: one line that names the file, on every rank."""

import shutil
from pathlib import Path

import pytest

from megavid.checkpoint import Checkpoint, latest, load, resolve
from megavid.checkpoint.inspect import describe
from megavid.checkpoint.ranks import agreed
from megavid.data.sample import BadSample
from megavid.errors import CheckpointError, ConfigError, DataError, MegavidError, StopRequested, StorageError
from tests.support.checkpoint_world import ThreadRanks, fragments_of, load_world, run_ranks, save_world

FILES = [
    "rank_00000.safetensors",
    "rank_00001.safetensors",
    "rank_00002.safetensors",
    "rank_00003.safetensors",
    "index.json",
    "state.json",
    "run.toml",
    "manifest.json",
    "manifest.sha256",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_world(folder, steps=(1, 2))
    return folder


def _errors(folder: Path) -> list[str]:
    """What two ranks say on loading; both must say the same, in one line."""
    fragments = [fragments_of(rank, 1, 2, None) for rank in range(2)]
    errors = run_ranks(2, lambda ranks: load(folder, fragments[ranks.rank], ranks))
    assert [type(error) for error in errors] == [CheckpointError] * 2, errors
    assert all((f.data == 77).all() for held in fragments for f in held)
    texts = [str(error) for error in errors]
    assert texts[0] == texts[1]
    assert "\n" not in texts[0]
    return texts


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (ConfigError("no"), ConfigError),
        (BadSample("no", "s"), DataError),
        (StopRequested("no"), StopRequested),
        (OSError("no"), StorageError),
    ],
)
def test_an_error_of_one_rank_is_the_same_kind_on_all(raised: Exception, told: type[MegavidError]) -> None:
    def body(ranks: ThreadRanks) -> None:
        with agreed(ranks):
            if ranks.rank == 1:
                raise raised

    other, own = run_ranks(2, body)
    assert type(other) is told
    assert str(raised) in str(other)
    assert isinstance(own, (told, OSError))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["first", "middle", "last", "truncated", "longer", "empty", "missing"])
def test_damage_of_any_file_is_found_and_named(saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    shutil.copytree(saved, tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints" / "step_00000002"
    path = folder / name
    content = bytearray(path.read_bytes())
    at = {"first": 0, "middle": len(content) // 2, "last": len(content) - 1}.get(damage)
    if at is not None:
        content[at] ^= 0x20 if content[at] != ord(" ") else 0x01  # 0x20 turns a letter's case, the least visible change
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-1], "longer": content + b"\n", "empty": b""}[damage])
    assert name in _errors(folder)[0]
    with pytest.raises(CheckpointError, match=name):
        describe(folder)
    load_world(folder.with_name("step_00000001"), 1, tp=1, dp=2)  # the previous one still loads when asked for


def test_every_single_byte_of_the_manifest_and_its_digest_matters(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "step_00000001", tmp_path / "step_00000001")
    for name in ("manifest.json", "manifest.sha256"):
        content = (folder / name).read_bytes()
        for at in range(len(content)):
            (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(CheckpointError, match=name):
                Checkpoint(folder)
        (folder / name).write_bytes(content)
    Checkpoint(folder)


@pytest.mark.parametrize(
    "content", [b"step_00000009\n", b"step_0000002\n", b"", b"\xff\xfe", b"../step_00000002\n", b"step_00000002\r"]
)
def test_damaged_latest_is_named_with_what_there_is(saved: Path, tmp_path: Path, content: bytes) -> None:
    folder = shutil.copytree(saved, tmp_path / "checkpoints")
    (folder / "latest").write_bytes(content)
    for find in (latest, resolve):
        with pytest.raises(CheckpointError, match=r"latest.*step_00000001, step_00000002"):
            find(folder)
    load_world(folder / "step_00000002", 2, tp=1, dp=1)


def test_small_files_are_checked_without_the_large_ones(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "step_00000001", tmp_path / "step_00000001")
    (folder / "rank_00000.safetensors").unlink()
    assert Checkpoint(folder).state["samples"] == 8
    (folder / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"state\.json"):
        _ = Checkpoint(folder).state


def test_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step_00000005 is no folder"):
        Checkpoint(tmp_path / "step_00000005")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        Checkpoint(tmp_path)
