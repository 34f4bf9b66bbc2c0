"""What one rank of a published run does: its products, memory-bound work and traffic, brought to the critical path.

Owns the layout rules of Megatron's engine for the models of ``reference``. The time is ``critical_path``'s, by the same
rules as for our own models; nothing here is fitted.
"""

from collections.abc import Mapping
from dataclasses import replace

from megavid.config.schema import require
from megavid.plan.critical_path import Stage
from megavid.plan.hardware import Hardware
from megavid.plan.kernels import Attention, Beside, Exchange, Product
from megavid.plan.reference import PublishedRun, ReferenceModel

SIZE = 2
"""Bytes of an activation or a weight (bf16)."""
OPTIMIZER_BYTES = 30
"""Bytes that Adam moves for each number that a rank updates: master and two moments both ways, gradient, weight."""
PARTS = ("self_attention", "cross_attention", "projections", "dense_ffn", "experts", "shared_expert", "router")
"""Parts of a layer that a forward pass done again can have."""
MODULES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "layernorm": ((), ("layernorm",)),
    "moe_act": ((), ("expert_activation",)),
    "moe": (("experts", "router", "shared_expert"), ("expert_activation", "permutation", "shared_activation")),
    "mla_up_proj": ((), ("rotary",)),
}
"""Megatron's names of modules that are computed again (``TransformerConfig.recompute_modules``): parts whose products
that repeats, and memory-bound operators. Of ``mla_up_proj``, a share of the projections besides."""


def stages_of(run: PublishedRun, model: ReferenceModel, hardware: Hardware) -> tuple[Stage, ...]:
    """The middle stage and the last one, which computes the output."""
    largest = run.stage_layers or -(-model.layers // run.pp)
    last = run.last_layers or largest
    if run.pp == 1:
        return (_Shard(run, model, hardware, largest, is_last=True).stage(),)
    middle = _Shard(run, model, hardware, largest, is_last=False).stage()
    return middle, _Shard(run, model, hardware, last, is_last=True).stage()


class _Shard:
    """One rank's share of a stage."""

    def __init__(
        self, run: PublishedRun, model: ReferenceModel, hardware: Hardware, layers: int, *, is_last: bool
    ) -> None:
        self.run, self.model, self.hardware, self.is_last = run, model, hardware, is_last
        self.span = run.micro_batch * run.sequence / run.cp
        self.own = self.span / run.tp
        # Leading dense layers sit on the first stage, which has no output: they count where there is one stage.
        self.dense = (model.dense_layers if run.pp == 1 else 0) if model.experts else layers
        self.moe = layers - self.dense
        if is_last:
            self.moe += model.extra_layers if model.experts else 0
            self.dense += 0 if model.experts else model.extra_layers
        self.outputs = (1 + model.extra_layers) if is_last and model.vocabulary else 0
        self.again = self._recomputed()

    @property
    def layers(self) -> int:
        return self.dense + self.moe

    def stage(self) -> Stage:
        model, run = self.model, self.run
        products = [_times(work, self.layers) for work in model.projections(self.span, run.tp)]
        if self.dense:
            products += [_times(work, self.dense) for work in model.feed_forward(self.span, run.tp, is_moe=False)]
        if self.moe:
            shared = [work for work in model.feed_forward(self.span, run.tp, is_moe=True) if work.part != "experts"]
            experts = model.expert_products(self.own, run.ep, run.etp)
            products += [_times(work, self.moe) for work in (*shared, *experts)]
        if self.outputs:
            products.append(Product("head", self.span, model.hidden, model.vocabulary / run.tp, self.outputs))
        is_dropless = bool(model.experts) and run.routing != "capacity"
        return Stage(
            products=tuple(products),
            attention=self._attention(),
            glue_bytes=sum(forward + backward for forward, backward in self._glue().values()),
            is_estimate=True,
            recompute=self.again,
            operators=70.0 * self.dense + 250.0 * self.moe,
            stalls=self.moe * (2 + self.again["experts"]) if is_dropless else 0.0,
            exchanges=tuple(self._exchanges()),
            optimizer_bytes=OPTIMIZER_BYTES * self._updated(),
        )

    def _attention(self) -> tuple[Attention, ...]:
        model, run = self.model, self.run
        seen, windowed = model.keys_seen(run.sequence)
        narrow = self.layers // 2 if model.window else 0
        queries = self.span / run.tp
        head = (model.head_size + (model.value_size or model.head_size)) / 2
        works = [
            Attention("self_attention", model.attention_flops(queries, keys) * layers, keys, head, run.cp > 1)
            for keys, layers in ((seen, self.layers - narrow), (windowed, narrow))
            if layers
        ]
        if model.text_length:
            flops = 4.0 * queries * model.text_length * model.hidden * self.layers
            works.append(Attention("cross_attention", flops, float(model.text_length), head))
        return tuple(works)

    def _recomputed(self) -> dict[str, float]:
        """Forward passes done again, by part; "glue" in thirds of all memory-bound bytes, as the critical path counts.

        Raises:
            ConfigError: a module that is not in ``MODULES``.
        """
        run = self.run
        again, glue = dict.fromkeys(PARTS, run.recompute_layers), self._glue()
        repeated = run.recompute_layers * sum(glue[name][0] for name in glue if name != "logits")
        for module in run.recompute_modules:
            require(module in MODULES, f"published run '{run.name}': unknown recompute module '{module}'")
            parts, operators = MODULES[module]
            again |= dict.fromkeys(parts, 1.0)
            repeated += sum(glue[name][0] for name in operators)
            if module == "mla_up_proj":
                again["projections"] = self.model.latent_share()
        total = sum(forward + backward for forward, backward in glue.values())
        return {**again, "glue": 3.0 * repeated / total}

    def _glue(self) -> dict[str, tuple[float, float]]:
        """Bytes of memory-bound operators, forward and backward: each reads its inputs and writes its outputs once.

        A fused Transformer Engine layer, in passes of the width: two norms, two residual sums, rotary embedding and
        layout changes of q, k, v, a norm of q and k, an activation, and with experts four permutations of their rows
        each way. A video layer modulates: 58 passes of the width, 30 of q and k (rotary embedding out of several
        operators), a third of them forward, from Megatron-Bridge's wan_layer_spec.py.
        """
        model, run = self.model, self.run
        width, own, size = float(model.hidden), self.own, SIZE * self.layers
        heads = (model.query_width + 2 * model.kv_width) / run.tp * self.span
        gates = (3, 5) if model.is_gated else (2, 3)
        if model.text_length:
            video = size * (58.0 * own + 80.0 * self.span / run.tp) * width / 3
            found = {"layer": (video, 2 * video)}
        else:
            found = {
                "layernorm": _passes(size * width * own, 4, 6),
                "residual": _passes(size * width * own, 6, 6),
                "rotary": _passes(size * heads, 4, 4),
            }
        if model.has_qk_norm:
            found["qk_norm"] = _passes(size * heads, 2, 3)
        found["activation"] = _passes(SIZE * self.dense * model.ffn / run.tp * self.span, *gates)
        rows, moe = own * model.top_k * run.etp, SIZE * self.moe
        found |= {
            "permutation": _passes(moe * width, 6 * rows + 5 * own, 6 * rows + 5 * own),
            "expert_activation": _passes(moe * rows * model.expert_ffn / run.etp, 3, 5),
            "shared_activation": _passes(moe * model.shared_ffn / run.tp * self.span, 3, 5),
            "logits": _passes(SIZE * self.span * model.vocabulary / run.tp * self.outputs, 4, 4),
        }
        return found

    def _updated(self) -> float:
        """Numbers that this rank's optimizer updates."""
        dense, experts = self._parameters()
        return dense / (self.run.dp * self.run.cp) + experts / max(self._edp(), 1)

    def _parameters(self) -> tuple[float, float]:
        """Parameters that this rank holds: its share of the dense ones, and of the experts."""
        model, run = self.model, self.run
        dense = self.dense * model.layer_parameters(is_moe=False)[0] / run.tp
        experts = 0.0
        if self.moe:
            shared, routed = model.layer_parameters(is_moe=True)
            dense, experts = dense + self.moe * shared / run.tp, self.moe * routed / (run.ep * run.etp)
        embeddings = model.hidden * model.vocabulary / run.tp * (2 if run.pp == 1 else 1)
        return dense + embeddings * self.is_last, experts

    def _edp(self) -> int:
        return self.run.gpus // (self.run.ep * self.run.etp * self.run.pp)

    def _exchanges(self) -> list[Exchange]:
        run, count = self.run, self.run.microbatches
        found = [*self._tensor(count), *self._experts(count), *self._data(count)]
        if run.cp > 1:
            keys = 2.0 * self.model.kv_width / run.tp * self.span * SIZE * self.layers
            # Keys and values go round forward and backward, their gradients once more.
            rounds = (run.cp - 1) * (2 + self.again["self_attention"]) + run.cp
            calls = rounds * self.layers * count
            found.append(self._exchange("cp", "send", calls, keys * rounds * count, run.cp, run.tp, "attention"))
        if run.pp > 1:
            sends = 2.0 * run.vpp * count
            size = self.own * self.model.hidden * SIZE * sends
            beside: Beside = "step" if "pp" in run.overlap else ""
            found.append(self._exchange("pp", "send", sends, size, run.pp, run.gpus // run.pp, beside))
        return found

    def _tensor(self, count: int) -> list[Exchange]:
        run, model = self.run, self.model
        if run.tp == 1:
            return []
        blocks = 2.0 * self.dense + self.moe + (self.layers if model.text_length else 0)
        blocks += self.moe if self.moe and model.shared_ffn else 0
        calls = blocks * (5 + 2 * self.again["projections"]) + 3 * self.outputs
        shard = self.own * model.hidden * SIZE * (run.tp - 1)
        beside: Beside = "pieces" if "tp" in run.overlap else ""
        found = [self._exchange("tp", "all_gather", calls * count, calls * shard * count, run.tp, 1, beside)]
        if run.etp > 1:
            calls = self.moe * (4 + 2 * self.again["experts"])
            shard = self.own * model.top_k * model.hidden * SIZE * (run.etp - 1)
            found.append(self._exchange("etp", "all_gather", calls * count, calls * shard * count, run.etp, 1))
        return found

    def _experts(self, count: int) -> list[Exchange]:
        run, model = self.run, self.model
        if run.ep == 1 or not self.moe:
            return []
        calls = self.moe * (4 + 2 * self.again["experts"]) * count
        size = calls * self.own * model.top_k * model.hidden * SIZE * (run.ep - 1) / run.ep
        beside: Beside = "neighbour" if "ep" in run.overlap else ""
        exchange = self._exchange("ep", "all_to_all", calls, size, run.ep, run.etp, beside)
        if run.dispatcher == "dedup" and exchange.ranks_per_domain < run.ep:
            domains = run.ep / exchange.ranks_per_domain
            visited = (domains - 1) * (1 - (1 - 1 / domains) ** model.top_k)
            remote = calls * self.own * model.hidden * SIZE * visited
            exchange = replace(exchange, remote_bytes=min(remote, size))
        return [exchange]

    def _data(self, count: int) -> list[Exchange]:
        run = self.run
        dense, experts = self._parameters()
        found = []
        for axis, numbers, size, stride in (
            ("dp", dense, run.dp * run.cp, run.tp),
            ("edp", experts, self._edp(), run.etp * run.ep),
        ):
            if size <= 1 or not numbers:
                continue
            share, buckets = numbers * (size - 1) / size, float(max(1, self.layers))
            if run.has_fsdp:
                sent = share * (2 * SIZE + run.gradient_bytes) * count
                found.append(self._exchange("fsdp", "all_gather", 3 * buckets * count, sent, size, stride, "step"))
                continue
            hidden = "dp" in run.overlap
            phases: tuple[tuple[str, int, Beside], ...] = (
                ("reduce_scatter", run.gradient_bytes, "last_backward"),
                ("all_gather", SIZE, "first_forward"),
            )
            for operation, width, beside in phases:
                sent = share * width
                found.append(self._exchange(axis, operation, buckets, sent, size, stride, beside if hidden else ""))
        return found

    def _exchange(
        self, axis: str, operation: str, calls: float, size: float, group: int, stride: int, beside: Beside = ""
    ) -> Exchange:
        near = self.hardware.ranks_per_domain(group, stride)
        return Exchange(axis, operation, calls, size, group, near, beside)


def _passes(size: float, forward: float, backward: float) -> tuple[float, float]:
    return size * forward, size * backward


def _times(work: Product, count: float) -> Product:
    return Product(work.part, work.rows, work.inner, work.columns, work.calls * count)
