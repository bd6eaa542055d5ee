"""From what a document says to the arguments of functions and classes, by their own signatures.

Nothing is guessed: a key that a signature does not have, a value of another type and an argument
that is missing are errors with the value's path in the document, and so is what a constructor
refuses.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made")


class ConfigError(ValueError):
    """What is wrong with a document, and where: "training.lr: expected a number, got 'fast'"."""


class _Mismatch(ConfigError):
    """A value of another type than the one that was tried."""


def make(
    target: Callable[..., Made],
    given: Any,
    path: str,
    *,
    fixed: Mapping[str, Any] | None = None,
    hidden: Collection[str] = (),
) -> Made:
    """`target(**fixed, **given)`, `given` being read by `arguments`.

    Raises:
        ConfigError: as `arguments`; or what `target` finds wrong, under the path.
    """
    fixed = fixed or {}
    read = arguments(target, given, path, hidden={*fixed, *hidden})
    with naming(path, inspect.signature(target).parameters):
        return target(**fixed, **read)


def arguments(
    target: Callable[..., Any], given: Any, path: str, *, hidden: Collection[str] = ()
) -> dict[str, Any]:
    """What a document gives, as the keyword arguments of `target`, whose annotations count.

    Args:
        target: A class or function.
        given: A mapping; None: an empty one.
        path: Where it stands in the document.
        hidden: Parameters that a document cannot give.

    Raises:
        ConfigError: other keys, values of other types, arguments that are missing.
    """
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}: expected a mapping, got {given!r}")
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    known, anything = {}, False
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            anything = True
        elif parameter.kind is not parameter.VAR_POSITIONAL and name not in hidden:
            known[name] = parameter
    for key in given:
        if key not in known and not anything:
            wanted = ", ".join(known) or "no key"
            raise ConfigError(f"{inner(path, key)}: expected one of {wanted}, got this key")
    for name, parameter in known.items():
        if name not in given and parameter.default is parameter.empty:
            raise ConfigError(
                f"{inner(path, name)}: expected {described(hints.get(name, Any))}, got nothing"
            )
    return {
        key: value(given[key], hints.get(key, Any) if key in known else Any, inner(path, key))
        for key in given
    }


def value(given: Any, hint: Any, path: str) -> Any:
    """A value of a document as the type that an annotation asks for.

    Integers are numbers, texts like "1e-4" too (which YAML takes for texts); lists are tuples where
    those are wanted; a mapping makes the object of an annotated class, "package.module:function"
    names a function.

    Raises:
        ConfigError: a value of another type.
    """
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return given
    if origin in (typing.Union, types.UnionType):
        return _first(given, hint, inside, path)
    if hint in (None, type(None)) and given is None:
        return None
    if hint is bool and isinstance(given, bool):
        return given
    if hint is int and isinstance(given, int) and not isinstance(given, bool):
        return given
    if hint is float and (number := _number(given)) is not None:
        return number
    if hint is str and isinstance(given, str):
        return given
    if inspect.isclass(hint) and issubclass(hint, Path) and isinstance(given, str):
        return Path(given)
    if origin is typing.Literal and given in inside:
        return given
    if origin is typing.Literal and given is False and "no" in inside:
        return "no"  # which YAML reads as false, unless it is quoted
    if origin in _SEQUENCES and isinstance(given, list | tuple):
        of = inside[0] if inside else Any
        if origin is tuple and inside[-1] is not Ellipsis and len(given) != len(inside):
            raise ConfigError(f"{path}: expected {len(inside)} values, got {given!r}")
        return tuple(value(item, of, f"{path}[{i}]") for i, item in enumerate(given))
    if origin in _MAPPINGS and isinstance(given, Mapping):
        return {key: value(item, inside[1], inner(path, key)) for key, item in given.items()}
    if (origin is collections.abc.Callable or hint is Callable) and isinstance(given, str):
        return imported(given, path)
    if _constructed(hint) and isinstance(given, Mapping):
        return make(hint, given, path)
    raise _Mismatch(f"{path}: expected {described(hint)}, got {given!r}")


def imported(name: str, path: str) -> Any:
    """What "package.module:function" names.

    Raises:
        ConfigError: no such name.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise _Mismatch(f"{path}: expected 'package.module:function', got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot import {name!r}: {error}") from error


def name_of(function: Any) -> str:
    """The "package.module:function" of a function."""
    return f"{function.__module__}:{function.__qualname__}"


def inner(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


class naming:
    """What is raised within, of values that were read under a path, becomes a ConfigError of it."""

    def __init__(self, path: str, names: Collection[str] = ()) -> None:
        self.path, self.names = path, names

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ConfigError) or not isinstance(
            error, ValueError | TypeError | FileNotFoundError | ImportError
        ):
            return
        name = re.match(r"\w+(?=: )", str(error))
        under = "." if name is not None and name[0] in self.names else ": "
        raise ConfigError(f"{self.path}{under}{error}" if self.path else str(error)) from error


def described(hint: Any) -> str:
    """A type in words."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(part) for part in inside)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inside))
    if origin in _SEQUENCES:
        return f"a list of {described(inside[0])}" if inside else "a list"
    if origin in _MAPPINGS or _constructed(hint):
        return "a mapping"
    if origin is collections.abc.Callable or hint is Callable:
        return "'package.module:function'"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _first(given: Any, hint: Any, inside: tuple[Any, ...], path: str) -> Any:
    """As the first member of a union that fits; of classes first those that know all keys."""
    if given is None and type(None) in inside:
        return None
    for member in sorted(inside, key=lambda member: not _knows(member, given)):
        try:
            return value(given, member, path)
        except _Mismatch as error:
            if not str(error).startswith(f"{path}: "):  # this one was meant
                raise
    raise _Mismatch(f"{path}: expected {described(hint)}, got {given!r}")


def _knows(hint: Any, given: Any) -> bool:
    """Whether a mapping's keys are all arguments of this class."""
    if not (isinstance(given, Mapping) and _constructed(hint)):
        return False
    return set(given) <= set(inspect.signature(hint).parameters)


def _number(given: Any) -> float | None:
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        return None
    try:
        return float(given)
    except ValueError:
        return None


def _constructed(hint: Any) -> bool:
    """Whether a mapping makes an object of this class."""
    return inspect.isclass(hint) and hint not in _WORDS and hint.__module__ != "builtins"


_SEQUENCES = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    Path: "a path",
    type(None): "null",
    Any: "a value",
}
