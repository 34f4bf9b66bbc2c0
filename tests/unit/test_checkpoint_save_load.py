"""Any layout reads what any layout wrote, bitwise; what does not fit is an error that names the tensor."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megavid.checkpoint import Checkpoint, SingleRank, latest, load, save
from megavid.errors import CheckpointError
from megavid.parallel.fragment import Box, Fragment
from tests.support.checkpoint_world import (
    RUN_TOML,
    TENSORS,
    assert_holds,
    fragments_of,
    load_world,
    run_ranks,
    save_world,
    truth,
)


def _saved(folder: Path, **options: object) -> Path:
    save_world(folder, **options)  # type: ignore[arg-type]
    found = latest(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(("tp", "dp", "dim"), [(1, 3, 0), (4, 1, 0), (1, 1, 0), (2, 2, 0), (2, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize("saved_dim", [0, 1])
def test_any_layout_loads_bitwise(tmp_path: Path, tp: int, dp: int, dim: int, saved_dim: int) -> None:
    folder = _saved(tmp_path, tp=2, dp=2, dim=saved_dim)
    checkpoint = load_world(folder, 1, tp=tp, dp=dp, dim=dim)[0]
    assert checkpoint.step == 1
    assert checkpoint.state == {"samples": 8, "step": 1}
    assert checkpoint.run_toml == RUN_TOML
    assert checkpoint.manifest.layout == "dp2 tp2"


def test_small_reads_and_many_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _saved(tmp_path, file_bytes=400, reread=True)
    assert (folder / "rank_00003_01.safetensors").exists()
    monkeypatch.setattr("megavid.checkpoint.read.READ_BYTES", 64)
    monkeypatch.setattr("megavid.checkpoint.read.GAP_BYTES", 0)
    load_world(folder, 1, tp=3, dp=1, dim=1)


def test_files_are_what_the_index_says(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == [
        "index.json", "manifest.json", "manifest.sha256",
        *(f"rank_{rank:05d}.safetensors" for rank in range(4)), "run.toml", "state.json",
    ]  # fmt: skip
    index = json.loads((folder / "index.json").read_text())
    entries = {name: load_file(folder / name) for name in index["files"]}
    count = 0
    for name, row in index["tensors"].items():
        for number, start, offset, shape in row["boxes"]:
            tensor = entries[index["files"][number]].pop(f"{name}@{','.join(map(str, offset))}")
            want = truth(name, 1)[tuple(slice(o, o + s) for o, s in zip(offset, shape))]
            assert torch.equal(tensor, want)
            with open(folder / index["files"][number], "rb") as file:
                file.seek(start)
                assert (
                    file.read(want.numel() * want.element_size())
                    == want.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                )
            count += 1
    assert count > len(TENSORS)
    assert not any(entries.values())
    assert (folder.parent / "latest").read_text() == "step_00000001\n"


def test_reads_only_the_bytes_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.arange(1 << 18, dtype=torch.float32)
    whole = Fragment("model/x", (512, 512), (Box((0, 0), (512, 512)),), data)
    folder = save(tmp_path, 3, [whole], {}, SingleRank(), run_toml="")
    monkeypatch.setattr("megavid.checkpoint.read.GAP_BYTES", 512)
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read.append(len(views[0])) or preadv(fd, views, at))
    checkpoint = Checkpoint(folder)
    rows = Fragment("model/x", (512, 512), (Box((7, 0), (5, 512)),), torch.zeros(5 * 512))
    checkpoint.fill([rows], SingleRank())
    assert torch.equal(rows.data, data[7 * 512 : 12 * 512])
    assert sum(read) == 5 * 512 * 4
    read.clear()
    column = Fragment("model/x", (512, 512), (Box((0, 3), (512, 2)),), torch.zeros(1024))
    checkpoint.fill([column], SingleRank())
    assert torch.equal(column.data.view(512, 2), data.view(512, 512)[:, 3:5])
    assert sum(read) == 512 * 2 * 4


def test_floating_point_data_is_converted_and_other_data_is_not(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    half = Fragment("model/a", (16, 12), (Box((0, 0), (16, 12)),), torch.zeros(192, dtype=torch.bfloat16))
    wide = Fragment("ema/a", (16, 12), (Box((0, 0), (16, 12)),), torch.zeros(192, dtype=torch.float64))
    load(folder, [half, wide], SingleRank(), allow_unread=("",))
    assert torch.equal(half.data, truth("model/a", 1).view(-1).bfloat16())
    assert torch.equal(wide.data, truth("ema/a", 1).view(-1).double())
    count = Fragment("model/a", (16, 12), half.boxes, torch.zeros(192, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"tensor model/a has dtype torch.float32, expected torch.int64"):
        load(folder, [count], SingleRank(), allow_unread=("",))


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        (Fragment("model/z", (4,), (Box((0,), (4,)),), torch.zeros(4)), "has no tensor model/z"),
        (Fragment("model/b", (13,), (Box((0,), (4,)),), torch.zeros(4)), r"model/b has shape \[12\], expected \[13\]"),
        (Fragment("model/b", (12,), (Box((9,), (4,)),), torch.zeros(4)), "has 3 saved elements, expected 4"),
        (Fragment("model/b", (12,), (Box((9,), (3,)),), torch.zeros(4)), r"has shape \[4\], expected \[3\]"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank_before_data_changes(
    tmp_path: Path, fragment: Fragment, message: str
) -> None:
    folder = _saved(tmp_path)
    good = [fragments_of(rank, 1, 2, None) for rank in range(2)]
    errors = run_ranks(2, lambda ranks: load(folder, good[ranks.rank] + [fragment] * ranks.rank, ranks))
    assert [type(error) for error in errors] == [CheckpointError] * 2
    assert str(errors[0]) == str(errors[1])
    with pytest.raises(CheckpointError, match=message):
        raise errors[0]
    assert all((f.data == 77).all() for fragments in good for f in fragments)


def test_tensors_that_nobody_asks_for_must_be_allowed(tmp_path: Path) -> None:
    folder = _saved(tmp_path)

    def wanted(rank: int) -> list[Fragment]:
        return [f for f in fragments_of(rank, 1, 2, None) if f.name.startswith("model/")]

    errors = run_ranks(2, lambda ranks: load(folder, wanted(ranks.rank), ranks))
    for error in errors:
        assert isinstance(error, CheckpointError)
        assert "holds 8 tensors that this model does not have, the first buffer/bias" in str(error)
    allowed = ("exp_avg/", "buffer/", "ema/")
    for rank, result in enumerate(
        run_ranks(2, lambda ranks: load(folder, wanted(ranks.rank), ranks, allow_unread=allowed))
    ):
        assert isinstance(result, Checkpoint), (rank, result)


def test_weights_load_without_owners(tmp_path: Path) -> None:
    folder = _saved(tmp_path)
    fragments = [Fragment(f.name, f.global_shape, f.boxes, f.data, is_owner=False) for f in fragments_of(0, 1, 1, None)]
    load(folder, fragments, SingleRank())
    assert_holds(fragments, 1)


@pytest.mark.parametrize("broken", ["two owners", "no owner", "length"])
def test_fragments_that_do_not_cover_a_tensor_once_are_not_saved(tmp_path: Path, broken: str) -> None:
    whole = Box((0,), (4,))
    fragments = {
        "two owners": [Fragment("x", (4,), (whole,), torch.zeros(4)), Fragment("x", (4,), (whole,), torch.zeros(4))],
        "no owner": [Fragment("x", (5,), (whole,), torch.zeros(4))],
        "length": [Fragment("x", (4,), (whole,), torch.zeros(3))],
    }[broken]
    with pytest.raises(CheckpointError, match="tensor x"):
        save(tmp_path, 1, fragments, {}, SingleRank(), run_toml="")
    assert latest(tmp_path) is None
    assert not list(tmp_path.glob("step_*"))


def test_extra_files_are_kept_and_checked(tmp_path: Path) -> None:
    folder = _saved(tmp_path, extra={"captions.model": b"abc"})
    assert Checkpoint(folder).read("captions.model") == b"abc"
    (folder / "captions.model").write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=r"captions\.model"):
        Checkpoint(folder).read("captions.model")
    with pytest.raises(CheckpointError, match="cannot be in a checkpoint"):
        save_world(tmp_path, extra={"../x": b""})
