"""The same images again and again: one pipeline, fixed prompts and seeds, whatever is switched on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_accel.conditioning import call_arguments, call_parameters, check_prompts_do, own_arguments

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Sampler:
    """Calls a pipeline for fixed prompts (or, without prompts, for as many images) with fixed seeds.

    Attributes:
        pipe: any diffusers pipeline that draws images or videos from texts, from classes or from nothing.
        prompts: one an image; a class-conditioned pipeline takes names or numbers of classes; what they say does not
            matter to an unconditional one.
        steps: denoising steps.
        seed: of the noise that the first image starts from.
        batch: images in a call.
        options: further arguments of the pipeline, such as guidance_scale, height and width.
        caller: what is called instead of the pipeline; None: the pipeline.
        stride: image i starts from the noise of seed + i · stride.
        scales: the guidance scale of each image; empty: what `options` say, or the pipeline's own default. A call is
            of one scale.

    Raises:
        UnsupportedPipelineError: the pipeline needs an image, or something else that `options` do not have.
    """

    pipe: DiffusionPipeline
    prompts: tuple[str, ...]
    steps: int
    seed: int = 0
    batch: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    caller: Any = None
    stride: int = 1
    scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_prompts_do(self.pipe, self.options)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Where each call's images begin and end."""
        start = 0
        while start < len(self.prompts):
            ends = range(start + 1, min(start + self.batch, len(self.prompts)))
            other = (i for i in ends if self.scales and self.scales[i] != self.scales[start])
            end = next(other, ends.stop)
            yield start, end
            start = end

    def call(self, start: int, end: int, **changes: Any) -> torch.Tensor:
        """Images `start` to `end`, (N, 3, H, W) in 0..1 on the CPU; of a video its frames below each other."""
        parameters = call_parameters(self.pipe)
        own = {"guidance_scale": self.scales[start]} if self.scales else {}
        given = {k: v for k, v in (self.options | own).items() if k in parameters and v is not None}
        generators = [torch.Generator("cpu").manual_seed(self.seed + i * self.stride) for i in range(start, end)]
        given = own_arguments(self.pipe, given) | call_arguments(self.pipe, list(self.prompts[start:end]))
        for name in [k for k, v in given.items() if k.startswith("negative_prompt") and isinstance(v, str)]:
            given[name] = [given[name]] * (end - start)  # as the prompts, which some pipelines insist on
        given |= {"num_inference_steps": self.steps, "generator": generators, "output_type": "np"} | changes
        output = (self.caller or self.pipe)(**given)
        images = np.asarray(output.images if hasattr(output, "images") else output.frames, np.float32)
        images = images.reshape(len(images), -1, *images.shape[-2:])
        return torch.from_numpy(images).permute(0, 3, 1, 2).clamp(0, 1)

    def images(self, **changes: Any) -> torch.Tensor:
        """All images, (N, 3, H, W) in 0..1."""
        return torch.cat([self.call(start, end, **changes) for start, end in self.chunks()])

    def part(self, start: int, end: int) -> Sampler:
        """A sampler of some of the images, with the same seeds."""
        own = slice(start, end)
        seed = self.seed + start * self.stride
        return replace(self, prompts=self.prompts[own], seed=seed, scales=self.scales[own])

    @property
    def arguments(self) -> dict[str, Any]:
        """`options`, with all guidance scales if there are several, increasing."""
        return self.options | ({"guidance_scale": sorted({*self.scales})} if self.scales else {})
