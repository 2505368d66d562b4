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
from diffusion_accel.cli.feature_flags import join_bare_flags
from diffusion_accel.cli.prompts import read_jobs
from diffusion_accel.cli.settings import merge, read_config, split_lora
from diffusion_accel.generation.outputs import plan_outputs
from diffusion_accel.generation.request import Request


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""
    import diffusion_accel.generation.loading as run

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
    "steps of other steps": ([PROMPT, "--reuse", "steps:full hold"], "for 2 steps, this call has 20; use 2"),
    "endless plan": ([PROMPT, "--reuse", "steps:full hold=" + "9" * 400], "at most 10000"),
    "key step beyond": ([PROMPT, "--steps", "4", "--encoder-reuse", "schedule=0+9"], "key step 9 lies beyond"),
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
        (["bench", "deepcache:0"], "the first number must be at least 1"),
        (["bench", "tgate:" + "9" * 400], "tgate takes numbers"),
        (["tune", "-o", "x.json", "--speedup", "2", "--try-scheduler", "eulr"], "did you mean 'euler'"),
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


def test_prompts_files(tmp_path: Path) -> None:
    plain = tmp_path / "p.txt"
    plain.write_text("one\n\n  two  \n")
    assert [j.prompt for j in read_jobs(["zero"], str(plain))] == ["zero", "one", "two"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a", "seed": 3, "guidance_scale": 4}\n{"prompt": "b", "output": "b.webp"}\n')
    a, b = read_jobs([], str(lines))
    assert (a.seed, a.guidance_scale, b.output) == (3, 4.0, "b.webp")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_texts_in_the_encodings_of_other_systems(encoding: str, tmp_path: Path) -> None:
    """A byte order mark is no part of a prompt, and only line ends end a line."""
    mark = "\ufeff" if encoding.endswith("e") else ""
    for name, text, read in (
        ("p.txt", "café \u2028 b\r\ntwo", lambda f: [job.prompt for job in read_jobs([], f)]),
        ("p.jsonl", '{"prompt": "café \u2028 b"}\n{"prompt": "two"}', lambda f: [j.prompt for j in read_jobs([], f)]),
        ("c.json", '{"prompt": ["café \u2028 b", "two"]}', lambda f: read_config(f)["prompt"]),
        ("c.toml", 'prompt = ["café \u2028 b", "two"]', lambda f: read_config(f)["prompt"]),
    ):
        (tmp_path / name).write_bytes((mark + text).encode(encoding))
        assert read(str(tmp_path / name)) == ["café \u2028 b", "two"]


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
        ('{"prompt": 5}', "line 2: prompt must be a text, got 5"),
        ('{"prompt": "\\ud800"}', "is not valid UTF-8"),
        ('{"prompt": "x", "num_images": ' + "9" * 4000 + "}", "4000 digits"),
        ('{"prompt": "x", "seed": 1e400}', "line 2: seed must be a whole number"),
        ('{"prompt": "x", "guidance_scale": ' + "9" * 39 + "}", "at most 1000"),
        ('{"prompt": "x", "output": "\\ud800.png"}', "cannot be the name of a file"),
        ("[" * 100_000, "deep in each other"),
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


def test_a_folder_may_have_a_dot_in_its_name(tmp_path: Path) -> None:
    request = Request(prompt="x", seed=3)
    for name in ("out.v2", "out.png"):
        (tmp_path / name).mkdir()
        (plan,) = plan_outputs(str(tmp_path / name), [request])
        assert plan.paths == (tmp_path / name / "0001-3.png",)
    (plan,) = plan_outputs(f"{tmp_path}/new.v3/", [request])
    assert plan.paths == (tmp_path / "new.v3" / "0001-3.png",)


def test_the_help_says_defaults_and_bounds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(call(capsys, "generate", "--help")[1].split())
    for words in ("20 with sticker", "(1 to 10000)", "a multiple of 8", "float32", "the folder outputs", "mostly 0.8"):
        assert words in text
    text = call(capsys, "tune", "--help")[1]
    for words in ("Target", "Prompts", "What the plan is for", "Search", "Machine", "(6 to 100000)"):
        assert words in text


def test_what_is_printed_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "generate", PROMPT, "--model", "\x1b]0;title\x07\u202e/x\r/y")
    assert code == 1 and err == "error: no such model file or folder: \\x1b]0;title\\x07\\u202e/x /y\n"
    code, _, err = call(capsys, "generate", PROMPT, "--\x1b[31mnonsense")
    assert code == 2 and "\x1b" not in err and "\\x1b[31m" in err
