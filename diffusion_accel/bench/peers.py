"""Other accelerators by name, with their settings. Each is an optional dependency, or a part of diffusers itself.

A new one is an entry of `PEERS` and a function of its name in the module that the entry names. Importing this imports
no torch: the command line asks what there is before anything is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .runner import Runner

Call = Callable[..., Any]
Settings = Mapping[str, Any]  # by name: a number or a word


@dataclass(frozen=True)
class Number:
    """A setting that is a number: its usual value, the range it may be in, and whether it is a whole one."""

    usual: float
    least: float = 1
    most: float = 9999
    whole: bool = True

    def read(self, text: str) -> float | None:
        """The number that a text is; None if it is none in the range."""
        if not re.fullmatch(r"-?[0-9]{1,4}(\.[0-9]{1,9})?", text):
            return None
        number = int(text) if text.lstrip("-").isdigit() else float(text)
        right = self.least <= number <= self.most and (not self.whole or number == int(number))
        return number if right else None

    def __str__(self) -> str:
        return f"{'a whole number' if self.whole else 'a number'} from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Word:
    """A setting that is one of some words, the usual one first."""

    words: tuple[str, ...]

    @property
    def usual(self) -> str:
        """The usual word."""
        return self.words[0]

    def read(self, text: str) -> str | None:
        """The word itself; None if it is none of them."""
        return text if text in self.words else None

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


def _share(usual: float) -> Number:
    return Number(usual, 0, 1, whole=False)


def _threshold(usual: float) -> Number:
    return Number(usual, 0, 100, whole=False)


@dataclass(frozen=True)
class Peer:
    """Another accelerator.

    Attributes:
        runtime: the module of this package with a function of its name: it is given the settings and a `Runner`,
            switches it on for good and returns what is called instead of the pipeline; and with `unfit`.
        settings: what can be set, by name, in the order in which values without a name are taken.
        package: what has to be installed, by the name that is imported; "": it is diffusers' own.
        install: what pip calls that; "": the same.
        by_image: it decides by what it sees which steps are computed, so each image is a call of its own.
        apart: it needs an environment of its own, whose interpreter `INTERPRETER` names; `runtime` runs there.
    """

    runtime: str
    settings: Mapping[str, Number | Word]
    package: str = ""
    install: str = ""
    by_image: bool = False
    apart: bool = False


INTERPRETER = "DIFFUSION_ACCEL_PEER_PYTHON"  # environment variable; without it: the one that runs this

#: by the kind of their entries
PEERS: dict[str, Peer] = {
    "deepcache": Peer("unet_peers", {"interval": Number(3), "branch": Number(0, 0)}, "DeepCache"),
    "tomesd": Peer("unet_peers", {"ratio": _share(0.5)}, "tomesd"),
    "tgate": Peer("unet_peers", {"step": Number(10)}, "tgate"),
    "pab": Peer("cache_peers", {"range": Number(2)}),
    "first-block": Peer("cache_peers", {"threshold": _threshold(0.05)}, by_image=True),
    "taylorseer": Peer(
        "cache_peers",
        {
            "interval": Number(5),
            "order": Number(1, 0, 4),
            "warmup": Number(3),
            "parts": Word(("blocks", "attention", "lite")),
        },
    ),
    "mag": Peer("cache_peers", {"threshold": _threshold(0.06), "skips": Number(3, 0), "retention": _share(0.2)}),
    "sea": Peer(
        "cache_peers", {"threshold": _threshold(0.25), "order": Number(1, 0, 1), "skips": Number(2, 0)}, by_image=True
    ),
    "faster-cache": Peer("cache_peers", {"range": Number(2), "unconditional": Number(5)}),
    "dbcache": Peer(
        "cache_dit_peer",
        {
            "threshold": _threshold(0.08),
            "first": Number(1),
            "last": Number(0, 0),
            "warmup": Number(8, 0),
            "skips": Number(-1, -1),
            "order": Number(0, 0, 4),
        },
        "cache_dit",
        "cache-dit",
        by_image=True,
    ),
    "optimum-intel": Peer(
        "optimum_intel",
        {"precision": Word(("float32", "bfloat16"))},
        "optimum.intel",
        "'optimum-intel[openvino]'",
        apart=True,
    ),
}


def read_settings(kind: str, text: str) -> dict[str, Any]:
    """A peer's settings, the usual ones where none are given: `VALUE,...,NAME=VALUE,...`, such as "3,order=2".

    Raises:
        ConfigurationError: it has no such setting, or that value is not allowed.
    """
    known = PEERS[kind].settings
    names, found = list(known), {name: setting.usual for name, setting in known.items()}
    parts = text.split(",") if text else []
    if len(parts) > len(names):
        raise ConfigurationError(f"{kind} takes at most {len(names)} settings ({', '.join(names)}), got {shown(text)}")
    given: set[str] = set()
    for place, part in enumerate(parts):
        name, named, value = part.rpartition("=")
        name = name if named else names[place]
        if name not in known or name in given or (not named and place != len(given)):
            raise ConfigurationError(
                f"{kind} takes {','.join(f'{n}=' for n in names)} each once, values without a name first and in this "
                f"order; got {shown(text)}"
            )
        read = known[name].read(value)
        if read is None:
            raise ConfigurationError(f"{name} of {kind} must be {known[name]}, got {shown(value)}")
        given.add(name)
        found[name] = read
    return found


def missing_package(kind: str) -> str | None:
    """That a peer's package is not installed where the peer runs; None if it is."""
    peer = PEERS[kind]
    name = peer.install or peer.package
    if not peer.apart:
        missing = bool(peer.package) and importlib.util.find_spec(peer.package) is None
        return f"the package {peer.package} is not installed (pip install {name})" if missing else None
    look = f"import importlib.util as u; exit(not u.find_spec({peer.package!r}))"
    try:
        found = subprocess.run([_interpreter(), "-c", look], capture_output=True, check=False)
    except OSError:
        return f"{INTERPRETER} is {shown(_interpreter())}, which cannot be run"
    if found.returncode == 0:
        return None
    return (
        f"{peer.package} is not installed for {_interpreter()}; pip install {name} in an environment of its own, and "
        f"set {INTERPRETER} to the python there"
    )


def command_of(kind: str) -> list[str]:
    """How the process of a peer is started."""
    if PEERS[kind].apart:
        return [_interpreter(), str(Path(__file__).with_name("lines.py")), PEERS[kind].runtime]
    return [sys.executable, "-m", f"{__package__}.worker"]


def _interpreter() -> str:
    return os.environ.get(INTERPRETER) or sys.executable


def unfit(kind: str, pipe: DiffusionPipeline) -> str | None:
    """Why a peer cannot work on a pipeline, as far as that is known without its package; None if it can."""
    return _runtime(kind).unfit(kind, pipe)


def switch_on(kind: str, settings: Settings, runner: Runner) -> Call:
    """Switch a peer on for good.

    Returns:
        What is called instead of the pipeline.
    """
    return getattr(_runtime(kind), kind.replace("-", "_"))(settings, runner)


def _runtime(kind: str) -> Any:
    return importlib.import_module(f".{PEERS[kind].runtime}", __package__)
