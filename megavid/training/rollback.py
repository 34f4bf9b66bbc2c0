"""Going back at a spike of the loss: which checkpoint to, and when not.

Owns the choice and its limit. Loading is a resume in the same processes: ``megavid.training.loop`` enters its body
again, with the checkpoint's weights and the samples behind the spike. The checkpoint is then saved again with the state
of the run that went back, and only after that is anything of the abandoned steps removed: a run that is killed in
between resumes before the spike, comes to it again and decides alike.
"""

from dataclasses import dataclass
from pathlib import Path

from megavid.checkpoint import AsyncSaver, Checkpoint, list_steps
from megavid.checkpoint.format import step_name
from megavid.checkpoint.ranks import agreed
from megavid.errors import NumericalStop
from megavid.training.callbacks import Run
from megavid.training.state import TrainState
from megavid.training.step import StepReport


@dataclass(frozen=True)
class RollBack:
    """A decision to go back, the same on every rank.

    Attributes:
        checkpoint: where to.
        later: counters of the run at the spike.
        loss: of the spike.
        samples: of its step.
    """

    checkpoint: Path
    later: TrainState
    loss: float
    samples: list[int]


def decide(run: Run, report: StepReport, samples: list[int], saver: AsyncSaver) -> RollBack | None:
    """Whether, and where to, a run goes back from the step of ``report``.

    Args:
        run: what runs.
        report: of the step just taken.
        samples: that are to blame, for the words.
        saver: of the run; the save under way is waited for, where the run may go back.

    Returns:
        None where the run does not go back: the step was no spike, the config says so, or no checkpoint is old enough
        (the step's own update is left out all the same).

    Raises:
        CheckpointError: a checkpoint that it could go back to is damaged.
        NumericalStop: it has gone back as often as it may.

    Ranks: collective.
    """
    train, state = run.config.train, run.state
    if not report.is_spike or not train.spike_rollback_steps:
        return None
    if len(state.rollbacks) >= train.max_rollbacks:
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        raise NumericalStop(
            f"step {report.step}: loss {report.loss}, {report.culprit}, samples {shown}; the run has gone back "
            f"{len(state.rollbacks)} times, the limit is train.max_rollbacks = {train.max_rollbacks}"
        )
    saver.wait()
    target: int | None = None
    with agreed(run.mesh):
        if run.mesh.is_main:
            target = last_step_before(run.run_dir.checkpoints, report.step - train.spike_rollback_steps, state)
    target = run.mesh.broadcast_object(target)
    if target is None:
        run.event("not_rolled_back", step=report.step, reason="no checkpoint is old enough")
        return None
    return RollBack(run.run_dir.checkpoints / step_name(target), state, report.loss, samples)


def last_step_before(checkpoints: Path, step: int, state: TrainState) -> int | None:
    """The last checkpoint at or before ``step`` that the run of ``state`` came by; None for none.

    Raises:
        CheckpointError: one is damaged.
    """
    for found in reversed(list_steps(checkpoints)):
        if found <= step and TrainState.from_json(Checkpoint(checkpoints / step_name(found)).state).is_before(state):
            return found
    return None
