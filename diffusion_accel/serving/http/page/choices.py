"""The slider between quality and speed: tuned plans, and what was measured of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion_accel.image_metadata import names_only
from diffusion_accel.reuse.plan_family import down
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.serving.http.plans import EVERY_STEP

if TYPE_CHECKING:
    from diffusion_accel.serving.http.plans import Plans

_FASTEST = 1000.0  # that a body may ask for


@dataclass(frozen=True)
class Choices:
    """Positions of the slider: 0 is every step, then come the plans from the most faithful to the fastest.

    Attributes:
        plans: of the positions from 1 on.
        usual: the position where the slider begins.
    """

    plans: tuple[TunedPlan, ...] = ()
    usual: int = 0

    @classmethod
    def of(cls, plans: Plans, scheduler: str | None) -> Choices:
        """Those of a scheduler: each plan that a request for its speed is given.

        Args:
            plans: that the server knows.
            scheduler: as in a body; None: the pipeline's own.
        """
        family = plans.find(scheduler)
        if family is None or not family.members:
            return cls()
        speeds = [plan.speedup for plan in family.members if 1 <= (plan.speedup or 0) <= _FASTEST]
        offered = tuple({id(plan := family.choose(speedup=speed)): plan for speed in speeds}.values())
        chosen = family.choose()
        return cls(offered, next((n for n, plan in enumerate(offered, 1) if plan is chosen), len(offered)))

    def asked(self, position: int) -> dict[str, Any]:
        """The fields of a body for a position; none of them where there are no plans to choose from."""
        if not self.plans:
            return {}
        return {"quality": EVERY_STEP} if position == 0 else {"speedup": self.plans[position - 1].speedup}

    def position_of(self, text: str | None) -> int | None:
        """The position of a plan by the text that metadata has for it, None for every step; None if it is none."""
        if text is None:
            return 0
        names = [names_only(plan.text) for plan in self.plans]
        return names.index(text) + 1 if text in names else None

    def promise(self, position: int, steps: float | None = None) -> tuple[str, str]:
        """What a position is called, and what was measured of it.

        Args:
            position: of the slider.
            steps: that the request asks for; None: nothing said.
        """
        if not self.plans:
            return (
                "As the server was started",
                "It has no tuned plans for this scheduler, so there is nothing to choose.",
            )
        if position == 0:
            return "Every step", "Nothing is skipped. It is the image that the plans are compared with."
        plan = self.plans[position - 1]
        name = (plan.name or f"plan {position}").capitalize()
        words = f"{down(plan.speedup, 1)} times as fast"
        if plan.psnr_median is not None:
            words += f", {down(plan.psnr_median)} dB to the image of every step"
        if plan.psnr_worst_decile is not None:
            words += f" (nine of ten images: {down(plan.psnr_worst_decile)} dB or more)"
        words += f". Measured with {plan.made_for} steps"
        return name, words + ("." if steps in (None, plan.made_for) else f"; with {steps:g} it may be less.")
