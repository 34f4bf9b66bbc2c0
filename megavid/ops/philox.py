"""Random numbers that are a pure function of (key, index): Philox 4x32-10 in int64 tensor arithmetic.

Owns the generator and its two distributions. Any slice of a stream equals that slice of the whole, whatever
the device, the number of threads or the chunking: a rank draws only what it owns, and CPU and CUDA draw the
same bits. For that, normals use nothing but operations that IEEE 754 rounds exactly (+, -, *, /, sqrt); ``log``
and ``cos`` of the libraries differ in their last bit from one machine to the next.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox); Box and Muller 1958.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Key = tuple[int, int]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# Third counter word: streams of different kinds never share a block, even under one key.
_UNIFORM, _NORMAL = 0, 1

# Blocks at a time. On a CPU the temporaries (128 KiB each) stay in cache; a GPU wants few launches.
_CHUNK_CPU, _CHUNK_GPU = 1 << 14, 1 << 22

_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # sqrt(1/2) as the bits of an fp64
_ONE_BITS = 0x3FF0000000000000
_FRACTION_BITS = (1 << 52) - 1


def key_of(*parts: int | str) -> Key:
    """Key of the stream that ``parts`` name, such as ``key_of(seed, "noise", draw)``: 64 bits of their BLAKE2b.

    Parts are told apart by type and length: ``key_of(1, "2")``, ``key_of("1", 2)`` and ``key_of("12")`` differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = str(part).encode()
        digest.update(f"{'i' if isinstance(part, int) else 's'}{len(data)}:".encode() + data)
    number = int.from_bytes(digest.digest(), "little")
    return number & _WORD, number >> 32


def philox(counter: Sequence[int], key: Key) -> tuple[int, int, int, int]:
    """One block of Philox 4x32-10 in plain integers: twin of the tensor code, and quick for a single block.

    Args:
        counter: four uint32.
        key: two uint32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & _WORD, (first >> 32) ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform_at(key: Key, index: int) -> float:
    """Element ``index`` of the stream of ``uniform``, without a tensor."""
    w0, w1, _, _ = philox((index & _WORD, index >> 32, _UNIFORM, 0), key)
    return ((w0 << 20 | w1 >> 12) + 0.5) * 2.0**-52


def uniform(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements ``start`` to ``start + count - 1`` of the uniform stream of ``key``, fp64, above 0 and below 1.

    Element i is the block with counter i, of which it takes 52 bits.

    Args:
        key: from ``key_of``.
        start: first index, at least 0 and below 2**63 - count.
        count: elements.
        device: where to compute.
    """
    out = torch.empty(count, dtype=torch.float64, device=device)
    chunk = _chunk_of(out)
    for at in range(0, count, chunk):
        stop = min(at + chunk, count)
        block = torch.arange(start + at, start + stop, dtype=torch.int64, device=device)
        w0, w1, _, _ = _words(block, _UNIFORM, key)
        bits = (w0 << 20).bitwise_or_(w1 >> 12)
        out[at:stop] = bits.double().add_(0.5).mul_(2.0**-52)
    return out


def normal(key: Key, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements ``start`` to ``start + count - 1`` of the standard normal stream of ``key``, fp32.

    Elements 4b to 4b + 3 come from the block with counter b: two Box-Muller pairs, in fp64 and then rounded.

    Args:
        key: from ``key_of``.
        start: first index, at least 0 and below 2**63 - count.
        count: elements.
        device: where to compute.
    """
    return normal_box(key, (start + count,), (start,), (count,), device)


def normal_box(
    key: Key,
    global_shape: Sequence[int],
    offset: Sequence[int],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """A box of the (virtual) tensor of ``global_shape`` that holds the normal stream of ``key`` in row-major order.

    Only the blocks that the box touches are computed: at most (n + 6) / n of the work, n being the length of
    the box's contiguous runs.

    Args:
        key: from ``key_of``.
        global_shape: shape of the whole tensor; up to 2**63 elements.
        offset: where the box begins.
        shape: extents of the box; ``offset + shape <= global_shape``.
        device: where to compute.

    Returns:
        The box, fp32, contiguous.

    Raises:
        ValueError: the box does not lie in the tensor.
    """
    if not len(global_shape) == len(offset) == len(shape) or any(
        low < 0 or extent < 0 or low + extent > size
        for low, extent, size in zip(offset, shape, global_shape, strict=True)
    ):
        raise ValueError(f"box at {tuple(offset)} of {tuple(shape)} must lie in a tensor of {tuple(global_shape)}")
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    outer, length = _runs(global_shape, shape)
    flat = out.view(-1, length)
    strides = [math.prod(global_shape[dim + 1 :]) for dim in range(len(global_shape))]
    base = sum(low * stride for low, stride in zip(offset, strides, strict=True))
    chunk = _chunk_of(out)
    if length >= chunk:
        for run, row in enumerate(flat):
            start = base + int(_run_starts(torch.tensor([run]), shape[:outer], strides))
            for at in range(0, length, 4 * chunk):
                _fill_run_(row[at : at + 4 * chunk], start + at, key)
        return out
    rows = max(1, chunk // _blocks_of(length))
    for run in range(0, len(flat), rows):
        part = flat[run : run + rows]
        starts = base + _run_starts(torch.arange(run, run + len(part)), shape[:outer], strides)
        if len(part) == 1:
            _fill_run_(part[0], int(starts), key)
        else:
            _fill_runs_(part, starts, key)
    return out


def _chunk_of(out: Tensor) -> int:
    return _CHUNK_CPU if out.device.type == "cpu" else _CHUNK_GPU


def _blocks_of(length: int) -> int:
    """Blocks that hold any run of ``length`` elements, wherever in a block it starts."""
    return (length + 6) // 4


def _runs(global_shape: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """Cut a box into contiguous runs: how many leading dims number the runs, and the elements of one."""
    outer = len(shape)
    length = 1
    while outer > 0:
        outer -= 1
        length *= shape[outer]
        if shape[outer] != global_shape[outer]:
            break
    return outer, length


def _run_starts(numbers: Tensor, outer_shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Flat index, from the box's first element, of the runs of these numbers."""
    starts = torch.zeros_like(numbers)
    for dim in reversed(range(len(outer_shape))):
        starts += (numbers % outer_shape[dim]) * strides[dim]
        numbers = numbers // outer_shape[dim]
    return starts


def _fill_run_(out: Tensor, start: int, key: Key) -> None:
    """Write to ``out`` (1-D) the normals that begin at ``start``; waits for no device."""
    first, lane = start >> 2, start & 3
    last = (start + len(out) + 3) >> 2
    block = torch.arange(first, last, dtype=torch.int64, device=out.device)
    out.copy_(_box_muller(*_words(block, _NORMAL, key)).view(-1)[lane : lane + len(out)])


def _fill_runs_(out: Tensor, starts: Tensor, key: Key) -> None:
    """Write to each row of ``out`` (2-D) the normals that begin at its start."""
    length = out.shape[1]
    blocks = torch.arange(_blocks_of(length), device=out.device)
    lanes = (starts & 3)[:, None] + torch.arange(length)
    starts = starts.to(out.device)
    block = (starts[:, None] >> 2) + blocks
    normals = _box_muller(*_words(block.view(-1), _NORMAL, key)).view(len(out), 4 * len(blocks))
    torch.gather(normals, 1, lanes.to(out.device), out=out)


def _words(block: Tensor, stream: int, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of the blocks with these 63-bit counters, 1-D."""
    low = block & _WORD
    return philox_rounds(low, block >> 32, torch.full_like(low, stream), torch.zeros_like(low), key)


def philox_rounds(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``philox`` of many counters at once: words in and out are uint32 held in int64; the inputs are kept."""
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two uint32 fills all 64 bits, so its shift by 32 drags the sign along: mask it off.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (second >> 32).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (first >> 32).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = second.bitwise_and_(_WORD), first.bitwise_and_(_WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _box_muller(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Four standard normals of each block, [blocks, 4] fp32: (w0, w1) and (w2, w3) give radius and angle."""
    out = torch.empty(w0.numel(), 4, dtype=torch.float32, device=w0.device)
    for lane, (radius_word, angle_word) in ((0, (w0, w1)), (2, (w2, w3))):
        radius = _minus_two_log(radius_word).sqrt_()
        # Two bits are the quarter turn, the other 30 an angle in (-pi/4, pi/4), where short series do.
        quarter = angle_word >> 30
        angle = (angle_word & 0x3FFFFFFF).double().add_(0.5 - 2.0**29).mul_(math.pi / 2 * 2.0**-30)
        sine, cosine = _sine_cosine(angle)
        radius.mul_((1 - (quarter & 2)).double())
        is_odd = (quarter & 1).bool()
        out[:, lane] = torch.where(is_odd, sine.neg(), cosine).mul_(radius)
        out[:, lane + 1] = torch.where(is_odd, cosine, sine).mul_(radius)
    return out


def _minus_two_log(word: Tensor) -> Tensor:
    """-2 ln((word + 1/2) / 2**32) in fp64 to 1e-11 relative, from exactly rounded operations only."""
    bits = word.double().add_(0.5).mul_(2.0**-32).view(torch.int64)
    # u = 2**exponent * m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh((m - 1) / (m + 1)).
    bits = bits + (_ONE_BITS - _SQRT_HALF_BITS)
    exponent = (bits >> 52).sub_(1023).double()
    m = bits.bitwise_and_(_FRACTION_BITS).add_(_SQRT_HALF_BITS).view(torch.float64)
    s = (m - 1.0).div_(m + 1.0)
    log = _polynomial(s * s, [1 / (2 * power + 1) for power in range(7)]).mul_(s).mul_(-4.0)
    return log.add_(exponent.mul_(-2 * math.log(2)))


def _sine_cosine(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine in fp64 of angles in [-pi/4, pi/4] by their series, to 1e-11."""
    square = angle * angle
    sine = _polynomial(square, [(-1) ** power / math.factorial(2 * power + 1) for power in range(6)])
    cosine = _polynomial(square, [(-1) ** power / math.factorial(2 * power) for power in range(7)])
    return sine.mul_(angle), cosine


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """sum of coefficients[n] * x**n by Horner's rule; each product and sum is rounded on its own, none fused."""
    value = x * coefficients[-1]
    for coefficient in reversed(coefficients[1:-1]):
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[0])
