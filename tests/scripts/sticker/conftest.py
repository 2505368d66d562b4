"""The tiny data set and what the recipe makes of it, once for all tests of this folder and all workers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import recipe
from recipe import once


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set: see `recipe.write_data`. Not to be changed."""
    return once(tmp_path_factory, "sticker-data", recipe.write_data)


@pytest.fixture(scope="session")
def work(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder after all stages, with the exported pipeline in ``pipeline``. Not to be changed."""
    return once(tmp_path_factory, "sticker-work", lambda folder: recipe.train_all(data, folder))


@pytest.fixture(scope="session")
def transparent(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after all stages of transparency, too, with what they exported in ``weights``. Not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(work, folder, dirs_exist_ok=True)
        recipe.train_transparency(folder, folder / "weights")

    return once(tmp_path_factory, "sticker-transparent", make)
