"""Reading text, JSON and TOML from outside, and showing it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from diffusion_accel.errors import AccelerationError, ConfigurationError, ModelLoadError, OutputError
from diffusion_accel.io import (
    first_line,
    is_there,
    parse_json,
    printable,
    read_bytes,
    read_json,
    read_text,
    read_toml,
    replacing,
    split_lines,
    writing,
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "text").write_bytes("ä red apple".encode(encoding))
    assert read_text(tmp_path / "text") == "ä red apple"
    (tmp_path / "values.json").write_bytes('{"a": 1}'.encode(encoding))
    assert read_json(tmp_path / "values.json") == {"a": 1}
    (tmp_path / "values.toml").write_bytes("a = 1\r\nb = 2".encode(encoding))
    assert read_toml(tmp_path / "values.toml") == {"a": 1, "b": 2}


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"x" * 11)
    for name, reason in (
        ("pipe", "not a regular file"),
        ("large", "11 bytes"),
        ("missing", "No such file"),
        (".", "a folder"),
        ("\0", "null"),
    ):
        with pytest.raises(ModelLoadError, match=f"(?s)--config.*{reason}"):
            read_bytes(tmp_path / name, "--config", limit=10, error=ModelLoadError)
    (tmp_path / "latin").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_text(tmp_path / "latin")


def test_lines_end_where_an_editor_ends_them() -> None:
    assert split_lines("a\u2028b\x0c\x85c\nd\r\ne\rf\n") == ["a\u2028b\x0c\x85c", "d", "e", "f"]
    assert split_lines("") == []
    assert split_lines("a\n\nb") == ["a", "", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        "[" * 100_000,
        '{"a":' * 70 + "1" + "}" * 70,
        "NaN",
        "[-Infinity]",
        "1e999",
        "9" * 41,
        "{",
        "",
        "\ud800",
    ],
    ids=lambda text: text[:8],
)
def test_what_json_allows_without_limits_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match="^the plan is not valid JSON: [^\n]+$"):
        parse_json(text, "the plan")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000 + "]" * 5000, "a." * 500 + "b = 1", "a = nan", f"a = {'9' * 41}", "a = "]
)
def test_toml_has_the_same_limits(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigurationError, match="c.toml is not valid TOML: [^\n]+$"):
        read_toml(tmp_path / "c.toml")


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(), st.lists, max_leaves=20))
def test_json_within_the_limits_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value), "it") == value
    assert parse_json(json.dumps([value, 'brackets in "texts" [[[[{{{{']), "it")[0] == value


@given(st.text())
def test_nothing_shown_reaches_the_terminal_as_a_command(text: str) -> None:
    shown = printable(text)
    assert not any(ord(sign) < 0x20 or 0x7F <= ord(sign) < 0xA0 or 0xD800 <= ord(sign) < 0xE000 for sign in shown)
    assert printable(shown) == shown
    shown.encode()


def test_what_is_shown_of_foreign_text() -> None:
    assert (
        printable("\x1b]52;c;aGk=\x07 \u202egnp.exe\r\nä 猫 👩‍🚀")
        == "\\x1b]52;c;aGk=\\x07 \\u202egnp.exe\\x0d\\x0aä 猫 👩‍🚀"
    )
    assert printable("a\n\tb\r", lines=True) == "a\n\tb\\x0d"


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n  wrong:\n  the size\nmore")) == "wrong: the size"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line("x" * 1000)) == 300


def test_a_file_is_complete_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    with pytest.raises(AccelerationError), replacing(path) as temporary:
        temporary.write_text("half")
        raise AccelerationError("stop")
    assert list(path.parent.iterdir()) == []
    with replacing(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole" and len(list(path.parent.iterdir())) == 1


def test_a_reason_is_said_once_and_names_may_be_anything(tmp_path: Path) -> None:
    for kind in (ConfigurationError, OutputError):  # which are a ValueError and an OSError, too
        with pytest.raises(kind) as found:
            read_text(tmp_path, "--config", error=kind)
        assert str(found.value) == f"--config {tmp_path} cannot be read: it is a folder"
    for name in ("a" * 5000, "a\0b", "~no-such-user/x"):
        assert not is_there(name)
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_text(name)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    full = "[Errno 28] No space left on device"
    errors = [
        OSError(28, "No space left on device"),
        shutil.Error([("a", "b", full), ("c", "d", full)]),
        SafetensorError(f"Error while serializing: I/O error: {full}"),
    ]
    for error in errors:
        with pytest.raises(OutputError, match=r"cannot be written: .*No space left on device"), writing(tmp_path / "x"):
            raise error
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("another fault stays what it is")
