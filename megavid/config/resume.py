"""What may change between two starts of one run.

Owns the one list of keys that a resumed run may change, and the sentence that refuses another. What a change
then takes (resharding, a longer schedule) is the trainer's.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from operator import attrgetter

from megavid.config.load import leaf_keys
from megavid.config.schema import RunConfig

MAY_CHANGE: dict[str, str] = {
    "parallel.*": "the loss does not depend on the layout; the checkpoint is resharded",
    "train.micro_batch_size": "cuts the same global batch otherwise",
    "train.stop_at_step": "chained jobs",
    "train.steps": "may grow: the learning rate's horizon is optimizer.schedule_steps",
    "train.init_from": "a path, read by the first start only; of a run of adapters, where their base is looked for too",
    "train.deterministic": "the same numbers, in a pinned order",
    "train.ops": "the same numbers but for rounding",
    "train.capture": "the same numbers but for rounding",
    "train.backend": "the same numbers but for rounding; checkpoints are the same",
    "deepspeed.*": "what is sharded, and where it is kept",
    "train.max_bad_steps": "a limit, not a number of the run",
    "train.spike_factor": "a limit for steps to come; what it skips is counted and named",
    "train.spike_window": "likewise",
    "train.spike_rollback_steps": "likewise; where the run went back is in its state",
    "train.max_rollbacks": "a limit, not a number of the run",
    "data.path": "a path; the shards behind it are told apart by their own identity",
    "data.queue_size": "how far the reader is ahead",
    "data.max_bad_samples": "a limit, not a number of the run",
    "checkpoint.*": "when and how to save",
    "watchdog.*": "limits, not numbers of the run",
    "log.*": "what is reported",
}
"""Keys (or patterns of keys) that may differ on resume, and why that leaves the run the same run."""


def may_change(key: str) -> bool:
    """Whether a resumed run may have another value of ``key`` (its dotted name)."""
    return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)


def differences(old: RunConfig, new: RunConfig) -> Iterator[tuple[str, object, object]]:
    """Every key whose value differs, in the order of the schema, with the old and the new value."""
    for key in leaf_keys():
        value = attrgetter(key)
        if value(old) != value(new):
            yield key, value(old), value(new)


def first_difference(old: RunConfig, new: RunConfig) -> str | None:
    """The first key that may not change but did, with both values; None where there is none."""
    for key, before, after in differences(old, new):
        if key == "train.steps" and new.train.steps < old.train.steps:
            return f"train.steps was {before}, now {after} (it may only grow; train.stop_at_step stops early)"
        if not may_change(key):
            return f"{key} was {before!r}, now {after!r}"
    return None
