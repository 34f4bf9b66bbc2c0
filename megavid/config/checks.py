"""Checks that the tables of a run share: one line that says key, value and limit. Imports no torch."""

from megavid.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError(message)`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def at_least(table: str, minimum: float, **values: float) -> None:
    """Raise ``ConfigError`` for the first key of ``table`` (``values``: key to value) below ``minimum``."""
    for name, value in values.items():
        require(value >= minimum, f"{table}.{name} = {value} must be at least {minimum}")
