"""Settings: merged from flags, a configuration file and the model, and LoRAs' scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import call
from safetensors.torch import save_file

from diffusion_accel import Compiled, ConfigurationError, EncoderReuse
from diffusion_accel.cli.settings import merge, read_config, split_lora

PROMPT = "red apple, 3d style"


def test_the_old_key_compile_is_a_feature(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("compile = true")
    settings, _ = merge({}, read_config(str(file)))
    assert settings.features == {"compiled": Compiled(engine="inductor", blocks=True)}
    file.write_text("compile = false")
    assert not merge({}, read_config(str(file)))[0].features
    for text, words in (("compile = 1", "true or false"), ('compile = true\ncompiled = "openvino"', "given twice")):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=words):
            read_config(str(file))


def test_flags_win_over_the_file_and_the_file_over_the_model(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('steps = 7\nguidance-scale = 2\n[encoder-reuse]\nschedule = "uniform:3"\n')
    settings, source = merge({"steps": 9, "scheduler": None, "lora": ()}, read_config(str(file)))
    assert (settings.steps, settings.guidance_scale, settings.scheduler, settings.width) == (9, 2.0, "dpm++", 96)
    assert settings.features == {"encoder_reuse": EncoderReuse(schedule="uniform:3")}
    assert source.kind == "embedded"
    off, _ = merge({"encoder_reuse": "off"}, read_config(str(file)))
    assert not off.features
    (tmp_path / "c.json").write_text(json.dumps({"encoder_reuse": True, "num_images": 2}))
    settings, _ = merge({}, read_config(str(tmp_path / "c.json")))
    assert settings.features == {"encoder_reuse": EncoderReuse()} and settings.count == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = [", "not valid"),
        ("stepz = 3", "unknown key 'stepz'"),
        ("steps = 2.5", "must be a whole number"),
        ("steps = true", "must be a whole number"),
        ("guidance_scale = nan", "is not a number that can be used"),
        ("lora = 'x'", "must be a list"),
        ("encoder_reuse = 3", "expected true, false"),
        ("[encoder_reuse]\nschedule = 4", "schedule=4"),
        ("prompt = 5", "prompt must be a text or a list of texts"),
        ("prompt = ['a', 5]", "prompt must be a text or a list of texts"),
        ("prompts_file = 5", "prompts_file must be a text"),
        ("model = 5", "model must be a text"),
        ("guidance-scale = 1\nguidance_scale = 2", "given twice"),
        (f"num_images = {'9' * 4000}", "40 digits"),
        (f"num_images = 0x{'f' * 5000}", "more than 40 digits"),
        (f"steps = 1{'0' * 30}", "at most 10000"),
        (f"lora = {'[' * 5000}{']' * 5000}", "deep in each other"),
        ('image = "a\\u0000b"', "no character NUL"),
        (f"'{'k' * 5000}' = 1", "unknown key"),
    ],
)
def test_bad_configuration_files(
    text: str, message: str, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    code, _, err = call(capsys, "generate", PROMPT, "--config", str(file))
    assert code == 2 and message in err and err.count("\n") == 1 and len(err) < 1600


def test_places_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a configuration file, where no shell makes anything of ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("ip.safetensors", "a.png"):
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    given = {"output": "~/out/", "ip_adapter": "~/ip.safetensors", "ip_adapter_image": "~/a.png"}
    settings, _ = merge({}, {**given, "quantize": "torchao:int8wo"})
    assert settings.output == f"{tmp_path}/out/" and settings.quantize == "torchao:int8wo"


def test_lora_scales(tmp_path: Path) -> None:
    assert split_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert split_lora("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert split_lora("c:a.safetensors") == ("c:a.safetensors", 1.0)
    odd = tmp_path / "a:2"
    odd.touch()
    assert split_lora(str(odd)) == (str(odd), 1.0)
