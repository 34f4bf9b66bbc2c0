"""What this host is called.

Owns the one rule: Slurm's name for the node where there is one, so that a name in a log is one that can be excluded.
"""

import os
import platform


def host_name() -> str:
    """This node as Slurm calls it, else the machine's own name."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()
