"""Names that somebody gives: the nearest of those that there are, unknown keywords refused, old keywords accepted."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

from .errors import ConfigurationError
from .io import printable

_P = ParamSpec("_P")
_R = TypeVar("_R")


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
