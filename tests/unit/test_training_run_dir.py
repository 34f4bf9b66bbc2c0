"""Rules of a run's folder: who may write, what a second start does, what may change."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from megavid import checkpoint
from megavid.checkpoint import SingleRank
from megavid.config.load import dump_toml, load_run
from megavid.config.schema import RunConfig
from megavid.data.build import build_source
from megavid.errors import CheckpointError, ConfigError
from megavid.parallel.fragment import Box, Fragment
from megavid.training.loop import is_save_due, last_step
from megavid.training.resume import check_init_from
from megavid.training.run_dir import RunDir, RunLock
from megavid.training.state import TrainState


def config_of(*overrides: str) -> RunConfig:
    return load_run("tiny", ["--train.steps", "6", *overrides])


def save(run_dir: RunDir, step: int, config: RunConfig) -> Path:
    """A checkpoint with one small tensor."""
    weight = Fragment("model/w", (3,), (Box((0,), (3,)),), torch.arange(3.0))
    state = TrainState(step=step, updates=step).to_json(seed=1, loader={})
    return checkpoint.save(
        run_dir.checkpoints, step, [weight], state, SingleRank(), run_toml=dump_toml(config), layout="dp1"
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run of six steps with checkpoints of steps 2 and 4."""
    found = RunDir(tmp_path / "run")
    found.path.mkdir()
    found.write_config(config_of())
    for step in (2, 4):
        save(found, step, config_of())
    return found


def test_empty_folder_is_a_new_run(tmp_path: Path) -> None:
    start = RunDir(tmp_path / "new").decide(config_of())
    assert (start.kind, start.step, start.checkpoint) == ("new", 0, None)


def test_same_command_goes_on_after_the_latest_checkpoint(run_dir: RunDir) -> None:
    start = run_dir.decide(config_of())
    assert (start.kind, start.step) == ("resume", 4)


def test_asked_for_checkpoint_is_taken(run_dir: RunDir) -> None:
    start = run_dir.decide(config_of(), resume_step=2)
    assert (start.kind, start.step) == ("resume", 2)
    with pytest.raises(CheckpointError, match=r"--resume-step 3: no such checkpoint.*2, 4"):
        run_dir.decide(config_of(), resume_step=3)


def test_finished_run_is_finished_until_it_may_grow(run_dir: RunDir) -> None:
    save(run_dir, 6, config_of())
    assert run_dir.decide(config_of()).kind == "finished"
    assert run_dir.decide(config_of("--train.steps", "7")).kind == "resume"


def test_another_config_is_refused_with_the_first_differing_key(run_dir: RunDir) -> None:
    with pytest.raises(ConfigError, match=r"another config: optimizer\.beta1 was 0\.9, now 0\.8"):
        run_dir.decide(config_of("--optimizer.beta1", "0.8", "--diffusion.flow_shift", "3"))
    with pytest.raises(ConfigError, match=r"train\.steps was 6, now 5"):
        run_dir.decide(config_of("--train.steps", "5"))


@pytest.mark.parametrize(
    "flags",
    [
        ("--parallel.tensor", "2"), ("--train.micro_batch_size", "2"), ("--train.stop_at_step", "5"),
        ("--checkpoint.interval_steps", "1"), ("--log.worst_samples", "3"),
    ],
)  # fmt: skip
def test_what_does_not_change_the_run_may_change(run_dir: RunDir, flags: tuple[str, str]) -> None:
    assert run_dir.decide(config_of(*flags)).kind == "resume"


def test_damaged_manifest_is_named_with_the_way_out(run_dir: RunDir) -> None:
    manifest = run_dir.checkpoints / "step_00000004" / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[20] ^= 1
    manifest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json.*--resume-step N.*step 2, 4") as caught:
        run_dir.decide(config_of())
    assert "\n" not in str(caught.value)
    assert run_dir.decide(config_of(), resume_step=2).step == 2


def test_lock_refuses_a_second_start_and_goes_with_its_holder(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(ConfigError, match=rf"in use by another start \(pid {os.getpid()} on "),
        RunLock(tmp_path, wait_s=0),
    ):
        pass
    with RunLock(tmp_path, wait_s=0):
        pass


def test_events_are_rows_and_a_half_row_is_left_out(run_dir: RunDir) -> None:
    run_dir.event("started", step=0)
    run_dir.event("validated", step=2, loss=float("nan"))
    with run_dir.events_file.open("a") as file:
        file.write('{"event": "sav')
    rows = run_dir.events()
    assert [row["event"] for row in rows] == ["started", "validated"]
    assert rows[1]["loss"] is None


def test_ranks_file_is_json(run_dir: RunDir) -> None:
    rows = [{"rank": 0, "pid": 1}, {"rank": 1, "pid": 2}]
    run_dir.write_ranks(rows)
    assert json.loads(run_dir.ranks_file.read_text()) == rows


def test_run_toml_repeats_the_run(run_dir: RunDir) -> None:
    assert load_run(str(run_dir.config_file), []) == config_of()


def test_state_comes_back_and_a_foreign_one_is_refused() -> None:
    state = TrainState(step=7, updates=5, skipped=2, bad_in_a_row=1, tokens=99, clips=3)
    table = json.loads(json.dumps(state.to_json(seed=3, loader={"position": 4})))
    assert TrainState.from_json(table) == state
    assert table["loader"] == {"position": 4}
    with pytest.raises(CheckpointError, match="format"):
        TrainState.from_json({**table, "format": 9})
    with pytest.raises(CheckpointError, match="tokens"):
        TrainState.from_json({**table, "tokens": None})


@pytest.mark.parametrize(
    ("stop_at", "interval", "saved"), [(0, 2, [2, 4, 6]), (3, 2, [2, 3]), (0, 0, [6]), (9, 4, [4, 6])]
)
def test_checkpoints_come_at_the_interval_and_at_the_last_step(stop_at: int, interval: int, saved: list[int]) -> None:
    config = config_of("--train.stop_at_step", str(stop_at), "--checkpoint.interval_steps", str(interval))
    assert [step for step in range(1, last_step(config) + 1) if is_save_due(config, step)] == saved


def test_init_from_takes_weights_that_fit_and_names_what_does_not(run_dir: RunDir) -> None:
    def starting(**model: int) -> RunConfig:
        config = config_of("--train.init_from", str(run_dir.path), "--train.seed", "9", "--data.pack_tokens", "768")
        return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))

    source = build_source(config_of())
    assert check_init_from(starting(), source).step == 4
    assert check_init_from(starting(text_length=64), source).step == 4
    with pytest.raises(
        ConfigError, match=r"another model: model\.ffn_size is 512 there, 256 here; .*may differ: model\.text_length"
    ):
        check_init_from(starting(ffn_size=256), source)
