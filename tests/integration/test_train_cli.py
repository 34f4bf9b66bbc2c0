"""``megavid train`` and ``megavid sample`` as people call them: exit statuses, files, stopping, resuming, damage.

Commands are forked from a process that has imported everything; one finished run is shared.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavid.errors import RankLost
from megavid.training.metrics import read_rows
from megavid.training.plots import column
from megavid.training.run_dir import RunDir
from tests.support.warm_parent import Command, WarmParent

FLAGS = (
    "--train.steps", "8", "--train.global_batch_size", "2", "--checkpoint.interval_steps", "2",
    "--data.validation_samples", "4",
)  # fmt: skip
RANKS = ("--ranks", "2", "--parallel.expert", "2")


def train(warm: WarmParent, out: Path, *args: str, file_bytes: int = 0) -> Command:
    """Run the command to its end."""
    return warm.run("train", "tiny", "--out", str(out), *FLAGS, *args, file_bytes=file_bytes)


def losses(out: Path) -> list[float]:
    return column(read_rows(out / "metrics.jsonl"), "loss")[1]


def rows_without_times(out: Path) -> list[tuple[object, ...]]:
    return [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(out / "metrics.jsonl")]


def assert_one_line(stderr: str) -> None:
    assert stderr.startswith("megavid: error: ")
    assert stderr.count("\n") == 1


@pytest.fixture(scope="module")
def finished(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on two ranks that nothing disturbed, with every report on."""
    out = tmp_path_factory.mktemp("finished") / "run"
    reports = ("--log.validation_interval_steps", "4", "--log.worst_samples", "2")
    pictures = ("--log.sample_interval_steps", "8", "--log.sample_steps", "2", "--log.sample_prompts", "a red circle")
    done = train(warm, out, *RANKS, *reports, *pictures, "--checkpoint.keep_last", "9")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("tokens/s") == 8
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may go on with or damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_folder_holds_what_the_contract_says(finished: Path) -> None:
    rows = read_rows(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    wanted = {"step", "loss", "grad_norm", "learning_rate", "step_time_s", "tokens", "tokens_per_s", "data_wait_s"}
    assert all(wanted <= row.keys() for row in rows)
    # A CPU's peak is nobody's figure, so there is no MFU; what was measured is there.
    assert all((row["mfu"], row["hfu"]) == (None, None) for row in rows)
    for name in ("tflops_per_rank", "memory_peak_gib", "comm_wait_s"):
        assert all(value > 0 for value in column(rows, name)[1]), name
    ranks = json.loads((finished / "ranks.json").read_text())
    assert [row["rank"] for row in ranks] == [0, 1]
    assert [row["coordinates"]["ep"] for row in ranks] == [0, 1]
    assert all(row["parameters"] > 0 and row["pid"] > 0 and row["host"] for row in ranks)
    names = [event["event"] for event in RunDir(finished).events()]
    assert names[0] == "started"
    assert names[-1] == "finished"
    assert {"validated", "worst_samples", "sampled", "saved"} <= set(names)
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "latest", "step_00000002", "step_00000004", "step_00000006", "step_00000008",
    ]  # fmt: skip
    assert (finished / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    for file in ("run.toml", "loss.png", "router.jsonl", "samples/step_00000008.png"):
        assert (finished / file).stat().st_size > 100
    assert any((finished / "tensorboard").iterdir())


def test_finished_run_says_so(warm: WarmParent, finished: Path) -> None:
    done = train(warm, finished)
    assert (done.returncode, done.stderr) == (0, "")
    assert "is finished: step 8 of 8" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--optimizer.beta1", "0.5"), r"optimizer.beta1 was 0.9, now 0.5"),
        (("--train.seed", "1"), r"train.seed was 1234, now 1"),
        (("--parallel.tensr", "2"), "did you mean 'parallel.tensor'?"),
        (("--parallel.tensor", "3"), "must divide the number of ranks"),
        (("--resume-step", "3"), "there are those of step 2, 4, 6, 8"),
        (("--train.init_from", "/nowhere"), "no checkpoint in /nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    warm: WarmParent, finished: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    out = tmp_path / "new" if "--train.init_from" in flags else finished
    refused = train(warm, out, *flags)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert_one_line(refused.stderr)


def test_other_layout_goes_on_within_the_law_and_keeps_earlier_rows(
    warm: WarmParent, copy: Path, finished: Path
) -> None:
    before = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    done = train(warm, copy, "--resume-step", "4", "--ranks", "2", "--parallel.pipeline", "2", "--train.steps", "9")
    assert done.returncode == 0, done.stderr
    after = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert losses(copy)[:8] == pytest.approx(losses(finished), rel=1e-5)
    assert len(after) == 9
    resumed = [event for event in RunDir(copy).events() if event["event"] == "resumed"]
    assert [(event["step"], event["layout"]) for event in resumed] == [(4, "dp1 pp2")]


def test_killed_run_goes_on_bitwise(warm: WarmParent, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    chance = random.Random(5)
    for victim in ("launcher", "rank", "launcher", "rank"):
        command = start(warm, out)
        pids = wait_for_ranks(command, out)
        time.sleep(chance.uniform(0.0, 0.5))
        if command.poll() is not None:
            break  # a fast machine was done before the kill
        os.kill(command.pid if victim == "launcher" else chance.choice(pids), signal.SIGKILL)
        assert command.wait() == (-signal.SIGKILL if victim == "launcher" else RankLost.exit_code), command.stderr
        assert_ended(pids)
    assert train(warm, out, *RANKS).returncode == 0
    assert rows_without_times(out) == rows_without_times(finished)


def test_stopped_and_chained_run_goes_on_bitwise(warm: WarmParent, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    command = start(warm, out)
    wait_for_ranks(command, out)
    command.send_signal(signal.SIGTERM)
    assert command.wait() == 75, command.stderr
    assert "SIGTERM at step" in command.stderr
    assert_one_line(command.stderr)

    chained = train(warm, out, *RANKS, "--train.stop_at_step", "7")
    assert chained.returncode == 0, chained.stderr
    stops = [event for event in RunDir(out).events() if event["event"] == "stopped"]
    assert [event["reason"] for event in stops] == ["SIGTERM", "train.stop_at_step"]
    assert stops[-1]["step"] == 7

    assert train(warm, out, *RANKS).returncode == 0
    assert rows_without_times(out) == rows_without_times(finished)


def start(warm: WarmParent, out: Path) -> Command:
    return warm.start("train", "tiny", "--out", str(out), *FLAGS, *RANKS, "--checkpoint.interval_steps", "1")


def wait_for_ranks(command: Command, out: Path) -> list[int]:
    """The ranks of this start, once they have written ranks.json."""
    deadline = time.monotonic() + 120
    while not writes_ranks(out, command):
        assert command.poll() is None, command.stderr
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return rank_pids(out)


def rank_pids(out: Path) -> list[int]:
    return [row["pid"] for row in json.loads((out / "ranks.json").read_text())]


def writes_ranks(out: Path, command: Command) -> bool:
    """Whether this start, not an earlier one, has written ranks.json: its ranks are the launcher's children."""
    return (out / "ranks.json").exists() and all(parent_of(pid) == command.pid for pid in rank_pids(out))


def parent_of(pid: int) -> int:
    """The process that started ``pid``; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def assert_ended(pids: list[int]) -> None:
    """The ranks die with their launcher, however that ended."""
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether it runs; one that has ended but that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_flipped_byte_in_a_tensor_file_is_one_line_and_the_previous_checkpoint_loads(
    warm: WarmParent, copy: Path
) -> None:
    file = next((copy / "checkpoints" / "step_00000008").glob("rank_*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused = train(warm, copy, "--train.steps", "9")
    assert refused.returncode == 2
    assert_one_line(refused.stderr)
    assert str(file) in refused.stderr
    assert "--resume-step N" in refused.stderr
    went_on = train(warm, copy, "--train.steps", "9", "--train.stop_at_step", "7", "--resume-step", "6")
    assert went_on.returncode == 0, went_on.stderr


def test_full_disk_is_a_storage_fault_and_the_previous_checkpoint_stands(warm: WarmParent, copy: Path) -> None:
    full = train(warm, copy, "--train.steps", "9", file_bytes=1 << 20)
    assert full.returncode == 3, full.stderr
    assert_one_line(full.stderr)
    assert (copy / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert RunDir(copy).decide(RunDir(copy).config()).step == 8


def test_numbers_that_are_not_finite_stop_the_run_with_their_origin(warm: WarmParent, tmp_path: Path) -> None:
    wild = ("--optimizer.learning_rate", "1e30", "--optimizer.warmup_steps", "0", "--train.max_bad_steps", "2")
    stopped = train(warm, tmp_path / "run", *wild)
    assert stopped.returncode == 4
    assert_one_line(stopped.stderr)
    for said in ("step 3:", "first not finite: ", "samples ", "train.max_bad_steps = 2"):
        assert said in stopped.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["is_skipped"] for row in rows] == [False, True, True]
    assert rows[-1]["loss"] is None


def test_new_run_starts_from_weights_alone(warm: WarmParent, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    done = train(warm, out, "--train.init_from", str(finished), "--train.steps", "1", "--train.seed", "7")
    assert done.returncode == 0, done.stderr
    assert RunDir(out).events()[0]["init_from"] == str(finished)
    # A fresh model of this seed would begin well above.
    assert losses(out)[0] < 1.5 * losses(finished)[-1]


def test_sample_writes_videos_from_any_layout_in_any_layout(warm: WarmParent, tmp_path: Path, finished: Path) -> None:
    outs = []
    for number, layout in enumerate(((), ("--ranks", "2", "--parallel.tensor", "2"))):
        out = tmp_path / str(number) / "clip.mp4"
        args = ("--prompt", "a red circle", "--prompt", "a blue square", "--steps", "2", "--sheet", "--gif")
        done = warm.run("sample", str(finished), *args, "--out", str(out), *layout)
        assert done.returncode == 0, done.stderr
        assert {p.name for p in out.parent.iterdir()} == {
            "clip_1.mp4", "clip_2.mp4", "clip_1.gif", "clip_2.gif", "clip.png",
        }  # fmt: skip
        outs.append(out)
    one, two = (np.asarray(Image.open(out.with_suffix(".png"))).astype(int) for out in outs)
    assert np.abs(one - two).max() <= 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--prompt TEXT is missing"),
        (("--prompt", "x", "--out", "x.avi"), "must be a file that ends in .mp4"),
        (("--prompt", "x", "--out", "x.mp4", "--frames", "6"), "takes 1 + 4k"),
        (("--prompt", "x", "--out", "x.mp4", "--train.steps", "6"), "only --parallel.* may be given"),
        (("--prompt", "x", "--out", "x.mp4", "--sampler", "ddim"), "must be one of unipc, euler"),
    ],
)
def test_sample_refuses_bad_input_in_one_line(
    warm: WarmParent, finished: Path, flags: tuple[str, ...], said: str
) -> None:
    refused = warm.run("sample", str(finished), *flags)
    assert refused.returncode == 2
    assert said in refused.stderr
    assert_one_line(refused.stderr)
