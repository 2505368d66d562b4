"""What can be compared: our features, fewer steps, other methods' forecasts, and other accelerators."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown
from diffusion_accel.pipelines.schedulers import check_scheduler, check_steps
from diffusion_accel.registry import FEATURES, feature_class

from . import families
from .forecasting import Forecast
from .peers import PEERS, missing_package, read_settings

if TYPE_CHECKING:
    from diffusion_accel.feature import Feature
    from diffusion_accel.model_files.names import ModelSource

USUAL: tuple[str, ...] = (
    "reuse:hold:2",
    "reuse:hold:3",
    "reuse:deepcache:3",
    "reuse:faster-diffusion",
    "encoder-reuse",
    "fewer-steps:25",
    "fewer-steps:17",
)
TOGETHER = "together"
KINDS = (*(name.replace("_", "-") for name in FEATURES), families.KIND, "fewer-steps", "forecast", *PEERS)
# what joins two kinds, in a text whose settings may have a "+" as well
_JOINED = re.compile(
    r"\+(?=(?:" + "|".join((*(name.replace("_", "-") for name in FEATURES), "fewer-steps")) + r")(?:[:+]|$))"
)


@dataclass(frozen=True)
class Entry:
    """One row of the benchmark.

    Attributes:
        kind: "baseline", a feature's name with dashes, "family" (see `expanded`), "fewer-steps", "forecast", one of
            `PEERS`, or "together".
        settings: a feature's settings as on the command line; "STEPS[,SCHEDULER[,SPACING]]" of fewer steps; what
            `forecasting.Rule` reads; a peer's settings; the whole text of features, and fewer steps, that are together.
        family: the tuned family that it is one plan of, "" if it is none or given by itself.
    """

    kind: str
    settings: str = ""
    family: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """As it is shown: the kind and its settings."""
        if self.kind == TOGETHER:
            return " + ".join(part.name for part in self.parts)
        return f"{self.kind} {self.settings}".strip()

    @functools.cached_property
    def parts(self) -> tuple[Entry, ...]:
        """What is switched on together; itself if it is one thing."""
        if self.kind != TOGETHER:
            return (self,)
        return tuple(Entry.parse(text) for text in _JOINED.split(self.settings))

    @property
    def is_peer(self) -> bool:
        """Whether it runs in a process of its own, since it may leave something patched."""
        return self.kind in PEERS

    @classmethod
    def parse(cls, text: str) -> Entry:
        """`KIND` or `KIND:SETTINGS`, such as "reuse:hold:3", "fewer-steps:25,dpm++", "deepcache:3,0"; features, and
        fewer steps, joined by "+": "compiled:precision=bf16+reuse:hold:2".

        Raises:
            ConfigurationError: an unknown kind or settings that it does not take.
        """
        if not isinstance(text, str):
            raise ConfigurationError(f"entries must be texts or objects of Entry, got {shown(text)}")
        if _JOINED.search(text):
            return cls._together(text)
        kind, _, settings = text.partition(":")
        if kind not in KINDS:
            owners = (name for name in FEATURES if feature_class(name).accepts_bare(text))
            near = next((f"{owner}:{text}" for owner in owners), None) or nearest(kind[:100], KINDS)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigurationError(f"unknown entry {shown(text)}; the kinds are: {', '.join(KINDS)}{hint}")
        entry = cls(kind, settings)
        if kind == "fewer-steps":
            entry.fewer_steps()
        elif entry.is_peer:
            _ = entry.peer_settings
        elif kind == families.KIND:
            families.members_of(settings)
        else:
            _ = entry.feature
        return entry

    @classmethod
    def _together(cls, text: str) -> Entry:
        entry = cls(TOGETHER, text)
        kinds = [part.kind for part in entry.parts]
        if odd := [kind for kind in kinds if kind.replace("-", "_") not in FEATURES and kind != "fewer-steps"]:
            raise ConfigurationError(f"only features and fewer-steps can be joined by +, got {shown(odd[0])}")
        if len(set(kinds)) < len(kinds):
            raise ConfigurationError(f"the entry {shown(text)} has one kind twice")
        return entry

    def expanded(self) -> list[Entry]:
        """Itself; of a family an entry for each of its plans."""
        if self.kind != families.KIND:
            return [self]
        return [Entry("reuse", settings, self.settings) for settings in families.members_of(self.settings)]

    @functools.cached_property
    def feature(self) -> Feature:
        """The feature with its settings, of an entry that runs here as one: ours, and other methods' forecasts."""
        kind = Forecast if self.kind == "forecast" else feature_class(self.kind)
        return kind.parse(self.settings)

    @property
    def features(self) -> list[Feature]:
        """The features that are switched on for it."""
        return [part.feature for part in self.parts if part.kind not in ("baseline", "fewer-steps", *PEERS)]

    @property
    def by_image(self) -> bool:
        """Whether it decides by what it sees which steps are computed, so that each image is a call of its own."""
        if self.is_peer:
            return PEERS[self.kind].by_image
        return self.kind == "forecast" and isinstance(self.feature, Forecast) and self.feature.parsed.kind.adaptive

    def refusal(self, steps: int, scheduler: str) -> str | None:
        """Why it cannot be compared with a baseline of so many steps, as far as that is known before a model is loaded;
        None if it can."""
        if self.is_peer:
            return missing_package(self.kind)
        fewer = next((part for part in self.parts if part.kind == "fewer-steps"), None)
        if fewer is not None:
            steps, other = fewer.fewer_steps()
            scheduler = other or scheduler
        return next(filter(None, (feature.unfit_for(steps, scheduler) for feature in self.features)), None)

    def fewer_steps(self) -> tuple[int, str | None]:
        """The number of steps, and the scheduler if it is another one."""
        steps, _, scheduler = self.settings.partition(",")
        if not re.fullmatch(r"[0-9]{1,5}", steps) or not 1 <= int(steps) <= 10_000:
            raise ConfigurationError(
                "fewer-steps takes STEPS[,SCHEDULER[,SPACING]], such as fewer-steps:25,dpm++,lu; "
                f"got {shown(self.settings)}"
            )
        if scheduler:
            check_scheduler(scheduler)
        return int(steps), scheduler or None

    @functools.cached_property
    def peer_settings(self) -> dict[str, Any]:
        """A peer's settings by name; the usual ones where none are given."""
        return read_settings(self.kind, self.settings)


def read_entries(entries: Sequence[str | Entry]) -> list[Entry]:
    """Entries as they are written, and those that a family stands for.

    Raises:
        ConfigurationError: an unknown kind, settings that it does not take, an entry that is given twice.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ConfigurationError(f"entries must be a list of entries, got {shown(entries)}")
    given = [entry if isinstance(entry, Entry) else Entry.parse(entry) for entry in entries]
    parsed = [entry for one in given for entry in one.expanded()]
    if len(set(parsed)) < len(parsed):
        raise ConfigurationError("an entry is given twice")
    return parsed


def check_entries(entries: Sequence[Entry], steps: int, scheduler: str, source: ModelSource | None = None) -> None:
    """Refuse what cannot work with so many steps and a scheduler, as far as that is known before a model is loaded.

    Args:
        entries: what is compared.
        steps, scheduler: of the baseline.
        source: the model, if it is one that is loaded later.

    Raises:
        ConfigurationError: an entry cannot work.
    """
    for entry in entries:
        if reason := entry.refusal(steps, scheduler):
            raise ConfigurationError(f"the entry {entry.name} cannot work: {reason}")
        for part in entry.parts:
            if source is not None and part.kind == "fewer-steps":
                fewer, other = part.fewer_steps()
                check_steps(other or scheduler or None, source, fewer)
