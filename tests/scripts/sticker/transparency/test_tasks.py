"""What the tasks of transparency are made of, by hand: the code of alpha, margins, losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from sticker import data as sticker_data
from sticker.transparency.images import rgba_of, with_margin
from sticker.transparency.pair import AMPLITUDE, COMPONENTS, alpha_code
from sticker.transparency.tasks import QUIET, JointTask, RefineTask, decisive

from diffusion_accel.training.denoising import Process
from diffusion_accel.transparency.rgba import on_grey


def test_the_code_of_alpha_is_hardly_seen_by_the_decoder(work: Path) -> None:
    vae = AutoencoderKL.from_pretrained(work / "pipeline", subfolder="vae")
    rgb, alpha = rgba_of(sticker_data.load_images(work), np.arange(12))
    kernel, bias = alpha_code(vae, on_grey(rgb, alpha), alpha)
    channels = vae.config.latent_channels
    assert kernel.shape == (channels, 1, 8, 8) and bias.shape == (channels,)
    code = torch.nn.functional.conv2d(alpha, kernel, bias, stride=8)
    assert code.mean((0, 2, 3)).abs().max() < 1e-4
    values = torch.linalg.svdvals(kernel.flatten(1))
    assert (values > 1e-4 * values[0]).sum() == min(COMPONENTS, channels)
    patches = torch.nn.functional.unfold(alpha, 8, stride=8).transpose(1, 2).reshape(-1, 64)
    largest = torch.linalg.eigvalsh(patches.T.cov()).flip(0)[:COMPONENTS].sqrt()
    deviations = torch.linalg.eigvalsh(code.transpose(0, 1).flatten(1).cov()).flip(0)[:COMPONENTS].sqrt()
    assert torch.allclose(deviations, AMPLITUDE * largest.sqrt(), rtol=0.02)
    with torch.no_grad():
        z = vae.encode(on_grey(rgb, alpha)).latent_dist.mean

        def change(move: torch.Tensor) -> float:
            return float((vae.decode(z + move).sample - vae.decode(z).sample).square().mean())

        generator = torch.Generator().manual_seed(0)
        turns = [torch.linalg.qr(torch.randn(channels, channels, generator=generator)).Q for _ in range(8)]
        turned = [change(torch.einsum("ij, njhw -> nihw", turn, code)) for turn in turns]
        assert change(code) < 0.95 * sum(turned) / len(turned)


def test_only_images_that_come_near_the_border_get_a_margin() -> None:
    alpha = torch.zeros(3, 1, 48, 48)
    alpha[0, :, 5:43, 4:44] = 1
    alpha[1, :, 20:, 10:30] = 1
    rgb = torch.tensor([0.2, 0.5, 0.9])[:, None, None] * (alpha > 0)
    made_rgb, made_alpha = with_margin(rgb, alpha, 4)
    assert all(torch.equal(made[k], given[k]) for made, given in ((made_rgb, rgb), (made_alpha, alpha)) for k in (0, 2))
    assert (made_alpha[1] > 0).nonzero()[:, 1:].amin(0).ge(4).all() and (made_alpha[1, :, 44:] == 0).all()
    assert made_alpha[1, 0, 43].max() > 0.95, "no further than needed"
    assert abs(float(made_alpha[1].sum() / alpha[1].sum()) - (40 / 48) ** 2) < 0.01
    inner = made_rgb[1, :, 26:40, 15:26]  # further inside than resampling rings
    torch.testing.assert_close(inner, rgb[1, :, 47, 20, None, None].expand_as(inner))


def test_an_uncertain_pixel_is_best_at_one_of_its_values() -> None:
    error = torch.arange(-100, 101) / 100
    cost = decisive(error)
    assert cost[100] == 0 and cost[0] == cost[200] == 1 and torch.equal(cost, cost.flip(0))
    assert (cost[100:].diff() > 0).all()
    value = torch.arange(101) / 100
    for chance in (0.3, 0.5, 0.8):
        expected = chance * decisive(value - 1) + (1 - chance) * decisive(value)
        assert int(expected.argmin()) == (100 if chance > 0.5 else 0)


def test_the_encoder_pays_beyond_its_budget(transparent: Path) -> None:
    task = JointTask(transparent, AutoencoderKL.from_pretrained(transparent / "pipeline", subfolder="vae"))
    batch = task.draw(np.random.default_rng(0), 4)
    rgb, alpha, padded = batch["images"].split((3, 1, 3), 1)
    batch["noise"] = torch.zeros_like(batch["noise"])
    with torch.no_grad():
        decoded, _, made = task.model(rgb, alpha, padded, batch["noise"])
        plain = task.model.vae.decode(task.model.vae.encode(on_grey(rgb, alpha)).latent_dist.mean).sample
        assert task.lost(plain, rgb, alpha).abs() < 1e-4
        error = (plain - on_grey(rgb, alpha)) * 2
        by_hand = [(4 * (e / 2).square().mean() + QUIET) / ((e / 2).square().mean() + QUIET) for e in error]
        lost = task.lost(on_grey(rgb, alpha) + error, rgb, alpha)
        assert abs(lost - 10 * torch.stack(by_hand).log10().mean()) < 1e-3
        reconstruction = task.reconstruction(made, alpha, padded)
        beyond = (task.lost(decoded, rgb, alpha) - task.BUDGET).clamp(min=0)
        torch.testing.assert_close(task.loss(task.model, batch), reconstruction + task.PRICE * beyond)
        batch["noise"] += 0.1
        made = task.model(rgb, alpha, padded, batch["noise"])[2]
        torch.testing.assert_close(task.loss(task.model, batch), task.reconstruction(made, alpha, padded))


def test_a_denoiser_that_knows_the_image_gives_it_back(transparent: Path) -> None:
    process, asked = Process(), []

    class Oracle(torch.nn.Module):
        def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            asked.append(timesteps)
            return process.noisy(z, process.noise_in(noisy, z, timesteps), timesteps)[1]

    vae = AutoencoderKL.from_pretrained(transparent / "pipeline", subfolder="vae")
    task = RefineTask(transparent, vae, Oracle(), process)  # type: ignore[arg-type]
    batch = task.draw(np.random.default_rng(0), 4)
    z = torch.randn(batch["noise"].shape, generator=torch.Generator().manual_seed(0))
    made = task.denoise(z, batch["gaussian"], batch["timesteps"], batch["ids"])
    torch.testing.assert_close(made, z, rtol=1e-3, atol=1e-3)
    assert torch.equal(asked[0], batch["timesteps"]) and torch.equal(asked[1], batch["timesteps"] // 2)
