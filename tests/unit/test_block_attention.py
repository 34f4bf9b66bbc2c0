"""Block attention: every kernel of this machine against the slow twin, and refusals that name what a backend lacks."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megavid.errors import ConfigError
from megavid.ops import block_attention_library
from megavid.ops.block_attention import CAPABILITIES, BlockAttention, ReferenceAttention, check_capability
from megavid.ops.block_attention_aten import CudaCudnn, CudaFlash
from megavid.ops.block_attention_library import block_attention
from tests.support.flash3 import BACKEND, MODULE, OldStand, Stand, stand_in

SHAPES = {
    "mha": ((2, 4, 9, 8), (2, 4, 9, 8)),
    "gqa": ((1, 6, 5, 8), (1, 2, 17, 8)),
    "one query": ((1, 2, 1, 16), (1, 2, 40, 16)),
    "one key": ((1, 2, 40, 16), (1, 2, 1, 16)),
}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def draw(shape: str, dtype: torch.dtype) -> list[Tensor]:
    """Gradient, queries, keys and values, each a view with tokens first in memory."""
    generator = torch.Generator().manual_seed(3)
    queries, keys = SHAPES[shape]

    def tensor(sizes: tuple[int, int, int, int]) -> Tensor:
        batch, heads, tokens, width = sizes
        drawn = torch.randn(tokens, batch, heads, width, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).permute(1, 2, 0, 3)

    return [tensor(queries), tensor(queries), tensor(keys), tensor(keys)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cpu_kernel_equals_its_slow_twin(shape: str, dtype: torch.dtype) -> None:
    grad, q, k, v = draw(shape, dtype)
    fast, slow = block_attention("aten", q.device, dtype, q.shape[-1]), ReferenceAttention()
    (out, lse), (want_out, want_lse) = fast.forward(q, k, v), slow.forward(q, k, v)
    limits = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(out, want_out, **limits)
    torch.testing.assert_close(lse, want_lse, **limits)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for got, want in zip(fast.backward(grad, q, k, v, out, lse), slow.backward(grad, q, k, v, want_out, want_lse)):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, **limits)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_slow_twin_are_autograds(shape: str) -> None:
    grad, *inputs = draw(shape, torch.float64)
    twin = ReferenceAttention()
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = twin.forward(*leaves)
    out.backward(grad)
    for got, leaf in zip(twin.backward(grad, *inputs, out.detach(), lse.detach()), leaves):
        assert leaf.grad is not None
        torch.testing.assert_close(got, leaf.grad, rtol=1e-12, atol=1e-12)


def test_parts_of_the_keys_with_global_output_add_up_to_the_whole() -> None:
    grad, q, k, v = draw("gqa", torch.float64)
    kernel = block_attention("aten", q.device, q.dtype, q.shape[-1])
    out, lse = kernel.forward(q, k, v)
    whole = kernel.backward(grad, q, k, v, out, lse)
    parts = [kernel.backward(grad, q, k[:, :, at], v[:, :, at], out, lse) for at in (slice(0, 4), slice(4, 17))]
    torch.testing.assert_close(parts[0].q + parts[1].q, whole.q, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([part.k for part in parts], 2), whole.k, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([part.v for part in parts], 2), whole.v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "device", "dtype", "width", "words"), [
    ("flash", "cpu", torch.float32, 64, "'flash' is unknown; set parallel.attention_backend to one of aten, cud"),
    ("cudnn", "cpu", torch.bfloat16, 64, "does not run on cpu; set parallel.attention_backend to one of aten, ref"),
    ("aten", "cuda", torch.float64, 64, "'aten' on cuda takes float32, bfloat16, float16, got float64; set par"),
    ("aten", "cuda", torch.bfloat16, 100, "width is a multiple of 8, at most 256, got 100; change model.num_heads"),
    ("cudnn", "cuda", torch.bfloat16, 256, "at most 128, got 256; change model.num_heads, or set parallel"),
])  # fmt: skip
def test_what_a_backend_lacks_is_refused_by_name(
    backend: str, device: str, dtype: torch.dtype, width: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_capability(backend, device, dtype, width)


def test_a_backend_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(block_attention_library.NEEDS, "flash_attn", "no_such_package")
    with pytest.raises(ConfigError, match="'flash_attn' needs the package no_such_package; install it, or set 'aten'"):
        block_attention("flash_attn", torch.device("cuda"), torch.bfloat16, 64)


def test_flash_attention_3_is_of_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its module is there: it is not asked to run what it cannot."""
    words = (
        r"capability 9\.0, this one has 10\.0; set parallel\.attention_backend to one of aten, cudnn, flash_attn, ref"
    )
    with stand_in():
        for generation in ((10, 0), (9, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=generation: found)
            block_attention_library._generation.cache_clear()
            refused = pytest.raises(ConfigError, match=words) if generation == (10, 0) else nullcontext()
            with refused:
                kernel = flash_attention_3()
        assert type(kernel).__name__ == "FlashAttn3"


def flash_attention_3() -> BlockAttention:
    return block_attention("flash_attn_3", torch.device("cuda", 0), torch.bfloat16, 128)


class Renamed(Stand):
    """A version whose backward pass has other words for what it is told."""

    def backward(  # type: ignore[override]
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor | None = None,
        dk: Tensor | None = None,
        dv: Tensor | None = None,
        softmax_scale: float | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        raise AssertionError


@pytest.mark.parametrize(
    ("stand", "words"),
    [
        (
            OldStand(),
            "_flash_attn_forward that has no argument q_descale, k_descale, v_descale, causal and wants k_new,",
        ),
        (Renamed(), "_flash_attn_backward that has no argument softmax_lse, deterministic and wants lse; install"),
    ],
)
def test_a_flash_attention_3_that_is_called_otherwise_is_refused(
    stand: Stand, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with stand_in(stand), pytest.raises(ConfigError, match=words):
        flash_attention_3()


def test_a_flash_attention_3_without_operators_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with stand_in():
        monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace())
        with pytest.raises(ConfigError, match="no operator flash_attn_3::_flash_attn_forward; install"):
            flash_attention_3()


def test_a_package_that_cannot_be_imported_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in():
        monkeypatch.delitem(sys.modules, BACKEND)
        monkeypatch.delattr(sys.modules[MODULE], "_flash_attn_forward")
        with pytest.raises(
            ConfigError, match=r"is there and cannot be imported \(cannot import name '_flash_attn_f"
        ) as told:
            flash_attention_3()
        assert "\n" not in str(told.value)


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    yield
    block_attention_library._generation.cache_clear()
    block_attention_library._block_attention.cache_clear()


def test_every_row_of_the_table_for_this_machine_can_do_what_it_says() -> None:
    rows = [(name, dtype) for (name, device), each in CAPABILITIES.items() if device == "cpu" for dtype in each.dtypes]
    assert len(rows) == 8
    for name, dtype in rows:
        q = torch.ones(1, 1, 4, 520, dtype=dtype)
        kernel = block_attention(name, q.device, dtype, 520)
        out, lse = kernel.forward(q, q, q)
        assert all(torch.isfinite(x).all() for x in kernel.backward(q, q, q, q, out, lse))


@pytest.mark.parametrize(("kernel", "name"), [(CudaFlash(), "flash_attention_backward"), (CudaCudnn(), "cudnn_")])
def test_gpu_kernels_are_not_told_of_ragged_batches(kernel: BlockAttention, name: str) -> None:
    """Torch takes any tensor of sequence starts, even an empty one, for a ragged batch."""
    seen: list[tuple[object, ...]] = []

    class Arguments(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if name in func.name() and "backward" in func.name():
                known = [argument.name for argument in func._schema.arguments]
                seen.append(tuple(args[known.index(each)] for each in ("cum_seq_q", "cum_seq_k")))
            return func(*args, **(kwargs or {}))

    q = torch.empty(1, 2, 16, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(1, 2, 16, device="meta")
    with Arguments():
        kernel.backward(q, q, q, q, q, lse)
    assert seen == [(None, None)]
