"""The strict loader: TOML tables and ``--section.key value`` flags become the schema's frozen dataclasses.

Owns reading, merging, type checks and writing. Precedence: defaults of the schema < ``base`` preset (one
level) < preset < its entry of ``[layouts]`` for this world size < flags. What values mean together is the schema's and
``megavid.plan.layout``'s. Every error is one ``ConfigError`` line.

tyro renders ``--help`` from the same dataclasses, but does not parse: its errors
are boxes of several lines, it reads no files, and a misspelt key in a file and on the command line should
read the same.
"""

import dataclasses
import difflib
import functools
import json
import math
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from megavid.config.schema import ParallelConfig, RunConfig
from megavid.errors import ConfigError

Config = TypeVar("Config")
DEGREES = tuple(
    f"parallel.{name}" for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
)
"""Keys that say how many ranks share what: one of them as a flag replaces the preset's ``[layouts]``."""
_WORDS = {"true": True, "false": False}


def load_run(preset_or_path: str, overrides: Sequence[str], *, world_size: int = 0) -> RunConfig:
    """Read a preset by name, or a ``.toml`` file, and lay the flags over it.

    Args:
        preset_or_path: name of a preset of the package (``tiny``), or a path that ends in ``.toml``.
        overrides: ``--section.key value`` or ``--section.key=value`` items; where a key comes twice, the last
            one counts.
        world_size: ranks of the run: the preset's ``[layouts]`` entry for that many is laid over its ``[parallel]``,
            unless a flag names a degree (``DEGREES``): then the layout is chosen by hand. 0 for no such entry.

    Raises:
        ConfigError: no such preset or file, broken TOML, an unknown key, a wrong type, a value out of range.
    """
    layer = _read_layers(preset_or_path)
    table, flags = layer.table, list(_pairs(overrides))
    if world_size in layer.layouts and not any(key in DEGREES for key, _ in flags):
        _merge(table, {"parallel": layer.layouts[world_size]})
    return _built(table, flags)


def with_flags(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """``config`` with flags laid over it, as ``load_run`` lays them over a preset.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range.
    """
    return _built(dataclasses.asdict(config), _pairs(overrides))


def from_table(cls: type[Config], table: dict[str, Any], path: str = "") -> Config:
    """Build one dataclass of the schema from one table, strictly.

    Args:
        cls: a dataclass of the schema.
        table: what ``tomllib`` gave.
        path: dotted name of the table, for messages.
    """
    return _build(cls, _checked(cls, table, path))


def preset_names() -> list[str]:
    """Presets that the package carries, in order of name."""
    files = (resources.files("megavid.config") / "presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def leaf_keys(cls: type = RunConfig) -> dict[str, Any]:
    """Every key of the schema by its dotted name, with its type, in the order of the schema."""
    return dict(_leaves(cls, ""))


def dump_toml(config: object) -> str:
    """Write every key of a config as TOML; reading it back gives an equal config."""
    return "\n".join(_dump(config, "")).strip("\n") + "\n"


# Reading


class _Layer(NamedTuple):
    """What one file says, checked."""

    table: dict[str, Any]
    base: str | None
    layouts: dict[int, dict[str, Any]]
    """Keys of ``parallel`` by world size."""


def _read_layers(preset_or_path: str) -> _Layer:
    """A preset and its base, merged."""
    own = _read(preset_or_path, Path())
    if own.base is None:
        return own
    folder = Path(preset_or_path).parent if preset_or_path.endswith(".toml") else Path()
    under = _read(own.base, folder)
    if under.base is not None:
        raise ConfigError(
            f"{preset_or_path}: base = {own.base!r} has a base of its own ({under.base!r}); one level is allowed, "
            f"so name {under.base!r} or write its keys out"
        )
    _merge(under.table, own.table)
    return _Layer(under.table, None, {**under.layouts, **own.layouts})


def _read(preset_or_path: str, folder: Path) -> _Layer:
    """One file's checked tables and the name of its base; a path is looked up from ``folder``."""
    try:
        table = tomllib.loads(_text(preset_or_path, folder))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{preset_or_path}: not valid TOML: {error}") from None
    base, layouts = table.pop("base", None), table.pop("layouts", {})
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{preset_or_path}: base must be the name of a preset, got {base!r}")
    try:
        return _Layer(_checked(RunConfig, table, ""), base, _checked_layouts(layouts))
    except ConfigError as error:
        raise ConfigError(f"{preset_or_path}: {error}") from None


def _checked_layouts(layouts: Any) -> dict[int, dict[str, Any]]:
    """``[layouts]``: keys of ``parallel`` for each number of ranks."""
    if not isinstance(layouts, dict):
        raise ConfigError(f"layouts must be a table by number of ranks, got {layouts!r}")
    for size, table in layouts.items():
        if not size.isdecimal() or int(size) < 1 or size != str(int(size)):
            raise ConfigError(f"layouts.{size}: a layout is named by its number of ranks, as in [layouts.16]")
        if not isinstance(table, dict):
            raise ConfigError(f"layouts.{size} must be a table of keys of [parallel], got {table!r}")
    return {int(size): _checked(ParallelConfig, table, f"layouts.{size}") for size, table in layouts.items()}


def layout_sizes(preset_or_path: str) -> list[int]:
    """World sizes that a preset's ``[layouts]`` names, rising.

    Raises:
        ConfigError: as ``load_run``.
    """
    return sorted(_read_layers(preset_or_path).layouts)


def _text(preset_or_path: str, folder: Path) -> str:
    if preset_or_path.endswith(".toml"):
        try:
            return (folder / preset_or_path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {folder / preset_or_path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{preset_or_path}: not valid TOML: it is not UTF-8 text") from None
    names = preset_names()
    if preset_or_path not in names:
        near = difflib.get_close_matches(preset_or_path, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(names)}"
        raise ConfigError(f"unknown preset {preset_or_path!r}; {hint} (a file's path must end in .toml)")
    file = resources.files("megavid.config") / "presets" / f"{preset_or_path}.toml"
    return file.read_text(encoding="utf-8")


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


# Flags


def _pairs(items: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(items)
    while rest:
        item = rest.pop(0)
        if not item.startswith("--") or item == "--":
            raise ConfigError(f"unexpected argument {item!r}; config keys are given as --section.key value")
        key, equals, text = item[2:].partition("=")
        _leaf_type(key)
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE")
            text = rest.pop(0)
        yield key, text


def _built(table: dict[str, Any], flags: Iterable[tuple[str, str]]) -> RunConfig:
    for key, text in flags:
        _set(table, key, _of_text(_leaf_type(key), text, key))
    return _build(RunConfig, table)


def _leaf_type(key: str) -> Any:
    leaves = leaf_keys()
    if key in leaves:
        return leaves[key]
    below = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
    if below:
        raise ConfigError(f"--{key} is a table of keys; give one of them, such as --{below[0]}")
    raise ConfigError(f"unknown key {key!r}; {_nearest(key, list(leaves))}")


def _nearest(key: str, known: list[str]) -> str:
    """What the writer may have meant: the same last word elsewhere, a near spelling, or where to look."""
    last = key.rpartition(".")[2].replace("-", "_")
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "`megavid train --help` lists all keys"


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for name in above:
        table = table.setdefault(name, {})
    table[last] = value


def _of_text(kind: Any, text: str, where: str) -> Any:
    """Read a flag's text as a value of type ``kind``; what cannot be read is left to ``_value`` to refuse."""
    value: Any = text
    if typing.get_origin(kind) is Literal:
        for choice in typing.get_args(kind):
            if text == str(choice) or (isinstance(choice, bool) and _WORDS.get(text.lower()) is choice):
                return choice
    elif typing.get_origin(kind) is tuple:
        value = _list_of_text(typing.get_args(kind)[0], text, where)
    elif kind is not str:
        value = _scalar_of_text(kind, text)
    return _value(kind, value, where)


def _list_of_text(kind: Any, text: str, where: str) -> list[Any]:
    if kind is str:  # a prompt has commas of its own: without brackets the text is one string
        if not text.startswith("["):
            return [text] if text else []
        try:
            items: list[Any] = tomllib.loads(f"items = {text}")["items"]
        except tomllib.TOMLDecodeError:
            raise ConfigError(f'{where} must be written as ["one", "two"], got {text!r}') from None
        return items
    inner = text.removeprefix("[").removesuffix("]").strip()
    return [_scalar_of_text(kind, item.strip()) for item in inner.split(",")] if inner else []


def _scalar_of_text(kind: Any, text: str) -> Any:
    if kind is bool:
        return _WORDS.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


# Checks


def _checked(cls: Any, table: dict[str, Any], path: str) -> dict[str, Any]:
    """``table`` with every key known and every value of its type; nested tables stay tables."""
    kinds = _kinds(cls)
    checked = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if key not in kinds:
            raise ConfigError(f"unknown key {where!r}; {_nearest_in(key, path, list(kinds))}")
        if not dataclasses.is_dataclass(kinds[key]):
            checked[key] = _value(kinds[key], value, where)
        elif isinstance(value, dict):
            checked[key] = _checked(kinds[key], value, where)
        else:
            raise ConfigError(f"{where} must be a table, got {value!r} ({type(value).__name__})")
    return checked


def _nearest_in(key: str, path: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=1)
    if near:
        return f"did you mean '{path}.{near[0]}'?" if path else f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}"


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        # Compared with their types: to Python 1 == True, to a reader of a preset it is not.
        if not any(type(choice) is type(value) and choice == value for choice in args):
            choices = ", ".join(_toml(choice) for choice in args)
            raise ConfigError(f"{where} must be one of {choices}; got {value!r}")
        return value
    if origin is tuple:
        return _tuple(args, value, where)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, got {value}")
    if kind is str and not _is_utf8(value):
        raise ConfigError(f"{where} must be valid text, got {value!r}")
    return value


def _tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list, got {value!r} ({type(value).__name__})")
    kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
    if len(kinds) != len(value):
        raise ConfigError(f"{where} needs {len(kinds)} values, got {len(value)}: {list(value)!r}")
    return tuple(_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# The schema


def _build(cls: Callable[..., Config], table: dict[str, Any]) -> Config:
    """Construct ``cls`` from a checked table; its own checks speak here."""
    kinds = _kinds(cls)
    return cls(**{k: _build(kinds[k], v) if isinstance(v, dict) else v for k, v in table.items()})


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _leaves(cls: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, kind in _kinds(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind, f"{path}{name}.")
        else:
            yield path + name, kind


# Writing


def _dump(config: Any, path: str) -> Iterator[str]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    tables = {name: value for name, value in values.items() if dataclasses.is_dataclass(value)}
    if path:
        yield f"\n[{path}]"
    yield from (f"{name} = {_toml(value)}" for name, value in values.items() if name not in tables)
    for name, value in tables.items():
        yield from _dump(value, f"{path}.{name}" if path else name)


def _toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case tuple():
            return f"[{', '.join(_toml(item) for item in value)}]"
    raise TypeError(f"no TOML form for {value!r} ({type(value).__name__})")
