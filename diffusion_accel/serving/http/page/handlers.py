"""What the buttons of the page call, and what its parts show then."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from .fields import Fields
from .memory import fields_of
from .painter import Painter, Shown, one_line

if TYPE_CHECKING:
    from diffusion_accel.serving.http.service import Service

    from .files import Files

REMEMBERED = 30  # images of a page's history
NAMES = [field.name for field in dataclasses.fields(Fields)]
_SEEN = 4  # parts that a drawn image is shown in: how it stands, the image, its layers, the comparison


class Handlers:
    """Functions for events of Gradio. Each returns a value, or an update, for each of its outputs.

    Args:
        service: of the server.
        files: where images lie.
    """

    def __init__(self, service: Service, files: Files) -> None:
        self._service, self._painter = service, Painter(service, files)

    async def draw(self, request: gr.Request, *entered: Any) -> AsyncIterator[list[Any]]:
        """From all fields and the history: what a drawn image is shown in, the history twice, whether to cancel."""
        *values, kept = entered
        async for shown in self._painter.draw(_fields(values), request.session_hash or ""):
            if shown.image is None:
                nothing = [gr.skip()] * (_SEEN - 2 + 2)
                picture = shown.preview or gr.skip()
                yield [standing(shown), picture, *nothing, gr.update(interactive=shown.running)]
            else:
                kept = [shown, *kept][:REMEMBERED]
                yield [*_seen(shown), _gallery(kept), kept, gr.update(interactive=False)]

    def cancel(self, request: gr.Request) -> None:
        """End what this page has asked for."""
        self._painter.cancel(request.session_hash or "")

    def told(self, position: Any, scheduler: Any, steps: Any) -> str:
        """From the slider, the scheduler and the steps: the plan's promise."""
        choices = self._painter.choices(_text(scheduler))
        return promise(*choices.promise(_position(position, len(choices.plans)), steps))

    def loras(self) -> str:
        """The LoRAs that there are, as loras.js shows them."""
        return self._lines({})

    def choices(self, scheduler: Any, steps: Any) -> list[Any]:
        """From the scheduler and the steps: the slider, its plan's promise."""
        choices = self._painter.choices(_text(scheduler))
        return [_slider(choices.plans, choices.usual), promise(*choices.promise(choices.usual, steps))]

    def remembered(self, text: Any) -> list[Any]:
        """From a dropped image: all fields, the plan's promise, how it stands, the place where it was dropped."""
        own = type(getattr(self._service.engine.pipe, "scheduler", None)).__name__
        try:
            found = fields_of(_text(text), self._service.reader.plans, own)
        except Exception as error:
            nothing = [gr.skip()] * (len(NAMES) + 1)
            return [*nothing, standing(Shown(words=one_line(error), failed=True)), ""]
        return [*self._entered(found), standing(Shown(words="These are the settings of the image.")), ""]

    def again(self, kept: list[Shown], event: gr.SelectData) -> list[Any]:
        """From the history: what a drawn image is shown in, all fields, the plan's promise."""
        index = event.index
        shown = kept[index] if isinstance(index, int) and 0 <= index < len(kept) else None
        if shown is None or shown.fields is None:
            return [gr.skip()] * (_SEEN + len(NAMES) + 1)
        return [*_seen(shown), *self._entered(shown.fields)]

    def _entered(self, fields: Fields) -> list[Any]:
        choices = self._painter.choices(fields.scheduler)
        position = _position(fields.position, len(choices.plans))
        values = {name: getattr(fields, name) for name in NAMES} | {"position": _slider(choices.plans, position)}
        values |= {"image": gr.skip(), "previews": gr.skip(), "loras": self._lines(fields.loras)}
        values["strength"] = gr.skip() if fields.strength is None else fields.strength
        return [*values.values(), promise(*choices.promise(position, fields.steps))]

    def _lines(self, chosen: Mapping[str, float]) -> str:
        names = sorted(self._service.engine.loras)
        return json.dumps([{"name": name, "on": name in chosen, "scale": chosen.get(name, 1)} for name in names])


# ---------------------------------------------------------------------- values of parts
def _fields(values: list[Any]) -> Fields:
    named = dict(zip(NAMES, values, strict=True))
    texts = {name: _text(named[name]) for name in ("prompt", "negative_prompt", "seed", "scheduler", "image")}
    others = {"position": int(named["position"] or 0), "loras": _chosen(_text(named["loras"]))}
    return Fields(**(named | texts | others))


def _chosen(text: str) -> dict[str, Any]:
    """The LoRAs that are switched on, of what loras.js sends; the body that they become is checked as every other."""
    try:
        lines = json.loads(text or "[]")
    except (ValueError, RecursionError):
        lines = None
    there = [line for line in lines if isinstance(line, dict)] if isinstance(lines, list) else []
    return {str(line.get("name")): line.get("scale") for line in there if line.get("on")}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _position(value: Any, most: int) -> int:
    return min(max(int(value or 0), 0), most)


def _slider(plans: tuple[Any, ...], position: int) -> Any:
    return gr.update(maximum=max(1, len(plans)), value=position, visible=bool(plans))


def _seen(shown: Shown) -> list[Any]:
    layers = gr.update(value=list(shown.layers), visible=bool(shown.layers))
    return [standing(shown), shown.image, layers, gr.update(value=shown.pair, visible=shown.pair is not None)]


def _gallery(kept: list[Shown]) -> Any:
    there = [(shown.image, None) for shown in kept if shown.image is not None]
    return gr.update(value=there, visible=len(there) > 1)


# ---------------------------------------------------------------------- HTML, in which every text is escaped
def promise(name: str, words: str) -> str:
    """What is promised of the slider's plan."""
    return f'<div class="promise"><b>{escape(name)}</b>{escape(words)}</div>'


def standing(shown: Shown) -> str:
    """How a request stands."""
    words = escape(shown.words)
    if shown.failed:
        return f'<div class="standing failed" role="alert">{words}</div>'
    bar = f'<div class="bar"><span style="width: {100 * shown.share:.0f}%"></span></div>' if shown.running else ""
    return f'<div class="standing" role="status">{bar}{words}</div>'
