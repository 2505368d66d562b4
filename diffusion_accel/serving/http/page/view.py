"""The page in Gradio: what is on it, where, and which function an event calls."""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI

from diffusion_accel.pipelines.learned import LEARNED
from diffusion_accel.pipelines.schedulers import SCHEDULERS
from diffusion_accel.serving.http.log import event
from diffusion_accel.transparency.latent_transparency import LatentTransparency

from .choices import Choices
from .handlers import Handlers, promise, standing
from .painter import Shown

if TYPE_CHECKING:
    from diffusion_accel.serving.http.service import Service

    from .files import Files

_SESSIONS = 1000  # open pages whose history is kept
_WORDS = 500  # characters of an error of Gradio
_DROP = """<label><input type="file" accept="image/png,image/webp,image/jpeg"><span>Drop an image here, or choose one,
to take over the settings it was drawn with.</span></label>"""
_START = """<label><input type="file" accept="image/png,image/webp,image/jpeg"><img alt="" hidden><span>Drop an image
here, or choose one, to start from it.</span></label><button type="button" hidden>Remove</button>"""


def application(service: Service, files: Files) -> FastAPI:
    """The application that answers the addresses of the page.

    Args:
        service: of the server.
        files: where images lie.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(files.folder)  # what it may serve, and writes itself
    page: Any = _page(service, Handlers(service, files))
    page.process_api = _quietly(page.process_api)
    page.has_launched = True  # only then it checks the paths of files
    page.state_session_capacity = _SESSIONS
    made = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=1,
        theme=_theme(),
        css=_file("style.css"),
    )
    made.state.calls = {number: [_kind(one) for one in call.inputs] for number, call in page.fns.items()}
    return made


def _kind(part: Any) -> str:
    """What a browser sends of a part of the page: one of `route.KINDS`."""
    kinds = {gr.Slider: "number", gr.Number: "maybe a number", gr.Checkbox: "switch", gr.State: "state"}
    return next((kind for cls, kind in kinds.items() if isinstance(part, cls)), "text")


def _quietly(process: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Gradio's call of a function without the traceback that it writes between the lines of the log."""

    @functools.wraps(process)
    async def call(*given: Any, **named: Any) -> Any:
        try:
            return await process(*given, **named)
        except Exception as error:
            if not isinstance(error, gr.Error):  # such as a value that is not on the page
                event("error", 40, error)
            words = error.message if isinstance(error, gr.Error) else "the server failed; its log has more"
            raise gr.Error(escape(str(words))[:_WORDS], print_exception=False) from error

    return call


def _page(service: Service, handlers: Handlers) -> gr.Blocks:
    model = service.settings.model
    with gr.Blocks(title=f"diffusion-accel: {model}", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>diffusion-accel</h1><p>draws with <code>{escape(model)}</code></p>", elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                *first, told = _asked(service)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120, scale=3)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=90, scale=1, interactive=False)
                stands = gr.HTML(standing(Shown(words="")), elem_id="standing")
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    *more, drop = _more(service)
                    previews = gr.Checkbox(True, label="Show the image while it is drawn", elem_id="previews")
                with gr.Accordion("Start from an image", open=False, elem_id="from"):
                    start = _start()
                able = bool(service.engine.loras) or service.settings.lora_changes
                with gr.Accordion("LoRAs", open=False, visible=able, elem_id="with"):
                    loras = gr.HTML(
                        handlers.loras(), html_template="<div></div>", js_on_load=_file("loras.js"), elem_id="loras"
                    )
            with gr.Column(min_width=320):
                picture, layers, pair, history = _drawn()
        kept = gr.State([])
        prompt, _, slider, *_ = first
        _, steps, _, scheduler, *_ = more
        fields, seen = [*first, *more, *start, loras, previews], [stands, picture, layers, pair]

        on = functools.partial(gr.on, api_visibility="private", show_progress="hidden")
        on(
            [draw.click, prompt.submit],
            handlers.draw,
            [*fields, kept],
            [*seen, history, kept, cancel],
            trigger_mode="once",
            api_name="draw",
        )
        on([cancel.click], handlers.cancel, None, None, api_name="cancel")
        last = functools.partial(on, trigger_mode="always_last")
        last([slider.change, steps.change], handlers.told, [slider, scheduler, steps], [told], api_name="promise")
        last([scheduler.input], handlers.choices, [scheduler, steps], [slider, told], api_name="choices")
        on([drop.submit], handlers.remembered, [drop], [*fields, told, stands, drop], api_name="settings")
        on([history.select], handlers.again, [kept], [*seen, *fields, told], api_name="again")
        on([page.load], handlers.loras, None, [loras], api_name="loras")
        page.unload(handlers.cancel)
    return page.queue(default_concurrency_limit=None)  # the engine has limits of its own


def _asked(service: Service) -> list[Any]:
    """The first fields of `Fields`, and what is promised."""
    engine, limits, given = service.engine, service.settings.limits, service.settings.defaults
    choices = Choices.of(service.reader.plans, None)
    able = "transparent" in engine.features or LatentTransparency().supports(engine.pipe) is None
    with gr.Group():
        prompt = gr.Textbox(
            label="Prompt",
            lines=2,
            max_lines=6,
            autofocus=True,
            placeholder="panda, 3d style",
            max_length=limits.prompt,
            elem_id="prompt",
        )
        negative = gr.Textbox(
            given.get("negative_prompt"),
            label="Negative prompt",
            lines=1,
            max_lines=4,
            placeholder="what should not be seen",
            max_length=limits.prompt,
        )
        slider = gr.Slider(
            0,
            max(1, len(choices.plans)),
            choices.usual,
            step=1,
            label="Quality or speed",
            visible=bool(choices.plans),
            buttons=[],
            elem_id="slider",
        )
        told = gr.HTML(promise(*choices.promise(choices.usual, given.get("steps"))), elem_id="promise")
        with gr.Row():
            transparent = gr.Checkbox(
                "transparent" in engine.features, label="Transparent", min_width=140, visible=able
            )
            compare = gr.Checkbox(False, label="Compare with every step", min_width=140, visible=bool(choices.plans))
    return [prompt, negative, slider, transparent, compare, told]


def _more(service: Service) -> list[Any]:
    """The other fields of `Fields`, and the place for an image."""
    given = service.settings.defaults
    names = [("the model's own", ""), *((name, name) for name in (*SCHEDULERS, LEARNED))]
    with gr.Row():
        seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1, min_width=130)
        steps = gr.Number(given.get("steps"), label="Steps", precision=0, min_width=80)
        guidance = gr.Number(given.get("guidance_scale"), label="Guidance", step=0.5, min_width=80)
    with gr.Row():
        scheduler = gr.Dropdown(names, value="", label="Scheduler", min_width=180, scale=2)
        width = gr.Number(given.get("width"), label="Width", precision=0, step=8, min_width=80)
        height = gr.Number(given.get("height"), label="Height", precision=0, step=8, min_width=80)
    drop = gr.HTML("", html_template=_DROP, js_on_load=_file("drop.js"), elem_id="drop")
    return [seed, steps, guidance, scheduler, width, height, drop]


def _start() -> list[Any]:
    """Where the drawing starts."""
    image = gr.HTML("", html_template=_START, js_on_load=_file("start.js"), elem_id="start")
    strength = gr.Slider(0.05, 1, 0.6, step=0.05, label="How much of it is replaced", buttons=[], elem_id="strength")
    return [image, strength]


def _drawn() -> list[Any]:
    """What is drawn: the image, its layers, the comparison, the history."""
    picture = gr.Image(
        label="Image",
        show_label=False,
        type="filepath",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="picture",
    )
    layers = gr.Gallery(
        label="Layers",
        visible=False,
        interactive=False,
        columns=3,
        height=200,
        object_fit="contain",
        buttons=["download", "fullscreen"],
        elem_id="layers",
    )
    pair = gr.ImageSlider(
        label="Left every step, right the plan",
        type="filepath",
        interactive=False,
        visible=False,
        elem_id="pair",
        buttons=["fullscreen"],
        max_height=460,
    )
    history = gr.Gallery(
        label="Drawn on this page: choose one to see it again, with its settings",
        visible=False,
        interactive=False,
        allow_preview=False,
        columns=5,
        fit_columns=False,
        object_fit="contain",
        buttons=[],
        elem_id="history",
        height="auto",
    )
    return [picture, layers, pair, history]


def _theme() -> Any:
    """Quiet labels, and fonts of the system: none is fetched."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    theme = gr.themes.Soft(primary_hue="indigo", neutral_hue="slate", font=fonts, font_mono=mono)
    quiet = {"background_fill": "none", "text_color": "*body_text_color"}
    labels = {
        "_".join(("block", part, what, *mode)): value
        for part in ("title", "label")
        for what, value in quiet.items()
        for mode in ((), ("dark",))
    }
    return theme.set(**labels, block_title_padding="0", block_title_text_weight="500", block_label_text_weight="500")


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
