"""Errors as clients see them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from diffusion_accel.errors import AccelerationError, EngineClosedError, QueueFullError
from diffusion_accel.io import printable

_LONGEST = 500  # characters of a message
_FOLDERS = re.compile(r"(?<![\w./])(?:~|\.{0,2})/(?:[^\s/:;,'\"]+/)+")  # of the server, which are no client's business
_TYPES = {
    401: ("authentication_error", "invalid_token"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "too_slow"),
    413: ("invalid_request_error", "too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal"),
    503: ("server_error", "unavailable"),
}
#: what the library's errors begin with -> a field of a body
_PARAMS = {
    "width": "size",
    "height": "size",
    "count": "n",
    "steps": "num_inference_steps",
    **{name: name for name in ("guidance_scale", "seed", "strength", "scheduler", "reuse", "quality", "speedup")},
    **{name: name for name in ("min_psnr", "prompt", "image")},
    **{name: name for name in ("control_guidance_start", "control_guidance_end")},
    "transparent": "background",
    "mask_image": "mask",
}


class Problem(HTTPException):
    """A request is refused.

    Args:
        status: of the answer.
        message: what was given, what is allowed, what to do.
        param: the field that it is about.
        code: a word for programs; None: the usual one of the status.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code


class Detail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: Detail


_UNKNOWN = "there is no such field; /docs lists those that there are"
#: what unknown fields begin with -> what is said of them
_ABSENT = {
    "ip_adapter": "this server draws without IP-Adapters; leave it out",
    "controlnet": "the ControlNet is the one that the server was started with; leave it out",
    "control_images": "one control_image is read, for the one ControlNet of this server",
}

#: answers of routes for the OpenAPI page
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "it cannot be read, or the model cannot draw it",
        401: "the token is missing or wrong",
        403: "it comes from a page of another site",
        404: "there is no such thing",
        408: "the body comes too slowly",
        409: "the request was cancelled meanwhile",
        413: "the body is too large",
        422: "a field is missing, unknown or out of its limits",
        429: "the queue is full; Retry-After says when to try again",
        500: "the server failed; its log has more under the request id",
        503: "the server is about to end; Retry-After says when to try again",
    }.items()
}


def body_of(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON values of an error."""
    kind, usual = _TYPES.get(status, ("invalid_request_error", None))
    text = printable(_FOLDERS.sub("…/", " ".join(message.split())))
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return {"error": {"message": text, "type": kind, "param": param, "code": code or usual}}


class Refusal(JSONResponse):
    """An answer that is an error.

    Args:
        values: of its body.
        status: of the answer.
        headers: of the answer.
    """

    def __init__(self, values: dict[str, Any], status: int, headers: Mapping[str, str]) -> None:
        self.values = values
        super().__init__(values, status, headers)


def answer_to(error: Exception, retry_after: int = 1) -> Refusal:
    """What a client is told about an error.

    Args:
        error: which; of those that nobody expected it learns nothing.
        retry_after: seconds, for errors that time heals.
    """
    headers: dict[str, str] = {}
    param = code = None
    if isinstance(error, RequestValidationError):
        status, message, param = _of_validation(error)
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
        param, code = getattr(error, "param", None), getattr(error, "code", None)
    elif isinstance(error, QueueFullError):
        status, message = 429, str(error)
    elif isinstance(error, EngineClosedError):
        status, message = 503, "the server is about to end and takes no more requests"
    elif isinstance(error, AccelerationError):
        status, message = 400, str(error)
        param = _PARAMS.get(message.split(" ", 1)[0].rstrip(":"))
    else:
        status, message = 500, "the server failed; its log has more under this request's id"
    if status in (429, 503):
        headers.setdefault("Retry-After", str(retry_after))
    return Refusal(body_of(status, message, param, code), status, headers)


def _of_validation(error: RequestValidationError) -> tuple[int, str, str | None]:
    """Status, message and field of the first thing that is wrong with a body."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    if (first["type"] in ("json_invalid", "missing") and not where) or first["type"] == "json_invalid":
        return 400, "the body is not valid JSON", None
    name = ".".join(where)[:100]
    message = str(jsonable_encoder(first["msg"]))
    if first["type"] == "extra_forbidden":
        message = next((words for start, words in _ABSENT.items() if name.startswith(start)), _UNKNOWN)
    elif name.startswith("control") and isinstance(first.get("input"), list):
        message = "one is taken, for the one ControlNet of this server, got a list"
    return 422, f"{name}: {message}" if name else message, name or None
