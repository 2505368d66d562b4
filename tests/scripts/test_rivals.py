"""What the serving engine is compared with draws the same images, and is what a server needs of an engine."""

from __future__ import annotations

import importlib
import threading
import time
from typing import Any

import pytest
from serving_tools import LATENTS, TIMEOUT, alone, request, same, sticker

from diffusion_accel import Reuse
from diffusion_accel.errors import ConfigurationError, EngineClosedError, QueueFullError

rivals = importlib.import_module("rivals")  # of scripts/, which pytest's settings put on the path


def held(rival: Any) -> threading.Event:
    """What is submitted from now on waits until the event is set."""
    draw, go = rival._drawn, threading.Event()

    def drawn(batch: Any) -> Any:
        go.wait(TIMEOUT)
        return draw(batch)

    rival._drawn = drawn
    return go


def begun(rival: Any, asked: Any) -> Any:
    """A request that waits no longer."""
    handle, end = rival.submit(asked), time.monotonic() + TIMEOUT
    while rival.stats()["queued"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    return handle


@pytest.mark.parametrize("most", [1, 8])
def test_images_are_those_drawn_alone(most: int) -> None:
    """Also where requests that are alike are one batch, and others, or with another plan, are not."""
    pipe = sticker()
    asked = [request(1), request(2, prompt="panda"), request(3, steps=4), request(4, count=2), request(5)]
    wanted = [alone(pipe, one) for one in asked] + [alone(pipe, request(5), [Reuse(plan="hold:2")])]
    rival = rivals.Rival(pipe, most)
    go = held(rival)
    first = begun(rival, request(9))
    handles = [rival.submit(one, arguments=LATENTS) for one in asked]
    handles.append(rival.submit(request(5), features=[Reuse(plan="hold:2")], arguments=LATENTS))
    go.set()
    for handle, images in zip(handles, wanted, strict=True):
        same(handle.result(TIMEOUT).images, images)
    first.result(TIMEOUT)
    stats = rival.stats()
    assert stats["completed"] == 7 and stats["batches"]["requests"] == ({1: 7} if most == 1 else {1: 4, 3: 1})
    rival.close()


def test_its_end_its_queue_and_errors() -> None:
    rival = rivals.Rival(sticker(), queue=2)
    go = held(rival)
    first = begun(rival, request(1))
    cancelled, last = rival.submit(request(2)), rival.submit(request(3))
    with pytest.raises(QueueFullError):
        rival.submit(request(4))
    with pytest.raises(ConfigurationError, match="only the engine takes loras"):
        rival.submit(request(4), loras={"a": 1})
    assert cancelled.cancel()
    go.set()
    rival.close()
    assert first.result(0).images and last.result(0).images
    assert {state: rival.stats()[state] for state in ("completed", "cancelled", "failed")} == {
        "completed": 2,
        "cancelled": 1,
        "failed": 0,
    }
    with pytest.raises(EngineClosedError):
        rival.submit(request(5))
