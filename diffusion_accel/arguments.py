"""Names that somebody gives: the nearest of those there are; unknown and missing ones refused, old ones accepted."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from .errors import ConfigurationError
from .io import printable

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


def public(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function of the public interface: a mistyped keyword is refused as any bad input is, with the nearest one."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    name = getattr(function, "__qualname__", "")

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not kwargs.keys() <= {*names}:
            refuse_unknown(kwargs, names, f"{name}()")
        return function(*args, **kwargs)

    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise TypeError(f"{name} takes any keyword: it has to check them itself")
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
