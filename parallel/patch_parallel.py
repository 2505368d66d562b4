"""The feature: one image on several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature, option, with_old_names
from diffusion_accel.io import shown

MODES = ("sync", "displaced", "partial", "naive")
GROUP_NORMS = ("corrected", "stale", "sync", "local")


@with_old_names
@dataclass(frozen=True, kw_only=True)
class PatchParallel(Feature):
    """Split one image among the processes of a job, so that each computes its rows of every layer.

    Run under torchrun or accelerate launch, every process with the same arguments; all return the same image. With
    one process it does nothing. Modes:

    - "sync": every layer waits for what it needs of the others: rows around its own, keys and values, statistics of
      group normalisation. The image is that of one process, up to rounding.
    - "displaced" (DistriFusion): after `warmup` exact steps a layer uses what the others had at the step before, which
      travelled while it computed, continued as its own values went on (`forecast`).
    - "partial" (PCPP): displaced, and self-attention sees its own part and the nearest
      `neighbour_fraction` of its neighbours'; no more is sent, as the tokens of which keys and values are made.
    - "naive": after `warmup` exact steps nothing is exchanged but the prediction.

    Of a transformer each process has a range of the tokens. In mode "sync" diffusers' context parallelism does this
    where it can (`enable_parallelism`, Ulysses; what it sends is not counted), otherwise hooks on the layers that
    `denoisers.Tokens` names; then the keys and values of self-attention are what is exchanged. "partial" is for U-Nets.

    Sources: Li et al., "DistriFusion: Distributed Parallel Inference for High-Resolution Diffusion Models" (CVPR
    2024), section 4; Zhang et al., "Partially Conditioned Patch Parallelism for Accelerated Diffusion Model Inference"
    (2024), section 4; tokens with keys and values of the step before: Fang et al., "PipeFusion" (2024).

    Attributes:
        ranks: how many processes there must be; the command line starts so many. 0: as many as were launched.
        mode: see above.
        warmup: exact steps at the beginning, at least 1 (naive: 0). DistriFusion's warmup_steps=4 are 5 of these.
        neighbour_fraction: share of each neighbour's part that "partial" attends to, 0 (own part only) to 1.
        group_norm: statistics at displaced steps: "corrected" (the others' old ones plus one's own change), "stale",
            "sync" (fresh, waited for) or "local" (one's own).
        forecast: at displaced steps add a part of the others' last change to what they had; how much is read off one's
            own values. False: DistriFusion and PCPP as published.
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
    conflicts: ClassVar[dict[str, str]] = {
        "controlnet_parallel": "the ControlNet's messages would go out at any time between those of the U-Net, "
        "and all processes must send theirs in one order"
    }
    shorthand: ClassVar[str | None] = "ranks"
    served: ClassVar[bool] = False  # several processes draw one image together, request by request
    runtime: ClassVar[str] = "diffusion_accel.parallel.attachment"
    old_names: ClassVar[dict[str, str]] = {"p": "neighbour_fraction"}

    ranks: int = option(0, "how many processes; 0: as many as were launched", (0, 1024))
    mode: str = option("displaced", " or ".join(MODES) + "; sync is exact")
    warmup: int = option(5, "exact steps at the beginning, at least 1 (naive: 0)", (0, 9_999))
    neighbour_fraction: float = option(0.3, "share of each neighbour's part that partial attends to, 0 to 1", (0, 1))
    group_norm: str = option("corrected", "statistics at displaced steps: " + " or ".join(GROUP_NORMS))
    forecast: bool = option(True, "continue what the others had as one's own values went on; false: as published")
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
        """Every layer waits for fresh values: exact up to rounding."""
        return cls(mode="sync")

    @classmethod
    def accepts_bare(cls, text: str) -> bool:
        """Whether `text` begins with a number of processes."""
        return text.partition(",")[0].isdigit()

    def clash(self, other: Feature) -> str | None:
        """Refuses what tells the branches of guidance apart together with `cfg_parallel`, which gives each to other
        processes."""
        if self.cfg_parallel and other.parts_branches():
            return (
                "cfg_parallel=true gives each branch of guidance to other processes, and its steps leave out a branch "
                "or need both at once; use guidance=both, or cfg_parallel=false"
            )
        return None
