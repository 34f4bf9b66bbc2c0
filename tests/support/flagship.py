"""The largest preset in a layout to reckon with by hand: one chunk a stage, no context parallelism, no overlap."""

PLAIN = (
    "--parallel.tensor=4",
    "--parallel.context=1",
    "--parallel.pipeline=4",
    "--parallel.virtual_pipeline=1",
    "--parallel.expert=8",
    "--parallel.recompute=full",
    "--parallel.overlap_grad_reduce=false",
    "--parallel.overlap_param_gather=false",
)
"""Keys of ``wan_moe_100b_a20b``; those that a test gives after them win."""
