"""Weights come in from open models and leave for the stacks that serve them, tensor by tensor and checked.

``open_model`` reads any layout into a ``ModelSource``, a model in model space that has not been read yet;
``write_model`` writes one in any layout. What lies between (upcycling) is a function from source to source.
"""

from megavid.checkpoint.convert.lazy import LazyTensor, stacked
from megavid.checkpoint.convert.source import ModelSource, open_model
from megavid.checkpoint.convert.write import write_model

__all__ = ["LazyTensor", "ModelSource", "open_model", "stacked", "write_model"]
