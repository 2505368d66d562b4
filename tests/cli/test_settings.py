"""The command line without a model: parsing, merging, refusals. Nothing here imports torch on the way to a refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import call

from diffusion_accel import EncoderReuse
from diffusion_accel.cli import main as cli
from diffusion_accel.cli.options import join_bare_flags
from diffusion_accel.cli.settings import merge, read_config, read_jobs, split_lora


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""
    import diffusion_accel.cli.run as run

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "load_pipeline", load)


PROMPT = "red apple, 3d style"
USAGE: dict[str, tuple[list[str], str]] = {
    "no prompt": ([], "there is no prompt"),
    "empty prompt": ([" "], "a prompt is empty"),
    "unknown model": ([PROMPT, "--model", "stiker"], "did you mean 'sticker'"),
    "width": ([PROMPT, "--width", "100"], "multiple of 8"),
    "height": ([PROMPT, "--height", "0"], "multiple of 8"),
    "steps 0": ([PROMPT, "--steps", "0"], "--steps must be at least 1"),
    "steps -1": ([PROMPT, "--steps", "-1"], "--steps must be at least 1"),
    "steps text": ([PROMPT, "--steps", "many"], "--steps"),
    "guidance nan": ([PROMPT, "--guidance-scale", "nan"], "finite number"),
    "guidance inf": ([PROMPT, "--guidance-scale", "inf"], "finite number"),
    "guidance -1": ([PROMPT, "--guidance-scale", "-1"], "finite number"),
    "strength": ([PROMPT, "--image", "IMAGE", "--strength", "1.5"], "at most 1"),
    "strength nan": ([PROMPT, "--image", "IMAGE", "--strength", "nan"], "at most 1"),
    "images": ([PROMPT, "--num-images", "0"], "--num-images"),
    "seed": ([PROMPT, "--seed", "-1"], "--seed must be between"),
    "mask alone": ([PROMPT, "--mask-image", "IMAGE"], "--mask-image needs --image"),
    "strength alone": ([PROMPT, "--strength", "0.5"], "--strength needs --image"),
    "control alone": ([PROMPT, "--control-image", "IMAGE"], "--control-image needs --controlnet"),
    "controlnet alone": ([PROMPT, "--controlnet", "x/y"], "--controlnet needs --control-image"),
    "missing image": ([PROMPT, "--image", "missing.png"], "no such file: missing.png"),
    "scheduler": ([PROMPT, "--scheduler", "eulr"], "did you mean 'euler'"),
    "dtype": ([PROMPT, "--dtype", "int3"], "--dtype must be one of"),
    "fp16 on cpu": ([PROMPT, "--dtype", "float16", "--device", "cpu"], "not usable on a CPU"),
    "offload on cpu": ([PROMPT, "--offload", "model", "--device", "cpu"], "needs an accelerator"),
    "xformers on cpu": ([PROMPT, "--attention", "xformers", "--device", "cpu"], "CUDA only"),
    "device": ([PROMPT, "--device", "warp9"], "not usable here"),
    "feature key": ([PROMPT, "--encoder-reuse", "schedul=all"], "unknown key 'schedul'"),
    "feature value": ([PROMPT, "--encoder-reuse", "schedule=papr"], "unknown key-step schedule"),
    "feature unknown": ([PROMPT, "--encoder-reus"], "--encoder-reus"),
    "compare nothing": ([PROMPT, "--compare"], "--compare needs a feature"),
    "suffix": ([PROMPT, "-o", "a.gif"], "unknown image type"),
    "option": ([PROMPT, "--nonsense"], "--nonsense"),
    "prompts file": (["--prompts-file", "missing.txt"], "cannot be read"),
    "config": ([PROMPT, "--config", "missing.toml"], "cannot be read"),
}
FAILURE: dict[str, tuple[list[str], str]] = {
    "missing model": ([PROMPT, "--model", "./missing"], "no such model"),
    "missing lora": ([PROMPT, "--lora", "missing.safetensors"], "no such file"),
    "pickle": ([PROMPT, "--model", "PICKLE"], "is a pickle"),
    "pickle lora": ([PROMPT, "--lora", "PICKLE:0.5"], "is a pickle"),
    "broken": ([PROMPT, "--model", "BROKEN"], "safetensors"),
    "exists": ([PROMPT, "-o", "IMAGE"], "exists; choose another name or pass --overwrite"),
    "unwritable": ([PROMPT, "-o", "BROKEN/out/apple.png"], "is not a folder"),
}


@pytest.mark.parametrize("case", [*USAGE, *FAILURE])
def test_refusals(
    case: str, no_model: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 2 for usage, 1 for failure; one line on stderr; nothing on stdout; no file appears."""
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("image.png")
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments, message = {**USAGE, **FAILURE}[case]
    names = {"IMAGE": "image.png", "PICKLE": "model.ckpt", "BROKEN": "broken.safetensors"}
    for key, value in names.items():
        arguments = [a.replace(key, value) for a in arguments]
    code, out, err = call(capsys, "generate", *arguments)
    assert code == (2 if case in USAGE else 1), err
    assert message in err and err.startswith("error: ")
    assert err.count("\n") == 1 and not out
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_debug_shows_the_traceback(no_model: None) -> None:
    from diffusion_accel import ConfigurationError

    with pytest.raises(ConfigurationError):
        cli.main(["generate", PROMPT, "--steps", "0", "--debug"])


def test_bare_feature_flags() -> None:
    assert join_bare_flags(["generate", "--encoder-reuse", "a red apple"]) == [
        "generate",
        "--encoder-reuse=on",
        "a red apple",
    ]
    for value in ("off", "on", "schedule=all", "schedule=0+1,batch_decoder=false"):
        assert join_bare_flags(["--encoder-reuse", value, "x"]) == [f"--encoder-reuse={value}", "x"]
    assert join_bare_flags(["x", "--encoder-reuse"]) == ["x", "--encoder-reuse=on"]
    assert join_bare_flags(["--encoder-reuse", "--encoder-reuse", "x"]) == ["--encoder-reuse=on"] * 2 + ["x"]
    assert join_bare_flags(["--", "--encoder-reuse"]) == ["--", "--encoder-reuse"]
    assert join_bare_flags(["--reuse", "deepcach:3", "x"]) == ["--reuse=deepcach:3", "x"]  # mistyped, but no prompt
    assert join_bare_flags(["--reuse", "tuned", "x"]) == ["--reuse=tuned", "x"]  # refused later: which level?
    assert join_bare_flags(["--reuse", "a cat: red", "x"]) == ["--reuse=on", "a cat: red", "x"]
    assert join_bare_flags(["--encoder-reuse", "--", "x"]) == ["--encoder-reuse=on", "--", "x"]


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
    assert settings.features == {"encoder_reuse": EncoderReuse()} and settings.num_images == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = [", "not valid"),
        ("stepz = 3", "unknown key 'stepz'"),
        ("steps = 2.5", "must be a whole number"),
        ("steps = true", "must be a whole number"),
        ("lora = 'x'", "must be a list"),
        ("encoder_reuse = 3", "expected true, false"),
        ("[encoder_reuse]\nschedule = 4", "schedule=4"),
    ],
)
def test_bad_configuration_files(
    text: str, message: str, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    code, _, err = call(capsys, "generate", PROMPT, "--config", str(file))
    assert code == 2 and message in err and err.count("\n") == 1


def test_prompts_files(tmp_path: Path) -> None:
    plain = tmp_path / "p.txt"
    plain.write_text("one\n\n  two  \n")
    assert [j.prompt for j in read_jobs(["zero"], str(plain))] == ["zero", "one", "two"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a", "seed": 3, "guidance_scale": 4}\n{"prompt": "b", "output": "b.webp"}\n')
    a, b = read_jobs([], str(lines))
    assert (a.seed, a.guidance_scale, b.output) == (3, 4.0, "b.webp")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", 'line 2: expected an object with a "prompt"'),
        ('{"prompt": "x", "stps": 1}', "line 2: unknown key 'stps'"),
        ('{"prompt": "x", "steps": "3"}', "line 2: steps must be a whole number"),
        ('{"prompt": "x", "steps": 0}', "line 2: steps must be at least 1"),
        ('{"prompt": "x", "guidance_scale": NaN}', "line 2: guidance-scale must be a finite"),
        ('{"prompt": "x", "output": "../x.png"}', "must be a plain file name"),
        ('{"prompt": "x", "output": "x.exe"}', "unknown image type"),
        ('{"prompt": ""}', "a prompt is empty"),
    ],
)
def test_bad_prompt_lines(
    line: str, message: str, tmp_path: Path, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "ok"}\n' + line + "\n")
    code, _, err = call(capsys, "generate", "--prompts-file", str(file), "-o", str(tmp_path / "out"))
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_lora_scales(tmp_path: Path) -> None:
    assert split_lora("a.safetensors") == ("a.safetensors", 1.0)
    assert split_lora("a.safetensors:0.5") == ("a.safetensors", 0.5)
    assert split_lora("c:a.safetensors") == ("c:a.safetensors", 1.0)
    odd = tmp_path / "a:2"
    odd.touch()
    assert split_lora(str(odd)) == (str(odd), 1.0)


def test_importing_is_cheap_and_help_needs_no_torch() -> None:
    code = (
        "import sys; import diffusion_accel; "
        "from diffusion_accel.cli import main; "
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for arguments in (["--help"], ["generate", "--help"], ["features"], ["models"], ["--version"]):
        script = (
            "import sys; from diffusion_accel.cli.main import main\n"
            f"try: main({arguments!r})\n"
            "except SystemExit as e: assert not e.code, e.code\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
