#!/usr/bin/env python3
"""Writes docs/combinations.md and docs/data/combinations.json: what can be switched on together, and what is refused.

python scripts/combinations.py

The pipelines, and what is switched on for them, are those of the tests (tests/pairs.py). Takes a minute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import pairs


def main() -> int:
    """Ask the toolkit, and write both files."""
    found = {kind: pairs.reasons(kind) for kind in pairs.KINDS}
    pairs.DATA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    pairs.PAGE.write_text(pairs.page(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
