"""`megavid launch slurm`: what it refuses, what it writes, and that the script is one that a shell reads."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megavid.cli import launch
from megavid.cluster.script import SLACK_S, seconds_of, signal_lead_s
from megavid.errors import ConfigError
from megavid.plan.answer import Answer

EXAMPLES = Path(__file__).parents[2] / "examples" / "slurm"


def planned(*argv: str) -> Answer:
    return launch.plan(launch.parse(list(argv)))


def dry_run(out: Path, *argv: str) -> str:
    assert launch.main(["slurm", *argv, "--out", str(out), "--dry-run"]) == 0
    return (out / "slurm" / "train.sbatch").read_text()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("5:30", 330), ("24:00:00", 86400), ("1-0", 86400), ("2-12:30", 217800), ("1-00:00:05", 86405)],
)
def test_times_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1-"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be written as Slurm does"):
        seconds_of(text)


def test_lead_holds_slack_a_step_and_two_saves() -> None:
    answer = planned("wan_moe_30b_a3b", "--nodes", "8", "--out", "x")
    goodput = replace(answer.goodput, write_s=100.0, blocked_s=2.0)
    lead = signal_lead_s(replace(answer, goodput=goodput))
    assert lead == pytest.approx(SLACK_S + answer.step_interval[1] + 204, abs=1)


def test_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    flags = ("--parallel.pipeline", "1", "--parallel.virtual_pipeline", "1")
    with pytest.raises(ConfigError, match=r"does not fit: .* --search"):
        dry_run(tmp_path / "run", "wan_moe_100b_a20b", "--nodes", "8", *flags)
    assert not (tmp_path / "run").exists()


def test_time_limit_without_room_for_the_save_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--time 00:05:00 is 300 s, of which the last"):
        dry_run(tmp_path / "run", "wan_moe_30b_a3b", "--nodes", "8", "--time", "00:05:00")


def test_script_holds_the_request_and_what_the_layout_needs(tmp_path: Path) -> None:
    argv = ("wan_moe_30b_a3b", "--nodes", "8", "--account", "physics", "--exclude", "n[3-4]", "--chain", "3")
    text = dry_run(tmp_path / "run", *argv, "--train.deterministic", "true", "--container", "/img/a b.sqsh")
    for line in ("--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8", "--account=physics", "--exclude=n[3-4]"):
        assert f"#SBATCH {line}\n" in text
    assert "export CUDA_DEVICE_MAX_CONNECTIONS=" in text  # expert parallelism
    assert "export NCCL_ALGO=" in text  # deterministic
    assert "export MEGAVID_RESTART_BY=chain" in text
    assert "'--container-image=/img/a b.sqsh'" in text
    assert "--train.deterministic true" in text


def test_script_and_shared_files_are_bash(tmp_path: Path) -> None:
    dry_run(tmp_path / "run", "wan_moe_30b_a3b", "--nodes", "8")
    for file in (*sorted((tmp_path / "run" / "slurm").iterdir()), *sorted(EXAMPLES.glob("*.s*"))):
        done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_edited_env_sh_is_kept(tmp_path: Path) -> None:
    dry_run(tmp_path / "run", "wan_moe_30b_a3b", "--nodes", "8")
    env = tmp_path / "run" / "slurm" / "env.sh"
    env.write_text("# mine\n")
    dry_run(tmp_path / "run", "wan_moe_30b_a3b", "--nodes", "8")
    assert env.read_text() == "# mine\n"


def test_examples_use_the_shipped_files() -> None:
    for name in ("env.sh", "job.sh"):
        assert (EXAMPLES / name).resolve() == (EXAMPLES / "../../megavid/cluster/files" / name).resolve()


@pytest.mark.parametrize(
    ("said", "host"),
    [
        ("megavid: error: rank 0: rank 1 on n1 is silent\nsrun: error: n0: task 0: Exited with exit code 5", "n1"),
        ("srun: error: n0: task 0: Exited with exit code 5\nsrun: error: n3: tasks 4-7: Killed", "n3"),
        ("srun: error: n2: task 2: Segmentation fault", "n2"),
        ("srun: Force Terminated StepId=1.0", "unknown"),
    ],
)  # fmt: skip
def test_fault_is_noted_with_the_host_to_blame(tmp_path: Path, said: str, host: str) -> None:
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step_00000003\n")
    (tmp_path / "errors").write_text(said + "\n")
    words = f"source {EXAMPLES / 'job.sh'}; OUT={run} errors={tmp_path / 'errors'} status=5; note_fault; bad_hosts"
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"}
    for count in (1, 2):
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True, env=env)
        assert done.stdout.split()[0] == str(count), done.stderr
    assert (run / "slurm" / "faults").read_text() == f"step_00000003 {host} 5 7.0\n" * 2
    assert done.stdout.split()[1:] == ([] if host == "unknown" else [host])  # bad once it has failed twice


@pytest.mark.parametrize(
    ("lock", "squeue", "ended"),
    [
        ("pid 1 on n1, Slurm job 7 start 0 of cluster big", "echo 8; echo 77", "7"),
        ("pid 1 on n1, Slurm job 7 start 0 of cluster big", "echo 8; echo 7", ""),
        ("pid 1 on n1, Slurm job 7 start 0 of cluster big", "exit 1", ""),
        ("pid 1 on n1, Slurm job 7 start 0 of cluster small", "echo 8", ""),
        ("pid 1 on n1", "echo 8", ""),
        (None, "echo 8", ""),
    ],
)
def test_holder_of_the_lock_is_over_where_slurm_says_so(
    tmp_path: Path, lock: str | None, squeue: str, ended: str
) -> None:
    (tmp_path / "squeue").write_text(f"#!/bin/bash\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    if lock:
        (tmp_path / ".lock").write_text(lock + "\n")
    words = f"set -u; source {EXAMPLES / 'job.sh'}; OUT={tmp_path}; ended_holder"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "8", "SLURM_CLUSTER_NAME": "big"}
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == ended, done.stderr


def sourced(tmp_path: Path, words: str, **commands: str) -> str:
    """What bash prints that sources job.sh, with ``commands`` (name: body) in place of Slurm's."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    script = f"set -uo pipefail; MEGAVID=(megavid) SRUN_OPTIONS=(); source {EXAMPLES / 'job.sh'}; {words}"
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]"}
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_NTASKS_PER_NODE": "8", **slurm}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("ranks_by", "launcher", "status"),
    [
        ("srun", "exit 0", "0"),
        ("srun", 'echo 75 > "$MEGAVID_STATUS_FILE"; exit 143', "75"),
        ("srun", "exit 127", "127"),
        ("torchrun", 'echo 3 > "$MEGAVID_STATUS_FILE"; exit 1', "3"),
        ("torchrun", "exit 1", "137"),
    ],
)
def test_status_is_the_one_that_the_first_rank_wrote(tmp_path: Path, ranks_by: str, launcher: str, status: str) -> None:
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / "slurm" / "7.0.status").write_text("4\n")  # of a former command of this start, as preflight
    words = f'RANKS_BY={ranks_by}; run_ranks train tiny --out {tmp_path / "run"} > /dev/null; echo "$status"'
    assert sourced(tmp_path, words, srun=launcher).strip() == status


def test_hosts_that_a_person_left_out_stay_out(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "exclude").write_text("n7\n")
    shown = '[ "$3" = 8 ] && hosts="n[3-4]"; echo "   ReqNodeList=(null) ExcNodeList=${hosts:-(null)} Nice=0"'
    scontrol = f'if [ "$1" = show ]; then {shown}; else echo "$@"; fi'
    said = sourced(tmp_path, f"OUT={tmp_path}; exclude_bad_hosts 8 9", scontrol=scontrol)
    assert "update JobId=8 ExcNodeList=n[3-4],n7\n" in said
    assert "update JobId=9 ExcNodeList=n7\n" in said


def test_only_this_chain_waits_behind_it(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "chain").write_text("8\n9\n")
    assert sourced(tmp_path, f"OUT={tmp_path}; waiting_jobs", squeue="echo 9; echo 90; echo 10").split() == ["9"]
    assert sourced(tmp_path / "bin", "OUT=/nowhere; waiting_jobs || true", squeue="echo 9") == ""
