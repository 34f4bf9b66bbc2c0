"""Adapters to packages that are not installed here, against stand-ins with the real names and shapes of answers."""

import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megavid.cluster.dcgm import dcgm_troubles
from megavid.config.load import load_run
from megavid.errors import ConfigError
from megavid.training import stragglers
from megavid.training.stragglers import GpuStragglers, check_detector


@dataclass(frozen=True)
class StragglerId:
    """As nvidia_resiliency_ext.straggler.reporting.StragglerId."""

    rank: int
    node: str


@dataclass(frozen=True)
class CallableId:
    """As nvidia_resiliency_ext.straggler.CallableId."""

    obj: object
    name: str


class FakeReport:
    """As its Report, of four ranks, the third at half the speed of the fastest."""

    gpu_relative_perf_scores = {0: 1.0, 1: 0.97, 2: 0.5, 3: 0.6}  # noqa: RUF012

    def identify_stragglers(
        self,
        gpu_rel_threshold: float = 0.75,
        section_rel_threshold: float = 0.75,
        gpu_indiv_threshold: float = 0.75,
        section_indiv_threshold: float = 0.75,
    ) -> dict[str, Any]:
        scores = self.gpu_relative_perf_scores.items()
        slow = {StragglerId(rank, f"node{rank}") for rank, score in scores if score < gpu_rel_threshold}
        return {
            "straggler_gpus_relative": slow, "straggler_gpus_individual": set(), "straggler_sections_relative": {},
            "straggler_sections_individual": {},
        }  # fmt: skip


class Detector:
    """As its Detector: class methods, initialised once, callables wrapped in place and restored."""

    initialized = False
    originals: dict[CallableId, Any]
    timed = 0

    @classmethod
    def initialize(
        cls,
        scores_to_compute: Any = "all",
        gather_on_rank0: bool = True,
        profiling_interval: int = 1,
        report_time_interval: float = 60,
        node_name: str | None = None,
    ) -> None:
        assert not cls.initialized
        cls.initialized, cls.interval = True, profiling_interval

    @classmethod
    def wrap_callables(cls, callable_ids: list[CallableId], profile_cuda: bool = True) -> None:
        cls.originals = {one: getattr(one.obj, one.name) for one in callable_ids}
        for one, original in cls.originals.items():

            def timed(*args: Any, original: Any = original) -> Any:
                cls.timed += 1
                return original(*args)

            setattr(one.obj, one.name, timed)

    @classmethod
    def generate_report(cls) -> FakeReport:
        assert cls.initialized
        return FakeReport()

    @classmethod
    def shutdown(cls) -> None:
        for one, original in cls.originals.items():
            setattr(one.obj, one.name, original)
        cls.initialized = False


@pytest.fixture(params=stragglers.MODULES)
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package, installed in one of the two places where its versions have the detector."""
    name: str = request.param
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__spec__ = types.SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Detector, module.CallableId = Detector, CallableId  # type: ignore[attr-defined]
    return name


class Engine:
    """What is timed."""

    def forward_backward(self, batch: int) -> int:
        return batch


class Stage:
    """What the callback needs of a run."""

    def __init__(self, is_main: bool = True) -> None:
        flags = ["--watchdog.gpu_stragglers", "true", "--watchdog.slow_interval_steps", "8"]
        self.config = load_run("tiny", flags)
        self.mesh = types.SimpleNamespace(is_main=is_main)
        self.engine = Engine()
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append({"event": name, **fields})


def test_slow_gpus_become_events_with_their_hosts_slowest_first(package: str) -> None:
    assert stragglers.find_detector() == package
    check_detector(is_cuda=True)
    run: Any = Stage()
    plain = run.engine.forward_backward
    callback = GpuStragglers()
    callback.before_training(run)
    assert Detector.interval == 2
    for step in range(1, 9):
        assert run.engine.forward_backward(step) == step
        assert run.events == []
        callback.after_step(run, types.SimpleNamespace(step=step))  # type: ignore[arg-type]
    assert run.events == [
        {"event": "slow_rank", "step": 8, "rank": 2, "host": "node2", "gpu_score": 0.5},
        {"event": "slow_rank", "step": 8, "rank": 3, "host": "node3", "gpu_score": 0.6},
    ]
    assert Detector.timed >= 8
    callback.after_training(run)
    assert run.engine.forward_backward == plain
    assert not Detector.initialized


def test_without_the_package_or_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="these are CPU ranks"):
        check_detector(is_cuda=False)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", None)
    monkeypatch.setattr(stragglers, "find_detector", lambda: None)
    with pytest.raises(ConfigError, match="needs the package nvidia-resiliency-ext"):
        check_detector(is_cuda=True)
    with pytest.raises(ConfigError, match=r"needs watchdog\.slow_factor"):
        load_run("tiny", ["--watchdog.gpu_stragglers", "true", "--watchdog.slow_factor", "0"])


TABLE = """\
#Entity   XIDER       RRF         RRP
ID
GPU 0     0           0           0
GPU 1     79          0           1
GPU 2     43          1           0
GPU 3     N/A         N/A         N/A
"""


def test_dcgm_is_asked_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dcgm_troubles() == ()
    command = tmp_path / "dcgmi"
    command.write_text(f"#!/bin/sh\n[ \"$*\" = 'dmon -e 230,395,396 -c 1' ] || exit 9\necho '{TABLE}'\n")
    command.chmod(0o755)
    assert dcgm_troubles() == (
        "GPU 1: rows of memory wait to be remapped; reset it",
        "GPU 1: its last XID is 79: it fell off the bus",
        "GPU 2: rows of memory could not be remapped; replace it",
    )
    command.write_text(
        "#!/bin/sh\necho 'Error: unable to establish a connection to the specified host' >&2\nexit 255\n"
    )
    assert dcgm_troubles() == ()
