"""Taking a command's own options out of its arguments, so that what is left are config keys.

Owns the two forms ``--name VALUE`` and ``--name=VALUE``. Config keys have a dot in their name, options have none.
"""

import math
from pathlib import Path

from megavid.config.load import preset_names
from megavid.errors import ConfigError


def take_all(argv: list[str], name: str) -> list[str]:
    """Remove every ``name`` with its value from ``argv`` and return the values, in order.

    Raises:
        ConfigError: one has no value.
    """
    values: list[str] = []
    kept: list[str] = []
    rest = iter(argv)
    for item in rest:
        if item == name:
            value = next(rest, None)
            if value is None or (value.startswith("--") and value != "--"):
                raise ConfigError(f"{name} needs a value: {name} VALUE")
            values.append(value)
        elif item.startswith(f"{name}="):
            values.append(item.partition("=")[2])
        else:
            kept.append(item)
    argv[:] = kept
    return values


def take_option(argv: list[str], name: str) -> str:
    """The value of an option that may come once; "" where it does not come.

    Raises:
        ConfigError: it comes twice, or has no value.
    """
    values = take_all(argv, name)
    if len(values) > 1:
        raise ConfigError(f"{name} was given {len(values)} times ({', '.join(values)}); give it once")
    return values[0] if values else ""


def take_flag(argv: list[str], name: str) -> bool:
    """Whether an option without a value is there; it is removed."""
    is_there = name in argv
    argv[:] = [item for item in argv if item != name]
    return is_there


def take_preset(argv: list[str]) -> tuple[str, tuple[str, ...]]:
    """The preset or file that comes first, and what is behind it: config keys.

    Raises:
        ConfigError: there is none.
    """
    if not argv or argv[0].startswith("-"):
        raise ConfigError(f"the first argument must be a preset ({', '.join(preset_names())}) or a .toml file")
    return argv[0], tuple(argv[1:])


def out_folder(text: str, what: str) -> Path:
    """The folder that ``--out`` names.

    Args:
        text: its value, "" where it did not come.
        what: is written there.

    Raises:
        ConfigError: it did not come.
    """
    if not text:
        raise ConfigError(f"--out DIR is missing: the folder that the {what} is written to")
    return Path(text)


def one_of(text: str, name: str, choices: tuple[str, ...]) -> str:
    """``text``, which must be one of ``choices``.

    Raises:
        ConfigError: it is none of them.
    """
    if text not in choices:
        raise ConfigError(f"{name} {text} must be one of {', '.join(choices)}")
    return text


def whole_number(text: str, name: str, *, default: int, minimum: int = 1) -> int:
    """``text`` as a number; ``default`` where it is "".

    Raises:
        ConfigError: it is none, or too small.
    """
    if not text:
        return default
    if not text.removeprefix("-").isdecimal() or int(text) < minimum:
        raise ConfigError(f"{name} {text} must be a whole number, at least {minimum}")
    return int(text)


def decimal_number(text: str, name: str, *, default: float, minimum: float) -> float:
    """``text`` as a number; ``default`` where it is "".

    Raises:
        ConfigError: it is none, or too small.
    """
    try:
        value = float(text) if text else default
    except ValueError:
        raise ConfigError(f"{name} {text} must be a number") from None
    if not value >= minimum:
        raise ConfigError(f"{name} {text} must be at least {minimum:g}")
    if not math.isfinite(value):
        raise ConfigError(f"{name} {text} must be a finite number")
    return value
