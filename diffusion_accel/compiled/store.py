"""Graphs on disk: one file each in the user's cache folder, of which the ones not used for longest go first."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusion_accel.errors import AccelerationError, OutputError
from diffusion_accel.io import cache_place, first_line, replacing, writing
from diffusion_accel.model_files.tensors import read_tensors

logger = logging.getLogger(__name__)

VARIABLE = "DIFFUSION_ACCEL_GRAPHS"  # a folder to use instead; "off": nothing is read or written
SUFFIX = ".safetensors"


def place() -> Path | None:
    """The folder; None where nothing is to be kept."""
    return cache_place(VARIABLE, "graphs")


def load(key: str) -> bytes | None:
    """The graph of this name; None if there is none, or none that can be read."""
    folder = place()
    file = None if folder is None else folder / (key + SUFFIX)
    if file is None or not file.is_file():
        return None
    try:
        graph = read_tensors(file, error=OutputError)["graph"].numpy().tobytes()
    except (AccelerationError, KeyError) as error:
        logger.warning("%s", first_line(error))
        drop(key)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)
    return graph


def save(key: str, graph: bytes, limit: int) -> None:
    """Keep a graph, unless it is empty, and at most `limit` bytes of all."""
    folder = place()
    if folder is None or not 0 < len(graph) <= limit:
        return
    file = folder / (key + SUFFIX)
    try:
        with writing(file), replacing(file) as temporary:
            save_file({"graph": torch.frombuffer(bytearray(graph), dtype=torch.uint8)}, temporary)
    except AccelerationError as error:
        logger.warning("the compiled graph is not kept: %s", first_line(error))
        return
    _keep_within(folder, limit)


def drop(key: str) -> None:
    """Remove a graph, if it is there."""
    folder = place()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / (key + SUFFIX)).unlink(missing_ok=True)


def _keep_within(folder: Path, limit: int) -> None:
    """Remove the files that were not used for longest until the others take at most `limit` bytes."""
    found = []
    for file in folder.glob("*" + SUFFIX):
        with contextlib.suppress(OSError):  # another process has removed it
            state = file.stat()
            found.append((state.st_mtime, state.st_size, file))
    room = limit
    for _, size, file in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with contextlib.suppress(OSError):
                file.unlink()
