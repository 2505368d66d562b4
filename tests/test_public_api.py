"""The public names: all load, all say what they take, and the verbs take the same things under the same names."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import zoo

import diffusion_accel
from diffusion_accel import ConfigurationError

NAMES = [name for name in diffusion_accel.__all__ if not name.startswith("_")]
VERBS = ("compare", "tune", "quantize", "benchmark", "evaluate")
SHARED = {"steps", "seed", "guidance_scale", "height", "width", "batch", "progress"}


def verbs() -> list[Any]:
    return [getattr(diffusion_accel, name) for name in VERBS if name in NAMES]


def section(text: str, name: str) -> str:
    """What stands under a heading of a docstring, such as Args."""
    found = re.search(rf"^{name}:\n((?:[ ]+.*\n?|\n)+)", text, flags=re.MULTILINE)
    return found[1] if found else ""


def test_importing_loads_neither_torch_nor_diffusers() -> None:
    code = "import sys, diffusion_accel; dir(diffusion_accel); print({'torch', 'diffusers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_table_of_names_is_the_list_of_names() -> None:
    assert {*diffusion_accel._LAZY} <= {*NAMES} == {*dir(diffusion_accel)} - {"__version__"}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = diffusion_accel.no_such_name  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_loads_and_says_what_it_is(name: str) -> None:
    value = getattr(diffusion_accel, name)
    text = inspect.getdoc(value) or ""
    assert len(text) > 20 and value.__name__ == name
    if inspect.isfunction(value):
        signature, described = inspect.signature(value), section(text, "Args")
        for parameter in signature.parameters:
            assert re.search(rf"^ {{4}}(\w+, )*{parameter}(, \w+)*: ", described, flags=re.MULTILINE), (name, parameter)
        assert "Raises:" in text and ("Returns:" in text or "return it" in text), name


@pytest.mark.parametrize("verb", verbs(), ids=lambda verb: verb.__name__)
def test_verbs_take_the_same_under_the_same_names(verb: Any) -> None:
    parameters = inspect.signature(verb).parameters
    assert [*parameters][:2] == ["pipe", "prompts"]
    kinds = {parameter.kind for parameter in [*parameters.values()][2:]}
    assert kinds <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}, "the rest is given by name"
    assert {*parameters} >= SHARED
    for name in ("steps", "guidance_scale", "height", "width"):
        assert parameters[name].default is None, f"{name}: None is the pipeline's own"
    example = rf"^ {{4}}.*\b{verb.__name__}\("
    assert re.search(example, inspect.getdoc(verb) or "", flags=re.MULTILINE)


class Pipeline:
    """What the verbs ask of a pipeline before they look at it more closely."""

    def __call__(self, prompt: str, num_inference_steps: int = 50, guidance_scale: float = 7.5) -> None: ...


@pytest.mark.parametrize("verb", verbs(), ids=lambda verb: verb.__name__)
def test_unknown_keywords_are_refused_with_the_nearest(verb: Any) -> None:
    needed = {"quantize": {"output": "nowhere"}, "tune": {"speedup": 2.0}}.get(verb.__name__, {})
    with pytest.raises(ConfigurationError, match="did you mean guidance_scale"):
        verb(Pipeline(), ["red apple"], guidance_skale=3.0, **needed)


def test_the_reference_page_is_of_today() -> None:
    text = reference.PAGE.read_text(encoding="utf-8")
    assert text == reference.page(), "python scripts/reference.py writes it anew"
    assert reference.PAGE == Path(diffusion_accel.__file__).parents[1] / "docs" / "reference" / "api.md"
    modules = reference.MODULES.read_text(encoding="utf-8")
    assert modules == reference.modules_page(), "python scripts/reference.py writes it anew"
    assert reference.DOCSTRINGS.read_text(encoding="utf-8") == reference.docstrings_page()
    packages = {p.parent.relative_to(reference.ROOT).as_posix() for p in reference.ROOT.glob("*/**/__init__.py")}
    ours = {p for p in packages if p.split("/")[0] in ("diffusion_accel", "pipelines", "quant", "parallel")}
    assert ours - {"diffusion_accel/assets"} == {*reference.SOURCES.values()}


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("quantize", {"output": 5}, "output must be a text or a path or None, got 5"),
        ("quantize", {"overwrite": "a"}, "overwrite must be true or false"),
        ("quantize", {"images": -1}, "images must be a whole number of at least 0"),
        ("evaluate", {"data": 5}, "data must be a text"),
        ("tune", {"speedup": 2, "progress": 3}, "progress must be a function"),
        ("tune", {"speedup": True}, "speedup must be a number"),
        ("tune", {"state": 3}, "state must be a text or a path"),
        ("compare", {"seed": 1.5}, "seed must be a whole number"),
        ("benchmark", {"entries": ["reuse:hold:2"], "device": "cdua"}, "device 'cdua' is none"),
        ("benchmark", {"entries": ["reuse:hold:2"], "converged": 1}, "converged must be true or false"),
    ],
)
def test_values_of_the_wrong_type_are_refused(name: str, values: dict[str, Any], says: str) -> None:
    pipe, _ = zoo.sd()
    with pytest.raises(ConfigurationError, match=says):
        getattr(diffusion_accel, name)(pipe, ["a", "b"], **values)


def test_what_no_verb_takes_is_refused() -> None:
    for call in (
        lambda: diffusion_accel.estimate(5),
        lambda: diffusion_accel.estimate("sd15", decode="x"),
        lambda: diffusion_accel.compare("no pipeline", ["a"], 4),
        lambda: diffusion_accel.evaluate(),
        lambda: diffusion_accel.fidelity(3, 4),
        lambda: diffusion_accel.fidelity([], []),
    ):
        with pytest.raises(ConfigurationError):
            call()
