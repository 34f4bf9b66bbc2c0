"""``megavid train --train.capture compile``: what was compiled is told, and a run may go on without it."""

import re
from pathlib import Path

import pytest

from megavid.ops.compiled import why_not_compiled
from megavid.training.metrics import read_rows
from tests.support import tolerance
from tests.support.tiny_run import TINY
from tests.support.warm_parent import WarmParent


@pytest.mark.skipif(bool(why_not_compiled()), reason="the ops of csrc/ are not built: plain torch takes far longer")
def test_a_run_tells_what_it_compiles_and_goes_on_without_the_compiler(warm: WarmParent, tmp_path: Path) -> None:
    """With the ops of csrc/, of which the compiler writes no code, so that this takes seconds."""
    flags = (*TINY, "--train.ops", "compiled", "--train.global_batch_size", "2", "--train.steps", "4")
    plain, captured = tmp_path / "plain", tmp_path / "captured"
    compiles = ("--train.capture", "compile", "--train.stop_at_step", "2")
    said = ""
    for out, more in ((plain, ()), (captured, compiles), (captured, ())):
        done = warm.start("train", "tiny", "--out", str(out), *flags, *more)
        assert done.wait(600.0) == 0, done.stderr  # the compiler's first start takes its time
        assert done.stderr == ""
        said += done.stdout
    rows, others = read_rows(plain / "metrics.jsonl"), read_rows(captured / "metrics.jsonl")
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=tolerance.LOSS_FP32)
    told = [row for row in read_rows(captured / "events.jsonl") if row["event"] == "captured"]
    assert {row["step"] for row in told} == {1}
    assert len(told) == len(re.findall(r"^train\.capture: compiled (\w+) for \d+ x 1 x \d+ \(", said, re.MULTILINE)) > 6
    assert not any(row["is_refused"] for row in told)


def test_without_a_compiler_it_is_refused_in_one_line(warm: WarmParent, tmp_path: Path) -> None:
    flags = (*TINY, "--train.capture", "compile")
    refused = warm.start("train", "tiny", "--out", str(tmp_path / "new"), *flags, environ={"CXX": "no-such-compiler"})
    assert (refused.wait(), refused.stderr.count("\n")) == (2, 1)
    assert "train.capture = 'compile' cannot run here: there is no C++ compiler no-such-compiler" in refused.stderr
