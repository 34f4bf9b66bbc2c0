"""What every command on ranks does first: the run's determinism, before CUDA and the world start."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megavid.cli import preflight
from megavid.parallel import world
from megavid.parallel.launch import RankEnv
from megavid.plan.layout import Layout
from megavid.training import profile_run, replay, run, sample_run
from tests.support.tiny_world import tiny_config

CONFIG = replace(tiny_config(), train=replace(tiny_config().train, deterministic=True))
COMMANDS: dict[str, Callable[..., None]] = {
    "train": functools.partial(run.run_rank, CONFIG, Layout(), "cuda", Any, SimpleNamespace(), 0),
    "replay": functools.partial(replay.replay_rank, CONFIG, Layout(), "cuda", Any, print),
    "profile": functools.partial(profile_run.profile_rank, CONFIG, Layout(), "cuda", Any, Path(), print),
    "sample": functools.partial(sample_run.sample_rank, SimpleNamespace(config=CONFIG, request=Any), Layout(), "cuda"),
    "preflight": functools.partial(preflight.preflight_rank, Any, CONFIG, Layout(), "cuda"),
}


class WorldStarts(Exception):
    """In the place of ``init_distributed``."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_is_deterministic_on_every_rank_of_every_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def start(*args: Any) -> None:
        raise WorldStarts

    monkeypatch.setattr(world, "set_deterministic", lambda: asked.append(name))
    monkeypatch.setattr(world, "init_distributed", start)
    with pytest.raises(WorldStarts):
        COMMANDS[name](RankEnv())
    assert asked == [name]
