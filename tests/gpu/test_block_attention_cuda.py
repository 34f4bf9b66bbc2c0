"""Block attention on a GPU: every kernel against the slow twin in fp32, and the merge of blocks against one call."""

import pytest
import torch
from torch import Tensor

from megavid.errors import ConfigError
from megavid.models.fp8 import Fp8AttentionRounding
from megavid.ops.block_attention import BlockAttention, ReferenceAttention
from megavid.ops.block_attention_fp8 import Fp8Attention, has_fp8_forward
from megavid.ops.block_attention_library import block_attention
from megavid.ops.fp8 import E4M3, RELATIVE_ERROR, dequantize, quantize_heads
from megavid.ops.fp8_ops import REFERENCE_FP8
from megavid.parallel.context.attention import ContextParallelAttention
from megavid.parallel.context.attn_plan import AttnPlan
from megavid.parallel.context.layout import CPLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPES = {"mha": (8, 8, 256, 320), "gqa": (8, 2, 100, 77), "long": (2, 2, 64, 2000)}  # heads, key heads, tokens, keys
KERNELS = [
    ("aten", torch.float32, 1e-4),
    ("aten", torch.bfloat16, 3e-2),
    ("cudnn", torch.bfloat16, 3e-2),
    ("flash_attn", torch.bfloat16, 3e-2),
    ("flash_attn_3", torch.bfloat16, 3e-2),
    ("reference", torch.float64, 1e-10),
]


def kernel_of(name: str, dtype: torch.dtype, width: int = 64) -> BlockAttention:
    """The backend, or a skip where this machine has not got it."""
    try:
        return block_attention(name, torch.device("cuda", torch.cuda.current_device()), dtype, width)
    except ConfigError as error:
        pytest.skip(str(error))


def draw(shape: str, dtype: torch.dtype) -> list[Tensor]:
    """Gradient, queries, keys and values of two packs, tokens first in memory."""
    heads, kv_heads, tokens, keys = SHAPES[shape]
    generator = torch.Generator().manual_seed(5)
    sizes = [(tokens, heads), (tokens, heads), (keys, kv_heads), (keys, kv_heads)]
    drawn = [torch.randn(length, 2, count, 64, generator=generator) for length, count in sizes]
    return [x.to("cuda", dtype).permute(1, 2, 0, 3) for x in drawn]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cuda_kernel_equals_its_slow_twin(shape: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    grad, q, k, v = draw(shape, dtype)
    fast, slow = kernel_of(name, dtype), ReferenceAttention()
    out, lse = fast.forward(q, k, v)
    want_out, want_lse = slow.forward(*(x.double() for x in (q, k, v)))
    assert lse.shape == want_lse.shape
    torch.testing.assert_close(out.double(), want_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=tolerance, atol=tolerance)
    want = slow.backward(*(x.double() for x in (grad, q, k, v)), want_out, want_lse)
    for got, truth in zip(fast.backward(grad, q, k, v, out, lse), want):
        torch.testing.assert_close(got.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "dtype", "tolerance"), KERNELS)
def test_blocks_on_a_gpu_merge_to_one_call(name: str, dtype: torch.dtype, tolerance: float) -> None:
    kernel_of(name, dtype)
    tokens = 200
    whole = AttnPlan.bidirectional(tokens)
    cuts = [(0, 70), (70, 71), (71, 200)]
    parts = AttnPlan.of_rectangles(tokens, [(0, 150, *cut) for cut in cuts] + [(150, 200, *cut) for cut in cuts[::-1]])
    torch.manual_seed(0)
    inputs = [torch.randn(tokens, 1, 4, 64, device="cuda").to(dtype) for _ in range(4)]
    results = []
    for plan, backend in ((whole, name), (parts, name)):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        out = ContextParallelAttention(CPLayout.contiguous(tokens), "ring", backend)(*leaves, (plan,))
        out.backward(inputs[3])
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, many in zip(*results):
        torch.testing.assert_close(many, one, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("keys", [333, 8192])
@pytest.mark.parametrize(("mean", "limit"), [(0.0, 0.01), (1.0, 0.05)])
def test_attention_in_eight_bits_is_near_that_of_the_numbers_turned_back(
    width: int, keys: int, mean: float, limit: float
) -> None:
    """Outputs within what e4m3 rounds of the weights, in mean and at worst; of many keys the sums are long, too.

    Gradients of queries are off along the mean key, by ``limit`` at most where channels of keys have means of ``mean``
    standard deviations.
    """
    kernel, device = kernel_of("flash_attn_3", torch.bfloat16, width), torch.device("cuda", torch.cuda.current_device())
    assert has_fp8_forward(kernel, device, width)
    generator = torch.Generator().manual_seed(9)
    sizes = [(141, 6), (141, 6), (keys, 2), (keys, 2)]
    grad, *inputs = (
        torch.randn(tokens, 2, heads, width, generator=generator).to(device, torch.bfloat16).permute(1, 2, 0, 3)
        for tokens, heads in sizes
    )
    inputs[1] = inputs[1] + mean * torch.randn(2, 2, 1, width, generator=generator).to(device, torch.bfloat16)
    attention = Fp8Attention(kernel, Fp8AttentionRounding("layer", REFERENCE_FP8), is_in_eight_bits=True)
    out, lse = attention.forward(*inputs)
    q, k, v = (dequantize(quantize_heads(x, 2, E4M3)) for x in inputs)
    want, want_lse = ReferenceAttention().forward(q, k, v)
    magnitudes, _ = ReferenceAttention().forward(q, k, v.abs())
    error = (out.float() - want).abs() / magnitudes
    print(
        f"width {width}, {keys} keys of mean {mean}: errors {error.mean():.4f} in the mean, {error.max():.4f} at most"
    )
    assert error.max() <= 2 * RELATIVE_ERROR[E4M3]
    torch.testing.assert_close(lse, want_lse, rtol=0.0, atol=2e-2)
    gradients = attention.backward(grad, *inputs, out, lse)
    truths = ReferenceAttention().backward(grad.float(), q, k, v, want, want_lse)
    errors = [float((got.float() - truth).norm() / truth.norm()) for got, truth in zip(gradients, truths)]
    print("gradients of queries, keys and values are off by", *(f"{each:.4f}" for each in errors))
    assert errors[0] <= limit
    assert max(errors[1:]) <= 0.01
