"""The graphs of one module: found by the signature of a call, compiled once, checked, and dropped when it changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import nn

from diffusion_accel._version import __version__
from diffusion_accel.diffusers_compat import has_offload_hook, hook_names, registry_of
from diffusion_accel.flops import counting
from diffusion_accel.hooks import bind_forward
from diffusion_accel.inside import CallInside, call_inside
from diffusion_accel.io import first_line
from diffusion_accel.snapshot import TORCH_HOOKS, Snapshot

from . import store
from .calls import Call, Flat, OpaqueError, Template
from .compiled import Compiled
from .digest import digest
from .engine import Graph, Target

logger = logging.getLogger(__name__)

MOST = 32  # graphs of one module
CHECKS = 2  # calls of a new graph that are compared with the module: a value may have become a constant of the graph
#: relative errors (L2) at which a graph is wrong, not only less precise
BOUNDS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05, "grids": 0.3}
_WASTED = 8  # graphs in a row that served no call but those that made them: the module changes all the time
_WIDE = (torch.float64, torch.complex64, torch.complex128)
_PACKAGES = ("torch", "diffusers", "transformers")

Counters = dict[str, float]
COUNTERS = ("graph_calls", "eager_calls", "graphs_compiled", "graphs_loaded", "compile_seconds")


@dataclass
class _Entry:
    """A graph, or None if the call runs uncompiled; how many of its next calls are checked."""

    graph: Graph | None
    template: Template
    dtypes: list[torch.dtype] = field(default_factory=list)
    checks: int = 0
    served: int = 0


# Graphs outlive the call and the attachment, not the module: switching the feature off and on compiles nothing.
_graphs: weakref.WeakKeyDictionary[nn.Module, dict[Compiled, Graphs]] = weakref.WeakKeyDictionary()


def graphs_of(module: nn.Module, feature: Compiled) -> Graphs:
    """The graphs of a module for a setting."""
    return _graphs.setdefault(module, {}).setdefault(feature, Graphs(feature))


class Graphs:
    """The graphs of one module for one setting. Holds what the module holds, never the module itself.

    Attributes:
        fresh: the next call is the first of a call of the pipeline: it notices weights that were written without a
            trace, too.
    """

    def __init__(self, feature: Compiled) -> None:
        self.feature, self.engine = feature, feature.compiler
        self._entries: dict[str, _Entry] = {}
        self._snapshot: Snapshot | None = None
        self._digest: str | None = None
        self._parts: list[nn.Module] = []
        self._hooked = self._strange = False  # by torch or accelerate, by others: a trace would follow them once
        self._known: tuple[list[str], bool] | None = None  # for which hooks inside, and whether they are as before
        self._wasted = 0
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self.fresh = True

    def run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counters: Counters,
    ) -> Any:
        """What stands in the place of the module's forward."""
        named, inside = bind_forward(module, args, kwargs), call_inside(module)
        own = getattr(forward, "__func__", None) is not type(module).forward
        given = None if inside is None else inside.given
        try:
            if own and not (self.engine.fuses_grids and getattr(forward, "goes_into_graphs", False)):
                raise OpaqueError("hooks of others around it")
            if reason := self._unfit(module, inside):
                raise OpaqueError(reason)
            call = Call.of(named, inside, own)
            if self.feature.closes_inside() and any(t.dtype in _WIDE and t.dim() for t in call.tensors):
                raise OpaqueError("a tensor in double precision")
        except OpaqueError as reason:
            counters["eager_calls"] += 1
            if not counting():
                self._tell(f"{type(module).__name__} runs uncompiled where its call has {reason}")
            return forward(*args, **kwargs)
        with self._lock:
            entry, tensors = self._serve(module, call, counters)
        if inside is not None:
            inside.start(given)
        if entry is None or tensors is None:
            counters["eager_calls"] += 1
            return forward(*args, **kwargs)
        counters["graph_calls"] += 1
        output, left = entry.template.output(tensors)
        if inside is not None:
            inside.left = left
        return output

    # ------------------------------------------------------------------ one call
    def _serve(
        self, module: nn.Module, call: Call, counters: Counters
    ) -> tuple[_Entry | None, list[torch.Tensor] | None]:
        """The graph of a call, and what it returns; None where the call runs uncompiled."""
        target = self._target(call)
        signature = f"{call.signature} {target.threads}"
        entry = self._entries.get(signature)
        if entry is None:
            if not self._may_compile(module):
                return None, None
            if not self.feature.closes_inside():
                graph = self.engine.compile(Flat(module, call.template, []), call.tensors, target)
                tensors = graph(module, call.tensors)
                entry = self._entries[signature] = _Entry(graph, call.template, [t.dtype for t in tensors])
                return entry, tensors
            return self._made(module, call, signature, target, counters)
        if entry.graph is None:
            return None, None
        entry.served += 1
        if entry.served > CHECKS:
            self._wasted = 0
        reference = None
        if entry.checks:
            entry.checks -= 1
            reference = entry.template.run(module, call.tensors)
        return self._checked(module, entry, call, reference)

    def _may_compile(self, module: nn.Module) -> bool:
        if self._entries and self.feature.on_new_shape == "eager":
            return False
        name = type(module).__name__
        if len(self._entries) >= MOST:
            self._tell(f"{name} was called in {MOST} ways; others run uncompiled")
        elif self._wasted >= _WASTED:
            self._tell(f"{name} changes from call to call, so it runs uncompiled")
        else:
            return True
        return False

    def _made(
        self, module: nn.Module, call: Call, signature: str, target: Target, counters: Counters
    ) -> tuple[_Entry | None, list[torch.Tensor] | None]:
        """A new graph of a call, from disk or compiled, and what it returns."""
        name, began = type(module).__name__, time.perf_counter()
        reference = call.template.run(module, call.tensors)
        entry = self._entries[signature] = _Entry(None, call.template, [tensor.dtype for tensor in reference])
        key = self._key(module, signature, target)
        try:
            entry.graph = self._restored(key, target)
            loaded = entry.graph is not None
            if entry.graph is None:
                logger.info("compiling %s for %s (%s)", name, call.shapes(), self.engine.name)
                entry.graph = self._compiled(module, call, target)
                entry.checks = CHECKS - 1
        except Exception as error:
            self._tell(f"{self.engine.name} cannot compile {name}, so it runs uncompiled: {first_line(error)}")
            return None, None
        _, tensors = self._checked(module, entry, call, reference)
        if tensors is None and loaded and key:
            store.drop(key)
        elif tensors is not None and not loaded and key and self.engine.store and entry.graph:
            store.save(key, self.engine.store(entry.graph), self.feature.max_cache_mb * 2**20)
        counters["graphs_loaded" if loaded else "graphs_compiled"] += 1
        counters["compile_seconds"] += time.perf_counter() - began
        self._wasted += 1
        return entry, tensors

    def _compiled(self, module: nn.Module, call: Call, target: Target) -> Graph:
        flat = Flat(module, call.template, [tensor.dtype for tensor in call.tensors])
        if not self.engine.keeps_weights:
            return self.engine.compile(flat, call.tensors, target)
        with torch.inference_mode(False), torch.no_grad():
            tensors = [tensor.detach().clone() for tensor in call.tensors]  # no two of them share memory
            return self.engine.compile(flat, tensors, target)

    def _checked(
        self, module: nn.Module, entry: _Entry, call: Call, reference: list[torch.Tensor] | None
    ) -> tuple[_Entry | None, list[torch.Tensor] | None]:
        """What a graph returns, unless it is not what the module returns."""
        assert entry.graph is not None
        found = entry.graph(module, call.tensors)
        tensors = [tensor.to(dtype) for tensor, dtype in zip(found, entry.dtypes, strict=True)]
        if reference is None:
            return entry, tensors
        kinds = (self.feature.precision, *entry.dtypes, "grids" if entry.template.own else "")
        bound = max(BOUNDS.get(str(kind).removeprefix("torch."), 0) for kind in kinds)
        error = max((_distance(a, b) for a, b in zip(reference, tensors, strict=True)), default=0.0)
        if error <= bound:
            return entry, tensors
        entry.graph = None
        self._tell(
            f"a graph of {type(module).__name__} is off by {error:.2g} (at most {bound:g} is allowed with "
            f"{self.feature.precision}), so it runs uncompiled"
        )
        return None, None

    # ------------------------------------------------------------------ what graphs depend on
    def _target(self, call: Call) -> Target:
        feature, precision = self.feature, self.feature.precision
        if self.engine.follows_model and any(tensor.dtype is torch.bfloat16 for tensor in call.tensors):
            precision = "bfloat16"
        return Target(precision, feature.device, feature.mode, torch.get_num_threads())

    def _unfit(self, module: nn.Module, inside: CallInside | None) -> str:
        """Why this call cannot be a graph's; drops the graphs of weights and settings that the module had before."""
        if not self.feature.closes_inside():
            return ""
        if torch.is_grad_enabled():
            return "gradients"
        if counting():
            return "operations that are counted"
        thorough, self.fresh = self.fresh, False
        if self._snapshot is None or not self._snapshot.holds(values=thorough):
            self._snapshot = Snapshot(module, hooks=False)
            self._parts = [part for part in module.modules() if part is not module]
            self._hooked = any(has_offload_hook(p) or any(getattr(p, n) for n in TORCH_HOOKS) for p in self._parts)
            frozen = [signature for signature, entry in self._entries.items() if self._keeps_weights(entry.template)]
            if self.engine.keeps_weights or inside is not None or frozen:
                before, self._digest = self._digest, digest(module)
                if before is None or before != self._digest:
                    for signature in frozen:
                        del self._entries[signature]
            self._known = None
        known, untouched = [] if inside is None else [inside.hooks], self._snapshot.untouched
        if self._known != (known, untouched) or not untouched:
            registries = filter(None, map(registry_of, self._parts))
            self._strange = any(hook_names(registry) != known for registry in registries)
            self._known = known, untouched
        return "hooks inside that are not known" if self._hooked or self._strange else ""

    def _keeps_weights(self, template: Template) -> bool:
        """Whether graphs of a call have their own copy of weights and settings."""
        return self.engine.keeps_weights or template.inside is not None

    def _stores(self) -> bool:
        return self.feature.cache and self.engine.store is not None and store.place() is not None

    def _key(self, module: nn.Module, signature: str, target: Target) -> str | None:
        """The name of a graph on disk; None where it is not kept."""
        if not self._stores() or self._digest is None:
            return None
        facts = {
            "module": type(module).__qualname__,
            "weights": self._digest,
            "signature": signature,
            "engine": self.engine.name,
            "versions": {**{name: metadata.version(name) for name in _PACKAGES}, "diffusion-accel": __version__},
            "target": dataclasses.asdict(target),
            **self.engine.identity(target),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]

    def _restored(self, key: str | None, target: Target) -> Graph | None:
        data = None if key is None else store.load(key)
        if data is None or self.engine.restore is None or key is None:
            return None
        try:
            return self.engine.restore(data, target)
        except Exception as error:  # of another build of the engine, or damaged
            logger.info("a stored graph cannot be used: %s", first_line(error))
            store.drop(key)
            return None

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning("%s", text)


def _distance(reference: torch.Tensor, found: torch.Tensor) -> float:
    """The relative error of a tensor (L2); infinite for another shape, 0 where the reference is not finite itself."""
    if reference.shape != found.shape:
        return float("inf")
    if not reference.dtype.is_floating_point:
        return 0.0 if torch.equal(reference, found) else float("inf")
    wide = reference.double()
    if not torch.isfinite(wide).all():
        return 0.0
    error, size = (found.double() - wide).norm(), wide.norm()
    ratio = float(error / size) if size else float(error)
    return ratio if ratio == ratio else float("inf")
