"""Prompts files, and texts in the encodings of other systems."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import call

from diffusion_accel.cli.prompts import read_jobs
from diffusion_accel.cli.settings import read_config


def test_prompts_files(tmp_path: Path) -> None:
    plain = tmp_path / "p.txt"
    plain.write_text("one\n\n  two  \n")
    assert [j.prompt for j in read_jobs(["zero"], str(plain))] == ["zero", "one", "two"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a", "seed": 3, "guidance_scale": 4}\n{"prompt": "b", "output": "b.webp"}\n')
    a, b = read_jobs([], str(lines))
    assert (a.overrides, b.output) == ({"seed": 3, "guidance_scale": 4.0}, "b.webp")


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
