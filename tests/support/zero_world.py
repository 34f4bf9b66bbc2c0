"""Jobs of the pool's ranks under DeepSpeed, which keeps the world of the job before in its modules."""

import importlib
from collections.abc import Callable
from typing import Any


def anew(function: Callable[..., Any], *args: Any) -> Any:
    """Job: ``function(*args)``, with a DeepSpeed that has seen no world yet."""
    for module in ("deepspeed.utils.groups", "deepspeed.comm.comm"):
        names = vars(importlib.import_module(module)) if DS.get("seen") else {}
        for name in [name for name in names if name in ("_WORLD_GROUP", "_DATA_PARALLEL_GROUP", "mesh_device", "cdb")]:
            names[name] = None
    DS["seen"] = True
    return function(*args)


DS: dict[str, bool] = {}
"""Whether a job of this process has used it."""
