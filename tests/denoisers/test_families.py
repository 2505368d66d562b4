"""What is known of diffusers' pipelines, as data: complete, and who belongs to it."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import diffusers
import pytest
from diffusers import StableDiffusionPipeline
from zoo import sd

from diffusion_accel import Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.denoisers.families import _PIPELINE_OF, UNKNOWN, family_of

SOURCES = pathlib.Path(diffusers.__file__).parent / "pipelines"


def test_every_pipeline_with_a_denoiser_has_a_family() -> None:
    """By their sources: a new release of diffusers may bring others."""
    there: dict[str, bool] = {}
    for path in SOURCES.rglob("pipeline_*.py"):
        for text in re.split(r"^class ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
            if "\n    def __call__(" in text:
                there[re.split(r"\W", text)[0]] = bool(re.search(r"^        (unet|transformer)\b[:,]", text, re.M))
    called = {name for name, with_denoiser in there.items() if with_denoiser}
    # they call other pipelines, or denoise in another way: tokens, chords of notes
    apart = {"UnCLIPPipeline", "Amused", "LLaDA2", "Onnx", "Combined", "VisualClozePipeline", "RFD4Proteina"}
    apart |= {"DiffusionDecode", "ConsistencyDecoder"}
    assert {name for name in called - _PIPELINE_OF.keys() if not any(part in name for part in apart)} == set()
    assert _PIPELINE_OF.keys() <= there.keys(), "a name that diffusers does not have"


def test_a_subclass_is_of_the_family_whose_loop_it_runs() -> None:
    class Same(StableDiffusionPipeline):
        pass

    class Around(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    class Own(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.unet(*args, **kwargs)

    plain, _ = sd()
    known = family_of(plain)
    assert known.branches is not None and not known.branches.conditional_first
    for cls, expected in ((Same, known), (Around, known), (Own, UNKNOWN)):
        pipe = cls(**plain.components, requires_safety_checker=False)
        assert family_of(pipe) == expected
        assert family_of(accelerate(pipe)) == expected, "also when it is accelerated"
        if expected is UNKNOWN:
            with pytest.raises(UnsupportedPipelineError, match="guidance=both"):
                accelerate(pipe, Reuse(guidance="reuse:2"))


def test_pipelines_whose_denoiser_cannot_be_followed_are_refused() -> None:
    plain, _ = sd()
    for name, words in (("StableDiffusionParadigmsPipeline", "several timesteps"), ("ScoreSdeVePipeline", "step")):
        cls = getattr(diffusers, name)
        pipe = cls.__new__(cls)
        pipe.__dict__.update(unet=plain.unet, scheduler=plain.scheduler)
        assert words in str(Reuse().supports(pipe))
