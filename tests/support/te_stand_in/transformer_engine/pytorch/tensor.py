"""Tensors in eight bits: a class that no tensor of the stand-in is of."""


class QuantizedTensor:
    """Base of all of Transformer Engine's."""
