"""Pipelines: two experts and their boundary, parts that are copied, and the inference class's names."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from megavid.checkpoint.convert import LazyTensor, open_model, pipeline, write_model
from megavid.checkpoint.convert.job import ConvertJob, ConvertRequest
from megavid.checkpoint.convert.tables import INFERENCE, KEPT_FP32, expected_tensors, links, matches, to_model_space
from megavid.errors import ConfigError
from megavid.inference import MegavidTransformer3DModel
from tests.support.inference_world import to_inference
from tests.support.tiny_world import tiny_config
from tests.support.wan_folders import assert_same_files, save_wan, tensors_in


def make_base(folder: Path, **index: Any) -> Path:
    """A pipeline's folder with two small parts; none of them is read."""
    for part in ("vae", "scheduler"):
        (folder / part).mkdir(parents=True)
    (folder / "vae" / "config.json").write_text("{}")
    (folder / "vae" / "big.bin").write_bytes(os.urandom(100_000))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 12.0}))
    parts = {"vae": ["diffusers", "AutoencoderKLWan"], "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
    fields = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"], **parts, **index}
    (folder / "model_index.json").write_text(json.dumps(fields))
    return folder


def convert(src: Path, dst: Path, to: str, **options: Any) -> None:
    ConvertJob.of(ConvertRequest(src, dst, to, command="convert", **options)).run()


def test_two_experts_there_and_back_keep_their_boundary(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    save_wan(tmp_path / "high"), save_wan(tmp_path / "low", dtype=torch.bfloat16)
    convert(
        tmp_path / "high", tmp_path / "pipe", "diffusers", second=str(tmp_path / "low"), boundary=0.875, base=str(base)
    )
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["boundary_ratio"] == 0.875
    assert index["expand_timesteps"] is False
    assert index["transformer_2"] == index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert (tmp_path / "pipe/vae/big.bin").read_bytes() == (base / "vae/big.bin").read_bytes()
    assert_same_files(tmp_path / "pipe/transformer", tmp_path / "high")
    assert_same_files(tmp_path / "pipe/transformer_2", tmp_path / "low")
    WanTransformer3DModel.from_pretrained(tmp_path / "pipe", subfolder="transformer_2")

    convert(tmp_path / "pipe", tmp_path / "runs", "megavid")
    levels = [open_model(tmp_path / "runs" / name).run.diffusion for name in ("transformer", "transformer_2")]
    assert [(level.sigma_min, level.sigma_max) for level in levels] == [(0.875, 1.0), (0.0, 0.875)]
    assert [level.flow_shift for level in levels] == [12.0, 12.0]

    convert(tmp_path / "runs", tmp_path / "original", "original")
    convert(tmp_path / "original", tmp_path / "again", "diffusers", boundary=0.875)
    assert_same_files(tmp_path / "again/transformer", tmp_path / "high")
    assert_same_files(tmp_path / "again/transformer_2", tmp_path / "low")
    # The levels that the checkpoints were given are enough to know the boundary.
    high, low = (tmp_path / "runs" / name for name in ("transformer", "transformer_2"))
    convert(high, tmp_path / "pair", "diffusers", second=str(low))
    assert json.loads((tmp_path / "pair/model_index.json").read_text())["boundary_ratio"] == 0.875
    with pytest.raises(ConfigError, match="SRC must be the high-noise expert"):
        convert(low, tmp_path / "wrong", "diffusers", second=str(high), boundary=0.875)
    with pytest.raises(ConfigError, match="is told twice"):
        convert(high, tmp_path / "wrong", "diffusers", second=str(low), boundary=0.9)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("variant", "options", "match"),
    [
        ("t2v", {"num_layers": 3}, r"num_layers = 2 in \S+high, 3 in \S+low"),
        ("t2v", {"ffn_dim": 48}, r"ffn_dim = 96 in \S+high, 48 in \S+low"),
        ("i2v of 2.2", {}, r"in_channels = 16 in \S+high, 36 in \S+low"),
    ],
)
def test_experts_of_two_shapes_are_no_pair(tmp_path: Path, variant: str, options: dict[str, Any], match: str) -> None:
    save_wan(tmp_path / "high"), save_wan(tmp_path / "low", variant, **options)
    with pytest.raises(ConfigError, match=f"different models: {match}"):
        convert(tmp_path / "high", tmp_path / "dst", "diffusers", second=str(tmp_path / "low"), boundary=0.9)
    assert not (tmp_path / "dst").exists()


def test_experts_of_two_families_are_no_pair(tmp_path: Path) -> None:
    for name, family in (("high", "wan"), ("low", "wan_moe")):
        MegavidTransformer3DModel.of_model(tiny_config(family).model).save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match=r"different models: family = 'wan' in \S+high, 'wan_moe' in \S+low"):
        convert(tmp_path / "high", tmp_path / "dst", "diffusers", second=str(tmp_path / "low"), boundary=0.9)


def test_runs_that_train_their_router_differently_are_a_pair(tmp_path: Path) -> None:
    MegavidTransformer3DModel.of_model(tiny_config("wan_moe").model).save_pretrained(tmp_path / "src")
    source = open_model(tmp_path / "src")
    for name, rate in (("high", 1e-3), ("low", 1e-2)):
        moe = replace(source.config.moe, bias_update_rate=rate)
        run = replace(source.run, model=replace(source.config, moe=moe))
        write_model(replace(source, run=run), tmp_path / name, to="megavid")
    convert(tmp_path / "high", tmp_path / "dst", "diffusers", second=str(tmp_path / "low"), boundary=0.9)
    assert (tmp_path / "dst" / "transformer_2").is_dir()


def test_interrupted_pipeline_does_not_write_a_finished_expert_again(tmp_path: Path) -> None:
    save_wan(tmp_path / "high"), save_wan(tmp_path / "low")
    request = ConvertRequest(
        tmp_path / "high", tmp_path / "pipe", "diffusers", "convert", second=str(tmp_path / "low"), boundary=0.9
    )
    job = ConvertJob.of(request)
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > 0.7 * job.nbytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(progress=stop)
    first = tmp_path / "pipe.partial/transformer"
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    ConvertJob.of(request).run()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pipe/transformer").iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == ["high", "low", "pipe"]
    assert sorted(os.listdir(tmp_path / "pipe")) == ["model_index.json", "transformer", "transformer_2"]


def run_at(folder: Path, updates: int = 1, **diffusion: float) -> Path:
    """A megavid checkpoint of a run with these noise levels and this shift, after so many updates."""
    save_wan(folder.with_name(folder.name + "_src"))
    source = open_model(folder.with_name(folder.name + "_src"))
    run = replace(source.run, diffusion=replace(source.run.diffusion, **diffusion))
    write_model(replace(source, run=run, state={"format": 1, "updates": updates}), folder, to="megavid")
    return folder


def test_pipeline_samples_at_the_shift_that_was_trained(tmp_path: Path) -> None:
    convert(
        run_at(tmp_path / "run", flow_shift=7.0), tmp_path / "pipe", "diffusers", base=str(make_base(tmp_path / "b"))
    )
    scheduler = json.loads((tmp_path / "pipe/scheduler/scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 7.0
    assert json.loads((tmp_path / "b/scheduler/scheduler_config.json").read_text())["flow_shift"] == 12.0


def test_pipeline_of_weights_that_no_run_has_trained_keeps_its_shift(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    convert(run_at(tmp_path / "run", updates=0), tmp_path / "pipe", "diffusers", base=str(base))
    scheduler = json.loads((tmp_path / "pipe/scheduler/scheduler_config.json").read_text())
    assert scheduler["flow_shift"] == 12.0


def test_experts_of_two_shifts_make_no_pipeline(tmp_path: Path) -> None:
    high, low = run_at(tmp_path / "high", flow_shift=7.0, sigma_min=0.9), run_at(tmp_path / "low", sigma_max=0.9)
    with pytest.raises(ConfigError, match=r"trained with diffusion\.flow_shift = .* and "):
        convert(high, tmp_path / "pipe", "diffusers", second=str(low), base=str(make_base(tmp_path / "base")))
    assert not (tmp_path / "pipe").exists()


def test_one_expert_alone_is_no_pipeline_and_keeps_its_levels(tmp_path: Path) -> None:
    high = run_at(tmp_path / "high", sigma_min=0.9, flow_shift=5.0)
    with pytest.raises(ConfigError, match=r"noise levels 0\.9 to 1 only.* --second"):
        convert(high, tmp_path / "pipe", "diffusers", base=str(make_base(tmp_path / "base")))
    convert(high, tmp_path / "alone", "diffusers")
    levels = open_model(tmp_path / "alone").run.diffusion
    assert (levels.sigma_min, levels.sigma_max, levels.flow_shift) == (0.9, 1.0, 5.0)


def test_a_pipeline_of_two_does_not_lose_one(tmp_path: Path) -> None:
    save_wan(tmp_path / "src")
    base = make_base(tmp_path / "base", transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(ConfigError, match="has two transformers"):
        convert(tmp_path / "src", tmp_path / "pipe", "diffusers", base=str(base))


@pytest.mark.parametrize("name", ["..", "../other", "a/b"])
def test_parts_lie_in_the_pipeline(tmp_path: Path, name: str) -> None:
    save_wan(tmp_path / "src")
    base = make_base(tmp_path / "base", **{name: ["diffusers", "X"]})
    with pytest.raises(ConfigError, match="which is no folder's name"):
        convert(tmp_path / "src", tmp_path / "pipe", "diffusers", base=str(base))
    assert not (tmp_path / "pipe").exists()


def test_changed_base_is_copied_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_wan(tmp_path / "src")
    base = make_base(tmp_path / "base")
    request = ConvertRequest(tmp_path / "src", tmp_path / "pipe", "diffusers", "convert", base=str(base))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    copied = tmp_path / "pipe.partial/vae/big.bin"
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_index", stop)  # when everything is copied
        with pytest.raises(KeyboardInterrupt):
            ConvertJob.of(request).run()
        (base / "vae" / "big.bin").write_bytes(b"other")
        with pytest.raises(KeyboardInterrupt):
            ConvertJob.of(request).run()
        assert copied.read_bytes() == b"other"
    times = (base / "vae" / "big.bin").stat()
    (base / "vae" / "big.bin").write_bytes(b"anoth")  # of the same size, and the same time
    os.utime(base / "vae" / "big.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    ConvertJob.of(request).run()
    assert (tmp_path / "pipe/vae/big.bin").read_bytes() == b"anoth"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"second": "low"}, "--boundary X is missing"),
        ({"boundary": 0.9}, "stands between two experts"),
        ({"keep_optimizer": True}, "--optimizer goes from megavid to megavid only"),
        ({"base": "nowhere"}, "--pipeline nowhere has no model_index.json"),
        ({"dtype": torch.bfloat16, "dtype_of": "low"}, "exclude each other"),
        ({"use_ema": True}, "has no moving average"),
        ({"dtype_of": "low", "to": "megavid"}, "--dtype-of goes by the names of --to diffusers or original"),
    ],
)
def test_what_would_do_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], match: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_wan(Path("high")), save_wan(Path("low"))
    with pytest.raises(Exception, match=match):
        convert(Path("high"), Path("dst"), **{"to": "diffusers", **options})
    assert sorted(os.listdir()) == ["high", "low"]


def test_formats_of_another_folder_bring_a_trained_model_back_to_them(tmp_path: Path) -> None:
    save_wan(tmp_path / "src", dtype=torch.bfloat16)
    write_model(open_model(tmp_path / "src"), tmp_path / "wide", to="megavid", dtype=torch.float32)
    convert(tmp_path / "wide", tmp_path / "dst", "diffusers", dtype_of=str(tmp_path / "src"))
    assert_same_files(tmp_path / "dst", tmp_path / "src")


def test_formats_of_another_folder_leave_routers_in_fp32(tmp_path: Path) -> None:
    MegavidTransformer3DModel.of_model(tiny_config("wan_moe").model).save_pretrained(tmp_path / "src")
    half = {name: tensor.bfloat16() for name, tensor in tensors_in(tmp_path / "src").items()}
    (tmp_path / "half").mkdir()
    save_file(half, tmp_path / "half" / "x.safetensors")
    convert(tmp_path / "src", tmp_path / "dst", "diffusers", dtype_of=str(tmp_path / "half"))
    wide = {name for name, tensor in tensors_in(tmp_path / "dst").items() if tensor.dtype == torch.float32}
    assert wide == {name for name in half if ".router." in name}


def lazily(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """Tensors in memory, as if they had not been read."""

    def lazy(name: str, tensor: torch.Tensor) -> LazyTensor:
        flat = tensor.reshape(-1)
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda start, stop: flat[start:stop], name)

    return {name: lazy(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_inference_names_are_those_of_the_class(tmp_path: Path, activation: str) -> None:
    model = tiny_config("wan_moe", moe={"activation": activation}).model
    weights = {name: torch.randn(shape) for name, shape in expected_tensors(model).items()}
    state = to_inference(weights, model)
    for name, tensor in to_model_space(model, INFERENCE, lazily(state), "state").items():
        assert torch.equal(tensor.read(), weights[name]), name
    for link in links(model, INFERENCE):
        assert torch.equal(link.from_model(lazily(weights)).read(), state[link.other]), link.other


def test_fp32_list_is_what_the_served_class_keeps(tmp_path: Path) -> None:
    model = tiny_config("wan_moe").model
    kept = MegavidTransformer3DModel._keep_in_fp32_modules
    for link in links(model, INFERENCE):
        is_kept = any(part in link.other for part in kept)
        assert matches(link.names[0], KEPT_FP32) == is_kept, link.other
