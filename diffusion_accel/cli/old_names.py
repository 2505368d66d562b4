"""Names that flags and commands had before: they keep working, and no help shows them.

A command line is rewritten before it is read, so that no command knows about its past.
"""

from __future__ import annotations

import os
from collections.abc import Callable

COMMANDS = {"plan": "estimate"}

#: the tokens in place of an old flag, from what stood behind its "=", or else from the tokens behind it, of which it
#: takes what is its own; None: the old flag was not allowed like that, so the token stays, to be refused
Rewrite = Callable[[str | None, list[str]], list[str] | None]


def _renamed(flag: str) -> Rewrite:
    """The same, by another name."""
    return lambda value, _: [flag if value is None else f"{flag}={value}"]


def _minutes(flag: str) -> Rewrite:
    """A number of minutes, where times have a unit now."""

    def rewrite(value: str | None, rest: list[str]) -> list[str]:
        if value is None and not rest:
            return [flag]
        return [f"{flag}={value if value is not None else rest.pop(0)}m"]

    return rewrite


def _instead(*tokens: str) -> Rewrite:
    """A switch that something else stands for, or that is not needed any more."""
    return lambda value, _: list(tokens) if value is None else None


def _switch_or_file(flag: str, file_flag: str) -> Rewrite:
    """A switch that was an option with a file: it still is where a file follows, which is nothing that `bench`
    compares."""

    def rewrite(value: str | None, rest: list[str]) -> list[str]:
        if value is not None:
            return [f"{file_flag}={value}"]
        return [file_flag, rest.pop(0)] if rest and _is_a_file(rest[0]) else [flag]

    return rewrite


def _is_a_file(token: str) -> bool:
    from diffusion_accel.bench.entries import KINDS  # with the command itself, which the table below does not need

    kind, colon, _ = token.partition(":")
    if token.startswith("-") or kind in KINDS:
        return False
    return not colon or token.lower().endswith(".json") or "/" in token or os.sep in token


#: command -> old flag -> what it becomes
FLAGS: dict[str, dict[str, Rewrite]] = {
    "generate": {
        "--num-images": _renamed("--count"),
        "--compile": _instead("--compiled=inductor,blocks=on"),
    },
    "tune": {"--resume": _instead()},  # it goes on by itself
    "quantize": {
        "--calibration-prompts": _renamed("--prompts-file"),
        "--budget-minutes": _minutes("--budget"),
    },
    "bench": {"--json": _switch_or_file("--json", "--output")},
    "estimate": {
        "--images": _renamed("--batch"),
        "--guidance": _instead("--guidance-scale=7.5"),  # any but 1: twice the batch
        "--no-guidance": _instead("--guidance-scale=1"),
    },
}


def in_todays_names(arguments: list[str]) -> list[str]:
    """The arguments with today's names of the command and its flags; what follows "--" stays as it is."""
    place = next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)
    if place is None:
        return list(arguments)
    command = COMMANDS.get(arguments[place], arguments[place])
    made, rest = [*arguments[:place], command], list(arguments[place + 1 :])
    flags = FLAGS.get(command, {})
    while rest:
        token = rest.pop(0)
        if token == "--":
            return [*made, token, *rest]
        name, equals, value = token.partition("=")
        rewrite = flags.get(name)
        rewritten = None if rewrite is None else rewrite(value if equals else None, rest)
        made += [token] if rewritten is None else rewritten
    return made
