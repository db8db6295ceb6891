"""Is a setting of the kind that is wanted, and in its range? Asked before anything has started, and at every call.

The default in conf/ says by its type what a key takes, the signature of what is called says it exactly; the tables
below add what neither can say.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vfmadapt.errors import UserError

# keys whose default is null; below the top level those that no signature knows
_NULL_DEFAULT: dict[str, Any] = {
    "adapter_file": str | list[str],
    "bands": list[int] | Literal["mean", "pca", "wavelength"],
    "block": int,
    "data.shots": int,
    "early_stop": int,
    "ejection_fraction": str | int,
    "evaluate": str,
    "focal": float,
    "foreground": list[str],
    "index": int,
    "input": str,
    "of": int,
    "objects.classes": str | list[str],
    "offset": float,
    "output": str,
    "ray.actors": int,
    "ray.address": str,
    "polygons": str,
    "prompt": str | list[dict[str, Any]],
    "reader": dict[str, Any],
    "resume": bool | str,
    "scale": float,
    "tta": str,
    "window": list[float],
}
# keys that take more, or less, than their default says
_KINDS: dict[str, Any] = {
    "augment.flips": bool | Literal["mirror"],
    "batch": int | Literal["auto"],
    "engine": Literal["local", "ray", "array", "merge"],
    "focus": float | None,
    "format": Literal["text", "json"],
    "png_scale": float,
    "metric": str | dict[str, str],
    "trainer.devices": int | str | list[int],
    "trainer.precision": int | str,
}
_MANY = float("inf")
# least and greatest values, by the last part of a key; the rest is checked where it is used
_RANGES = {
    "accumulate_grad_batches": (1, _MANY),
    "boundary_tolerance": (0, _MANY),
    "cache_mb": (0, _MANY),
    "ce_weight": (0, _MANY),
    "cells": (1, _MANY),
    "check_val_every_n_epoch": (1, _MANY),
    "depth": (0, _MANY),
    "dice_weight": (0, _MANY),
    "early_stop": (0, _MANY),
    "fit_pixels": (1, _MANY),
    "heads": (1, _MANY),
    "images": (1, _MANY),
    "lr": (0, _MANY),
    "mask_ratio": (0, 1),
    "predict_ratio": (0, 1),
    "previews": (0, _MANY),
    "score_pixels": (1, _MANY),
    "seed": (0, _MANY),
    "shots": (1, _MANY),
    "stats_weight": (0, 1),
    "steps": (1, _MANY),
    "tokens": (1, _MANY),
    "warmup": (0, _MANY),
    "weight_decay": (0, _MANY),
    "width": (1, _MANY),
    "window": (1, _MANY),
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

    Below the top level only a signature says whether null is meant, and whether a number must be whole: that is left to
    `check_arguments`.

    Raises:
        UserError: a value of another kind than its default, or out of range; a key of the top level that was removed.
    """
    for key in (k for k in defaults if k not in settings):
        raise UserError(f"~{key}: this key cannot be removed, only changed; write {key}=VALUE")
    for key, value, default in _changed(settings, defaults, ""):
        if value is None and "." in key:
            continue
        if default is None or default == "???":
            hint = _NULL_DEFAULT[key] | None if key in _NULL_DEFAULT else Any
        else:
            hint = _KINDS.get(key, _kind(default, exact="." not in key))
        _check(key, value, hint, default)


def _check(key: str, value: Any, hint: Any, default: Any) -> None:
    if not fits(value, hint):
        number = fits("", hint) and fits(value, float)
        quotes = f"; a number as text goes into quotes: '{key}=\"{value}\"'" if number else ""
        raise UserError(f"{key}={_shown(value)}: wanted is {_words(hint)}{_example(key, default)}{quotes}")
    low, high = _RANGES.get(key.rpartition(".")[2], (-_MANY, _MANY))
    if isinstance(value, int | float) and not low <= value <= high:
        allowed = f"{low} and more" if high == _MANY else f"{low} to {high}"
        raise UserError(f"{key}={value}: allowed are {allowed}{_example(key, default)}")


def _changed(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and default of what differs; a key that has no default (+key=value) is left out."""
    for name in (n for n in settings if n in defaults):
        value, default = settings[name], defaults[name]
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _changed(value, default, f"{prefix}{name}.")
        elif (type(value), value) != (type(default), default):
            yield f"{prefix}{name}", value, default


def check_arguments(made: Any, name: str, settings: Mapping[str, Any]) -> None:
    """Check the keyword arguments `settings` against the signature of `made`; `name` is what the user knows it by.

    Raises:
        UserError: a setting that it does not take, a value of another kind than annotated, or out of range.
    """
    known = [p for p in inspect.signature(made).parameters if p not in ("self", "spec")]
    try:
        hints = get_type_hints(made.__init__ if inspect.isclass(made) else made)
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


def _kind(default: Any, *, exact: bool) -> Any:
    """The annotation that a default stands for; not `exact`: 1 may be a default for any number."""
    whole = int if exact else float
    if not isinstance(default, list):
        return dict if isinstance(default, Mapping) else whole if fits(default, int) else type(default)
    kinds = (kind for kind in (whole, float, str) if default and all(fits(item, kind) for item in default))
    return next((list[kind] for kind in kinds), list)  # type: ignore[valid-type]


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
