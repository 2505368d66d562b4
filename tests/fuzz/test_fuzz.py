"""A few mutants of every kind of file, the same every time; `make fuzz` tries more, and others."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.harness import fuzz
from fuzz.kinds import KINDS, quiet


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")  # the mutants of it
@pytest.mark.parametrize("name", KINDS)
def test_broken_files_are_refused_or_read_alike(name: str, tmp_path: Path) -> None:
    quiet()
    found = fuzz(name, KINDS[name], tmp_path / name, count=KINDS[name].count)
    assert not found.faults, "\n".join(found.faults)
    assert found.refused > found.inputs // 5, f"the mutants reach something: {found}"
