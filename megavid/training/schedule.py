"""The learning rate of a step: a pure function of the optimizer table and the step's number.

Owns the shape of the schedule. Nothing is stored: a resumed run asks the same function.
"""

import math

from megavid.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Learning rate of ``step`` (from 1): linear warm-up, then constant or half a cosine down to ``end_factor``.

    The last step of the warm-up has the peak; from ``schedule_steps`` on the cosine stays at its end, so a run that
    grows beyond it goes on at ``learning_rate * end_factor``.
    """
    peak = config.learning_rate
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant":
        return peak
    span = max(config.schedule_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    return peak * (config.end_factor + (1 - config.end_factor) * 0.5 * (1 + math.cos(math.pi * progress)))
