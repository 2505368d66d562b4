"""Names of tuned plans: which file a text means, and which plan in it; importing this imports no torch."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_accel.io import is_there, read_json

SHIPPED = Path(__file__).parent.parent / "assets" / "plans"
LEVELS = ("quality", "balanced", "fast")
OWN = "dpm"  # the shipped family whose plans have their names for themselves: tuned:fast, but tuned:ddim-fast
_MEMBER = r"[a-z0-9][a-z0-9-]{0,39}"
_FILE = re.compile(rf".*\.json(?::{_MEMBER})?", re.DOTALL)


class Place(NamedTuple):
    """Where a plan lies.

    Attributes:
        path: the file.
        member: the name or the number of a plan in a family; "": the whole file.
    """

    path: Path
    member: str = ""


def is_tuned(text: str) -> bool:
    """Whether `Reuse.plan` names tuned plans: "tuned:NAME", "tuned:FILE", "FILE.json", or one plan of a family behind
    its file, "FILE.json:NAME"."""
    return text.startswith("tuned:") or _FILE.fullmatch(text) is not None


def names_file(text: str) -> bool:
    """Whether a text names tuned plans that do not ship with this package."""
    return is_tuned(text) and text.removeprefix("tuned:") not in _places()


def may_name(name: object, numbers: bool = False) -> bool:
    """Whether a plan of a family may be called so: small letters, digits and dashes; a number alone if `numbers`."""
    return isinstance(name, str) and re.fullmatch(_MEMBER, name) is not None and (numbers or not name.isdigit())


def place_of(text: str) -> Place:
    """The file that a text of `is_tuned` means, whether it is there or not, and the plan in it."""
    name = text.removeprefix("tuned:")
    if text.startswith("tuned:") and name in _places():
        return _places()[name]
    path, colon, member = name.rpartition(":")
    if colon and re.fullmatch(_MEMBER, member) and not is_there(name, "file"):
        return Place(Path(path), member)
    return Place(Path(name))


def text_of_member(origin: str, member: str) -> str:
    """What a plan of a family is loaded by; `origin` is the text of the family, "" if it has none."""
    stem = origin.removeprefix("tuned:")
    if origin.startswith("tuned:") and stem in shipped_families():
        return f"tuned:{_own_name(stem, member)}"
    return f"{origin}:{member}" if origin else ""


def names_of(members: list[Any]) -> list[str]:
    """What the plans of a family's file are called by: each its name, or its number, from 1."""
    named = [member.get("name") if isinstance(member, dict) else None for member in members]
    return [str(name) if may_name(name) else str(number) for number, name in enumerate(named, 1)]


@functools.cache
def shipped_families() -> tuple[str, ...]:
    """The names of the families that ship with the embedded model, behind "tuned:"."""
    return tuple(sorted(file.stem for file in SHIPPED.glob("*.json")))


@functools.cache
def shipped() -> tuple[str, ...]:
    """The names of all that ships with the embedded model, behind "tuned:": families, and each of their plans."""
    plans = [_own_name(family, member) for family in shipped_families() for member in _members(family)]
    return (*shipped_families(), *plans)


def shipped_texts() -> str:
    """The same in an error message."""
    return ", ".join(f"tuned:{name}" for name in shipped()) or "none"


@functools.cache
def _places() -> dict[str, Place]:
    found = {}
    for family in shipped_families():
        path = SHIPPED / f"{family}.json"
        found[family] = Place(path)
        for member in _members(family):
            for name in (_own_name(family, member), f"{family}-{member}", f"{family}:{member}"):
                found[name] = Place(path, member)
    return found


def _members(family: str) -> list[str]:
    return names_of(read_json(SHIPPED / f"{family}.json", "the plan")["members"])


def _own_name(family: str, member: str) -> str:
    if member.isdigit():
        return f"{family}:{member}"
    return member if family == OWN else f"{family}-{member}"
