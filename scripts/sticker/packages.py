"""The pinned npm packages of the artwork: which they are, and reading them without writing to disk."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_MEMBER_BYTES = 256 * 1024 * 1024  # several times the largest member that is read


class BuildError(RuntimeError):
    """The data set cannot be built; the message is one line for the user."""


@dataclass(frozen=True)
class Package:
    """One pinned npm package; `integrity` is npm's own checksum, base64 of the SHA-512 of the tarball."""

    name: str
    version: str
    integrity: str

    @property
    def spec(self) -> str:
        """Name and version, as npm writes them."""
        return f"{self.name}@{self.version}"

    @property
    def filename(self) -> str:
        """Of the tarball that `npm pack` writes."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """One style of artwork: where it comes from, under which licence, and the word that names it in captions."""

    package: Package
    licence: str
    author: str
    word: str


STYLES: dict[str, Style] = {
    "noto": Style(
        Package(
            "@iconify-json/noto",
            "1.2.9",
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        ),
        "Apache-2.0",
        "Google Inc",
        "noto",
    ),
    "gradient": Style(
        Package(
            "@iconify-json/fluent-emoji",
            "1.2.7",
            "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        ),
        "MIT",
        "Microsoft Corporation",
        "gradient",
    ),
    "flat": Style(
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        ),
        "MIT",
        "Microsoft Corporation",
        "flat",
    ),
    "3d": Style(
        Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        ),
        "MIT",
        "Microsoft Corporation / LobeHub",
        "3d",
    ),
    "twemoji": Style(
        Package(
            "@iconify-json/twemoji",
            "1.2.5",
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        ),
        "CC-BY-4.0",
        "Twitter / jdecked",
        "twemoji",
    ),
    "blob": Style(
        Package(
            "@iconify-json/noto-v1",
            "1.2.5",
            "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        ),
        "Apache-2.0",
        "Google Inc",
        "blob",
    ),
    "emojitwo": Style(
        Package(
            "@iconify-json/emojione",
            "1.2.3",
            "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        ),
        "CC-BY-4.0",
        "EmojiTwo (Emoji One)",
        "emojitwo",
    ),
}
NAMES = Package(  # MIT: names, keywords and groups of all concepts
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


def sha512(path: Path) -> str:
    """Base64 SHA-512 of a file, as npm writes it."""
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def fetch(package: Package, cache: Path) -> Path:
    """Tarball of a pinned package, from the cache or through `npm pack`; its checksum is verified either way."""
    path = cache / package.filename
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise BuildError(f"npm is not on the PATH; install Node.js, or put {package.filename} into {cache}")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [npm, "pack", package.spec, "--pack-destination", folder, "--silent"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            fresh = Path(folder) / package.filename
            if done.returncode or not fresh.exists():
                reason = (done.stderr or done.stdout).strip().splitlines()
                raise BuildError(f"npm pack {package.spec} failed: {reason[0] if reason else 'no output'}")
            fresh.replace(path)
    if sha512(path) != package.integrity:
        raise BuildError(f"{path} does not have the pinned checksum of {package.spec}; delete it and run again")
    return path


def members(tarball: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the regular files of a tarball whose name ends in `suffix`; nothing is written to disk."""
    try:
        with tarfile.open(tarball) as archive:
            for member in archive:
                if not member.isfile() or not member.name.endswith(suffix):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise BuildError(f"{tarball.name}: {member.name} is larger than {MAX_MEMBER_BYTES >> 20} MiB")
                content = archive.extractfile(member)
                if content is not None:
                    yield member.name, content.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise BuildError(f"{tarball} is not a readable npm package: {error}") from error


def read_json(tarball: Path, path: str) -> Any:
    """One JSON file of an npm package; `path` is relative to the package's root."""
    for name, content in members(tarball, "/" + path):
        if name == "package/" + path:
            try:
                return json.loads(content)
            except ValueError as error:
                raise BuildError(f"{tarball.name}: {path} is not JSON: {error}") from error
    raise BuildError(f"{tarball.name} has no {path}")
