"""Table ``lora``: what it refuses, which matrices it means, and what they are called elsewhere."""

import re
import tomllib

import pytest

from megavid.checkpoint.convert.adapter import names_in_diffusers
from megavid.config.load import dump_toml, from_table, load_run
from megavid.config.schema import LoraConfig, RunConfig
from megavid.errors import ConfigError
from megavid.plan.adapters import adapter_tensors
from megavid.plan.layout import layout_of
from megavid.plan.unplanned import refuse_unplanned
from tests.support.tiny_world import tiny_config


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lora.rank", "-1"], "lora.rank"),
        (["--lora.rank", "4", "--lora.alpha", "-1"], "lora.alpha = -1.0 must be at least 0"),
        (["--lora.rank", "4", "--lora.targets", '["experts"]'], "must be some of self_attention, cross_attention, ffn"),
        (["--lora.rank", "4", "--lora.targets", "[]"], "must be some of"),
    ],
)
def test_what_does_nothing_or_does_not_exist_is_refused(flags: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_run("tiny", flags)


def test_a_resumed_run_reads_the_table_it_wrote() -> None:
    config = load_run("tiny", ["--lora.rank", "4", "--lora.targets", '["ffn", "self_attention"]'])
    assert from_table(RunConfig, tomllib.loads(dump_toml(config))) == config
    assert config.lora.scale == 1.0
    assert LoraConfig(rank=4, alpha=2.0).scale == 0.5


def test_a_stage_with_nothing_to_train_is_refused() -> None:
    lora = {"rank": 2, "targets": ("ffn",)}
    layout_of(tiny_config("wan_moe", lora=lora, pipeline=2), 2)
    layout_of(tiny_config("wan", lora=lora, pipeline=4), 4)
    with pytest.raises(ConfigError, match=r"lora.targets = \['ffn'\] leaves blocks 1 to 1 without an adapter"):
        layout_of(tiny_config("wan_moe", lora=lora, pipeline=4), 4)


@pytest.mark.parametrize("family", ["wan", "wan_moe"])
def test_adapters_stand_on_attention_and_dense_feed_forwards_and_diffusers_has_a_name_for_each(family: str) -> None:
    config = tiny_config(family, lora={"rank": 3}, task="i2v", image=(10, 5, 0))
    shapes = adapter_tensors(config.model, config.lora)
    stems = {name.removesuffix(".lora_A.weight") for name in shapes if name.endswith("A.weight")}
    assert len(stems) == 4 * 10 + 2 * (4 if family == "wan" else 2)
    assert not any(".moe." in stem or "norm" in stem for stem in stems)
    names = names_in_diffusers(config.model)
    assert stems <= names.keys()
    assert names["blocks.3.cross_attention.image_v"] == "blocks.3.attn2.add_v_proj"
    assert names["blocks.0.ffn.up"] == "blocks.0.ffn.net.0.proj"
    assert shapes["blocks.0.ffn.down.lora_A.weight"] == (3, 96)
    assert shapes["blocks.0.ffn.down.lora_B.weight"] == (48, 3)


def test_the_planner_refuses_what_it_does_not_know() -> None:
    refuse_unplanned(tiny_config("wan"), "megavid plan")
    with pytest.raises(ConfigError, match="megavid plan does not know runs of adapters yet"):
        refuse_unplanned(tiny_config("wan", lora={"rank": 3}), "megavid plan")
    zero = ["--train.backend", "deepspeed", "--deepspeed.zero_stage"]
    refuse_unplanned(load_run("tiny", [*zero, "1"]), "megavid plan")
    for flags in ([*zero, "3"], [*zero, "1", "--deepspeed.offload", "optimizer"]):
        with pytest.raises(ConfigError, match=r"megavid plan knows DeepSpeed's ZeRO-1 only"):
            refuse_unplanned(load_run("tiny", flags), "megavid plan")
