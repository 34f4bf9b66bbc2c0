"""The ``megavid`` command: picks the command, and turns errors into one line and an exit status.

Owns the list of commands and what an error looks like; each command is ``megavid/cli/<command>.py`` with
``HELP`` (one line) and ``main(argv) -> int``. A command's module imports torch inside its functions, so that
help answers at once.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from megavid import __version__
from megavid.errors import ConfigError, MegavidError, StorageError, tell_job

COMMANDS = (
    "train", "sample", "plan", "profile", "prepare", "convert", "upcycle", "inspect", "status", "replay", "diff",
    "launch", "preflight", "doctor",
)  # fmt: skip
"""Every command, in the order of ``megavid --help``."""

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_EXAMPLES = """\
Examples:
  megavid doctor                                    what this machine has, and what is therefore on or off
  megavid train tiny --out runs/tiny --ranks 4 --parallel.tensor 2 --parallel.expert 2
  megavid train tiny --out runs/tiny --ranks 4 --parallel.pipeline 2      goes on in another layout
  megavid plan wan_14b --world-size 64 --gpu h100-80gb --search           what it takes, and the best layout
  megavid sample runs/tiny/checkpoints/latest --prompt "a red circle" --out circle.mp4
  megavid convert runs/tiny tiny_inference --to diffusers --ema           weights for inference stacks, checked
  megavid profile tiny --out profiles/tiny --ranks 2 --parallel.expert 2  MFU, and where the time of a step goes
  megavid status runs/tiny                          running, stopped, crashed or hung; step, ETA, last checkpoint
  torchrun --nproc-per-node 8 -m megavid train wan_moe_7b_a2b --out runs/7b --data.path SHARDS

Exit status: 0 done; 2 bad input; 3 storage or machine fault; 4 numerical stop; 5 lost or hung rank;
75 stopped on request, may be queued again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: arguments after the program's name; None for the process's own.
    """
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv) or ["--help"])
    except Exception:  # that nobody expected
        tell_job(1)
        raise
    tell_job(status)
    return status


def _run(argv: list[str]) -> int:
    try:
        status = _dispatch(argv)
        sys.stdout.flush()  # here, so that a reader who left is noticed here
    except MegavidError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # `megavid inspect X | head` is no error, but the interpreter would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        return _fail(f"{error.filename or 'storage'}: {error.strerror}", StorageError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + 2)
    return status


def _dispatch(argv: list[str]) -> int:
    command, *rest = argv
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command in ("-V", "--version", "version"):
        print(f"megavid {__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}; {hint}")
    status: int = importlib.import_module(f"megavid.cli.{command}").main(rest)
    return status


def _fail(message: str, status: int) -> int:
    print(f"megavid: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {importlib.import_module(f'megavid.cli.{name}').HELP}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: megavid COMMAND ...",
            "",
            "Trains mixture-of-experts video diffusion transformers in any parallel layout, on CPU or GPUs.",
            "",
            "Commands (each has its own --help):",
            *rows,
            "",
            _EXAMPLES,
        ]
    )
