"""What is written into an image, and reading it back: ours exactly, and the settings that other tools write.

Every kind of file holds two things: the `parameters` text in the form of AUTOMATIC1111's web UI, which many tools read,
and our own JSON. PNG has a text chunk for each. WebP and JPEG have EXIF: the text as UserComment, both as MakerNote.
A GIF has both in its comment. EXIF of a JPEG ends at 64 KiB; where that is too short, both go into comment segments,
and EXIF keeps as much of the text as fits.
"""

from __future__ import annotations

import json
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion_accel.errors import AccelerationError, OutputError
from diffusion_accel.io import at_home, is_there, parse_json

CHUNK = "diffusion_accel"
_USER_COMMENT, _MAKER_NOTE, _EXIF_IFD = 0x9286, 0x927C, 0x8769
_MARK = b"diffusion_accel\0"
_EXIF_LIMIT = 65_000  # bytes of a JPEG's EXIF that we use, of 65,533
_SEGMENT = 65_000  # bytes of a comment segment that we use
_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt: "


# ------------------------------------------------------------------------------------------- the text
def parameters_text(prompt: str, negative: str | None, pairs: dict[str, Any]) -> str:
    """The text that other tools read: the prompt, the negative prompt, and a line of `pairs` that are not None."""
    lines = [prompt]
    if negative:
        lines.append(_NEGATIVE + negative)
    lines.append(", ".join(f"{k}: {_quoted(v)}" for k, v in pairs.items() if v is not None))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    """A value of the settings line: as a JSON string where it holds what the line is cut at, as the web UI does."""
    text = str(value)
    plain = text == text.strip() and not re.search(r'[,:"\\\x00-\x1f]', text) and text
    return text if plain else json.dumps(text, ensure_ascii=False)


def parse_parameters(text: str) -> tuple[str, str | None, dict[str, str]]:
    """The inverse of `parameters_text`, also for the text of other tools: prompt, negative prompt, settings."""
    *lines, last = text.split("\n")
    found = _PAIR.findall(last)
    if (not lines and not last.startswith("Steps: ")) or not found:
        lines, found = [*lines, last], []
    start = next((n for n, line in enumerate(lines) if line.startswith(_NEGATIVE.strip())), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE.strip()).removeprefix(" ") if lines[start:] else None
    return "\n".join(lines[:start]), negative, {key: _unquoted(value) for key, value in found}


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        try:
            return str(json.loads(text))
        except ValueError:
            return text
    return text


def names_only(value: Any) -> Any:
    """JSON values in which the path of a local file or folder is its name; prompts stay as they are."""
    if isinstance(value, dict):
        return {k: v if k in ("prompt", "negative_prompt") else names_only(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [names_only(v) for v in value]
    return _name(value) if isinstance(value, str) else value


def whole_path(text: str) -> str:
    """What names a local file or folder, maybe between a prefix and a scale or member (tuned:FILE:NAME), with its whole
    path; other texts stay as they are."""
    before = "tuned:" if text.startswith("tuned:") else ""
    name = text.removeprefix(before)
    for path in (name, name.rpartition(":")[0]):
        if path and is_there(path):
            return f"{before}{at_home(path).absolute()}{name[len(path) :]}"
    return text


def _name(text: str) -> str:
    kind, colon, rest = text.partition(":")  # tuned:FILE
    if colon and kind.isalpha() and not rest.startswith("//"):
        return f"{kind}:{_name(rest)}"
    path, colon, scale = text.rpartition(":")  # a LoRA may have a scale behind it
    if not colon or "/" in scale:
        path, colon, scale = text, "", ""
    local = text.startswith(("/", "./", "../", "~")) or ("/" in path and (is_there(path) or is_there(text)))
    return f"{Path(path).name}{colon}{scale}" if local and Path(path).name else text


# ------------------------------------------------------------------------------------------- writing
def save_options(kind: str, text: str, data: dict[str, Any]) -> dict[str, Any]:
    """What Pillow's `save` needs to write `text` and `data` into a file of `kind` ("PNG", "WEBP", "JPEG" or "GIF")."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files may be no Unicode
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("parameters", text)
        info.add_itxt(CHUNK, json.dumps(data))
        return {"pnginfo": info}
    whole = _MARK + json.dumps({"parameters": text, CHUNK: data}).encode("ascii")
    if kind == "GIF":
        return {"comment": whole}
    exif = _exif(text, whole)
    if kind != "JPEG" or len(exif) <= _EXIF_LIMIT:
        return {"exif": exif}
    parts = [_MARK + whole[start : start + _SEGMENT] for start in range(len(_MARK), len(whole), _SEGMENT)]
    segments = b"".join(b"\xff\xfe" + (len(part) + 2).to_bytes(2, "big") + part for part in parts)
    return {"exif": _exif(_shortened(text, _EXIF_LIMIT // 2 - 500)), "extra": segments}


def _exif(text: str, whole: bytes | None = None) -> bytes:
    exif = Image.Exif()
    values = exif.get_ifd(_EXIF_IFD)
    values[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    if whole is not None:
        values[_MAKER_NOTE] = whole
    return exif.tobytes()


def _shortened(text: str, units: int) -> str:
    """`text` with fewer than `units` UTF-16 units: the prompt is cut, the line of settings stays if there is room."""
    if len(text.encode("utf-16-be")) // 2 < units:
        return text
    _, _, last = text.rpartition("\n")
    last = "" if len(last) > units // 4 else f"\n{last}"
    kept = text.encode("utf-16-be")[: 2 * (units - 2 * len(last) - 2)].decode("utf-16-be", "ignore")
    return f"{kept}…{last}"


# ------------------------------------------------------------------------------------------- reading
def read_embedded(image: Image.Image, file: str) -> tuple[str | None, dict[str, Any] | None]:
    """The `parameters` text and our JSON of a loaded image; None for what is not there.

    Raises:
        OutputError: our JSON is there and damaged.
    """
    segments = b"".join(
        part.removeprefix(_MARK)
        for name, part in getattr(image, "applist", [])
        if name == "COM" and part.startswith(_MARK)
    )
    comment, note, order = _exif_values(image)
    if not segments and isinstance(note, bytes) and note.startswith(_MARK):
        segments = note.removeprefix(_MARK)
    remark = image.info.get("comment") if image.format == "GIF" else None
    if isinstance(remark, bytes) and remark.startswith(_MARK):
        segments = remark.removeprefix(_MARK)
    if segments:
        return _both(segments.decode("utf-8", "replace"), file)
    texts = {k: str(v) for k, v in getattr(image, "text", {}).items()}
    if "parameters" in texts or CHUNK in texts:
        return texts.get("parameters"), _ours(texts[CHUNK], file) if CHUNK in texts else None
    written = user_comment(comment, order)
    if written is not None and written.startswith("{") and f'"{CHUNK}"' in written:  # as older versions wrote both
        return _both(written, file)
    return written, None


def _exif_values(image: Image.Image) -> tuple[Any, Any, str]:
    """UserComment, MakerNote and the byte order; None where EXIF is missing or broken."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif = image.getexif()
            values = exif.get_ifd(_EXIF_IFD)
        except Exception:  # Pillow raises many kinds for broken EXIF
            return None, None, "be"
    return values.get(_USER_COMMENT), values.get(_MAKER_NOTE), "le" if exif.endian == "<" else "be"


def _both(text: str, file: str) -> tuple[str | None, dict[str, Any] | None]:
    values = _ours(text, file)
    parameters, data = values.get("parameters"), values.get(CHUNK)
    if not isinstance(parameters, (str, type(None))) or not isinstance(data, (dict, type(None))):
        raise OutputError(f"the metadata of {file} is damaged")
    return parameters, data


def _ours(text: str, file: str) -> dict[str, Any]:
    try:
        values = parse_json(text, f"the metadata of {file}")
    except AccelerationError as error:
        raise OutputError(f"the metadata of {file} is damaged") from error
    if not isinstance(values, dict):
        raise OutputError(f"the metadata of {file} is damaged")
    return values


def user_comment(value: Any, order: str = "be") -> str | None:
    """The text of EXIF's UserComment: UTF-16 of either byte order, ASCII, JIS, or without a word about its encoding.

    Args:
        value: what Pillow found there: bytes, or a text where a tool gave the tag that type.
        order: the byte order of the EXIF, "be" or "le"; decides where the text itself does not.
    """
    if isinstance(value, str):
        value = value.encode("latin-1", "replace")
    if not isinstance(value, bytes) or not value.strip(b"\0 "):
        return None
    head, body = value[:8], value[8:]
    if head == b"UNICODE\0":
        return _utf16(body, order).strip("\0") or None
    encodings = {b"ASCII\0\0\0": ["utf-8"], b"JIS\0\0\0\0\0": ["iso2022_jp"], b"\0" * 8: ["utf-8"]}
    if head in encodings:
        value = body
    for encoding in encodings.get(head, ["utf-8"]):
        try:
            return value.decode(encoding).strip("\0") or None
        except UnicodeDecodeError:
            continue
    return value.decode("latin-1").strip("\0") or None


def _utf16(body: bytes, order: str) -> str:
    """Text whose byte order nobody can rely on: that of the mark in front, otherwise the one with more ASCII in it.
    What has no zero byte and is UTF-8 is taken for that."""
    whole, body = body, body[: len(body) // 2 * 2]
    for mark, name in ((b"\xff\xfe", "le"), (b"\xfe\xff", "be")):
        if body.startswith(mark):
            return body[2:].decode(f"utf-16-{name}", "replace")
    high, low = body[::2], body[1::2]
    if 0 not in body:  # settings in UTF-16 have ASCII in them: this is what some programs call Unicode
        with suppress(UnicodeDecodeError):
            return whole.decode("utf-8")
    ascii_be = sum(not a and 0 < b < 128 for a, b in zip(high, low, strict=True))
    ascii_le = sum(not b and 0 < a < 128 for a, b in zip(high, low, strict=True))
    if ascii_be != ascii_le:
        order = "be" if ascii_be > ascii_le else "le"
    return body.decode(f"utf-16-{order}", "replace")
