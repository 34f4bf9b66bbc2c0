"""What tools/bench_ops.py and bench_peer.py say of a run, and what they refuse before they measure."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megavid.ops.compiled import why_not_compiled
from tools import bench_ops, bench_peer

needs_compiled = pytest.mark.skipif(bool(why_not_compiled()), reason=f"compiled ops: {why_not_compiled()}")


@pytest.fixture
def default_device() -> Iterator[None]:
    yield
    torch.set_default_device(None)


@needs_compiled
@pytest.mark.usefixtures("default_device")
def test_the_page_names_the_command_that_was_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ceiling.json").write_text(json.dumps({"copy_gbs": 3000.0}))
    command = ["--only", "no such op", "--steps", "0", "--head", "64", "--ceiling", str(tmp_path / "ceiling.json")]
    assert bench_ops.main(command) == 0
    page = capsys.readouterr().out
    assert (
        f"python tools/bench_ops.py --only 'no such op' --steps 0 --head 64 --ceiling {tmp_path}/ceiling.json`" in page
    )
    assert "of a copy's bandwidth |" in page


@needs_compiled
def test_a_peer_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_peer.main(["--only", "diffusers, eager, autocast"]) == 2
    said = capsys.readouterr().err
    assert "--only 'diffusers, eager, autocast' is no peer in fp32; there are 'diffusers, eager', 'diffusers, c" in said


def test_without_megavid_there_is_nothing_to_compare() -> None:
    def dead(order: str) -> float:
        raise EOFError

    steps = {"megavid": dead, "diffusers, eager": lambda order: 1.0}
    with pytest.raises(SystemExit, match="megavid failed"):
        bench_peer.warm_up(steps)
    rest = {"diffusers, eager": steps["diffusers, eager"], "diffusers, compiled": dead}
    bench_peer.warm_up(rest)
    assert list(rest) == ["diffusers, eager"]


def test_shares_of_a_step_are_of_the_profiled_rounds() -> None:
    """The ratio is that of the rounds, in which the machine was the same for both; not that of two medians."""
    mine = [{"aten::mm": 5.0, "aten::add": 1.0 * slow, "": 0.5 * slow} for slow in (1, 2, 4)]
    theirs = [{"aten::addmm": 4.0, "aten::gelu": 3.0 * slow, "": 0.0} for slow in (1, 2, 2)]
    seconds = {"megavid": [6.0, 7.0], "diffusers, eager": [8.0, 14.0]}
    lines = bench_peer.table(seconds, {"megavid": mine, "diffusers, eager": theirs})
    assert lines[2] == "| megavid | 6.50 (6.00 to 7.00) |  | 5.00 | 0.00 | 3.00 (1.50 to 6.00) |  |"
    assert lines[3].endswith("| 0.625 (0.500 to 0.750) | 4.00 | 0.00 | 6.00 (3.00 to 6.00) | 0.500 (0.500 to 1.000) |")
    assert bench_peer.largest(mine, 5) == [("aten::add", 2.0)]
