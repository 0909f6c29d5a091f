"""Frozen dataclasses as nested dictionaries and back, and dotted options over them. Knows no setting by name.

Every key and type is checked; an error names the place, what was given, and the nearest key.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import yaml

from instructrec_jax.errors import ConfigError, did_you_mean

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 reads "1e-3" as text


def plain(value: Any) -> Any:
    """A dataclass as nested plain dictionaries; ``built(type(c), plain(c)) == c``."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value


def changed(config: Any) -> dict[str, Any]:
    """What differs from the defaults, as nested dictionaries: a new setting does not change the hash of configs without it."""
    usual, out = type(config)(), {}
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        if value != getattr(usual, name):
            out[name] = changed(value) if dataclasses.is_dataclass(value) else plain(value)
    return out


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def built(cls: type, tree: Any, where: str, prefix: str = "") -> Any:
    """A dataclass from nested dictionaries.

    Raises:
        ConfigError: an unknown key or a value of another type, in ``where``.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'config'} must be a mapping, not {tree!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(
                f"{where}: unknown key {prefix}{key}{did_you_mean(str(key), known)}",
                remedy=f"known keys: {', '.join(known)}",
            )
        values[key] = _convert(hints[key], value, where, f"{prefix}{key}")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return built(typing.cast(type, kind), value, where, name + ".")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            near = did_you_mean(str(value), map(str, args))
            raise ConfigError(f"{where}: {name} = {value!r}{near}", remedy=f"one of {', '.join(map(repr, args))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where, name)
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(args[0], v, where, f"{name}[{i}]") for i, v in enumerate(items))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {name} must be a mapping, not {value!r}")
        return {str(k): _convert(args[1], v, where, f"{name}.{k}") for k, v in value.items()}
    if kind in (int, float) and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {name} must be a finite number, not {value!r}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: {name} must be {kind.__name__}, not {value!r} ({type(value).__name__})")
    return value


def parse_options(cls: type, words: Sequence[str]) -> dict[str, Any]:
    """``--a.b 3 --c.d=x`` as ``{"a.b": 3, "c.d": "x"}``; values are YAML, or plain text for text fields of ``cls``."""
    out: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"unexpected argument {word!r}", remedy="overrides look like --train.steps 400")
        key, eq, value = word[2:].partition("=")
        if not eq:
            if not rest:
                raise ConfigError(f"--{key} has no value")
            value = rest.pop(0)
        out[key] = value if _kind(cls, key) is str else _scalar(value)
    return out


def split_options(words: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """(the other words, those of the options ``--PREFIXname`` without the prefix): ``--beam.runner X`` becomes ``--runner X``."""
    ours, theirs = [], []
    taken = False  # by the option before: a word that is no option is its value
    for word in words:
        taken = word.startswith(f"--{prefix}") or (taken and not word.startswith("--"))
        (theirs if taken else ours).append(word.replace(f"--{prefix}", "--", 1) if word.startswith("--") else word)
    return ours, theirs


def _kind(cls: type, key: str) -> Any:
    """Type of a dotted key, or None if there is no such key."""
    kind: Any = cls
    for part in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part)
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind


def _scalar(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dictionaries, in place."""
    *sections, last = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--{key}: {section!r} is a value, not a section")
        tree = child
    tree[last] = value
