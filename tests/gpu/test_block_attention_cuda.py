"""Block attention on a GPU: every kernel against the slow twin in fp32, and the merge of blocks against one call."""

import pytest
import torch
from torch import Tensor

from megavid.ops.block_attention import ReferenceAttention
from megavid.ops.block_attention_library import block_attention, installed
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
    ("reference", torch.float64, 1e-10),
]


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
    if name not in installed():
        pytest.skip(f"{name} is not installed")
    grad, q, k, v = draw(shape, dtype)
    fast, slow = block_attention(name, q.device, dtype, q.shape[-1]), ReferenceAttention()
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
    if name not in installed():
        pytest.skip(f"{name} is not installed")
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
