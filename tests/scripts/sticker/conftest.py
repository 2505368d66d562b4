"""The tiny data set and what the recipe makes of it, once for all tests of this folder and all workers."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).parent))

import recipe


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one worker makes while the others wait for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_name(f"{name}.making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(folder)
    return folder


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
