"""Task routing: published mask numbers, blocks written out by hand, and what happens to trained and other models."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from diffusers import (
    DiTPipeline,
    UNet2DConditionModel,
)
from routing_cases import tiny_dit
from zoo import ddim, run, sd, svd, vae

from diffusion_accel import ConfigurationError, EncoderReuse, TaskRouting, UnsupportedPipelineError, accelerate
from diffusion_accel.routing import Recipe, route
from diffusion_accel.routing.hooks import CONFIG_KEY, trained_recipe


def routed_sd(**recipe: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = sd()
    pipe.unet.register_to_config(**{CONFIG_KEY: Recipe(**recipe).to_dict()})
    return pipe, call


def test_a_trained_model_switches_itself_on(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = routed_sd(beta=0.5)
    plain = run(pipe, call)
    pipe.unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert trained_recipe(loaded) == Recipe(beta=0.5)
    pipe.unet = loaded
    with caplog.at_level(logging.INFO, "diffusion_accel"):
        accelerate(pipe)
    assert "task_routing is on: the model was trained with it" in caplog.text
    assert list(pipe.acceleration.features) == ["task_routing"]
    routed = run(pipe, call)
    assert not torch.equal(routed, plain)
    assert pipe.acceleration.report().counters["task_routing"]["active_share"] == 0.5
    hooks = route(pipe.unet, Recipe(beta=0.5))
    pipe.acceleration.disable()
    assert torch.equal(run(pipe, call), routed), "the feature equals routing the bare model"
    hooks.remove()
    assert torch.equal(run(pipe, call), plain)


def test_untrained_and_otherwise_trained_models(caplog: pytest.LogCaptureFixture) -> None:
    pipe, _ = sd()
    with pytest.raises(UnsupportedPipelineError, match="trained without task routing.*untrained=true"):
        accelerate(pipe, TaskRouting())
    accelerate(pipe, TaskRouting(untrained=True))
    assert "trained without task routing" in caplog.text
    caplog.clear()
    pipe, _ = routed_sd(beta=0.5, alpha=2.0)
    with pytest.raises(UnsupportedPipelineError, match="was trained with beta=0.5"):
        accelerate(pipe, TaskRouting(beta=0.8))
    accelerate(pipe, TaskRouting(beta=0.5))
    assert not caplog.text
    accelerate(pipe, TaskRouting(beta=0.9, untrained=True))
    assert "trained with another task routing" in caplog.text
    pipe.unet.register_to_config(**{CONFIG_KEY: {"beta": 7}})
    with pytest.raises(ConfigurationError, match="task_routing cannot be used.*beta"):
        run(pipe, {})


def test_dit_pipeline() -> None:
    transformer = tiny_dit()
    transformer.register_to_config(**{CONFIG_KEY: Recipe(beta=0.5).to_dict()})
    pipe = DiTPipeline(transformer=transformer, vae=vae(), scheduler=ddim(), id2label={})
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Any:
        call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "np"}
        return torch.from_numpy(pipe([1, 2], guidance_scale=3.0, **call).images)

    plain = draw()
    accelerate(pipe)
    routed = draw()
    assert not torch.equal(routed, plain) and torch.equal(routed, draw())
    accelerate(pipe, TaskRouting(beta=1.0, untrained=True))
    assert torch.equal(draw(), plain)


@pytest.mark.parametrize("make", [sd, svd])
def test_encoder_reuse_on_a_routed_model(make: Any) -> None:
    """Neutral reuse is exact; one decoder call for several timesteps equals one by one."""
    pipe, call = make()
    pipe.unet.register_to_config(**{CONFIG_KEY: Recipe(beta=0.5, alpha=1.0).to_dict()})
    accelerate(pipe)
    routed = run(pipe, call)
    accelerate(pipe, EncoderReuse.neutral())
    assert set(pipe.acceleration.features) == {"task_routing", "encoder_reuse"}
    assert torch.equal(run(pipe, call), routed)
    made = []
    for batched in (False, True):
        accelerate(pipe, EncoderReuse(schedule="uniform:3", batch_decoder=batched))
        made.append(run(pipe, call))
    assert pipe.acceleration.report().counters["encoder_reuse"]["decoder_runs"] < 9
    torch.testing.assert_close(made[0], made[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made[0], routed, atol=1e-3)
