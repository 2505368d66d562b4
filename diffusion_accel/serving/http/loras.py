"""LoRAs by name; which there are can be changed only where the server was started so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from .bodies import LoraName
from .problems import ERRORS, Problem

if TYPE_CHECKING:
    from .service import Service

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class LoraBody(BaseModel):
    """The LoRA that is meant: the name of its file in the server's folder, without .safetensors."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: LoraName


class Loras(BaseModel):
    """The LoRAs that requests may name."""

    loras: list[str]


def routes(service: Service) -> APIRouter:
    """The routes, for one server."""
    router = APIRouter(prefix="/v1/loras", tags=["LoRAs"], responses=ERRORS)
    engine, folder = service.engine, service.settings.lora_folder

    def there() -> Loras:
        return Loras(loras=sorted(engine.loras))

    def allowed_folder() -> Path:
        if folder is None or not service.settings.lora_changes:
            raise Problem(403, "LoRAs change only where lora_folder and lora_changes are given", code="not_enabled")
        return folder

    @router.get("")
    async def loras() -> Loras:
        """Which there are."""
        return there()

    @router.post("/load")
    async def load(body: LoraBody) -> Loras:
        """Let requests name a file that is in the server's folder now, or another one by a name that there was."""
        file = allowed_folder() / f"{body.name}.safetensors"
        if not _PLAIN.fullmatch(body.name) or not file.is_file():
            raise Problem(404, "there is no such file in the server's folder of LoRAs", "name")
        engine.add_lora(body.name, file)
        return there()

    @router.post("/unload")
    async def unload(body: LoraBody) -> Loras:
        """Let requests name it no longer; those that have it already are drawn."""
        allowed_folder()
        if body.name not in engine.loras:
            raise Problem(404, "there is no such LoRA", "name")
        engine.remove_lora(body.name)
        return there()

    return router
