"""Names that somebody gives: the nearest of those there are; unknown and missing ones refused, old ones accepted."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from .errors import ConfigurationError
from .field_values import is_a
from .io import printable, shown

_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The name among `known` that is most like `name`; None if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `ConfigurationError` for names that are not known, with the nearest known one, or all of them.

    Args:
        given: the names that were given.
        known: the names that there are.
        what: whose names they are, for the message: "tune()", "reuse".
    """
    known = sorted({*known})
    unknown = sorted({*given} - {*known})
    if not unknown:
        return
    near = nearest(unknown[0][:100], known)
    hint = f"did you mean {near}?" if near else f"there are: {', '.join(known) or 'none'}"
    names = printable(", ".join(name[:100] for name in unknown[:5]))
    raise ConfigurationError(f"{what}: unknown argument {names}; {hint}")


_WORDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text", "Path": "a path"}
_KINDS: dict[str, type] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "Path": Path,
    "None": types.NoneType,
}
_WORDS |= {"Progress": "a function of what, share and left", "None": "None"}


def _is_a(value: object, kind: str) -> bool:
    return callable(value) if kind == "Progress" else is_a(value, _KINDS[kind])


def check_types(what: str, hints: dict[str, str], values: dict[str, Any]) -> None:
    """Raise `ConfigurationError` for a value that is not what its annotation says, where that is plain: numbers, texts,
    paths, switches, progress, None. The rest is left to the function.

    Args:
        what: whose arguments they are, for the message: "tune()".
        hints: annotations, as text.
        values: what was given.
    """
    for name, value in values.items():
        kinds = hints.get(name, "?").split(" | ")
        if {*kinds} <= {*_WORDS} and not any(_is_a(value, kind) for kind in kinds):
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise ConfigurationError(f"{what}: {name} must be {words}, got {shown(value)}")


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function of the public interface: a mistyped keyword is refused as any bad input is, with the nearest one, and
    so is a number, text or switch that is none. One that takes any keyword checks their names itself."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    hints = {p.name: p.annotation for p in parameters if isinstance(p.annotation, str)}
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    name = getattr(function, "__qualname__", "")
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not open_ended and not kwargs.keys() <= {*names}:
            refuse_unknown(kwargs, names, f"{name}()")
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:  # too many, or one is missing
            raise ConfigurationError(f"{name}(): {error}") from error
        check_types(f"{name}()", hints, given)
        return function(*args, **kwargs)

    return checked


def with_old_keywords(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator: the function also takes what its arguments were called before, old name -> argument."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            renamed = {names.get(key, key): value for key, value in kwargs.items()}
            if len(renamed) < len(kwargs):
                both = "; ".join(f"{old} is the old name of {new}" for old, new in names.items() if old in kwargs)
                raise ConfigurationError(f"{function.__qualname__}(): {both}; give one of them")
            return function(*args, **renamed)  # type: ignore[arg-type]

        return checked

    return decorate


def by_name(cls: type[_T]) -> type[_T]:
    """Let a dataclass refuse unknown and missing names as any bad input is refused. Goes above `@dataclass`."""
    plain, fields = cls.__init__, [field for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    names, in_turn = [field.name for field in fields], [field.name for field in fields if not field.kw_only]
    nothing = dataclasses.MISSING
    needed = [field.name for field in fields if field.default is nothing and field.default_factory is nothing]

    @functools.wraps(plain)
    def init(self: _T, *args: Any, **values: Any) -> None:
        if len(args) > len(in_turn):
            raise ConfigurationError(f"{cls.__name__} is made by name, such as {cls.__name__}({names[0]}=...)")
        refuse_unknown(values, names, cls.__name__)
        if missing := [name for name in needed if name not in values and name not in in_turn[: len(args)]]:
            raise ConfigurationError(f"{cls.__name__}: {missing[0]} is missing")
        plain(self, *args, **values)

    cls.__init__ = init  # type: ignore[method-assign,assignment]
    return cls
