"""Processes that end with the one that started them.

Owns nothing but that: ranks must never outlive their launcher.
"""

import ctypes
import os
import signal
import sys
import threading
import time

from megavid import errors


def die_with_parent(parent: int) -> None:
    """Have this process killed when the process ``parent``, which started it, ends in any way, kill -9 included."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <linux/prctl.h>
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=_poll_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the line above
        os._exit(errors.RankLost.exit_code)


def _poll_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
