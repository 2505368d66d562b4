"""What patch parallelism does on a pipeline: joins the processes, and has its hooks and messages for one call."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from diffusion_accel.denoisers import (
    denoiser_names,
    find_denoiser,
    not_a_unet,
    not_splittable,
    reads_every_step,
)
from diffusion_accel.diffusers_compat import execution_device
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment
from diffusion_accel.report import several, size

from .agreement import Agreement, share_random_state
from .communicator import Communicator
from .group import PeerError, join
from .patch_parallel import PatchParallel
from .run import PatchRun
from .setup import install, why_not, why_not_transformers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.steps import StepClock


logger = logging.getLogger(__name__)


def supports(feature: PatchParallel, pipeline: DiffusionPipeline) -> str | None:
    """Why the denoiser of a pipeline cannot be shared among processes in this mode, or None if it can."""
    denoiser = find_denoiser(pipeline)
    if denoiser is None:
        return "the pipeline has no unet or transformer"
    reason = not_a_unet(denoiser)
    if reason is None:
        return not_splittable(denoiser) or reads_every_step(pipeline)
    if "unet" in denoiser_names(pipeline):
        return reason
    return why_not_transformers(pipeline, feature.cfg_parallel, feature.mode)


def attach(feature: PatchParallel, pipeline: DiffusionPipeline) -> PatchAttachment:
    """Attach the feature to a pipeline that it supports."""
    return PatchAttachment(feature, pipeline)


class PatchAttachment(Attachment[PatchParallel]):
    """Patch parallelism on one pipeline; its hooks, messages and buffers live for one call."""

    def __init__(self, feature: PatchParallel, pipeline: DiffusionPipeline) -> None:
        super().__init__(feature, pipeline)
        self._traffic: dict[tuple[str, str], int] = {}
        self._run: PatchRun | None = None
        self._counters: dict[str, float] = {}

    def before_call(self, clock: StepClock) -> None:
        """Join the other processes, check that all were asked for the same, and put the hooks on the models."""
        feature = self.feature
        device = execution_device(self.pipeline)
        world = join(device, feature.timeout)
        self._traffic, self._counters = {}, {"ranks": world.size}
        if feature.ranks not in (0, world.size):
            raise ConfigurationError(
                f"patch_parallel was set to {feature.ranks} processes, but this job has {world.size}; start it with "
                f"torchrun --nproc-per-node {feature.ranks}, or leave ranks out"
            )
        if world.size == 1:
            return
        share_random_state(world, device)
        reason = supports(feature, self.pipeline) or why_not(
            self.pipeline, feature.cfg_parallel, feature.mode, world.size
        )
        if reason:
            raise ConfigurationError(f"patch_parallel cannot be used on this pipeline: {reason}")
        communicator = Communicator(world.group, feature.comm_checkpoint)
        self._run = PatchRun(
            world,
            clock,
            communicator,
            feature.mode,
            feature.warmup,
            feature.neighbour_fraction,
            feature.group_norm,
            feature.forecast,
        )
        check = Agreement(self.pipeline, clock, world)
        install(self.changes, self._run, self.pipeline, feature.cfg_parallel, feature.vae, check)

    def after_call(self) -> None:
        """Take the hooks off, and keep what was counted; a process that was lost is a warning here."""
        super().after_call()
        run, self._run = self._run, None
        if run is not None:
            self._traffic = dict(run.communicator.traffic)
            self._counters.update(run.summary())
            try:
                run.communicator.close()
            except PeerError as error:  # the call has ended, well or with an error of its own; the next one will tell
                logger.warning("%s", error)

    def counters(self) -> dict[str, float]:
        """Steps, and bytes by kind, of the last call; see `PatchParallel`."""
        return dict(self._counters)

    def words(self) -> str:
        """The counters for people."""
        count = self._counters
        if "exact_steps" not in count:
            return several(count["ranks"], "process", "processes")
        kinds = {"halo": "edges", "norm": "statistics", "attention": "attention", "output": "outputs"}
        sent = ", ".join(f"{what} {size(count[f'{kind}_bytes'])}" for kind, what in kinds.items())
        return (
            f"{several(count['ranks'], 'process', 'processes')}, {several(count['exact_steps'], 'step')} with the "
            f"others' values of that step, {count['stale_steps']:g} with those of the one before; "
            f"{size(count['bytes_sent'])} sent by this process ({sent}), {size(count['bytes_per_exact_step'])} and "
            f"{size(count['bytes_per_stale_step'])} a step; {size(count['buffer_bytes'])} of buffers"
        )

    def details(self) -> dict[str, float]:
        """Bytes that this process sent in the last call, by layer."""
        found: dict[str, float] = {}
        for (_, layer), count in self._traffic.items():
            found[layer] = found.get(layer, 0) + count
        return found
