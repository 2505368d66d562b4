"""Jobs: asked for now, fetched later."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from http_server import SMALL, TIMEOUT, Server
from PIL import Image

from diffusion_accel.serving.http import jobs
from diffusion_accel.serving.http.problems import Problem


def ended(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    end = time.monotonic() + TIMEOUT
    while job["status"] in ("queued", "generating"):
        assert time.monotonic() < end
        time.sleep(0.02)
        job = server.ask("GET", job["poll_url"])[2]
    return job


def test_a_job(server: Server) -> None:
    status, headers, job = server.ask("POST", "/jobs", SMALL | {"background": "transparent"})
    assert status == 202 and headers["location"] == job["poll_url"] and job["status"] in ("queued", "generating")
    job = ended(server, job)
    assert (job["status"], job["progress"], job["step"], job["steps"]) == ("completed", 1.0, 3, 3)
    _, _, whole = server.ask("POST", "/v1/images/generations", SMALL | {"background": "transparent"})
    assert job["result"]["data"] == whole["data"]
    assert server.ask("POST", job["cancel_url"])[2]["status"] == "completed"  # too late


def test_a_job_that_is_cancelled(server: Server) -> None:
    _, _, job = server.ask("POST", "/jobs", SMALL | {"num_inference_steps": 1000})
    assert server.ask("POST", job["cancel_url"])[2]["status"] == "cancelled"
    assert server.ask("GET", job["poll_url"])[2]["status"] == "cancelled"


@pytest.mark.parametrize("name", ["job-1", "..", "%2e%2e%2fetc", "x" * 5000])
def test_no_such_job(server: Server, name: str) -> None:
    assert server.ask("GET", f"/jobs/{name}")[0] == 404
    assert server.ask("POST", f"/jobs/{name}/cancel")[0] == 404


def test_refused(server: Server) -> None:
    assert server.ask("POST", "/jobs", SMALL | {"stream": True})[0] == 422
    assert server.ask("POST", "/jobs", SMALL | {"n": 5})[0] == 422
    assert server.ask("POST", "/jobs", SMALL | {"prompt": " "})[0] == 422
    assert server.ask("POST", "/jobs/edits", SMALL)[0] == 400


@pytest.mark.parametrize(
    ("limit", "most", "kept"),
    [("KEPT", 2, 2), ("KEPT_BYTES", 192, 3), ("KEPT_BYTES", 1, 1), ("KEPT_SECONDS", -1, 0)],
)
def test_the_last_ones_are_kept(monkeypatch: pytest.MonkeyPatch, limit: str, most: float, kept: int) -> None:
    monkeypatch.setattr(jobs, limit, most)

    async def submit(_asked: Any) -> Any:
        return SimpleNamespace(future=Future())

    async def begun() -> list[str]:
        known = jobs.Jobs(SimpleNamespace(submit=submit))  # type: ignore[arg-type]
        made = [await known.begin(SimpleNamespace()) for _ in range(5)]  # type: ignore[arg-type]
        for job in made[:4]:
            job.handle.future.set_result(SimpleNamespace(images=[Image.new("RGBA", (4, 4))]))
            await asyncio.sleep(0.001)
        there = []
        for number, job in enumerate(made):
            try:
                there.append(number * (known.get(job.name) is job))
            except Problem as error:
                assert error.status_code == 404
        return there

    assert asyncio.run(begun()) == [*range(4 - kept, 4), 4]
