"""Which settings of a feature name files: those of recipes and of images are looked for beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusion_accel import Reuse
from diffusion_accel.feature import Feature, option
from diffusion_accel.parallel import PatchParallel


@dataclass(frozen=True)
class Renamed(Feature):
    """A feature whose field had another name."""

    name: ClassVar[str] = "renamed"
    old_names: ClassVar[dict[str, str]] = {"was": "file"}
    file: str = option("", "a file", names_file=bool)


def test_a_file_is_known_by_old_names_too() -> None:
    for key in ("file", "was"):
        test = Renamed.file_test(key)
        assert test is not None and test("a.json") and not test("")
    plan = Reuse.file_test("plan")
    assert plan is not None and plan("folder/plan.json") and not plan("hold:2")
    assert PatchParallel.file_test("p") is None and Renamed.file_test("else") is None
