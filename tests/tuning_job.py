"""One search, by one process or by several: what the tests of shared tuning run in each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import zoo

IMAGES = 7  # of which 5 calibrate: an odd number, so that two processes have different shares


def pipeline() -> Any:
    """DDIM in pixel space, tiny."""
    from diffusers import DDIMPipeline

    pipe = DDIMPipeline(unet=zoo.unet2d()[0].unet, scheduler=zoo.ddim())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def work_of(work: Callable[[], Any]) -> float:
    """A clock that counts multiplications."""
    done = [0]

    def count(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            done[0] += output.numel() * module.weight[0].numel()

    with torch.nn.modules.module.register_module_forward_hook(count):
        work()
    return done[0] / 1e9


def search(together: Any, state: Path | None = None, **changes: Any) -> Any:
    """A search that ends when nothing is left to try, whatever the clock says. Images are drawn one by one, so that the
    same numbers are computed by any number of processes."""
    from diffusion_accel.tuning.tuner import tune

    given = {"steps": 5, "seconds": 1000.0, "batch": 1, "computed_steps": (2, 3), "state": state, "together": together}
    with (
        mock.patch("diffusion_accel.tuning.by_rollouts.seconds_of", work_of),
        mock.patch("diffusion_accel.tuning.result.seconds_of", work_of),
    ):
        return tune(pipeline(), [""] * changes.pop("images", IMAGES), **given | changes)


def _begin(rank: int, size: int, port: int, folder: Path) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def tune_together(rank: int, size: int, port: int, folder: Path) -> None:
    """One process of `size`: a family, a plan of a fidelity, and a search that finds nothing."""
    _begin(rank, size, port, folder)
    from diffusion_accel.errors import AccelerationError
    from diffusion_accel.tuning.together import Together

    together = Together.joined(torch.device("cpu"), 60.0)
    found: dict[str, Any] = {"family": search(together, folder / f"state-{rank}").to_dict()}
    found["plan"] = search(together, min_psnr=20.0).to_dict()
    for name, changes in {
        "nothing": {"speedup": 900.0},
        "different": {"speedup": 1.5, "seed": rank},
        "too many": {"speedup": 1.5, "images": 6, "together": Together(rank, 5, together.group)},
    }.items():
        try:
            search(together, **changes) if name != "too many" else changes["together"].check(4, {})
        except AccelerationError as error:
            found[name] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(found))


def lose_one(rank: int, size: int, port: int, folder: Path) -> None:
    """One process ends in the middle of the search."""
    _begin(rank, size, port, folder)
    from diffusion_accel.tuning.jumps import Jumps
    from diffusion_accel.tuning.together import Together

    together, run = Together.joined(torch.device("cpu"), 60.0), Jumps.run

    def ends(self: Any, nodes: Any) -> Any:
        if rank == 1 and len(nodes) == 3:
            os._exit(9)
        return run(self, nodes)

    text = ""
    with mock.patch.object(Jumps, "run", ends):
        try:
            search(together)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.txt").write_text(text)
    os._exit(0)


def command(rank: int, size: int, port: int, folder: Path, arguments: list[str]) -> None:
    """One process of a command."""
    _begin(rank, size, port, folder)
    from diffusion_accel.cli.main import run

    run(arguments)


def large_search(file: Path) -> None:
    """What a search holds of 24 images of SDXL in 50 steps, with a scheduler that scales its latents and without any
    model: writes by how many bytes the process grew, and how many of these are recorded."""
    import resource

    from diffusion_accel.tuning.jumps import Jumps, Trajectory
    from diffusion_accel.tuning.replay import Said
    from diffusion_accel.tuning.rows import Rows
    from diffusion_accel.tuning.timesteps import residuals

    torch.set_num_threads(1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    with torch.inference_mode():
        rows, latents = Rows(50, 24), torch.randn(8, 4, 128, 128)
        for first in (0, 8, 16):
            for step in range(50):
                rows.write(step, first, latents, latents * (1 + step), latents)
        alphas = [0.1 + 0.018 * i for i in range(51)]
        times, sigmas = [1000.0 - 20 * i for i in range(50)], [(1 - a * a) ** 0.5 for a in alphas]
        recorded = rows.latents, rows.predictions, rows.latents[-1]
        trajectory = Trajectory(times, alphas, sigmas, *recorded, "epsilon")
        residuals(trajectory, range(2), torch.ones(4))  # image by image, so that more need no more memory
        replay: Any = SimpleNamespace(apart=lambda x, time, which, known: Said(x * 0.5, x * 0.1, x * 0.2))
        jumps = Jumps(replay, trajectory, range(12), apart=True)
        jumps.run([0, 20, 40])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    held = sum(t.numel() * t.element_size() for t in (rows.latents, rows.predictions, rows.samples))
    most = jumps.beginnings.most * 12 * latents[0].numel() * 4
    file.write_text(json.dumps({"grown": grown, "held": held, "beginnings": most}))
