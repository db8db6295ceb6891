"""Is a setting of the kind that is wanted, and in its range? Asked before anything has started, and at every call.

The default in conf/ says by its type what a key takes, the signature of what is called says it exactly; the tables
below add what neither can say.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vfmadapt.errors import UserError

# keys of the top level whose default is null
_NULL_DEFAULT: dict[str, Any] = {
    "adapter_file": str,
    "bands": list[int],
    "block": int,
    "early_stop": int,
    "foreground": list[str],
    "index": int,
    "input": str,
    "minutes": float,
    "of": int,
    "offset": float,
    "output": str,
    "resume": bool | str,
    "scale": float,
    "tta": str,
    "window": list[int],
}
# keys that take more, or less, than their default says
_KINDS: dict[str, Any] = {
    "engine": Literal["local", "array", "merge"],
    "format": Literal["text", "json"],
    "trainer.devices": int | str | list[int],
    "trainer.precision": int | str,
}
# least values by the last part of a key; the rest is checked where it is used
_LEAST = {
    "accumulate_grad_batches": 1,
    "boundary_tolerance": 0,
    "cache_mb": 0,
    "ce_weight": 0,
    "cells": 1,
    "check_val_every_n_epoch": 1,
    "dice_weight": 0,
    "early_stop": 0,
    "fit_pixels": 1,
    "minutes": 0.01,  # the share that is done is a part of it
    "previews": 0,
    "score_pixels": 1,
    "seed": 0,
    "steps": 1,
    "weight_decay": 0,
    "width": 1,
    "window": 1,
}

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    NoneType: "null",
}


def check_overrides(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Compare what was set with the same config as it is by default, both as plain containers.

    Null below the top level is left to `check_arguments`, since only a signature says whether it is meant.

    Raises:
        UserError: a value of another kind than its default, or one that is too small.
    """
    for key, value, default in _changed(settings, defaults, ""):
        if value is None and "." in key:
            continue
        if default is None or default == "???":
            hint = _NULL_DEFAULT[key] | None if key in _NULL_DEFAULT else Any
        else:
            hint = _KINDS.get(key, _kind(default))
        _check(key, value, hint, default)


def _check(key: str, value: Any, hint: Any, default: Any) -> None:
    name = key.rpartition(".")[2]
    if not fits(value, hint):
        number = fits("", hint) and fits(value, float)
        quotes = f"; a number as text goes into quotes: '{key}=\"{value}\"'" if number else ""
        raise UserError(f"{key}={_shown(value)}: wanted is {_words(hint)}{_example(key, default)}{quotes}")
    if name in _LEAST and isinstance(value, int | float) and value < _LEAST[name]:
        raise UserError(f"{key}={value}: allowed are {_LEAST[name]} and more{_example(key, default)}")


def _changed(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and default of what differs; a key that has no default (+key=value) is left out."""
    for name in (n for n in settings if n in defaults):
        value, default = settings[name], defaults[name]
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _changed(value, default, f"{prefix}{name}.")
        elif (type(value), value) != (type(default), default):
            yield f"{prefix}{name}", value, default


def check_arguments(made: Callable[..., Any], name: str, settings: Mapping[str, Any]) -> None:
    """Check the keyword arguments `settings` against the signature of `made`; `name` is what the user knows it by.

    Raises:
        UserError: a setting that it does not take, or one of another kind than annotated.
    """
    known = [p for p in inspect.signature(made).parameters if p not in ("self", "spec")]
    try:
        hints = get_type_hints(made.__init__ if isinstance(made, type) else made)
    except (NameError, TypeError):  # names that only type checkers import
        hints = {}
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"{name} has no setting {key!r}; it has: {', '.join(known)}")
        _check(f"{name}.{key}", value, hints.get(key, Any), inspect.signature(made).parameters[key].default)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated kind; a whole number is a number, a kind unknown here takes anything."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint in (NoneType, bool, str, Path):
        return isinstance(value, str if hint is Path else hint)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type) or not issubclass(kind, Mapping | Sequence):
        return True
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if not isinstance(value, list | tuple):
        return False
    if kind is tuple and args and Ellipsis not in args:
        return len(value) == len(args) and all(map(fits, value, args))
    return not args or all(fits(item, args[0]) or (fits("", args[0]) and fits(item, float)) for item in value)


def _kind(default: Any) -> Any:
    """The annotation that a default stands for."""
    if not isinstance(default, list):
        return dict if isinstance(default, Mapping) else type(default)
    return next((list[kind] for kind in (int, float, str) if default and all(fits(v, kind) for v in default)), list)  # type: ignore[valid-type]


def _example(key: str, default: Any) -> str:
    return "" if default in (None, inspect.Parameter.empty, "???") else f", for instance {key}={_shown(default)}"


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(arg) for arg in sorted(args, key=lambda a: a is not NoneType)))
    if origin is Literal:
        return "one of " * (len(args) > 1) + ", ".join(map(_shown, args))
    if hint in _WORDS:
        return _WORDS[hint]
    if issubclass(kind := origin or hint, Mapping):
        return "a mapping in braces"
    if kind is tuple and args and Ellipsis not in args:
        return f"a list of {len(args)}: " + ", ".join(map(_words, args))
    return "a list in brackets" + (f", each item {_words(args[0])}" if args else "")


def _shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(_shown, value))}]" if isinstance(value, list | tuple) else str(value)
