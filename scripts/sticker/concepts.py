"""The concepts of the data set: their names as captions have them, and which of them are trained on."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from .packages import BuildError, read_json

STARTER_FILE = Path(__file__).parent.parent / "data" / "starter_concepts.txt"
PEOPLE, COMPONENTS = 1, 2  # emojibase group numbers; 2 holds skin tones and hair styles
CORE_GROUPS = (0, 3, 4, 5, 6, 7)  # faces, animals, food, places, activities, objects
STARTER_GROUPS = (3, 4)  # animals and nature, food and drink
CORE_PEOPLE = (
    "hand-fingers-open",
    "hand-fingers-partial",
    "hand-single-finger",
    "hand-fingers-closed",
    "hands",
    "body-parts",
    "person-fantasy",
    "person-role",
    "person",
)


def to_ascii(text: str) -> str:
    """Lower-case ASCII: letters without their accents, nothing else."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()


def slug(text: str) -> str:
    """'Woman’s hat' -> 'womans-hat': the key that the Iconify collections use."""
    text = to_ascii(text).replace("'", "").replace("&", "and")
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def clean_label(text: str) -> str:
    """Lower-case ASCII words without punctuation: what captions are made of."""
    text = to_ascii(text.replace("’", "'"))
    text = re.sub(r"[\"“”:,()]", " ", text).replace("-", " ")
    return re.sub(r"\s+", " ", text).strip()


def plain_hexcode(hexcode: str) -> str:
    """Code points without the variation selector, in lower case: the common key of file names."""
    return hexcode.lower().replace("-fe0f", "")


def read_starter_names(path: Path = STARTER_FILE) -> set[str]:
    """The names of the list of starter concepts; lines that begin with # are comments."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BuildError(f"cannot read the starter list: {error}") from error
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def read_concepts(tarball: Path) -> dict[str, dict[str, Any]]:
    """Concepts by slug: hexcode, name, group, subgroup, keywords, and whether they are core and starter concepts.

    Core concepts are what a model is trained on: things, animals, food, faces, some hands and people, but no flags,
    letters, clock faces or gendered people. Starter concepts are the core ones for a first, short training run.
    """
    messages = read_json(tarball, "en/messages.json")
    groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
    subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
    starter_names = read_starter_names()
    concepts: dict[str, dict[str, Any]] = {}
    for entry in read_json(tarball, "en/data.json"):
        group = entry.get("group")
        if group is None or group == COMPONENTS:
            continue
        subgroup, name = subgroups[entry["subgroup"]], clean_label(entry["label"])
        words = set(name.split())
        gendered = group == PEOPLE and (entry.get("gender") is not None or words & {"man", "woman", "men", "women"})
        core = group in CORE_GROUPS or (group == PEOPLE and not gendered and subgroup in CORE_PEOPLE)
        if subgroup == "time" and ("o'clock" in name or "thirty" in name):
            core = False
        if group == PEOPLE and name.startswith("person "):
            core = core and subgroup == "person-fantasy"
        concepts[slug(entry["label"])] = {
            "hexcode": entry["hexcode"],
            "name": name,
            "group": groups[group],
            "subgroup": subgroup,
            "keywords": [clean_label(tag) for tag in entry.get("tags", [])][:8],
            "core": bool(core),
            "starter": bool(core and (group in STARTER_GROUPS or name in starter_names)),
        }
    unknown = sorted(starter_names - {concept["name"] for concept in concepts.values()})
    if unknown:
        raise BuildError(f"{STARTER_FILE.name} names unknown concepts: {', '.join(unknown)}")
    return concepts
