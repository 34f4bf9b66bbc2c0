"""A pipeline folder: transformers beside the parts that are copied, and model_index.json that names them all.

Owns what a model_index.json says of a transformer in its folder (per-frame timesteps, the noise levels that each of two
experts is for, the shift of the scheduler) and how one is written. The boundary between two experts is a timestep /
1000 after the shift everywhere: the space in which inference switches.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavid.checkpoint.convert.configs import beyond_wan
from megavid.checkpoint.files import reading, sync_folder, write_file
from megavid.checkpoint.manifest import decode
from megavid.config.schema import ModelConfig
from megavid.errors import ConfigError

PIPELINE = "model_index.json"
SCHEDULER = Path("scheduler") / "scheduler_config.json"
EXPERTS = ("transformer", "transformer_2")
"""Folders of the high-noise expert (or the only transformer) and of the low-noise expert."""
ORIGINAL_EXPERTS = ("high_noise_model", "low_noise_model")
"""The same in the original repositories."""
_COPYING = ".copying"  # a copy that is not finished ends so


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a pipeline says of one of its transformers; the defaults are those of a transformer that stands alone.

    Attributes:
        model: keys of ``model`` that the transformer's own config.json has no word for.
        diffusion: keys of ``diffusion``.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    diffusion: Mapping[str, Any] = field(default_factory=dict)


def surroundings(transformer: Path) -> Surroundings:
    """What the pipeline around a transformer's folder says of it.

    Raises:
        CheckpointError: the pipeline's files are damaged.
    """
    folder = transformer.resolve().parent
    if transformer.resolve().name not in EXPERTS or not (folder / PIPELINE).is_file():
        return Surroundings()
    index = read_json(folder / PIPELINE)
    model = {"task": "ti2v"} if index.get("expand_timesteps") is True else {}
    diffusion = _levels(index.get("boundary_ratio"), transformer.resolve().name == EXPERTS[0], folder / PIPELINE)
    scheduler = folder / SCHEDULER
    if scheduler.is_file():
        fields = read_json(scheduler)
        shift = fields.get("flow_shift", fields.get("shift"))
        if isinstance(shift, int | float) and shift > 0:
            diffusion["flow_shift"] = float(shift)
    return Surroundings(model, diffusion)


def _levels(boundary: Any, is_high: bool, where: Path) -> dict[str, Any]:
    """Keys of ``diffusion`` for the noise levels of one of two experts."""
    if boundary is None:
        return {}
    checked = check_boundary(boundary, f"{where}: boundary_ratio")
    return {"sigma_min": checked} if is_high else {"sigma_max": checked}


def check_boundary(value: Any, what: str) -> float:
    """A boundary between two experts: a timestep / 1000 after the shift.

    Raises:
        ConfigError: no number between 0 and 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(
            f"{what} = {value!r} must be between 0 and 1: the timestep at which inference switches, divided by 1000 "
            "(Wan 2.2: 0.875 for text-to-video, 0.9 for image-to-video)"
        )
    return float(value)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    with reading(path):
        return decode(path.read_bytes(), path)


def base_parts(base: Path) -> dict[str, Any]:
    """model_index.json of the pipeline whose parts are to be copied.

    Raises:
        ConfigError: there is none, or a part that it names is not there.
    """
    if not (base / PIPELINE).is_file():
        raise ConfigError(f"--pipeline {base} has no {PIPELINE}; give a diffusers pipeline folder")
    index = read_json(base / PIPELINE)
    for name in _copied(index):
        if name in (".", "..") or "/" in name or "\\" in name:
            raise ConfigError(f"--pipeline {base} names a part {name!r} in its {PIPELINE}, which is no folder's name")
        if not (base / name).is_dir():
            raise ConfigError(f"--pipeline {base} names {name} in its {PIPELINE}, but has no such folder")
    return index


def _copied(index: Mapping[str, Any]) -> list[str]:
    """Parts of a pipeline that are not its transformers."""
    return [
        name
        for name, value in index.items()
        if name not in EXPERTS and isinstance(value, list) and len(value) == 2 and value[0] is not None
    ]


def index_of(base: Mapping[str, Any] | None, models: list[ModelConfig], boundary: float | None) -> dict[str, Any]:
    """model_index.json of a pipeline with these transformers.

    Args:
        base: the model_index.json whose other parts are there; None where only the transformers are.
        models: one, or the high-noise expert and the low-noise one.
        boundary: between the two.
    """
    task = models[0].task
    index: dict[str, Any] = dict(base or {"_class_name": _class_of(task)})
    if base is not None and (task == "i2v") != ("ImageToVideo" in str(base.get("_class_name"))):
        raise ConfigError(
            f"--pipeline is a {base.get('_class_name')}, which does not fit model.task = {task!r}; give a "
            f"{_class_of(task)}"
        )
    if len(models) == 1 and base is not None and _is_named(base, EXPERTS[1]):
        raise ConfigError(
            "--pipeline has two transformers, for high noise and for low noise, and SRC is one model; give the other "
            "expert with --second, or a pipeline of one transformer"
        )
    for name, model in zip(EXPERTS, [*models, None][: len(EXPERTS)]):
        index[name] = [None, None] if model is None else list(_library_of(model))
    index["boundary_ratio"] = boundary
    index["expand_timesteps"] = task == "ti2v"
    return index


def _is_named(index: Mapping[str, Any], name: str) -> bool:
    value = index.get(name)
    return isinstance(value, list) and len(value) == 2 and value[0] is not None


def base_identity(base: Path) -> list[Any]:
    """What the parts that are copied are told apart by: every file's name, size and times."""
    parts = [base / PIPELINE, *(path for name in _copied(base_parts(base)) for path in (base / name).rglob("*"))]
    facts = [(str(path.relative_to(base)), path.stat()) for path in parts if path.is_file()]
    return sorted([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in facts)


def write_shift(folder: Path, shift: float) -> None:
    """Give the scheduler of the pipeline in ``folder`` the shift that its transformers were trained with."""
    path = folder / SCHEDULER
    if path.is_file():
        fields = read_json(path)
        fields["shift" if "flow_shift" not in fields and "shift" in fields else "flow_shift"] = shift
        path.unlink()
        write_file(path, [(json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()])


def _class_of(task: str) -> str:
    return "WanImageToVideoPipeline" if task == "i2v" else "WanPipeline"


def _library_of(model: ModelConfig) -> tuple[str, str]:
    if beyond_wan(model):
        return "megavid.inference", "MegavidTransformer3DModel"
    return "diffusers", "WanTransformer3DModel"


def copy_parts(base: Path, index: Mapping[str, Any], dst: Path) -> None:
    """Copy every part but the transformers; files that an earlier try has copied stay.

    Raises:
        OSError: a file could not be read or written.
    """
    for name in _copied(index):
        for path in sorted((base / name).rglob("*")):
            if path.is_dir():
                continue
            target = dst / name / path.relative_to(base / name)
            if target.is_file():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(target.name + _COPYING)
            aside.unlink(missing_ok=True)
            with open(path, "rb") as source:
                write_file(aside, iter(lambda: source.read(8 << 20), b""))
            aside.rename(target)
            sync_folder(target.parent)


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write model_index.json."""
    (folder / PIPELINE).unlink(missing_ok=True)
    write_file(folder / PIPELINE, [(json.dumps(index, indent=2, sort_keys=True) + "\n").encode()])
