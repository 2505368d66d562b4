"""The command line as such: feature flags, cheap start, help, what may be printed."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

import pytest
import typer
from command import call

from diffusion_accel.cli.app import app
from diffusion_accel.cli.feature_flags import join_bare_flags
from diffusion_accel.cli.main import at_home

PROMPT = "red apple, 3d style"


def test_a_place_at_home_behind_an_equals_sign_or_in_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it as it is, and a folder of that name would be made."""
    monkeypatch.setenv("HOME", "/home/somebody")
    given = [
        "generate",
        "--output=~/out/",
        "--lora=~",
        "--quantize=~other",
        "--negative-prompt=~/x",
        "~/x",
        "--steps=4",
        "--negative-prompt",
        "~/x",
        "-o",
        "~/out/",
    ]
    home = "/home/somebody"
    wanted = ["generate", f"--output={home}/out/", f"--lora={home}", *given[3:-1], f"{home}/out/"]
    assert at_home(given) == wanted and at_home([*given, "--", "--output=~/x"]) == [*wanted, "--", "--output=~/x"]


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
    for level in ("balanced", "ddim-fast", "flow"):  # refused later: tuned:balanced is meant
        assert join_bare_flags(["--reuse", level, "x"]) == [f"--reuse={level}", "x"]
    assert join_bare_flags(["--reuse", "a cat: red", "x"]) == ["--reuse=on", "a cat: red", "x"]
    assert join_bare_flags(["--encoder-reuse", "--", "x"]) == ["--encoder-reuse=on", "--", "x"]


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


@pytest.mark.parametrize("command", sorted(typer.main.get_command(app).commands))
def test_every_option_has_its_default_in_the_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parameters = typer.main.get_command(app).commands[command].params
    options = {param.opts[0]: param for param in parameters if param.param_type_name == "option"}
    text = call(capsys, command, "--help")[1]
    entries = dict(re.findall(r"│ \*? *(--[a-z-]+)(.*?)(?=│ \*? *--|╰)", text, re.DOTALL))
    assert {*options} <= {*entries}
    for flag, param in options.items():
        assert ("[required]" if param.required else "[default: ") in entries[flag], flag
    if len(options) > 12:
        plain = [flag for flag, param in options.items() if not getattr(param, "rich_help_panel", None)]
        assert {*plain} <= {"--debug", "--model", "--bits", "--budget", "--json"}, plain


def test_drawing_imports_no_pipelines_for_other_tasks() -> None:
    """What is imported for nothing is time before the first step."""
    script = (
        "import sys, gc; from diffusion_accel.cli.main import main\n"
        "try: main(['generate', 'red apple', '--steps', '1', '-q', '-o', sys.argv[1]])\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "needless = {'diffusers.pipelines.auto_pipeline', 'diffusers.models.controlnets', "
        "'diffusion_accel.bench.run', 'diffusion_accel.serving.engine', 'diffusion_accel.training.loop'}\n"
        "assert not needless & set(sys.modules), needless & set(sys.modules)\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000"
    )
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", script, f"{folder}/a.png"], check=True)


def test_the_help_says_defaults_and_bounds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(call(capsys, "generate", "--help")[1].split())
    for words in ("20 with sticker", "(1 to 10000)", "a multiple of 8", "float32", "the folder outputs", "mostly 0.8"):
        assert words in text
    assert "diffusion-accel[ui]" in call(capsys, "serve", "--help")[1], "no markup"
    text = call(capsys, "tune", "--help")[1]
    for words in ("Target", "Prompts", "What the plan is for", "Search", "Machine", "(6 to 100000)"):
        assert words in text


def test_the_help_breaks_lines_at_its_own_width_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    for command, last in (
        ("accelerate", "is made anew."),
        ("tune", "share the work."),
        ("bench", "optimum-intel:PRECISION."),
    ):
        text = call(capsys, command, "--help")[1].partition("╭")[0]
        usage, _, *paragraphs = [line.strip() for line in text.strip().splitlines()]
        assert usage.startswith("Usage:") and len(paragraphs) == 3 and paragraphs[2].endswith(last), text


def test_what_is_printed_holds_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "generate", PROMPT, "--model", "\x1b]0;title\x07\u202e/x\r/y")
    assert code == 1 and err == "error: no such model file or folder: \\x1b]0;title\\x07\\u202e/x /y\n"
    code, _, err = call(capsys, "generate", PROMPT, "--\x1b[31mnonsense")
    assert code == 2 and "\x1b" not in err and "\\x1b[31m" in err


@pytest.mark.parametrize(("typed", "found"), [("gen", "generate"), ("generate --sched", "--scheduler")])
def test_a_shell_can_complete(
    typed: str, found: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_DIFFUSION_ACCEL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"diffusion-accel {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
    code, out, _ = call(capsys)
    assert code == 0 and out.split() == [found]
