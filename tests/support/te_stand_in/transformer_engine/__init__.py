"""A stand-in for Transformer Engine: what megatron-core's wrappers of its linears use of it, in plain torch.

For tests of the wiring on CPU, in a process of its own that has this folder's parent on its path. Names and signatures
are those of Transformer Engine 2.9 (its pytorch/module/linear.py, pytorch/module/grouped_linear.py, pytorch/fp8.py and
common/recipe/__init__.py); rounding is simpler: one scale for a tensor in every recipe. Everything else that
megatron-core imports from it is a class that cannot be used.
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.9.0"
