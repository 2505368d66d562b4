"""Shallow steps on every transformer whose blocks are known: in their order, each once, whatever lies between them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry, ModelHook
from transformers_zoo import CASES as TENSORS
from transformers_zoo import IMAGE, SD3
from zoo import ddim, rand, seeded

from diffusion_accel import AccelerationError, Reuse, accelerate
from diffusion_accel.denoisers import prediction, stream_blocks
from diffusion_accel.denoisers.families import _MODELS

LISTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "z_image": ("ZImageTransformer2DModel", {"in_channels": 4, "dim": 32, "n_layers": 3, "n_refiner_layers": 1,
                "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 4, 8], "axes_lens": [128, 16, 16]},
                {"x": [*IMAGE[:, :, None]], "cap_feats": [rand(6, 16), rand(40, 16, seed=1)]}),
}  # fmt: skip
CASES = TENSORS | LISTS


class Still(DiffusionPipeline):
    """Gives its transformer the same at every step, so that whatever is kept is exact."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, steps: int, call: dict[str, Any]) -> list[torch.Tensor]:
        self.scheduler.set_timesteps(steps)
        drawn = []
        for t in self.scheduler.timesteps:
            given = {"hidden_states": IMAGE, **call, "timestep": t.expand(2).float()}
            if "x" in call:
                given = {**call, "t": given["timestep"] / 1000}
            drawn.append(prediction(self.transformer(**given, return_dict=False)))
            self.scheduler.step(drawn[0], t, drawn[0])
        return drawn


class Note(ModelHook):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def standing_still() -> Any:
    scheduler = ddim()
    set_timesteps = scheduler.set_timesteps

    def stand(steps: int) -> None:
        set_timesteps(steps)
        scheduler.timesteps = torch.full_like(scheduler.timesteps, 500)

    scheduler.set_timesteps = stand
    return scheduler


@pytest.mark.parametrize("case", CASES)
def test_shallow_steps_are_exact_where_nothing_moves(case: str) -> None:
    """What the inner blocks added at the full step is added once, and they are not computed again."""
    name, config, call = CASES[case]
    transformer = seeded(lambda: getattr(diffusers, name)(**config))
    pipe = Still(transformer, standing_still())
    blocks = stream_blocks(transformer)
    want = pipe(1, call)[0]
    for depth in range(1, len(blocks)):
        accelerate(pipe, Reuse(plan=f"steps:full shallow:{depth}@1 full shallow:{depth}"))
        first, *others = pipe(4, call)
        assert torch.equal(first, want)
        for other in others:
            assert (other - want).abs().max() <= 2e-5 * want.abs().max(), depth
    notes = []
    for block in blocks:
        notes.append(Note())
        HookRegistry.check_if_exists_or_initialize(block.module).register_hook(notes[-1], "note")
    pipe(4, call)
    assert sorted(note.calls for note in notes) == [2] + [4] * (len(blocks) - 1)


def test_every_known_transformer_is_tried() -> None:
    assert {name for name, _, _ in CASES.values()} == {name for name, family in _MODELS.items() if family.stream_lists}


class Unknown(diffusers.SD3Transformer2DModel):
    """A transformer with a forward of its own, of which nothing is known."""

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, **more: Any) -> Any:
        return super().forward(hidden_states, timestep=timestep, **more)


class Named(diffusers.SD3Transformer2DModel):
    def forward(self, noisy: torch.Tensor, level: torch.Tensor) -> Any:
        return super().forward(noisy, timestep=level)


@pytest.mark.parametrize(
    ("model", "plan", "words"),
    [
        (diffusers.SD3Transformer2DModel, "uniform:3", "is not a U-Net: it has no decoder"),
        (diffusers.SD3Transformer2DModel, "faster-diffusion", "use hold:n or shallow:n,depth"),
        (diffusers.SD3Transformer2DModel, "steps:full decoder", "no decoder"),
        (diffusers.SD3Transformer2DModel, "shallow:2,4", "has 4 blocks: the depth of a shallow step must be 1 to 3"),
        (diffusers.SD3Transformer2DModel, "hold:2,epsilon", "cannot be turned into noise"),
        (Unknown, "shallow:2,1", "the blocks of Unknown are not known to this toolkit; use hold:n"),
        (Unknown, "deepcache:2", "the blocks of Unknown are not known"),
        (Named, "hold:2", "Named does not take latents and a timestep"),
    ],
)
def test_what_cannot_work_is_refused_by_accelerate(model: Any, plan: str, words: str) -> None:
    scheduler = ddim(prediction_type="epsilon")
    if "epsilon" in plan:
        scheduler.register_to_config(prediction_type="unknown")
    pipe = Still(seeded(lambda: model(**SD3)), scheduler)
    with pytest.raises(AccelerationError, match=words):
        accelerate(pipe, Reuse(plan=plan))
    assert type(pipe) is Still and not hasattr(pipe, "acceleration")


def test_one_block_is_said_to_be_one() -> None:
    pipe = Still(seeded(lambda: diffusers.SD3Transformer2DModel(**{**SD3, "num_layers": 1})), ddim())
    with pytest.raises(AccelerationError, match="has 1 block: a shallow step would leave out nothing or all; use hold"):
        accelerate(pipe, Reuse(plan="deepcache:2"))
