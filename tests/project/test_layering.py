"""What import-linter cannot see: what is imported when, by the commands that answer at once."""

import subprocess
import sys

import pytest


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("package", ["megavid.config", "megavid.plan", "megavid.errors"])
def test_config_and_plan_import_no_torch(package: str) -> None:
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(getattr(package, "__path__", []), {package!r} + "."):
    importlib.import_module(module.name)
assert "torch" not in sys.modules and "numpy" not in sys.modules, sorted(sys.modules)
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_presets_load_without_torch() -> None:
    code = """
import sys
from megavid.config.load import load_run, preset_names
from megavid.plan.layout import layout_of
from megavid.plan.parameters import count
for name in preset_names():
    count(load_run(name, []).model)
assert "torch" not in sys.modules
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_serving_needs_neither_megatron_core_nor_the_trainer() -> None:
    done = _python(
        "import megavid.inference, sys; "
        "own = {name.split('.')[1] for name in sys.modules if name.startswith('megavid.')}; "
        "assert 'megatron' not in sys.modules and own == {'config', 'errors', 'inference', 'ops'}, own"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["train", "tiny", "--help"],
        ["profile", "--help"],
        ["plan", "--help"],
    ],
)
def test_help_answers_without_torch(argv: list[str]) -> None:
    done = _python(f"import sys; from megavid.cli.main import main; s = main({argv!r}); assert not s, s; "
                   "assert 'torch' not in sys.modules")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 1


def test_python_m_megavid_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megavid", "trian"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "megavid: error: unknown command 'trian'; did you mean 'train'?\n"
