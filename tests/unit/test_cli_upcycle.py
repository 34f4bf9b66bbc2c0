"""``megavid upcycle``: which weights of a run it takes, and what it says."""

from pathlib import Path

import pytest
import torch

from megavid.checkpoint.convert import open_model, write_model
from megavid.cli.upcycle import main
from tests.support.adapter_run import adapter_run
from tests.support.wan_folders import save_wan

ADAPTED = "blocks.0.self_attention.q.weight"


@pytest.mark.parametrize("ema_decay", [0.9, 0.0])
def test_of_adapters_their_moving_average_is_taken_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ema_decay: float
) -> None:
    write_model(open_model(save_wan(tmp_path / "src")), tmp_path / "base", to="megavid")
    run = adapter_run(tmp_path / "run", tmp_path / "base", ema_decay)
    flags = ("--experts", "4", "--top-k", "2", "--granularity", "2", "--to", "diffusers")
    assert main([str(run), str(tmp_path / "dst"), *flags]) == 0
    said = capsys.readouterr().out
    assert "adapters of 20 matrices are merged" in said
    assert ("the moving average of its weights" in said) == (ema_decay > 0)
    assert "--ema" not in said
    want = open_model(run, weights="ema" if ema_decay else "model").tensors[ADAPTED].read()
    assert torch.equal(open_model(tmp_path / "dst").tensors[ADAPTED].read(), want)
