"""Every kind of pipeline and conditioning: served in batches as drawn alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from diffusers import (
    FirstBlockCacheConfig,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from serving_tools import FOREVER, TIMEOUT, generator, held, sharing

from diffusion_accel import TaskRouting
from diffusion_accel.denoisers import Branches, PipelineFamily, register_family
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.serving.engine import Engine


def pag() -> zoo.Built:
    """It puts attention processors of its own into the denoiser while it is called."""
    pipe = zoo._sd(StableDiffusionPAGPipeline, zoo.unet(), pag_applied_layers=["mid"])
    return pipe, {**zoo.text(), "height": 16, "width": 16, "output_type": "latent"}


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
    pag: set(),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
def test_as_drawn_alone(build: Any) -> None:
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    asked = [{**call, "num_inference_steps": steps} for steps in (3, 2, 3)]
    wanted = [first(pipe(**one, generator=generator(seed))) for seed, one in enumerate(asked)]
    with Engine(pipe, running=3, wait=FOREVER) as engine:
        with held(engine, 3):
            handles = [engine.submit({**one, "generator": generator(seed)}) for seed, one in enumerate(asked)]
        found = [handle.result(TIMEOUT).images for handle in handles]
        assert handles[0].result().alone == (("StableDiffusionPAGPipeline",) if build is pag else ())
        assert sharing(engine) == KINDS[build]
    for one, other in zip(found, wanted, strict=True):
        one = first(one)
        assert (one - other).abs().max() <= 1e-4 * max(1, other.abs().max())


def first(output: Any) -> torch.Tensor:
    while not hasattr(output, "shape"):
        output = output[0] if isinstance(output, (list, tuple)) else next(iter(output.values()))
    return torch.as_tensor(output).float()


class Remembering(UNet2DConditionModel):
    """It reads what its last call left."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (sample,) = super().forward(*args, **(kwargs | {"return_dict": False}))
        sample = sample + vars(self).get("last", 0.0)
        vars(self)["last"] = sample.mean()
        return (sample,)


class OneThatKeepsKeys(StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        vars(self.unet).pop("last", None)
        return super().__call__(*args, **kwargs)


def test_a_denoiser_that_keeps_something_between_its_calls() -> None:
    register_family(OneThatKeepsKeys, PipelineFamily(Branches(), whole="its denoiser keeps keys and values"))
    pipe = zoo._sd(OneThatKeepsKeys, zoo.unet())
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.__class__ = Remembering
    asked = {**zoo.text(), "num_inference_steps": 3, "output_type": "latent"}
    wanted = [pipe(**asked, generator=generator(seed)).images for seed in range(3)]
    with Engine(pipe, running=2) as engine:
        handles = [engine.submit({**asked, "generator": generator(seed)}) for seed in range(3)]
        for handle, one in zip(handles, wanted, strict=True):
            assert torch.equal(handle.result(TIMEOUT).images, one) and handle.result().alone == ("OneThatKeepsKeys",)


def test_a_cache_of_diffusers_on_the_model() -> None:
    pipe, _ = zoo.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(UnsupportedPipelineError, match="a cache of diffusers is enabled"):
        Engine(pipe)


def test_features_inside_of_a_denoiser_that_the_pipeline_changes() -> None:
    pipe, call = pag()
    pipe.set_progress_bar_config(disable=True)
    with Engine(pipe, running=1) as engine:
        asked = engine.submit({**call, "num_inference_steps": 1}, features=[TaskRouting(untrained=True)])
        with pytest.raises(ConfigurationError, match="changes its denoiser while it is called"):
            asked.result(TIMEOUT)


def test_what_a_call_that_fails_leaves_in_its_twin() -> None:
    pipe, call = pag()
    pipe.set_progress_bar_config(disable=True)
    asked = {**call, "num_inference_steps": 2}
    wanted = pipe(**asked, pag_scale=0.0, generator=generator(1)).images

    def stop(standing: Any) -> None:
        raise ArithmeticError

    with Engine(pipe, running=1) as engine:
        failing = engine.submit({**asked, "generator": generator(1)}, on_progress=stop)
        assert isinstance(failing.future.exception(TIMEOUT), ArithmeticError)
        found = engine.submit({**asked, "pag_scale": 0.0, "generator": generator(1)}).result(TIMEOUT)
    assert found.alone == () and (found.images - wanted).abs().max() <= 1e-4
