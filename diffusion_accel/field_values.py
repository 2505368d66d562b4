"""Values of a feature's fields: read from texts and JSON, checked against their types and limits."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from typing import Any

from .errors import ConfigurationError
from .io import shown

Hint = Any  # a type, as annotations have them
_PLAIN = (bool, int, float, str, types.NoneType)


def _alternatives(hint: Hint) -> tuple[Any, ...]:
    """The plain types that a field may have: those of JSON, and tuples of them."""
    return tuple(kind for kind in _members(hint) if kind in _PLAIN or typing.get_origin(kind) is tuple)


def objects_of(hint: Hint) -> tuple[type, ...]:
    """The other classes in the type of a field; see `option`."""
    return tuple(kind for kind in _members(hint) if kind not in _PLAIN and isinstance(kind, type))


def _members(hint: Hint) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def from_text(owner: str, key: str, text: str, hint: Hint) -> Any:
    """What the text of a field says: a bool, a number, a text or a list `a+b+c`, whichever its type allows.

    Raises:
        ConfigurationError: none of them.
    """
    kinds = _alternatives(hint)
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            try:
                return [inner(p) for p in text.split("+")]
            except ValueError:
                continue
        if kind is bool:
            if text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
                return text.lower() in ("true", "yes", "on", "1")
            continue
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str:
            return text
    raise ConfigurationError(f"{owner}: {key}={shown(text)} is not allowed; it must be {_describe(hint)}")


def from_json(owner: str, key: str, value: object, hint: Hint) -> Any:
    """A value of JSON or of Python as the type of a field; lists become tuples.

    Raises:
        ConfigurationError: it is of another type.
    """
    kinds = _alternatives(hint)
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            if isinstance(value, (list, tuple)) and all(is_a(v, inner) for v in value):
                return tuple(map(inner, value))
        elif is_a(value, kind):
            return value if kind is types.NoneType else kind(value)
    raise ConfigurationError(f"{owner}: {key}={shown(value)} is not {_describe(hint)}")


def is_a(value: object, kind: type) -> bool:
    """Whether a value may stand for a field of this type: numbers of other packages do, true is no number."""
    if kind is bool or isinstance(value, bool):
        return type(value) is kind
    if kind is float:
        return isinstance(value, numbers.Real) and not (isinstance(value, int) and abs(value) > 2**1000)
    return isinstance(value, numbers.Integral if kind is int else kind)


def check_limits(owner: str, field: dataclasses.Field[Any], value: object) -> None:
    """Raise `ConfigurationError` for a number that is not finite, or beyond its field's limits (`option(within=)`)."""
    low, high = field.metadata.get("within") or (-math.inf, math.inf)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if not low <= number <= high or not (isinstance(number, int) or math.isfinite(number)):
            allowed = f"between {low:.10g} and {high:.10g}" if math.isfinite(high - low) else "finite"
            meaning = field.metadata.get("doc", "")
            raise ConfigurationError(
                f"{owner}: {field.name} must be {allowed}, got {shown(number)}" + (f" ({meaning})" if meaning else "")
            )


def _describe(hint: Hint) -> str:
    kinds = _alternatives(hint)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", types.NoneType: "nothing"}
    return " or ".join(
        f"a list of {words[typing.get_args(k)[0]].split(' ')[-1]}s (a+b+c)"
        if typing.get_origin(k) is tuple
        else words.get(k, str(k))
        for k in kinds
    )
