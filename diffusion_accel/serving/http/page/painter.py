"""Drawing what the page asks for: through the reader and the service of the other routes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffusion_accel.compositing import checkerboard, over
from diffusion_accel.errors import AccelerationError
from diffusion_accel.generation.layers import by_image
from diffusion_accel.generation.records import Origin
from diffusion_accel.measure.fidelity import EQUAL, fidelity
from diffusion_accel.serving.http.answers import skipped_steps
from diffusion_accel.serving.http.log import event
from diffusion_accel.serving.http.plans import EVERY_STEP
from diffusion_accel.serving.http.problems import Problem, answer_to
from diffusion_accel.serving.http.uploads import LARGER, decoded, from_base64

from .choices import Choices
from .memory import LARGEST

if TYPE_CHECKING:
    from PIL import Image

    from diffusion_accel.generation.partial import Partial
    from diffusion_accel.serving.handle import Handle, Served
    from diffusion_accel.serving.http.asked import Asked
    from diffusion_accel.serving.http.service import Service

    from .fields import Fields
    from .files import Files

_LAYERS = {"fg": "foreground", "bg": "background", "blend": "both"}
_FIELDS = (233, 251)  # the greys of style.css
_FETCHED = 1.0  # seconds in which a browser fetches an image
_PREVIEWS = 4  # times that an image is shown before it is finished
_TICK = 0.2  # seconds between two looks at how far it is


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What the page shows of a request.

    Attributes:
        words: how it stands, in a line.
        share: of its steps that are done, 0 to 1.
        running: whether it goes on.
        failed: whether the words are an error.
        image: a file, once it is drawn.
        preview: a file of what it is until then, if it is another one than before.
        layers: files by name, of a model that draws layers.
        pair: files of the image of every step and of this one, without alpha.
        fields: that draw it again, with its seed.
    """

    words: str
    share: float = 0.0
    running: bool = False
    failed: bool = False
    image: str | None = None
    preview: str | None = None
    layers: tuple[tuple[str, str], ...] = ()
    pair: tuple[str, str] | None = None
    fields: Fields | None = None


class _Drawing:
    """What a page has asked for: requests that are cancelled together, also while they are being submitted."""

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self._cancelled = False

    def add(self, handle: Handle) -> None:
        self.handles.append(handle)
        if self._cancelled:
            handle.cancel()

    def cancel(self) -> None:
        self._cancelled = True
        for handle in self.handles:
            handle.cancel()


class Painter:
    """Draws for the pages of one server.

    Args:
        service: of the server.
        files: where images lie.
    """

    def __init__(self, service: Service, files: Files) -> None:
        self.service, self._files = service, files
        self._running: dict[str, list[_Drawing]] = {}  # by page

    def choices(self, scheduler: str) -> Choices:
        """The slider for a scheduler."""
        return Choices.of(self.service.reader.plans, scheduler or None)

    async def draw(self, fields: Fields, page: str) -> AsyncIterator[Shown]:
        """Draw, and say how far it is; if nobody listens any more, the request is cancelled.

        Args:
            fields: as they were entered.
            page: which of the open pages asks.
        """
        drawing = _Drawing()
        self.service.showing += 1
        self._running.setdefault(page, []).append(drawing)
        loop, news, previews = asyncio.get_running_loop(), asyncio.Event(), list[str]()

        def preview(partial: Partial) -> None:
            image = by_image(partial.images, asked[0].layers)[0][asked[0].wanted[0]]
            previews.append(self._files.keep(image, "preview"))
            loop.call_soon_threadsafe(news.set)

        try:
            fields = replace(fields, seed=fields.seed.strip() or str(secrets.randbelow(2**32)))
            asked = await self.service.in_thread(self._asked, fields)
            shows = fields.previews and self.service.engine.shows_partial_images(asked[0].scheduler)
            for one in asked:
                first = not drawing.handles
                handle = await self.service.submit(one, _PREVIEWS if shows and first else 0, preview if first else None)
                drawing.add(handle)
                handle.future.add_done_callback(lambda _future: loop.call_soon_threadsafe(news.set))
            while not all(handle.future.done() for handle in drawing.handles):
                yield replace(_progress(drawing.handles), preview=previews[-1] if previews else None)
                previews.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), _TICK)
                news.clear()
            served = [self.service.result_of(handle) for handle in drawing.handles]
            yield await self.service.in_thread(self._drawn, fields, asked, drawing.handles, served)
        except Exception as error:
            cancelled = isinstance(error, Problem) and error.code == "cancelled"
            yield Shown(words="Cancelled.") if cancelled else Shown(words=one_line(error), failed=True)
        finally:
            drawing.cancel()
            loop.call_later(_FETCHED, self._fetched)
            self._running[page].remove(drawing)
            if not self._running[page]:
                del self._running[page]

    def cancel(self, page: str) -> None:
        """End what a page has asked for."""
        for drawing in self._running.get(page, []):
            drawing.cancel()

    def _fetched(self) -> None:
        self.service.showing -= 1

    def _asked(self, fields: Fields) -> list[Asked]:
        """The request, and the one for every step where they differ and shall be compared."""
        choices, reader = self.choices(fields.scheduler), self.service.reader
        start = self._start(fields)
        asked = [reader.read(fields.body(choices.asked(min(fields.position, len(choices.plans)))), **start)]
        if fields.compare:
            plain = reader.read(fields.body({"quality": EVERY_STEP}), **start)
            asked += [plain] if plain.features != asked[0].features else []
        return asked

    def _start(self, fields: Fields) -> dict[str, Any]:
        """The fields of a request that starts from an image."""
        if not fields.image:
            return {}
        if len(fields.image) > LARGEST * 4 // 3 + 100:
            raise Problem(413, f"the image has more than the {LARGEST >> 20} MiB that are allowed", "image")
        limit = self.service.settings.limits.pixels * LARGER
        return {"image": decoded(from_base64(fields.image, "image"), "image", limit), "strength": fields.strength}

    def _drawn(self, fields: Fields, asked: list[Asked], handles: list[Handle], served: list[Served]) -> Shown:
        """Write the images; in a thread."""
        request = asked[0].request
        layers = by_image(served[0].images, asked[0].layers)[0]
        files = {}
        for name in asked[0].wanted:
            words, data = self._settings(asked[0], handles[0], served[0], layers[name].size)
            files[name] = self._files.keep(layers[name], "-".join(filter(None, ("image", name))), words, data)
        report, pair, more = served[0].report, None, ""
        if len(served) > 1:
            both = [by_image(one.images, asked[0].layers)[0][asked[0].wanted[0]] for one in reversed(served)]
            every, fewer = (self._files.keep(_opaque(image), "compared") for image in both)
            pair = (every, fewer)
            near = fidelity(both[:1], both[1:]).psnr_median
            more = " It equals the image of every step." if near >= EQUAL else f" {near:.1f} dB to that of every step."
        skipped = skipped_steps(served[0])
        steps = f"{report.steps} steps" + (f", {skipped} of them not computed in full" if skipped else "")
        words = f"Seed {request.seed}: {steps}, {report.seconds:.1f} s.{more}"
        return Shown(
            words=words,
            share=1.0,
            image=files[asked[0].wanted[0]],
            layers=tuple((file, _LAYERS[name]) for name, file in files.items()) if len(files) > 1 else (),
            pair=pair,
            fields=replace(fields, image=""),
        )

    def _settings(
        self, asked: Asked, handle: Handle, served: Served, size: tuple[int, int]
    ) -> tuple[str, dict[str, Any]]:
        origin = Origin(
            pipe=self.service.engine.pipe,
            model=self.service.settings.model,
            features={feature.name: feature for feature in asked.features},
            scheduler=handle.scheduler,
        )
        request = asked.request
        data = origin.data(request, request.seed, served)
        chosen = {"scheduler": asked.scheduler, "loras": dict(asked.loras)}
        data["settings"] |= {name: value for name, value in chosen.items() if value}
        return origin.text(request, request.seed, served, size), data


def _opaque(image: Image.Image) -> Image.Image:
    """An image as the page shows it: transparent parts over a checkerboard."""
    return over(image, checkerboard(image.size, *_FIELDS)) if image.mode == "RGBA" else image


def _progress(handles: list[Handle]) -> Shown:
    standings = [handle.progress for handle in handles]
    ahead = max(standing.ahead for standing in standings)
    if any(standing.state == "queued" for standing in standings):
        return Shown(words="Waiting" + (f": {ahead} before this one" if ahead else "") + " …", running=True)
    step, steps = sum(one.step for one in standings), sum(one.steps for one in standings)
    words = f"Step {step} of {steps} …" if steps else "Beginning …"
    return Shown(words=words, share=step / max(1, steps), running=True)


def one_line(error: Exception) -> str:
    """An error as a client of HTTP reads it, in one line; of those that nobody expected it learns nothing."""
    if not isinstance(error, AccelerationError) and answer_to(error).status_code == 500:
        event("error", 40, error)
    return str(answer_to(error).values["error"]["message"])
