"""Log lines of a server: one a request, as text or JSON, never with a prompt, a token or an image in them."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import IO, Any

from diffusion_accel.io import printable

FORMATS = ("text", "json")
logger = logging.getLogger("diffusion_accel.http")
request_id: ContextVar[str] = ContextVar("request_id", default="")


def event(what: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Write one line: what happened, and values by name. The id of the request comes along."""
    named = {"request_id": request_id.get() or None, **fields}
    logger.log(level, what, exc_info=error, extra={"fields": {k: v for k, v in named.items() if v is not None}})


def set_up(form: str, stream: IO[str] | None = None) -> None:
    """Send the lines of the server, and of the libraries below it, to a stream (stderr) in one of the `FORMATS`."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    for name, level in ((logger.name, logging.INFO), ("uvicorn", logging.WARNING), ("python_multipart", logging.ERROR)):
        one = logging.getLogger(name)
        one.handlers[:] = [handler]
        one.setLevel(level)
        one.propagate = False


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        words = [_time(record), record.levelname.lower(), record.getMessage()]
        line = printable(" ".join([*words, *(f"{name}={value}" for name, value in fields.items())]))
        return line if record.exc_info is None else f"{line}\n{self.formatException(record.exc_info)}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
