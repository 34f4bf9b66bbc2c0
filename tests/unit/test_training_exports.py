"""The text that Prometheus' textfile collector reads."""

import re

import pytest

from megavid.config.schema import LogConfig
from megavid.errors import ConfigError
from megavid.training.prometheus import HELP, prometheus_text


def test_every_line_is_of_the_format() -> None:
    values: dict[str, float | None] = dict.fromkeys(HELP, 1.5)
    values |= {"loss": float("nan"), "grad_norm": float("inf"), "mfu": None, "skipped_steps_total": 3}
    text = prometheus_text(values, 'my "run"')
    lines = text.splitlines()
    assert text.endswith("\n")
    for line in lines:
        assert re.fullmatch(
            r'# (HELP|TYPE) megavid_[a-z_]+ .+|megavid_[a-z_]+\{run="my \\"run\\""\} (NaN|[+-]Inf|[0-9.e+-]+)', line
        ), line
    assert 'megavid_loss{run="my \\"run\\""} NaN' in lines
    assert 'megavid_grad_norm{run="my \\"run\\""} +Inf' in lines
    assert "# TYPE megavid_skipped_steps_total counter" in lines
    assert "megavid_mfu" not in text


def test_file_that_the_collector_would_not_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"log.prometheus = 'x.txt' must end in .prom"):
        LogConfig(prometheus="x.txt")
