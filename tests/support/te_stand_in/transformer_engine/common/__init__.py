"""What is common to all frameworks: the recipes."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
