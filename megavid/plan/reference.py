"""Published models and runs: sizes, layouts and figures, as the hindcast reads them.

Owns ``ReferenceModel`` (GPT-like language models, dense or with experts, and dense video transformers; its products and
FLOPs) and ``PublishedRun`` (one line of a published table with its layout). What a rank of such a run does is
``reference_stage``'s; nothing here is read when one of our own models is planned.
"""

from dataclasses import dataclass
from typing import Literal

from megavid.config.schema import require
from megavid.plan.critical_path import Schedule
from megavid.plan.kernels import Product


@dataclass(frozen=True, kw_only=True)
class ReferenceModel:
    """Sizes of a published model.

    Attributes:
        layers: transformer layers, all of them with experts but the first ``dense_layers``.
        hidden: width.
        heads: query heads.
        kv_heads: key and value heads.
        head_size: width of a head; of its keys under latent attention.
        value_size: width of a head's values; 0 for ``head_size``.
        ffn: hidden width of a dense feed-forward.
        is_gated: three matrices instead of two.
        experts: of a layer; 0 for a dense model.
        top_k: experts of a token.
        expert_ffn: hidden width of one.
        shared_ffn: hidden width of the shared expert.
        dense_layers: leading layers without experts.
        vocabulary: rows of the output matrix; 0 for a video model.
        text_length: keys of cross-attention; 0 for none.
        is_causal: half of the attention matrix is empty.
        window: keys that every second layer's queries see at most; 0 for no such layers.
        has_qk_norm: normalises queries and keys.
        query_rank: width that queries are squeezed to (latent attention); 0 for none.
        kv_rank: width that keys and values are squeezed to, rotary part included.
        extra_layers: layers that predict tokens further ahead, with an output each; on the last stage.
        family: key of the model that this one is a cut of (fewer layers); empty for none.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int = 0
    value_size: int = 0
    is_gated: bool = True
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    vocabulary: int = 0
    text_length: int = 0
    is_causal: bool = True
    window: int = 0
    has_qk_norm: bool = False
    query_rank: int = 0
    kv_rank: int = 0
    extra_layers: int = 0
    family: str = ""

    @property
    def query_width(self) -> int:
        """All heads' queries."""
        return self.heads * self.head_size

    @property
    def value_width(self) -> int:
        """All heads' outputs."""
        return self.heads * (self.value_size or self.head_size)

    @property
    def kv_width(self) -> int:
        """All heads' keys."""
        return self.kv_heads * self.head_size

    @property
    def up_matrices(self) -> int:
        """Matrices that widen in a feed-forward."""
        return 2 if self.is_gated else 1

    def projections(self, rows: float, tp: int) -> tuple[Product, ...]:
        """Products around self-attention (and cross-attention) of one layer, for ``rows`` tokens inside a tp group."""
        hidden, out = self.hidden, Product("projections", rows, self.value_width / tp, self.hidden)
        if self.query_rank:
            latent = self.kv_rank - 64  # without the rotary part
            expanded = self.heads * (self.head_size - 64 + self.value_size)
            return (
                Product("projections", rows / tp, hidden, self.query_rank + self.kv_rank),
                Product("projections", rows, self.query_rank, self.query_width / tp),
                Product("projections", rows, latent, expanded / tp),
                out,
            )
        products = [Product("projections", rows, hidden, (self.query_width + 2 * self.kv_width) / tp), out]
        if self.text_length:
            products += [Product("projections", rows, hidden, hidden / tp, calls=2)]
        return tuple(products)

    def latent_share(self) -> float:
        """Of the projections' FLOPs, those that widen the squeezed queries, keys and values (latent attention)."""
        flops = [product.flops for product in self.projections(1.0, 1)]
        return (flops[1] + flops[2]) / sum(flops)

    def attention_flops(self, tokens: float, seen: float) -> float:
        """Forward FLOPs of self-attention of one layer for ``tokens`` queries that see ``seen`` keys each."""
        return 2.0 * (self.query_width + self.value_width) * tokens * seen

    def keys_seen(self, sequence: int) -> tuple[float, float]:
        """Average keys of a query in layers without and with a window."""
        full = sequence / 2 if self.is_causal else float(sequence)
        return full, min(float(self.window), full) if self.window else full

    def layer_parameters(self, *, is_moe: bool) -> tuple[float, float]:
        """Parameters of one layer: those that every rank of a tp group shares in, and those of its experts."""
        flops = sum(product.flops for product in self.projections(1.0, 1)) / 2
        text = 2.0 * self.hidden**2 if self.text_length else 0.0
        matrices = self.up_matrices + 1
        if not is_moe:
            return flops + text + matrices * self.hidden * self.ffn, 0.0
        dense = flops + matrices * self.hidden * self.shared_ffn + self.hidden * self.experts
        return dense, float(self.experts * matrices * self.hidden * self.expert_ffn)

    def published_flops(self, sequence: int, counted: Literal["half", "full"]) -> float:
        """Forward and backward FLOPs of one sequence as published tables count them.

        Args:
            sequence: tokens.
            counted: "half" counts half of a causal attention matrix (Megatron since 2025), "full" all of it.
        """
        total = 0.0
        seen, windowed = self.keys_seen(sequence)
        factor = 2.0 if self.is_causal and counted == "full" else 1.0
        for layer in range(self.layers + self.extra_layers):
            keys = windowed if self.window and layer % 2 else seen
            is_moe = bool(self.experts) and layer >= self.dense_layers
            total += self.attention_flops(sequence, keys) * factor
            total += sum(product.flops for product in self.feed_forward(sequence, 1, is_moe=is_moe))
            total += sum(product.flops for product in self.projections(sequence, 1))
            if self.text_length:
                total += 4.0 * sequence * self.text_length * self.hidden + 4.0 * self.text_length * self.hidden**2
        return 3.0 * (total + 2.0 * sequence * self.hidden * self.vocabulary * (1 + self.extra_layers))

    def feed_forward(self, rows: float, tp: int, *, is_moe: bool) -> tuple[Product, ...]:
        """Products of one layer's feed-forward with all experts as one; ``expert_products`` has the real shapes."""
        if not is_moe:
            return self._pair("dense_ffn", rows, self.ffn / tp, 1.0)
        shared = self._pair("shared_expert", rows, self.shared_ffn / tp, 1.0) if self.shared_ffn else ()
        router = Product("router", rows / tp, self.hidden, self.experts)
        return (*shared, router, *self._pair("experts", rows * self.top_k, self.expert_ffn / tp, 1.0))

    def expert_products(self, own: float, ep: int, etp: int) -> tuple[Product, ...]:
        """Products of a rank's experts: each its share of the rows that ``own`` tokens of each rank send."""
        rows = own * etp * self.top_k * ep / self.experts
        return self._pair("experts", rows, self.expert_ffn / etp, self.experts / ep)

    def _pair(self, part: str, rows: float, width: float, calls: float) -> tuple[Product, ...]:
        up = Product(part, rows, self.hidden, width * self.up_matrices, calls)
        return up, Product(part, rows, width, self.hidden, calls)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a measurement is from.

    Attributes:
        publisher: who measured; all of a publisher's rows are left out together in the strictest error.
        title: of the page or the paper.
        address: where its figure is.
        recipe: where its layout is, if not at the address.
    """

    publisher: str
    title: str
    address: str
    recipe: str = ""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One published measurement with its layout.

    Attributes:
        name: short, unique.
        source: where it is from.
        model: key of the model table.
        hardware: as in ``hardware.toml``.
        gpus: ranks.
        sequence: tokens of a sequence or a clip.
        micro_batch: sequences of a microbatch.
        global_batch: sequences of a step.
        seconds: of a step, where published.
        tokens_per_gpu_s: where published instead.
        tflops: TFLOP/s and GPU, where published instead.
        counted: how ``tflops`` counts causal attention.
        routing: "forced" (balanced by force), "capacity" (padded or dropped to a fixed size), "real".
        dispatcher: "alltoall" sends every copy of a token; "dedup" (DeepEP, HybridEP) one for each node.
        overlap: axes whose communication runs beside computation: "tp", "dp", "ep", "pp".
        has_fsdp: weights are sharded over data parallelism and gathered in every microbatch.
        recompute_layers: share of the layers whose whole forward pass is done again.
        recompute_modules: modules of every layer that are done again, as Megatron's ``--recompute-modules`` names them.
        gradient_bytes: of a gradient while it is reduced.
        stage_layers: layers of the largest stage; 0 for an even split.
        last_layers: layers of the last stage, which has the output too; 0 for ``stage_layers``.
        note: what the row assumes beyond its source.
    """

    name: str
    source: Source
    model: str
    hardware: str
    gpus: int
    sequence: int
    global_batch: int
    micro_batch: int = 1
    seconds: float = 0.0
    tokens_per_gpu_s: float = 0.0
    tflops: float = 0.0
    counted: Literal["half", "full"] = "half"
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    routing: Literal["forced", "capacity", "real"] = "forced"
    dispatcher: Literal["alltoall", "dedup"] = "alltoall"
    overlap: tuple[str, ...] = ()
    has_fsdp: bool = False
    recompute_layers: float = 0.0
    recompute_modules: tuple[str, ...] = ()
    gradient_bytes: int = 4
    stage_layers: int = 0
    last_layers: int = 0
    note: str = ""

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def microbatches(self) -> int:
        """Of one pipeline in a step."""
        return self.global_batch // (self.micro_batch * self.dp)

    def published_seconds(self, model: ReferenceModel) -> float:
        """Seconds of a step that the source states or implies."""
        if self.seconds:
            return self.seconds
        if self.tokens_per_gpu_s:
            return self.global_batch * self.sequence / (self.gpus * self.tokens_per_gpu_s)
        require(self.tflops > 0, f"published run '{self.name}' has neither seconds, tokens_per_gpu_s nor tflops")
        return self.global_batch * model.published_flops(self.sequence, self.counted) / (self.gpus * self.tflops * 1e12)

    def schedule(self, imbalance: float) -> Schedule:
        """How its microbatches run; ``imbalance`` holds for real routing only."""
        factor = imbalance if self.routing == "real" and self.ep > 1 else 1.0
        return Schedule(self.microbatches, self.pp, self.vpp, factor)
