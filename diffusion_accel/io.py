"""Files and texts from outside: the one place that reads text, JSON and TOML, makes text fit for a terminal, and
writes files that are either complete or not there."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import interrupts
from .errors import AccelerationError, ConfigurationError, OutputError

TEXT_LIMIT = 64 * 2**20  # bytes of a text file
DEPTH_LIMIT = 64  # of lists and objects within each other
DIGITS_LIMIT = 40  # of a whole number

_BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_LINE_END = re.compile(r"\r\n|\n|\r")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
# what moves the cursor, switches a terminal's modes, reverses the direction of reading or ends a line
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


# ---------------------------------------------------------------------- reading
def at_home(path: Path | str) -> Path:
    """The path; a leading ~ is the home folder, or stays where there is none of that user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder() -> Path | None:
    """The folder in which this toolkit keeps what it can make again, of this user; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not base and sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "")
    if not base:
        base = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    try:
        return Path(base).expanduser() / "diffusion-accel"
    except RuntimeError:
        return None


def cache_place(variable: str, name: str) -> Path | None:
    """A file or folder of this project's in the user's cache folder, or where an environment variable says.

    Args:
        variable: whose value is another place, or "off".
        name: in the cache folder.

    Returns:
        Where it is, which need not exist; None where nothing is to be kept.
    """
    given = os.environ.get(variable, "")
    if given:
        return None if given == "off" else Path(given).expanduser()
    folder = cache_folder()
    return None if folder is None else folder / name


def is_there(path: Path | str, kind: str = "any") -> bool:
    """Whether there is something (or a "file", a "dir") of this name; False for a text that cannot be a name."""
    test = {"any": Path.exists, "file": Path.is_file, "dir": Path.is_dir}[kind]
    try:
        return test(at_home(path))
    except (OSError, ValueError):  # too long, a null byte
        return False


def read_bytes(
    path: Path | str,
    what: str = "",
    *,
    limit: int = TEXT_LIMIT,
    error: type[AccelerationError] = ConfigurationError,
) -> bytes:
    """The bytes of a regular file.

    Args:
        path: the file; a leading ~ is the home folder.
        what: what the file is, the first words of an error, for example "the configuration" or "the plan".
        limit: the most bytes it may have.
        error: what is raised.

    Raises:
        AccelerationError (of the kind `error`): there is no such file, it is no regular file (a folder, a pipe, a
            device), it is too large, or it may not be read.
    """
    file = at_home(path)
    name = " ".join(filter(None, (what, str(path))))
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise error(f"{name} cannot be read: it is {kind}")
        if status.st_size > limit:
            raise error(f"{name} cannot be read: it has {status.st_size} bytes, at most {limit} are allowed")
        return file.read_bytes()
    except AccelerationError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a null byte in the path
        raise error(f"{name} cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem


def decode_text(data: bytes, name: str, *, error: type[AccelerationError] = ConfigurationError) -> str:
    """Bytes as text: UTF-8, or UTF-16 that begins with a byte order mark; the mark is no part of the text."""
    encoding = next((encoding for mark, encoding in _BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as problem:
        raise error(f"{name} cannot be read: it is not {encoding.removesuffix('-sig').upper()} text") from problem


def read_text(
    path: Path | str,
    what: str = "",
    *,
    limit: int = TEXT_LIMIT,
    error: type[AccelerationError] = ConfigurationError,
) -> str:
    """The text of a regular file; see `read_bytes` and `decode_text`."""
    name = " ".join(filter(None, (what, str(path))))
    return decode_text(read_bytes(path, what, limit=limit, error=error), name, error=error)


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, which end with \n, \r\n or \r; other separators (U+2028, form feeds) stay within a line."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines and not lines[-1] else lines


def parse_json(
    text: str,
    where: str,
    *,
    error: type[AccelerationError] = ConfigurationError,
    nonfinite: bool = False,
) -> Any:
    """The value of a JSON text.

    Args:
        text: the JSON.
        where: what it is, the first words of an error.
        error: what is raised.
        nonfinite: let NaN and Infinity pass, for files of others.

    Raises:
        AccelerationError (of the kind `error`): it is not JSON, its lists and objects lie more than `DEPTH_LIMIT` deep
            in each other, or a number is not finite or has more than `DIGITS_LIMIT` digits.
    """

    def constant(name: str) -> float:
        if nonfinite:
            return float(name)
        raise ValueError(f"{name} is not a number that can be used")

    def decimal(digits: str) -> float:
        value = float(digits)
        if not nonfinite and not math.isfinite(value):
            raise ValueError(f"the number {digits[:20]} is too large")
        return value

    def whole(digits: str) -> int:
        if len(digits) > DIGITS_LIMIT:
            raise ValueError(f"a number has {len(digits)} digits")
        return int(digits)

    try:
        _check_depth(text)
        return json.loads(text, parse_constant=constant, parse_float=decimal, parse_int=whole)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where} is not valid JSON: {first_line(problem)}") from problem


def read_json(
    path: Path | str,
    what: str = "",
    *,
    limit: int = TEXT_LIMIT,
    error: type[AccelerationError] = ConfigurationError,
    nonfinite: bool = False,
) -> Any:
    """The value in a JSON file; see `read_bytes` and `parse_json`."""
    name = " ".join(filter(None, (what, str(path))))
    return parse_json(read_text(path, what, limit=limit, error=error), name, error=error, nonfinite=nonfinite)


def read_toml(
    path: Path | str, what: str = "", *, limit: int = 2**20, error: type[AccelerationError] = ConfigurationError
) -> dict[str, Any]:
    """The table in a TOML file, under the same limits as JSON; see `read_bytes` and `parse_json`."""
    name = " ".join(filter(None, (what, str(path))))
    text = read_text(path, what, limit=limit, error=error)
    try:
        _check_depth(text)
        values = tomllib.loads(text.replace("\r\n", "\n"))
        _check_numbers(values)
    except (ValueError, RecursionError) as problem:
        raise error(f"{name} is not valid TOML: {first_line(problem)}") from problem
    return values


def _check_depth(text: str) -> None:
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        sign = match[0]
        depth += sign in "[{"
        depth -= sign in "]}"
        deepest = max(deepest, depth)
    if deepest > DEPTH_LIMIT:
        raise ValueError(f"lists and tables lie {deepest} deep in each other, at most {DEPTH_LIMIT} are allowed")


def _check_numbers(value: Any, depth: int = 0) -> None:
    if depth > DEPTH_LIMIT:
        raise ValueError(f"tables lie more than {DEPTH_LIMIT} deep in each other")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            _check_numbers(inner, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a number that can be used")
    elif type(value) is int and abs(value) >= 10**DIGITS_LIMIT:
        raise ValueError(f"a number has more than {DIGITS_LIMIT} digits")


# ---------------------------------------------------------------------- showing
def printable(text: Any, *, lines: bool = False) -> str:
    r"""A text from outside as it may be shown on a terminal: what is no visible character appears as \x1b or \u202e.

    Control characters could move the cursor, change a title or fill the clipboard; direction marks could show a text
    as another one. Letters of all scripts and emoji stay.

    Args:
        text: anything; `str` of it is shown.
        lines: keep line ends and tabs.
    """

    def escaped(match: re.Match[str]) -> str:
        sign = match[0]
        if lines and sign in "\n\t":
            return sign
        code = ord(sign)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escaped, str(text))


def shown(value: Any, limit: int = 80) -> str:
    """A value in an error message: as Python writes it, on one line, cut where it is long."""
    if type(value) is int and value.bit_length() > 200:  # Python refuses to write out very long ones
        return f"a number of about {int(value.bit_length() * 0.30103) + 1} digits"
    try:
        text = repr(value[: limit + 1] if isinstance(value, str) else value)
    except (ValueError, RecursionError):  # such a number, or very deep, inside of it
        return f"a {type(value).__name__}"
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def plain(value: Any, limit: int = 80) -> str:
    """The same within a sentence: a text has no quotes."""
    if not isinstance(value, str):
        return shown(value, limit)
    text = printable(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def first_line(error: BaseException | str, limit: int = 300) -> str:
    """The first line of an error's message that says something, at most `limit` characters long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ("" if isinstance(error, str) else type(error).__name__)
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---------------------------------------------------------------------- writing
@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Around what writes files: a full disk and its like are one line, whoever notices them.

    Raises:
        OutputError: in place of an OSError, of the list that shutil makes of several, or of safetensors' own error.
    """
    try:
        yield
    except AccelerationError:
        raise
    except Exception as problem:
        if not isinstance(problem, OSError) and type(problem).__name__ != "SafetensorError":
            raise
        reason: Any = getattr(problem, "strerror", None) or problem
        while isinstance(reason, BaseException) and reason.args and isinstance(reason.args[0], list):
            reason = str(reason.args[0][0][-1])  # shutil.Error: a list of (from, to, why)
        raise OutputError(f"{what} cannot be written: {first_line(str(reason))}") from problem


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed to `path` at the end, removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with interrupts.unfinished(temporary):
        yield temporary
        interrupts.finish(temporary, path)
