"""Checkpoints: written aside, verified, renamed, then pointed to; readable by any layout.

The form on disk is in ``format``; a run saves through ``AsyncSaver`` and resumes with
``load(latest(folder), ...)``.
"""

from megavid.checkpoint.fence import Fence
from megavid.checkpoint.ranks import Ranks, SingleRank
from megavid.checkpoint.read import Checkpoint, load, verify
from megavid.checkpoint.retention import latest, list_steps, resolve, tidy
from megavid.checkpoint.saver import AsyncSaver, save

__all__ = [
    "AsyncSaver",
    "Checkpoint",
    "Fence",
    "Ranks",
    "SingleRank",
    "latest",
    "list_steps",
    "load",
    "resolve",
    "save",
    "tidy",
    "verify",
]
