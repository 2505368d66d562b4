"""Plans that a search begins with, by family."""

from __future__ import annotations

from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.preset import Preset
from diffusion_accel.reuse.search import Rule, best_plans, predicted_error

from .measure import Observations
from .neighbours import guidance_thinned


def find_families(seen: Observations) -> list[list[Plan]]:
    """Plans to begin with, by family: those of the dynamic programme for every number of full steps, in all spaces
    together and in each, with fewer or more rules; also with guidance's unconditional branch left out at some."""
    found, total = [], seen.total
    for chosen in (seen.forecasts, *([f] for f in seen.forecasts if len(seen.forecasts) > 1)):
        for rules in ([Rule(1, True)], [Rule(1, True), Rule(2, True)], [Rule(1), Rule(2), Rule(3)]):
            for careful in (True, False)[: len(rules)]:
                found.append(list(best_plans(chosen, total, rules, careful).values()))
    found.append([Preset("hold", interval, order=2).for_steps(total) for interval in (2, 3, 4)])
    if seen.guided:
        found += [[guidance_thinned(plan, every) for plan in plans] for plans in found for every in (2, 3)]
    return found


def starts(families: list[list[Plan]], seen: Observations, limit: float) -> list[Plan]:
    """The best plan of each family within a time of `limit`, the one of smallest predicted error first.

    Plans that reuse guidance come last: what that costs is not predicted.
    """
    affordable = [[plan for plan in plans if seen.costs.time(plan) <= limit] for plans in families]
    chosen = dict.fromkeys(max(plans, key=seen.costs.time) for plans in affordable if plans)
    return sorted(chosen, key=lambda plan: (plan.reuses_guidance, predicted_error(plan, seen.forecasts)))
