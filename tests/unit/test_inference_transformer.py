"""The served model: folders, dtypes, diffusers' own Wan as its twin, offloading, compiling, eight bits."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megavid.config.schema import ModelConfig
from megavid.errors import ConfigError
from megavid.inference import MegavidTransformer3DModel
from megavid.inference.fp8 import dequantize_rows, quantize_rows
from megavid.ops.fp8 import ABSOLUTE_ERROR, E4M3, RELATIVE_ERROR
from tests.support.inference_world import call_of, with_moe
from tools import inference_memory

DENSE = with_moe("wan", absolute=False).model
EXPERTS = with_moe(activation="swiglu").model
ROUTERS = {
    "sigmoid": with_moe(num_groups=2, top_groups=1).model,
    "softmax": with_moe(router="softmax").model,
    "expert_choice": with_moe(router="expert_choice").model,
}


def made(model: ModelConfig, **config: Any) -> Any:
    """A model with random numbers everywhere, biases too."""
    from megavid.inference.shape import config_of_model

    torch.manual_seed(3)
    built = MegavidTransformer3DModel.from_config({**config_of_model(model), **config}).eval()
    for parameter in built.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return built


@torch.no_grad()
def velocity(model: Any, shape: ModelConfig = EXPERTS, **options: Any) -> Tensor:
    call = call_of(shape)
    result: Tensor = model(call.latents, call.timestep, call.text, **options).sample
    return result


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_a_saved_folder_loads_bitwise(tmp_path: Path, shard: str) -> None:
    model = made(EXPERTS)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == (shard == "100KB")
    loaded = MegavidTransformer3DModel.from_pretrained(tmp_path)
    assert loaded.shape == model.shape
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(velocity(loaded), velocity(model))


def test_names_and_config_of_the_folder_are_diffusers_and_ours(tmp_path: Path) -> None:
    model = made(EXPERTS)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "MegavidTransformer3DModel"
    assert inspect.signature(diffusers.WanTransformer3DModel).parameters.keys() <= config.keys()
    shapes = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name.startswith("blocks.1.ffn")
    }
    experts, hidden, width = 4, 32, 48
    assert shapes == {
        "blocks.1.ffn.router.weight": (experts, width),
        "blocks.1.ffn.router.expert_bias": (experts,),
        **{f"blocks.1.ffn.experts.{m}.weight": (experts, hidden, width) for m in ("up", "gate")},
        **{f"blocks.1.ffn.experts.{m}.bias": (experts, hidden) for m in ("up", "gate")},
        "blocks.1.ffn.experts.down.weight": (experts, width, hidden),
        "blocks.1.ffn.experts.down.bias": (experts, width),
        **{f"blocks.1.ffn.shared.{m}.weight": (hidden, width) for m in ("up", "gate")},
        **{f"blocks.1.ffn.shared.{m}.bias": (hidden,) for m in ("up", "gate")},
        "blocks.1.ffn.shared.down.weight": (width, hidden),
        "blocks.1.ffn.shared.down.bias": (width,),
    }


WAN = {
    "t2v": {},
    "i2v": {"in_channels": 9, "out_channels": 4, "image_dim": 20, "added_kv_proj_dim": 48},
    "first and last frame": {
        "in_channels": 9,
        "out_channels": 4,
        "image_dim": 20,
        "added_kv_proj_dim": 48,
        "pos_embed_seq_len": 14,
    },
}


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", WAN)
def test_dense_model_equals_diffusers_wan(kind: str, per_token: bool) -> None:
    model = made(DENSE, **WAN[kind])
    keys = ("patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
            "freq_dim", "ffn_dim", "num_layers", "image_dim", "added_kv_proj_dim", "pos_embed_seq_len")  # fmt: skip
    twin = diffusers.WanTransformer3DModel(**{key: model.config[key] for key in keys}).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    call = call_of(replace(DENSE, in_channels=model.config.in_channels, text_length=512))
    model.register_to_config(text_length=512)
    model.shape = replace(model.shape, text_length=512)
    timestep = call.timestep
    if per_token:
        timestep = torch.cat([torch.zeros(2, 24), timestep[:, None].expand(2, 48)], dim=1)
    image = None
    if kind != "t2v":
        image = torch.randn(4, 7, 20) if "first" in kind else torch.randn(2, 7, 20)
    with torch.no_grad():
        got, want = (m(call.latents, timestep, call.text, image, return_dict=False)[0] for m in (model, twin))
    # diffusers computes the timestep's code in fp32, which moves angles by up to 6e-5.
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_bf16_keeps_the_fp32_list(tmp_path: Path) -> None:
    model = made(EXPERTS)
    model.save_pretrained(tmp_path)
    loaded = MegavidTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    kept = {name for name, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    assert {name for name in kept if not name.startswith("blocks.")} == {
        "scale_shift_table",
        *(f"condition_embedder.time_embedder.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")),
        *(f"condition_embedder.time_proj.{kind}" for kind in ("weight", "bias")),
    }
    assert {name.removeprefix("blocks.1.") for name in kept if name.startswith("blocks.1.")} == {
        "scale_shift_table", "norm2.weight", "norm2.bias", "ffn.router.weight", "ffn.router.expert_bias",
        *(f"{attention}.norm_{part}.weight" for attention in ("attn1", "attn2") for part in ("q", "k")),
    }  # fmt: skip
    got = velocity(loaded)
    assert got.dtype == torch.bfloat16
    assert gap(got, velocity(model)) < 0.03


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    made(EXPERTS).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    with pytest.raises(OSError, match="safetensors"):
        MegavidTransformer3DModel.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="pickled weights are not read"):
        MegavidTransformer3DModel.from_pretrained(tmp_path, use_safetensors=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "topk"}, "router = 'topk' must be 'sigmoid' or 'softmax' or 'expert_choice'"),
        ({"qk_norm": "rms_norm"}, "qk_norm = 'rms_norm' must be 'rms_norm_across_heads'"),
        ({"top_k": 5}, "top_k = 5 must be at most"),
        ({"in_channels": 9, "image_dim": 20}, "image_dim = 20 and added_kv_proj_dim = None must both be given"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(EXPERTS, **change)


def test_a_dense_model_reads_nothing_of_experts() -> None:
    """As megavid convert writes a dense model with absolute places: keys that say there are none."""
    model = made(with_moe("wan").model, num_experts=0, top_k=1, expert_ffn_dim=1)
    assert not any("experts" in name for name in model.state_dict())


@pytest.mark.parametrize("preset", ["wan_1b", "wan_moe_7b_a2b"])
def test_memory_on_the_page_is_what_the_tool_adds_up(preset: str) -> None:
    assert inference_memory.row(preset) in (Path(__file__).parents[2] / "docs" / "inference.md").read_text()


def test_calls_that_do_not_fit_the_model_are_refused_in_words() -> None:
    model, call = made(EXPERTS), call_of(EXPERTS)
    with pytest.raises(ConfigError, match=r"pass max_sequence_length=6 to the pipeline"):
        model(call.latents, call.timestep, torch.zeros(2, 512, 8))
    with pytest.raises(ConfigError, match=r"3 channels, this model takes 4"):
        model(call.latents[:, :3], call.timestep, call.text)
    with pytest.raises(ConfigError, match=r"timestep has shape \(3,\), it must be \[2\] or \[2, 72\]"):
        model(call.latents, torch.zeros(3), call.text)
    with pytest.raises(ConfigError, match=r"takes no encoder_hidden_states_image"):
        model(call.latents, call.timestep, call.text, torch.zeros(2, 7, 20))
    with pytest.raises(ConfigError, match=r"attention_kwargs has fps; known: latent_frame_rate"):
        model(call.latents, call.timestep, call.text, attention_kwargs={"fps": 16})
    with pytest.raises(ConfigError, match=r"beyond rope_max_seq_len = 4"):
        made(EXPERTS, rope_max_seq_len=4)(call.latents, call.timestep, call.text)


def test_blocks_spread_by_a_device_map_with_some_on_disk_give_the_same(tmp_path: Path) -> None:
    model = made(EXPERTS)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    places = {"patch_embedding": "cpu", "condition_embedder": "cpu", "proj_out": "cpu", "scale_shift_table": "cpu"}
    places |= {f"blocks.{n}": "disk" if n in (1, 2) else "cpu" for n in range(4)}
    spread = MegavidTransformer3DModel.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "offload")
    )
    assert spread.blocks[1].ffn.experts.up.weight.device.type == "meta"
    assert torch.equal(velocity(spread), velocity(model))


@pytest.mark.parametrize("router", ["sigmoid", "expert_choice"])
def test_a_block_compiles_to_one_graph_in_bf16_and_gives_the_same(router: str) -> None:
    shape = replace(ROUTERS[router], num_layers=3)
    model = made(shape).to(torch.bfloat16)
    want = velocity(model, shape)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert gap(velocity(model, shape), want) < 1e-3


def test_the_whole_model_compiles_in_fp32_and_gives_the_same() -> None:
    """In several graphs: torch 2.13 traces its grouped product in bf16 only."""
    model = made(replace(EXPERTS, num_layers=3))
    want = velocity(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(velocity(compiled), want, rtol=1e-5, atol=1e-5)


def test_weights_in_eight_bits_are_within_the_stated_error() -> None:
    weight = torch.randn(3, 40, 64) * torch.logspace(-6, 3, 40).unsqueeze(1) * torch.rand(64).pow(8)
    weight[0, 0] = 0
    bits, scale = quantize_rows(weight)
    back = dequantize_rows(bits, scale, torch.float32)
    error = (back - weight).abs()
    assert (
        error <= torch.maximum(RELATIVE_ERROR[E4M3] * weight.abs(), ABSOLUTE_ERROR[E4M3] * scale.unsqueeze(-1))
    ).all()
    assert (error > 0.4 * RELATIVE_ERROR[E4M3] * weight.abs()).any()
    assert torch.equal(scale.log2().round().exp2(), scale)
    largest = weight.abs().amax(-1) / scale
    assert ((largest >= 224) | (largest == 0)).all()
    assert (largest <= 448).all()
    assert torch.equal(back.to(torch.bfloat16), dequantize_rows(bits, scale, torch.bfloat16))
    assert torch.equal(back.to(torch.bfloat16).float(), back)


def test_a_model_in_eight_bits_is_near_halves_the_memory_and_is_saved_so(tmp_path: Path) -> None:
    model = made(replace(EXPERTS, hidden_size=96))
    call = call_of(EXPERTS)
    with torch.no_grad():
        want = model(call.latents, call.timestep, call.text).sample
        model.save_pretrained(tmp_path / "plain")
        small = MegavidTransformer3DModel.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
        before = sum(p.nbytes for p in small.blocks.parameters() if p.dtype == torch.bfloat16)
        small.quantize_fp8_()
        after = sum(p.nbytes for n, p in small.blocks.named_parameters() if "fp8" in n or "weight_scale" in n)
        assert 0.5 * before < after < 0.56 * before
        got = small(call.latents, call.timestep, call.text).sample
        assert 0.003 < gap(got, want) < 0.06
        assert small.dtype == torch.bfloat16
        small.save_pretrained(tmp_path / "fp8")
        loaded = MegavidTransformer3DModel.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
        assert loaded.blocks[1].ffn.experts.up.weight_fp8.dtype == torch.uint8
        assert torch.equal(loaded(call.latents, call.timestep, call.text).sample, got)
        assert loaded.to(torch.float32).blocks[1].ffn.experts.up.weight_fp8.dtype == torch.uint8


class Unpacked(TorchFunctionMode):
    """The largest tensor that is made of eight bits, and how many of experts are."""

    largest = 0
    number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and args[0].dtype == torch.float8_e4m3fn:
            self.largest = max(self.largest, args[0].numel())
            self.number += args[0].dim() == 3
        return func(*args, **(kwargs or {}))


def test_a_model_in_eight_bits_unpacks_one_expert_at_a_time() -> None:
    shape = replace(EXPERTS, moe=replace(EXPERTS.moe, dense_first=0, dense_last=0), num_layers=1, ffn_size=8)
    model = made(shape).quantize_fp8_()
    experts = model.blocks[0].ffn.experts
    one = experts.up.weight_fp8[0].numel()
    attention = shape.hidden_size**2
    with Unpacked() as seen, torch.no_grad():
        experts(torch.randn(6, shape.hidden_size), torch.tensor([4, 0, 2, 0]), torch.ones(6))
        assert (seen.largest, seen.number) == (one, 2 * 3)  # two experts have rows, of three matrices each
        velocity(model, shape)
    assert seen.largest == max(one, attention)


def test_a_model_in_eight_bits_compiles_and_gives_the_same() -> None:
    model = made(replace(EXPERTS, num_layers=3)).quantize_fp8_().to(torch.bfloat16)
    want = velocity(model)
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend="aot_eager")
    assert gap(velocity(model), want) < 1e-3


def test_a_model_in_eight_bits_errs_by_its_weights_alone() -> None:
    """The same as a plain model whose weights were rounded to what the bits stand for."""
    model = made(EXPERTS)
    rounded = made(EXPERTS)
    model.quantize_fp8_()
    state = model.state_dict()
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            bits = state.get(f"{name}_fp8")
            if bits is not None:
                parameter.copy_(dequantize_rows(bits, state[f"{name}_scale"], torch.float32))
    torch.testing.assert_close(velocity(model), velocity(rounded), rtol=1e-6, atol=1e-6)
