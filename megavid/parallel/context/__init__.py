"""Context parallelism: exact attention over ranks that share the tokens of every pack.

``CPLayout`` says who holds which tokens, ``AttnPlan`` who attends to whom, ``ContextParallelAttention`` computes it;
with one rank it is the attention of every other run too.

    layout = CPLayout.contiguous(pack_tokens, mesh.context)
    attention = ContextParallelAttention(layout, mesh.context.plan.kind)
    out_tBNA = attention(q_tBNA, k_tBNA, v_tBNA, tuple(AttnPlan.packed(pack) for pack in packs))
"""
