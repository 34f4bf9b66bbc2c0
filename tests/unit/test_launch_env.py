"""Who a rank is, read from torchrun's or srun's variables."""

import pytest

from megavid.errors import ConfigError
from megavid.parallel import rank_env
from megavid.parallel.launch import RankEnv, first_host, run_local_ranks


def test_alone_without_a_launcher() -> None:
    assert RankEnv.detect({"PATH": "/bin"}) == RankEnv(rank=0, world_size=1, local_rank=0)


def test_torchrun_is_read() -> None:
    environ = {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007", "MASTER_PORT": "29400",
    }  # fmt: skip
    assert RankEnv.detect(environ) == RankEnv(9, 16, 1, "gpu007", 29400)


def test_srun_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_env.shutil, "which", lambda name: None)
    environ = {
        "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "gpu[003-006]",
    }  # fmt: skip
    env = RankEnv.detect(environ)
    assert env == RankEnv(5, 8, 1, "gpu003", 23456)
    assert RankEnv.detect({**environ, "MASTER_ADDR": "other", "MASTER_PORT": "7"}).master_address == "other"
    assert not env.is_main


def test_job_script_without_srun_is_refused() -> None:
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS = 8, .* use `srun megavid \.\.\.`, or --ranks N"):
        RankEnv.detect(environ)
    assert RankEnv.detect({**environ, "SLURM_NTASKS": "1"}).world_size == 1


@pytest.mark.parametrize("wrong", ["", "x", "-1"])
def test_a_variable_that_is_no_number_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match=f"MASTER_PORT = '{wrong}' must be a number"):
        RankEnv.detect({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": wrong})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-006,9],login", "gpu003"),
        ("node1", "node1"),
        ("a-1,b-2", "a-1"),
        ("rack[2,4]-ib", "rack2-ib"),
        ("10.0.0.[1-4]", "10.0.0.1"),
    ],
)
def test_first_host_without_scontrol(monkeypatch: pytest.MonkeyPatch, nodes: str, first: str) -> None:
    monkeypatch.setattr(rank_env.shutil, "which", lambda name: None)
    assert first_host(nodes) == first


def test_first_host_asks_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    fake = tmp_path / "scontrol"
    fake.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "%s-a\\n%s-b\\n" "$3" "$3"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert first_host("weird") == "weird-a"


def test_one_local_rank_runs_here() -> None:
    seen: list[RankEnv] = []
    run_local_ranks(seen.append, 1)
    assert seen == [RankEnv()]


def test_no_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ranks 0 must be at least 1"):
        run_local_ranks(lambda env: None, 0)
