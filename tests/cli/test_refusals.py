"""What is refused without a model: one line, an exit code, nothing written, nothing loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import call

from diffusion_accel.cli import main as cli

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
    "steps many": ([PROMPT, "--steps", "999999999999"], "--steps must be at least 1 and at most 10000"),
    "width large": ([PROMPT, "--width", "80000000"], "at most 32768"),
    "guidance 1e30": ([PROMPT, "--guidance-scale", "1e30"], "at most 1000"),
    "images many": ([PROMPT, "--count", "10001"], "at most 10000"),
    "images in all": ([PROMPT, "another", "--count", "9000"], "at most 10000"),
    "last seed": ([PROMPT, "--count", "2", "--seed", str(2**63 - 1)], "goes beyond"),
    "no step left": ([PROMPT, "--image", "IMAGE", "--strength", "0.01", "--steps", "20"], "leaves no step to run"),
    "not UTF-8": (["caf\udce9"], "is not valid UTF-8 at character 4"),
    "negative not UTF-8": ([PROMPT, "--negative-prompt", "\udce9"], "the negative prompt"),
    "long prompt": (["x" * 1_000_001], "has 1000001 characters"),
    "no output": ([PROMPT, "-o", ""], "cannot be the name of a file"),
    "suffix alone": ([PROMPT, "-o", ".png"], "nothing before its suffix"),
    "video": ([PROMPT, "-o", "x.mp4"], "allowed: .png, .webp, .jpg, .jpeg, or a folder"),
    "too wide for webp": ([PROMPT, "-o", "x.webp", "--width", "16384"], "at most 16383 pixels"),
    "output in the file": (["--prompts-file", "JOBS", "-o", "x.png"], "needs -o to be a folder"),
    "no layer": ([PROMPT, "--transparent", "--layers", ""], "layers is empty"),
    "no device": ([PROMPT, "--device", ""], "device is empty"),
    "config without a name": ([PROMPT, "--config", ""], "--config"),
    "prompts file without a name": (["--prompts-file", ""], "--prompts-file"),
    "lora scale": ([PROMPT, "--lora", "x.safetensors:1e30"], "the scale must be a finite number"),
    "seed of many digits": ([PROMPT, "--seed", "9" * 5000], "--seed"),
    "long model": ([PROMPT, "--model", "a" * 5000], "unknown model"),
    "long image": ([PROMPT, "--image", "a" * 5000], "no such file"),
    "long preview": ([PROMPT, "--transparent", "--preview", "a" * 5000], "neither checkerboard"),
    "guidance nan": ([PROMPT, "--guidance-scale", "nan"], "finite number"),
    "guidance inf": ([PROMPT, "--guidance-scale", "inf"], "finite number"),
    "guidance -1": ([PROMPT, "--guidance-scale", "-1"], "finite number"),
    "strength": ([PROMPT, "--image", "IMAGE", "--strength", "1.5"], "at most 1"),
    "strength nan": ([PROMPT, "--image", "IMAGE", "--strength", "nan"], "at most 1"),
    "images": ([PROMPT, "--count", "0"], "--count"),
    "seed": ([PROMPT, "--seed", "-1"], "--seed must be between"),
    "mask alone": ([PROMPT, "--mask-image", "IMAGE"], "--mask-image needs --image"),
    "strength alone": ([PROMPT, "--strength", "0.5"], "--strength needs --image"),
    "control alone": ([PROMPT, "--control-image", "IMAGE"], "--control-image needs --controlnet"),
    "controlnet alone": ([PROMPT, "--controlnet", "x/y"], "--controlnet needs --control-image"),
    "no image": ([PROMPT, "--image", "BROKEN"], "--image broken.safetensors is not an image that can be read"),
    "no mask": ([PROMPT, "--image", "IMAGE", "--mask-image", "JOBS"], "--mask-image jobs.jsonl is not an image"),
    "missing image": ([PROMPT, "--image", "missing.png"], "no such file: missing.png"),
    "scheduler": ([PROMPT, "--scheduler", "eulr"], "did you mean 'euler'"),
    "spacing": ([PROMPT, "--scheduler", "ddim,lu"], "scheduler 'ddim' has no lu spacing"),
    "dtype": ([PROMPT, "--dtype", "int3"], "--dtype must be one of"),
    "fp16 on cpu": ([PROMPT, "--dtype", "float16", "--device", "cpu"], "not usable on a CPU"),
    "offload on cpu": ([PROMPT, "--offload", "model", "--device", "cpu"], "needs an accelerator"),
    "xformers on cpu": ([PROMPT, "--attention", "xformers", "--device", "cpu"], "CUDA only"),
    "device": ([PROMPT, "--device", "warp9"], "not usable here"),
    "feature key": ([PROMPT, "--encoder-reuse", "schedul=all"], "unknown key 'schedul'"),
    "feature value": ([PROMPT, "--encoder-reuse", "schedule=papr"], "unknown key-step schedule"),
    "missing plan": ([PROMPT, "--reuse", "missing.json"], "the plan missing.json cannot be read"),
    "plan of other steps": (
        [PROMPT, "--reuse", "tuned:fast", "--steps", "12"],
        "for 20 steps, this call has 12; use 20",
    ),
    "plan of another model": (
        [PROMPT, "--model", "sticker-dit", "--reuse", "tuned:fast"],
        "plans for 28 steps are tuned:flow with FlowMatchEulerDiscreteScheduler",
    ),
    "plan without tuned": ([PROMPT, "--reuse", "balanced"], "did you mean tuned:balanced?"),
    "steps of other steps": ([PROMPT, "--reuse", "steps:full hold"], "for 2 steps, this call has 20; use 2"),
    "endless plan": ([PROMPT, "--reuse", "steps:full hold=" + "9" * 400], "at most 10000"),
    "key step beyond": ([PROMPT, "--steps", "4", "--encoder-reuse", "schedule=0+9"], "key step 9 lies beyond"),
    "feature unknown": ([PROMPT, "--encoder-reus"], "--encoder-reus"),
    "compare nothing": ([PROMPT, "--compare"], "--compare needs a feature"),
    "suffix": ([PROMPT, "-o", "a.bmp"], "unknown image type"),
    "moving": ([PROMPT, "-o", "a.gif"], "the model draws images; allowed: .png"),
    "option": ([PROMPT, "--nonsense"], "--nonsense"),
    "prompts file": (["--prompts-file", "missing.txt"], "cannot be read"),
    "config": ([PROMPT, "--config", "missing.toml"], "cannot be read"),
}
FAILURE: dict[str, tuple[list[str], str]] = {
    "missing model": ([PROMPT, "--model", "./missing"], "no such model"),
    "missing lora": ([PROMPT, "--lora", "missing.safetensors"], "no such file"),
    "pickle": ([PROMPT, "--model", "PICKLE"], "is a pickle"),
    "pickle lora": ([PROMPT, "--lora", "PICKLE:0.5"], "which can run code when loaded; convert it to safetensors\n"),
    "no lora": ([PROMPT, "--lora", "IMAGE:0.5"], "is not a file of weights: expected a .safetensors file\n"),
    "broken": ([PROMPT, "--model", "BROKEN"], "safetensors"),
    "long name": ([PROMPT, "-o", "a" * 240 + ".png"], "is too long"),
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
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "x", "output": "a.png"}')
    before = sorted(p.name for p in tmp_path.iterdir())
    arguments, message = {**USAGE, **FAILURE}[case]
    names = {"JOBS": "jobs.jsonl", "IMAGE": "image.png", "PICKLE": "model.ckpt", "BROKEN": "broken.safetensors"}
    for key, value in names.items():
        arguments = [a.replace(key, value) for a in arguments]
    code, out, err = call(capsys, "generate", *arguments)
    assert code == (2 if case in USAGE else 1), err
    assert message in err and err.startswith("error: ")
    assert err.count("\n") == 1 and not out and len(err) < 1600
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--reuse", "missing.json"], "the plan missing.json cannot be read"),
        (["evaluate", "--reuse", "tuned:fast", "--steps", "9"], "is for 20 steps"),
        (["bench", "reuse:hold:2", "reuse:missing.json"], "the plan missing.json cannot be read"),
        (["bench", "reuse:tuned:fast", "--steps", "9"], "the entry reuse tuned:fast cannot work: the plan"),
        (["bench", "deepcache:0"], "must be a whole number from 1 to 9999"),
        (["bench", "tgate:" + "9" * 400], "step of tgate must be a whole number"),
        (["tune", "-o", "x.json", "--speedup", "2", "--try-scheduler", "eulr"], "did you mean 'euler'"),
        (["bench", "fewer-steps:5,dpm++,lou"], "did you mean 'lu'"),
        (["bench", "forecast:hermit,5"], "did you mean 'hermite'"),
        (["bench", "forecast:sada", "--scheduler", "heun"], "heun repeats timesteps"),
        (["tune", "-o", "damaged.json", "--speedup", "2", "--resume"], "line 1 of the search damaged.json.search"),
        (["generate", PROMPT, "--config", "c.toml"], "the plan missing.json cannot be read"),
    ],
)
def test_plans_are_read_before_a_model_is(
    arguments: list[str], message: str, no_model: None, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("damaged.json.search").write_text("{{\n")
    Path("c.toml").write_text('[reuse]\nplan = "missing.json"\n')
    code, out, err = call(capsys, *arguments)
    assert code == 2 and not out and err.count("\n") == 1
    assert message in err


def test_debug_shows_the_traceback(no_model: None) -> None:
    from diffusion_accel import ConfigurationError

    with pytest.raises(ConfigurationError):
        cli.main(["generate", PROMPT, "--steps", "0", "--debug"])
