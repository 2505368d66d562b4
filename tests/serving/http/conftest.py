"""One server for all tests of a worker that do not end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from http_server import TIMEOUT, TOKEN, Server, running
from model_folder import write_folder
from openai import OpenAI
from safetensors.torch import save_file
from zoo import controlnet_model, unet

LIMITS = "--max-running 4 --max-queue 4 --max-pixels 16384 --max-steps 1000 --max-images 4 --max-body-mb 1".split()


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), *LIMITS) as made:
        yield made


@pytest.fixture
def server(shared_server: Server) -> Server:
    """It draws nothing: what the test before left there has ended."""
    shared_server.until_idle()
    return shared_server


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can also inpaint."""
    return write_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LoRA for it."""
    made = tmp_path_factory.mktemp("loras")
    write_lora(made / "first.safetensors", 0)
    return made


def write_lora(file: Path, seed: int) -> None:
    name, layer = next((n, m) for n, m in unet().named_modules() if n.endswith("attn1.to_q"))
    rows, columns = layer.weight.shape
    values = torch.Generator().manual_seed(seed)
    halves = {"A": torch.randn(4, columns, generator=values), "B": torch.randn(rows, 4, generator=values)}
    save_file({f"unet.{name}.lora_{half}.weight": 5 * value for half, value in halves.items()}, file)


@pytest.fixture(scope="session")
def controlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for it."""
    made = tmp_path_factory.mktemp("controlnet")
    controlnet_model().save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def painter(tmp_path_factory: pytest.TempPathFactory, folder: Path, loras: Path, controlnet: Path) -> Iterator[Server]:
    """A server with that model, whose images take no time."""
    few = "--steps 2 --width 16 --height 16 --max-steps 6 --max-pixels 1024 --max-images 2".split()
    beside = ["--lora-folder", str(loras), "--lora-changes", "--controlnet", str(controlnet)]
    with running(tmp_path_factory.mktemp("painter"), "--model", str(folder), *beside, *few) as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, timeout=TIMEOUT, max_retries=0) as made:
        yield made
