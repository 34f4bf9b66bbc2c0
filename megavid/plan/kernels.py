"""Seconds of one kernel or one collective: peaks and link rates times the efficiencies of the calibration.

Owns the four laws that every step time is made of (matrix products, attention, memory-bound work, transfers) and
nothing about models or schedules. Every law is smooth and monotone: a faster machine is never slower, more work never
takes less time.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megavid.plan.calibration import BESIDE, Calibration, CallCost
from megavid.plan.fp8 import Units
from megavid.plan.hardware import Hardware

BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of an activation by number format."""
GRADIENT_BYTES = 4
"""Bytes of a weight gradient; matrix products add to it in fp32."""


Beside = Literal[
    "", "pieces", "products", "shared_expert", "attention", "neighbour", "last_backward", "first_forward", "step"
]
"""What computation hides a collective."""


@dataclass(frozen=True, slots=True)
class Product:
    """Matrix products of one shape: ``calls`` times [rows, inner] x [inner, columns].

    Attributes:
        part: what the time is booked as, a part of ``megavid.plan.flops``.
        rows: tokens of one call.
        inner: width that is summed over.
        columns: width of the result.
        calls: in the forward pass of one microbatch.
        units: what multiplies, see ``megavid.plan.fp8``; "" for the run's number format.
        is_of_prompt: its rows are those of captions or images.
    """

    part: str
    rows: float
    inner: float
    columns: float
    calls: float = 1.0
    units: Units = ""
    is_of_prompt: bool = False

    @property
    def flops(self) -> float:
        """FLOPs of the forward pass."""
        return 2.0 * self.rows * self.inner * self.columns * self.calls


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounding of the operands of products in FP8, and turning them back.

    Attributes:
        part: that the products are booked as.
        forward_bytes: that it moves in the forward pass of one microbatch.
        backward_bytes: in the backward pass.
    """

    part: str
    forward_bytes: float
    backward_bytes: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one shape: the products of queries with keys and of weights with values.

    Attributes:
        part: "self_attention" or "cross_attention".
        flops: of the forward pass, all calls; a causal mask's empty half is not in it.
        keys: that a query sees on average.
        head_size: width of a head (the mean of its keys' and its values').
        is_ring: crosses context-parallel ranks by a ring, a piece of the keys at a time.
        units: what multiplies in the forward pass; "fp8", or anything else for the run's number format.
    """

    part: str
    flops: float
    keys: float
    head_size: float
    is_ring: bool = False
    units: Units = ""

    @property
    def exponentials(self) -> float:
        """Exponentials of the forward pass; the backward one computes them again."""
        return self.flops / (4.0 * self.head_size)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Collectives of one kind that one rank takes part in, over a whole step.

    Attributes:
        axis: "tp", "cp", "ep", "etp", "pp", "dp", "edp", or "fsdp" (weights gathered in every microbatch).
        operation: c10d's name.
        calls: of one step.
        bytes: that this rank sends in all of them.
        group_size: ranks of the group.
        ranks_per_domain: ranks of the group inside one NVLink domain.
        beside: what the engine computes while they run, see ``megavid.plan.critical_path``; "" for nothing.
        remote_bytes: of ``bytes``, what leaves the domain; None for what even shares give.
    """

    axis: str
    operation: str
    calls: float
    bytes: float
    group_size: int
    ranks_per_domain: int
    beside: Beside = ""
    remote_bytes: float | None = None


@dataclass(frozen=True)
class Machine:
    """A machine with its calibration, in one number format: seconds of kernels and collectives.

    Attributes:
        hardware: rates of every rank.
        calibration: what kernels and links reach of them.
        dtype: number format of the activations.
        is_crowded: other ranks compute at the same time, so that ``Calibration.crowding`` counts.
    """

    hardware: Hardware
    calibration: Calibration
    dtype: str = "bf16"
    is_crowded: bool = False

    @property
    def slowdown(self) -> float:
        """Seconds of computation over those of a rank that is alone."""
        return self.calibration.crowding if self.is_crowded else 1.0

    @property
    def operator_s(self) -> float:
        """Seconds of host time to issue one operator."""
        return self.calibration.operator_s * self.slowdown

    @cached_property
    def memory_rate(self) -> float:
        """Bytes/s that memory-bound kernels reach."""
        return self.hardware.memory_rate * self.calibration.memory_efficiency / self.slowdown

    @cached_property
    def product_rate(self) -> float:
        """FLOP/s that a matrix product of large operands reaches."""
        return self.hardware.peak_of(self.dtype) * self.calibration.matrix_efficiency / self.slowdown

    @cached_property
    def fp8_product_rate(self) -> float:
        """FLOP/s of a product on units for eight bits."""
        efficiency = self.calibration.matrix_efficiency * self.calibration.fp8_matrix_ratio
        return self.hardware.peak_of("fp8") * efficiency / self.slowdown

    @cached_property
    def turned_back_rate(self) -> float:
        """FLOP/s of a product of numbers in eight bits that were turned back: they are multiplied in fp32."""
        dtype = "fp32" if "fp32" in self.hardware.peak else self.dtype
        return self.hardware.peak_of(dtype) * self.calibration.matrix_efficiency / self.slowdown

    def product(self, work: Product) -> tuple[float, float]:
        """Forward and backward seconds: arithmetic, and the operands' way through memory on top of it.

        Adding both is what makes narrow products slow (few rows for each expert: its weights are read for little). The
        backward pass is two products, of which the one for the weights adds to fp32 gradients.
        """
        if work.units:
            return self._product_in_fp8(work)
        size = BYTES[self.dtype]
        arithmetic = work.flops / self.product_rate
        rows = work.rows * (work.inner + work.columns) * size
        weights = work.inner * work.columns
        forward = arithmetic + work.calls * (rows + weights * size) / self.memory_rate
        of_weights = arithmetic + work.calls * (rows + 2.0 * weights * GRADIENT_BYTES) / self.memory_rate
        return forward, forward + of_weights

    def _product_in_fp8(self, work: Product) -> tuple[float, float]:
        """The same of rounded operands, each of which is read at its own size; rounding them is ``rounding``.

        The gradient of a matrix is a tensor in the run's format, which is added to the fp32 one afterwards.
        """
        result = BYTES[self.dtype]
        operand, rate = (1, self.fp8_product_rate) if work.units == "fp8" else (GRADIENT_BYTES, self.turned_back_rate)
        if work.units != "fp8":
            result += 2 * GRADIENT_BYTES  # written in fp32, read, and written in the run's format
        arithmetic = work.flops / rate
        inputs, outputs = work.rows * work.inner, work.rows * work.columns
        weights = work.inner * work.columns
        of_output = (inputs + weights) * operand + outputs * result
        of_input = (outputs + weights) * operand + inputs * result
        of_weights = (outputs + inputs) * operand + weights * (result + BYTES[self.dtype] + 2 * GRADIENT_BYTES)
        forward, first, second = (
            arithmetic + work.calls * moved / self.memory_rate for moved in (of_output, of_input, of_weights)
        )
        return forward, first + second

    def rounding(self, work: Rounding) -> tuple[float, float]:
        """Forward and backward seconds of rounding."""
        return self.glue(work.forward_bytes), self.glue(work.backward_bytes)

    def attention(self, work: Attention) -> tuple[float, float]:
        """Forward and backward seconds of a fused kernel; the backward one does 2.5 times the products.

        Exponentials add to the products' time. That is what makes attention reach less of a Blackwell's peak than of
        a Hopper's, and less with narrow heads.
        """
        calibration = self.calibration
        filled = work.keys / (work.keys + calibration.attention_half_keys)
        filled *= calibration.ring_efficiency if work.is_ring else 1.0
        filled /= self.slowdown
        rate = self.hardware.peak_of(self.dtype) * calibration.attention_efficiency
        exponentials = work.exponentials / self.hardware.exponential_rate
        forward = work.flops / rate
        backward = 2.5 * forward / calibration.attention_backward_ratio
        if work.units == "fp8":  # as much less of its peak as a product reaches; exponentials are as many
            forward *= self.product_rate / self.fp8_product_rate
        return (forward + exponentials) / filled, (backward + exponentials) / filled

    def glue(self, bytes_moved: float, *, is_estimate: bool = False) -> float:
        """Seconds of memory-bound work of this many bytes, counted operator by operator or estimated by hand."""
        calibration = self.calibration
        factor = calibration.estimated_glue_factor if is_estimate else calibration.glue_factor
        return bytes_moved * factor / self.memory_rate

    def exchange(self, work: Exchange) -> float:
        """Seconds of the collectives of one step, whether hidden or not."""
        if work.group_size <= 1 or (work.bytes <= 0 and work.calls <= 0):
            return 0.0
        calibration, hardware = self.calibration, self.hardware
        measured = self._measured(work)
        if measured is not None:
            return work.bytes / measured.rate + work.calls * math.log2(work.group_size) * measured.latency_s
        nvlink = hardware.nvlink_rate * calibration.nvlink_efficiency
        network = hardware.network_rate * calibration.network_efficiency
        hops = math.log2(work.group_size)
        if work.ranks_per_domain >= work.group_size:
            return work.bytes / nvlink + work.calls * hops * calibration.nvlink_latency_s
        latency = work.calls * hops * calibration.network_latency_s
        if work.operation == "all_to_all":
            remote = work.remote_bytes
            if remote is None:
                remote = work.bytes * (work.group_size - work.ranks_per_domain) / (work.group_size - 1)
            exchange_rate = hardware.network_rate * calibration.alltoall_efficiency
            return max(remote / exchange_rate, (work.bytes - remote) / nvlink) + latency
        # A ring enters and leaves a domain once, over the network cards of all the group's ranks in it.
        lanes = work.ranks_per_domain if work.operation != "send" else 1
        return work.bytes / min(nvlink, lanes * network) + latency

    def _measured(self, work: Exchange) -> CallCost | None:
        """What this kind of collective was measured to cost; None where it was not, or leaves the domain."""
        calls = self.calibration.calls
        if work.ranks_per_domain < work.group_size:
            return None
        return (calls.get(work.operation + BESIDE) if work.beside else None) or calls.get(work.operation)
