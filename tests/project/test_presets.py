"""Every preset and every example loads, lays out where it says it is meant to run, and stays short."""

import re
import shlex
from pathlib import Path

import pytest

from megavid.cli.prepare import _parser as prepare_parser
from megavid.config.load import leaf_keys, load_run, preset_names
from megavid.config.schema import RunConfig
from megavid.data.build import require_fit
from megavid.data.sample import TextSpec, TokenizerSpec
from megavid.plan.layout import layers_of_chunk, layout_of

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "megavid/config/presets").glob("*.toml"))
EXAMPLES = sorted((ROOT / "examples").iterdir())
WORLDS = {
    "tiny": (1, 2, 4, 8),
    "demo": (1, 2, 4),
    "wan_1b": (8, 64),
    "wan_14b": (8, 64, 512),
    "wan21_i2v_14b": (8, 64),
    "wan22_t2v_a14b_high": (8, 64),
    "wan22_t2v_a14b_low": (8, 64),
    "wan22_i2v_a14b_high": (8, 64),
    "wan22_i2v_a14b_low": (8, 64),
    "wan22_ti2v_5b": (8, 64),
    "wan_moe_7b_a2b": (8, 64),
    "wan_moe_30b_a3b": (64, 128),
    "wan_moe_100b_a20b": (256, 1024),
}
CONTRACT = {
    "parallel": "tensor sequence pipeline virtual_pipeline context expert expert_tensor context_strategy dispatcher "
    "recompute",
    "train": "steps seed micro_batch_size global_batch_size stop_at_step init_from deterministic",
    "precision": "dtype fp8",
    "checkpoint": "interval_steps",
    "data": "kind path pack_tokens",
}


def test_every_preset_is_in_the_table_of_worlds() -> None:
    assert preset_names() == sorted(WORLDS)


@pytest.mark.parametrize(("preset", "world_size"), [(name, size) for name, sizes in WORLDS.items() for size in sizes])
def test_presets_lay_out_where_they_are_meant_to_run(preset: str, world_size: int) -> None:
    config = load_run(preset, [])
    layout = layout_of(config, world_size)
    assert layout.world_size == world_size
    layers = [
        layer
        for stage in range(layout.pp)
        for chunk in range(layout.vpp)
        for layer in layers_of_chunk(config.model, layout, stage, chunk)
    ]
    assert sorted(layers) == list(range(config.model.num_layers))


@pytest.mark.parametrize("preset", preset_names())
def test_packs_of_presets_divide_by_96_or_their_layout(preset: str) -> None:
    assert load_run(preset, []).data.pack_tokens % 96 == 0


@pytest.mark.parametrize("path", [*PRESETS, *(ROOT / "examples").glob("*/preset.toml")], ids=str)
def test_presets_are_short_and_open_with_command_hardware_and_result(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 40
    header = " ".join(line for line in lines[:4] if line.startswith("#"))
    assert "megavid train" in header
    assert re.search(r"GPU|CPU", header)


def test_keys_of_the_command_line_contract_exist() -> None:
    keys = leaf_keys()
    wanted = [f"{table}.{key}" for table, names in CONTRACT.items() for key in names.split()]
    assert [key for key in wanted if key not in keys] == []
    assert {key.partition(".")[0] for key in keys} >= {"model", "diffusion", "optimizer", "data", "log"}
    config = RunConfig()
    assert (config.parallel.sequence, config.parallel.expert_tensor) == ("auto", 1)
    assert any("ema" in key for key in keys if key.startswith("optimizer."))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_examples_have_all_their_files_and_the_readme_says_what_to_expect(folder: Path) -> None:
    assert {"README.md", "run.sh", "preset.toml"} <= {file.name for file in folder.iterdir()}
    readme = (folder / "README.md").read_text()
    for word in ("command", "hardware", "time", "expected"):
        assert f"| {word} |" in readme
    assert (folder / "run.sh").stat().st_mode & 0o111


def _train_commands(text: str) -> list[list[str]]:
    """What follows ``megavid train`` in every such command of a script or a page, as words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = [shlex.split(line, comments=True) for line in re.findall(r"megavid train ([^`\n]*)", joined)]
    return [words for words in found if words and re.match(r"[a-z]", words[0])]


PAGES = [*PRESETS, *(ROOT / "examples").rglob("*.*"), ROOT / "README.md", ROOT / "tools/demo.sh"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_train_command_on_a_page_parses_and_lays_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    for assignment in re.findall(r"^(\w+)=(\S+)", text, flags=re.M):
        text = text.replace(f"${assignment[0]}", assignment[1])
    for argv in _train_commands(text):
        own = {"--out": "", "--ranks": "1", "--resume-step": ""}
        items: list[str] = []
        rest = argv[1:]
        while rest:
            name = rest.pop(0)
            if name in own:
                own[name] = rest.pop(0)
            else:
                items.append(name)
        config = load_run(argv[0], items)
        assert own["--out"], argv
        if "--ranks" in argv:
            layout_of(config, int(own["--ranks"]))


def test_commands_are_found_on_pages() -> None:
    assert len(_train_commands((ROOT / "README.md").read_text())) >= 4


def _readers(text: str) -> list[tuple[list[str], str]]:
    """Every ``megavid prepare`` command of a page, as words, with each preset that its folder is then trained with."""
    joined = re.sub(r"\\\n\s*", " ", text)
    prepares = [shlex.split(line, comments=True) for line in re.findall(r"megavid prepare (.* --out [^`\n]*)", joined)]
    reader = r"megavid (?:train|profile|launch slurm) ([a-z]\w*) [^`\n]*--data\.path (\w+)"
    return [
        (words, preset)
        for words in prepares
        for preset, folder in re.findall(reader, joined)
        if folder == words[words.index("--out") + 1]
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/image_to_video.md", "docs/benchmarks/gpu.md"])
def test_shards_prepared_on_a_page_fit_the_models_that_read_them_there(page: str) -> None:
    readers = _readers((ROOT / page).read_text())
    assert readers
    for words, preset in readers:
        given = prepare_parser().parse_args(words)
        kind, _, channels = given.tokenizer.partition("-")
        # A folder stands for what Wan 2.1 publishes: a VAE of 16 channels, UMT5-XXL's features of width 4096.
        tokenizer = TokenizerSpec(kind, "1", int(channels or 32) if kind == "dct" else 16, 8, 4, "")
        width = given.text_width if given.text_encoder == "sentencepiece" else 4096
        text = TextSpec(given.text_encoder, "1", width, given.text_length)
        require_fit(tokenizer, text, load_run(preset, []).model, page)
