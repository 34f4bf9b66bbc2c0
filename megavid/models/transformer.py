"""megatron-core's TransformerConfig of a run: the record that its linears, MoE layer, schedules and optimizer read.

Owns the translation from megavid's config and layout; what megavid's own layers decide themselves is switched off here.
"""

from typing import Any

import torch

from megavid.config.schema import RunConfig
from megavid.parallel import mcore
from megavid.plan.layout import Layout


def transformer_config(config: RunConfig, layout: Layout, device: torch.device) -> Any:
    """The TransformerConfig of ``config`` in ``layout`` on ``device`` (megatron-core has no type stubs)."""
    model, moe, on_cpu = config.model, config.model.moe, device.type != "cuda"
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    experts: dict[str, Any] = {}
    if model.family == "wan_moe":
        experts = {
            "num_moe_experts": moe.num_experts,
            "moe_router_topk": moe.top_k,
            "moe_ffn_hidden_size": moe.expert_ffn_size,
            "moe_token_dispatcher_type": config.parallel.dispatcher,
            "moe_router_load_balancing_type": "none",  # megavid's routers bring their own losses, per clip
            "moe_router_dtype": "fp32",
            "moe_router_pre_softmax": True,  # not read, but megatron-core refuses top_k = 1 without it
            # Read by megavid's expert layer; the size makes megatron-core accept the overlap.
            "moe_shared_expert_intermediate_size": moe.shared_ffn_size or None,
            "moe_shared_expert_overlap": config.parallel.shared_expert_overlap,
            "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.etp,
        }
    return mcore.TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.ffn_size,
        add_bias_linear=False,  # for megatron-core's experts and router, whose biases megavid's own replace
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Values come from placements, box by box.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        # The loss is divided by the tokens of the global batch before the backward pass, so gradients are plain sums.
        calculate_per_token_loss=True,
        batch_p2p_comm=not on_cpu,  # gloo has no batched point-to-point on a single group of two
        deterministic_mode=False,  # Transformer Engine's switch; train.deterministic sets torch's and NCCL's
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **experts,
    )
