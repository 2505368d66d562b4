"""No engine: the module itself, called as a graph would be. What is compared with, and what tests run everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .engine import Engine, Graph, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .calls import Flat, Template


class _Eager:
    def __init__(self, template: Template) -> None:
        self.template = template

    def __call__(self, module: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.template.run(module, tensors)


def _compile(flat: Flat, _tensors: list[torch.Tensor], _target: Target) -> Graph:
    return _Eager(flat.template)


EAGER = Engine("eager", _compile, machines=("cpu", "cuda", "mps", "xpu"))
