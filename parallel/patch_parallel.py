"""The feature: one image on several processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment, Feature, option
from diffusion_accel.io import shown

if TYPE_CHECKING:
    from diffusion_accel.steps import StepClock

    from .run import PatchRun

logger = logging.getLogger(__name__)

MODES = ("sync", "displaced", "partial", "naive")
GROUP_NORMS = ("corrected", "stale", "sync", "local")


@dataclass(frozen=True, kw_only=True)
class PatchParallel(Feature):
    """Split one image among the processes of a job, so that each computes its rows of every layer.

    Run under torchrun or accelerate launch, every process with the same arguments; all return the same image. With
    one process it does nothing. Modes:

    - "sync": every layer waits for what it needs of the others: rows around its own, keys and values, statistics of
      group normalisation. The image is that of one process, up to rounding.
    - "displaced" (DistriFusion): after `warmup` exact steps a layer uses what the others had at the step before, which
      travelled while it computed.
    - "partial" (PCPP): displaced, and self-attention sees its own part and the `p` nearest share of its neighbours';
      no more is sent, as the tokens of which keys and values are made.
    - "naive": after `warmup` exact steps nothing is exchanged but the prediction.

    Transformers are shared by diffusers' context parallelism (`enable_parallelism`, Ulysses), in mode "sync" only; what
    it sends is not counted.

    Sources: Li et al., "DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models" (CVPR
    2024), section 4; Zhang et al., "Partially Conditioned Patch Parallelism for Accelerated Diffusion Model Inference"
    (2024), section 4.

    Attributes:
        ranks: how many processes there must be; the command line starts so many. 0: as many as were launched.
        mode: see above.
        warmup: exact steps at the beginning, at least 1 (naive: 0). DistriFusion's warmup_steps=4 are 5 of these.
        p: share of each neighbour's part that "partial" attends to, 0 (own part only) to 1.
        group_norm: statistics at displaced steps: "corrected" (the others' old ones plus one's own change), "stale",
            "sync" (fresh, waited for) or "local" (one's own).
        cfg_parallel: give the two halves of guidance's batch to two halves of the processes, and split the image
            within each. Calls without guidance split the image only.
        vae: decode and encode in parts, exactly.
        comm_checkpoint: displaced messages of so many layers travel together, at least 1 (DistriFusion's 60).
        timeout: seconds after which a process that does not answer is given up, above 0.

    Counters: `ranks`, `exact_steps`, `stale_steps`, `bytes_sent` by this process in all, per step after the warm-up
    (`bytes_per_stale_step`) and during it (`bytes_per_exact_step`), and by kind (`halo_bytes`, `norm_bytes`,
    `attention_bytes`, `output_bytes`); `buffer_bytes`. `report().details` has the bytes of the call by layer.

    Whatever is drawn without a generator is drawn from the random state of rank 0.
    """

    name: ClassVar[str] = "patch_parallel"
    summary: ClassVar[str] = "one image on several processes, exactly or with activations of the step before"
    paper: ClassVar[str] = "DistriFusion (Li et al., CVPR 2024); PCPP (Zhang et al., 2024)"
    order: ClassVar[int] = 10
    shorthand: ClassVar[str | None] = "ranks"

    ranks: int = option(0, "how many processes; 0: as many as were launched", (0, 1024))
    mode: str = option("displaced", " or ".join(MODES) + "; sync is exact")
    warmup: int = option(5, "exact steps at the beginning, at least 1 (naive: 0)", (0, 9_999))
    p: float = option(0.3, "share of each neighbour's part that partial attends to, 0 to 1", (0, 1))
    group_norm: str = option("corrected", "statistics at displaced steps: " + " or ".join(GROUP_NORMS))
    cfg_parallel: bool = option(False, "split the two branches of guidance first")
    vae: bool = option(True, "decode and encode in parts, exactly")
    comm_checkpoint: int = option(60, "displaced messages of so many layers travel together", (1, 9_999))
    timeout: float = option(300.0, "seconds after which a process that does not answer is given up", (0, 1e6))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("mode", MODES), ("group_norm", GROUP_NORMS)):
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"patch_parallel: {name}={shown(getattr(self, name))} is not allowed; use {', '.join(allowed)}"
                )
        least = 1 if self.mode in ("displaced", "partial") else 0
        checks = {
            "warmup": (self.warmup >= least, f"at least {least} with mode={self.mode}"),
            "comm_checkpoint": (self.comm_checkpoint >= 1, "at least 1"),
            "timeout": (0 < self.timeout < 1e6, "above 0, in seconds"),
        }
        for name, (good, allowed_values) in checks.items():
            if not good:
                raise ConfigurationError(
                    f"patch_parallel: {name}={getattr(self, name)} is not allowed; it must be {allowed_values}"
                )

    @classmethod
    def neutral(cls) -> Self:
        return cls(mode="sync")

    @classmethod
    def accepts_bare(cls, text: str) -> bool:
        return text.partition(",")[0].isdigit()

    def supports(self, pipeline: Any) -> str | None:
        from diffusion_accel.denoisers import (
            denoiser_names,
            find_denoiser,
            not_a_unet,
            not_splittable,
            reads_every_step,
        )
        from diffusion_accel.diffusers_compat import context_parallel_plan

        denoiser = find_denoiser(pipeline)
        if denoiser is None:
            return "the pipeline has no unet or transformer"
        reason = not_a_unet(denoiser)
        if reason is None:
            return not_splittable(denoiser) or reads_every_step(pipeline)
        name = type(denoiser).__name__
        if "unet" in denoiser_names(pipeline):
            return reason
        if context_parallel_plan(type(denoiser)) is None:
            return f"{name} is a transformer, and diffusers has no context-parallel plan for it (enable_parallelism)"
        if self.mode != "sync":
            return f"{name} is a transformer, which is shared exactly: use mode=sync instead of mode={self.mode}"
        return None

    def clash(self, other: Feature) -> str | None:
        if self.cfg_parallel and other.leaves_branches_out():
            return (
                "cfg_parallel=true gives each branch of guidance to other processes, and its steps leave out a branch; "
                "use guidance=both, or cfg_parallel=false"
            )
        return None

    def attach(self, pipeline: Any) -> Attachment:
        return PatchAttachment(self, pipeline)


class PatchAttachment(Attachment):
    """Patch parallelism on one pipeline; its hooks, messages and buffers live for one call."""

    feature: PatchParallel

    def __init__(self, feature: PatchParallel, pipeline: Any) -> None:
        super().__init__(feature, pipeline)
        self._traffic: dict[tuple[str, str], int] = {}
        self._run: PatchRun | None = None
        self._counters: dict[str, float] = {}

    def before_call(self, clock: StepClock) -> None:
        from diffusion_accel.diffusers_compat import execution_device

        from .communicator import Communicator
        from .group import join, share_random_state
        from .run import PatchRun
        from .setup import Agreement, install, why_not

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
        reason = feature.supports(self.pipeline) or why_not(self.pipeline, feature.cfg_parallel, world.size)
        if reason:
            raise ConfigurationError(f"patch_parallel cannot be used on this pipeline: {reason}")
        communicator = Communicator(world.group, feature.comm_checkpoint)
        self._run = PatchRun(world, clock, communicator, feature.mode, feature.warmup, feature.p, feature.group_norm)
        check = Agreement(self.pipeline, clock, world)
        install(self.changes, self._run, self.pipeline, feature.cfg_parallel, feature.vae, check)

    def after_call(self) -> None:
        from .group import PeerError

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
        return dict(self._counters)

    def details(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for (_, layer), size in self._traffic.items():
            found[layer] = found.get(layer, 0) + size
        return found
