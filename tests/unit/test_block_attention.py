"""Block attention: every kernel of this machine against the slow twin, and refusals that name what a backend lacks."""

import pytest
import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.ops import block_attention_library
from megavid.ops.block_attention import CAPABILITIES, ReferenceAttention, check_capability
from megavid.ops.block_attention_library import block_attention

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
    ("flash", "cpu", torch.float32, 64, "backend 'flash' is unknown; set one of aten, cudnn"),
    ("cudnn", "cpu", torch.bfloat16, 64, "'cudnn' does not run on cpu; set one of aten, reference"),
    ("aten", "cuda", torch.float64, 64, "'aten' on cuda takes float32, bfloat16, float16, got float64; set one of ref"),
    ("aten", "cuda", torch.bfloat16, 100, "width is a multiple of 8, at most 256, got 100; change model.num_heads"),
    ("cudnn", "cuda", torch.bfloat16, 256, "at most 128, got 256; change model.num_heads, or set one of aten"),
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


def test_every_row_of_the_table_can_do_what_it_says() -> None:
    for (backend, device), capability in CAPABILITIES.items():
        for dtype in capability.dtypes:
            check_capability(backend, device, dtype, capability.max_head_size or 512)
