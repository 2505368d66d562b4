"""One server for all tests of a worker that do not end it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from http_server import TIMEOUT, TOKEN, Server, running
from openai import OpenAI

LIMITS = "--max-running 4 --max-queue 4 --max-pixels 16384 --max-steps 100 --max-images 4 --max-body-mb 1".split()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server"), *LIMITS) as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, timeout=TIMEOUT, max_retries=0) as made:
        yield made
