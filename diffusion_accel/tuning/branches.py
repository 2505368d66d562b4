"""At which computed steps the conditional branch of guidance is enough: a forecast difference makes the other of it.

Such a step costs about half as much, so there may be more of them. Which steps to compute is known by then
(`timesteps`), for every number of them; here some are marked, ~n, so that all cost as much as fewer whole ones. A fit
weighs what guidance adds at each of them anew, so an old difference counts as much as it is still worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from .timesteps import LUCK, Nodes, NodeSearch

WORTH = 0.85  # of a whole step's cost: where one branch costs more nothing is gained


def cost(nodes: Nodes, half: float) -> float:
    """Of computed steps, in whole ones; `half`: of one with the conditional branch only."""
    return sum(1.0 if node >= 0 else half for node in nodes)


class BranchSearch:
    """Marks nodes.

    Attributes:
        search: of the nodes, whose rollouts are known.
        run: the scores of the images in dB of a rollout with marked nodes.
        half: what a step with one branch costs, of one with both.
        known: the scores of all that were run.
    """

    def __init__(self, search: NodeSearch, run: Callable[[Nodes], Sequence[float]], half: float) -> None:
        self.search, self.run, self.half = search, run, half
        self.known: dict[Nodes, np.ndarray] = {}

    def best(self, size: int, go_on: Callable[[], bool], told: Callable[[], None] = lambda: None) -> Nodes:
        """The best nodes that cost as much as `size` whole ones, marked or not, so far as there is time."""
        best = self.search.best(size)
        tried = self._of(size, size + 1)
        while tried and go_on():
            nodes = tried.pop(0)
            if self._ahead(nodes, best):
                best = nodes
                others = [*self._of(size, len(nodes) + 1), *self._near(nodes)]
                tried = [other for other in others if other not in self.known]
            told()
        return best

    def _ahead(self, nodes: Nodes, other: Nodes) -> bool:
        """Whether a rollout is nearer than another one, by more than images disagree about it; see `NodeSearch`."""
        if nodes not in self.known:
            self.known[nodes] = np.asarray(self.run(nodes), dtype=float)
        before = self.known[other] if other in self.known else self.search.known[other]
        each = np.clip(self.known[nodes] - before, -LUCK, LUCK)
        return bool(each.mean() > each.std() / math.sqrt(len(each)))

    def _of(self, size: int, count: int) -> list[Nodes]:
        """So many nodes of the same cost, of which the last ones are marked, or some all over."""
        marked = math.ceil((count - size) / (1 - self.half) - 1e-9)
        if count > self.search.profile.size or marked >= count:
            return []
        nodes = self.search.likely(count)
        spread = {count - 1 - math.floor(k * (count - 1) / marked) for k in range(marked)}
        return list(dict.fromkeys([_marked(nodes, set(range(count - marked, count))), _marked(nodes, spread)]))

    def _near(self, nodes: Nodes) -> list[Nodes]:
        """A mark moved to the node beside it."""
        found = []
        for k in range(1, len(nodes) - 1):
            if (nodes[k] < 0) != (nodes[k + 1] < 0):
                found.append((*nodes[:k], ~nodes[k], ~nodes[k + 1], *nodes[k + 2 :]))
        return found


def _marked(nodes: Nodes, places: set[int]) -> Nodes:
    return tuple(~node if place in places else node for place, node in enumerate(nodes))
