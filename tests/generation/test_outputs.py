"""The files of a request: names, checks, writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.generation.drawing import Drawn
from diffusion_accel.generation.outputs import OutputPlan, plan_outputs
from diffusion_accel.generation.request import Request
from diffusion_accel.image_files import read_metadata
from diffusion_accel.report import Report


def test_a_folder_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    request = Request(prompt="x", seed=3)
    for name in ("out.v2", "out.png"):
        (tmp_path / name).mkdir()
        (plan,) = plan_outputs(str(tmp_path / name), [request])
        assert plan.paths == (tmp_path / name / "0001-3.png",)
    (plan,) = plan_outputs(f"{tmp_path}/new.v3/", [request])
    assert plan.paths == (tmp_path / "new.v3" / "0001-3.png",)


def drawn(*modes: str) -> Drawn:
    return Drawn([Image.new(mode, (8, 8)) for mode in modes], Report(steps=1, seconds=1.0))


def test_several_images_are_numbered_over_all_requests(tmp_path: Path) -> None:
    requests = [Request(prompt="a", seed=1, count=2), Request(prompt="b", seed=7)]
    plans = plan_outputs(str(tmp_path / "x.webp"), requests)
    assert [[path.name for path in plan.paths] for plan in plans] == [["x-1.webp", "x-2.webp"], ["x-3.webp"]]
    (tmp_path / "0004-9.png").touch()
    plans = plan_outputs(str(tmp_path), requests, [None, "own.jpg"])
    assert [[path.name for path in plan.paths] for plan in plans] == [["0005-1.png", "0006-2.png"], ["own.jpg"]]


def test_a_plan_knows_every_file(tmp_path: Path) -> None:
    layers = ("fg", "bg", "blend")
    (plan,) = plan_outputs(
        str(tmp_path / "a.png"), [Request(prompt="x", seed=0)], layers=layers, preview="white", comparing=True
    )
    names = ["a-fg", "a-bg", "a-blend", "a-preview", "a-composite", "a-compare"]
    assert [file.name for file in plan.files()] == [f"{name}.png" for name in names]
    assert {file.name for file in plan.image_files(plan.paths[0])} == {"a-fg.png", "a-bg.png", "a-blend.png"}
    (tmp_path / "a-composite.png").touch()
    with pytest.raises(OutputError, match=r"a-composite\.png exists; choose another name or pass overwrite=True"):
        plan.check(overwrite=False)
    plan.check(overwrite=True)


@pytest.mark.parametrize(
    ("output", "names", "options", "words"),
    [
        ("x.bmp", (), {}, "output x.bmp: unknown image type .bmp"),
        ("x.png", ("a.png", None), {}, "output 'a.png' of the prompts file needs output to be a folder"),
        ("out", ("a.png", "a.png"), {}, "two images would be written to the same file"),
        ("out", ("../a.png", None), {}, "must be a plain file name; the folder is set by output"),
        ("x.jpg", (), {"layers": ("fg",)}, "JPEG cannot hold transparency"),
        ("out", ("a.png", "a-preview.png"), {"layers": ("fg",), "preview": "white"}, "would be written twice"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_drawn(
    output: str, names: Any, options: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    requests = [Request(prompt="a", seed=1), Request(prompt="b", seed=2)]
    with pytest.raises(ConfigurationError, match=words):
        plan_outputs(output, requests, names, **options)
    assert not list(tmp_path.iterdir())


def test_images_are_written_one_by_one_with_what_describes_them(tmp_path: Path) -> None:
    plan = OutputPlan(request=Request(prompt="x", seed=5, count=2), paths=(tmp_path / "a.png", tmp_path / "b.png"))
    files = plan.write(drawn("RGB", "RGB"), lambda image, seed: (f"x\nSteps: 1, Seed: {seed}", {"size": image.size}))
    assert not list(tmp_path.iterdir())
    first = next(files)
    assert (first.path, first.seed) == (plan.paths[0], 5) and [f.name for f in tmp_path.iterdir()] == ["a.png"]
    assert [(file.path, file.seed) for file in files] == [(plan.paths[1], 6)]
    assert read_metadata(str(plan.paths[1])) == ("x\nSteps: 1, Seed: 6", {"size": [8, 8]})


def test_layers_previews_and_composites(tmp_path: Path) -> None:
    plan = OutputPlan(
        request=Request(prompt="x", seed=5), paths=(tmp_path / "a.png",), layers=("fg", "bg"), wanted=("fg",),
        preview="checkerboard",
    )  # fmt: skip
    written = list(plan.write(drawn("RGBA", "RGB")))
    assert [(file.path.name, file.seed, file.words) for file in written] == [
        ("a-fg.png", 5, ""),
        ("a-preview.png", None, "over checkerboard"),
        ("a-composite.png", None, "fg over bg"),
    ]
    assert {file.name for file in tmp_path.iterdir()} == {file.path.name for file in written}
