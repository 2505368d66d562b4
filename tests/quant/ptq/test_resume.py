"""An interrupted run ends as an uninterrupted one, or is refused for what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized import SHORT, WHOLE, Killed, sampler

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.ptq import stage as stage_of
from diffusion_accel.quant.ptq.run import quantize_denoiser

Whole = dict[int, tuple[dict[str, torch.Tensor], int]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Uninterrupted runs by bits of inputs: tensors of the quantized model, and how often it told what it does."""
    made: Whole = {}
    for bits in (8, 4):
        steps: list[str] = []
        work, settings = tmp_path_factory.mktemp("whole"), replace(SHORT, activation_bits=bits)
        run = quantize_denoiser(sampler(), settings, work, progress=lambda what, *rest, to=steps: to.append(what))  # type: ignore[misc]
        made[bits] = (run.model.state_dict(), len(steps))
    return made


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("seed", "bits"), [(0, 8), (3, 4)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, bits: int
) -> None:
    monkeypatch.setattr(stage_of, "SAVE_EVERY", 0.0)  # so that finetuning is interrupted in its middle, too
    (expected, steps), settings = whole[bits], replace(SHORT, activation_bits=bits)
    for place in torch.randint(1, steps, (3,), generator=torch.Generator().manual_seed(seed)).tolist():
        left = [place]

        def stop(what: str, *rest: float, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        try:
            quantize_denoiser(sampler(), settings, tmp_path, progress=stop)
        except Killed:
            continue
    found = quantize_denoiser(sampler(), settings, tmp_path).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_folder_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    quick = replace(WHOLE, rounding=None, finetune=None)
    quantize_denoiser(sampler(4), quick, tmp_path)
    file = tmp_path / "settings.json"
    file.write_text(file.read_text().replace("seed of the images", "seed of the pictures"))
    quantize_denoiser(sampler(4), quick, tmp_path)
    with pytest.raises(ConfigurationError, match=r"seed of the images \(0 then, 1 now\)"):
        quantize_denoiser(replace(sampler(4), seed=1), quick, tmp_path)


def test_other_settings_do_not_go_on_from_there(tmp_path: Path) -> None:
    quick = replace(WHOLE, rounding=None, finetune=None)
    quantize_denoiser(sampler(4), quick, tmp_path)
    other_scheduler, other_weights, trained = sampler(4), sampler(4), sampler(4)
    other_scheduler.pipe.scheduler.register_to_config(beta_end=0.03)
    with torch.no_grad():
        other_weights.pipe.unet.conv_in.weight.view(-1)[5] += 1e-3
    trained.pipe.unet.to(torch.bfloat16)
    for s, settings, minutes, says in (
        (sampler(4), replace(quick, weight_bits=4), None, r"weight_bits \(3 then, 4 now\)"),
        (replace(sampler(4), batch=3), quick, None, r"batch \(4 then, 3 now\)"),
        (replace(sampler(4), seed=1), quick, None, r"seed of the images \(0 then, 1 now\)"),
        (replace(sampler(4), prompts=("", "", "", "x")), quick, None, "another model: prompts;"),
        (sampler(4), quick, 5.0, r"budget minutes \(None then, 5.0 now\)"),
        (other_scheduler, quick, None, "settings of the scheduler.beta_end"),
        (other_weights, quick, None, "another model: weights"),
        (trained, quick, None, "type of numbers"),
    ):
        with pytest.raises(ConfigurationError, match=f"holds a run with other settings.*{says}"):
            quantize_denoiser(s, settings, tmp_path, minutes)
