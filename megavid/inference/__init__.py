"""What people serve: the trained model as a diffusers model, without megatron-core and without the trainer.

Needs torch and diffusers. ``import megavid.inference`` before ``WanPipeline.from_pretrained`` of a folder whose
``model_index.json`` names this package: diffusers imports nothing because a file says so.
"""

# diffusers looks for ModelMixin in the package that model_index.json names, to know how its classes are loaded.
from diffusers import ModelMixin

from megavid.inference.expert_parallel import load_expert_parallel
from megavid.inference.transformer import MegavidTransformer3DModel

__all__ = ["MegavidTransformer3DModel", "ModelMixin", "load_expert_parallel"]
