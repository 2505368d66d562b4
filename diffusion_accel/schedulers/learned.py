"""The learned solver as a diffusers scheduler: fitted timesteps, and fitted combinations between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput

from diffusion_accel.arguments import nearest
from diffusion_accel.combination import Combination, channel_dim
from diffusion_accel.diffusers_compat import whole_config
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.io import shown
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.prediction import Conversion, converted

from .neutral import ddim_coefficients, dpmpp_2m_coefficients
from .noise_schedule import NoiseSchedule, prediction_kind
from .solver import Solver, needs, not_learnt, read_file, read_solvers, shipped_file, shipped_models

if TYPE_CHECKING:
    Level = float | torch.Tensor


@dataclass
class LearnedMultistepOutput(BaseOutput):
    """What a step returns: the next latents, and the clean sample that the model's output meant."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class LearnedMultistepScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler that was fitted to a model: few evaluations, each where and weighed as it serves best.

    For given numbers of evaluations it holds timesteps t₁ > … > t_N and for each step a combination of the clean
    samples x0ᵢ that the model's outputs mean and of the latents xᵢ, for each channel or for all:

        xᵢ₊₁ = Σⱼ wⱼ·x0ᵢ₋ⱼ + Σₖ uₖ·xᵢ₋ₖ

    The last one is the result. Latents are variance preserving (those of DDIM and DPM-Solver) or, with `flow`, those
    of flow matching. Where fewer evaluations were made than a step looks back on (an image to start from), the neutral
    update takes its place: DDIM's, then DPM-Solver++(2M)'s with these timesteps; or the solver's own `start`.

        pipe.scheduler = LearnedMultistepScheduler.for_model("sticker")
        image = pipe("red apple, 3d style", num_inference_steps=8).images[0]

    Args:
        num_train_timesteps: of the model's training, 1 to 100,000.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise schedule, as in diffusers.
        prediction_type: what the model predicts: "epsilon" (the default), "v_prediction", "sample"; of a flow "flow".
        flow: whether it is a flow-matching model (α = 1 − σ; timesteps are σ · num_train_timesteps).
        solvers: for each number of evaluations its timesteps and combinations: {"8": {"timesteps": [961.0, …],
            "steps": ["1.2;0.01", …], "start": {"4": ["1.1;0.2", …]}}}; see `schedulers.solver` and `combination`.
        made_for: what the solvers were fitted to and measured with; see `schedulers.measured`.

    Raises:
        ConfigurationError: a value is none of these, with what is wrong.
    """

    __module__ = __package__  # a model_index.json gets this name; the file may move
    _compatibles = [kind.name for kind in KarrasDiffusionSchedulers]  # noqa: RUF012, as diffusers has it
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str | None = None,
        flow: bool = False,
        solvers: dict[str, Any] | None = None,
        made_for: dict[str, Any] | None = None,
    ) -> None:
        self._schedule = NoiseSchedule(
            num_train_timesteps,
            flow,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )
        if not isinstance(made_for, dict | None):
            raise ConfigurationError(f"made_for must be a table, got {shown(made_for)}")
        self._solvers = read_solvers(solvers or {}, num_train_timesteps, flow)
        texts = {str(n): solver.to_dict() for n, solver in self._solvers.items()}
        self.register_to_config(prediction_type=prediction_kind(prediction_type, flow), solvers=texts)
        if flow:
            self.register_to_config(use_flow_sigmas=True)  # Flux then leaves σ to the scheduler
        else:
            self.alphas_cumprod = self._schedule.alphas_cumprod
        self.num_inference_steps: int | None = None
        self._solver: Solver | None = None
        self._set(np.arange(num_train_timesteps, dtype=np.float32)[::-1] + int(flow))

    # ------------------------------------------------------------------ what there is
    @classmethod
    def for_model(cls, model: str) -> Self:
        """The learned solver that ships for an embedded model, such as "sticker".

        Raises:
            ConfigurationError: there is no such model, or none ships for it.
        """
        file = shipped_file(model) if isinstance(model, str) else None
        if file is not None:
            return cls.from_config(read_file(file))
        if isinstance(model, str) and model in EMBEDDED:
            there = ", ".join(shipped_models()) or "none"
            raise ConfigurationError(f"no learned solver ships for {model}; models that have one: {there}")
        near = nearest(model, EMBEDDED) if isinstance(model, str) else None
        hint = f"did you mean {near}?" if near else f"embedded models: {', '.join(EMBEDDED)}"
        raise ConfigurationError(f"unknown model {shown(model)}; {hint}")

    @classmethod
    def like(
        cls, scheduler: SchedulerMixin, solvers: dict[Any, Any] | None = None, made_for: dict[str, Any] | None = None
    ) -> Self:
        """A learned solver with the noise schedule and prediction of another scheduler.

        Args:
            scheduler: of a model; its latents may be scaled (Euler's), these are not.
            solvers, made_for: see the class; a solver may be an object of `Solver`.

        Raises:
            UnsupportedPipelineError: its noise schedule or prediction is not one of those this class knows.
        """
        conversion = Conversion(scheduler)
        if not conversion.possible:
            raise UnsupportedPipelineError(f"a solver cannot be learnt for {type(scheduler).__name__}")
        given = {str(n): s.to_dict() if isinstance(s, Solver) else s for n, s in (solvers or {}).items()}
        config = {**whole_config(scheduler), "prediction_type": conversion.kind}
        if conversion.flow:  # no other class takes the rest
            config = {key: config[key] for key in ("num_train_timesteps", "prediction_type")}
        made = cls.from_config(config, flow=conversion.flow, solvers=given, made_for=made_for)
        if reason := made.unfit_for(scheduler):
            raise UnsupportedPipelineError(f"a solver cannot be learnt for {type(scheduler).__name__}: {reason}")
        return made

    @property
    def evaluations(self) -> list[int]:
        """The numbers of evaluations that it was learnt for."""
        return [*self._solvers]

    @property
    def compatibles(self) -> list[type]:
        """The schedulers of diffusers that take the same configuration."""
        return [] if self.config.flow else super().compatibles

    @property
    def step_index(self) -> int | None:
        """The place of the next step in `timesteps`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where a pipeline begins; None if it does not say."""
        return self._begin_index

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def unfit_for(self, scheduler: SchedulerMixin) -> str | None:
        """Why the model of another scheduler cannot be sampled with this one; None if it can."""
        return self._schedule.unlike(scheduler, self.config.prediction_type)

    def alphas_and_sigmas(self, timesteps: Sequence[float]) -> tuple[list[float], list[float]]:
        """α and σ at timesteps, which need not be whole numbers."""
        return self._schedule.at(timesteps)

    # ------------------------------------------------------------------ before the loop
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: object = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,  # noqa: ARG002, the size's shift of a flow: these timesteps were learnt
    ) -> None:
        """Take the timesteps and combinations of a number of evaluations, and forget what was.

        Args:
            num_inference_steps: one of `evaluations`.
            device: where `timesteps` go.
            timesteps: refused: they were learnt.
            sigmas: refused, unless they are 1, 1 − 1/N, … 1/N, which pipelines give where nobody asked for any.
            mu: taken and left alone.

        Raises:
            ConfigurationError: it was not learnt for so many.
        """
        if sigmas is not None and timesteps is None:
            count = len(sigmas)
            usual = np.linspace(1.0, 1 / max(1, count), count)
            if num_inference_steps in (None, count) and np.allclose(sigmas, usual, atol=1e-6):
                num_inference_steps, sigmas = count, None
        if timesteps is not None or sigmas is not None:
            raise ConfigurationError(
                "a learned solver has timesteps of its own; give num_inference_steps, without timesteps or sigmas"
            )
        if reason := not_learnt(self.evaluations, num_inference_steps):
            raise ConfigurationError(f"num_inference_steps: {reason}")
        assert num_inference_steps is not None
        self._solver = self._solvers[num_inference_steps]
        self.num_inference_steps = num_inference_steps
        self._set(np.array(self._solver.timesteps, dtype=np.float32), device)

    def _set(self, times: np.ndarray[Any, Any], device: str | torch.device | None = None) -> None:
        self._times = [float(t) for t in times]
        self._alphas, self._sigmas = self._schedule.at(self._times)
        flow = self.config.flow
        sigmas = [s if flow else s / a for a, s in zip(self._alphas, self._sigmas, strict=True)]
        self.sigmas = torch.tensor([*sigmas, 0.0])
        self.timesteps = torch.from_numpy(times.copy()).to(device)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._forget()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which of the timesteps the loop begins. Raises `ConfigurationError` if there is no such one."""
        if begin_index is not None and not 0 <= begin_index <= len(self._times):  # the last: no step is left to make
            raise ConfigurationError(f"begin_index must be from 0 to {len(self._times)}, got {shown(begin_index)}")
        self._begin_index = begin_index

    def scale_model_input(self, sample: torch.Tensor, timestep: Level | None = None) -> torch.Tensor:  # noqa: ARG002
        """The sample as it is: these latents are what the model takes."""
        return sample

    # ------------------------------------------------------------------ the loop
    def step(
        self,
        model_output: torch.Tensor,
        timestep: Level,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,  # noqa: ARG002, nothing is random here
        return_dict: bool = True,
    ) -> LearnedMultistepOutput | tuple[torch.Tensor, ...]:
        """The latents at the next timestep, or the result, computed in float32 or better.

        Args:
            model_output: of the model; a learned variance behind the prediction is left out.
            timestep: at which it was evaluated. Steps are counted; one out of turn begins anew there.
            sample: the latents, (B, C, …) or (B, L, C), which the model was given.
            generator: not used.
            return_dict: return an object instead of a tuple.

        Raises:
            ConfigurationError: `set_timesteps` was not called, or the numbers of channels do not fit.
        """
        if self._solver is None:
            raise ConfigurationError("set_timesteps must be called before step")
        index = self._find(timestep)
        wide = sample if sample.dtype == torch.float64 else sample.float()
        output = _prediction(model_output, sample).to(wide.dtype)
        clean = converted("sample", self.config.prediction_type, output, wide, self._alphas[index], self._sigmas[index])
        self._clean.appendleft(clean)
        self._latents.appendleft(wide)
        combination = self._combination(index)
        channels = sample.shape[channel_dim(sample)]
        if not combination.fits(channels):
            raise ConfigurationError(
                f"this solver was learnt for latents of {combination.channels} channels, these have {channels}"
            )
        following = combination.apply([*self._clean], [*self._latents]).to(sample.dtype)
        self._step_index = index + 1
        if not return_dict:
            return following, clean.to(sample.dtype)
        return LearnedMultistepOutput(following, clean.to(sample.dtype))

    def _combination(self, index: int) -> Combination:
        """That of a step; a neutral one where too little is known."""
        assert self._solver is not None
        wanted, made = self._solver.steps[index], len(self._clean)
        if needs(wanted) <= made:
            return wanted
        own = self._solver.start.get(index, ())
        if made <= len(own):
            return own[made - 1]
        neutral = ddim_coefficients if made == 1 else dpmpp_2m_coefficients
        return neutral(self._alphas, self._sigmas)[index]

    def _find(self, timestep: Level) -> int:
        """Which step this is; what was is forgotten where it is not the next."""
        told, expected = self._told(timestep), self._step_index
        if told is not None and told == expected:
            return told
        if told is None and expected is not None:  # it cannot be read here: steps are counted
            if expected == len(self._times):
                raise ConfigurationError(f"all {expected} steps are made: set_timesteps begins anew")
            return expected
        self._forget()
        if told is not None:
            return told
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _told(self, timestep: Level) -> int | None:
        """The place of a timestep; None if it is none of these, or reading it would wait for a device."""
        if isinstance(timestep, torch.Tensor):
            if timestep.numel() != 1:
                return None
            if timestep.device.type != "cpu":
                own = self.timesteps
                same = timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
                return int(timestep.storage_offset() - own.storage_offset()) if same else None
        value = float(np.float32(float(timestep)))  # as `timesteps` has it
        return self._times.index(value) if value in self._times else None

    def index_for_timestep(self, timestep: Level, schedule_timesteps: torch.Tensor | None = None) -> int:
        """The place of the timestep that is nearest."""
        times = self._times if schedule_timesteps is None else schedule_timesteps.tolist()
        value = float(timestep.max() if isinstance(timestep, torch.Tensor) else timestep)
        return min(range(len(times)), key=lambda i: abs(times[i] - value))

    def strength_at(self, timestep: float) -> float:
        """The `strength` with which an image-to-image pipeline of so many steps begins at the timestep nearest to this
        one; above 0, at most 1. `set_timesteps` comes first."""
        count = len(self._times)
        return min(1.0, (count - self.index_for_timestep(timestep) + 0.5) / count)  # pipelines round down

    def _forget(self) -> None:
        most = 1 if self._solver is None else self._solver.history
        self._clean: deque[torch.Tensor] = deque(maxlen=most)
        self._latents: deque[torch.Tensor] = deque(maxlen=most)

    # ------------------------------------------------------------------ training's side
    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """α · sample + σ · noise, with one timestep for each sample or one for all."""
        alpha, sigma = self._schedule.beside(timesteps, original_samples)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add_noise`, as the pipelines of flow-matching models call it."""
        if noise is None:
            raise ConfigurationError("scale_noise needs noise")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """α · noise − σ · sample; of a flow noise − sample."""
        if self.config.flow:
            return noise - sample
        alpha, sigma = self._schedule.beside(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)


def _prediction(output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """A model's output without a learned variance behind it."""
    dim = channel_dim(sample)
    if output.shape == sample.shape:
        return output
    fits = output.dim() == sample.dim() and output.shape[dim] == 2 * sample.shape[dim]
    if not fits or output.narrow(dim, 0, sample.shape[dim]).shape != sample.shape:
        raise ConfigurationError(
            f"the model's output must have the shape of the latents, {list(sample.shape)}, got {list(output.shape)}"
        )
    return output.narrow(dim, 0, sample.shape[dim])
