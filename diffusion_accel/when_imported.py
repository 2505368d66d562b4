"""Something to do once another package's module is imported, by whomever, without importing it before."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # without importing `typing`: every start of the command comes by here
if TYPE_CHECKING:
    import importlib.machinery
    from collections.abc import Callable, Sequence
    from types import ModuleType
    from typing import Any


class _Watch:
    """Runs something on a module as soon as somebody has imported it, then steps aside."""

    def __init__(self, name: str, run: Callable[[Any], None]) -> None:
        self.name, self.run = name, run

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        import importlib.util  # only where it is imported: every start of the command comes by here

        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.run(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(name: str, run: Callable[[Any], None]) -> None:
    """Call `run` with a module, now if it is imported, else as soon as it is. The same twice is done once.

    Args:
        name: of the module.
        run: may be called more than once with the same module.
    """
    if name in sys.modules:
        run(sys.modules[name])
    elif not any(isinstance(f, _Watch) and (f.name, f.run) == (name, run) for f in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, run))  # type: ignore[arg-type]
