"""The feature: a ControlNet that runs beside the U-Net's encoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Feature, option
from diffusion_accel.io import shown

_DEVICE = re.compile(r"(cpu|(cuda|xpu)(:[0-9]{1,3})?)")


@dataclass(frozen=True, kw_only=True)
class ControlNetParallel(Feature):
    """Compute a ControlNet at the same time as the U-Net's encoder.

    A U-Net adds what the ControlNet gives only after its encoder. So the ControlNet's call returns at once, and the
    U-Net waits where it first needs a value. Until then the ControlNet computes in a thread of its own: on a CPU beside
    the U-Net on other cores, on CUDA in a stream of its own, or on another device. The images are the same, bit for
    bit, where both devices are of one kind. Several ControlNets of one pipeline run one after the other in that thread.

    It pays where something is idle: cores that one image does not fill, a GPU that small images do not fill, another
    GPU. Where the U-Net alone fills the device, both only share it.

    Source: Li et al., "SwiftDiffusion: Efficient Diffusion Model Serving with Add-on Modules" (2024), ControlNets as
    services beside the base model.

    Attributes:
        device: where the ControlNet computes, such as "cuda:1"; it is moved there when a call begins and back when it
            ends. Empty: where it lies, which may be another device than that of the U-Net, and then costs no move.

    Counters: `runs_beside` (calls of the ControlNet that returned at once), `runs_in_turn` (others: operations were
    counted meanwhile, for example).
    """

    name: ClassVar[str] = "controlnet_parallel"
    summary: ClassVar[str] = "the ControlNet at the same time as the U-Net's encoder"
    paper: ClassVar[str] = "SwiftDiffusion (Li et al., 2024)"
    order: ClassVar[int] = 15
    conflicts: ClassVar[dict[str, str]] = {
        "patch_parallel": "the ControlNet's messages would go out at any time between those of the U-Net, "
        "and all processes must send theirs in one order"
    }
    served: ClassVar[bool] = False
    runtime: ClassVar[str] = "diffusion_accel.controlnet.attachment"

    device: str = option("", "where the ControlNet computes, such as cuda:1 (default: where it lies)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device and not _DEVICE.fullmatch(self.device):
            raise ConfigurationError(
                f"controlnet_parallel: device={shown(self.device)} is not allowed; use cpu, cuda, cuda:1 or xpu:1"
            )

    @classmethod
    def neutral(cls) -> Self:
        """The recommended setting: it changes nothing but when something is computed."""
        return cls()
