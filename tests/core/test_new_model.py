"""A model and a pipeline that nobody has seen, made known by the steps of docs/design/support-a-new-model.md and by
nothing else; and what is refused before."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from zoo import rand, seeded

from diffusion_accel import ConfigurationError, Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.denoisers import Branches, ModelFamily, PipelineFamily, families, register_family
from diffusion_accel.denoisers.layers import quantization_preset
from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.ptq.finetune import PRESETS, matching

WIDTH, STEPS = 16, 6
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "design" / "support-a-new-model.md"


# ---------------------------------------------------------------------- somebody's model
class KiteAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))


class KiteFeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class KiteBlock(nn.Module):
    """Adds to the text and to the image; returns the text first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = KiteAttention(), KiteFeedForward()

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = torch.cat([text, hidden_states + time], 1)
        both = both + self.attn(both)
        added = self.ff(both)
        return text + added[:, : text.shape[1]], hidden_states + added[:, text.shape[1] :]


class KiteTransformer(ModelMixin, ConfigMixin):
    """A forward of its own, and blocks in a list with a name of its own."""

    @register_to_config
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.entry, self.exit, self.time = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4), nn.Linear(1, WIDTH)
        self.tail = nn.ModuleList(KiteBlock() for _ in range(layers))

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_dict: bool = True
    ) -> Any:
        x = self.entry(hidden_states.flatten(2).transpose(1, 2))
        time = self.time(timestep[:, None, None].to(x))
        for block in self.tail:
            text, x = block(x, text, time)
        return (self.exit(x).transpose(1, 2).reshape(hidden_states.shape),)


class KitePipeline(DiffusionPipeline):
    """The conditional half of the batch comes first, and the model is told the square root of the time."""

    def __init__(self, transformer: KiteTransformer, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        text: torch.Tensor,
        negative: torch.Tensor,
        guidance_scale: float = 5.0,
        steps: int = STEPS,
        start: int = 0,
    ) -> torch.Tensor:
        guided = guidance_scale > 1
        self.scheduler.set_timesteps(STEPS)
        x = rand(1, 4, 4, 4, seed=7)
        both = torch.cat([text, negative]) if guided else text
        for t in self.scheduler.timesteps[start:]:
            given = torch.cat([x, x]) if guided else x
            time = torch.sqrt(t / 1000).expand(len(given))
            predicted = self.transformer(given, time, both, return_dict=False)[0]
            if guided:
                with_text, without = predicted.chunk(2)
                predicted = without + guidance_scale * (with_text - without)
            x = self.scheduler.step(predicted, t, x).prev_sample
        return x


CALL = {"text": rand(1, 5, WIDTH, seed=1), "negative": rand(1, 5, WIDTH, seed=2)}


def kite() -> Any:
    return KitePipeline(seeded(KiteTransformer), DDIMScheduler(clip_sample=False))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the page, undone after the test."""
    monkeypatch.setattr(families, "_registered", {})
    code = next(
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "register_family" in code
    )
    exec(code, {"KitePipeline": KitePipeline, "KiteTransformer": KiteTransformer})


# ---------------------------------------------------------------------- before
def test_what_is_not_known_is_refused_and_the_rest_works() -> None:
    for feature, words in (
        (Reuse(plan="shallow:2,1"), "the blocks of KiteTransformer are not known to this toolkit; use hold:n"),
        (Reuse(plan="full", guidance="reuse:2"), "its loop over the steps is not one that this toolkit knows"),
    ):
        with pytest.raises(UnsupportedPipelineError, match=words):
            accelerate(kite(), feature)
    plain = kite()(**CALL)
    pipe = accelerate(kite(), Reuse(plan="full"))
    assert torch.equal(pipe(**CALL), plain)
    accelerate(pipe, Reuse(plan="hold:2"))
    pipe(**CALL)
    counted = pipe.acceleration.report().counters["reuse"]
    assert (counted["full_steps"], counted["hold_steps"]) == (3, 3)


def test_a_family_is_about_a_method_of_the_class(known: None) -> None:
    class Same(KitePipeline):
        pass

    class Own(KitePipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.transformer(*args, **kwargs)

    there = families.family_of(kite())
    for cls, family in ((Same, there), (Own, families.UNKNOWN)):
        assert families.family_of(cls(**kite().components)) is family
    model = ModelFamily("transformer")
    for cls, mistaken in ((Same, there), (KitePipeline, model), ("KitePipeline", there)):
        with pytest.raises(ConfigurationError, match=r"has no (__call__|forward) of its own.*that defines it"):
            register_family(cls, mistaken)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PipelineFamily(time="t/100"), "time must be one of t, t/1000"),
        (lambda: PipelineFamily(guided="always"), "guided must be one of property, above 1, not 1, got 'always'"),
        (lambda: PipelineFamily(Branches(), calls=True), "a pipeline has one layout"),
        (lambda: ModelFamily("vae"), "kind must be one of unet, transformer, autoencoder, controlnet, got 'vae'"),
        (lambda: ModelFamily("transformer", preset="flux"), "preset must be one of sd, sdxl, lsun, dit, got 'flux'"),
        (lambda: ModelFamily("transformer", stream_lists=("tail",)), "stream_lists and streams come together"),
    ],
)
def test_what_a_family_cannot_say(make: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


def test_presets_have_the_same_names_everywhere() -> None:
    assert set(families.PRESETS) == {"", *PRESETS}


# ---------------------------------------------------------------------- after
def by_hand(pipe: Any) -> torch.Tensor:
    """Every second step the two inner blocks of three add what they added at the step before it."""
    calls, entered, added = [0], [], []
    plain = [block.forward for block in pipe.transformer.tail]

    def first(hidden_states: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] % 2 == 0:
            return text + added[-1][0], hidden_states + added[-1][1]
        entered.append((text, hidden_states))
        return plain[1](hidden_states, text, time)

    def second(hidden_states: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> Any:
        if calls[0] % 2 == 0:
            return text, hidden_states
        made = plain[2](hidden_states, text, time)
        added.append(tuple(new - old for new, old in zip(made, entered[-1], strict=True)))
        return made

    pipe.transformer.tail[1].forward, pipe.transformer.tail[2].forward = first, second
    return pipe(**CALL)


def test_shallow_steps_leave_the_inner_blocks_out(known: None) -> None:
    plain, pipe = kite()(**CALL), accelerate(kite(), Reuse(plan="shallow:2,1"))
    counted = [0, 0, 0]
    for i, block in enumerate(pipe.transformer.tail):
        block.attn.register_forward_pre_hook(lambda *_, i=i: counted.__setitem__(i, counted[i] + 1))
    got = pipe(**CALL)
    assert counted == [STEPS, STEPS // 2, STEPS // 2]
    assert (got - by_hand(kite())).abs().max() < 1e-4 < (got - plain).abs().max()
    accelerate(pipe, Reuse.neutral())
    assert torch.equal(pipe(**CALL), plain)


def test_held_steps_are_found_by_the_unit_of_the_timestep(known: None) -> None:
    """A call that begins in the middle follows the second half of the plan: only the unit says where it is."""
    pipe = accelerate(kite(), Reuse(plan="steps:full hold hold full hold full"))
    calls = []
    pipe.transformer.entry.register_forward_pre_hook(lambda *_: calls.append(None))
    for start, computed in ((0, 3), (3, 2), (5, 1)):
        calls.clear()
        pipe(**CALL, start=start)
        assert len(calls) == computed, start


@pytest.mark.parametrize("right", [True, False])
def test_the_unconditional_branch_is_the_one_left_out(right: bool, known: None) -> None:
    """Without guidance everywhere is what a scale of 1 draws; a family that says the other order draws the negative."""
    if not right:
        there = families.family_of(kite())
        register_family(KitePipeline, dataclasses.replace(there, branches=Branches()))
    alone = kite()(**CALL, guidance_scale=1.0)
    pipe = accelerate(kite(), Reuse(plan="full", guidance="interval:0.9991-0.9992"))
    rows = []
    pipe.transformer.entry.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    difference = (pipe(**CALL) - alone).abs().max()
    assert rows == [1] * STEPS
    assert difference < 1e-4 if right else difference > 1e-2
    rows.clear()
    accelerate(pipe, Reuse(plan="full", guidance="reuse:2"))
    pipe(**CALL)
    assert rows == [2, 1] * (STEPS // 2)


def test_quantization_finetunes_what_the_family_says(known: None) -> None:
    model = kite().transformer
    assert quantization_preset(model) == "sdxl"
    chosen = matching(candidates(model), PRESETS[quantization_preset(model)])
    assert chosen == [f"tail.{i}.{name}" for i in range(3) for name in ("attn.to_q", "ff.net.0", "ff.net.2")]
