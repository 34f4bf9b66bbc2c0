"""Following a job: what is printed of it while Slurm answers, does not, and has forgotten it."""

from pathlib import Path

import pytest

from megavid.cluster import submit
from megavid.cluster.submit import SlurmError

GONE = "slurm_load_jobs error: Invalid job id specified"
BUSY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def answering(monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
    """Slurm's answers, one after the other; those with an error in them are refusals."""
    left = list(answers)

    def ask(*command: str) -> str:
        answer = left.pop(0)
        if "error" in answer:
            raise SlurmError(f"{command[0]}: {answer}")
        return answer

    monkeypatch.setattr(submit, "ask", ask)
    monkeypatch.setattr(submit, "POLL_S", 0.0)


def test_job_is_followed_to_its_end_through_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("step 1\n")
    answering(monkeypatch, "JobState=RUNNING", BUSY, BUSY, "JobState=FAILED ExitCode=4:0")
    assert submit.follow("7", tmp_path / "log") == 4
    said = capsys.readouterr().out
    assert said == "step 1\njob 7: RUNNING\njob 7: Slurm does not answer; asking again\njob 7: FAILED, exit status 4\n"


def test_job_that_slurm_has_forgotten_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering(monkeypatch, "JobState=RUNNING", GONE)
    with pytest.raises(SlurmError, match="no longer knows job 7"):
        submit.follow("7", tmp_path / "log")


def test_numbers_of_a_chain_are_kept_for_its_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answering(monkeypatch, "7;big\n", "8;big\n", "9\n")
    assert submit.submit(tmp_path / "train.sbatch", 2) == ["7", "8"]
    assert submit.submit(tmp_path / "train.sbatch", 1) == ["9"]
    assert (tmp_path / "chain").read_text() == "7\n8\n9\n"
