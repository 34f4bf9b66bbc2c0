"""An installed Transformer Engine that cannot work here counts as absent, for megatron-core too."""

import importlib
import sys
from pathlib import Path

import pytest

from megavid.parallel.te import probe


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "ImportError", "AssertionError"])
def test_transformer_engine_that_fails_to_import_is_absent(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text(f"raise {error}('no device')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0].startswith("transformer_engine")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    assert probe() is False
    with pytest.raises(ModuleNotFoundError):  # the one that megatron-core 0.16.1 catches everywhere
        importlib.import_module("transformer_engine")


def test_transformer_engine_that_imports_is_present(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "pytorch.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("transformer_engine")}
    importlib.invalidate_caches()
    assert probe() is True
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]
    sys.modules.update(before)
