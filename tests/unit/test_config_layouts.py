"""``[layouts]``: the layout that a preset names for each number of ranks."""

from pathlib import Path

import pytest

from megavid.config.load import layout_sizes, load_run
from megavid.errors import ConfigError

TOML = """\
base = "tiny"
[parallel]
recompute = "full"
[layouts.2]
expert = 2
[layouts.8]
tensor = 2
pipeline = 2
recompute = "none"
"""


@pytest.fixture
def preset(tmp_path: Path) -> str:
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    return str(file)


def test_entry_of_the_world_size_is_laid_over_parallel(preset: str) -> None:
    parallel = load_run(preset, [], world_size=8).parallel
    assert (parallel.tensor, parallel.pipeline, parallel.expert, parallel.recompute) == (2, 2, 1, "none")
    assert load_run(preset, [], world_size=2).parallel.recompute == "full"


@pytest.mark.parametrize("world_size", [0, 1, 4])
def test_other_world_sizes_have_the_plain_layout(preset: str, world_size: int) -> None:
    assert load_run(preset, [], world_size=world_size) == load_run(preset, [])


def test_degree_as_a_flag_replaces_the_entry_and_other_flags_do_not(preset: str) -> None:
    assert load_run(preset, ["--parallel.expert=4"], world_size=8).parallel.tensor == 1
    assert load_run(preset, ["--parallel.overlap_grad_reduce", "true"], world_size=8).parallel.tensor == 2


def test_sizes_are_listed(preset: str) -> None:
    assert layout_sizes(preset) == [2, 8]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[layouts.eight]\ntensor = 2", r"layouts.eight: a layout is named by its number of ranks"),
        ("[layouts.08]\ntensor = 2", r"layouts.08: a layout is named by its number of ranks"),
        ("[layouts.8]\ntensr = 2", r"unknown key 'layouts.8.tensr'; did you mean 'layouts.8.tensor'"),
        ("[layouts.8]\ntensor = true", r"layouts.8.tensor must be int"),
        ("[layouts]\n8 = 2", r"layouts.8 must be a table of keys of \[parallel\], got 2"),
        ("layouts = 3", r"layouts must be a table by number of ranks"),
    ],
)
def test_bad_entries_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.toml").write_text(text + "\n")
    with pytest.raises(ConfigError, match=words):
        load_run(str(tmp_path / "bad.toml"), [])
