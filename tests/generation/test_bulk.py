"""Sharing prompts through a folder: what is taken, what is left, and what is refused. Nothing is drawn here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.generation.bulk import Share, seed_of
from diffusion_accel.generation.outputs import OutputPlan, plan_outputs
from diffusion_accel.generation.request import Request

PROMPTS = ("apple", "pear", "plum")


def share(folder: Path, prompts: Sequence[str] = PROMPTS, name: str = "process 0", **settings: Any) -> Share:
    def plan(seed: int) -> list[OutputPlan]:
        requests = [Request(prompt=prompt, seed=seed_of(seed, k)) for k, prompt in enumerate(prompts, 1)]
        return plan_outputs(f"{folder}/", requests, resuming=True)

    return Share(folder, plan, settings, name)


def draw(own: Share, number: int) -> None:
    for file in own.plans[number - 1].files():
        file.touch()
    own.drawn(number)


def test_all_are_drawn_once_and_the_seeds_stay(tmp_path: Path) -> None:
    first = share(tmp_path / "out")
    for number, _ in first.turns():
        if number == 3:
            break
        draw(first, number)
    first.close()
    second = share(tmp_path / "out", name="process 1")
    assert [p.files() for p in second.plans] == [p.files() for p in first.plans], "seeds are in the names"
    assert [number for number, _ in second.turns()] == [3]
    assert len({plan.request.seed for plan in second.plans}) == 3
    draw(second, 3)
    found = second.summary()
    assert (found.before, found.drawn, found.failed) == (2, {"process 1": 1}, {})
    assert str(found) == "1 of 3 prompts were drawn, 2 were there before"
    assert str(first.summary()) == "3 of 3 prompts were drawn (process 0: 2, process 1: 1), 0 were there before"
    assert not list(share(tmp_path / "out").turns())
    assert share(tmp_path / "other").plans[0].request.seed != first.plans[0].request.seed


def test_what_another_process_draws_is_awaited_and_drawn_when_it_has_ended(tmp_path: Path) -> None:
    own = share(tmp_path)
    take = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 2)"
    code = f"{take}; print('taken', flush=True); sys.stdin.read()"
    claims = tmp_path / ".diffusion-accel" / "claims"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", code, str(claims)], **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"taken\n"
        half = own.plans[1].paths[0]
        (tmp_path / f".{half.stem}.77.tmp.png").touch()
        own = share(tmp_path)
        turns = own.turns()
        for expected in (1, 3):
            number, _ = next(turns)
            assert number == expected
            draw(own, number)
        assert len(list(tmp_path.glob(".*.tmp.png"))) == 1, "it may still be written"
        other.kill()
        number, plan = next(turns)
    assert number == 2 and not list(tmp_path.glob(".*.tmp.png"))
    draw(own, 2)
    assert not list(turns) and own.summary().drawn == {"process 0": 3}


def test_what_failed_elsewhere_is_not_tried_again_before_the_next_call(tmp_path: Path) -> None:
    one, other = share(tmp_path), share(tmp_path, name="process 1")
    number, _ = next(one.turns())
    one.failed(number, "no memory")
    log = next((tmp_path / ".diffusion-accel").glob("*.jsonl"))
    with log.open("a") as file:
        file.write('{"prompt": 99, "failed": "?"}\n[\n{"prompt": 3, "fai')  # of others, and of one that was killed
    assert [number for number, _ in other.turns()] == [2, 3]
    assert other.summary().failed == {1: "no memory"} == one.summary().failed
    assert str(other.summary()) == "0 of 3 prompts were drawn, 0 were there before, 1 failed"
    assert [number for number, _ in share(tmp_path).turns()] == [1, 2, 3]


def test_files_of_a_prompt_that_are_there_stay(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from PIL import Image

    request = Request(prompt="apple", seed=1, count=2)
    (plan,) = plan_outputs(f"{tmp_path}/", [request], resuming=True)
    plan.paths[0].write_bytes(b"finished")
    drawn: Any = SimpleNamespace(images=[Image.new("RGB", (8, 8))] * 2, comparison=None)
    assert [file.path for file in plan.write(drawn)] == [plan.paths[1]]
    assert plan.paths[0].read_bytes() == b"finished"


def test_a_folder_belongs_to_one_command(tmp_path: Path) -> None:
    own = share(tmp_path, steps=3)
    draw(own, 1)
    with pytest.raises(ConfigurationError, match=r"begun with other settings \(scheduler, steps\)"):
        share(tmp_path, steps=4, scheduler="ddim")
    with pytest.raises(ConfigurationError, match=r"begun with another prompt 2, .* \(more may follow\)"):
        share(tmp_path, ["apple", "fig"], steps=3)
    more = share(tmp_path, [*PROMPTS, "fig"], steps=3)
    assert [number for number, _ in more.turns()] == [2, 3, 4]
    assert [number for number, _ in share(tmp_path, PROMPTS[:2], steps=3).turns()] == [2]
    (tmp_path / ".diffusion-accel" / "job.json").write_text(json.dumps({"seed": 1}))
    with pytest.raises(ConfigurationError, match="is damaged"):
        share(tmp_path, steps=3)


def test_images_of_others_are_neither_taken_for_done_nor_replaced(tmp_path: Path) -> None:
    requests = [Request(prompt="apple", seed=1)]

    def plan(_seed: int) -> list[OutputPlan]:
        return plan_outputs(f"{tmp_path}/", requests, ["apple.png"], resuming=True)

    (tmp_path / "apple.png").touch()
    with pytest.raises(OutputError, match=r"apple\.png exists; use another folder"):
        Share(tmp_path, plan, {})
    assert [file.name for file in tmp_path.iterdir()] == ["apple.png"]
