"""The strict loader: what it reads, and the one line that every mistake gives."""

import tomllib
from pathlib import Path

import pytest

from megavid.config.load import dump_toml, from_table, leaf_keys, load_run, preset_names
from megavid.config.resume import MAY_CHANGE, differences, first_difference, may_change
from megavid.config.schema import RunConfig
from megavid.errors import ConfigError


def test_flags_take_a_value_in_both_forms_and_the_last_one_counts() -> None:
    config = load_run("tiny", ["--parallel.tensor", "2", "--train.steps=7", "--train.steps", "9"])
    assert config.parallel.tensor == 2
    assert config.train.steps == 9


@pytest.mark.parametrize(
    ("items", "key", "expected"),
    [
        (["--model.moe.num_experts", "16"], "model.moe.num_experts", 16),
        (["--optimizer.learning_rate", "7e-5"], "optimizer.learning_rate", 7e-5),
        (["--optimizer.learning_rate", "1"], "optimizer.learning_rate", 1.0),
        (["--log.tensorboard", "false"], "log.tensorboard", False),
        (["--train.deterministic", "True"], "train.deterministic", True),
        (["--parallel.sequence", "auto"], "parallel.sequence", "auto"),
        (["--parallel.sequence", "false"], "parallel.sequence", False),
        (["--parallel.tensor", "2", "--parallel.sequence", "true"], "parallel.sequence", True),
        (["--model.patch_size", "1,4,4"], "model.patch_size", (1, 4, 4)),
        (["--model.patch_size", "[1, 4, 4]"], "model.patch_size", (1, 4, 4)),
        (["--data.path", "010"], "data.path", "010"),
        (["--data.path=a=b"], "data.path", "a=b"),
        (["--data.path="], "data.path", ""),
        (["--log.sample_prompts", "a cat, a dog"], "log.sample_prompts", ("a cat, a dog",)),
        (["--log.sample_prompts", '["a cat, red", "b"]'], "log.sample_prompts", ("a cat, red", "b")),
        (["--log.sample_prompts", ""], "log.sample_prompts", ()),
    ],
)
def test_a_flag_reads_as_its_type(items: list[str], key: str, expected: object) -> None:
    value: object = load_run("tiny", items)
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["--parallel.expret", "2"], r"^unknown key 'parallel\.expret'; did you mean 'parallel\.expert'\?$"),
        (["--tensor", "2"], r"^unknown key 'tensor'; did you mean 'parallel\.tensor'\?$"),
        (["--train.global-batch-size", "8"], r"did you mean 'train\.global_batch_size'\?$"),
        (["--zzz", "2"], r"^unknown key 'zzz'; `megavid train --help` lists all keys$"),
        (["--model.moe", "2"], r"^--model\.moe is a table of keys; give one of them, such as --model\.moe\."),
        (["--train.steps"], r"^--train\.steps needs a value: --train\.steps VALUE$"),
        (["--train.steps", "--train.seed", "1"], r"^--train\.steps needs a value"),
        (["--log.tensorboard", "--train.seed", "1"], r"^--log\.tensorboard needs a value"),
        (["train.steps", "3"], r"^unexpected argument 'train\.steps'; config keys are given as --section\.key value$"),
        (["--train.steps", "1e3"], r"^train\.steps must be int, got '1e3' \(str\)$"),
        (["--train.deterministic", "1"], r"^train\.deterministic must be bool, got '1' \(str\)$"),
        (["--parallel.sequence", "1"], r'^parallel\.sequence must be one of "auto", true, false; got \'1\'$'),
        (["--model.patch_size", "2,2"], r"^model\.patch_size needs 3 values, got 2: \[2, 2\]$"),
        (["--model.patch_size", "1,2,x"], r"^model\.patch_size\[2\] must be int, got 'x' \(str\)$"),
        (["--optimizer.learning_rate", "nan"], r"^optimizer\.learning_rate must be a finite number, got nan$"),
        (["--optimizer.clip_norm", "inf"], r"^optimizer\.clip_norm must be a finite number, got inf$"),
        (["--model.moe.router", "sigmoids"], r"^model\.moe\.router must be one of \"sigmoid\", .*got 'sigmoids'$"),
        (["--data.path", "\udcff"], r"^data\.path must be valid text"),
        (["--train.steps", "0"], r"^train\.steps = 0 must be at least 1$"),
        (["--model.task", "i2v"], r"^model\.in_channels = 32 must be above twice model\.out_channels = 32 with"),
        (
            ["--model.task", "ti2v", "--model.in_channels", "36"],
            r"in_channels = 36 must be model\.out_channels = 32 with",
        ),
        (
            ["--model.task", "ti2v", "--model.patch_size", "2,2,2"],
            r"^model\.patch_size = \(2, 2, 2\) must have 1 latent",
        ),
        (["--log.sample_interval_steps", "-5"], r"^log\.sample_interval_steps = -5 must be at least 0$"),
        (
            [
                "--model.task",
                "i2v",
                "--model.in_channels",
                "68",
                "--model.image_size",
                "8",
                "--model.image_positions",
                "9",
            ],
            r"^model\.image_positions = 9 must be 0 or model\.image_length = 257$",
        ),
        (
            ["--diffusion.sigma_min", "1"],
            r"^diffusion\.sigma_min = 1\.0 and diffusion\.sigma_max = 1\.0 must be from 0",
        ),
        (
            ["--diffusion.sigma_max", "1.1"],
            r"diffusion\.sigma_max = 1\.1 must be from 0 to 1, the first below the second$",
        ),
        (["--model.moe.top_k", "9"], r"^model\.moe\.top_k = 9 must be at most model\.moe\.num_experts = 8$"),
    ],
)
def test_a_wrong_flag_gives_one_line(items: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_run("tiny", items)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"paralel": {}}, r"^unknown key 'paralel'; did you mean 'parallel'\?$"),
        ({"parallel": {"expret": 1}}, r"^unknown key 'parallel\.expret'; did you mean 'parallel\.expert'\?$"),
        ({"model": {"moe": {"q": 1}}}, r"^unknown key 'model\.moe\.q'; known: num_experts, "),
        ({"parallel": 3}, r"^parallel must be a table, got 3 \(int\)$"),
        ({"parallel": {"sequence": 1}}, r'^parallel\.sequence must be one of "auto", true, false; got 1$'),
        ({"train": {"steps": True}}, r"^train\.steps must be int, got True \(bool\)$"),
        ({"train": {"steps": 2.0}}, r"^train\.steps must be int, got 2\.0 \(float\)$"),
        ({"train": {"deterministic": 0}}, r"^train\.deterministic must be bool, got 0 \(int\)$"),
        ({"optimizer": {"learning_rate": "1e-4"}}, r"^optimizer\.learning_rate must be float, got '1e-4' \(str\)$"),
        ({"model": {"patch_size": 2}}, r"^model\.patch_size must be a list, got 2 \(int\)$"),
        ({"log": {"sample_prompts": ["a", 2]}}, r"^log\.sample_prompts\[1\] must be str, got 2 \(int\)$"),
    ],
)
def test_a_wrong_table_gives_one_line(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_table(RunConfig, table)


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_a_literal_tells_true_from_one(value: object) -> None:
    config = from_table(RunConfig, {"parallel": {"sequence": value, "tensor": 2}})
    assert config.parallel.sequence is value or config.parallel.sequence == value == "auto"


def test_an_unknown_preset_names_a_near_one_or_all() -> None:
    with pytest.raises(
        ConfigError, match=r"^unknown preset 'tinny'; did you mean 'tiny'\? \(a file's path must end in"
    ):
        load_run("tinny", [])
    with pytest.raises(ConfigError, match=r"^unknown preset 'q'; presets: demo, tiny, "):
        load_run("q", [])


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^cannot read .*none\.toml: No such file or directory$"):
        load_run(str(tmp_path / "none.toml"), [])
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML: "):
        load_run(str(broken), [])
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML: it is not UTF-8 text$"):
        load_run(str(broken), [])
    broken.write_text("[train]\nstepz = 3\n")
    with pytest.raises(ConfigError, match=r"broken\.toml: unknown key 'train\.stepz'; did you mean 'train\.steps'\?$"):
        load_run(str(broken), [])


def test_precedence_is_schema_then_base_then_preset_then_flags(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[train]\nsteps = 11\nseed = 12\nglobal_batch_size = 4\n")
    own = tmp_path / "own.toml"
    own.write_text('base = "base.toml"\n[train]\nseed = 13\nglobal_batch_size = 2\n')
    config = load_run(str(own), ["--train.global_batch_size", "1"])
    assert (config.train.steps, config.train.seed, config.train.global_batch_size) == (11, 13, 1)
    assert config.train.micro_batch_size == RunConfig().train.micro_batch_size


def test_a_base_has_no_base(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('base = "tiny"\n')
    (tmp_path / "b.toml").write_text('base = "a.toml"\n')
    with pytest.raises(ConfigError, match=r"b\.toml: base = 'a\.toml' has a base of its own \('tiny'\); one level"):
        load_run(str(tmp_path / "b.toml"), [])
    (tmp_path / "b.toml").write_text("base = 3\n")
    with pytest.raises(ConfigError, match=r"base must be the name of a preset, got 3$"):
        load_run(str(tmp_path / "b.toml"), [])


@pytest.mark.parametrize("preset", preset_names())
def test_what_is_written_reads_back_equal(preset: str, tmp_path: Path) -> None:
    nasty = 'back\\slash "quote" tab\t newline\n del\x7f \u00e9\U0001f600'
    config = load_run(preset, ["--data.path", nasty, "--optimizer.eps", "1e-16", "--log.sample_prompts", nasty])
    text = dump_toml(config)
    assert from_table(RunConfig, tomllib.loads(text)) == config
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    assert load_run(str(tmp_path / "run.toml"), []) == config
    assert dump_toml(load_run(str(tmp_path / "run.toml"), [])) == text


def test_every_key_of_the_schema_is_written() -> None:
    table = tomllib.loads(dump_toml(RunConfig()))
    for key in leaf_keys():
        value: object = table
        for name in key.split("."):
            assert isinstance(value, dict)
            value = value[name]


@pytest.mark.parametrize(
    "items",
    [
        ["--parallel.pipeline", "2"],
        ["--train.micro_batch_size", "2"],
        ["--train.stop_at_step", "5"],
        ["--train.steps", "201"],
        ["--checkpoint.interval_steps", "7", "--checkpoint.async_save", "false"],
        ["--log.tensorboard", "false"],
        ["--data.path", "elsewhere", "--data.queue_size", "9"],
        ["--train.init_from", "somewhere"],
    ],
)
def test_a_resumed_run_may_change(items: list[str]) -> None:
    assert first_difference(load_run("tiny", []), load_run("tiny", items)) is None


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["--train.seed", "1"], "train.seed was 1234, now 1"),
        (["--train.global_batch_size", "16"], "train.global_batch_size was 8, now 16"),
        (["--parallel.tensor", "2", "--precision.dtype", "bf16"], "precision.dtype was 'fp32', now 'bf16'"),
        (["--data.pack_tokens", "768", "--model.num_layers", "6"], "model.num_layers was 4, now 6"),
        (["--optimizer.schedule_steps", "400"], "optimizer.schedule_steps was 200, now 400"),
    ],
)
def test_the_first_key_that_may_not_change_is_named(items: list[str], message: str) -> None:
    assert first_difference(load_run("tiny", []), load_run("tiny", items)) == message


def test_steps_grow_and_do_not_shrink() -> None:
    shorter = first_difference(load_run("tiny", []), load_run("tiny", ["--train.steps", "100"]))
    assert shorter is not None
    assert shorter.startswith("train.steps was 200, now 100 (it may only grow")


def test_every_pattern_of_the_resume_list_matches_a_key() -> None:
    for pattern in MAY_CHANGE:
        assert any(may_change(key) for key in leaf_keys() if key.startswith(pattern.rstrip("*"))), pattern
    assert [key for key, _, _ in differences(RunConfig(), RunConfig())] == []
