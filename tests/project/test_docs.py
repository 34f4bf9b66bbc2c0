"""Pages: links resolve, the table of versions is the doctor's, counts are the closed form's, no machine is named."""

import re
from pathlib import Path

import pytest

from megavid.cli.versions import as_markdown
from megavid.config.load import load_run, preset_names
from megavid.plan.parameters import count

ROOT = Path(__file__).parents[2]
SKIPPED = {".venv", ".git", "runs", ".cache", "node_modules", "build"}
PAGES = [p for p in sorted(ROOT.rglob("*.md")) if not SKIPPED & set(p.relative_to(ROOT).parts)]
NEEDED = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile", "Dockerfile", "setup.py", "pyproject.toml",
    "constraints.txt", ".ci/run",
)  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_the_house_is_complete(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target


def test_the_readme_shows_the_doctors_table() -> None:
    assert as_markdown() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.startswith("wan")])
def test_parameter_counts_of_pages_are_the_closed_form(preset: str) -> None:
    counts = count(load_run(preset, []).model)
    total, active = f"{counts.total / 1e9:.2f} B", f"{counts.active / 1e9:.2f} B"
    assert f"| `{preset}` | {total} | {active} |" in (ROOT / "README.md").read_text()
    header = (ROOT / f"megavid/config/presets/{preset}.toml").read_text()
    assert f"{total} parameters" in header
    assert total == active or f"{active} active" in header


def test_ci_runs_what_people_run() -> None:
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("exec make test")
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_only_the_dockerfile_names_a_registry() -> None:
    found = []
    for pattern in ("*.py", "*.md", "*.toml", "*.sh", "Makefile", "*.txt"):
        for path in ROOT.rglob(pattern):
            if SKIPPED & set(path.relative_to(ROOT).parts) or path == Path(__file__):
                continue
            if re.search(r"nvcr\.io|pypi\.org", path.read_text(encoding="utf-8", errors="replace")):
                found.append(str(path.relative_to(ROOT)))
    assert found == []
