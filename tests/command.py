"""The command line, called in this process."""

from __future__ import annotations

from typing import Any

import pytest

from diffusion_accel.cli import main as cli


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `diffusion-accel ARGUMENTS`."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(a) for a in arguments])
    out = capsys.readouterr()
    return int(exit_.value.code or 0), out.out, out.err
