"""Drawing samples from a denoiser in training, for previews and measurements, with diffusers' own solvers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from .denoising import TIMESTEPS, Process


def scheduler_for(process: Process, solver: str = "ddim") -> Any:
    """The diffusers scheduler that fits a process: "ddim" or "dpm++", and flow-matching Euler for a flow."""
    if process.prediction == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)
    betas: dict[str, Any] = {"linear": {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}}
    betas["scaled_linear"] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    betas["cosine"] = {"beta_schedule": "squaredcos_cap_v2"}
    values = betas[process.schedule] | {"prediction_type": process.prediction, "num_train_timesteps": TIMESTEPS}
    if solver == "dpm++":
        return DPMSolverMultistepScheduler(**values)
    return DDIMScheduler(**values, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


@torch.no_grad()
def sample(
    denoiser: nn.Module,
    process: Process,
    shape: tuple[int, ...],
    condition: torch.Tensor | None = None,
    empty: torch.Tensor | None = None,
    guidance: float = 1.0,
    steps: int = 20,
    seed: int = 0,
    batch: int = 64,
) -> torch.Tensor:
    """Samples float32 (N, C, h, w) on the CPU: DPM-Solver++ (Euler for a flow), row i from the noise of seed + i.

    Args:
        condition: (N, ...) or None; empty: the same with the empty condition. Without it there is no guidance.
        guidance: scale of classifier-free guidance; 1 uses the condition alone.
    """
    device = next(denoiser.parameters()).device
    made = []
    for rows in torch.arange(shape[0]).split(batch):
        noise = [torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + int(i))) for i in rows]
        x = torch.stack(noise).to(device)
        scheduler = scheduler_for(process, "dpm++")
        scheduler.set_timesteps(steps, device=device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        guided = guidance != 1 and condition is not None and empty is not None
        given = None if condition is None else condition[rows].to(device)
        if guided:
            given = torch.cat([empty[rows].to(device), given])  # type: ignore[index,list-item]
        for t in scheduler.timesteps:
            both = torch.cat([x, x]) if guided else x
            predicted = denoiser(both, t.expand(len(both)), given).float()
            if guided:
                without, with_condition = predicted.chunk(2)
                predicted = without + guidance * (with_condition - without)
            x = scheduler.step(predicted, t, x, return_dict=False)[0]
        made.append(x.float().cpu())
    return torch.cat(made)
