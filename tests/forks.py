"""Forks of a server that has imported torch, diffusers and the test models once: a process costs what a fork costs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent


def start(target: Callable[..., None], *arguments: Any, **named: Any) -> BaseProcess:
    """Start a process that runs a function of a module of this folder or of `parallel/`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["world", "cases"])
    process = context.Process(target=target, args=arguments, kwargs=named, daemon=True)
    # of the server, which the first of these processes starts
    settings = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL"}
    settings["PYTHONPATH"] = f"{HERE / 'parallel'}{os.pathsep}{HERE}"
    with mock.patch.dict(os.environ, settings):
        process.start()
    return process
