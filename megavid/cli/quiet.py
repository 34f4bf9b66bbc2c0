"""Warnings of libraries that mean nothing to who starts a run, so that an error is one line and output is our own.

Owns the list; every entry says why it may go. ``megavid doctor`` says what is installed.
"""

import warnings

SILENCED: tuple[tuple[str, type[Warning], str], ...] = (
    (r".*Apex (is|are) not installed", UserWarning, "optional; said by doctor"),
    (r".*Transformer Engine.* not installed", UserWarning, "optional; said by doctor"),
    (r".*`torch\.distributed\.\w+` is deprecated", FutureWarning, "megatron-core's calls, right until it moves on"),
    (r"full scope is deprecated", UserWarning, "megatron-core warns of its own default"),
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning, "megatron-core looks, on purpose"),
)
"""Beginning of the message, category, why."""


def silence_known_warnings() -> None:
    """Leave out the warnings of ``SILENCED`` in this process and the ranks that it forks."""
    for message, category, _ in SILENCED:
        warnings.filterwarnings("ignore", message=message, category=category)
