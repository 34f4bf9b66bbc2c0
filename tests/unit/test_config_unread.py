"""Keys that a run would not read are refused, each by name, with what reads it."""

import re
from operator import attrgetter

import pytest

from megavid.config.load import leaf_keys, load_run, preset_names
from megavid.config.schema import RunConfig
from megavid.config.unread import READERS, refuse_unread
from megavid.errors import ConfigError
from megavid.plan.layout import layout_of

SET = {
    "model.image_size": "8",
    "model.image_length": "9",
    "model.image_positions": "9",
    "model.moe.aux_loss_weight": "0.5",
    "model.moe.route_scale": "2.0",
    "parallel.context_strategy": "'ring'",
    "train.spike_window": "9",
    "train.spike_rollback_steps": "5",
    "train.max_rollbacks": "9",
    "precision.fp8_attention": "True",
    "precision.fp8_gradients": "'e5m2'",
    "precision.fp8_experts": "'nvfp4'",
    "precision.fp8_skip_first": "2",
    "precision.fp8_skip_last": "0",
    "precision.fp8_history": "4",
    "lora.alpha": "8.0",
    "lora.targets": "('ffn',)",
    "deepspeed.zero_stage": "2",
    "deepspeed.offload": "'optimizer'",
}
"""Another value than the default, as the message writes it."""
ELSEWHERE = {"model.moe.route_scale": ["--model.moe.router", "softmax"]}
"""Flags that a key needs to be unread; the router of the defaults reads this one."""


def test_every_key_of_the_table_is_a_key_and_is_tried() -> None:
    keys = [key for reader in READERS for key in reader.keys]
    assert sorted(keys) == sorted(SET)
    assert set(keys) <= set(leaf_keys())
    assert all(reader.words for reader in READERS)


@pytest.mark.parametrize("key", SET)
def test_a_key_that_nothing_reads_is_refused(key: str) -> None:
    text = "ffn" if key == "lora.targets" else SET[key].strip("'")
    config = load_run("tiny", [f"--{key}", text, *ELSEWHERE.get(key, [])])
    default = attrgetter(key)(RunConfig())
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{key} = {SET[key]}')} is read with .* only; set") as told:
        layout_of(config, 1)
    assert str(told.value).endswith(f"or {default!r}")


def test_fp8_history_is_of_delayed_scales_alone() -> None:
    flags = ["--precision.fp8_history", "4", "--precision.fp8"]
    refuse_unread(load_run("tiny", [*flags, "delayed"]))
    with pytest.raises(ConfigError, match=r"is read with precision\.fp8 = 'delayed' only"):
        refuse_unread(load_run("tiny", [*flags, "blockwise"]))


def test_fp8_experts_is_of_blocks_that_have_some_and_are_in_fp8() -> None:
    """In tiny's four blocks, of which all but the first and the last are in FP8 by default."""
    flags = ["--precision.fp8", "blockwise", "--precision.fp8_experts", "nvfp4"]
    refuse_unread(load_run("tiny", flags))
    for without in (["--model.family", "wan"], ["--precision.fp8_skip_first", "2", "--precision.fp8_skip_last", "2"]):
        with pytest.raises(ConfigError, match=r"is read with .* a block with experts in it only"):
            refuse_unread(load_run("tiny", [*flags, *without]))


@pytest.mark.parametrize("preset", preset_names())
def test_presets_set_nothing_that_they_do_not_read(preset: str) -> None:
    refuse_unread(load_run(preset, []))
