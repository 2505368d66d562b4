"""Names that flags and commands had before: they work, and no help shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from command import call

from diffusion_accel.cli.app import app
from diffusion_accel.cli.old_names import COMMANDS, FLAGS, in_todays_names
from diffusion_accel.cli.settings import merge, read_config
from diffusion_accel.errors import ConfigurationError

TODAY = {  # a line in old names, and the same in today's
    "generate x --num-images 3": "generate x --count 3",
    "generate x --num-images=3": "generate x --count=3",
    "generate -- --num-images": "generate -- --num-images",
    "generate x --compile --steps 3": "generate x --compiled=inductor,blocks=on --steps 3",
    "tune -o a.json --resume --speedup 2": "tune -o a.json --speedup 2",
    "quantize --calibration-prompts p.txt -o d": "quantize --prompts-file p.txt -o d",
    "quantize --budget-minutes 20 -o d": "quantize --budget=20m -o d",
    "quantize --budget-minutes=0.5 -o d": "quantize --budget=0.5m -o d",
    "quantize --budget-minutes": "quantize --budget",
    "plan --images 2": "estimate --batch 2",
    "plan --guidance": "estimate --guidance-scale=7.5",
    "plan --no-guidance --steps 3": "estimate --guidance-scale=1 --steps 3",
    "plan --guidance=3": "estimate --guidance=3",
    "tune --resume=yes": "tune --resume=yes",
    "estimate --batch 2": "estimate --batch 2",
    "bench --json out.json": "bench --output out.json",
    "bench --json=out": "bench --output=out",
    "bench reuse:hold:2 --json runs/numbers": "bench reuse:hold:2 --output runs/numbers",
    "bench --json numbers": "bench --output numbers",
    "bench --json reuse:hold:2": "bench --json reuse:hold:2",
    "bench --json reuse:plan.json": "bench --json reuse:plan.json",
    "bench --json encoder-reuse": "bench --json encoder-reuse",
    "bench --json depcache:3": "bench --json depcache:3",
    "bench --json -q": "bench --json -q",
    "bench --json": "bench --json",
    "evaluate --json": "evaluate --json",
    "--version": "--version",
    "": "",
}


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@pytest.mark.parametrize("line", TODAY)
def test_old_names_become_todays(line: str) -> None:
    assert in_todays_names(line.split()) == TODAY[line].split()
    assert in_todays_names(TODAY[line].split()) == TODAY[line].split()


def test_every_old_name_is_tried_here_and_becomes_a_name_that_there_is() -> None:
    known = {name: {flag for p in c.params for flag in (*p.opts, *p.secondary_opts)} for name, c in commands().items()}
    for command, flags in FLAGS.items():
        for flag in flags:
            old = [name for name, today in COMMANDS.items() if today == command] or [command]
            lines = [line.split() for line in TODAY if line.startswith((*old, command))]
            assert any(flag in line or any(word.startswith(f"{flag}=") for word in line) for line in lines), flag
    for line in map(str.split, TODAY.values()):
        used = {word.partition("=")[0] for word in line[1:] if word.startswith("--") and word != "--"}
        refused = {flag for flag in used if f"{flag}=" in " ".join(line)} & {"--guidance", "--resume"}
        assert not line or line[0].startswith("-") or "--" in line or used - refused <= known[line[0]], line


@pytest.mark.parametrize("command", [*commands(), *COMMANDS])
def test_help_shows_one_name(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, text, err = call(capsys, command, "--help")
    assert code == 0 and not err
    today = COMMANDS.get(command, command)
    assert f"diffusion-accel {today} " in text
    words = set(text.replace("=", " ").replace(",", " ").split())
    assert not words & (set(FLAGS.get(today, ())) - {"--json"}), "the old names are for those who know them"
    names = call(capsys, "--help")[1]
    assert f" {today} " in names and not any(f"│ {old} " in names for old in COMMANDS)


def test_one_name_for_one_option() -> None:
    """What is called alike is declared alike: the same flags for the same parameter in every command."""
    seen: dict[str, dict[tuple[str, ...], str]] = {}
    for name, command in commands().items():
        for parameter in command.params:
            seen.setdefault(parameter.name, {}).setdefault(tuple(parameter.opts), name)
    two = {name: found for name, found in seen.items() if len(found) > 1}
    assert set(two) <= {"image", "layers", "model"}, two  # arguments of `cutout`, `compose` and `accelerate`
    switches = {c: p.is_flag for c, command in commands().items() for p in command.params if "--json" in p.opts}
    assert len(switches) >= 9 and all(switches.values())


def test_an_old_name_means_what_it_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--num-images", "--count"):
        code, _, err = call(capsys, "generate", "x", flag, "0")
        assert code == 2 and err == "error: --count must be at least 1, got 0\n"
    for words in (["--budget-minutes", "0"], ["--budget", "0"], ["--budget", "0s"]):
        code, _, err = call(capsys, "quantize", "-o", tmp_path / "d", *words)
        assert code == 2 and err.startswith("error: --budget must be a time above 0")
    code, _, err = call(capsys, "quantize", "-o", tmp_path / "d", "--budget", "soon")
    assert code == 2 and "is no time such as 90 (seconds), 90s, 20m or 1.5h" in err and err.count("\n") == 1
    usual = ["--model", "sticker", "--width", "64", "--height", "64", "--devices", "1", "--json"]
    found = [
        json.loads(call(capsys, *words, *usual)[1])
        for words in (["plan", "--images", "2"], ["estimate", "--batch", "2"])
    ]
    assert found[0] == found[1]
    half = json.loads(call(capsys, "plan", "--no-guidance", *usual)[1])
    assert half[0]["exact_step_s"] < found[0][0]["exact_step_s"]


def test_old_keys_of_files(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("num-images = 2\n")
    assert merge({}, read_config(str(tmp_path / "c.toml")))[0].count == 2
    (tmp_path / "c.toml").write_text("num-images = 2\ncount = 3\n")
    with pytest.raises(ConfigurationError, match="'count' is given twice, once as 'num_images'"):
        read_config(str(tmp_path / "c.toml"))
