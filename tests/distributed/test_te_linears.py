"""Linears of Transformer Engine in the place of megavid's own, with a stand-in for the package.

What is shown: they get the right sizes, groups, weights, rows and regions of FP8, and nothing else of a run changes.
What is not: anything that Transformer Engine itself computes, which is tests/gpu/test_te_cuda.py's.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megavid.config.schema import PrecisionConfig
from megavid.errors import ConfigError
from megavid.models.te import check_usable
from megavid.parallel import te
from megavid.plan.layout import layout_of
from tests.support.te_world import CASES, FORMATS, Case, assert_as_near, errors
from tests.support.tiny_world import assemble
from tests.support.tolerance import LOSS_FP32

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests/support/te_stand_in"
WIDE = [name for name, case in CASES.items() if "fp8" not in case.precision]
NARROW = [name for name in CASES if name not in WIDE]
Found = dict[Any, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What every case told, run in a process of its own: the stand-in must be there before megatron-core is."""
    file = tmp_path_factory.mktemp("te") / "found.pt"
    path = os.pathsep.join([str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.te_world", str(file)]
    environment = dict(os.environ) | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    told: Found = torch.load(file, weights_only=False)
    return told


def gradients(told: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Of the first step, by name in model space."""
    return assemble([rank["first"] for rank in told])


@pytest.mark.mcore
@pytest.mark.parametrize("name", WIDE)
def test_a_run_is_the_same_with_either(found: Found, name: str) -> None:
    ours, theirs = found[name, "native"], found[name, "transformer_engine"]
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=LOSS_FP32)
    wanted, got = gradients(ours), gradients(theirs)
    assert got.keys() == wanted.keys()
    for tensor, gradient in wanted.items():
        torch.testing.assert_close(got[tensor], gradient, rtol=LOSS_FP32, atol=LOSS_FP32 * float(gradient.abs().max()))


@pytest.mark.mcore
@pytest.mark.parametrize("name", NARROW)
def test_runs_in_fp8_are_near(found: Found, name: str) -> None:
    ours, theirs = found[name, "native"], found[name, "transformer_engine"]
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=0.02)
    wanted, got = (torch.cat([x.reshape(-1) for _, x in sorted(gradients(told).items())]) for told in (ours, theirs))
    assert 1e-3 < float((got - wanted).norm() / wanted.norm()) < 0.1


def test_attention_in_fp8_is_ours_beside_its_linears(found: Found) -> None:
    for linears in ("native", "transformer_engine"):
        wide, narrow = (found[name, linears][0]["loss"] for name in ("tensorwise", "tensorwise, attention"))
        assert all(one != other for one, other in zip(wide, narrow, strict=True))
        assert narrow == pytest.approx(wide, rel=0.02)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("tensorwise", "Float8CurrentScaling HYBRID"),
        ("tensorwise, attention", "Float8CurrentScaling HYBRID"),
        ("experts tensorwise e4m3", "Float8CurrentScaling E4M3"),
        ("experts blockwise", "Float8BlockScaling E4M3"),
        ("experts in four bits", "Float8CurrentScaling HYBRID"),
    ],
)
def test_inner_blocks_are_in_regions_of_the_recipe(found: Found, name: str, recipe: str) -> None:
    regions = found[name, "regions"]
    has_experts = name in ("experts tensorwise e4m3", "experts blockwise")
    assert len(regions) == 4 * 7 + 2 * 3 * has_experts, sorted(regions)
    for layer, told in regions.items():
        is_inner = layer.startswith(("blocks.1.", "blocks.2.")) and not layer.endswith("cross_attention.kv")
        assert told == ({recipe} if is_inner else {"none"}), layer


@pytest.mark.mcore
def test_native_linears_in_another_layout_load_what_its_linears_saved(found: Found) -> None:
    saved, loaded = (assemble([rank["saved"] for rank in found[which]]) for which in ("saved", "loaded"))
    assert any(name.startswith("exp_avg/") and ".experts.3.down.weight" in name for name in saved)
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    assert found["loaded"][0]["loss"] == pytest.approx(found["saved"][0]["loss"], rel=LOSS_FP32)


@pytest.mark.parametrize("family", ["wan", "wan_moe"])
@pytest.mark.parametrize("name", ["bf16", "bf16, tensorwise"])
def test_one_layer_is_as_near_to_fp32(found: Found, family: str, name: str) -> None:
    given = (found[family, name, which] for which in ("native", "transformer_engine"))
    ours, theirs = (errors(told, found[family, "passes"]) for told in given)
    assert_as_near(ours, theirs, FORMATS[name])


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = PrecisionConfig(linears="transformer_engine")
    monkeypatch.setattr(te, "HAS_TE", False)
    with pytest.raises(
        ConfigError, match=r"needs the package transformer-engine, .*; set precision.linears = 'native'"
    ):
        check_usable(asked, "cuda")
    monkeypatch.setattr(te, "HAS_TE", True)
    with pytest.raises(ConfigError, match="runs on cuda, this run is on cpu"):
        check_usable(asked, "cpu")
    check_usable(PrecisionConfig(), "cpu")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(precision={"fp8": "delayed"}), "precision.fp8 = 'delayed' needs precision.linears = 'native'"),
        (
            Case(world=2, options={"tensor": 2}, precision={"fp8": "blockwise"}, width=256),
            "= 128 to be a multiple of 128 on each of 2 ranks",
        ),
    ],
)
def test_what_its_products_cannot_do_is_refused(case: Case, words: str) -> None:
    layout_of(case.config("native"), case.world)
    with pytest.raises(ConfigError, match=words):
        layout_of(case.config("transformer_engine"), case.world)
