"""Ways to break a file. Every mutant is a function of a `random.Random`."""

from __future__ import annotations

import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rng = random.Random
NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, -7, 255, 2**31, 2**63, -(2**63), 10**7, 10**22, 10**39, 10**400, 0.0, -0.5, 1e-300, 1e308),
    *(float("nan"), float("inf"), float("-inf"), 0.1, 999.0),
)
TEXTS = ("", " ", "x" * 5000, "\x1b]52;c;eA==\x07", "\u202eabc", "a\nb\r\nc", "../../x", "/etc/passwd", "\0", "😀" * 50)
TEXTS += ("nan", "1e999", "[bold]x[/bold]", "{}", "%s%n", "\ud800", "__class__", "..", "C:\\x", "\u2028")
DEEP = 2000


def number(rng: Rng) -> Any:
    return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.uniform(-1000, 1000)


def odd(rng: Rng) -> Any:
    """A value that nobody expects."""
    kind = rng.randrange(8)
    if kind < 3:
        return number(rng)
    if kind < 5:
        return rng.choice(TEXTS)
    return rng.choice([None, True, False, [], {}, [[]], {"a": 1}, [None], ["x"], [1, 2, 3]])


# ---------------------------------------------------------------------- bytes
def bytes_mutant(data: bytes, rng: Rng, others: list[bytes]) -> bytes:
    """Flipped bits, cut, doubled, spliced or overwritten ranges."""
    if not data:
        return rng.randbytes(rng.randrange(64))
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.5 else rng.randrange(min(len(found), 300) + 1)
        end = min(len(found), at + rng.choice((1, 4, 50, 1000)))
        kind = rng.randrange(8)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at:]
        elif kind == 2:
            del found[at:end]
        elif kind == 3:
            found[at:at] = found[at:end]
        elif kind == 4:
            other = rng.choice(others) if others else data
            start = rng.randrange(len(other) + 1)
            found[at:end] = other[start : start + end - at]
        elif kind == 5:
            found[at:at] = rng.randbytes(rng.choice((1, 8, 200)))
        elif kind == 6:
            found[at:end] = bytes(end - at)
        else:
            found[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(found)


def text_mutant(data: bytes, rng: Rng, others: list[bytes]) -> bytes:
    """Numbers, words and lines of a text replaced; byte order marks, other encodings, brackets without end."""
    text = data.decode("utf-8", "replace")
    kind = rng.randrange(6)
    spots = list(re.finditer(r"-?\d+(?:\.\d+)?", text)) if kind < 2 else list(re.finditer(r"\w+", text))
    if kind < 4 and spots:
        spot = rng.choice(spots)
        new = str(number(rng)) if kind < 2 else rng.choice((*TEXTS, str(number(rng)), '"', "=", "[", "{}", "#"))
        return (text[: spot.start()] + new + text[spot.end() :]).encode("utf-8", "surrogatepass")
    if kind == 4:
        lines = text.splitlines(keepends=True) or [""]
        at = rng.randrange(len(lines))
        lines[at : at + 1] = rng.choice(
            ([], [lines[at]] * 2, [rng.choice(TEXTS)], ["[" * DEEP], ['{"a":' * DEEP + "\n"])
        )
        return "".join(lines).encode("utf-8", "surrogatepass")
    how = rng.choice(("utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1"))
    return text.encode(how, "replace")


# ---------------------------------------------------------------------- JSON
def json_value_mutant(value: Any, rng: Rng) -> str:
    """JSON text of a value with one place changed."""
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], (dict, list)):
                walk(part[key])

    value = json.loads(json.dumps(value))
    if isinstance(value, (dict, list)):
        walk(value)
    if not places:
        return json.dumps(odd(rng))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        owner, key = rng.choice(places)
        kind = rng.randrange(8)
        try:
            if kind == 0:
                del owner[key]
            elif kind == 1 and isinstance(owner, dict):
                owner[rng.choice(TEXTS) + str(key)] = owner.pop(key)
            elif kind == 2:
                owner[key] = [owner[key]]
            elif kind == 3:
                other, there = rng.choice(places)
                owner[key] = json.loads(json.dumps(other[there]))
            elif kind == 4 and isinstance(owner[key], (int, float)):
                owner[key] = rng.choice((owner[key] + 1, -owner[key], owner[key] * 2, str(owner[key]), number(rng)))
            elif kind == 5 and isinstance(owner, dict):
                return json.dumps(value)[:-1] + f", {json.dumps(key)}: {_dump(odd(rng))}}}"  # twice, at the top
            elif kind == 6:
                owner[key] = "@DEEP@"
            else:
                owner[key] = odd(rng)
        except (KeyError, IndexError, TypeError):
            continue
    return _dump(value).replace('"@DEEP@"', "[" * DEEP + "]" * DEEP)


def _dump(value: Any) -> str:
    """JSON with numbers of any length."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {k: plain(v) for k, v in part.items()}
        if isinstance(part, list):
            return [plain(v) for v in part]
        return "@HUGE@" if type(part) is int and abs(part) > 10**100 else part

    return json.dumps(plain(value)).replace('"@HUGE@"', "9" * 401)


def json_mutant(data: bytes, rng: Rng, others: list[bytes]) -> bytes:
    try:
        return json_value_mutant(json.loads(data), rng).encode()
    except ValueError:
        return text_mutant(data, rng, others)


def json_lines_mutant(data: bytes, rng: Rng, others: list[bytes]) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = json_mutant(lines[at], rng, others)
    return b"\n".join(lines)


# ---------------------------------------------------------------------- safetensors
_FLOATS = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_ODD_FLOATS = {"F32": "<f", "F64": "<d", "F16": "<e"}


def safetensors_mutant(data: bytes, rng: Rng, others: list[bytes]) -> bytes:
    """The header as JSON, a tensor left out or renamed or of another type or shape, values that are no numbers."""
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        body = bytearray(data[8 + length :])
        names = [n for n in header if n != "__metadata__"]
        name = rng.choice(names)
        entry = header[name]
        begin, end = entry["data_offsets"]
    except (struct.error, ValueError, KeyError, IndexError, TypeError):
        return bytes_mutant(data, rng, others)
    kind = rng.randrange(7)
    if kind == 0:
        return _with_header(json_value_mutant(header, rng), bytes(body))
    if kind == 1:  # left out, the rest whole
        del header[name], body[begin:end]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [n - (end - begin) for n in other["data_offsets"]]
    elif kind == 2:
        header[rng.choice((name + "x", rng.choice(TEXTS), name[1:]))] = header.pop(name)
    elif kind == 3:
        entry["dtype"] = rng.choice(("F32", "I32", "U32", "F16", "BF16", "I8", "U8", "BOOL", "F64", "I64", "X"))
    elif kind == 4:
        entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [-1], [0], [2**40], []))
    elif kind == 5:
        swap = header[rng.choice(names)]
        entry["data_offsets"], swap["data_offsets"] = swap["data_offsets"], entry["data_offsets"]
    elif entry["dtype"] in _ODD_FLOATS and end > begin:
        width = _FLOATS[entry["dtype"]]
        value = rng.choice((float("nan"), float("inf"), float("-inf")))
        for at in range(begin, end, width) if rng.random() < 0.3 else [rng.randrange(begin, end, width)]:
            body[at : at + width] = struct.pack(_ODD_FLOATS[entry["dtype"]], value)
    return _with_header(json.dumps(header), bytes(body))


def _with_header(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


# ---------------------------------------------------------------------- files and folders
Mutator = Callable[[bytes, Rng, list[bytes]], bytes]
BY_SUFFIX: dict[str, tuple[Mutator, ...]] = {
    ".json": (json_mutant, json_mutant, json_mutant, text_mutant, bytes_mutant),
    ".jsonl": (json_lines_mutant, json_lines_mutant, text_mutant, bytes_mutant),
    ".toml": (text_mutant, text_mutant, bytes_mutant),
    ".txt": (text_mutant, bytes_mutant),
    ".safetensors": (safetensors_mutant, safetensors_mutant, safetensors_mutant, bytes_mutant),
}


def file_mutant(name: str, data: bytes, rng: Rng, others: list[bytes]) -> bytes:
    """One mutant of a file's bytes, in ways that fit its suffix."""
    return rng.choice(BY_SUFFIX.get(Path(name).suffix, (bytes_mutant,)))(data, rng, others)


def replace_by_another_kind(file: Path, rng: Rng) -> str:
    """In the place of a file: nothing, nothing in it, a folder, a pipe, a device, a link that leads nowhere or out."""
    kind = rng.choice(("missing", "empty", "folder", "pipe", "device", "loop", "outside"))
    file.unlink()
    if kind == "empty":
        file.touch()
    elif kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind != "missing":
        file.symlink_to({"device": "/dev/zero", "loop": file.name, "outside": "/etc/passwd"}[kind])
    return kind
