"""The other end of an `Isolated`: what is asked and answered, in JSON lines.

As a program (`python lines.py MODULE`) it answers with `handle` of a module beside it, in an environment where this
package need not be installed; so this file imports nothing but Python.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

MARK = "@bench "


def serve(handle: Callable[[dict[str, Any]], Any]) -> None:
    """Answer what is asked with what `handle` returns, or with the error that it raises."""
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a package prints
    for line in _lines():
        try:
            answer = {"value": handle(json.loads(line))}
        except Exception as error:
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"}
        print(MARK + json.dumps(answer), file=out, flush=True)


def _lines() -> Iterator[str]:
    """What is asked, line by line. When nobody can ask any more, this process ends, also in the middle of its work."""
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            asked.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True, name="asked").start()
    while True:
        yield asked.get()


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]).handle)
