"""The table of engines. Another one is a file with its `Engine`, and a line here."""

from __future__ import annotations

from .eager_engine import EAGER
from .engine import Engine
from .inductor_engine import INDUCTOR
from .openvino_engine import OPENVINO

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (OPENVINO, INDUCTOR, EAGER)}
