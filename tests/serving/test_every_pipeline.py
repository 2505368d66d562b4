"""Every kind of pipeline and conditioning: served in batches as drawn alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from serving_tools import FOREVER, TIMEOUT, held, sharing

from diffusion_accel.serving.engine import Engine

#: builder -> the parts whose calls share batches of several requests
KINDS: dict[Any, set[str]] = {
    zoo.inpaint: {"unet", "vae.encode"},
    zoo.controlnets: {"controlnet", "unet"},
    zoo.ip_adapter: {"unet"},
    zoo.sdxl: {"unet"},
    zoo.animatediff: set(),  # its rows are frames, which see each other
    zoo.dit: {"transformer", "vae.decode"},
    zoo.flux: {"transformer"},
    zoo.wan: {"transformer", "transformer_2"},
    zoo.panorama: {"unet"},
}


@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
def test_as_drawn_alone(build: Any) -> None:
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    asked = [{**call, "num_inference_steps": steps} for steps in (3, 2, 3)]
    wanted = [first(pipe(**one, generator=torch.Generator().manual_seed(seed))) for seed, one in enumerate(asked)]
    with Engine(pipe, running=3, wait=FOREVER) as engine:
        with held(engine, 3):
            handles = [
                engine.submit({**one, "generator": torch.Generator().manual_seed(seed)})
                for seed, one in enumerate(asked)
            ]
        found = [handle.result(TIMEOUT).images for handle in handles]
        assert sharing(engine) == KINDS[build]
    for one, other in zip(found, wanted, strict=True):
        one = first(one)
        assert (one - other).abs().max() <= 1e-4 * max(1, other.abs().max())


def first(output: Any) -> torch.Tensor:
    while not hasattr(output, "shape"):
        output = output[0] if isinstance(output, (list, tuple)) else next(iter(output.values()))
    return torch.as_tensor(output).float()
