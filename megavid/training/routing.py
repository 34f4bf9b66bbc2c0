"""What the routers did in a step, for every expert layer on every rank, and rows of router.jsonl.

Owns bringing the statistics of all pipeline stages together; what they say is ``megavid.models.moe.stats``'s.
"""

from collections.abc import Mapping

import torch

from megavid.config.schema import ModelConfig
from megavid.models.moe.stats import RoutingStats, summary
from megavid.models.moe.tokens import NOISE_BUCKETS
from megavid.parallel.mesh import Mesh

Routing = Mapping[int, RoutingStats]
"""Statistics of each expert layer over the global batch, on the host; empty for a dense model."""


def join_stages(model: ModelConfig, mesh: Mesh, routing: Routing) -> Routing:
    """Join the statistics of this rank's layers with those of the other stages.

    Ranks: collective over the pipeline; one small sum.
    """
    layers = [layer for layer in range(model.num_layers) if model.is_moe_layer(layer)]
    if not layers:
        return {}
    q, e = NOISE_BUCKETS, model.moe.num_experts
    shapes = [(q, e), (q, e), (q,), (q,), (q,), (), ()]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.zeros(len(layers), sum(sizes), dtype=torch.float64, device=mesh.device)
    for layer, stats in routing.items():
        flat[layers.index(layer)] = torch.cat([value.reshape(-1).double() for value in stats])
    rows = mesh.sum(flat, over="pp").cpu()
    return {
        layer: RoutingStats(*(part.view(shape) for part, shape in zip(row.split(sizes), shapes, strict=True)))
        for layer, row in zip(layers, rows, strict=True)
    }


def worst_figures(routing: Routing) -> dict[str, float]:
    """The worst of all layers, for a row of metrics.jsonl: how unbalanced, how undecided, how much was dropped."""
    figures = [summary(stats) for stats in routing.values()]
    if not figures:
        return {}
    return {
        "max_load": round(max(layer["max_load"] for layer in figures), 4),
        "load_entropy": round(min(layer["load_entropy"] for layer in figures), 4),
        "score_entropy": round(min(layer["score_entropy"] for layer in figures), 4),
        "dropped": round(max(layer["dropped"] for layer in figures), 6),
    }


def layer_rows(routing: Routing) -> dict[str, dict[str, object]]:
    """Every layer for router.jsonl: tokens of each expert, and entropy and drops per token, by noise bucket."""
    rows: dict[str, dict[str, object]] = {}
    for layer, stats in routing.items():
        tokens_Q = stats.tokens_Q.clamp(min=1)
        rows[str(layer)] = {
            "tokens": _whole(stats.tokens_Q),
            "counts": [_whole(counts_E) for counts_E in stats.counts_QE],
            "entropy": [round(value, 5) for value in (stats.entropy_Q / tokens_Q).tolist()],
            "dropped": [round(value, 6) for value in (stats.dropped_Q / tokens_Q).tolist()],
        }
    return rows


def _whole(values: torch.Tensor) -> list[int]:
    return [round(value) for value in values.tolist()]
