"""How near is equal: the one table of tolerances of the parity ladder. Loosening one needs a line in CHANGELOG.md.

Relative, unless the name says otherwise. Measured values lie one to three orders below.
"""

LAYER_FP64 = 1e-10
"""A layer on N ranks against its plain twin in fp64: outputs and gradients, relative to the largest element."""
LAYER_FP32 = 1e-5
"""The same in fp32."""
LOSS_FP32 = 1e-5
"""Loss of a step in one layout against another, fp32."""
GRAD_NORM_FP32 = 1e-4
"""Norm of the gradient of a step in one layout against another, fp32."""
WEIGHT_FP32 = 1e-4
"""A weight after three optimizer steps in one layout against another, norm of the gap relative to the norm."""
CLIP_FP32 = 1e-6
"""Loss of a clip in a pack with others, in any layout, against its loss alone on one rank, fp32."""
LATENTS_FP32 = 1e-5
"""Latents that a sampler gives in one layout against another, fp32, relative to the largest number."""
BF16_FACTOR = 2.0
"""In bf16: gap between two layouts, at most this often the gap between two reduction orders on one rank."""
EXACT = 0.0
"""Bitwise: resume in the same layout, resharded weights and optimizer state, random numbers."""
CONTEXT_FP64 = 1e-12
"""Absolute, numbers near 1: attention over context-parallel ranks against dense attention in fp64."""
CONTEXT_FP32 = 1e-5
"""The same in fp32."""
