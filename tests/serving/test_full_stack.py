"""Everything at once, served: a learned solver, shallow steps, quantized layers, task routing, images with alpha."""

from __future__ import annotations

from typing import Any

import pytest
from pairs import STACK, Case
from serving_tools import FOREVER, TIMEOUT, generator, held, same

from diffusion_accel import ConfigurationError, ControlNetParallel, PatchParallel, Reuse
from diffusion_accel.serving.engine import Engine


def asked(case: Case, seed: int) -> dict[str, Any]:
    return {**case.call, "num_inference_steps": case.steps, "generator": generator(seed)}


@pytest.mark.parametrize("kind", ["controlnet", pytest.param("sticker", marks=pytest.mark.slow)])
def test_the_full_stack_is_served(kind: str) -> None:
    """The images are those that the pipeline draws by itself, also beside a request without what works inside."""
    case = Case(kind)
    case.on(*STACK)
    case.pipe.set_progress_bar_config(disable=True)
    wanted = [case.pipe(**asked(case, seed)).images for seed in (1, 2)]
    assert wanted[0].shape[:2] == (1, 4)
    whole = tuple(case.pipe.acceleration.features.values())
    held_steps = [feature for feature in whole if feature.name != "reuse"] + [Reuse(plan="hold:2")]
    case.off("shallow")
    case.on("hold")
    other = case.pipe(**asked(case, 1)).images
    with Engine(case.pipe, running=3, wait=FOREVER) as engine:
        with held(engine, 3):
            handles = [engine.submit(asked(case, seed), features=whole) for seed in (1, 2)]
            handles.append(engine.submit(asked(case, 1), features=held_steps))
        found = [handle.result(TIMEOUT) for handle in handles]
        for feature in (PatchParallel(), ControlNetParallel()):
            with pytest.raises(ConfigurationError, match=f"{feature.name} is not for an engine"):
                engine.submit(asked(case, 1), features=[*whole, feature])
    for one, image in zip(found, [*wanted, other], strict=True):
        same(one.images, image)
    assert found[0].alone == found[1].alone == ("task_routing", "reuse", "transparent") and found[2].alone == ()
    case.off("hold")
    case.on("patch_parallel")
    with pytest.raises(ConfigurationError, match="patch_parallel is not for an engine"):
        Engine(case.pipe)
