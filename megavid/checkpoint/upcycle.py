"""A dense model as a mixture of experts that computes the same function: which part of which tensor each expert is.

Owns the shape of the upcycled model, the conditions under which it equals the dense one, and the map from its tensors
to the dense ones, each read lazily. Reading and writing files is not its business.

A dense feed-forward of hidden width H is copied ``copies = experts / granularity`` times, and every copy is cut along
its hidden width into ``granularity`` experts of width H / granularity, numbered one after another. The router's rows of
one copy (a virtual group) are equal; those of different copies are drawn anew. Why this is the dense function, for any
input, any drawn rows and any balancing bias that is the same for the experts of a copy:

1. The scores of a copy's experts are equal, and so are the numbers by which they are selected. They stand next to each
   other, and ties go to the lower number, so the order of selection is one of whole copies, even where two copies tie;
   a top-k that is a multiple of the granularity takes whole copies.
2. Sigmoid: with s_c the score of copy c and S their sum over the selected copies, an expert's gate is
   route_scale * s_c / (granularity * S), which with route_scale = granularity is s_c / S. Softmax has no route_scale:
   its gate is s_c / (granularity * S), and the second matrix is multiplied by the granularity instead.
3. The experts of a copy add up to the dense feed-forward but for its second bias, as the hidden units are independent
   of each other up to the second matrix. Each expert has a granularity-th of that bias (softmax: all of it), so a
   copy's gated sum is s_c / S times the dense output, and those sum to the dense output.

Nothing inside the nonlinearity is scaled, so this holds for every activation. It does not hold where a gate is no share
of a sum: one expert for each token (its gate is its score) and expert choice; these are refused. It is exact but for
the rounding of sums, given that equal rows give equal scores: where a matrix product sums its columns in different
orders (on CPUs at odd sizes), the scores of a copy differ in the last bit, and a token for which two copies tie to that
bit may get parts of both. The smaller the drawn rows, the likelier that is, hence rows of a fresh router's size.

Source: "Upcycling Large Language Models into Mixture of Experts" (arXiv:2410.07524), virtual-group initialisation;
there the expert weights are scaled instead.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megavid.checkpoint.convert import LazyTensor, ModelSource
from megavid.checkpoint.convert.tables import expected_tensors
from megavid.config.schema import ModelConfig, MoEConfig, require
from megavid.ops.philox import key_of, normal_box

MAX_NOISE = 2.0
"""Largest deviation of the router's logits at the start."""

_EXPERT = re.compile(r"(blocks\.\d+)\.moe\.experts\.(\d+)\.(up|down)\.(weight|bias)")
_ROUTER = re.compile(r"blocks\.\d+\.moe\.router\.(weight|expert_bias)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Upcycling:
    """What experts a dense model becomes.

    Attributes:
        num_experts: routed experts of one layer.
        top_k: experts that each token goes to; a multiple of the granularity.
        granularity: experts that one copy of the dense feed-forward is cut into.
        router: how experts are scored; the identity holds for both.
        dense_first: layers at the beginning that stay dense.
        dense_last: layers at the end that stay dense.
        seed: of the router's rows.
        noise: standard deviation of the router's logits for an input of unit variance; 1 is a fresh router's.
    """

    num_experts: int
    top_k: int
    granularity: int
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    dense_first: int = 0
    dense_last: int = 0
    seed: int = 1234
    noise: float = 1.0

    @property
    def copies(self) -> int:
        """Copies of the dense feed-forward."""
        return self.num_experts // self.granularity

    def model_of(self, dense: ModelConfig) -> ModelConfig:
        """The config of the upcycled model.

        Raises:
            ConfigError: the source is not dense, the sizes do not divide, or the result would not be the dense
                function.
        """
        self._check(dense)
        moe = MoEConfig(
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_ffn_size=dense.ffn_size // self.granularity,
            router=self.router,
            route_scale=float(self.granularity) if self.router == "sigmoid" else 1.0,
            dense_first=self.dense_first,
            dense_last=self.dense_last,
        )
        return replace(dense, family="wan_moe", moe=moe)

    def _check(self, dense: ModelConfig) -> None:
        experts, top_k, pieces = self.num_experts, self.top_k, self.granularity
        require(dense.family == "wan", f"upcycling needs a dense model (family wan), got family {dense.family}")
        require(pieces >= 1, f"--granularity {pieces} must be at least 1")
        require(
            dense.ffn_size % pieces == 0,
            f"--granularity {pieces} must divide the dense model's ffn_size = {dense.ffn_size}",
        )
        require(
            experts >= pieces and experts % pieces == 0,
            f"--granularity {pieces} must divide --experts {experts}, so that every copy of the feed-forward is whole",
        )
        require(
            self.router in ("sigmoid", "softmax"),
            f"--router {self.router} cannot give the dense function at step 0: its gates are no shares of a sum over a "
            "token's experts; choose sigmoid or softmax",
        )
        require(
            pieces <= top_k <= experts and top_k % pieces == 0,
            f"--top-k {top_k} must be a multiple of --granularity {pieces}, at most --experts {experts}: a token goes "
            "to whole copies of the feed-forward",
        )
        require(
            top_k > 1,
            f"--top-k {top_k} cannot give the dense function at step 0: a single expert's gate is its score, not a "
            "share of a sum; set --top-k 2 or more",
        )
        require(
            0 < self.noise <= MAX_NOISE,
            f"--noise {self.noise} must be above 0, or all tokens go to the same experts, and at most {MAX_NOISE:g}, "
            "where sigmoid scores begin to be all 1 or 0",
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor of the upcycled model as a part of a dense one, times a factor.

    Attributes:
        source: name of the dense tensor.
        dim: what is cut, 0 for rows and 1 for columns; -1 where the whole tensor is taken.
        part: which of ``parts`` equal parts.
        parts: how many.
        factor: on every number; 1 leaves them bitwise.
    """

    source: str
    dim: int = -1
    part: int = 0
    parts: int = 1
    factor: float = 1.0


def cut_of(name: str, how: Upcycling) -> Cut | None:
    """Where the tensor ``name`` of the upcycled model comes from; None for the router's, which are new."""
    if _ROUTER.fullmatch(name):
        return None
    match = _EXPERT.fullmatch(name)
    if match is None:
        return Cut(name)
    block, expert, matrix, kind = match.groups()
    source, part, parts = f"{block}.ffn.{matrix}.{kind}", int(expert) % how.granularity, how.granularity
    # What is missing in the gates for their sum to be the granularity.
    missing = 1.0 if how.router == "sigmoid" else float(parts)
    if matrix == "up":
        return Cut(source, 0, part, parts)
    if kind == "weight":
        return Cut(source, 1, part, parts, missing)
    return Cut(source, factor=missing / parts)


def upcycled(source: ModelSource, how: Upcycling) -> ModelSource:
    """The upcycled model, its tensors in model space; nothing is read yet.

    Args:
        source: a dense model.
        how: what to make of it.

    Raises:
        ConfigError: see ``Upcycling.model_of``.
    """
    model = how.model_of(source.config)
    last_read = _LastRead()
    found: dict[str, LazyTensor] = {}
    for name, shape in expected_tensors(model).items():
        cut = cut_of(name, how)
        if cut is None:
            found[name] = _router_tensor(name, shape, how)
            continue
        dense = source.tensors[cut.source]
        if cut.dim == 0:
            dense = _rows_of(dense, cut, shape)
        elif cut.dim == 1:
            dense = _columns_of(dense, cut, shape, last_read)
        found[name] = _scaled(dense, cut.factor)
    return source.with_model(model, found)


def _rows_of(dense: LazyTensor, cut: Cut, shape: tuple[int, ...]) -> LazyTensor:
    """Part of a dense tensor whose rows are cut: one range of its elements."""
    first, fetch = cut.part * math.prod(shape), dense.fetch
    return replace(dense, shape=shape, fetch=lambda start, stop: fetch(first + start, first + stop), key="")


def _columns_of(dense: LazyTensor, cut: Cut, shape: tuple[int, ...], last_read: "_LastRead") -> LazyTensor:
    """Part of a dense matrix whose columns are cut; they are strewn over all of it."""
    width = shape[1]

    def fetch(start: int, stop: int) -> Tensor:
        own = last_read.read(dense)[:, cut.part * width : (cut.part + 1) * width]
        first, last = start // width, -(-stop // width)
        return own[first:last].reshape(-1)[start - first * width : stop - first * width]

    return replace(dense, shape=shape, fetch=fetch, key="")


def _scaled(dense: LazyTensor, factor: float) -> LazyTensor:
    """A tensor times a number; with factor 1 the tensor itself."""
    if factor == 1.0:
        return dense
    fetch = dense.fetch
    return replace(dense, fetch=lambda start, stop: fetch(start, stop) * factor, key="")


def _router_tensor(name: str, shape: tuple[int, ...], how: Upcycling) -> LazyTensor:
    """The router's rows, equal within a copy of the feed-forward and drawn for each; or its balancing bias, zero."""
    where = f"router drawn with seed {how.seed}"
    if len(shape) == 1:
        return LazyTensor(shape, torch.float32, lambda start, stop: torch.zeros(stop - start), where)
    width = shape[1]

    def fetch(start: int, stop: int) -> Tensor:
        drawn = normal_box(key_of(how.seed, "upcycle", name), (how.copies, width), (0, 0), (how.copies, width))
        rows: Tensor = (drawn * (how.noise * width**-0.5)).repeat_interleave(how.granularity, dim=0)
        return rows.view(-1)[start:stop]

    return LazyTensor(shape, torch.float32, fetch, where)


class _LastRead:
    """The dense matrix that was read last, whole: the experts of a layer take one part of it after another."""

    def __init__(self) -> None:
        self._tensor: LazyTensor | None = None
        self._value = torch.empty(0)

    def read(self, tensor: LazyTensor) -> Tensor:
        """The whole of a matrix; not to be written to."""
        if tensor is not self._tensor:
            self._tensor, self._value = None, torch.empty(0)  # before the next one is read: one at a time
            self._value, self._tensor = tensor.read(), tensor
        return self._value
