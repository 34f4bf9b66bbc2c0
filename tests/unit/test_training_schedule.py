"""The learning rate as a table of steps."""

import pytest

from megavid.config.schema import OptimizerConfig
from megavid.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "expected"), [(1, 0.1), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (111, 0.1), (10_000, 0.1)]
)
def test_cosine_warms_up_falls_to_the_end_factor_and_stays(step: int, expected: float) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, schedule_steps=110, end_factor=0.1)
    assert learning_rate(config, step) == pytest.approx(expected)


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(config, step) for step in (1, 2, 4, 5, 999)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="constant"), 1) == 1.0


def test_schedule_does_not_depend_on_the_number_of_steps_of_the_run() -> None:
    config = OptimizerConfig(schedule_steps=50)
    assert learning_rate(config, 50) == pytest.approx(config.learning_rate * config.end_factor)
