"""Files that say nonsense: whatever stands in a header, a config or a record, the answer is one line."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megavid.checkpoint.convert import open_model, write_model
from megavid.checkpoint.convert.adapter import METADATA, open_adapter
from megavid.checkpoint.convert.configs import Recorded, model_of
from megavid.checkpoint.convert.pipeline import index_of, surroundings
from megavid.checkpoint.convert.record import parse_record
from megavid.checkpoint.convert.shards import OpenFiles, open_file, open_shards
from megavid.errors import CheckpointError, ConfigError, MegavidError
from megavid.inference import MegavidTransformer3DModel
from tests.support.tiny_world import tiny_config
from tests.support.wan_folders import save_wan

NONSENSE = (None, True, -1, 0, 1.5, 2**70, "x", "", [], ["x"], [1, "x", None], [-1], {}, {"x": []})


@contextlib.contextmanager
def one_line(what: object) -> Iterator[None]:
    """Inside, all is well or refused in one line; whatever else is raised fails with what was written."""
    said = ""
    try:
        yield
    except MegavidError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} {error}") from error
    assert "\n" not in said, what


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value, at most three deep."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(inner) if len(rest) < 3)


def changed(value: Any, place: tuple[Any, ...], to: Any) -> Any:
    """A copy of a JSON value with another value in one place."""
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    return copy


def nonsense(value: Any, read: Callable[[Any], object], keep: int = 40) -> None:
    """Read ``value`` with every kind of nonsense in every one of its first places."""
    read(value)
    for place in list(places(value))[:keep]:
        for other in NONSENSE:
            with one_line((place, other)):
                read(changed(value, place, other))


@pytest.mark.parametrize("layout", ["diffusers", "original", "inference"])
def test_config_json(tmp_path: Path, layout: str) -> None:
    if layout == "inference":
        MegavidTransformer3DModel.of_model(tiny_config("wan_moe").model).save_pretrained(tmp_path / "src")
    else:
        write_model(open_model(save_wan(tmp_path / "a", "i2v of 2.1", image_dim=1280)), tmp_path / "src", to=layout)
    fields, tensors = json.loads((tmp_path / "src/config.json").read_text()), open_shards(tmp_path / "src", OpenFiles())
    nonsense(fields, lambda given: model_of(given, tensors, Recorded({}), "config.json"))
    with pytest.raises(CheckpointError, match=r"config.json is of a \['WanModel'\]"):
        model_of({**fields, "_class_name": ["WanModel"]}, tensors, Recorded({}), "config.json")


def test_header_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
    }

    def read(fields: Any) -> None:
        text = json.dumps(fields).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(10))
        open_file(file, OpenFiles())

    nonsense(header, read)
    with pytest.raises(CheckpointError, match=r"x.safetensors: tensor a has dtype \['F32'\], shape \[2, 1\]"):
        read(changed(header, ("a", "dtype"), ["F32"]))


ADAPTED = "transformer.blocks.0.attn1.to_q"
SCALED: dict[str, Any] = {
    "r": 2, "lora_alpha": 3, "use_rslora": True, "use_dora": False, "lora_bias": False,
    "alpha_pattern": {"to_k": 5, "to_q": 4},
}  # fmt: skip


def open_pair(file: Path, fields: Any = SCALED, module: str = ADAPTED, **tensors: torch.Tensor) -> None:
    """Open a file with one adapter of a matrix of 48 by 48."""
    given = {"lora_A.weight": torch.ones(2, 48), "lora_B.weight": torch.ones(48, 2)}
    given |= {name.replace("_weight", ".weight"): tensor for name, tensor in tensors.items()}
    save_file({f"{module}.{name}": t for name, t in given.items()}, file, {METADATA: json.dumps(fields)})
    open_adapter(file, tiny_config("wan").model)


def test_metadata_of_an_adapter(tmp_path: Path) -> None:
    nonsense({f"transformer.{key}": value for key, value in SCALED.items()}, lambda f: open_pair(tmp_path / "x", f))
    nonsense([SCALED], lambda f: open_pair(tmp_path / "x", f[0]))
    for fields in ({"alpha_pattern": {"(": 1}}, {"lora_alpha": None}, {"lora_alpha": float("nan")}):
        with pytest.raises(CheckpointError, match=r"no scale of blocks\.0\.attn1\.to_q follows from"):
            open_pair(tmp_path / "x", fields)


@pytest.mark.parametrize(
    ("module", "tensors", "told"),
    [
        (ADAPTED, {"lora_A_weight": torch.ones(0, 48), "lora_B_weight": torch.ones(48, 0)}, r"has A \[0, 48\]"),
        (ADAPTED, {"lora_A_weight": torch.tensor(1.0)}, r"has A \[\]"),
        (ADAPTED, {"lora_B_weight": torch.tensor(1.0)}, r"and B \[\]"),
        (ADAPTED, {"alpha": torch.ones(2)}, "no scale of"),
        ("transformer.blocks.0.norm2", {}, r"tensor blocks\.0\.norm2\.lora_A\.weight .* place for"),
    ],
)
def test_tensors_of_an_adapter(tmp_path: Path, module: str, tensors: dict[str, torch.Tensor], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        open_pair(tmp_path / "x", module=module, **tensors)


def test_index_of_files(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src", shard="100KB")
    (index,) = src.glob("*.index.json")

    def read(fields: Any) -> None:
        index.write_text(json.dumps(fields))
        open_shards(src, OpenFiles())

    nonsense(json.loads(index.read_text()), read, keep=6)


def test_record_of_a_conversion(tmp_path: Path) -> None:
    write_model(open_model(save_wan(tmp_path / "src")), tmp_path / "dst", to="diffusers")
    path = tmp_path / "dst" / "conversion.json"
    record = json.loads(path.read_text())
    for side in ("source", "target"):
        record[side]["tensors"] = dict(list(record[side]["tensors"].items())[:1])
    del record["model"]["moe"]
    content = path.read_text()
    fields = json.loads((tmp_path / "dst/config.json").read_text())
    with contextlib.suppress(CheckpointError):
        parse_record(json.dumps(record).encode(), path)
    for place in list(places(record))[:60]:
        for other in NONSENSE:
            with one_line((place, other)):
                parse_record(json.dumps(changed(record, place, other)).encode(), path)
    # What it says of the model is checked with the model, what it says of noise levels with them.
    whole = json.loads(content)
    for place in [("model", key) for key in ("task", "text_length", "latent_frame_rate")]:
        for other in NONSENSE:
            with one_line((place, other)):
                model_of(fields, {}, Recorded(changed(whole, place, other)["model"]), "config.json")
    for place in [("diffusion", key) for key in whole["diffusion"]] + [("diffusion",)]:
        for other in NONSENSE:
            path.write_text(json.dumps(changed(whole, place, other)))
            with one_line((place, other)):
                open_model(tmp_path / "dst")


def test_index_and_scheduler_of_a_pipeline(tmp_path: Path) -> None:
    index: dict[str, Any] = {
        "_class_name": "WanPipeline", "boundary_ratio": 0.9, "expand_timesteps": True, "vae": ["diffusers", "X"],
        "transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None],
    }  # fmt: skip
    (tmp_path / "transformer").mkdir()
    (tmp_path / "scheduler").mkdir()
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"flow_shift": 3.0}))
    model = tiny_config("wan").model

    def read(fields: Any) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps(fields))
        surroundings(tmp_path / "transformer")
        index_of(fields, [model], None)

    nonsense(index, read)
    for other in NONSENSE:
        scheduler.write_text(json.dumps({"flow_shift": other}))
        with one_line(other):
            surroundings(tmp_path / "transformer")


def test_a_malformed_folder_is_refused_and_nothing_written(tmp_path: Path) -> None:
    src = save_wan(tmp_path / "src")
    fields = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**fields, "_class_name": ["WanTransformer3DModel"]}))
    with pytest.raises((CheckpointError, ConfigError), match=r"is of a \['WanTransformer3DModel'\]"):
        write_model(open_model(src), tmp_path / "dst", to="megavid")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
