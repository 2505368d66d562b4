"""Private names of diffusers, transformers and accelerate are used in diffusers_compat.py and nowhere else."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("diffusion_accel", "pipelines", "quant", "parallel")
COMPAT = ROOT / "diffusion_accel" / "diffusers_compat.py"
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if file != COMPAT)
_PRIVATE = re.compile(r"_[A-Za-z]\w*")

ALLOWED = {
    "python": {"_exit", "_getframe"},
    "torch: modules and what is compiled": {
        "_apply", "_buffers", "_compiled_call_impl", "_conv_forward", "_forward_hooks", "_forward_hooks_with_kwargs",
        "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_load_from_state_dict", "_modules", "_orig_mod",
        "_parameters", "_register_state_dict_hook", "_state_dict_hooks", "_torchdynamo_orig_callable",
    },
    "torch: tensors and operators": {
        "_C", "_cdata", "_foreach_lerp_", "_int_mm", "_is_amx_tile_supported", "_is_avx512_bf16_supported",
        "_python_dispatch",
        "_scaled_dot_product_flash_attention_for_cpu", "_schema", "_version",
    },
    "ends of texts": {"_cpu_offload", "_top1", "_top5"},
    "keys of the files that diffusers writes, which cannot change": {"_class_name"},
}  # fmt: skip


def private_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names that begin with one underscore, of something else than `self`: attributes, imports, and texts."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            found = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found = [node.value]
        elif isinstance(node, ast.ImportFrom):
            found = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield from ((name, node.lineno) for name in found if _PRIVATE.fullmatch(name))  # type: ignore[attr-defined]


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that a module gives something itself: functions, classes, variables, attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr


@functools.cache
def parsed(file: Path) -> ast.AST:
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def ours() -> set[str]:
    """Names of this project: given in one of its files, or written as the text with which something of it is set."""
    names = {name for file in FILES for name in own_names(parsed(file))}
    texts = ("_source", "_like", "_acceleration", "_accelerated_base", "_accelerated_class", "_new_handle")
    suffixes = ("_codes", "_scale", "_zero_point", "_right")  # ends of the names of stored tensors
    modules = {file.stem for file in FILES}
    return (
        names
        | modules
        | {
            *texts,
            *suffixes,
            "_diffusion_accel",
            "_task_routing",
            "_diffusion_accel_call",
            "_diffusion_accel_calls",
            "_own_forward",
        }
    )


def test_only_one_module_uses_private_names_of_diffusers() -> None:
    known = ours() | {name for names in ALLOWED.values() for name in names}
    strange = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in FILES
        for name, line in private_names(parsed(file))
        if name not in known
    ]
    assert not strange, "move these into diffusers_compat.py, as a function that says which private name it is, and why"


def test_what_that_module_uses_is_nobody_elses() -> None:
    """A name of ours that is one of diffusers', too, would hide a use of theirs from the test above."""
    tree = parsed(COMPAT)
    theirs = {name for name, _ in private_names(tree)} - set(own_names(tree))
    assert len(theirs) > 15
    assert not theirs & ours()


@pytest.mark.parametrize(
    "text", ["pipe._execution_device", "vars(m).get('_hf_hook')", "from diffusers.models import _modeling_parallel"]
)
def test_the_test_sees_them(text: str) -> None:
    assert [name for name, _ in private_names(ast.parse(text)) if name not in ours()]


def test_every_function_says_which_private_name_it_is_about() -> None:
    for node in ast.walk(parsed(COMPAT)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert "`" in (ast.get_docstring(node) or ""), node.name


def test_nothing_is_allowed_that_nobody_uses() -> None:
    used = {name for file in FILES for name, _ in private_names(parsed(file))}
    used |= {name for file in FILES for name in own_names(parsed(file))}
    assert {name for names in ALLOWED.values() for name in names} <= used
