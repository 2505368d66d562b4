"""A hook of mkdocs (mkdocs.yml): the sources that it reads docstrings from, put together as they are installed.

The four source folders are one package only once they are installed, and what reads docstrings reads one folder.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).resolve().parent.parent
_FOLDER = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: Any) -> Any:
    """Point mkdocstrings at a folder with copies of all modules."""
    package = Path(_FOLDER.name) / "diffusion_accel"
    for source in ("diffusion_accel", "pipelines", "quant", "parallel"):
        folder = package if source == package.name else package / source
        shutil.copytree(ROOT / source, folder, ignore=shutil.ignore_patterns("assets"), dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_FOLDER.name]
    return config
