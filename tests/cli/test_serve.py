"""What `serve` refuses before it listens or loads a model."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path

import pytest
from command import call


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port must be at least 0 and at most 65535"),
        (["--max-pixels", "0"], "--max-pixels must be at least 64"),
        (["--log-format", "xml"], "--log-format must be text or json"),
        (["--token", "short"], "--token must have at least 8 characters"),
        (["--token", "with a space"], "--token must be of letters"),
        (["--host", "no such host."], "cannot listen at no such host."),
        (["--patch-parallel", "2"], "run a server on each of them"),
        (["--controlnet-parallel"], "--controlnet-parallel is not for a server"),
        (["--controlnet", ""], "--controlnet is empty"),
        (
            ["--controlnet", "a", "--controlnet", "b"],
            "--controlnet must be given once for a server, which has one, got 2",
        ),
        (["--reuse", "tuned:fast", "--steps", "30"], "20 steps"),
        (["--model", "stickr"], "did you mean 'sticker'"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], no_model: None, options: list[str], message: str) -> None:
    code, out, err = call(capsys, "serve", "--port", "0", *options)
    assert code == 2 and message in err and not out
    assert "with a space" not in err and "short" not in err


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("AnimateDiffPipeline", 2, "AnimateDiffPipeline draws videos, and a server sends images"),
        ("StableVideoDiffusionPipeline", 2, "StableVideoDiffusionPipeline draws videos"),
        ("DDPMPipeline", 1, "DDPMPipeline takes neither a prompt nor a class"),
    ],
)
def test_models_that_cannot_be_served(
    name: str, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    found, out, err = call(capsys, "serve", "--port", 0, "--model", tmp_path)
    assert found == code and message in err and err.count("\n") == 1 and not out


def test_a_model_with_several_controlnets(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_model: None) -> None:
    index = {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "MultiControlNetModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in ("controlnet", "controlnet_1"):
        (tmp_path / name).mkdir()
    code, out, err = call(capsys, "serve", "--port", 0, "--model", tmp_path)
    words = f"{tmp_path.name} has 2 ControlNets, and a server has one: give --controlnet"
    assert code == 2 and words in err and err.count("\n") == 1 and not out


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], no_model: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, err = call(capsys, "serve", "--port", taken.getsockname()[1])
    assert code == 2 and "Address already in use" in err


def test_without_the_extra(capsys: pytest.CaptureFixture[str], no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "fastapi" else find(name, *more)
    )
    code, _, err = call(capsys, "serve")
    assert code == 2 and err.splitlines() == [
        "error: serve needs fastapi, which is not installed; pip install 'diffusion-accel[serve]'"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-replicas", "2"], "--min-replicas needs --ray"),
        (["--replica-gpus", "-1"], "--replica-gpus must be at least 0"),
        (
            ["--ray", "--min-replicas", "3", "--max-replicas", "2"],
            "--max-replicas 2 must be at least --min-replicas, 3",
        ),
        (["--ray", "--port", "0"], "--port 0 cannot be combined with --ray"),
        (["--ray", "--lora-changes"], "--lora-changes cannot be combined with --ray"),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_replicas(
    capsys: pytest.CaptureFixture[str],
    no_model: None,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
    installed: bool,
) -> None:
    find = importlib.util.find_spec
    there = {"ray": object() if installed else None}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: there[name] if name in there else find(name, *more)
    )
    code, out, err = call(capsys, "serve", *options)
    if "--ray" in options and not installed:
        message = "serve --ray needs ray, which is not installed; pip install 'diffusion-accel[ray]'"
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


def test_help_needs_no_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fastapi", None)
    code, out, _ = call(capsys, "serve", "--help")
    assert code == 0 and "--max-queue" in out
