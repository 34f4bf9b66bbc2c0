"""The part of ``--help`` that comes from the schema: every config key with type, default and one-line text.

Owns how tyro is asked; the words are the schema's field strings.
"""

import contextlib
import io

import tyro

from megavid.config.schema import RunConfig

_INTRODUCTION = "Config keys: --section.key VALUE or --section.key=VALUE; booleans take true or false."


def config_help(default: RunConfig | None = None) -> str:
    """Text of every key of ``RunConfig``, grouped by table, with the values of ``default`` as defaults."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(
            RunConfig,
            prog="megavid",
            default=RunConfig() if default is None else default,
            args=["--help"],
            use_underscores=True,
            # Every key takes a value, booleans too, and tuples are written 1,2,2: that is what the loader reads.
            config=(tyro.conf.FlagConversionOff,),
        )
    # tyro opens with a usage line and its own --help; the command that calls this has said both.
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    first = next(number for number, line in enumerate(lines) if line.strip() == "model options")
    return "\n".join(
        [
            "Config keys: --section.key VALUE or --section.key=VALUE; booleans take true or false.",
            "",
            *lines[first:],
        ]
    )
