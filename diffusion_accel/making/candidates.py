"""What can be switched on in the end: plans and solvers on the model that is kept, and what each was measured to do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffusion_accel.flops import count_flops
from diffusion_accel.measure.fidelity import EQUAL, fidelity
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import interleaved, ratios
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.tuning.measure import reusing, scheduling


@dataclass(frozen=True)
class Candidate:
    """One way to draw with the model that is kept.

    Attributes:
        name: as reports show it.
        steps: of its calls.
        plan: what it reuses; None: nothing.
        scheduler: a learned solver; None: the pipeline's scheduler.
    """

    name: str
    steps: int
    plan: TunedPlan | None = None
    scheduler: Any = None

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Within this context the pipeline draws so."""
        with ExitStack() as stack:
            if self.scheduler is not None:
                stack.enter_context(scheduling(pipe, self.scheduler))
            if self.plan is not None:
                stack.enter_context(reusing(pipe, self.plan))
            yield


@dataclass
class Judge:
    """Measures candidates against the model as it was, on prompts that nothing was fitted to.

    Attributes:
        full: draws with the model as it was.
        pipe: the pipeline of the model that is kept, which may be the same one.
        images: of the model as it was, drawn once.
        work: FLOPs of one of them.
    """

    full: Sampler
    pipe: Any
    images: torch.Tensor | None = None
    work: float = 0.0

    def of(self, candidate: Candidate, rounds: int) -> tuple[dict[str, Any], torch.Tensor]:
        """What a candidate keeps and gains, and its images.

        Args:
            candidate: to switch on.
            rounds: of timing, single images, in turn with the model as it was; 0: no times.

        Returns:
            PSNR (dB) and SSIM as medians and worst deciles, `flop_ratio` and `time_ratio` (above 1: less work, faster),
            and how many images.
        """
        if self.images is None:
            self.images = self.full.images()
            with count_flops() as count:
                self.full.part(0, 1).images()
            self.work = count.total
        fast = replace(self.full, pipe=self.pipe, steps=candidate.steps)
        with candidate.applied(self.pipe):
            drawn = fast.images()
            with count_flops() as count:
                fast.part(0, 1).images()
        calls: dict[bool, Callable[[], object]] = {False: self.full.part(0, 1).images, True: fast.part(0, 1).images}

        @contextmanager
        def around(which: bool) -> Iterator[None]:
            with candidate.applied(self.pipe) if which else ExitStack():
                yield

        found = fidelity(self.images, drawn)
        numbers: dict[str, Any] = {
            "psnr_median": min(found.psnr_median, EQUAL),
            "psnr_worst_decile": min(found.psnr_worst_decile, EQUAL),
            "flop_ratio": self.work / count.total if count.total else 1.0,
        }
        if rounds:
            took = interleaved(calls, rounds, around=around)
            numbers["time_ratio"] = statistics.median(ratios(took[False], took[True]))
        if found.ssim_median is not None:
            numbers["ssim_median"] = found.ssim_median
        return {**{key: round(value, 4) for key, value in numbers.items()}, "images": len(drawn)}, drawn


def in_order(tried: dict[str, dict[str, Any]], min_psnr: float) -> list[str]:
    """Those that keep a median PSNR (dB), the one of least work first, of equal ones the nearest. FLOPs decide and not
    times, which are another choice on a busy machine."""
    enough = [name for name, numbers in tried.items() if numbers["psnr_median"] >= min_psnr]
    return sorted(enough, key=lambda name: (-tried[name]["flop_ratio"], -tried[name]["psnr_median"]))


def left_for_plans(min_psnr: float, quantized: float) -> float:
    """The PSNR (dB) that a plan must keep on a quantized model so that both together keep `min_psnr`: errors of two
    causes add up as their squares do."""
    return float(-10 * torch.log10(torch.tensor(10 ** (-min_psnr / 10) - 10 ** (-quantized / 10))))
